//go:build unix

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"example.com/leader"
	"example.com/leader/examples/internal/demo"
)

// An event is what a process tells the demonstration, a line of JSON on its standard output: that it
// holds a shard from now on, or no longer.
type event struct {
	Process string
	At      time.Time
	Shard   int
	Token   int64
	Held    bool
}

// A process is an instance of a service that holds its share of the shards.
//
// It waits in the queue of every shard, so that the shards of a process that dies are taken over as
// soon as its lease has expired, and a queue has as many candidates as there are processes. Who holds
// more than an even share gives the rest to the next in line, and queues up again. That next one may
// hold enough itself; it does the same, so that a shard comes to rest after fewer handoffs than
// there are processes.
//
// For that nobody has to assign shards, or to be told who there is. The price is a key in etcd, and
// a watch, for each shard and process, which is fine for hundreds of shards and not for millions; more
// handoffs than an assignment would need, when a process joins; and that a share is counted in shards,
// whatever work they are. All shards of a process are on one lease, and are lost with it together.
type process struct {
	name    string
	shards  int
	elector *leader.Elector

	mu   sync.Mutex
	held map[int]context.CancelCauseFunc // by shard: gives it to the next in line
	out  *json.Encoder
}

// serve is the life of a process, until it is asked to end.
func serve(name string, c config) error {
	asked, stop := demo.Context() // in a service this is signal.NotifyContext
	defer stop()
	client, err := c.client()
	if err != nil {
		return err
	}
	defer client.Close()
	elector, err := leader.New(client, leader.WithTTL(c.ttl), leader.WithPrefix("shards"))
	if err != nil {
		return fmt.Errorf("-ttl %v: %w", c.ttl, err)
	}
	p := &process{name: name, shards: c.shards, elector: elector, held: make(map[int]context.CancelCauseFunc), out: json.NewEncoder(os.Stdout)}

	ctx, fail := context.WithCancelCause(asked)
	defer fail(nil)
	var parts sync.WaitGroup
	for _, shard := range rand.Perm(c.shards) { // processes that start together begin with different ones
		parts.Go(func() { fail(p.take(ctx, shard)) })
	}
	p.balance(ctx)
	parts.Wait()
	if asked.Err() != nil {
		return nil // each shard has been resigned
	}
	return context.Cause(ctx)
}

// election is the name of a shard's election.
func election(shard int) string { return fmt.Sprint(shard) }

// errExcess ends a term that the process has given to the next in line.
var errExcess = errors.New("more than an even share")

// take holds the shard whenever it is this process's turn, until ctx ends or campaigning fails for good.
func (p *process) take(ctx context.Context, shard int) error {
	for {
		err := p.elector.Run(ctx, election(shard), p.name, func(ctx context.Context, l *leader.Leader) error {
			return p.work(ctx, shard, l)
		})
		if !errors.Is(err, errExcess) {
			return err
		}
		// At once: balance, which ended it, takes its time.
	}
}

// work is what a process does with a shard while it holds it.
func (p *process) work(ctx context.Context, shard int, l *leader.Leader) error {
	ctx, release := context.WithCancelCause(ctx)
	defer release(nil)
	p.mu.Lock()
	p.held[shard] = release
	p.mu.Unlock()

	p.report(event{Shard: shard, Token: l.Token(), Held: true})
	<-ctx.Done() // here a service does its work
	p.report(event{Shard: shard, Token: l.Token()})

	p.mu.Lock()
	delete(p.held, shard)
	p.mu.Unlock()
	return context.Cause(ctx)
}

// balance gives shards away while the process holds more than its share.
func (p *process) balance(ctx context.Context) {
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-second.C:
		}
		queue, err := p.elector.Candidates(ctx, election(rand.IntN(p.shards)))
		if err != nil || len(queue) == 0 {
			if err != nil && ctx.Err() == nil {
				slog.Warn("how many processes there are is not known", "process", p.name, "error", err)
			}
			continue
		}
		p.mu.Lock()
		excess := len(p.held) - share(p.shards, len(queue))
		for shard, release := range p.held { // in no order
			if excess <= 0 {
				break
			}
			release(errExcess)
			delete(p.held, shard) // now: its work may take a while to end
			excess--
		}
		p.mu.Unlock()
	}
}

// share is how many shards a process may hold.
func share(shards, processes int) int { return (shards + processes - 1) / processes }

func (p *process) report(e event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e.Process, e.At = p.name, time.Now()
	_ = p.out.Encode(e) // nobody listens any more: the end of standard input says so
}

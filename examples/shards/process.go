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

// An event is what a process reports to the demonstration, as a line of JSON on its standard output: that it holds a
// shard from now on, or that it no longer does.
type event struct {
	Process string
	At      time.Time
	Shard   int
	Token   int64
	Held    bool
}

// A process is an instance of a service that holds its share of the shards.
//
// It campaigns for every shard. So a queue has as many candidates as there are processes, and when a process dies,
// others take over its shards as soon as its lease has expired. A process that holds more than an even share gives the
// excess to the next in line, and queues up again. The next one may hold enough itself; it then does the same. So a
// shard comes to rest after fewer handoffs than there are processes.
//
// Nobody has to assign shards, or to know which processes there are. The price:
//
//   - For each shard and process there is a key in etcd and a watch. That is fine for hundreds of shards, not for
//     millions.
//   - When a process joins, there are more handoffs than an assignment would need.
//   - A share is counted in shards, however much work each is.
//   - All shards of a process are on one lease, and are lost with it together.
type process struct {
	name    string
	shards  int
	elector *leader.Elector

	mu   sync.Mutex
	held map[int]context.CancelCauseFunc // by shard: the function gives it to the next in line
	out  *json.Encoder
}

// serve runs a process until it is asked to end.
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
	// In random order, so that processes that start together begin with different shards.
	for _, shard := range rand.Perm(c.shards) {
		parts.Go(func() { fail(p.take(ctx, shard)) })
	}
	p.balance(ctx)
	parts.Wait()
	if asked.Err() != nil {
		return nil // the process has resigned each shard
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
		// Campaign again without a pause: balance, which ended the term, runs only once a second.
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

// balance gives away shards, once a second, while the process holds more than its share.
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
				slog.Warn("number of processes unknown, shards not balanced", "process", p.name, "error", err)
			}
			continue
		}
		p.mu.Lock()
		excess := len(p.held) - share(p.shards, len(queue))
		for shard, release := range p.held { // in random order
			if excess <= 0 {
				break
			}
			release(errExcess)
			delete(p.held, shard) // at once, because its work may take a while to end
			excess--
		}
		p.mu.Unlock()
	}
}

// share is how many shards a process may hold at most.
func share(shards, processes int) int { return (shards + processes - 1) / processes }

func (p *process) report(e event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e.Process, e.At = p.name, time.Now()
	_ = p.out.Encode(e) // fails when nobody listens any more; the end of standard input shows that
}

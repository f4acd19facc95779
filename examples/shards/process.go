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
	"slices"
	"sync"
	"time"

	"example.com/leader"
	"example.com/leader/examples/internal/demo"
)

// An event is what a process reports to the demonstration, as a line of JSON on its standard output: that it leads a
// shard from now on, or that it has stopped its work.
type event struct {
	Process string
	At      time.Time
	Shard   int
	Token   int64
	Leads   bool
}

// A process is an instance of a service that leads its share of the shards.
//
// It campaigns for every shard. So when a process dies, the others take over its shards as soon as its lease has
// expired. It also campaigns to be the balancer, which transfers shards from processes that lead too many. The queues
// say which processes there are, so nobody has to be told. Only one process decides: if several did, they might choose
// the same receiver at the same time, and move shards to and fro.
//
// The price:
//
//   - For each shard and process there is a key in etcd and a watch, and the balancer reads all queues once a second.
//     That is fine for hundreds of shards, not for millions.
//   - When a process ends, whoever is next in line for a shard takes it over. So a process may get too many shards, and
//     the balancer moves some of them once more.
//   - A share is counted in shards, however much work each is.
//   - All shards of a process are on one lease, and are lost with it together.
type process struct {
	name    string // no other process may have it
	shards  int
	elector *leader.Elector

	mu  sync.Mutex
	out *json.Encoder
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
		return err
	}
	p := &process{name: name, shards: c.shards, elector: elector, out: json.NewEncoder(os.Stdout)}

	ctx, fail := context.WithCancelCause(asked)
	defer fail(nil)
	var parts sync.WaitGroup
	// In random order, so that processes that start together begin with different shards.
	for _, shard := range rand.Perm(c.shards) {
		parts.Go(func() {
			fail(elector.Run(ctx, election(shard), name, func(ctx context.Context, l *leader.Leader) error {
				return p.work(ctx, shard, l)
			}))
		})
	}
	parts.Go(func() { fail(elector.Run(ctx, "balancer", name, p.balance)) })
	parts.Wait()
	if asked.Err() != nil {
		return nil // the process has resigned each shard
	}
	return context.Cause(ctx)
}

// election is the name of a shard's election.
func election(shard int) string { return fmt.Sprint(shard) }

// work is what a process does with a shard while it leads it.
func (p *process) work(ctx context.Context, shard int, l *leader.Leader) error {
	p.report(event{Shard: shard, Token: l.Token(), Leads: true})
	<-ctx.Done() // here a service does its work
	p.report(event{Shard: shard, Token: l.Token()})
	return ctx.Err()
}

func (p *process) report(e event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e.Process, e.At = p.name, time.Now()
	_ = p.out.Encode(e) // fails when nobody listens any more; the end of standard input shows that
}

// balance is what the balancer does. It may wait for Transfer, as the elections that it transfers are not its own.
func (p *process) balance(ctx context.Context, _ *leader.Leader) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
		if err := p.rebalance(ctx); err != nil && ctx.Err() == nil {
			slog.Warn("shards not balanced, trying again", "process", p.name, "error", err)
		}
	}
}

// rebalance transfers shards until no process leads more than its share. If that fails, the next call plans anew.
func (p *process) rebalance(ctx context.Context) error {
	queues := make([][]leader.Candidate, p.shards)
	for shard := range queues {
		var err error
		if queues[shard], err = p.elector.Candidates(ctx, election(shard)); err != nil {
			return err
		}
	}
	var errs []error
	for _, m := range plan(queues) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second) // work that does not stop must not hold up the others
		err := p.elector.Transfer(ctx, election(m.shard), m.to)
		cancel()
		if !errors.Is(err, leader.ErrNotCandidate) { // that is: the receiver has just ended
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// A move is the transfer of a shard.
type move struct {
	shard int
	to    leader.Candidate
}

// plan returns the fewest moves after which no process leads more than its share. queues has the candidates for each
// shard. Each move takes a shard from a process that leads too many, and gives it to the first in line that has room.
func plan(queues [][]leader.Candidate) []move {
	processes := make(map[string]bool)
	leads := make(map[string]int) // number of shards by process
	for _, queue := range queues {
		for i, c := range queue {
			processes[c.Value] = true
			if i == 0 {
				leads[c.Value]++
			}
		}
	}
	most := share(len(queues), len(processes))
	var moves []move
	for shard, queue := range queues {
		if len(queue) == 0 || leads[queue[0].Value] <= most {
			continue
		}
		if i := slices.IndexFunc(queue, func(c leader.Candidate) bool { return leads[c.Value] < most }); i > 0 {
			leads[queue[0].Value]--
			leads[queue[i].Value]++
			moves = append(moves, move{shard, queue[i]})
		}
	}
	return moves
}

// share is how many shards a process may lead at most: an even share, rounded up.
func share(shards, processes int) int {
	processes = max(processes, 1) // none if nobody has joined yet
	return (shards + processes - 1) / processes
}

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// An audience is some observers of one election, all of one contestant and over one client.
type audience struct {
	name    string
	observe func(ctx context.Context, client *clientv3.Client, election string, saw func(token int64)) error

	client *clientv3.Client
	meter  *meter
	took   sample
	reads  []int
}

// observeOurs and observeStock call saw with the token of every leader until ctx ends.
func observeOurs(ctx context.Context, client *clientv3.Client, election string, saw func(token int64)) error {
	e, err := leader.New(client, leader.WithTTL(crowdTTL))
	if err != nil {
		return err
	}
	for c, err := range e.Observe(ctx, election) {
		if err != nil {
			return unless(ctx, err)
		}
		saw(c.Token)
	}
	return nil
}

func observeStock(ctx context.Context, client *clientv3.Client, election string, saw func(token int64)) error {
	lease, err := concurrency.NewSession(client, concurrency.WithLease(1), concurrency.WithContext(ctx)) // no request, and no lease
	if err != nil {
		return err
	}
	for resp := range concurrency.NewElection(lease, election).Observe(ctx) {
		saw(resp.Kvs[0].CreateRevision)
	}
	return nil
}

func measureObservers(ctx context.Context, r *run) (*result, error) {
	res := &result{}
	t := table{
		caption: "Observers of one election, in one process and over one client: time in ms from just before the leader resigns until the last observer has seen its successor, and how many reads the observers send for that.",
		header:  []string{"observers", "contestant", "median (p10 – p90)", "trials", "reads", "× stock"},
	}
	for _, n := range []int{1, 100, 1000}[:r.pick(3, 3, 2)] {
		r.log("observers: %d", n)
		audiences, err := observed(ctx, r, n)
		if err != nil {
			return nil, err
		}
		own, stock := audiences[0], audiences[1]
		for _, a := range audiences {
			t.add(append(append([]string{fmt.Sprint(n), a.name}, a.took.cells()...), fmt.Sprint(medianInt(a.reads)), number(a.took.over(stock.took)))...)
		}
		res.atMost(0, exact(float64(medianInt(own.reads))), "reads of leader, observers: %d", n)
		res.atMost(1, own.took.ratio(stock.took), "leader / stock, observers: %d", n)
	}
	res.tables = []table{t}
	return res, nil
}

// observed makes handoffs in two elections, each with so many observers of one contestant.
func observed(ctx context.Context, r *run, n int) ([]*audience, error) {
	endpoints, err := r.cluster(1)
	if err != nil {
		return nil, err
	}
	defer r.stop()
	candidates, err := r.clients(ctx, 2, endpoints)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var observers sync.WaitGroup
	defer func() { cancel(); observers.Wait() }()

	audiences := []*audience{{name: ours.name, observe: observeOurs}, {name: stock.name, observe: observeStock}}
	sights := make(chan time.Time, 2*n) // every observer sees each leader once
	failed := make(chan error, 2*n)
	terms := make(map[*audience]*candidate)
	for _, a := range audiences {
		a.meter = newMeter()
		if a.client, err = r.client(ctx, endpoints, a.meter.options()...); err != nil {
			return nil, err
		}
		if terms[a], err = ours.lead(ctx, candidates[0], a.name, crowdTTL); err != nil {
			return nil, err
		}
		for range n {
			observers.Go(func() {
				var seen int64 // stock says again who leads when the leader's key is put again
				failed <- a.observe(ctx, a.client, a.name, func(token int64) {
					if token > seen {
						seen = token
						sights <- time.Now()
					}
				})
			})
		}
	}
	// all blocks until so many observers have seen a new leader, and returns when the last one has.
	all := func(n int) (last time.Time, err error) {
		for range n {
			at, err := receive(ctx, "the observers", sights)
			if err != nil {
				return last, errors.Join(err, whatFailed(failed))
			}
			if at.After(last) {
				last = at
			}
		}
		return last, nil
	}
	if _, err := all(2 * n); err != nil {
		return nil, err
	}
	for range r.pick(60, 10, 1) {
		for _, i := range rand.Perm(len(audiences)) {
			a := audiences[i]
			next, err := ours.join(ctx, candidates[1], a.name, crowdTTL)
			if err == nil {
				err = queued(ctx, candidates[1], a.name+"/", 2)
			}
			if err != nil {
				return nil, err
			}
			sleep(ctx, 250*time.Millisecond)
			read, began := a.meter.of("Range"), time.Now()
			if err := terms[a].resign(); err != nil {
				return nil, err
			}
			last, err := all(n)
			if err := errors.Join(err, terms[a].close()); err != nil {
				return nil, err
			}
			a.took = append(a.took, last.Sub(began))
			a.reads = append(a.reads, a.meter.of("Range")-read)
			if _, err := receive(ctx, "the successor", next.won); err != nil {
				return nil, err
			}
			terms[a] = next
		}
	}
	return audiences, nil
}

// whatFailed is the first error that is there, if any.
func whatFailed(failed <-chan error) error {
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"path"
	"time"

	"example.com/leader"
	"github.com/mailgun/holster/v4/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// A contestant is one way to elect on etcd.
type contestant struct {
	name string
	// join makes a candidate, which campaigns from then on. It uses the TTL as far as the contestant
	// can be told one.
	join func(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (*candidate, error)
	// prefix is what the keys of an election's candidates begin with; nil if they have none.
	prefix func(election string) string
}

// A candidate takes part in one election.
type candidate struct {
	won    chan time.Time // gets the moment in which it was elected
	resign func() error   // ends its leadership; called once it has won
	close  func() error   // ends all of it
}

var (
	ours = contestant{"leader", joinOurs, func(election string) string { return election + "/" }}
	// anchored is ours with a lease that outlives the term, as stock's does.
	anchored = contestant{"leader, which leads another election too", joinAnchored, ours.prefix}
	stock    = contestant{"stock", joinStock, func(election string) string { return election + "/" }}
	clientGo = contestant{"client-go", joinClientGo, nil}
	holster  = contestant{"holster", joinHolster, func(election string) string { return path.Join("/elections", election) }}
	// limit is one guarded delete and its watch event at another client: no election on etcd can
	// beat it.
	limit = contestant{"limit", joinLimit, nil}
)

// awaitQueued blocks until so many candidates can be seen in the election.
func (c contestant) awaitQueued(ctx context.Context, client *clientv3.Client, election string, n int) error {
	if c.prefix == nil {
		return nil
	}
	return queued(ctx, client, c.prefix(election), n)
}

// lead returns a candidate that has won.
func (c contestant) lead(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (*candidate, error) {
	cand, err := c.join(ctx, client, election, ttl)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.name, err)
	}
	if _, err := receive(ctx, c.name+" to be elected", cand.won); err != nil {
		return nil, err
	}
	return cand, nil
}

func joinOurs(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (*candidate, error) {
	e, err := leader.New(client, leader.WithTTL(ttl))
	if err != nil {
		return nil, err
	}
	return campaignOurs(ctx, e, election), nil
}

func joinAnchored(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (*candidate, error) {
	e, err := newAnchored(ctx, client, ttl)
	if err != nil {
		return nil, err
	}
	return campaignOurs(ctx, e, election), nil
}

// newAnchored returns an Elector that leads an election of its own, so that its lease is in use.
func newAnchored(ctx context.Context, client *clientv3.Client, ttl time.Duration) (*leader.Elector, error) {
	e, err := leader.New(client, leader.WithTTL(ttl))
	if err != nil {
		return nil, err
	}
	_, err = e.Campaign(ctx, fmt.Sprint("anchor/", rand.Int64()), "")
	return e, err
}

func campaignOurs(ctx context.Context, e *leader.Elector, election string) *candidate {
	c := &candidate{won: make(chan time.Time, 1)}
	var term *leader.Leader
	go func() {
		l, err := e.Campaign(ctx, election, "")
		if err == nil {
			now := time.Now()
			term = l
			c.won <- now
		}
	}()
	c.resign = func() error { return term.Resign(ctx) }
	c.close = func() error { return e.Close(ctx) }
	return c
}

func joinStock(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (*candidate, error) {
	s, err := concurrency.NewSession(client, concurrency.WithTTL(seconds(ttl)))
	if err != nil {
		return nil, err
	}
	c := campaignStock(ctx, s, election)
	leave := c.close
	c.close = func() error { return errors.Join(leave(), s.Close()) }
	return c, nil
}

// campaignStock campaigns on a session that others may share.
func campaignStock(ctx context.Context, s *concurrency.Session, election string) *candidate {
	ctx, cancel := context.WithCancel(ctx)
	e := concurrency.NewElection(s, election)
	c := &candidate{won: make(chan time.Time, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := e.Campaign(ctx, ""); err == nil {
			c.won <- time.Now()
		}
	}()
	c.resign = func() error {
		rctx, cancel := request(ctx)
		defer cancel()
		return e.Resign(rctx)
	}
	c.close = func() error { cancel(); <-done; return nil }
	return c
}

func joinHolster(_ context.Context, client *clientv3.Client, election string, ttl time.Duration) (*candidate, error) {
	c := &candidate{won: make(chan time.Time, 1)}
	e := etcdutil.NewElectionAsync(client, etcdutil.ElectionConfig{
		Election:  election,
		Candidate: "candidate",
		TTL:       int64(seconds(ttl)),
		EventObserver: func(event etcdutil.ElectionEvent) {
			if event.IsLeader {
				select {
				case c.won <- time.Now():
				default:
				}
			}
		},
	})
	c.close = func() error { e.Close(); return nil } // a second call does nothing
	c.resign = c.close
	return c, nil
}

// joinLimit puts the election's key if it is not there, and else watches it.
func joinLimit(ctx context.Context, client *clientv3.Client, election string, _ time.Duration) (*candidate, error) {
	key := "limit/" + election
	rctx, cancel := request(ctx)
	defer cancel()
	put, err := client.Txn(rctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, "")).
		Commit()
	if err != nil {
		return nil, err
	}
	c := &candidate{won: make(chan time.Time, 1)}
	if put.Succeeded {
		c.won <- time.Now()
		c.close = func() error { return nil }
		c.resign = func() error {
			rctx, cancel := request(ctx)
			defer cancel()
			created := clientv3.Compare(clientv3.CreateRevision(key), "=", put.Header.Revision)
			_, err := client.Txn(rctx).If(created).Then(clientv3.OpDelete(key)).Commit()
			return err
		}
		return c, nil
	}
	wctx, stop := context.WithCancel(ctx)
	events := client.Watch(wctx, key, clientv3.WithCreatedNotify())
	if _, err := receive(ctx, "a watch", events); err != nil {
		stop()
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, ok := <-events; ok {
			c.won <- time.Now()
		}
	}()
	c.close = func() error { stop(); <-done; return nil }
	return c, nil
}

// seconds is what stock sessions and etcd count in.
func seconds(d time.Duration) int { return int(math.Ceil(d.Seconds())) }

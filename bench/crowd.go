package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// crowdTTL keeps the renewals of ten thousand leases few; more is refused by this library.
const crowdTTL = 5 * time.Minute

// A crowd is one election with many candidates of a contestant. They share some clients.
type crowd struct {
	contestant
	clients []*clientv3.Client
	meter   *meter
	joined  chan struct{}
	won     chan election

	size   int
	leader *candidate

	// By size.
	joins                     map[int]float64 // per second
	joinEvents                map[int]float64 // per join
	handoffs                  map[int]sample
	requests, watches, events map[int][]int // per handoff
}

type election struct {
	*candidate
	at time.Time
}

func measureCandidates(ctx context.Context, r *run) (*result, error) {
	endpoints, err := r.cluster(1)
	if err != nil {
		return nil, err
	}
	var crowds []*crowd
	for _, c := range []contestant{ours, stock} {
		m := newMeter()
		clients, err := r.clients(ctx, 4, endpoints, m.options()...)
		if err != nil {
			return nil, err
		}
		crowd := &crowd{
			contestant: c, clients: clients, meter: m, joined: make(chan struct{}, 1), won: make(chan election, 1),
			joins: make(map[int]float64), joinEvents: make(map[int]float64), handoffs: make(map[int]sample),
			requests: make(map[int][]int), watches: make(map[int][]int), events: make(map[int][]int),
		}
		follower, err := r.client(ctx, endpoints) // of its own, whose events are not the crowd's
		if err != nil {
			return nil, err
		}
		if err := crowd.follow(ctx, r, follower); err != nil {
			return nil, err
		}
		crowds = append(crowds, crowd)
	}
	outside, err := r.clients(ctx, 2, endpoints)
	if err != nil {
		return nil, err
	}
	limits := make(map[int]sample)
	sizes := []int{2, 10, 100, 1000, 10000}[:r.pick(5, 4, 2)]
	for _, size := range sizes {
		for _, c := range crowds {
			if err := c.grow(ctx, size); err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			r.log("%d candidates of %s: %.0f joins/s", size, c.name, c.joins[size])
		}
		for trial := range r.pick(60, 15, 2) {
			// The limit has no crowd, but the same etcd, with the renewals of both crowds.
			p, err := limit.pair(ctx, outside[0], outside[1], fmt.Sprintf("%d/%d", size, trial), crowdTTL)
			if err != nil {
				return nil, err
			}
			sleep(ctx, 250*time.Millisecond) // as the successors of row 1 wait
			for _, i := range rand.Perm(len(crowds) + 1) {
				if i < len(crowds) {
					if err := crowds[i].handoff(ctx); err != nil {
						return nil, fmt.Errorf("%s: %w", crowds[i].name, err)
					}
					continue
				}
				d, err := p.handoff(ctx)
				if err := errors.Join(err, p.close()); err != nil {
					return nil, err
				}
				limits[size] = append(limits[size], d)
			}
		}
	}

	t := table{
		caption: "Candidates in one election, each with a lease of its own. Handoff in ms. Requests, watches (begun or ended) and events are those of all candidates in one handoff, without renewals (medians). Joins per second and events per join are measured while the election grows to this size.",
		header:  []string{"candidates", "contestant", "handoff, median (p10 – p90)", "trials", "requests", "watches", "events", "joins per second", "events per join"},
	}
	for _, size := range sizes {
		for _, c := range crowds {
			line := append([]string{fmt.Sprint(size), c.name}, c.handoffs[size].cells()...)
			t.add(append(line, fmt.Sprint(medianInt(c.requests[size])), fmt.Sprint(medianInt(c.watches[size])), fmt.Sprint(medianInt(c.events[size])),
				number(c.joins[size]), number(c.joinEvents[size]))...)
		}
		t.add(append(append([]string{fmt.Sprint(size), limit.name}, limits[size].cells()...), "", "", "", "", "")...)
	}
	res := &result{tables: []table{t}}
	own, largest := crowds[0], sizes[len(sizes)-1]
	res.atMost(1.2, own.handoffs[largest].ratio(own.handoffs[2]), "leader: handoff with %d candidates / with 2", largest).
		beside(limit.name, limits[largest].ratio(limits[2]))
	fewest := medianInt(own.requests[sizes[1]]) // with two nobody is left to find a new predecessor
	res.atMost(float64(fewest), exact(float64(medianInt(own.requests[largest]))), "leader: requests per handoff with %d, at most as many as with %d", largest, sizes[1])
	base := sizes[min(2, len(sizes)-1)] // fewer joins say little
	res.atMost(1.2*own.joinEvents[base], exact(own.joinEvents[largest]), "leader: events per join with %d, at most 1.2 × as many as with %d", largest, base)
	handoff := lines{file: "candidates-handoff.svg", title: "Handoff by number of candidates", x: "candidates", y: "ms"}
	requests := lines{file: "candidates-requests.svg", title: "Requests per handoff by number of candidates", x: "candidates", y: "requests"}
	for _, c := range crowds {
		handoff.add(c.name, sizes, func(n int) float64 { return float64(c.handoffs[n].median()) / 1e6 })
		requests.add(c.name, sizes, func(n int) float64 { return float64(medianInt(c.requests[n])) })
	}
	handoff.add(limit.name, sizes, func(n int) float64 { return float64(limits[n].median()) / 1e6 })
	res.figures = []figure{handoff, requests}
	return res, nil
}

func medianInt(ns []int) int { return slices.Sorted(slices.Values(ns))[len(ns)/2] }

func (c *crowd) election() string { return "crowd/" + c.name }

// follow lets joined tell of every candidate whose key is there, until the run stops.
func (c *crowd) follow(ctx context.Context, r *run, client *clientv3.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	events := client.Watch(ctx, c.prefix(c.election()), clientv3.WithPrefix(), clientv3.WithFilterDelete(), clientv3.WithCreatedNotify())
	if _, err := receive(ctx, "a watch", events); err != nil {
		cancel()
		return err
	}
	done := make(chan struct{})
	r.onStop(func() { cancel(); <-done })
	go func() {
		defer close(done)
		for resp := range events {
			for _, ev := range resp.Events {
				if !ev.IsCreate() { // a touch
					continue
				}
				select {
				case c.joined <- struct{}{}:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return nil
}

// add lets one more candidate join, and returns when somebody has joined: with so many calls at a
// time, no more than so many joins are under way.
func (c *crowd) add(ctx context.Context) error {
	cand, err := c.join(ctx, c.clients[rand.IntN(len(c.clients))], c.election(), crowdTTL)
	if err != nil {
		return err
	}
	go func() {
		select {
		case at := <-cand.won:
			c.won <- election{cand, at}
		case <-ctx.Done():
		}
	}()
	_, err = receive(ctx, "a join", c.joined)
	return err
}

// grow lets candidates join until there are so many, and all that follows from it has happened.
func (c *crowd) grow(ctx context.Context, size int) error {
	_, _, events := c.traffic()
	began, more := time.Now(), size-c.size
	if err := each(more, 32, func(int) error { return c.add(ctx) }); err != nil {
		return err
	}
	c.size = size
	c.joins[size] = float64(more) / time.Since(began).Seconds()
	c.meter.settle(ctx, time.Second)
	_, _, nowEvents := c.traffic()
	c.joinEvents[size] = float64(nowEvents-events) / float64(more)
	if c.leader != nil {
		return nil
	}
	first, err := receive(ctx, "the first to be elected", c.won)
	c.leader = first.candidate
	return err
}

// handoff lets the leader resign, and somebody else join so that the size stays the same.
func (c *crowd) handoff(ctx context.Context) error {
	requests, watches, events := c.traffic()
	began := time.Now()
	if err := c.leader.resign(); err != nil {
		return err
	}
	next, err := receive(ctx, "the successor", c.won)
	if err := errors.Join(err, c.leader.close()); err != nil {
		return err
	}
	sleep(ctx, 50*time.Millisecond) // for what else follows
	nowRequests, nowWatches, nowEvents := c.traffic()
	c.handoffs[c.size] = append(c.handoffs[c.size], next.at.Sub(began))
	c.requests[c.size] = append(c.requests[c.size], nowRequests-requests)
	c.watches[c.size] = append(c.watches[c.size], nowWatches-watches)
	c.events[c.size] = append(c.events[c.size], nowEvents-events)
	c.leader = next.candidate
	return c.add(ctx)
}

// traffic is how many requests and how many begins and ends of watches were sent so far, but for
// renewals, and how many events came.
func (c *crowd) traffic() (requests, watches, events int) {
	return c.meter.count(keepAlive, renewalRead, watching), c.meter.of(watching), int(c.meter.events.Load())
}

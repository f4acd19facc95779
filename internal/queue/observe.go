package queue

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// maxPending and maxPendingBytes bound the states that wait for a slow consumer of Observe: then
	// the oldest are left out.
	maxPending      = 64
	maxPendingBytes = 1 << 20
)

// Observe calls yield with the present leader, then with each change of the leader or its value, in the
// order of revisions, until yield returns false, and returns nil then, or until ctx ends or a request
// fails for good. The zero Candidate means that nobody leads. While yield has not returned, states may
// be left out, but not the last one. warn is told of the first failure of each streak. Both are called
// in the caller's goroutine.
//
// It keeps a copy of the whole queue, which the events of one watch keep up to date, so that a
// handoff costs no read. Where the watch breaks or its history is compacted the copy is read
// anew, as it is when the interval reread shows another leader than the copy's.
func (q *Queue) Observe(ctx context.Context, warn func(error), reread time.Duration, yield func(Candidate) bool) error {
	following, cancel := context.WithCancel(ctx)
	o := &observer{q: q, reread: reread, changed: make(chan struct{}, 1)}
	var follower sync.WaitGroup
	defer follower.Wait() // also if yield panics
	defer cancel()
	var err error
	follower.Go(func() {
		defer o.end()
		err = o.follow(following)
	})
	for ctx.Err() == nil {
		c, more, failure := o.next()
		if failure != nil {
			warn(failure)
		}
		if !more {
			break
		}
		if failure == nil && !yield(c) {
			return nil
		}
	}
	cancel()
	follower.Wait()
	return cmp.Or(ctx.Err(), err)
}

// An observer follows the queue in a goroutine that takes every event at once, however slow the
// consumer is: clientv3 would keep them all, without a bound.
type observer struct {
	q      *Queue
	reread time.Duration

	mu      sync.Mutex
	pending []Candidate // states to be yielded
	bytes   int         // of their values
	failure error       // to be warned of
	ended   bool
	changed chan struct{} // has a token when one of these has changed

	// Of the caller alone.
	told    bool
	yielded Candidate // if told

	// Of the follower alone.
	loop  retry.Loop
	tries int                        // to have a watch created
	queue []Candidate                // the copy, by Token
	rev   int64                      // of the last read of it
	valid bool                       // no event has been missed since then
	since map[string]*clientv3.Event // the last event of each key while the queue is being read
	began bool                       // last is pending, or was
	last  Candidate
}

// next blocks until there is something to yield or to warn of. more is false when nothing follows.
func (o *observer) next() (c Candidate, more bool, failure error) {
	for {
		o.mu.Lock()
		switch {
		case o.failure != nil:
			failure, o.failure = o.failure, nil
			o.mu.Unlock()
			return Candidate{}, true, failure
		case len(o.pending) > 0:
			c, o.pending = o.pending[0], o.pending[1:]
			o.bytes -= len(c.Value)
			o.mu.Unlock()
			if o.told && c == o.yielded { // what came in between was left out
				continue
			}
			o.told, o.yielded = true, c
			return c, true, nil
		case o.ended:
			o.mu.Unlock()
			return Candidate{}, false, nil
		}
		o.mu.Unlock()
		<-o.changed
	}
}

func (o *observer) change(f func()) {
	o.mu.Lock()
	f()
	o.mu.Unlock()
	select {
	case o.changed <- struct{}{}:
	default:
	}
}

func (o *observer) end() { o.change(func() { o.ended = true }) }

// report tells of the leader if it has changed.
func (o *observer) report() {
	leader := o.leader()
	if o.began && leader == o.last {
		return
	}
	o.began, o.last = true, leader
	o.change(func() {
		o.pending = append(o.pending, leader)
		o.bytes += len(leader.Value)
		for len(o.pending) > maxPending || o.bytes > maxPendingBytes && len(o.pending) > 1 {
			o.bytes -= len(o.pending[0].Value)
			o.pending = o.pending[1:]
		}
	})
}

func (o *observer) leader() Candidate {
	if len(o.queue) == 0 {
		return Candidate{}
	}
	return o.queue[0]
}

// A snapshot is what a read of the queue has found.
type snapshot struct {
	queue []Candidate
	rev   int64
}

func (o *observer) read(ctx context.Context) (snapshot, error) {
	queue, rev, err := o.q.read(ctx)
	return snapshot{queue, rev}, err
}

// follow keeps the copy up to date until ctx ends or a request fails for good.
func (o *observer) follow(ctx context.Context) error {
	o.loop = retry.Loop{Client: o.q.client, Warn: func(err error) { o.change(func() { o.failure = err }) }}
	for {
		lived, err := o.watch(ctx)
		if lived > retry.RequestTimeout {
			o.loop.OK() // that was no part of a streak
		}
		// The error of a watch may be about others, with which it shares a stream.
		o.valid = false
		now, rerr := retry.Ask(ctx, o.q.client, o.loop.Failed, o.read)
		if rerr != nil {
			return rerr
		}
		o.apply(now)
		o.valid = false // nothing is watched
		if err := o.loop.Again(ctx, retry.Passing(err)); err != nil {
			return err
		}
	}
}

// watch follows one watch until it ends. It returns how long that has lived.
func (o *observer) watch(ctx context.Context) (lived time.Duration, err error) {
	var beside sync.WaitGroup
	defer beside.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watch := o.q.open(ctx, &beside, &o.tries, o.q.prefix, clientv3.WithPrefix())
	defer func() { watch.close() }()

	ticker := time.NewTicker(o.reread)
	defer ticker.Stop()
	failed := make(chan error)
	fail := func(err error) {
		select {
		case failed <- err:
		case <-ctx.Done():
		}
	}
	failing := false
	ok := func() {
		if failing {
			failing = false
			o.loop.OK()
		}
	}
	type result struct {
		snapshot
		err error
	}
	var reads chan result // nil while the queue is not being read
	read := func() {
		if reads != nil {
			return
		}
		found := make(chan result, 1)
		reads, o.since = found, make(map[string]*clientv3.Event)
		beside.Go(func() {
			now, err := retry.Ask(ctx, o.q.client, fail, o.read)
			found <- result{now, err}
		})
	}
	var leaders chan Candidate // nil while the leader is not being read
	for {
		select {
		case watch.events = <-watch.opened:
			watch.opened = nil
		case resp, open := <-watch.events:
			if !open {
				return watch.lived(), errWatch
			}
			if err := resp.Err(); err != nil {
				return watch.lived(), err
			}
			if resp.Created {
				watch.exists()
				o.tries = 0
				read()
			}
			o.events(resp.Events)
		case now := <-reads:
			reads = nil
			if now.err != nil {
				return 0, now.err
			}
			ok()
			o.apply(now.snapshot)
		case <-ticker.C:
			if leaders != nil || !o.valid {
				break
			}
			found := make(chan Candidate, 1)
			leaders = found
			beside.Go(func() {
				c, err := o.q.Leader(ctx, func(ctx context.Context, read Read) ([]*mvccpb.KeyValue, error) {
					return retry.Ask(ctx, o.q.client, fail, read)
				})
				if err != nil { // the read of all says why
					c = Candidate{Token: -1}
				}
				found <- c
			})
		case leader := <-leaders:
			leaders = nil
			if leader != o.leader() {
				read() // either an event is still under way or the watch has died silently
			} else {
				ok()
			}
		case err := <-failed:
			failing = true
			o.loop.Failed(err)
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// events brings the copy up to date, and keeps the events for the read that is under way.
//
// Here is the rule "an event counts only if it is newer than what it is about": the copy has the older
// ones already.
func (o *observer) events(events []*clientv3.Event) {
	for i, ev := range events {
		if o.since != nil {
			o.since[string(ev.Kv.Key)] = ev
		}
		if !o.valid || ev.Kv.ModRevision <= o.rev {
			continue
		}
		o.applyEvent(ev)
		// A revision is atomic: only its last event shows a state that existed.
		if i+1 == len(events) || events[i+1].Kv.ModRevision != ev.Kv.ModRevision {
			o.report()
		}
	}
}

// applyEvent makes the change of one event in the copy.
func (o *observer) applyEvent(ev *clientv3.Event) {
	c, ok := o.q.candidate(ev.Kv)
	if !ok {
		return
	}
	o.queue = slices.DeleteFunc(o.queue, func(other Candidate) bool { return other.Key == c.Key })
	if ev.Type == clientv3.EventTypeDelete {
		return
	}
	i, _ := slices.BinarySearchFunc(o.queue, c, func(a, b Candidate) int { return cmp.Compare(a.Token, b.Token) })
	o.queue = slices.Insert(o.queue, i, c)
}

// apply makes what a read has found the copy, with the events that are newer.
func (o *observer) apply(now snapshot) {
	o.queue, o.rev, o.valid = now.queue, now.rev, true
	for _, ev := range o.since {
		if ev.Kv.ModRevision > o.rev {
			o.applyEvent(ev)
		}
	}
	o.since = nil
	o.report()
}

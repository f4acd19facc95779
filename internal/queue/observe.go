package queue

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"example.com/leader/internal/retry"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// maxPending and maxPendingBytes bound the states that wait for a slow consumer of Observe. Beyond that, the oldest
	// are left out.
	maxPending      = 64
	maxPendingBytes = 1 << 20
)

// Observe calls yield with the present leader, and then with each change of the leader or its value, in the order of
// revisions. It returns nil when yield returns false, and an error when ctx ends or a request fails for good. The zero
// Candidate means that nobody leads. While yield has not returned, states may be left out, but never the last one. warn
// is called with the first failure of each streak. Both are called in the caller's goroutine.
//
// It keeps a copy of the whole queue and updates it by the events of one watch, so a handoff costs no read. It reads
// the queue again if the watch breaks or its history is compacted. At the interval reread it reads the leader, and if
// that is not the copy's, it reads the queue again.
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
	if last := o.loop.Last(); ctx.Err() != nil && last != nil {
		return retry.WithLast(ctx.Err(), last)
	}
	return cmp.Or(ctx.Err(), err)
}

// An observer follows the queue in a goroutine of its own. The goroutine takes every event at once, however slow the
// consumer is: otherwise clientv3 would keep all events, without a bound.
type observer struct {
	q      *Queue
	reread time.Duration

	mu      sync.Mutex
	pending []Candidate // states to yield
	bytes   int         // total length of their values
	failure error       // to pass to warn
	ended   bool
	changed chan struct{} // has a token when one of these has changed

	// Used only by the caller's goroutine.
	told    bool      // yielded is set
	yielded Candidate // the last one

	// Used only by the follower's goroutine.
	loop  retry.Loop
	tries int                        // how often a watch was opened without being created
	queue []Candidate                // the copy, sorted by Token
	rev   int64                      // revision of the last read of the queue
	valid bool                       // no event has been missed since that read
	since map[string]*clientv3.Event // last event of each key while the queue is being read; nil otherwise
	began bool                       // last is set
	last  Candidate                  // the last state that was added to pending
}

// next blocks until there is a state to yield or a failure to warn of. more is false at the end.
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
			if o.told && c == o.yielded { // the states in between were left out, so nothing has changed
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

// report adds the leader to pending if it has changed.
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

// A snapshot is the result of a read of the queue.
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
			o.loop.Forget() // a watch that lived that long does not continue a streak of failures
		}
		// The watch's error may be about another watch on its stream. If this read is refused, that is about the queue.
		o.valid, o.since = false, nil // events that were kept may be of a time before etcd went back
		now, rerr := retry.Ask(ctx, o.q.client, o.loop.Failed, o.read)
		if rerr != nil {
			return rerr
		}
		o.apply(now)
		o.valid = false // nothing is watched, so events may be missed from here on
		if err := o.loop.Retry(ctx, retry.Passing(err)); err != nil {
			return err
		}
	}
}

// errBack is the error of a watch of an etcd that was restored from a backup, or replaced by an empty one. clientv3
// resumes the watch at a revision that is still to come, and there are no events until then.
var errBack = errors.New("etcd has gone back in time")

// watch follows one watch until it ends. It returns how long the watch lived.
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
		if failing || o.loop.Last() != nil && watch.lived() > retry.RequestTimeout {
			failing = false
			o.loop.OK()
		}
	}
	var newest int64 // revision that etcd has come to, at least
	type result struct {
		snapshot
		err  error
		back bool // etcd has gone back in time
	}
	type leading struct {
		leader Candidate
		back   bool
	}
	var reads chan result // nil while the queue is not being read
	read := func() {
		if reads != nil {
			return
		}
		found := make(chan result, 1)
		reads, o.since = found, make(map[string]*clientv3.Event)
		reached := newest
		beside.Go(func() {
			now, err := retry.Ask(ctx, o.q.client, fail, o.read)
			found <- result{now, err, now.rev < reached}
		})
	}
	var leaders chan leading // nil while the leader is not being read
	for {
		select {
		case watch.events = <-watch.opened:
			watch.opened = nil
		case resp, open := <-watch.events:
			if !open {
				return watch.lived(), errWatch
			}
			if err := watch.failed(&resp); err != nil {
				return watch.lived(), err
			}
			newest = max(newest, resp.Header.GetRevision())
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
			if now.back {
				return watch.lived(), errBack
			}
			ok()
			newest = max(newest, now.rev)
			o.apply(now.snapshot)
		case <-ticker.C:
			if leaders != nil || !o.valid {
				break
			}
			found := make(chan leading, 1)
			leaders = found
			reached := newest
			beside.Go(func() {
				c, rev, err := o.q.leader(ctx, &retry.Loop{Client: o.q.client, Warn: fail})
				if err != nil { // nobody has this token, so the queue is read, and that read reports the error
					c = Candidate{Token: -1}
				}
				found <- leading{c, err == nil && rev < reached}
			})
		case now := <-leaders:
			leaders = nil
			if now.back {
				return watch.lived(), errBack
			}
			if now.leader != o.leader() {
				read() // either an event is still under way, or the watch has died without a sign
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

// events applies events to the copy. It also keeps them for the read of the queue that is under way, if any.
//
// Rule: an event counts only if it is newer than what it is about. Here that is the copy, which already contains
// everything up to revision rev.
func (o *observer) events(events []*clientv3.Event) {
	for i, ev := range events {
		if o.since != nil {
			o.since[string(ev.Kv.Key)] = ev
		}
		if !o.valid || ev.Kv.ModRevision <= o.rev {
			continue
		}
		o.applyEvent(ev)
		// All events of a revision happen at once, so only the last one yields a state that existed.
		if i+1 == len(events) || events[i+1].Kv.ModRevision != ev.Kv.ModRevision {
			o.report()
		}
	}
}

// applyEvent applies one event to the copy.
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

// apply replaces the copy by the result of a read, and applies the newer events that came during the read.
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

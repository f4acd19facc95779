package queue

import (
	"cmp"
	"context"
	"slices"
	"time"

	"example.com/leader/internal/retry"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Observe calls yield with the present leader, then with each change of the leader or its
// value, in the order of revisions, until yield returns false, and returns nil then, or until
// ctx ends or a request fails for good. The zero Candidate means that nobody leads.
//
// It keeps a copy of the whole queue, which the events of one watch keep up to date, so that a
// handoff costs no read. Where the watch breaks or its history is compacted the copy is read
// anew, as it is when the interval reread shows another leader than the copy's.
func (q *Queue) Observe(ctx context.Context, loop *retry.Loop, reread time.Duration, yield func(Candidate) bool) error {
	o := observer{q: q, yield: yield}
	for {
		lived, err := o.follow(ctx, reread)
		if o.stopped {
			return nil
		}
		if lived > retry.RequestTimeout {
			loop.OK() // that was no part of a streak
		}
		if ctx.Err() == nil {
			_, rerr := q.Leader(ctx)
			err = cmp.Or(rerr, err) // a watch gives its reasons as text only, see WaitDeleted
		}
		if err := loop.Again(ctx, err); err != nil {
			return err
		}
	}
}

type observer struct {
	q       *Queue
	yield   func(Candidate) bool
	stopped bool // yield has returned false

	queue []Candidate // by Token
	began bool        // last has been yielded
	last  Candidate
}

// follow reads the queue once a watch has been created and follows the watch until it ends. It
// returns how long that was.
func (o *observer) follow(ctx context.Context, reread time.Duration) (lived time.Duration, err error) {
	ctx, cancel := context.WithCancel(retry.RequireLeader(ctx))
	defer cancel()
	events := o.q.watch(ctx, cancel, o.q.prefix, clientv3.WithPrefix())
	began := time.Now()
	defer func() { lived = time.Since(began) }()
	ticker := time.NewTicker(reread)
	defer ticker.Stop()
	var rev int64 // of the copy
	for !o.stopped {
		select {
		case resp, ok := <-events:
			if !ok {
				return 0, errWatch
			}
			if err := resp.Err(); err != nil {
				return 0, err
			}
			if resp.Created {
				if o.queue, rev, err = o.q.read(ctx); err != nil {
					return 0, err
				}
				o.report()
			}
			for i, ev := range resp.Events {
				if ev.Kv.ModRevision <= rev {
					continue // the copy has it already
				}
				o.apply(ev)
				// A revision is atomic: only its last event shows a state that existed.
				if i+1 == len(resp.Events) || resp.Events[i+1].Kv.ModRevision != ev.Kv.ModRevision {
					o.report()
				}
			}
		case <-ticker.C:
			leader, err := o.q.Leader(ctx)
			if err != nil {
				return 0, err
			}
			if leader != o.leader() {
				// Either an event is still under way or the watch has died silently.
				if o.queue, rev, err = o.q.read(ctx); err != nil {
					return 0, err
				}
				o.report()
			}
		}
	}
	return 0, nil
}

func (o *observer) apply(ev *clientv3.Event) {
	c, ok := o.q.candidate(ev.Kv)
	if !ok {
		return
	}
	if ev.IsCreate() {
		o.queue = append(o.queue, c) // the newest create revision is the last of the queue
		return
	}
	i := slices.IndexFunc(o.queue, func(other Candidate) bool { return other.Key == c.Key })
	if i < 0 {
		return
	}
	if ev.IsModify() {
		o.queue[i] = c
	} else {
		o.queue = slices.Delete(o.queue, i, i+1)
	}
}

func (o *observer) leader() Candidate {
	if len(o.queue) == 0 {
		return Candidate{}
	}
	return o.queue[0]
}

// report yields the leader if it has changed.
func (o *observer) report() {
	leader := o.leader()
	if o.stopped || o.began && leader == o.last {
		return
	}
	o.began, o.last = true, leader
	o.stopped = !o.yield(leader)
}

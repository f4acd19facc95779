package leader

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader/internal/lease"
	"example.com/leader/internal/queue"
	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// requestTTL is the time to live of the lease that requests to step back are on, so that they do not outlive their
	// asker for long.
	requestTTL = 10 * time.Second

	// maxTransferRead is how long a Transfer waits until it reads the queue again, in case its watch is dead.
	maxTransferRead = time.Second
)

// Transfer hands the election name over to the candidate to, without an overlap: the leader stops its work before the
// next one is elected. Transfer first asks the candidates in between to step back: they join again at the end of the
// queue. When they have left, it asks the leader. With the zero Candidate whoever is next leads.
//
// It returns nil once the candidate to, found by its Key and Token, is first in the queue, at once if it already is;
// with the zero Candidate, once a term other than the one that it found has begun. It returns [ErrNoLeader] if nobody
// leads, [ErrNotCandidate] if to has left the queue or nobody waits, and ctx's error if ctx ends, with the names of
// those who have not left. So give ctx a deadline. Transfer does not check that the process of to is alive: if it is
// paused or has died, nobody works until its lease expires.
//
// A leader under [Elector.Run] leaves when its function has returned, however long that takes: nobody leads meanwhile,
// Hooks.Overdue says so, and [Elector.Evict] ends it. A leader under [Elector.Campaign] leaves when it calls Resign, or
// a margin after its context has ended. Its term ends with [ErrTransferred].
//
// A Transfer that fails may have sent candidates to the end of the queue. Once the leader was asked nothing is undone:
// if to dies then, the next one leads. A candidate whose watch is dead, or that uses concurrency.Election, does not
// notice that it is asked: then the leader is not asked, and Transfer returns when ctx ends.
//
// The function that Run calls must not wait for a Transfer of its own election: each would wait for the other. Transfer
// suits queues of tens of candidates, since each that steps back costs a read of the queue.
func (e *Elector) Transfer(ctx context.Context, name string, to Candidate) error {
	q, err := e.queue(name)
	if err != nil {
		return err
	}
	ctx, end, err := e.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	t := &transfer{
		e: e, q: q, to: queue.Candidate(to), loop: &retry.Loop{Client: e.client}, leases: &retry.Loop{Client: e.client},
		asked: make(map[string]*asked), again: make(chan struct{}, 1),
	}
	err = t.run(ctx)
	t.withdraw(ctx)
	switch {
	case err == nil:
		return nil
	case e.over(ctx, err):
		err = e.whyEnded(ctx)
		if last := cmp.Or(t.loop.Last(), t.leases.Last()); last != nil {
			err = retry.WithLast(err, last)
		}
		if who := t.missing(); who != "" {
			err = fmt.Errorf("%w: %s", err, who)
		}
	}
	if errors.Is(err, ErrNoLeader) {
		return err
	}
	return fmt.Errorf("leader: transfer %q: %w", name, err)
}

// A transfer is a Transfer under way.
type transfer struct {
	e     *Elector
	q     *queue.Queue
	to    queue.Candidate // the zero value: whoever is next
	first queue.Candidate // who led when it began
	loop  *retry.Loop
	pool  *lease.Pool       // of the requests; nil while there is none
	asked map[string]*asked // by the key of who is asked
	again chan struct{}     // has a token when the queue is to be read again

	leases *retry.Loop // of leases that were lost, or to which somebody else has attached a key
}

// An asked is a candidate that is asked to step back.
type asked struct {
	queue.Candidate
	request  *lease.Key
	rev      int64       // create revision of the request
	vanished atomic.Bool // a renewal has found that the request is gone
}

func (t *transfer) run(ctx context.Context) error {
	watching, cancel := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	defer watcher.Wait()
	defer cancel()
	watcher.Go(func() { t.watch(watching) })
	for {
		listing, err := retry.Do(ctx, t.loop, t.q.ListWithRequests)
		if err != nil {
			return err
		}
		over, err := t.step(ctx, listing)
		if over || err != nil {
			return err
		}
		select {
		case <-t.again:
		case <-time.After(maxTransferRead):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// watch makes run read the queue again when somebody has left it. It need not be reliable, as run reads at intervals
// too.
func (t *transfer) watch(ctx context.Context) {
	wctx, cancel := retry.StreamOf(t.e.client).Watching(ctx)
	defer cancel()
	for range t.e.client.Watch(wctx, t.q.Prefix(), clientv3.WithPrefix(), clientv3.WithFilterPut(), clientv3.WithCreatedNotify()) {
		t.read()
	}
}

func (t *transfer) read() {
	select {
	case t.again <- struct{}{}:
	default:
	}
}

// step does what the queue as it is now asks for. over says that the transfer is done.
func (t *transfer) step(ctx context.Context, listing queue.Listing) (over bool, err error) {
	cs := listing.Candidates
	if len(cs) > 0 && t.first == (queue.Candidate{}) {
		t.first = cs[0]
	}
	place := t.place(cs)
	switch {
	case len(cs) == 0 && t.first == (queue.Candidate{}):
		return false, ErrNoLeader
	case place == 0:
		return true, nil
	case place < 0:
		return false, fmt.Errorf("%w: key %q with token %d", ErrNotCandidate, t.to.Key, t.to.Token)
	case place >= len(cs):
		return false, fmt.Errorf("%w: nobody waits", ErrNotCandidate)
	}
	if between := cs[1:place]; len(between) > 0 {
		for _, c := range between {
			if err := t.ask(ctx, c, queue.Candidate{}); err != nil {
				return false, err
			}
		}
	} else if err := t.ask(ctx, cs[0], cs[place]); err != nil {
		return false, err
	}
	t.forget(ctx, listing) // last: the requests share a lease, which is given back with the last of them
	return false, nil
}

// place is the place in the queue of who is to lead: 0 if it leads, -1 if it is not there.
func (t *transfer) place(cs []queue.Candidate) int {
	if t.to != (queue.Candidate{}) {
		return slices.IndexFunc(cs, t.to.Is)
	}
	if len(cs) > 0 && !cs[0].Is(t.first) {
		return 0 // another term than the one that was found
	}
	return 1
}

// ask asks a candidate to step back, unless that was done, and again if the request has vanished.
func (t *transfer) ask(ctx context.Context, c, successor queue.Candidate) error {
	a := t.asked[c.Key]
	again := a != nil && a.Token == c.Token
	if again && a.request.Session().Valid() && !a.vanished.Swap(false) {
		return nil
	}
	if a != nil && (!again || !a.request.Session().Valid()) {
		a.request.Drop()
		delete(t.asked, c.Key)
		a = nil
	}
	if t.pool == nil {
		t.pool = lease.NewPool(t.e.client, lease.Config{TTL: requestTTL, SharedNames: true})
	}
	var err error
	if a == nil { // else it is put again under the same lease
		a = &asked{Candidate: c}
		vanished := &a.vanished
		a.request, err = t.pool.Track(ctx, t.loop, func(clientv3.LeaseID) string { return queue.Request(c) }, func() {
			vanished.Store(true)
			t.read()
		})
		if err != nil {
			return err
		}
	}
	actx, cancel := context.WithCancel(ctx) // ends with the session, which cancels each attempt
	defer cancel()
	defer context.AfterFunc(a.request.Session().Context(), cancel)()
	rev, err := retry.Do(actx, t.loop, func(ctx context.Context) (int64, error) {
		return lease.Attempt(ctx, a.request, func(ctx context.Context) (int64, error) {
			return t.q.Ask(ctx, a.request.Session().ID(), c, successor)
		})
	})
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound): // another one is taken
		a.request.Session().Revoked()
		a.request.Abandon()
		delete(t.asked, c.Key)
		t.read()
		return t.leases.Retry(ctx, retry.Passing(err))
	case errors.Is(err, rpctypes.ErrPermissionDenied): // perhaps only because of the lease: see errAttached
		a.request.Drop()
		delete(t.asked, c.Key)
		_, denied := retry.Do(ctx, t.loop, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, t.q.MayAsk(ctx, c)
		})
		if denied != nil {
			return denied
		}
		a.request.Session().Deny()
		_ = a.request.Session().Finish(ctx)
		t.read()
		return t.leases.Retry(ctx, retry.Passing(errAttached))
	case err != nil && ctx.Err() == nil && !a.request.Session().Valid():
		a.request.Abandon()
		delete(t.asked, c.Key)
		t.read()
		return nil
	case err != nil:
		a.request.Abandon()
		delete(t.asked, c.Key)
		return err
	case rev == 0: // somebody has left, so nothing was put, and the queue is read again
		a.request.Joined(c.Token) // of no key of that name: it is not there
		a.request.Drop()
		_ = a.request.Session().Finish(ctx)
		delete(t.asked, c.Key)
		t.read()
		return nil
	}
	t.leases.OK()
	a.rev = rev
	a.request.Joined(a.rev)
	t.asked[c.Key] = a
	return nil
}

// forget deletes the requests to those who have left. Who has stepped back has deleted its own: deleting it again would
// cost etcd a write each, just as the leader hands over.
func (t *transfer) forget(ctx context.Context, listing queue.Listing) {
	for key, a := range t.asked {
		if slices.ContainsFunc(listing.Candidates, a.Is) {
			continue
		}
		delete(t.asked, key)
		var err error
		if request := queue.Request(a.Candidate); listing.Requests[request] == a.rev { // it was put before the listing
			_, err = retry.First(ctx, t.e.client, func(ctx context.Context) (struct{}, error) {
				return struct{}{}, t.q.Remove(ctx, request, a.rev)
			})
		}
		if err == nil {
			a.request.Drop()
		} else {
			a.request.Abandon()
		}
		_ = a.request.Session().Finish(ctx)
	}
}

// withdraw gives the lease of the requests back, and them with it.
func (t *transfer) withdraw(ctx context.Context) {
	if t.pool == nil {
		return
	}
	cctx, cancel := retry.Cleanup(ctx)
	defer cancel()
	for _, a := range t.asked {
		a.request.Abandon()
	}
	if t.pool.Close(cctx) == nil {
		return
	}
	// The lease expires. But requests may be under way, for which Close has to wait.
	pool := t.pool
	t.e.watching.Go(func() { //nolint:contextcheck // ctx has ended
		ctx, cancel := context.WithTimeout(context.Background(), retry.RequestTimeout+retry.CleanupTimeout)
		defer cancel()
		_ = pool.Close(ctx)
	})
}

// missing names those who were asked and have not left.
func (t *transfer) missing() string {
	var names []string
	for _, a := range t.asked {
		names = append(names, fmt.Sprintf("%q (%s)", logged(a.Value), a.Key))
	}
	if names == nil {
		return ""
	}
	slices.Sort(names)
	return strings.Join(names, ", ") + " were asked and have not left: they have not noticed, or their work has not ended"
}

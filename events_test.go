package leader_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// The tests of this file are about events that are older than what they are about, and about ends that
// come together with a victory.

// long is for terms that nothing ends but what the test does: no renewal comes, and no machine is too slow
// for one.
var long = leader.WithTTL(time.Minute)

// A laggingWatcher opens watches as a member does that lags: what it takes for now is a revision of the
// past.
type laggingWatcher struct {
	clientv3.Watcher
	now  atomic.Int64         // 0: it does not lag
	told chan *clientv3.Event // the first deletion of each watch, when it was passed on
}

func lagging(client *clientv3.Client) (*clientv3.Client, *laggingWatcher) {
	w := &laggingWatcher{Watcher: client.Watcher, told: make(chan *clientv3.Event, 100)}
	c := wrapped(client)
	c.Watcher = w
	return c, w
}

func (w *laggingWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	now := w.now.Load()
	if now == 0 {
		return w.Watcher.Watch(ctx, key, opts...)
	}
	in := w.Watcher.Watch(ctx, key, append(opts, clientv3.WithRev(now))...)
	out := make(chan clientv3.WatchResponse)
	go func() {
		defer close(out)
		told := false
		for resp := range in {
			select {
			case out <- resp:
			case <-ctx.Done():
				continue
			}
			for _, ev := range resp.Events {
				if ev.Type == clientv3.EventTypeDelete && !told {
					told = true
					w.told <- ev
				}
			}
		}
	}()
	return out
}

// awaitOld waits until a watch of the term's key has told of the deletion of an earlier key of that name.
func (w *laggingWatcher) awaitOld(t *testing.T, l *leader.Leader) {
	t.Helper()
	for {
		ev := await(t, "the deletion of the earlier key", w.told)
		if string(ev.Kv.Key) != l.Key() {
			continue
		}
		if ev.Kv.ModRevision >= l.Token() {
			t.Fatalf("the deletion is of revision %d, the key of %d", ev.Kv.ModRevision, l.Token())
		}
		return
	}
}

// again lets e lead twice under the same key, and returns both terms. The first one is over.
func again(t *testing.T, e *leader.Elector, name, value string) (earlier, l *leader.Leader) {
	t.Helper()
	lead(t, e, name+"-other", "") // keeps the lease
	earlier = lead(t, e, name, value)
	resign(t, earlier)
	l = lead(t, e, name, value)
	if l.Key() != earlier.Key() {
		t.Fatalf("keys %q and %q", earlier.Key(), l.Key())
	}
	return earlier, l
}

// Pitfall 30: it is not the end of the key that the candidate waits for.
func TestDeletionOfAnEarlierKeyOfTheSameNameElectsNobody(t *testing.T) {
	_, client := start(t)
	for _, before := range []int{1, 2} {
		t.Run(fmt.Sprintf("behind %d", before), func(t *testing.T) {
			name := t.Name()
			earlier, first := again(t, newElector(t, client, long), name, "first")
			lag, w := lagging(client)
			w.now.Store(earlier.Token())
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			var middle <-chan outcome
			if before == 2 { // it does not know then that the first one is the oldest
				middle = campaign(ctx, newElector(t, client, long), name, "middle")
				awaitQueue(t, client, name, queued(2))
			}
			next := campaign(t.Context(), newElector(t, lag, long), name, "next")
			awaitQueue(t, client, name, queued(before+1))
			if middle != nil {
				leave()
				await(t, "Campaign", middle)
			}
			w.awaitOld(t, first)
			select {
			case o := <-next:
				t.Errorf("elected (%v) by the deletion of an earlier key, while another leads: IsLeader %v, guard holds %v",
					o.err, first.IsLeader(), guarded(t, client, first))
				resign(t, o.l)
				resign(t, first)
				return
			case <-time.After(100 * time.Millisecond): // what must not happen has no event
			}
			resign(t, first)
			resign(t, awaitLeader(t, next)) // by the deletion that it was waiting for
		})
	}
}

// Pitfall 30: a term that is ended by such an event forgets its key, and the next campaign leads with that
// key, and so with the old token.
func TestDeletionOfAnEarlierOwnKeyEndsNoTermAndNoOldTokenLeadsAgain(t *testing.T) {
	_, client := start(t)
	lag, w := lagging(client)
	e := newElector(t, lag, long)
	earlier, l := again(t, e, "jobs", "")
	resign(t, l)
	w.now.Store(earlier.Token())
	last := l.Token()
	for range 3 {
		l := lead(t, e, "jobs", "")
		if l.Token() <= last {
			t.Errorf("token %d came after %d", l.Token(), last)
		}
		last = l.Token()
		w.awaitOld(t, l)
		select {
		case <-l.Context().Done():
			t.Errorf("the term was ended by the deletion of an earlier key: %v; guard holds %v", context.Cause(l.Context()), guarded(t, client, l))
		case <-time.After(100 * time.Millisecond): // what must not happen has no event
		}
		if err := l.Proclaim(t.Context(), "still"); err != nil {
			t.Errorf("Proclaim: %v", err)
		}
		resign(t, l)
	}
	// The watch is not deaf for that.
	l = lead(t, e, "jobs", "")
	w.awaitOld(t, l)
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, l, leader.ErrEvicted)
}

// Pitfall 30.
func TestDeletionOfAnEarlierOwnKeyCostsNoCandidateItsPlace(t *testing.T) {
	_, client := start(t)
	lag, w := lagging(client)
	e := newElector(t, lag, long)
	earlier, l := again(t, e, "jobs", "")
	resign(t, l)
	first := lead(t, newElector(t, client, long), "jobs", "first")
	w.now.Store(earlier.Token())
	next := campaign(t.Context(), e, "jobs", "second")
	second := awaitQueue(t, client, "jobs", queued(2))[1]
	third := campaign(t.Context(), newElector(t, client, long), "jobs", "third")
	awaitQueue(t, client, "jobs", queued(3))
	for string(await(t, "the deletion of the earlier key", w.told).Kv.Key) != second.Key {
		continue
	}
	resign(t, first)
	l = awaitLeader(t, next)
	if l.Token() != second.Token {
		t.Errorf("it had token %d while it waited, and leads with %d", second.Token, l.Token())
	}
	resign(t, l)
	resign(t, awaitLeader(t, third))
}

// Pitfall 30.
func TestObserveDoesNotGoBackWhereAMemberLags(t *testing.T) {
	_, client := start(t)
	earlier, l := again(t, newElector(t, client, long), "jobs", "one")
	if err := l.Proclaim(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	lag, w := lagging(client)
	w.now.Store(earlier.Token())
	observed := observe(t, newElector(t, lag, long), "jobs")
	if c := await(t, "the leader", observed); c.Value != "two" || c.Token != l.Token() {
		t.Errorf("observed %+v, want token %d", c, l.Token())
	}
	w.awaitOld(t, l)
	resign(t, l)
	if c := await(t, "the vacancy", observed); c != (leader.Candidate{}) {
		t.Errorf("observed %+v though nobody leads", c)
	}
}

// Pitfall 32: the process stands still while its join is answered, for long enough to lose the lease.
// Neither elected nor told why not is no outcome.
func TestCampaignReturnsAnErrorWhenAllEndsAsItIsWon(t *testing.T) {
	_, client := start(t)
	for _, what := range []string{"ctx", "client", "Elector"} {
		t.Run(what+" ends", func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			cctx, closeClient := context.WithCancel(t.Context())
			defer closeClient()
			defer cancel()
			c := clientv3.NewCtxClient(cctx)
			kv := &brokenKV{KV: client.KV}
			c.KV, c.Watcher, c.Lease = kv, client.Watcher, client.Lease
			e := newElector(t, c, leader.WithTTL(time.Second))
			closed := make(chan error, 1)
			ends := map[string]func(){
				"ctx":     cancel,
				"client":  closeClient, // as Close does
				"Elector": func() { go func() { closed <- e.Close(context.WithoutCancel(t.Context())) }() },
			}
			var still sync.Once
			var until time.Time
			after := func(resp *clientv3.TxnResponse, err error) (*clientv3.TxnResponse, error) {
				still.Do(func() { ends[what](); until = time.Now().Add(time.Second) }) // the TTL
				time.Sleep(time.Until(until))                                          // renewals, too
				return resp, err
			}
			kv.after.Store(&after)
			o := await(t, "Campaign", recovered(func() outcome {
				l, err := e.Campaign(ctx, "jobs-"+what, "")
				return outcome{l: l, err: err}
			}))
			want := leader.ErrClosed
			if what == "ctx" {
				want = context.Canceled
			}
			if o.l != nil || !errors.Is(o.err, want) {
				t.Errorf("Campaign returned %v, %v, want %v", o.l, o.err, want)
			}
			if what == "Elector" {
				if err := await(t, "Close", closed); err != nil {
					t.Errorf("Close: %v", err)
				}
			}
		})
	}
	awaitExpiry(t, client) // a closed client revokes no lease
}

// recovered campaigns in the background and gives a panic as an error.
func recovered(campaign func() outcome) <-chan outcome {
	c := make(chan outcome, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				c <- outcome{err: fmt.Errorf("panic: %v", r)}
			}
		}()
		c <- campaign()
	}()
	return c
}

// Pitfall 32: a candidate is elected by an event, and its client is closed in the same moment.
func TestCampaignReturnsWhenItsClientIsClosedAsItIsElected(t *testing.T) {
	_, client := start(t)
	for range 30 {
		first := lead(t, newElector(t, client, long), "jobs", "")
		cctx, closeClient := context.WithCancel(t.Context())
		c := clientv3.NewCtxClient(cctx)
		c.KV, c.Watcher, c.Lease = client.KV, endingWatcher{client.Watcher, first.Key(), closeClient}, client.Lease
		e := newElector(t, c, long)
		next := recovered(func() outcome {
			l, err := e.Campaign(t.Context(), "jobs", "")
			return outcome{l: l, err: err}
		})
		awaitQueue(t, client, "jobs", queued(2))
		resign(t, first)
		o := await(t, "Campaign", next)
		if (o.l == nil) == (o.err == nil) || o.err != nil && !errors.Is(o.err, leader.ErrClosed) {
			t.Errorf("Campaign returned %v, %v", o.l, o.err)
		}
		closeClient() // it may have been elected without an event
		revokeAll(t, client)
	}
	awaitExpiry(t, client)
}

// revokeAll revokes what a closed client cannot revoke.
func revokeAll(t *testing.T, client *clientv3.Client) {
	t.Helper()
	leases, err := client.Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range leases.Leases {
		if _, err := client.Revoke(t.Context(), l.ID); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			t.Fatal(err)
		}
	}
}

// An endingWatcher calls end as it passes on the deletion of key.
type endingWatcher struct {
	clientv3.Watcher
	key string
	end func()
}

func (w endingWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	in := w.Watcher.Watch(ctx, key, opts...)
	if key != w.key {
		return in
	}
	out := make(chan clientv3.WatchResponse, 2) // that it is created, and that the key is deleted
	go func() {
		defer close(out)
		for resp := range in {
			out <- resp
			if len(resp.Events) > 0 {
				w.end()
				return
			}
		}
	}()
	return out
}

// etcd grants leases with negative ids to those who ask for them.
func TestStockCandidateUnderANegativeLeaseIsNotOverlooked(t *testing.T) {
	_, client := start(t)
	const id = -5
	_, err := etcdserverpb.NewLeaseClient(client.ActiveConnection()).LeaseGrant(t.Context(), &etcdserverpb.LeaseGrantRequest{ID: id, TTL: 60})
	if err != nil {
		t.Fatal(err)
	}
	session, err := concurrency.NewSession(client, concurrency.WithLease(id))
	if err != nil {
		t.Fatal(err)
	}
	election := concurrency.NewElection(session, "jobs")
	if err := election.Campaign(t.Context(), "stock"); err != nil {
		t.Fatal(err)
	}
	e := newElector(t, client, long)
	if c, err := e.Current(t.Context(), "jobs"); err != nil || c.Token != election.Rev() || c.Lease != id {
		t.Errorf("Current is %+v, %v, want token %d", c, err, election.Rev())
	}
	if _, err := e.TryCampaign(t.Context(), "jobs", "ours"); !errors.Is(err, leader.ErrHeld) {
		t.Errorf("TryCampaign beside a stock leader: %v", err)
	}
	next := campaign(t.Context(), e, "jobs", "ours")
	awaitQueue(t, client, "jobs", queued(2))
	select {
	case o := <-next:
		t.Fatalf("elected (%v) beside a stock leader", o.err)
	case <-time.After(100 * time.Millisecond): // what must not happen has no event
	}
	if err := session.Close(); err != nil {
		t.Fatal(err)
	}
	resign(t, awaitLeader(t, next))
}

// A candidate whose key is deleted together with that of the leader may see the other's deletion first,
// and be elected with a token that is smaller than that of the next term. Its guard does not hold, and
// what it does to its key next tells it.
func TestCandidateWhoseKeyIsDeletedTogetherWithTheLeadersDoesNotLeadOn(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client, long), "jobs", "first")
	var calls rpcCounter
	muted := wrapped(etcdtest.NewClientFrom(t, calls.config(m.Endpoint)))
	watcher := &mutedWatcher{Watcher: muted.Watcher}
	muted.Watcher = watcher
	next := campaign(t.Context(), newElector(t, muted, leader.WithTTL(5*time.Minute)), "jobs", "second") // no renewal comes
	second := awaitQueue(t, client, "jobs", queued(2))[1]
	awaitCalls(t, calls.reads, 2) // it watches both keys
	watcher.key.Store(&second.Key)
	third := campaign(t.Context(), newElector(t, client, long), "jobs", "third")
	awaitQueue(t, client, "jobs", queued(3))
	if _, err := client.Txn(t.Context()).Then(clientv3.OpDelete(first.Key()), clientv3.OpDelete(second.Key)).Commit(); err != nil {
		t.Fatal(err)
	}
	phantom := awaitLeader(t, next)
	if guarded(t, client, phantom) {
		t.Error("the guard holds without a key")
	}
	awaitEnd(t, phantom, leader.ErrEvicted)
	resign(t, awaitLeader(t, third))
}

// A mutedWatcher keeps the events of a key to itself.
type mutedWatcher struct {
	clientv3.Watcher
	key atomic.Pointer[string]
}

func (w *mutedWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	in, out := w.Watcher.Watch(ctx, key, opts...), make(chan clientv3.WatchResponse)
	go func() {
		defer close(out)
		for resp := range in {
			if muted := w.key.Load(); muted != nil && *muted == key {
				continue
			}
			select {
			case out <- resp:
			case <-ctx.Done():
			}
		}
	}()
	return out
}

// The end of the client reaches a request and its campaign at once, and either may be the first to see it.
func TestCampaignWhoseClientIsClosedReturnsErrClosed(t *testing.T) {
	t.Parallel()
	for range 300 {
		ctx, closeClient := context.WithCancel(t.Context())
		c := clientv3.NewCtxClient(ctx)
		asked := make(chan struct{}, 10)
		c.Lease = silentGrant{asked: asked, closed: ctx}
		next := campaign(t.Context(), newElector(t, c), "jobs", "")
		await(t, "a grant", asked)
		closeClient() // as Close does
		if o := await(t, "Campaign", next); !errors.Is(o.err, leader.ErrClosed) {
			t.Fatalf("Campaign returned %v", o.err)
		}
	}
}

// A silentGrant does not answer until its client is closed.
type silentGrant struct {
	clientv3.Lease
	asked  chan<- struct{}
	closed context.Context
}

func (l silentGrant) Grant(ctx context.Context, _ int64) (*clientv3.LeaseGrantResponse, error) {
	l.asked <- struct{}{}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-l.closed.Done():
		return nil, l.closed.Err()
	}
}

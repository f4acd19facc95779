package leader_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"example.com/leader/internal/queue"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The tests of this file are about how the next in line comes to lead: at once, at the same cost for any number of
// candidates, and nobody else.

// A handoff may not cost more requests the more candidates there are.
func TestHandoffCostsTheSameForAnyNumberOfCandidates(t *testing.T) {
	m, client := start(t)
	for _, candidates := range []int{4, 20} {
		t.Run(fmt.Sprint(candidates), func(t *testing.T) {
			name := t.Name()
			var calls rpcCounter
			counted := etcdtest.NewClientFrom(t, calls.config(m.Endpoint))
			// A TTL so long that no renewal falls into the count.
			l := lead(t, newElector(t, counted, leader.WithTTL(time.Minute)), name, "")
			var next []<-chan outcome
			for i := range candidates {
				next = append(next, campaign(t.Context(), newElector(t, counted, leader.WithTTL(time.Minute)), name, ""))
				awaitQueue(t, client, name, queued(i+2))
			}
			// Each candidate reads the one before it and itself once, when its watches have been created.
			sent := int64(1 + 2*candidates)
			awaitCalls(t, calls.reads, sent)
			least := int64(math.MaxInt64) // on a busy machine a request is sent again now and then
			for _, next := range next[:3] {
				before := calls.all()
				resign(t, l)
				l = awaitLeader(t, next)
				awaitCalls(t, calls.all, before+4) // the deletion, the revocation, the touch by the new leader, and a look at it
				least = min(least, calls.all()-before)
			}
			if least != 4 {
				t.Errorf("each of 3 handoffs took %d requests or more, want 4", least)
			}
		})
	}
}

// Whoever is next in line knows it, from joining or from the leader's touch, and is elected by the event alone.
func TestNextInLineIsElectedWithoutARead(t *testing.T) {
	m, client := start(t)
	type candidate struct {
		calls *rpcCounter
		won   <-chan outcome
	}
	const n = 5
	// readsOf counts what each candidate of an election reads between the resignation before it and its own election.
	readsOf := func(name string) (reads [n - 1]int64) {
		var queue []candidate
		for i := range n {
			calls := new(rpcCounter)
			e := newElector(t, etcdtest.NewClientFrom(t, calls.config(m.Endpoint)), leader.WithTTL(time.Minute))
			queue = append(queue, candidate{calls, campaign(t.Context(), e, name, "")})
			awaitQueue(t, client, name, queued(i+1))
			awaitCalls(t, calls.reads, int64(min(2*i+1, 2))) // its watches have been created
		}
		l := awaitLeader(t, queue[0].won)
		for i, c := range queue[1:] {
			if i > 0 {
				awaitCalls(t, c.calls.reads, 3) // it has looked
			}
			before := c.calls.reads()
			resign(t, l)
			l = awaitLeader(t, c.won)
			reads[i] = c.calls.reads() - before
		}
		resign(t, l)
		return reads
	}
	var all [][n - 1]int64
	for i := range 3 { // on a busy machine a read is sent again now and then
		reads := readsOf(fmt.Sprint("jobs", i))
		if reads == [n - 1]int64{} {
			return
		}
		all = append(all, reads)
	}
	t.Errorf("the candidates of three elections have read %v times between the resignation and their election, want never", all)
}

func TestNextInLineKnowsThatItIsWhenTheOneBetweenHasLeft(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "")
	ctx, leave := context.WithCancel(t.Context())
	between := campaign(ctx, newElector(t, client), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	var calls rpcCounter
	next := campaign(t.Context(), newElector(t, etcdtest.NewClientFrom(t, calls.config(m.Endpoint)), leader.WithTTL(time.Minute)), "jobs", "")
	awaitQueue(t, client, "jobs", queued(3))
	awaitCalls(t, calls.reads, 2) // of the one before it and of itself, when it watches them
	leave()
	etcdtest.Await(t, "the end of a campaign", between)
	awaitCalls(t, calls.reads, 4) // who is before it now, and that one when it watches it
	resign(t, first)
	awaitLeader(t, next)
	if got := calls.reads(); got != 4 {
		t.Errorf("it read %d times between the resignation and its election", got-4)
	}
}

// The next one waits for the deletion, and nobody for the end of a watch.
func TestResignationDeletesBeforeItLetsGoOfTheWatch(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	kv, watches := &brokenKV{KV: client.KV}, make(chan context.Context, 1)
	broken.KV, broken.Watcher = kv, watchReporter{client.Watcher, watches}
	l := lead(t, newElector(t, broken), "jobs", "")
	watch := etcdtest.Await(t, "the watch of the own key", watches)
	var given atomic.Bool
	before := func() { given.Store(watch.Err() != nil) }
	kv.before.Store(&before)
	resign(t, l)
	if given.Load() {
		t.Error("the watch was given up before the deletion was sent")
	}
	if watch.Err() == nil {
		t.Error("the watch goes on")
	}
}

// A watchReporter tells of the contexts of watches.
type watchReporter struct {
	clientv3.Watcher
	watches chan<- context.Context
}

func (w watchReporter) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	w.watches <- ctx
	return w.Watcher.Watch(ctx, key, opts...)
}

// mixer/etcd3#176: whoever waits for the one in the middle must not take its end for the leader's.
func TestNobodyIsElectedWhenACandidateInTheMiddleLeaves(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	ctx, cancel := context.WithCancel(t.Context())
	second := campaign(ctx, newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	third := campaign(t.Context(), newElector(t, client), "jobs", "third")
	awaitQueue(t, client, "jobs", queued(3))
	cancel()
	etcdtest.Await(t, "Campaign", second)
	awaitQueue(t, client, "jobs", queued(2))
	select {
	case o := <-third:
		t.Fatalf("elected while another leads: %v", o.err)
	case <-time.After(100 * time.Millisecond): // what must not happen has no event
	}
	resign(t, first)
	awaitLeader(t, third)
}

// A stock candidate that waits and campaigns again puts its key again, as a leader does that touches it.
func TestNobodyIsElectedWhenACandidateInTheMiddleIsTouchedAndLeaves(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	session, _, _ := stock(t, client, "jobs", "second", time.Minute)
	middle := awaitQueue(t, client, "jobs", queued(2))[1]
	var calls rpcCounter
	third := campaign(t.Context(), newElector(t, etcdtest.NewClientFrom(t, calls.config(m.Endpoint)), leader.WithTTL(time.Minute)), "jobs", "third")
	awaitQueue(t, client, "jobs", queued(3))
	awaitCalls(t, calls.reads, 2) // it watches the second, and itself
	if _, err := client.Put(t.Context(), middle.Key, "second", clientv3.WithLease(middle.Lease)); err != nil {
		t.Fatal(err)
	}
	awaitCalls(t, calls.reads, 3) // it has looked who is first
	if err := session.Close(); err != nil {
		t.Fatal(err)
	}
	awaitQueue(t, client, "jobs", queued(2))
	select {
	case o := <-third:
		t.Fatalf("elected while another leads: %v", o.err)
	case <-time.After(100 * time.Millisecond): // what must not happen has no event
	}
	resign(t, first)
	awaitLeader(t, third)
}

// What a leader does to its key for the next in line changes nothing for those who read the key.
func TestTouchKeepsValueAndLease(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "")
	won := campaign(t.Context(), newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	resign(t, first)
	l := awaitLeader(t, won)
	touch := etcdtest.Await(t, "a touch", client.Watch(t.Context(), l.Key(), clientv3.WithRev(l.Token()+1)))
	// One that comes late finds another term's key.
	if _, err := queue.New(client, "jobs").Touch(t.Context(), l.Key(), l.Token()-1); !errors.Is(err, queue.ErrGone) {
		t.Error(err)
	}
	if kv, err := client.Get(t.Context(), l.Key()); err != nil || kv.Kvs[0].Version != 2 {
		t.Errorf("after the touch of a term that is over, the key is %v, %v", kv, err)
	}
	if kv := touch.Events[0].Kv; string(kv.Value) != "second" || l.Key() != fmt.Sprintf("jobs/%x", kv.Lease) || kv.CreateRevision != l.Token() {
		t.Errorf("after the touch, the key is %v", kv)
	}
}

// A selectiveWatcher passes on the events of one key only.
type selectiveWatcher struct {
	clientv3.Watcher
	key string
}

func (w selectiveWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	in := w.Watcher.Watch(ctx, key, opts...)
	if key == w.key {
		return in
	}
	out := make(chan clientv3.WatchResponse)
	go func() {
		defer close(out)
		for resp := range in {
			if resp.Events = nil; !resp.Created {
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

// If the keys of leader and candidate are deleted together, the first deletion may elect the candidate before it knows
// of the second.
func TestTouchThatFindsTheKeyGoneEndsTheTerm(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	var calls rpcCounter
	deaf := wrapped(etcdtest.NewClientFrom(t, calls.config(m.Endpoint)))
	deaf.Watcher = selectiveWatcher{deaf.Watcher, first.Key()}
	renewed := make(chan struct{}, 1000)
	e := newElector(t, deaf, leader.WithTTL(5*time.Minute), leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	}))
	won := campaign(t.Context(), e, "jobs", "second")
	own := awaitQueue(t, client, "jobs", queued(2))[1]
	awaitCalls(t, calls.reads, 2) // it watches both keys
	resp, err := client.Txn(t.Context()).Then(clientv3.OpDelete(first.Key()), clientv3.OpDelete(own.Key)).Commit()
	if err != nil || len(resp.Responses) != 2 {
		t.Fatal(resp, err)
	}
	l := awaitLeader(t, won)
	awaitEnd(t, l, leader.ErrEvicted)
	if len(renewed) > 0 {
		t.Error("a renewal may have found out")
	}
	awaitEnd(t, first, leader.ErrEvicted)
}

// A candidate whose key is deleted together with that of the leader may see the other's deletion first,
// and be elected with a token that is smaller than that of the next term. Its guard does not hold, and
// what it does to its key next tells it.
func TestCandidateWhoseKeyIsDeletedTogetherWithTheLeadersDoesNotLeadOn(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	var calls rpcCounter
	muted := wrapped(etcdtest.NewClientFrom(t, calls.config(m.Endpoint)))
	watcher := &mutedWatcher{Watcher: muted.Watcher}
	muted.Watcher = watcher
	next := campaign(t.Context(), newElector(t, muted, leader.WithTTL(5*time.Minute)), "jobs", "second") // no renewal comes
	second := awaitQueue(t, client, "jobs", queued(2))[1]
	awaitCalls(t, calls.reads, 2) // it watches both keys
	watcher.key.Store(&second.Key)
	third := campaign(t.Context(), newElector(t, client), "jobs", "third")
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

// A valueCounter counts the bytes of the values that the watches of a key deliver, and reports the watches' contexts.
type valueCounter struct {
	clientv3.Watcher
	key     string
	bytes   atomic.Int64
	watches chan context.Context
}

func (c *valueCounter) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	if key != c.key {
		return c.Watcher.Watch(ctx, key, opts...)
	}
	in, out := c.Watcher.Watch(ctx, key, opts...), make(chan clientv3.WatchResponse)
	c.watches <- ctx
	go func() {
		defer close(out)
		for resp := range in {
			for _, ev := range resp.Events {
				c.bytes.Add(int64(len(ev.Kv.Value)))
			}
			select {
			case out <- resp:
			case <-ctx.Done():
			}
		}
	}()
	return out
}

// A candidate watches the puts of the one before it until that one's touch says that it leads. Later puts carry the
// values that the leader proclaims, and nobody needs them: a watch of deletions alone replaces the first watch.
func TestWhatALeaderThatHadWaitedProclaimsDoesNotReachTheNextInLine(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	won := campaign(t.Context(), newElector(t, client), "jobs", "second")
	second := awaitQueue(t, client, "jobs", queued(2))[1]
	counter := &valueCounter{Watcher: client.Watcher, key: second.Key, watches: make(chan context.Context, 10)}
	counting := wrapped(client)
	counting.Watcher = counter
	next := campaign(t.Context(), newElector(t, counting), "jobs", "third")
	awaitQueue(t, client, "jobs", queued(3))
	before := etcdtest.Await(t, "the watch of the one before", counter.watches)
	resign(t, first)
	l := awaitLeader(t, won)
	replaced := true
	select {
	case <-before.Done():
	case <-time.After(5 * time.Second):
		replaced = false
	}
	const n, size = 10, 100_000
	for i := range n {
		if err := l.Proclaim(t.Context(), fmt.Sprint(i)+strings.Repeat("v", size)); err != nil {
			t.Fatal(err)
		}
	}
	resign(t, l)
	resign(t, awaitLeader(t, next))
	// All that the watch delivered came before the deletion.
	if got := counter.bytes.Load(); got > size {
		t.Errorf("the next in line got %d bytes of the %d values of %d bytes that the leader has proclaimed", got, n, size)
	}
	if !replaced {
		t.Error("the next in line went on to watch the values of the leader")
	}
}

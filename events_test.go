package leader_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// The tests of this file are about events of watches that are older than what they seem to be about, that come too
// late, or that do not come at all.

// A laggingWatcher opens watches as a member does that lags: what it takes for now is a revision of the
// past.
type laggingWatcher struct {
	clientv3.Watcher
	now  atomic.Int64         // 0: it does not lag
	told chan *clientv3.Event // the first deletion of each watch, when it was passed on
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
		ev := etcdtest.Await(t, "the deletion of the earlier key", w.told)
		if string(ev.Kv.Key) != l.Key() {
			continue
		}
		if ev.Kv.ModRevision >= l.Token() {
			t.Fatalf("the deletion is of revision %d, the key of %d", ev.Kv.ModRevision, l.Token())
		}
		return
	}
}

func lagging(client *clientv3.Client) (*clientv3.Client, *laggingWatcher) {
	w := &laggingWatcher{Watcher: client.Watcher, told: make(chan *clientv3.Event, 100)}
	c := wrapped(client)
	c.Watcher = w
	return c, w
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

// It is not the end of the key that the candidate waits for.
func TestDeletionOfAnEarlierKeyOfTheSameNameElectsNobody(t *testing.T) {
	_, client := start(t)
	for _, before := range []int{1, 2} {
		t.Run(fmt.Sprintf("behind %d", before), func(t *testing.T) {
			name := t.Name()
			earlier, first := again(t, newElector(t, client), name, "first")
			lag, w := lagging(client)
			w.now.Store(earlier.Token())
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			var middle <-chan outcome
			if before == 2 { // it does not know then that the first one is the oldest
				middle = campaign(ctx, newElector(t, client), name, "middle")
				awaitQueue(t, client, name, queued(2))
			}
			next := campaign(t.Context(), newElector(t, lag), name, "next")
			awaitQueue(t, client, name, queued(before+1))
			if middle != nil {
				leave()
				etcdtest.Await(t, "Campaign", middle)
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

// A term that is ended by such an event forgets its key, and the next campaign leads with that key, and so with the old
// token.
func TestDeletionOfAnEarlierOwnKeyEndsNoTermAndNoOldTokenLeadsAgain(t *testing.T) {
	_, client := start(t)
	lag, w := lagging(client)
	e := newElector(t, lag)
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

// Nor is it the end of the candidate's own key.
func TestDeletionOfAnEarlierOwnKeyCostsNoCandidateItsPlace(t *testing.T) {
	_, client := start(t)
	lag, w := lagging(client)
	e := newElector(t, lag)
	earlier, l := again(t, e, "jobs", "")
	resign(t, l)
	first := lead(t, newElector(t, client), "jobs", "first")
	w.now.Store(earlier.Token())
	next := campaign(t.Context(), e, "jobs", "second")
	second := awaitQueue(t, client, "jobs", queued(2))[1]
	third := campaign(t.Context(), newElector(t, client), "jobs", "third")
	awaitQueue(t, client, "jobs", queued(3))
	for string(etcdtest.Await(t, "the deletion of the earlier key", w.told).Kv.Key) != second.Key {
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

// The member tells of the earlier term after Observe has read of the present one.
func TestObserveDoesNotGoBackWhereAMemberLags(t *testing.T) {
	_, client := start(t)
	earlier, l := again(t, newElector(t, client), "jobs", "one")
	if err := l.Proclaim(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	lag, w := lagging(client)
	w.now.Store(earlier.Token())
	observed := observe(t, newElector(t, lag), "jobs")
	if c := etcdtest.Await(t, "the leader", observed); c.Value != "two" || c.Token != l.Token() {
		t.Errorf("observed %+v, want token %d", c, l.Token())
	}
	w.awaitOld(t, l)
	resign(t, l)
	if c := etcdtest.Await(t, "the vacancy", observed); c != (leader.Candidate{}) {
		t.Errorf("observed %+v though nobody leads", c)
	}
}

// The event that elects may have been under way when the candidate's own key was deleted (etcd-io/etcd#19597).
func TestCandidateWhoseKeyIsGoneIsNotElectedByALateEvent(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	var calls rpcCounter
	late := wrapped(etcdtest.NewClientFrom(t, calls.config(m.Endpoint)))
	late.Watcher = lateWatcher{late.Watcher, first.Key()}
	next := campaign(t.Context(), newElector(t, late), "jobs", "second")
	old := awaitQueue(t, client, "jobs", queued(2))[1]
	awaitCalls(t, calls.reads, 2) // it watches both keys
	resign(t, first)
	if _, err := client.Delete(t.Context(), old.Key); err != nil {
		t.Fatal(err)
	}
	if l := awaitLeader(t, next); l.Token() == old.Token || !guarded(t, client, l) {
		t.Errorf("elected with token %d, of a key that was deleted", l.Token())
	}
}

// A lateWatcher passes the events of a key on when the watch has been given up.
type lateWatcher struct {
	clientv3.Watcher
	key string
}

func (w lateWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	in := w.Watcher.Watch(ctx, key, opts...)
	if key != w.key {
		return in
	}
	out := make(chan clientv3.WatchResponse, 2) // that it is created, and that the key is deleted
	go func() {
		defer close(out)
		for resp := range in {
			if len(resp.Events) > 0 {
				<-ctx.Done()
			}
			out <- resp
		}
	}()
	return out
}

// etcd-io/etcd#8980: the stock candidate would wait for ever.
func TestNextInLineLearnsThatItLeadsThoughItsWatchIsDead(t *testing.T) {
	_, client := start(t)
	deaf := wrapped(client)
	watcher := &deafWatcher{Watcher: client.Watcher}
	deaf.Watcher = watcher
	first := lead(t, newElector(t, client), "jobs", "first")
	next := campaign(t.Context(), newExpiring(t, deaf), "jobs", "second")
	observed := observe(t, newExpiring(t, deaf), "jobs")
	if c := etcdtest.Await(t, "the leader", observed); c.Value != "first" {
		t.Errorf("observed %+v", c)
	}
	awaitQueue(t, client, "jobs", queued(2))
	time.Sleep(100 * time.Millisecond) // the candidate reads what is before it, once
	watcher.deaf.Store(true)
	resign(t, first)
	resigned := time.Now()
	o := etcdtest.Await(t, "Campaign", next)
	if o.err != nil {
		t.Fatal(o.err)
	}
	if took := o.at.Sub(resigned); took > 3*ttl {
		t.Errorf("learned of it after %v, want one TTL of %v", took, ttl)
	}
	if c := etcdtest.Await(t, "the next leader", observed); c.Value != "second" && c != (leader.Candidate{}) {
		t.Errorf("observed %+v", c)
	}
	resign(t, o.l)
}

// Its watch is dead as in etcd-io/etcd#8980, and a renewal tells.
func TestLeaderLearnsThatItsKeyIsDeletedThoughItsWatchIsDead(t *testing.T) {
	_, client := start(t)
	deaf := wrapped(client)
	watcher := &deafWatcher{Watcher: client.Watcher}
	deaf.Watcher = watcher
	e := newExpiring(t, deaf)
	lead(t, e, "other", "") // keeps the lease
	l := lead(t, e, "jobs", "")
	time.Sleep(100 * time.Millisecond) // the own key is read once, when its watch has been created
	watcher.deaf.Store(true)
	if _, err := client.Delete(t.Context(), l.Key()); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, l, leader.ErrEvicted) // by the next renewal
}

// A watch that is created and dies again and again is one streak of failures.
func TestFlappingWatchIsOneStreak(t *testing.T) {
	_, client := start(t)
	flapping := wrapped(client)
	watcher := &flappingWatcher{Watcher: client.Watcher}
	flapping.Watcher = watcher
	var log logRecorder
	// No renewal falls into it, which might fail on a busy machine.
	l := lead(t, newElector(t, flapping, leader.WithTTL(time.Minute), leader.WithLogger(slog.New(&log))), "jobs", "")
	const observed = 3 * time.Second
	time.Sleep(observed)
	// Pauses double from 50 ms; without that there would be one watch every 50 ms at the most.
	if n := watcher.watches.Load(); n > int64(observed/(200*time.Millisecond)) {
		t.Errorf("%d watches in %v", n, observed)
	}
	got := slices.Sorted(slices.Values(log.lines())) // the watch may fail before Campaign returns
	if !slices.Equal(got, []string{"INFO elected", "WARN watch of the own key is being retried"}) {
		t.Errorf("logged %q", got)
	}
	resign(t, l)
}

type flappingWatcher struct {
	clientv3.Watcher
	watches atomic.Int64
}

func (w *flappingWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	w.watches.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	in, out := w.Watcher.Watch(ctx, key, opts...), make(chan clientv3.WatchResponse, 1)
	if created, ok := <-in; ok {
		out <- created
	}
	cancel()
	close(out)
	return out
}

// A stuckWatcher creates no watch on a client's first stream, as clientv3 3.7.3 does once that is stuck.
type stuckWatcher struct {
	clientv3.Watcher
	tried *atomic.Int64 // watches on it
}

func (w stuckWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get("leader-watch-stream")) > 0 {
		return w.Watcher.Watch(ctx, key, opts...)
	}
	w.tried.Add(1)
	<-ctx.Done()
	none := make(chan clientv3.WatchResponse)
	close(none)
	return none
}

// stuck returns a client whose first stream is, and how often it was tried.
func stuck(client *clientv3.Client) (*clientv3.Client, *atomic.Int64) {
	stuck, tried := wrapped(client), new(atomic.Int64)
	stuck.Watcher = stuckWatcher{client.Watcher, tried}
	return stuck, tried
}

func TestStreamThatIsStuckDelaysOneObserveAlone(t *testing.T) {
	_, client := start(t)
	client, tried := stuck(client)
	e := newElector(t, client)
	for range 3 {
		for _, err := range e.Observe(t.Context(), "jobs") {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	if n := tried.Load(); n != 1 {
		t.Errorf("the stream that is stuck was tried %d times, want 1", n)
	}
}

// The read of a candidate's place may come before its watch is given up: that says as much of the stream.
func TestStreamThatIsStuckDelaysOneHandoffAlone(t *testing.T) {
	_, client := start(t)
	broken, tried := stuck(client)
	e, other := newElector(t, broken, leader.WithTTL(20*time.Second)), newElector(t, client, leader.WithTTL(20*time.Second))
	var first int64
	for i := range 3 {
		l := lead(t, other, "jobs", "")
		waiting := campaign(t.Context(), e, "jobs", "")
		awaitQueue(t, client, "jobs", queued(2))
		if i == 0 { // until it is noticed
			time.Sleep(1500 * time.Millisecond)
			first = tried.Load()
		}
		resign(t, l)
		resign(t, awaitLeader(t, waiting))
	}
	if n := tried.Load(); first == 0 || n != first {
		t.Errorf("the stream that is stuck was tried %d times, and %d times later", first, n-first)
	}
}

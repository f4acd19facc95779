package leader_test

import (
	"context"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
)

// The tests of this file are the ways in which elections on etcd have gone wrong, by their numbers in
// the list of pitfalls that this package was written from, with who met them. (8 is in deposed_test.go;
// 24, a machine that was suspended, is in internal/lease, where the clocks can be set.) Where it is cheap the same is done to a stock [concurrency.Election], to show the
// difference; -short leaves that out.

// mended says that a pitfall is no more.
const mended = "stock does not do this any more: take it out of the README's table"

// stock campaigns with concurrency.Election, on a session of its own.
func stock(tb testing.TB, client *clientv3.Client, name, value string, ttl time.Duration) (*concurrency.Session, *concurrency.Election, <-chan outcome) {
	tb.Helper()
	s, err := concurrency.NewSession(client, concurrency.WithTTL(int(ttl/time.Second)))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() }) // an error says that the lease is gone already
	e := concurrency.NewElection(s, name)
	won := make(chan outcome, 1)
	go func() {
		err := e.Campaign(tb.Context(), value)
		won <- outcome{err: err, at: time.Now()}
	}()
	return s, e, won
}

// Pitfall 1: etcd-io/etcd#19597, cagriekin/charts#326: the stock candidate is elected without a key.
func TestWaitingCandidateWhoseLeaseIsRevokedJoinsAgain(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	old := awaitQueue(t, client, "jobs", queued(2))[1]
	if _, err := client.Revoke(t.Context(), old.Lease); err != nil {
		t.Fatal(err)
	}
	again := awaitQueue(t, client, "jobs", func(cs []leader.Candidate) bool {
		return len(cs) == 2 && cs[1].Lease != old.Lease
	})
	resign(t, first)
	l := awaitLeader(t, next)
	if l.Token() != again[1].Token || !guarded(t, client, l) {
		t.Errorf("elected with token %d, the key in etcd has %d", l.Token(), again[1].Token)
	}
	resign(t, l)

	if testing.Short() {
		return
	}
	first = lead(t, newElector(t, client), "stock", "first")
	s, election, won := stock(t, client, "stock", "second", time.Minute)
	awaitQueue(t, client, "stock", queued(2))
	if _, err := client.Revoke(t.Context(), s.Lease()); err != nil {
		t.Fatal(err)
	}
	awaitQueue(t, client, "stock", queued(1))
	resign(t, first)
	if err := await(t, "stock Campaign", won).err; err == nil {
		if resp, err := client.Get(t.Context(), election.Key()); err == nil && len(resp.Kvs) == 0 {
			t.Log("stock: elected without a key")
			return
		}
	}
	t.Error(mended)
}

// Pitfall 1.
func TestWaitingCandidateWhoseKeyIsDeletedJoinsAgain(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	log := make(logChannel, 100)
	e := newElector(t, client, leader.WithLogger(slog.New(log)))
	lead(t, e, "other", "") // keeps the lease, so that the candidate joins again under the same key
	next := campaign(t.Context(), e, "jobs", "second")
	old := awaitQueue(t, client, "jobs", queued(2))[1]
	if _, err := client.Delete(t.Context(), old.Key); err != nil {
		t.Fatal(err)
	}
	lost := awaitRecord(t, log, "candidacy was lost, joining again", next)
	if want := fmt.Sprintf("key %q deleted", old.Key); !strings.Contains(attr(lost, "error"), want) {
		t.Errorf("logged %q, want it to say %q", attr(lost, "error"), want)
	}
	awaitQueue(t, client, "jobs", func(cs []leader.Candidate) bool { return len(cs) == 2 && cs[1].Token > old.Token })
	resign(t, first)
	if l := awaitLeader(t, next); l.Key() != old.Key || !guarded(t, client, l) {
		t.Errorf("elected with key %q, want %q again", l.Key(), old.Key)
	}
}

// Pitfall 1: the event that elects may have been under way when the candidate's own key was deleted.
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

// Pitfall 1.
func TestWaitingCandidateWhoseLeaseExpiresJoinsAgain(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	link := etcdtest.NewLink(t, m)
	next := campaign(t.Context(), newElector(t, etcdtest.NewClient(t, link.Endpoint)), "jobs", "second")
	old := awaitQueue(t, client, "jobs", queued(2))[1]
	link.Darken()
	awaitQueue(t, client, "jobs", queued(1))
	link.Heal()
	awaitQueue(t, client, "jobs", func(cs []leader.Candidate) bool { return len(cs) == 2 && cs[1].Lease != old.Lease })
	resign(t, first)
	if l := awaitLeader(t, next); !guarded(t, client, l) {
		t.Error("elected without a key")
	}
}

// Pitfall 2: pingcap/tidb#54689: the stock leader never notices.
func TestLeaderWhoseKeyIsDeletedStops(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client, leader.WithTTL(5*time.Minute)) // no renewal comes before the watch event
	lead(t, e, "other", "")                                   // keeps the lease
	for i := range 10 {
		l := lead(t, e, "jobs", "") // and right after the win
		if i%2 == 0 {
			time.Sleep(time.Duration(i) * 10 * time.Millisecond)
		}
		if _, err := client.Delete(t.Context(), l.Key()); err != nil {
			t.Fatal(err)
		}
		awaitEnd(t, l, leader.ErrEvicted)
		resign(t, l) // nil: the term was lost
	}

	if testing.Short() {
		return
	}
	_, election, won := stock(t, client, "stock", "", ttl)
	if err := await(t, "stock Campaign", won).err; err != nil {
		t.Fatal(err)
	}
	key := election.Key()
	if _, err := client.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	second := lead(t, newElector(t, client), "stock", "")
	if election.Key() == key && second.IsLeader() {
		t.Log("stock: still believes that it leads, beside its successor")
	} else {
		t.Error(mended)
	}
}

// Pitfall 2.
func TestLeaderWhoseLeaseIsRevokedStops(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	terms := []*leader.Leader{lead(t, e, "a", ""), lead(t, e, "b", "")}
	id := awaitQueue(t, client, "a", queued(1))[0].Lease
	if _, err := client.Revoke(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	for _, l := range terms {
		awaitEnd(t, l, leader.ErrEvicted)
	}
	lead(t, e, "a", "") // on a fresh lease
}

// Pitfall 3: etcd-io/etcd#14641: the stock Campaign blocks for good.
func TestCampaignReturnsWhenCtxEndsWithoutEtcd(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	far := etcdtest.NewClient(t, link.Endpoint)
	first := lead(t, newElector(t, client), "jobs", "first")
	ctx, cancel := context.WithCancel(t.Context())
	next := campaign(ctx, newElector(t, far), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	link.Darken()
	cancel()
	ended := time.Now()
	o := await(t, "Campaign", next) // while the link is dark
	if !errors.Is(o.err, context.Canceled) {
		t.Errorf("Campaign returned %v", o.err)
	}
	if took := o.at.Sub(ended); took > 3*2*time.Second {
		t.Errorf("the clean-up, which is bounded by 2 s, took %v", took)
	}
	// The lease takes the key away.
	awaitQueue(t, client, "jobs", queued(1))
	link.Heal()
	resign(t, first)
}

// Pitfall 4: etcd-io/etcd#14631, #6681: stock NewSession blocks for ever.
func TestCampaignReturnsWhenCtxEndsBeforeThereIsALease(t *testing.T) {
	m, _ := start(t)
	link := etcdtest.NewLink(t, m)
	link.Darken()
	for what, client := range map[string]*clientv3.Client{
		"dark":    etcdtest.NewClient(t, link.Endpoint),
		"refused": etcdtest.NewClient(t, "127.0.0.1:1"),
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		e := newElector(t, client)
		_, err := e.Campaign(ctx, "jobs", "")
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: Campaign returned %v", what, err)
		}
		if !strings.Contains(err.Error(), "last failure: no ") {
			t.Errorf("%s: the error does not say why it took so long: %v", what, err)
		}
		if err := e.Close(t.Context()); err != nil {
			t.Errorf("%s: Close: %v", what, err)
		}
	}
	link.Heal()
}

// Pitfall 4.
func TestResignAndCloseReturnWhenCtxEndsWithoutEtcd(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	e := newElector(t, etcdtest.NewClient(t, link.Endpoint))
	a := lead(t, e, "a", "")
	b := lead(t, e, "b", "")
	link.Darken()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := a.Resign(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Resign returned %v", err)
	}
	if err := e.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close returned %v", err)
	}
	awaitEnd(t, a, leader.ErrResigned)
	awaitEnd(t, b, leader.ErrResigned)
	// Nobody renews the lease on their behalf.
	awaitQueue(t, client, "a", queued(0))
	link.Heal()
	resign(t, a)
}

// Pitfall 4.
func TestCloseThatFailsDoesNotKeepEndedTermsAlive(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	working, finish, ran := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ran <- e.Run(t.Context(), "slow", "", func(context.Context, *leader.Leader) error {
			close(working)
			<-finish
			return nil
		})
	}()
	await(t, "lead", working)
	l := lead(t, e, "jobs", "")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := e.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close returned %v", err)
	}
	awaitEnd(t, l, leader.ErrResigned)
	awaitQueue(t, client, "jobs", queued(0)) // though the lease is renewed for Run
	close(finish)
	if err := await(t, "Run", ran); !errors.Is(err, leader.ErrClosed) {
		t.Errorf("Run returned %v", err)
	}
}

// Pitfall 5: etcd-io/etcd#22123, google/trillian#3789: the stock Resign forgets the key, and says nil the
// second time.
func TestResignWithACancelledCtxCanBeRetried(t *testing.T) {
	_, client := start(t)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, shared := range []bool{false, true} {
		e := newElector(t, client, leader.WithTTL(time.Minute))
		if shared {
			lead(t, e, "other", "")
		}
		l := lead(t, e, "jobs", "")
		if err := l.Resign(cancelled); !errors.Is(err, context.Canceled) {
			t.Errorf("shared %v: Resign with a cancelled ctx returned %v", shared, err)
		}
		awaitEnd(t, l, leader.ErrResigned)
		if !guarded(t, client, l) {
			t.Errorf("shared %v: the key is gone though nobody could delete it", shared)
		}
		resign(t, l)
		if guarded(t, client, l) {
			t.Errorf("shared %v: the retry left the key", shared)
		}
		for range 20 { // nothing is left to do, so nothing can fail
			if err := l.Resign(cancelled); err != nil {
				t.Fatalf("shared %v: Resign of a term that was resigned returned %v", shared, err)
			}
		}
	}

	if testing.Short() {
		return
	}
	_, election, won := stock(t, client, "stock", "", time.Minute)
	if err := await(t, "stock Campaign", won).err; err != nil {
		t.Fatal(err)
	}
	key := election.Key()
	first, second := election.Resign(cancelled), election.Resign(t.Context())
	if resp, err := client.Get(t.Context(), key); err == nil && len(resp.Kvs) == 1 {
		t.Logf("stock: Resign returned %v, then %v, and the key is still there", first, second)
	} else {
		t.Error(mended)
	}
}

// Pitfall 5: and where nobody retries, the lease is not renewed on behalf of the key.
func TestKeyLeftByAFailedResignExpires(t *testing.T) {
	_, client := start(t)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	l := lead(t, newElector(t, client), "jobs", "")
	if err := l.Resign(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("Resign with a cancelled ctx returned %v", err)
	}
	awaitQueue(t, client, "jobs", queued(0))
	awaitExpiry(t, client)
}

// Pitfall 5: A key that a failed resignation has left must not keep its election blocked for as long as other
// elections keep the lease, nor come back to life in a new term.
func TestKeyLeftByAFailedResignIsDeletedWhileTheLeaseLives(t *testing.T) {
	_, client := start(t)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	e := newElector(t, client)
	lead(t, e, "other", "")
	l := lead(t, e, "jobs", "")
	if err := l.Resign(cancelled); err == nil {
		t.Fatal("Resign with a cancelled ctx returned nil")
	}
	awaitQueue(t, client, "jobs", queued(0)) // a renewal has seen to it

	l = lead(t, e, "jobs", "")
	if err := l.Resign(cancelled); err == nil {
		t.Fatal("Resign with a cancelled ctx returned nil")
	}
	again := lead(t, e, "jobs", "")
	if again.Key() != l.Key() || again.Token() <= l.Token() || guarded(t, client, l) {
		t.Errorf("the new term has token %d, the one before it %d", again.Token(), l.Token())
	}
	resign(t, l) // the retry comes late, and must not harm the new term
	if !again.IsLeader() || !guarded(t, client, again) {
		t.Error("the late retry of Resign deleted the key of the next term")
	}
}

// Pitfall 6: etcd-io/etcd#21128, pingcap/dm#1983: stock leaves a candidate behind that blocks the others.
func TestCampaignRecognisesItsOwnKeyAfterALostReply(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	kv := &brokenKV{KV: client.KV}
	broken.KV = kv
	kv.loseReplies(3)
	l := lead(t, newElector(t, broken), "jobs", "me")
	if cs := awaitQueue(t, client, "jobs", queued(1)); cs[0].Token != l.Token() || cs[0].Value != "me" {
		t.Errorf("the queue is %+v, the term has token %d", cs, l.Token())
	}
	resign(t, l)

	// The same with somebody before it.
	first := lead(t, newElector(t, client), "jobs", "first")
	kv.loseReplies(1)
	next := campaign(t.Context(), newElector(t, broken), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	select {
	case o := <-next:
		t.Fatalf("elected beside another leader: %v", o.err)
	case <-time.After(50 * time.Millisecond):
	}
	resign(t, first)
	awaitLeader(t, next)
}

// Pitfall 6.
func TestCampaignThatFailsLeavesNoKey(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	for _, shared := range []bool{false, true} {
		e := newElector(t, client)
		if shared {
			lead(t, e, "other", "")
		}
		ctx, cancel := context.WithCancel(t.Context())
		next := campaign(ctx, e, "jobs", "second")
		awaitQueue(t, client, "jobs", queued(2))
		cancel()
		if o := await(t, "Campaign", next); !errors.Is(o.err, context.Canceled) {
			t.Errorf("Campaign returned %v", o.err)
		}
		if cs, err := e.Candidates(t.Context(), "jobs"); err != nil || len(cs) != 1 {
			t.Errorf("shared %v: Campaign left the queue as %+v, %v", shared, cs, err)
		}
	}
	resign(t, first)
}

// Pitfall 6: A join that was given up for lost may reach etcd after the clean-up. While other elections keep
// the lease, a renewal must find it.
func TestJoinThatArrivesAfterItsCampaignFailedIsSweptAway(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	kv := &brokenKV{KV: client.KV}
	broken.KV = kv
	e := newElector(t, broken)
	l := lead(t, e, "other", "")
	ctx, cancel := context.WithCancel(t.Context())
	fail := func(*clientv3.TxnResponse, error) (*clientv3.TxnResponse, error) {
		kv.after.Store(nil)
		cancel()
		return nil, rpctypes.ErrTimeoutDueToConnectionLost
	}
	kv.after.Store(&fail)
	if _, err := e.Campaign(ctx, "jobs", ""); !errors.Is(err, context.Canceled) {
		t.Fatalf("Campaign returned %v", err)
	}
	id := awaitQueue(t, client, "other", queued(1))[0].Lease
	if _, err := client.Put(t.Context(), fmt.Sprintf("jobs/%x", id), "late", clientv3.WithLease(id)); err != nil {
		t.Fatal(err)
	}
	awaitQueue(t, client, "jobs", queued(0))
	if !l.IsLeader() {
		t.Error("the term in the other election has ended")
	}
}

var blackholes = flag.Int("blackholes", 10, "`number` of leaders that TestBlackholedLeaderStopsBeforeItsSuccessorStarts cuts off")

// Pitfall 7: Netflix/curator#980 and pd's lease: the stock leader learns of a blackhole up to a second after
// its successor has won, nine seconds if the first keepalive was lost.
func TestBlackholedLeaderStopsBeforeItsSuccessorStarts(t *testing.T) {
	m, client := start(t)
	const together = 10
	var tried, overlaps, stockTried, stockOverlaps int
	var worst, stockWorst time.Duration
	for tried < *blackholes {
		n := min(together, *blackholes-tried)
		link := etcdtest.NewLink(t, m)
		far := etcdtest.NewClient(t, link.Endpoint)
		type pair struct {
			old  *leader.Leader
			end  chan time.Time // of its context
			next <-chan outcome
		}
		var pairs []pair
		for i := range n {
			name := fmt.Sprintf("jobs-%d-%d", tried, i)
			old := lead(t, newElector(t, far), name, "old")
			end := make(chan time.Time, 1)
			context.AfterFunc(old.Context(), func() { end <- time.Now() })
			pairs = append(pairs, pair{old, end, campaign(t.Context(), newElector(t, client), name, "next")})
			awaitQueue(t, client, name, queued(2))
			time.Sleep(ttl / 3 / together) // so that each is cut off at another point of its interval
		}
		type stockPair struct {
			end  chan time.Time
			next <-chan outcome
		}
		var stocks []stockPair
		if !testing.Short() {
			for i := range n {
				name := fmt.Sprintf("stock-%d-%d", tried, i)
				s, _, won := stock(t, far, name, "old", ttl)
				if err := await(t, "stock Campaign", won).err; err != nil {
					t.Fatal(err)
				}
				end := make(chan time.Time, 1)
				go func() { <-s.Done(); end <- time.Now() }()
				stocks = append(stocks, stockPair{end, campaign(t.Context(), newElector(t, client), name, "next")})
				awaitQueue(t, client, name, queued(2))
			}
		}
		link.Darken()
		for _, p := range pairs {
			next := await(t, "the successor", p.next)
			if next.err != nil {
				t.Fatal(next.err)
			}
			if p.old.IsLeader() {
				t.Error("the old leader still believes that it leads")
			}
			end := await(t, "the end of the old term", p.end)
			if end.After(next.at) {
				overlaps++
				worst = max(worst, end.Sub(next.at))
			}
			if cause := context.Cause(p.old.Context()); !errors.Is(cause, leader.ErrExpired) {
				t.Errorf("the old term ended with %v", cause)
			}
			tried++
		}
		for _, p := range stocks {
			next := await(t, "the successor", p.next)
			end := await(t, "the end of the stock session", p.end)
			if stockTried++; next.err == nil && end.After(next.at) {
				stockOverlaps++
				stockWorst = max(stockWorst, end.Sub(next.at))
			}
		}
		link.Heal()
	}
	t.Logf("%d blackholes, %d overlaps, the longest %v; stock: %d, %d, %v", tried, overlaps, worst, stockTried, stockOverlaps, stockWorst)
	if overlaps > 0 {
		t.Errorf("%d of %d terms overlapped with their successor's", overlaps, tried)
	}
}

// Pitfall 9: etcd-io/etcd#8980, tikv/pd#6961: stock stays with the dark endpoint until the lease is lost.
func TestLeaderSurvivesOneDarkEndpointOfThree(t *testing.T) {
	t.Parallel()
	members := etcdtest.StartCluster(t, 3)
	client := etcdtest.NewClient(t, members[0].Endpoint, members[1].Endpoint, members[2].Endpoint)
	const ttl = 3 * time.Second
	var terms []*leader.Leader
	var links []*etcdtest.Link
	for dark := range members { // one leader for each endpoint that may go dark
		var endpoints []string
		for i, m := range members {
			link := etcdtest.NewLink(t, m)
			endpoints = append(endpoints, link.Endpoint)
			if i == dark {
				links = append(links, link)
			}
		}
		e := newElector(t, etcdtest.NewClient(t, endpoints...), leader.WithTTL(ttl))
		terms = append(terms, lead(t, e, fmt.Sprintf("jobs%d", dark), ""))
	}
	for _, link := range links {
		link.Darken()
	}
	time.Sleep(2 * ttl) // what must not happen has no event
	for i, l := range terms {
		if !l.IsLeader() || !guarded(t, client, l) {
			t.Errorf("with endpoint %d dark the term was lost: %v", i, context.Cause(l.Context()))
		}
	}
	for _, link := range links {
		link.Heal()
	}
}

// Pitfall 9: a request that happens to go to the dark endpoint must not be the only one that a resignation
// sends: nobody would lead until the lease has expired.
func TestResignationAsksAnotherEndpointWhereOneIsDark(t *testing.T) {
	t.Parallel()
	members := etcdtest.StartCluster(t, 3)
	var endpoints []string
	var links []*etcdtest.Link
	for _, m := range members {
		links = append(links, etcdtest.NewLink(t, m))
		endpoints = append(endpoints, links[len(links)-1].Endpoint)
	}
	client := etcdtest.NewClient(t, endpoints...)
	// Should a busy machine make etcd itself lose its leader just then, the next trial has it again.
	for trial := range 3 {
		var terms []*leader.Leader
		for i := range 4 { // each resignation sends two requests: some go to the dark endpoint
			terms = append(terms, lead(t, newElector(t, client), fmt.Sprintf("jobs%d-%d", trial, i), ""))
		}
		links[0].Darken()
		resigned := make(chan error, len(terms))
		for _, l := range terms {
			go func() { resigned <- l.Resign(t.Context()) }()
		}
		var err error
		for range terms {
			err = errors.Join(err, await(t, "a resignation", resigned))
		}
		links[0].Heal()
		if err == nil {
			return
		}
		t.Logf("trial %d: %v", trial, err)
	}
	t.Error("a resignation failed in each trial")
}

// A deafWatcher stops to pass events on when it is told to, without a sign: as a stream does that
// has died silently.
type deafWatcher struct {
	clientv3.Watcher
	deaf atomic.Bool
}

func (w *deafWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	in, out := w.Watcher.Watch(ctx, key, opts...), make(chan clientv3.WatchResponse)
	go func() {
		defer close(out)
		for resp := range in {
			if w.deaf.Load() {
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

// Pitfall 10: etcd-io/etcd#8980: the stock candidate would wait for ever.
func TestNextInLineLearnsThatItLeadsThoughItsWatchIsDead(t *testing.T) {
	_, client := start(t)
	deaf := wrapped(client)
	watcher := &deafWatcher{Watcher: client.Watcher}
	deaf.Watcher = watcher
	first := lead(t, newElector(t, client), "jobs", "first")
	next := campaign(t.Context(), newElector(t, deaf), "jobs", "second")
	observed := observe(t, newElector(t, deaf), "jobs")
	if c := await(t, "the leader", observed); c.Value != "first" {
		t.Errorf("observed %+v", c)
	}
	awaitQueue(t, client, "jobs", queued(2))
	time.Sleep(100 * time.Millisecond) // the candidate reads what is before it, once
	watcher.deaf.Store(true)
	resign(t, first)
	resigned := time.Now()
	o := await(t, "Campaign", next)
	if o.err != nil {
		t.Fatal(o.err)
	}
	if took := o.at.Sub(resigned); took > 3*ttl {
		t.Errorf("learned of it after %v, want one TTL of %v", took, ttl)
	}
	if c := await(t, "the next leader", observed); c.Value != "second" && c != (leader.Candidate{}) {
		t.Errorf("observed %+v", c)
	}
	resign(t, o.l)
}

// Pitfall 10.
func TestLeaderLearnsThatItsKeyIsDeletedThoughItsWatchIsDead(t *testing.T) {
	_, client := start(t)
	deaf := wrapped(client)
	watcher := &deafWatcher{Watcher: client.Watcher}
	deaf.Watcher = watcher
	e := newElector(t, deaf)
	lead(t, e, "other", "") // keeps the lease
	l := lead(t, e, "jobs", "")
	time.Sleep(100 * time.Millisecond) // the own key is read once, when its watch has been created
	watcher.deaf.Store(true)
	if _, err := client.Delete(t.Context(), l.Key()); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, l, leader.ErrEvicted) // by the next renewal
}

// Pitfall 7: A slow client must not hold up the end of the term.
func TestContextEndsAtTheDeadlineThoughARequestHangs(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	deaf := wrapped(etcdtest.NewClient(t, link.Endpoint))
	kv := &hangingKV{KV: deaf.KV, release: make(chan struct{})}
	deaf.KV = kv
	l := lead(t, newElector(t, deaf), "jobs", "") // the own key's watch hangs in its first read
	link.Darken()
	awaitEnd(t, l, leader.ErrExpired)
	close(kv.release)
	awaitQueue(t, client, "jobs", queued(0))
	link.Heal()
}

// A hangingKV does not answer reads, and ignores their contexts, until it is released.
type hangingKV struct {
	clientv3.KV
	release chan struct{}
}

func (kv *hangingKV) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	<-kv.release
	return kv.KV.Get(ctx, key, opts...)
}

// Pitfall 22: A watch that is created and dies again and again is one streak of failures.
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

// Pitfall 11: hashicorp/consul#830 and #912, etcd-io/etcd#15922: needless demotions.
func TestTermSurvivesAShortOutage(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	far := etcdtest.NewClient(t, link.Endpoint)
	const ttl = 5 * time.Second
	for what, fail := range map[string]func(){"dark": link.Darken, "cut": link.Cut} {
		l := lead(t, newElector(t, far, leader.WithTTL(ttl)), "jobs", "")
		next := campaign(t.Context(), newElector(t, far, leader.WithTTL(ttl)), "jobs", "")
		awaitQueue(t, client, "jobs", queued(2))
		fail()
		time.Sleep(ttl / 2) // past the time of a renewal
		link.Heal()
		select {
		case <-l.Context().Done():
			t.Fatalf("%s: the term ended: %v", what, context.Cause(l.Context()))
		case o := <-next:
			t.Fatalf("%s: another was elected: %v", what, o.err)
		case <-time.After(ttl):
		}
		if err := l.Proclaim(t.Context(), "still"); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		resign(t, l)
		resign(t, awaitLeader(t, next))
	}
}

// Pitfall 11.
func TestTermSurvivesAChangeOfEtcdsLeader(t *testing.T) {
	t.Parallel()
	members := etcdtest.StartCluster(t, 3)
	var endpoints []string
	for _, m := range members {
		endpoints = append(endpoints, m.Endpoint)
	}
	client := etcdtest.NewClient(t, endpoints...)
	renewed := make(chan struct{}, 1000)
	e := newElector(t, client, leader.WithTTL(3*time.Second), leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	}))
	l := lead(t, e, "jobs", "")
	next := campaign(t.Context(), newElector(t, client), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	for range 3 {
		old := etcdtest.NewClient(t, raftLeaderOf(t, members).Endpoint)
		list, err := old.MemberList(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		to := slices.IndexFunc(list.Members, func(m *etcdserverpb.Member) bool { return m.ID != list.Header.MemberId })
		if _, err := old.MoveLeader(t.Context(), list.Members[to].ID); err != nil {
			t.Fatal(err)
		}
		await(t, "a renewal", renewed)
		await(t, "a renewal", renewed)
	}
	if !l.IsLeader() || !guarded(t, client, l) {
		t.Errorf("the term was lost: %v", context.Cause(l.Context()))
	}
	resign(t, l)
	resign(t, awaitLeader(t, next))
	awaitExpiry(t, client) // members list what they know of, which may be late by a moment
}

// Pitfall 12: pingcap/dm#1214: stock lets both share one key, and one Resign ends both.
func TestSecondCampaignOfOneElectorIsRefused(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	l := lead(t, e, "jobs", "")
	if _, err := e.Campaign(t.Context(), "jobs", ""); !errors.Is(err, leader.ErrCampaigning) {
		t.Errorf("Campaign while leading: %v", err)
	}
	if !l.IsLeader() {
		t.Error("the refused campaign ended the term")
	}
	other := newElector(t, client)
	ctx, cancel := context.WithCancel(t.Context())
	waiting := campaign(ctx, other, "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	if _, err := other.TryCampaign(t.Context(), "jobs", ""); !errors.Is(err, leader.ErrCampaigning) {
		t.Errorf("TryCampaign while campaigning: %v", err)
	}
	cancel()
	await(t, "Campaign", waiting)
	resign(t, l)
	resign(t, lead(t, e, "jobs", "")) // now it may
	l = lead(t, e, "jobs", "")
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	<-l.Context().Done()
	lead(t, e, "jobs", "") // as it may as soon as a term is lost
}

// Pitfall 13: etcd-io/etcd#6278, #13469: in stock "a" is blocked by "a/b" and reports its leader.
func TestElectionsWhoseNamesNestAreIndependent(t *testing.T) {
	_, client := start(t)
	names := []string{"a/b", "ab", "a/beef/1", "a"} // "a/b" is hex, too
	if _, err := client.Put(t.Context(), "a/", "data of somebody else"); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"a/config", "a/00", "a/-0", "a/BEEF", "a/0", "a/ffffffffffffffff"} {
		if _, err := client.Put(t.Context(), key, "data of somebody else"); err != nil {
			t.Fatal(err)
		}
	}
	e := newElector(t, client)
	terms := make(map[string]*leader.Leader)
	for _, name := range names {
		terms[name] = lead(t, e, name, "leader of "+name)
	}
	waiting := make(map[string]<-chan outcome)
	second := newElector(t, client)
	for _, name := range names {
		waiting[name] = campaign(t.Context(), second, name, "next of "+name)
	}
	third := make(map[string]<-chan outcome)
	for _, name := range names {
		awaitQueue(t, client, name, queued(2))
		third[name] = campaign(t.Context(), newElector(t, client), name, "third of "+name)
		awaitQueue(t, client, name, queued(3))
		c, err := e.Current(t.Context(), name)
		if err != nil || c.Value != "leader of "+name || c.Token != terms[name].Token() {
			t.Errorf("the leader of %q is %+v, %v", name, c, err)
		}
	}
	for _, name := range names {
		observed := observe(t, e, name)
		if c := await(t, "the leader", observed); c.Value != "leader of "+name {
			t.Errorf("observed %+v leading %q", c, name)
		}
		resign(t, terms[name])
		l := awaitLeader(t, waiting[name])
		if c := await(t, "the next leader", observed); c.Token != l.Token() {
			t.Errorf("observed %+v leading %q, want token %d", c, name, l.Token())
		}
		resign(t, l)
		resign(t, awaitLeader(t, third[name]))
	}
}

// Pitfall 14: google/trillian#1387: the stock Observe is silent.
func TestObserveYieldsChangesAndVacancies(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	observed := observe(t, e, "jobs")
	expect := func(value string) leader.Candidate {
		t.Helper()
		c := await(t, "a change", observed)
		if c.Value != value {
			t.Errorf("observed %+v, want value %q", c, value)
		}
		return c
	}
	if c := expect(""); c != (leader.Candidate{}) {
		t.Errorf("observed %+v though nobody leads", c)
	}
	if _, err := client.Put(t.Context(), "jobs/config", "is no candidate"); err != nil {
		t.Fatal(err)
	}
	l := lead(t, e, "jobs", "one")
	if c := expect("one"); c.Token != l.Token() || c.Key != l.Key() {
		t.Errorf("observed %+v, the term has token %d", c, l.Token())
	}
	if err := l.Proclaim(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	expect("two")
	next := campaign(t.Context(), newElector(t, client), "jobs", "three")
	awaitQueue(t, client, "jobs", queued(2)) // is no change
	resign(t, l)
	expect("three")
	resign(t, awaitLeader(t, next))
	if c := expect(""); c != (leader.Candidate{}) {
		t.Errorf("observed %+v though nobody leads", c)
	}
}

// Pitfall 15: etcd-io/etcd#7815, kube-vip#1725: the stock channel closes without a reason.
func TestObserveAndCampaignGoOnAfterACompaction(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	far := etcdtest.NewClient(t, link.Endpoint)
	l := lead(t, newElector(t, client), "jobs", "one")
	observed := observe(t, newElector(t, far), "jobs")
	if c := await(t, "the leader", observed); c.Value != "one" {
		t.Errorf("observed %+v", c)
	}
	next := campaign(t.Context(), newElector(t, far, leader.WithTTL(time.Minute)), "jobs", "next")
	awaitQueue(t, client, "jobs", queued(2))

	// While the watches are cut off their history is thrown away.
	link.Cut()
	for i := range 10 {
		if err := l.Proclaim(t.Context(), fmt.Sprint("hidden ", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Proclaim(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	resp, err := client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Compact(t.Context(), resp.Header.Revision); err != nil {
		t.Fatal(err)
	}
	link.Heal()
	for await(t, "the new value", observed).Value != "two" {
		continue // hidden values may show up or not
	}
	resign(t, l)
	second := awaitLeader(t, next)
	if c := await(t, "the next leader", observed); c.Token != second.Token() {
		t.Errorf("observed %+v, want token %d", c, second.Token())
	}
	resign(t, second)
}

// Pitfall 16: etcd-io/etcd#18163: when several changes come at once, stock may report one that does not lead.
func TestObserveReportsOnlyWhoLed(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	observed := observe(t, newElector(t, etcdtest.NewClient(t, link.Endpoint)), "jobs")
	await(t, "the vacancy", observed)
	truth := []int64{0}
	link.Darken() // so that the changes arrive together
	var next []<-chan outcome
	for i := range 6 {
		next = append(next, campaign(t.Context(), newElector(t, client), "jobs", fmt.Sprint(i)))
		awaitQueue(t, client, "jobs", queued(i+1))
	}
	for _, c := range next {
		l := awaitLeader(t, c)
		truth = append(truth, l.Token())
		resign(t, l)
	}
	last := lead(t, newElector(t, client), "jobs", "last")
	truth = append(truth, last.Token())
	link.Heal()
	at := 0
	for at < len(truth)-1 {
		c := await(t, "a change", observed)
		i := slices.Index(truth, c.Token)
		if i < 0 || c.Token != 0 && i < at {
			t.Fatalf("observed token %d, who led were %v in that order", c.Token, truth)
		}
		at = max(at, i)
	}
	resign(t, last)
}

// Pitfall 17: pingcap/tidb#55076: a guard that compares values passes for the old term.
func TestOldTermStaysDeadWhenTheSameProcessLeadsAgain(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	lead(t, e, "other", "") // keeps the lease, so that the key is the same
	old := lead(t, e, "jobs", "me")
	resign(t, old)
	again := lead(t, e, "jobs", "me")
	if again.Key() != old.Key() {
		t.Fatalf("keys %q and %q", old.Key(), again.Key())
	}
	if again.Token() <= old.Token() {
		t.Errorf("token %d came after %d", again.Token(), old.Token())
	}
	if guarded(t, client, old) || old.IsLeader() || old.Context().Err() == nil {
		t.Error("the old term is alive again")
	}
	if err := old.Proclaim(t.Context(), "late"); !errors.Is(err, leader.ErrNotLeader) {
		t.Errorf("Proclaim in the old term: %v", err)
	}
	resign(t, old)
	if !guarded(t, client, again) || !again.IsLeader() {
		t.Error("the old term's Resign ended the new one")
	}
}

// Pitfall 18: pingcap/tidb#43894, uber/cadence's guard.
func TestProclaimKeepsLeaseAndToken(t *testing.T) {
	_, client := start(t)
	l := lead(t, newElector(t, client), "jobs", "one")
	before := onlyKey(t, client, "jobs/")
	if err := l.Proclaim(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	after := onlyKey(t, client, "jobs/")
	if string(after.Value) != "two" || after.Lease != before.Lease || after.CreateRevision != l.Token() || !guarded(t, client, l) {
		t.Errorf("the key was %v and is %v", before, after)
	}
}

// Pitfall 18.
func TestProclaimThatFindsTheKeyGoneEndsTheTerm(t *testing.T) {
	_, client := start(t)
	deaf := wrapped(client)
	watcher := &deafWatcher{Watcher: client.Watcher} // so that Proclaim is the first to know
	watcher.deaf.Store(true)
	deaf.Watcher = watcher
	l := lead(t, newElector(t, deaf, leader.WithTTL(time.Minute)), "jobs", "")
	if _, err := client.Delete(t.Context(), l.Key()); err != nil {
		t.Fatal(err)
	}
	if err := l.Proclaim(t.Context(), "x"); !errors.Is(err, leader.ErrNotLeader) || !errors.Is(err, leader.ErrEvicted) {
		t.Errorf("Proclaim returned %v", err)
	}
	awaitEnd(t, l, leader.ErrEvicted)
}

// Pitfall 19: mixer/etcd3#176.
func TestNobodyIsElectedWhenACandidateInTheMiddleLeaves(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	ctx, cancel := context.WithCancel(t.Context())
	second := campaign(ctx, newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	third := campaign(t.Context(), newElector(t, client), "jobs", "third")
	awaitQueue(t, client, "jobs", queued(3))
	cancel()
	await(t, "Campaign", second)
	awaitQueue(t, client, "jobs", queued(2))
	select {
	case o := <-third:
		t.Fatalf("elected while another leads: %v", o.err)
	case <-time.After(100 * time.Millisecond): // what must not happen has no event
	}
	resign(t, first)
	awaitLeader(t, third)
}

// Pitfall 19: A stock candidate that waits and campaigns again puts its key again, as a leader does that touches it.
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

// Pitfall 20: kubernetes/kubernetes#139991, client-go#728.
func TestRunLetsGoOnlyAfterLeadHasReturned(t *testing.T) {
	_, client := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	working, stopping, finish := make(chan struct{}), make(chan struct{}), make(chan struct{})
	ran := make(chan error, 1)
	go func() {
		ran <- leader.Run(ctx, client, "jobs", "", func(ctx context.Context, l *leader.Leader) error {
			close(working)
			<-ctx.Done()
			close(stopping)
			<-finish
			if !l.IsLeader() {
				t.Error("the term ended before lead returned")
			}
			return nil
		}, leader.WithTTL(ttl))
	}()
	await(t, "lead", working)
	next := campaign(t.Context(), newElector(t, client), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	cancel()
	await(t, "lead's context", stopping)
	select {
	case <-next:
		t.Error("another was elected while lead was still at work")
	case <-time.After(100 * time.Millisecond):
	}
	close(finish)
	awaitLeader(t, next)
	if err := await(t, "Run", ran); !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
}

// Pitfall 20: The margin is for work to stop in. It must not be cut short by handing over early, where etcd can be
// reached again.
func TestExpiredTermKeepsOthersOutForTheMargin(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	lease := &brokenLease{Lease: client.Lease}
	broken.Lease = lease
	refuse := func(context.Context) (*clientv3.LeaseKeepAliveResponse, error) { return nil, rpctypes.ErrNoLeader }
	lease.keepAlive.Store(&refuse)
	const ttl, margin = 4 * time.Second, 2 * time.Second
	var stopped time.Time
	ctx, cancel := context.WithCancel(t.Context())
	working, ran := make(chan struct{}, 10), make(chan error, 1)
	go func() {
		ran <- leader.Run(ctx, broken, "jobs", "", func(ctx context.Context, _ *leader.Leader) error {
			working <- struct{}{}
			<-ctx.Done()
			time.Sleep(margin / 2) // the work that is left
			if stopped.IsZero() {
				stopped = time.Now()
			}
			return nil
		}, leader.WithTTL(ttl), leader.WithMargin(margin))
	}()
	await(t, "lead", working)
	next := campaign(t.Context(), newElector(t, client), "jobs", "")
	o := await(t, "Campaign", next)
	if o.err != nil {
		t.Fatal(o.err)
	}
	cancel()
	if err := await(t, "Run", ran); !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
	if o.at.Before(stopped) {
		t.Errorf("the next leader came %v before the work had stopped", stopped.Sub(o.at))
	}
}

// Pitfall 21: elastic/elastic-agent#4543, client-go#1155: the process stays up and never leads again.
func TestRunCampaignsAgainAfterALostTerm(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	terms := make(chan *leader.Leader)
	boom := errors.New("not returned, for the term was lost")
	ran := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		ran <- e.Run(ctx, "jobs", "", func(ctx context.Context, l *leader.Leader) error {
			terms <- l
			<-ctx.Done()
			if ctxErr, termErr := context.Cause(ctx), context.Cause(l.Context()); termErr != nil && !errors.Is(ctxErr, termErr) {
				t.Errorf("lead's context was cancelled with %v, the term's with %v", ctxErr, termErr)
			}
			return boom
		})
	}()
	operator := newElector(t, client)
	var last int64
	for range 4 {
		l := await(t, "lead", terms)
		if l.Token() <= last {
			t.Errorf("token %d came after %d", l.Token(), last)
		}
		last = l.Token()
		if err := operator.Evict(t.Context(), "jobs"); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "lead", terms)
	cancel()
	if err := await(t, "Run", ran); !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
}

// Pitfall 22: pingcap/tiflash#8519, hashicorp/vault#3031: hot retries.
func TestRetriesBackOff(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	var calls rpcCounter
	counted := etcdtest.NewClientFrom(t, calls.config(link.Endpoint))
	first := lead(t, newElector(t, counted, leader.WithTTL(10*time.Second)), "jobs", "")
	next := campaign(t.Context(), newElector(t, counted, leader.WithTTL(10*time.Second)), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	before := calls.all()
	link.Cut()
	const outage = 5 * time.Second // a renewal falls into it
	time.Sleep(outage)
	got := calls.all() - before
	link.Heal()
	// clientv3 itself repeats reads every 25 ms. Its KeepAliveOnce alone would make tens of thousands.
	if most := int64(outage / (5 * time.Millisecond)); got > most {
		t.Errorf("%d requests in an outage of %v", got, outage)
	}
	t.Logf("%d requests in an outage of %v", got, outage)
	resign(t, first)
	resign(t, awaitLeader(t, next))
}

// Pitfall 23: etcd-io/etcd#17623, #14850.
func TestExpiredAuthTokensAndARoleForThePrefixOnly(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"auth-token-ttl": 1, "bcrypt-cost": 4})
	root := etcdtest.NewClient(t, m.Endpoint)
	enableAuth(t, root, "svc/jobs/")
	as := func(user string) *clientv3.Client {
		return etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: user, Password: user})
	}
	e := newElector(t, as("service"), leader.WithPrefix("svc"))
	l := lead(t, e, "jobs", "first")
	next := campaign(t.Context(), newElector(t, as("service"), leader.WithPrefix("svc")), "jobs", "second")
	awaitQueue(t, as("root"), "svc/jobs", queued(2))
	select {
	case <-l.Context().Done():
		t.Fatalf("the term ended: %v", context.Cause(l.Context()))
	case <-time.After(2 * ttl): // several times the life of a token
	}
	if err := l.Proclaim(t.Context(), "still"); err != nil {
		t.Error(err)
	}
	resign(t, l)
	l = awaitLeader(t, next)

	// What is denied is not waited for, does no harm to what is allowed, and leaves no lease.
	for range 3 {
		if _, err := e.Campaign(t.Context(), "forbidden", ""); !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("Campaign without permission: %v", err)
		}
	}
	for _, err := range e.Observe(t.Context(), "forbidden") {
		if !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("Observe without permission: %v", err)
		}
	}
	resign(t, l)
	if resp, err := as("root").Leases(t.Context()); err != nil || len(resp.Leases) != 0 {
		t.Errorf("leases left: %v, %v", resp, err)
	}
}

// Pitfall 6: as where the right to read is taken away from a candidate that waits.
func TestCandidateThatIsDeniedAfterItHasJoinedIsNotForgotten(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	enableAuth(t, etcdtest.NewClient(t, m.Endpoint), "svc/")
	as := func(user string) *clientv3.Client {
		return etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: user, Password: user})
	}
	root := as("root")
	grant := func(prefix string, to clientv3.PermissionType) {
		t.Helper()
		if _, err := root.RoleGrantPermission(t.Context(), "candidate", prefix, clientv3.GetPrefixRangeEnd(prefix), to); err != nil {
			t.Fatal(err)
		}
	}
	permit := func(to clientv3.PermissionType) {
		t.Helper()
		grant("svc/jobs/", to)
		grant("svc/other/", clientv3.PermissionType(clientv3.PermReadWrite))
	}
	permit(clientv3.PermissionType(clientv3.PermReadWrite))
	if _, err := root.RoleRevokePermission(t.Context(), "candidate", "svc/", clientv3.GetPrefixRangeEnd("svc/")); err != nil {
		t.Fatal(err)
	}
	e := newElector(t, as("service"))
	other := lead(t, e, "svc/other", "") // keeps the lease
	first := lead(t, newElector(t, root), "svc/jobs", "first")
	next := campaign(t.Context(), e, "svc/jobs", "second")
	awaitQueue(t, root, "svc/jobs", queued(2))
	permit(clientv3.PermissionType(clientv3.PermWrite))
	if o := await(t, "Campaign", next); !errors.Is(o.err, rpctypes.ErrPermissionDenied) {
		t.Errorf("Campaign that is denied returned %v", o.err)
	}
	permit(clientv3.PermissionType(clientv3.PermReadWrite))
	awaitQueue(t, root, "svc/jobs", queued(1)) // a renewal has found the key
	if !other.IsLeader() || !first.IsLeader() {
		t.Error("a term has ended")
	}
}

// enableAuth makes a user root, and a user service that may use keys under prefix. Passwords are the
// names.
func enableAuth(t *testing.T, client *clientv3.Client, prefix string) {
	t.Helper()
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(client.UserAdd(ctx, "root", "root"))
	must(client.UserGrantRole(ctx, "root", "root"))
	must(client.RoleAdd(ctx, "candidate"))
	must(client.RoleGrantPermission(ctx, "candidate", prefix, clientv3.GetPrefixRangeEnd(prefix), clientv3.PermissionType(clientv3.PermReadWrite)))
	must(client.UserAdd(ctx, "service", "service"))
	must(client.UserGrantRole(ctx, "service", "candidate"))
	must(client.AuthEnable(ctx))
}

func TestTLSWithClientCertificates(t *testing.T) {
	t.Parallel()
	certificate, err := transport.SelfCert(zap.NewNop(), t.TempDir(), []string{"127.0.0.1:0"}, 1, x509.ExtKeyUsageClientAuth)
	if err != nil {
		t.Fatal(err)
	}
	m := etcdtest.Start(t, etcdtest.Settings{"client-transport-security": etcdtest.Settings{
		"cert-file":        certificate.CertFile,
		"key-file":         certificate.KeyFile,
		"trusted-ca-file":  certificate.CertFile,
		"client-cert-auth": true,
	}})
	certificate.TrustedCAFile = certificate.CertFile
	secure, err := certificate.ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	client := etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{"https://" + m.Endpoint}, TLS: secure})
	leavesNothing(t, client)
	l := lead(t, newElector(t, client), "jobs", "first")
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	resign(t, l)
	awaitLeader(t, next)

	// Without a certificate there is no election, and the error says why.
	secure = secure.Clone()
	secure.Certificates, secure.GetClientCertificate = nil, nil
	anonymous := etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{"https://" + m.Endpoint}, TLS: secure})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := newElector(t, anonymous).Campaign(ctx, "jobs", ""); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "last failure: no connection to etcd") {
		t.Errorf("Campaign without a certificate: %v", err)
	}
}

// Pitfall 25.
func TestLeaderAndCampaignOutliveAFullEtcd(t *testing.T) {
	m, client := start(t)
	l := lead(t, newElector(t, client), "jobs", "")
	renewed := make(chan struct{}, 1000)
	other := lead(t, newElector(t, client, leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	})), "other", "")
	status, err := client.Status(t.Context(), m.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	maintenance := etcdserverpb.NewMaintenanceClient(client.ActiveConnection())
	alarm := &etcdserverpb.AlarmRequest{Action: etcdserverpb.AlarmRequest_ACTIVATE, MemberID: status.Header.MemberId, Alarm: etcdserverpb.AlarmType_NOSPACE}
	if _, err := maintenance.Alarm(t.Context(), alarm); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Put(t.Context(), "x", "y"); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatalf("etcd is not full: %v", err)
	}
	next := campaign(t.Context(), newElector(t, client), "jobs", "")
	for range 4 {
		await(t, "a renewal", renewed)
	}
	if !other.IsLeader() || !l.IsLeader() {
		t.Error("a term ended because etcd is full")
	}
	resign(t, l)
	select {
	case o := <-next:
		t.Fatalf("Campaign returned while etcd is full: %v", o.err)
	default:
	}
	alarm.Action = etcdserverpb.AlarmRequest_DEACTIVATE
	if _, err := maintenance.Alarm(t.Context(), alarm); err != nil {
		t.Fatal(err)
	}
	awaitLeader(t, next)
}

// Pitfall 26: etcd-io/etcd#6681.
func TestConcurrentUseIsDefined(t *testing.T) {
	_, client := start(t)
	for range 5 {
		e := newElector(t, client)
		l := lead(t, e, "jobs", "")
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				for {
					switch err := l.Proclaim(t.Context(), fmt.Sprint(i)); {
					case err == nil:
					case errors.Is(err, leader.ErrNotLeader):
						return
					default:
						t.Errorf("Proclaim: %v", err)
						return
					}
				}
			})
			wg.Go(func() {
				for l.IsLeader() {
					_, _, _ = l.Deadline(), l.Token(), l.Guard()
				}
			})
		}
		for i := range 3 {
			wg.Go(func() {
				if i == 0 {
					if err := e.Close(t.Context()); err != nil {
						t.Errorf("Close: %v", err)
					}
				} else if err := l.Resign(t.Context()); err != nil {
					t.Errorf("Resign: %v", err)
				}
			})
		}
		wg.Wait()
		awaitEnd(t, l, leader.ErrResigned)
		if guarded(t, client, l) {
			t.Error("the key is left")
		}
	}
}

// Pitfall 27: cilium/cilium#12619.
func TestTermOutlivesTheCampaignsCtx(t *testing.T) {
	_, client := start(t)
	renewed := make(chan struct{}, 1000)
	e := newElector(t, client, leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	}))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	l, err := e.Campaign(ctx, "jobs", "")
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	for range 4 { // more than a TTL
		await(t, "a renewal", renewed)
	}
	if !l.IsLeader() || l.Context().Err() != nil {
		t.Errorf("the term ended with the campaign's ctx: %v", context.Cause(l.Context()))
	}
}

// Pitfall 28: After a long outage gRPC waits for up to two minutes before it connects again. A gRPC that waits
// a minute from the first failure on stands for that.
func TestCampaignIsBackSoonAfterALongOutage(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	patient := etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{link.Endpoint}, DialOptions: []grpc.DialOption{
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Minute, Multiplier: 1, MaxDelay: time.Minute}}),
	}})
	e := newElector(t, patient)
	l := lead(t, e, "jobs", "")
	link.Cut()
	awaitEnd(t, l, leader.ErrExpired)
	next := campaign(t.Context(), e, "jobs", "")
	for patient.ActiveConnection().GetState() != connectivity.TransientFailure {
		time.Sleep(time.Millisecond)
	}
	link.Heal()
	o := await(t, "Campaign, long before gRPC would connect again", next)
	if o.err != nil {
		t.Fatal(o.err)
	}
	if !guarded(t, client, o.l) {
		t.Error("elected without a key")
	}
}

// The same for what has the time of a single request, by a client that hides each failure: it repeats by itself what
// has failed for want of a connection.
func TestQuestionAfterALongOutageIsAnswered(t *testing.T) {
	m, _ := start(t)
	link := etcdtest.NewLink(t, m)
	patient := etcdtest.NewClientFrom(t, clientv3.Config{
		Endpoints: []string{link.Endpoint}, BackoffWaitBetween: time.Minute, DialOptions: []grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Minute, Multiplier: 1, MaxDelay: time.Minute}}),
		},
	})
	e := newElector(t, patient)
	if _, err := e.Current(t.Context(), "jobs"); !errors.Is(err, leader.ErrNoLeader) {
		t.Fatal(err)
	}
	link.Cut()
	for deadline := time.Now().Add(time.Minute); patient.ActiveConnection().GetState() != connectivity.TransientFailure; {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		_, _ = patient.Get(ctx, "jobs") // a connection that carries nothing is not cut
		cancel()
		patient.ActiveConnection().Connect()
		if time.Now().After(deadline) {
			t.Fatal("the connection was not cut")
		}
	}
	link.Heal()
	if _, err := e.Current(t.Context(), "jobs"); !errors.Is(err, leader.ErrNoLeader) {
		t.Errorf("Current() = %v, want that nobody leads", err)
	}
}

// Pitfall 29: A Lease that answers with neither response nor error: stock NewSession returns nil, nil.
func TestEmptyAnswersAreErrors(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	lease := &brokenLease{Lease: client.Lease}
	broken.Lease = lease
	l := lead(t, newElector(t, broken), "jobs", "")
	empty := func(context.Context) (*clientv3.LeaseKeepAliveResponse, error) { return nil, nil }
	lease.keepAlive.Store(&empty)
	awaitEnd(t, l, leader.ErrExpired)
	awaitExpiry(t, client)
}

func TestCompetesWithStockElections(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "ours")
	_, election, won := stock(t, client, "jobs", "stock", time.Minute)
	awaitQueue(t, client, "jobs", queued(2))
	if resp, err := election.Leader(t.Context()); err != nil || string(resp.Kvs[0].Value) != "ours" {
		t.Errorf("stock sees the leader as %v, %v", resp, err)
	}
	next := campaign(t.Context(), newElector(t, client), "jobs", "ours again")
	awaitQueue(t, client, "jobs", queued(3))
	resign(t, first)
	if err := await(t, "stock Campaign", won).err; err != nil {
		t.Fatal(err)
	}
	e := newElector(t, client)
	if c, err := e.Current(t.Context(), "jobs"); err != nil || c.Value != "stock" || c.Token != election.Rev() {
		t.Errorf("Current is %+v, %v", c, err)
	}
	select {
	case o := <-next:
		t.Fatalf("elected beside a stock leader: %v", o.err)
	default:
	}
	if err := election.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitLeader(t, next)
}

func TestCompetesWithEtcdctlElect(t *testing.T) {
	etcdctl, err := exec.LookPath("etcdctl")
	if err != nil {
		t.Skip("etcdctl is not installed (Debian: apt-get install etcd-client); interop with it is not tested")
	}
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "ours")
	cmd := exec.Command(etcdctl, "--endpoints", m.Endpoint, "elect", "jobs", "theirs")
	cmd.Env = append(cmd.Environ(), "ETCDCTL_API=3") // the default since 3.4, but not in all packages
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = cmd.Wait() // its status is the signal's
	}()
	defer func() { _ = cmd.Process.Kill(); <-exited }()
	id := awaitQueue(t, client, "jobs", queued(2))[1].Lease
	next := campaign(t.Context(), newElector(t, client), "jobs", "ours again")
	awaitQueue(t, client, "jobs", queued(3))
	resign(t, first)
	e := newElector(t, client)
	if c, err := e.Current(t.Context(), "jobs"); err != nil || c.Value != "theirs" {
		t.Errorf("Current is %+v, %v", c, err)
	}
	select {
	case o := <-next:
		t.Fatalf("elected beside etcdctl: %v", o.err)
	case <-time.After(100 * time.Millisecond):
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil { // it resigns
		t.Fatal(err)
	}
	awaitLeader(t, next)
	await(t, "etcdctl's end", exited)
	if _, err := client.Revoke(t.Context(), id); err != nil { // and leaves its lease behind
		t.Fatal(err)
	}
}

package leader_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/namespace"
)

// How the leader campaigns, how many wait before the target, and whether it is named or just the next.
func TestTransferHandsOverWithoutAnOverlap(t *testing.T) {
	_, client := start(t)
	left, kept := 0, 0 // those who have stepped back, and those of them that have joined again on their lease
	for _, by := range []string{"Campaign", "TryCampaign", "Run"} {
		for _, between := range []int{0, 1, 10} {
			for _, named := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, %d between, named %v", by, between, named), func(t *testing.T) {
					name := t.Name()
					ctx, stop := context.WithCancel(t.Context())
					defer stop()
					first, ran := leadBy(ctx, t, newElector(t, client, leader.WithMargin(50*time.Millisecond)), by, name)
					var next []<-chan outcome
					for i := range between + 2 {
						next = append(next, campaign(ctx, newElector(t, client), name, fmt.Sprint("waits-", i)))
						awaitQueue(t, client, name, queued(i+2))
					}
					cs := awaitQueue(t, client, name, queued(between+3))
					to, want := leader.Candidate{}, 0
					if named {
						to, want = cs[between+1], between
					}
					tctx, cancel := context.WithTimeout(ctx, patience)
					defer cancel()
					if err := newElector(t, client).Transfer(tctx, name, to); err != nil {
						t.Fatalf("Transfer: %v", err)
					}
					if cause := context.Cause(first.Context()); !errors.Is(cause, leader.ErrTransferred) {
						t.Errorf("the term ended with %v", cause)
					}
					if l := awaitLeader(t, next[want]); l.Token() != cs[want+1].Token {
						t.Errorf("token %d leads, want %d", l.Token(), cs[want+1].Token)
					} else {
						next[want] = won(l)
					}
					stay := between + 2 // those between join again; a leader does under Run
					if by == "Run" {
						stay++
					}
					// Those behind the target keep their order, before all who have joined again.
					behind, former := cs[want+2:], cs[1:want+1]
					cs = awaitQueue(t, client, name, queued(stay))
					for i, c := range behind {
						if cs[i+1].Token != c.Token {
							t.Errorf("%q is not next %d behind the leader: %+v", c.Value, i+1, cs)
						}
					}
					for _, c := range former {
						left++
						if slices.ContainsFunc(cs, func(again leader.Candidate) bool { return again.Key == c.Key && again.Token > c.Token }) {
							kept++
						}
					}
					wantNoRequest(t, client, name)
					stop()
					leave(t, next)
					_ = etcdtest.Await(t, "Run", ran)
					awaitQueue(t, client, name, queued(0))
				})
			}
		}
	}
	// It spares etcd a revocation and a grant while the leader hands over. Whoever has asked twice to join takes another
	// lease, because one attempt has no answer.
	if 2*kept < left {
		t.Errorf("%d of %d candidates have joined again on their lease", kept, left)
	}
}

// Who steps back deletes the request with its key. To delete it again would cost etcd a write each, while the leader hands
// over.
func TestTransferDeletesNoRequestThatHasGoneWithItsCandidate(t *testing.T) {
	m, client := start(t)
	const between = 10
	first := lead(t, newElector(t, client, leader.WithMargin(50*time.Millisecond)), "jobs", "leads")
	var next []<-chan outcome
	for i := range between + 1 {
		next = append(next, campaign(t.Context(), newElector(t, client), "jobs", fmt.Sprint("waits-", i)))
		awaitQueue(t, client, "jobs", queued(i+2))
	}
	var calls rpcCounter
	cs := awaitQueue(t, client, "jobs", queued(between+2))
	ops := newElector(t, etcdtest.NewClientFrom(t, calls.config(m.Endpoint)))
	if err := ops.Transfer(t.Context(), "jobs", cs[between+1]); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, first, leader.ErrTransferred)
	const requests = between + 1 // to step back; the rest is room for some that are sent again
	if n := calls.of("/etcdserverpb.KV/Txn"); n < requests || n >= requests+between/2 {
		t.Errorf("%d transactions for %d requests", n, requests)
	}
	next[between] = won(awaitLeader(t, next[between]))
	resignInAnyOrder(t, next)
}

// Who has left otherwise, such as a stock candidate that resigns, has not deleted it. Stock would take it for a candidate.
func TestTransferDeletesTheRequestToWhoeverHasLeftOtherwise(t *testing.T) {
	q := newStockBetween(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	other := standStock(t, nil, q.client) // because of this one the Transfer goes on
	awaitQueue(t, q.client, "jobs", queued(4))
	last := campaign(t.Context(), newElector(t, q.client), "jobs", "last")
	q.cs = awaitQueue(t, q.client, "jobs", queued(5))
	transferred := transfer(ctx, newElector(t, q.client), "jobs", q.cs[4])
	for _, c := range []leader.Candidate{q.cs[1], q.cs[3]} {
		etcdtest.Await(t, "the request", q.client.Watch(ctx, c.Key+"/stepback", clientv3.WithRev(1)))
	}
	deleted := q.client.Watch(ctx, q.request(), clientv3.WithFilterPut())
	q.leaves()
	etcdtest.Await(t, "the deletion of the request", deleted)
	cancel()
	if err := etcdtest.Await(t, "Transfer", transferred); !errors.Is(err, context.Canceled) {
		t.Errorf("Transfer: %v", err)
	}
	other()
	resign(t, q.l)
	resignInAnyOrder(t, []<-chan outcome{q.next, last})
}

// Whoever has stepped back keeps its lease only to join again at once. Here its health fails while it steps back.
func TestWhoeverHasSteppedBackAndIsUnhealthyKeepsNoLease(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "leads")
	slow, kv := holding(client, client.KV)
	var p patient
	log := make(logChannel, 100)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	e := newExpiring(t, slow, leader.WithMargin(time.Second), leader.WithHealth(p.check), leader.WithLogger(slog.New(log)))
	next := campaign(ctx, e, "jobs", "waits")
	c := awaitQueue(t, client, "jobs", queued(2))[1]
	p.fail(errSick) // it is unhealthy a margin before a TTL has passed
	askToStepBack(t, client, c)
	etcdtest.Await(t, "the deletion of the key", kv.held)
	time.Sleep(1200 * time.Millisecond) // until it is unhealthy, which has no event; Campaign holds on to a deletion for 2 s
	close(kv.release)
	awaitRecord(t, log, "unhealthy, not in the queue", next)
	if left, err := client.TimeToLive(t.Context(), c.Lease); err != nil || left.TTL > 0 {
		t.Errorf("the lease: %+v, %v, want none", left, err)
	}
	cancel()
	leave(t, []<-chan outcome{next})
	resign(t, first)
}

// The same where the campaign is given up while its candidate steps back.
func TestCampaignThatIsGivenUpAsItStepsBackDoesNotBlameEtcd(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "leads")
	own, kv := holding(client, client.KV)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	next := campaign(ctx, newElector(t, own), "jobs", "waits")
	c := awaitQueue(t, client, "jobs", queued(2))[1]
	askToStepBack(t, client, c)
	etcdtest.Await(t, "the deletion of the key", kv.held)
	cancel()
	close(kv.release)
	if o := etcdtest.Await(t, "Campaign", next); !errors.Is(o.err, context.Canceled) || strings.Contains(o.err.Error(), "last failure") {
		t.Errorf("Campaign: %v", o.err)
	}
	if left, err := client.TimeToLive(t.Context(), c.Lease); err != nil || left.TTL > 0 {
		t.Errorf("the lease: %+v, %v, want none", left, err)
	}
	resign(t, first)
}

// The same where the log handler exits while the own key is watched beside the campaign, which ends that campaign.
func TestWhoeverHasSteppedBackInACampaignThatExitsKeepsNoLease(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "leads")
	dark, kv := darkened(client, func(string) bool { return false })
	watcher := &breakingWatcher{Watcher: client.Watcher, broken: make(chan struct{})}
	dark.Watcher = watcher
	reached, goOn, exited := make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	e := newElector(t, dark, leader.WithLogger(slog.New(handler(func(r slog.Record) {
		if r.Message == "campaign is being retried" {
			reached <- struct{}{}
			<-goOn
			runtime.Goexit()
		}
	}))))
	go func() {
		defer close(exited)
		_, _ = e.Campaign(t.Context(), "jobs", "exits")
	}()
	c := awaitQueue(t, client, "jobs", queued(2))[1]
	awaitCalls(t, watcher.created.Load, 2)                      // of the leader's key and of the own one
	kv.set(func(key string) bool { return key == first.Key() }) // so the campaign cannot read it
	close(watcher.broken)
	etcdtest.Await(t, "the log handler", reached)
	read := make(chan struct{}, 100)
	kv.set(func(key string) bool {
		if key == c.Key {
			read <- struct{}{}
		}
		return key == first.Key()
	})
	askToStepBack(t, client, c)
	etcdtest.Await(t, "the read of the request", read)
	time.Sleep(100 * time.Millisecond) // until the candidacy has ended, which has no event
	close(goOn)
	etcdtest.Await(t, "the end of the campaign", exited)
	if left, err := client.TimeToLive(t.Context(), c.Lease); err != nil || left.TTL > 0 {
		t.Errorf("the lease: %+v, %v, want none", left, err)
	}
	resign(t, first)
}

// askToStepBack asks a candidate, as Transfer does, until the test ends.
func askToStepBack(t *testing.T, client *clientv3.Client, c leader.Candidate) {
	t.Helper()
	lease, err := client.Grant(t.Context(), 60)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = client.Revoke(context.Background(), lease.ID) })
	if _, err := client.Put(t.Context(), c.Key+"/stepback", fmt.Sprint(c.Token), clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
}

// A heldKV holds transactions that delete keys until it is released.
type heldKV struct {
	clientv3.KV
	held    chan struct{} // has an element for each transaction
	release chan struct{} // is closed
}

func (kv *heldKV) Txn(ctx context.Context) clientv3.Txn {
	return &heldTxn{Txn: kv.KV.Txn(ctx), kv: kv, ctx: ctx}
}

// holding returns a client whose KV is kv, held.
func holding(client *clientv3.Client, kv clientv3.KV) (*clientv3.Client, *heldKV) {
	held := &heldKV{KV: kv, held: make(chan struct{}, 10), release: make(chan struct{})}
	c := wrapped(client)
	c.KV = held
	return c, held
}

type heldTxn struct {
	clientv3.Txn
	kv      *heldKV
	ctx     context.Context
	deletes bool
}

func (t *heldTxn) If(cs ...clientv3.Cmp) clientv3.Txn   { t.Txn = t.Txn.If(cs...); return t }
func (t *heldTxn) Else(ops ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Else(ops...); return t }
func (t *heldTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	t.Txn, t.deletes = t.Txn.Then(ops...), ops[0].IsDelete()
	return t
}

func (t *heldTxn) Commit() (*clientv3.TxnResponse, error) {
	if t.deletes {
		t.kv.held <- struct{}{}
		select {
		case <-t.kv.release:
		case <-t.ctx.Done():
			return nil, t.ctx.Err()
		}
	}
	return t.Txn.Commit()
}

// leadBy leads until ctx ends, by Campaign, TryCampaign or Run. ran receives when that is over.
func leadBy(ctx context.Context, t *testing.T, e *leader.Elector, by, name string) (l *leader.Leader, ran <-chan error) {
	t.Helper()
	returned := make(chan error, 1)
	var err error
	switch by {
	case "Run":
		terms := make(chan *leader.Leader, 10)
		go func() {
			returned <- e.Run(ctx, name, "leads", func(ctx context.Context, l *leader.Leader) error {
				terms <- l
				<-ctx.Done()
				return nil
			})
		}()
		return etcdtest.Await(t, "the term", terms), returned
	case "TryCampaign":
		l, err = e.TryCampaign(ctx, name, "leads")
	default:
		l, err = e.Campaign(ctx, name, "leads")
	}
	if err != nil {
		t.Fatalf("%s: %v", by, err)
	}
	close(returned)
	return l, returned
}

// won is a campaign that has returned l.
func won(l *leader.Leader) <-chan outcome {
	c := make(chan outcome, 1)
	c <- outcome{l: l}
	return c
}

// leave awaits campaigns whose context has ended, and resigns what they have won.
func leave(t *testing.T, campaigns []<-chan outcome) {
	t.Helper()
	for _, c := range campaigns {
		if o := etcdtest.Await(t, "the end of a campaign", c); o.err == nil {
			resign(t, o.l)
		}
	}
}

// wantNoRequest checks that nobody is asked to step back in the election.
func wantNoRequest(t *testing.T, client *clientv3.Client, name string) {
	t.Helper()
	resp, err := client.Get(t.Context(), name+"/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range resp.Kvs {
		if strings.HasSuffix(string(kv.Key), "/stepback") {
			t.Errorf("a request is left: %q", kv.Key)
		}
	}
}

// resignInAnyOrder awaits the terms of candidates that were sent to the end of the queue, which come in any order, and resigns.
func resignInAnyOrder(t *testing.T, candidates []<-chan outcome) {
	t.Helper()
	over := make(chan error, len(candidates))
	for _, c := range candidates {
		go func() {
			o := <-c
			if o.err == nil {
				o.err = o.l.Resign(context.WithoutCancel(t.Context()))
			}
			over <- o.err
		}()
	}
	for range candidates {
		if err := etcdtest.Await(t, "a term", over); err != nil {
			t.Error(err)
		}
	}
}

func TestTransferUnderRunWaitsForTheFunction(t *testing.T) {
	_, client := start(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	began, release, ran := make(chan context.Context, 10), make(chan struct{}), make(chan error, 1)
	e := newElector(t, client)
	go func() {
		ran <- e.Run(ctx, "jobs", "first", func(ctx context.Context, _ *leader.Leader) error {
			began <- ctx
			<-ctx.Done()
			<-release
			return nil
		})
	}()
	lctx := etcdtest.Await(t, "the term", began)
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	transferred := transfer(t.Context(), newElector(t, client), "jobs", leader.Candidate{})
	etcdtest.Await(t, "the end of the function's context", lctx.Done())
	select {
	case o := <-next:
		t.Fatalf("%v was elected while the function works", o.l)
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	wantTransferred(t, transferred)
	l := awaitLeader(t, next)
	awaitQueue(t, client, "jobs", queued(2)) // the first has joined again
	stop()
	_ = etcdtest.Await(t, "Run", ran)
	resign(t, l)
}

// transferCase has a leader and candidates behind it, and an operator.
func transferCase(t *testing.T, waiting int, opts ...leader.Option) (client *clientv3.Client, l *leader.Leader, next []<-chan outcome, ops *leader.Elector, cs []leader.Candidate) {
	t.Helper()
	_, client = start(t)
	l = lead(t, newElector(t, client, opts...), "jobs", "leads")
	for i := range waiting {
		next = append(next, campaign(t.Context(), newElector(t, client), "jobs", fmt.Sprint("waits-", i+1)))
		awaitQueue(t, client, "jobs", queued(i+2))
	}
	ops = newElector(t, client)
	cs, err := ops.Candidates(t.Context(), "jobs")
	if err != nil {
		t.Fatal(err)
	}
	return client, l, next, ops, cs
}

// A revokingLease calls a function before each revocation.
type revokingLease struct {
	clientv3.Lease
	before func()
}

func (l revokingLease) Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	l.before()
	return l.Lease.Revoke(ctx, id)
}

func TestTransferSaysWhyItHasFailedThoughItsContextEndsMeanwhile(t *testing.T) {
	client, l, _, _, _ := transferCase(t, 0)
	stock(t, client, "jobs", "stock", time.Minute) // does not step back
	awaitQueue(t, client, "jobs", queued(2))
	target, leave := context.WithCancel(t.Context())
	defer leave()
	left := campaign(target, newElector(t, client), "jobs", "target")
	cs := awaitQueue(t, client, "jobs", queued(3))
	own := wrapped(client)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	own.Lease = revokingLease{client.Lease, cancel} // the lease of the requests is revoked in the end
	transferred := transfer(ctx, newElector(t, own), "jobs", cs[2])
	etcdtest.Await(t, "the request", client.Watch(t.Context(), cs[1].Key+"/stepback", clientv3.WithRev(1)))
	leave()
	etcdtest.Await(t, "the end of the target", left)
	if err := etcdtest.Await(t, "Transfer", transferred); !errors.Is(err, leader.ErrNotCandidate) {
		t.Errorf("Transfer: %v, want ErrNotCandidate", err)
	}
	resign(t, l)
}

// A heldLease holds grants until it is released.
type heldLease struct {
	clientv3.Lease
	held    chan struct{} // has an element for each grant
	release chan struct{} // is closed
	running atomic.Int64
}

func (l *heldLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	l.running.Add(1)
	defer l.running.Add(-1)
	l.held <- struct{}{}
	select {
	case <-l.release:
		return l.Lease.Grant(ctx, ttl)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// A grant that Transfer does not wait for any more goes on, and its lease is revoked when it is answered.
func TestCloseWaitsForTheGrantOfATransfer(t *testing.T) {
	client, l, next, _, cs := transferCase(t, 1)
	own := wrapped(client)
	held := &heldLease{Lease: client.Lease, held: make(chan struct{}, 100), release: make(chan struct{})}
	own.Lease = held
	e := newElector(t, own)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	transferred := transfer(ctx, e, "jobs", cs[1])
	etcdtest.Await(t, "the grant", held.held)
	cancel()
	if err := etcdtest.Await(t, "Transfer", transferred); !errors.Is(err, context.Canceled) {
		t.Errorf("Transfer: %v", err)
	}
	_, leases := footprint(t, client)
	time.AfterFunc(200*time.Millisecond, func() { close(held.release) }) // so that a Close that does not wait returns before
	if err := e.Close(t.Context()); err != nil {
		t.Errorf("Close: %v", err)
	}
	if n := held.running.Load(); n != 0 {
		t.Errorf("Close has returned while %d requests were under way", n)
	}
	if _, now := footprint(t, client); now != leases {
		t.Errorf("%d leases, want %d", now, leases)
	}
	resign(t, l)
	resign(t, awaitLeader(t, next[0]))
}

// An endedWatcher has no watches.
type endedWatcher struct{ clientv3.Watcher }

func (endedWatcher) Watch(context.Context, string, ...clientv3.OpOption) clientv3.WatchChan {
	events := make(chan clientv3.WatchResponse)
	close(events)
	return events
}

// The end of the client reaches its requests and Transfer in any order.
func TestTransferSaysThatItsClientIsClosed(t *testing.T) {
	for range 3000 {
		ctx, closeClient := context.WithCancel(t.Context())
		client, kv := darkened(clientv3.NewCtxClient(ctx), func(string) bool { return true })
		client.Watcher = endedWatcher{}
		transferred := transfer(t.Context(), newElector(t, client), "jobs", leader.Candidate{})
		etcdtest.Await(t, "a request", kv.hung)
		closeClient()
		if err := etcdtest.Await(t, "Transfer", transferred); !errors.Is(err, leader.ErrClosed) {
			t.Fatalf("Transfer: %v, want ErrClosed", err)
		}
	}
}

func TestErrorOfTransferRepeatsNoLargeValue(t *testing.T) {
	client, l, _, _, _ := transferCase(t, 0)
	stock(t, client, "jobs", strings.Repeat("v", 1<<20), time.Minute) // does not step back
	awaitQueue(t, client, "jobs", queued(2))
	campaign(t.Context(), newElector(t, client), "jobs", "target")
	cs := awaitQueue(t, client, "jobs", queued(3))
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second) // until it knows that the request was put
	defer cancel()
	transferred := transfer(ctx, newElector(t, client), "jobs", cs[2])
	if err := etcdtest.Await(t, "Transfer", transferred); len(err.Error()) > 1000 || !strings.Contains(err.Error(), cs[1].Key) {
		t.Errorf("the error has %d bytes: %.1000v", len(err.Error()), err)
	}
	resign(t, l)
}

func TestTransferThatCannotBeSaysWhyAndWritesNothing(t *testing.T) {
	client, l, next, ops, cs := transferCase(t, 1)
	other := lead(t, newElector(t, client), "other", "")
	revision, leases := footprint(t, client)
	for _, test := range []struct {
		what, name string
		to         leader.Candidate
		want       error
	}{
		{"nobody leads", "nobody", leader.Candidate{}, leader.ErrNoLeader},
		{"nobody leads, but it names one", "nobody", cs[1], leader.ErrNoLeader},
		{"the target leads already", "jobs", cs[0], nil},
		{"no such key", "jobs", leader.Candidate{Key: "jobs/1", Token: cs[1].Token}, leader.ErrNotCandidate},
		{"another token", "jobs", leader.Candidate{Key: cs[1].Key, Token: cs[1].Token + 1}, leader.ErrNotCandidate},
		{"no token", "jobs", leader.Candidate{Key: cs[1].Key}, leader.ErrNotCandidate},
		{"no key", "jobs", leader.Candidate{Value: cs[1].Value}, leader.ErrNotCandidate},
		{"that of another election", "jobs", leader.Candidate{Key: other.Key(), Token: other.Token()}, leader.ErrNotCandidate},
		{"nobody waits", "other", leader.Candidate{}, leader.ErrNotCandidate},
	} {
		err := ops.Transfer(t.Context(), test.name, test.to)
		if !errors.Is(err, test.want) || err != nil && !strings.HasPrefix(err.Error(), "leader: ") {
			t.Errorf("%s: %v, want %v", test.what, err, test.want)
		}
	}
	if now, n := footprint(t, client); now != revision || n != leases {
		t.Errorf("etcd's revision was %d and is %d, with %d leases and now %d", revision, now, leases, n)
	}
	if !l.IsLeader() || !other.IsLeader() {
		t.Error("a Transfer that could not be has ended a term")
	}
	resign(t, other)
	resign(t, l)
	resign(t, awaitLeader(t, next[0]))
}

// footprint is what a write changes in etcd: its revision, and how many leases there are.
func footprint(t *testing.T, client *clientv3.Client) (revision int64, leases int) {
	t.Helper()
	resp, err := client.Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	read, err := client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	return read.Header.Revision, len(resp.Leases)
}

// Guard and token hold while the work winds down, and nobody else is elected.
func TestTransferredTermOfCampaignKeepsItsKeyForTheMarginOrUntilResign(t *testing.T) {
	const margin = 800 * time.Millisecond
	for name, resigns := range map[string]bool{"for the margin": false, "until Resign": true} {
		t.Run(name, func(t *testing.T) {
			client, l, next, ops, cs := transferCase(t, 1, leader.WithMargin(margin))
			transferred := transfer(t.Context(), ops, "jobs", cs[1])
			etcdtest.Await(t, "the end of the term", l.Context().Done())
			ended := time.Now()
			if resp, err := client.Txn(t.Context()).If(l.Guard()).Then(clientv3.OpPut("data", "x")).Commit(); err != nil || !resp.Succeeded {
				t.Errorf("a write under guard while the work winds down: %v, %v", resp, err)
			}
			if resigns {
				resign(t, l)
			}
			successor := awaitLeader(t, next[0])
			if took := time.Since(ended); !resigns && took < margin {
				t.Errorf("the next one was elected %v after the end, before the margin", took)
			}
			wantTransferred(t, transferred)
			resign(t, l)
			resign(t, successor)
		})
	}
}

// A stock candidate never steps back, and its key must not be deleted for it: it would be elected as a phantom.
func TestTransferPastToAndFromAStockCandidate(t *testing.T) {
	for kind, stand := range map[string]func(t *testing.T, m *etcdtest.Member, client *clientv3.Client) (leave func()){
		"concurrency.Election": standStock,
		"etcdctl elect": func(t *testing.T, m *etcdtest.Member, client *clientv3.Client) func() {
			return etcdctlElect(t, m, client, "jobs", "stock")
		},
	} {
		for place, test := range map[string]struct {
			stock, to int // places in the queue
			first     string
		}{
			"it leads":            {stock: 0, to: 1},
			"it waits between":    {stock: 1, to: 2},
			"it is to lead":       {stock: 1, to: 1, first: "stock"},
			"it waits behind":     {stock: 2, to: 1, first: "ours-1"},
			"it waits behind two": {stock: 3, to: 2, first: "ours-2"},
		} {
			t.Run(kind+", "+place, func(t *testing.T) {
				m, client := start(t)
				ctx, stop := context.WithCancel(t.Context())
				defer stop()
				var ours []<-chan outcome
				var stockLeaves func()
				for i := range 4 {
					if i == test.stock {
						stockLeaves = stand(t, m, client)
					} else {
						e := newElector(t, client, leader.WithMargin(50*time.Millisecond))
						ours = append(ours, campaign(ctx, e, "jobs", fmt.Sprint("ours-", i)))
					}
					awaitQueue(t, client, "jobs", queued(i+1))
				}
				cs := awaitQueue(t, client, "jobs", queued(4))
				tctx, cancel := context.WithCancel(ctx)
				defer cancel()
				transferred := transfer(tctx, newElector(t, client), "jobs", cs[test.to])
				if test.first == "" { // it is asked in vain
					etcdtest.Await(t, "the request", client.Watch(ctx, cs[test.stock].Key+"/stepback", clientv3.WithRev(1)))
					time.Sleep(200 * time.Millisecond) // the leader must not be asked next, and it would leave within its margin
					cancel()
					if err := etcdtest.Await(t, "Transfer", transferred); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), `"stock"`) {
						t.Errorf("Transfer: %v", err)
					}
					if now := awaitQueue(t, client, "jobs", queued(4)); now[0].Token != cs[0].Token {
						t.Errorf("the leader has stepped back: %+v", now)
					}
				} else {
					wantTransferred(t, transferred)
					now := awaitQueue(t, client, "jobs", queued(3))
					if now[0].Value != test.first || !slices.ContainsFunc(now, func(c leader.Candidate) bool { return c.Token == cs[test.stock].Token }) {
						t.Errorf("%q leads, want %q; stock must stay: %+v", now[0].Value, test.first, now)
					}
				}
				wantNoRequest(t, client, "jobs")
				stockLeaves()
				stop()
				leave(t, ours)
				awaitQueue(t, client, "jobs", queued(0))
			})
		}
	}
}

// standStock is a candidate of concurrency.Election until leave is called, at the latest with the end of the test.
func standStock(t *testing.T, _ *etcdtest.Member, client *clientv3.Client) (leave func()) {
	t.Helper()
	session, err := concurrency.NewSession(client, concurrency.WithTTL(60))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan error, 1)
	go func() { over <- concurrency.NewElection(session, "jobs").Campaign(ctx, "stock") }()
	leave = sync.OnceFunc(func() {
		cancel()
		_ = etcdtest.Await(t, "the stock candidate", over)
		_ = session.Close() // an error says that the lease is gone already
	})
	t.Cleanup(leave)
	return leave
}

// The leader dies when it was asked, and is back under the same key: the request is not about the new term.
func TestRequestOfAnEarlierTermIsIgnored(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	lead(t, e, "other", "") // keeps the lease
	l := lead(t, e, "jobs", "")
	lease, err := client.Grant(t.Context(), 60)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = client.Revoke(context.Background(), lease.ID) }()
	if _, err := client.Put(t.Context(), l.Key()+"/stepback", fmt.Sprint(l.Token()-1), clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
	if err := l.Proclaim(t.Context(), "still"); err != nil || !l.IsLeader() {
		t.Errorf("Proclaim: %v; leads: %v", err, l.IsLeader())
	}
	time.Sleep(100 * time.Millisecond)
	if !l.IsLeader() {
		t.Fatal("a request of an earlier term has ended this one")
	}
	if _, err := client.Put(t.Context(), l.Key()+"/stepback", fmt.Sprint(l.Token()), clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
	etcdtest.Await(t, "the end of the term", l.Context().Done())
	resign(t, l)
	wantNoRequest(t, client, "jobs") // it has gone with the key, though its lease lives
}

// Both ask the same ones, and one may ask whom the other one names. The one that names the last of them always succeeds.
func TestTwoTransfersAtOnceBothEnd(t *testing.T) {
	for target, place := range map[string]int{"whoever is next": 0, "the next": 1, "another one": 2, "the same": 3} {
		t.Run(target, func(t *testing.T) {
			client, _, next, ops, cs := transferCase(t, 3, leader.WithMargin(50*time.Millisecond))
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			to := cs[place]
			if place == 0 {
				to = leader.Candidate{}
			}
			asked := client.Watch(ctx, "jobs/", clientv3.WithPrefix(), clientv3.WithFilterDelete()) // it exists from here on
			other := transfer(ctx, newElector(t, client), "jobs", to)
			if place == 0 { // if it began when the last one leads, it would hand over from that one, rightly
				etcdtest.Await(t, "the request to step back", asked)
			}
			if err := ops.Transfer(ctx, "jobs", cs[3]); err != nil {
				t.Errorf("the Transfer to the last: %v", err)
			}
			if err := etcdtest.Await(t, "the other Transfer", other); err != nil && !errors.Is(err, leader.ErrNotCandidate) {
				t.Errorf("the other Transfer: %v", err)
			}
			wantNoRequest(t, client, "jobs")
			if l := awaitLeader(t, next[2]); l.Token() != cs[3].Token {
				t.Errorf("token %d leads, want %d", l.Token(), cs[3].Token)
			} else {
				next[2] = won(l)
			}
			resignInAnyOrder(t, next)
		})
	}
}

// An Elector may ask for the leadership for itself, or give its own away.
func TestTransferByAnElectorThatTakesPart(t *testing.T) {
	for asker := range 4 {
		t.Run([]string{"the leader", "one between", "the target", "one behind"}[asker], func(t *testing.T) {
			_, client := start(t)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var es []*leader.Elector
			var terms []<-chan outcome
			for i := range 4 {
				es = append(es, newElector(t, client, leader.WithMargin(50*time.Millisecond)))
				terms = append(terms, campaign(ctx, es[i], "jobs", ""))
				awaitQueue(t, client, "jobs", queued(i+1))
			}
			cs := awaitQueue(t, client, "jobs", queued(4))
			tctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			if err := es[asker].Transfer(tctx, "jobs", cs[2]); err != nil {
				t.Errorf("Transfer: %v", err)
			}
			if l := awaitLeader(t, terms[2]); l.Token() != cs[2].Token {
				t.Errorf("token %d leads, want %d", l.Token(), cs[2].Token)
			} else {
				terms[2] = won(l)
			}
			stop()
			leave(t, terms)
		})
	}
}

// In "a", "a/b" is no candidate, though its name is hex; and in "a/b" nobody of "a" is asked.
func TestTransferInElectionsWhoseNamesNest(t *testing.T) {
	_, client := start(t)
	names := []string{"a", "a/b"}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			queues := make(map[string][]leader.Candidate)
			var terms []<-chan outcome
			for i := range 3 { // in turns, so that each stands between those of the other
				for _, n := range names {
					e := newElector(t, client, leader.WithPrefix("svc"), leader.WithMargin(50*time.Millisecond))
					terms = append(terms, campaign(ctx, e, n, fmt.Sprint(n, " ", i)))
					queues[n] = awaitQueue(t, client, "svc/"+n, queued(i+1))
				}
			}
			tctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			if err := newElector(t, client, leader.WithPrefix("svc")).Transfer(tctx, name, queues[name][2]); err != nil {
				t.Errorf("Transfer: %v", err)
			}
			for _, n := range names {
				want := queues[n]
				if n == name {
					want = []leader.Candidate{want[2], want[1]} // which has joined again
				}
				now := awaitQueue(t, client, "svc/"+n, queued(len(want)))
				for i, c := range now {
					if c.Value != want[i].Value || n != name && c.Token != want[i].Token {
						t.Errorf("after a Transfer in %q the queue of %q is %+v", name, n, now)
					}
				}
			}
			wantNoRequest(t, client, "svc")
			stop()
			leave(t, terms)
		})
	}
}

// Whoever deletes all that lies below the name must not make a Transfer wait for ever.
func TestRequestThatVanishesIsPutAgain(t *testing.T) {
	q := newStockBetween(t)
	ctx, cancel := context.WithCancel(t.Context())
	transferred := q.transfer(ctx, t, newElector(t, q.client))
	puts := 0
	for resp := range q.client.Watch(t.Context(), q.request(), clientv3.WithRev(1)) {
		for _, ev := range resp.Events {
			if ev.Type != clientv3.EventTypePut {
				continue
			}
			if puts++; puts == 1 {
				if _, err := q.client.Delete(t.Context(), q.request()); err != nil {
					t.Fatal(err)
				}
			}
		}
		if puts == 2 {
			break
		}
	}
	cancel()
	if err := etcdtest.Await(t, "Transfer", transferred); !errors.Is(err, context.Canceled) {
		t.Errorf("Transfer: %v", err)
	}
	q.wantNoRequest(t)
	q.end(t)
}

// It needs no right but that below the election's name, and no key outside a namespace.
func TestTransferNeedsNoMoreThanCandidatesDo(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	root := etcdtest.NewClient(t, m.Endpoint)
	enableAuth(t, root, "tenant/jobs/")
	service := etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: "service", Password: "service"})
	ns := wrapped(service)
	ns.KV, ns.Watcher, ns.Lease = namespace.NewKV(service.KV, "tenant/"), namespace.NewWatcher(service.Watcher, "tenant/"), namespace.NewLease(service.Lease, "tenant/")
	l := lead(t, newElector(t, ns), "jobs", "first")
	between := campaign(t.Context(), newElector(t, ns), "jobs", "second")
	awaitQueue(t, ns, "jobs", queued(2))
	next := campaign(t.Context(), newElector(t, ns), "jobs", "third")
	cs := awaitQueue(t, ns, "jobs", queued(3))
	e := newElector(t, ns)
	transferred := transfer(t.Context(), e, "jobs", cs[2])
	etcdtest.Await(t, "the end of the term", l.Context().Done())
	resign(t, l)
	wantTransferred(t, transferred)
	resign(t, awaitLeader(t, next))
	resign(t, awaitLeader(t, between))
}

// Somebody else's Resign has no answer, and holds the election, for longer than Run resigns.
func TestRunGoesOnThoughAnotherResignOfATransferredTermIsUnderWay(t *testing.T) {
	m := etcdtest.StartProcesses(t, 1)[0]
	client := etcdtest.NewClient(t, m.Endpoint)
	leavesNothing(t, client)
	e := newElector(t, client)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	dark := make(chan struct{})
	terms, ran := runHeld(ctx, e, "first", dark)
	l := etcdtest.Await(t, "the term", terms)
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	transferred := transfer(t.Context(), newElector(t, client), "jobs", leader.Candidate{})
	etcdtest.Await(t, "the end of the term", l.Context().Done())
	if err := m.Pause(); err != nil {
		t.Fatal(err)
	}
	resigned := make(chan error, 1)
	go func() { resigned <- l.Resign(context.WithoutCancel(t.Context())) }()
	time.Sleep(100 * time.Millisecond)
	close(dark)
	select {
	case err := <-ran:
		t.Errorf("Run: %v", err)
		ran <- err
	case <-time.After(3 * time.Second):
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	_ = etcdtest.Await(t, "Resign", resigned)
	_ = etcdtest.Await(t, "Transfer", transferred)
	second := awaitLeader(t, next)
	stop()
	_ = etcdtest.Await(t, "Run", ran)
	resign(t, second)
}

// An outage that begins while a candidate is being asked lasts for longer than the lease of the requests.
func TestTransferSurvivesAnOutageThatItsLeaseDoesNot(t *testing.T) {
	_, client := start(t)
	l := lead(t, newElector(t, client), "jobs", "leads")
	next := campaign(t.Context(), newElector(t, client), "jobs", "waits")
	awaitQueue(t, client, "jobs", queued(2))
	var out atomic.Bool
	out.Store(true)
	bad := wrapped(client)
	bad.KV = outKV{client.KV, &out}
	e := newElector(t, bad)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	transferred := transfer(ctx, e, "jobs", leader.Candidate{})
	time.Sleep(10 * time.Second)
	out.Store(false)
	select {
	case <-l.Context().Done():
	case <-time.After(6 * time.Second):
		t.Error("the leader is not asked though the outage is over")
		cancel()
	}
	resign(t, l)
	wantTransferred(t, transferred)
	resign(t, awaitLeader(t, next))
}

// An operator transfers the leadership of a leader that hangs before its check has noticed: it still costs a TTL.
func TestTransferDoesNotSaveAHungLeaderFromItsCheck(t *testing.T) {
	_, client := start(t)
	var p patient
	e := newElector(t, client, leader.WithTTL(3*time.Second), leader.WithHealth(p.check))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	release := make(chan struct{})
	terms, ran := runHeld(ctx, e, "", release)
	l := etcdtest.Await(t, "the term", terms)
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	p.fail(errSick)
	ops := newElector(t, client)
	transferred := transfer(ctx, ops, "jobs", leader.Candidate{})
	etcdtest.Await(t, "the end of the term", l.Context().Done())
	select {
	case o := <-next:
		if o.err != nil {
			t.Fatal(o.err)
		}
		_ = etcdtest.Await(t, "Transfer", transferred)
		resign(t, o.l)
		stop()
		close(release)
	case <-time.After(6 * time.Second):
		t.Error("nobody leads two TTLs after the check has begun to fail")
		close(release)
		resign(t, awaitLeader(t, next))
		stop()
	}
	_ = etcdtest.Await(t, "Run", ran)
}

// A Transfer that has asked somebody deletes, by its renewals, only requests of its own.
func TestTransferDeletesNoRequestOfAnother(t *testing.T) {
	q := newStockBetween(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	transferred := q.transfer(ctx, t, newElector(t, q.client))
	// One more that stands before to: it steps back, and its request is forgotten.
	e := newElector(t, q.client)
	own := campaign(t.Context(), e, "jobs", "last")
	awaitQueue(t, q.client, "jobs", queued(4))
	ops := newElector(t, q.client)
	second, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	// asks stock, waits and then last: only stock is left
	tail := campaign(t.Context(), newElector(t, q.client), "jobs", "tail")
	cs := awaitQueue(t, q.client, "jobs", queued(5))
	over := transfer(second, ops, "jobs", cs[4])
	for {
		now, err := ops.Candidates(t.Context(), "jobs")
		if err != nil {
			t.Fatal(err)
		}
		if len(now) == 5 && now[2].Value == "tail" {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(200 * time.Millisecond)
	lease, err := q.client.Grant(t.Context(), 60)
	if err != nil {
		t.Fatal(err)
	}
	another := cs[3].Key + "/stepback" // of somebody else, not about the present term
	if _, err := q.client.Put(t.Context(), another, "1", clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(8 * time.Second)
	if resp, err := q.client.Get(t.Context(), another); err != nil || resp.Count != 1 {
		t.Errorf("the request of somebody else: %v, %v", resp, err)
	}
	stop()
	_, _ = q.client.Revoke(t.Context(), lease.ID)
	_ = etcdtest.Await(t, "Transfer", over)
	cancel()
	_ = etcdtest.Await(t, "Transfer", transferred)
	q.leaves()
	resign(t, q.l)
	resignInAnyOrder(t, []<-chan outcome{q.next, own, tail})
}

// A request that was deleted once by somebody else is put again once, not deleted by the Transfer's own renewals for ever.
func TestRequestThatVanishedOnceIsPutAgainOnce(t *testing.T) {
	q := newStockBetween(t)
	transfers, cancel := context.WithCancel(t.Context())
	transferred := q.transfer(transfers, t, newElector(t, q.client))
	if _, err := q.client.Delete(t.Context(), q.request()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(11 * time.Second) // three renewals
	resp, err := q.client.Get(t.Context(), q.request())
	if err != nil || resp.Count != 1 {
		t.Errorf("the request was not put again: %v, %v", resp, err)
	}
	ctx, stop := context.WithCancel(t.Context())
	deletions := 0
	time.AfterFunc(500*time.Millisecond, stop)
	for resp := range q.client.Watch(ctx, q.request(), clientv3.WithRev(1)) {
		for _, ev := range resp.Events {
			if ev.Type == clientv3.EventTypeDelete {
				deletions++
			}
		}
	}
	if deletions != 1 {
		t.Errorf("the request was deleted %d times", deletions)
	}
	leases, err := q.client.Leases(t.Context())
	if err != nil || len(leases.Leases) != 4 { // leader, stock, next, Transfer
		t.Errorf("leases: %v, %v, want 4", leases, err)
	}
	cancel()
	_ = etcdtest.Await(t, "Transfer", transferred)
	q.end(t)
}

// After an outage the lease of the requests is gone, and with it the requests.
func TestTransferThatHasLostItsLeaseAsksAgain(t *testing.T) {
	q := newStockBetween(t)
	ctx, cancel := context.WithCancel(t.Context())
	transferred := q.transfer(ctx, t, newElector(t, q.client))
	q.revokeRequest(t)
	deadline := time.Now().Add(8 * time.Second)
	for {
		resp, err := q.client.Get(t.Context(), q.request())
		if err == nil && resp.Count == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Error("the request is not put again after its lease was lost")
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	cancel()
	_ = etcdtest.Await(t, "Transfer", transferred)
	q.end(t)
}

// The lease is gone in etcd, and the Transfer does not know that yet when it has to ask the next one.
func TestTransferWhoseLeaseIsGoneAsksTheNextOneWithAnother(t *testing.T) {
	q := newStockBetween(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	transferred := q.transfer(ctx, t, newElector(t, q.client))
	q.revokeRequest(t)
	q.leaves()
	select {
	case <-q.l.Context().Done():
	case err := <-transferred:
		t.Errorf("Transfer: %v", err)
		resign(t, q.l)
		resign(t, awaitLeader(t, q.next))
		return
	}
	resign(t, q.l)
	wantTransferred(t, transferred)
	resign(t, awaitLeader(t, q.next))
}

// Run waits for the function of a transferred term; Hooks.Ended must not.
func TestEndOfATransferredTermIsToldThoughTheFunctionHasNotReturned(t *testing.T) {
	_, client := start(t)
	ended, release := make(chan error, 10), make(chan struct{})
	e := newElector(t, client, leader.WithHooks(leader.Hooks{
		LeaderChanged: func(string, leader.Candidate) {},
		Ended:         func(_ string, _ *leader.Leader, cause error) { ended <- cause },
	}))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	terms, ran := runHeld(ctx, e, "first", release)
	etcdtest.Await(t, "the term", terms)
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	transferred := transfer(t.Context(), newElector(t, client), "jobs", leader.Candidate{})
	select {
	case cause := <-ended:
		if !errors.Is(cause, leader.ErrTransferred) {
			t.Errorf("ended with %v", cause)
		}
	case <-time.After(3 * time.Second):
		t.Error("Hooks.Ended is not called while the function has not returned")
	}
	close(release)
	_ = etcdtest.Await(t, "Transfer", transferred)
	l := awaitLeader(t, next)
	stop()
	_ = etcdtest.Await(t, "Run", ran)
	resign(t, l)
}

// Who is next leaves just before the leader is asked.
func TestATransferToWhoeverIsNextAsksNobodyToMakeWayForNobody(t *testing.T) {
	_, client := start(t)
	l := lead(t, newElector(t, client), "jobs", "leads")
	ctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	next := campaign(ctx, newElector(t, client), "jobs", "next")
	awaitQueue(t, client, "jobs", queued(2))
	c, kv := wrapped(client), &brokenKV{KV: client.KV}
	c.KV = kv
	before := sync.OnceFunc(func() {
		giveUp()
		<-next
	})
	kv.before.Store(&before)
	if err := newElector(t, c).Transfer(t.Context(), "jobs", leader.Candidate{}); !errors.Is(err, leader.ErrNotCandidate) {
		t.Errorf("Transfer: %v, want ErrNotCandidate", err)
	}
	if !l.IsLeader() {
		t.Errorf("the leader has stepped back: %v", context.Cause(l.Context()))
	}
	resign(t, l)
}

// A revokedLease revokes each lease that it grants, as any user of etcd may while the lease has no key.
type revokedLease struct {
	clientv3.Lease
	grants atomic.Int64
}

func (l *revokedLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	l.grants.Add(1)
	resp, err := l.Lease.Grant(ctx, ttl)
	if err == nil {
		_, err = l.Revoke(ctx, resp.ID)
	}
	return resp, err
}

// Without a pause this takes hundreds of leases a second.
func TestATransferWhoseLeasesAreRevokedBacksOff(t *testing.T) {
	_, client := start(t)
	l := lead(t, newElector(t, client), "jobs", "leads")
	next := campaign(t.Context(), newElector(t, client), "jobs", "next")
	awaitQueue(t, client, "jobs", queued(2))
	c, lease := wrapped(client), &revokedLease{Lease: client.Lease}
	c.Lease = lease
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	err := newElector(t, c).Transfer(ctx, "jobs", leader.Candidate{})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "lease not found") {
		t.Errorf("Transfer: %v, want that the deadline has passed, and the last failure", err)
	}
	if n := lease.grants.Load(); n > 30 {
		t.Errorf("%d leases were granted in 3 s", n)
	}
	resign(t, l)
	resign(t, awaitLeader(t, next))
}

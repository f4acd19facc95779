package leader_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/namespace"
)

func TestTransferHandsOverToWhomItNamesPastThoseBetween(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	var next []<-chan outcome
	for _, value := range []string{"second", "third", "fourth"} {
		next = append(next, campaign(t.Context(), newElector(t, client), "jobs", value))
		awaitQueue(t, client, "jobs", queued(len(next)+1))
	}
	ops := newElector(t, client)
	cs, err := ops.Candidates(t.Context(), "jobs")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	began := time.Now()
	if err := ops.Transfer(ctx, "jobs", cs[3]); err != nil {
		t.Fatalf("Transfer: %v", err)
	}
	t.Logf("took %v", time.Since(began))
	etcdtest.Await(t, "the end of the term", first.Context().Done())
	if cause := context.Cause(first.Context()); !errors.Is(cause, leader.ErrTransferred) {
		t.Errorf("the term ended with %v", cause)
	}
	l := awaitLeader(t, next[2])
	if l.Token() != cs[3].Token {
		t.Errorf("token %d leads, want %d", l.Token(), cs[3].Token)
	}
	cs = awaitQueue(t, client, "jobs", queued(3))
	if cs[0].Value != "fourth" {
		t.Errorf("the queue is %+v", cs)
	}
	resign(t, l)
	resignInAnyOrder(t, next[:2])
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
	if err := etcdtest.Await(t, "Transfer", transferred); err != nil {
		t.Errorf("Transfer: %v", err)
	}
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

func TestTransferThatCannotBeSaysWhyAndLeavesNothing(t *testing.T) {
	client, l, next, ops, cs := transferCase(t, 1)
	if err := ops.Transfer(t.Context(), "nobody", leader.Candidate{}); !errors.Is(err, leader.ErrNoLeader) {
		t.Errorf("Transfer of an election without a leader: %v", err)
	}
	if err := ops.Transfer(t.Context(), "jobs", cs[0]); err != nil {
		t.Errorf("Transfer to the leader: %v", err)
	}
	for what, to := range map[string]leader.Candidate{
		"a key that is not there": {Key: "jobs/1", Token: 1},
		"another token":           {Key: cs[1].Key, Token: cs[1].Token + 1},
	} {
		if err := ops.Transfer(t.Context(), "jobs", to); !errors.Is(err, leader.ErrNotCandidate) {
			t.Errorf("Transfer to %s: %v", what, err)
		}
	}
	if err := ops.Transfer(t.Context(), "jobs/", cs[1]); !errors.Is(err, leader.ErrInvalidName) {
		t.Errorf("Transfer of a bad name: %v", err)
	}
	if !l.IsLeader() {
		t.Fatal("a Transfer that could not be has ended the term")
	}
	resign(t, l)
	last := awaitLeader(t, next[0])
	if err := ops.Transfer(t.Context(), "jobs", leader.Candidate{}); !errors.Is(err, leader.ErrNotCandidate) {
		t.Errorf("Transfer when nobody waits: %v", err)
	}
	resign(t, last)
	if err := ops.Close(t.Context()); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := ops.Transfer(t.Context(), "jobs", leader.Candidate{}); !errors.Is(err, leader.ErrClosed) {
		t.Errorf("Transfer of a closed Elector: %v", err)
	}
	keys, err := client.Get(t.Context(), "jobs/", clientv3.WithPrefix())
	if err != nil || keys.Count != 0 {
		t.Errorf("keys left: %v, %v", keys, err)
	}
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
			if err := etcdtest.Await(t, "Transfer", transferred); err != nil {
				t.Errorf("Transfer: %v", err)
			}
			resign(t, l)
			resign(t, successor)
		})
	}
}

// A stock candidate never steps back, and its key must not be deleted for it: it would be elected as a phantom.
func TestTransferAsksNobodyPastAStockCandidate(t *testing.T) {
	q := newStockBetween(t)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	err := newElector(t, q.client).Transfer(ctx, "jobs", q.cs[2])
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), `"stock"`) {
		t.Errorf("Transfer past a stock candidate: %v", err)
	}
	if !q.l.IsLeader() {
		t.Error("the leader was asked")
	}
	q.end(t)
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
}

// Both ask the same ones, and neither's requests are needed when the other's are there.
func TestTwoTransfersAtOnceBothEnd(t *testing.T) {
	_, _, next, ops, cs := transferCase(t, 3)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	second := transfer(ctx, ops, "jobs", cs[3])
	if err := ops.Transfer(ctx, "jobs", cs[3]); err != nil {
		t.Errorf("the first Transfer: %v", err)
	}
	if err := etcdtest.Await(t, "the second Transfer", second); err != nil {
		t.Errorf("the second Transfer: %v", err)
	}
	resignInAnyOrder(t, next)
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
	if err := etcdtest.Await(t, "Transfer", transferred); err != nil {
		t.Errorf("Transfer: %v", err)
	}
	resign(t, awaitLeader(t, next))
	resign(t, awaitLeader(t, between))
}

// The asker dies: its requests are gone after their lease, and whoever has not seen them stays.
func TestTransferThatIsGivenUpLeavesNoRequestAndTheLeaderWhereItWasNotAsked(t *testing.T) {
	q := newStockBetween(t)
	e := newElector(t, q.client)
	transferred := q.transfer(t.Context(), t, e)
	if err := e.Close(t.Context()); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := etcdtest.Await(t, "Transfer", transferred); !errors.Is(err, leader.ErrClosed) {
		t.Errorf("Transfer of an Elector that is closed: %v", err)
	}
	q.wantNoRequest(t)
	if !q.l.IsLeader() {
		t.Error("the leader has stepped back, and was not asked")
	}
	q.end(t)
}

// Somebody else's Resign has no answer, and holds the election, for longer than Run resigns.
func TestRunGoesOnThoughAnotherResignOfATransferredTermIsUnderWay(t *testing.T) {
	m := etcdtest.StartProcesses(t, 1)[0]
	client := etcdtest.NewClient(t, m.Endpoint)
	leavesNothing(t, client)
	e := newElector(t, client, long)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	terms, dark, ran := make(chan *leader.Leader, 10), make(chan struct{}), make(chan error, 1)
	go func() {
		ran <- e.Run(ctx, "jobs", "first", func(ctx context.Context, l *leader.Leader) error {
			terms <- l
			<-ctx.Done()
			<-dark
			return nil
		})
	}()
	l := etcdtest.Await(t, "the term", terms)
	next := campaign(t.Context(), newElector(t, client, long), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	transferred := transfer(t.Context(), newElector(t, client, long), "jobs", leader.Candidate{})
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
	l := lead(t, newElector(t, client, long), "jobs", "leads")
	next := campaign(t.Context(), newElector(t, client, long), "jobs", "waits")
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
	if err := etcdtest.Await(t, "Transfer", transferred); err != nil {
		t.Errorf("Transfer: %v", err)
	}
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
	terms, ran := overdueRun(ctx, e, release)
	l := etcdtest.Await(t, "the term", terms)
	next := campaign(t.Context(), newElector(t, client, long), "jobs", "second")
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
	e := newElector(t, q.client, long)
	own := campaign(t.Context(), e, "jobs", "last")
	awaitQueue(t, q.client, "jobs", queued(4))
	ops := newElector(t, q.client)
	second, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	// asks stock, waits and then last: only stock is left
	tail := campaign(t.Context(), newElector(t, q.client, long), "jobs", "tail")
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
	q.stockLeaves(t)
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
	q.stockLeaves(t)
	select {
	case <-q.l.Context().Done():
	case err := <-transferred:
		t.Errorf("Transfer: %v", err)
		resign(t, q.l)
		resign(t, awaitLeader(t, q.next))
		return
	}
	resign(t, q.l)
	if err := etcdtest.Await(t, "Transfer", transferred); err != nil {
		t.Errorf("Transfer: %v", err)
	}
	resign(t, awaitLeader(t, q.next))
}

// Run waits for the function of a transferred term; Hooks.Ended must not.
func TestEndOfATransferredTermIsToldThoughTheFunctionHasNotReturned(t *testing.T) {
	_, client := start(t)
	ended, release, began, ran := make(chan error, 10), make(chan struct{}), make(chan struct{}, 10), make(chan error, 1)
	e := newElector(t, client, long, leader.WithHooks(leader.Hooks{
		LeaderChanged: func(string, leader.Candidate) {},
		Ended:         func(_ string, _ *leader.Leader, cause error) { ended <- cause },
	}))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	go func() {
		ran <- e.Run(ctx, "jobs", "first", func(ctx context.Context, _ *leader.Leader) error {
			began <- struct{}{}
			<-ctx.Done()
			<-release
			return nil
		})
	}()
	etcdtest.Await(t, "the term", began)
	next := campaign(t.Context(), newElector(t, client, long), "jobs", "second")
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

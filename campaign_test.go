package leader_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The tests of this file are about campaigns: TryCampaign, candidacies that are lost while they wait, joins whose
// replies are lost, campaigns that end without a term, and the errors that say why. What stock gets wrong of that is in
// pitfalls_test.go.

func TestTryCampaignReturnsErrHeldAtOnce(t *testing.T) {
	_, client := start(t)
	first, second := newElector(t, client), newElector(t, client)
	l := lead(t, first, "jobs", "first")
	if _, err := second.TryCampaign(t.Context(), "jobs", "second"); !errors.Is(err, leader.ErrHeld) {
		t.Errorf("TryCampaign while another leads: %v", err)
	}
	if leases, err := client.Leases(t.Context()); err != nil || len(leases.Leases) != 1 {
		t.Errorf("TryCampaign took a lease: %v, %v", leases, err)
	}
	resign(t, l)
	l, err := second.TryCampaign(t.Context(), "jobs", "second")
	if err != nil || !l.IsLeader() {
		t.Errorf("TryCampaign while nobody leads: %v", err)
	}
}

func TestTryCampaignsAtOnceElectOneAndLeaveNoCandidate(t *testing.T) {
	_, client := start(t)
	var wg sync.WaitGroup
	var won, held atomic.Int32
	for range 8 {
		e := newElector(t, client)
		wg.Go(func() {
			switch l, err := e.TryCampaign(t.Context(), "jobs", ""); {
			case err == nil && l.IsLeader():
				won.Add(1)
			case errors.Is(err, leader.ErrHeld):
				held.Add(1)
			default:
				t.Errorf("TryCampaign: %v", err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 || held.Load() != 7 {
		t.Errorf("%d won and %d found it held, want 1 and 7", won.Load(), held.Load())
	}
	onlyKey(t, client, "jobs/")
}

// As where its lease is revoked (etcd-io/etcd#19597), a candidate without a key is never elected.
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

// The same where nobody but the clock ends the lease.
func TestWaitingCandidateWhoseLeaseExpiresJoinsAgain(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	link := etcdtest.NewLink(t, m)
	next := campaign(t.Context(), newExpiring(t, etcdtest.NewClient(t, link.Endpoint)), "jobs", "second")
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

// etcd-io/etcd#21128, pingcap/dm#1983: stock leaves a candidate behind that blocks the others.
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

// The end of the client reaches a request and its campaign at once, and either may be the first to see it.
func TestCampaignWhoseClientIsClosedReturnsErrClosed(t *testing.T) {
	t.Parallel()
	for range 300 {
		ctx, closeClient := context.WithCancel(t.Context())
		c := clientv3.NewCtxClient(ctx)
		asked := make(chan struct{}, 10)
		c.Lease = silentGrant{asked: asked, closed: ctx}
		next := campaign(t.Context(), newElector(t, c), "jobs", "")
		etcdtest.Await(t, "a grant", asked)
		closeClient() // as Close does
		if o := etcdtest.Await(t, "Campaign", next); !errors.Is(o.err, leader.ErrClosed) {
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

// A candidate is elected by an event, and its client is closed in the same moment.
func TestCampaignReturnsWhenItsClientIsClosedAsItIsElected(t *testing.T) {
	_, client := start(t)
	for range 30 {
		first := lead(t, newElector(t, client), "jobs", "")
		cctx, closeClient := context.WithCancel(t.Context())
		c := clientv3.NewCtxClient(cctx)
		c.KV, c.Watcher, c.Lease = client.KV, endingWatcher{client.Watcher, first.Key(), closeClient}, client.Lease
		e := newExpiring(t, c)
		next := recovered(func() outcome {
			l, err := e.Campaign(t.Context(), "jobs", "")
			return outcome{l: l, err: err}
		})
		awaitQueue(t, client, "jobs", queued(2))
		resign(t, first)
		o := etcdtest.Await(t, "Campaign", next)
		if (o.l == nil) == (o.err == nil) || o.err != nil && !errors.Is(o.err, leader.ErrClosed) {
			t.Errorf("Campaign returned %v, %v", o.l, o.err)
		}
		closeClient() // it may have been elected without an event
		revokeAll(t, client)
	}
	awaitExpiry(t, client)
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

// The process stands still while its join is answered, for long enough to lose the lease. Neither elected nor told why
// not is no outcome.
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
			o := etcdtest.Await(t, "Campaign", recovered(func() outcome {
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
				if err := etcdtest.Await(t, "Close", closed); err != nil {
					t.Errorf("Close: %v", err)
				}
			}
		})
	}
	awaitExpiry(t, client) // a closed client revokes no lease
}

func TestErrorOfACampaignNamesNoFailureThatHasHealed(t *testing.T) {
	_, client := start(t)
	lead(t, newElector(t, client, leader.WithTTL(time.Minute)), "jobs", "first")
	renewed := make(chan struct{}, 100)
	e := newExpiring(t, client, leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	}))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	second := campaign(ctx, e, "jobs", "second")
	cs := awaitQueue(t, client, "jobs", queued(2))
	if _, err := client.Delete(t.Context(), cs[1].Key); err != nil {
		t.Fatal(err)
	}
	awaitQueue(t, client, "jobs", func(now []leader.Candidate) bool { return len(now) == 2 && now[1].Token != cs[1].Token })
	for len(renewed) > 0 {
		<-renewed
	}
	for range 5 { // it waits in peace for more than a TTL
		etcdtest.Await(t, "a renewal", renewed)
	}
	cancel()
	if err := etcdtest.Await(t, "Campaign", second).err; !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "last failure") {
		t.Errorf("Campaign: %v", err)
	}
}

func TestErrorOfACampaignThatIsCancelledIsNoDeadline(t *testing.T) {
	_, client := start(t)
	c := wrapped(client)
	asked := make(chan struct{}, 100)
	c.Lease = silentGrant{Lease: client.Lease, asked: asked, closed: client.Ctx()}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := campaign(ctx, newElector(t, c), "jobs", "")
	etcdtest.Await(t, "a grant", asked)
	cancel()
	err := etcdtest.Await(t, "Campaign", ended).err
	if !errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no answer") {
		t.Errorf("Campaign: %v, want that it was cancelled before there was an answer", err)
	}
}

func TestEachOfTwoCampaignsSaysWhatItHasWaitedFor(t *testing.T) {
	m, _ := start(t)
	link := etcdtest.NewLink(t, m)
	client := etcdtest.NewClient(t, link.Endpoint)
	link.Darken()
	e := newElector(t, client)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	for _, c := range []<-chan outcome{campaign(ctx, e, "a", ""), campaign(ctx, e, "b", "")} {
		if err := etcdtest.Await(t, "Campaign", c).err; !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "last failure") {
			t.Errorf("Campaign() = %v, which does not say why", err)
		}
	}
	link.Heal()
}

// Nothing was asked of etcd, which is well.
func TestCampaignWhoseContextHasEndedDoesNotBlameEtcd(t *testing.T) {
	_, client := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := newElector(t, client).Campaign(ctx, "jobs", "")
	if !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "last failure") {
		t.Errorf("Campaign() = %v", err)
	}
}

// A context may have been ended by another Elector, such as that of an outer election.
func TestCallThatEndsWithAContextOfAnotherElectorReturnsTheContextsError(t *testing.T) {
	_, client := start(t)
	outer, inner := newElector(t, client), newElector(t, client)
	held := lead(t, newElector(t, client), "held", "")
	results := make(chan map[string]error, 1)
	running := make(chan struct{})
	go func() {
		_ = outer.Run(context.Background(), "outer", "", func(ctx context.Context, _ *leader.Leader) error {
			close(running)
			got := make(map[string]error)
			_, got["Campaign"] = inner.Campaign(ctx, "held", "")
			got["Run"] = inner.Run(ctx, "free", "", func(ctx context.Context, _ *leader.Leader) error {
				<-ctx.Done()
				return nil
			})
			for _, err := range inner.Observe(ctx, "held") {
				got["Observe"] = err
			}
			results <- got
			return nil
		})
	}()
	etcdtest.Await(t, "lead", running)
	awaitQueue(t, client, "held", queued(2))
	if err := outer.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for call, err := range etcdtest.Await(t, "the calls", results) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s returned %v, want an error that wraps %v: this Elector is open", call, err, context.Canceled)
		}
	}
	resign(t, held)
}

// Another candidate joins first, and the context ends while the own key is deleted.
func TestTryCampaignSaysThatItIsHeldThoughItsContextEndsMeanwhile(t *testing.T) {
	_, client := start(t)
	other := newElector(t, client)
	broken := &brokenKV{KV: client.KV}
	own, kv := holding(client, broken)
	var l *leader.Leader
	before := sync.OnceFunc(func() { l = lead(t, other, "jobs", "is faster") })
	broken.before.Store(&before)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	e := newElector(t, own)
	tried := make(chan error, 1)
	go func() { _, err := e.TryCampaign(ctx, "jobs", "tries"); tried <- err }()
	etcdtest.Await(t, "the deletion of its key", kv.held)
	cancel()
	close(kv.release)
	if err := etcdtest.Await(t, "TryCampaign", tried); !errors.Is(err, leader.ErrHeld) {
		t.Errorf("TryCampaign: %v, want ErrHeld", err)
	}
	resign(t, l)
}

func TestEtcdIsNotBlamedForWhatItWasNotAsked(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, campaign := e.Campaign(ctx, "jobs", "")
	_, try := e.TryCampaign(ctx, "jobs", "")
	_, current := e.Current(ctx, "jobs")
	_, candidates := e.Candidates(ctx, "jobs")
	for what, err := range map[string]error{
		"Campaign": campaign, "TryCampaign": try, "Current": current, "Candidates": candidates,
		"Transfer": e.Transfer(ctx, "jobs", leader.Candidate{}), "Evict": e.Evict(ctx, "jobs"),
	} {
		if !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "last failure") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

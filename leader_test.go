package leader_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"example.com/leader/internal/queue"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
)

func TestMain(m *testing.M) {
	etcdtest.Main()
	code := m.Run()
	if code == 0 {
		// All of the package's goroutines have an owner that waits for them, but for that of stock's
		// session, which ends with ours. So none may be left after the last test has closed its
		// client. A stopped etcd leaves some between its members, which speak net/http; this package
		// does not.
		err := goleak.Find(
			goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"),
			goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"),
			goleak.IgnoreAnyFunction("net/http.(*connReader).backgroundRead"),
			goleak.IgnoreAnyFunction("net/http.(*conn).serve"),
		)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// patience is how long a test waits for an event that must come. Nothing is inferred from it but
// that the event did not come.
const patience = 30 * time.Second

// ttl is what tests lead with: long enough for a busy machine, short enough to wait for.
const ttl = 2 * time.Second

// start runs an etcd for the test, with a client. When the test ends nothing may be left in it.
func start(t *testing.T) (*etcdtest.Member, *clientv3.Client) {
	t.Helper()
	t.Parallel()
	m := etcdtest.Start(t)
	client := etcdtest.NewClient(t, m.Endpoint)
	leavesNothing(t, client)
	return m, client
}

// leavesNothing checks, when the test has ended, that no key with a lease and no lease is left.
func leavesNothing(t *testing.T, client *clientv3.Client) {
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		leases, err := client.Leases(ctx)
		if err != nil {
			t.Errorf("list leases: %v", err)
		} else if len(leases.Leases) > 0 {
			t.Errorf("leases left in etcd: %v", leases.Leases)
		}
		keys, err := client.Get(ctx, "\x00", clientv3.WithFromKey(), clientv3.WithKeysOnly())
		if err != nil {
			t.Errorf("list keys: %v", err)
		}
		for _, kv := range keys.Kvs {
			if kv.Lease != 0 {
				t.Errorf("key left in etcd: %q", kv.Key)
			}
		}
	})
}

// awaitExpiry waits until there is no lease: one that could not be renewed is left to expire.
func awaitExpiry(t *testing.T, client *clientv3.Client) {
	t.Helper()
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		resp, err := client.Leases(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Leases) == 0 {
			return
		}
		if time.Since(began) > patience {
			t.Fatalf("leases do not expire: %v", resp.Leases)
		}
	}
}

// raftLeaderOf waits until the members of a cluster have a leader.
func raftLeaderOf(t *testing.T, members []*etcdtest.Member) *etcdtest.Member {
	t.Helper()
	for range 100 {
		for _, m := range members {
			client := etcdtest.NewClient(t, m.Endpoint)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			status, err := client.Status(ctx, m.Endpoint)
			cancel()
			if err == nil && status.Leader == status.Header.MemberId {
				return m
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("etcd has no leader")
	return nil
}

// newElector returns an Elector that is closed with the test.
func newElector(t *testing.T, client *clientv3.Client, opts ...leader.Option) *leader.Elector {
	t.Helper()
	e, err := leader.New(client, append([]leader.Option{leader.WithTTL(ttl)}, opts...)...)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := e.Close(ctx); err != nil && !t.Failed() && client.Ctx().Err() == nil {
			t.Errorf("Close: %v", err)
		}
	})
	return e
}

// lead campaigns and must win.
func lead(t *testing.T, e *leader.Elector, name, value string) *leader.Leader {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := e.Campaign(ctx, name, value)
	if err != nil {
		t.Fatalf("Campaign: %v", err)
	}
	return l
}

// An outcome is what Campaign returned, and when.
type outcome struct {
	l   *leader.Leader
	err error
	at  time.Time
}

// campaign campaigns in the background.
func campaign(ctx context.Context, e *leader.Elector, name, value string) <-chan outcome {
	c := make(chan outcome, 1)
	go func() {
		l, err := e.Campaign(ctx, name, value)
		c <- outcome{l, err, time.Now()}
	}()
	return c
}

// await returns what comes from a channel, or its zero value when the channel is closed.
func await[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("waited in vain for %s", what)
		panic("not reached")
	}
}

func awaitLeader(t *testing.T, c <-chan outcome) *leader.Leader {
	t.Helper()
	o := await(t, "Campaign", c)
	if o.err != nil {
		t.Fatalf("Campaign: %v", o.err)
	}
	return o.l
}

// awaitQueue waits until the election's queue is as wanted, and returns it.
func awaitQueue(t testing.TB, client *clientv3.Client, name string, wanted func([]leader.Candidate) bool) []leader.Candidate {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	e, err := leader.New(client)
	if err != nil {
		t.Fatal(err)
	}
	events := client.Watch(ctx, name+"/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	for range events {
		cs, err := e.Candidates(ctx, name)
		if err != nil {
			t.Fatalf("Candidates: %v", err)
		}
		if wanted(cs) {
			return cs
		}
	}
	t.Fatalf("waited in vain for the queue of %q", name)
	return nil
}

func queued(n int) func([]leader.Candidate) bool {
	return func(cs []leader.Candidate) bool { return len(cs) == n }
}

func resign(t *testing.T, l *leader.Leader) {
	t.Helper()
	if err := l.Resign(t.Context()); err != nil {
		t.Fatalf("Resign: %v", err)
	}
}

// awaitEnd waits until the term has ended and checks why.
func awaitEnd(t *testing.T, l *leader.Leader, cause error) {
	t.Helper()
	await(t, "the end of the term", l.Context().Done())
	if got := context.Cause(l.Context()); !errors.Is(got, cause) {
		t.Errorf("the term ended with cause %v, want %v", got, cause)
	}
	if l.IsLeader() {
		t.Error("IsLeader is true after the end of the term")
	}
}

// guarded reports whether a transaction under the term's guard goes through.
func guarded(t *testing.T, client *clientv3.Client, l *leader.Leader) bool {
	t.Helper()
	resp, err := client.Txn(t.Context()).If(l.Guard()).Commit()
	if err != nil {
		t.Fatalf("guarded transaction: %v", err)
	}
	return resp.Succeeded
}

func TestCampaignLeadsUntilResign(t *testing.T) {
	_, client := start(t)
	l, err := leader.Campaign(t.Context(), client, "jobs", "me", leader.WithTTL(ttl))
	if err != nil {
		t.Fatal(err)
	}
	if !l.IsLeader() || l.Context().Err() != nil || !time.Now().Before(l.Deadline()) {
		t.Errorf("after Campaign: IsLeader %v, Context %v, Deadline %v", l.IsLeader(), l.Context().Err(), l.Deadline())
	}
	kv := onlyKey(t, client, "jobs/")
	if string(kv.Key) != l.Key() || kv.CreateRevision != l.Token() || string(kv.Value) != "me" || l.Key() != fmt.Sprintf("jobs/%x", kv.Lease) {
		t.Errorf("key in etcd is %v, the term says %q, token %d", kv, l.Key(), l.Token())
	}
	if !guarded(t, client, l) {
		t.Error("the guard does not hold while leading")
	}
	resign(t, l)
	awaitEnd(t, l, leader.ErrResigned)
	if guarded(t, client, l) {
		t.Error("the guard holds after the term")
	}
	if d := l.Deadline(); d.After(time.Now()) || !d.Equal(l.Deadline()) {
		t.Errorf("the deadline of a term that has ended is %v, and then %v", d, l.Deadline())
	}
	if err := l.Proclaim(t.Context(), "late"); !errors.Is(err, leader.ErrNotLeader) || !errors.Is(err, concurrency.ErrElectionNotLeader) || !errors.Is(err, leader.ErrResigned) {
		t.Errorf("Proclaim after the term: %v", err)
	}
	resign(t, l) // once more, to no effect
}

func TestTermIsOverHereBeforeEtcdIsAskedToDeleteTheKey(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	kv := &brokenKV{KV: client.KV}
	broken.KV = kv
	l := lead(t, newElector(t, broken, leader.WithTTL(time.Minute)), "jobs", "")
	var sent atomic.Bool
	before := func() {
		sent.Store(true)
		if l.IsLeader() || l.Context().Err() == nil {
			t.Error("the deletion is sent while the term goes on")
		}
	}
	kv.before.Store(&before)
	resign(t, l)
	if !sent.Load() {
		t.Error("no deletion was sent")
	}
}

func onlyKey(t *testing.T, client *clientv3.Client, prefix string) *mvccpb.KeyValue {
	t.Helper()
	resp, err := client.Get(t.Context(), prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Kvs) != 1 {
		t.Fatalf("%d keys under %q, want one", len(resp.Kvs), prefix)
	}
	return resp.Kvs[0]
}

func TestContextCarriesTheCampaignsValues(t *testing.T) {
	_, client := start(t)
	type key struct{}
	l, err := newElector(t, client).Campaign(context.WithValue(t.Context(), key{}, "v"), "jobs", "")
	if err != nil {
		t.Fatal(err)
	}
	if l.Context().Value(key{}) != "v" {
		t.Error("the term's context lost the value of the campaign's")
	}
}

func TestDefaultValueNamesHostAndTimeAndIsUnique(t *testing.T) {
	_, client := start(t)
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool)
	for i := range 20 {
		before := time.Now().UnixMilli()
		l := lead(t, newElector(t, client), fmt.Sprintf("jobs%d", i), "")
		value := string(onlyKey(t, client, fmt.Sprintf("jobs%d/", i)).Value)
		var ms int64
		if _, err := fmt.Sscanf(strings.TrimPrefix(value, host), "-%d", &ms); err != nil || ms < before {
			t.Errorf("default value %q does not begin with %s and the time in milliseconds", value, host)
		}
		if seen[value] {
			t.Errorf("default value %q is not unique", value)
		}
		seen[value] = true
		if err := l.Proclaim(t.Context(), "x"); err != nil {
			t.Fatal(err)
		}
		if err := l.Proclaim(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
		if got := string(onlyKey(t, client, fmt.Sprintf("jobs%d/", i)).Value); got != value {
			t.Errorf("Proclaim of the default value gave %q, want %q", got, value)
		}
	}
}

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

// A campaign waits for what observes on its behalf, and nothing changes here that would wake that.
func TestCampaignThatEndsStopsObserving(t *testing.T) {
	_, client := start(t)
	lead(t, newElector(t, client), "jobs", "first")
	changes := make(chan leader.Candidate, 10)
	e := newElector(t, client, leader.WithHooks(leader.Hooks{
		LeaderChanged: func(_ string, c leader.Candidate) { changes <- c },
	}))
	campaigned := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		_, err := e.Campaign(ctx, "jobs", "second")
		campaigned <- err
	}()
	await(t, "the leader", changes)
	awaitQueue(t, client, "jobs", queued(2)) // a grant that is cut short would leave a lease to expire
	cancel()
	if err := await(t, "the end of the campaign", campaigned); !errors.Is(err, context.Canceled) {
		t.Errorf("Campaign: %v", err)
	}
	if _, err := e.TryCampaign(t.Context(), "jobs", "second"); !errors.Is(err, leader.ErrHeld) {
		t.Errorf("TryCampaign: %v", err)
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

func TestCurrentCandidatesAndEvict(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	if _, err := e.Current(t.Context(), "jobs"); !errors.Is(err, leader.ErrNoLeader) || !errors.Is(err, concurrency.ErrElectionNoLeader) {
		t.Errorf("Current of an empty election: %v", err)
	}
	if err := e.Evict(t.Context(), "jobs"); !errors.Is(err, leader.ErrNoLeader) {
		t.Errorf("Evict from an empty election: %v", err)
	}
	if cs, err := e.Candidates(t.Context(), "jobs"); err != nil || len(cs) != 0 {
		t.Errorf("Candidates of an empty election: %v, %v", cs, err)
	}
	l := lead(t, e, "jobs", "first")
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	cs := awaitQueue(t, client, "jobs", queued(2))
	current, err := e.Current(t.Context(), "jobs")
	if err != nil || current != cs[0] || current.Value != "first" || current.Token != l.Token() || current.Key != l.Key() {
		t.Errorf("Current is %+v, %v; the queue %+v", current, err, cs)
	}
	if cs[1].Value != "second" || cs[1].Token <= cs[0].Token || cs[1].Key != fmt.Sprintf("jobs/%x", cs[1].Lease) {
		t.Errorf("the second candidate is %+v", cs[1])
	}
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Errorf("Evict: %v", err)
	}
	awaitEnd(t, l, leader.ErrEvicted)
	awaitLeader(t, next)
}

func TestEvictDoesNotEndTheNextTerm(t *testing.T) {
	_, client := start(t)
	// The leader whom Evict has read resigns, and another leads, before Evict deletes.
	e := newElector(t, client)
	first := lead(t, e, "jobs", "first")
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	late := wrapped(client)
	var second *leader.Leader
	var once sync.Once // the deletion may be sent again
	before := func() {
		once.Do(func() {
			resign(t, first)
			second = awaitLeader(t, next)
		})
	}
	kv := &brokenKV{KV: client.KV}
	kv.before.Store(&before)
	late.KV = kv
	operator, err := leader.New(late)
	if err != nil {
		t.Fatal(err)
	}
	if err := operator.Evict(t.Context(), "jobs"); err != nil {
		t.Errorf("Evict: %v", err)
	}
	if !guarded(t, client, second) || !second.IsLeader() {
		t.Error("Evict ended a term that it had not seen")
	}
}

func TestFirstComeFirstServed(t *testing.T) {
	_, client := start(t)
	const n = 6
	var next [n]<-chan outcome
	for i := range n {
		next[i] = campaign(t.Context(), newElector(t, client, long), "jobs", fmt.Sprint(i))
		awaitQueue(t, client, "jobs", queued(i+1))
	}
	var last int64
	for i := range n {
		l := awaitLeader(t, next[i])
		if l.Token() <= last {
			t.Errorf("token %d came after %d", l.Token(), last)
		}
		last = l.Token()
		for j := i + 1; j < n; j++ {
			select {
			case o := <-next[j]:
				t.Fatalf("candidate %d was elected while %d led: %v", j, i, o.err)
			default:
			}
		}
		resign(t, l)
	}
}

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
	await(t, "the end of a campaign", between)
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
	watch := await(t, "the watch of the own key", watches)
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

// What a leader does to its key for the next in line changes nothing for those who read the key.
func TestTouchKeepsValueAndLease(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "")
	won := campaign(t.Context(), newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	resign(t, first)
	l := awaitLeader(t, won)
	touch := await(t, "a touch", client.Watch(t.Context(), l.Key(), clientv3.WithRev(l.Token()+1)))
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

// Many elections on one Elector are kept with one keepalive and one read per interval.
func TestRenewalCostsTheSameForAnyNumberOfElections(t *testing.T) {
	m, _ := start(t)
	var calls rpcCounter
	counted := etcdtest.NewClientFrom(t, calls.config(m.Endpoint))
	renewals := make(chan struct{}, 100)
	e := newElector(t, counted, leader.WithTTL(5*time.Second), leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewals <- struct{}{} },
	}))
	const n = 50
	for i := range n {
		lead(t, e, fmt.Sprintf("jobs%d", i), "")
	}
	awaitCalls(t, calls.reads, n) // the watches of the own keys
	for len(renewals) > 0 {
		<-renewals // told late
	}
	await(t, "a renewal", renewals)
	before := calls.all()
	const rounds = 3
	for range rounds {
		await(t, "a renewal", renewals)
	}
	if got := calls.all() - before; got < rounds-1 || got > 2*rounds { // told late, or sent again on a busy machine
		t.Errorf("%d renewals of %d elections took %d requests beside the stream of renewals, want one read each", rounds, n, got)
	}
	if leases, err := counted.Leases(t.Context()); err != nil || len(leases.Leases) != 1 {
		t.Errorf("%d elections have leases %v, %v", n, leases, err)
	}
}

func TestLeaseIsRevokedAfterTheLastLeader(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	a, b := lead(t, e, "a", ""), lead(t, e, "b", "")
	if a.Key() != strings.Replace(b.Key(), "b/", "a/", 1) {
		t.Errorf("keys %q and %q are not of one lease", a.Key(), b.Key())
	}
	resign(t, a)
	if !b.IsLeader() || !guarded(t, client, b) {
		t.Error("the resignation from one election ended the term in another")
	}
	resign(t, b)
	if leases, err := client.Leases(t.Context()); err != nil || len(leases.Leases) != 0 {
		t.Errorf("leases after the last resignation: %v, %v", leases, err)
	}
	if c := lead(t, e, "a", ""); c.Key() == a.Key() {
		t.Error("the next term is on the old lease")
	}
}

func TestCloseResignsAllAndEndsCampaigns(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	var terms []*leader.Leader
	for i := range 5 {
		terms = append(terms, lead(t, e, fmt.Sprint("jobs", i), ""))
	}
	other := lead(t, newElector(t, client), "held", "")
	waiting := campaign(t.Context(), e, "held", "")
	awaitQueue(t, client, "held", queued(2))
	if err := e.Close(t.Context()); err != nil {
		t.Fatalf("Close: %v", err)
	}
	for _, l := range terms {
		awaitEnd(t, l, leader.ErrResigned)
		resign(t, l)
	}
	if o := await(t, "Campaign", waiting); !errors.Is(o.err, leader.ErrClosed) {
		t.Errorf("Campaign of a closed Elector: %v", o.err)
	}
	if leases, err := client.Leases(t.Context()); err != nil || len(leases.Leases) != 1 || !other.IsLeader() {
		t.Errorf("leases after Close: %v, %v", leases, err)
	}
	if err := e.Close(t.Context()); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestCloseCanBeRetried(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	lease := &brokenLease{Lease: client.Lease}
	broken.Lease = lease
	e := newElector(t, broken)
	l := lead(t, e, "jobs", "")
	refuse := func() error { return errors.New("no") }
	lease.revoke.Store(&refuse)
	if err := e.Close(t.Context()); err == nil {
		t.Fatal("Close returned nil though the lease was not revoked")
	}
	awaitEnd(t, l, leader.ErrResigned)
	lease.revoke.Store(nil)
	if err := e.Close(t.Context()); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if leases, err := client.Leases(t.Context()); err != nil || len(leases.Leases) != 0 {
		t.Errorf("leases after Close: %v, %v", leases, err)
	}
}

// Close lets go of an election only after the function that works under it has returned.
func TestCloseWaitsForRun(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	working, finish, ran := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ran <- e.Run(t.Context(), "jobs", "", func(ctx context.Context, l *leader.Leader) error {
			close(working)
			<-ctx.Done()
			if !errors.Is(context.Cause(ctx), leader.ErrClosed) {
				t.Errorf("lead's context was cancelled with %v", context.Cause(ctx))
			}
			if !l.IsLeader() {
				t.Error("the term ended before lead returned")
			}
			<-finish
			return nil
		})
	}()
	await(t, "lead", working)
	next := campaign(t.Context(), newElector(t, client), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Close whose ctx ended while lead was running: %v", err)
	}
	select {
	case <-next:
		t.Error("another was elected while lead was running")
	default:
	}
	close(finish)
	if err := e.Close(t.Context()); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := await(t, "Run", ran); !errors.Is(err, leader.ErrClosed) {
		t.Errorf("Run of a closed Elector: %v", err)
	}
	awaitLeader(t, next)
}

func TestClosedClientEndsTheTerm(t *testing.T) {
	m, other := start(t)
	client := etcdtest.NewClient(t, m.Endpoint)
	e := newElector(t, client)
	l := lead(t, e, "jobs", "")
	ended := make(chan error, 1)
	go func() {
		ended <- e.Run(t.Context(), "run", "", func(ctx context.Context, _ *leader.Leader) error {
			client.Close()
			<-ctx.Done()
			return nil
		})
	}()
	awaitEnd(t, l, leader.ErrExpired)
	if !errors.Is(context.Cause(l.Context()), leader.ErrClosed) {
		t.Errorf("the cause does not say that the client is closed: %v", context.Cause(l.Context()))
	}
	if err := await(t, "Run", ended); !errors.Is(err, leader.ErrClosed) {
		t.Errorf("Run with a closed client: %v", err)
	}
	if _, err := e.Campaign(t.Context(), "more", ""); !errors.Is(err, leader.ErrClosed) {
		t.Errorf("Campaign with a closed client: %v", err)
	}
	// Nobody could revoke the lease.
	resp, err := other.Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range resp.Leases {
		if _, err := other.Revoke(t.Context(), l.ID); err != nil {
			t.Error(err)
		}
	}
}

func TestRunReturnsWhatLeadReturns(t *testing.T) {
	_, client := start(t)
	boom := errors.New("boom")
	for _, want := range []error{nil, boom} {
		err := leader.Run(t.Context(), client, "jobs", "", func(context.Context, *leader.Leader) error { return want }, leader.WithTTL(ttl))
		if !errors.Is(err, want) {
			t.Errorf("Run returned %v, want %v", err, want)
		}
	}
	// A lead that resigns by itself has not lost its term.
	err := leader.Run(t.Context(), client, "jobs", "", func(ctx context.Context, l *leader.Leader) error {
		if err := l.Resign(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
		return boom
	}, leader.WithTTL(ttl))
	if !errors.Is(err, boom) {
		t.Errorf("Run returned %v, want %v", err, boom)
	}
}

func TestErrorOfACampaignNamesNoFailureThatHasHealed(t *testing.T) {
	_, client := start(t)
	lead(t, newElector(t, client, leader.WithTTL(time.Minute)), "jobs", "first")
	renewed := make(chan struct{}, 100)
	e := newElector(t, client, leader.WithHooks(leader.Hooks{
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
		await(t, "a renewal", renewed)
	}
	cancel()
	if err := await(t, "Campaign", second).err; !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "last failure") {
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
	await(t, "a grant", asked)
	cancel()
	err := await(t, "Campaign", ended).err
	if !errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no answer") {
		t.Errorf("Campaign: %v, want that it was cancelled before there was an answer", err)
	}
}

func TestRunCallsLeadForNoTermThatIsOver(t *testing.T) {
	_, client := start(t)
	operator := newElector(t, client)
	var over []int64 // tokens
	e := newElector(t, client, leader.WithHooks(leader.Hooks{Elected: func(_ string, l *leader.Leader, _ time.Duration) {
		if len(over) == 2 {
			return
		}
		over = append(over, l.Token())
		if err := operator.Evict(t.Context(), "jobs"); err != nil {
			t.Error(err)
		}
		<-l.Context().Done()
	}}))
	calls := 0
	err := e.Run(t.Context(), "jobs", "", func(_ context.Context, l *leader.Leader) error {
		if calls++; !l.IsLeader() || slices.Contains(over, l.Token()) {
			t.Errorf("lead was called for the term %d, and those that are over are %v", l.Token(), over)
		}
		return nil
	})
	if err != nil || calls != 1 || len(over) != 2 {
		t.Errorf("Run returned %v after %d calls of lead and %d terms that were over before, want nil, 1 and 2", err, calls, len(over))
	}
}

func TestRunResignsBeforeAPanicGoesOn(t *testing.T) {
	_, client := start(t)
	func() {
		defer func() {
			if r := recover(); r != "boom" {
				t.Errorf("recovered %v", r)
			}
			if resp, err := client.Get(t.Context(), "jobs/", clientv3.WithPrefix()); err != nil || len(resp.Kvs) != 0 {
				t.Errorf("keys after the panic: %v, %v", resp, err)
			}
		}()
		_ = leader.Run(t.Context(), client, "jobs", "", func(context.Context, *leader.Leader) error { panic("boom") }, leader.WithTTL(ttl))
	}()
}

func TestRunReturnsCtxErrorJoinedWithLeads(t *testing.T) {
	_, client := start(t)
	boom := errors.New("boom")
	ctx, cancel := context.WithCancel(t.Context())
	err := leader.Run(ctx, client, "jobs", "", func(ctx context.Context, _ *leader.Leader) error {
		cancel()
		<-ctx.Done()
		return boom
	}, leader.WithTTL(ttl))
	if !errors.Is(err, context.Canceled) || !errors.Is(err, boom) {
		t.Errorf("Run returned %v", err)
	}
	// A campaign's end by ctx is Run's too.
	l := lead(t, newElector(t, client), "jobs", "")
	ctx, cancel = context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() {
		ran <- leader.Run(ctx, client, "jobs", "", func(context.Context, *leader.Leader) error { return nil }, leader.WithTTL(ttl))
	}()
	awaitQueue(t, client, "jobs", queued(2))
	cancel()
	if err := await(t, "Run", ran); !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
	onlyKey(t, client, "jobs/")
	resign(t, l)
}

func TestBadInputIsRefusedAndNothingIsWritten(t *testing.T) {
	_, client := start(t)
	revision := func() int64 {
		resp, err := client.Get(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		return resp.Header.Revision
	}
	before := revision()
	e := newElector(t, client)
	nothing := func(context.Context, *leader.Leader) error { return nil }
	errOf := func(_ any, err error) error { return err }
	observed := func(e *leader.Elector, name string) (err error) {
		for _, err = range e.Observe(t.Context(), name) {
			break
		}
		return err
	}
	closed := newElector(t, client)
	if err := closed.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		what string
		err  error
		is   error  // or
		says string // all of these words
	}{
		{what: "nil client", err: errOf(leader.New(nil)), says: "client nil"},
		{what: "nil client", err: errOf(leader.Campaign(t.Context(), nil, "jobs", "")), says: "client nil"},
		{what: "nil client", err: leader.Run(t.Context(), nil, "jobs", "", nothing), says: "client nil"},
		{what: "short TTL", err: errOf(leader.New(client, leader.WithTTL(0))), says: "WithTTL(0s) at least 1s"},
		{what: "short TTL", err: errOf(leader.New(client, leader.WithTTL(999*time.Millisecond))), says: "WithTTL(999ms) at least 1s"},
		{what: "long TTL", err: errOf(leader.New(client, leader.WithTTL(301*time.Second))), says: "WithTTL(5m1s) at most 5m0s"},
		{what: "no margin", err: errOf(leader.New(client, leader.WithMargin(0))), says: "WithMargin(0s) positive"},
		{what: "negative margin", err: errOf(leader.New(client, leader.WithMargin(-1))), says: "WithMargin(-1ns) positive"},
		{what: "large margin", err: errOf(leader.New(client, leader.WithTTL(2*time.Second), leader.WithMargin(1001*time.Millisecond))), says: "WithMargin(1.001s) half TTL 2s"},
		{what: "large margin, other order", err: errOf(leader.New(client, leader.WithMargin(1001*time.Millisecond), leader.WithTTL(2*time.Second))), says: "WithMargin(1.001s) half TTL 2s"},
		{what: "nil logger", err: errOf(leader.New(client, leader.WithLogger(nil))), says: "WithLogger(nil)"},
		{what: "zero option", err: errOf(leader.New(client, leader.Option{})), says: "Option{}"},
		{what: "empty name", err: errOf(e.Campaign(t.Context(), "", "v")), is: leader.ErrInvalidName, says: "empty"},
		{what: "name with a slash", err: errOf(e.Campaign(t.Context(), "jobs/", "v")), is: leader.ErrInvalidName, says: `"jobs/" slash`},
		{what: "slash", err: errOf(e.TryCampaign(t.Context(), "/", "v")), is: leader.ErrInvalidName},
		{what: "empty name", err: e.Run(t.Context(), "", "v", nothing), is: leader.ErrInvalidName},
		{what: "empty name", err: errOf(e.Current(t.Context(), "")), is: leader.ErrInvalidName},
		{what: "empty name", err: errOf(e.Candidates(t.Context(), "")), is: leader.ErrInvalidName},
		{what: "empty name", err: e.Evict(t.Context(), ""), is: leader.ErrInvalidName},
		{what: "empty name", err: observed(e, ""), is: leader.ErrInvalidName},
		{what: "nil lead", err: e.Run(t.Context(), "jobs", "v", nil), says: "lead nil"},
		{what: "nil lead", err: leader.Run(t.Context(), client, "jobs", "v", nil), says: "lead nil"},
		{what: "large value", err: errOf(e.Campaign(t.Context(), "jobs", strings.Repeat("x", 1<<20+1))), says: "value 1048577 1048576"},
		{what: "closed Elector", err: errOf(closed.Campaign(t.Context(), "jobs", "v")), is: leader.ErrClosed},
		{what: "closed Elector", err: errOf(closed.TryCampaign(t.Context(), "jobs", "v")), is: leader.ErrClosed},
		{what: "closed Elector", err: closed.Run(t.Context(), "jobs", "v", nothing), is: leader.ErrClosed},
		{what: "closed Elector", err: errOf(closed.Current(t.Context(), "jobs")), is: leader.ErrClosed},
		{what: "closed Elector", err: errOf(closed.Candidates(t.Context(), "jobs")), is: leader.ErrClosed},
		{what: "closed Elector", err: closed.Evict(t.Context(), "jobs"), is: leader.ErrClosed},
		{what: "closed Elector", err: observed(closed, "jobs"), is: leader.ErrClosed},
	} {
		if test.err == nil || test.is != nil && !errors.Is(test.err, test.is) {
			t.Errorf("%s: error is %v, want %v", test.what, test.err, test.is)
			continue
		}
		if !strings.HasPrefix(test.err.Error(), "leader: ") {
			t.Errorf("%s: %q does not say whose error it is", test.what, test.err)
		}
		for _, word := range strings.Fields(test.says) {
			if !strings.Contains(test.err.Error(), word) {
				t.Errorf("%s: %q does not say %q", test.what, test.err, word)
			}
		}
	}
	if after := revision(); after != before {
		t.Errorf("bad input moved etcd from revision %d to %d", before, after)
	}
	if leases, err := client.Leases(t.Context()); err != nil || len(leases.Leases) != 0 {
		t.Errorf("bad input left leases: %v, %v", leases, err)
	}
	// The largest value fits, and the largest margin.
	l := lead(t, newElector(t, client, long, leader.WithMargin(30*time.Second)), "jobs", strings.Repeat("x", 1<<20))
	if err := l.Proclaim(t.Context(), strings.Repeat("y", 1<<20+1)); err == nil || errors.Is(err, leader.ErrNotLeader) || !l.IsLeader() {
		t.Errorf("Proclaim of a large value: %v", err)
	}
}

func TestPrefixIsJoinedWithOneSlash(t *testing.T) {
	_, client := start(t)
	for _, test := range []struct{ prefix, name, key string }{
		{"", "jobs", "jobs/"},
		{"", "/svc/jobs", "/svc/jobs/"},
		{"svc", "a", "svc/a/"},
		{"/svc/", "b", "/svc/b/"},
		{"/svc//", "/c", "/svc/c/"},
		{"/", "d", "/d/"},
	} {
		l := lead(t, newElector(t, client, leader.WithPrefix(test.prefix)), test.name, "")
		if !strings.HasPrefix(l.Key(), test.key) || strings.Contains(l.Key()[len(test.key):], "/") {
			t.Errorf("prefix %q, name %q: key %q, want it under %q", test.prefix, test.name, l.Key(), test.key)
		}
	}
}

func TestNamespacedClient(t *testing.T) {
	_, client := start(t)
	ns := wrapped(client)
	ns.KV = namespace.NewKV(client.KV, "tenant/")
	ns.Watcher = namespace.NewWatcher(client.Watcher, "tenant/")
	ns.Lease = namespace.NewLease(client.Lease, "tenant/")
	l := lead(t, newElector(t, ns), "jobs", "one")
	if kv := onlyKey(t, client, "tenant/jobs/"); string(kv.Key) != "tenant/"+l.Key() {
		t.Errorf("key in etcd %q, of the term %q", kv.Key, l.Key())
	}
	next := campaign(t.Context(), newElector(t, ns), "jobs", "two")
	awaitQueue(t, ns, "jobs", queued(2))
	observed := observe(t, newElector(t, ns), "jobs")
	if c := await(t, "the leader", observed); c.Value != "one" {
		t.Errorf("observed %+v", c)
	}
	if !guarded(t, ns, l) || guarded(t, client, l) {
		t.Error("the guard is not one of the namespace")
	}
	if err := l.Proclaim(t.Context(), "uno"); err != nil {
		t.Error(err)
	}
	if c := await(t, "the new value", observed); c.Value != "uno" {
		t.Errorf("observed %+v", c)
	}
	// Resigning here goes through the shared path: another election keeps the lease.
	resign(t, l)
	two := awaitLeader(t, next)
	if c := await(t, "the next leader", observed); c.Token != two.Token() {
		t.Errorf("observed %+v, want token %d", c, two.Token())
	}
	if _, err := client.Delete(t.Context(), "tenant/"+two.Key()); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, two, leader.ErrEvicted)
}

// observe observes in the background until the test ends.
func observe(t *testing.T, e *leader.Elector, name string) <-chan leader.Candidate {
	t.Helper()
	c := make(chan leader.Candidate, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for candidate, err := range e.Observe(ctx, name) {
			if err != nil {
				if ctx.Err() == nil {
					t.Errorf("Observe: %v", err)
				}
				return
			}
			c <- candidate
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return c
}

func TestObserveEndsWithCtxError(t *testing.T) {
	_, client := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	e := newElector(t, client)
	var got []error
	for c, err := range e.Observe(ctx, "jobs") {
		got = append(got, err)
		if c != (leader.Candidate{}) {
			t.Errorf("observed %+v in an empty election", c)
		}
		cancel()
	}
	if len(got) != 2 || got[0] != nil || !errors.Is(got[1], context.Canceled) {
		t.Errorf("Observe yielded errors %v, want nil and then ctx's", got)
	}
	for _, err := range e.Observe(t.Context(), "jobs") {
		if err != nil {
			t.Error(err)
		}
		break // and yields no more
	}
}

func TestHooksTellACampaignsAndATermsStory(t *testing.T) {
	_, client := start(t)
	story := make(chan string, 1000)
	tell := func(format string, args ...any) { story <- fmt.Sprintf(format, args...) }
	hooks := leader.Hooks{
		Campaigning:    func(election string) { tell("campaigning %s", election) },
		CampaignFailed: func(election string, err error) { tell("failed %s %v", election, errors.Is(err, context.Canceled)) },
		Elected: func(election string, l *leader.Leader, waited time.Duration) {
			tell("elected %s %v %v", election, l.IsLeader(), waited > 0)
		},
		Ended: func(election string, l *leader.Leader, cause error) {
			tell("ended %s %v %v", election, l.IsLeader(), cause)
		},
	}
	expect := func(want string) {
		t.Helper()
		if got := await(t, want, story); got != want {
			t.Errorf("the hook said %q, want %q", got, want)
		}
	}
	e := newElector(t, client, leader.WithPrefix("svc"), leader.WithHooks(hooks))
	l := lead(t, e, "jobs", "")
	expect("campaigning svc/jobs")
	expect("elected svc/jobs true true")
	resign(t, l)
	expect("ended svc/jobs false " + leader.ErrResigned.Error())

	other := lead(t, newElector(t, client), "svc/jobs", "")
	ctx, cancel := context.WithCancel(t.Context())
	failing := campaign(ctx, e, "jobs", "")
	awaitQueue(t, client, "svc/jobs", queued(2))
	expect("campaigning svc/jobs")
	cancel()
	await(t, "Campaign", failing)
	expect("failed svc/jobs true")
	resign(t, other)

	lead(t, e, "jobs", "")
	expect("campaigning svc/jobs")
	expect("elected svc/jobs true true")
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	if got := await(t, "the end", story); !strings.HasPrefix(got, "ended svc/jobs false "+leader.ErrEvicted.Error()) {
		t.Errorf("the hook said %q", got)
	}
}

func TestHookReportsWhoLeadsWhileCampaigning(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	changes := make(chan string, 100)
	e := newElector(t, client, leader.WithHooks(leader.Hooks{
		LeaderChanged: func(election string, c leader.Candidate) { changes <- election + "=" + c.Value },
	}))
	next := campaign(t.Context(), e, "jobs", "second")
	if got := await(t, "the leader", changes); got != "jobs=first" {
		t.Errorf("the hook said %q", got)
	}
	awaitQueue(t, client, "jobs", queued(2))
	resign(t, first)
	second := awaitLeader(t, next)
	if got := await(t, "the next leader", changes); got != "jobs=second" {
		t.Errorf("the hook said %q", got)
	}
	resign(t, second)
}

func TestEndIsToldAfterTheLastChange(t *testing.T) {
	_, client := start(t)
	changes, goOn, ended := make(chan leader.Candidate), make(chan struct{}), make(chan struct{}, 1)
	e := newElector(t, client, leader.WithHooks(leader.Hooks{
		LeaderChanged: func(_ string, c leader.Candidate) {
			if c.Value == "busy" {
				changes <- c
				<-goOn
			}
		},
		Ended: func(string, *leader.Leader, error) { ended <- struct{}{} },
	}))
	l := lead(t, e, "jobs", "")
	if err := l.Proclaim(t.Context(), "busy"); err != nil {
		t.Fatal(err)
	}
	await(t, "the change", changes)
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	await(t, "the end of the term", l.Context().Done())
	select {
	case <-ended:
		t.Error("Ended was called while LeaderChanged had not returned")
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	await(t, "Ended", ended)
}

func TestLogTellsATermAndEachStreakOnce(t *testing.T) {
	_, client := start(t)
	var log logRecorder
	broken := wrapped(client)
	kv := &brokenKV{KV: client.KV}
	broken.KV = kv
	e := newElector(t, broken, leader.WithLogger(slog.New(&log)))
	resign(t, lead(t, e, "jobs", ""))
	lead(t, e, "jobs", "")
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	log.await(t, "WARN lost")
	want := []string{"INFO elected", "INFO resigned", "INFO elected", "WARN lost"}
	if got := log.lines(); !slices.Equal(got, want) {
		t.Errorf("logged %q, want %q", got, want)
	}
	// Many failed attempts are one streak.
	kv.loseReplies(4)
	lead(t, e, "jobs", "")
	if got := log.lines()[len(want):]; !slices.Equal(got, []string{"WARN campaign is being retried", "INFO elected"}) {
		t.Errorf("a streak of failures was logged as %q", got)
	}
}

// Whoever reads of a lost term wants to know why the lease could not be renewed.
func TestLogSaysWhyRenewalsFailedAndThatTheyWorkAgain(t *testing.T) {
	m, direct := start(t)
	link := etcdtest.NewLink(t, m)
	var log logRecorder
	lost := make(chan string, 1)
	e := newElector(t, etcdtest.NewClient(t, link.Endpoint), leader.WithTTL(3*time.Second), leader.WithLogger(slog.New(teeHandler{&log, func(rec slog.Record, with []slog.Attr) {
		if rec.Message == "lost" {
			lost <- fmt.Sprint(with)
		}
	}, nil})))
	lead(t, e, "jobs", "")
	link.Cut()
	log.await(t, "WARN renewal of the lease is being retried")
	link.Heal()
	log.await(t, "INFO renewals of the lease work again")
	link.Darken() // the end of the term cuts the last attempt short
	if with := await(t, "the loss", lost); !strings.Contains(with, "renewal=") || strings.Contains(with, "renewal=lease expired") {
		t.Errorf("lost was logged with %s, want the failure of the last renewal", with)
	}
	link.Heal()
	awaitExpiry(t, direct)
}

// A teeHandler passes records on, and tells of them with the attributes of their logger.
type teeHandler struct {
	slog.Handler
	tell func(slog.Record, []slog.Attr)
	with []slog.Attr
}

func (h teeHandler) WithAttrs(with []slog.Attr) slog.Handler {
	return teeHandler{h.Handler, h.tell, append(h.with[:len(h.with):len(h.with)], with...)}
}

func (h teeHandler) Handle(ctx context.Context, rec slog.Record) error {
	h.tell(rec, h.with)
	return h.Handler.Handle(ctx, rec)
}

// A logRecorder keeps level and message of what is logged.
type logRecorder struct {
	mu  sync.Mutex
	got []string
}

func (r *logRecorder) Enabled(context.Context, slog.Level) bool { return true }
func (r *logRecorder) WithAttrs([]slog.Attr) slog.Handler       { return r }
func (r *logRecorder) WithGroup(string) slog.Handler            { return r }
func (r *logRecorder) Handle(_ context.Context, rec slog.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, rec.Level.String()+" "+rec.Message)
	return nil
}

// await waits until something is logged.
func (r *logRecorder) await(t *testing.T, line string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !slices.Contains(r.lines(), line); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%q was not logged, but %q", line, r.lines())
		}
	}
}

func (r *logRecorder) lines() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// An rpcCounter counts requests that have been answered, and streams of keepalives, by method.
type rpcCounter struct{ calls sync.Map }

func (c *rpcCounter) config(endpoint string) clientv3.Config {
	return clientv3.Config{Endpoints: []string{endpoint}, DialOptions: []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			defer c.count(method)
			return invoker(ctx, method, req, reply, cc, opts...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			c.count(method)
			return streamer(ctx, desc, cc, method, opts...)
		}),
	}}
}

func (c *rpcCounter) count(method string) {
	n, _ := c.calls.LoadOrStore(method, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
}

func (c *rpcCounter) reads() int64 {
	if n, ok := c.calls.Load("/etcdserverpb.KV/Range"); ok {
		return n.(*atomic.Int64).Load()
	}
	return 0
}

// awaitCalls blocks until count, a counter of calls, has reached n.
func awaitCalls(t testing.TB, count func() int64, n int64) {
	t.Helper()
	for began := time.Now(); count() < n; time.Sleep(time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatalf("%d calls after %v, want %d", count(), patience, n)
		}
	}
}

// all counts everything but the streams of watches.
func (c *rpcCounter) all() (sum int64) {
	c.calls.Range(func(method, n any) bool {
		if method != "/etcdserverpb.Watch/Watch" {
			sum += n.(*atomic.Int64).Load()
		}
		return true
	})
	return sum
}

// wrapped returns a client on the same connection whose KV, Watcher and Lease can be replaced
// without touching the original's. It must not be closed.
func wrapped(client *clientv3.Client) *clientv3.Client {
	c := clientv3.NewCtxClient(client.Ctx())
	c.KV, c.Watcher, c.Lease = client.KV, client.Watcher, client.Lease
	return c
}

// A brokenKV does to transactions what it is told.
type brokenKV struct {
	clientv3.KV
	before atomic.Pointer[func()]                                                            // a transaction is sent
	after  atomic.Pointer[func(*clientv3.TxnResponse, error) (*clientv3.TxnResponse, error)] // it was answered
}

func (kv *brokenKV) Txn(ctx context.Context) clientv3.Txn { return brokenTxn{kv.KV.Txn(ctx), kv} }

type brokenTxn struct {
	clientv3.Txn
	kv *brokenKV
}

func (t brokenTxn) If(cs ...clientv3.Cmp) clientv3.Txn   { t.Txn = t.Txn.If(cs...); return t }
func (t brokenTxn) Then(ops ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Then(ops...); return t }
func (t brokenTxn) Else(ops ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Else(ops...); return t }
func (t brokenTxn) Commit() (*clientv3.TxnResponse, error) {
	if before := t.kv.before.Load(); before != nil {
		(*before)()
	}
	resp, err := t.Txn.Commit()
	if after := t.kv.after.Load(); after != nil {
		return (*after)(resp, err)
	}
	return resp, err
}

// loseReplies makes the next n transactions fail as if their replies were lost, though etcd has
// carried them out.
func (kv *brokenKV) loseReplies(n int) {
	var lost atomic.Int64
	after := func(resp *clientv3.TxnResponse, err error) (*clientv3.TxnResponse, error) {
		if lost.Add(1) <= int64(n) {
			return nil, rpctypes.ErrTimeoutDueToConnectionLost
		}
		return resp, err
	}
	kv.after.Store(&after)
}

// A brokenLease does to requests what it is told.
type brokenLease struct {
	clientv3.Lease
	revoke    atomic.Pointer[func() error]
	keepAlive atomic.Pointer[func(ctx context.Context) (*clientv3.LeaseKeepAliveResponse, error)]
}

func (l *brokenLease) Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	if revoke := l.revoke.Load(); revoke != nil {
		if err := (*revoke)(); err != nil {
			return nil, err
		}
	}
	return l.Lease.Revoke(ctx, id)
}

func (l *brokenLease) KeepAliveOnce(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseKeepAliveResponse, error) {
	if keepAlive := l.keepAlive.Load(); keepAlive != nil {
		return (*keepAlive)(ctx)
	}
	return l.Lease.KeepAliveOnce(ctx, id)
}

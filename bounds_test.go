//go:build linux

package leader_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// The tests of this file are about bounds: memory, and the requests of a renewal, must not grow with the number of
// elections that an Elector was ever used for, with values that nobody has taken yet, or with what has failed.
//
// The tests that measure the heap run etcd in a process of its own, and no other test beside them: then the heap is
// the client's.

// An account is what this process holds after a garbage collection.
type account struct {
	heap       int64 // bytes
	goroutines int
}

func (a account) String() string {
	return fmt.Sprintf("heap %.1f MB, %d goroutines", float64(a.heap)/1e6, a.goroutines)
}

func takeStock() account {
	var stats runtime.MemStats
	runtime.GC()
	runtime.GC() // what pools hold goes with the second
	runtime.ReadMemStats(&stats)
	return account{int64(stats.HeapAlloc), runtime.NumGoroutine()}
}

// A tap sees the transactions of a client. It can lose joins: they do not reach etcd, and get no answer.
type tap struct {
	lost  sync.Map     // a lostJoin, by election
	reads atomic.Int64 // keys in the largest transaction that only reads
}

// A lostJoin is what happens when a join is lost.
type lostJoin struct {
	sent  func()          // called when it is sent
	until context.Context // its sender waits for an answer until this or the join's own context ends
}

// client returns a client whose transactions the tap sees.
func (tap *tap) client(t *testing.T, endpoint string) *clientv3.Client {
	t.Helper()
	return etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{endpoint}, DialOptions: []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(tap.intercept),
	}})
}

func (tap *tap) intercept(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	txn, ok := req.(*etcdserverpb.TxnRequest)
	if !ok || len(txn.Success) == 0 {
		return invoker(ctx, method, req, reply, cc, opts...)
	}
	if txn.Success[0].GetRequestRange() != nil {
		for n := int64(len(txn.Success)); ; {
			largest := tap.reads.Load()
			if n <= largest || tap.reads.CompareAndSwap(largest, n) {
				break
			}
		}
	}
	election, _, _ := strings.Cut(string(txn.Success[0].GetRequestPut().GetKey()), "/")
	if join, ok := tap.lost.Load(election); ok {
		join := join.(lostJoin)
		join.sent()
		select {
		case <-ctx.Done():
		case <-join.until.Done():
		}
		return context.DeadlineExceeded
	}
	return invoker(ctx, method, req, reply, cc, opts...)
}

// giveUp campaigns, and gives up when the join has been sent, which gets no answer before until ends.
func (tap *tap) giveUp(ctx, until context.Context, e *leader.Elector, election, value string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tap.lost.Store(election, lostJoin{sent: cancel, until: until})
	defer tap.lost.Delete(election)
	_, err := e.Campaign(ctx, election, value)
	return err
}

var soak = flag.Duration("soak", 16*time.Second,
	"`how long` TestElectorDoesNotGrowInAYearOfUse uses an Elector, beside two rests")

// In a year each of these happens often: elections with new names and large values, all told to a hook; an observer
// that is slow; broken links, and outages so long that all terms are lost; joins that are given up before they are
// answered; resignations that fail and are not repeated.
func TestElectorDoesNotGrowInAYearOfUse(t *testing.T) {
	const ttl = 3 * time.Second
	m := etcdtest.StartProcesses(t, 1)[0]
	direct := etcdtest.NewClient(t, m.Endpoint)
	leavesNothing(t, direct)
	link := etcdtest.NewLink(t, m)

	var tap tap
	var told sync.Map // what to call when LeaderChanged hears of an election's leader
	var elected, lost, failed, changes, observed, used atomic.Int64
	e := newElector(t, tap.client(t, link.Endpoint), leader.WithTTL(ttl), leader.WithHooks(leader.Hooks{
		Elected:        func(string, *leader.Leader, time.Duration) { elected.Add(1) },
		CampaignFailed: func(string, error) { failed.Add(1) },
		LeaderChanged: func(election string, c leader.Candidate) {
			changes.Add(1)
			if done, ok := told.Load(election); ok && c != (leader.Candidate{}) {
				done.(func())()
			}
		},
		Ended: func(_ string, _ *leader.Leader, cause error) {
			if !errors.Is(cause, leader.ErrResigned) {
				lost.Add(1)
			}
		},
	}))
	noisy := lead(t, newElector(t, direct, leader.WithTTL(time.Minute)), "noisy", "")

	// Some elections are led all the time. So the lease is never given back, and nothing is cleared away with it.
	const keepers = 3
	var forever sync.WaitGroup
	running, stop := context.WithCancel(t.Context())
	defer func() { stop(); forever.Wait() }()
	var kept sync.Map // their terms
	for i := range keepers {
		forever.Go(func() {
			err := e.Run(running, fmt.Sprint("keep-", i), "", func(ctx context.Context, l *leader.Leader) error {
				kept.Store(i, l)
				<-ctx.Done()
				return ctx.Err()
			})
			if running.Err() == nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	// The observer takes two values a second. There are many more.
	forever.Go(func() {
		for _, err := range e.Observe(running, "noisy") {
			if err != nil {
				if running.Err() == nil {
					t.Errorf("Observe: %v", err)
				}
				return
			}
			observed.Add(1)
			select {
			case <-time.After(500 * time.Millisecond):
			case <-running.Done():
			}
		}
	})
	// atRest reports whether all are led, and nothing else is in etcd.
	atRest := func(ctx context.Context) (ok bool, leases, keys int) {
		led := 0
		kept.Range(func(_, l any) bool {
			if l.(*leader.Leader).IsLeader() {
				led++
			}
			return true
		})
		leases, keys = inEtcd(ctx, t, direct)
		return led == keepers && leases == 2 && keys == keepers+1, leases, keys
	}

	var numbers atomic.Int64 // of names
	large := func() string { return strings.Repeat("v", 50_000+rand.N(100_000)) }
	ended, end := context.WithCancel(t.Context())
	end()
	// use is a part of the year. It returns when ctx ends.
	use := func(ctx context.Context) {
		var workers sync.WaitGroup
		pause := func(d time.Duration) {
			select {
			case <-time.After(d):
			case <-ctx.Done():
			}
		}
		work := func(what string, n int, every time.Duration, step func(name string)) {
			for range n {
				workers.Go(func() {
					for ctx.Err() == nil {
						step(fmt.Sprintf("%s-%d", what, numbers.Add(1)))
						pause(every)
					}
				})
			}
		}
		work("job", 6, 0, func(name string) {
			changed := make(chan struct{})
			told.Store(name, sync.OnceFunc(func() { close(changed) }))
			defer told.Delete(name)
			value := large()
			l, err := e.Campaign(ctx, name, value)
			if err != nil {
				return
			}
			used.Add(int64(len(value)))
			if rand.N(2) == 0 {
				_ = l.Proclaim(ctx, large())
			}
			select {
			case <-changed:
			case <-l.Context().Done():
			case <-ctx.Done():
			}
			rctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			_ = l.Resign(rctx) //nolint:contextcheck // it is to outlive the run
		})
		const every = 20 * time.Millisecond
		work("unrepeated", 1, every, func(name string) {
			if l, err := e.Campaign(ctx, name, large()); err == nil {
				_ = l.Resign(ended)
			}
		})
		work("given-up", 1, every, func(name string) {
			if tap.giveUp(ctx, ctx, e, name, large()) == nil {
				t.Error("a campaign was won whose join was lost")
			}
		})
		work("try", 1, every, func(string) {
			if _, err := e.TryCampaign(ctx, "noisy", large()); err == nil {
				t.Error("TryCampaign has won an election that another leads")
			}
		})
		work("wait", 1, every, func(string) {
			ctx, cancel := context.WithTimeout(ctx, every)
			defer cancel()
			_, _ = e.Campaign(ctx, "noisy", large())
		})
		work("glance", 1, every, func(string) {
			for range e.Observe(ctx, "noisy") { //nolint:errcheck // it looks once, whatever there is
				break
			}
		})
		work("proclaim", 1, every, func(string) { _ = noisy.Proclaim(ctx, large()) })
		work("compact", 1, time.Second, func(string) { // else etcd would be full after some minutes
			if resp, err := direct.Get(ctx, "noisy"); err == nil {
				_, _ = direct.Compact(ctx, resp.Header.Revision)
			}
		})
		outage := time.Now().Add(min(*soak/4, time.Minute))
		work("fault", 1, time.Second, func(string) {
			defer link.Heal()
			switch {
			case time.Now().After(outage):
				outage = time.Now().Add(time.Minute)
				link.Darken()
				pause(ttl)
			case rand.N(2) == 0:
				link.Cut()
				pause(50 * time.Millisecond)
			default:
				link.Darken()
				pause(100 * time.Millisecond)
			}
		})
		workers.Wait()
	}
	// rest returns what is held when everything that was begun has ended, and the goroutines grow no fewer or are as few
	// as wanted.
	rest := func(wanted int) account {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		last := takeStock()
		for calm := 0; calm < 5; time.Sleep(50 * time.Millisecond) {
			ok, leases, keys := atRest(ctx)
			now := takeStock()
			if calm++; !ok || now.goroutines > max(last.goroutines, wanted) {
				calm = 0
			}
			if last = now; ctx.Err() != nil {
				t.Errorf("it does not come to rest: %d leases, %d keys, %v", leases, keys, last)
				break
			}
		}
		return last
	}

	rest(0)
	numbers.Store(0)
	var half [2]account
	var bytes [2]int64 // of values that terms began with
	for i := range half {
		ctx, cancel := context.WithTimeout(t.Context(), *soak/2)
		use(ctx)
		cancel()
		_, leases, keys := atRest(t.Context())
		half[i], bytes[i] = rest(half[0].goroutines), used.Swap(0)
		t.Logf("half %d: %d new names, %d terms, %d of them lost, %d campaigns failed, %.1f MB of values, %d changes told, "+
			"%d states observed", i+1, numbers.Swap(0), elected.Swap(0), lost.Swap(0), failed.Swap(0),
			float64(bytes[i])/1e6, changes.Swap(0), observed.Swap(0))
		t.Logf("half %d: at its end %d leases and %d keys in etcd; at rest %v; a renewal has read up to %d keys",
			i+1, leases, keys, half[i], tap.reads.Swap(0))
	}
	const most, noise = 1.25, 1 << 20
	if growth := float64(half[1].heap-noise) / float64(half[0].heap); growth > most {
		t.Errorf("the heap has grown %.2f-fold in the second half", growth)
	}
	if growth := half[1].heap - half[0].heap - noise; growth > bytes[1]/2 {
		t.Errorf("the heap has grown by %d bytes with terms that began with values of %d bytes", growth, bytes[1])
	}
	if growth := float64(half[1].goroutines) / float64(half[0].goroutines); growth > most {
		t.Errorf("goroutines have grown %.2f-fold in the second half", growth)
	}
	stop()
	forever.Wait()
	resign(t, noisy)
}

// inEtcd counts leases and keys. A count that fails because ctx has ended is 0.
func inEtcd(ctx context.Context, t *testing.T, client *clientv3.Client) (leases, keys int) {
	t.Helper()
	resp, err := client.Leases(ctx)
	if err == nil {
		leases = len(resp.Leases)
		var all *clientv3.GetResponse
		if all, err = client.Get(ctx, "\x00", clientv3.WithFromKey(), clientv3.WithCountOnly()); err == nil {
			keys = int(all.Count)
		}
	}
	if err != nil && ctx.Err() == nil {
		t.Fatalf("count leases and keys: %v", err)
	}
	return leases, keys
}

// The last call of LeaderChanged for an election is remembered, so that it is not repeated. The value itself, which may
// be large, is not kept for that.
func TestElectionsThatAreOverKeepNoValues(t *testing.T) {
	m := etcdtest.StartProcesses(t, 1)[0]
	client := etcdtest.NewClient(t, m.Endpoint)
	told := make(chan string, 1000)
	e := newElector(t, client, leader.WithTTL(time.Minute), leader.WithHooks(leader.Hooks{
		LeaderChanged: func(election string, c leader.Candidate) {
			if c != (leader.Candidate{}) {
				told <- election
			}
		},
	}))
	lead(t, e, "keep", "")
	etcdtest.Await(t, "LeaderChanged", told)
	value := strings.Repeat("v", 100_000)
	use := func(n int, what string) account {
		t.Helper()
		for i := range n {
			name := fmt.Sprintf("%s-%d", what, i)
			l := lead(t, e, name, value)
			awaitThat(t, "LeaderChanged", told, func(n string) bool { return n == name })
			resign(t, l)
		}
		return takeStock()
	}
	const n = 50
	before := use(n, "warm-up")
	after := use(n, "job")
	grown := after.heap - before.heap
	t.Logf("%d elections that are over, with values of %d bytes: %+.1f MB", n, len(value), float64(grown)/1e6)
	if grown > int64(n*len(value)/2) { // gRPC keeps buffers for reuse
		t.Errorf("%d elections that are over, with values of %d bytes, hold %d bytes", n, len(value), grown)
	}
}

// After a Resign that failed the Elector keeps the term, but only until its key is gone.
func TestFailedResignThatNobodyRepeatsKeepsNothingWhenItsKeyHasGone(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client, leader.WithTTL(9*time.Second))
	lead(t, e, "keep", "") // keeps the lease
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	const n = 50
	var collected atomic.Int64
	giveUp := func(i int) { // and forget the term
		l := lead(t, e, fmt.Sprintf("jobs/%d", i), "") //nolint:contextcheck // lead has a context of its own
		runtime.AddCleanup(l, func(int) { collected.Add(1) }, i)
		if err := l.Resign(ended); !errors.Is(err, context.Canceled) {
			t.Errorf("Resign with an ended ctx: %v", err)
		}
	}
	for i := range n {
		giveUp(i)
	}
	awaitNoKeys(t, client, "jobs/")
	for began := time.Now(); collected.Load() < n; time.Sleep(10 * time.Millisecond) {
		if runtime.GC(); time.Since(began) > patience/3 {
			t.Fatalf("%d of %d terms are held though their keys have gone", n-collected.Load(), n)
		}
	}
}

// awaitNoKeys waits until there are no keys with the prefix.
func awaitNoKeys(t *testing.T, client *clientv3.Client, prefix string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var left int64
	for range client.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify()) {
		resp, err := client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			t.Fatal(err)
		}
		if left = resp.Count; left == 0 {
			return
		}
	}
	t.Fatalf("%d keys with the prefix %q are left", left, prefix)
}

func TestSlowConsumerOfObserveCostsABoundedAmount(t *testing.T) {
	m := etcdtest.StartProcesses(t, 1)[0]
	client, other := etcdtest.NewClient(t, m.Endpoint), etcdtest.NewClient(t, m.Endpoint)
	l := lead(t, newElector(t, other, leader.WithTTL(time.Minute)), "jobs", "first")
	e := newElector(t, client, leader.WithTTL(time.Minute))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	began, goOn := make(chan struct{}), make(chan struct{})
	values := make(chan string, 1000)
	var slow sync.WaitGroup
	slow.Go(func() {
		began := sync.OnceFunc(func() { close(began) })
		for c, err := range e.Observe(ctx, "jobs") {
			if err == nil {
				began()
				<-goOn
				values <- c.Value
			}
		}
	})
	etcdtest.Await(t, "the leader", began)
	swift := observe(t, e, "jobs")
	const n, size = 30, 500_000
	var last string
	proclaim := func(what string) account {
		t.Helper()
		for i := range n {
			last = fmt.Sprint(what, i, strings.Repeat("v", size))
			if err := l.Proclaim(t.Context(), last); err != nil {
				t.Fatal(err)
			}
			// So the slow one has it, or will have it in a moment.
			awaitThat(t, "the value", swift, func(c leader.Candidate) bool { return c.Value == last })
		}
		return takeStock()
	}
	before := proclaim("warm-up ")
	after := proclaim("")
	grown := after.heap - before.heap
	t.Logf("%d values of %d bytes while the consumer is busy: %+.1f MB", n, size, float64(grown)/1e6)
	if grown > n*size/2 { // gRPC keeps buffers for some values, whatever their number
		t.Errorf("%d values of %d bytes cost %d bytes while the consumer is busy", n, size, grown)
	}
	close(goOn)
	awaitThat(t, "the last value", values, func(value string) bool { return value == last })
	cancel()
	slow.Wait()
	resign(t, l)
}

// A readReporter reports each read that was answered.
type readReporter struct {
	clientv3.KV
	read func()
}

func (r readReporter) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	resp, err := r.KV.Get(ctx, key, opts...)
	if err == nil {
		r.read()
	}
	return resp, err
}

// A deafElector is an Elector whose watches can go deaf.
type deafElector struct {
	*leader.Elector
	watcher  *deafWatcher
	watched  atomic.Int64 // own keys: each watch of one has a read, once it has been created
	renewals atomic.Int64
}

func newDeafElector(t *testing.T, client *clientv3.Client, ttl time.Duration) *deafElector {
	t.Helper()
	e := &deafElector{watcher: &deafWatcher{Watcher: client.Watcher}}
	deaf := wrapped(client)
	deaf.Watcher, deaf.KV = e.watcher, readReporter{client.KV, func() { e.watched.Add(1) }}
	var first atomic.Int64
	e.Elector = newElector(t, deaf, leader.WithTTL(ttl), leader.WithHooks(leader.Hooks{
		Renewed: func(id clientv3.LeaseID, _ time.Duration, _ time.Time) {
			if first.CompareAndSwap(0, int64(id)) || first.Load() == int64(id) {
				e.renewals.Add(1)
			}
		},
	}))
	return e
}

// lead begins n terms, and returns when their keys are watched and their lease has been renewed.
func (e *deafElector) lead(t *testing.T, n int) []*leader.Leader {
	t.Helper()
	var terms []*leader.Leader
	for i := range n {
		terms = append(terms, lead(t, e.Elector, fmt.Sprint("term-", i), ""))
	}
	awaitCalls(t, e.watched.Load, int64(n))
	awaitCalls(t, e.renewals.Load, 1)
	return terms
}

// evict deletes the keys of terms, unseen by their watches, and returns how many renewals it took to end the terms.
func (e *deafElector) evict(t *testing.T, client *clientv3.Client, terms []*leader.Leader) int64 {
	t.Helper()
	e.watcher.deaf.Store(true)
	before := e.renewals.Load()
	for _, l := range terms {
		if _, err := client.Delete(t.Context(), l.Key()); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range terms {
		awaitEnd(t, l, leader.ErrEvicted)
	}
	return e.renewals.Load() - before
}

// leaveOrphans leaves n keys behind, by resignations that fail. It waits until renewals have deleted them, and returns
// how many renewals that took.
func leaveOrphans(t *testing.T, e *leader.Elector, client *clientv3.Client, n int, renewals *atomic.Int64) int64 {
	t.Helper()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range n {
		if err := lead(t, e, fmt.Sprint("orphan-", i), "").Resign(ended); !errors.Is(err, context.Canceled) {
			t.Errorf("Resign with an ended ctx: %v", err)
		}
	}
	before := renewals.Load()
	awaitNoKeys(t, client, "orphan-")
	return renewals.Load() - before
}

// If a watch has died without a sign, a renewal finds out that an own key is gone. Abandoned keys must not take the
// place of own keys in what a renewal reads.
func TestAbandonedKeysDoNotCrowdOutTheOwnOnes(t *testing.T) {
	m, client := start(t)
	var tap tap
	e := newDeafElector(t, tap.client(t, m.Endpoint), 9*time.Second)
	terms := e.lead(t, 10)
	const n = 400
	until, answered := context.WithCancel(t.Context())
	defer answered()
	for i := range n {
		err := tap.giveUp(t.Context(), until, e.Elector, fmt.Sprint("given-up-", i), "")
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("Campaign: %v", err)
		}
	}
	answered()
	took := e.evict(t, client, terms)
	t.Logf("with %d campaigns given up, it took %d renewals to learn that own keys are gone", n, took)
	if took > 3 { // one under way, the next one, and one while the test looks at the terms
		t.Error("that is more than it takes without them")
	}
}

// A server may allow fewer operations in a transaction (--max-txn-ops) than a renewal has keys to read.
func TestRenewalsReadFewerKeysWhereEtcdTakesFewOperationsInATransaction(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"max-txn-ops": 10})
	client := etcdtest.NewClient(t, m.Endpoint)
	leavesNothing(t, client)
	e := newDeafElector(t, client, 3*time.Second)
	const n, evicted = 30, 5
	terms := e.lead(t, n)
	took := leaveOrphans(t, e.Elector, client, 5, &e.renewals)
	t.Logf("it took %d renewals to find 5 orphans", took)
	if took > 3 {
		t.Error("they are not looked for in each")
	}
	took = e.evict(t, client, terms[:evicted])
	t.Logf("it took %d renewals to read %d own keys", took, n)
	if took > n/6+2 { // a hundred, halved until ten are enough, is six
		t.Error("they are not read in turn")
	}
	for i, l := range terms[evicted:] {
		if !l.IsLeader() {
			t.Errorf("term %d has ended: %v", evicted+i, context.Cause(l.Context()))
		}
	}
}

// Each renewal looks for the abandoned keys, however many elections the Elector leads.
func TestOrphansAreFoundInTheNextRenewalsOfManyElections(t *testing.T) {
	_, client := start(t)
	var renewals atomic.Int64
	e := newElector(t, client, leader.WithTTL(5*time.Second), leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewals.Add(1) },
	}))
	const n, together = 600, 20
	var joining sync.WaitGroup
	for i := range together {
		joining.Go(func() {
			for ; i < n; i += together {
				if _, err := e.Campaign(t.Context(), fmt.Sprint("term-", i), ""); err != nil {
					t.Errorf("Campaign: %v", err)
				}
			}
		})
	}
	joining.Wait()
	took := leaveOrphans(t, e, client, 10, &renewals)
	t.Logf("with %d elections it took %d renewals to find 10 orphans", n, took)
	if took > 3 {
		t.Error("they are not looked for in each")
	}
}

package leader_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/namespace"
)

// The tests of this file are about what every user relies on: campaign, lead, proclaim, resign, under a name of one's
// own, also beside stock candidates. campaign_test.go, term_test.go, run_test.go and observe_test.go go on from there.

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

func TestFirstComeFirstServed(t *testing.T) {
	_, client := start(t)
	const n = 6
	var next [n]<-chan outcome
	for i := range n {
		next[i] = campaign(t.Context(), newElector(t, client), "jobs", fmt.Sprint(i))
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

// cilium/cilium#12619: a stock session dies with the ctx that it was made with.
func TestTermOutlivesTheCampaignsCtx(t *testing.T) {
	_, client := start(t)
	renewed := make(chan struct{}, 1000)
	e := newExpiring(t, client, leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	}))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	l, err := e.Campaign(ctx, "jobs", "")
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	for range 4 { // more than a TTL
		etcdtest.Await(t, "a renewal", renewed)
	}
	if !l.IsLeader() || l.Context().Err() != nil {
		t.Errorf("the term ended with the campaign's ctx: %v", context.Cause(l.Context()))
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

// pingcap/tidb#43894, and the guard of uber/cadence: whoever fences with the lease or the token must not notice.
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

// pingcap/tidb#55076: a guard that compares values passes for the old term.
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

// etcd-io/etcd#6681: stock has data races there.
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
	if c := etcdtest.Await(t, "the leader", observed); c.Value != "one" {
		t.Errorf("observed %+v", c)
	}
	if !guarded(t, ns, l) || guarded(t, client, l) {
		t.Error("the guard is not one of the namespace")
	}
	if err := l.Proclaim(t.Context(), "uno"); err != nil {
		t.Error(err)
	}
	if c := etcdtest.Await(t, "the new value", observed); c.Value != "uno" {
		t.Errorf("observed %+v", c)
	}
	// Resigning here goes through the shared path: another election keeps the lease.
	resign(t, l)
	two := awaitLeader(t, next)
	if c := etcdtest.Await(t, "the next leader", observed); c.Token != two.Token() {
		t.Errorf("observed %+v, want token %d", c, two.Token())
	}
	if _, err := client.Delete(t.Context(), "tenant/"+two.Key()); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, two, leader.ErrEvicted)
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
		{what: "nil check", err: errOf(leader.New(client, leader.WithHealth(nil))), says: "WithHealth(nil)"},
		{what: "empty name", err: e.Transfer(t.Context(), "", leader.Candidate{}), is: leader.ErrInvalidName},
		{what: "name with a slash", err: e.Transfer(t.Context(), "jobs/", leader.Candidate{}), is: leader.ErrInvalidName},
		{what: "closed Elector", err: closed.Transfer(t.Context(), "jobs", leader.Candidate{}), is: leader.ErrClosed},
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
	l := lead(t, newElector(t, client, leader.WithMargin(30*time.Second)), "jobs", strings.Repeat("x", 1<<20))
	if err := l.Proclaim(t.Context(), strings.Repeat("y", 1<<20+1)); err == nil || errors.Is(err, leader.ErrNotLeader) || !l.IsLeader() {
		t.Errorf("Proclaim of a large value: %v", err)
	}
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
	if err := etcdtest.Await(t, "stock Campaign", won).err; err != nil {
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
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "ours")
	theirsLeaves := etcdctlElect(t, m, client, "jobs", "theirs")
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
	theirsLeaves()
	awaitLeader(t, next)
}

// etcdctlElect joins the queue by the command of that name. leaves ends it.
func etcdctlElect(t *testing.T, m *etcdtest.Member, client *clientv3.Client, name, value string) (leaves func()) {
	t.Helper()
	etcdctl, err := exec.LookPath("etcdctl")
	if err != nil {
		t.Skip("etcdctl is not installed (Debian: apt-get install etcd-client); interop with it is not tested")
	}
	cmd := exec.Command(etcdctl, "--endpoints", m.Endpoint, "elect", name, value)
	cmd.Env = append(cmd.Environ(), "ETCDCTL_API=3") // the default since 3.4, but not in all packages
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = cmd.Wait() // its status is the signal's
	}()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-exited })
	joined := func(cs []leader.Candidate) bool { return len(cs) > 0 && cs[len(cs)-1].Value == value }
	cs := awaitQueue(t, client, name, joined)
	return func() {
		if err := cmd.Process.Signal(os.Interrupt); err != nil { // it resigns
			t.Error(err)
		}
		etcdtest.Await(t, "etcdctl's end", exited)
		if _, err := client.Revoke(t.Context(), cs[len(cs)-1].Lease); err != nil { // and leaves its lease behind
			t.Error(err)
		}
	}
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
	e := newElector(t, client)
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

package leader_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The tests of this file are the rows of README's table "Why not concurrency.Election alone", in its order, each with
// who met it. Where it is cheap the same is done to a stock [concurrency.Election], to show the difference; -short
// leaves that out.

// mended says that a pitfall is no more.
const mended = "stock does not do this any more: take it out of the README's table"

// github.com/etcd-io/etcd/issues/19597, also cagriekin/charts#326: the stock candidate is elected without a key.
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
	if err := etcdtest.Await(t, "stock Campaign", won).err; err == nil {
		if resp, err := client.Get(t.Context(), election.Key()); err == nil && len(resp.Kvs) == 0 {
			t.Log("stock: elected without a key")
			return
		}
	}
	t.Error(mended)
}

// github.com/pingcap/tidb/issues/54689: the stock leader never notices.
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
	if err := etcdtest.Await(t, "stock Campaign", won).err; err != nil {
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

// github.com/etcd-io/etcd/issues/14641: the stock Campaign blocks for good.
func TestCampaignReturnsWhenCtxEndsWithoutEtcd(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	far := etcdtest.NewClient(t, link.Endpoint)
	first := lead(t, newElector(t, client), "jobs", "first")
	ctx, cancel := context.WithCancel(t.Context())
	next := campaign(ctx, newExpiring(t, far), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	link.Darken()
	cancel()
	ended := time.Now()
	o := etcdtest.Await(t, "Campaign", next) // while the link is dark
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

// github.com/etcd-io/etcd/issues/14631, also etcd-io/etcd#6681: stock NewSession blocks for ever.
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

// github.com/etcd-io/etcd/issues/22123, also google/trillian#3789: the stock Resign forgets the key, and says nil the
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
	if err := etcdtest.Await(t, "stock Campaign", won).err; err != nil {
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

// github.com/etcd-io/etcd/issues/21128, also pingcap/dm#1983: stock leaves a candidate behind that blocks the others.
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
		if o := etcdtest.Await(t, "Campaign", next); !errors.Is(o.err, context.Canceled) {
			t.Errorf("Campaign returned %v", o.err)
		}
		if cs, err := e.Candidates(t.Context(), "jobs"); err != nil || len(cs) != 1 {
			t.Errorf("shared %v: Campaign left the queue as %+v, %v", shared, cs, err)
		}
	}
	resign(t, first)
}

var blackholes = flag.Int("blackholes", 10, "`number` of leaders that TestBlackholedLeaderStopsBeforeItsSuccessorStarts cuts off")

// github.com/Netflix/curator/issues/980, and pd's lease: the stock leader learns of a blackhole up to a second after
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
			old := lead(t, newExpiring(t, far), name, "old")
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
				if err := etcdtest.Await(t, "stock Campaign", won).err; err != nil {
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
			next := etcdtest.Await(t, "the successor", p.next)
			if next.err != nil {
				t.Fatal(next.err)
			}
			if p.old.IsLeader() {
				t.Error("the old leader still believes that it leads")
			}
			end := etcdtest.Await(t, "the end of the old term", p.end)
			if end.After(next.at) {
				overlaps++
				worst = max(worst, end.Sub(next.at))
			}
			if cause := context.Cause(p.old.Context()); !errors.Is(cause, leader.ErrExpired) {
				t.Errorf("the old term ended with %v", cause)
			}
			resign(t, next.l)
			tried++
		}
		for _, p := range stocks {
			next := etcdtest.Await(t, "the successor", p.next)
			end := etcdtest.Await(t, "the end of the stock session", p.end)
			if stockTried++; next.err == nil && end.After(next.at) {
				stockOverlaps++
				stockWorst = max(stockWorst, end.Sub(next.at))
			}
			if next.err == nil {
				resign(t, next.l)
			}
		}
		link.Heal()
	}
	t.Logf("%d blackholes, %d overlaps, the longest %v; stock: %d, %d, %v", tried, overlaps, worst, stockTried, stockOverlaps, stockWorst)
	if overlaps > 0 {
		t.Errorf("%d of %d terms overlapped with their successor's", overlaps, tried)
	}
	awaitExpiry(t, client) // of leases whose grant or revocation the blackhole has cut short
}

// github.com/etcd-io/etcd/issues/8980, also tikv/pd#6961: stock stays with the dark endpoint until the lease is lost.
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

// github.com/pingcap/dm/issues/1214: stock lets both share one key, and one Resign ends both.
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
	etcdtest.Await(t, "Campaign", waiting)
	resign(t, l)
	resign(t, lead(t, e, "jobs", "")) // now it may
	l = lead(t, e, "jobs", "")
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	<-l.Context().Done()
	lead(t, e, "jobs", "") // as it may as soon as a term is lost
}

// github.com/etcd-io/etcd/issues/6278, also etcd-io/etcd#13469: in stock "a" is blocked by "a/b" and reports its
// leader.
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
		if c := etcdtest.Await(t, "the leader", observed); c.Value != "leader of "+name {
			t.Errorf("observed %+v leading %q", c, name)
		}
		resign(t, terms[name])
		l := awaitLeader(t, waiting[name])
		if c := etcdtest.Await(t, "the next leader", observed); c.Token != l.Token() {
			t.Errorf("observed %+v leading %q, want token %d", c, name, l.Token())
		}
		resign(t, l)
		resign(t, awaitLeader(t, third[name]))
	}
}

// github.com/google/trillian/issues/1387: the stock Observe is silent.
func TestObserveYieldsChangesAndVacancies(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	observed := observe(t, e, "jobs")
	expect := func(value string) leader.Candidate {
		t.Helper()
		c := etcdtest.Await(t, "a change", observed)
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

// github.com/etcd-io/etcd/issues/7815, also kube-vip/kube-vip#1725: the stock channel closes without a reason.
func TestObserveAndCampaignGoOnAfterACompaction(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	far := etcdtest.NewClient(t, link.Endpoint)
	l := lead(t, newElector(t, client), "jobs", "one")
	observed := observe(t, newElector(t, far), "jobs")
	if c := etcdtest.Await(t, "the leader", observed); c.Value != "one" {
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
	for etcdtest.Await(t, "the new value", observed).Value != "two" {
		continue // hidden values may show up or not
	}
	resign(t, l)
	second := awaitLeader(t, next)
	if c := etcdtest.Await(t, "the next leader", observed); c.Token != second.Token() {
		t.Errorf("observed %+v, want token %d", c, second.Token())
	}
	resign(t, second)
}

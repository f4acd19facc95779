package leader_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The tests of this file are about terms: what ends them, what does not, what is left when they have expired, and how
// Resign and Close end them. What stock gets wrong of that is in pitfalls_test.go.

// As where its key is deleted (pingcap/tidb#54689), the leader does not lead on.
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

// The backup knows the term, but not its last values. So the key's revision is smaller than the term knows.
func TestProclaimGoesOnAfterARestore(t *testing.T) {
	t.Parallel()
	data, backup := t.TempDir(), t.TempDir()
	m := etcdtest.Start(t, etcdtest.Settings{"data-dir": data})
	var calls rpcCounter
	client := etcdtest.NewClientFrom(t, calls.config(m.Endpoint))
	l := lead(t, newElector(t, client), "jobs", "one")
	restart := func(between func() error) {
		t.Helper()
		m.Stop()
		if err := between(); err != nil {
			t.Fatal(err)
		}
		if err := m.Start(); err != nil {
			t.Fatal(err)
		}
	}
	restart(func() error { return os.CopyFS(filepath.Join(backup, "data"), os.DirFS(data)) })
	for i := range 10 {
		if err := l.Proclaim(t.Context(), fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	restart(func() error {
		return errors.Join(os.RemoveAll(data), os.CopyFS(data, os.DirFS(filepath.Join(backup, "data"))))
	})
	before := calls.of("/etcdserverpb.KV/Txn")
	if err := l.Proclaim(t.Context(), "after"); err != nil {
		t.Errorf("Proclaim: %v", err)
	}
	if n := calls.of("/etcdserverpb.KV/Txn") - before; n > 20 { // renewals among them
		t.Errorf("Proclaim has sent %d transactions", n)
	}
	resign(t, l)
}

// Proclaim must not put a key that was deleted: it would have another token.
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
	if err := etcdtest.Await(t, "Run", ended); !errors.Is(err, leader.ErrClosed) {
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
		if _, err := other.Revoke(t.Context(), l.ID); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) { // expired since
			t.Error(err)
		}
	}
}

// A slow client must not hold up the end of the term.
func TestContextEndsAtTheDeadlineThoughARequestHangs(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	deaf := wrapped(etcdtest.NewClient(t, link.Endpoint))
	kv := &hangingKV{KV: deaf.KV, release: make(chan struct{})}
	deaf.KV = kv
	l := lead(t, newExpiring(t, deaf), "jobs", "") // the own key's watch hangs in its first read
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

// A Lease that answers with neither response nor error: stock NewSession returns nil, nil.
func TestEmptyAnswersAreErrors(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	lease := &brokenLease{Lease: client.Lease}
	broken.Lease = lease
	l := lead(t, newExpiring(t, broken), "jobs", "")
	empty := func(context.Context) (*clientv3.LeaseKeepAliveResponse, error) { return nil, nil }
	lease.keepAlive.Store(&empty)
	awaitEnd(t, l, leader.ErrExpired)
	awaitExpiry(t, client)
}

// hashicorp/consul#830, hashicorp/consul#912, etcd-io/etcd#15922: needless demotions.
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

// This, too, is no reason for a demotion (etcd-io/etcd#15922).
func TestTermSurvivesAChangeOfEtcdsLeader(t *testing.T) {
	t.Parallel()
	members := etcdtest.StartCluster(t, 3)
	var endpoints []string
	for _, m := range members {
		endpoints = append(endpoints, m.Endpoint)
	}
	client := etcdtest.NewClient(t, endpoints...)
	renewed := make(chan struct{}, 1000)
	e := newElector(t, client, leader.WithTTL(6*time.Second), leader.WithHooks(leader.Hooks{
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
		etcdtest.Await(t, "a renewal", renewed)
		etcdtest.Await(t, "a renewal", renewed)
	}
	if !l.IsLeader() || !guarded(t, client, l) {
		t.Errorf("the term was lost: %v", context.Cause(l.Context()))
	}
	resign(t, l)
	resign(t, awaitLeader(t, next))
	awaitExpiry(t, client) // members list what they know of, which may be late by a moment
}

// An etcd that is out of space refuses puts, but still renews leases and deletes keys.
func TestLeaderAndCampaignOutliveAFullEtcd(t *testing.T) {
	m, client := start(t)
	l := lead(t, newExpiring(t, client), "jobs", "")
	renewed := make(chan struct{}, 1000)
	other := lead(t, newExpiring(t, client, leader.WithHooks(leader.Hooks{
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
	next := campaign(t.Context(), newExpiring(t, client), "jobs", "")
	for range 4 {
		etcdtest.Await(t, "a renewal", renewed)
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
	etcdtest.Await(t, "a renewal", renewals)
	before := calls.all()
	const rounds = 3
	for range rounds {
		etcdtest.Await(t, "a renewal", renewals)
	}
	if got := calls.all() - before; got < rounds-1 || got > 2*rounds { // told late, or sent again on a busy machine
		t.Errorf("%d renewals of %d elections took %d requests beside the stream of renewals, want one read each", rounds, n, got)
	}
	if leases, err := counted.Leases(t.Context()); err != nil || len(leases.Leases) != 1 {
		t.Errorf("%d elections have leases %v, %v", n, leases, err)
	}
}

// The margin is for work to stop in. It must not be cut short by handing over early, where etcd can be reached again.
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
	etcdtest.Await(t, "lead", working)
	next := campaign(t.Context(), newElector(t, client), "jobs", "")
	o := etcdtest.Await(t, "Campaign", next)
	if o.err != nil {
		t.Fatal(o.err)
	}
	cancel()
	if err := etcdtest.Await(t, "Run", ran); !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
	if o.at.Before(stopped) {
		t.Errorf("the next leader came %v before the work had stopped", stopped.Sub(o.at))
	}
}

func TestLeaseOfAnExpiredTermIsRevokedWhenTheMarginHasPassed(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	reporter := revocationReporter{client.Lease, make(chan revocation, 100)}
	lease := &brokenLease{Lease: reporter}
	broken.Lease = lease
	const ttl, margin = 4 * time.Second, 2 * time.Second
	refuse := func(context.Context) (*clientv3.LeaseKeepAliveResponse, error) { return nil, rpctypes.ErrNoLeader }
	lease.keepAlive.Store(&refuse)
	l := lead(t, newElector(t, broken, leader.WithTTL(ttl), leader.WithMargin(margin)), "jobs", "")
	awaitEnd(t, l, leader.ErrExpired)
	deadline := l.Deadline()
	for {
		r := etcdtest.Await(t, "the revocation", reporter.revocations)
		if l.Key() != fmt.Sprintf("jobs/%x", r.id) {
			continue // on a busy machine more than one lease may have been granted
		}
		if r.at.Before(deadline.Add(margin)) {
			t.Errorf("the lease was revoked %v before the margin had passed", deadline.Add(margin).Sub(r.at))
		}
		break
	}
	awaitExpiry(t, client)
}

type revocation struct {
	id clientv3.LeaseID
	at time.Time
}

// A revocationReporter reports each lease that is to be revoked.
type revocationReporter struct {
	clientv3.Lease
	revocations chan revocation
}

func (r revocationReporter) Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	r.revocations <- revocation{id, time.Now()}
	return r.Lease.Revoke(ctx, id)
}

// moveRaftLeader makes another member etcd's leader, and returns when it is.
func moveRaftLeader(t *testing.T, members []*etcdtest.Member) {
	t.Helper()
	old := raftLeaderOf(t, members)
	client := etcdtest.NewClient(t, old.Endpoint)
	list, err := client.MemberList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	to := list.Members[0].ID
	if to == list.Header.MemberId {
		to = list.Members[1].ID
	}
	if _, err := client.MoveLeader(t.Context(), to); err != nil {
		t.Fatal(err)
	}
	if raftLeaderOf(t, members) == old {
		t.Fatal("etcd's leader has not moved")
	}
}

// A new leader of etcd restarts the TTL of every lease. So the owner of a term that has expired revokes the lease
// itself, as soon as it can. It first waits for the margin, which belongs to the work that has to stop.
func TestOwnerDeletesTheKeyOfAnExpiredTermThatEtcdHasProlonged(t *testing.T) {
	t.Parallel()
	members := etcdtest.StartCluster(t, 3)
	const ttl = 8 * time.Second
	for what, test := range map[string]struct {
		margin, blind time.Duration
		shared        bool
	}{
		"the network is back before the margin has passed": {margin: 3 * time.Second},
		"the network is back after it":                     {margin: 3 * time.Second, blind: 7 * time.Second / 2},
		// It gives the lease back when it has tried for 2 s to delete its key.
		"a candidate has the lease too": {margin: time.Second, blind: 4 * time.Second, shared: true},
	} {
		t.Run(what, func(t *testing.T) {
			margin := test.margin
			var near, far []string
			var links []*etcdtest.Link
			for _, m := range members {
				link := etcdtest.NewLink(t, m)
				links, near, far = append(links, link), append(near, m.Endpoint), append(far, link.Endpoint)
			}
			client := etcdtest.NewClient(t, near...)
			ended := make(chan struct{})
			e := newElector(t, etcdtest.NewClient(t, far...), leader.WithTTL(ttl), leader.WithMargin(margin),
				leader.WithHooks(leader.Hooks{Ended: func(string, *leader.Leader, error) { close(ended) }}))
			l := lead(t, e, "jobs", "old")
			if test.shared {
				lead(t, newElector(t, client, leader.WithTTL(time.Minute)), "other", "")
				ctx, cancel := context.WithCancel(t.Context())
				candidate := campaign(ctx, e, "other", "")
				defer etcdtest.Await(t, "Campaign", candidate)
				defer cancel()
				awaitQueue(t, client, "other", queued(2))
			}
			next := campaign(t.Context(), newElector(t, client, leader.WithTTL(time.Minute)), "jobs", "next")
			awaitQueue(t, client, "jobs", queued(2))
			for _, link := range links {
				link.Darken()
			}
			awaitEnd(t, l, leader.ErrExpired)
			deadline := l.Deadline()
			etcdtest.Await(t, "Ended", ended)
			moveRaftLeader(t, members)
			prolonged := time.Now()
			time.Sleep(time.Until(deadline.Add(test.blind)))
			for _, link := range links {
				link.Heal()
			}
			o := etcdtest.Await(t, "Campaign", next)
			if o.err != nil {
				t.Fatal(o.err)
			}
			t.Logf("the next leader was elected %v after the end of the term, %v after etcd's leader had moved",
				o.at.Sub(deadline).Round(time.Millisecond), o.at.Sub(prolonged).Round(time.Millisecond))
			if o.at.Before(deadline.Add(margin)) {
				t.Errorf("that is %v before the margin has passed", deadline.Add(margin).Sub(o.at))
			}
			if o.at.After(prolonged.Add(ttl - time.Second/2)) {
				t.Error("the key blocked the election for a TTL anew")
			}
			resign(t, o.l)
			if !test.shared {
				awaitExpiry(t, client)
			}
		})
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

// etcd-io/etcd#14631, etcd-io/etcd#6681: closing a stock session without etcd takes a TTL.
func TestResignAndCloseReturnWhenCtxEndsWithoutEtcd(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	e := newExpiring(t, etcdtest.NewClient(t, link.Endpoint))
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

// Where nobody retries a Resign that has failed, the lease is not renewed on behalf of the key.
func TestKeyLeftByAFailedResignExpires(t *testing.T) {
	_, client := start(t)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	l := lead(t, newExpiring(t, client), "jobs", "")
	if err := l.Resign(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("Resign with a cancelled ctx returned %v", err)
	}
	awaitQueue(t, client, "jobs", queued(0))
	awaitExpiry(t, client)
}

// A key that a failed resignation has left must not keep its election blocked for as long as other elections keep the
// lease, nor come back to life in a new term.
func TestKeyLeftByAFailedResignIsDeletedWhileTheLeaseLives(t *testing.T) {
	_, client := start(t)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	e := newExpiring(t, client)
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
	if o := etcdtest.Await(t, "Campaign", waiting); !errors.Is(o.err, leader.ErrClosed) {
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

// While Close waits for Run, the lease is renewed; what Close has ended is deleted all the same.
func TestCloseThatFailsDoesNotKeepEndedTermsAlive(t *testing.T) {
	_, client := start(t)
	e := newExpiring(t, client)
	working, finish, ran := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ran <- e.Run(t.Context(), "slow", "", func(context.Context, *leader.Leader) error {
			close(working)
			<-finish
			return nil
		})
	}()
	etcdtest.Await(t, "lead", working)
	l := lead(t, e, "jobs", "")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := e.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close returned %v", err)
	}
	awaitEnd(t, l, leader.ErrResigned)
	awaitQueue(t, client, "jobs", queued(0)) // though the lease is renewed for Run
	close(finish)
	if err := etcdtest.Await(t, "Run", ran); !errors.Is(err, leader.ErrClosed) {
		t.Errorf("Run returned %v", err)
	}
}

// A service closes its Elector with a ctx that ended with it. Where nothing is left to do, nothing can
// fail.
func TestCloseThatHasNothingToDoReturnsNilWhateverItsCtx(t *testing.T) {
	_, client := start(t)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	used := newElector(t, client)
	resign(t, lead(t, used, "jobs", ""))
	if err := used.Close(cancelled); err != nil {
		t.Errorf("Close after the last term was resigned: %v", err)
	}
	for range 50 {
		e := newElector(t, client)
		for range 2 {
			if err := e.Close(cancelled); err != nil {
				t.Fatalf("Close of an idle Elector: %v", err)
			}
		}
	}
}

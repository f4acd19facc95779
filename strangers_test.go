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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// The tests of this file are about others: strangers who may write elsewhere in the same etcd, candidates with large
// values, limits on the rate of requests, and the metadata of a caller's context. None of them may end a campaign, a
// term or an observer.

// withStranger runs an etcd with the users of enableAuth and a stranger, who may write below mal/ alone. as returns a
// client of a user.
func withStranger(t *testing.T) (as func(user string) *clientv3.Client) {
	t.Helper()
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	ctx, client := t.Context(), etcdtest.NewClient(t, m.Endpoint)
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(client.RoleAdd(ctx, "elsewhere"))
	must(client.RoleGrantPermission(ctx, "elsewhere", "mal/", clientv3.GetPrefixRangeEnd("mal/"),
		clientv3.PermissionType(clientv3.PermReadWrite)))
	must(client.UserAdd(ctx, "stranger", "stranger"))
	must(client.UserGrantRole(ctx, "stranger", "elsewhere"))
	enableAuth(t, client, "svc/")
	as = func(user string) *clientv3.Client {
		t.Helper()
		return etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: user, Password: user})
	}
	leavesNothing(t, as("root"))
	return as
}

// An attacker attaches a stranger's key to each new lease of others, before its owner knows the lease.
type attacker struct {
	clientv3.Lease
	stranger *clientv3.Client

	mu       sync.Mutex
	left     int // leases yet to be attacked
	granted  int
	attacked map[clientv3.LeaseID]bool
}

// attacked returns a client on the same connection whose next leases are attacked.
func attacked(client, stranger *clientv3.Client, leases int) (*clientv3.Client, *attacker) {
	a := &attacker{Lease: client.Lease, stranger: stranger, left: leases, attacked: make(map[clientv3.LeaseID]bool)}
	victim := wrapped(client)
	victim.Lease = a
	return victim, a
}

func (a *attacker) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	resp, err := a.Lease.Grant(ctx, ttl)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.granted++
	if a.left == 0 {
		return resp, nil
	}
	if _, err := a.stranger.Put(ctx, "mal/key", "", clientv3.WithLease(resp.ID)); err != nil {
		return nil, fmt.Errorf("the stranger cannot attach a key: %w", err)
	}
	a.left--
	a.attacked[resp.ID] = true
	return resp, nil
}

func (a *attacker) grants() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.granted
}

// Any user may list the leases and attach a key to one that has none yet. etcd then denies that lease to a candidate
// who may not write the key.
func TestCandidateTakesAnotherLeaseWhereAStrangerHasAttachedAKey(t *testing.T) {
	as := withStranger(t)
	service := as("service")
	victim, attack := attacked(service, as("stranger"), 3)
	renewed := make(chan struct{}, 1000)
	e := newExpiring(t, victim, leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	}))
	l := lead(t, e, "svc/jobs", "")
	attack.mu.Lock()
	defer attack.mu.Unlock()
	if attack.left != 0 {
		t.Errorf("%d leases were not attacked", attack.left)
	}
	if kv := onlyKey(t, service, "svc/jobs/"); attack.attacked[clientv3.LeaseID(kv.Lease)] || string(kv.Key) != l.Key() {
		t.Errorf("the candidate leads with %v, on a lease that a stranger has attached a key to", kv)
	}
	etcdtest.Await(t, "a renewal", renewed)
	etcdtest.Await(t, "a renewal", renewed)
	if !l.IsLeader() || !guarded(t, service, l) {
		t.Errorf("the term has ended: %v", context.Cause(l.Context()))
	}
	resign(t, l)
	awaitExpiry(t, as("root")) // nobody but the stranger and root may revoke a lease that has the stranger's key
}

// Here the strangers know of the leases only what etcd lists.
func TestStrangersWhoAttachKeysToEveryNewLeaseEndNoCampaign(t *testing.T) {
	as := withStranger(t)
	service := as("service")
	polling, stop := context.WithCancel(t.Context())
	var strangers sync.WaitGroup
	var attached atomic.Int64
	for i := range 2 {
		stranger := as("stranger")
		strangers.Go(func() {
			seen := make(map[clientv3.LeaseID]bool)
			for polling.Err() == nil {
				resp, err := stranger.Leases(polling)
				if err != nil {
					continue
				}
				for _, l := range resp.Leases {
					if seen[l.ID] {
						continue
					}
					seen[l.ID] = true
					if _, err := stranger.Put(polling, fmt.Sprint("mal/", i), "", clientv3.WithLease(l.ID)); err == nil {
						attached.Add(1)
					}
				}
			}
		})
	}
	campaigns, ended := 0, 0
	for campaigns < 30 || attached.Load() < 5 {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		l, err := newExpiring(t, service).Campaign(ctx, "svc/jobs", "")
		cancel()
		if campaigns++; err != nil {
			ended++
			t.Logf("Campaign: %v", err)
			continue
		}
		if err := l.Resign(t.Context()); err != nil && !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("Resign: %v", err)
		}
	}
	stop()
	strangers.Wait()
	t.Logf("%d campaigns, %d ended by a stranger; %d keys attached", campaigns, ended, attached.Load())
	if ended > 0 {
		t.Errorf("strangers have ended %d of %d campaigns", ended, campaigns)
	}
	awaitExpiry(t, as("root"))
}

// The others of the Elector take the next lease too, and the same one: it may have eight.
func TestStrangerOnOneLeaseHoldsUpNoneOfManyElections(t *testing.T) {
	as := withStranger(t)
	victim, _ := attacked(as("service"), as("stranger"), 1)
	e := newElector(t, victim, leader.WithTTL(5*time.Second))
	const elections = 20
	var campaigns []<-chan outcome
	for i := range elections {
		campaigns = append(campaigns, campaign(t.Context(), e, fmt.Sprint("svc/jobs-", i), ""))
	}
	var led []*leader.Leader
	for _, c := range campaigns {
		led = append(led, awaitLeader(t, c))
	}
	leases, err := as("root").Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n := len(leases.Leases); n > 2 {
		t.Errorf("%d leases, want the one that was attacked and one more", n)
	}
	for _, l := range led {
		resign(t, l)
	}
	awaitExpiry(t, as("root")) // the one that was attacked cannot be revoked
}

func TestCampaignUnderAttackBacksOffAndSaysSoOnce(t *testing.T) {
	as := withStranger(t)
	const leases = 8
	victim, attack := attacked(as("service"), as("stranger"), leases)
	var warned atomic.Int64
	e := newElector(t, victim, leader.WithTTL(5*time.Second), leader.WithLogger(slog.New(handler(func(r slog.Record) {
		if r.Level >= slog.LevelWarn && r.Message == "campaign is being retried" {
			warned.Add(1)
		}
	}))))
	began := time.Now()
	l := lead(t, e, "svc/jobs", "")
	took := time.Since(began)
	// Pauses of 50 ms that double, up to 2 s, each less a half at most. On a busy machine a grant may be sent again, and
	// then some of the leases that were attacked are not tried.
	if least := 2 * time.Second; took < least && attack.grants() == leases+1 {
		t.Errorf("%d leases were tried in %v, want pauses of %v in all at least", leases, took, least)
	}
	if n := warned.Load(); n != 1 {
		t.Errorf("%d warnings, want 1", n)
	}
	resign(t, l)
	awaitExpiry(t, as("root"))
}

// When the key of its last term has been deleted a lease has none, so a stranger may attach one. Then etcd denies the
// revocation to the owner. That is no failure: the election is free, and the lease expires.
func TestResignAndCloseSucceedThoughAStrangerHasAttachedAKeyToTheLease(t *testing.T) {
	as := withStranger(t)
	stranger, service := as("stranger"), as("service")
	victim := wrapped(service)
	lease := &brokenLease{Lease: service.Lease}
	victim.Lease = lease
	e := newExpiring(t, victim)
	l := lead(t, e, "svc/jobs", "")
	id := clientv3.LeaseID(onlyKey(t, service, "svc/jobs/").Lease)
	attach := func() error {
		_, err := stranger.Put(t.Context(), "mal/key", "", clientv3.WithLease(id))
		lease.revoke.Store(nil)
		return err
	}
	lease.revoke.Store(&attach)
	if err := l.Resign(t.Context()); err != nil {
		t.Errorf("Resign: %v", err)
	}
	if err := e.Close(t.Context()); err != nil {
		t.Errorf("Close: %v", err)
	}
	if resp, err := service.Get(t.Context(), "svc/jobs/", clientv3.WithPrefix()); err != nil || len(resp.Kvs) != 0 {
		t.Errorf("keys left: %v, %v", resp, err)
	}
	awaitExpiry(t, as("root"))
}

func TestCandidateWithoutTheRightIsDeniedAtOnceAndLeavesNothing(t *testing.T) {
	as := withStranger(t)
	root, service := as("root"), as("service")
	denied := func(what string, client *clientv3.Client, kept, left int) {
		t.Helper()
		log := make(logChannel, 1000)
		e := newElector(t, client, leader.WithTTL(8*time.Second), leader.WithLogger(slog.New(log)))
		var terms []*leader.Leader
		for i := range kept {
			terms = append(terms, lead(t, e, fmt.Sprint("svc/jobs", i), ""))
		}
		if _, err := e.Campaign(t.Context(), "forbidden", ""); !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("%s: Campaign without permission: %v", what, err)
		}
		if cs, err := newElector(t, root).Candidates(t.Context(), "forbidden"); err != nil || len(cs) != 0 {
			t.Errorf("%s: the queue is %+v, %v", what, cs, err)
		}
		for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			resp, err := root.Leases(t.Context())
			if err == nil && len(resp.Leases) == left {
				break // an etcd that is slow may have granted more than one, which are revoked in the background
			}
			if err != nil || time.Since(began) > 5*time.Second {
				t.Fatalf("%s: leases %v, %v; want %d", what, resp, err, left)
			}
		}
		for _, l := range terms {
			if !l.IsLeader() || !guarded(t, service, l) {
				t.Errorf("%s: the term beside it has ended: %v", what, context.Cause(l.Context()))
			}
			resign(t, l)
		}
		for len(log) > 0 {
			if r := <-log; r.Message == "campaign is being retried" {
				t.Errorf("%s: it was not denied at once: %s", what, attr(r, "error"))
			}
		}
	}
	denied("alone", service, 0, 0)
	denied("beside a term", service, 1, 1)
	victim, _ := attacked(service, as("stranger"), 1)
	denied("on a lease with a stranger's key", victim, 0, 1) // which that lease takes with it
	awaitExpiry(t, root)
}

// receivesLittle returns a client that refuses messages of 256 KiB and more.
func receivesLittle(t *testing.T, m *etcdtest.Member) *clientv3.Client {
	t.Helper()
	return etcdtest.NewClientFrom(t, clientv3.Config{
		Endpoints: []string{m.Endpoint}, MaxCallRecvMsgSize: 256 << 10, MaxCallSendMsgSize: 128 << 10,
	})
}

// tooLarge is a value that a client of receivesLittle cannot receive.
var tooLarge = strings.Repeat("v", 300<<10)

// A stock leader does not touch its key, so the candidate behind it gets all that it proclaims.
func TestCampaignOutlivesALargeValueOfTheOneBefore(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	_, election, won := stock(t, client, "jobs", "second", time.Minute)
	awaitQueue(t, client, "jobs", queued(2))
	log := make(logChannel, 1000)
	e := newElector(t, receivesLittle(t, m), leader.WithLogger(slog.New(log)))
	next := campaign(t.Context(), e, "jobs", "third")
	awaitQueue(t, client, "jobs", queued(3))
	resign(t, first)
	if err := etcdtest.Await(t, "stock Campaign", won).err; err != nil {
		t.Fatal(err)
	}
	if err := election.Proclaim(t.Context(), tooLarge); err != nil {
		t.Fatal(err)
	}
	awaitRecord(t, log, "campaign is being retried", next)
	if err := election.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitLeader(t, next)
}

// All watches of a client share a stream, and a message that is too large for one of them ends it for all.
func TestLargeValueOfAnotherEndsNoWatchForGood(t *testing.T) {
	m, client := start(t)
	const ttl = 5 * time.Minute // no renewal and no regular read finds out what a watch should
	log := make(logChannel, 1000)
	other, small := newElector(t, client), receivesLittle(t, m)
	e := newElector(t, small, leader.WithTTL(ttl), leader.WithLogger(slog.New(log)))
	noisy, held := lead(t, other, "noisy", "quiet"), lead(t, other, "held", "")
	mine := lead(t, e, "mine", "")
	next := campaign(t.Context(), e, "held", "next")
	awaitQueue(t, client, "held", queued(2))
	observed := observe(t, e, "noisy")
	if c := etcdtest.Await(t, "the leader", observed); c.Value != "quiet" {
		t.Errorf("observed %+v", c)
	}
	if err := noisy.Proclaim(t.Context(), tooLarge); err != nil {
		t.Fatal(err)
	}
	for retried := make(map[string]bool); len(retried) < 3; {
		r := etcdtest.Await(t, "the warnings of three watches", log)
		if strings.HasSuffix(r.Message, "is being retried") {
			retried[r.Message] = true
		}
	}
	if err := noisy.Proclaim(t.Context(), "quiet again"); err != nil {
		t.Fatal(err)
	}
	awaitThat(t, "the next value", observed, func(c leader.Candidate) bool { return c.Value == "quiet again" })
	if _, err := client.Delete(t.Context(), mine.Key()); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, mine, leader.ErrEvicted)
	resign(t, held)
	awaitLeader(t, next)
}

// clientv3 opens a stream for each set of metadata that watches have. A request id makes each set another one.
func TestCampaignsShareOneStreamWhateverMetadataTheirContextsHave(t *testing.T) {
	m, client := start(t)
	var calls rpcCounter
	counted := etcdtest.NewClientFrom(t, calls.config(m.Endpoint))
	renewed := make(chan struct{}, 1000)
	e := newElector(t, counted, leader.WithTTL(6*time.Second), leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	}))
	holder := newElector(t, client, leader.WithTTL(time.Minute))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const n = 100
	var waiting []<-chan outcome
	for i := range n {
		name := fmt.Sprint("jobs", i)
		lead(t, holder, name, "")
		requestID := metadata.AppendToOutgoingContext(ctx, "x-request-id", fmt.Sprint(i))
		waiting = append(waiting, campaign(requestID, e, name, ""))
		// Each reads the one before it and itself once, when its watches have been created.
		awaitCalls(t, calls.reads, int64(2*(i+1)))
	}
	const renewals = 5
	for range renewals {
		etcdtest.Await(t, "a renewal", renewed)
	}
	// On a busy machine a watch or a renewal may take so long that it is tried again on another stream.
	for method, most := range map[string]int64{
		"/etcdserverpb.Watch/Watch":          4,
		"/etcdserverpb.Lease/LeaseKeepAlive": renewals - 1,
	} {
		streams, _ := calls.calls.LoadOrStore(method, new(atomic.Int64))
		got := streams.(*atomic.Int64).Load()
		t.Logf("%d streams of %s", got, method)
		if got > most {
			t.Errorf("%d campaigns with a request id each, and %d renewals, have opened more than one", n, renewals)
		}
	}
	cancel()
	for _, c := range waiting {
		if o := etcdtest.Await(t, "Campaign", c); !errors.Is(o.err, context.Canceled) {
			t.Errorf("Campaign: %v", o.err)
		}
	}
}

// A rateLimit refuses every other request.
type rateLimit struct {
	err      error
	requests atomic.Int64
}

func (l *rateLimit) refuse() error {
	if l.requests.Add(1)%2 == 1 {
		return l.err
	}
	return nil
}

// limited returns a client whose requests the limit refuses.
func limited(client *clientv3.Client, limit *rateLimit) *clientv3.Client {
	c := wrapped(client)
	c.KV, c.Lease = limitedKV{client.KV, limit}, limitedLease{client.Lease, limit}
	return c
}

type limitedKV struct {
	clientv3.KV
	limit *rateLimit
}

func (kv limitedKV) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if err := kv.limit.refuse(); err != nil {
		return nil, err
	}
	return kv.KV.Get(ctx, key, opts...)
}

func (kv limitedKV) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	if err := kv.limit.refuse(); err != nil {
		return clientv3.OpResponse{}, err
	}
	return kv.KV.Do(ctx, op)
}

func (kv limitedKV) Txn(ctx context.Context) clientv3.Txn {
	return limitedTxn{kv.KV.Txn(ctx), kv.limit}
}

type limitedTxn struct {
	clientv3.Txn
	limit *rateLimit
}

func (t limitedTxn) If(cs ...clientv3.Cmp) clientv3.Txn   { t.Txn = t.Txn.If(cs...); return t }
func (t limitedTxn) Then(ops ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Then(ops...); return t }
func (t limitedTxn) Else(ops ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Else(ops...); return t }
func (t limitedTxn) Commit() (*clientv3.TxnResponse, error) {
	if err := t.limit.refuse(); err != nil {
		return nil, err
	}
	return t.Txn.Commit()
}

type limitedLease struct {
	clientv3.Lease
	limit *rateLimit
}

func (l limitedLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	if err := l.limit.refuse(); err != nil {
		return nil, err
	}
	return l.Lease.Grant(ctx, ttl)
}

func (l limitedLease) Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	if err := l.limit.refuse(); err != nil {
		return nil, err
	}
	return l.Lease.Revoke(ctx, id)
}

func (l limitedLease) KeepAliveOnce(ctx context.Context, id clientv3.LeaseID) (*renewedLease, error) {
	if err := l.limit.refuse(); err != nil {
		return nil, err
	}
	return l.Lease.KeepAliveOnce(ctx, id)
}

type renewedLease = clientv3.LeaseKeepAliveResponse

func TestRateLimitDelaysAndEndsNothing(t *testing.T) {
	_, client := start(t)
	for what, err := range map[string]error{
		"proxy":    status.Error(codes.ResourceExhausted, "slow down"),
		"etcd":     rpctypes.ErrGRPCRequestTooManyRequests,
		"clientv3": rpctypes.ErrTooManyRequests,
		"HTTP/2":   status.Error(codes.ResourceExhausted, "RST_STREAM with error code: ENHANCE_YOUR_CALM"),
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			name := t.Name()
			first := lead(t, newElector(t, client, leader.WithTTL(time.Minute)), name, "first")
			renewed := make(chan struct{}, 1000)
			hooks := leader.Hooks{
				Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
			}
			client := limited(client, &rateLimit{err: err})
			e := newElector(t, client, leader.WithTTL(6*time.Second), leader.WithHooks(hooks))
			joined := client.Watch(t.Context(), name+"/", clientv3.WithPrefix(), clientv3.WithRev(first.Token()+1))
			next := campaign(t.Context(), e, name, "second")
			select {
			case <-joined:
			case o := <-next:
				t.Fatalf("Campaign: %v", o.err)
			}
			etcdtest.Await(t, "a renewal", renewed)
			resign(t, first)
			l := awaitLeader(t, next)
			etcdtest.Await(t, "a renewal", renewed)
			etcdtest.Await(t, "a renewal", renewed)
			if !l.IsLeader() {
				t.Errorf("the term has ended: %v", context.Cause(l.Context()))
			}
			observed := observe(t, e, name)
			if c := etcdtest.Await(t, "the leader", observed); c.Value != "second" {
				t.Errorf("observed %+v", c)
			}
			resign(t, l)
		})
	}
}

// A stranger attaches a key to the new lease of a Transfer, which then takes another one.
func TestAStrangerDoesNotEndATransfer(t *testing.T) {
	as := withStranger(t)
	service := as("service")
	l := lead(t, newElector(t, service), "svc/jobs", "leads")
	next := campaign(t.Context(), newElector(t, service), "svc/jobs", "next")
	awaitQueue(t, service, "svc/jobs", queued(2))
	victim, _ := attacked(service, as("stranger"), 1)
	if err := newElector(t, victim).Transfer(t.Context(), "svc/jobs", leader.Candidate{}); err != nil {
		t.Error(err)
	}
	resign(t, l)
	resign(t, awaitLeader(t, next))
	awaitExpiry(t, as("root"))
}

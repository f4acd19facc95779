package leader_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// The tests of this file are about connections that die without a sign, and about clients with a password.

// A NAT or a load balancer that has forgotten a connection drops whatever is sent on it. TCP retries for minutes, and
// the connection seems to be open. Only gRPC's keepalive notices, after 10 s or more.
func TestKeepaliveBringsLeaderCandidateAndObserverBackFromAForgottenConnection(t *testing.T) {
	m, direct := start(t)
	link := etcdtest.NewForgetfulLink(t, m)
	process := func() *leader.Elector {
		return newElector(t, etcdtest.NewClientFrom(t, clientv3.Config{
			Endpoints: []string{link.Endpoint}, DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
		}))
	}
	terms, ran := make(chan *leader.Leader, 10), make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	e := process()
	go func() {
		ran <- e.Run(ctx, "jobs", "", func(ctx context.Context, l *leader.Leader) error {
			terms <- l
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	l := await(t, "a term", terms)
	held := lead(t, newElector(t, direct, leader.WithTTL(time.Minute)), "held", "first")
	next := campaign(t.Context(), process(), "held", "next")
	awaitQueue(t, direct, "held", queued(2))
	observed := observe(t, process(), "held")
	if c := await(t, "the leader", observed); c.Value != "first" {
		t.Errorf("observed %+v", c)
	}

	link.Forget()
	forgotten := time.Now()
	awaitEnd(t, l, leader.ErrExpired) // in time, as in any outage
	if err := held.Proclaim(t.Context(), "news"); err != nil {
		t.Fatal(err)
	}
	if again := await(t, "a term after the lost one", terms); again.Token() <= l.Token() {
		t.Errorf("token %d came after %d", again.Token(), l.Token())
	}
	t.Logf("leads again after %v", time.Since(forgotten))
	awaitThat(t, "the news", observed, func(c leader.Candidate) bool { return c.Value == "news" })
	t.Logf("observes again after %v", time.Since(forgotten))
	awaitQueue(t, direct, "held", queued(2)) // its first key has expired
	resign(t, held)
	resign(t, awaitLeader(t, next))
	cancel()
	if err := await(t, "Run", ran); !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v", err)
	}
	awaitExpiry(t, direct) // a grant may have been given up just as the connection was back
}

// attr returns the record's attribute as text.
func attr(r slog.Record, key string) (text string) {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == key {
			text = a.Value.String()
		}
		return true
	})
	return text
}

// Without gRPC's keepalive nothing ends such a connection: this package cannot make a borrowed client dial again. It
// logs the cure once three renewals in a row have had no answer.
func TestUnansweredRenewalsNameTheCureForAForgottenConnection(t *testing.T) {
	m, direct := start(t)
	together(t, map[string]func(*testing.T){
		"default TTL": func(t *testing.T) { unansweredRenewals(t, m, leader.WithTTL(leader.DefaultTTL)) },
		"short TTL":   func(t *testing.T) { unansweredRenewals(t, m, leader.WithTTL(3*time.Second)) },
		"small margin": func(t *testing.T) {
			unansweredRenewals(t, m, leader.WithTTL(6*time.Second), leader.WithMargin(time.Millisecond))
		},
	})
	awaitExpiry(t, direct)
}

func unansweredRenewals(t *testing.T, m *etcdtest.Member, opts ...leader.Option) {
	link := etcdtest.NewForgetfulLink(t, m)
	client := etcdtest.NewClient(t, link.Endpoint)
	log, told := make(logChannel, 1000), make(chan error, 1000)
	e := newElector(t, client, append(opts, leader.WithLogger(slog.New(log)), leader.WithHooks(leader.Hooks{
		RenewFailed: func(_ clientv3.LeaseID, _ time.Duration, err error) { told <- err },
	}))...)
	l := lead(t, e, t.Name(), "")
	link.Forget()
	await(t, "the end of the term", l.Context().Done())
	client.Close() // else Close would wait for answers
	if err := e.Close(t.Context()); err != nil {
		t.Logf("Close: %v", err)
	}
	// All has been told and logged by now.
	close(told)
	close(log)
	for err := range told {
		t.Logf("renewal failed: %v", err)
	}
	warned := 0
	for r := range log {
		if r.Message != "etcd does not answer on an open connection" {
			continue
		}
		warned++
		if cure := attr(r, "cure"); r.Level != slog.LevelWarn || !strings.Contains(cure, "DialKeepAliveTime") {
			t.Errorf("warned at level %v of the cure %q", r.Level, cure)
		}
	}
	if warned != 1 {
		t.Errorf("warned %d times of a connection on which nothing was answered until the term was lost", warned)
	}
}

// together runs tests at the same time, and returns when all have ended.
func together(t *testing.T, tests map[string]func(*testing.T)) {
	t.Helper()
	t.Run("together", func(t *testing.T) {
		for what, test := range tests {
			t.Run(what, func(t *testing.T) {
				t.Parallel()
				test(t)
			})
		}
	})
}

func TestRetriedCampaignNamesTheCureForAForgottenConnection(t *testing.T) {
	m, direct := start(t)
	held := lead(t, newElector(t, direct, leader.WithTTL(time.Minute)), "held", "")
	retried := func(t *testing.T, name string, forget func(link *etcdtest.ForgetfulLink, begin func())) {
		link := etcdtest.NewForgetfulLink(t, m)
		client := etcdtest.NewClient(t, link.Endpoint)
		log := make(logChannel, 1000)
		e := newElector(t, client, leader.WithLogger(slog.New(log)))
		resign(t, lead(t, e, t.Name(), "")) // it has a connection
		var campaigns <-chan outcome
		forget(link, func() { campaigns = campaign(t.Context(), e, name, "me") })
		r := awaitRecord(t, log, "campaign is being retried", campaigns)
		if err := attr(r, "error"); !strings.Contains(err, "DialKeepAliveTime") {
			t.Errorf("the campaign is being retried because of %q", err)
		} else {
			t.Log(err)
		}
		client.Close() // else what follows would wait for answers
		if o := await(t, "Campaign", campaigns); !errors.Is(o.err, leader.ErrClosed) {
			t.Errorf("Campaign: %v", o.err)
		}
	}
	together(t, map[string]func(*testing.T){
		"waiting": func(t *testing.T) {
			retried(t, "held", func(link *etcdtest.ForgetfulLink, begin func()) {
				begin()
				awaitQueue(t, direct, "held", queued(2))
				link.Forget()
			})
		},
		"beginning": func(t *testing.T) {
			retried(t, t.Name(), func(link *etcdtest.ForgetfulLink, begin func()) {
				link.Forget()
				begin()
			})
		},
	})
	resign(t, held)
	awaitExpiry(t, direct)
}

// Whoever waits for an answer when the client is closed is told so: the caller's own context has not ended.
func TestCampaignsAndObserversWhoseClientIsClosedSaySo(t *testing.T) {
	m, direct := start(t)
	link := etcdtest.NewLink(t, m)
	client := etcdtest.NewClient(t, link.Endpoint)
	e := newElector(t, client)
	lead(t, e, "jobs", "") // there is a lease
	link.Darken()
	const n = 100
	var began sync.WaitGroup
	ended := make(chan error, 3*n)
	for i := range n {
		name := fmt.Sprint("jobs", i)
		began.Add(3)
		go func() {
			began.Done()
			_, err := e.Campaign(t.Context(), name, "")
			ended <- err
		}()
		go func() {
			began.Done()
			_, err := e.TryCampaign(t.Context(), name+"/try", "")
			ended <- err
		}()
		go func() {
			began.Done()
			for _, err := range e.Observe(t.Context(), name) {
				if err != nil {
					ended <- err
				}
			}
		}()
	}
	began.Wait()
	time.Sleep(100 * time.Millisecond) // they have sent their requests, or will find the client closed
	client.Close()
	var wrong []error
	for range 3 * n {
		if err := await(t, "the end of a campaign or an observer", ended); !errors.Is(err, leader.ErrClosed) {
			wrong = append(wrong, err)
		}
	}
	if len(wrong) > 0 {
		t.Errorf("%d of %d did not say that the client is closed, but: %v", len(wrong), 3*n, wrong[0])
	}
	link.Heal()
	awaitExpiry(t, direct)
}

// withPassword returns what a client of the user service needs.
func withPassword(m *etcdtest.Member) clientv3.Config {
	return clientv3.Config{Endpoints: []string{m.Endpoint}, Username: "service", Password: "service"}
}

// rootOf enables authentication, and returns a client of root.
func rootOf(t *testing.T, m *etcdtest.Member) *clientv3.Client {
	t.Helper()
	enableAuth(t, etcdtest.NewClient(t, m.Endpoint), "svc/")
	return etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: "root", Password: "root"})
}

// clientv3 authenticates for each stream that it opens, and each authentication costs etcd a password hash and a raft
// entry. So renewals must not open streams.
func TestRenewalsDoNotAuthenticate(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	leavesNothing(t, rootOf(t, m))
	var calls rpcCounter
	cfg := calls.config(m.Endpoint)
	cfg.Username, cfg.Password = "service", "service"
	client := etcdtest.NewClientFrom(t, cfg)
	renewed := make(chan struct{}, 1000)
	hooks := leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	})
	for i := range 3 { // all on one client, and so on one stream
		lead(t, newElector(t, client, hooks, leader.WithTTL(4*time.Second)), fmt.Sprint("svc/jobs", i), "")
	}
	next := campaign(t.Context(), newElector(t, client, hooks, leader.WithTTL(4*time.Second)), "svc/jobs0", "")
	for range 2 * 4 {
		await(t, "a renewal", renewed)
	}
	authenticated := func() int64 {
		n, _ := calls.calls.LoadOrStore("/etcdserverpb.Auth/Authenticate", new(atomic.Int64))
		return n.(*atomic.Int64).Load()
	}
	before := authenticated()
	const n = 5 * 4
	for range n {
		await(t, "a renewal", renewed)
	}
	if got := authenticated() - before; before == 0 || got != 0 {
		t.Errorf("%d authentications before and %d in %d renewals", before, got, n)
	}
	select {
	case o := <-next:
		t.Errorf("Campaign: %v", o.err)
	default:
	}
}

// survive checks that no term ends in n renewals of each.
func survive(t *testing.T, terms []*leader.Leader, renewals []chan struct{}, n int) {
	t.Helper()
	for i, l := range terms {
		for range n {
			select {
			case <-renewals[i]:
			case <-l.Context().Done():
				t.Errorf("term %d of %d has ended: %v", i, len(terms), context.Cause(l.Context()))
				return
			case <-time.After(patience):
				t.Fatal("waited in vain for a renewal")
			}
		}
	}
	for i, l := range terms {
		if !l.IsLeader() {
			t.Errorf("term %d of %d has ended: %v", i, len(terms), context.Cause(l.Context()))
		}
	}
}

// leadMany begins n terms, each on a lease of its own, and checks that none ends in two TTLs.
func leadMany(t *testing.T, n int, client func() *clientv3.Client) {
	t.Helper()
	const ttl = 10 * time.Second
	var terms []*leader.Leader
	renewals := make([]chan struct{}, n)
	began := time.Now()
	for i := range n {
		renewals[i] = make(chan struct{}, 1000)
		e := newElector(t, client(), leader.WithTTL(ttl), leader.WithHooks(leader.Hooks{
			Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewals[i] <- struct{}{} },
		}))
		terms = append(terms, lead(t, e, fmt.Sprint("svc/jobs", i), ""))
	}
	t.Logf("%d terms began within %v", n, time.Since(began))
	for _, c := range renewals {
		for len(c) > 0 {
			<-c
		}
	}
	survive(t, terms, renewals, 6)
}

func TestFortyLeadersWithPasswordsLoseNoTerm(t *testing.T) {
	for what, shared := range map[string]bool{"a client each": false, "one client": true} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
			leavesNothing(t, rootOf(t, m))
			one := etcdtest.NewClientFrom(t, withPassword(m))
			leadMany(t, 40, func() *clientv3.Client {
				if shared {
					return one
				}
				return etcdtest.NewClientFrom(t, withPassword(m))
			})
		})
	}
}

// With the default cost etcd spends about 60 ms of a core on each password hash.
func TestEightyLeadersWithPasswordsOfTheDefaultCostLoseNoTerm(t *testing.T) {
	t.Parallel()
	var settings []etcdtest.Settings
	if raceDetector() { // with it, a hash takes over a second
		settings = append(settings, etcdtest.Settings{"bcrypt-cost": 6})
	}
	m := etcdtest.Start(t, settings...)
	leavesNothing(t, rootOf(t, m))
	client := etcdtest.NewClientFrom(t, withPassword(m))
	leadMany(t, 80, func() *clientv3.Client { return client })
}

// raceDetector reports whether the test runs under it.
func raceDetector() bool {
	info, _ := debug.ReadBuildInfo()
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// authenticating is withPassword with a call of wait before each authentication.
func authenticating(m *etcdtest.Member, wait func(context.Context)) clientv3.Config {
	cfg := withPassword(m)
	cfg.DialOptions = []grpc.DialOption{grpc.WithChainUnaryInterceptor(
		func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
			invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if strings.HasSuffix(method, "/Authenticate") {
				wait(ctx)
			}
			return invoker(ctx, method, req, reply, cc, opts...)
		})}
	return cfg
}

// It may take longer to open the stream of renewals than one attempt to renew may take.
func TestTermSurvivesAnAuthenticationThatTakesLongerThanAnAttemptToRenew(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	root := rootOf(t, m)
	var slow atomic.Bool
	cfg := authenticating(m, func(ctx context.Context) {
		if slow.Load() {
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
		}
	})
	const ttl = 5 * time.Second // an attempt to renew may take 0.8 s, and there is time for three of them
	renewed := make(chan struct{}, 1000)
	e := newElector(t, etcdtest.NewClientFrom(t, cfg), leader.WithTTL(ttl), leader.WithHooks(leader.Hooks{
		Renewed:     func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
		RenewFailed: func(_ clientv3.LeaseID, _ time.Duration, err error) { t.Logf("renewal failed: %v", err) },
	}))
	l := lead(t, e, "svc/jobs", "")
	slow.Store(true)
	survive(t, []*leader.Leader{l}, []chan struct{}{renewed}, 3)
	slow.Store(false)
	if l.IsLeader() {
		resign(t, l)
	}
	awaitExpiry(t, root)
}

// 40 password hashes of 0.1 s each take a core of etcd 4 s. A client that gives up and asks again makes that longer,
// because etcd finishes the hash that nobody waits for. A stock session does not give up, and survives this.
func TestFortyClientsThatAuthenticateAtOnceLoseNoTerm(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	root := rootOf(t, m)
	core := make(chan struct{}, 1)
	var hashes atomic.Int64
	var hashing sync.WaitGroup
	t.Cleanup(hashing.Wait)
	hash := func(ctx context.Context) {
		done := make(chan struct{})
		hashing.Go(func() {
			core <- struct{}{}
			hashes.Add(1)
			time.Sleep(100 * time.Millisecond)
			<-core
			close(done)
		})
		select {
		case <-done:
		case <-ctx.Done():
		}
	}
	const n, ttl = 40, leader.DefaultTTL // an attempt to renew may take 2.3 s
	var electors []*leader.Elector
	renewals := make([]chan struct{}, n)
	for i := range n {
		renewals[i] = make(chan struct{}, 1000)
		client := etcdtest.NewClientFrom(t, authenticating(m, hash))
		electors = append(electors, newElector(t, client, leader.WithTTL(ttl), leader.WithHooks(leader.Hooks{
			Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewals[i] <- struct{}{} },
		})))
	}
	var terms []*leader.Leader
	for i, e := range electors {
		terms = append(terms, lead(t, e, fmt.Sprint("svc/jobs", i), ""))
	}
	before := hashes.Load()
	survive(t, terms, renewals, 2)
	t.Logf("%d clients have authenticated %d times in 2 renewals", n, hashes.Load()-before)
	for _, l := range terms {
		resign(t, l)
	}
	awaitExpiry(t, root)
}

// etcd's simple tokens expire if they are not used for a while. JSON web tokens expire in any case.
func TestTermsOutliveTheTokensOfTheirClients(t *testing.T) {
	for what, token := range map[string]func(t *testing.T) etcdtest.Settings{
		"simple": func(*testing.T) etcdtest.Settings { return etcdtest.Settings{"auth-token-ttl": 1} },
		"jwt": func(t *testing.T) etcdtest.Settings {
			return etcdtest.Settings{"auth-token": "jwt,sign-method=RS256,ttl=1s,priv-key=" + signingKey(t)}
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4}, token(t))
			leavesNothing(t, rootOf(t, m))
			const ttl = 9 * time.Second // a renewal comes every 3 s
			renewed := make(chan struct{}, 1000)
			e := newElector(t, etcdtest.NewClientFrom(t, withPassword(m)), leader.WithTTL(ttl), leader.WithHooks(leader.Hooks{
				Renewed:     func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
				RenewFailed: func(_ clientv3.LeaseID, took time.Duration, err error) { t.Logf("after %v: %v", took, err) },
			}))
			l := lead(t, e, "svc/jobs", "")
			next := campaign(t.Context(), newElector(t, etcdtest.NewClientFrom(t, withPassword(m))), "svc/jobs", "")
			survive(t, []*leader.Leader{l}, []chan struct{}{renewed}, 4)
			if err := l.Proclaim(t.Context(), "still"); err != nil {
				t.Errorf("Proclaim: %v", err)
			}
			resign(t, l)
			awaitLeader(t, next)
		})
	}
}

// signingKey returns the path of a new key.
func signingKey(t *testing.T) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key.pem")
	block := &pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A restart ends the stream of renewals and makes the token invalid.
func TestTermsWithPasswordsSurviveTheRestartOfAMember(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	root := rootOf(t, m)
	leavesNothing(t, root)
	client := etcdtest.NewClientFrom(t, withPassword(m))
	const ttl = 10 * time.Second
	var terms []*leader.Leader
	var renewals []chan struct{}
	for i := range 3 {
		renewed := make(chan struct{}, 1000)
		e := newElector(t, client, leader.WithTTL(ttl), leader.WithHooks(leader.Hooks{
			Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
		}))
		terms = append(terms, lead(t, e, fmt.Sprint("svc/jobs", i), ""))
		renewals = append(renewals, renewed)
	}
	survive(t, terms, renewals, 1)
	m.Stop()
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	for _, c := range renewals {
		for len(c) > 0 {
			<-c
		}
	}
	survive(t, terms, renewals, 2)
	for _, l := range terms {
		if err := l.Proclaim(t.Context(), "still"); err != nil {
			t.Errorf("Proclaim: %v", err)
		}
	}
}

func TestQuestionsWhoseClientIsClosedSaySo(t *testing.T) {
	_, client := start(t)
	for name, ask := range map[string]func(e *leader.Elector) error{
		"Current":    func(e *leader.Elector) error { _, err := e.Current(t.Context(), "jobs"); return err },
		"Candidates": func(e *leader.Elector) error { _, err := e.Candidates(t.Context(), "jobs"); return err },
		"Evict":      func(e *leader.Elector) error { return e.Evict(t.Context(), "jobs") },
	} {
		ctx, closeClient := context.WithCancel(client.Ctx())
		defer closeClient()
		closable := clientv3.NewCtxClient(ctx)
		closable.KV, closable.Watcher, closable.Lease = client.KV, client.Watcher, client.Lease
		c, kv := darkened(closable, func(string) bool { return true })
		e := newElector(t, c)
		answered := make(chan error, 1)
		go func() { answered <- ask(e) }()
		await(t, "a read", kv.hung)
		closeClient()
		if err := await(t, name, answered); !errors.Is(err, leader.ErrClosed) {
			t.Errorf("%s: %v, want %v", name, err, leader.ErrClosed)
		}
	}
}

// A stuckWatcher creates no watch on a client's first stream, as clientv3 3.7.3 does once that is stuck.
type stuckWatcher struct {
	clientv3.Watcher
	tried *atomic.Int64 // watches on it
}

func (w stuckWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get("leader-watch-stream")) > 0 {
		return w.Watcher.Watch(ctx, key, opts...)
	}
	w.tried.Add(1)
	<-ctx.Done()
	none := make(chan clientv3.WatchResponse)
	close(none)
	return none
}

// stuck returns a client whose first stream is, and how often it was tried.
func stuck(client *clientv3.Client) (*clientv3.Client, *atomic.Int64) {
	stuck, tried := wrapped(client), new(atomic.Int64)
	stuck.Watcher = stuckWatcher{client.Watcher, tried}
	return stuck, tried
}

func TestStreamThatIsStuckDelaysOneObserveAlone(t *testing.T) {
	_, client := start(t)
	client, tried := stuck(client)
	e := newElector(t, client)
	for range 3 {
		for _, err := range e.Observe(t.Context(), "jobs") {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	if n := tried.Load(); n != 1 {
		t.Errorf("the stream that is stuck was tried %d times, want 1", n)
	}
}

// The read of a candidate's place may come before its watch is given up: that says as much of the stream.
func TestStreamThatIsStuckDelaysOneHandoffAlone(t *testing.T) {
	_, client := start(t)
	broken, tried := stuck(client)
	e, other := newElector(t, broken, leader.WithTTL(20*time.Second)), newElector(t, client, leader.WithTTL(20*time.Second))
	var first int64
	for i := range 3 {
		l := lead(t, other, "jobs", "")
		waiting := campaign(t.Context(), e, "jobs", "")
		awaitQueue(t, client, "jobs", queued(2))
		if i == 0 { // until it is noticed
			time.Sleep(1500 * time.Millisecond)
			first = tried.Load()
		}
		resign(t, l)
		resign(t, awaitLeader(t, waiting))
	}
	if n := tried.Load(); first == 0 || n != first {
		t.Errorf("the stream that is stuck was tried %d times, and %d times later", first, n-first)
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
		if err := await(t, "Campaign", c).err; !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "last failure") {
			t.Errorf("Campaign() = %v, which does not say why", err)
		}
	}
	link.Heal()
}

// Whoever has set a wrong endpoint or authority reads so in the error.
func TestErrorsSayWhyThereIsNoConnection(t *testing.T) {
	addresses, err := etcdtest.FreeAddresses(1) // nobody listens
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	for want, cfg := range map[string]clientv3.Config{
		"connection refused":                      {Endpoints: addresses},
		"certificate signed by unknown authority": {Endpoints: []string{server.Listener.Addr().String()}, TLS: &tls.Config{MinVersion: tls.VersionTLS12}},
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			cfg.Logger = zap.NewNop()
			client, err := clientv3.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			e := newElector(t, client)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			_, campaigned := e.Campaign(ctx, "jobs", "")
			_, asked := e.Current(t.Context(), "jobs")
			for what, err := range map[string]error{"Campaign": campaigned, "Current": asked} {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%s() = %v, want it to say %q", what, err, want)
				}
			}
		})
	}
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

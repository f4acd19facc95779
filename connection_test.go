package leader_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
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
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
)

// The tests of this file are about connections: those that die without a sign, that cannot be made, that come back
// after a long outage, or that the user closes. Where one endpoint of several does not answer is in dark_test.go.

// A NAT or a load balancer that has forgotten a connection drops whatever is sent on it. TCP retries for minutes, and
// the connection seems to be open. Only gRPC's keepalive notices, after 10 s or more.
func TestKeepaliveBringsLeaderCandidateAndObserverBackFromAForgottenConnection(t *testing.T) {
	m, direct := start(t)
	link := etcdtest.NewForgetfulLink(t, m)
	process := func() *leader.Elector {
		return newExpiring(t, etcdtest.NewClientFrom(t, clientv3.Config{
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
	l := etcdtest.Await(t, "a term", terms)
	held := lead(t, newElector(t, direct, leader.WithTTL(time.Minute)), "held", "first")
	next := campaign(t.Context(), process(), "held", "next")
	awaitQueue(t, direct, "held", queued(2))
	observed := observe(t, process(), "held")
	if c := etcdtest.Await(t, "the leader", observed); c.Value != "first" {
		t.Errorf("observed %+v", c)
	}

	link.Forget()
	forgotten := time.Now()
	awaitEnd(t, l, leader.ErrExpired) // in time, as in any outage
	if err := held.Proclaim(t.Context(), "news"); err != nil {
		t.Fatal(err)
	}
	if again := etcdtest.Await(t, "a term after the lost one", terms); again.Token() <= l.Token() {
		t.Errorf("token %d came after %d", again.Token(), l.Token())
	}
	t.Logf("leads again after %v", time.Since(forgotten))
	awaitThat(t, "the news", observed, func(c leader.Candidate) bool { return c.Value == "news" })
	t.Logf("observes again after %v", time.Since(forgotten))
	awaitQueue(t, direct, "held", queued(2)) // its first key has expired
	resign(t, held)
	resign(t, awaitLeader(t, next))
	cancel()
	if err := etcdtest.Await(t, "Run", ran); !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v", err)
	}
	awaitExpiry(t, direct) // a grant may have been given up just as the connection was back
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
	etcdtest.Await(t, "the end of the term", l.Context().Done())
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
		e := newExpiring(t, client, leader.WithLogger(slog.New(log)))
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
		if o := etcdtest.Await(t, "Campaign", campaigns); !errors.Is(o.err, leader.ErrClosed) {
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

// pingcap/tiflash#8519, hashicorp/vault#3031: hot retries.
func TestRetriesBackOff(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	var calls rpcCounter
	counted := etcdtest.NewClientFrom(t, calls.config(link.Endpoint))
	first := lead(t, newElector(t, counted, leader.WithTTL(10*time.Second)), "jobs", "")
	next := campaign(t.Context(), newElector(t, counted, leader.WithTTL(10*time.Second)), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	before := calls.all()
	link.Cut()
	const outage = 5 * time.Second // a renewal falls into it
	time.Sleep(outage)
	got := calls.all() - before
	link.Heal()
	// clientv3 itself repeats reads every 25 ms. Its KeepAliveOnce alone would make tens of thousands.
	if most := int64(outage / (5 * time.Millisecond)); got > most {
		t.Errorf("%d requests in an outage of %v", got, outage)
	}
	t.Logf("%d requests in an outage of %v", got, outage)
	resign(t, first)
	resign(t, awaitLeader(t, next))
}

// After a long outage gRPC waits for up to two minutes before it connects again. A gRPC that waits a minute from the
// first failure on stands for that.
func TestCampaignIsBackSoonAfterALongOutage(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	patient := etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{link.Endpoint}, DialOptions: []grpc.DialOption{
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Minute, Multiplier: 1, MaxDelay: time.Minute}}),
	}})
	e := newExpiring(t, patient)
	l := lead(t, e, "jobs", "")
	link.Cut()
	awaitEnd(t, l, leader.ErrExpired)
	next := campaign(t.Context(), e, "jobs", "")
	for patient.ActiveConnection().GetState() != connectivity.TransientFailure {
		time.Sleep(time.Millisecond)
	}
	link.Heal()
	o := etcdtest.Await(t, "Campaign, long before gRPC would connect again", next)
	if o.err != nil {
		t.Fatal(o.err)
	}
	if !guarded(t, client, o.l) {
		t.Error("elected without a key")
	}
}

// The same for what has the time of a single request, by a client that hides each failure: it repeats by itself what
// has failed for want of a connection.
func TestQuestionAfterALongOutageIsAnswered(t *testing.T) {
	m, _ := start(t)
	link := etcdtest.NewLink(t, m)
	patient := etcdtest.NewClientFrom(t, clientv3.Config{
		Endpoints: []string{link.Endpoint}, BackoffWaitBetween: time.Minute, DialOptions: []grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Minute, Multiplier: 1, MaxDelay: time.Minute}}),
		},
	})
	e := newElector(t, patient)
	if _, err := e.Current(t.Context(), "jobs"); !errors.Is(err, leader.ErrNoLeader) {
		t.Fatal(err)
	}
	link.Cut()
	for deadline := time.Now().Add(time.Minute); patient.ActiveConnection().GetState() != connectivity.TransientFailure; {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		_, _ = patient.Get(ctx, "jobs") // a connection that carries nothing is not cut
		cancel()
		patient.ActiveConnection().Connect()
		if time.Now().After(deadline) {
			t.Fatal("the connection was not cut")
		}
	}
	link.Heal()
	if _, err := e.Current(t.Context(), "jobs"); !errors.Is(err, leader.ErrNoLeader) {
		t.Errorf("Current() = %v, want that nobody leads", err)
	}
}

// Whoever waits for an answer when the client is closed is told so: the caller's own context has not ended.
func TestCampaignsAndObserversWhoseClientIsClosedSaySo(t *testing.T) {
	m, direct := start(t)
	link := etcdtest.NewLink(t, m)
	client := etcdtest.NewClient(t, link.Endpoint)
	e := newExpiring(t, client)
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
		if err := etcdtest.Await(t, "the end of a campaign or an observer", ended); !errors.Is(err, leader.ErrClosed) {
			wrong = append(wrong, err)
		}
	}
	if len(wrong) > 0 {
		t.Errorf("%d of %d did not say that the client is closed, but: %v", len(wrong), 3*n, wrong[0])
	}
	link.Heal()
	awaitExpiry(t, direct)
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
		etcdtest.Await(t, "a read", kv.hung)
		closeClient()
		if err := etcdtest.Await(t, name, answered); !errors.Is(err, leader.ErrClosed) {
			t.Errorf("%s: %v, want %v", name, err, leader.ErrClosed)
		}
	}
}

// A question that is given up says why it was not answered.
func TestErrorOfAQuestionWhoseContextEndsFirstNamesTheLastFailure(t *testing.T) {
	m, _ := start(t)
	link := etcdtest.NewLink(t, m)
	client := etcdtest.NewClient(t, link.Endpoint)
	e := newElector(t, client)
	if _, err := e.Current(t.Context(), "jobs"); !errors.Is(err, leader.ErrNoLeader) {
		t.Fatal(err)
	}
	link.Darken()
	for what, ask := range map[string]func(context.Context) error{
		"Current":    func(ctx context.Context) error { _, err := e.Current(ctx, "jobs"); return err },
		"Candidates": func(ctx context.Context) error { _, err := e.Candidates(ctx, "jobs"); return err },
		"Transfer":   func(ctx context.Context) error { return e.Transfer(ctx, "jobs", leader.Candidate{}) },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		err := ask(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "last failure: no answer from etcd") {
			t.Errorf("%s: %v", what, err)
		}
	}
	link.Heal()
}

// While there is no connection, a request that is sent again would only wait beside the first. When etcd is back it
// would get all of them at once: of each candidate several grants, and with a password a login for each.
func TestARequestThatWaitsForAConnectionIsSentOnce(t *testing.T) {
	m, _ := start(t)
	link := etcdtest.NewLink(t, m)
	var grants atomic.Int64
	client := etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{link.Endpoint}, DialOptions: []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			err := invoker(ctx, method, req, reply, cc, opts...)
			if err == nil && method == "/etcdserverpb.Lease/LeaseGrant" {
				grants.Add(1)
			}
			return err
		}),
	}})
	link.Cut()
	var log logRecorder
	next := campaign(t.Context(), newElector(t, client, leader.WithLogger(slog.New(&log))), "jobs", "")
	log.await(t, "WARN campaign is being retried") // after several times as long as an answer is waited for
	link.Heal()
	resign(t, awaitLeader(t, next))
	if n := grants.Load(); n != 1 {
		t.Errorf("%d leases were granted", n)
	}
}

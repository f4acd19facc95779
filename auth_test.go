package leader_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
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
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// The tests of this file are about clients with a password or a certificate, and about rights. That strangers, who have
// rights elsewhere, do no harm is in strangers_test.go.

// etcd-io/etcd#17623, etcd-io/etcd#14850: a stream may die of an invalid token.
func TestExpiredAuthTokensAndARoleForThePrefixOnly(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"auth-token-ttl": 1, "bcrypt-cost": 4})
	root := etcdtest.NewClient(t, m.Endpoint)
	enableAuth(t, root, "svc/jobs/")
	as := func(user string) *clientv3.Client {
		return etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: user, Password: user})
	}
	opts := []leader.Option{leader.WithPrefix("svc"), leader.WithTTL(6 * time.Second)} // renewed every 2 s
	e := newElector(t, as("service"), opts...)
	l := lead(t, e, "jobs", "first")
	next := campaign(t.Context(), newElector(t, as("service"), opts...), "jobs", "second")
	awaitQueue(t, as("root"), "svc/jobs", queued(2))
	select {
	case <-l.Context().Done():
		t.Fatalf("the term ended: %v", context.Cause(l.Context()))
	case <-time.After(5 * time.Second): // several times the life of a token
	}
	if err := l.Proclaim(t.Context(), "still"); err != nil {
		t.Error(err)
	}
	resign(t, l)
	l = awaitLeader(t, next)

	// What is denied is not waited for, does no harm to what is allowed, and leaves no lease.
	for range 3 {
		if _, err := e.Campaign(t.Context(), "forbidden", ""); !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("Campaign without permission: %v", err)
		}
	}
	for _, err := range e.Observe(t.Context(), "forbidden") {
		if !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("Observe without permission: %v", err)
		}
	}
	resign(t, l)
	if resp, err := as("root").Leases(t.Context()); err != nil || len(resp.Leases) != 0 {
		t.Errorf("leases left: %v, %v", resp, err)
	}
}

// Where the right to read is taken away from a candidate that waits, its key must not be left to block the others.
func TestCandidateThatIsDeniedAfterItHasJoinedIsNotForgotten(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	enableAuth(t, etcdtest.NewClient(t, m.Endpoint), "svc/")
	as := func(user string) *clientv3.Client {
		return etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: user, Password: user})
	}
	root := as("root")
	grant := func(prefix string, to clientv3.PermissionType) {
		t.Helper()
		if _, err := root.RoleGrantPermission(t.Context(), "candidate", prefix, clientv3.GetPrefixRangeEnd(prefix), to); err != nil {
			t.Fatal(err)
		}
	}
	permit := func(to clientv3.PermissionType) {
		t.Helper()
		grant("svc/jobs/", to)
		grant("svc/other/", clientv3.PermissionType(clientv3.PermReadWrite))
	}
	permit(clientv3.PermissionType(clientv3.PermReadWrite))
	if _, err := root.RoleRevokePermission(t.Context(), "candidate", "svc/", clientv3.GetPrefixRangeEnd("svc/")); err != nil {
		t.Fatal(err)
	}
	e := newElector(t, as("service"), leader.WithTTL(6*time.Second))
	other := lead(t, e, "svc/other", "") // keeps the lease
	first := lead(t, newElector(t, root), "svc/jobs", "first")
	next := campaign(t.Context(), e, "svc/jobs", "second")
	awaitQueue(t, root, "svc/jobs", queued(2))
	permit(clientv3.PermissionType(clientv3.PermWrite))
	if o := etcdtest.Await(t, "Campaign", next); !errors.Is(o.err, rpctypes.ErrPermissionDenied) {
		t.Errorf("Campaign that is denied returned %v", o.err)
	}
	permit(clientv3.PermissionType(clientv3.PermReadWrite))
	awaitQueue(t, root, "svc/jobs", queued(1)) // a renewal has found the key
	if !other.IsLeader() || !first.IsLeader() {
		t.Error("a term has ended")
	}
}

func TestTLSWithClientCertificates(t *testing.T) {
	t.Parallel()
	certificate, err := transport.SelfCert(zap.NewNop(), t.TempDir(), []string{"127.0.0.1:0"}, 1, x509.ExtKeyUsageClientAuth)
	if err != nil {
		t.Fatal(err)
	}
	m := etcdtest.Start(t, etcdtest.Settings{"client-transport-security": etcdtest.Settings{
		"cert-file":        certificate.CertFile,
		"key-file":         certificate.KeyFile,
		"trusted-ca-file":  certificate.CertFile,
		"client-cert-auth": true,
	}})
	certificate.TrustedCAFile = certificate.CertFile
	secure, err := certificate.ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	client := etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{"https://" + m.Endpoint}, TLS: secure})
	leavesNothing(t, client)
	l := lead(t, newElector(t, client), "jobs", "first")
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	resign(t, l)
	awaitLeader(t, next)

	// Without a certificate there is no election, and the error says why.
	secure = secure.Clone()
	secure.Certificates, secure.GetClientCertificate = nil, nil
	anonymous := etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{"https://" + m.Endpoint}, TLS: secure})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := newElector(t, anonymous).Campaign(ctx, "jobs", ""); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "last failure: no connection to etcd") {
		t.Errorf("Campaign without a certificate: %v", err)
	}
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
		etcdtest.Await(t, "a renewal", renewed)
	}
	authenticated := func() int64 { return calls.of("/etcdserverpb.Auth/Authenticate") }
	before := authenticated()
	const n = 5 * 4
	for range n {
		etcdtest.Await(t, "a renewal", renewed)
	}
	// An answer may be late on a busy machine. Then another stream is opened.
	if got := authenticated() - before; before == 0 || got > n/4 {
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

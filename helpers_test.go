package leader_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// This file is what the tests of several files use.

func TestMain(m *testing.M) {
	etcdtest.Main()
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		_ = parallel.Value.Set(strconv.Itoa(2 * runtime.GOMAXPROCS(0))) // tests wait more than they work
	}
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
const patience = etcdtest.Patience

// ttl is for terms that expire: long enough for a busy machine, short enough to wait for.
const ttl = 2 * time.Second

// long is for terms that nothing ends but what the test does: no renewal comes, and no machine is too slow
// for one.
var long = leader.WithTTL(time.Minute)

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
			for _, l := range leases.Leases {
				left, err := client.TimeToLive(ctx, l.ID, clientv3.WithAttachedKeys())
				t.Errorf("lease left in etcd: %x, %+v, %v", l.ID, left, err)
			}
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

// newElector returns an Elector that is closed with the test. Its leases do not expire while the test runs.
func newElector(t *testing.T, client *clientv3.Client, opts ...leader.Option) *leader.Elector {
	t.Helper()
	e, err := leader.New(client, append([]leader.Option{long}, opts...)...)
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

// wipe replaces the etcd by an empty one of the same cluster. data is its data-dir.
func wipe(t *testing.T, m *etcdtest.Member, data string) {
	t.Helper()
	m.Stop()
	if err := os.RemoveAll(data); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
}

// newExpiring is newElector for tests in which leases expire, or that wait for renewals.
func newExpiring(t *testing.T, client *clientv3.Client, opts ...leader.Option) *leader.Elector {
	t.Helper()
	return newElector(t, client, append([]leader.Option{leader.WithTTL(ttl)}, opts...)...)
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

// runHeld runs in the background. Its function returns when release is closed, whatever its context says.
func runHeld(ctx context.Context, e *leader.Elector, value string, release <-chan struct{}) (terms <-chan *leader.Leader, ran chan error) {
	began, ran := make(chan *leader.Leader, 10), make(chan error, 1)
	go func() {
		ran <- e.Run(ctx, "jobs", value, func(_ context.Context, l *leader.Leader) error {
			began <- l
			<-release
			return nil
		})
	}()
	return began, ran
}

// transfer transfers in the background.
func transfer(ctx context.Context, e *leader.Elector, name string, to leader.Candidate) <-chan error {
	c := make(chan error, 1)
	go func() { c <- e.Transfer(ctx, name, to) }()
	return c
}

// wantTransferred waits for a transfer, which succeeds.
func wantTransferred(t *testing.T, transferred <-chan error) {
	t.Helper()
	if err := etcdtest.Await(t, "Transfer", transferred); err != nil {
		t.Errorf("Transfer: %v", err)
	}
}

func awaitLeader(t *testing.T, c <-chan outcome) *leader.Leader {
	t.Helper()
	o := etcdtest.Await(t, "Campaign", c)
	if o.err != nil {
		t.Fatalf("Campaign: %v", o.err)
	}
	return o.l
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
	etcdtest.Await(t, "the end of the term", l.Context().Done())
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
	now, err := e.Candidates(t.Context(), name)
	t.Fatalf("waited in vain for the queue of %q, which is %v, %v", name, now, err)
	return nil
}

func queued(n int) func([]leader.Candidate) bool {
	return func(cs []leader.Candidate) bool { return len(cs) == n }
}

// awaitThat receives until that is true of what it has received.
func awaitThat[T any](t *testing.T, what string, c <-chan T, that func(T) bool) {
	t.Helper()
	for {
		if that(etcdtest.Await(t, what, c)) {
			return
		}
	}
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

// stock campaigns with concurrency.Election, on a session of its own.
func stock(tb testing.TB, client *clientv3.Client, name, value string, ttl time.Duration) (*concurrency.Session, *concurrency.Election, <-chan outcome) {
	tb.Helper()
	s, err := concurrency.NewSession(client, concurrency.WithTTL(int(ttl/time.Second)))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() }) // an error says that the lease is gone already
	e := concurrency.NewElection(s, name)
	won := make(chan outcome, 1)
	go func() {
		err := e.Campaign(tb.Context(), value)
		won <- outcome{err: err, at: time.Now()}
	}()
	return s, e, won
}

// enableAuth makes a user root, and a user service that may use keys under prefix. Passwords are the
// names.
func enableAuth(t *testing.T, client *clientv3.Client, prefix string) {
	t.Helper()
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(client.UserAdd(ctx, "root", "root"))
	must(client.UserGrantRole(ctx, "root", "root"))
	must(client.RoleAdd(ctx, "candidate"))
	must(client.RoleGrantPermission(ctx, "candidate", prefix, clientv3.GetPrefixRangeEnd(prefix), clientv3.PermissionType(clientv3.PermReadWrite)))
	must(client.UserAdd(ctx, "service", "service"))
	must(client.UserGrantRole(ctx, "service", "candidate"))
	must(client.AuthEnable(ctx))
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

// A darkKV sends requests to an endpoint that does not answer: those that dark picks. They end with their
// ctx.
type darkKV struct {
	clientv3.KV
	mu      sync.Mutex
	dark    func(key string) bool
	hung    chan struct{} // has an element for each request that went there; has room
	expired chan struct{} // and for each that has run into its own deadline
}

// ask returns ctx's error when ctx ends, if the request goes to the dark endpoint.
func (kv *darkKV) ask(ctx context.Context, key []byte) error {
	kv.mu.Lock()
	dark := kv.dark(string(key))
	kv.mu.Unlock()
	if !dark {
		return nil
	}
	kv.hung <- struct{}{}
	<-ctx.Done()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		kv.expired <- struct{}{}
	}
	return ctx.Err()
}

func (kv *darkKV) set(dark func(key string) bool) {
	kv.mu.Lock()
	defer kv.mu.Unlock()
	kv.dark = dark
}

func (kv *darkKV) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if err := kv.ask(ctx, []byte(key)); err != nil {
		return nil, err
	}
	return kv.KV.Get(ctx, key, opts...)
}

func (kv *darkKV) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	if err := kv.ask(ctx, op.KeyBytes()); err != nil {
		return clientv3.OpResponse{}, err
	}
	return kv.KV.Do(ctx, op)
}

func (kv *darkKV) Txn(ctx context.Context) clientv3.Txn {
	return &darkTxn{Txn: kv.KV.Txn(ctx), kv: kv, ctx: ctx}
}

func darkened(client *clientv3.Client, dark func(key string) bool) (*clientv3.Client, *darkKV) {
	kv := &darkKV{KV: client.KV, dark: dark, hung: make(chan struct{}, 1000), expired: make(chan struct{}, 1000)}
	c := wrapped(client)
	c.KV = kv
	return c, kv
}

type darkTxn struct {
	clientv3.Txn
	kv  *darkKV
	ctx context.Context
	key []byte // of its first operation
}

func (t *darkTxn) If(cs ...clientv3.Cmp) clientv3.Txn   { t.Txn = t.Txn.If(cs...); return t }
func (t *darkTxn) Else(ops ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Else(ops...); return t }
func (t *darkTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	t.Txn, t.key = t.Txn.Then(ops...), ops[0].KeyBytes()
	return t
}

func (t *darkTxn) Commit() (*clientv3.TxnResponse, error) {
	if err := t.kv.ask(t.ctx, t.key); err != nil {
		return nil, err
	}
	return t.Txn.Commit()
}

// A deafWatcher stops to pass events on when it is told to, without a sign: as a stream does that
// has died silently.
type deafWatcher struct {
	clientv3.Watcher
	deaf atomic.Bool
}

func (w *deafWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	in, out := w.Watcher.Watch(ctx, key, opts...), make(chan clientv3.WatchResponse)
	go func() {
		defer close(out)
		for resp := range in {
			if w.deaf.Load() {
				continue
			}
			select {
			case out <- resp:
			case <-ctx.Done():
			}
		}
	}()
	return out
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

// of returns how many there were of a method.
func (c *rpcCounter) of(method string) int64 {
	if n, ok := c.calls.Load(method); ok {
		return n.(*atomic.Int64).Load()
	}
	return 0
}

func (c *rpcCounter) reads() int64 { return c.of("/etcdserverpb.KV/Range") }

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

// awaitCalls blocks until count, a counter of calls, has reached n.
func awaitCalls(t testing.TB, count func() int64, n int64) {
	t.Helper()
	for began := time.Now(); count() < n; time.Sleep(time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatalf("%d calls after %v, want %d", count(), patience, n)
		}
	}
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

// A logChannel gets each record that is logged, without the attributes of [slog.Logger.With].
type logChannel chan slog.Record

func (c logChannel) Enabled(context.Context, slog.Level) bool { return true }
func (c logChannel) WithAttrs([]slog.Attr) slog.Handler       { return c }
func (c logChannel) WithGroup(string) slog.Handler            { return c }
func (c logChannel) Handle(_ context.Context, r slog.Record) error {
	select {
	case c <- r.Clone():
	default: // nobody asks for so many
	}
	return nil
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

// awaitRecord waits until the message has been logged. It fails if the campaign ends first.
func awaitRecord(t *testing.T, log logChannel, message string, campaign <-chan outcome) slog.Record {
	t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case r := <-log:
			if r.Message == message {
				return r
			}
		case o := <-campaign:
			t.Fatalf("Campaign ended while %q was awaited: %v", message, o.err)
		case <-timeout:
			t.Fatalf("waited in vain for %q to be logged", message)
		}
	}
}

// A handler handles log records.
type handler func(slog.Record)

func (handler) Enabled(context.Context, slog.Level) bool          { return true }
func (h handler) WithAttrs([]slog.Attr) slog.Handler              { return h }
func (h handler) WithGroup(string) slog.Handler                   { return h }
func (h handler) Handle(_ context.Context, rec slog.Record) error { h(rec); return nil }

// outKV fails each transaction while out is set.
type outKV struct {
	clientv3.KV
	out *atomic.Bool
}

func (kv outKV) Txn(ctx context.Context) clientv3.Txn { return outTxn{kv.KV.Txn(ctx), kv.out} }

type outTxn struct {
	clientv3.Txn
	out *atomic.Bool
}

func (t outTxn) If(cs ...clientv3.Cmp) clientv3.Txn   { return outTxn{t.Txn.If(cs...), t.out} }
func (t outTxn) Then(ops ...clientv3.Op) clientv3.Txn { return outTxn{t.Txn.Then(ops...), t.out} }
func (t outTxn) Commit() (*clientv3.TxnResponse, error) {
	if t.out.Load() {
		return nil, status.Error(codes.Unavailable, "out")
	}
	return t.Txn.Commit()
}

// A stockBetween is a queue of a leader, a stock candidate, which notices no request to step back, and another candidate.
type stockBetween struct {
	client *clientv3.Client
	l      *leader.Leader
	next   <-chan outcome // of the last
	cs     []leader.Candidate
	leaves func() // the stock candidate
}

func newStockBetween(t *testing.T) *stockBetween {
	t.Helper()
	_, client := start(t)
	q := &stockBetween{client: client, l: lead(t, newElector(t, client), "jobs", "leads")}
	q.leaves = standStock(t, nil, client)
	awaitQueue(t, client, "jobs", queued(2))
	q.next = campaign(t.Context(), newElector(t, client), "jobs", "waits")
	q.cs = awaitQueue(t, client, "jobs", queued(3))
	return q
}

// request is the key by which the stock candidate is asked to step back.
func (q *stockBetween) request() string { return q.cs[1].Key + "/stepback" }

// transfer starts a Transfer to the last, and returns when the stock candidate was asked.
func (q *stockBetween) transfer(ctx context.Context, t *testing.T, e *leader.Elector) <-chan error {
	t.Helper()
	transferred := transfer(ctx, e, "jobs", q.cs[2])
	etcdtest.Await(t, "the request", q.client.Watch(ctx, q.request(), clientv3.WithRev(1)))
	return transferred
}

// end lets everybody leave, one after another.
func (q *stockBetween) end(t *testing.T) {
	t.Helper()
	q.leaves()
	awaitQueue(t, q.client, "jobs", queued(2))
	resign(t, q.l)
	resign(t, awaitLeader(t, q.next))
}

// revokeRequest revokes the lease of the request.
func (q *stockBetween) revokeRequest(t *testing.T) {
	t.Helper()
	resp, err := q.client.Get(t.Context(), q.request())
	if err != nil || resp.Count != 1 {
		t.Fatalf("the request: %v, %v", resp, err)
	}
	if _, err := q.client.Revoke(t.Context(), clientv3.LeaseID(resp.Kvs[0].Lease)); err != nil {
		t.Fatal(err)
	}
}

func (q *stockBetween) wantNoRequest(t *testing.T) {
	t.Helper()
	if resp, err := q.client.Get(t.Context(), q.request()); err != nil || resp.Count != 0 {
		t.Errorf("the request is left: %v, %v", resp, err)
	}
}

package leadertest_test

import (
	"context"
	"errors"
	"fmt"
	"go/doc/comment"
	"go/parser"
	"go/token"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"example.com/leader/leadertest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for an event that must come.
const patience = etcdtest.Patience

// A scope is a test within a test, which may fail and ends when the outer one wants it to.
type scope struct {
	testing.TB
	ctx      context.Context
	cancel   context.CancelFunc
	failure  string
	cleanups []func()
}

func newScope(tb testing.TB) *scope {
	s := &scope{TB: tb}
	s.ctx, s.cancel = context.WithCancel(tb.Context())
	return s
}

// in calls f with a scope and ends that. It returns what f has failed with.
func in(tb testing.TB, f func(tb testing.TB)) (failure string) {
	s := newScope(tb)
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		f(s)
	}()
	<-returned
	s.end()
	return s.failure
}

func (s *scope) Context() context.Context { return s.ctx }

func (s *scope) Cleanup(f func()) { s.cleanups = append(s.cleanups, f) }

func (s *scope) Fatal(args ...any) { s.Fatalf("%v", args...) }

func (s *scope) Fatalf(format string, args ...any) {
	s.failure = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func (s *scope) end() {
	s.cancel()
	for _, f := range slices.Backward(s.cleanups) {
		f()
	}
}

func put(ctx context.Context, client *clientv3.Client, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := client.Put(ctx, "key", "value")
	return err
}

func TestDisconnectedLeaderExpiresBeforeAnotherLeads(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	server := leadertest.NewServer(t)
	a, b := server.NewClient(t), server.NewClient(t)
	first, err := leader.Campaign(ctx, a, "jobs", "a", leader.WithTTL(2*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	reconnect := leadertest.Disconnect(t, a)
	second, err := leader.Campaign(ctx, b, "jobs", "b", leader.WithTTL(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if first.IsLeader() {
		t.Error("two lead")
	}
	etcdtest.Await(t, "the end of the first term", first.Context().Done())
	if cause := context.Cause(first.Context()); !errors.Is(cause, leader.ErrExpired) {
		t.Errorf("the first term ended with %v", cause)
	}
	reconnect()
	if err := put(t.Context(), a, patience); err != nil {
		t.Errorf("after reconnect: %v", err)
	}
	if !second.IsLeader() {
		t.Error("the second term has ended")
	}
	if err := second.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestDisconnectedClientStaysSoWhenDisconnectedAgain(t *testing.T) {
	t.Parallel()
	client := leadertest.NewClient(t)
	if err := put(t.Context(), client, patience); err != nil {
		t.Fatal(err)
	}
	reconnect := leadertest.Disconnect(t, client)
	done := make(chan error)
	go func() { done <- put(t.Context(), client, time.Second) }()
	for {
		select {
		case err := <-done:
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a request of a disconnected client returned %v", err)
			}
			reconnect()
			if err := put(t.Context(), client, patience); err != nil {
				t.Errorf("after reconnect: %v", err)
			}
			return
		case <-time.After(10 * time.Millisecond):
			leadertest.Disconnect(t, client)
		}
	}
}

func TestClientIsDisconnectedUntilEveryTestHasReconnectedIt(t *testing.T) {
	t.Parallel()
	client := leadertest.NewClient(t)
	cut := func(when string) {
		t.Helper()
		if err := put(t.Context(), client, 100*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", when, err)
		}
	}
	reconnect := leadertest.Disconnect(t, client)
	in(t, func(tb testing.TB) { leadertest.Disconnect(tb, client) })
	cut("after the end of a subtest that disconnected it too")
	in(t, func(tb testing.TB) {
		leadertest.Disconnect(tb, client)()
		cut("after a subtest reconnected it")
		leadertest.Disconnect(tb, client)
		reconnect()
		cut("while a subtest still disconnects it")
	})
	if err := put(t.Context(), client, patience); err != nil {
		t.Errorf("after both have reconnected it: %v", err)
	}
}

func TestClientWorksInCleanup(t *testing.T) {
	t.Parallel()
	for _, disconnected := range []bool{false, true} {
		in(t, func(tb testing.TB) {
			client := leadertest.NewClient(tb)
			tb.Cleanup(func() {
				if err := put(t.Context(), client, patience); err != nil {
					t.Errorf("disconnected %v: %v", disconnected, err)
				}
			})
			if disconnected {
				leadertest.Disconnect(tb, client)
			}
		})
	}
}

func TestServiceMayMakeItsOwnClient(t *testing.T) {
	t.Parallel()
	client := leadertest.NewClient(t)
	own := newOwnClient(t, client)
	defer own.Close()
	for range 2 {
		if err := put(t.Context(), own, patience); err != nil {
			t.Errorf("while connected: %v", err)
		}
		reconnect := leadertest.Disconnect(t, client)
		if err := put(t.Context(), own, 100*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("while disconnected: %v", err)
		}
		reconnect()
	}
}

func TestServerEndsThoughTheServiceLeavesClientsOpen(t *testing.T) {
	t.Parallel()
	var open []*clientv3.Client
	in(t, func(tb testing.TB) {
		client := leadertest.NewClient(tb)
		for range 5 {
			own := newOwnClient(tb, client)
			if err := put(t.Context(), own, patience); err != nil {
				t.Error(err)
			}
			open = append(open, own)
		}
	})
	for _, own := range open {
		own.Close()
	}
}

// newOwnClient returns a client as a service makes it that is given the endpoints of another.
func newOwnClient(tb testing.TB, client *clientv3.Client) *clientv3.Client {
	tb.Helper()
	own, err := clientv3.New(clientv3.Config{Endpoints: client.Endpoints(), Logger: zap.NewNop()})
	if err != nil {
		tb.Fatalf("new client: %v", err)
	}
	return own
}

func TestNothingIsLeft(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	running := goleak.IgnoreCurrent()
	in(t, func(tb testing.TB) {
		server := leadertest.NewServer(tb)
		for range 2 {
			client := server.NewClient(tb)
			if err := put(t.Context(), client, patience); err != nil {
				t.Error(err)
			}
			leadertest.Disconnect(tb, client)
			tb.Cleanup(func() {
				if client.Ctx().Err() != nil {
					t.Error("the client is closed before the cleanups that came later")
				}
			})
		}
		if left, err := os.ReadDir(tmp); err != nil || len(left) == 0 {
			t.Errorf("the data is not where this test looks for it: %v, %v", left, err)
		}
	})
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("left in the temporary folder: %v, %v", left, err)
	}
	goleak.VerifyNone(t, running)
}

func TestServerThatDoesNotStartFailsTheTest(t *testing.T) {
	t.Setenv("TMPDIR", "/does/not/exist")
	failure := in(t, func(tb testing.TB) { leadertest.NewClient(tb) })
	if !strings.HasPrefix(failure, "leadertest: start etcd: ") || !strings.Contains(failure, "/does/not/exist") {
		t.Errorf("failed with %q", failure)
	}
}

// breakEnv asks the test's own binary for a server that fails: "test" for one of a test, "process" for one of Start.
const breakEnv = "LEADERTEST_BREAK"

// An etcd inside the test's process must not end the process silently, nor leave the test waiting.
func TestServerThatFailsSaysSo(t *testing.T) {
	switch os.Getenv(breakEnv) {
	case "test":
		t.Cleanup(func() { t.Log("cleaned up") })
		client := leadertest.NewClient(t)
		if err := putIntoNoFolder(t, client); err == nil || t.Context().Err() != nil {
			t.Errorf("Put returned %v", err)
		}
	case "process":
		server, _, err := leadertest.Start()
		if err != nil {
			t.Fatal(err)
		}
		t.Error(putIntoNoFolder(t, server.NewClient(t)))
	default:
		t.Parallel()
		for from, want := range map[string][]string{
			"test":    {"leadertest: etcd has failed: ", "cleaned up", "--- FAIL: " + t.Name()},
			"process": {"\nleadertest: etcd has failed: "},
		} {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=1m")
			cmd.Env = append(os.Environ(), breakEnv+"="+from, "TMPDIR="+t.TempDir())
			out, err := cmd.CombinedOutput()
			if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Errorf("%s: %v", from, err)
			}
			for _, text := range want {
				if !strings.Contains(string(out), text) {
					t.Errorf("%s: %q is not in what it prints:\n%s", from, text, out)
				}
			}
			if strings.Contains(string(out), "panic: ") {
				t.Errorf("%s: panics:\n%s", from, out)
			}
		}
	}
}

// putIntoNoFolder deletes the folder of the only server's log and then writes until the log needs a new file there.
func putIntoNoFolder(t *testing.T, client *clientv3.Client) error {
	wals, err := filepath.Glob(filepath.Join(os.TempDir(), "*", "*", "*", "member", "wal"))
	if err != nil || len(wals) != 1 {
		t.Fatalf("found %v, %v", wals, err)
	}
	if err := os.RemoveAll(wals[0]); err != nil {
		t.Fatal(err)
	}
	_, err = client.Put(t.Context(), "key", strings.Repeat("x", 1<<20))
	return err
}

func TestDisconnectOfAForeignClientFailsTheTest(t *testing.T) {
	t.Parallel()
	foreign, err := clientv3.New(clientv3.Config{Endpoints: []string{"127.0.0.1:1"}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	for want, client := range map[string]*clientv3.Client{
		"leadertest: Disconnect: client must not be nil":                       nil,
		"leadertest: Disconnect: client must be one of leadertest's NewClient": foreign,
	} {
		if failure := in(t, func(tb testing.TB) { leadertest.Disconnect(tb, client) }); failure != want {
			t.Errorf("failed with %q, want %q", failure, want)
		}
	}
}

func TestServerListensOnLoopbackOnly(t *testing.T) {
	t.Parallel()
	resp, err := leadertest.NewClient(t).MemberList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range resp.Members {
		for _, u := range slices.Concat(m.ClientURLs, m.PeerURLs) {
			if parsed, err := url.Parse(u); err != nil || parsed.Hostname() != "127.0.0.1" {
				t.Errorf("listens on %q", u)
			}
		}
	}
}

func TestServerGrantsLeasesFromASecondOn(t *testing.T) {
	t.Parallel()
	resp, err := leadertest.NewClient(t).Grant(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if resp.TTL != 1 {
		t.Errorf("granted %d s, want 1 s", resp.TTL)
	}
}

// What the documentation shows must be what is run.
func TestDocumentationQuotesTheExample(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "leadertest.go", nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	quotes := 0
	for _, block := range new(comment.Parser).Parse(file.Doc.Text()).Content {
		if code, ok := block.(*comment.Code); ok {
			quotes++
			if !strings.Contains(string(example), code.Text) {
				t.Errorf("example_test.go does not contain\n%s", code.Text)
			}
		}
	}
	if quotes == 0 {
		t.Error("no code in the package documentation")
	}
}

func BenchmarkNewClient(b *testing.B) {
	for b.Loop() {
		s := newScope(b)
		if err := put(b.Context(), leadertest.NewClient(s), patience); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		s.end()
		b.StartTimer()
	}
}

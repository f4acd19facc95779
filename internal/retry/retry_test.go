package retry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// etcdErrors are what etcd answers, as the gRPC status that is sent. refused is set where etcd has not carried out the
// request and never will.
var etcdErrors = []struct {
	err                error
	permanent, refused bool
	why                string
}{
	{rpctypes.ErrGRPCPermissionDenied, true, true, "only an operator can change that"},
	{rpctypes.ErrGRPCAuthFailed, true, true, "wrong user or password"},
	{rpctypes.ErrGRPCUserEmpty, true, true, "etcd wants a user, the client has none"},
	{rpctypes.ErrGRPCEmptyKey, true, true, "invalid request"},
	{rpctypes.ErrGRPCTooManyOps, true, true, "invalid request"},
	{rpctypes.ErrGRPCDuplicateKey, true, true, "invalid request"},
	{rpctypes.ErrGRPCRequestTooLarge, true, true, "the value stays too large"},
	{rpctypes.ErrGRPCLeaseNotFound, true, true, "the same request has the same lease"},
	{rpctypes.ErrGRPCAuthOldRevision, false, true, "the next request has the new revision"},
	{rpctypes.ErrGRPCInvalidAuthToken, false, true, "the client gets a new token"},
	{rpctypes.ErrGRPCNoSpace, false, true, "until somebody compacts and disarms the alarm"},
	{rpctypes.ErrGRPCRequestTooManyRequests, false, true, "etcd is busy, and refuses before it proposes"},
	{rpctypes.ErrGRPCCompacted, false, false, "the next watch begins later"},
	{rpctypes.ErrGRPCFutureRev, false, false, "the member lags behind"},
	{rpctypes.ErrGRPCNoLeader, false, false, "until there is a quorum"},
	{rpctypes.ErrGRPCLeaderChanged, false, false, "what was proposed may still be committed"},
	{rpctypes.ErrGRPCNotLeader, false, false, "ask again"},
	{rpctypes.ErrGRPCStopped, false, false, "another member answers"},
	{rpctypes.ErrGRPCTimeout, false, false, "what was proposed may still be committed"},
	{rpctypes.ErrGRPCTimeoutDueToLeaderFail, false, false, "what was proposed may still be committed"},
	{rpctypes.ErrGRPCTimeoutDueToConnectionLost, false, false, "what was proposed may still be committed"},
	{rpctypes.ErrGRPCUnhealthy, false, false, "until there is a quorum"},
	{rpctypes.ErrGRPCNotSupportedForLearner, false, false, "another member answers"},
	{rpctypes.ErrGRPCCanceled, false, false, "somebody's context ended"},
	{rpctypes.ErrGRPCDeadlineExceeded, false, false, "ask again"},
}

func TestPermanentIsWhatCannotHeal(t *testing.T) {
	testVerdict(t, "Permanent", Permanent, func(i int) bool { return etcdErrors[i].permanent })
}

// Whoever counts the requests that may still be carried out must count each one that is not certainly refused.
func TestRefusedIsWhatEtcdWillNotCarryOut(t *testing.T) {
	testVerdict(t, "Refused", Refused, func(i int) bool { return etcdErrors[i].refused })
}

// testVerdict checks what is said of etcd's errors and, as they are the same for all verdicts, of others.
func testVerdict(t *testing.T, name string, verdict func(error) bool, wanted func(i int) bool) {
	check := func(err error, want bool, why string) {
		t.Helper()
		for _, err := range []error{err, fmt.Errorf("wrapped: %w", err), errors.Join(io.EOF, err)} {
			if got := verdict(err); got != want {
				t.Errorf("%s(%T %v) = %v, want %v: %s", name, err, err, got, want, why)
			}
		}
	}
	for i, test := range etcdErrors {
		// clientv3 returns no status of etcd's, but a KV that somebody has wrapped around its own may.
		check(test.err, wanted(i), test.why)
		check(rpctypes.Error(test.err), wanted(i), test.why) // as clientv3 returns it
	}
	for c, why := range map[codes.Code]string{
		codes.PermissionDenied: "a proxy in between may say so, too",
		codes.InvalidArgument:  "the request stays the same",
	} {
		check(status.Error(c, "a text unknown to etcd"), true, why)
	}
	for c, why := range map[codes.Code]string{
		codes.Canceled:           "a connection was closed",
		codes.Unknown:            "nothing is known",
		codes.DeadlineExceeded:   "ask again",
		codes.NotFound:           "it may be there later",
		codes.AlreadyExists:      "it may be gone later",
		codes.FailedPrecondition: "it may be met later",
		codes.ResourceExhausted:  "a limit on the rate of requests, of a proxy for example",
		codes.Aborted:            "ask again",
		codes.OutOfRange:         "a revision",
		codes.Internal:           "ask again",
		codes.Unavailable:        "no connection",
		codes.DataLoss:           "another member may be whole",
		codes.Unauthenticated:    "a token has expired",
	} {
		check(status.Error(c, "a text unknown to etcd"), false, why)
	}
	check(context.Canceled, false, "not etcd's")
	check(context.DeadlineExceeded, false, "not etcd's")
	check(errors.New("permission denied"), false, "never by text")
	if verdict(nil) {
		t.Errorf("%s(nil) = true", name)
	}
}

// The error of a watch may be about others, so it must not end a wait.
func TestPassingHidesPermanence(t *testing.T) {
	for _, err := range []error{
		rpctypes.ErrPermissionDenied, rpctypes.ErrGRPCPermissionDenied, rpctypes.ErrLeaseNotFound,
	} {
		passing := Passing(fmt.Errorf("watch: %w", err))
		if Permanent(passing) || Refused(passing) || errors.Is(passing, err) {
			t.Errorf("Passing returns %v, which is permanent: %v", passing, Permanent(passing))
		}
		if got, want := passing.Error(), "watch: "+err.Error(); got != want {
			t.Errorf("Passing returns %q, want the text %q", got, want)
		}
	}
}

func TestBackoffDoublesUpToMaxLessAJitterOfUpToAHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := Backoff{Min: 100 * time.Millisecond, Max: time.Second}
		for range 2 { // Reset starts over
			if b.Streak() != 0 {
				t.Errorf("Streak() = %d before a failure", b.Streak())
			}
			for i, ms := range []time.Duration{100, 200, 400, 800, 1000, 1000} {
				full := ms * time.Millisecond
				if got := pause(t, &b); got < full/2 || got > full {
					t.Errorf("pause %d of %v, want %v to %v", i, got, full/2, full)
				}
				if b.Streak() != i+1 {
					t.Errorf("Streak() = %d after %d failures", b.Streak(), i+1)
				}
			}
			b.Reset()
		}
		least, most := time.Hour, time.Duration(0)
		for range 200 {
			d := pause(t, &b)
			least, most = min(least, d), max(most, d)
			b.Reset()
		}
		if least > 60*time.Millisecond || most < 90*time.Millisecond {
			t.Errorf("pauses of %v to %v, want them all over 50ms to 100ms", least, most)
		}
	})
}

func TestBackoffEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		b := Backoff{Min: time.Hour, Max: time.Hour}
		began := time.Now()
		if err := b.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("Wait() = %v after %v, want %v after 1s", err, time.Since(began), context.DeadlineExceeded)
		}
	})
}

func TestLoopWarnsOnceForAStreak(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var warned []error
		l := Loop{Client: client(t), Warn: func(err error) { warned = append(warned, err) }}
		first, other := errors.New("first"), errors.New("other")
		for _, err := range []error{first, other, other, nil, other, first} {
			if err == nil {
				l.OK()
			} else if got := l.Retry(t.Context(), err); got != nil {
				t.Errorf("Retry(%v) = %v", err, got)
			}
		}
		if len(warned) != 2 || !errors.Is(warned[0], first) || !errors.Is(warned[1], other) {
			t.Errorf("warned of %v, want the first failure of either streak", warned)
		}
		if !errors.Is(l.Last(), first) {
			t.Errorf("Last() = %v, want %v", l.Last(), first)
		}
	})
}

func TestLoopPausesLongerAndLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := Loop{Client: client(t)}
		for range 2 {
			for i, ms := range []time.Duration{50, 100, 200, 400, 800, 1600, 2000, 2000} {
				full := ms * time.Millisecond
				began := time.Now()
				if err := l.Retry(t.Context(), io.EOF); err != nil {
					t.Errorf("Retry() = %v", err)
				}
				if got := time.Since(began); got < full/2 || got > full {
					t.Errorf("pause %d of %v, want %v to %v", i, got, full/2, full)
				}
			}
			l.OK()
		}
	})
}

func TestDoGivesUpOnWhatCannotHeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := Loop{Client: client(t), Warn: func(err error) { t.Errorf("warned of %v, which is returned", err) }}
		denied := fmt.Errorf("read: %w", rpctypes.ErrPermissionDenied)
		began, tries := time.Now(), 0
		_, err := Do(t.Context(), &l, func(context.Context) (int, error) {
			tries++
			return 0, denied
		})
		if !errors.Is(err, denied) || !errors.Is(l.Last(), denied) || tries != 1 || time.Since(began) != 0 {
			t.Errorf("Do() = %v after %d tries and %v, Last() = %v, want %v at once",
				err, tries, time.Since(began), l.Last(), denied)
		}
	})
}

func TestAgainGivesUpOnWhatCannotHeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := Loop{Client: client(t), Warn: func(err error) { t.Errorf("warned of %v, which is returned", err) }}
		denied := fmt.Errorf("read: %w", rpctypes.ErrPermissionDenied)
		began := time.Now()
		err := l.Retry(t.Context(), denied)
		if !errors.Is(err, denied) || !errors.Is(l.Last(), denied) || time.Since(began) != 0 {
			t.Errorf("Retry() = %v after %v, Last() = %v, want %v at once", err, time.Since(began), l.Last(), denied)
		}
	})
}

func TestLoopReturnsTheErrorOfAContextThatEnded(t *testing.T) {
	bubble(t, "during a request", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		l := Loop{Client: client(t)}
		tries := 0
		_, err := Do(ctx, &l, func(rctx context.Context) (int, error) {
			if tries++; tries == 1 {
				return 0, rpctypes.ErrNoLeader
			}
			cancel()
			<-rctx.Done() // ends with ctx
			return 0, rpctypes.ErrPermissionDenied
		})
		if !errors.Is(err, context.Canceled) || !errors.Is(l.Last(), rpctypes.ErrNoLeader) {
			t.Errorf("Do() = %v, Last() = %v, want %v and %v", err, l.Last(), context.Canceled, rpctypes.ErrNoLeader)
		}
	})
	bubble(t, "during the first request", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		l := Loop{Client: client(t)}
		_, err := Do(ctx, &l, hang)
		if !errors.Is(err, context.DeadlineExceeded) || fmt.Sprint(l.Last()) != "no answer from etcd for 1s" {
			t.Errorf("Do() = %v, Last() = %v, want %v and a reason for it", err, l.Last(), context.DeadlineExceeded)
		}
	})
	bubble(t, "during a pause", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		l := Loop{Client: client(t)}
		if err := l.Retry(ctx, io.EOF); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(l.Last(), io.EOF) {
			t.Errorf("Retry() = %v, Last() = %v, want %v and %v", err, l.Last(), context.DeadlineExceeded, io.EOF)
		}
	})
}

func TestDoWarnsOnceForAStreakThatASuccessEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var warned []error
		l := Loop{Client: client(t), Warn: func(err error) { warned = append(warned, err) }}
		for _, first := range []error{rpctypes.ErrNoLeader, io.EOF} {
			tries := 0
			value, err := Do(t.Context(), &l, func(context.Context) (int, error) {
				switch tries++; tries {
				case 1:
					return 0, first
				case 2, 3:
					return 0, rpctypes.ErrTimeout
				}
				return tries, nil
			})
			if value != 4 || err != nil || l.Last() != nil || l.streak != 0 {
				t.Errorf("Do() = %v, %v; after it Last() = %v in a streak of %d", value, err, l.Last(), l.streak)
			}
		}
		if len(warned) != 2 || !errors.Is(warned[0], rpctypes.ErrNoLeader) || !errors.Is(warned[1], io.EOF) {
			t.Errorf("warned of %v, want the first failure of either streak", warned)
		}
	})
}

func TestContextsOfRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type key struct{}
		parent, cancel := context.WithTimeout(context.WithValue(t.Context(), key{}, "v"), time.Second)
		defer cancel()
		request, cancelRequest := Request(parent)
		defer cancelRequest()
		wantRequest(request, t, time.Second) // the caller's is shorter
		cleanup, cancelCleanup := Cleanup(parent)
		defer cancelCleanup()
		wantRequest(cleanup, t, CleanupTimeout)
		if request.Value(key{}) != "v" || cleanup.Value(key{}) != "v" {
			t.Error("values of the caller's context are lost")
		}
		cancel()
		if request.Err() == nil || cleanup.Err() != nil {
			t.Errorf("after the end of the caller's context Request has %v and Cleanup %v", request.Err(), cleanup.Err())
		}
	})
}

func TestRequireLeaderSendsWhatTheClientsDoes(t *testing.T) {
	for name, ctx := range map[string]context.Context{
		"no metadata":          t.Context(),
		"metadata of a user":   metadata.AppendToOutgoingContext(t.Context(), "trace", "7"),
		"it is required twice": RequireLeader(t.Context()),
		"a user requires it":   clientv3.WithRequireLeader(t.Context()),
	} {
		got, _ := metadata.FromOutgoingContext(RequireLeader(ctx))
		want, _ := metadata.FromOutgoingContext(clientv3.WithRequireLeader(ctx))
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: sends %v, want %v", name, got, want)
		}
	}
}

// clientv3 opens a stream for each metadata: a caller's trace id would cost one for each watch.
func TestWatchingCarriesNothingOfTheCallers(t *testing.T) {
	type key struct{}
	client := client(t)
	ctx := metadata.AppendToOutgoingContext(context.WithValue(t.Context(), key{}, "v"), "trace", "7")
	stream := StreamOf(client)
	watching, cancel := stream.Watching(ctx)
	defer cancel()
	if v := watching.Value(key{}); v != nil {
		t.Errorf("a watch has the value %v of its caller's context", v)
	}
	got, _ := metadata.FromOutgoingContext(watching)
	want, _ := metadata.FromOutgoingContext(clientv3.WithRequireLeader(client.Ctx()))
	if !reflect.DeepEqual(got, want) {
		t.Errorf("a watch sends %v, want %v, as a user's own watches do", got, want)
	}
}

func TestWatchesAreOpenedOnAnotherStreamOnceOneWasLate(t *testing.T) {
	client := client(t)
	streams := make(map[string]bool)
	for late := range 10 * watchStreams {
		stream, beside := StreamOf(client), StreamOf(client)
		watching, cancel := stream.Watching(t.Context())
		md, _ := metadata.FromOutgoingContext(watching)
		cancel()
		if len(md.Get(rpctypes.MetadataRequireLeaderKey)) == 0 {
			t.Errorf("after %d that were late it does not require a leader: %v", late, md)
		}
		if stream != beside {
			t.Errorf("after %d that were late watches are opened on different streams", late)
		}
		name := fmt.Sprint(md) // what clientv3 tells them apart by
		if late < watchStreams && streams[name] {
			t.Errorf("after %d that were late the stream is one that was late: %v", late, md)
		}
		streams[name] = true
		stream.Late()
		beside.Late() // of one stream, so that none is skipped
	}
	if len(streams) != watchStreams {
		t.Errorf("%d streams were used, want %d", len(streams), watchStreams)
	}
}

func TestWatchingEnds(t *testing.T) {
	for name, end := range map[string]func(cancelCtx, cancel func()){
		"with the caller's context": func(cancelCtx, _ func()) { cancelCtx() },
		"when it is cancelled":      func(_, cancel func()) { cancel() },
	} {
		bubble(t, name, func(t *testing.T) {
			ctx, cancelCtx := context.WithCancel(t.Context())
			defer cancelCtx()
			stream := StreamOf(client(t))
			watching, cancel := stream.Watching(ctx)
			defer cancel()
			synctest.Wait()
			if watching.Err() != nil {
				t.Errorf("has ended before: %v", watching.Err())
			}
			end(cancelCtx, cancel)
			synctest.Wait()
			if !errors.Is(watching.Err(), context.Canceled) {
				t.Errorf("has not ended: %v", watching.Err())
			}
		})
	}
}

// A campaign's context may live for weeks, and through many watches.
func TestWatchingThatHasEndedLeavesNothingInTheCallersContext(t *testing.T) {
	ctx := &registry{Context: t.Context()}
	stream := StreamOf(client(t))
	_, cancel := stream.Watching(ctx)
	if ctx.registered != 1 {
		t.Fatalf("%d functions wait for the caller's context, want 1", ctx.registered)
	}
	cancel()
	if ctx.registered != 0 {
		t.Errorf("%d functions wait for the caller's context after the end of the watch", ctx.registered)
	}
}

// A registry is a context that counts the functions which wait for its end, see [context.AfterFunc].
type registry struct {
	context.Context
	registered int
}

func (*registry) Value(any) any { return nil } // hides what it is derived from

func (r *registry) AfterFunc(func()) (stop func() bool) {
	r.registered++
	return func() bool { r.registered--; return true }
}

func TestSilenceNamesTheCureForAnOpenConnectionAlone(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	defer serving.Wait()
	defer server.Stop()
	connected, err := clientv3.New(clientv3.Config{Endpoints: []string{listener.Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	defer connected.Close()

	check := func(client *clientv3.Client, waited time.Duration, want string) {
		t.Helper()
		err := Silence(client, waited)
		isTimeout := errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled)
		if err.Error() != want || !isTimeout || Permanent(err) {
			t.Errorf("is %q, want %q, which may heal and matches %v", err, want, context.DeadlineExceeded)
		}
	}
	check(connected, 5*time.Second, "no connection to etcd: IDLE")
	conn := connected.ActiveConnection()
	conn.Connect()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		conn.WaitForStateChange(t.Context(), state)
	}
	check(connected, 5*time.Second, "no answer from etcd for 5s on an open connection, "+Cure)
	check(connected, 250*time.Millisecond, "no answer from etcd for 250ms") // that is no sign of a dead connection
	check(client(t), 5*time.Second, "no answer from etcd for 5s")           // it has none of its own
}

func bubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// client returns one without a connection, which [Reconnect] must leave alone.
func client(t *testing.T) *clientv3.Client { return clientv3.NewCtxClient(t.Context()) }

// hang is a request to an endpoint that does not answer.
func hang(ctx context.Context) (int, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}

func pause(t *testing.T, b *Backoff) time.Duration {
	t.Helper()
	began := time.Now()
	if err := b.Wait(t.Context()); err != nil {
		t.Fatalf("Wait() = %v", err)
	}
	return time.Since(began)
}

// wantRequest wants a context that ends after d and asks for a member with a raft leader.
func wantRequest(ctx context.Context, t *testing.T, d time.Duration) {
	t.Helper()
	if end, ok := ctx.Deadline(); !ok || time.Until(end) != d {
		t.Errorf("request has a deadline: %v, in %v, want one in %v", ok, time.Until(end), d)
	}
	md, _ := metadata.FromOutgoingContext(ctx)
	if got := md.Get(rpctypes.MetadataRequireLeaderKey); len(got) != 1 || got[0] != rpctypes.MetadataHasLeader {
		t.Errorf("request has %s: %q", rpctypes.MetadataRequireLeaderKey, got)
	}
}

// A streak that is forgotten is over, but nothing has succeeded.
func TestOnlyASuccessIsReportedAsTheEndOfAStreak(t *testing.T) {
	var over []int
	l := &Loop{Over: func(failures int, _ time.Duration) { over = append(over, failures) }}
	l.OK()
	l.Failed(io.EOF)
	l.Failed(io.EOF)
	l.Forget()
	l.OK()
	if over != nil || l.Last() != nil {
		t.Errorf("reported %v, Last() = %v after a streak that was forgotten", over, l.Last())
	}
	l.Failed(io.EOF)
	l.Failed(io.EOF)
	l.OK()
	l.OK()
	if !slices.Equal(over, []int{2}) {
		t.Errorf("reported %v, want one streak of 2 failures", over)
	}
}

// An outage may end in another one: etcd is back, and its certificate has expired.
func TestAStreakIsWarnedOfAgainWhenItsReasonHasChangedAndMoreAndMoreSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var warned []string
		l := Loop{Warn: func(err error) { warned = append(warned, fmt.Sprint(time.Since(began), " ", err)) }}
		for i := range 300 {
			reason := "refused"
			switch {
			case i >= 100:
				reason = fmt.Sprint("port ", i) // another each time
			case i >= 30:
				reason = "expired"
			}
			l.Failed(errors.New(reason))
			time.Sleep(2 * time.Second)
		}
		want := []string{"0s refused", "1m0s expired", "3m20s port 100", "6m40s port 200"}
		if !slices.Equal(warned, want) {
			t.Errorf("warned: %q, want %q", warned, want)
		}
		l.OK()
		l.Failed(errors.New("refused"))
		if len(warned) != len(want)+1 {
			t.Errorf("the first of the next streak: %q", warned)
		}
	})
}

package retry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// etcdErrors are what etcd answers, as the gRPC status that is sent.
var etcdErrors = []struct {
	err       error
	permanent bool
	why       string
}{
	{rpctypes.ErrGRPCPermissionDenied, true, "only an operator can change that"},
	{rpctypes.ErrGRPCAuthFailed, true, "wrong user or password"},
	{rpctypes.ErrGRPCUserEmpty, true, "etcd wants a user, the client has none"},
	{rpctypes.ErrGRPCEmptyKey, true, "invalid request"},
	{rpctypes.ErrGRPCTooManyOps, true, "invalid request"},
	{rpctypes.ErrGRPCDuplicateKey, true, "invalid request"},
	{rpctypes.ErrGRPCRequestTooLarge, true, "the value stays too large"},
	{rpctypes.ErrGRPCAuthOldRevision, false, "the next request has the new revision"},
	{rpctypes.ErrGRPCInvalidAuthToken, false, "the client gets a new token"},
	{rpctypes.ErrGRPCNoSpace, false, "until somebody compacts and disarms the alarm"},
	{rpctypes.ErrGRPCRequestTooManyRequests, false, "etcd is busy"},
	{rpctypes.ErrGRPCLeaseNotFound, true, "the same request has the same lease"},
	{rpctypes.ErrGRPCCompacted, false, "the next watch begins later"},
	{rpctypes.ErrGRPCFutureRev, false, "the member lags behind"},
	{rpctypes.ErrGRPCNoLeader, false, "until there is a quorum"},
	{rpctypes.ErrGRPCLeaderChanged, false, "ask again"},
	{rpctypes.ErrGRPCNotLeader, false, "ask again"},
	{rpctypes.ErrGRPCStopped, false, "another member answers"},
	{rpctypes.ErrGRPCTimeout, false, "ask again"},
	{rpctypes.ErrGRPCTimeoutDueToLeaderFail, false, "ask again"},
	{rpctypes.ErrGRPCTimeoutDueToConnectionLost, false, "ask again"},
	{rpctypes.ErrGRPCUnhealthy, false, "until there is a quorum"},
	{rpctypes.ErrGRPCNotSupportedForLearner, false, "another member answers"},
	{rpctypes.ErrGRPCCanceled, false, "somebody's context ended"},
	{rpctypes.ErrGRPCDeadlineExceeded, false, "ask again"},
}

func TestPermanentIsWhatCannotHeal(t *testing.T) {
	check := func(err error, want bool, why string) {
		t.Helper()
		for _, err := range []error{err, fmt.Errorf("wrapped: %w", err), errors.Join(io.EOF, err)} {
			if got := Permanent(err); got != want {
				t.Errorf("Permanent(%T %v) = %v, want %v: %s", err, err, got, want, why)
			}
		}
	}
	for _, test := range etcdErrors {
		if got := Permanent(test.err); got != test.permanent {
			t.Errorf("Permanent(%v) = %v, want %v: %s", test.err, got, test.permanent, test.why)
		}
		check(rpctypes.Error(test.err), test.permanent, test.why) // as clientv3 returns it
	}
	for c, why := range map[codes.Code]string{
		codes.PermissionDenied:  "a proxy in between may say so, too",
		codes.InvalidArgument:   "the request stays the same",
		codes.ResourceExhausted: "the message is larger than gRPC's limit",
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
	if Permanent(nil) {
		t.Error("Permanent(nil) = true")
	}
}

// clientv3 returns no such error, but a KV that somebody has wrapped around its own may.
func TestPermanentSeesThroughAWrappedStatusOfEtcd(t *testing.T) {
	for _, test := range etcdErrors {
		if got := Permanent(fmt.Errorf("wrapped: %w", test.err)); got != test.permanent {
			t.Errorf("Permanent(%v), wrapped, = %v, want %v: %s", test.err, got, test.permanent, test.why)
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
			} else if got := l.Again(t.Context(), err); got != nil {
				t.Errorf("Again(%v) = %v", err, got)
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
				if err := l.Again(t.Context(), io.EOF); err != nil {
					t.Errorf("Again() = %v", err)
				}
				if got := time.Since(began); got < full/2 || got > full {
					t.Errorf("pause %d of %v, want %v to %v", i, got, full/2, full)
				}
			}
			l.OK()
		}
	})
}

func TestLoopGivesUpOnWhatCannotHeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := Loop{Client: client(t), Warn: func(err error) { t.Errorf("warned of %v, which is returned", err) }}
		denied := fmt.Errorf("read: %w", rpctypes.ErrPermissionDenied)
		began, tries := time.Now(), 0
		err := l.Do(t.Context(), func(context.Context) error {
			tries++
			return denied
		})
		if !errors.Is(err, denied) || !errors.Is(l.Last(), denied) || tries != 1 || time.Since(began) != 0 {
			t.Errorf("Do() = %v after %d tries and %v, Last() = %v, want %v at once", err, tries, time.Since(began), l.Last(), denied)
		}
	})
}

func TestLoopReturnsTheErrorOfAContextThatEnded(t *testing.T) {
	bubble(t, "during a request", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		l := Loop{Client: client(t)}
		noLeader := rpctypes.ErrNoLeader
		err := l.Do(ctx, func(rctx context.Context) error {
			if l.Last() == nil {
				return noLeader
			}
			cancel()
			<-rctx.Done() // ends with ctx
			return rpctypes.ErrPermissionDenied
		})
		if !errors.Is(err, context.Canceled) || !errors.Is(l.Last(), noLeader) {
			t.Errorf("Do() = %v, Last() = %v, want %v and %v", err, l.Last(), context.Canceled, noLeader)
		}
	})
	bubble(t, "during the first request", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		l := Loop{Client: client(t)}
		err := l.Do(ctx, hang)
		if !errors.Is(err, context.DeadlineExceeded) || l.Last() == nil || errors.Is(l.Last(), context.DeadlineExceeded) {
			t.Errorf("Do() = %v, Last() = %v, want %v and a reason for it", err, l.Last(), context.DeadlineExceeded)
		}
	})
	bubble(t, "during a pause", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		l := Loop{Client: client(t)}
		if err := l.Again(ctx, io.EOF); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(l.Last(), io.EOF) {
			t.Errorf("Again() = %v, Last() = %v, want %v and %v", err, l.Last(), context.DeadlineExceeded, io.EOF)
		}
	})
}

func TestDoGivesEveryRequestAContextOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := Loop{Client: client(t)}
		var former []context.Context
		err := l.Do(t.Context(), func(ctx context.Context) error {
			for _, f := range former {
				if f.Err() == nil {
					t.Error("context of a former request was not cancelled")
				}
			}
			former = append(former, ctx)
			wantRequest(ctx, t, RequestTimeout)
			if len(former) == 2 {
				return hang(ctx) // costs this request and not the whole
			}
			if len(former) < 4 {
				return rpctypes.ErrNoLeader
			}
			return nil
		})
		if err != nil || len(former) != 4 {
			t.Errorf("Do() = %v after %d requests, want success after 4", err, len(former))
		}
		if l.backoff.Streak() != 0 {
			t.Errorf("a streak of %d after a success", l.backoff.Streak())
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

// All watches of one metadata share one stream, with those that a user has opened.
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

func bubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// client returns one without a connection, which [Reconnect] must leave alone.
func client(t *testing.T) *clientv3.Client { return clientv3.NewCtxClient(t.Context()) }

func hang(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
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

func TestPersistAsksOthersWhereOneDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		var tries atomic.Int64
		err := Persist(ctx, client(t), func(ctx context.Context) error {
			if tries.Add(1) < 4 {
				return hang(ctx)
			}
			return nil
		})
		if err != nil {
			t.Errorf("after %d tries: %v", tries.Load(), err)
		}
	})
}

func TestPersistGivesUpOnWhatCannotHeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		tries := 0
		err := Persist(ctx, client(t), func(context.Context) error {
			tries++
			return rpctypes.ErrPermissionDenied
		})
		if tries != 1 || !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("%d tries: %v", tries, err)
		}
	})
}

func TestPersistGivesTimeToOneThatIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		err := Persist(ctx, client(t), func(ctx context.Context) error { return Sleep(ctx, 1900*time.Millisecond) })
		if err != nil {
			t.Error(err)
		}
	})
}

func TestPersistTellsTheLastFailureWhenItEnds(t *testing.T) {
	for name, end := range map[string]struct {
		by   func(cancel context.CancelFunc, client *clientv3.Client)
		want error
	}{
		"deadline":         {func(context.CancelFunc, *clientv3.Client) {}, context.DeadlineExceeded},
		"context":          {func(cancel context.CancelFunc, _ *clientv3.Client) { cancel() }, context.Canceled},
		"client is closed": {func(_ context.CancelFunc, client *clientv3.Client) { _ = client.Close() }, context.Canceled},
	} {
		bubble(t, name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			client := client(t)
			time.AfterFunc(3*time.Second, func() { end.by(cancel, client) })
			var tries atomic.Int64
			err := Persist(ctx, client, func(ctx context.Context) error {
				if tries.Add(1) < 4 {
					return rpctypes.ErrNoLeader
				}
				return hang(ctx)
			})
			if !errors.Is(err, end.want) || !errors.Is(err, rpctypes.ErrNoLeader) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestPersistReturnsAtOnceWhenItsTimeIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, late := range []time.Duration{0, time.Hour} {
			ctx, cancel := context.WithDeadline(t.Context(), time.Now().Add(-late))
			defer cancel()
			began := time.Now()
			if err := Persist(ctx, client(t), hang); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != 0 {
				t.Errorf("got %v after %v", err, time.Since(began))
			}
		}
	})
}

func TestPersistPausesBetweenTries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var tries atomic.Int64
		err := Persist(ctx, client(t), func(context.Context) error {
			tries.Add(1)
			return rpctypes.ErrNoLeader
		})
		if err == nil || tries.Load() < 5 || tries.Load() > 20 {
			t.Errorf("%d tries in a second, then %v", tries.Load(), err)
		}
	})
}

package retry

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/test/bufconn"
)

func TestAskSendsAgainBesideASilentRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sent sends
		value, err := Ask(t.Context(), client(t), nil, func(ctx context.Context) (int, error) {
			n := sent.add()
			if n == 1 {
				return hang(ctx)
			}
			return n, nil
		})
		if value != 2 || err != nil {
			t.Errorf("Ask() = %d, %v, want the answer to the second request", value, err)
		}
		if at := sent.at[1]; at < silence/2 || at > silence {
			t.Errorf("the second request was sent after %v, want %v to %v", at, silence/2, silence)
		}
	})
}

// Round robin sends two that are sent together to two endpoints, of which one at most is the dark one.
func TestWhatIsSentAgainIsSentTwiceAtOnceIfThereAreSeveralEndpoints(t *testing.T) {
	for endpoints, together := range map[string]int{"127.0.0.1:1": 1, "127.0.0.1:1 127.0.0.1:2": 2} {
		bubble(t, endpoints, func(t *testing.T) {
			client := connected(t, strings.Fields(endpoints))
			ctx, cancel := context.WithTimeout(t.Context(), 3*silence)
			defer cancel()
			var sent sends
			_, _ = AskWithin(ctx, client, RequestTimeout, nil, sent.hang)
			if len(sent.at) < 1+together {
				t.Errorf("sent at %v", sent.at)
			}
			for i := 1; i+together <= len(sent.at); i += together {
				if sent.at[i] != sent.at[i+together-1] || i+together < len(sent.at) && sent.at[i] == sent.at[i+together] {
					t.Errorf("sent at %v, want %d at a time after the first", sent.at, together)
				}
			}
		})
	}
}

// connected returns a client that has a connection to each of the endpoints, where nothing answers.
func connected(t *testing.T, endpoints []string) *clientv3.Client {
	t.Helper()
	listener := bufconn.Listen(1 << 16)
	server := grpc.NewServer()
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop(), DialOptions: []grpc.DialOption{
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = client.Close()
		server.Stop()
		serving.Wait()
	})
	conn := client.ActiveConnection()
	conn.Connect()
	for s := conn.GetState(); s != connectivity.Ready; s = conn.GetState() {
		conn.WaitForStateChange(t.Context(), s)
	}
	synctest.Wait() // for all of the connections
	return client
}

func TestAskGivesASilentRequestTheTimeToAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var sent sends
		value, err := Ask(t.Context(), client(t), nil, func(ctx context.Context) (int, error) {
			n := sent.add()
			if n == 1 {
				return n, Sleep(ctx, 4*time.Second)
			}
			return hang(ctx)
		})
		if value != 1 || err != nil || time.Since(began) != 4*time.Second {
			t.Errorf("Ask() = %d, %v after %v, want the answer to the first request after 4s", value, err, time.Since(began))
		}
	})
}

func TestAskSendsAgainSoonerWhereTimeIsShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
		defer cancel()
		var sent sends
		if _, err := Ask(ctx, client(t), nil, sent.hang); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Ask() = %v", err)
		}
		if len(sent.at) < 4 || sent.at[1] > 50*time.Millisecond {
			t.Errorf("requests sent after %v, want at least 4, the second after 50ms at most", sent.at)
		}
	})
}

func TestAskHasEightRequestsUnansweredAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var sent sends
		_, _ = Ask(ctx, client(t), nil, sent.hang)
		if sent.most != maxBeside {
			t.Errorf("%d requests at a time, want %d", sent.most, maxBeside)
		}
		if len(sent.at) < 20 {
			t.Errorf("%d requests in a minute: those that have timed out were not followed by others", len(sent.at))
		}
	})
}

// An etcd that is slow, since much is asked of it, must not be asked for a multiple of that.
func TestAsksThatGetNoAnswerSendFewRequestsBesideOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := client(t)
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
		defer cancel()
		var sent sends
		var asks sync.WaitGroup
		const n = 70 // with hundreds the race detector may crash: golang/go#78156
		for range n {
			asks.Go(func() { _, _ = Ask(ctx, client, nil, sent.hang) })
		}
		asks.Wait()
		if beside := len(sent.at) - n; beside < minTokens || beside > minTokens+4*tokensPerSecond {
			t.Errorf("%d requests beside others in 4s, want %d and %d a second at most", beside, minTokens, tokensPerSecond)
		}
	})
}

// While one endpoint of three is dark the others answer: so the requests to it can be sent to them.
func TestDarkEndpointDelaysFewRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := client(t)
		const n = 96
		var sent atomic.Int64
		var late atomic.Int64
		var asks sync.WaitGroup
		for range n {
			asks.Go(func() {
				began := time.Now()
				_, _ = Ask(t.Context(), client, nil, func(ctx context.Context) (int, error) {
					if sent.Add(1)%3 == 0 {
						return hang(ctx)
					}
					return 0, nil
				})
				if time.Since(began) > 2*time.Second {
					late.Add(1)
				}
			})
		}
		asks.Wait()
		if late := late.Load(); late > n/16 { // a few meet the dark one each time
			t.Errorf("%d of %d answers came after more than 2s", late, n)
		}
	})
}

func TestRequestThatMayNotBeSentBesideAnotherIsSentSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := client(t)
		traffic := trafficOf(client)
		for traffic.send(true) { // until there is no token left
			traffic.ended(false)
		}
		var sent sends
		_, err := AskWithin(t.Context(), client, 400*time.Millisecond, nil, func(ctx context.Context) (int, error) {
			if sent.add() == 1 {
				return hang(ctx)
			}
			return 0, nil
		})
		if at := sent.at[1]; err != nil || at < time.Second/tokensPerSecond || at > 250*time.Millisecond {
			t.Errorf("AskWithin() = %v; requests were sent after %v, want a token for the second after 100ms", err, sent.at)
		}
	})
}

func TestAskPausesLongerAndLongerAfterFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := []time.Duration{50, 100, 200, 400, 800, 1600, 2000, 2000, 2000}
		var sent sends
		_, err := Ask(t.Context(), client(t), nil, func(context.Context) (int, error) {
			if n := sent.add(); n <= len(full) {
				return 0, rpctypes.ErrNoLeader
			}
			return 0, nil
		})
		if err != nil {
			t.Errorf("Ask() = %v", err)
		}
		for i, ms := range full {
			full := ms * time.Millisecond
			if pause := sent.at[i+1] - sent.at[i]; pause < full/2 || pause > full {
				t.Errorf("pause %d of %v, want %v to %v", i, pause, full/2, full)
			}
		}
	})
}

func TestAskReturnsAtOnceWhatCannotHeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := func(err error) { t.Errorf("told of %v, which is returned", err) }
		var sent sends
		value, err := Ask(t.Context(), client(t), failed, func(ctx context.Context) (int, error) {
			if sent.add() == 1 {
				return hang(ctx)
			}
			return 7, rpctypes.ErrPermissionDenied
		})
		if !errors.Is(err, rpctypes.ErrPermissionDenied) || value != 0 {
			t.Errorf("Ask() = %d, %v, want no value and %v", value, err, rpctypes.ErrPermissionDenied)
		}
		if len(sent.at) != 2 || sent.now() != sent.at[1] {
			t.Errorf("returned after %v and requests after %v, want the second refusal at once", sent.now(), sent.at)
		}
	})
}

// A request that was carried out must not be reported as one that was not.
func TestAnswerThatCameWinsOverTheEnd(t *testing.T) {
	bubble(t, "of ctx", func(t *testing.T) {
		for range 100 {
			ctx, cancel := context.WithCancel(t.Context())
			value, err := Ask(ctx, client(t), nil, func(context.Context) (int, error) {
				cancel()
				return 7, nil
			})
			if value != 7 || err != nil {
				t.Fatalf("Ask() = %d, %v", value, err)
			}
		}
	})
	bubble(t, "of ctx, after a failure", func(t *testing.T) {
		for range 100 {
			ctx, cancel := context.WithCancel(t.Context())
			var sent sends
			value, err := Ask(ctx, client(t), nil, func(rctx context.Context) (int, error) {
				if sent.add() == 1 {
					<-rctx.Done()
					return 7, nil
				}
				cancel()
				return 0, rpctypes.ErrNoLeader
			})
			if value != 7 || err != nil {
				t.Fatalf("Ask() = %d, %v", value, err)
			}
		}
	})
	bubble(t, "by a refusal", func(t *testing.T) {
		var sent sends
		value, err := Ask(t.Context(), client(t), nil, func(ctx context.Context) (int, error) {
			if sent.add() == 1 {
				<-ctx.Done()
				return 7, nil
			}
			return 0, rpctypes.ErrPermissionDenied
		})
		if value != 7 || err != nil {
			t.Errorf("Ask() = %d, %v", value, err)
		}
	})
}

func TestNoRequestIsLeftWhenAskHasReturned(t *testing.T) {
	for name, fourth := range map[string]func(ctx context.Context, cancel func(), client *clientv3.Client) (int, error){
		"with an answer": func(context.Context, func(), *clientv3.Client) (int, error) { return 7, nil },
		"with a refusal": func(context.Context, func(), *clientv3.Client) (int, error) {
			return 0, rpctypes.ErrPermissionDenied
		},
		"with its context": func(ctx context.Context, cancel func(), _ *clientv3.Client) (int, error) {
			cancel()
			return hang(ctx)
		},
		"with the client": func(ctx context.Context, _ func(), client *clientv3.Client) (int, error) {
			_ = client.Close()
			return hang(ctx)
		},
		"by a panic of failed":  func(context.Context, func(), *clientv3.Client) (int, error) { return 0, errPanic },
		"by a Goexit of failed": func(context.Context, func(), *clientv3.Client) (int, error) { return 0, errGoexit },
	} {
		bubble(t, name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background()) // it must not be the test's end that ends requests
			defer cancel()
			client := clientv3.NewCtxClient(context.Background())
			var sent sends
			var caller sync.WaitGroup
			caller.Go(func() {
				defer func() {
					_ = recover()
					if running := sent.running.Load(); running != 0 {
						t.Errorf("%d requests go on", running)
					}
				}()
				failed := func(err error) {
					switch {
					case errors.Is(err, errPanic):
						panic(err)
					case errors.Is(err, errGoexit):
						runtime.Goexit()
					}
					t.Errorf("told of %v", err)
				}
				_, _ = Ask(ctx, client, failed, func(ctx context.Context) (int, error) {
					sent.running.Add(1)
					defer sent.running.Add(-1)
					if sent.add() == 4 {
						return fourth(ctx, cancel, client)
					}
					<-ctx.Done()
					time.Sleep(time.Second) // it takes its time to end
					return 0, ctx.Err()
				})
			})
			caller.Wait()
			if len(sent.at) != 4 {
				t.Errorf("%d requests were sent, want 4", len(sent.at))
			}
		})
	}
}

var errPanic, errGoexit = errors.New("failed panics"), errors.New("failed calls runtime.Goexit")

func TestAskEndsWhenTheClientIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := client(t)
		time.AfterFunc(3*time.Second, func() { _ = client.Close() })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		if _, err := Ask(ctx, client, nil, hang); !errors.Is(err, context.Canceled) || time.Since(began) != 3*time.Second {
			t.Errorf("Ask() = %v after %v, want %v after 3s", err, time.Since(began), context.Canceled)
		}
	})
}

func TestAskSendsNothingWhenItsContextHasEndedBefore(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Hour))
	defer cancel()
	for _, ctx := range []context.Context{ended, late} {
		for range 1000 {
			_, err := Ask(ctx, client(t), nil, func(context.Context) (int, error) {
				t.Error("a request was sent")
				return 0, nil
			})
			if !errors.Is(err, ctx.Err()) {
				t.Errorf("Ask() = %v, want %v", err, ctx.Err())
			}
			if t.Failed() {
				return
			}
		}
	}
}

// failed is the user's logger in the end, which may panic: only in the caller's goroutine can that be recovered.
func TestAskTellsOfFailuresInTheCallersGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		caller := goroutine()
		var told []error
		failed := func(err error) {
			told = append(told, err)
			if g := goroutine(); g != caller {
				t.Errorf("told in %s, want %s", g, caller)
			}
		}
		var sent sends
		_, err := Ask(t.Context(), client(t), failed, func(context.Context) (int, error) {
			switch sent.add() {
			case 1:
				return 0, rpctypes.ErrNoLeader
			case 2:
				return 0, rpctypes.ErrTimeout
			}
			return 0, nil
		})
		want := []error{rpctypes.ErrNoLeader, rpctypes.ErrTimeout}
		if err != nil || !slices.Equal(told, want) {
			t.Errorf("Ask() = %v, and told of %v, want %v", err, told, want)
		}
	})
}

func TestAskGivesEachRequestAContextOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sent sends
		var answered []context.Context
		_, err := Ask(t.Context(), client(t), nil, func(ctx context.Context) (int, error) {
			n := sent.add()
			for _, former := range answered {
				if former.Err() == nil {
					t.Error("the context of a request that was answered was not cancelled")
				}
			}
			wantRequest(ctx, t, RequestTimeout)
			if n == 2 {
				return hang(ctx) // costs this request and not the whole
			}
			answered = append(answered, ctx)
			if n < 5 {
				return 0, rpctypes.ErrNoLeader
			}
			return 0, nil
		})
		if err != nil || len(sent.at) != 5 {
			t.Errorf("Ask() = %v after %d requests, want success after 5", err, len(sent.at))
		}
	})
}

func TestAskWithinGivesEachRequestItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const attempt = 400 * time.Millisecond
		var told []time.Duration
		var sent sends
		failed := func(err error) {
			told = append(told, sent.now())
			if !errors.Is(err, context.DeadlineExceeded) || err.Error() != "no answer from etcd for 400ms" {
				t.Errorf("told of %q, want the silence", err)
			}
		}
		value, err := AskWithin(t.Context(), client(t), attempt, failed, func(ctx context.Context) (int, error) {
			n := sent.add()
			wantRequest(ctx, t, attempt)
			if n < 6 {
				return hang(ctx)
			}
			return n, nil
		})
		if value != 6 || err != nil {
			t.Errorf("AskWithin() = %d, %v", value, err)
		}
		if at := sent.at[1]; at < attempt/8 || at > attempt/4 {
			t.Errorf("the second request was sent after %v, want a quarter of %v, less a half of that at most", at, attempt)
		}
		if len(told) == 0 || told[0] != attempt {
			t.Errorf("told of a silence after %v, want %v", told, attempt)
		}
	})
}

func TestFirstReturnsTheFirstAnswerThoughItIsAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, want := range []error{rpctypes.ErrNoLeader, rpctypes.ErrPermissionDenied, io.EOF} {
			var sent sends
			value, err := First(t.Context(), client(t), func(context.Context) (int, error) {
				sent.add()
				return 7, want
			})
			if value != 7 || !errors.Is(err, want) || len(sent.at) != 1 || sent.now() != 0 {
				t.Errorf("First() = %d, %v after requests at %v and %v, want %v at once", value, err, sent.at, sent.now(), want)
			}
		}
	})
}

func TestFirstAsksAnotherWhereOneDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sent sends
		_, err := First(t.Context(), client(t), func(ctx context.Context) (int, error) {
			if sent.add() == 1 {
				return hang(ctx)
			}
			return 0, rpctypes.ErrNoLeader
		})
		if !errors.Is(err, rpctypes.ErrNoLeader) || sent.now() > silence {
			t.Errorf("First() = %v after %v, want %v after %v at most", err, sent.now(), rpctypes.ErrNoLeader, silence)
		}
	})
}

func TestFirstBlocksForFiveSecondsAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, limit := range []time.Duration{time.Second, time.Minute} {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			began := time.Now()
			_, err := First(ctx, client(t), hang)
			if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != min(limit, 5*time.Second) {
				t.Errorf("First() = %v after %v, in a context of %v", err, time.Since(began), limit)
			}
			if silent := strings.Contains(err.Error(), "no answer from etcd for 5s"); silent != (ctx.Err() == nil) {
				t.Errorf("First() = %v, in a context of %v", err, limit)
			}
		}
	})
}

func TestFirstKeepsAnAnswerThatComesWithTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		value, err := First(ctx, client(t), func(context.Context) (int, error) {
			cancel()
			return 7, nil
		})
		if value != 7 || err != nil {
			t.Errorf("First() = %d, %v, want the answer", value, err)
		}
		ctx, cancel = context.WithCancel(t.Context())
		_, err = First(ctx, client(t), func(rctx context.Context) (int, error) {
			cancel()
			<-rctx.Done()
			return 0, io.EOF // what the end looks like from inside a request
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("First() = %v, want %v", err, context.Canceled)
		}
	})
}

func TestPersistAsksOthersWhereOneDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		var sent sends
		err := Persist(ctx, client(t), func(ctx context.Context) error {
			if sent.add() < 4 {
				_, err := hang(ctx)
				return err
			}
			return nil
		})
		if err != nil {
			t.Errorf("after %d tries: %v", len(sent.at), err)
		}
	})
}

func TestPersistGivesUpOnWhatCannotHeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var sent sends
		err := Persist(ctx, client(t), func(context.Context) error {
			if sent.add() == 1 {
				return rpctypes.ErrNoLeader
			}
			return rpctypes.ErrPermissionDenied
		})
		if len(sent.at) != 2 || !errors.Is(err, rpctypes.ErrPermissionDenied) || errors.Is(err, rpctypes.ErrNoLeader) {
			t.Errorf("%d tries: %v", len(sent.at), err)
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
			var sent sends
			err := Persist(ctx, client, func(ctx context.Context) error {
				if sent.add() < 4 {
					return rpctypes.ErrNoLeader
				}
				_, err := hang(ctx)
				return err
			})
			if !errors.Is(err, end.want) {
				t.Errorf("got %v, want %v", err, end.want)
			}
			if name == "deadline" { // the requests have had theirs in the meantime
				if !strings.Contains(err.Error(), "no answer from etcd") {
					t.Errorf("got %v, want the last failure", err)
				}
			} else if !errors.Is(err, rpctypes.ErrNoLeader) {
				t.Errorf("got %v, want %v, the last failure", err, rpctypes.ErrNoLeader)
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
			err := Persist(ctx, client(t), func(ctx context.Context) error {
				_, err := hang(ctx)
				return err
			})
			if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != 0 {
				t.Errorf("got %v after %v", err, time.Since(began))
			}
		}
	})
}

func TestPersistPausesBetweenTries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var sent sends
		err := Persist(ctx, client(t), func(context.Context) error {
			sent.add()
			return rpctypes.ErrNoLeader
		})
		if err == nil || len(sent.at) < 5 || len(sent.at) > 20 {
			t.Errorf("%d tries in a second, then %v", len(sent.at), err)
		}
	})
}

func TestOutliveReturnsTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var owner Group
		value, err := Outlive(t.Context(), &owner, func(ctx context.Context) (int, error) {
			wantRequest(ctx, t, RequestTimeout)
			return 7, io.EOF
		}, func(int, error) { t.Error("late was called for an answer that was returned") })
		if value != 7 || !errors.Is(err, io.EOF) {
			t.Errorf("Outlive() = %d, %v, want the answer", value, err)
		}
		if err := owner.Wait(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestOutliveLetsTheRequestGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type key struct{}
		ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), key{}, "v"), time.Second)
		defer cancel()
		began := time.Now()
		var owner Group
		lates := 0
		_, err := Outlive(ctx, &owner, func(ctx context.Context) (int, error) {
			if ctx.Value(key{}) != "v" {
				t.Error("values of the caller's context are lost")
			}
			return 7, Sleep(ctx, time.Hour)
		}, func(value int, err error) {
			lates++
			if value != 7 || !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != RequestTimeout {
				t.Errorf("late got %d, %v after %v, want what the request returned", value, err, time.Since(began))
			}
			time.Sleep(time.Second)
			lates++
		})
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("Outlive() = %v after %v, want the end of its context after 1s", err, time.Since(began))
		}
		if err := owner.Wait(t.Context()); err != nil || lates != 2 {
			t.Errorf("the owner waited: %v, and not until late had returned", err)
		}
	})
}

// Whoever takes the answer takes over what the request has made; so it must be taken exactly once.
func TestAnswerIsEitherReturnedOrLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for range 1000 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			var owner Group
			late := 0
			value, err := Outlive(ctx, &owner, func(context.Context) (int, error) {
				time.Sleep(time.Second) // until the very moment at which ctx ends
				return 7, nil
			}, func(int, error) { late++ })
			cancel()
			if err := owner.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			returned, ended := value == 7 && err == nil, value == 0 && errors.Is(err, context.DeadlineExceeded)
			if ok := returned && late == 0 || ended && late == 1; !ok {
				t.Fatalf("Outlive() = %d, %v, and late was called %d times", value, err, late)
			}
		}
	})
}

func TestGroupWaitsForAllItsGoroutines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Group
		for round := range 2 { // it can be used again
			began := time.Now()
			for i := range 3 {
				g.Go(func() { time.Sleep(time.Duration(i+1) * time.Second) })
			}
			var waiters sync.WaitGroup
			for range 2 {
				waiters.Go(func() {
					if err := g.Wait(t.Context()); err != nil || time.Since(began) != 3*time.Second {
						t.Errorf("round %d: Wait() = %v after %v, want nil after 3s", round, err, time.Since(began))
					}
				})
			}
			waiters.Wait()
		}
	})
}

func TestGroupWaitsNoLongerThanItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Group
		g.Go(func() { time.Sleep(time.Minute) })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if err := g.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("Wait() = %v after %v, want the end of its context after 1s", err, time.Since(began))
		}
		if err := g.Wait(t.Context()); err != nil || time.Since(began) != time.Minute {
			t.Errorf("Wait() = %v after %v, want nil after a minute", err, time.Since(began))
		}
	})
}

// Close returns nil when there was nothing to wait for, also if its context had ended before.
func TestIdleWinsOverTheEndOfTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		var g Group
		if err := g.Wait(ended); err != nil {
			t.Errorf("Wait() of a group without goroutines = %v", err)
		}
		g.Go(func() {})
		synctest.Wait()
		if err := g.Wait(ended); err != nil {
			t.Errorf("Wait() of a group whose goroutines have ended = %v", err)
		}
		closed := make(chan struct{})
		close(closed)
		for range 100 {
			if err := Wait(ended, closed); err != nil {
				t.Fatalf("Wait() for what has happened = %v", err)
			}
		}
	})
}

// What a client has learned about its streams outlasts each use of it, and not the client.
func TestClientIsForgottenWhenItIsGone(t *testing.T) {
	known := func() int {
		traffics.mu.Lock()
		defer traffics.mu.Unlock()
		return len(traffics.of)
	}
	before := known()
	for range 100 {
		StreamOf(clientv3.NewCtxClient(context.Background())).Late()
	}
	for range 1000 {
		runtime.GC()
		if known() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d clients are remembered, want %d at most", known(), before)
}

func TestWatchesAvoidAStreamThatWasLateForAsLongAsTheClientLives(t *testing.T) {
	client := client(t)
	StreamOf(client).Late()
	runtime.GC()
	if got := StreamOf(client).number; got != 1 {
		t.Errorf("the next watch is opened on stream %d, want 1", got)
	}
}

func TestStreamIsIdleSinceAWatchWasCreatedOnIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := client(t)
		stream, same := StreamOf(client), StreamOf(client)
		stream.Late()
		other := StreamOf(client)
		began := time.Now()
		time.Sleep(time.Second)
		if idle := stream.Idle(began); idle != time.Second {
			t.Errorf("idle for %v, want 1s", idle)
		}
		same.Created()
		time.Sleep(2 * time.Second)
		if idle := stream.Idle(began); idle != 2*time.Second {
			t.Errorf("idle for %v after a watch was created, want 2s", idle)
		}
		if idle := other.Idle(began); idle != 3*time.Second {
			t.Errorf("another stream is idle for %v, want 3s", idle)
		}
		if idle := stream.Idle(time.Now().Add(-time.Second)); idle != time.Second {
			t.Errorf("idle for %v of the last second", idle)
		}
	})
}

// sends are the requests of one Ask. It may be used in one bubble alone.
type sends struct {
	mu      sync.Mutex
	began   time.Time // when the first was sent
	at      []time.Duration
	most    int // at a time
	running atomic.Int64
}

// add counts a request and returns its number, from 1.
func (s *sends) add() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.began.IsZero() {
		s.began = time.Now()
	}
	s.at = append(s.at, time.Since(s.began))
	return len(s.at)
}

// now is the time since the first request was sent.
func (s *sends) now() time.Duration { return time.Since(s.began) }

// hang is a request to an endpoint that does not answer.
func (s *sends) hang(ctx context.Context) (int, error) {
	s.add()
	running := int(s.running.Add(1))
	defer s.running.Add(-1)
	s.mu.Lock()
	s.most = max(s.most, running)
	s.mu.Unlock()
	return hang(ctx)
}

// goroutine names the goroutine that it is called in.
func goroutine() string {
	buf := make([]byte, 64)
	name, _, _ := strings.Cut(string(buf[:runtime.Stack(buf, false)]), " [")
	return name
}

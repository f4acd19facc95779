package lease

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader/internal/etcdtest"
	"example.com/leader/internal/retry"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/namespace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

// patience is how long a test waits for an event that must come. Nothing is inferred from it but
// that the event did not come.
const patience = 30 * time.Second

func TestSessionsOfAClientRenewOverOneStream(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	for name, wrap := range map[string]func(*clientv3.Client){
		"plain": func(*clientv3.Client) {},
		"namespaced": func(c *clientv3.Client) {
			c.KV, c.Lease = namespace.NewKV(c.KV, "ns/"), namespace.NewLease(c.Lease, "ns/")
		},
	} {
		t.Run(name, func(t *testing.T) {
			var calls, others calls
			client := etcdtest.NewClientFrom(t, calls.config(m.Endpoint))
			wrap(client)
			var sessions []*realSession
			for range 3 {
				sessions = append(sessions, startReal(t, client, Config{}))
			}
			other := startReal(t, etcdtest.NewClientFrom(t, others.config(m.Endpoint)), Config{})
			for range 3 {
				for _, s := range sessions {
					s.renew(t)
				}
				var together sync.WaitGroup
				for _, s := range sessions {
					together.Go(func() { s.renew(t) })
				}
				together.Wait()
				other.renew(t)
			}
			calls.want(t, 1, 1, 18)
			others.want(t, 1, 1, 3) // the stream of one client is not for another
		})
	}
}

func TestStreamEndsWithTheLastSessionOfItsClient(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	var calls calls
	client := etcdtest.NewClientFrom(t, calls.config(m.Endpoint))
	var sessions []*realSession
	for range 3 {
		s := startReal(t, client, Config{})
		s.renew(t)
		sessions = append(sessions, s)
	}
	unused := startReal(t, client, Config{}) // has not been renewed yet, so it uses no stream
	for i, s := range sessions {
		if err := s.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		if i < 2 {
			calls.want(t, 1, 1, 3)
		} else {
			calls.want(t, 1, 0, 3)
		}
	}
	if keepers := keepersOf(client); keepers != 0 {
		t.Errorf("%d keepers are left", keepers)
	}
	unused.renew(t)
	calls.want(t, 2, 1, 4)
	if err := unused.Close(t.Context()); err != nil {
		t.Errorf("Close() = %v", err)
	}
	calls.want(t, 2, 0, 4)
}

func TestCloseOfASessionWaitsForTheEndOfTheStream(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	ending, released := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(released) })
	calls := calls{end: func() {
		close(ending)
		<-released
	}}
	s := startReal(t, etcdtest.NewClientFrom(t, calls.config(m.Endpoint)), Config{})
	defer release()
	s.renew(t)
	ctx, cancel := context.WithCancel(t.Context())
	closed := make(chan error, 1)
	go func() { closed <- s.Close(ctx) }()
	await(t, ending)
	poll(t, "the lease is revoked", s.Gone)
	select {
	case err := <-closed:
		t.Errorf("Close() = %v while the stream has not ended", err)
	case <-time.After(100 * time.Millisecond): // Close waits for nothing else now
	}
	cancel()
	if err := await(t, closed); !errors.Is(err, context.Canceled) {
		t.Errorf("Close() = %v while the stream has not ended, want %v", err, context.Canceled)
	}
	release()
	if err := s.Close(t.Context()); err != nil {
		t.Errorf("Close() = %v once the stream has ended", err)
	}
	calls.want(t, 1, 0, 1)
}

func TestClosedClientEndsTheStream(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	var calls calls
	client := etcdtest.NewClientFrom(t, calls.config(m.Endpoint))
	s := startReal(t, client, Config{})
	s.renew(t)
	client.Close()
	await(t, s.done) // the renewal may be about to end
	await(t, s.streams)
	calls.want(t, 1, 0, 1)
}

func TestStreamIsOpenedAgainAfterTheMemberRestarted(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	var calls calls
	client := etcdtest.NewClientFrom(t, calls.config(m.Endpoint))
	s := startReal(t, client, Config{})
	s.renew(t)
	m.Stop()
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	poll(t, "the client has dialled anew", func() bool {
		retry.Reconnect(client)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := client.Get(ctx, "k")
		return err == nil
	})
	s.renew(t) // and no failure is reported
	calls.want(t, 2, 1, 2)
}

// The token of a stream is that of its beginning.
func TestStreamIsOpenedAgainOnceItsTokenHasExpired(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4, "auth-token-ttl": 1})
	var calls calls
	client := startAuth(t, m, &calls, m.Endpoint)
	s := startReal(t, client, Config{})
	s.renew(t)
	time.Sleep(3 * time.Second) // etcd looks for expired tokens every second
	s.renew(t)                  // and no failure is reported
	if opened, open, _ := calls.counts(); opened != 2 || open != 1 {
		t.Errorf("%d streams opened, %d open, want 2 and 1: the token has not expired, or the stream was not replaced",
			opened, open)
	}
}

// etcd checks a password by a hash that is slow on purpose, and writes each new token through raft (etcd#15764).
func TestUserAndPasswordAreCheckedOncePerStreamAndNotPerRenewal(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	var calls calls
	client := startAuth(t, m, &calls, m.Endpoint)
	var sessions []*realSession
	before := calls.authenticated.Load()
	for range 3 {
		sessions = append(sessions, startReal(t, client, Config{}))
	}
	calls.await(t, 1, 1) // before the first renewal needs it
	for range 3 {
		for _, s := range sessions {
			s.renew(t)
		}
	}
	if got := calls.authenticated.Load() - before; got != 1 {
		t.Errorf("authenticated %d times for 9 renewals, want once", got)
	}
	calls.want(t, 1, 1, 9)
}

func TestLeaseIsKeptWhileOneOfTwoEndpointsDoesNotAnswer(t *testing.T) {
	t.Parallel()
	for _, password := range []bool{false, true} {
		m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
		var user string
		if password {
			user = startAuth(t, m, new(calls), m.Endpoint).Username
		}
		for turn := range 2 { // the endpoint whose turn it is after the failure is either
			t.Run(fmt.Sprintf("password %v turn %d", password, turn), func(t *testing.T) {
				t.Parallel()
				links := []*etcdtest.Link{etcdtest.NewLink(t, m), etcdtest.NewLink(t, m)}
				var calls calls
				cfg := calls.config(links[0].Endpoint, links[1].Endpoint)
				cfg.Username, cfg.Password = user, user
				client := etcdtest.NewClientFrom(t, cfg)
				get := func() {
					if _, err := client.Get(t.Context(), "k"); err != nil {
						t.Fatal(err)
					}
				}
				for calls.endpoints() < 2 { // until both are connected: they take turns then
					get()
				}
				s := startReal(t, client, Config{TTL: 2 * ttl})
				s.renew(t)
				for range turn {
					get()
				}
				first := calls.lastStream()
				i := slices.IndexFunc(links, func(l *etcdtest.Link) bool { return strings.HasSuffix(l.Endpoint, first) })
				if i < 0 {
					t.Fatalf("the stream is at %q, which is no link", first)
				}
				links[i].Darken()
				r := s.tryRenew(t)
				if !errors.Is(r.Err, context.DeadlineExceeded) {
					t.Errorf("renewal over a dark link: %v, want %v", r.Err, context.DeadlineExceeded)
				}
				for r.Err != nil { // as a rule once; what else is sent at the same time also takes turns
					r = await(t, s.renewals)
				}
				if !s.Valid() {
					t.Errorf("the lease was lost: %v", s.Cause())
				}
				calls.awaitOpen(t, 1) // nobody waits for one that does not answer, nor for those that were opened beside
				if err := s.Close(t.Context()); err != nil {
					t.Errorf("Close() = %v", err)
				}
				calls.awaitOpen(t, 0)
			})
		}
	}
}

// That would find no other, and passwords are checked at a cost.
func TestOneStreamIsOpenedForTheOnlyEndpoint(t *testing.T) {
	t.Parallel()
	f := serve(t, func(n int, asked <-chan int64, answer func(int64, int64)) error {
		for id := range asked {
			if n > 1 {
				answer(id, 60)
			}
		}
		return nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := f.keeper.renew(ctx, 7)
		left <- err
	}()
	f.awaitAsked(t, 1)
	cancel()
	if err := await(t, left); !errors.Is(err, context.Canceled) {
		t.Errorf("renew() = %v, want %v", err, context.Canceled)
	}
	f.renew(t, 7)
	f.calls.await(t, 2, 1)
}

// Whoever has wrapped the Lease wants to see the renewals, or to change what becomes of them.
func TestClientWithAWrappedLeaseRenewsThroughTheWrapper(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	client := etcdtest.NewClient(t, m.Endpoint)
	wrapper := &countingLease{Lease: client.Lease}
	client.Lease = wrapper
	s := startReal(t, client, Config{})
	for range 3 {
		s.renew(t)
	}
	if got := wrapper.renewals.Load(); got != 3 {
		t.Errorf("the wrapper has seen %d of 3 renewals", got)
	}
	if keepers := keepersOf(client); keepers != 0 {
		t.Error("the client has a stream for renewals")
	}
}

type countingLease struct {
	clientv3.Lease
	renewals atomic.Int64
}

func (l *countingLease) KeepAliveOnce(ctx context.Context, id clientv3.LeaseID) (*ack, error) {
	l.renewals.Add(1)
	return l.Lease.KeepAliveOnce(ctx, id)
}

func TestRevokedLeaseIsFoundOutOverTheStream(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	var calls calls
	client := etcdtest.NewClientFrom(t, calls.config(m.Endpoint))
	kept, s := startReal(t, client, Config{}), startReal(t, client, Config{})
	s.renew(t)
	if _, err := client.Revoke(t.Context(), s.ID()); err != nil {
		t.Fatal(err)
	}
	if r := s.tryRenew(t); !errors.Is(r.Err, rpctypes.ErrLeaseNotFound) || !errors.Is(s.Cause(), ErrRevoked) || !s.Gone() {
		t.Errorf("reported %v, Cause() = %v, Gone() = %v, want %v, %v and true",
			r.Err, s.Cause(), s.Gone(), rpctypes.ErrLeaseNotFound, ErrRevoked)
	}
	kept.renew(t)
	if err := s.Close(t.Context()); err != nil {
		t.Errorf("Close() = %v", err)
	}
}

func TestServerThatAllowsFewOperationsIsAskedForFewerKeys(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"max-txn-ops": 4})
	client := etcdtest.NewClient(t, m.Endpoint)
	s := startReal(t, client, Config{})
	for i := range 9 {
		name := fmt.Sprint("key/", i)
		put, err := client.Put(t.Context(), name, "")
		if err != nil {
			t.Fatal(err)
		}
		s.track(name, func() { t.Errorf("gone called for key %q", name) }).Joined(put.Header.Revision)
	}
	for range 2 {
		s.renew(t)
	}
	if most := s.most(); most != 3 { // 100, 50, 25, 12, 6
		t.Errorf("asks for %d keys, want 3", most)
	}
}

// What follows is about streams to a fake of etcd: serve is called for each, with its number from 1 on.

func TestAnswerAboutAnotherLeaseEndsTheStream(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		before int // renewals that are answered as they should be
		fails  bool
	}{
		"the first answer": {0, true},
		"a later one":      {2, false}, // what a stream that was there already does is not the renewal's failure
	} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, func(n int, asked <-chan int64, answer func(int64, int64)) error {
				answered := 0
				for id := range asked {
					if n == 1 && answered == test.before {
						id++
					}
					answer(id, 60)
					answered++
				}
				return nil
			})
			for range test.before {
				f.renew(t, 7)
			}
			_, err := f.try(t, 7)
			if (err != nil) != test.fails || err != nil && !strings.Contains(err.Error(), "was not asked for") {
				t.Errorf("renew() = %v after an answer about another lease, want an error: %v", err, test.fails)
			}
			f.renew(t, 7)
			f.calls.await(t, 2, 1)
		})
	}
}

func TestAnswerThatNobodyHasAskedForEndsTheStream(t *testing.T) {
	t.Parallel()
	f := serve(t, func(n int, asked <-chan int64, answer func(int64, int64)) error {
		for id := range asked {
			answer(id, 60)
			if n == 1 {
				answer(id, 60)
			}
		}
		return nil
	})
	f.renew(t, 7)
	f.calls.await(t, 1, 0)
	f.renew(t, 7)
	f.calls.await(t, 2, 1)
}

func TestRenewalsOfSeveralLeasesGetTheirOwnAnswers(t *testing.T) {
	t.Parallel()
	f := serve(t, func(_ int, asked <-chan int64, answer func(int64, int64)) error {
		for id := range asked {
			answer(id, 100+id)
		}
		return nil
	})
	var together sync.WaitGroup
	for id := range 50 {
		together.Go(func() {
			for range 10 {
				answer, err := f.try(t, clientv3.LeaseID(id))
				if err != nil || answer.ttl != int64(100+id) {
					t.Errorf("renewal of lease %x: %v, %v", id, answer, err)
				}
			}
		})
	}
	together.Wait()
	f.calls.await(t, 1, 1)
}

func TestStreamThatHasEndedSinceTheLastRenewalCostsNoAttempt(t *testing.T) {
	t.Parallel()
	for _, code := range []codes.Code{codes.OK, codes.Unavailable, codes.Unauthenticated, codes.Unknown} {
		t.Run(code.String(), func(t *testing.T) {
			f := serve(t, func(_ int, asked <-chan int64, answer func(int64, int64)) error {
				answer(<-asked, 60)
				<-asked
				return status.Error(code, "")
			})
			for range 3 {
				f.renew(t, 7)
			}
			f.calls.await(t, 3, 1)
		})
	}
}

// A second stream would be refused too.
func TestRefusedRenewalIsNotSentAgain(t *testing.T) {
	t.Parallel()
	f := serve(t, func(_ int, asked <-chan int64, answer func(int64, int64)) error {
		answer(<-asked, 60)
		<-asked
		return rpctypes.ErrGRPCPermissionDenied
	})
	f.renew(t, 7)
	if _, err := f.try(t, 7); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("renew() = %v, want %v", err, rpctypes.ErrPermissionDenied)
	}
	f.calls.await(t, 1, 0)
}

// etcd ends the stream because of one request, the oldest.
func TestRefusalIsForTheOldestRenewalAlone(t *testing.T) {
	t.Parallel()
	const denied, other = 1, 2
	f := serve(t, func(n int, asked <-chan int64, answer func(int64, int64)) error {
		if n == 1 {
			answer(<-asked, 60)
			<-asked
			<-asked
			return rpctypes.ErrGRPCPermissionDenied
		}
		for id := range asked {
			answer(id, 60)
		}
		return nil
	})
	f.renew(t, other)
	first := make(chan error, 1)
	go func() {
		_, err := f.try(t, denied)
		first <- err
	}()
	f.awaitSent(t, 1)
	f.renew(t, other)
	if err := await(t, first); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("renew() = %v, want %v", err, rpctypes.ErrPermissionDenied)
	}
}

func TestTTLOfZeroMeansThatThereIsNoSuchLease(t *testing.T) {
	t.Parallel()
	f := serve(t, func(_ int, asked <-chan int64, answer func(int64, int64)) error {
		for id := range asked {
			answer(id, 0)
		}
		return nil
	})
	for range 2 {
		if answer, err := f.try(t, 7); answer.ttl != 0 || err != nil {
			t.Errorf("renew() = %v, %v, want a TTL of 0 and no error", answer, err)
		}
	}
	f.calls.await(t, 1, 1) // which is no failure of the stream
}

// It may be slow and not dead: who has waited for less long goes on to wait.
func TestStreamThatIsLeftStillAnswersThoseWhoWait(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	f := serve(t, func(n int, asked <-chan int64, answer func(int64, int64)) error {
		for id := range asked {
			if n == 1 {
				<-release
			}
			answer(id, int64(n))
		}
		return nil
	})
	hasty, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := f.keeper.renew(hasty, 1)
		left <- err
	}()
	f.awaitSent(t, 1)
	type result struct {
		answer acknowledgement
		err    error
	}
	patient := make(chan result, 1)
	go func() {
		a, err := f.try(t, 2)
		patient <- result{a, err}
	}()
	f.awaitSent(t, 2)
	f.awaitAsked(t, 1)
	cancel()
	if err := await(t, left); !errors.Is(err, context.Canceled) {
		t.Errorf("renew() = %v, want %v", err, context.Canceled)
	}
	if answer, err := f.try(t, 1); err != nil || answer.ttl != 2 {
		t.Errorf("renew() = %v, %v, want an answer of the second stream", answer, err)
	}
	f.calls.await(t, 2, 2)
	close(release)
	if r := await(t, patient); r.err != nil || r.answer.ttl != 1 {
		t.Errorf("renew() = %v, %v, want an answer of the first stream", r.answer, r.err)
	}
	f.calls.await(t, 2, 1) // nobody waits for it any more
}

func TestEndpointThatDoesNotAnswerCostsOneAttempt(t *testing.T) {
	t.Parallel()
	for _, password := range []bool{false, true} {
		for turn := range 2 { // the endpoint whose turn it is after the failure is either
			t.Run(fmt.Sprintf("password %v turn %d", password, turn), func(t *testing.T) {
				var together atomic.Int64 // authentications
				options := []any{2}
				if password {
					options = append(options, &auth{check: func(ctx context.Context, n int64) {
						together.Add(1)
						for began := time.Now(); n > 1 && together.Load() < 3 && time.Since(began) < time.Second; {
							_ = retry.Sleep(ctx, time.Millisecond) // a password takes a while to check
						}
					}})
				}
				f := serve(t, func(_ int, asked <-chan int64, answer func(int64, int64)) error {
					for id := range asked {
						answer(id, 60)
					}
					return nil
				}, options...)
				next := func() { _, _ = f.keeper.client.AuthStatus(t.Context()) } // a request that takes a turn
				for f.calls.endpoints() < 2 {                                     // until both are connected
					next()
				}
				f.renew(t, 7)
				f.darken(f.calls.lastStream())
				for range turn {
					next()
				}
				dark := f.start(t, 7)
				f.awaitSent(t, 1)
				dark.giveUp(t)
				together.Store(0)
				f.renew(t, 7)
				f.calls.awaitOpen(t, 1)
			})
		}
	}
}

// A renewal that takes longer than an attempt is answered all the same, if each attempt does not begin anew.
func TestStreamThatHasNotAnsweredIsAskedAgainBesideAnother(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	f := serve(t, func(n int, asked <-chan int64, answer func(int64, int64)) error {
		for id := range asked {
			if n == 1 {
				<-release
				answer(id, 60)
			}
		}
		return nil
	})
	first := f.start(t, 7)
	f.awaitAsked(t, 1)
	first.giveUp(t)
	second := f.start(t, 7)
	f.awaitAsked(t, 2) // over the second stream; over the first it waits behind the first
	f.calls.await(t, 2, 2)
	close(release)
	if err := await(t, second.done); err != nil {
		t.Errorf("renew() = %v, want the answer of the first stream", err)
	}
	f.calls.await(t, 2, 1) // the other is not needed any more
}

func TestSeveralRenewalsThatFailOpenOneStream(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	f := serve(t, func(n int, asked <-chan int64, answer func(int64, int64)) error {
		for id := range asked {
			if n > 1 {
				<-release
				answer(id, 60)
			}
		}
		return nil
	})
	one, other := f.start(t, 1), f.start(t, 2)
	f.awaitAsked(t, 2)
	one.giveUp(t)
	one = f.start(t, 1)
	f.calls.await(t, 2, 2)
	other.giveUp(t)
	other = f.start(t, 2)
	f.awaitAsked(t, 2+2+1) // two more over the first stream and, over the second, one, behind which the other waits
	close(release)
	for _, r := range []*request{one, other} {
		if err := await(t, r.done); err != nil {
			t.Errorf("renew() = %v", err)
		}
	}
	f.calls.await(t, 2, 1)
}

func TestFewStreamsAreOpenWhileNoneAnswers(t *testing.T) {
	t.Parallel()
	for endpoints := range 3 {
		t.Run(fmt.Sprint(endpoints+1), func(t *testing.T) {
			f := serve(t, func(_ int, asked <-chan int64, _ func(int64, int64)) error {
				for range asked {
				}
				return nil
			}, endpoints+1)
			beside := min(2, endpoints+1)
			asked := 0
			for attempts := range 5 {
				open := min(1+attempts*beside, 2*beside)
				asked += open // over each
				r := f.start(t, 7)
				f.awaitAsked(t, int64(asked))
				f.calls.awaitOpen(t, open)
				r.giveUp(t)
			}
		})
	}
}

// It may be slow for the very reason that so many authenticate (etcd#15764).
func TestFewAuthenticationsAreUnderWayWhileNoneIsAnswered(t *testing.T) {
	t.Parallel()
	for endpoints, most := range []int{1, 3, 3} {
		t.Run(fmt.Sprint(endpoints+1), func(t *testing.T) {
			release := make(chan struct{})
			auth := &auth{check: func(ctx context.Context, n int64) {
				if n > 1 { // that of clientv3.New is answered
					_ = retry.Wait(ctx, release)
				}
			}}
			f := serve(t, func(_ int, asked <-chan int64, answer func(int64, int64)) error {
				for id := range asked {
					answer(id, 60)
				}
				return nil
			}, endpoints+1, auth)
			for attempts := range 5 {
				r := f.start(t, 7)
				want := most
				if attempts == 0 {
					want = 1
				}
				poll(t, fmt.Sprintf("%d authentications are under way", want), func() bool {
					return auth.asked.Load()-1 == int64(want)
				})
				r.giveUp(t)
			}
			if got := auth.asked.Load() - 1; got != int64(most) {
				t.Errorf("%d authentications are under way after 5 attempts, want %d", got, most)
			}
			close(release)
			f.renew(t, 7)
			f.calls.awaitOpen(t, 1)
		})
	}
}

// auth checks passwords.
type auth struct {
	pb.UnimplementedAuthServer
	asked atomic.Int64
	check func(ctx context.Context, n int64)
}

func (a *auth) Authenticate(ctx context.Context, _ *pb.AuthenticateRequest) (*pb.AuthenticateResponse, error) {
	a.check(ctx, a.asked.Add(1))
	return &pb.AuthenticateResponse{Header: &pb.ResponseHeader{}, Token: "token"}, nil
}

// A request is a renewal that is under way.
type request struct {
	cancel context.CancelFunc
	done   chan error
}

func (f *fake) start(t *testing.T, id clientv3.LeaseID) *request {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	r := &request{cancel: cancel, done: make(chan error, 1)}
	go func() {
		defer cancel()
		_, err := f.keeper.renew(ctx, id)
		r.done <- err
	}()
	return r
}

// giveUp ends the attempt before it is answered.
func (r *request) giveUp(t *testing.T) {
	t.Helper()
	r.cancel()
	if err := await(t, r.done); !errors.Is(err, context.Canceled) {
		t.Errorf("renew() = %v, want %v", err, context.Canceled)
	}
}

// A fake is a server of renewals, with a keeper of a client of it.
type fake struct {
	pb.UnimplementedLeaseServer
	serve  server
	n      atomic.Int64 // streams
	asked  atomic.Int64 // renewals
	dark   atomic.Value // the endpoint that does not answer any more
	calls  calls
	keeper *keeper
}

type server func(n int, asked <-chan int64, answer func(id, ttl int64)) error

// serve starts a fake. asked is closed when the stream ends; whoever serves returns then. The options are the number
// of the client's endpoints, 1 unless given, and who checks its password.
func serve(t *testing.T, serve server, options ...any) *fake {
	t.Helper()
	f := &fake{serve: serve}
	f.darken("")
	cfg := f.calls.config()
	endpoints := 1
	var passwords *auth
	for _, option := range options {
		switch o := option.(type) {
		case int:
			endpoints = o
		case *auth:
			passwords = o
			cfg.Username, cfg.Password = "user", "password"
		}
	}
	for range endpoints {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		endpoint := listener.Addr().String()
		server := grpc.NewServer(grpc.UnaryInterceptor(
			func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
				resp, err := handle(ctx, req)
				if f.dark.Load() == endpoint {
					<-ctx.Done()
				}
				return resp, err
			}))
		pb.RegisterLeaseServer(server, served{fake: f, endpoint: endpoint})
		if passwords != nil {
			pb.RegisterAuthServer(server, passwords)
		}
		go func() { _ = server.Serve(listener) }()
		t.Cleanup(server.Stop)
		cfg.Endpoints = append(cfg.Endpoints, endpoint)
	}
	f.keeper = keep(t, etcdtest.NewClientFrom(t, cfg))
	return f
}

// darken makes an endpoint answer nothing any more.
func (f *fake) darken(endpoint string) { f.dark.Store(endpoint) }

// served is a fake at one endpoint.
type served struct {
	*fake
	endpoint string
}

func (f served) LeaseKeepAlive(stream pb.Lease_LeaseKeepAliveServer) error {
	if md, _ := metadata.FromIncomingContext(stream.Context()); len(md.Get(rpctypes.MetadataRequireLeaderKey)) != 1 {
		return errors.New("a member without a raft leader is not asked to end the stream")
	}
	asked := make(chan int64)
	go func() {
		defer close(asked)
		for {
			req, err := stream.Recv()
			if err != nil {
				return
			}
			select {
			case asked <- req.ID:
				f.asked.Add(1)
			case <-stream.Context().Done():
				return
			}
		}
	}()
	return f.serve(int(f.n.Add(1)), asked, func(id, ttl int64) {
		if f.dark.Load() == f.endpoint {
			return
		}
		_ = stream.Send(&pb.LeaseKeepAliveResponse{Header: &pb.ResponseHeader{RaftTerm: 1}, ID: id, TTL: ttl})
	})
}

// renew wants a renewal to be answered.
func (f *fake) renew(t *testing.T, id clientv3.LeaseID) {
	t.Helper()
	answer, err := f.try(t, id)
	if want := (acknowledgement{60, 1}); err != nil || answer != want {
		t.Errorf("renewal of lease %x: %v, %v, want %v", id, answer, err, want)
	}
}

func (f *fake) try(t *testing.T, id clientv3.LeaseID) (acknowledgement, error) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return f.keeper.renew(ctx, id)
}

// awaitAsked waits until so many renewals have reached the fake.
func (f *fake) awaitAsked(t *testing.T, n int64) {
	t.Helper()
	poll(t, fmt.Sprintf("%d renewals were sent", n), func() bool { return f.asked.Load() == n })
}

// awaitSent waits until so many renewals of the present stream have no answer.
func (f *fake) awaitSent(t *testing.T, n int) {
	t.Helper()
	poll(t, fmt.Sprintf("%d renewals are under way", n), func() bool {
		f.keeper.mu.Lock()
		streams := slices.Clone(f.keeper.streams)
		f.keeper.mu.Unlock()
		if len(streams) != 1 {
			return false
		}
		st := streams[0]
		st.mu.Lock()
		defer st.mu.Unlock()
		return len(st.sent) == n
	})
}

// keep returns the client's keeper until the test ends, and waits for its streams then.
func keep(t *testing.T, client *clientv3.Client) *keeper {
	t.Helper()
	k := keeperOf(client)
	if k == nil {
		t.Fatal("the client has no stream for renewals")
	}
	t.Cleanup(func() { await(t, k.release()) })
	return k
}

// keepersOf is how many keepers a client has.
func keepersOf(client *clientv3.Client) int {
	keepers.mu.Lock()
	defer keepers.mu.Unlock()
	if keepers.of[client] == nil {
		return 0
	}
	return 1
}

// A real is a session with a lease and a key in a real etcd.
type realSession struct {
	*Session
	renewals chan Renewal
}

// startReal grants a lease that renews only when the test says so, unless cfg has a shorter TTL.
func startReal(t *testing.T, client *clientv3.Client, cfg Config) *realSession {
	t.Helper()
	s := &realSession{renewals: make(chan Renewal, 100)}
	if cfg.TTL == 0 {
		cfg.TTL = 10 * time.Minute
	}
	cfg.Renewal = func(r Renewal) { s.renewals <- r }
	var err error
	if s.Session, err = Grant(t.Context(), client, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil && client.Ctx().Err() == nil {
			t.Errorf("Close() = %v", err)
		}
	})
	name := fmt.Sprintf("key/%x", s.ID())
	k := s.track(name, func() { t.Errorf("gone called for key %q", name) })
	put, err := client.Put(t.Context(), name, "", clientv3.WithLease(s.ID()))
	if err != nil {
		t.Fatal(err)
	}
	k.Joined(put.Header.Revision)
	return s
}

// renew renews the lease now, and wants the first attempt to count.
func (s *realSession) renew(t *testing.T) {
	t.Helper()
	if r := s.tryRenew(t); r.Err != nil {
		t.Errorf("renewal: %v", r.Err)
	}
}

// tryRenew renews the lease now, and returns what is reported first.
func (s *realSession) tryRenew(t *testing.T) Renewal {
	t.Helper()
	poll(t, "no renewal is under way", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.cause != nil {
			t.Fatalf("the session is over: %v", s.cause)
		}
		if !s.due.Stop() {
			return false
		}
		s.due.Reset(0)
		return true
	})
	return await(t, s.renewals)
}

// startAuth makes etcd ask for passwords, and returns a client with the user root's.
func startAuth(t *testing.T, m *etcdtest.Member, calls *calls, endpoints ...string) *clientv3.Client {
	t.Helper()
	const root = "root"
	client := etcdtest.NewClient(t, m.Endpoint)
	if _, err := client.UserAdd(t.Context(), root, root); err != nil {
		t.Fatal(err)
	}
	if _, err := client.UserGrantRole(t.Context(), root, root); err != nil {
		t.Fatal(err)
	}
	if _, err := client.AuthEnable(t.Context()); err != nil {
		t.Fatal(err)
	}
	cfg := calls.config(endpoints...)
	cfg.Username, cfg.Password = root, root
	return etcdtest.NewClientFrom(t, cfg)
}

// calls is a [stats.Handler] that counts what a client sends for renewals.
type calls struct {
	end func() // called before a stream has ended

	authenticated atomic.Int64

	mu                 sync.Mutex
	opened, done, sent int
	streams            []string        // the endpoints of the streams
	seen               map[string]bool // endpoints
}

func (c *calls) config(endpoints ...string) clientv3.Config {
	return clientv3.Config{Endpoints: endpoints, DialOptions: []grpc.DialOption{grpc.WithStatsHandler(c)}}
}

type methodKey struct{}

func (c *calls) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, methodKey{}, info.FullMethodName)
}

func (c *calls) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if header, ok := s.(*stats.OutHeader); ok && header.RemoteAddr != nil {
		c.mu.Lock()
		if c.seen == nil {
			c.seen = make(map[string]bool)
		}
		c.seen[header.RemoteAddr.String()] = true
		c.mu.Unlock()
	}
	switch method := ctx.Value(methodKey{}); method {
	case "/etcdserverpb.Auth/Authenticate":
		if _, ok := s.(*stats.Begin); ok {
			c.authenticated.Add(1)
		}
		return
	case "/etcdserverpb.Lease/LeaseKeepAlive":
	default:
		return
	}
	if _, ok := s.(*stats.End); ok && c.end != nil {
		c.end()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch s := s.(type) {
	case *stats.Begin:
		c.opened++
	case *stats.End:
		c.done++
	case *stats.OutPayload:
		c.sent++
	case *stats.OutHeader:
		if s.RemoteAddr != nil {
			c.streams = append(c.streams, s.RemoteAddr.String())
		}
	}
}

func (c *calls) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (c *calls) HandleConn(context.Context, stats.ConnStats)                       {}

// counts is how many streams were opened, how many of them are open, and how many renewals were sent.
func (c *calls) counts() (opened, open, sent int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.opened, c.opened - c.done, c.sent
}

func (c *calls) want(t *testing.T, opened, open, sent int) {
	t.Helper()
	if gotOpened, gotOpen, gotSent := c.counts(); gotOpened != opened || gotOpen != open || gotSent != sent {
		t.Errorf("%d streams opened, %d open, %d renewals sent, want %d, %d and %d",
			gotOpened, gotOpen, gotSent, opened, open, sent)
	}
}

// await waits until so many streams were opened, and so many of them are open.
func (c *calls) await(t *testing.T, opened, open int) {
	t.Helper()
	poll(t, fmt.Sprintf("%d streams were opened and %d are open", opened, open), func() bool {
		gotOpened, gotOpen, _ := c.counts()
		return gotOpened == opened && gotOpen == open
	})
}

func (c *calls) awaitOpen(t *testing.T, open int) {
	t.Helper()
	poll(t, fmt.Sprintf("%d streams are open", open), func() bool {
		_, got, _ := c.counts()
		return got == open
	})
}

// endpoints is how many the client has sent anything to.
func (c *calls) endpoints() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.seen)
}

// lastStream is the endpoint of the last stream.
func (c *calls) lastStream() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.streams) == 0 {
		return ""
	}
	return c.streams[len(c.streams)-1]
}

// await waits for what c tells, or its end.
func await[T any](t *testing.T, c <-chan T) (value T) {
	t.Helper()
	select {
	case value = <-c:
	case <-time.After(patience):
		t.Fatalf("nothing has happened in %v", patience)
	}
	return value
}

// poll waits for what no event tells.
func poll(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for began := time.Now(); !holds(); time.Sleep(time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatalf("still not so after %v: %s", patience, what)
		}
	}
}

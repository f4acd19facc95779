package lease

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// The lease of most tests: a TTL of 15 s, so a margin of 3 s, and a renewal after 5 s.
const (
	ttl      = 15 * time.Second
	deadline = 12 * time.Second
	third    = 5 * time.Second
	attempt  = (deadline - third) / 3
)

func TestDeadlineCountsFromTheTimeTheGrantWasSent(t *testing.T) {
	const ms = time.Millisecond
	for name, test := range map[string]struct {
		ttl, margin    time.Duration
		asked, granted int64
		answer         time.Duration // how long it took
		deadline       time.Duration // after the grant was sent
	}{
		"margin is a fifth":         {15000 * ms, 0, 15, 15, 0, 12000 * ms},
		"answer is late":            {15000 * ms, 0, 15, 15, 4000 * ms, 12000 * ms},
		"answer is 1 ms in time":    {2000 * ms, 0, 2, 2, 1599 * ms, 1600 * ms},
		"margin as configured":      {15000 * ms, 1000 * ms, 15, 15, 0, 14000 * ms},
		"etcd raised the TTL":       {1000 * ms, 0, 1, 2, 0, 1600 * ms},
		"raised TTL, own margin":    {1000 * ms, 500 * ms, 1, 2, 0, 1500 * ms},
		"a fraction, is rounded up": {2500 * ms, 0, 3, 3, 0, 2400 * ms},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.onGrant = func(_ context.Context, _ int, l *granted) (*granted, error) {
				time.Sleep(test.answer)
				l.TTL = test.granted
				return l, nil
			}
			s := grant(t, e, Config{TTL: test.ttl, Margin: test.margin})
			e.wantDeadline(s, test.deadline)
			if got, want := s.TTL(), time.Duration(test.granted)*time.Second; got != want {
				t.Errorf("TTL() = %v, want %v", got, want)
			}
			if asked := e.log().asked; !slices.Equal(asked, []int64{test.asked}) {
				t.Errorf("asked for leases of %v s, want one of %d s", asked, test.asked)
			}
			e.wantEnd(s, test.deadline) // no renewal counts, since there is no key to read
		})
	}
}

func TestRenewalCountsFromTheTimeItWasSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = func(_ context.Context, _ int, a *ack) (*ack, error) {
			time.Sleep(1500 * time.Millisecond)
			a.TTL = 20 // what etcd says now is what counts; the margin is 4 s then
			return a, nil
		}
		e.onRead = takes[read](500 * time.Millisecond)
		s := start(t, e, Config{})
		e.waitUntil(third + 2*time.Second - 1)
		e.wantDeadline(s, deadline)
		e.waitUntil(third + 2*time.Second)
		e.wantDeadline(s, third+16*time.Second)
		want := []Renewal{{Lease: s.ID(), Took: 2 * time.Second, Deadline: s.Deadline()}}
		if got := e.log().renewals; !slices.Equal(got, want) {
			t.Errorf("reported %v, want %v", got, want)
		}
	})
}

func TestRenewsEveryThirdOfTheTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = func(_ context.Context, _ int, a *ack) (*ack, error) {
			time.Sleep(time.Second) // does not add up: the next third also counts from the sending
			return a, nil
		}
		s := start(t, e, Config{})
		e.waitUntil(time.Minute)
		var want []time.Duration
		for at := third; at <= time.Minute; at += third {
			want = append(want, at)
		}
		if got := e.log().sent; !slices.Equal(got, want) {
			t.Errorf("renewals sent at %v, want %v", got, want)
		}
		if !s.Valid() || s.Cause() != nil || ended(s.Context().Done()) {
			t.Errorf("Valid() = %v, Cause() = %v of a session that is renewed", s.Valid(), s.Cause())
		}
	})
}

func TestSessionEndsExactlyAtTheDeadline(t *testing.T) {
	for name, fault := range map[string]func(e *etcd){
		"renewals fail":             func(e *etcd) { e.onRenew = fails[ack](rpctypes.ErrNoLeader) },
		"renewals hang":             func(e *etcd) { e.onRenew = hangs },
		"renewals ignore their ctx": func(e *etcd) { e.onRenew = stuck[ack](e) },
		"reads fail":                func(e *etcd) { e.onRead = fails[read](rpctypes.ErrNoLeader) },
		"reads are not allowed":     func(e *etcd) { e.onRead = fails[read](rpctypes.ErrPermissionDenied) },
		"reads hang":                func(e *etcd) { e.onRead = hangs },
		"reads ignore their ctx":    func(e *etcd) { e.onRead = stuck[read](e) },
		"reads in another term":     func(e *etcd) { e.onRead = otherTerm },
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			fault(e)
			s := start(t, e, Config{})
			done := stockDone(s)
			e.waitUntil(deadline - 1)
			if ended(s.Context().Done()) || ended(done) || !s.Valid() || s.Cause() != nil {
				t.Errorf("over 1 ns before the deadline: %v", s.Cause())
			}
			e.waitUntil(deadline)
			if !ended(s.Context().Done()) || !ended(done) {
				t.Error("Context or Done have not ended at the deadline")
			}
			e.wantExpired(s)
		})
	}
}

// A timer may fire late; who asks is told the truth at once.
func TestValidAsksTheClocksAndDoesNotWaitForTheTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = hangs
		s := start(t, e, Config{})
		s.mu.Lock()
		s.timer.Stop()
		s.mu.Unlock()
		e.waitUntil(deadline - 1)
		if !s.Valid() {
			t.Error("not valid 1 ns before the deadline")
		}
		e.waitUntil(deadline)
		if s.Valid() || !ended(s.Context().Done()) {
			t.Error("valid at the deadline, or known not to be and still not ended")
		}
		e.wantExpired(s)
	})
}

func TestAnswerAtTheDeadlineOrLaterDoesNotCount(t *testing.T) {
	for name, late := range map[string]time.Duration{"at the deadline": 0, "just after it": 1, "long after it": time.Minute} {
		for what, slow := range map[string]func(e *etcd){
			"acknowledgement ": func(e *etcd) { e.onRenew = answersAt[ack](e, deadline+late) },
			"read ":            func(e *etcd) { e.onRead = answersAt[read](e, deadline+late) },
		} {
			bubble(t, what+name, func(t *testing.T) {
				e := newEtcd(t)
				slow(e)
				s := start(t, e, Config{})
				time.Sleep(deadline + late)
				if s.Valid() {
					t.Error("valid when the answer arrived")
				}
				e.wantExpired(s)
				time.Sleep(time.Second)
				e.wantExpired(s)
				if got := e.log().renewals; len(got) != 1 || !errors.Is(got[0].Err, ErrExpired) {
					t.Errorf("reported %v, want one renewal that failed with %v", got, ErrExpired)
				}
			})
		}
	}
}

// The wall clock passes the deadline in the middle of a renewal: no timer has fired yet when the
// answer arrives, and the new deadline would still lie ahead.
func TestDeadlineWinsOverARenewalThatIsAnsweredBeforeTheTimerFires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		var wall wall
		e.onRead = func(_ context.Context, _ int, r *read) (*read, error) {
			wall.jump(deadline - third)
			return r, nil
		}
		s := start(t, e, Config{Wall: wall.now})
		e.waitUntil(third)
		if !ended(s.Context().Done()) {
			t.Error("renewal counted after the deadline")
		}
		e.wantExpired(s)
		if got := e.log().renewals; len(got) != 1 || !errors.Is(got[0].Err, ErrExpired) {
			t.Errorf("reported %v, want one renewal that failed with %v", got, ErrExpired)
		}
	})
}

// The timer that ends the context counts from when it is set, not from the look at the clocks that said for how long.
func TestContextEndsInTimeThoughTheProcessIsStoppedAsItsTimerIsSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = func(ctx context.Context, _ int, _ *ack) (*ack, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		looks := 0
		s := start(t, e, Config{Wall: func() time.Time {
			now := time.Now()
			if e.at() == deadline-clockCheck {
				if looks++; looks == 2 { // the first is of checkClocks, whose timer has fired
					time.Sleep(clockCheck / 2)
				}
			}
			return now
		}})
		e.wantEnd(s, deadline)
		if looks != 2 {
			t.Errorf("%d looks at the clocks as the timer fired, want 2", looks)
		}
	})
}

func TestRenewalsDoNotOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		var under atomic.Int64
		e.onRenew = func(_ context.Context, _ int, a *ack) (*ack, error) {
			if under.Add(1) > 1 {
				t.Error("a renewal was sent while another was under way")
			}
			time.Sleep(third + time.Second/2) // longer than until the next one is due
			under.Add(-1)
			return a, nil
		}
		s := start(t, e, Config{})
		e.waitUntil(time.Minute - 1)
		if got := len(e.log().sent); got != 10 || !s.Valid() {
			t.Errorf("%d renewals sent, Valid() = %v, want one right after the other: 10 and true", got, s.Valid())
		}
	})
}

func TestNoGoroutineBetweenRenewals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		start(t, e, Config{})
		for at := third / 2; at < time.Minute; at += third {
			e.waitUntil(at)
			if got := goroutines("lease.(*Session)"); got != 0 {
				t.Errorf("%d goroutines at %v, want none", got, at)
			}
		}
	})
}

func TestHangingAttemptCostsAnAttemptAndNotTheLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = func(ctx context.Context, n int, a *ack) (*ack, error) {
			if n == 1 {
				return hangs(ctx, n, a)
			}
			return a, nil
		}
		s := start(t, e, Config{})
		e.waitUntil(third + attempt + attempt/16)
		log := e.log()
		if r := log.renewals; len(r) != 2 || r[0].Took != attempt || !errors.Is(r[0].Err, context.DeadlineExceeded) || r[1].Err != nil {
			t.Fatalf("reported %v, want a failure after %v and a success", r, attempt)
		}
		e.wantDeadline(s, log.sent[1]+deadline)
	})
}

func TestARenewalAndTwoRetriesFitBeforeTheDeadline(t *testing.T) {
	for name, test := range map[string]struct {
		ttl, attempt time.Duration
		least, most  int
	}{
		"TTL 2s":  {2 * time.Second, (1600*time.Millisecond - 2*time.Second/3) / 3, 3, 3},
		"TTL 15s": {15 * time.Second, attempt, 3, 3},
		"TTL 60s": {time.Minute, maxAttempt, 7, 8}, // no attempt waits longer than that, so more fit
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.ttl = int64(test.ttl / time.Second)
			e.onRenew = hangs
			s := start(t, e, Config{TTL: test.ttl})
			e.wantEnd(s, test.ttl*4/5)
			r := e.log().renewals
			if len(r) < test.least || len(r) > test.most {
				t.Errorf("%d attempts, want %d to %d", len(r), test.least, test.most)
			}
			for _, r := range r[:len(r)-1] { // the deadline cuts the last one short
				if r.Took != test.attempt {
					t.Errorf("an attempt took %v, want %v", r.Took, test.attempt)
				}
			}
		})
	}
}

func TestAcknowledgementOfADeposedLeaderDoesNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = func(ctx context.Context, n int, r *read) (*read, error) {
			if n <= 3 {
				return otherTerm(ctx, n, r)
			}
			return r, nil
		}
		s := start(t, e, Config{})
		e.waitUntil(third + attempt/2) // three pauses: up to 1/16, 1/8 and 1/4 of an attempt
		log := e.log()
		if len(log.sent) != 4 || len(log.reads) != 4 || len(log.renewals) != 4 {
			t.Fatalf("%d renewals and %d reads sent, %d reported, want 4 of each", len(log.sent), len(log.reads), len(log.renewals))
		}
		for i, r := range log.renewals[:3] {
			if got := r.Deadline.Sub(e.began); !errors.Is(r.Err, ErrRefused) || got != deadline {
				t.Errorf("renewal %d: %v, deadline %v, want %v and %v", i, r.Err, got, ErrRefused, deadline)
			}
			if pause, least := log.sent[i+1]-log.sent[i], attempt/32<<i; pause < least {
				t.Errorf("pause of %v after refused renewal %d, want %v at least", pause, i, least)
			}
		}
		e.wantDeadline(s, log.sent[3]+deadline)
	})
}

// The renewals may be refused for long, if etcd cannot agree on a leader. A key is gone all the same.
func TestRefusedRenewalSaysWhichKeysAreGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = otherTerm
		s := start(t, e, Config{})
		gone := 0
		s.track("candidate", func() { gone++ }).Joined(7)
		e.waitUntil(third)
		if gone != 1 {
			t.Errorf("gone called %d times, want 1", gone)
		}
		if r := e.log().renewals; len(r) != 1 || !errors.Is(r[0].Err, ErrRefused) {
			t.Errorf("reported %v, want one renewal that failed with %v", r, ErrRefused)
		}
	})
}

func TestFailedReadIsRepeatedWithoutAnotherRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = func(_ context.Context, n int, r *read) (*read, error) {
			if n <= 2 {
				return nil, rpctypes.ErrNoLeader
			}
			return r, nil
		}
		s := start(t, e, Config{})
		e.waitUntil(2*third - 1)
		log := e.log()
		if len(log.sent) != 1 || len(log.reads) != 3 {
			t.Errorf("%d renewals and %d reads sent, want 1 and 3", len(log.sent), len(log.reads))
		}
		r := log.renewals
		const least = 75 * time.Millisecond // pauses of 25 to 50 and of 50 to 100 ms
		if len(r) != 3 || !errors.Is(r[0].Err, rpctypes.ErrNoLeader) || r[1].Err == nil || r[2].Err != nil || r[2].Took < least {
			t.Errorf("reported %v, want two failures, and a success that took %v at least", r, least)
		}
		e.wantDeadline(s, third+deadline) // the S of the acknowledgement stands
	})
}

// The endpoint that it was sent to may have stopped to answer: the next is not to wait for a whole attempt.
func TestReadThatIsNotAnsweredIsSentAgainBesideIt(t *testing.T) {
	for name, test := range map[string]struct {
		ttl   time.Duration
		first time.Duration // until it is sent again, at most
	}{
		"after 250ms":              {ttl, 250 * time.Millisecond},
		"after a quarter of a try": {2 * time.Second, (1600*time.Millisecond - 2*time.Second/3) / 12},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.ttl = int64(test.ttl / time.Second)
			e.onRead = func(ctx context.Context, n int, r *read) (*read, error) {
				if n == 1 {
					return hangs(ctx, n, r)
				}
				return r, nil
			}
			s := start(t, e, Config{TTL: test.ttl})
			due := test.ttl / 3
			e.waitUntil(due + test.first)
			r := e.log().renewals
			if len(r) != 1 || r[0].Err != nil || r[0].Took < test.first/2 || r[0].Took > test.first {
				t.Errorf("reported %v, want one renewal that counted after %v", r, test.first)
			}
			e.wantDeadline(s, due+test.ttl*4/5)
		})
	}
}

func TestMeaninglessAnswersAreErrors(t *testing.T) {
	for name, mangle := range map[string]func(e *etcd){
		"no acknowledgement":         func(e *etcd) { e.onRenew = fails[ack](nil) },
		"TTL 0":                      func(e *etcd) { e.onRenew = mangled(func(a *ack) { a.TTL = 0 }) },
		"TTL below 0":                func(e *etcd) { e.onRenew = mangled(func(a *ack) { a.TTL = -1 }) },
		"acknowledgement, no header": func(e *etcd) { e.onRenew = mangled(func(a *ack) { a.ResponseHeader = nil }) },
		"no read":                    func(e *etcd) { e.onRead = fails[read](nil) },
		"read, no header":            func(e *etcd) { e.onRead = mangled(func(r *read) { r.Header = nil }) },
		"read, too few responses":    func(e *etcd) { e.onRead = mangled(func(r *read) { r.Responses = nil }) },
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			mangle(e)
			s := start(t, e, Config{})
			e.waitUntil(deadline)
			e.wantExpired(s)
			log := e.log()
			if len(log.sent)+len(log.reads) < 3 {
				t.Errorf("%d renewals and %d reads sent, want more tries", len(log.sent), len(log.reads))
			}
			for _, r := range log.renewals {
				if r.Err == nil {
					t.Errorf("a renewal counted: %v", r)
				}
			}
		})
	}
}

func TestGrantFails(t *testing.T) {
	for name, test := range map[string]struct {
		onGrant func(context.Context, int, *granted) (*granted, error)
		timeout time.Duration // of the caller
		want    error         // nil: any
		after   time.Duration
	}{
		"neither lease nor error": {fails[granted](nil), time.Minute, nil, 0},
		"lease 0, which is none":  {mangled(func(l *granted) { l.ID = clientv3.NoLease }), time.Minute, nil, 0},
		"TTL 0":                   {mangled(func(l *granted) { l.TTL = 0 }), time.Minute, nil, 0},
		"an error":                {fails[granted](rpctypes.ErrNoSpace), time.Minute, rpctypes.ErrNoSpace, 0},
		"no answer":               {hangs[granted], time.Minute, context.DeadlineExceeded, 5 * time.Second},
		"ctx ends":                {hangs[granted], time.Second, context.DeadlineExceeded, time.Second},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.onGrant = test.onGrant
			ctx, cancel := context.WithTimeout(t.Context(), test.timeout)
			defer cancel()
			s, err := Grant(ctx, e.client, Config{TTL: ttl})
			if s != nil || err == nil || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("Grant() = %v, %v, want the error %v", s, err, test.want)
			}
			if got := e.at(); got != test.after {
				t.Errorf("Grant returned after %v, want %v", got, test.after)
			}
		})
	}
}

// A resignation or a clean-up may be what needs the first election, after the session's end.
func TestElectionsShareOneStockSessionThatEndsWithTheirs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		s := start(t, e, Config{})
		for range 10 {
			s.Election("name/", "k", 1)
		}
		synctest.Wait()
		if got := goroutines("concurrency.NewSession"); got != 1 {
			t.Errorf("%d goroutines for the elections of one session, want 1", got)
		}
		done := stockDone(s)
		s.end(ErrClosed)
		synctest.Wait()
		if !ended(done) {
			t.Error("Done has not ended")
		}

		over := start(t, e, Config{})
		over.end(ErrClosed)
		done = stockDone(over)
		synctest.Wait()
		if !ended(done) {
			t.Error("Done of a session that was over before has not ended")
		}
	})
}

// A process that goes on after a pause may have the answer to a renewal before its timer fires.
func TestLeaseThatIsGoneAtTheDeadlineOrLaterHasExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.ttl = 16 // no look at the clocks comes with a renewal
		const ttl = 16 * time.Second
		var paused atomic.Int64 // for how long, as the wall clock alone has noticed
		e.onRenew = func(context.Context, int, *ack) (*ack, error) {
			paused.Store(int64(ttl))
			e.put("k", 0) // it has gone with its lease
			return nil, rpctypes.ErrLeaseNotFound
		}
		s := start(t, e, Config{Wall: func() time.Time { return time.Now().Add(time.Duration(paused.Load())) }})
		e.wantEnd(s, ttl/3)
		if !errors.Is(s.Cause(), ErrExpired) || !s.Gone() {
			t.Errorf("Cause() = %v, Gone() = %v, want %v and true", s.Cause(), s.Gone(), ErrExpired)
		}
	})
}

func TestRevokedLeaseEndsTheSessionAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = func(context.Context, int, *ack) (*ack, error) {
			e.put("k", 0)
			return nil, rpctypes.ErrLeaseNotFound
		}
		s := start(t, e, Config{})
		e.wantEnd(s, third)
		if s.Valid() || !errors.Is(s.Cause(), ErrRevoked) || !s.Gone() {
			t.Errorf("Valid() = %v, Cause() = %v, Gone() = %v, want false, %v and true", s.Valid(), s.Cause(), s.Gone(), ErrRevoked)
		}
		if err := s.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		if log := e.log(); len(log.revoked) != 0 || len(log.sent) != 1 {
			t.Errorf("%d renewals sent and %d requests to revoke, want 1 and none: there is no such lease", len(log.sent), len(log.revoked))
		}
	})
}

// An etcd leader that was deposed does not know a lease that its successor has granted.
func TestLeaseIsNotTakenForGoneWhileItsKeyIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = func(_ context.Context, n int, a *ack) (*ack, error) {
			if n <= 2 {
				return nil, rpctypes.ErrLeaseNotFound
			}
			return a, nil
		}
		s := start(t, e, Config{})
		e.waitUntil(third + attempt/2)
		log := e.log()
		if len(log.renewals) != 3 || !errors.Is(log.renewals[0].Err, ErrRefused) || !errors.Is(log.renewals[1].Err, ErrRefused) || log.renewals[2].Err != nil {
			t.Fatalf("reported %v, want two that do not count and one that does", log.renewals)
		}
		if !s.Valid() || s.Gone() {
			t.Errorf("Valid() = %v, Gone() = %v, want true and false", s.Valid(), s.Gone())
		}
		e.wantDeadline(s, log.sent[2]+deadline)
	})
}

func TestLeaseThatCannotBeLookedForExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew, e.onRead = fails[ack](rpctypes.ErrLeaseNotFound), hangs
		s := start(t, e, Config{})
		e.wantEnd(s, deadline)
		e.wantExpired(s)
		if s.Gone() {
			t.Error("the lease is taken for gone")
		}
	})
}

func TestWhatShowsThatALeaseIsGone(t *testing.T) {
	held := func() *Key { return &Key{rev: 7} }
	joining := func() *Key { return &Key{} }
	orphan := func() *Key { return &Key{state: abandoned} }
	type keys = []*Key
	for name, test := range map[string]struct {
		keys       keys // that were read
		revs       []int64
		read, term uint64
		unread     keys
		want       bool
	}{
		"its key is there":                    {keys{held()}, []int64{7}, 2, 2, nil, false},
		"its key is not there":                {keys{held()}, []int64{0}, 2, 2, nil, true},
		"another key is in its place":         {keys{held()}, []int64{8}, 2, 2, nil, true},
		"one of its keys is there":            {keys{held(), held()}, []int64{0, 7}, 2, 2, nil, false},
		"its key is not there, term unknown":  {keys{held()}, []int64{0}, 2, 0, nil, true},
		"its key is not there, another term":  {keys{held()}, []int64{0}, 2, 1, nil, true},
		"one was not read":                    {keys{held()}, []int64{0}, 2, 2, keys{held()}, true},
		"one was not read, another term":      {keys{held()}, []int64{0}, 2, 1, keys{held()}, false},
		"one is being put, another term":      {keys{held()}, []int64{0}, 2, 1, keys{joining()}, false},
		"one is being looked for":             {keys{held()}, []int64{0}, 2, 1, keys{orphan()}, true},
		"nothing was put yet":                 {keys{joining()}, []int64{0}, 2, 2, nil, true},
		"nothing was put yet, another term":   {keys{joining()}, []int64{0}, 2, 1, nil, false},
		"nothing was put yet, term unknown":   {keys{joining()}, []int64{0}, 2, 0, nil, false},
		"a join has arrived, not its answer":  {keys{joining()}, []int64{9}, 2, 1, nil, false},
		"an abandoned key, of a term unknown": {keys{orphan()}, []int64{0}, 2, 0, nil, false},
	} {
		s := &Session{keys: make(map[string]*Key)}
		seen := sighting{term: test.read, revs: test.revs}
		for i, k := range append(slices.Clone(test.keys), test.unread...) {
			s.keys[fmt.Sprint(i)] = k
		}
		for _, k := range test.keys {
			seen.keys = append(seen.keys, reading{Key: k, rev: k.rev, abandoned: k.state == abandoned})
		}
		if got := s.lacks(seen, test.term); got != test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

// One key of the lease was resigned, another one put, and neither answer has come yet. A leader of etcd that was
// deposed says that there is no such lease.
func TestLeaseWhoseOnlyKeyIsBeingPutIsNotTakenForGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = func(_ context.Context, n int, a *ack) (*ack, error) {
			if n == 1 {
				return nil, rpctypes.ErrLeaseNotFound
			}
			return a, nil
		}
		s := grant(t, e, Config{})
		resigned, joining := s.track("x", func() {}), s.track("y", func() {})
		e.put("x", 1)
		resigned.Joined(1)
		e.waitUntil(third - 1)
		e.put("x", 0)
		e.put("y", 2)
		e.waitUntil(third)
		resigned.Drop()
		joining.Joined(2)
		e.waitUntil(third + attempt)
		if !s.Valid() || s.Gone() {
			t.Errorf("Cause() = %v, Gone() = %v of a lease that has a key", s.Cause(), s.Gone())
		}
	})
}

func TestWallClockThatIsSetForwardEndsTheSession(t *testing.T) {
	bubble(t, "as soon as it is asked", func(t *testing.T) {
		e := newEtcd(t)
		var wall wall
		s := start(t, e, Config{Wall: wall.now})
		time.Sleep(time.Second)
		wall.jump(deadline - time.Second - 1)
		if !s.Valid() {
			t.Error("not valid 1 ns before the deadline on the wall clock")
		}
		wall.jump(1)
		if s.Valid() || !ended(s.Context().Done()) {
			t.Error("valid at the deadline on the wall clock")
		}
		wall.jump(-time.Hour) // does not revive it
		e.wantExpired(s)
	})
	bubble(t, "within a second if it is not asked", func(t *testing.T) {
		e := newEtcd(t)
		var wall wall
		s := start(t, e, Config{Wall: wall.now})
		time.Sleep(2300 * time.Millisecond)
		wall.jump(time.Hour)
		e.wantEnd(s, 3*clockCheck)
		wall.jump(-time.Hour)
		e.wantExpired(s)
	})
	bubble(t, "earlier if not at once", func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = hangs
		var wall wall
		s := start(t, e, Config{Wall: wall.now})
		time.Sleep(2300 * time.Millisecond)
		const jump = 4*time.Second + 1
		wall.jump(jump)
		e.wantEnd(s, deadline-jump)
	})
}

func TestMonotonicClockGovernsWhenTheWallClockIsSetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = hangs
		var wall wall
		s := start(t, e, Config{Wall: wall.now})
		time.Sleep(time.Second)
		wall.jump(-time.Hour)
		e.wantEnd(s, deadline)
	})
}

func TestRenewalSaysWhichKeysAreGone(t *testing.T) {
	for name, test := range map[string]struct {
		joined, found int64 // create revisions
		dropped       bool
		want          int64
	}{
		"still there":             {joined: 7, found: 7, want: 0},
		"missing":                 {joined: 7, found: 0, want: 1},
		"another create revision": {joined: 7, found: 9, want: 1},
		"joined, as nobody knows": {joined: 0, found: 7, want: 0},
		"dropped":                 {joined: 7, found: 0, dropped: true, want: 0},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			s := grant(t, e, Config{})
			var gone atomic.Int64
			k := s.track("candidate", func() {
				s.Valid() // would block if a lock were held
				gone.Add(1)
			})
			if test.joined != 0 {
				k.Joined(test.joined)
			}
			e.put("candidate", test.found)
			if test.dropped {
				k.Drop()
				e.track(s, "other", 1) // a renewal must have something to read
			}
			e.waitUntil(third)
			if got := gone.Load(); got != test.want {
				t.Errorf("gone called %d times, want %d", got, test.want)
			}
			e.wantDeadline(s, third+deadline) // what became of a key is no matter of the lease
		})
	}
}

// A request without an answer may still put the key after it was abandoned, and more than once.
func TestAbandonedKeyIsDeletedWheneverItIsFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onDelete = func(_ context.Context, n int) error {
			if n == 1 {
				return rpctypes.ErrNoLeader
			}
			return nil
		}
		s := start(t, e, Config{})
		k := s.track("orphan", func() { t.Error("gone called for an abandoned key") })
		attemptUnanswered(t, k)
		k.Joined(5)
		k.Abandon()

		e.waitUntil(third) // it is not in etcd
		if got := e.log().deletes; len(got) != 0 {
			t.Errorf("deletions sent: %v, want none", got)
		}
		e.put("orphan", 7)             // with a create revision that nobody was told of
		e.waitUntil(2*third + attempt) // the first deletion fails
		if got, want := e.log().deletes, (orphan{"orphan", 7}); !slices.Equal(got, []orphan{want, want}) {
			t.Errorf("deletions sent: %v, want %v twice", got, want)
		}
		e.put("orphan", 9)
		e.waitUntil(3 * third)
		if e.revision("orphan") != 0 || e.revision("k") != 1 {
			t.Errorf("revisions of the abandoned key and the other one are %d and %d, want 0 and 1", e.revision("orphan"), e.revision("k"))
		}
	})
}

func TestRenewalReadsTheKeysInTurnIfOneRequestCannotReadAll(t *testing.T) {
	for name, test := range map[string]struct {
		keys int
		read time.Duration // how long it takes
	}{
		"a few more than one request reads": {keys: maxReads + 1},
		"two requests":                      {keys: 2 * maxReads},
		"three requests":                    {keys: 2*maxReads + 1},
		"reads are sent again beside":       {keys: 2 * maxReads, read: 400 * time.Millisecond},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.onRead = takes[read](test.read)
			s := grant(t, e, Config{})
			gone := make(map[string]int)
			for i := range test.keys {
				key := strconv.Itoa(i)
				e.track(s, key, 1)
			}
			renewals := (test.keys + maxReads - 1) / maxReads
			for round := range 3 {
				clear(gone)
				s.mu.Lock()
				for name, k := range s.keys { // who learns that the key is gone learns that it was read
					k.gone = func() { gone[name]++ }
					k.rev = 2
				}
				s.mu.Unlock()
				e.waitUntil(time.Duration((round+1)*renewals)*third + 2*test.read)
				if len(gone) != test.keys {
					t.Errorf("%d renewals have read %d of %d keys", renewals, len(gone), test.keys)
				}
			}
			for _, keys := range e.log().reads {
				slices.Sort(keys)
				if got := len(slices.Compact(slices.Clone(keys))); len(keys) != maxReads || got != maxReads {
					t.Errorf("read %d keys, %d different ones, want %d", len(keys), got, maxReads)
				}
			}
		})
	}
}

// A key that was not put yet may turn out to be one that may not be read.
func TestKeysThatHaveJoinedAreReadRatherThanOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		s := grant(t, e, Config{})
		for i := range 20 {
			s.track(strconv.Itoa(i), func() {})
		}
		k := e.track(s, "joined", 1)
		e.waitUntil(third)
		k.Drop()
		e.waitUntil(2 * third)
		reads := e.log().reads
		if len(reads) != 2 || !slices.Equal(reads[0], []string{"joined"}) || len(reads[1]) != 2 || reads[1][0] == "joined" {
			t.Errorf("read %v, want the joined key and then, once it was dropped, one of the others before it", reads)
		}
		e.wantDeadline(s, 2*third+deadline)
	})
}

func TestUnreadableKeyDoesNotCostTheOthersTheirLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = func(_ context.Context, _ int, r *read) (*read, error) {
			if len(r.Responses) > 1 {
				return nil, rpctypes.ErrPermissionDenied
			}
			return r, nil
		}
		s := start(t, e, Config{})
		e.track(s, "a", 1)
		e.track(s, "b", 1)
		e.waitUntil(third) // all at once
		log := e.log()
		if len(log.sent) != 1 || len(log.reads) != 2 || len(log.reads[0]) != 3 || len(log.reads[1]) != 1 {
			t.Errorf("%d renewals sent and %v read, want one renewal, three keys, and one of them", len(log.sent), log.reads)
		}
		e.wantDeadline(s, third+deadline)
	})
}

func TestRenewalFailsIfNotOneKeyMayBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = fails[read](rpctypes.ErrPermissionDenied)
		s := start(t, e, Config{})
		e.waitUntil(third)
		log := e.log()
		if r := log.renewals; len(r) != 1 || !errors.Is(r[0].Err, rpctypes.ErrPermissionDenied) || len(log.reads) != 2 {
			t.Errorf("reported %v after %d reads, want %v after 2", r, len(log.reads), rpctypes.ErrPermissionDenied)
		}
		e.wantDeadline(s, deadline)
		e.waitUntil(third + attempt/16) // the next attempt may read another key
		if got := e.log().sent; len(got) != 2 {
			t.Errorf("renewals sent at %v, want a second one after a pause", got)
		}
	})
}

func TestRenewalCountsOnlyOnceThereIsAKeyToRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		s := grant(t, e, Config{})
		e.waitUntil(deadline - attempt)
		e.wantDeadline(s, deadline)
		if log := e.log(); len(log.sent) != 1 || len(log.reads) != 0 {
			t.Errorf("%d renewals and %d reads sent, want 1 and none", len(log.sent), len(log.reads))
		}
		e.track(s, "k", 1)
		e.waitUntil(deadline)
		if log := e.log(); !s.Valid() || len(log.reads) == 0 {
			t.Errorf("Valid() = %v after %d reads of a key that has joined since", s.Valid(), len(log.reads))
		}
	})
}

// An etcd whose disk is slow behaves so: neither renewals nor reads wait for the disk, deletions do.
func TestDeletingAbandonedKeysDoesNotHoldUpRenewals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onDelete = func(ctx context.Context, _ int) error {
			<-ctx.Done()
			return ctx.Err()
		}
		s := start(t, e, Config{})
		for i := range 6 { // an attempt each is more than what is left of the TTL
			e.track(s, strconv.Itoa(i), 7).Abandon()
		}
		e.waitUntil(time.Minute)
		if !s.Valid() {
			t.Errorf("%v, renewals sent at %v although etcd answered them all", s.Cause(), e.log().sent)
		}
	})
}

func TestClosedClientEndsTheSessionAtOnce(t *testing.T) {
	for name, end := range map[string]func(e *etcd){
		"closed":             func(e *etcd) { _ = e.client.Close() },
		"its context ended":  func(e *etcd) { e.cancel() },
		"a renewal is stuck": func(e *etcd) { e.waitUntil(third); e.cancel() },
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.onRenew = stuck[ack](e)
			s := start(t, e, Config{})
			done := stockDone(s)
			end(e)
			e.wantEnd(s, e.at())
			// Nothing else is waited for: who learns that the session is over asks why.
			if cause := s.Cause(); !errors.Is(cause, ErrClosed) || s.Valid() {
				t.Errorf("Context has ended but Cause() = %v, Valid() = %v", cause, s.Valid())
			}
			synctest.Wait()
			if !ended(done) {
				t.Error("Done has not ended")
			}
		})
	}
}

func TestCloseEndsTheSessionAndThenRevokesOnce(t *testing.T) {
	for name, answer := range map[string]error{"revoked": nil, "gone already": rpctypes.ErrLeaseNotFound} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			s := start(t, e, Config{})
			e.onRevoke = func(context.Context, int) error {
				if s.Valid() || !ended(s.Context().Done()) {
					t.Error("etcd was told before the session had ended here")
				}
				return answer
			}
			for range 3 {
				if err := s.Close(t.Context()); err != nil {
					t.Errorf("Close() = %v", err)
				}
			}
			if !s.Gone() || !errors.Is(s.Cause(), ErrClosed) {
				t.Errorf("Gone() = %v, Cause() = %v, want true and %v", s.Gone(), s.Cause(), ErrClosed)
			}
			e.waitUntil(time.Minute)
			if log := e.log(); !slices.Equal(log.revoked, []clientv3.LeaseID{s.ID()}) || len(log.sent) != 0 {
				t.Errorf("revoked %v, renewals sent at %v, want the lease once and none", log.revoked, log.sent)
			}
		})
	}
}

// Any user may attach a key to a lease that has none any more, which those who may not write that key cannot revoke.
func TestLeaseThatMayNotBeRevokedIsLeftToExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRevoke = func(context.Context, int) error { return rpctypes.ErrPermissionDenied }
		k := lend(t, newPool(e), "k")
		k.Drop()
		if err := k.Session().Finish(t.Context()); err != nil || k.Session().Gone() {
			t.Errorf("Finish() = %v, Gone() = %v, want nil and false", err, k.Session().Gone())
		}
		e.waitUntil(time.Minute)
		if got := len(e.log().revoked); got != 1 {
			t.Errorf("%d requests to revoke, want 1", got)
		}
	})
}

func TestCloseMayBeRetriedAfterAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRevoke = func(ctx context.Context, n int) error {
			switch {
			case n == 1:
				return rpctypes.ErrAuthFailed
			case e.at() < 5*time.Second:
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		s := start(t, e, Config{})
		if err := s.Close(t.Context()); !errors.Is(err, rpctypes.ErrAuthFailed) || s.Gone() {
			t.Errorf("Close() = %v, Gone() = %v, want %v and false", err, s.Gone(), rpctypes.ErrAuthFailed)
		}
		if err := s.Close(t.Context()); !errors.Is(err, context.DeadlineExceeded) || e.at() != 5*time.Second {
			t.Errorf("Close() = %v after %v, want %v after 5s", err, e.at(), context.DeadlineExceeded)
		}
		for range 2 {
			if err := s.Close(t.Context()); err != nil {
				t.Errorf("Close() = %v", err)
			}
		}
		if got := len(e.log().revoked); got < 5 || got > 50 { // the second Close has sent several
			t.Errorf("%d requests to revoke", got)
		}
	})
}

func TestCloseAsksAgainWhatWasNotAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRevoke = func(ctx context.Context, n int) error {
			if n == 1 {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		s := start(t, e, Config{})
		if err := s.Close(t.Context()); err != nil || !s.Gone() {
			t.Errorf("Close() = %v, Gone() = %v", err, s.Gone())
		}
	})
}

func TestCloseReturnsWhenItsContextEnds(t *testing.T) {
	for name, fault := range map[string]func(e *etcd){
		"renewal ignores its ctx": func(e *etcd) { e.onRenew = stuck[ack](e) },
		"read ignores its ctx":    func(e *etcd) { e.onRead = stuck[read](e) },
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			fault(e)
			s := start(t, e, Config{})
			e.waitUntil(third)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			closed := make(chan error, 1)
			go func() { closed <- s.Close(ctx) }()
			e.waitUntil(third + time.Second)
			select {
			case err := <-closed:
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Close() = %v, want %v", err, context.DeadlineExceeded)
				}
			default:
				t.Error("Close goes on after the end of its context")
			}
			e.release()
			if err := s.Close(t.Context()); err != nil {
				t.Errorf("Close() = %v once the request was answered", err)
			}
		})
	}
}

func TestCloseWaitsForTheRenewalUnderWay(t *testing.T) {
	refuses := func(e *etcd) {
		e.onRevoke = func(context.Context, int) error { return rpctypes.ErrAuthFailed }
	}
	for name, test := range map[string]struct {
		hold, revoke func(e *etcd)
		want         error
	}{
		"renewal":                 {func(e *etcd) { e.onRenew = stuck[ack](e) }, func(*etcd) {}, nil},
		"read":                    {func(e *etcd) { e.onRead = stuck[read](e) }, func(*etcd) {}, nil},
		"sweep":                   {func(e *etcd) { e.onDelete = func(context.Context, int) error { <-e.released; return nil } }, func(*etcd) {}, nil},
		"though it cannot revoke": {func(e *etcd) { e.onRenew = stuck[ack](e) }, refuses, rpctypes.ErrAuthFailed},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			test.hold(e)
			test.revoke(e)
			s := start(t, e, Config{})
			e.track(s, "orphan", 7).Abandon()
			e.waitUntil(third)
			closed := make(chan error, 1)
			go func() { closed <- s.Close(t.Context()) }()
			e.waitUntil(time.Minute)
			select {
			case err := <-closed:
				t.Errorf("Close() = %v before the renewal had returned", err)
			default:
				e.release()
				if err := <-closed; !errors.Is(err, test.want) {
					t.Errorf("Close() = %v, want %v", err, test.want)
				}
			}
		})
	}
}

// A session that ends in the very moment in which a renewal is to begin, or has just been made, is
// what both may take for theirs to tell of.
func TestRenewalsStopOnceWheneverTheSessionEnds(t *testing.T) {
	for name, test := range map[string]struct {
		at, took time.Duration // the end; each renewal
	}{
		"before the first renewal":    {third / 2, 0},
		"when the first is due":       {third, 0},
		"in the middle of one":        {third + time.Second, 2 * time.Second},
		"when one has been made":      {third + 2*time.Second, 2 * time.Second},
		"between renewals":            {third + third/2, 0},
		"when a later one is due":     {3 * third, 0},
		"when one is due and another": {3 * third, third},
	} {
		t.Run(name, func(t *testing.T) {
			// Which of two things that happen together comes first is left to chance. Each try has a bubble of its own, since
			// the race detector does not survive too many timers in one (golang/go#78156).
			for range 100 {
				synctest.Test(t, func(t *testing.T) {
					e := newEtcd(t)
					e.onRenew = func(_ context.Context, _ int, a *ack) (*ack, error) {
						time.Sleep(test.took)
						return a, nil
					}
					s := start(t, e, Config{})
					time.Sleep(test.at)
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					var closes sync.WaitGroup
					for range 3 {
						closes.Go(func() {
							if err := s.Close(ctx); err != nil {
								t.Errorf("Close() = %v", err)
							}
						})
					}
					closes.Wait()
					cancel()
					if waited := e.at() - test.at; waited > test.took {
						t.Errorf("Close returned after %v, and no renewal took longer than %v", waited, test.took)
					}
					sent := len(e.log().sent)
					e.waitUntil(2 * time.Minute)
					if got := len(e.log().sent); got != sent || !ended(s.done) {
						t.Errorf("%d renewals sent after Close", got-sent)
					}
				})
			}
		})
	}
}

func TestRenewalThatCloseCutsShortIsNotReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = hangs
		s := start(t, e, Config{})
		e.waitUntil(third + time.Second)
		if err := s.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		e.waitUntil(time.Minute)
		if log := e.log(); len(log.sent) != 1 || len(log.renewals) != 0 {
			t.Errorf("%d renewals sent, reported %v, want 1 and none", len(log.sent), log.renewals)
		}
	})
}

// clientv3's KeepAliveOnce repeats what fails at once for as long as its context has no error.
func TestRenewalThatTheClientRepeatsIsPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		var tries atomic.Int64
		e.onRenew = func(ctx context.Context, _ int, _ *ack) (*ack, error) {
			for range 1000 { // without pauses the fake time would stand still
				tries.Add(1)
				if err := ctx.Err(); err != nil {
					return nil, err
				}
			}
			t.Error("spins")
			return nil, rpctypes.ErrNoLeader
		}
		start(t, e, Config{})
		e.waitUntil(third + attempt)
		if r := e.log().renewals; len(r) != 1 || r[0].Took != attempt {
			t.Errorf("reported %v, want one attempt of %v", r, attempt)
		}
		if got := tries.Load(); got < 4 || got > 9 {
			t.Errorf("%d tries in one attempt, want about 8", got)
		}
	})
}

// The fakes.

type (
	granted = clientv3.LeaseGrantResponse
	ack     = clientv3.LeaseKeepAliveResponse
	read    = clientv3.TxnResponse
)

func bubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

func ended(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// goroutines is how many run in a function, or were started by it.
func goroutines(function string) (n int) {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for stack := range bytes.SplitSeq(stacks, []byte("\n\n")) {
		if bytes.Contains(stack, []byte(function)) {
			n++
		}
	}
	return n
}

// stockDone is what the elections of the session see of it.
func stockDone(s *Session) <-chan struct{} {
	s.Election("name/", "k", 1)
	return s.stock.Done()
}

// wall is a wall clock that can be set.
type wall struct{ offset atomic.Int64 }

func (w *wall) now() time.Time       { return time.Now().Add(time.Duration(w.offset.Load())) }
func (w *wall) jump(d time.Duration) { w.offset.Add(int64(d)) }

// etcd is a fake of one, with a client. A test that wants it to behave otherwise sets one of the on
// functions, which get the number of the request, from 1 on, and the answer that would be given.
type etcd struct {
	clientv3.Lease // nil: what the fake does not have panics
	clientv3.KV

	t        *testing.T
	client   *clientv3.Client
	cancel   context.CancelFunc // ends the context behind the client's
	began    time.Time
	ttl      int64  // that it grants
	denied   string // a key that may not be read
	released chan struct{}
	release  func() // lets stuck requests go

	onGrant  func(context.Context, int, *granted) (*granted, error)
	onRenew  func(context.Context, int, *ack) (*ack, error)
	onRead   func(context.Context, int, *read) (*read, error)
	onDelete func(context.Context, int) error
	onRevoke func(context.Context, int) error

	mu      sync.Mutex
	revs    map[string]int64   // create revision by key
	granted []clientv3.LeaseID // leases
	puts    [][]clientv3.Cmp   // the comparisons of each put
	got     requests
}

// orphan is a key without an owner, with its create revision.
type orphan struct {
	name string
	rev  int64
}

// requests are what the fake was sent, and what the session reported.
type requests struct {
	asked    []int64         // TTLs of grants
	sent     []time.Duration // renewals: when, since the fake began
	reads    [][]string      // keys
	deletes  []orphan
	revoked  []clientv3.LeaseID
	renewals []Renewal
}

func newEtcd(t *testing.T) *etcd {
	e := &etcd{t: t, began: time.Now(), ttl: int64(ttl / time.Second), revs: make(map[string]int64), released: make(chan struct{})}
	e.release = sync.OnceFunc(func() { close(e.released) })
	var ctx context.Context
	ctx, e.cancel = context.WithCancel(context.Background())
	t.Cleanup(e.cancel)
	e.client = clientv3.NewCtxClient(ctx)
	e.client.Lease, e.client.KV = e, e
	return e
}

// grant is Grant, with the TTL of most tests unless cfg has one, of a lease without keys.
func grant(t *testing.T, e *etcd, cfg Config) *Session {
	t.Helper()
	if cfg.TTL == 0 {
		cfg.TTL = ttl
	}
	told := cfg.Renewal
	cfg.Renewal = func(r Renewal) {
		e.mu.Lock()
		e.got.renewals = append(e.got.renewals, r)
		e.mu.Unlock()
		if told != nil {
			told(r)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel() // bounds the grant, not the session
	s, err := Grant(ctx, e.client, cfg)
	if err != nil {
		t.Fatalf("Grant() = %v", err)
	}
	t.Cleanup(func() {
		e.release()
		s.end(ErrClosed)
		<-s.done
	})
	return s
}

// start is grant, and a key "k" of the lease.
func start(t *testing.T, e *etcd, cfg Config) *Session {
	t.Helper()
	s := grant(t, e, cfg)
	e.track(s, "k", 1)
	return s
}

func (e *etcd) track(s *Session, key string, rev int64) *Key {
	e.put(key, rev)
	k := s.track(key, func() { e.t.Errorf("gone called for key %q", key) })
	k.Joined(rev)
	return k
}

// attemptUnanswered sends a request that puts the key, of which nobody learns whether it did.
func attemptUnanswered(t *testing.T, k *Key) {
	t.Helper()
	_, err := Attempt(t.Context(), k, func(context.Context) (struct{}, error) { return struct{}{}, rpctypes.ErrNoLeader })
	if !errors.Is(err, rpctypes.ErrNoLeader) {
		t.Errorf("Attempt() = %v, want %v", err, rpctypes.ErrNoLeader)
	}
}

func (e *etcd) at() time.Duration { return time.Since(e.began) }

// waitUntil blocks until d after the beginning, and until what happens then has happened.
func (e *etcd) waitUntil(d time.Duration) {
	time.Sleep(d - e.at())
	synctest.Wait()
}

// log returns what has happened so far.
func (e *etcd) log() requests {
	synctest.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.got
}

func (e *etcd) wantDeadline(s *Session, want time.Duration) {
	e.t.Helper()
	if got := s.Deadline().Sub(e.began); got != want {
		e.t.Errorf("Deadline is %v after the beginning, want %v", got, want)
	}
}

// wantEnd waits for the end of the session.
func (e *etcd) wantEnd(s *Session, want time.Duration) {
	e.t.Helper()
	select {
	case <-s.Context().Done():
	case <-time.After(time.Hour):
	}
	if got := e.at(); got != want {
		e.t.Errorf("session ended after %v, want %v", got, want)
	}
}

// wantExpired wants a session that has ended at the deadline of its grant.
func (e *etcd) wantExpired(s *Session) {
	e.t.Helper()
	synctest.Wait()
	if s.Valid() || !errors.Is(s.Cause(), ErrExpired) {
		e.t.Errorf("Valid() = %v, Cause() = %v, want false and %v", s.Valid(), s.Cause(), ErrExpired)
	}
	e.wantDeadline(s, deadline)
}

func (e *etcd) put(key string, rev int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.revs[key] = rev
}

func (e *etcd) revision(key string) int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.revs[key]
}

// record checks and records a request, and returns its number.
func record[T any](ctx context.Context, e *etcd, requests *[]T, request T) int {
	md, _ := metadata.FromOutgoingContext(ctx)
	_, bounded := ctx.Deadline()
	if leader := md.Get(rpctypes.MetadataRequireLeaderKey); !bounded || len(leader) != 1 {
		e.t.Errorf("request %v has a deadline: %v, requires a raft leader: %v", request, bounded, leader)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	*requests = append(*requests, request)
	return len(*requests)
}

func (e *etcd) Grant(ctx context.Context, ttl int64) (*granted, error) {
	n := record(ctx, e, &e.got.asked, ttl)
	l := &granted{ID: clientv3.LeaseID(100 + n), TTL: e.ttl}
	var err error
	if e.onGrant != nil {
		l, err = e.onGrant(ctx, n, l)
	}
	if err == nil && l != nil {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.granted = append(e.granted, l.ID)
	}
	return l, err
}

func (e *etcd) KeepAliveOnce(ctx context.Context, id clientv3.LeaseID) (*ack, error) {
	n := record(ctx, e, &e.got.sent, e.at())
	a := &ack{ResponseHeader: &etcdserverpb.ResponseHeader{RaftTerm: 1}, ID: id, TTL: e.ttl}
	if e.onRenew == nil {
		return a, nil
	}
	return e.onRenew(ctx, n, a)
}

func (e *etcd) Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	n := record(ctx, e, &e.got.revoked, id)
	if e.onRevoke == nil {
		return &clientv3.LeaseRevokeResponse{}, nil
	}
	return nil, e.onRevoke(ctx, n)
}

func (e *etcd) Close() error { return nil } // for clientv3.Client.Close

func (e *etcd) Txn(ctx context.Context) clientv3.Txn { return &txn{e: e, ctx: ctx} }

// txn either reads keys, or deletes one that has a certain create revision, or puts one that nobody reads.
type txn struct {
	clientv3.Txn
	e   *etcd
	ctx context.Context
	ifs []clientv3.Cmp
	ops []clientv3.Op
}

func (x *txn) If(ifs ...clientv3.Cmp) clientv3.Txn  { x.ifs = ifs; return x }
func (x *txn) Then(ops ...clientv3.Op) clientv3.Txn { x.ops = ops; return x }

func (x *txn) Commit() (*read, error) {
	switch {
	case x.ops[0].IsDelete():
		return x.commitDelete()
	case x.ops[0].IsPut():
		x.e.mu.Lock()
		defer x.e.mu.Unlock()
		x.e.puts = append(x.e.puts, x.ifs)
		return &read{Succeeded: true}, nil
	}
	var keys []string
	r := &read{Header: &etcdserverpb.ResponseHeader{RaftTerm: 1}, Succeeded: true}
	for _, op := range x.ops {
		key := string(op.KeyBytes())
		if !op.IsGet() || !op.IsKeysOnly() || op.IsSerializable() || len(x.ifs) != 0 {
			x.e.t.Errorf("%q is not read linearizably, the key only", key)
		}
		keys = append(keys, key)
		var kvs []*mvccpb.KeyValue
		if rev := x.e.revision(key); rev != 0 {
			kvs = append(kvs, &mvccpb.KeyValue{Key: op.KeyBytes(), CreateRevision: rev})
		}
		r.Responses = append(r.Responses, &etcdserverpb.ResponseOp{Response: &etcdserverpb.ResponseOp_ResponseRange{
			ResponseRange: &etcdserverpb.RangeResponse{Kvs: kvs},
		}})
	}
	n := record(x.ctx, x.e, &x.e.got.reads, keys)
	if slices.Contains(keys, x.e.denied) {
		return nil, rpctypes.ErrPermissionDenied
	}
	if x.e.onRead == nil {
		return r, nil
	}
	return x.e.onRead(x.ctx, n, r)
}

func (x *txn) commitDelete() (*read, error) {
	key := string(x.ops[0].KeyBytes())
	if len(x.ops) != 1 || len(x.ifs) != 1 || string(x.ifs[0].KeyBytes()) != key {
		x.e.t.Errorf("%q is deleted without a guard", key)
		return nil, errors.New("unknown transaction")
	}
	rev := x.ifs[0].GetCompare().GetCreateRevision()
	n := record(x.ctx, x.e, &x.e.got.deletes, orphan{key, rev})
	if x.e.onDelete != nil {
		if err := x.e.onDelete(x.ctx, n); err != nil {
			return nil, err
		}
	}
	if x.e.revision(key) == rev {
		x.e.put(key, 0)
	}
	return &read{}, nil
}

// What a request may meet: hangs until its context ends, is stuck whatever its context does, ...

func fails[T any](err error) func(context.Context, int, *T) (*T, error) {
	return func(context.Context, int, *T) (*T, error) { return nil, err }
}

func hangs[T any](ctx context.Context, _ int, _ *T) (*T, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func stuck[T any](e *etcd) func(context.Context, int, *T) (*T, error) {
	return func(_ context.Context, _ int, answer *T) (*T, error) {
		<-e.released
		return answer, nil
	}
}

// takes is to answer after d.
func takes[T any](d time.Duration) func(context.Context, int, *T) (*T, error) {
	return func(ctx context.Context, _ int, answer *T) (*T, error) {
		return answer, retry.Sleep(ctx, d)
	}
}

func answersAt[T any](e *etcd, d time.Duration) func(context.Context, int, *T) (*T, error) {
	return func(_ context.Context, _ int, answer *T) (*T, error) {
		time.Sleep(d - e.at())
		return answer, nil
	}
}

func mangled[T any](mangle func(*T)) func(context.Context, int, *T) (*T, error) {
	return func(_ context.Context, _ int, answer *T) (*T, error) {
		mangle(answer)
		return answer, nil
	}
}

func otherTerm(_ context.Context, _ int, r *read) (*read, error) {
	r.Header.RaftTerm++
	return r, nil
}

package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestPoolGrantsOneLeaseForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onGrant = answersAt[granted](e, soon)
		p := newPool(e)
		var wg sync.WaitGroup
		keys := make([]*Key, 10)
		for i := range keys {
			wg.Go(func() { keys[i] = lend(t, p, strconv.Itoa(i)) })
		}
		wg.Wait()
		s := keys[0].Session()
		for i, k := range keys {
			if k.Session() != s {
				t.Fatal("lent different sessions")
			}
			if want := fmt.Sprintf("%d/%x", i, s.ID()); k.Name() != want {
				t.Errorf("the key is %q, want %q", k.Name(), want)
			}
		}
		if got := e.log().asked; len(got) != 1 {
			t.Errorf("%d leases granted, want 1", len(got))
		}

		for i, k := range keys {
			if err := s.Finish(t.Context()); err != nil || !s.Valid() {
				t.Errorf("Finish() = %v, Valid() = %v while %d keys use the session", err, s.Valid(), len(keys)-i)
			}
			for range 2 { // the second is ignored
				k.Drop()
			}
		}
		for range 2 {
			if err := s.Finish(t.Context()); err != nil {
				t.Errorf("Finish() = %v", err)
			}
		}
		if got := e.log().revoked; !slices.Equal(got, []clientv3.LeaseID{s.ID()}) || s.Valid() {
			t.Errorf("revoked %v, want the lease once", got)
		}
	})
}

func TestFinishMayBeRetriedAfterAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRevoke = func(_ context.Context, n int) error {
			if n == 1 {
				return rpctypes.ErrAuthFailed
			}
			return nil
		}
		k := lend(t, newPool(e), "k")
		s := k.Session()
		k.Drop()
		if err := s.Finish(t.Context()); !errors.Is(err, rpctypes.ErrAuthFailed) {
			t.Errorf("Finish() = %v, want %v", err, rpctypes.ErrAuthFailed)
		}
		if err := s.Finish(t.Context()); err != nil || !s.Gone() {
			t.Errorf("Finish() = %v, Gone() = %v, want nil and true", err, s.Gone())
		}
	})
}

// It may be about to be closed.
func TestPoolDoesNotLendASessionThatAllHaveReturned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool(newEtcd(t))
		first := lend(t, p, "k")
		first.Drop()
		second := lend(t, p, "k")
		if first.Session() == second.Session() {
			t.Error("lent again after the last one had given it back")
		}
		second.Drop()
		for _, k := range []*Key{first, second} {
			if err := k.Session().Finish(t.Context()); err != nil || !k.Session().Gone() {
				t.Errorf("Finish() = %v, Gone() = %v", err, k.Session().Gone())
			}
		}
	})
}

func TestPoolReplacesASessionThatIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = hangs
		p := newPool(e)
		old := lend(t, p, "a")
		e.waitUntil(deadline)
		renewed := lend(t, p, "a")
		if old.Session() == renewed.Session() || !renewed.Session().Valid() || !errors.Is(old.Session().Cause(), ErrExpired) {
			t.Errorf("lent a session that is over: %v", renewed.Session().Cause())
		}
		old.Drop() // does not take the new one away
		if third := lend(t, p, "b"); third.Session() != renewed.Session() {
			t.Error("a session that is in use was replaced when an older one was given back")
		}
		if err := renewed.Session().Finish(t.Context()); err != nil || !renewed.Session().Valid() {
			t.Errorf("Finish() = %v, Valid() = %v of a session that is in use", err, renewed.Session().Valid())
		}
	})
}

// A timer may be late to end it.
func TestPoolDoesNotLendASessionWhoseDeadlineHasPassed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		var wall wall
		p := NewPool(e.client, Config{TTL: ttl, Wall: wall.now})
		old := lend(t, p, "a")
		wall.jump(deadline)
		if k := lend(t, p, "b"); k.Session() == old.Session() {
			t.Errorf("lent a session whose deadline was %v ago", time.Since(old.Session().Deadline()))
		}
	})
}

func TestTrackReturnsWhenItsContextEndsWhileAnotherIsGranting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onGrant = stuck[granted](e)
		p := newPool(e)
		granting := make(chan *Key, 1)
		go func() { granting <- lend(t, p, "a") }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		k, err := track(ctx, p, "b")
		if k != nil || !errors.Is(err, context.DeadlineExceeded) || e.at() != time.Second {
			t.Errorf("Track() = %v, %v after %v, want %v after 1s", k, err, e.at(), context.DeadlineExceeded)
		}
		e.release()
		k = <-granting
		k.Drop()
		if err := k.Session().Finish(t.Context()); err != nil || k.Session().Valid() {
			t.Errorf("Finish() = %v, Valid() = %v, want nil and false: the Track that failed is no user",
				err, k.Session().Valid())
		}
	})
}

func TestFailedGrantIsForTheOneWhoAskedAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onGrant = func(_ context.Context, n int, l *granted) (*granted, error) {
			time.Sleep(soon)
			if n == 1 {
				return nil, rpctypes.ErrPermissionDenied
			}
			return l, nil
		}
		p := newPool(e)
		failed := make(chan error, 1)
		go func() {
			_, err := track(t.Context(), p, "a")
			failed <- err
		}()
		synctest.Wait()
		lend(t, p, "b")
		if err := <-failed; !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("first Track() = %v, want %v", err, rpctypes.ErrPermissionDenied)
		}
		if got := e.log().asked; len(got) != 2 {
			t.Errorf("%d leases asked for, want 2", len(got))
		}
	})
}

func TestDeniedLeaseIsLentNoMoreAndTheNextToAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := newPool(e)
		first := lend(t, p, "a")
		var denied []*Key
		for i := range 2 * maxSessions { // they wait for etcd to say so
			denied = append(denied, lend(t, p, fmt.Sprint("k", i)))
		}
		var used *Session
		for i, k := range denied {
			if k.Session() != first.Session() {
				t.Fatalf("lent lease %x, want the first, %x", k.Session().ID(), first.Session().ID())
			}
			k.Session().Deny()
			k.Drop() // the name is free again
			next := lend(t, p, fmt.Sprint("k", i))
			if used == nil {
				used = next.Session()
			}
			if next.Session() == first.Session() || next.Session() != used {
				t.Fatalf("lent lease %x after it was denied, and %x to others", next.Session().ID(), used.ID())
			}
		}
		if !first.Session().Valid() {
			t.Error("the denied session has ended, though it is used")
		}
	})
}

// All campaigns wait for the same lease.
func TestGrantIsAskedForByOneAtATimeAndLessAndLessOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		var healed atomic.Bool
		e.onGrant = func(_ context.Context, _ int, l *granted) (*granted, error) {
			if !healed.Load() {
				return nil, rpctypes.ErrNoLeader
			}
			return l, nil
		}
		p := newPool(e)
		keys := make(chan *Key)
		const users = 500
		for i := range users {
			go func() {
				k, err := track(t.Context(), p, fmt.Sprint("k", i))
				if err != nil {
					t.Error(err)
				}
				keys <- k
			}()
		}
		time.Sleep(time.Minute)
		asked := len(e.log().asked)
		if most := 2*int(time.Minute/maxRetry) + 10; asked > most {
			t.Errorf("%d leases asked for in a minute, want %d at most", asked, most)
		}
		healed.Store(true)
		began := time.Now()
		for range users {
			cleanUp(t, <-keys)
		}
		if took := time.Since(began); took > 2*maxRetry+maxRetry { // the pause of one, and that of all
			t.Errorf("all had a lease %v after etcd was well again", took)
		}
		if n := len(e.log().asked); n != asked+1 {
			t.Errorf("%d leases asked for since, want 1", n-asked)
		}
	})
}

func TestCallersWhoGiveUpMakeNoPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onGrant = takes[granted](soon)
		p := newPool(e)
		for range 10 {
			ctx, cancel := context.WithTimeout(t.Context(), soon/2)
			if _, err := track(ctx, p, "k"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Track() = %v, want %v", err, context.DeadlineExceeded)
			}
			cancel()
		}
		began := time.Now()
		lend(t, p, "k")
		if took := time.Since(began); took != soon {
			t.Errorf("a lease took %v, want as long as etcd takes, %v", took, soon)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
}

// They all wait for one grant, which one of them asks for.
func TestEachUserLearnsWhyThereIsNoLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onGrant = fails[granted](rpctypes.ErrNoSpace)
		p := newPool(e)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		var users sync.WaitGroup
		for i := range 30 {
			users.Go(func() {
				loop := &retry.Loop{Client: p.client}
				name := func(clientv3.LeaseID) string { return fmt.Sprint("k", i) }
				if _, err := p.Track(ctx, loop, name, func() {}); err == nil || !errors.Is(loop.Last(), rpctypes.ErrNoSpace) {
					t.Errorf("Track() = %v, last failure %v, want %v", err, loop.Last(), rpctypes.ErrNoSpace)
				}
			})
		}
		users.Wait()
	})
}

func TestOldFailureIsNotWhatACampaignHasWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := newPool(e)
		last := func(answer func(context.Context, int, *granted) (*granted, error)) error {
			e.onGrant = answer
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			loop := &retry.Loop{Client: p.client}
			if _, err := p.Track(ctx, loop, func(clientv3.LeaseID) string { return "k" }, func() {}); err == nil {
				t.Error("Track() has succeeded without a grant")
			}
			return loop.Last()
		}
		if err := last(fails[granted](rpctypes.ErrNoSpace)); !errors.Is(err, rpctypes.ErrNoSpace) {
			t.Errorf("last failure %v, want %v", err, rpctypes.ErrNoSpace)
		}
		time.Sleep(time.Hour)
		if err := last(hangs); err == nil || errors.Is(err, rpctypes.ErrNoSpace) {
			t.Errorf("last failure %v, want that there was no answer", err)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
}

func TestSessionIsLentWhileAnotherIsAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := newPool(e)
		first := lend(t, p, "a")
		e.onGrant = hangs
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var second sync.WaitGroup
		second.Go(func() {
			if _, err := track(ctx, p, "a"); err == nil { // the name is in use on the first
				t.Error("Track() has succeeded without a grant")
			}
		})
		time.Sleep(time.Second / 2)
		began := time.Now()
		if k := lend(t, p, "b"); k.Session() != first.Session() || time.Since(began) != 0 {
			t.Errorf("lent another session, or after %v", time.Since(began))
		}
		second.Wait()
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
}

func TestPoolLendsAtMostEightSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := newPool(e)
		var keys []*Key
		for range maxSessions { // the name is in use on each session there is
			keys = append(keys, lend(t, p, "k"))
		}
		if k, err := track(t.Context(), p, "k"); k != nil || !errors.Is(err, ErrCrowded) {
			t.Errorf("Track() = %v, %v, want %v", k, err, ErrCrowded)
		}
		if got := len(e.log().asked); got != maxSessions || maxSessions != 8 {
			t.Errorf("%d leases granted, want 8", got)
		}
		lend(t, p, "other") // has room on each

		keys[3].Session().Revoked() // one of them ends
		k := lend(t, p, "k")
		if slices.ContainsFunc(keys, func(old *Key) bool { return old.Session() == k.Session() }) {
			t.Error("lent a session on which the name is in use")
		}
	})
}

func TestSessionWithTooManyAbandonedKeysTakesNoMoreNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := newPool(e)
		var keys []*Key
		for i := range maxAbandoned {
			keys = append(keys, lend(t, p, strconv.Itoa(i)))
			attemptUnanswered(t, keys[i])
		}
		s := keys[0].Session()
		for i, k := range keys {
			if other := lend(t, p, fmt.Sprint("before ", i)); other.Session() != s {
				t.Fatalf("the session takes no more names after %d were abandoned, want %d", i, maxAbandoned)
			}
			k.Abandon()
		}
		if other := lend(t, p, "after"); other.Session() == s {
			t.Errorf("the session takes a name although %d were abandoned", maxAbandoned)
		}
	})
}

// Nobody would use it, and the user's etcd would keep it for a TTL.
func TestGrantThatItsContextCutsShortIsRevokedWhenItsAnswerComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onGrant = answersAt[granted](e, 3*time.Second)
		p := newPool(e)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		k, err := track(ctx, p, "k")
		if k != nil || !errors.Is(err, context.DeadlineExceeded) || e.at() != time.Second {
			t.Errorf("Track() = %v, %v after %v, want %v after 1s", k, err, e.at(), context.DeadlineExceeded)
		}
		if err := p.Close(t.Context()); err != nil || e.at() < 3*time.Second {
			t.Errorf("Close() = %v after %v, want it to wait for the answers after 3s", err, e.at())
		}
		e.wantRevokedBut(nil)
	})
}

func TestOfTwoGrantsThatAreAnsweredOneIsUsedAndTheOtherRevoked(t *testing.T) {
	for name, at := range map[string][]time.Duration{ // when each is answered
		"the second first":      {2 * time.Second, time.Second},
		"the first first":       {time.Second, 2 * time.Second},
		"both at the same time": {time.Second, time.Second},
	} {
		bubble(t, name, func(t *testing.T) {
			for range 20 { // which of two that are answered together is used is left to chance
				e := newEtcd(t)
				e.onGrant = func(ctx context.Context, n int, l *granted) (*granted, error) {
					if n > len(at) {
						return hangs(ctx, n, l)
					}
					return answersAt[granted](e, at[n-1])(ctx, n, l)
				}
				p := newPool(e)
				k := lend(t, p, "k")
				if e.at() != time.Second || !k.Session().Valid() {
					t.Errorf("Track returned after %v, want 1s", e.at())
				}
				if err := p.Close(t.Context()); err != nil || e.at() < slices.Max(at) {
					t.Errorf("Close() = %v after %v, want it to wait for the other answer after %v", err, e.at(), slices.Max(at))
				}
				e.wantRevokedBut(k.Session())
			}
		})
	}
}

// Whoever asks may be held up by the logger, and find two answers when it goes on.
func TestOfTwoGrantsThatAwaitOneWhoIsHeldUpOneIsRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onGrant = func(ctx context.Context, n int, l *granted) (*granted, error) {
			if n == 1 { // fails when two more are under way
				time.Sleep(time.Second - e.at())
				return nil, errors.New("no connection")
			}
			return answersAt[granted](e, 2*time.Second)(ctx, n, l)
		}
		p := newPool(e)
		loop := &retry.Loop{Client: e.client, Warn: func(error) { time.Sleep(3 * time.Second) }}
		k, err := p.Track(t.Context(), loop, func(id clientv3.LeaseID) string { return fmt.Sprint("k", id) }, func() {})
		if err != nil {
			t.Fatal(err)
		}
		cleanUp(t, k)
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		e.mu.Lock()
		granted := len(e.granted)
		e.mu.Unlock()
		if granted < 2 {
			t.Errorf("%d leases were granted, want at least 2", granted)
		}
		e.wantRevokedBut(k.Session())
	})
}

// wantRevokedBut wants each lease that was granted to be revoked, but for that of the session.
func (e *etcd) wantRevokedBut(used *Session) {
	e.t.Helper()
	log := e.log()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.granted) == 0 {
		e.t.Error("no lease was granted")
	}
	for _, id := range e.granted {
		want := used == nil || used.ID() != id
		if got := slices.Contains(log.revoked, id); got != want {
			e.t.Errorf("lease %x was revoked: %v, want %v", id, got, want)
		}
	}
	if used != nil && !slices.Contains(e.granted, used.ID()) {
		e.t.Errorf("lease %x is used and was not granted", used.ID())
	}
}

// Its margin is promised to work that has to stop, and a campaign deletes at once what is offered here.
func TestKeyOfAnExpiredSessionIsNotOfferedForDeletion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = hangs[ack]
		p := newPool(e)
		k := lend(t, p, "k")
		lend(t, p, "other") // still uses the session when that has expired
		attemptUnanswered(t, k)
		k.Joined(7)
		name := func(id clientv3.LeaseID) string { return fmt.Sprintf("k/%x", id) }
		e.wantEnd(k.Session(), deadline)
		k.Drop()
		if left := p.Abandoned(name); len(left) != 0 || !k.Abandoned() {
			t.Errorf("%d keys are offered, Abandoned() = %v, want none and true", len(left), k.Abandoned())
		}
	})
}

// An etcd that has a new leader gives the lease the whole TTL anew. Nobody could lead until it expires.
func TestLeaseOfAnExpiredSessionIsRevokedOnceItMayHaveExpired(t *testing.T) {
	for name, test := range map[string]struct {
		jumpAt, jump time.Duration // of the wall clock
		want         time.Duration
	}{
		"S + TTL":                           {0, 0, ttl},
		"wall clock set back delays it":     {13 * time.Second, -10 * time.Second, ttl + 10*time.Second},
		"wall clock set forward does not":   {13 * time.Second, time.Hour, ttl},
		"nor if that has ended the session": {time.Second, time.Hour, ttl},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.onRenew = hangs
			var revoked []time.Duration
			e.onRevoke = func(context.Context, int) error {
				revoked = append(revoked, e.at())
				return nil
			}
			var wall wall
			time.AfterFunc(test.jumpAt, func() { wall.jump(test.jump) })
			p := NewPool(e.client, Config{TTL: ttl, Wall: wall.now})
			s := e.expire(t, p)
			for range 3 {
				if err := s.Finish(t.Context()); err != nil {
					t.Errorf("Finish() = %v", err)
				}
			}
			e.waitUntil(test.want - 1)
			if len(revoked) != 0 || s.Gone() {
				t.Errorf("revoked after %v, Gone() = %v", revoked, s.Gone())
			}
			e.waitUntil(test.want + clockCheck)
			if !slices.Equal(revoked, []time.Duration{test.want}) || !s.Gone() {
				t.Errorf("revoked after %v, Gone() = %v, want once after %v", revoked, s.Gone(), test.want)
			}
		})
	}
}

// expire lends a session, and gives it back when it has expired.
func (e *etcd) expire(t *testing.T, p *Pool) *Session {
	k := lend(t, p, "k")
	<-k.Session().Context().Done()
	if cause := k.Session().Cause(); !errors.Is(cause, ErrExpired) {
		t.Errorf("Cause() = %v, want %v", cause, ErrExpired)
	}
	k.Drop()
	if err := k.Session().Finish(t.Context()); err != nil {
		t.Errorf("Finish() = %v", err)
	}
	return k.Session()
}

func TestRevocationOfAnExpiredLeaseIsRetriedThroughAnOutage(t *testing.T) {
	for name, fault := range map[string]func(context.Context) error{
		"etcd refuses": func(context.Context) error { return rpctypes.ErrNoLeader },
		"etcd hangs":   func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.onRenew = hangs
			const over = 10 * time.Minute
			e.onRevoke = func(ctx context.Context, _ int) error {
				if e.at() < over {
					return fault(ctx)
				}
				return rpctypes.ErrLeaseNotFound // it has expired meanwhile
			}
			s := e.expire(t, newPool(e))
			e.waitUntil(over - 1)
			if s.Gone() {
				t.Error("Gone() = true before etcd has answered")
			}
			e.waitUntil(over + 10*time.Second)
			if !s.Gone() {
				t.Errorf("the lease was not revoked in 10s after the outage, by %d requests", len(e.log().revoked))
			}
		})
	}
}

func TestRevocationOfAnExpiredLeaseEnds(t *testing.T) {
	const early = deadline + 3*clockCheck/2 // before S + TTL
	for name, test := range map[string]struct {
		end   func(t *testing.T, e *etcd, p *Pool)
		after time.Duration
	}{
		"an hour after": {func(*testing.T, *etcd, *Pool) {}, deadline + maxLate},
		"with the pool": {func(t *testing.T, _ *etcd, p *Pool) {
			over, cancel := context.WithCancel(t.Context())
			cancel()
			if err := p.Close(over); !errors.Is(err, context.Canceled) { // else it would try once more
				t.Errorf("Close() = %v", err)
			}
		}, time.Minute},
		"with the client":                      {func(_ *testing.T, e *etcd, _ *Pool) { e.cancel() }, time.Minute},
		"with the client, before it has begun": {func(_ *testing.T, e *etcd, _ *Pool) { e.cancel() }, early},
		"with the pool, before it has begun": {func(t *testing.T, _ *etcd, p *Pool) {
			if err := p.Close(t.Context()); err != nil {
				t.Errorf("Close() = %v", err)
			}
		}, early},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.onRenew = hangs
			e.onRevoke = func(context.Context, int) error { return rpctypes.ErrNoLeader }
			p := newPool(e)
			e.expire(t, p)
			e.waitUntil(min(test.after, time.Minute))
			before := len(e.log().revoked)
			test.end(t, e, p)
			e.waitUntil(test.after)
			if err := p.late.Wait(t.Context()); err != nil || e.at() != test.after {
				t.Errorf("ended after %v, want %v", e.at(), test.after)
			}
			ended := len(e.log().revoked)
			e.waitUntil(3 * maxLate)
			if got := len(e.log().revoked); got != ended || (before == 0) != (test.after < ttl) {
				t.Errorf("%d requests to revoke before the end and %d after it", before, got-ended)
			}
		})
	}
}

// A session that has been given back when the pool is closed already leaves its lease to expire.
func TestNoRevocationBeginsOnceThePoolIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRenew = hangs
		p := newPool(e)
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		e.expire(t, p)
		e.waitUntil(time.Minute)
		if got := len(e.log().revoked); got != 0 {
			t.Errorf("%d requests to revoke", got)
		}
	})
}

func TestCloseOfAPoolRevokesWhatNobodyUses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRevoke = func(_ context.Context, n int) error {
			if n == 1 {
				return rpctypes.ErrAuthFailed
			}
			return nil
		}
		p := newPool(e)
		unused := lend(t, p, "a")
		unused.Drop()
		used := lend(t, p, "a")
		if err := p.Close(t.Context()); !errors.Is(err, rpctypes.ErrAuthFailed) {
			t.Errorf("Close() = %v, want %v", err, rpctypes.ErrAuthFailed)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		if !unused.Session().Gone() || used.Session().Gone() || !used.Session().Valid() {
			t.Errorf("Gone() = %v of the unused session and %v of the other, want true and false",
				unused.Session().Gone(), used.Session().Gone())
		}
	})
}

// soon is before a request is sent again.
const soon = 100 * time.Millisecond

func newPool(e *etcd) *Pool { return NewPool(e.client, Config{TTL: ttl}) }

// track is Track of a key <name>/<lease>.
func track(ctx context.Context, p *Pool, name string) (*Key, error) {
	key := func(id clientv3.LeaseID) string { return fmt.Sprintf("%s/%x", name, id) }
	return p.Track(ctx, &retry.Loop{Client: p.client}, key, func() {})
}

func lend(t *testing.T, p *Pool, name string) *Key {
	k, err := track(t.Context(), p, name)
	if err != nil {
		t.Errorf("Track() = %v", err)
		return nil
	}
	cleanUp(t, k)
	return k
}

// cleanUp ends the key's session with the test.
func cleanUp(t *testing.T, k *Key) {
	t.Cleanup(func() {
		k.s.end(ErrClosed)
		<-k.s.done
	})
}

// Its last user may give an expired session back when the margin has passed, as it was stopped or has tried to delete
// its key, and in an outage still.
func TestLeaseThatIsGivenBackLateIsRevokedAfterTheOutage(t *testing.T) {
	for name, givenBack := range map[string]time.Duration{"in the margin": ttl - time.Second, "after it": ttl + time.Second} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.onRenew = hangs
			const outage = time.Minute
			e.onRevoke = func(context.Context, int) error {
				if e.at() < outage {
					return rpctypes.ErrNoLeader
				}
				return nil
			}
			k := lend(t, newPool(e), "k")
			e.wantEnd(k.Session(), deadline)
			e.waitUntil(givenBack)
			k.Drop()
			ctx, cancel := retry.Cleanup(t.Context())
			defer cancel()
			_ = k.Session().Finish(ctx)
			e.waitUntil(2 * outage)
			if !k.Session().Gone() {
				t.Errorf("the lease was not revoked, by %d requests", len(e.log().revoked))
			}
		})
	}
}

// The user's Lease may ignore its context. What is still running must not be forgotten by a Close that has failed.
func TestCloseOfAPoolThatIsRepeatedWaitsForTheRenewalUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		defer e.release()
		e.onRenew = stuck[ack](e)
		p := newPool(e)
		k := lend(t, p, "a")
		e.waitUntil(third) // a renewal is stuck
		k.Drop()
		for i := range 2 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := p.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Close number %d = %v, want %v: a renewal is running", i+1, err, context.DeadlineExceeded)
			}
			cancel()
		}
		e.release()
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v after the renewal has returned", err)
		}
	})
}

// A session whose renewal does not return must not keep the lease of another one.
func TestCloseOfAPoolRevokesALeaseThoughTheRenewalOfAnotherIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		defer e.release()
		e.onRenew = func(ctx context.Context, n int, a *ack) (*ack, error) {
			if n == 1 {
				return stuck[ack](e)(ctx, n, a)
			}
			return a, nil
		}
		p := newPool(e)
		first := lend(t, p, "a")
		attemptUnanswered(t, first)
		e.waitUntil(third) // its renewal is stuck
		first.Drop()
		second := lend(t, p, "a")
		second.Drop()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := p.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Close() = %v, want %v", err, context.DeadlineExceeded)
		}
		if !second.Session().Gone() {
			t.Error("the lease was not revoked")
		}
	})
}

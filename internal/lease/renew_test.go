package lease

import (
	"context"
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// What is told is the user's code.
func TestRenewalsDoNotWaitForWhoIsToldOfThem(t *testing.T) {
	for name, hook := range map[string]func(e *etcd){
		"it blocks": func(e *etcd) { <-e.released },
		"it exits":  func(*etcd) { runtime.Goexit() },
		"it blocks, then exits": func(e *etcd) {
			<-e.released
			runtime.Goexit()
		},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			var under atomic.Int64
			s := start(t, e, Config{Renewal: func(Renewal) {
				if under.Add(1) > 1 {
					t.Error("told of a renewal before it has returned from the one before")
				}
				defer under.Add(-1)
				hook(e)
			}})
			const renewals = 20
			e.waitUntil(renewals * third)
			if got := len(e.log().sent); got != renewals || !s.Valid() {
				t.Errorf("%d renewals sent, Valid() = %v, want %d and true", got, s.Valid(), renewals)
			}
			e.wantDeadline(s, renewals*third+deadline)
			e.release()
			e.wantTold(1, renewals)
		})
	}
}

// wantTold wants reports of the renewals with these numbers, all of which have counted, in their order.
func (e *etcd) wantTold(first, last int) {
	e.t.Helper()
	told := e.log().renewals
	if len(told) != last-first+1 {
		e.t.Fatalf("told of %d renewals, want of %d", len(told), last-first+1)
	}
	for i, r := range told {
		if got, want := r.Deadline.Sub(e.began), time.Duration(first+i)*third+deadline; got != want || r.Err != nil {
			e.t.Fatalf("report %d is %v, want that of renewal %d, with the deadline %v", i, r, first+i, want)
		}
	}
}

func TestNewestRenewalsAreKeptForWhoDoesNotReturn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		s := start(t, e, Config{Renewal: func(Renewal) { <-e.released }})
		const dropped = 7
		const renewals = 1 + dropped + maxUntold // the first is being told of
		e.waitUntil(renewals * third)
		s.mu.Lock()
		kept := len(s.untold)
		s.mu.Unlock()
		if kept != maxUntold {
			t.Errorf("%d renewals are kept, want %d", kept, maxUntold)
		}
		e.mu.Lock()
		e.got.renewals = nil
		e.mu.Unlock()
		e.release()
		e.wantTold(1+dropped+1, renewals)
	})
}

func TestCloseOfAPoolWaitsForWhoIsToldOfARenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := NewPool(e.client, Config{TTL: ttl, Renewal: func(Renewal) { <-e.released }})
		k := lend(t, p, "k")
		e.waitUntil(third)
		k.Drop()
		if err := k.Session().Finish(t.Context()); err != nil || e.at() != third {
			t.Errorf("Finish() = %v after %v, want nil at once", err, e.at())
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := p.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Close() = %v while the hook blocks, want %v", err, context.DeadlineExceeded)
		}
		time.AfterFunc(time.Second, e.release)
		if err := p.Close(t.Context()); err != nil || e.at() != third+2*time.Second {
			t.Errorf("Close() = %v after %v, want nil once the hook has returned", err, e.at())
		}
	})
}

func TestReportsCountFailuresAndSilenceInARow(t *testing.T) {
	const (
		counts = iota
		fails
		hang
	)
	script := []int{fails, hang, hang, fails, hang, counts, hang, counts}
	want := []struct{ failures, silent int }{{1, 0}, {2, 1}, {3, 2}, {4, 0}, {5, 1}, {0, 0}, {1, 1}, {0, 0}}
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.ttl = 60
		e.onRenew = func(ctx context.Context, n int, a *ack) (*ack, error) {
			switch script[n-1] {
			case fails:
				return nil, rpctypes.ErrNoLeader
			case hang:
				return hangs(ctx, n, a)
			}
			return a, nil
		}
		s := start(t, e, Config{TTL: time.Minute})
		for len(e.log().renewals) < len(script) && s.Valid() {
			time.Sleep(time.Second)
		}
		for i, r := range e.log().renewals {
			if r.Failures != want[i].failures || r.Silent != want[i].silent || (r.Err == nil) != (script[i] == counts) {
				t.Errorf("report %d: %d failures, %d without an answer, %v; want %v", i, r.Failures, r.Silent, r.Err, want[i])
			}
			if r.Lease != s.ID() {
				t.Errorf("report %d is about lease %x, want %x", i, r.Lease, s.ID())
			}
		}
		if got := len(e.log().renewals); got != len(script) {
			t.Errorf("%d reports, want %d", got, len(script))
		}
	})
}

// The cause of a failure is told apart by errors.Is.
func TestReportSaysWhatHasFailed(t *testing.T) {
	for name, test := range map[string]struct {
		fault func(e *etcd)
		want  error
	}{
		"renewal refused": {func(e *etcd) { e.onRenew = fails[ack](rpctypes.ErrNoLeader) }, rpctypes.ErrNoLeader},
		"renewal hangs":   {func(e *etcd) { e.onRenew = hangs }, context.DeadlineExceeded},
		"read refused":    {func(e *etcd) { e.onRead = fails[read](rpctypes.ErrNoLeader) }, rpctypes.ErrNoLeader},
		"read hangs":      {func(e *etcd) { e.onRead = hangs }, context.DeadlineExceeded},
		"another term":    {func(e *etcd) { e.onRead = otherTerm }, ErrRefused},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			test.fault(e)
			start(t, e, Config{})
			e.waitUntil(third + attempt + attempt/2)
			r := e.log().renewals
			if len(r) == 0 || !errors.Is(r[0].Err, test.want) || r[0].Failures != 1 {
				t.Errorf("reported %v, want %v", r, test.want)
			}
			t.Logf("%d reports", len(r))
		})
	}
}

// Whoever is told that etcd is silent counts attempts to renew, not the requests that each of them takes.
func TestReadsThatAreSentBesideEachOtherAreOneSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = hangs
		s := start(t, e, Config{})
		e.wantEnd(s, deadline)
		log := e.log()
		if len(log.sent) != 1 || len(log.reads) < 6 {
			t.Errorf("%d renewals and %d reads sent, want 1 and one beside another", len(log.sent), len(log.reads))
		}
		for i, r := range log.renewals[:len(log.renewals)-1] { // the deadline cuts the last one short
			if r.Failures != i+1 || r.Silent != i+1 || r.Took < time.Duration(i+1)*attempt {
				t.Errorf("report %d: %d failures, %d without an answer after %v, want one per %v",
					i, r.Failures, r.Silent, r.Took, attempt)
			}
		}
		if got := len(log.renewals); got != 3 {
			t.Errorf("%d reports, want 3", got)
		}
	})
}

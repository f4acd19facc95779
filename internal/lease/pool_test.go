package lease

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestPoolGrantsOneLeaseForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onGrant = answersAt[granted](e, time.Second)
		p := newPool(e)
		var wg sync.WaitGroup
		lent := make([]*Lent, 10)
		for i := range lent {
			wg.Go(func() { lent[i] = get(t, p) })
		}
		wg.Wait()
		for _, l := range lent {
			if l != lent[0] {
				t.Fatal("lent different sessions")
			}
		}
		if got := e.log().asked; len(got) != 1 {
			t.Errorf("%d leases granted, want 1", len(got))
		}

		for i, l := range lent {
			if l.Unused() {
				t.Errorf("unused while %d have not given it back", len(lent)-i)
			}
			if err := l.Finish(t.Context()); err != nil || !l.Valid() {
				t.Errorf("Finish() = %v, Valid() = %v of a session that is in use", err, l.Valid())
			}
			l.Return()
		}
		if !lent[0].Unused() {
			t.Error("in use after all have given it back")
		}
		for range 2 {
			if err := lent[0].Finish(t.Context()); err != nil {
				t.Errorf("Finish() = %v", err)
			}
		}
		if got := e.log().revoked; !slices.Equal(got, []clientv3.LeaseID{lent[0].ID()}) || lent[0].Valid() {
			t.Errorf("revoked %v, want the lease once", got)
		}
	})
}

func TestFinishMayBeRetriedAfterAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRevoke = func(_ context.Context, n int) error {
			if n == 1 {
				return rpctypes.ErrPermissionDenied
			}
			return nil
		}
		l := get(t, newPool(e))
		l.Return()
		if err := l.Finish(t.Context()); !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("Finish() = %v, want %v", err, rpctypes.ErrPermissionDenied)
		}
		if err := l.Finish(t.Context()); err != nil || !l.Gone() {
			t.Errorf("Finish() = %v, Gone() = %v, want nil and true", err, l.Gone())
		}
	})
}

// It may be about to be closed.
func TestPoolDoesNotLendASessionThatAllHaveReturned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool(newEtcd(t))
		first := get(t, p)
		first.Return()
		second := get(t, p)
		if first == second {
			t.Error("lent again after the last one had given it back")
		}
		second.Return()
		for _, l := range []*Lent{first, second} {
			if err := l.Finish(t.Context()); err != nil {
				t.Errorf("Finish() = %v", err)
			}
		}
	})
}

func TestPoolReplacesASessionThatIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := newPool(e)
		old := get(t, p)
		e.waitUntil(deadline) // no renewal counts without a key
		renewed := get(t, p)
		if old == renewed || !renewed.Valid() || !errors.Is(old.Cause(), ErrExpired) {
			t.Errorf("lent a session that is over: %v", renewed.Cause())
		}
		old.Return() // does not take the new one away
		if third := get(t, p); third != renewed {
			t.Error("a session that is in use was replaced when an older one was given back")
		}
		if renewed.Unused() || !old.Unused() {
			t.Errorf("Unused() = %v of the new session and %v of the old one", renewed.Unused(), old.Unused())
		}
	})
}

func TestGetReturnsWhenItsContextEndsWhileAnotherIsGranting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onGrant = stuck[granted](e)
		p := newPool(e)
		granting := make(chan *Lent, 1)
		go func() { granting <- get(t, p) }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if l, err := p.Get(ctx); l != nil || !errors.Is(err, context.DeadlineExceeded) || e.at() != time.Second {
			t.Errorf("Get() = %v, %v after %v, want %v after 1s", l, err, e.at(), context.DeadlineExceeded)
		}
		e.release()
		l := <-granting
		l.Return()
		if !l.Unused() {
			t.Error("the Get that failed counts as a user")
		}
	})
}

func TestFailedGrantIsForTheOneWhoAskedAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onGrant = func(_ context.Context, n int, l *granted) (*granted, error) {
			time.Sleep(time.Second)
			if n == 1 {
				return nil, rpctypes.ErrNoLeader
			}
			return l, nil
		}
		p := newPool(e)
		failed := make(chan error, 1)
		go func() {
			_, err := p.Get(t.Context())
			failed <- err
		}()
		synctest.Wait()
		get(t, p)
		if err := <-failed; !errors.Is(err, rpctypes.ErrNoLeader) {
			t.Errorf("first Get() = %v, want %v", err, rpctypes.ErrNoLeader)
		}
		if got := e.log().asked; len(got) != 2 {
			t.Errorf("%d leases asked for, want 2", len(got))
		}
	})
}

func newPool(e *etcd) *Pool { return NewPool(e.client, Config{TTL: ttl}) }

func get(t *testing.T, p *Pool) *Lent {
	l, err := p.Get(t.Context())
	if err != nil {
		t.Errorf("Get() = %v", err)
		return nil
	}
	t.Cleanup(func() {
		l.end(ErrClosed)
		<-l.done
	})
	return l
}

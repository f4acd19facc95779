package leader

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// The tests of this file are about time alone, and need no etcd.

// newHealthy returns an Elector with a check.
func newHealthy(t *testing.T, check func(ctx context.Context, election string) error, opts ...Option) *Elector {
	t.Helper()
	e, err := New(clientv3.NewCtxClient(t.Context()), append(opts, WithHealth(check))...)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// Elections that begin together are not checked together for long.
func TestChecksOfManyElectionsAreSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, period = 1000, DefaultTTL / 3
		var checks [100]atomic.Int64 // by tenths of a period
		began := time.Now()
		e := newHealthy(t, func(context.Context, string) error {
			checks[10*time.Since(began)/period].Add(1)
			return nil
		})
		for i := range n {
			h := e.newHealth(fmt.Sprint(i), func(err error) { t.Error(err) })
			defer h.stop()
		}
		time.Sleep(9*period + period/2)
		synctest.Wait()
		for tenth := range checks {
			switch made := checks[tenth].Load(); {
			case tenth == 0 && made < n: // the campaigns wait for the first ones
				t.Errorf("%d checks at once, want %d", made, n)
			case tenth > 0 && made > n/5:
				t.Errorf("%d of %d elections were checked in the same tenth of a period, the %dth", made, n, tenth)
			}
		}
	})
}

// A success holds until two more checks could have been made, whatever the margin is.
func TestHealthSurvivesAFailureBetweenSuccesses(t *testing.T) {
	for _, margin := range []time.Duration{time.Millisecond, 3 * time.Second, 7500 * time.Millisecond} { // of 15 s
		for how, slow := range map[string]bool{"at once": false, "after as long as a check may take": true} {
			t.Run(fmt.Sprintf("margin %v, failing %s", margin, how), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					checks := 0
					e := newHealthy(t, func(ctx context.Context, _ string) error {
						if checks++; checks%2 == 1 {
							return nil
						}
						if slow {
							<-ctx.Done()
						}
						return errors.New("fails")
					}, WithMargin(margin))
					h := e.newHealth("jobs", func(err error) { t.Errorf("after %d checks: %v", checks, err) })
					time.Sleep(time.Hour)
					h.stop()
					synctest.Wait()
					if checks < 600 {
						t.Errorf("%d checks in an hour", checks)
					}
				})
			})
		}
	}
}

// A check that takes long, and succeeds, loses nothing, not even when the checks of a campaign begin.
func TestHealthSurvivesSlowSuccesses(t *testing.T) {
	for _, margin := range []time.Duration{time.Millisecond, 3 * time.Second, 7500 * time.Millisecond} { // of 15 s
		t.Run(fmt.Sprintf("margin %v", margin), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newHealthy(t, func(ctx context.Context, _ string) error {
					deadline, _ := ctx.Deadline()
					time.Sleep(time.Until(deadline) * 9 / 10)
					return nil
				}, WithMargin(margin))
				var all []*health
				for i := range 100 { // when the second check begins is random
					all = append(all, e.newHealth(fmt.Sprint(i), func(err error) { t.Errorf("lost: %v", err) }))
				}
				time.Sleep(time.Minute)
				for _, h := range all {
					if err := h.err(); err != nil {
						t.Errorf("in the end: %v", err)
					}
					h.stop()
				}
				_ = e.watching.Wait(t.Context())
			})
		})
	}
}

// The timer that says so may be late, as in a process that is busy or was stopped.
func TestWaitingForHealthBlocksAsSoonAsASuccessHoldsNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		e := newHealthy(t, func(context.Context, string) error {
			if time.Now().Equal(began) {
				return nil
			}
			return errors.New("ill")
		})
		h := e.newHealth("x", func(error) {})
		defer h.stop()
		if err := h.wait(t.Context(), false, func(error) {}); err != nil {
			t.Fatal(err)
		}
		h.mu.Lock()
		h.expiry.Stop()
		h.mu.Unlock()
		time.Sleep(DefaultTTL)
		ctx, cancel := context.WithTimeout(t.Context(), DefaultTTL)
		defer cancel()
		told := 0
		err := h.wait(ctx, false, func(error) {
			if told++; told > 100 {
				t.Fatal("it does not wait")
			}
		})
		if !errors.Is(err, context.DeadlineExceeded) || told == 0 {
			t.Errorf("%v, told %d times; want that the time is over", err, told)
		}
	})
}

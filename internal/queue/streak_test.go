package queue

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/retry"
)

// broken waits as jobs/2 behind jobs/1, by a watch that was opened again after the first one has ended.
func (e *fakeEtcd) broken(ctx context.Context, t *testing.T, over func(int, time.Duration)) (*waitCall, *fakeWatch) {
	t.Helper()
	waiting := e.wait(func(loop *retry.Loop) error {
		loop.Over = over
		return e.queue().Wait(ctx, loop, Place{Token: 6, before: "jobs/1", rev: 5, oldest: true}, reread, nil, nil)
	})
	first := e.watch(t)
	first.create()
	first.end()
	second := e.watch(t)
	second.create()
	return waiting, second
}

// The candidate's key is deleted when Wait has returned, so the user's code must not hold it up.
func TestWaitThatIsGivenUpDoesNotTellThatItGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		ctx, cancel := context.WithCancel(t.Context())
		blocked := make(chan struct{})
		defer close(blocked)
		waiting, _ := e.broken(ctx, t, func(int, time.Duration) { <-blocked })
		time.Sleep(10 * time.Second)
		cancel()
		synctest.Wait()
		select {
		case err := <-waiting.result:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("returned %v", err)
			}
		default:
			t.Error("has not returned: it is telling of the end of a streak")
		}
	})
}

// A streak ends when the next watch works, not when that one breaks, which may be months later.
func TestEndOfAStreakIsToldWhenTheNextWatchWorks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		var told []time.Duration
		waiting, second := e.broken(t.Context(), t, func(_ int, lasted time.Duration) { told = append(told, lasted) })
		time.Sleep(24 * time.Hour)
		second.end()
		e.watch(t).create()
		if len(told) != 1 || told[0] > 2*reread {
			t.Errorf("told of streaks that lasted %v, want one that has not lasted a day", told)
		}
		waiting.wantGoingOn(t)
		e.del("jobs/1")
		if err := returned(t, waiting.result); err != nil {
			t.Error(err)
		}
	})
}

// A failure long after an earlier one that was mended is another streak, and warned of.
func TestFailureLongAfterABrokenWatchIsWarnedOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting, second := e.broken(t.Context(), t, nil)
		time.Sleep(24 * time.Hour)
		e.fail(errors.New("no answer"))
		time.Sleep(2 * reread)
		synctest.Wait()
		if waiting.warnings != 2 {
			t.Errorf("%d warnings, want one of the watch and one of the read a day later", waiting.warnings)
		}
		e.fail(nil)
		second.send(t, e.del("jobs/1"))
		if err := returned(t, waiting.result); err != nil {
			t.Error(err)
		}
	})
}

func TestFailureLongAfterABrokenWatchOfAnObserverIsWarnedOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		ctx, cancel := context.WithCancel(t.Context())
		o := e.observe(ctx, nil)
		first := e.watch(t)
		first.create()
		first.end()
		e.watch(t).create()
		time.Sleep(24 * time.Hour)
		e.fail(errors.New("no answer"))
		time.Sleep(2 * reread)
		synctest.Wait()
		o.mu.Lock()
		if len(o.warnings) != 2 {
			t.Errorf("warned of %v, want of the watch and, a day later, of the read", o.warnings)
		}
		o.mu.Unlock()
		e.fail(nil)
		cancel()
		if err := returned(t, o.result); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

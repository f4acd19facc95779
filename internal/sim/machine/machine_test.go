package machine_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/sim/machine"
	"example.com/leader/internal/sim/machine/clock"
	"example.com/leader/internal/sim/machine/contexts"
	"example.com/leader/internal/sim/machine/locks"
)

func newMachine(rate float64) *machine.Machine {
	return machine.New("m", rand.New(rand.NewPCG(1, 2)), rate, nil)
}

func TestStoppedMachineHoldsItsGoroutinesAtClocksLocksAndTimers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(1)
		began := time.Now()
		var mu locks.Mutex
		for name, gate := range map[string]func(){
			"clock":  func() { clock.Now() },
			"lock":   func() { mu.Lock(); defer mu.Unlock() },
			"timer":  func() { <-clock.After(time.Second) },
			"ticker": func() { k := clock.NewTicker(time.Second); <-k.C; k.Stop() },
			"context": func() {
				ctx, cancel := contexts.WithTimeout(t.Context(), time.Second)
				<-ctx.Done()
				cancel()
				clock.Now()
			},
		} {
			m.Stop()
			done := make(chan struct{})
			m.Go(func() { defer close(done); gate() })
			time.Sleep(time.Minute)
			synctest.Wait()
			select {
			case <-done:
				t.Errorf("%s: the machine was stopped, and the goroutine was not", name)
			default:
			}
			m.Resume()
			<-done
		}
		if machine.Gate(); time.Since(began) == 0 {
			t.Error("no time has passed")
		}
	})
}

func TestWhoWaitsForALockOfAStoppedMachineLetsTimePass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(1)
		var mu locks.Mutex
		held := make(chan struct{})
		m.Go(func() {
			mu.Lock()
			defer mu.Unlock()
			close(held)
			clock.Sleep(time.Second)
		})
		<-held
		m.Stop()
		time.AfterFunc(time.Minute, m.Resume)
		began := time.Now()
		mu.Lock()
		defer mu.Unlock()
		if waited := time.Since(began); waited != time.Minute {
			t.Errorf("had the lock after %v", waited)
		}
	})
}

func TestLockThatAStoppedMachineHoldsIsFreeForAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, other := newMachine(1), newMachine(1)
		var mu locks.Mutex // of a package, which both have
		hold := func(of *machine.Machine, f func()) {
			held := make(chan struct{})
			of.Go(func() {
				mu.Lock()
				defer mu.Unlock()
				close(held)
				f()
			})
			<-held
		}
		hold(m, func() { clock.Sleep(time.Second) })
		m.Stop()
		began := time.Now()
		hold(other, func() {})
		hold(other, func() {})
		if waited := time.Since(began); waited != 0 {
			t.Errorf("another machine had the lock after %v", waited)
		}
		m.Resume()
		hold(m, func() {})
		if waited := time.Since(began); waited != time.Second {
			t.Errorf("the same machine had the lock after %v", waited)
		}
	})
}

func TestClocksRunAtTheirRateAndMayBeSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(0.5)
		began, bubble := m.Now(), time.Now()
		time.Sleep(10 * time.Second)
		if passed := m.Now().Sub(began); passed != 5*time.Second {
			t.Errorf("in 10 s a clock of half the rate has counted %v", passed)
		}
		m.SetWall(-time.Hour)
		now := m.Now()
		if mono, wall := now.Sub(began), now.Round(0).Sub(began.Round(0)); mono != 5*time.Second || wall != 5*time.Second-time.Hour {
			t.Errorf("after the wall clock was set back the clocks have counted %v and %v", mono, wall)
		}
		m.Do(func() {
			clock.Sleep(5 * time.Second)
			ctx, cancel := contexts.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if at, ok := ctx.Deadline(); !ok || clock.Until(at) != 5*time.Second {
				t.Errorf("the deadline is %v from now", clock.Until(at))
			}
			inner, cancel := context.WithCancel(ctx)
			defer cancel()
			<-inner.Done()
			if !errors.Is(inner.Err(), context.DeadlineExceeded) {
				t.Error(inner.Err())
			}
		})
		if passed := time.Since(bubble); passed != 30*time.Second {
			t.Errorf("20 s and twice 5 s at half the rate took %v", passed)
		}
	})
}

func TestSuspendedMachineHoldsItsMonotonicClockAndItsTimers(t *testing.T) {
	for _, rate := range []float64{1, 0.5, 2} {
		synctest.Test(t, func(t *testing.T) {
			counted := func(d time.Duration) time.Duration { return time.Duration(rate * float64(d)) }
			m := newMachine(rate)
			began, bubble := m.Now(), time.Now()
			fired := make(chan time.Duration, 1)
			m.AfterFunc(counted(10*time.Second), func() { fired <- time.Since(bubble) })
			time.Sleep(3 * time.Second)
			m.Suspend()
			time.Sleep(time.Hour)
			m.Resume()
			now := m.Now()
			mono, wall := now.Sub(began), now.Round(0).Sub(began.Round(0))
			if mono != counted(3*time.Second) || wall != counted(time.Hour+3*time.Second) {
				t.Errorf("after an hour's suspension the clocks of rate %v have counted %v and %v", rate, mono, wall)
			}
			if at := <-fired; at != time.Hour+10*time.Second {
				t.Errorf("the timer has fired after %v", at)
			}
		})
	}
}

func TestTimerThatIsStoppedWhileItsMachineIsDoesNotFire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(1)
		timer := m.AfterFunc(time.Second, func() { t.Error("it has fired") })
		m.Stop()
		time.Sleep(time.Minute)
		if !timer.Stop() {
			t.Error("it was not armed any more")
		}
		m.Resume()
		again := m.AfterFunc(time.Second, func() {})
		again.Reset(time.Hour)
		time.Sleep(time.Minute)
		if !again.Stop() {
			t.Error("it was reset to an hour, and has fired in a minute")
		}
	})
}

func TestMonotonicClockStandsStillInASuspendedMachineWhateverItsRate(t *testing.T) {
	for _, rate := range []float64{0.5, 1, 1.5} {
		synctest.Test(t, func(t *testing.T) {
			m := newMachine(rate)
			time.Sleep(time.Second)
			m.Suspend()
			before := m.Now()
			time.Sleep(time.Minute)
			m.Resume()
			after := m.Now()
			if passed := after.Sub(before); passed != 0 {
				t.Errorf("at the rate %v, %v have passed on the monotonic clock", rate, passed)
			}
			if passed := after.Round(0).Sub(before.Round(0)); passed < time.Minute/2 {
				t.Errorf("at the rate %v, %v have passed on the wall clock", rate, passed)
			}
		})
	}
}

package machine

import "time"

// A Timer calls a function, in a goroutine of its machine, when a time has passed on that machine's clock. It is
// safe for concurrent use.
type Timer struct {
	m *Machine
	f func()

	// Guarded by m.mu.
	timer *time.Timer
	armed bool
	round int           // how often it was armed
	due   time.Time     // true time
	left  time.Duration // until it is due, while the machine is suspended; true time
	index int           // in m.timers
}

// AfterFunc arms a timer of the machine.
func (m *Machine) AfterFunc(d time.Duration, f func()) *Timer {
	t := &Timer{m: m.full, f: f}
	m.mu.Lock()
	defer m.mu.Unlock()
	t.armLocked(d)
	return t
}

// Reset arms the timer again and reports whether it was armed.
func (t *Timer) Reset(d time.Duration) bool {
	t.m.mu.Lock()
	defer t.m.mu.Unlock()
	was := t.disarmLocked()
	t.armLocked(d)
	return was
}

// Stop disarms the timer and reports whether it was armed. Then the function is not called.
func (t *Timer) Stop() bool {
	t.m.mu.Lock()
	defer t.m.mu.Unlock()
	return t.disarmLocked()
}

func (t *Timer) armLocked(d time.Duration) {
	m := t.m
	t.armed, t.index = true, len(m.timers)
	m.timers = append(m.timers, t)
	t.startLocked(max(0, m.Real(d)))
	if !m.suspended.IsZero() {
		t.freezeLocked()
	}
}

// startLocked starts what fires after d of true time.
func (t *Timer) startLocked(d time.Duration) {
	t.round++
	round := t.round
	t.due = time.Now().Add(d)
	t.timer = time.AfterFunc(d, func() { t.fire(round) })
}

// fire calls the function as soon as the machine runs, unless the timer is disarmed by then.
func (t *Timer) fire(round int) {
	t.m.Enter()
	t.m.Gate()
	t.m.mu.Lock()
	if !t.armed || t.round != round {
		t.m.mu.Unlock()
		return
	}
	t.disarmLocked()
	t.m.mu.Unlock()
	t.f()
}

func (t *Timer) disarmLocked() bool {
	if !t.armed {
		return false
	}
	t.armed = false
	t.timer.Stop()
	timers := t.m.timers
	last := len(timers) - 1
	timers[t.index], timers[last].index = timers[last], t.index
	timers[last] = nil
	t.m.timers = timers[:last]
	return true
}

// freezeLocked and thawLocked hold the timer while the machine is suspended. One that has fired already waits at
// the gate.
func (t *Timer) freezeLocked() {
	if t.timer.Stop() {
		t.left = time.Until(t.due)
	} else {
		t.left = -1
	}
}

func (t *Timer) thawLocked() {
	if t.left >= 0 {
		t.startLocked(t.left)
	}
}

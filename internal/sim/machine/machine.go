// Package machine is what a simulated process runs on: it may stop at any time, and its clocks may be wrong.
//
// A goroutine that has entered a [Machine], and every goroutine that it starts, belongs to it. Such a
// goroutine stops at its next gate when the machine has stopped. Gates are wherever code reads a clock, takes
// a lock, arms a timer or is called by one, and wherever a message comes or goes: the packages clock, locks and
// contexts have them in place of time, sync and context, for whoever is compiled with them.
//
// A machine has two clocks, as any has: a monotonic one, which may run at another rate than the rest of the world
// and stands still while the machine is suspended, and a wall clock, which may be set. "True time" is that of
// the bubble that all of the simulation runs in.
package machine

import (
	"math"
	"math/rand/v2"
	"sync"
	"time"
	"unsafe"
)

// A Machine stops, goes on and tells the time. It is safe for concurrent use.
type Machine struct {
	// labels is what the runtime takes for the labels of the machine's goroutines: a pointer to the machine
	// is where it keeps them. So it must come first.
	labels []label
	free   bool // from gates
	tag    any
	*state
}

type state struct {
	full    *Machine // the one that stops
	rng     *rand.Rand
	whim    func() time.Duration
	rate    float64
	started time.Time // true time; both clocks were right then

	mu        sync.Mutex
	stopped   bool
	suspended time.Time // since when; zero if it is not
	waiting   []chan struct{}
	slept     time.Duration // how long it was suspended, in all
	ahead     time.Duration // of the wall clock, by its settings
	timers    []*Timer      // that are armed
}

// With returns the same machine for goroutines that are to be told apart from others by a tag: those who have
// entered it, and those that they start.
func (m *Machine) With(tag any) *Machine { return &Machine{m.labels, m.free, tag, m.state} }

// Whole is the machine itself, whatever it was made with; nil for none.
func (m *Machine) Whole() *Machine {
	if m == nil {
		return nil
	}
	return m.full
}

// Tag is what the machine was made with.
func (m *Machine) Tag() any {
	if m == nil {
		return nil
	}
	return m.tag
}

// label is internal/runtime/pprof/label.Label.
type label struct{ key, value string }

// New returns a machine that runs and whose clocks are right now. They run rate times as fast as true time.
//
// whim, if not nil, is called at every gate by the goroutine that has come there. It may stop the machine, and
// returns for how long the goroutine alone is held up.
func New(name string, rng *rand.Rand, rate float64, whim func() time.Duration) *Machine {
	m := &Machine{labels: []label{{"machine", name}}, state: &state{rng: rng, whim: whim, rate: rate, started: time.Now()}}
	m.full = m
	return m
}

// Shadow returns a machine with the same clocks that never stops, for a look from outside at what the code in the
// machine would find now.
func (m *Machine) Shadow() *Machine { return &Machine{labels: m.labels, free: true, state: m.state} }

// Current is the machine that the goroutine belongs to, nil if none.
func Current() *Machine { return (*Machine)(goroutineLabels()) }

// Enter makes the goroutine, and those that it starts from now on, the machine's; nil makes it nobody's. It returns the
// one that it belonged to.
func (m *Machine) Enter() (former *Machine) {
	former = Current()
	setGoroutineLabels(unsafe.Pointer(m))
	return former
}

// Do calls f in the machine.
func (m *Machine) Do(f func()) {
	defer m.Enter().Enter()
	f()
}

// Go calls f in a goroutine of the machine.
func (m *Machine) Go(f func()) { m.Do(func() { go f() }) }

// Gate blocks while the machine of the goroutine is stopped. Goroutines that have no machine pass.
func Gate() {
	Current().Gate()
}

// Gate is the gate of this machine, for whoever is in it without having entered it.
func (m *Machine) Gate() {
	if m == nil || m.free {
		return
	}
	if m.whim != nil {
		if d := m.whim(); d > 0 {
			time.Sleep(d)
		}
	}
	for {
		m.mu.Lock()
		if !m.stopped {
			m.mu.Unlock()
			return
		}
		resumed := make(chan struct{})
		m.waiting = append(m.waiting, resumed)
		m.mu.Unlock()
		<-resumed
	}
}

// Stop stops the machine's goroutines at their next gates, as SIGSTOP stops those of a process. Clocks and
// timers go on, but nobody is there to look at them.
func (m *Machine) Stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopped = true
}

// Suspend is Stop for the whole machine: the monotonic clock and all timers stand still, too.
func (m *Machine) Suspend() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopped = true
	if m.suspended.IsZero() {
		m.suspended = time.Now()
		for _, t := range m.timers {
			t.freezeLocked()
		}
	}
}

// Resume lets the machine go on. Who goes first is a matter of chance.
func (m *Machine) Resume() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.suspended.IsZero() {
		m.slept += time.Since(m.suspended)
		m.suspended = time.Time{}
		for _, t := range m.timers {
			t.thawLocked()
		}
	}
	m.stopped = false
	m.rng.Shuffle(len(m.waiting), func(i, j int) { m.waiting[i], m.waiting[j] = m.waiting[j], m.waiting[i] })
	for _, resumed := range m.waiting {
		close(resumed)
	}
	m.waiting = nil
}

// Stopped reports whether the machine is stopped or suspended.
func (m *Machine) Stopped() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stopped
}

// SetWall sets the wall clock forward, or back.
func (m *Machine) SetWall(forward time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ahead += forward
}

// Now is the time on the machine's clocks: its reading of the monotonic clock and that of the wall clock are
// what the two clocks of the machine say.
func (m *Machine) Now() time.Time {
	if m == nil {
		return time.Now()
	}
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	passed := now.Sub(m.started)
	drift := m.local(passed) - passed
	slept := m.slept
	if !m.suspended.IsZero() {
		slept += now.Sub(m.suspended)
	}
	return both(m.local(passed-slept), now.Add(drift+m.ahead))
}

// Rate is how fast the machine's clocks run.
func (m *Machine) Rate() float64 { return m.rate }

// local is how long d of true time is for the machine's clocks.
func (m *Machine) local(d time.Duration) time.Duration {
	if m.rate == 1 {
		return d
	}
	return time.Duration(float64(d) * m.rate)
}

// Real is how long it takes in true time until d has passed on the machine's clocks.
func (m *Machine) Real(d time.Duration) time.Duration {
	if m == nil || m.rate == 1 {
		return d
	}
	return time.Duration(math.Ceil(float64(d) / m.rate))
}

// both is a time with these readings of the two clocks. [time.Now] makes one too, but not in a bubble.
func both(mono time.Duration, wall time.Time) (t time.Time) {
	*(*reading)(unsafe.Pointer(&t)) = reading{
		wall: 1<<63 | uint64(wall.Unix()-minWall)<<30 | uint64(wall.Nanosecond()),
		ext:  int64(mono) + 1, // 0 would be no reading
		loc:  time.Local,
	}
	return t
}

// reading is time.Time with a reading of the monotonic clock. TestClocksRunAtTheirRateAndMayBeSet fails should
// that change.
type reading struct {
	wall uint64 // a bit that says so, seconds since 1885, nanoseconds
	ext  int64  // of the monotonic clock
	loc  *time.Location
}

var minWall = time.Date(1885, 1, 1, 0, 0, 0, 0, time.UTC).Unix()

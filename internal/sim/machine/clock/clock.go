// Package clock is package time on a [machine.Machine]: as much of it as the library uses. For goroutines that belong
// to no machine it is package time.
package clock

import (
	"time"

	"example.com/leader/internal/sim/machine"
)

// As in package time.
type (
	Duration = time.Duration
	Time     = time.Time
)

// As in package time.
const (
	Nanosecond  = time.Nanosecond
	Microsecond = time.Microsecond
	Millisecond = time.Millisecond
	Second      = time.Second
	Minute      = time.Minute
	Hour        = time.Hour
)

// Now reads both clocks of the machine.
func Now() Time {
	machine.Gate()
	now := machine.Current().Now()
	machine.Gate()
	return now
}

// Since is what has passed since t.
func Since(t Time) Duration { return Now().Sub(t) }

// Until is what has to pass until t.
func Until(t Time) Duration { return t.Sub(Now()) }

// Sleep blocks for d.
func Sleep(d Duration) { <-NewTimer(d).C }

// A Timer is a [time.Timer].
type Timer struct {
	C     <-chan Time
	c     chan Time
	timer interface {
		Stop() bool
		Reset(Duration) bool
	}
}

// NewTimer returns a timer that sends the time on its channel after d.
func NewTimer(d Duration) *Timer {
	machine.Gate()
	m := machine.Current()
	if m == nil {
		t := time.NewTimer(d)
		return &Timer{C: t.C, timer: t}
	}
	c := make(chan Time, 1)
	t := &Timer{C: c, c: c}
	t.timer = m.AfterFunc(d, func() { c <- m.Now() })
	return t
}

// AfterFunc returns a timer that calls f in a goroutine of its own after d.
func AfterFunc(d Duration, f func()) *Timer {
	machine.Gate()
	m := machine.Current()
	if m == nil {
		return &Timer{timer: time.AfterFunc(d, f)}
	}
	return &Timer{timer: m.AfterFunc(d, f)}
}

// After is the channel of a new timer.
func After(d Duration) <-chan Time { return NewTimer(d).C }

// Stop stops the timer. As with any timer since Go 1.23 nothing is received from its channel after that.
func (t *Timer) Stop() bool {
	armed := t.timer.Stop()
	return t.drain() || armed
}

// Reset starts the timer again, as Stop and a new start do.
func (t *Timer) Reset(d Duration) bool {
	armed := t.Stop()
	t.timer.Reset(d)
	return armed
}

// drain takes back what was sent and not received.
func (t *Timer) drain() bool {
	select {
	case <-t.c:
		return true
	default:
		return false
	}
}

// A Ticker is a [time.Ticker].
type Ticker struct {
	C    <-chan Time
	stop func()
}

// NewTicker returns a ticker that sends the time on its channel every d, unless the last one was not received.
func NewTicker(d Duration) *Ticker {
	machine.Gate()
	m := machine.Current()
	if m == nil {
		t := time.NewTicker(d)
		return &Ticker{C: t.C, stop: t.Stop}
	}
	c := make(chan Time, 1)
	var timer *machine.Timer
	ready := make(chan struct{})
	timer = m.AfterFunc(d, func() {
		<-ready
		timer.Reset(d)
		select {
		case c <- m.Now():
		default:
		}
	})
	close(ready)
	return &Ticker{C: c, stop: func() { timer.Stop() }}
}

// Stop stops the ticker.
func (t *Ticker) Stop() { t.stop() }

// Package contexts is package context on a [machine.Machine]: deadlines are times on its clock, and what is to be
// called when a context ends is called in it. For goroutines that belong to no machine it is package context.
//
// The end of a context by its deadline reaches a machine that is stopped all the same: who waits for it goes on
// to its next gate.
package contexts

import (
	"context"
	"time"

	"example.com/leader/internal/sim/machine"
)

// As in package context.
type (
	Context         = context.Context
	CancelFunc      = context.CancelFunc
	CancelCauseFunc = context.CancelCauseFunc
)

// As in package context.
var (
	Canceled         = context.Canceled
	DeadlineExceeded = context.DeadlineExceeded
)

// Background is [context.Background].
func Background() Context { return context.Background() }

// Cause is [context.Cause].
func Cause(ctx Context) error { return context.Cause(ctx) }

// WithCancel is [context.WithCancel].
func WithCancel(parent Context) (Context, CancelFunc) { return context.WithCancel(parent) }

// WithCancelCause is [context.WithCancelCause].
func WithCancelCause(parent Context) (Context, CancelCauseFunc) {
	return context.WithCancelCause(parent)
}

// WithoutCancel is [context.WithoutCancel].
func WithoutCancel(parent Context) Context { return context.WithoutCancel(parent) }

// WithValue is [context.WithValue].
func WithValue(parent Context, key, value any) Context { return context.WithValue(parent, key, value) }

// WithTimeout is [context.WithTimeout] on the clock of the machine.
func WithTimeout(parent Context, d time.Duration) (Context, CancelFunc) {
	return WithDeadline(parent, machine.Current().Now().Add(d))
}

// WithDeadline is [context.WithDeadline] on the clock of the machine.
func WithDeadline(parent Context, deadline time.Time) (Context, CancelFunc) {
	machine.Gate()
	m := machine.Current()
	if m == nil {
		return context.WithDeadline(parent, deadline)
	}
	if earlier, ok := parent.Deadline(); ok && earlier.Before(deadline) {
		return context.WithCancel(parent)
	}
	ctx, cancel := context.WithTimeout(timeless{parent}, m.Real(deadline.Sub(m.Now())))
	return local{ctx, deadline}, cancel
}

// timeless hides a deadline, which is on another clock than that of package context.
type timeless struct{ context.Context }

func (timeless) Deadline() (time.Time, bool) { return time.Time{}, false }

// local has a deadline on the clock of its machine.
type local struct {
	context.Context
	deadline time.Time
}

func (c local) Deadline() (time.Time, bool) { return c.deadline, true }

// AfterFunc is [context.AfterFunc] in the machine.
func AfterFunc(ctx Context, f func()) (stop func() bool) {
	m := machine.Current()
	if m == nil {
		return context.AfterFunc(ctx, f)
	}
	return context.AfterFunc(ctx, func() {
		m.Enter()
		machine.Gate()
		f()
	})
}

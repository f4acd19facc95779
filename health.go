package leader

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// A health is what the check of [WithHealth] says in one election, from the beginning of a campaign to the end of the
// term. It is treated like the lease: what has begun to succeed holds for TTL − margin. At rest it has timers and no
// goroutine.
type health struct {
	e        *Elector
	election string
	lost     func(error) // called when it does not hold any more, without h.mu

	mu      sync.Mutex
	until   time.Time     // it holds until then
	holds   chan struct{} // closed while it holds
	failure error         // the last one; nil before
	next    *time.Timer   // begins the next check; not set while one is under way
	expiry  *time.Timer   // fires at until
	began   time.Time     // when the check that is under way has begun; zero if none is
	cancel  func()        // ends its context
	stopped bool
}

// newHealth begins to check. lost is called each time when the Elector is not healthy any more.
func (e *Elector) newHealth(election string, lost func(error)) *health {
	h := &health{e: e, election: election, lost: lost, holds: make(chan struct{}), cancel: func() {}}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.next = time.AfterFunc(0, h.check)
	h.expiry = time.AfterFunc(time.Hour, h.expire)
	h.expiry.Stop()
	return h
}

// period is how often the check is called, and for how long it may take.
//
// A success holds for TTL − margin. Two more checks fit into that, so that one failure, or one slow check, loses
// nothing.
func (h *health) period() time.Duration {
	return min(h.e.opts.ttl/3, (h.e.opts.ttl-h.e.opts.healthMargin())*5/12)
}

// check calls the user's check, once at a time: next is set when it has returned.
func (h *health) check() {
	began := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopped {
		return
	}
	h.e.mu.Lock()
	former, busy := h.e.checking[h.election]
	if !busy {
		h.e.checking[h.election] = began
	}
	h.e.mu.Unlock()
	if busy { // that of an earlier campaign has not returned
		h.began = former
		h.next.Reset(h.period() / 8)
		return
	}
	h.began = began
	// Not with e.ctx: the function of a Run has its term, and so its checks, for as long as Close waits for it.
	var ctx context.Context
	ctx, h.cancel = context.WithTimeout(context.Background(), h.period())
	h.e.watching.Go(func() { h.call(ctx, began) })
}

func (h *health) call(ctx context.Context, began time.Time) {
	err := errors.New("the check has ended its goroutine")
	defer func() { h.checked(began, err) }()
	err = h.e.opts.health(ctx, h.election)
	if err == nil && ctx.Err() != nil {
		err = fmt.Errorf("the check took %v: %w", time.Since(began).Round(time.Millisecond), ctx.Err())
	}
}

// checked notes what a check has said.
func (h *health) checked(began time.Time, err error) {
	h.e.mu.Lock()
	delete(h.e.checking, h.election)
	h.e.mu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cancel()
	h.began = time.Time{}
	if h.stopped {
		return
	}
	least := h.period() / 8
	early := least
	if h.failure == nil && h.until.IsZero() { // the first: spread, as thousands of elections may have begun together
		early = h.period() - least
	}
	h.next.Reset(max(h.period()-rand.N(early+1)-time.Since(began), least))
	if err != nil {
		h.failure = err
		return
	}
	h.until = began.Add(h.e.opts.ttl - h.e.opts.healthMargin())
	if time.Now().Before(h.until) {
		h.armLocked()
		select {
		case <-h.holds:
		default:
			close(h.holds)
		}
	}
}

// armLocked sets the timer that ends what the last success allows. Like that of a lease, it would fire late if the
// process is stopped between the look at the clock and the start of the timer, so it is set again then.
func (h *health) armLocked() {
	for wait := time.Until(h.until); ; {
		h.expiry.Reset(wait)
		before := wait
		if wait = time.Until(h.until); before-wait < time.Millisecond {
			return
		}
	}
}

// expire says that the Elector is not healthy any more.
func (h *health) expire() {
	h.mu.Lock()
	if h.stopped || time.Now().Before(h.until) { // a check has succeeded in the very moment
		h.mu.Unlock()
		return
	}
	h.openLocked()
	err := h.errorLocked()
	h.mu.Unlock()
	h.lost(err)
}

// openLocked makes holds block again.
func (h *health) openLocked() {
	select {
	case <-h.holds:
		h.holds = make(chan struct{})
	default:
	}
}

// errorLocked is why it does not hold.
func (h *health) errorLocked() error {
	if !h.began.IsZero() && time.Since(h.began) > h.period() {
		return &unhealthyError{fmt.Errorf("the check has not returned for %v", time.Since(h.began).Round(time.Millisecond))}
	}
	return &unhealthyError{h.failure}
}

// An unhealthyError is [ErrUnhealthy] with the last failure. It does not ask the failure for its text before it is asked
// itself: that is the user's code, and may block on the very work that has made the check fail.
type unhealthyError struct{ failure error } // nil: no check has returned yet

func (u *unhealthyError) Error() string {
	if u.failure == nil {
		return ErrUnhealthy.Error()
	}
	return fmt.Sprintf("%v: %v", ErrUnhealthy, u.failure)
}

func (u *unhealthyError) Unwrap() []error {
	if u.failure == nil {
		return []error{ErrUnhealthy}
	}
	return []error{ErrUnhealthy, u.failure}
}

// err is nil if the Elector is healthy now. It asks the clock, so it is right though a timer is late.
func (h *health) err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Now().Before(h.until) {
		return nil
	}
	return h.errorLocked()
}

// wait blocks until the Elector is healthy or ctx ends. As soon as a check has failed or is late, it returns that with
// once, and else tells it, now and again.
func (h *health) wait(ctx context.Context, once bool, tell func(error)) error {
	for {
		err := h.err()
		if err == nil {
			return nil
		}
		h.mu.Lock()
		if !time.Now().Before(h.until) { // expire may be late, and holds would not block until then
			h.openLocked()
		}
		holds, began, failure := h.holds, h.began, h.failure
		h.mu.Unlock()
		if failure != nil || !began.IsZero() && time.Since(began) > h.period() {
			if once {
				return err
			}
			tell(err)
		}
		timer := time.NewTimer(h.period() / 8)
		select {
		case <-holds:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
		timer.Stop()
	}
}

// stop ends the checks. One that is under way is told by its context, and waited for by Close.
func (h *health) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stopped = true
	h.cancel()
	h.next.Stop()
	h.expiry.Stop()
}

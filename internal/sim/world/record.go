package world

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
)

// noted is what the simulation tells of itself, for readers alone.
const noted oracle.Kind = "note"

// now is the time of a history: nanoseconds since the simulation began.
func (w *world) now() int64 { return int64(time.Since(w.began)) }

// record adds to the history.
func (w *world) record(e oracle.Entry) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.recordLocked(e)
}

func (w *world) recordLocked(e oracle.Entry) {
	if e.T == 0 {
		e.T = w.now()
	}
	w.hash = hashOf(w.hash, e)
	w.result.History = append(w.result.History, e)
}

func (w *world) note(format string, args ...any) {
	w.record(oracle.Entry{Kind: noted, Value: fmt.Sprintf(format, args...)})
}

func (w *world) noteLocked(format string, args ...any) {
	w.recordLocked(oracle.Entry{Kind: noted, Value: fmt.Sprintf(format, args...)})
}

// tell records what an Elector's process says, unless it was killed before it could.
func (w *world) tell(el *elector, e oracle.Entry) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tellLocked(el, e)
}

func (w *world) tellLocked(el *elector, e oracle.Entry) {
	if !el.p.dead.Load() {
		e.Proc = el.name
		w.recordLocked(e)
	}
}

// failureOf says which of the failures of a campaign that is, or "".
func failureOf(err error) string {
	switch {
	case errors.Is(err, leader.ErrHeld):
		return oracle.Held
	case errors.Is(err, leader.ErrClosed):
		return oracle.Shut
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return oracle.GaveUp
	}
	return ""
}

// violate says that a rule does not hold. The first time ends the simulation.
func (w *world) violate(rule, format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.violateLocked(rule, format, args...)
}

func (w *world) violateLocked(rule, format string, args ...any) {
	v := Violation{time.Since(w.began), rule, fmt.Sprintf(format, args...)}
	w.noteLocked("VIOLATION of %s: %s", v.Rule, v.What)
	if len(w.result.Violations) == 0 { // what follows is no surprise
		w.result.Violations = append(w.result.Violations, v)
		close(w.quit)
	}
}

// hashOf adds an entry to a hash, FNV-1a of 64 bits.
func hashOf(hash uint64, e oracle.Entry) uint64 {
	if hash == 0 {
		hash = 14695981039346656037
	}
	number := func(n int64) {
		for range 8 {
			hash = (hash ^ uint64(n&0xff)) * 1099511628211
			n >>= 8
		}
	}
	text := func(s string) {
		for i := range len(s) {
			hash = (hash ^ uint64(s[i])) * 1099511628211
		}
		hash = (hash ^ 0x100) * 1099511628211
	}
	for _, n := range []int64{e.T, e.From, e.Until, e.Token, e.Lease, e.Rev} {
		number(n)
	}
	for _, s := range []string{e.Proc, string(e.Kind), e.Election, e.Key, e.Op, e.Base, e.Value, e.Result, e.Err} {
		text(s)
	}
	return hash
}

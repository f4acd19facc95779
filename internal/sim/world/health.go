package world

import (
	"context"
	"errors"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/machine/clock"
)

// A sickness is what the checks of a process say, beside what happens to each of them at random.
type sickness int

const (
	well    sickness = iota
	failing          // checks fail
	hanging          // checks do not return, whatever their context says
)

// errSick is what a check fails with.
var errSick = errors.New("the worker is sick")

// A health is what the checks of an Elector in an election have said. w.mu guards it.
type health struct {
	busy bool // a check is under way
	success
	former success // the one before. The library may not know of the last one yet, if its process is held up
}

// A success is of a check.
type success struct {
	asked time.Time // when it was called, in true time
	until time.Time // so long does it hold, by the clocks of the machine
}

// healthy reports whether it holds at that time of the machine.
func (s success) healthy(now time.Time) bool { return now.Before(s.until) }

// lapsedLocked records that the Elector may have been unhealthy, as a success came too late.
func (h *health) lapsedLocked(el *elector, election string) {
	for _, s := range []success{h.success, h.former} {
		if !s.until.IsZero() && !s.healthy(el.p.m.Now()) && (s == h.success || !el.p.unhindered(h.asked)) {
			el.p.w.tellLocked(el, oracle.Entry{Kind: oracle.CheckFailed, From: int64(s.asked.Sub(el.p.w.began)), Election: election})
			return
		}
	}
}

// healthLocked is the health of the Elector in an election, nil if it has no check.
func (el *elector) healthLocked(election string) *health {
	if !el.checks {
		return nil
	}
	h := el.healths[election]
	if h == nil {
		h = new(health)
		el.healths[election] = h
	}
	return h
}

// check is the check of the user's.
func (el *elector) check(ctx context.Context, election string) (err error) {
	p, w := el.p, el.p.w
	asked, began := time.Now(), clock.Now()
	w.mu.Lock()
	h := el.healthLocked(election)
	if h.busy && !p.dead.Load() {
		w.violateLocked("health", "%s: %s is checked twice at a time", election, el.name)
	}
	h.busy = true
	h.lapsedLocked(el, election)
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		h.busy = false
		h.lapsedLocked(el, election)
		if err == nil && ctx.Err() == nil {
			h.success, h.former = success{asked, began.Add(w.ttl - w.margin)}, h.success
			return
		}
		w.result.Counts.Unhealthy++
		w.tellLocked(el, oracle.Entry{Kind: oracle.CheckFailed, From: int64(asked.Sub(w.began)), Election: election})
	}()
	if !w.calm.Load() {
		if p.rng.IntN(4) == 0 {
			p.sleep(ctx, p.about(w.ttl/6))
		}
		if p.rng.IntN(20) == 0 {
			return errSick
		}
	}
	switch p.sickness() {
	case failing:
		return errSick
	case hanging:
		for p.sickness() == hanging && w.ctx.Err() == nil && !p.dead.Load() {
			p.sleep(w.ctx, w.ttl/20)
		}
	}
	return ctx.Err()
}

func (p *process) sickness() sickness {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sick
}

func (p *process) fall(s sickness) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sick = s
}

// sicken lets the checks of a process fail or hang for a while.
func (s *strike) sicken(how sickness) {
	s.p.fall(how)
	s.last(s.ttl(0.2, 3))
	s.p.fall(well)
}

// unhindered reports whether nothing has held the process up since that time, so that what it has read of its clocks
// is what the time was.
func (p *process) unhindered(since time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stops == 0 && p.holds == 0 && p.until.IsZero() && p.resumed.Before(since)
}

// checkUnhealthyLocked checks that a term that was lost by its health was not healthy.
func (w *world) checkUnhealthyLocked(t *term) {
	h := t.call.el.healthLocked(t.election)
	if h == nil || t.p.unhindered(h.asked) && h.healthy(t.p.m.Now()) {
		w.violateLocked("cause", "%s: %s was told that it is not healthy enough for token %d, and it is", t.election, t.p.name, t.token)
	}
}

// checkHealthy checks that whoever believes to lead is healthy.
func (w *world) checkHealthy() {
	w.mu.Lock()
	var checked []*term
	for _, name := range w.names {
		for _, t := range w.terms[name] {
			if t.call.el.checks {
				checked = append(checked, t)
			}
		}
	}
	w.mu.Unlock()
	for _, t := range checked {
		if !t.believes() {
			continue
		}
		w.mu.Lock()
		h := t.call.el.healthLocked(t.election)
		if t.p.unhindered(h.asked) && !t.p.dead.Load() && !h.healthy(t.p.m.Now()) {
			w.violateLocked("health", "%s: %s believes in token %d, and its last check that has succeeded does not hold", t.election, t.p.name, t.token)
		}
		w.mu.Unlock()
	}
}

// checkKeptLocked checks, when a process has deleted the key of a term of its own by Run, that this was not in the middle
// of its work. Whoever is unhealthy may hang, so its work has a margin.
func (w *world) checkKeptLocked(t *term) {
	c := t.call
	if !c.run || !c.inLead || c.leads != t.token || t.resigned || !t.p.unhindered(t.over) {
		return
	}
	switch cause := context.Cause(t.l.Context()); {
	case errors.Is(cause, leader.ErrUnhealthy) && time.Since(t.over) < t.p.m.Real(w.margin):
		w.violateLocked("margin", "%s: the key of %s with token %d was deleted before its function had returned, and before a margin had passed", t.election, t.p.name, t.token)
	case errors.Is(cause, leader.ErrTransferred):
		w.violateLocked("margin", "%s: the key of %s with token %d, which was asked to step back, was deleted before its function had returned", t.election, t.p.name, t.token)
	}
}

// sickenALeader lets the checks of a leader fail, or hang. It loses its term in time, and leads no more before it is well.
// The function that leads may hang too: then the key goes a margin later, and Run does not campaign again before the
// function has returned.
func (w *world) sickenALeader() {
	w.mu.Lock()
	var sick *term
	for _, name := range w.names {
		for _, t := range w.terms[name] {
			if t.call.el.checks && t.told && (sick == nil || t.call.run) {
				sick = t
			}
		}
	}
	w.mu.Unlock()
	if sick == nil {
		return
	}
	p, c := sick.p, sick.call
	how := failing + sickness(w.rng.IntN(2))
	w.note("probe: %s is sick: %d", p.name, how)
	blocked := w.longest(w.margin) + prompt
	w.limit(limits{blocked, 0, w.longest(w.ttl) + sweepWithin, blocked + 2*time.Second})
	w.mu.Lock()
	c.stuck = true
	w.mu.Unlock()
	p.fall(how)
	w.sleep(p.m.Real(w.ttl-w.margin) + prompt)
	if !w.violated() && sick.believes() {
		w.violate("health", "%s: %s believes in token %d, although its checks have failed for %v", sick.election, p.name, sick.token, w.ttl-w.margin+prompt)
	}
	w.sleep(p.m.Real(w.margin) + prompt)
	w.mu.Lock()
	stuck := c.inLead
	switch {
	case w.violated():
	case w.lives[sick.token].fate == alive:
		w.violateLocked("health", "%s: the key of %s with token %d is there a margin after the term was lost", sick.election, p.name, sick.token)
	case stuck && c.overdue == 0:
		w.violateLocked("overdue", "%s: nobody was told that the function of %s with token %d does not return", sick.election, p.name, sick.token)
	}
	for _, name := range w.names {
		for _, other := range w.callsLocked(p, name) {
			if life := w.lives[other.newest]; other.el.checks && life != nil && life.fate == alive && !w.violated() {
				w.violateLocked("health", "%s: the key of %s with token %d is there, although its checks fail", name, p.name, life.token)
			}
		}
	}
	c.stuck = false
	w.mu.Unlock()
	p.fall(well)
	w.sleep(p.m.Real(w.ttl/3) + rejoinWithin) // the next check
}

// overdue is the hook.
func (w *world) overdue(el *elector, election string, l *leader.Leader, late time.Duration) {
	c, ok := l.Context().Value(callKey{}).(*call)
	if !ok {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if el.p.dead.Load() {
		return
	}
	switch {
	case l.Context().Err() == nil && c.ctx.Err() == nil && !el.isClosed():
		w.violateLocked("overdue", "%s: %s was told that its function is late with token %d, and its context goes on", election, el.p.name, l.Token())
	case late > 0 && !c.inLead && el.p.unhindered(c.left):
		w.violateLocked("overdue", "%s: %s was told that its function is late with token %d, and it has returned", election, el.p.name, l.Token())
	case late > 0 && late < w.margin:
		w.violateLocked("overdue", "%s: %s was told that its function is late with token %d by %v, within the margin", election, el.p.name, l.Token(), late)
	case late == 0 && (c.inLead || c.overdue == 0):
		w.violateLocked("overdue", "%s: %s was told that its function has returned with token %d, which it has not, or nobody was told that it is late", election, el.p.name, l.Token())
	}
	c.overdue = late
}

// enter says that the function that Run has called for a term begins, and leave that it has returned.
func (c *call) enter(token int64) (leave func()) {
	in := func(yes bool) {
		c.p.w.mu.Lock()
		defer c.p.w.mu.Unlock()
		c.inLead = yes
		if yes {
			c.leads, c.overdue = token, 0
		} else {
			c.left = time.Now()
		}
	}
	in(true)
	return func() { in(false) }
}

func (c *call) isStuck() bool {
	c.p.w.mu.Lock()
	defer c.p.w.mu.Unlock()
	return c.stuck && c.p.w.ctx.Err() == nil && !c.p.dead.Load()
}

// checkOverdueLocked checks, when Run goes on, that its function has returned, and that this was told if it was late.
func (c *call) checkOverdueLocked() {
	switch {
	case c.p.dead.Load():
	case c.inLead:
		c.p.w.violateLocked("overdue", "%s: %s goes on, and the function that Run has called has not returned", c.election, c.value)
	case c.overdue > 0:
		c.p.w.violateLocked("overdue", "%s: %s goes on, and nobody was told that the function that was late has returned", c.election, c.value)
	}
}

package world

import (
	"context"
	"errors"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
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
	busy      bool // a check is under way
	succeeded bool // one has
}

// healthLocked is the health of the Elector in an election, nil if it has no check.
func (el *elector) healthLocked(election string) *health {
	if !el.p.checks {
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
	e := oracle.Entry{Kind: oracle.Checked, From: w.now(), Election: election, Result: oracle.Failed}
	w.mu.Lock()
	h := el.healthLocked(election)
	if h.busy && !p.dead.Load() {
		w.violateLocked("health", "%s: %s is checked twice at a time", election, el.name)
	}
	h.busy = true
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		h.busy = false
		if err == nil {
			h.succeeded, e.Result = true, oracle.OK
		} else {
			w.result.Counts.Unhealthy++
		}
		w.tellLocked(el, e)
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

// sickenALeader lets the checks of a leader fail, or hang. It loses its term in time, and leads no more before it is well.
// The function that leads may hang too: then the key goes a margin later, and Run does not campaign again before the
// function has returned.
func (w *world) sickenALeader() {
	w.mu.Lock()
	var sick *term
	for _, name := range w.names {
		for _, t := range w.terms[name] {
			if t.p.checks && t.told && (sick == nil || t.call.run) {
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
	switch {
	case w.violated():
	case w.lives[sick.token].fate == alive:
		w.violateLocked("health", "%s: the key of %s with token %d is there a margin after the term was lost", sick.election, p.name, sick.token)
	case c.inLead && !c.overdue:
		w.violateLocked("overdue", "%s: nobody was told that the function of %s with token %d does not return", sick.election, p.name, sick.token)
	}
	for _, name := range w.names {
		for _, other := range w.callsLocked(p, name) {
			if life := w.lives[other.newest]; p.checks && life != nil && life.fate == alive && !w.violated() {
				w.violateLocked("health", "%s: the key of %s with token %d is there, although its checks fail", name, p.name, life.token)
			}
		}
	}
	c.stuck = false
	w.mu.Unlock()
	p.fall(well)
	w.sleep(p.m.Real(w.ttl/3) + rejoinWithin) // the next check
}

// overdue is the hook. The oracle knows whether it is right, unless the term was given up before the function has returned,
// by Close or by itself: the history does not say when it returns then.
func (w *world) overdue(el *elector, election string, l *leader.Leader, late time.Duration) {
	c, ok := l.Context().Value(callKey{}).(*call)
	if !ok {
		return
	}
	e := oracle.Entry{Kind: oracle.Overdue, Election: election, Token: l.Token()}
	if late > 0 {
		e.From = w.now() - int64(el.p.m.Real(late))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	t := c.terms[l.Token()]
	unknown := t != nil && t.givenUp && c.inLead
	if late > 0 && !unknown || late == 0 && c.overdue {
		c.overdue = true
		w.tellLocked(el, e)
	}
}

// enter says that the function that Run has called begins, and leave that it has returned.
func (c *call) enter() (leave func()) {
	in := func(yes bool) {
		c.p.w.mu.Lock()
		defer c.p.w.mu.Unlock()
		if c.inLead = yes; yes {
			c.overdue = false
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

// checkReturnedLocked checks, when Run goes on, that its function has returned.
func (c *call) checkReturnedLocked() {
	if c.inLead && !c.p.dead.Load() {
		c.p.w.violateLocked("overdue", "%s: %s goes on, and the function that Run has called has not returned", c.election, c.value)
	}
}

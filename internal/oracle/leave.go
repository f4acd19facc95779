package oracle

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// overdueIn is how late a call of Overdue may be.
const overdueIn = time.Second

// A check is a check of health that has succeeded.
type check struct {
	*Entry
	until int64 // that this one and those before allow to believe
}

// readChecks reads who was healthy when. The library may note a success some time after it is recorded: too late for it
// to count, or when the health that was there before is just over.
func (c *checker) readChecks() {
	c.checks, c.healthy = make(map[place][]*check), make(map[place][]span)
	for _, e := range c.by[Checked] {
		// A timer ends what a success allows, and stands still while the machine is suspended.
		at, until := placeOf(e), ranSince(c.suspends[c.host(e.Proc)], e.From, c.lasts(e.Proc), 0)
		if c.healthy[at] == nil {
			c.healthy[at] = []span{}
		}
		if e.Result != OK {
			continue
		}
		spans := c.healthy[at]
		if noted := c.within(e.Proc, e.T, clockLag); noted-e.From < c.lasts(e.Proc)/3 {
			from := e.T
			if n := len(spans); n > 0 && from <= spans[n-1].to && spans[n-1].to < noted {
				from = noted
			}
			began := e.From // by the library's account. It may have been stopped between that and the call
			if stop, ok := touches(c.stops[c.host(e.Proc)], span{began, began}); ok {
				began = stop.from
			}
			c.healthy[at] = append(spans, span{from, until - (e.From - began) - c.slack(clockLag)})
		}
		all := c.checks[at]
		if len(all) > 0 {
			until = max(until, all[len(all)-1].until)
		}
		c.checks[at] = append(all, &check{e, until})
	}
	for at, spans := range c.healthy {
		c.healthy[at] = merge(spans)
	}
}

// sick reports whether the owner of a key may have lost its health since it has put the key, and by the given time. It
// has put the key only after a check had succeeded.
func (c *checker) sick(l *life, by int64) bool {
	return c.unwell(place{l.owner, l.election}, span{l.since.to, by})
}

// unwell reports whether a process that has checks may not have been healthy at some time.
func (c *checker) unwell(at place, in span) bool {
	healthy, checks := c.healthy[at]
	return checks && slices.ContainsFunc(gaps(in, healthy), func(s span) bool { return s.from < s.to })
}

// checked reports whether a check has succeeded in a campaign, long before its end, and the process was healthy from
// then on.
func (c *checker) checked(at place, k *campaign) bool {
	return slices.ContainsFunc(c.checks[at], func(e *check) bool {
		noted := c.within(at.proc, e.T, clockLag)
		return e.From >= k.began.T && noted < k.until && !c.unwell(at, span{noted, k.until})
	})
}

// asked reports whether a candidate or leader may have been asked to step back by the given time.
func (c *checker) asked(who termID, by int64) bool {
	since, ok := c.asks[who]
	return ok && since <= by
}

// until returns until when the holder of a term that is over by the given time must have kept its key: until its work
// had stopped, as it has said, or, if it was asked to step back or unhealthy, until a margin after the end of the term.
// Run waits for its function however long that takes, unless the process is unhealthy.
func (c *checker) until(t *term, by int64) int64 {
	until := int64(never)
	if given := c.given(t); given != nil {
		until = given.T
	}
	switch t.cause() {
	case Resigned:
		return until
	case Transferred, Unhealthy, "":
	default:
		return never // whoever has lost a term also says that it resigns
	}
	l := c.lives[t.termID]
	sick := l != nil && c.sick(l, by)
	switch {
	case !sick && !c.asked(t.termID, by):
	case t.won == nil || t.won.T > by: // nobody has worked in it
		until = min(until, t.first().T)
	case sick || t.won.Value != ByRun:
		until = min(until, t.last+c.real(t.proc(), c.Margin)-c.slack(rounding))
	}
	return until
}

// checkHealth flags belief that outlasts the last successful check. A timer ends it, also for IsLeader.
func (c *checker) checkHealth() {
	for _, t := range c.allTerms() {
		if t.won == nil || t.won.Op != Ours || c.healthy[placeOf(t.won)] == nil {
			continue
		}
		checks := c.checks[placeOf(t.won)]
		for _, p := range t.pieces {
			i, _ := slices.BinarySearchFunc(checks, p.T+1, func(e *check, t int64) int { return cmp.Compare(e.T, t) })
			var until int64
			var last *Entry
			if i > 0 {
				until, last = checks[i-1].until, checks[i-1].Entry
			}
			if p.judged() && p.T > c.lateUntil(t.proc(), until+c.slack(c.Margin/4)) {
				c.violate(RuleHealth, []*Entry{t.won, last, p.Entry}, "%s believed in %s by %s at %s, though its last successful check allowed that until %s",
					p.Proc, t.termID, p.Op, c.at(p.T), c.at(until))
				break
			}
		}
	}
}

// checkOverdue checks what was reported of functions that ignore the end of their context.
func (c *checker) checkOverdue() {
	for _, t := range c.allTerms() {
		if t.won == nil || t.won.Value != ByRun {
			if len(t.overdue) > 0 {
				c.violate(RuleOverdue, t.overdue, "%s was told that the function of %s is overdue, but Run has called none", t.overdue[0].Proc, t.termID)
			}
			continue
		}
		wrong := func(e *Entry, why string) {
			c.violate(RuleOverdue, []*Entry{t.won, t.resigning, e}, "%s in %s: %s", t.proc(), t.termID, why)
		}
		returned := int64(never)
		if t.resigning != nil {
			returned = t.resigning.T
		}
		told := slices.ContainsFunc(t.overdue, func(e *Entry) bool { return e.From == 0 })
		for i, e := range t.overdue {
			switch {
			case e.From == 0 && (i == 0 || i+1 < len(t.overdue) || e.T < returned):
				wrong(e, "the return of the function was told when it had not returned, was not overdue, or again")
			case e.From == 0:
			case e.T-e.From < c.real(t.proc(), c.Margin)-c.slack(rounding):
				wrong(e, "the function was called overdue before the margin had passed")
			case slices.ContainsFunc(t.pieces, func(p *piece) bool { return p.Op == ByRun && p.T > e.From+c.slack(clockLag) }):
				wrong(e, "the function was called overdue, and its context had not ended then")
			case t.resigning != nil && e.T > c.within(t.proc(), returned, overdueIn):
				wrong(e, "the function was called overdue when it had returned")
			}
		}
		if n := len(t.overdue); n > 0 && !told && t.resigning != nil && !t.cutShort(c.within(t.proc(), returned, tellTime)) {
			wrong(t.overdue[n-1], "the function was called overdue, and its return was not told")
		}
		if len(t.ended) > 0 && len(t.overdue) == 0 && t.resigning != nil &&
			returned > c.within(t.proc(), t.ended[0].T, c.Margin+overdueIn) {
			wrong(t.ended[0], "the function has not returned in time, and was not called overdue")
		}
	}
}

// checkTransfers checks what Transfer has returned.
func (c *checker) checkTransfers() {
	for _, e := range c.by[Transfer] {
		led := c.led(e)
		target := c.lives[idOf(e)]
		vacant := slices.Contains(led, 0)
		led = slices.DeleteFunc(led, func(token int64) bool { return token == 0 })
		alone := func(l line) (span, bool) { return l.since, !strings.Contains(l.tokens, " ") }
		switch {
		case e.Result == OK && e.Token != 0 && !slices.Contains(led, e.Token):
			c.violate(RuleTransfer, []*Entry{e}, "%s was transferred to token %d from %s to %s, which did not lead then", e.Election, e.Token, c.at(e.From), c.at(e.T))
		case e.Result == OK && e.Token == 0 && len(led) < 2:
			c.violate(RuleTransfer, []*Entry{e}, "%s was transferred from %s to %s, but its leader was the same all that time", e.Election, c.at(e.From), c.at(e.T))
		case e.Result == Failed && !vacant && (target == nil || target.gone.from > e.T) && (e.Token != 0 || !during(c.linesOf(e.Election), e, alone)):
			c.violate(RuleTransfer, []*Entry{e}, "the transfer of %s failed at %s, though somebody led and the candidate was there: %s", e.Election, c.at(e.T), e.Err)
		case e.Result == Unknown && c.inCalm(e.From, e.T) && e.T-e.From > int64(RecoverTime+c.Patience) && !c.peers(e):
			c.violate(RuleTransfer, []*Entry{e}, "in calm, the transfer of %s took from %s to %s, and was not done: %s", e.Election, c.at(e.From), c.at(e.T), e.Err)
		}
	}
}

// led returns the tokens of all who may have led during a call, 0 for nobody.
func (c *checker) led(e *Entry) []int64 {
	var tokens []int64
	states := c.statesOf(e.Election)
	for i, s := range states {
		if s.since.from <= e.T && (i+1 == len(states) || states[i+1].since.to >= e.From) {
			tokens = append(tokens, s.token)
		}
	}
	slices.Sort(tokens)
	return slices.Compact(tokens)
}

// peers reports whether a candidate of another system was in the queue during a call.
func (c *checker) peers(e *Entry) bool {
	return slices.ContainsFunc(c.queues[e.Election], func(l *life) bool {
		return !c.ours(l.owner) && l.since.from <= e.T && l.gone.to >= e.From
	})
}

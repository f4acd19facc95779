package oracle

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"
)

const (
	// overlapAllowed is how long a leader whose key was taken may need to know, when nothing hinders it.
	overlapAllowed = 500 * time.Millisecond
	// PauseOf a process is what a time without belief shows, or without a sign of life, if it is longer than that.
	PauseOf = 50 * time.Millisecond
	// lateTimer is how late a timer may fire after its process was stopped.
	lateTimer = 100 * time.Millisecond
	// unknown is a deadline that nobody has told of: later than all others, and something may be added.
	unknown = never / 2
)

// A piece of belief.
type piece struct {
	*Entry
	until int64 // what is later is excused, as the timer was late
}

// judged reports whether belief of that sort is to keep the rules.
func (p *piece) judged() bool { return p.Op == ByIsLeader || p.timed() }

// timed reports whether it is of a context, which a timer ends.
func (p *piece) timed() bool { return p.Op == ByContext || p.Op == ByRun }

// A renewal is one that counted, and what may be believed of it.
type renewal struct {
	*Entry
	sent     int64
	deadline int64 // by this one and those before
}

// readRenewals reads those that counted, by lease. The hook that tells of one may be late, and so may be what it says
// of when the renewal was sent. A deadline that is later than that allows is not believed.
func (c *checker) readRenewals() map[int64][]*renewal {
	renewed := make(map[int64][]*renewal)
	for _, e := range c.by[Renewed] {
		lasts := c.lasts(e.Proc)
		if e.Until > e.From+lasts+c.slack(clockLag) {
			c.violate(RuleDeadline, []*Entry{e}, "%s renewed the lease %x at %s, with a deadline at %s", e.Proc, e.Lease, c.at(e.From), c.at(e.Until))
		}
		r := &renewal{e, min(e.From, e.Until-lasts), min(e.Until, e.From+lasts)}
		all := renewed[e.Lease]
		if len(all) > 0 {
			r.deadline = max(r.deadline, all[len(all)-1].deadline)
		}
		renewed[e.Lease] = append(all, r)
	}
	return renewed
}

// bought is the deadline that renewals have bought which were sent by then; 0 if there were none, [unknown] if that was not told.
func (c *checker) bought(lease, by int64) int64 {
	renewals := c.renewed[lease]
	i, _ := slices.BinarySearchFunc(renewals, by+1, func(r *renewal, t int64) int { return cmp.Compare(r.sent, t) })
	if len(renewals) > 0 && i == len(renewals) && c.untold[renewals[0].Proc] != 0 {
		return unknown
	}
	if i == 0 {
		return 0
	}
	return renewals[i-1].deadline
}

// firstDeadline is the latest that a term may have begun with: its lease was granted before the key was there.
func (c *checker) firstDeadline(t *term) int64 {
	granted := t.won.T
	if l := c.lives[t.termID]; l != nil {
		granted = l.since.to
	}
	return max(granted+c.lasts(t.proc()), c.bought(t.won.Lease, t.won.T))
}

// deadline is until when a term may be believed in, as far as renewals go that were sent by then.
func (c *checker) deadline(t *term, by int64) int64 {
	return max(min(t.won.Until, c.firstDeadline(t)), c.bought(t.won.Lease, by))
}

// checkBeliefs checks when belief in each term ended.
func (c *checker) checkBeliefs() {
	for _, t := range c.allTerms() {
		if t.won == nil || t.won.Op != Ours {
			continue
		}
		// What is told of a term that is over already is when that was noticed.
		if t.won.Until > c.firstDeadline(t)+c.slack(clockLag) && t.won.Until > t.won.T {
			c.violate(RuleDeadline, []*Entry{t.won}, "%s won %s at %s with a deadline at %s", t.proc(), t.termID, c.at(t.won.T), c.at(t.won.Until))
		}
		for _, p := range t.pieces {
			deadline := c.deadline(t, p.T)
			if !c.inTime(p, deadline+c.slack(clockLag), true) {
				c.violate(RuleDeadline, []*Entry{t.won, p.Entry}, "%s believed in %s by %s at %s, after its deadline at %s",
					p.Proc, t.termID, p.Op, c.at(p.T), c.at(deadline))
				break
			}
		}
		if len(t.ended) > 0 {
			c.checkBelief(t, t.ended[0].T, false, "the term had ended", t.ended[0])
		}
		l := c.lives[t.termID]
		if l == nil {
			continue
		}
		switch how, _ := c.endingOf(l, l.gone.to); how {
		case operator, early:
			if told := l.gone.to + int64(overlapAllowed); c.inCalm(l.gone.to, told) {
				c.checkBelief(t, c.lateUntil(t.proc(), told), true, "it must have known, without faults, that its key was gone", l.deleted)
			}
			// No renewal counts once the key is gone.
			c.checkBelief(t, l.gone.to+c.lasts(t.proc()), true, "no renewal could count any longer", l.deleted)
		case resigned:
			// It may have been stopped before it could, until the lease had expired.
			lasted := c.deadline(t, l.gone.to)
			alone := lasted >= unknown || l.gone.to >= lasted+c.margin(t.proc())
			c.checkBelief(t, l.gone.to, alone, "it had deleted its key", l.deleted)
		case expired:
			c.checkBelief(t, l.gone.to-c.margin(t.proc())+c.slack(rounding), true, "the margin before its lease expired had begun", l.deleted)
		}
	}
}

// checkBelief objects to the last belief in a term that is later than it may be.
func (c *checker) checkBelief(t *term, limit int64, timers bool, since string, because *Entry) {
	for _, p := range slices.Backward(t.pieces) {
		if !c.inTime(p, limit, timers) {
			c.violate(RuleMargin, []*Entry{t.won, p.Entry, because}, "%s believed in %s by %s at %s, when %s, at %s",
				p.Proc, t.termID, p.Op, c.at(p.T), since, c.at(limit))
			return
		}
	}
}

// inTime reports whether a piece of belief that is to end at a time does so. A context that a timer ends may be late by
// a quarter of the margin, and longer if its process was stopped. That of Run ends with another one, which takes
// moments in any case.
func (c *checker) inTime(p *piece, limit int64, timers bool) bool {
	if p.T <= limit || !p.judged() {
		return true
	}
	if p.Op == ByIsLeader || p.Op == ByContext && !timers {
		return false
	}
	timer := limit + c.slack(c.Margin/4)
	if p.T > timer {
		if p.T > c.lateUntil(p.Proc, timer) {
			return false
		}
		if p.until == p.T {
			c.Late = append(c.Late, *p.Entry)
		}
		p.until = min(p.until, limit)
	}
	return true
}

// An Overlap is a time in which two believed that they led.
type Overlap struct {
	Election string
	Tokens   [2]int64 // the earlier term first
	Procs    [2]string
	Why      string
	From     int64         // both had believed by then
	Certain  time.Duration // for how long both certainly believed

	first [2]*Entry // pieces that overlap
	spans []span
}

// checkExclusion goes through the pieces of each election in the order of their beginning.
func (c *checker) checkExclusion() {
	in := make(map[string][]*piece)
	for _, t := range c.terms {
		for _, p := range t.pieces {
			if p.judged() {
				in[t.election] = append(in[t.election], p)
			}
		}
	}
	for _, election := range slices.Sorted(maps.Keys(in)) {
		pieces := in[election]
		slices.SortFunc(pieces, func(a, b *piece) int {
			return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.Token, b.Token), cmp.Compare(a.T, b.T))
		})
		overlaps := make(map[[2]int64]*Overlap)
		var open []*piece
		for _, p := range pieces {
			open = slices.DeleteFunc(open, func(q *piece) bool { return q.T < p.From })
			for _, q := range open {
				if q.Token != p.Token {
					c.overlap(overlaps, q, p)
				}
			}
			open = append(open, p)
		}
		for _, o := range slices.SortedFunc(maps.Values(overlaps), func(a, b *Overlap) int {
			return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.Tokens[0], b.Tokens[0]))
		}) {
			c.judge(o)
		}
	}
}

// overlap adds what two pieces have in common to the overlap of their terms. A single answer was given at some time
// between question and answer, and has something in common only with what covers all of that.
func (c *checker) overlap(overlaps map[[2]int64]*Overlap, older, newer *piece) {
	if older.Token > newer.Token {
		older, newer = newer, older
	}
	from, to := max(older.From, newer.From), min(older.until, newer.T)
	if older.From > newer.T || newer.From > older.until || older.until < min(older.From, older.T) {
		return
	}
	tokens := [2]int64{older.Token, newer.Token}
	o := overlaps[tokens]
	if o == nil {
		o = &Overlap{
			Election: older.Election, Tokens: tokens, Procs: [2]string{older.Proc, newer.Proc},
			From: from, first: [2]*Entry{older.Entry, newer.Entry},
		}
		overlaps[tokens] = o
	}
	o.spans = append(o.spans, span{from, to}) // the other way round for a single answer
}

// judge measures an overlap and decides whether it is excused.
func (c *checker) judge(o *Overlap) {
	for _, s := range merge(o.spans) {
		o.Certain += time.Duration(max(0, s.to-s.from))
	}
	why, entries, excused := c.excuse(o)
	o.Why = why
	if excused {
		c.Overlaps = append(c.Overlaps, *o)
		return
	}
	c.violate(RuleExclusion, append(o.first[:], entries...), "%s: %s believed in term %d and %s in term %d from %s on, for %v in all; %s",
		o.Election, o.Procs[0], o.Tokens[0], o.Procs[1], o.Tokens[1], c.at(o.From), o.Certain, why)
}

// excuse says what was with the key of the earlier term, which entries show it and whether it excuses the
// overlap.
func (c *checker) excuse(o *Overlap) (why string, entries []*Entry, excused bool) {
	l := c.lives[termID{o.Election, o.Tokens[0]}]
	if l == nil {
		return "no key of the earlier term is known", nil, false
	}
	how, because := c.endingOf(l, o.From)
	entries = []*Entry{because, l.deleted}
	switch how {
	case operator:
		why := fmt.Sprintf("an operator took the earlier key (%s, from %s)", because.Op, c.at(because.From))
		return why, entries, true
	case expired:
		if c.slow(o.Procs[0]) {
			return "the clocks of its holder are slower than the margin covers", entries, true
		}
	case early:
		return "etcd deleted the earlier key before its lease could expire", entries, o.Certain <= overlapAllowed && c.deposed(l.gone.to)
	}
	return fmt.Sprintf("the earlier key's end: %s", how), entries, false
}

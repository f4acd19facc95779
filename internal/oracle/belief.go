package oracle

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"
)

const (
	// overlapAllowed is how long a leader may take to learn that its key was taken, if nothing hinders it.
	overlapAllowed = 500 * time.Millisecond
	// PauseOf is for how long a process that has paused gave no answer, or no sign of life, at least.
	PauseOf = 50 * time.Millisecond
	// lateTimer is how late a timer may fire after its process was stopped.
	lateTimer = 100 * time.Millisecond
	// unknown is a deadline that was not recorded. It is later than all others, and can be added to without overflow.
	unknown = never / 2
)

// A piece of belief.
type piece struct {
	*Entry
	until int64 // what is later is excused, because the timer was late
}

// judged reports whether belief of this kind must keep the rules.
func (p *piece) judged() bool { return p.Op == ByIsLeader || p.timed() }

// timed reports whether it is belief by a context, which a timer ends.
func (p *piece) timed() bool { return p.Op == ByContext || p.Op == ByRun }

// A renewal is a renewal that counted, with the times that follow from it.
type renewal struct {
	*Entry
	sent     int64
	deadline int64 // that this one and those before have bought
}

// readRenewals reads the renewals that counted, by lease. The hook that reports one may be late, and so may be the time
// at which it says that the renewal was sent. A deadline later than that time allows is not trusted.
func (c *checker) readRenewals() map[int64][]*renewal {
	renewed := make(map[int64][]*renewal)
	for _, e := range c.by[Renewed] {
		lasts := c.lasts(e.Proc)
		if e.Until > e.From+lasts+c.slack(clockLag) {
			c.violate(RuleDeadline, []*Entry{e}, "%s renewed the lease %x at %s, with a deadline at %s, which is later than that allows", e.Proc, e.Lease, c.at(e.From), c.at(e.Until))
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

// bought returns the deadline that the renewals sent by the given time have bought. It is 0 if there were none, and
// [unknown] if the process was killed before it could report them.
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

// firstDeadline returns the latest deadline with which a term may have begun: its lease was granted before its key
// existed.
func (c *checker) firstDeadline(t *term) int64 {
	granted := t.won.T
	if l := c.lives[t.termID]; l != nil {
		granted = l.since.to
	}
	return max(granted+c.lasts(t.proc()), c.bought(t.won.Lease, t.won.T))
}

// deadline returns until when a term may be believed in, considering the renewals sent by the given time.
func (c *checker) deadline(t *term, by int64) int64 {
	return max(min(t.won.Until, c.firstDeadline(t)), c.bought(t.won.Lease, by))
}

// checkBeliefs checks when belief in each term ended.
func (c *checker) checkBeliefs() {
	for _, t := range c.allTerms() {
		if t.won == nil || t.won.Op != Ours {
			continue
		}
		// If a term was already over when it was recorded, its deadline is the time at which that was noticed.
		if t.won.Until > c.firstDeadline(t)+c.slack(clockLag) && t.won.Until > t.won.T {
			c.violate(RuleDeadline, []*Entry{t.won}, "%s won %s at %s with a deadline at %s, which is later than its lease allows", t.proc(), t.termID, c.at(t.won.T), c.at(t.won.Until))
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
				c.checkBelief(t, c.lateUntil(t.proc(), told), true, "without faults it must have known that its key was gone", l.deleted)
			}
			// Once the key is gone, no renewal counts.
			c.checkBelief(t, l.gone.to+c.lasts(t.proc()), true, "no renewal could count any longer", l.deleted)
		case resigned:
			// The process may have been stopped before it could delete the key, until the lease had expired.
			lasted := c.deadline(t, l.gone.to)
			alone := lasted >= unknown || l.gone.to >= lasted+c.margin(t.proc())
			c.checkBelief(t, l.gone.to, alone, "it had deleted its key", l.deleted)
		case reclaimed:
			c.checkBelief(t, l.gone.to, false, "its lease had been revoked, because it was dead", l.deleted)
		case expired:
			if c.reclaimable(l) != nil {
				c.checkBelief(t, l.gone.to, false, "its lease had been revoked, because it was dead, or had expired", l.deleted)
				continue
			}
			c.checkBelief(t, l.gone.to-c.margin(t.proc())+c.slack(rounding), true, "the margin before its lease expired had begun", l.deleted)
		}
	}
}

// checkBelief flags the last belief in a term that is later than the limit.
func (c *checker) checkBelief(t *term, limit int64, timers bool, since string, because *Entry) {
	for _, p := range slices.Backward(t.pieces) {
		if !c.inTime(p, limit, timers) {
			c.violate(RuleMargin, []*Entry{t.won, p.Entry, because}, "%s believed in %s by %s at %s, but %s at %s",
				p.Proc, t.termID, p.Op, c.at(p.T), since, c.at(limit))
			return
		}
	}
}

// inTime reports whether a piece of belief ends by the limit. A context that a timer ends may be late by a quarter of
// the margin, and longer if its process was stopped. The context of Run ends with another context, which always takes
// moments.
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

// An Overlap is a time in which two processes believed that they led.
type Overlap struct {
	Election string
	Tokens   [2]int64 // the earlier term first
	Procs    [2]string
	Why      string
	From     int64         // by then each of them believed
	Certain  time.Duration // for how long both certainly believed

	first [2]*Entry // the first pieces that overlap
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

// overlap adds the common time of two pieces to the overlap of their terms. A single answer was given at an unknown
// time between question and answer. So it overlaps only with a piece that covers all of that time.
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
	o.spans = append(o.spans, span{from, to}) // from is later than to for a single answer
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

// excuse returns what happened to the key of the earlier term, which entries show it, and whether it excuses the
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

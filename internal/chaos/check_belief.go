//go:build linux

package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	opIsLeader = "IsLeader"
	opContext  = "Context"

	// overlapAllowed is how long a leader whose key was taken may need to know, when nothing hinders it.
	overlapAllowed = 500 * time.Millisecond
	// settled is how long there must have been no fault for nothing to hinder it.
	settled = time.Second
	// pauseOf a process is what a time without belief shows, if it is longer than that.
	pauseOf = 50 * time.Millisecond
	// lateTimer is how late a timer may fire after a pause.
	lateTimer = 100 * time.Millisecond
)

// beliefs of a history.
type beliefs struct {
	of map[term][]*piece // in the order of T
	in map[string][]*piece
}

// A piece of belief.
type piece struct {
	*Entry
	// late says that it is of a context and comes soon after a pause.
	late     bool
	reported bool // as late
}

// from and to are what the piece spans, the time in which a single answer was true at some instant included.
func (p *piece) from() int64 { return min(p.From, p.T) }
func (p *piece) to() int64   { return max(p.From, p.T) }

func readBeliefs(entries []*Entry, won map[term]*Entry) beliefs {
	b := beliefs{of: make(map[term][]*piece), in: make(map[string][]*piece)}
	pieces := make([]piece, len(entries))
	for i, e := range entries {
		p := &pieces[i]
		p.Entry = e
		b.of[termOf(e)] = append(b.of[termOf(e)], p)
		if e.Op == opIsLeader || e.Op == opContext {
			b.in[e.Election] = append(b.in[e.Election], p)
		}
	}
	for t, pieces := range b.of {
		var resumed, last int64
		if e := won[t]; e != nil {
			resumed, last = e.T-int64(lateTimer), e.T
		}
		for _, p := range pieces {
			if p.from()-last > int64(pauseOf) {
				resumed = p.from()
			}
			last = max(last, p.to())
			p.late = p.Op == opContext && p.T-resumed <= int64(lateTimer)
		}
	}
	return b
}

// lateContext reports whether a piece is excused since its process was paused just before.
func (c *checker) lateContext(p *piece) bool {
	if p.late && !p.reported {
		p.reported = true
		c.LateContexts = append(c.LateContexts, *p.Entry)
	}
	return p.late
}

// An Overlap is a time in which two believed that they led.
type Overlap struct {
	Election string
	Tokens   [2]int64 // the earlier term first
	Procs    [2]string
	Why      string
	From, To int64         // both had believed at From
	Certain  time.Duration // how much of it both certainly believed

	first [2]*Entry // pieces that overlap
	spans [][2]int64
}

// checkExclusion goes through the pieces of each election in the order of their beginning.
func (c *checker) checkExclusion() {
	for _, election := range slices.Sorted(maps.Keys(c.in)) {
		pieces := c.in[election]
		slices.SortFunc(pieces, func(a, b *piece) int { return cmp.Compare(a.from(), b.from()) })
		overlaps := make(map[[2]int64]*Overlap)
		var open []*piece
		for _, p := range pieces {
			open = slices.DeleteFunc(open, func(q *piece) bool { return q.to() < p.from() })
			for _, q := range open {
				if q.Token != p.Token && q.From <= p.T && p.From <= q.T {
					c.overlap(overlaps, q, p)
				}
			}
			open = append(open, p)
		}
		for _, o := range slices.SortedFunc(maps.Values(overlaps), func(a, b *Overlap) int { return cmp.Compare(a.From, b.From) }) {
			c.judge(o)
		}
	}
}

// overlap adds what two pieces have in common to the overlap of their terms.
func (c *checker) overlap(overlaps map[[2]int64]*Overlap, older, newer *piece) {
	if older.Token > newer.Token {
		older, newer = newer, older
	}
	if c.lateContext(older) {
		return
	}
	from, to := max(older.From, newer.From), min(older.T, newer.T)
	tokens := [2]int64{older.Token, newer.Token}
	o := overlaps[tokens]
	if o == nil {
		o = &Overlap{
			Election: older.Election, Tokens: tokens, Procs: [2]string{older.Proc, newer.Proc},
			From: from, To: max(from, to), first: [2]*Entry{older.Entry, newer.Entry},
		}
		overlaps[tokens] = o
	}
	o.From, o.To = min(o.From, from), max(o.To, from, to)
	if from < to { // else a single answer, which was true at some instant
		o.spans = append(o.spans, [2]int64{from, to})
	}
}

// judge measures an overlap and decides whether it is excused.
func (c *checker) judge(o *Overlap) {
	slices.SortFunc(o.spans, func(a, b [2]int64) int { return cmp.Compare(a[0], b[0]) })
	o.Certain = o.certain(o.From, never)
	why, entries, excused := c.excuse(o)
	o.Why = why
	if excused {
		c.Overlaps = append(c.Overlaps, *o)
		return
	}
	c.violate(ruleExclusion, append(o.first[:], entries...), "%s: %s believed in term %d and %s in term %d from %s to %s, for %v in all; %s",
		o.Election, o.Procs[0], o.Tokens[0], o.Procs[1], o.Tokens[1], c.at(o.From), c.at(o.To), o.Certain, why)
}

// certain is how long both certainly believed in that time. The spans are sorted.
func (o *Overlap) certain(from, to int64) (d time.Duration) {
	for _, s := range o.spans {
		if end := min(s[1], to); end > from {
			d += time.Duration(end - max(s[0], from))
			from = end
		}
	}
	return d
}

// excuse says what was with the key of the earlier term, which entries show it and whether it excuses
// the overlap.
func (c *checker) excuse(o *Overlap) (why string, entries []*Entry, excused bool) {
	l := c.lives[term{o.Election, o.Tokens[0]}]
	if l == nil {
		return "no key of the earlier term is known", nil, false
	}
	how, taken := c.endingOf(l, o.From)
	entries = []*Entry{taken, l.deleted}
	brief := o.Certain <= overlapAllowed
	switch how {
	case operator:
		why := fmt.Sprintf("an operator took the earlier key (%s, from %s)", taken.Op, c.at(taken.From))
		return why, entries, !c.inCalm(o, taken.From-int64(settled))
	case early:
		return "etcd deleted the earlier key before its lease could expire", entries, brief && c.deposed(l.gone)
	}
	return fmt.Sprintf("the earlier key's end: %s", how), entries, false
}

// inCalm reports whether an overlap has lasted for longer than allowed in a time without faults that had begun by then.
func (c *checker) inCalm(o *Overlap, began int64) bool {
	return slices.ContainsFunc(c.by[Calm], func(e *Entry) bool {
		return e.From <= began && o.certain(e.From, e.T) > overlapAllowed
	})
}

// checkMargins compares the end of belief with the end of the key.
func (c *checker) checkMargins() {
	for _, won := range c.by[Term] {
		if !ours(won) {
			continue
		}
		t := termOf(won)
		if ended := c.ended[t]; ended != nil {
			c.checkBelief(t, ended.T, ended.T, "the term had ended", ended)
		}
		l := c.lives[t]
		if l == nil {
			continue
		}
		switch how, _ := c.endingOf(l, l.gone); how {
		case operator:
			c.Checked.Taken++
			c.checkTaken(t, l)
		case early:
			c.Checked.Early++
			c.checkLease(l)
			c.checkTaken(t, l)
		case resigned:
			c.Checked.Resigned++
			c.checkBelief(t, l.gone, l.gone, "it had deleted its key", l.deleted)
		case expired:
			c.Checked.Expired++
			c.checkBelief(t, l.gone-int64(c.Margin), l.gone-int64(c.Margin*3/4), "the margin before its lease expired had begun", l.deleted)
		}
	}
}

// checkEvictions does for candidates what checkLease does for leaders.
func (c *checker) checkEvictions() {
	for _, e := range c.by[Evicted] {
		l := c.lost(e)
		if l == nil {
			continue
		}
		c.Checked.Evicted++
		if how, _ := c.endingOf(l, l.gone); how == early {
			c.checkLease(l)
		}
	}
}

// lost is the key that a candidate says it lost: the last of that name in its campaign. It is nil if that is not
// known: the lease was revoked, or the process was killed before it told how the campaign ended.
func (c *checker) lost(e *Entry) (last *life) {
	_, rest, _ := strings.Cut(e.Err, ": key \"")
	key, _, _ := strings.Cut(rest, "\"")
	campaign := func(o *Entry) bool {
		return o.Proc == e.Proc && o.Election == e.Election && o.From <= e.T && e.T <= o.T
	}
	all := slices.Concat(c.by[GivenUp], c.by[Term])
	i := slices.IndexFunc(all, campaign)
	if i < 0 {
		return nil
	}
	for _, l := range c.lives {
		in := l.key == key && l.election == e.Election && all[i].From <= l.created.T && l.created.T <= e.T
		if in && l.deleted != nil && (last == nil || l.token > last.token) {
			last = l
		}
	}
	return last
}

// checkTaken objects to belief in a key that was taken for longer than a renewal lasts: none counts
// once the key is gone.
func (c *checker) checkTaken(t term, l *life) {
	if l.deleted == nil {
		return
	}
	last := l.gone + int64(c.TTL-c.Margin)
	c.checkBelief(t, last, last+int64(c.Margin/4), "no renewal could count any longer", l.deleted)
}

// checkBelief objects to the last belief in a term that is later than it may be.
func (c *checker) checkBelief(t term, isLeader, context int64, since string, because *Entry) {
	for _, p := range slices.Backward(c.of[t]) {
		limit := isLeader
		if p.Op == opContext {
			limit = context
		}
		if p.T > limit && !c.lateContext(p) {
			c.violate(ruleMargin, []*Entry{c.terms[t], p.Entry, because}, "%s believed in %s by %s at %s, when %s, at %s",
				p.Proc, t, p.Op, c.at(p.T), since, c.at(limit))
			return
		}
	}
}

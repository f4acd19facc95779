package oracle

import (
	"cmp"
	"slices"
	"time"
)

// seesIn is how soon, in calm, a state must be reported.
const seesIn = 2 * time.Second

// A stream is what one call of Observe, or the hook LeaderChanged of one process, is told about an election.
type stream struct {
	proc, election, op string
	told               []*Entry
	open               []span // times in which there was somebody to tell
}

func leadingOf(e *Entry) leading { return leading{e.Token, e.Key, e.Value, e.Lease} }

// checkObservers checks what observers were told without asking.
func (c *checker) checkObservers() {
	for _, s := range c.streams() {
		c.checkTold(s)
		for _, open := range s.open {
			c.checkFresh(s, open)
		}
	}
}

// streams returns all streams in a fixed order.
func (c *checker) streams() []*stream {
	type key struct{ proc, election, op string }
	streams := make(map[key]*stream)
	of := func(e *Entry) *stream {
		k := key{e.Proc, e.Election, e.Op}
		s := streams[k]
		if s == nil {
			s = &stream{proc: e.Proc, election: e.Election, op: e.Op}
			streams[k] = s
		}
		return s
	}
	for _, e := range c.by[Observing] {
		open := span{e.T, never}
		if exit := firstAfter(c.exits[c.host(e.Proc)], e.T); exit != nil {
			open.to = exit.T
		}
		s := of(e)
		s.open = append(s.open, open)
	}
	for _, e := range c.by[Observed] {
		s := of(e)
		s.told = append(s.told, e)
	}
	for _, e := range c.by[ObserveEnded] {
		s := of(e)
		if e.Err == "" {
			c.violate(RuleObserve, []*Entry{e}, "a call of Observe by %s in %s ended at %s without an error", e.Proc, e.Election, c.at(e.T))
		}
		if len(s.open) == 1 {
			s.open[0].to = e.T
		}
	}
	for _, e := range c.by[Changed] {
		s := of(e)
		s.told = append(s.told, e)
		if s.open == nil {
			for _, k := range c.campaigns[placeOf(e)] {
				s.open = append(s.open, span{k.began.T, c.endOf(k)})
			}
		}
	}
	var all []*stream
	for _, k := range sortedKeys(streams, func(a, b key) int {
		return cmp.Or(cmp.Compare(a.election, b.election), cmp.Compare(a.proc, b.proc), cmp.Compare(a.op, b.op))
	}) {
		all = append(all, streams[k])
	}
	return all
}

// checkTold flags states that never existed, states that are older than what was told before, and a state that the
// same call was told twice in a row.
func (c *checker) checkTold(s *stream) {
	states := c.statesOf(s.election)
	at := 0 // the earliest state that the stream can have reached
	var last *Entry
	for _, e := range s.told {
		next := index(states[at:], e, e.T)
		switch {
		case last != nil && e.Kind == Observed && leadingOf(last) == leadingOf(e):
			c.violate(RuleObserve, []*Entry{last, e}, "%s was told twice in a row that %q leads %s with token %d and value %q, at %s and %s",
				e.Proc, e.Key, e.Election, e.Token, e.Value, c.at(last.T), c.at(e.T))
		case next >= 0:
			at += next
		default:
			how := "which never was"
			if index(states, e, e.T) >= 0 {
				how = "and has gone back"
			}
			c.violate(RuleObserve, []*Entry{last, e}, "%s saw %q lead %s with token %d and value %q at %s, %s",
				e.Proc, e.Key, e.Election, e.Token, e.Value, c.at(e.T), how)
		}
		last = e
	}
}

// checkFresh flags a state, in calm, if neither it nor a later one was told soon.
func (c *checker) checkFresh(s *stream, open span) {
	states := c.statesOf(s.election)
	calm, _ := slices.BinarySearchFunc(c.calms, open.from, func(e *Entry, t int64) int { return cmp.Compare(e.T, t) })
	for _, e := range c.calms[calm:] {
		if e.From > open.to {
			return
		}
		from := max(open.from, e.From+int64(c.TTL)) // by then dead watches must have been noticed
		to := min(open.to, e.T)
		first, _ := slices.BinarySearchFunc(states, from+1, func(s state, t int64) int { return cmp.Compare(s.since.to, t) })
		for i := first - 1; i < len(states); i++ {
			due := c.within(s.proc, max(from, states[i].since.to), seesIn+c.Patience)
			if due > to {
				break
			}
			c.Checked.Fresh++
			told := s.by(due)
			if told == nil || index(states[i:], told, due) < 0 {
				c.violate(RuleObserve, []*Entry{told, e}, "%s was not told by %s that %q leads %s with token %d and value %q since %s",
					s.proc, c.at(due), states[i].key, s.election, states[i].token, states[i].value, c.at(states[i].since.to))
				break
			}
		}
	}
}

// index returns the index of the first state that is what was told, among those that had begun by the given time, or
// -1.
func index(states []state, told *Entry, by int64) int {
	for i, s := range states {
		if s.since.from > by {
			break
		}
		if s.leading == leadingOf(told) {
			return i
		}
	}
	return -1
}

// by returns what was told last at or before t, or nil.
func (s *stream) by(t int64) *Entry {
	i, _ := slices.BinarySearchFunc(s.told, t+1, func(e *Entry, t int64) int { return cmp.Compare(e.T, t) })
	if i == 0 {
		return nil
	}
	return s.told[i-1]
}

// checkAnswers checks the answers of Current and Candidates.
func (c *checker) checkAnswers() {
	for _, e := range slices.Concat(c.by[Current], c.by[Candidates]) {
		if e.Err != "" {
			if c.inCalm(e.From, e.T) {
				c.violate(RuleObserve, []*Entry{e}, "in calm, %s asked who leads %s, from %s to %s, and got an error: %s", e.Proc, e.Election, c.at(e.From), c.at(e.T), e.Err)
			}
			continue
		}
		var was bool
		if e.Kind == Current {
			was = during(c.statesOf(e.Election), e, func(s state) (span, bool) { return s.since, s.leading == leadingOf(e) })
		} else {
			was = during(c.linesOf(e.Election), e, func(l line) (span, bool) { return l.since, l.tokens == e.Value })
		}
		if !was {
			c.violate(RuleObserve, []*Entry{e}, "%s was told %q by %s, and that %s leads %s with token %d, from %s to %s, but no such state existed then",
				e.Proc, e.Value, e.Kind, cmp.Or(e.Key, "nobody"), e.Election, e.Token, c.at(e.From), c.at(e.T))
		}
	}
}

// checkEvictions checks the answers of Evict.
func (c *checker) checkEvictions() {
	for _, e := range c.by[Taken] {
		if e.Op != Evict {
			continue
		}
		vacant := func(s state) (span, bool) { return s.since, s.token == 0 }
		if e.Result == Failed && !during(c.statesOf(e.Election), e, vacant) {
			c.violate(RuleObserve, []*Entry{e}, "%s was told that nobody leads %s, from %s to %s, but somebody led all that time",
				e.Proc, e.Election, c.at(e.From), c.at(e.T))
		}
		if l := c.lives[idOf(e)]; e.Result == OK && l != nil && !goneBy(l, e) {
			c.violate(RuleObserve, []*Entry{e, l.created, l.deleted}, "%s existed until %s, although %s had evicted the leader at %s",
				l.key, c.at(l.gone.to), e.Proc, c.at(e.T))
		}
	}
}

// inCalm reports whether from..to lies in a calm, at least one TTL after its beginning.
func (c *checker) inCalm(from, to int64) bool {
	return slices.ContainsFunc(c.calms, func(e *Entry) bool { return e.From+int64(c.TTL) <= from && to <= e.T })
}

// during reports whether the state in an answer may have existed at some time during the call.
func during[S any](states []S, e *Entry, is func(S) (since span, same bool)) bool {
	i, _ := slices.BinarySearchFunc(states, e.From, func(s S, t int64) int { since, _ := is(s); return cmp.Compare(since.to, t) })
	for _, s := range states[max(0, i-1):] {
		since, same := is(s)
		if since.from > e.T {
			return false
		}
		if same {
			return true
		}
	}
	return false
}

package oracle

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// audited is what the audit knows: what was in etcd, revision by revision.
type audited struct {
	lag    int64     // the longest time after which an event is seen
	there  []instant // times at which a revision existed, by revision
	not    []instant // times at which a revision did not exist yet
	lives  map[termID]*life
	queues map[string][]*life // by election, in the order of tokens
	of     map[place][]*life  // lives of a process in an election, in the order of tokens
	leased map[int64][]*life
	states map[string][]state // of each election, in their order
	lines  map[string][]line  // the same for lines
	puts   map[register][]*Entry
	asks   map[termID]int64 // who was asked to step back, and since when at the earliest
}

// A life is the life of one candidate's key, from its creation to its deletion.
type life struct {
	termID
	key              string
	lease            int64
	owner            string
	created, deleted *Entry // deleted is nil if the key was not deleted
	since, gone      span   // the key was created, and deleted, at some time in these spans
	before           *life  // of all older keys, the one that was deleted last or not at all
}

// goneBy reports whether the key was deleted at or before this revision.
func (l *life) goneBy(rev int64) bool { return l.deleted != nil && l.deleted.Rev <= rev }

// A leading is who leads, as Observe reports it.
type leading struct {
	token      int64
	key, value string
	lease      int64
}

// A state is a state of an election, from some time on.
type state struct {
	leading
	since span
}

// A line is the candidates that an election had from some time on: their tokens, as [Candidates] records them.
type line struct {
	tokens string
	since  span
}

// A register is a value in etcd that leaders write.
type register struct{ election, what string }

// An instant is a time that belongs to a revision.
type instant struct{ rev, t int64 }

// readAudit follows the events in the order of revisions.
func (c *checker) readAudit() *audited {
	a := &audited{
		lag:    c.slack(auditLag),
		lives:  make(map[termID]*life),
		queues: make(map[string][]*life),
		of:     make(map[place][]*life),
		leased: make(map[int64][]*life),
		states: make(map[string][]state),
		lines:  make(map[string][]line),
		puts:   make(map[register][]*Entry),
		asks:   make(map[termID]int64),
	}
	events := slices.Clone(c.by[Event])
	slices.SortStableFunc(events, func(x, y *Entry) int { return cmp.Compare(x.Rev, y.Rev) })
	a.readTimes(c, events)
	queues := make(map[string][]*Entry)
	for _, e := range events {
		if r, ok := c.registerOf(e.Key); ok {
			a.puts[r] = append(a.puts[r], e)
		} else if election, _, ok := candidateOf(e.Key); ok {
			queues[election] = append(queues[election], e)
		} else if who, ok := requestOf(e); ok {
			if _, known := a.asks[who]; !known {
				a.asks[who] = a.when(e.Rev).from
			}
		}
	}
	for election, events := range queues {
		a.follow(election, events)
	}
	for _, queue := range a.queues {
		for _, l := range queue {
			at := place{l.owner, l.election}
			a.of[at] = append(a.of[at], l)
			a.leased[l.lease] = append(a.leased[l.lease], l)
		}
	}
	return a
}

// follow replays the events of one election's candidates.
func (a *audited) follow(election string, events []*Entry) {
	type member struct {
		*life
		value string
	}
	var all []*life
	var alive []member // in the order of tokens, because revisions grow
	states, lines := []state{{}}, []line{{}}
	for i, e := range events {
		at := slices.IndexFunc(alive, func(m member) bool { return m.key == e.Key })
		switch {
		case e.Token == e.Rev:
			_, lease, _ := candidateOf(e.Key)
			owner, _, _ := strings.Cut(e.Value, "/")
			l := &life{
				termID: termID{election, e.Token}, key: e.Key, lease: lease, owner: owner,
				created: e, since: a.when(e.Rev), gone: span{never, never},
			}
			all, alive = append(all, l), append(alive, member{l, e.Value})
			a.lives[l.termID] = l
		case at < 0: // its creation was not seen
		case e.Op == "put":
			alive[at].value = e.Value
		default:
			alive[at].deleted, alive[at].gone = e, a.when(e.Rev)
			alive = slices.Delete(alive, at, at+1)
		}
		if i+1 < len(events) && events[i+1].Rev == e.Rev {
			continue // only after the last event of a revision is this a state that existed
		}
		s := state{since: a.when(e.Rev)}
		if len(alive) > 0 {
			m := alive[0]
			s.leading = leading{m.token, m.key, m.value, m.lease}
		}
		if s.leading != states[len(states)-1].leading {
			states = append(states, s)
		}
		tokens := make([]string, len(alive))
		for i, m := range alive {
			tokens[i] = strconv.FormatInt(m.token, 10)
		}
		lines = append(lines, line{strings.Join(tokens, " "), s.since})
	}
	a.queues[election], a.states[election], a.lines[election] = all, states, lines
	var before *life
	for _, l := range all {
		l.before = before
		if before == nil || before.deleted != nil && !l.goneBy(before.deleted.Rev) {
			before = l
		}
	}
}

// statesOf and linesOf return those of an election. If nothing ever happened in it, there is one empty state.
func (a *audited) statesOf(election string) []state {
	if states := a.states[election]; states != nil {
		return states
	}
	return []state{{}}
}

func (a *audited) linesOf(election string) []line {
	if lines := a.lines[election]; lines != nil {
		return lines
	}
	return []line{{}}
}

// readTimes bounds the times of revisions. If a process was told a revision, that one and all before it existed at that
// time. If a process read at a revision, no later one existed when it sent the read.
func (a *audited) readTimes(c *checker, events []*Entry) {
	there := func(rev, t int64) { a.there = append(a.there, instant{rev, t}) }
	for _, e := range slices.Concat(events, c.by[Write], c.by[Read]) { // the revision of a write without an answer is 0
		there(e.Rev, e.T)
	}
	for _, e := range slices.Concat(c.by[Elected], c.by[Term]) {
		there(e.Token, e.T)
	}
	for _, e := range c.by[Read] {
		a.not = append(a.not, instant{e.Rev + 1, e.From})
	}
	byRev := func(x, y instant) int { return cmp.Compare(x.rev, y.rev) }
	slices.SortFunc(a.there, byRev)
	for i := len(a.there) - 2; i >= 0; i-- {
		a.there[i].t = min(a.there[i].t, a.there[i+1].t)
	}
	slices.SortFunc(a.not, byRev)
	for i := 1; i < len(a.not); i++ {
		a.not[i].t = max(a.not[i].t, a.not[i-1].t)
	}
}

// when returns the span in which the revision of an event came.
func (a *audited) when(rev int64) span {
	find := func(all []instant, rev int64) int {
		i, _ := slices.BinarySearchFunc(all, rev, func(i instant, rev int64) int { return cmp.Compare(i.rev, rev) })
		return i
	}
	to := a.there[find(a.there, rev)].t
	from := to - a.lag
	if i := find(a.not, rev+1); i > 0 {
		from = max(from, a.not[i-1].t)
	}
	return span{from, to}
}

// registers returns all registers, in a fixed order.
func (c *checker) registers() []register {
	all := make(map[register]bool)
	for r := range c.puts {
		all[r] = true
	}
	for _, e := range slices.Concat(c.by[Read], c.by[Write]) {
		all[register{e.Election, e.Op}] = true
	}
	return slices.SortedFunc(maps.Keys(all), func(x, y register) int {
		return cmp.Or(cmp.Compare(x.election, y.election), cmp.Compare(x.what, y.what))
	})
}

// registerOf returns the register that a key holds.
func (o Options) registerOf(key string) (register, bool) {
	rest, data := strings.CutPrefix(key, o.Data)
	election, what, ok := cutLast(rest)
	return register{election, what}, data && ok
}

// candidateOf returns the election and the lease of a candidate's key. ok is false for any other key under an election.
func candidateOf(key string) (election string, lease int64, ok bool) {
	election, id, _ := cutLast(key)
	lease, _ = strconv.ParseInt(id, 16, 64) // 0 if it is not a number
	if lease <= 0 || strconv.FormatInt(lease, 16) != id {
		return "", 0, false
	}
	return election, lease, true
}

// requestOf returns whom an event asks to step back.
func requestOf(e *Entry) (who termID, ok bool) {
	key, request := strings.CutSuffix(e.Key, "/stepback")
	election, _, candidate := candidateOf(key)
	token, err := strconv.ParseInt(e.Value, 10, 64)
	return termID{election, token}, request && candidate && err == nil && e.Op == "put"
}

// cutLast cuts a key at its last slash.
func cutLast(key string) (before, after string, ok bool) {
	i := strings.LastIndexByte(key, '/')
	if i < 0 {
		return "", "", false
	}
	return key[:i], key[i+1:], true
}

//go:build linux

package main

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// What the audit knows: what was in etcd, revision by revision.
type audited struct {
	last   int64 // revision
	lastT  int64
	times  []instant // by revision
	lives  map[term]*life
	states map[string][]state // of each election that anybody told of, revision by revision
	quiet  map[string]int64   // when the last candidate's key of the election changed
	puts   map[register][]*Entry
}

// A life is that of one candidate's key, from its creation to its deletion.
type life struct {
	term
	key              string
	lease            int64
	created, deleted *Entry // deleted is nil if it was not
	gone             int64  // the deletion was not later than this
	before           *life  // of all that are older, the one that was deleted last
}

// goneBy reports whether the key was deleted before the revision.
func (l *life) goneBy(rev int64) bool { return l.deleted != nil && l.deleted.Rev < rev }

// A state is who leads, as Observe tells it.
type state struct {
	token      int64
	key, value string
	lease      int64
}

// A register is a value in etcd that leaders write.
type register struct{ election, what string }

// An instant is when a revision was there already.
type instant struct{ rev, t int64 }

// readAudit follows the events in the order of revisions. Writes with an answer also bound the time of
// their revision, and of those before.
func readAudit(events, writes []*Entry) *audited {
	a := &audited{
		lives:  make(map[term]*life),
		states: make(map[string][]state),
		quiet:  make(map[string]int64),
		puts:   make(map[register][]*Entry),
	}
	byRev := func(x, y *Entry) int { return cmp.Compare(x.Rev, y.Rev) }
	events = slices.Clone(events)
	slices.SortStableFunc(events, byRev)
	known := slices.Concat(events, slices.DeleteFunc(slices.Clone(writes), func(e *Entry) bool { return e.Result != OK }))
	slices.SortFunc(known, byRev)
	a.times = make([]instant, len(known))
	t := int64(never)
	for i, e := range slices.Backward(known) {
		t = min(t, e.T)
		a.times[i] = instant{e.Rev, t}
	}
	queues := make(map[string][]*Entry)
	for _, e := range events {
		a.last, a.lastT = max(a.last, e.Rev), max(a.lastT, e.T)
		if r, ok := registerOf(e.Key); ok {
			a.puts[r] = append(a.puts[r], e)
		} else if election, _, ok := candidateOf(e.Key); ok {
			queues[election] = append(queues[election], e)
			a.quiet[election] = max(a.quiet[election], e.T)
		}
	}
	for election, queue := range queues {
		a.follow(election, queue)
	}
	return a
}

// follow plays the events of one election's candidates.
func (a *audited) follow(election string, events []*Entry) {
	type member struct {
		*life
		value string
	}
	var all []*life
	var alive []member // by token, since revisions grow
	states := []state{{}}
	for i, e := range events {
		at := slices.IndexFunc(alive, func(m member) bool {
			return m.key == e.Key && (e.Token == 0 || m.token == e.Token)
		})
		switch {
		case e.Op == "put" && e.Token == e.Rev:
			_, lease, _ := candidateOf(e.Key)
			l := &life{term: term{election, e.Token}, key: e.Key, lease: lease, created: e, gone: never}
			all, alive = append(all, l), append(alive, member{l, e.Value})
			a.lives[l.term] = l
		case at < 0:
			continue
		case e.Op == "put":
			alive[at].value = e.Value
		default:
			alive[at].deleted, alive[at].gone = e, a.happened(e.Rev)
			alive = slices.Delete(alive, at, at+1)
		}
		if i+1 < len(events) && events[i+1].Rev == e.Rev {
			continue // only the last event of a revision shows a state that was
		}
		var s state
		if len(alive) > 0 {
			m := alive[0]
			s = state{m.token, m.key, m.value, m.lease}
		}
		states = append(states, s)
	}
	a.states[election] = states
	var before *life
	for _, l := range all {
		l.before = before
		if before == nil || before.deleted != nil && !l.goneBy(before.deleted.Rev) {
			before = l
		}
	}
}

// happened is a time by which the revision of an event was there.
func (a *audited) happened(rev int64) int64 {
	i, _ := slices.BinarySearchFunc(a.times, rev, func(i instant, rev int64) int { return cmp.Compare(i.rev, rev) })
	return a.times[i].t
}

// registers returns which registers there are, in an order that does not change.
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
func registerOf(key string) (register, bool) {
	rest, ok := strings.CutPrefix(key, dataRoot)
	i := strings.LastIndexByte(rest, '/')
	if !ok || i < 0 {
		return register{}, false
	}
	return register{root + rest[:i], rest[i+1:]}, true
}

// candidateOf returns the election and the lease of a candidate's key. Whatever else lies under an
// election is none.
func candidateOf(key string) (election string, lease int64, ok bool) {
	i := strings.LastIndexByte(key, '/')
	lease, err := strconv.ParseInt(key[i+1:], 16, 64)
	if i < 0 || err != nil || lease <= 0 || strconv.FormatInt(lease, 16) != key[i+1:] {
		return "", 0, false
	}
	return key[:i], lease, true
}

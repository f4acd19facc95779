//go:build linux

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/leader"
)

func TestCorrectHistoryHasNoViolation(t *testing.T) {
	t.Parallel()
	var seen Counts
	var overlaps, late int
	for seed := range uint64(30) {
		v := check(newHistory(seed, 8))
		for _, violation := range v.Violations {
			t.Errorf("seed %d: %s: %s", seed, violation.Rule, violation.What)
		}
		overlaps += len(v.Overlaps)
		late += len(v.LateContexts)
		seen.Recovered += v.Checked.Recovered
		seen.LastStates += v.Checked.LastStates
		seen.Expired += v.Checked.Expired
	}
	if overlaps == 0 || late == 0 || seen.Recovered == 0 || seen.LastStates == 0 || seen.Expired == 0 {
		t.Errorf("the histories are too tame: %d overlaps, %d late contexts, %+v", overlaps, late, seen)
	}
}

// changes are those of a correct history that make it incorrect. A history that has no place for a change
// is changed to nil.
var changes = map[string]struct {
	rule, what string
	change     func(*checker, []Entry) []Entry
}{
	"belief until the next term": {ruleExclusion, "the earlier key's end: resigned", func(c *checker, h []Entry) []Entry {
		next := find(c.by[Belief], func(e *Entry) bool {
			l := c.lives[termOf(e)]
			return e.Op == opIsLeader && l.before != nil && c.how(l.before) == resigned && ours(c.terms[l.before.term])
		})
		if next == nil {
			return nil
		}
		older := *next
		older.Token = c.lives[termOf(next)].before.token
		older.Proc = c.terms[termOf(&older)].Proc
		return append(h, older)
	}},
	"belief until the lease expires": {ruleMargin, "the margin before its lease expired", func(c *checker, h []Entry) []Entry {
		return c.believes(h, expired, opIsLeader, 0)
	}},
	"context lasts until the lease expires": {ruleMargin, "the margin before its lease expired", func(c *checker, h []Entry) []Entry {
		return c.believes(h, expired, opContext, 0)
	}},
	"belief after the key was given up": {ruleMargin, "it had deleted its key", func(c *checker, h []Entry) []Entry {
		return slices.DeleteFunc(c.believes(h, resigned, opIsLeader, 1), func(e Entry) bool { return e.Kind == Ended })
	}},
	"belief after the end was told": {ruleMargin, "the term had ended", func(c *checker, h []Entry) []Entry {
		ended := find(c.by[Ended], func(e *Entry) bool { return ours(c.terms[termOf(e)]) })
		return append(h, Entry{T: ended.T + 1, From: ended.T, Proc: ended.Proc, Kind: Belief, Election: ended.Election, Token: ended.Token, Op: opIsLeader})
	}},
	"two win a term": {ruleToken, "was won twice", func(c *checker, h []Entry) []Entry {
		e := *find(c.by[Term], ours)
		e.Proc = "thief"
		return append(h, e)
	}},
	"token is of another revision": {ruleToken, "not created at that revision", func(c *checker, h []Entry) []Entry {
		find(c.by[Term], ours).Token++
		return h
	}},
	"key is another": {ruleToken, "not created at that revision", func(c *checker, h []Entry) []Entry {
		find(c.by[Term], ours).Key += "0"
		return h
	}},
	"tokens shrink though the later campaign began later": {ruleToken, ", after ", func(c *checker, h []Entry) []Entry {
		a, b := c.followed()
		if a == nil {
			return nil
		}
		a.T, a.From = b.T+2, b.T+1
		return h
	}},
	"tokens shrink and both believe": {ruleToken, ", after ", func(c *checker, h []Entry) []Entry {
		a, b := c.followed()
		if a == nil {
			return nil
		}
		a.T = b.T + 1
		return append(h, Entry{T: b.T + 3, From: b.T + 2, Proc: a.Proc, Kind: Belief, Election: a.Election, Token: a.Token, Op: opIsLeader})
	}},
	"belief in the term of another": {ruleToken, "which it has not won", func(c *checker, h []Entry) []Entry {
		c.by[Belief][0].Proc = "thief"
		return h
	}},
	"belief in no term": {ruleToken, "which it has not won", func(c *checker, h []Entry) []Entry {
		c.by[Belief][0].Token++
		return h
	}},
	"write has two effects": {ruleData, "twice", func(c *checker, h []Entry) []Entry {
		e := *c.effect("register", OK)
		e.Rev++
		return append(h, e)
	}},
	"write has no effect": {ruleData, `was told "ok"`, func(c *checker, h []Entry) []Entry {
		e := *c.effect("register", OK)
		return slices.DeleteFunc(h, func(o Entry) bool { return o == e })
	}},
	"answer names another revision": {ruleData, `was told "ok"`, func(c *checker, h []Entry) []Entry {
		c.write("register", OK).Rev--
		return h
	}},
	"write that failed has an effect": {ruleData, `was told "failed"`, func(c *checker, h []Entry) []Entry {
		c.write("register", OK).Result = Failed
		return h
	}},
	"value comes from nowhere": {ruleData, "by nobody", func(c *checker, h []Entry) []Entry {
		c.effect("register", OK).Value = "7"
		return h
	}},
	"value is deleted": {ruleData, "by nobody", func(c *checker, h []Entry) []Entry {
		e := *c.effect("register", OK)
		e.T, e.Rev, e.Op, e.Value = e.T+1, e.Rev+1, "delete", ""
		return append(h, e)
	}},
	"write has its effect before it was asked for": {ruleData, "before that was asked for", func(c *checker, h []Entry) []Entry {
		c.effect("register", OK).T = c.write("register", OK).From - 1
		return h
	}},
	"count leaves a number out": {ruleData, "counter of", func(c *checker, h []Entry) []Entry {
		e := c.effect("counter", OK)
		e.Value = "9" + e.Value
		return h
	}},
	"write replaces what another has written meanwhile": {ruleData, "is not linearizable", func(c *checker, h []Entry) []Entry {
		c.write("register", OK).Base = "0 1:1"
		return h
	}},
	"read is stale": {ruleData, "is not linearizable", func(c *checker, h []Entry) []Entry {
		c.read(-1)
		return h
	}},
	"read is of a write that was not sent yet": {ruleData, "is not linearizable", func(c *checker, h []Entry) []Entry {
		c.read(1)
		return h
	}},
	"read shows a write without an effect": {ruleData, "is not linearizable", func(c *checker, h []Entry) []Entry {
		find(c.by[Read], func(*Entry) bool { return true }).Value = c.write("counter", Failed).Value
		return h
	}},
	"write passes the guard after the term": {ruleGuard, "did not exist", func(c *checker, h []Entry) []Entry {
		w := c.write("register", OK)
		l := c.lives[termOf(w)]
		l.deleted.Rev = w.Rev
		return h
	}},
	"write passes the guard before the term": {ruleGuard, "did not exist", func(c *checker, h []Entry) []Entry {
		e := c.write("register", OK)
		for _, l := range c.lives {
			if l.election == e.Election && l.token > e.Rev {
				e.Token = l.token
				return h
			}
		}
		return nil
	}},
	"write passes the guard without a term": {ruleGuard, "did not exist", func(c *checker, h []Entry) []Entry {
		c.write("register", OK).Token++
		return h
	}},
	"older candidate is overtaken": {ruleOrder, "was not gone", func(c *checker, h []Entry) []Entry {
		w := c.lastWrite()
		key := w.Election + "/fffffff"
		return append(h, Entry{T: 1, Kind: Event, Op: "put", Rev: 1, Token: 1, Key: key, Value: "x", Lease: 0xfffffff})
	}},
	"older candidate is overtaken and goes later": {ruleOrder, "was not gone", func(c *checker, h []Entry) []Entry {
		w := c.lastWrite()
		key := w.Election + "/fffffff"
		return append(h, Entry{T: 1, Kind: Event, Op: "put", Rev: 1, Token: 1, Key: key, Value: "x", Lease: 0xfffffff},
			Entry{T: w.T + 1, Kind: Event, Op: "delete", Rev: w.Rev + 1, Token: 1, Key: key})
	}},
	"resource goes back to a smaller token": {ruleFencing, "after the larger token", func(c *checker, h []Entry) []Entry {
		e := *find(c.by[Accepted], func(e *Entry) bool { return e.Result == OK })
		e.T, e.Token, e.Value = e.T+1, e.Token-1, "late"
		return append(h, e)
	}},
	"resource takes a request twice": {ruleFencing, "accepted twice", func(c *checker, h []Entry) []Entry {
		return append(h, *find(c.by[Accepted], func(e *Entry) bool { return e.Result == OK }))
	}},
	"resource forgets a request": {ruleFencing, `was told "ok"`, func(_ *checker, h []Entry) []Entry {
		return slices.DeleteFunc(h, func(e Entry) bool { return e.Kind == Accepted })
	}},
	"resource takes what it says it refuses": {ruleFencing, `was told "failed"`, func(c *checker, h []Entry) []Entry {
		find(c.by[Accepted], func(e *Entry) bool { return e.Result == Failed }).Result = OK
		return h
	}},
	"nobody leads though it is calm": {ruleLiveness, "had no leader", func(c *checker, h []Entry) []Entry {
		calm := find(c.by[Calm], func(e *Entry) bool { return e.T-e.From > int64(c.TTL+recoverTime) })
		from, to := calm.From, calm.From+int64(c.TTL+recoverTime)
		return slices.DeleteFunc(h, func(e Entry) bool {
			return e.Kind == Term && e.T >= from && e.T <= to || e.Kind == Belief && e.T >= from && e.From <= to
		})
	}},
	"observer sees what never was": {ruleObserve, "which never was", func(c *checker, h []Entry) []Entry {
		find(c.by[Observed], func(e *Entry) bool { return e.Token != 0 }).Value += "!"
		return h
	}},
	"observer goes back": {ruleObserve, "and has gone back", func(c *checker, h []Entry) []Entry {
		for _, first := range c.by[Observed] {
			for _, second := range c.by[Observed] {
				if first.Token != 0 && second.Token > first.Token && second.Op == first.Op && second.Election == first.Election && second.T < c.lastT {
					e := *first
					e.T = second.T + 1
					return append(h, e)
				}
			}
		}
		return nil
	}},
	"observer misses the last state": {ruleObserve, "had seen", func(c *checker, h []Entry) []Entry {
		end := find(c.by[Observed], func(e *Entry) bool { return e.Err != "" && e.T > c.quiet[e.Election]+int64(seesLast) })
		last := c.last
		e := Entry{T: c.quiet[end.Election] - 1, Kind: Event, Op: "put", Rev: last + 1, Token: last + 1, Key: end.Election + "/fffffff", Value: "x"}
		return append(h, e)
	}},
	"key is left":     {ruleEnd, "the key chaos/a/1 is left", added(Entry{Kind: Left, Op: "key", Value: "chaos/a/1"})},
	"process crashes": {ruleEnd, "c1 ended at", added(Entry{Kind: Exit, Proc: "c1", Result: Failed, Err: "exit status 2"})},
	"call fails":      {ruleEnd, "c1 failed at", added(Entry{Kind: Failure, Proc: "c1", Err: "Close: no"})},
	"no parameters":   {ruleNothing, `of the kind "run"`, without(Run)},
	"bad parameters":  {ruleNothing, "cannot be read", added(Entry{Kind: Run, Value: "{"})},
	"no terms":        {ruleNothing, `of the kind "term"`, without(Term)},
	"no giving up":    {ruleNothing, `of the kind "given-up"`, without(GivenUp)},
	"no events":       {ruleNothing, `of the kind "event"`, without(Event)},
	"no writes":       {ruleNothing, "no guarded write", without(Write)},
}

func TestIncorrectHistoryHasViolation(t *testing.T) {
	t.Parallel()
	var histories [4][]Entry
	for seed := range histories {
		histories[seed] = newHistory(uint64(seed), 5)
	}
	for name, test := range changes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			applied := 0
			for seed, h := range histories {
				h := slices.Clone(h)
				if h = test.change(newChecker(h), h); h == nil {
					continue
				}
				applied++
				v := check(byTime(h))
				if !slices.ContainsFunc(v.Violations, func(v Violation) bool {
					return v.Rule == test.rule && strings.Contains(v.What, test.what)
				}) {
					t.Errorf("seed %d: no violation of %q with %q, but %+v", seed, test.rule, test.what, v.Violations)
				}
			}
			if applied == 0 {
				t.Error("no history to change")
			}
		})
	}
}

func byTime(h []Entry) []Entry {
	slices.SortStableFunc(h, func(a, b Entry) int { return cmp.Compare(a.T, b.T) })
	return h
}

// find returns the first entry of which is is true.
func find(entries []*Entry, is func(*Entry) bool) *Entry {
	if i := slices.IndexFunc(entries, is); i >= 0 {
		return entries[i]
	}
	return nil
}

func added(e Entry) func(*checker, []Entry) []Entry {
	e.T = 2000 * ms
	return func(_ *checker, h []Entry) []Entry { return append(h, e) }
}

func without(kind Kind) func(*checker, []Entry) []Entry {
	return func(_ *checker, h []Entry) []Entry {
		return slices.DeleteFunc(h, func(e Entry) bool { return e.Kind == kind })
	}
}

func (c *checker) how(l *life) ending {
	how, _ := c.endingOf(l, l.gone)
	return how
}

// believes makes belief last until some time after the key of a term that has come to that end is gone.
func (c *checker) believes(h []Entry, how ending, op string, after int64) []Entry {
	for _, e := range c.by[Term] {
		l := c.lives[termOf(e)]
		if pieces := c.of[termOf(e)]; ours(e) && c.how(l) == how && len(pieces) > 0 && pieces[0].Op == op {
			last := *pieces[len(pieces)-1].Entry
			if last.From <= last.T {
				last.From, last.T = last.T, l.gone+after
				return append(h, last)
			}
		}
	}
	return nil
}

// followed returns the entries of two terms that followed each other, of which the first was resigned.
func (c *checker) followed() (a, b *Entry) {
	for _, b := range c.by[Term] {
		if l := c.lives[termOf(b)].before; l != nil && ours(b) {
			if a := c.terms[l.term]; ours(a) && c.how(l) == resigned {
				return a, b
			}
		}
	}
	return nil, nil
}

// write returns the first of these writes, effect its event.
func (c *checker) write(what, result string) *Entry {
	return find(c.by[Write], func(e *Entry) bool { return e.Op == what && e.Result == result })
}

func (c *checker) effect(what, result string) *Entry {
	w := c.write(what, result)
	return find(c.by[Event], func(e *Entry) bool { return e.Value == w.Value })
}

// lastWrite returns the last write with an answer.
func (c *checker) lastWrite() (last *Entry) {
	for _, e := range c.by[Write] {
		if e.Result == OK {
			last = e
		}
	}
	return last
}

// read makes a read show the value before or after the one that it may.
func (c *checker) read(by int) {
	w := c.write("counter", OK)
	puts := c.puts[register{w.Election, "counter"}]
	for _, e := range c.by[Read] {
		i := slices.IndexFunc(puts, func(p *Entry) bool { return p.Value == e.Value })
		if e.Election == w.Election && e.Op == "counter" && i+3*by >= 0 && i > 0 && i+3*by < len(puts) {
			e.Value = puts[i+3*by].Value
			return
		}
	}
	panic("no read")
}

// A scene is what two terms of an election are made of: term 10 of c1, whose key with lease 1 is gone
// at some time, and term 20 of c2. Times are in milliseconds.
type scene struct {
	gone  int64
	extra []Entry
}

func (s scene) history() []Entry {
	const election = "chaos/a"
	h := []Entry{
		runEntry(0, election),
		{T: 10, Proc: "audit", Kind: Event, Op: "put", Rev: 10, Token: 10, Key: election + "/1", Value: "c1", Lease: 1},
		{T: 20, Proc: "audit", Kind: Event, Op: "put", Rev: 20, Token: 20, Key: election + "/2", Value: "c2", Lease: 2},
		{T: 12, From: 12, Proc: "c1", Kind: Write, Election: election, Token: 10, Op: "register", Value: "1 10:1", Rev: 25, Result: OK},
		{T: 12, Proc: "audit", Kind: Event, Op: "put", Rev: 25, Token: 25, Key: dataRoot + "a/register", Value: "1 10:1"},
	}
	h = append(h, // so that there is something of each kind
		Entry{T: 1, From: 0, Proc: "chaos", Kind: Fault, Op: "cut"},
		Entry{T: 1, From: 0, Proc: "chaos", Kind: Calm},
		Entry{T: 1, From: 0, Proc: "c9", Kind: GivenUp},
		Entry{T: 2, From: 1, Proc: "c1", Kind: Read, Election: election, Token: 10, Op: "register"},
		Entry{T: 2, From: 1, Proc: "c1", Kind: Append, Election: election, Token: 10, Value: "10:9", Result: Unknown},
		Entry{T: 2, Proc: "o", Kind: Observed, Election: "chaos/b", Op: "1"},
	)
	for t := int64(1000); t < 10000; t += 1000 { // so that etcd may be early at any time
		h = append(h, Entry{T: t, Proc: "m0", Kind: Resumed})
	}
	if s.gone != 0 {
		h = append(h, Entry{T: s.gone, Proc: "audit", Kind: Event, Op: "delete", Rev: 30, Token: 10, Key: election + "/1"})
	}
	h = append(h, s.extra...)
	for i := range h {
		e := &h[i]
		switch e.Kind {
		case Belief, Taken, Term, Ended, Resigning, Evicted, GivenUp:
			e.Election = cmp.Or(e.Election, election)
		}
		e.T *= ms
		e.From *= ms
		e.Until *= ms
	}
	return byTime(h)
}

func beliefOf(proc string, token int64, op string, from, to int64) Entry {
	return Entry{T: to, From: from, Proc: proc, Kind: Belief, Token: token, Op: op}
}

// first is the term of c1, second that of c2.
var first = Entry{T: 11, From: 9, Proc: "c1", Kind: Term, Token: 10, Key: "chaos/a/1", Lease: 1, Op: "leader"}
var second = Entry{T: 25, From: 19, Proc: "c2", Kind: Term, Token: 20, Key: "chaos/a/2", Lease: 2, Op: "leader"}

// during is belief of both: of c1 until to, of c2 from 5000 on.
func during(to int64) []Entry {
	return []Entry{second, beliefOf("c1", 10, opIsLeader, 4000, to), beliefOf("c2", 20, opIsLeader, 5000, 9000)}
}

var (
	takenKey     = Entry{T: 4995, From: 4990, Proc: "chaos", Kind: Taken, Op: "delete", Token: 10, Key: "chaos/a/1", Lease: 1, Result: OK}
	revokeLease1 = Entry{T: 4995, From: 4990, Proc: "chaos", Kind: Taken, Op: "revoke", Election: "chaos/b", Token: 5, Lease: 1, Result: Unknown}
	// renewed1 lets the lease expire at 6000.
	renewed1 = Entry{T: 4010, From: 4000, Until: 6000, Proc: "c1", Kind: Renewed, Lease: 1}
)

func with(e Entry, change func(*Entry)) Entry {
	change(&e)
	return e
}

func calmFrom(from, to int64) Entry { return Entry{T: to, From: from, Proc: "chaos", Kind: Calm} }

func TestExcusesAreExact(t *testing.T) {
	t.Parallel()
	type outcome struct {
		rules    []string // violated
		overlaps []time.Duration
		late     int
	}
	good := outcome{}
	overlap := func(milliseconds int64) outcome {
		return outcome{overlaps: []time.Duration{time.Duration(milliseconds * ms)}}
	}
	late := func(n int) outcome { return outcome{late: n} }
	bad := func(rules ...string) outcome { return outcome{rules: rules} }
	expires := func(e ...Entry) []Entry { return append(e, renewed1) }
	for name, test := range map[string]struct {
		gone  int64
		extra []Entry
		want  outcome
	}{
		"belief of one after the other":       {4500, []Entry{second, beliefOf("c1", 10, opIsLeader, 11, 2000), beliefOf("c2", 20, opIsLeader, 5000, 9000)}, good},
		"belief of both, by etcd's expiry":    {4999, during(5000), bad(ruleExclusion, ruleMargin)},
		"belief of both, and both keys there": {0, during(5000), bad(ruleExclusion)},
		"belief of both, and an unknown key": {4999, append(during(5000), with(second, func(e *Entry) { e.Token, e.Proc = 5, "c3" }), beliefOf("c3", 5, opIsLeader, 8999, 9000)),
			bad(ruleExclusion, ruleExclusion, ruleMargin, ruleToken, ruleToken)},
		"belief of a peer": {4999, []Entry{with(second, func(e *Entry) { e.Op = "stock" }), beliefOf("c2", 20, "stock", 3000, 9000), beliefOf("c1", 10, opIsLeader, 11, 4000)}, good},

		"operator took the key":                     {4999, append(during(6599), takenKey), overlap(1599)},
		"operator may have revoked the lease":       {4999, append(during(6599), revokeLease1), overlap(1599)},
		"operator has failed to take the key":       {4999, append(during(8000), with(takenKey, func(e *Entry) { e.Result = Failed })), bad(ruleExclusion, ruleMargin)},
		"operator took the key, and belief went on": {4999, append(during(6600), takenKey), outcome{rules: []string{ruleMargin}, overlaps: []time.Duration{time.Duration(1600 * ms)}}},
		"operator may have taken it in the end":     {19995, append(during(8000), with(takenKey, func(e *Entry) { e.Result = Unknown })), overlap(3000)},
		"operator may have taken it long ago":       {20001, append(during(8000), with(takenKey, func(e *Entry) { e.Result = Unknown })), bad(ruleExclusion)},
		"operator took another key":                 {4999, append(during(6000), with(takenKey, func(e *Entry) { e.Token = 20 })), bad(ruleExclusion, ruleMargin)},
		"operator came as both believed":            {5100, append(during(6700), with(takenKey, func(e *Entry) { e.From = 5000 })), overlap(1700)},
		"operator came after both believed":         {5100, append(during(6000), with(takenKey, func(e *Entry) { e.From = 5001 })), bad(ruleExclusion)},
		"operator came when the key was gone":       {4999, append(during(8000), with(takenKey, func(e *Entry) { e.From = 5000 })), bad(ruleExclusion, ruleMargin)},
		"operator came again":                       {4999, append(during(6599), takenKey, with(takenKey, func(e *Entry) { e.T, e.From = 5050, 5040 })), overlap(1599)},
		"operator in calm that ends with belief":    {4999, append(during(5501), takenKey, calmFrom(3990, 5501)), bad(ruleExclusion)},
		"operator in calm, 500 ms":                  {4999, append(during(5500), takenKey, calmFrom(3990, 8500)), overlap(500)},
		"operator in calm, 501 ms":                  {4999, append(during(5501), takenKey, calmFrom(3990, 8500)), bad(ruleExclusion)},
		"operator in calm that ends within belief":  {4999, append(during(6000), takenKey, calmFrom(3990, 5501)), bad(ruleExclusion)},
		"operator in calm of less than 1 s":         {4999, append(during(5501), takenKey, calmFrom(3991, 8500)), overlap(501)},
		"operator in calm that ends before belief":  {4999, append(during(5501), takenKey, calmFrom(3990, 5500)), overlap(501)},

		"etcd was early, 500 ms":                         {4999, append(during(5500), renewed1), overlap(500)},
		"etcd was early, 501 ms":                         {4999, append(during(5501), renewed1), bad(ruleExclusion)},
		"etcd was not early by a renewal too late":       {4999, append(during(5000), with(renewed1, func(e *Entry) { e.T = 5001 })), bad(ruleExclusion, ruleMargin)},
		"etcd was 1 ms early":                            {4999, append(during(5000), with(renewed1, func(e *Entry) { e.Until = 5000 })), overlap(0)},
		"etcd was not early":                             {4999, append(during(5000), with(renewed1, func(e *Entry) { e.Until = 4999 })), bad(ruleExclusion, ruleMargin)},
		"lease was said to last for longer than it does": {4999, append(during(5000), with(renewed1, func(e *Entry) { e.From = 2999 })), bad(ruleExclusion, ruleMargin)},
		"renewal does not tell when it was sent":         {4999, append(during(5000), with(renewed1, func(e *Entry) { e.T, e.From, e.Until = 2999, 0, 9000 })), bad(ruleExclusion, ruleMargin)},
		"etcd was early to a lease never renewed":        {2009, []Entry{second, beliefOf("c1", 10, opIsLeader, 1900, 2020), beliefOf("c2", 20, opIsLeader, 2010, 2030)}, overlap(10)},
		"lease never renewed has expired":                {2010, []Entry{second, beliefOf("c1", 10, opIsLeader, 1900, 2020), beliefOf("c2", 20, opIsLeader, 2010, 2030)}, bad(ruleExclusion, ruleMargin)},
		"audit is late, a write shows the deletion":      {6000, append(during(5100), renewed1, Entry{T: 5050, From: 5050, Proc: "c2", Kind: Write, Election: "chaos/a", Token: 20, Op: "counter", Value: "1 20:1", Rev: 31, Result: OK}), overlap(100)},

		"late context after 50 ms and more":  {4999, []Entry{second, beliefOf("c1", 10, opContext, 11, 2000), beliefOf("c1", 10, opContext, 5100, 5200), beliefOf("c2", 20, opIsLeader, 5000, 9000)}, late(1)},
		"late context 1 ms too late":         {4999, []Entry{second, beliefOf("c1", 10, opContext, 11, 2000), beliefOf("c1", 10, opContext, 5100, 5201), beliefOf("c2", 20, opIsLeader, 5000, 9000)}, bad(ruleExclusion, ruleMargin)},
		"late context without a pause":       {4999, []Entry{second, beliefOf("c1", 10, opContext, 11, 4990), beliefOf("c1", 10, opContext, 5040, 5041), beliefOf("c2", 20, opIsLeader, 5000, 9000)}, bad(ruleExclusion, ruleMargin)},
		"late answer after a pause":          {4999, []Entry{second, beliefOf("c1", 10, opContext, 11, 2000), beliefOf("c1", 10, opContext, 5300, 5100), beliefOf("c2", 20, opIsLeader, 5000, 9000)}, late(1)},
		"late context of a term just won":    {4999, []Entry{second, beliefOf("c1", 10, opContext, 5100, 5200), beliefOf("c2", 20, opIsLeader, 5000, 9000)}, late(1)},
		"IsLeader is late after a pause":     {4999, []Entry{second, beliefOf("c1", 10, opIsLeader, 11, 2000), beliefOf("c1", 10, opIsLeader, 5110, 5100), beliefOf("c2", 20, opIsLeader, 5000, 9000)}, bad(ruleExclusion, ruleMargin)},
		"context of the later term is early": {6000, []Entry{second, renewed1, beliefOf("c1", 10, opIsLeader, 11, 5600), beliefOf("c2", 20, opContext, 5550, 5551)}, bad(ruleExclusion)},

		"both ops of a term count once":  {4999, append(during(5400), renewed1, beliefOf("c1", 10, opContext, 4000, 5300)), overlap(400)},
		"time without belief counts not": {4999, append(during(5200), renewed1, beliefOf("c1", 10, opIsLeader, 5900, 6000)), overlap(300)},
		"answer within belief":           {4999, []Entry{second, renewed1, beliefOf("c1", 10, opIsLeader, 5200, 5100), beliefOf("c2", 20, opIsLeader, 5100, 5200)}, overlap(0)},
		"answer may be before belief":    {4999, []Entry{second, renewed1, beliefOf("c1", 10, opIsLeader, 5200, 5100), beliefOf("c2", 20, opIsLeader, 5101, 5300)}, good},
		"answer may be after belief":     {4999, []Entry{second, renewed1, beliefOf("c1", 10, opIsLeader, 5200, 5100), beliefOf("c2", 20, opIsLeader, 5000, 5199)}, good},
		"context of both":                {4999, []Entry{second, renewed1, beliefOf("c1", 10, opContext, 4000, 5100), beliefOf("c2", 20, opContext, 5000, 6000)}, overlap(100)},

		"margin is kept":                            {6000, expires(beliefOf("c1", 10, opIsLeader, 11, 5600)), good},
		"margin is short by 1 ms":                   {6000, expires(beliefOf("c1", 10, opIsLeader, 11, 5601)), bad(ruleMargin)},
		"timer is late by a quarter of the margin":  {6000, expires(beliefOf("c1", 10, opContext, 11, 5700)), good},
		"timer is later":                            {6000, expires(beliefOf("c1", 10, opContext, 11, 5701)), bad(ruleMargin)},
		"timer is late after a pause":               {6000, expires(beliefOf("c1", 10, opContext, 11, 5000), beliefOf("c1", 10, opContext, 5800, 5900)), late(1)},
		"answer is late that was asked for in time": {6000, expires(beliefOf("c1", 10, opIsLeader, 7000, 5600)), good},
		"peer believes past the end":                {6000, expires(with(second, func(e *Entry) { e.Op = "stock" }), beliefOf("c2", 20, "stock", 11, 9000), Entry{T: 7000, Kind: Event, Op: "delete", Rev: 40, Key: "chaos/a/2"}), good},
		"resigned at the last moment":               {6000, expires(Entry{T: 6000, Proc: "c1", Kind: Resigning, Token: 10}, beliefOf("c1", 10, opIsLeader, 11, 6000)), good},
		"resigned too late":                         {6000, expires(Entry{T: 6001, Proc: "c1", Kind: Resigning, Token: 10}, beliefOf("c1", 10, opIsLeader, 11, 6000)), bad(ruleMargin)},
		"resigned and lost at once":                 {6000, expires(Entry{T: 5601, Proc: "c1", Kind: Resigning, Token: 10}, Entry{T: 5700, Proc: "c1", Kind: Ended, Token: 10, Err: leader.ErrExpired.Error()}, beliefOf("c1", 10, opIsLeader, 11, 5601)), bad(ruleMargin)},
		"resigned, and the end told later":          {6000, expires(Entry{T: 5601, Proc: "c1", Kind: Resigning, Token: 10}, Entry{T: 6010, Proc: "c1", Kind: Ended, Token: 10, Err: leader.ErrResigned.Error()}, beliefOf("c1", 10, opIsLeader, 11, 6000)), good},
		"believed until the end was told":           {5700, expires(Entry{T: 5600, Proc: "c1", Kind: Ended, Token: 10, Err: leader.ErrExpired.Error()}, beliefOf("c1", 10, opIsLeader, 11, 5600)), good},
		"believed after the end was told":           {5700, expires(Entry{T: 5600, Proc: "c1", Kind: Ended, Token: 10, Err: leader.ErrExpired.Error()}, beliefOf("c1", 10, opIsLeader, 11, 5601)), bad(ruleMargin)},

		"term is told late":                    {4000, []Entry{second, with(first, func(e *Entry) { e.T, e.From = 4100, 9 })}, good},
		"term is told late and had been taken": {4999, []Entry{second, takenKey, with(first, func(e *Entry) { e.T, e.From = 4100, 9 }), beliefOf("c1", 10, opIsLeader, 4100, 4200)}, good},
		"term is told late and etcd was early": {4999, []Entry{second, renewed1, with(first, func(e *Entry) { e.T, e.From = 4100, 9 }), beliefOf("c1", 10, opIsLeader, 4100, 4200)}, good},
		"term is told late and believed in":    {6000, []Entry{second, renewed1, with(first, func(e *Entry) { e.T, e.From = 4100, 9 }), beliefOf("c1", 10, opIsLeader, 4100, 4200)}, bad(ruleToken)},
		"stock campaigns twice with one key":   {6000, []Entry{with(second, func(e *Entry) { e.Op = "stock" }), with(second, func(e *Entry) { e.Op, e.T = "stock", 30 })}, good},
		"stock shares a key with ours":         {6000, []Entry{second, with(second, func(e *Entry) { e.Op, e.T = "stock", 30 })}, bad(ruleToken)},
		"stock leads with an older key":        {6000, []Entry{second, with(second, func(e *Entry) { e.Op, e.T, e.From, e.Token, e.Key = "stock", 30, 29, 10, "chaos/a/1" })}, bad(ruleToken)},
		"audit has not come to a term":         {6000, []Entry{with(second, func(e *Entry) { e.T, e.Token, e.Key = 7000, 31, "chaos/a/3" })}, good},

		"calm of less than it takes":             {0, []Entry{calmFrom(100, 5099)}, good},
		"calm in vain":                           {0, []Entry{calmFrom(100, 5100)}, bad(ruleLiveness)},
		"calm, and led after a TTL":              {0, []Entry{calmFrom(100, 5100), beliefOf("c1", 10, opIsLeader, 50, 2100)}, good},
		"calm, and led until then":               {0, []Entry{calmFrom(100, 5100), beliefOf("c1", 10, opIsLeader, 50, 2099)}, bad(ruleLiveness)},
		"calm, and led in the end":               {0, []Entry{calmFrom(100, 9000), beliefOf("c1", 10, opIsLeader, 5100, 5101)}, good},
		"calm, and led too late":                 {0, []Entry{calmFrom(100, 9000), beliefOf("c1", 10, opIsLeader, 5101, 5102)}, bad(ruleLiveness)},
		"calm, and a peer leads":                 {0, []Entry{calmFrom(10, 9000), with(second, func(e *Entry) { e.Op, e.T = "etcdctl", 2010 })}, good},
		"calm, and only another election is led": {0, []Entry{calmFrom(100, 9000), with(second, func(e *Entry) { e.Election, e.T, e.Token = "chaos/b", 200, 99 })}, bad(ruleLiveness)},

		"fault that was not injected":                {0, []Entry{{T: 9, Kind: Fault, Err: "no"}}, good},
		"write in the last revision of the key":      {100, writes(10, 29, "1 10:1", "2 10:2"), good},
		"write in the revision without the key":      {100, writes(10, 30, "1 10:1", "2 10:2"), bad(ruleGuard)},
		"write in the first revision as the oldest":  {100, writes(20, 31, "1 10:1", "2 20:2"), good},
		"write in the last revision of an older key": {100, writes(20, 30, "1 10:1", "2 20:2"), bad(ruleOrder)},
		"write as the oldest but one": {100, append(writes(20, 31, "1 10:1", "2 20:2"),
			Entry{T: 5, Proc: "audit", Kind: Event, Op: "put", Rev: 5, Token: 5, Key: "chaos/a/5", Value: "c5"}), bad(ruleOrder, ruleOrder)},
		"write nobody has recorded":             {100, writes(10, 29, "1 10:1", "2 10:2")[1:], good},
		"read that begins as the write ends":    {0, []Entry{{T: 13, From: 12, Kind: Read, Election: "chaos/a", Op: "register"}}, good},
		"read that begins after the write ends": {0, []Entry{{T: 14, From: 13, Kind: Read, Election: "chaos/a", Op: "register"}}, bad(ruleData)},
		"write that the audit has not come to": {0, []Entry{
			{T: 40, From: 30, Proc: "c1", Kind: Write, Election: "chaos/a", Token: 10, Op: "register", Base: "1 10:1", Value: "2 10:2", Rev: 26, Result: OK},
			{T: 60, From: 50, Proc: "c1", Kind: Read, Election: "chaos/a", Op: "register", Value: "2 10:2"},
		}, good},
		"observer sees what the audit has not come to":        {0, []Entry{observed(20, 20, "c3"), observed(21, 20, "c3")}, bad(ruleObserve)},
		"observer sees that nobody leads where somebody does": {0, []Entry{observed(10, 10, "c1"), observed(11, 0, ""), observed(12, 10, "c1"), observed(13, 10, "c1")}, bad(ruleObserve)},
		"observer has not seen the last state":                {0, []Entry{observed(5, 0, ""), stops("chaos/a", 2021)}, bad(ruleObserve)},
		"observer had no time to see it":                      {0, []Entry{observed(5, 0, ""), stops("chaos/a", 2020)}, good},
		"observer has seen the last state":                    {0, []Entry{observed(5, 0, ""), observed(11, 10, "c1"), stops("chaos/a", 2021)}, good},
		"observer has seen nothing":                           {0, []Entry{stops("chaos/a", 2021)}, good},
		"observer where nothing happened":                     {0, []Entry{with(observed(5, 0, ""), func(e *Entry) { e.Election = "chaos/b" }), stops("chaos/b", 2021)}, good},
		"observer sees somebody where nobody is":              {0, []Entry{with(observed(5, 10, "c1"), func(e *Entry) { e.Election = "chaos/b" })}, bad(ruleObserve)},
		"observer sees what comes after the audit":            {0, []Entry{observed(21, 20, "c3")}, good},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			extra := slices.Clone(test.extra)
			if !slices.ContainsFunc(extra, func(e Entry) bool { return e.Kind == Term && e.Token == 10 && e.Op == "leader" && e.Proc == "c1" }) {
				extra = append(extra, first)
			}
			v := check(scene{test.gone, extra}.history())
			var got outcome
			for _, v := range v.Violations {
				got.rules = append(got.rules, v.Rule)
			}
			for _, o := range v.Overlaps {
				got.overlaps = append(got.overlaps, o.Certain)
			}
			got.late = len(v.LateContexts)
			if got, want := fmt.Sprint(got), fmt.Sprint(test.want); got != want {
				t.Errorf("check() = %s, want %s\n%+v", got, want, v.Violations)
			}
		})
	}
}

func observed(t, token int64, value string) Entry {
	e := Entry{T: t, Proc: "o", Kind: Observed, Election: "chaos/a", Op: "1"}
	if token != 0 {
		e.Token, e.Key, e.Value, e.Lease = token, fmt.Sprintf("chaos/a/%d", token/10), value, token/10
	}
	return e
}

// writes is a write and its event.
func writes(token, rev int64, base, value string) []Entry {
	return []Entry{
		{T: 90, From: 80, Proc: "c", Kind: Write, Election: "chaos/a", Token: token, Op: "register", Base: base, Value: value, Rev: rev, Result: OK},
		{T: 85, Proc: "audit", Kind: Event, Op: "put", Rev: rev, Token: 25, Key: dataRoot + "a/register", Value: value},
	}
}

func stops(election string, t int64) Entry {
	return Entry{T: t, Proc: "o", Kind: Observed, Election: election, Op: "1", Err: "context canceled"}
}

func TestEventsOfOneRevisionAreOneChange(t *testing.T) {
	t.Parallel()
	h := scene{30, []Entry{
		first,
		{T: 30, Proc: "audit", Kind: Event, Op: "delete", Rev: 30, Key: "chaos/a/2"},
		observed(31, 10, "c1"), observed(32, 20, "c2"),
		{T: 33, Proc: "audit", Kind: Event, Op: "put", Rev: 33, Token: 33, Key: root + "end"},
	}}.history()
	v := check(h)
	if len(v.Violations) != 1 || v.Violations[0].Rule != ruleObserve || !strings.Contains(v.Violations[0].What, "never was") {
		t.Errorf("c2 never led, but check() = %+v", v.Violations)
	}
}

// Keys of other things under an election are not candidates.
func TestCandidatesAreToldFromOtherKeys(t *testing.T) {
	t.Parallel()
	for key, want := range map[string]bool{
		"chaos/a/1":                true,
		"chaos/a/b/7fffffffffffff": true,
		"chaos/a/0":                false,
		"chaos/a/01":               false,
		"chaos/a/A":                false,
		"chaos/a/-1":               false,
		"chaos/a/+1":               false,
		"chaos/a/end":              false,
		"chaos/a/":                 false,
		"1":                        false,
	} {
		if _, _, ok := candidateOf(key); ok != want {
			t.Errorf("candidateOf(%q) = %v", key, ok)
		}
	}
}

// Reads of one value that may have come in any order have too many orders to try them all.
func TestPatienceEnds(t *testing.T) {
	t.Parallel()
	extra := []Entry{first, {T: 200, From: 100, Proc: "r", Kind: Read, Election: "chaos/a", Op: "register", Value: "0 0:0"}}
	for range 40 {
		extra = append(extra, Entry{T: 200, From: 100, Proc: "r", Kind: Read, Election: "chaos/a", Op: "register", Value: "1 10:1"})
	}
	c := newChecker(scene{0, extra}.history())
	c.patience = 20 * time.Millisecond
	c.run()
	if len(c.Violations) != 1 || c.Violations[0].Rule != ruleUndecided {
		t.Errorf("check() = %+v", c.Violations)
	}
}

func BenchmarkCheck(b *testing.B) {
	h := newHistory(1, 1000)
	b.ReportMetric(float64(len(h)), "entries")
	for b.Loop() {
		check(slices.Clone(h))
	}
}

func TestEtcdIsExcusedAfterAMemberWentOnAlone(t *testing.T) {
	t.Parallel()
	resigned := Entry{T: 4998, Proc: "c1", Kind: Ended, Token: 10, Err: leader.ErrResigned.Error()}
	resigning := func(t int64) Entry { return Entry{T: t, Proc: "c1", Kind: Resigning, Token: 10} }
	believed := []Entry{renewed1, beliefOf("c1", 10, opIsLeader, 4000, 5100), beliefOf("c2", 20, opIsLeader, 5000, 9000)}
	for name, test := range map[string]struct {
		resumed, gone int64
		extra         []Entry
		want          []string
	}{
		"a member went on":           {2999, 4999, believed, nil},
		"a member went on long ago":  {2998, 4999, believed, []string{ruleExclusion, ruleLease}},
		"a member went on later":     {5000, 4999, believed, []string{ruleExclusion, ruleLease}},
		"nobody believed any longer": {5000, 4999, []Entry{renewed1}, []string{ruleLease}},
		"the holder has resigned":    {5000, 4999, []Entry{renewed1, resigned}, nil},
		"the holder resigned before": {5000, 4999, []Entry{renewed1, resigned, resigning(4999)}, nil},
		"the holder resigned later":  {5000, 4999, []Entry{renewed1, resigned, resigning(5000)}, []string{ruleLease}},
		"the lease has expired":      {9000, 6000, []Entry{renewed1}, nil},
		"never renewed":              {5000, 2009, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			history := scene{test.gone, append([]Entry{first, second}, test.extra...)}.history()
			history = slices.DeleteFunc(history, func(e Entry) bool { return e.Kind == Resumed })
			var got []string
			for _, v := range check(byTime(append(history, Entry{T: test.resumed * ms, Proc: "m0", Kind: Resumed}))).Violations {
				got = append(got, v.Rule)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("violated %q, want %q", got, test.want)
			}
		})
	}
}

func TestCandidateLosesItsKeyToNobody(t *testing.T) {
	t.Parallel()
	evicted := Entry{T: 5010, Proc: "c1", Kind: Evicted, Err: `candidacy lost: leadership ended by somebody else: key "chaos/a/1" deleted`}
	campaign := Entry{T: 8000, From: 9, Proc: "c1", Kind: GivenUp}
	for name, test := range map[string]struct {
		gone  int64
		extra []Entry
		want  []string
	}{
		"nobody is known":            {4999, []Entry{evicted, campaign, renewed1}, []string{ruleLease}},
		"and it was elected later":   {4999, []Entry{evicted, with(campaign, func(e *Entry) { e.Kind, e.Token, e.Key, e.Op = Term, 31, "chaos/a/1", "leader" }), renewed1}, []string{ruleLease}},
		"an operator took it":        {4999, []Entry{evicted, campaign, renewed1, takenKey}, nil},
		"the lease has expired":      {6000, []Entry{with(evicted, func(e *Entry) { e.T = 6010 }), campaign, renewed1}, nil},
		"the lease was revoked":      {4999, []Entry{with(evicted, func(e *Entry) { e.Err = "lease revoked" }), campaign, renewed1}, nil},
		"it is of another election":  {4999, []Entry{with(evicted, func(e *Entry) { e.Election = "chaos/b" }), with(campaign, func(e *Entry) { e.Election = "chaos/b" }), renewed1}, nil},
		"it is of an earlier one":    {4999, []Entry{evicted, with(campaign, func(e *Entry) { e.From = 11 }), renewed1}, nil},
		"the campaign has not ended": {4999, []Entry{evicted, renewed1}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			history := scene{test.gone, append([]Entry{second}, test.extra...)}.history()
			history = slices.DeleteFunc(history, func(e Entry) bool { return e.Kind == Resumed })
			var got []string
			for _, v := range check(history).Violations {
				got = append(got, v.Rule)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("violated %q, want %q", got, test.want)
			}
		})
	}
}

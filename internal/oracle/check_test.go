package oracle

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func TestCorrectHistoryHasNoViolation(t *testing.T) {
	t.Parallel()
	var overlaps, late int
	var ended [6]int
	var recovered, reclaimed, fresh, lost int
	for seed := range uint64(30) {
		v := Check(newHistory(seed, 8), worldOptions)
		for _, violation := range v.Violations {
			t.Errorf("seed %d: %s: %s", seed, violation.Rule, violation.What)
		}
		overlaps += len(v.Overlaps)
		late += len(v.Late)
		for i, n := range []int{v.Checked.Resigned, v.Checked.Expired, v.Checked.Early, v.Checked.Taken, v.Checked.Transferred, v.Checked.Unhealthy} {
			ended[i] += n
		}
		recovered += v.Checked.Recovered
		reclaimed += v.Checked.Reclaimed
		fresh += v.Checked.Fresh
		lost += v.Checked.Lost
	}
	if slices.Min(append(ended[:], overlaps, late, recovered, reclaimed, fresh, lost)) == 0 {
		t.Errorf("the histories are too tame: terms ended so %v, %d overlaps, %d late contexts, %d writes recovered, %d keys reclaimed, %d states to be told, %d keys lost",
			ended, overlaps, late, recovered, reclaimed, fresh, lost)
	}
}

// changes are those of a correct history that make it incorrect. A history that has no place for a change
// is changed to nil.
var changes = map[string]struct {
	rule, what string
	change     func(*checker, []Entry) []Entry
}{
	"belief until the next term": {RuleExclusion, "the earlier key's end: resigned", func(c *checker, h []Entry) []Entry {
		next := find(c.by[Belief], func(e *Entry) bool {
			l := c.lives[idOf(e)]
			return e.Op == ByIsLeader && l.before != nil && c.how(l.before) == resigned && c.won(l.before)
		})
		if next == nil {
			return nil
		}
		older := *next
		older.Token = c.lives[idOf(next)].before.token
		older.Proc = c.terms[idOf(&older)].proc()
		return append(h, older)
	}},
	"belief until the lease expires": {RuleMargin, "the margin before its lease expired", func(c *checker, h []Entry) []Entry {
		return c.believes(h, expired, ByIsLeader, 0)
	}},
	"context lasts until the lease expires": {RuleMargin, "the margin before its lease expired", func(c *checker, h []Entry) []Entry {
		return c.believes(h, expired, ByContext, 0)
	}},
	"belief after the key was given up": {RuleMargin, "it had deleted its key", func(c *checker, h []Entry) []Entry {
		return c.believes(h, resigned, ByIsLeader, 1)
	}},
	"belief after the end was told": {RuleMargin, "the term had ended", func(c *checker, h []Entry) []Entry {
		ended := find(c.by[Ended], func(*Entry) bool { return true })
		return append(h, Entry{T: ended.T + 1, From: ended.T, Proc: ended.Proc, Kind: Belief, Election: ended.Election, Token: ended.Token, Op: ByIsLeader})
	}},
	"belief after the deadline": {RuleDeadline, "after its deadline", func(c *checker, h []Entry) []Entry {
		return c.believes(h, expired, ByIsLeader, -10*ms)
	}},
	"end is not told": {RuleEnded, "was not told", func(c *checker, h []Entry) []Entry {
		return remove(h, find(c.by[Ended], func(*Entry) bool { return true }))
	}},
	"end is told twice": {RuleEnded, "was told 2 times", func(c *checker, h []Entry) []Entry {
		return append(h, *find(c.by[Ended], func(*Entry) bool { return true }))
	}},
	"expired is told as resigned": {RuleEnded, "though nobody has resigned", func(c *checker, h []Entry) []Entry {
		ended := find(c.by[Ended], func(e *Entry) bool { return e.Op == Expired })
		if given := c.given(c.terms[idOf(ended)]); given != nil && given.T <= ended.T {
			return nil
		}
		ended.Op = Resigned
		return h
	}},
	"evicted is told as expired": {RuleEnded, "though the deadline was", func(c *checker, h []Entry) []Entry {
		ended := find(c.by[Ended], func(e *Entry) bool { return e.Op == Evicted })
		if ended == nil {
			return nil
		}
		ended.Op = Expired
		return h
	}},
	"expired is told as evicted": {RuleEnded, "though the end of its key", func(c *checker, h []Entry) []Entry {
		find(c.by[Ended], func(e *Entry) bool { return e.Op == Expired && c.how(c.lives[idOf(e)]) == expired }).Op = Evicted
		return h
	}},
	"transferred, and not asked": {RuleEnded, "though nobody had asked that term", func(_ *checker, h []Entry) []Entry {
		return slices.DeleteFunc(h, func(e Entry) bool { return strings.HasSuffix(e.Key, "/stepback") })
	}},
	"transferred, and another term was asked": {RuleEnded, "though nobody had asked that term", func(c *checker, h []Entry) []Entry {
		for _, e := range c.by[Event] {
			if strings.HasSuffix(e.Key, "/stepback") {
				e.Value += "0"
			}
		}
		return h
	}},
	"unhealthy, and its checks succeed": {RuleEnded, "though its checks had succeeded", func(c *checker, h []Entry) []Entry {
		e := find(c.by[Checked], func(e *Entry) bool { return e.Result == Failed })
		if e == nil {
			return nil
		}
		e.Result = OK
		return h
	}},
	"belief in a term that is unhealthy": {RuleHealth, "its last successful check allowed", func(c *checker, h []Entry) []Entry {
		e := find(c.by[Checked], func(e *Entry) bool { return e.Result == Failed })
		if e == nil {
			return nil
		}
		return remove(h, find(c.by[Checked], func(last *Entry) bool { return last.Proc == e.Proc && last.T == e.T-500*ms }))
	}},
	"campaign begins twice": {RuleCampaign, "began a campaign", func(c *checker, h []Entry) []Entry {
		return append(h, *find(c.by[Campaigning], func(*Entry) bool { return true }))
	}},
	"campaign that is not told": {RuleCampaign, "when it did not campaign", func(c *checker, h []Entry) []Entry {
		return remove(h, find(c.by[Campaigning], func(*Entry) bool { return true }))
	}},
	"campaign ends for no reason": {RuleCampaign, "for no reason", func(_ *checker, h []Entry) []Entry {
		return slices.DeleteFunc(h, func(e Entry) bool { return e.Kind == GivingUp })
	}},
	"term that is not told": {RuleCampaign, "had not been told", func(c *checker, h []Entry) []Entry {
		return remove(h, find(c.by[Elected], func(*Entry) bool { return true }))
	}},
	"operator who has done nothing": {RuleLease, "though nobody had said", func(c *checker, h []Entry) []Entry {
		if !slices.ContainsFunc(c.allTerms(), func(t *term) bool {
			l := c.lives[t.termID]
			return t.cause() == Evicted && c.how(l) == operator && !c.deposed(l.gone.to)
		}) {
			return nil
		}
		return slices.DeleteFunc(h, func(e Entry) bool { return e.Kind == Taken })
	}},
	"key that is never used": {RuleOrphan, "was not used any more", func(c *checker, h []Entry) []Entry {
		if len(c.calms) == 0 || c.calms[0].T < 7000*ms {
			return nil
		}
		return append(h, Entry{
			T: 1100 * ms, Proc: "audit", Kind: Event, Op: "put", Rev: 1100 * ms, Token: 1100 * ms, Key: "chaos/z/ffffff",
			Value: c.by[Elected][0].Proc, Lease: 0xffffff,
		})
	}},
	"lease that is renewed for nothing": {RuleOrphan, "which had no key any more", func(c *checker, h []Entry) []Entry {
		e := find(c.by[Renewed], func(e *Entry) bool {
			_, keyless := touches(c.joining[e.Proc], span{e.From - 2*ttl, e.T})
			return !keyless
		})
		if e == nil {
			return nil
		}
		nothing := *e
		nothing.Lease = 0xffffff
		return append(h, nothing)
	}},
	"older candidate waits while another leads": {RuleOrder, "was there", func(_ *checker, h []Entry) []Entry {
		return append(h, Entry{T: 1, Proc: "audit", Kind: Event, Op: "put", Rev: 1, Token: 1, Key: "chaos/a/ffffff", Value: "stock", Lease: 0xffffff})
	}},
	"two win a term": {RuleToken, "was won twice", func(c *checker, h []Entry) []Entry {
		e := *find(c.by[Term], func(e *Entry) bool { return e.Op == Ours })
		e.Proc = "thief"
		return append(h, e)
	}},
	"token is of another revision": {RuleToken, "not created at that revision", func(c *checker, h []Entry) []Entry {
		find(c.by[Term], func(e *Entry) bool { return e.Op == Ours }).Token++
		return h
	}},
	"key is another": {RuleToken, "not created at that revision", func(c *checker, h []Entry) []Entry {
		find(c.by[Term], func(e *Entry) bool { return e.Op == Ours }).Key += "0"
		return h
	}},
	"belief in the term of another": {RuleToken, "which it has not won", func(c *checker, h []Entry) []Entry {
		c.by[Belief][0].Proc = "thief"
		return h
	}},
	"belief in no term": {RuleToken, "which it has not won", func(c *checker, h []Entry) []Entry {
		c.by[Belief][0].Token++
		return h
	}},
	"write has two effects": {RuleData, "twice", func(c *checker, h []Entry) []Entry {
		e := *c.effect("register", OK)
		e.Rev++
		return append(h, e)
	}},
	"write has no effect": {RuleData, `was told "ok"`, func(c *checker, h []Entry) []Entry {
		e := *c.effect("register", OK)
		return slices.DeleteFunc(h, func(o Entry) bool { return o == e })
	}},
	"answer names another revision": {RuleData, `was told "ok"`, func(c *checker, h []Entry) []Entry {
		c.write("register", OK).Rev--
		return h
	}},
	"write that failed has an effect": {RuleData, `was told "failed"`, func(c *checker, h []Entry) []Entry {
		c.write("register", OK).Result = Failed
		return h
	}},
	"write has its effect before it was asked for": {RuleData, "before that was asked for", func(c *checker, h []Entry) []Entry {
		c.effect("register", OK).T = c.write("register", OK).From - 1
		return h
	}},
	"write replaces what another has written meanwhile": {RuleData, "is not linearizable", func(c *checker, h []Entry) []Entry {
		c.write("register", OK).Base = "0 1:1"
		return h
	}},
	"read is stale": {RuleData, "is not linearizable", func(c *checker, h []Entry) []Entry {
		c.shift(-1)
		return h
	}},
	"read is of a write that was not sent yet": {RuleData, "is not linearizable", func(c *checker, h []Entry) []Entry {
		c.shift(1)
		return h
	}},
	"read shows a write without an effect": {RuleData, "is not linearizable", func(c *checker, h []Entry) []Entry {
		find(c.by[Read], func(*Entry) bool { return true }).Value = c.write("counter", Failed).Value
		return h
	}},
	"write passes the guard after the term": {RuleGuard, "did not exist", func(c *checker, h []Entry) []Entry {
		w := c.write("register", OK)
		l := c.lives[idOf(w)]
		l.deleted.Rev = w.Rev
		return h
	}},
	"write passes the guard before the term": {RuleGuard, "did not exist", func(c *checker, h []Entry) []Entry {
		e := c.write("register", OK)
		for _, l := range c.lives {
			if l.election == e.Election && l.token > e.Rev {
				e.Token = l.token
				return h
			}
		}
		return nil
	}},
	"write passes the guard without a term": {RuleGuard, "did not exist", func(c *checker, h []Entry) []Entry {
		c.write("register", OK).Token++
		return h
	}},
	"observer sees what never was": {RuleObserve, "which never was", func(c *checker, h []Entry) []Entry {
		find(c.by[Observed], func(e *Entry) bool { return e.Token != 0 }).Value += "!"
		return h
	}},
	"observer goes back": {RuleObserve, "and has gone back", func(c *checker, h []Entry) []Entry {
		for _, first := range c.by[Observed] {
			for _, second := range c.by[Observed] {
				if first.Token != 0 && second.Token > first.Token && second.Op == first.Op && second.Election == first.Election {
					e := *first
					e.T = second.T + 1
					return append(h, e)
				}
			}
		}
		return nil
	}},
	"key is left":     {RuleEnd, "the key chaos/a/1 is left", added(Entry{Kind: Left, Op: "key", Value: "chaos/a/1"})},
	"process crashes": {RuleEnd, "c1 ended at", added(Entry{Kind: Exit, Proc: "c1", Result: Failed, Err: "exit status 2"})},
	"call fails":      {RuleEnd, "c1 failed at", added(Entry{Kind: Failure, Proc: "c1", Err: "Close: no"})},
	"no run":          {RuleNothing, `of the kind "run"`, without(Run)},
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
				if h = test.change(newChecker(h, worldOptions), h); h == nil {
					continue
				}
				applied++
				Sort(h)
				v := Check(h, worldOptions)
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

// find returns the first entry of which is is true.
func find(entries []*Entry, is func(*Entry) bool) *Entry {
	if i := slices.IndexFunc(entries, is); i >= 0 {
		return entries[i]
	}
	return nil
}

func remove(h []Entry, e *Entry) []Entry {
	gone := *e
	return slices.DeleteFunc(h, func(e Entry) bool { return e == gone })
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
	how, _ := c.endingOf(l, l.gone.to)
	return how
}

func (c *checker) won(l *life) bool {
	t := c.terms[l.termID]
	return t != nil && t.won != nil && t.won.Op == Ours
}

// believes makes belief last until some time after the key of a term that has come to that end is gone.
func (c *checker) believes(h []Entry, how ending, op string, after int64) []Entry {
	for _, t := range c.allTerms() {
		if l := c.lives[t.termID]; c.won(l) && c.how(l) == how && (how != resigned || !t.lost()) && len(t.pieces) > 0 && t.pieces[0].Op == op && c.stops[t.proc()] == nil {
			last := *t.pieces[len(t.pieces)-1].Entry
			last.From, last.T = last.T, l.gone.to+after
			return append(h, last)
		}
	}
	return nil
}

// write returns the first of these writes, effect its event.
func (c *checker) write(what, result string) *Entry {
	return find(c.by[Write], func(e *Entry) bool { return e.Op == what && e.Result == result })
}

func (c *checker) effect(what, result string) *Entry {
	w := c.write(what, result)
	return find(c.by[Event], func(e *Entry) bool { return e.Value == w.Value })
}

// shift makes a read show the value before or after the one that it may.
func (c *checker) shift(by int) {
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

func TestEventsOfOneRevisionAreOneChange(t *testing.T) {
	t.Parallel()
	both := event(9700, 20, "chaos/a/2", "")
	h := scene{drop: "elected c2 term c2 ended c2 resigning c2 read c2", extra: join(
		both, with(deletedIt, func(e *Entry) { e.Token, e.Rev = 20, 9700 }), observed(11, 10), observed(9701, 20))}.history()
	v := Check(h, sceneOptions())
	if len(v.Violations) != 1 || v.Violations[0].Rule != RuleObserve || !strings.Contains(v.Violations[0].What, "never was") {
		t.Errorf("c2 never led, but Check() = %+v", v.Violations)
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
		"chaos/a/8000000000000000": false,
		"chaos/a/":                 false,
		"1":                        false,
		"/1":                       true,
	} {
		if _, _, ok := candidateOf(key); ok != want {
			t.Errorf("candidateOf(%q) = %v", key, ok)
		}
	}
}

func TestEachValueIsChecked(t *testing.T) {
	t.Parallel()
	// two are writes at the same time, of which the second replaces the first.
	two := func(first, second int64) []Entry {
		w := Entry{T: 130, From: 100, Proc: "c9", Kind: Write, Token: 10, Op: "other", Value: "1 10:5", Rev: first, Result: OK}
		e := Entry{T: 130, Proc: "audit", Kind: Event, Op: "put", Rev: first, Token: 110, Key: "chaos/data/chaos/a/other", Value: "1 10:5"}
		return []Entry{w, e, with(w, func(e *Entry) { e.Base, e.Value, e.Rev = "1 10:5", "2 10:6", second }), with(e, func(e *Entry) { e.Value, e.Rev = "2 10:6", second })}
	}
	put := func(key, value string) Entry {
		return Entry{T: 100, Proc: "audit", Kind: Event, Op: "put", Rev: 100, Token: 100, Key: key, Value: value}
	}
	testScenes(t, map[string]sceneTest{
		"one that nobody has told of": {scene{extra: join(put("chaos/data/chaos/a/other", "7"))}, violated(RuleData)},
		"one without a sequence":      {scene{extra: join(put("chaos/data/chaos/a/other", "1 10"))}, violated(RuleData)},
		"one that came before it was asked for": {scene{extra: join(put("chaos/data/chaos/a/other", "1 10:7"),
			Entry{T: 110, From: 101, Proc: "c9", Kind: Write, Token: 10, Op: "other", Value: "1 10:7", Rev: 100, Result: OK})}, violated(RuleData)},
		"two in the order of revisions":         {scene{extra: join(two(110, 120))}, good},
		"two in the other order":                {scene{extra: join(two(120, 110))}, violated(RuleData)},
		"one that was only read":                {scene{extra: join(Entry{T: 100, From: 99, Proc: "r", Kind: Read, Op: "other", Value: "1 1:1", Rev: 50})}, violated(RuleData)},
		"one that was only written":             {scene{extra: join(Entry{T: 100, From: 99, Proc: "c2", Kind: Write, Token: 20, Op: "other", Value: "1 20:1", Rev: 50, Result: OK})}, violated(RuleData)},
		"one that is deleted":                   {scene{extra: join(with(put("chaos/data/chaos/a/register", ""), func(e *Entry) { e.Op = "delete" })), drop: "read c2"}, violated(RuleData)},
		"one after the other":                   {scene{extra: join(put("chaos/data/chaos/a/register", "2 10:9")), drop: "read c2"}, good},
		"one left out":                          {scene{extra: join(put("chaos/data/chaos/a/register", "3 10:9")), drop: "read c2"}, violated(RuleData)},
		"read that begins as the write ends":    {scene{extra: join(Entry{T: 15, From: 14, Proc: "r", Kind: Read, Op: "register", Rev: 12})}, good},
		"read that begins after the write ends": {scene{extra: join(Entry{T: 16, From: 15, Proc: "r", Kind: Read, Op: "register", Rev: 12})}, violated(RuleData)},
		"what is no value":                      {scene{extra: join(put("chaos/data/other", "7"))}, good},
		"what is elsewhere":                     {scene{extra: join(put("chaos/date/chaos/a/other", "7"))}, good},
		"write beyond what was audited":         {scene{extra: join(Entry{T: 9950, From: 9940, Proc: "c2", Kind: Write, Token: 20, Op: "other", Value: "1 20:1", Rev: 9999, Result: OK})}, violated(RuleData)},
	})
}

func TestVerdictShowsWhatItIsAbout(t *testing.T) {
	t.Parallel()
	s := scene{4999, Evicted, "", join(both(5599), deletedIt, Entry{T: 1000, Proc: "chaos", Kind: Run})}
	v := Check(s.history(), sceneOptions())
	if len(v.Overlaps) != 1 || v.Overlaps[0].Why != "an operator took the earlier key (delete, from 3.990s)" || v.Overlaps[0].From != 5000*ms {
		t.Errorf("overlaps: %+v", v.Overlaps)
	}
	s.extra[len(s.extra)-2].Rev = 4998
	v = Check(s.history(), sceneOptions())
	if len(v.Violations) != 2 {
		t.Fatalf("violations: %+v", v.Violations)
	}
	const what = "chaos/a: c1 believed in term 10 and c2 in term 20 from 4.000s on, for 599ms in all; etcd deleted the earlier key before its lease could expire"
	if got := v.Violations[0].What; got != what {
		t.Errorf("What = %s, want %s", got, what)
	}
	v2 := Check(scene{extra: join(event(5, 5, "chaos/a/5", "stock"), Entry{T: 1000, Proc: "chaos", Kind: Run}), drop: "read c1 read c2 write c1"}.history(), sceneOptions())
	if what := "c2 won term 20 of chaos/a at 8.701s, and the older candidate chaos/a/5 was there until the end"; !slices.ContainsFunc(v2.Violations, func(v Violation) bool { return v.What == what }) {
		t.Errorf("violations: %+v, want %q", v2.Violations, what)
	}
	v4 := Check(scene{extra: join(Entry{T: 5, Proc: "o", Kind: Observing, Op: "1"}, observed(9701, 20), observed(9702, 0), Entry{T: 1000, Proc: "chaos", Kind: Run})}.history(), sceneOptions())
	if what := `o saw "" lead chaos/a with token 0 and value "" at 8.702s, and has gone back`; len(v4.Violations) != 1 || v4.Violations[0].What != what {
		t.Errorf("violations: %+v, want %q", v4.Violations, what)
	}
	v3 := Check(scene{extra: join(Entry{T: 100, From: 99, Proc: "r", Kind: Read, Op: "other", Value: "1 1:1", Rev: 50})}.history(), sceneOptions())
	if len(v3.Violations) != 1 || len(v3.Violations[0].Entries) != 1 || v3.Violations[0].Entries[0].Proc != "r" {
		t.Errorf("violations: %+v, want the read shown", v3.Violations)
	}
	for i, want := range [][]Kind{{Belief, Belief, Event}, {Event, Event, Renewed}} {
		var kinds []Kind
		for _, e := range v.Violations[i].Entries {
			kinds = append(kinds, e.Kind)
		}
		if !slices.Equal(kinds, want) {
			t.Errorf("%s shows %q, want %q", v.Violations[i].Rule, kinds, want)
		}
	}
}

// What was checked is counted, as a rule that has had nothing to object to proves nothing.
func TestWhatWasCheckedIsCounted(t *testing.T) {
	t.Parallel()
	unknown := Entry{T: 17, From: 15, Proc: "c9", Kind: Write, Token: 10, Op: "counter", Value: "1 10:7", Result: Unknown}
	told := join(unknown, with(unknown, func(e *Entry) { e.Value = "1 10:8" }), changed("c1", 100, 10), Entry{T: 5, Proc: "o", Kind: Observing, Op: "1"}, observed(5, 0), observed(11, 10), observed(9701, 20), with(observed(9801, 50), func(e *Entry) { e.Value = "stock" }),
		Entry{T: 9990, Proc: "o", Kind: ObserveEnded, Op: "1", Err: "done"})
	ask := join(Entry{T: 20, From: 19, Proc: "o", Kind: Candidates, Value: "10 20"}, with(observed(30, 10), func(e *Entry) { e.From, e.Kind, e.Op = 29, Current, "" }),
		event(50, 50, "chaos/a/5", "stock"), event(9850, 50, "chaos/a/5", ""), Entry{T: 9802, Proc: "stock", Kind: Term, Token: 50, Key: "chaos/a/5", Op: "stock"})
	gaveUp := join(Entry{T: 60, Proc: "c6", Kind: Campaigning}, event(61, 61, "chaos/a/6", "c6"), Entry{T: 70, Proc: "c6", Kind: GivingUp},
		event(71, 61, "chaos/a/6", ""), Entry{T: 72, Proc: "c6", Kind: CampaignFailed, Op: GaveUp})
	v := Check(scene{extra: join(waits(4500, deposed, deletedIt), gaveUp, told, ask, calm(100, 9990), calm(1, 2), Entry{T: 5, Kind: Fault}, Entry{T: 5, Kind: Fault, Err: "no"})}.history(), sceneOptions())
	want := Counts{
		Entries: v.Checked.Entries, Events: 11, Campaigns: 4, Terms: 2, PeerTerms: 1, Resigned: 2, Waited: 2, Lost: 1, Oldest: 2, Reads: 2, Writes: 3, Effects: 1,
		Resolved: 2, Calms: 2, Observations: 5, Fresh: 2, Asked: 2, Faults: 1,
	}
	if v.Checked != want {
		t.Errorf("checked %+v, want %+v", v.Checked, want)
	}
}

// Reads of one value that may have come in any order have too many orders to try them all.
func TestPatienceEnds(t *testing.T) {
	t.Parallel()
	read := Entry{T: 200, From: 100, Proc: "r", Kind: Read, Op: "register", Value: "0 0:0", Rev: 150}
	extra := join(read)
	read.Value = "1 10:1"
	for range 40 {
		extra = append(extra, read)
	}
	c := newChecker(scene{extra: extra}.history(), sceneOptions())
	c.patience = 200 * time.Millisecond
	c.run()
	if len(c.Violations) != 1 || c.Violations[0].Rule != RuleUndecided {
		t.Errorf("Check() = %+v", c.Violations)
	}
}

func TestExactTimesNeedNoSlack(t *testing.T) {
	t.Parallel()
	expires := func(extra ...any) scene { return scene{gone: 6000, cause: Expired, extra: join(extra...)} }
	testScenes(t, map[string]sceneTest{
		"all in time":                        {expires(beliefOf("c1", 10, ByContext, 11, 5600)), good},
		"a timer that is late":               {expires(beliefOf("c1", 10, ByContext, 11, 5602)), violated(RuleDeadline, RuleMargin)},
		"IsLeader that is late":              {expires(beliefOf("c1", 10, ByIsLeader, 11, 5601)), violated(RuleDeadline, RuleMargin)},
		"a timer as the process goes on":     {expires(beliefOf("c1", 10, ByContext, 11, 6050), Entry{T: 6050, From: 5600, Proc: "c1", Kind: Stopped}), late(1)},
		"a timer that is late after that":    {expires(beliefOf("c1", 10, ByContext, 11, 6051), Entry{T: 6050, From: 5600, Proc: "c1", Kind: Stopped}), violated(RuleDeadline, RuleMargin)},
		"an older candidate is still there":  {scene{drop: "read c2", extra: ahead(9699)}, violated(RuleOrder)},
		"an older candidate goes as it wins": {scene{drop: "read c2", extra: ahead(9700)}, good},
	}, func(o *Options) { o.Exact = true })
}

func TestHistoryIsReadAsItWasWritten(t *testing.T) {
	t.Parallel()
	h := newHistory(1, 2)
	var b []byte
	for _, e := range h {
		b = append(b, Encode(e)...)
	}
	read, err := Decode(bytes.NewReader(append(b, "{\"t\":1,\"proc\":\"killed\""...)))
	if err != nil || !slices.Equal(read, h) {
		t.Errorf("Decode() = %d entries, %v, want %d", len(read), err, len(h))
	}
	for text, want := range map[string]string{
		"{}\n{\n":                "line 2: unexpected EOF",
		"{}\n{\"ti\":1}\n":       "line 2: json: unknown field \"ti\"",
		"{}\n{\"t\":\"soon\"}\n": "line 2: json: cannot unmarshal string into Go struct field Entry.t of type int64",
	} {
		if _, err := Decode(strings.NewReader(text)); fmt.Sprint(err) != want {
			t.Errorf("Decode(%q): %v, want %s", text, err, want)
		}
	}
	if _, err := Decode(iotest.ErrReader(iotest.ErrTimeout)); err != iotest.ErrTimeout { //nolint:errorlint // as it is
		t.Errorf("Decode: %v", err)
	}
}

func BenchmarkCheck(b *testing.B) {
	for _, terms := range []int{100, 1000} {
		h := newHistory(1, terms)
		b.Run(fmt.Sprint(terms), func(b *testing.B) {
			for b.Loop() {
				Check(h, worldOptions)
			}
			b.ReportMetric(float64(len(h)), "entries")
		})
	}
}

func TestRequestsMayBeLateByTwoTTLs(t *testing.T) {
	t.Parallel()
	for ttl, want := range map[time.Duration]time.Duration{2 * time.Second: 15 * time.Second, 10 * time.Second: 20 * time.Second} {
		if got := (Options{TTL: ttl}).late(); got != int64(want) {
			t.Errorf("with a TTL of %v: %d, want %d", ttl, got, want)
		}
	}
}

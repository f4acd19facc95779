package oracle

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// An effect is a read, or a write that took effect, at some time in from..to.
type effect struct {
	*Entry
	from, to    int64
	rev         int64 // of a write
	base, value string
}

func (c *checker) checkData() {
	reads, writes := make(map[register][]*Entry), make(map[register][]*Entry)
	for _, e := range c.by[Read] {
		r := register{e.Election, e.Op}
		reads[r] = append(reads[r], e)
	}
	for _, e := range c.by[Write] {
		r := register{e.Election, e.Op}
		writes[r] = append(writes[r], e)
	}
	for _, r := range c.registers() {
		effects := c.effects(r, writes[r])
		c.Checked.Effects += len(effects)
		for _, e := range reads[r] {
			effects = append(effects, effect{Entry: e, from: e.From, to: e.T, value: e.Value})
		}
		c.checkLinearizable(r, effects)
	}
}

// checkProclaimed checks the values that were proclaimed, each of which is unique. If a call succeeded, its value must
// have been in etcd. A value must be in the key of its own term. It must not replace the value of a later call that
// succeeded.
func (c *checker) checkProclaimed() {
	type value struct{ election, value string }
	puts := make(map[value]*Entry) // the last put of each value
	for _, e := range c.by[Event] {
		election, _, _ := candidateOf(e.Key)
		puts[value{election, e.Value}] = e
	}
	replaced := make(map[termID]int64) // the revision of a later call that has succeeded
	for _, e := range slices.Backward(c.by[Proclaimed]) {
		put, id := puts[value{e.Election, e.Value}], idOf(e)
		switch by := replaced[id]; {
		case put != nil && put.Token != e.Token:
			c.violate(RuleGuard, []*Entry{e, put}, "%q was proclaimed at revision %d by %s in term %d, which is not its own",
				e.Value, put.Rev, e.Proc, put.Token)
		case put == nil && e.Result == OK:
			c.violate(RuleData, []*Entry{e}, "%s was told that it had proclaimed %q in %s at %s, which is false", e.Proc, e.Value, id, c.at(e.T))
		case put != nil && by != 0 && put.Rev > by:
			c.violate(RuleData, []*Entry{e, put}, "%q was proclaimed at revision %d in %s, after a later value at revision %d", e.Value, put.Rev, id, by)
		case e.Result == OK:
			replaced[id] = put.Rev
		}
	}
}

// effects returns the writes of a register that took effect, in the order of revisions, and checks each of them.
func (c *checker) effects(r register, writes []*Entry) []effect {
	puts := make(map[string]*Entry)
	for _, e := range c.puts[r] {
		if first := puts[e.Value]; first != nil {
			c.violate(RuleData, []*Entry{first, e}, "%s of %s became %q twice, at revisions %d and %d",
				r.what, r.election, e.Value, first.Rev, e.Rev)
		}
		puts[e.Value] = e
	}
	written := make(map[string]*Entry)
	var effects []effect
	for _, w := range writes {
		written[w.Value] = w
		put := puts[w.Value]
		if w.Result == OK && (put == nil || put.Rev != w.Rev) || w.Result == Failed && put != nil {
			c.violate(RuleData, []*Entry{w, put}, "%s was told %q about its write %q of %s in %s at %s, revision %d, which is false",
				w.Proc, w.Result, w.Value, r.what, idOf(w), c.at(w.T), w.Rev)
		}
		if w.Result == Unknown {
			c.Checked.Resolved++
		}
	}
	// A write that nobody has recorded replaced the value before it. Its request came no earlier than the request for
	// that value.
	var base string
	var from int64
	for _, put := range c.puts[r] {
		e := effect{put, from, c.when(put.Rev).to, put.Rev, base, put.Value}
		n, token, ok := parse(put.Value)
		before, _, _ := parse(base)
		switch w := written[put.Value]; {
		case w != nil:
			e.Entry, e.from, e.base, token, ok = w, w.From, w.Base, w.Token, true
		case !ok || n != before+1:
			c.violate(RuleData, []*Entry{put}, "%s of %s went from %q to %q at revision %d, although nobody wrote that", r.what, r.election, base, put.Value, put.Rev)
		default:
			c.Checked.Recovered++
		}
		if e.to < e.from {
			c.violate(RuleData, []*Entry{e.Entry, put}, "%s of %s was %q at %s, before that was asked for at %s",
				r.what, r.election, put.Value, c.at(e.to), c.at(e.from))
			e.to = e.from // because time does not go back
		}
		if ok {
			c.checkGuard(termID{r.election, token}, put, e.Entry)
		}
		effects = append(effects, e)
		base, from = put.Value, e.from
	}
	return effects
}

// parse splits a value "<n> <token>:<seq>". For an empty value n is 0.
func parse(value string) (n, token int64, ok bool) {
	number, id, _ := strings.Cut(value, " ")
	text, seq, _ := strings.Cut(id, ":")
	n, err := strconv.ParseInt(number, 10, 64)
	token, terr := strconv.ParseInt(text, 10, 64)
	_, serr := strconv.ParseInt(seq, 10, 64)
	return n, token, cmp.Or(err, terr, serr) == nil
}

// checkGuard checks that a guarded write came while the term's key existed and no older one did.
func (c *checker) checkGuard(t termID, put, write *Entry) {
	l := c.lives[t]
	if l == nil || put.Rev <= t.token || l.goneBy(put.Rev) {
		c.violate(RuleGuard, []*Entry{write, put}, "%q was written at revision %d, when the key of %s did not exist", put.Value, put.Rev, t)
		return
	}
	if b := l.before; b != nil && !b.goneBy(put.Rev-1) {
		c.violate(RuleOrder, []*Entry{write, put, b.created, b.deleted}, "%q was written at revision %d in %s, when the older candidate %s was not gone",
			put.Value, put.Rev, t, b.key)
	}
}

// checkLinearizable lets porcupine check a register. The history is cut wherever no operation was under way. There the
// value is that of the last write before, in the order of revisions. So the parts are small, and a violation shows only
// the part that is wrong.
func (c *checker) checkLinearizable(r register, effects []effect) {
	slices.SortFunc(effects, func(a, b effect) int { return cmp.Compare(a.from, b.from) })
	var value string
	var rev int64
	for len(effects) > 0 {
		n, end := 1, effects[0].to
		for n < len(effects) && effects[n].from <= end {
			end = max(end, effects[n].to)
			n++
		}
		part, first := effects[:n], value
		effects = effects[n:]
		for _, e := range part {
			if e.rev > rev {
				value, rev = e.value, e.rev
			}
		}
		if result := linearizable(part, first, value, end, c.patience); result != porcupine.Ok {
			rule, is := RuleData, "is not linearizable"
			if result == porcupine.Unknown {
				rule, is = RuleUndecided, "may be linearizable or not: the check takes too long"
			}
			var entries []*Entry
			for _, e := range part {
				entries = append(entries, e.Entry)
			}
			c.violate(rule, entries, "the history of %s of %s from %s to %s, in which it went from %q to %q, %s",
				r.what, r.election, c.at(part[0].from), c.at(end), first, value, is)
		}
	}
}

// linearizable asks porcupine whether there is an order of the effects in which the value is first at the beginning and
// last at the end.
func linearizable(effects []effect, first, last string, end int64, patience time.Duration) porcupine.CheckResult {
	model := porcupine.Model{
		Init: func() any { return first },
		Step: func(state, input, _ any) (bool, any) {
			e := input.(effect)
			if e.rev == 0 {
				return state == e.value, state
			}
			return state == e.base, e.value
		},
	}
	operations := []porcupine.Operation{{Input: effect{value: last}, Call: end + 1, Return: end + 1}}
	for _, e := range effects {
		operations = append(operations, porcupine.Operation{Input: e, Call: e.from, Return: e.to})
	}
	return porcupine.CheckOperationsTimeout(model, operations, patience)
}

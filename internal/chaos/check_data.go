//go:build linux

package main

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// An effect is a read, or a write that took effect, in from..to.
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

// effects returns the writes of a register that took effect, by revision, and checks each of them.
func (c *checker) effects(r register, writes []*Entry) []effect {
	puts := make(map[string]*Entry)
	for _, e := range c.puts[r] {
		if first := puts[e.Value]; first != nil {
			c.violate(ruleData, []*Entry{first, e}, "%s of %s became %q twice, at revisions %d and %d",
				r.what, r.election, e.Value, first.Rev, e.Rev)
		}
		puts[e.Value] = e
	}
	written := make(map[string]*Entry)
	var effects []effect
	for _, w := range writes {
		written[w.Value] = w
		put := puts[w.Value]
		switch {
		case put == nil && w.Result == OK && w.Rev > c.last: // the audit has not come that far
			effects = append(effects, effect{w, w.From, w.T, w.Rev, w.Base, w.Value})
		case w.Result == OK && (put == nil || put.Rev != w.Rev), w.Result == Failed && put != nil:
			c.violate(ruleData, []*Entry{w, put}, "%s was told %q of its write %q of %s in %s at %s, revision %d, which is not so",
				w.Proc, w.Result, w.Value, r.what, termOf(w), c.at(w.T), w.Rev)
		}
		if w.Result == Unknown {
			c.Checked.Resolved++
		}
	}
	// What nobody has recorded replaced the value before it, and not before that one was asked for.
	var base string
	var from int64
	for _, put := range c.puts[r] {
		e := effect{put, from, c.happened(put.Rev), put.Rev, base, put.Value}
		n, token, ok := parse(put.Value)
		if w := written[put.Value]; w != nil {
			e.Entry, e.from, e.base, token = w, w.From, w.Base, w.Token
		} else if ok {
			c.Checked.Recovered++
		}
		if !ok {
			c.violate(ruleData, []*Entry{put}, "%s of %s became %q at revision %d, by nobody", r.what, r.election, put.Value, put.Rev)
		}
		if e.to < e.from {
			c.violate(ruleData, []*Entry{e.Entry, put}, "%s of %s was %q at %s, before that was asked for at %s",
				r.what, r.election, put.Value, c.at(e.to), c.at(e.from))
			e.to = e.from
		}
		if before, _, _ := parse(base); ok && r.what == "counter" && n != before+1 {
			c.violate(ruleData, []*Entry{put}, "counter of %s went from %d to %d at revision %d", r.election, before, n, put.Rev)
		}
		if ok {
			c.checkGuard(term{r.election, token}, put, e.Entry)
		}
		effects = append(effects, e)
		base, from = put.Value, e.from
	}
	return effects
}

// parse takes a value "<n> <token>:<seq>" apart. None at all is 0.
func parse(value string) (n, token int64, ok bool) {
	number, id, _ := strings.Cut(value, " ")
	text, seq, _ := strings.Cut(id, ":")
	n, err := strconv.ParseInt(number, 10, 64)
	token, terr := strconv.ParseInt(text, 10, 64)
	_, serr := strconv.ParseInt(seq, 10, 64)
	return n, token, cmp.Or(err, terr, serr) == nil
}

// checkGuard checks that a guarded write came when the term's key was there and no older one was.
func (c *checker) checkGuard(t term, put, write *Entry) {
	l := c.lives[t]
	if l == nil || put.Rev <= t.token || l.goneBy(put.Rev+1) {
		var deleted *Entry
		if l != nil {
			deleted = l.deleted
		}
		c.violate(ruleGuard, []*Entry{write, put, deleted}, "%q was written at revision %d, when the key of %s did not exist", put.Value, put.Rev, t)
		return
	}
	if b := l.before; b != nil && !b.goneBy(put.Rev) {
		c.violate(ruleOrder, []*Entry{write, put, b.created, b.deleted}, "%q was written at revision %d in %s, when the older candidate %s was not gone",
			put.Value, put.Rev, t, b.key)
	}
}

// checkLinearizable lets porcupine check a register. Wherever nothing was under way the history is cut:
// there the value is that of the last write before, in the order of revisions. So the parts are
// small, and what is reported is only what is wrong.
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
		if result := linearizable(part, first, value, c.patience); result != porcupine.Ok {
			rule, is := ruleData, "is not linearizable"
			if result == porcupine.Unknown {
				rule, is = ruleUndecided, "may be linearizable or not, which takes too long to find out"
			}
			var entries []*Entry
			for _, e := range part {
				entries = append(entries, e.Entry)
			}
			c.violate(rule, entries, "what happened to %s of %s from %s to %s, when it went from %q to %q, %s",
				r.what, r.election, c.at(part[0].from), c.at(end), first, value, is)
		}
	}
}

// linearizable asks porcupine whether effects can have followed each other such that the value was first
// at the beginning and last at the end.
func linearizable(effects []effect, first, last string, patience time.Duration) porcupine.CheckResult {
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
	end := effect{value: last}
	operations := make([]porcupine.Operation, 0, len(effects)+1)
	for _, e := range effects {
		operations = append(operations, porcupine.Operation{Input: e, Call: e.from, Return: e.to})
		end.from = max(end.from, e.to+1)
	}
	operations = append(operations, porcupine.Operation{Input: end, Call: end.from, Return: end.from})
	return porcupine.CheckOperationsTimeout(model, operations, patience)
}

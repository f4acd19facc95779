//go:build linux

package main

import (
	"slices"
	"time"
)

// seesLast is how long an election must have been quiet for an observer to know its last state.
const seesLast = 2 * time.Second

// An observation is one call of Observe.
type observation struct {
	at   int    // the earliest state it can have come to
	last *Entry // pair without an error
}

func (c *checker) checkObservers() {
	type place struct {
		election string
		state    state
	}
	places := make(map[place][]int) // where in the order of states
	for election, states := range c.states {
		for i, s := range states {
			places[place{election, s}] = append(places[place{election, s}], i)
		}
	}
	type call struct{ proc, election, op string }
	calls := make(map[call]*observation)
	for _, e := range c.by[Observed] {
		key := call{e.Proc, e.Election, e.Op}
		o := calls[key]
		if o == nil {
			o = new(observation)
			calls[key] = o
		}
		if e.Err != "" {
			c.checkLastState(e, o.last)
			continue
		}
		at := places[place{e.Election, stateOf(e)}]
		if i, _ := slices.BinarySearch(at, o.at); i < len(at) {
			o.at = at[i]
		} else if e.T <= c.lastT {
			how := "which never was"
			if len(at) > 0 {
				how = "and has gone back"
			}
			c.violate(ruleObserve, []*Entry{o.last, e}, "%s saw %q lead %s with token %d and value %q at %s, %s",
				e.Proc, e.Key, e.Election, e.Token, e.Value, c.at(e.T), how)
		}
		o.last = e
	}
}

// checkLastState checks what a call of Observe had yielded last when it ended.
func (c *checker) checkLastState(end, last *Entry) {
	states := c.states[end.Election]
	if last == nil || end.T <= c.quiet[end.Election]+int64(seesLast) {
		return
	}
	c.Checked.LastStates++
	if s := states[len(states)-1]; s != stateOf(last) {
		c.violate(ruleObserve, []*Entry{last, end}, "%s had seen %q lead %s with token %d and value %q when its call ended at %s, and not that %q did with token %d and value %q",
			last.Proc, last.Key, last.Election, last.Token, last.Value, c.at(end.T), s.key, s.token, s.value)
	}
}

func stateOf(e *Entry) state { return state{e.Token, e.Key, e.Value, e.Lease} }

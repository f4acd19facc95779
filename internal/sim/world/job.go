package world

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"time"

	"example.com/leader/internal/oracle"
)

// A Job is one simulation. It is done in a process of its own: what a program does once and for all, such as filling a
// table when that is first needed, must not depend on the simulations before.
type Job struct {
	Config
	Whole bool // the history is wanted though no rule is violated
}

// Do does the job in a bubble and writes its result to out, as JSON.
func (j Job) Do(out io.Writer, bubble func(func())) error {
	debug.SetGCPercent(-1) // it would come at moments of its own choice: monitor calls it
	var result *Result
	func() {
		defer func() {
			if r := recover(); r != nil && (result == nil || !result.Stuck) {
				panic(r)
			}
		}()
		bubble(func() { result = Run(j.Config) })
	}()
	result.Judge()
	if len(result.Violations) == 0 && !j.Whole {
		result.History = nil
	}
	return json.NewEncoder(out).Encode(result)
}

// Judge adds what the oracle objects to in the history, unless a rule of the simulation's own has cut it short.
func (r *Result) Judge() {
	if len(r.Violations) > 0 {
		return
	}
	oracle.Sort(r.History)
	verdict := oracle.Check(r.History, r.Options)
	for _, v := range verdict.Violations {
		if r.excludes(v) {
			continue
		}
		at := r.Simulated
		if len(v.Entries) > 0 {
			at = time.Duration(v.Entries[len(v.Entries)-1].T)
		}
		r.Violations = append(r.Violations, Violation{at, "oracle: " + v.Rule, v.What})
	}
}

// excludes reports whether the oracle cannot judge that of this simulation.
func (r *Result) excludes(v oracle.Violation) bool {
	switch v.Rule {
	case oracle.RuleNothing:
		// One simulation of many may have nothing to object to: the program counts over all.
		return true
	case oracle.RuleData:
		// The answer to a write that was carried out twice may be that to the second time. Those of Proclaim are true.
		return r.Doubled && !slices.ContainsFunc(v.Entries, func(e oracle.Entry) bool { return e.Kind == oracle.Proclaimed })
	}
	return false
}

// Format is an entry of a history for readers.
func Format(e oracle.Entry) string {
	s := fmt.Sprintf("%12.6f %-10s", time.Duration(e.T).Seconds(), e.Kind)
	if e.Kind == noted {
		return s + " " + e.Value
	}
	for _, f := range []struct {
		name  string
		value any
	}{
		{"", e.Proc}, {"", e.Election}, {"token", e.Token}, {"key", e.Key}, {"lease", e.Lease}, {"", e.Op}, {"base", e.Base},
		{"value", e.Value}, {"rev", e.Rev}, {"", e.Result}, {"", e.Err},
	} {
		if f.value == "" || f.value == int64(0) {
			continue
		}
		if s += " "; f.name != "" {
			s += f.name + "="
		}
		s += fmt.Sprint(f.value)
	}
	if e.From != 0 {
		s += fmt.Sprintf(" from=%.6f", time.Duration(e.From).Seconds())
	}
	if e.Until != 0 {
		s += fmt.Sprintf(" until=%.6f", time.Duration(e.Until).Seconds())
	}
	return s
}

//go:build linux

package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"example.com/leader/internal/oracle"
)

// Measures count what happened in a history, whether it was right or not.
type Measures struct {
	Faults   []FaultMeasure // by kind
	Terms    map[string]int // by who won them: "leader", "stock", "etcdctl"
	Failed   map[string]int // campaigns by reason
	Renewed  int
	Refused  int
	Observed int
	Writes   map[string]int // by result
	Appends  map[string]int // by result
	Started  map[string]int // processes by kind
	Killed   map[string]int // processes by kind
}

// A FaultMeasure is how often a kind of fault was injected, and what it did to the elections. For each fault and each
// election it takes the longest time without a leader that touches the fault's time. Other faults of that time may have
// caused it just as well.
type FaultMeasure struct {
	Op            string
	Injected      int
	Refused       int // could not be injected
	Median, Worst time.Duration
}

// A span is a stretch of time, both ends included.
type span struct{ from, to int64 }

func (s span) touches(other span) bool { return s.from <= other.to && other.from <= s.to }

// believed returns when a [Belief] was held. If the piece is a single answer, that is a point.
func believed(e oracle.Entry) span { return span{min(e.From, e.T), e.T} }

// merge joins spans that are no further apart than slack. It sorts them in place.
func merge(spans []span, slack time.Duration) []span {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	var merged []span
	for _, s := range spans {
		if last := len(merged) - 1; last >= 0 && s.from-merged[last].to <= int64(slack) {
			merged[last].to = max(merged[last].to, s.to)
		} else {
			merged = append(merged, s)
		}
	}
	return merged
}

// gaps returns the parts of whole that the spans do not cover.
func gaps(whole span, spans []span) []span {
	var left []span
	for _, s := range merge(spans, 0) {
		if whole.from < s.from {
			left = append(left, span{whole.from, s.from})
		}
		whole.from = s.to
	}
	if whole.from < whole.to {
		left = append(left, whole)
	}
	return left
}

// measure counts what happened in the history.
func measure(history []oracle.Entry) Measures {
	m := Measures{
		Terms:   make(map[string]int),
		Failed:  make(map[string]int),
		Writes:  make(map[string]int),
		Appends: make(map[string]int),
		Started: make(map[string]int),
		Killed:  make(map[string]int),
	}
	var faults []oracle.Entry
	beliefs := make(map[string][]span) // by election
	sortOf := make(map[string]string)  // process
	for _, e := range history {
		switch e.Kind {
		case oracle.Term:
			m.Terms[e.Op]++
		case oracle.CampaignFailed:
			m.Failed[e.Op]++
		case oracle.Belief:
			beliefs[e.Election] = append(beliefs[e.Election], believed(e))
		case oracle.Renewed:
			m.Renewed++
		case oracle.Refused:
			m.Refused++
		case oracle.Observed:
			m.Observed++
		case oracle.Write:
			m.Writes[e.Result]++
		case oracle.Append:
			m.Appends[e.Result]++
		case oracle.Fault:
			faults = append(faults, e)
		case oracle.Start:
			if e.Err == "" {
				sortOf[e.Proc] = e.Op
				m.Started[e.Op]++
			}
		case oracle.Exit:
			if strings.Contains(e.Err, "killed") {
				m.Killed[sortOf[e.Proc]]++
			}
		}
	}
	m.Faults = measureFaults(faults, leaderless(beliefs), parameters(history).TTL)
	return m
}

// leaderless returns, for each election, the times in which nobody believed that it led, in order. The time before the
// first leader of all elections and the time after the last do not count.
func leaderless(beliefs map[string][]span) [][]span {
	whole := span{from: math.MaxInt64}
	for _, spans := range beliefs {
		for _, s := range spans {
			whole = span{min(whole.from, s.from), max(whole.to, s.to)}
		}
	}
	var vacant [][]span
	for _, spans := range beliefs {
		vacant = append(vacant, gaps(whole, spans))
	}
	return vacant
}

func measureFaults(faults []oracle.Entry, leaderless [][]span, ttl time.Duration) []FaultMeasure {
	measures := make(map[string]*FaultMeasure)
	samples := make(map[string][]time.Duration)
	for _, f := range faults {
		m := measures[f.Op]
		if m == nil {
			m = &FaultMeasure{Op: f.Op}
			measures[f.Op] = m
		}
		if f.Err != "" {
			m.Refused++
			continue
		}
		m.Injected++
		struck := span{f.From, f.T + int64(ttl+oracle.RecoverTime)}
		for _, gaps := range leaderless {
			samples[f.Op] = append(samples[f.Op], longest(gaps, struck))
		}
	}
	var result []FaultMeasure
	for _, op := range slices.Sorted(maps.Keys(measures)) {
		m := measures[op]
		m.Median, m.Worst = medianAndWorst(samples[op])
		result = append(result, *m)
	}
	return result
}

// longest returns the length of the longest gap that touches s. The gaps are in order.
func longest(gaps []span, s span) time.Duration {
	first, _ := slices.BinarySearchFunc(gaps, s.from, func(g span, t int64) int { return cmp.Compare(g.to, t) })
	var result int64
	for _, g := range gaps[first:] {
		if g.from > s.to {
			break
		}
		result = max(result, g.to-g.from)
	}
	return time.Duration(result)
}

// medianAndWorst returns 0 for no durations. For an even number of them, the median is the larger of the two in the
// middle, so that it is a measured value.
func medianAndWorst(ds []time.Duration) (median, worst time.Duration) {
	if len(ds) == 0 {
		return 0, 0
	}
	sorted := slices.Sorted(slices.Values(ds))
	return sorted[len(sorted)/2], sorted[len(sorted)-1]
}

// parameters returns the parameters that the run was started with, as far as the history has them.
func parameters(history []oracle.Entry) Parameters {
	var p Parameters
	if i := slices.IndexFunc(history, isRun); i >= 0 {
		// A report without the parameters is better than none.
		_ = json.Unmarshal([]byte(history[i].Value), &p)
	}
	return p
}

// began is the time from which a report counts.
func began(history []oracle.Entry) int64 {
	if len(history) == 0 {
		return 0
	}
	return history[max(0, slices.IndexFunc(history, isRun))].T
}

func isRun(e oracle.Entry) bool { return e.Kind == oracle.Run }

// writeReport writes a report in Markdown: what the run was, what happened, and whether it was right. command is the
// command that repeats the run.
func writeReport(w io.Writer, history []oracle.Entry, v oracle.Verdict, command string) error {
	p, m := parameters(history), measure(history)
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Fault campaign\n\n**%s**\n\nTo repeat it:\n\n    %s\n\n", verdict(v), command)
	table(&b, "Parameter | value", [][]any{
		{"seed", p.Seed},
		{"duration", p.Duration},
		{"members", p.Members},
		{"candidates", p.Candidates},
		{"elections", len(p.Elections)},
		{"TTL", p.TTL},
		{"margin", p.Margin},
		{"etcd", p.Etcd},
		{"race detector", map[bool]string{true: "on", false: "off"}[p.Race]},
		{"mutation", cmp.Or(p.Mutation, "none")},
	})

	b.WriteString("## Faults\n\n")
	if len(m.Faults) == 0 {
		b.WriteString("None.\n\n")
	} else {
		fmt.Fprintf(&b, "The last two columns say how long an election was without a leader. They take, for each fault and each election, the\n"+
			"longest vacancy that touches the period from the injection until %v after the healing. The figures are upper limits:\n"+
			"several faults act at a time, and what one causes counts for the others too. Terms also end without a fault.\n\n",
			p.TTL+oracle.RecoverTime)
		var rows [][]any
		for _, f := range m.Faults {
			row := []any{f.Op, f.Injected, f.Refused, "", ""}
			if f.Injected > 0 {
				row[3], row[4] = brief(f.Median), brief(f.Worst)
			}
			rows = append(rows, row)
		}
		table(&b, "Fault | injected | not injected | without leader, median | worst", rows)
	}

	b.WriteString("## What happened\n\n")
	table(&b, "What | how often", slices.Concat(
		counts("processes started: %s", m.Started),
		counts("processes killed, including at the end: %s", m.Killed),
		counts("terms of %s", m.Terms),
		counts("campaigns that were not won: %s", m.Failed),
		[][]any{
			{"renewals that counted", m.Renewed},
			{"renewals that etcd acknowledged but that did not count", m.Refused},
		},
		counts("guarded writes: %s", m.Writes),
		counts("appends outside etcd: %s", m.Appends),
		[][]any{{"observations", m.Observed}},
	))
	checked(&b, v.Checked)
	excused(&b, v, history)
	violations(&b, v.Violations)
	_, err := w.Write(b.Bytes())
	return err
}

// longestList is the largest number of entries of a list that the report shows. The record has all.
const longestList = 20

// checked writes how much was checked.
func checked(b *bytes.Buffer, n oracle.Counts) {
	b.WriteString("## What was checked\n\n")
	table(b, "What | how often", [][]any{
		{"entries in the record", n.Entries},
		{"changes in etcd", n.Events},
		{"campaigns", n.Campaigns},
		{"terms", n.Terms},
		{"terms that ended by resignation", n.Resigned},
		{"terms that were transferred", n.Transferred},
		{"terms that ended because their process was unhealthy", n.Unhealthy},
		{"terms that expired", n.Expired},
		{"terms that etcd ended before their lease could expire", n.Early},
		{"terms that an operator ended", n.Taken},
		{"keys of killed processes that were reclaimed", n.Reclaimed},
		{"revocations of leases of dead processes", n.Revocations},
		{"keys of candidates that were not elected", n.Waited},
		{"of these, keys that an operator or etcd took", n.Lost},
		{"terms checked by a read: no older candidate was left", n.Oldest},
		{"terms of peers (stock, etcdctl)", n.PeerTerms},
		{"beliefs: intervals in which a process believed that it led", n.Beliefs},
		{"reports that the function of Run is overdue, or has returned", n.Overdue},
		{"reads of data", n.Reads},
		{"guarded writes", n.Writes},
		{"writes that took effect", n.Effects},
		{"writes without an answer, whose outcome the audit shows", n.Resolved},
		{"writes whose writer was killed before it recorded them", n.Recovered},
		{"appends outside etcd", n.Appends},
		{"observations", n.Observations},
		{"states that an observer had to see in time", n.Fresh},
		{"calls of Current and Candidates", n.Asked},
		{"periods of calm", n.Calms},
	})
}

// excused writes what is excused. It would be a violation, but no client can prevent its cause.
func excused(b *bytes.Buffer, v oracle.Verdict, history []oracle.Entry) {
	overlaps := slices.SortedFunc(slices.Values(v.Overlaps), func(x, y oracle.Overlap) int { return cmp.Compare(y.Certain, x.Certain) })
	var certain []time.Duration
	var rows [][]any
	for _, o := range overlaps {
		certain = append(certain, o.Certain)
		rows = append(rows, []any{
			fmt.Sprintf("%s: %s (%d) and %s (%d)", strings.TrimPrefix(o.Election, root), o.Procs[0], o.Tokens[0], o.Procs[1], o.Tokens[1]),
			brief(o.Certain), fmt.Sprintf("%.3fs", time.Duration(o.From-began(history)).Seconds()), o.Why,
		})
	}
	median, worst := medianAndWorst(certain)
	b.WriteString("## What is excused\n\n")
	table(b, "What | how often | median | worst", [][]any{
		{"two terms overlapped because an operator or etcd itself took the earlier key", len(overlaps), brief(median), brief(worst)},
		{"a context ended late because its process was paused when the timer was to fire", len(v.Late), "", ""},
	})
	if len(rows) > 0 {
		table(b, "Longest overlaps | length | from | why", rows[:min(len(rows), longestList)])
	}
}

func violations(b *bytes.Buffer, violations []oracle.Violation) {
	if len(violations) == 0 {
		return
	}
	b.WriteString("## Violations\n\n")
	for _, v := range violations[:min(len(violations), longestList)] {
		fmt.Fprintf(b, "- **%s**: %s\n\n", v.Rule, plain(v.What))
		for _, e := range v.Entries[:min(len(v.Entries), longestList)] {
			line, _ := json.Marshal(e) // it was read from JSON, so this cannot fail
			fmt.Fprintf(b, "      %s\n", line)
		}
		b.WriteString("\n")
	}
	if more := len(violations) - longestList; more > 0 {
		fmt.Fprintf(b, "And %d more.\n", more)
	}
}

func verdict(v oracle.Verdict) string {
	switch n := len(v.Violations); n {
	case 0:
		return "Passed: no violation."
	case 1:
		return "Failed: 1 violation."
	default:
		return fmt.Sprintf("Failed: %d violations.", n)
	}
}

// counts returns one row of a table for each key.
func counts(format string, of map[string]int) [][]any {
	var rows [][]any
	for _, key := range slices.Sorted(maps.Keys(of)) {
		rows = append(rows, []any{fmt.Sprintf(format, key), of[key]})
	}
	return rows
}

// table writes rows below a head of columns. All columns but the first are figures.
func table(b *bytes.Buffer, head string, rows [][]any) {
	fmt.Fprintf(b, "| %s |\n", head)
	b.WriteString("|---|" + strings.Repeat("---:|", strings.Count(head, "|")) + "\n")
	for _, row := range rows {
		for _, value := range row {
			fmt.Fprintf(b, "| %s ", plain(fmt.Sprint(value)))
		}
		b.WriteString("|\n")
	}
	b.WriteString("\n")
}

// plain keeps a text on one line and in one cell.
var plain = strings.NewReplacer("\n", " ", "|", `\|`, "<", "&lt;", "`", "'").Replace

// brief formats a duration with as many digits as matter.
func brief(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	default:
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
}

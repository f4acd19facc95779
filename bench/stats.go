package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// A sample is what was measured in the trials.
type sample []time.Duration

func (s sample) quantile(q float64) time.Duration {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	return sorted[int(q*float64(len(s)-1)+0.5)]
}

func (s sample) median() time.Duration { return s.quantile(0.5) }

// over is the ratio of the medians.
func (s sample) over(other sample) float64 { return float64(s.median()) / float64(other.median()) }

// cells are the median with the tenth and the ninetieth percentile, and the number of trials.
func (s sample) cells() []string {
	return []string{
		fmt.Sprintf("%s (%s – %s)", milliseconds(s.median()), milliseconds(s.quantile(0.1)), milliseconds(s.quantile(0.9))),
		fmt.Sprint(len(s)),
	}
}

func milliseconds(d time.Duration) string { return number(float64(d) / 1e6) }

// number formats to three digits, or to all that are before the point.
func number(v float64) string {
	switch size := math.Abs(v); {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "–"
	case size >= 100 || v == math.Trunc(v):
		return fmt.Sprintf("%.0f", v)
	case size >= 10:
		return fmt.Sprintf("%.1f", v)
	case size >= 0.1:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.2g", v)
	}
}

// A result is what a row has found.
type result struct {
	tables  []table
	targets []*target
	figures []figure
}

type table struct {
	caption string
	header  []string
	lines   [][]string
}

func (t *table) add(cells ...string) { t.lines = append(t.lines, cells) }

// A target is what the library has to reach.
type target struct {
	what    string
	value   float64
	bound   float64
	atLeast bool // else at most

	// What shows how far the target is in anybody's reach, and its value; "" if nothing does.
	reference      string
	referenceValue float64
}

func (t *target) reachedBy(value float64) bool {
	if t.atLeast {
		return value >= t.bound
	}
	return value <= t.bound
}

// beside puts the value of a reference, measured in the same run, beside the library's.
func (t *target) beside(reference string, value float64) {
	t.reference, t.referenceValue = reference, value
}

func (t *target) String() string {
	sign, reference, verdict := "≤", "", "reached"
	if t.atLeast {
		sign = "≥"
	}
	if t.reference != "" {
		reference = t.reference + ": " + number(t.referenceValue)
	}
	if !t.reachedBy(t.value) {
		verdict = "**missed**"
		if t.reference != "" && !t.reachedBy(t.referenceValue) {
			verdict += ", by the reference too"
		}
	}
	return fmt.Sprintf("| %s | %s %s | %s | %s | %s |", t.what, sign, number(t.bound), number(t.value), reference, verdict)
}

func (r *result) atMost(bound, value float64, format string, args ...any) *target {
	t := &target{what: fmt.Sprintf(format, args...), value: value, bound: bound}
	r.targets = append(r.targets, t)
	return t
}

func (r *result) atLeast(bound, value float64, format string, args ...any) *target {
	t := r.atMost(bound, value, format, args...)
	t.atLeast = true
	return t
}

// String is the result in Markdown.
func (r *result) String() string {
	var b strings.Builder
	for _, t := range r.tables {
		fmt.Fprintf(&b, "\n%s\n\n| %s |\n|%s\n", t.caption, strings.Join(t.header, " | "), strings.Repeat("---|", len(t.header)))
		for _, line := range t.lines {
			fmt.Fprintf(&b, "| %s |\n", strings.Join(line, " | "))
		}
	}
	b.WriteString(targets(r.targets))
	return b.String()
}

func targets(ts []*target) string {
	if len(ts) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString("\n| target | bound | value | reference | |\n|---|---|---|---|---|\n")
	for _, t := range ts {
		fmt.Fprintln(&b, t)
	}
	return b.String()
}

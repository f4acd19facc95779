package main

import (
	"fmt"
	"math"
	"math/rand/v2"
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

// A ratio is one of medians, with the interval in which it lies with a probability of 95 %.
type ratio struct{ value, low, high float64 }

// exact is a value that has no interval: a count, or a mean.
func exact(value float64) ratio { return ratio{value, value, value} }

// resamples is how often a ratio is calculated anew for its interval.
const resamples = 1000

// ratio is over with its interval: a bootstrap, whose resamples are the same in each run.
func (s sample) ratio(other sample) ratio {
	r := exact(s.over(other))
	if len(s) == 0 || len(other) == 0 {
		return r
	}
	rng := rand.New(rand.NewPCG(1, 2))
	resampled := make([]float64, resamples)
	for i := range resampled {
		resampled[i] = s.resample(rng).over(other.resample(rng))
	}
	slices.Sort(resampled)
	r.low, r.high = resampled[resamples/40], resampled[resamples-1-resamples/40]
	return r
}

// resample draws as many values as the sample has, each of which may come more than once.
func (s sample) resample(rng *rand.Rand) sample {
	drawn := make(sample, len(s))
	for i := range drawn {
		drawn[i] = s[rng.IntN(len(s))]
	}
	return drawn
}

func (r ratio) String() string {
	if r.low == r.high {
		return number(r.value)
	}
	return fmt.Sprintf("%s (%s – %s)", number(r.value), number(r.low), number(r.high))
}

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
	bars    []bar // of the picture
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
	value   ratio
	bound   float64
	atLeast bool // else at most

	// What shows how far the target is in anybody's reach, and its value; "" if nothing does.
	reference      string
	referenceValue ratio
}

// A verdict says whether a value reaches a bound. If its interval has the bound in it, the measurement does not tell.
type verdict string

const (
	reached verdict = "reached"
	missed  verdict = "**missed**"
	untold  verdict = "not told apart"
)

func (t *target) judge(value ratio) verdict {
	best, worst := value.low, value.high
	reaches := func(v float64) bool { return v <= t.bound }
	if t.atLeast {
		best, worst = worst, best
		reaches = func(v float64) bool { return v >= t.bound }
	}
	switch {
	case reaches(worst):
		return reached
	case reaches(best):
		return untold
	}
	return missed
}

// beside puts the value of a reference, measured in the same run, beside the library's.
func (t *target) beside(reference string, value ratio) {
	t.reference, t.referenceValue = reference, value
}

func (t *target) String() string {
	sign, reference := "≤", ""
	if t.atLeast {
		sign = "≥"
	}
	if t.reference != "" {
		reference = t.reference + ": " + t.referenceValue.String()
	}
	said := t.judge(t.value)
	if said == missed && t.reference != "" && t.judge(t.referenceValue) == missed {
		said += ", by the reference too"
	}
	return fmt.Sprintf("| %s | %s %s | %s | %s | %s |", t.what, sign, number(t.bound), t.value, reference, said)
}

func (r *result) atMost(bound float64, value ratio, format string, args ...any) *target {
	t := &target{what: fmt.Sprintf(format, args...), value: value, bound: bound}
	r.targets = append(r.targets, t)
	return t
}

func (r *result) atLeast(bound float64, value ratio, format string, args ...any) *target {
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

package main

import (
	"context"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
)

func TestMain(m *testing.M) {
	be()
	os.Exit(m.Run())
}

// once measures each row with as few trials as possible, for the test and the benchmark together. The
// figures of so few mean nothing; that there are some shows that the row still works.
var once = func() map[string]func() (*result, error) {
	all := make(map[string]func() (*result, error))
	for _, row := range rows {
		all[row.name] = sync.OnceValues(func() (*result, error) {
			return measure(context.Background(), row, single, func(string, ...any) {})
		})
	}
	return all
}()

// TestReport shows that a report finds the places of all it has to write, which a run of twenty minutes
// must not find out at its end, and that it leaves alone what is written by hand.
func TestReport(t *testing.T) {
	rep := report{dir: t.TempDir()}
	for _, row := range rows {
		if err := rep.add(row, &result{}, 0); err != nil {
			t.Error(err)
		}
	}
	if err := rep.summarize(); err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(filepath.Join(rep.dir, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	generated := regexp.MustCompile(`(?s)(<!-- [a-z]+( \d+)? -->\n).*?(<!-- /)`)
	byHand := func(text string) string { return generated.ReplaceAllString(text, "$1$3") }
	if byHand(string(text)) != byHand(readme) {
		t.Errorf("the report has changed what is not between its markers:\n%s", text)
	}
}

func TestRows(t *testing.T) {
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel() // most of them wait most of the time
			check(t, row)
		})
	}
}

// BenchmarkRows reports how far each row is from its targets. Run the command for figures to rely on.
func BenchmarkRows(b *testing.B) {
	for _, row := range rows {
		b.Run(row.name, func(b *testing.B) {
			for _, t := range check(b, row).targets {
				b.ReportMetric(t.value, strings.Join(strings.Fields(t.what), "_"))
			}
			b.ReportMetric(0, "ns/op") // of what was measured before: says nothing
		})
	}
}

func check(tb testing.TB, row row) *result {
	tb.Helper()
	res, err := once[row.name]()
	if err != nil {
		tb.Fatal(err)
	}
	for _, table := range res.tables {
		if len(table.lines) == 0 {
			tb.Errorf("nothing under %q", table.caption)
		}
		for _, line := range table.lines {
			if len(line) != len(table.header) {
				tb.Errorf("%d cells under %d headers: %q", len(line), len(table.header), line)
			}
		}
	}
	for _, target := range res.targets {
		for _, value := range []float64{target.value, target.referenceValue} {
			if math.IsNaN(value) || math.IsInf(value, 0) || value < 0 {
				tb.Errorf("%s is %v", target.what, value)
			}
		}
	}
	dir := tb.TempDir()
	for _, f := range res.figures {
		file, err := save(f, dir)
		if err != nil {
			tb.Error(err)
		} else if !strings.HasSuffix(file, ".svg") {
			tb.Errorf("a plot is called %q", file)
		}
	}
	return res
}

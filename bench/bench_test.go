package main

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
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

// TestMeterCountsEachRenewalOnAStream shows that the meter counts what etcd says it has received, though all
// renewals of a client come over one stream.
func TestMeterCountsEachRenewalOnAStream(t *testing.T) {
	for _, c := range []contestant{ours, stock} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			r := &run{size: single}
			defer r.stop()
			endpoints, err := r.cluster(1)
			if err != nil {
				t.Fatal(err)
			}
			m := newMeter()
			client, err := r.client(ctx, endpoints, m.options()...)
			if err != nil {
				t.Fatal(err)
			}
			cand, err := c.lead(ctx, client, "election", 2*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			defer cand.close()
			var counted, renewals, streams int
			for counted < 4 || renewals != counted { // they differ while one is on its way
				if streams, renewals, err = received(ctx, endpoints[0]); err != nil {
					t.Fatalf("counted %d renewals, and etcd did not say that it has received as many: %v", counted, err)
				}
				counted = m.of(keepAlive)
				sleep(ctx, 50*time.Millisecond)
			}
			if streams >= renewals {
				t.Errorf("%d renewals came over %d streams", renewals, streams)
			}
		})
	}
}

// received is how many streams of renewals etcd has seen, and how many renewals.
func received(ctx context.Context, endpoint string) (streams, renewals int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+endpoint+"/metrics", nil)
	if err != nil {
		return 0, 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, 0, err
	}
	value := func(metric string) int {
		line := regexp.MustCompile(`(?m)^` + metric + `{.*grpc_method="LeaseKeepAlive".*} (\d+)$`).FindSubmatch(text)
		if line == nil {
			err = errors.Join(err, fmt.Errorf("etcd has no %s", metric))
			return 0
		}
		n, aerr := strconv.Atoi(string(line[1]))
		err = errors.Join(err, aerr)
		return n
	}
	return value("grpc_server_started_total"), value("grpc_server_msg_received_total"), err
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
				b.ReportMetric(t.value.value, strings.Join(strings.Fields(t.what), "_"))
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
		for _, value := range []float64{target.value.low, target.value.high, target.referenceValue.value} {
			if math.IsNaN(value) || math.IsInf(value, 0) || value < 0 {
				tb.Errorf("%s is %v", target.what, value)
			}
		}
	}
	dir := tb.TempDir()
	for _, f := range res.figures {
		file, title, err := save(f, dir)
		if err != nil {
			tb.Fatal(err)
		}
		svg, err := os.ReadFile(filepath.Join(dir, file))
		if err == nil {
			err = xml.Unmarshal(svg, new(struct{}))
		}
		if err != nil || title == "" || strings.Contains(string(svg), "%!") || strings.Contains(string(svg), "NaN") || !strings.Contains(string(svg), "<polyline") {
			tb.Errorf("the plot %q in %s: %v\n%s", title, file, err, svg)
		}
	}
	return res
}

func TestAVerdictSaysWhetherTheIntervalReachesTheBound(t *testing.T) {
	slow, quick := sample{100, 101, 102, 103, 104, 105, 106}, sample{50, 51, 52, 53, 54, 55, 56}
	wide := sample{10, 20, 52, 90, 300}
	for what, c := range map[string]struct {
		value ratio
		bound float64
		want  verdict
	}{
		"well below":        {quick.ratio(slow), 0.7, reached},
		"well above":        {slow.ratio(quick), 1.1, missed},
		"on both sides":     {wide.ratio(quick), 1.1, untold},
		"exact, at":         {exact(1.1), 1.1, reached},
		"exact, just above": {exact(1.1001), 1.1, missed},
	} {
		if got := (&target{bound: c.bound, value: c.value}).judge(c.value); got != c.want {
			t.Errorf("%s: %v at most %v is %s, want %s", what, c.value, c.bound, got, c.want)
		}
		inverse := ratio{1 / c.value.value, 1 / c.value.high, 1 / c.value.low}
		if got := (&target{bound: 1 / c.bound, atLeast: true}).judge(inverse); got != c.want {
			t.Errorf("%s: %v at least %v is %s, want %s", what, inverse, 1/c.bound, got, c.want)
		}
	}
	if r := slow.ratio(quick); r.low > r.value || r.high < r.value || r != slow.ratio(quick) {
		t.Errorf("the interval is %v", r)
	}
}

func TestThePictureHasABarForEachMedian(t *testing.T) {
	rep := report{dir: t.TempDir(), bars: []bar{
		{crashed, "leader, with a lease file", ours, 15 * time.Millisecond},
		{crashed, stock.name, stock, 12863 * time.Millisecond},
		{resignation, ours.name, ours, 5600 * time.Microsecond},
		{cutFromEtcd, ours.name, ours, 450 * time.Millisecond},
		{cutFromEtcd, stock.name, stock, -380 * time.Millisecond},
	}}
	if err := rep.picture(); err != nil {
		t.Fatal(err)
	}
	svg, err := os.ReadFile(filepath.Join(rep.dir, "gap.svg"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{">15 ms<", ">13 s<", ">5.6 ms<", ">450 ms<", ">two leaders at once, for 380 ms<"} {
		if !strings.Contains(string(svg), want) {
			t.Errorf("it does not have %q", want)
		}
	}
	if err := xml.Unmarshal(svg, new(struct{})); err != nil {
		t.Error(err)
	}
}

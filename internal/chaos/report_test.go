//go:build linux

package main

import (
	"cmp"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/leader/internal/oracle"
)

// A story makes up a history as a run might have recorded it, in which no two lead at a time but
// where an operator took the key.
type story struct {
	rand    *rand.Rand
	history []oracle.Entry
	token   int64
}

const (
	storyBegin = 1_000 * int64(time.Second)
	storyTTL   = 3 * time.Second
)

var storyFaults = []string{
	"kill-candidate", "stop-candidate-short", "stop-candidate-long", "link-dark", "link-dark-sending",
	"link-dark-receiving", "link-reset", "link-slow", "link-flapping", "endpoint-dark", "kill-member",
	"stop-member", "stop-raft-leader", "depose-raft-leader", "partition-member", "quorum-lost-short",
	"quorum-lost-long", "move-raft-leader", "compact-defragment", "no-space", "auth",
}

// tell returns a made-up history of that length.
func tell(t testing.TB, seed uint64, length time.Duration) []oracle.Entry {
	t.Helper()
	s := &story{rand: rand.New(rand.NewPCG(seed, 0))}
	end := storyBegin + int64(length)
	params, err := json.Marshal(Parameters{
		Seed: seed, Duration: length, Members: 3, Candidates: 5, TTL: storyTTL, Margin: storyTTL / 5, Etcd: "3.7.3",
		Faults: storyFaults, Elections: []string{"e0", "e1", "e2", "mixed"},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.add(oracle.Entry{T: storyBegin, Proc: "chaos", Kind: oracle.Run, Value: string(params)})
	candidates := []string{"c0", "c1", "c2", "c3", "c4"}
	for _, proc := range slices.Concat(candidates, []string{"m0", "m1", "m2", "stock", "etcdctl"}) {
		sort := map[byte]string{'c': "candidate", 'm': "member"}[proc[0]]
		s.add(oracle.Entry{T: storyBegin + 1, Proc: proc, Kind: oracle.Start, Op: cmp.Or(sort, proc)})
	}
	absent := s.strike(end, candidates)
	for _, election := range []string{"e0", "e1", "e2"} {
		s.elections(root+election, candidates, absent, end)
	}
	s.elections(root+mixed, append(candidates, "stock", "etcdctl"), absent, end)
	slices.SortStableFunc(s.history, func(a, b oracle.Entry) int { return cmp.Compare(a.T, b.T) })
	return s.history
}

func (s *story) add(e oracle.Entry) { s.history = append(s.history, e) }

// between is a random time.
func (s *story) between(from, to time.Duration) int64 {
	return int64(from) + s.rand.Int64N(int64(to-from))
}

// strike adds the faults, and returns when a candidate is paused or dead.
func (s *story) strike(end int64, candidates []string) map[string][]oracle.Entry {
	absent := make(map[string][]oracle.Entry)
	for at := storyBegin + int64(5*time.Second); at < end-int64(10*time.Second); at += s.between(time.Second, 6*time.Second) {
		f := oracle.Entry{
			From: at, T: at + s.between(500*time.Millisecond, 2*storyTTL), Proc: "chaos", Kind: oracle.Fault,
			Op: storyFaults[s.rand.IntN(len(storyFaults))], Value: fmt.Sprintf("m%d", s.rand.IntN(3)),
		}
		if s.rand.IntN(20) == 0 {
			f.Err = "it does not want to"
		} else if strings.Contains(f.Op, "candidate") {
			f.Value = candidates[s.rand.IntN(len(candidates))]
			absent[f.Value] = append(absent[f.Value], f)
			if f.Op == "kill-candidate" {
				s.add(oracle.Entry{T: f.From, Proc: f.Value, Kind: oracle.Exit, Result: oracle.OK, Err: "signal: killed"})
				s.add(oracle.Entry{T: f.T, Proc: f.Value, Kind: oracle.Start, Op: "candidate"})
			}
		}
		s.add(f)
	}
	return absent
}

// elections adds term after term in one election.
func (s *story) elections(election string, procs []string, absent map[string][]oracle.Entry, end int64) {
	at := storyBegin + int64(time.Second)
	for at < end-int64(2*time.Second) {
		proc := procs[s.rand.IntN(len(procs))]
		if slices.ContainsFunc(absent[proc], func(f oracle.Entry) bool { return f.From <= at && at < f.T }) {
			at += int64(20 * time.Millisecond)
			continue
		}
		s.token += s.between(3, 400)
		e := oracle.Entry{Proc: proc, Election: election, Token: s.token, Op: "leader"}
		if proc == "stock" || proc == "etcdctl" {
			e.Op = proc
		}
		at = s.term(e, at, absent[proc])
	}
}

// term adds a term and returns when the next may begin.
func (s *story) term(e oracle.Entry, at int64, absent []oracle.Entry) int64 {
	e.Kind, e.T = oracle.Term, at
	e.Key, e.Lease = fmt.Sprintf("%s/%x", e.Election, e.Token), e.Token
	s.add(e)
	s.add(created(e.Election, e.Token, at))
	if e.Kind = oracle.Belief; !isPeer(e.Op) {
		e.Op = "IsLeader"
	}
	end := at + s.between(300*time.Millisecond, 3*time.Second)
	next := end + s.between(2*time.Millisecond, 15*time.Millisecond)
	for at < end {
		e.From, e.T = at, min(at+int64(100*time.Millisecond), end)
		at = e.T
		i := slices.IndexFunc(absent, func(f oracle.Entry) bool { return f.From < e.T && e.From < f.T })
		if i < 0 {
			s.add(e)
			continue
		}
		e.T = max(e.From+1, absent[i].From)
		s.add(e)
		if absent[i].Op != "stop-candidate-short" {
			return e.T + int64(storyTTL) + s.between(0, 500*time.Millisecond)
		}
		at = absent[i].T
		end += at - e.T
		next = end + s.between(2*time.Millisecond, 15*time.Millisecond)
	}
	switch s.rand.IntN(12) {
	case 0:
		s.add(taken(e.Election, e.Token, end-int64(3*time.Millisecond)))
		s.add(deleted(e.Election, e.Token, end-int64(3*time.Millisecond)))
		next = end - int64(time.Millisecond)
		s.add(oracle.Entry{T: end + 1, Kind: oracle.Ended, Proc: e.Proc, Election: e.Election, Token: e.Token, Err: "leader: evicted"})
	case 1:
		if !isPeer(e.Op) {
			next = end + s.between(500*time.Millisecond, 2*time.Second)
		}
		s.add(oracle.Entry{T: end + 1, Kind: oracle.Ended, Proc: e.Proc, Election: e.Election, Token: e.Token, Err: "leader: lease expired"})
	}
	if isPeer(e.Op) && s.rand.IntN(3) == 0 {
		next = end - s.between(time.Millisecond, 300*time.Millisecond)
	}
	return next
}

// created and deleted are what becomes of a candidate's key.
func created(election string, token, t int64) oracle.Entry {
	key := fmt.Sprintf("%s/%x", election, token)
	return oracle.Entry{T: t, Proc: "audit", Kind: oracle.Event, Op: "put", Rev: token, Token: token, Key: key, Lease: token}
}

func deleted(election string, token, t int64) oracle.Entry {
	e := created(election, token, t)
	e.Op, e.Rev, e.Lease = "delete", token+1, 0
	return e
}

// taken is an operator's request to delete a key.
func taken(election string, token, t int64) oracle.Entry {
	return oracle.Entry{T: t, From: t - 1, Proc: "chaos", Kind: oracle.Taken, Op: "delete", Election: election, Token: token, Result: oracle.OK, Rev: token + 1}
}

// taking is an overlap of the terms 1 and 3, when an operator has asked for the key of one of them to
// be deleted, with that result.
func taking(token int64, result string) []oracle.Entry {
	const election = root + "e0"
	request := taken(election, token, moment(2))
	request.Result = result
	return []oracle.Entry{
		created(election, 1, moment(1)), request, deleted(election, 1, moment(2)), created(election, 3, moment(2)),
		told("c0", 1, 1, 2.1), told("c1", 3, 2, 3),
	}
}

// moment is a time of a story.
func moment(seconds float64) int64 { return storyBegin + int64(seconds*float64(time.Second)) }

// told is a piece of belief in a term.
func told(proc string, token int64, from, to float64) oracle.Entry {
	return oracle.Entry{T: moment(to), From: moment(from), Proc: proc, Kind: oracle.Belief, Election: root + "e0", Token: token, Op: "IsLeader"}
}

func TestMeasureCounts(t *testing.T) {
	m := measure([]oracle.Entry{
		{Kind: oracle.Start, Proc: "c0", Op: "candidate"},
		{Kind: oracle.Start, Proc: "m0", Op: "member"},
		{Kind: oracle.Start, Proc: "etcdctl", Op: "etcdctl", Err: "not found"},
		{Kind: oracle.Exit, Proc: "c0", Result: oracle.OK, Err: "signal: killed"},
		{Kind: oracle.Exit, Proc: "m0", Result: oracle.OK},
		{Kind: oracle.Term, Op: "leader"}, {Kind: oracle.Term, Op: "leader"}, {Kind: oracle.Term, Op: "stock"},
		{Kind: oracle.CampaignFailed, Op: oracle.Held}, {Kind: oracle.CampaignFailed, Op: oracle.Held},
		{Kind: oracle.Renewed}, {Kind: oracle.Renewed}, {Kind: oracle.Refused}, {Kind: oracle.Observed},
		{Kind: oracle.Write, Result: oracle.OK}, {Kind: oracle.Write, Result: oracle.Unknown}, {Kind: oracle.Append, Result: oracle.Failed},
	})
	want := Measures{
		Terms: map[string]int{"leader": 2, "stock": 1}, Failed: map[string]int{"held": 2}, Renewed: 2, Refused: 1, Observed: 1,
		Writes: map[string]int{oracle.OK: 1, oracle.Unknown: 1}, Appends: map[string]int{oracle.Failed: 1},
		Started: map[string]int{"candidate": 1, "member": 1}, Killed: map[string]int{"candidate": 1},
	}
	if !reflect.DeepEqual(m, want) {
		t.Errorf("measured %+v, want %+v", m, want)
	}
}

// Only a time without any leader counts, and only if it touches what the fault may have done.
func TestMeasureLeaderlessTime(t *testing.T) {
	fault := func(op string, from, to float64) oracle.Entry {
		return oracle.Entry{T: moment(to), From: moment(from), Kind: oracle.Fault, Op: op}
	}
	history := []oracle.Entry{
		{T: moment(0), Kind: oracle.Run, Value: `{"ttl":2000000000}`},
		told("c0", 1, 1, 10),
		told("c1", 2, 12, 20), // 2 s after c0
		told("c0", 3, 15, 30), // overlaps
		{T: moment(33), From: moment(33.5), Proc: "c1", Kind: oracle.Belief, Election: root + "e0", Token: 4, Op: "Context"}, // one answer
		{T: moment(60), From: moment(37), Proc: "stock", Kind: oracle.Belief, Election: root + "e0", Token: 5, Op: "stock"},  // 4 s after it
		fault("none", 13, 20),   // until 25: nobody was missed
		fault("some", 11, 11.5), // 2 s
		fault("some", 24, 24),   // until 29
		fault("some", 24, 25),   // until 30: 3 s
		fault("more", 9, 30),    // 4 s
		fault("before", 2, 3),   // until 8
		fault("after", 61, 62),  // nobody leads any more, but the campaign is over
		{Kind: oracle.Fault, Op: "refused", From: moment(2), T: moment(40), Err: "no"},
	}
	got := measure(history).Faults
	want := []FaultMeasure{
		{Op: "after", Injected: 1},
		{Op: "before", Injected: 1},
		{Op: "more", Injected: 1, Median: 4 * time.Second, Worst: 4 * time.Second},
		{Op: "none", Injected: 1},
		{Op: "refused", Refused: 1},
		{Op: "some", Injected: 3, Median: 2 * time.Second, Worst: 3 * time.Second},
	}
	if !slices.Equal(got, want) {
		t.Errorf("measured %+v, want %+v", got, want)
	}
}

// An election that nobody wins any more is without leader while the others go on.
func TestMeasureElectionThatStaysVacant(t *testing.T) {
	other := told("c1", 2, 0, 60)
	other.Election = root + "e1"
	m := measure([]oracle.Entry{told("c0", 1, 0, 10), other, {Kind: oracle.Fault, Op: "f", From: moment(9), T: moment(9)}})
	if got := m.Faults[0].Worst; got != 50*time.Second {
		t.Errorf("worst time without leader: %v, want 50s", got)
	}
}

func BenchmarkMillionBeliefs(b *testing.B) {
	var history []oracle.Entry
	for i := range 1_000_000 {
		e := told(fmt.Sprint("c", i/20%5), int64(i/20), float64(i/4)/10, float64(i/4)/10+0.099)
		e.Election = fmt.Sprint("e", i%4)
		history = append(history, e)
		if i%1000 == 0 {
			history = append(history, oracle.Entry{Kind: oracle.Fault, Op: storyFaults[i/1000%20], From: e.From, T: e.T})
		}
	}
	b.Run("measure", func(b *testing.B) {
		for b.Loop() {
			measure(history)
		}
	})
	b.Run("timeline", func(b *testing.B) {
		for b.Loop() {
			if err := writeTimeline(io.Discard, history, oracle.Verdict{}, 0, 0); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func TestReportNamesEachFaultOnce(t *testing.T) {
	history := tell(t, 1, 10*time.Minute)
	text := report(t, history, oracle.Verdict{})
	for _, f := range measure(history).Faults {
		if n := strings.Count(text, "| "+f.Op+" |"); n != 1 {
			t.Errorf("%s has %d rows in\n%s", f.Op, n, text)
		}
	}
	for _, want := range []string{"**Passed", "    go run . -seed 1\n", "| seed | 1 |", "| TTL | 3s |"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
}

func TestReportTellsWhatIsWrong(t *testing.T) {
	history := []oracle.Entry{{T: moment(0), Kind: oracle.Run, Value: "{}"}}
	v := oracle.Verdict{
		Checked:    oracle.Counts{Terms: 4711},
		Late:       make([]oracle.Entry, 7),
		Violations: []oracle.Violation{{Rule: oracle.RuleToken, What: "a|b won twice", Entries: []oracle.Entry{{Kind: oracle.Term, Token: 815}}}},
	}
	for _, certain := range []time.Duration{3, 1, 40} {
		v.Overlaps = append(v.Overlaps, oracle.Overlap{
			Election: root + "e0", Tokens: [2]int64{1, 2}, Procs: [2]string{"c0", "c1"}, Why: "an operator did it",
			From: moment(12.5), Certain: certain * time.Millisecond,
		})
	}
	text := report(t, history, v)
	for _, want := range []string{
		"**Failed: 1 violation.**", "**token**", `a\|b won twice`, `"token":815`, "| terms | 4711 |", "| 3 | 3.0 ms | 40 ms |", "| 7 |",
		"| e0: c0 (1) and c1 (2) | 40 ms | 12.500s | an operator did it |",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
	v.Violations = slices.Repeat(v.Violations, longestList+5)
	text = report(t, history, v)
	if !strings.Contains(text, "**Failed: 25 violations.**") || !strings.Contains(text, "And 5 more.") {
		t.Errorf("25 violations are not told of in\n%s", text)
	}
}

// Each row of a table has as many cells as its head.
func TestReportTablesAreWhole(t *testing.T) {
	history := append(tell(t, 1, time.Minute), oracle.Entry{Kind: oracle.Fault, Op: "a|b\nc", T: moment(30), From: moment(29)})
	columns := 0
	for line := range strings.Lines(report(t, history, oracle.Verdict{})) {
		cells := strings.Count(strings.ReplaceAll(line, `\|`, ""), "|")
		if columns != 0 && cells != 0 && cells != columns {
			t.Errorf("%d instead of %d bars in %q", cells, columns, line)
		}
		columns = cells
	}
}

func TestNothingToReport(t *testing.T) {
	histories := map[string][]oracle.Entry{
		"empty":          nil,
		"run only":       {{T: moment(0), Kind: oracle.Run, Value: "{}"}},
		"broken run":     {{T: moment(0), Kind: oracle.Run, Value: "?"}},
		"without faults": {told("c0", 1, 1, 2)},
		"without terms":  {{Kind: oracle.Fault, Op: "f", T: moment(2), From: moment(1)}},
		"one moment":     {told("c0", 1, 1, 1)},
	}
	for name, history := range histories {
		report(t, history, oracle.Verdict{})
		shapes(t, timeline(t, history, 0, 0))
		if t.Failed() {
			t.Fatalf("with a history that is %s", name)
		}
	}
}

func report(t *testing.T, history []oracle.Entry, v oracle.Verdict) string {
	t.Helper()
	var b strings.Builder
	if err := writeReport(&b, history, v, "go run . -seed 1"); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func timeline(t *testing.T, history []oracle.Entry, from, to int64) string {
	t.Helper()
	var b strings.Builder
	if err := writeTimeline(&b, history, oracle.Check(history, parameters(history).options()), from, to); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// shapes returns how many elements of each class an SVG has, and fails if it is not well-formed.
func shapes(t *testing.T, svg string) map[string]int {
	t.Helper()
	found := make(map[string]int)
	for d := xml.NewDecoder(strings.NewReader(svg)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
		if e, ok := token.(xml.StartElement); ok {
			for _, a := range e.Attr {
				if a.Name.Local == "class" {
					found[a.Value]++
				}
				if strings.Contains(a.Value, "NaN") || strings.Contains(a.Value, "Inf") || strings.HasPrefix(a.Value, "-") {
					t.Errorf("%s of <%s> is %s", a.Name.Local, e.Name.Local, a.Value)
				}
			}
		}
	}
}

func TestTimelineHasEachTerm(t *testing.T) {
	history := tell(t, 2, 5*time.Minute)
	window := span{moment(100), moment(130)}
	terms := make(map[termID]bool)
	for _, e := range history {
		if e.Kind == oracle.Belief && window.touches(believed(e)) {
			terms[termID{e.Election, e.Token}] = true
		}
	}
	svg := timeline(t, history, window.from, window.to)
	if n := shapes(t, svg)["term"]; n != len(terms) {
		t.Errorf("%d terms are drawn, of %d", n, len(terms))
	}
	for e := range terms {
		if title := fmt.Sprintf("leads %s, token %d&#xA;", e.election, e.token); strings.Count(svg, title) != 1 {
			t.Errorf("%q is not in the picture", title)
		}
	}
}

// Red is what must not be: a run that ends well has none of it.
func TestTimelineShowsOverlaps(t *testing.T) {
	peer := told("stock", 9, 1, 5)
	peer.Op = "stock"
	once := func(asked, answered float64) oracle.Entry { return told("c1", 2, answered, asked) }
	elsewhere := told("c1", 2, 2, 3)
	elsewhere.Election = root + "e1"
	for name, test := range map[string]struct {
		history          []oracle.Entry
		overlap, excused int
	}{
		"one after the other":              {[]oracle.Entry{told("c0", 1, 1, 2), told("c1", 2, 2, 3)}, 0, 0},
		"two elections":                    {[]oracle.Entry{told("c0", 1, 1, 4), elsewhere}, 0, 0},
		"pieces of one term":               {[]oracle.Entry{told("c0", 1, 1, 3), told("c0", 1, 2, 4)}, 0, 0},
		"two at a time":                    {[]oracle.Entry{told("c0", 1, 1, 3), told("c1", 2, 2.999, 4)}, 1, 0},
		"one within the other":             {[]oracle.Entry{told("c1", 2, 2, 3), told("c0", 1, 1, 4)}, 1, 0},
		"two terms of one process":         {[]oracle.Entry{told("c0", 1, 1, 3), told("c0", 2, 2, 4)}, 1, 0},
		"the key was taken":                {taking(1, oracle.OK), 0, 1},
		"the key was not taken":            {taking(1, oracle.Failed), 1, 0},
		"the later one was taken":          {taking(3, oracle.OK), 1, 0},
		"a peer":                           {[]oracle.Entry{peer, told("c0", 1, 3, 8)}, 0, 1},
		"an answer within":                 {[]oracle.Entry{told("c0", 1, 1, 4), once(2, 3)}, 1, 0},
		"an answer that may be from later": {[]oracle.Entry{told("c0", 1, 1, 4), once(3, 5)}, 0, 0},
		"an answer from before":            {[]oracle.Entry{once(0, 2), told("c0", 1, 1, 4)}, 0, 0},
	} {
		found := shapes(t, timeline(t, test.history, moment(0), moment(10)))
		if got := found["overlap"] - 1; got != test.overlap { // one is in the legend
			t.Errorf("%s: %d overlaps are red, want %d", name, got, test.overlap)
		}
		if got := found["excused"] - 1; got != test.excused {
			t.Errorf("%s: %d overlaps are excused, want %d", name, got, test.excused)
		}
	}
}

func TestTimelineShowsFaultsAndTakings(t *testing.T) {
	history := tell(t, 3, 5*time.Minute)
	window := span{moment(60), moment(200)}
	var faults, taken int
	for _, e := range history {
		switch {
		case e.Kind == oracle.Fault && e.Err == "" && window.touches(span{e.From, e.T}):
			faults++
		case e.Kind == oracle.Taken && window.touches(span{e.T, e.T}):
			taken++
		}
	}
	found := shapes(t, timeline(t, history, window.from, window.to))
	if found["fault"]-1 != faults || found["struck"] != faults || found["taken"]-1 != taken { // beside the legend
		t.Errorf("%d faults, %d spans and %d crosses, want %d and %d", found["fault"]-1, found["struck"], found["taken"]-1, faults, taken)
	}
}

func TestTimelineEscapes(t *testing.T) {
	e := told(`<c&"0'>`, 1, 1, 3)
	e.Election = root + "a<b>&\x00"
	svg := timeline(t, []oracle.Entry{
		e,
		{T: moment(3), Kind: oracle.Ended, Proc: e.Proc, Election: e.Election, Token: 1, Err: "</title><script>"},
		{T: moment(3), From: moment(2), Kind: oracle.Fault, Op: "<x>", Value: "a & b"},
	}, 0, 0)
	shapes(t, svg)
	for _, raw := range []string{"<script>", "<x>", "<c&"} {
		if strings.Contains(svg, raw) {
			t.Errorf("%s is in the picture", raw)
		}
	}
}

// The window that is chosen has more sorts of faults in it than the begin of the run.
func TestTimelineChoosesWhereMuchHappens(t *testing.T) {
	history := []oracle.Entry{{T: moment(0), Kind: oracle.Run, Value: "{}"}, {T: moment(1000), Kind: oracle.Calm}}
	for i := range 40 {
		history = append(history, oracle.Entry{Kind: oracle.Fault, Op: "dull", From: moment(float64(i)), T: moment(float64(i) + 1)})
	}
	for i, op := range storyFaults[:5] {
		from := 700 + float64(i)
		history = append(history, oracle.Entry{Kind: oracle.Fault, Op: op, From: moment(from), T: moment(from + 1)})
	}
	slices.SortStableFunc(history, func(a, b oracle.Entry) int { return cmp.Compare(a.T, b.T) })
	svg := timeline(t, history, 0, 0)
	for _, op := range storyFaults[:5] {
		if !strings.Contains(svg, "<title>"+op) {
			t.Errorf("%s is not in the picture", op)
		}
	}
}

//go:build linux

package main

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.com/leader/internal/oracle"
)

// Sizes of the picture, in pixels.
const (
	pictureWidth = 1600.0
	plotLeft     = 126.0
	plotRight    = pictureWidth - 24
	rowHeight    = 14.0
	rowPitch     = 18.0
	digitWidth   = 6.0
	letterWidth  = 6.3
	maxLanes     = 12 // of faults; if more act at a time, labels are cut
)

// defaultWindow is short enough to distinguish single terms.
const defaultWindow = 90 * time.Second

// hues are the colours of the candidates. Red, amber and grey have meanings of their own.
var hues = []string{"#3566b8", "#2f9468", "#8a5cc2", "#1796ab", "#b44a8b", "#7c5a34", "#6b7f1e", "#2b3f78"}

// peerHues are those of processes that lead without this library.
var peerHues = []string{"#636a77", "#9ba1ad"}

const pictureStyle = `
text { font: 11px system-ui, "DejaVu Sans", sans-serif; fill: #2b303b }
.title { font-size: 17px; font-weight: 600 }
.election { font-size: 13px; font-weight: 600 }
.dim { fill: #687080 }
.end { text-anchor: end }
.mid { text-anchor: middle }
.token { font-size: 10px; fill: #fff; text-anchor: middle; pointer-events: none }
.label { pointer-events: none }
.band { fill: #eeeef1; rx: 6px }
.vacant { fill: #fff }
.life { stroke: #c3c9d5 }
.grid { stroke: #d9dde5 }
.fault { fill: #f3bb45; rx: 2px }
.struck { fill: #f0a400; fill-opacity: .1; pointer-events: none }
.begin { fill-opacity: .45; pointer-events: none }
.overlap { fill: #e01e2b }
.excused { fill: #23262d }
.taken { stroke: #111318; stroke-width: 2; stroke-linecap: round }
`

// A picture is a timeline being drawn.
type picture struct {
	back   bytes.Buffer // what is drawn behind everything
	svg    bytes.Buffer
	y      float64 // of the next element
	origin int64   // time zero of the axis
	window span

	faults []oracle.Entry // that were injected, in the window
	taken  []oracle.Entry
	// What is excused is not red: red is only what the checker objects to.
	excused map[excuse]bool
	late    map[oracle.Entry]bool // belief in a context whose timer was late
	terms   []*heldTerm           // of the whole run, by election, proc and token
	lives   map[string][]span     // of processes
	colour  map[string]paint      // of the processes that led
	procs   map[string][]string   // processes that ever led, by election
}

// A termID identifies a term.
type termID struct {
	election string
	token    int64
}

// A heldTerm is a term as its holder recorded it.
type heldTerm struct {
	termID
	proc, op string
	whole    span           // from the victory to the last belief
	beliefs  []oracle.Entry // as far as the window shows them
	end      string         // the cause of its end, if the holder was told
}

// An excuse identifies an excused overlap of two terms, the earlier first.
type excuse struct {
	election string
	tokens   [2]int64
}

// A paint is how a process is drawn: solid while it believes that it leads, still while it gives no answer.
type paint struct{ solid, still string }

// isPeer reports whether a [Term] or [Belief] with this Op is not of this library.
func isPeer(op string) bool { return op == "stock" || op == "etcdctl" }

// writeTimeline draws as an SVG who led when, and which faults acted, from..to (times of the history). If both are 0 it
// draws the minute and a half with the most kinds of faults.
func writeTimeline(w io.Writer, history []oracle.Entry, v oracle.Verdict, from, to int64) error {
	p := newPicture(history, v, from, to)
	p.head(parameters(history))
	top := p.y
	spans := p.faultLanes()
	p.axis()
	for _, election := range slices.Sorted(maps.Keys(p.procs)) {
		p.election(election)
	}
	for _, s := range spans {
		rect(&p.back, "struck", s.from, top, s.width(), p.y-top, "")
	}
	p.axis()

	var head bytes.Buffer
	fmt.Fprintf(&head, `<svg xmlns="http://www.w3.org/2000/svg" width="%v" height="%v" viewBox="0 0 %[1]v %[2]v">`+"\n", pictureWidth, p.y+8)
	fmt.Fprintf(&head, "<style>%s</style>\n<defs>\n", pictureStyle)
	for i, hue := range slices.Concat(hues, peerHues) {
		fmt.Fprintf(&head, `<pattern id="still%d" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">`+
			`<rect width="5" height="5" fill="#fff"/><rect width="1.8" height="5" fill="%s"/></pattern>`+"\n", i, hue)
	}
	head.WriteString("</defs>\n" + `<rect width="100%" height="100%" rx="8" fill="#fafbfc"/>` + "\n")
	p.svg.WriteString("</svg>\n")
	_, err := io.Copy(w, io.MultiReader(&head, &p.back, &p.svg))
	return err
}

func newPicture(history []oracle.Entry, v oracle.Verdict, from, to int64) *picture {
	p := &picture{
		excused: make(map[excuse]bool),
		late:    make(map[oracle.Entry]bool),
		lives:   make(map[string][]span),
		colour:  make(map[string]paint),
		procs:   make(map[string][]string),
	}
	for _, o := range v.Overlaps {
		p.excused[excuse{o.Election, o.Tokens}] = true
	}
	for _, e := range v.Late {
		p.late[e] = true
	}
	p.origin = began(history)
	run := span{p.origin, p.origin} // without the time before the run and after the last leader
	for _, e := range history {
		switch e.Kind {
		case oracle.Fault:
			run.to = max(run.to, e.T)
			if e.Err == "" {
				p.faults = append(p.faults, e)
			}
		case oracle.Belief:
			run.to = max(run.to, e.T)
		case oracle.Taken:
			p.taken = append(p.taken, e)
		}
	}
	p.window = span{from, max(to, from+1)}
	if from == 0 && to == 0 {
		p.window = mostVaried(p.faults, run)
	}
	outside := func(e oracle.Entry) bool { return !p.window.touches(span{min(e.From, e.T), e.T}) }
	p.faults = slices.DeleteFunc(p.faults, outside)
	slices.SortStableFunc(p.faults, func(a, b oracle.Entry) int { return cmp.Compare(a.From, b.From) })
	p.readTerms(history)
	p.readLives(history)
	return p
}

// mostVaried chooses the part of the run in which the most kinds of faults were injected.
func mostVaried(faults []oracle.Entry, run span) span {
	best := span{run.from, max(min(run.to, run.from+int64(defaultWindow)), run.from+1)}
	var most int
	for _, first := range faults {
		// Also show who led before the first fault, and what became of the last one.
		start := max(run.from, min(first.From-int64(2*time.Second), run.to-int64(defaultWindow)))
		window := span{start, min(run.to, start+int64(defaultWindow))}
		sorts := make(map[string]bool)
		for _, f := range faults {
			if window.from <= f.From && f.T <= window.to {
				sorts[f.Op] = true
			}
		}
		if len(sorts) > most {
			best, most = window, len(sorts)
		}
	}
	return best
}

// readTerms collects who led, and chooses the colours.
func (p *picture) readTerms(history []oracle.Entry) {
	type id struct {
		termID
		proc string // two processes may claim the same term: then show both
	}
	terms := make(map[id]*heldTerm)
	for _, e := range history {
		if e.Kind != oracle.Term && e.Kind != oracle.Belief && e.Kind != oracle.Ended {
			continue
		}
		key := id{termID{e.Election, e.Token}, e.Proc}
		t := terms[key]
		if e.Kind == oracle.Ended {
			if t != nil {
				t.end = cmp.Or(e.Err, e.Op)
			}
			continue
		}
		seen := span{e.T, e.T}
		if e.Kind == oracle.Belief {
			seen = believed(e)
		}
		if t == nil {
			t = &heldTerm{termID: key.termID, proc: e.Proc, op: e.Op, whole: seen}
			terms[key] = t
		}
		t.whole = span{min(t.whole.from, seen.from), max(t.whole.to, seen.to)}
		if e.Kind == oracle.Belief && p.window.touches(seen) {
			t.beliefs = append(t.beliefs, e)
		}
	}
	p.terms = slices.SortedFunc(maps.Values(terms), func(a, b *heldTerm) int {
		return cmp.Or(cmp.Compare(a.election, b.election), cmp.Compare(a.proc, b.proc), cmp.Compare(a.token, b.token))
	})
	peers := make(map[string]bool)
	for _, t := range p.terms {
		peers[t.proc] = isPeer(t.op)
		if procs := p.procs[t.election]; !slices.Contains(procs, t.proc) {
			p.procs[t.election] = append(procs, t.proc)
		}
	}
	var free, freePeer int // the next hue
	for _, proc := range slices.Sorted(maps.Keys(peers)) {
		i := free % len(hues)
		if peers[proc] {
			i = len(hues) + freePeer%len(peerHues)
			freePeer++
		} else {
			free++
		}
		p.colour[proc] = paint{slices.Concat(hues, peerHues)[i], fmt.Sprintf("url(#still%d)", i)}
	}
}

// readLives collects when each process ran.
func (p *picture) readLives(history []oracle.Entry) {
	born := make(map[string]int64)
	for _, e := range history {
		switch e.Kind {
		case oracle.Start:
			born[e.Proc] = e.T
		case oracle.Exit:
			if from, ok := born[e.Proc]; ok {
				p.lives[e.Proc] = append(p.lives[e.Proc], span{from, e.T})
				delete(born, e.Proc)
			}
		}
	}
	for proc, from := range born {
		p.lives[proc] = append(p.lives[proc], span{from, p.window.to})
	}
}

// head draws title and legend.
func (p *picture) head(params Parameters) {
	p.text("title", 20, 30, "Who believed that it led, and when")
	p.text("dim", 20, 48, fmt.Sprintf("From %.0f s to %.0f s of a run of %v with seed %d and a TTL of %v",
		p.since(p.window.from).Seconds(), p.since(p.window.to).Seconds(), params.Duration, params.Seed, params.TTL))

	x, y := plotRight, 20.0
	sample := func(label string, draw func(x float64)) {
		x -= letterWidth*float64(len([]rune(label))) + 26
		draw(x)
		p.text("", x+19, y+10, label)
	}
	box := func(class string) func(float64) {
		return func(x float64) { rect(&p.svg, class, x, y, 14, 12, "") }
	}
	sample("operator took the key", func(x float64) { p.cross(x+7, y+6, "") })
	sample("excused overlap", box("excused"))
	sample("overlap", box("overlap"))
	sample("process stood still", func(x float64) { p.still(paint{hues[0], "url(#still0)"}, stretch{x, x + 14}, y, 12) })
	sample("fault", box("fault"))
	x, y = plotRight, 38
	procs := slices.Sorted(maps.Keys(p.colour))
	for _, proc := range slices.Backward(procs) {
		sample(proc, func(x float64) { p.painted(p.colour[proc].solid, stretch{x, x + 14}, y, 12) })
	}
	p.y = 66
}

// faultLanes draws each fault with its name, in a lane that no other fault uses at that time, and returns where the
// bars are.
func (p *picture) faultLanes() []stretch {
	const height, pitch, gap = 13.0, 16.0, 6.0
	type placed struct {
		fault      oracle.Entry
		bar, label stretch
		lane       int
		room       float64 // where the next fault in its lane begins
	}
	all := make([]placed, len(p.faults))
	var lanes []*placed // the last fault of each
	for i, f := range p.faults {
		bar := stretch{p.x(f.From), max(p.x(f.T), p.x(f.From)+3)}
		width := letterWidth * float64(len([]rune(f.Op)))
		label := min(bar.from+3, plotRight-width)
		begin := min(bar.from, label)
		lane := slices.IndexFunc(lanes, func(l *placed) bool { return max(l.label.to, l.bar.to)+gap <= begin })
		if lane < 0 && len(lanes) >= maxLanes {
			lane = slices.IndexFunc(lanes, func(l *placed) bool { return l.bar.to <= begin })
		}
		if lane < 0 {
			lane = len(lanes)
			lanes = append(lanes, nil)
		}
		if last := lanes[lane]; last != nil {
			last.room = begin
		}
		all[i] = placed{f, bar, stretch{label, label + width}, lane, pictureWidth}
		lanes[lane] = &all[i]
	}
	p.text("dim end", plotLeft-8, p.y+10, "faults")
	var bars []stretch
	for _, f := range all {
		y := p.y + pitch*float64(f.lane)
		rect(&p.svg, "fault", f.bar.from, y, f.bar.width(), height, p.describeFault(f.fault))
		text := f.fault.Op
		if long := text + " " + f.fault.Value; letterWidth*float64(len([]rune(long)))+3 <= f.bar.width() {
			text = long
		}
		p.text("label", f.label.from, y+10, cut(text, (f.room-f.label.from)/letterWidth))
		bars = append(bars, f.bar)
	}
	p.y += pitch*float64(len(lanes)) + 4
	return bars
}

func (p *picture) describeFault(f oracle.Entry) string {
	return fmt.Sprintf("%s\n%s\n%s", f.Op, f.Value, p.times(span{f.From, f.T}))
}

// axis draws the seconds since the start of the run.
func (p *picture) axis() {
	for _, t := range p.ticks() {
		p.text("dim mid", p.x(t), p.y+11, strconv.FormatInt((t-p.origin)/int64(time.Second), 10)+" s")
	}
	p.y += 20
}

// ticks returns times that are far enough apart for their labels to be readable.
func (p *picture) ticks() []int64 {
	var step int64
	for _, seconds := range []int64{1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 14400} {
		step = seconds * int64(time.Second)
		if p.x(p.window.from+step)-plotLeft >= 60 {
			break
		}
	}
	var ticks []int64
	for t := p.origin + (p.window.from-p.origin+step-1)/step*step; t <= p.window.to; t += step {
		ticks = append(ticks, t)
	}
	return ticks
}

// election draws a band: one lane for whoever leads, then a row for each process that ever led.
func (p *picture) election(name string) {
	procs := p.procs[name]
	const padding = 7.0
	rect(&p.back, "band", 12, p.y, pictureWidth-24, 2*padding+rowPitch*float64(len(procs)+1), "")
	p.y += padding
	p.text("election", 22, p.y+11, strings.TrimPrefix(name, root))
	p.text("dim end", plotLeft-8, p.y+11, "leader")
	rect(&p.svg, "vacant", plotLeft, p.y, plotRight-plotLeft, rowHeight, "")
	for _, t := range p.ticks() {
		p.line("grid", p.x(t), p.y, p.x(t), p.y+rowPitch*float64(len(procs)+1))
	}
	lane := p.y
	row := make(map[string]float64)
	for i, proc := range procs {
		row[proc] = p.y + rowPitch*float64(i+1)
		p.text("end", plotLeft-8, row[proc]+11, proc)
		for _, life := range p.lives[proc] {
			if p.window.touches(life) {
				y := row[proc] + rowHeight/2
				p.line("life", p.x(life.from), y, p.x(life.to), y)
			}
		}
	}
	var beliefs []oracle.Entry
	holder := make(map[int64]string) // of a token
	for _, t := range p.terms {
		if t.election == name {
			holder[t.token] = t.proc
			beliefs = append(beliefs, t.beliefs...)
			if p.window.touches(t.whole) {
				p.term(t, lane, row[t.proc])
			}
		}
	}
	for _, e := range p.taken {
		if e.Election == name && e.Result != oracle.Failed && p.window.touches(span{e.T, e.T}) {
			waiting, _, _ := strings.Cut(e.Value, "/")
			y, ok := row[cmp.Or(holder[e.Token], waiting)]
			if !ok {
				y = lane
			}
			p.cross(p.x(e.T), y+rowHeight/2, fmt.Sprintf("%s of token %d: %s\n%s", e.Op, e.Token, e.Result, p.times(span{e.From, e.T})))
		}
	}
	for _, o := range overlaps(beliefs) {
		class := "overlap"
		tokens := [2]int64{min(o.a.Token, o.b.Token), max(o.a.Token, o.b.Token)}
		if isPeer(o.a.Op) || isPeer(o.b.Op) || p.late[o.a] || p.late[o.b] || p.excused[excuse{name, tokens}] {
			class = "excused"
		}
		at := p.stretch(o.span)
		rect(&p.svg, class, at.from, lane, max(2, at.width()), rowHeight, fmt.Sprintf("%s (token %d) and %s (token %d)\n%s",
			o.a.Proc, o.a.Token, o.b.Proc, o.b.Token, p.times(o.span)))
	}
	p.y = lane + rowPitch*float64(len(procs)+1) + padding + 6
}

// term draws what its holder believed, in its own row and in the lane of the election.
func (p *picture) term(t *heldTerm, lane, row float64) {
	var held []span
	for _, e := range t.beliefs {
		held = append(held, believed(e))
	}
	title := fmt.Sprintf("%s leads %s, token %d\n%s", t.proc, t.election, t.token, p.times(t.whole))
	if t.end != "" {
		title += "\nended: " + t.end
	}
	paint := p.colour[t.proc]
	p.svg.WriteString(`<g class="term">` + tooltip(title))
	p.still(paint, p.stretch(t.whole), row, rowHeight) // visible between the pieces of belief
	var longest stretch
	for _, s := range merge(held, oracle.PauseOf) {
		at := p.stretch(s)
		p.painted(paint.solid, at, row, rowHeight)
		p.painted(paint.solid, at, lane, rowHeight)
		if at.width() > longest.width() {
			longest = at
		}
	}
	if label := strconv.FormatInt(t.token, 10); digitWidth*float64(len(label))+4 <= longest.width() {
		p.text("token", longest.from+longest.width()/2, row+10.5, label)
	}
	if p.window.from <= t.whole.from { // mark the beginning, because terms of one process may follow each other at once
		x := p.x(t.whole.from)
		rect(&p.svg, "begin", x, row, 1, rowHeight, "")
		rect(&p.svg, "begin", x, lane, 1, rowHeight, "")
	}
	p.svg.WriteString("</g>\n")
}

// An overlap is a time in which two terms of one election were both believed in.
type overlap struct {
	span
	a, b oracle.Entry
}

// overlaps returns the overlaps of the beliefs. A single answer was given at an unknown time between question and
// answer. So it overlaps only with a belief that covers all of that time.
func overlaps(beliefs []oracle.Entry) []overlap {
	sorted := slices.SortedFunc(slices.Values(beliefs), func(a, b oracle.Entry) int {
		return cmp.Compare(believed(a).from, believed(b).from)
	})
	var found []overlap
	var open []oracle.Entry // that may still last
	for _, b := range sorted {
		from, to := min(b.From, b.T), max(b.From, b.T)
		single := b.From > b.T
		open = slices.DeleteFunc(open, func(a oracle.Entry) bool { return a.T <= from })
		for _, a := range open {
			if (a.Token != b.Token || a.Proc != b.Proc) && (!single || to <= a.T) {
				found = append(found, overlap{span{from, min(to, a.T)}, a, b})
			}
		}
		if !single {
			open = append(open, b)
		}
	}
	return found
}

// A stretch is a span in pixels.
type stretch struct{ from, to float64 }

func (s stretch) width() float64 { return s.to - s.from }

// stretch returns where a span is in the picture. However short the span, it is visible.
func (p *picture) stretch(s span) stretch {
	from := p.x(s.from)
	return stretch{from, max(from+1.5, p.x(s.to))}
}

// x returns the position of a time in the picture.
func (p *picture) x(t int64) float64 {
	part := float64(t-p.window.from) / float64(p.window.to-p.window.from)
	return plotLeft + (plotRight-plotLeft)*min(max(part, 0), 1)
}

// since is the time since the start of the run.
func (p *picture) since(t int64) time.Duration { return time.Duration(t - p.origin) }

// times formats a span for a tooltip.
func (p *picture) times(s span) string {
	return fmt.Sprintf("%.3f s to %.3f s, %s", p.since(s.from).Seconds(), p.since(s.to).Seconds(), brief(time.Duration(s.to-s.from)))
}

func rect(b *bytes.Buffer, class string, x, y, width, height float64, title string) {
	fmt.Fprintf(b, `<rect class="%s" x="%.1f" y="%.1f" width="%.1f" height="%.1f">%s</rect>`+"\n",
		class, x, y, width, height, tooltip(title))
}

// painted draws a bar in the colour of a process.
func (p *picture) painted(fill string, at stretch, y, height float64) {
	fmt.Fprintf(&p.svg, `<rect fill="%s" x="%.1f" y="%.1f" width="%.1f" height="%.1f"/>`, fill, at.from, y, at.width(), height)
}

// still draws the bar of a process that gives no answer.
func (p *picture) still(paint paint, at stretch, y, height float64) {
	fmt.Fprintf(&p.svg, `<rect fill="%s" stroke="%s" x="%.1f" y="%.1f" width="%.1f" height="%.1f"/>`,
		paint.still, paint.solid, at.from+.5, y+.5, at.width()-1, height-1)
}

func (p *picture) line(class string, x1, y1, x2, y2 float64) {
	fmt.Fprintf(&p.svg, `<line class="%s" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`+"\n", class, x1, y1, x2, y2)
}

func (p *picture) cross(x, y float64, title string) {
	fmt.Fprintf(&p.svg, `<path class="taken" d="M%.1f %.1fl7 7m0 -7l-7 7">%s</path>`+"\n", x-3.5, y-3.5, tooltip(title))
}

func (p *picture) text(class string, x, y float64, text string) {
	fmt.Fprintf(&p.svg, `<text class="%s" x="%.1f" y="%.1f">%s</text>`+"\n", class, x, y, escape(text))
}

// tooltip returns the element that is shown under the pointer.
func tooltip(text string) string {
	if text == "" {
		return ""
	}
	return "<title>" + escape(text) + "</title>"
}

func escape(text string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(text)) // a Builder never fails
	return b.String()
}

// cut shortens a label to the room there is. One or two letters would say nothing.
func cut(label string, room float64) string {
	runes := []rune(label)
	switch letters := int(room); {
	case len(runes) <= letters:
		return label
	case letters < 3:
		return ""
	default:
		return string(runes[:letters])
	}
}

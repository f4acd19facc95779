package main

import (
	"cmp"
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A figure is drawn to an SVG file, in which each contestant has its own color everywhere, and each curve its label.
type figure interface {
	// draw returns the chart and the name of its file.
	draw() (c chart, file string)
}

// A curve is what a chart shows of one contestant.
type curve struct {
	name   string
	label  string // beside the name, if not empty
	points []point
}

type point struct{ x, y float64 }

// A chart has curves over two axes.
type chart struct {
	title, x, y string
	logX, logY  bool
	maxY        float64 // 0: that of the curves
	marks       bool    // at each point
	atEnd       bool    // labels are where curves end, else below each other
	curves      []curve
}

// colorsOf are the contestants'. Each can be read on white and on black, and those of one figure differ in lightness for
// readers who cannot tell all colors.
var colorsOf = []struct{ prefix, color string }{
	{"leader, lease kept", "#7db8d8"}, {"expiry of leader", "#7db8d8"}, {ours.name, "#0a84c6"},
	{watched, "#a8550f"}, {oneSession, "#f0a868"}, {"expiry of stock", "#f0a868"}, {stock.name, "#e0701a"},
	{limit.name, "#2b9348"}, {ofReclaim, "#2b9348"},
	{clientGo.name, "#8a8f98"}, {holster.name, "#b5489a"},
}

func colorFor(name string) string {
	for _, c := range colorsOf {
		if strings.HasPrefix(name, c.prefix) {
			return c.color
		}
	}
	return "#6b7280"
}

// style is that of all figures. It needs no font that may be missing, and follows the reader's light or dark.
const style = `<style>
text { font: 13px sans-serif; fill: #24292f }
.title { font-size: 16px; font-weight: bold }
.scene { font-weight: bold }
.name { text-anchor: end }
.tick, .about { fill: #6b7280; font-size: 12px }
.tick { text-anchor: middle }
.end { text-anchor: end }
.bad { fill: #d1242f; font-weight: bold }
.grid { stroke: #d0d7de }
.curve { fill: none; stroke-width: 2.5; stroke-linejoin: round }
.back { fill: #ffffff }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.tick, .about { fill: #9aa4af }
.bad { fill: #ff7b72 }
.grid { stroke: #30363d }
.back { fill: #0d1117 }
}
</style>
`

// An axis maps values to pixels.
type axis struct {
	from, to   float64 // values
	start, end float64 // pixels
	log        bool
}

func (a axis) at(v float64) float64 {
	share := (v - a.from) / (a.to - a.from)
	if a.log {
		share = math.Log(v/a.from) / math.Log(a.to/a.from)
	}
	return a.start + share*(a.end-a.start)
}

// ticks are round values.
func (a axis) ticks() (values []float64) {
	if a.log {
		for v := math.Pow(10, math.Ceil(math.Log10(a.from)-1e-9)); v <= a.to*1.001; v *= 10 {
			values = append(values, v)
		}
		return values
	}
	step := math.Pow(10, math.Floor(math.Log10((a.to-a.from)/2)))
	for (a.to-a.from)/step > 6 {
		step *= 2
	}
	for v := a.from; v <= a.to*1.001; v += step {
		values = append(values, v)
	}
	return values
}

func (c chart) svg() string {
	const w, h, left, right, top, bottom = 800.0, 380.0, 60.0, 250.0, 56.0, 48.0
	xs := axis{math.Inf(1), math.Inf(-1), left, w - right, c.logX}
	ys := axis{0, c.maxY, h - bottom, top, c.logY}
	if c.logY {
		ys.from = math.Inf(1)
	}
	for _, curve := range c.curves {
		for _, p := range curve.points {
			xs.from, xs.to = min(xs.from, p.x), max(xs.to, p.x)
			ys.from = min(ys.from, p.y)
			if c.maxY == 0 {
				ys.to = max(ys.to, p.y*1.05)
			}
		}
	}
	if xs.to <= xs.from {
		xs.to = xs.from + 1
	}
	if ys.to <= ys.from {
		ys.to = ys.from + 1
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" viewBox=\"0 0 %[1]v %[2]v\" role=\"img\">\n", w, h)
	fmt.Fprintf(&b, "<title>%s</title>\n%s<rect class=\"back\" width=\"100%%\" height=\"100%%\" rx=\"6\"/>\n", html.EscapeString(c.title), style)
	fmt.Fprintf(&b, "<text class=\"title\" x=\"16\" y=\"26\">%s</text>\n", html.EscapeString(c.title))
	fmt.Fprintf(&b, "<text class=\"about\" x=\"16\" y=\"46\">%s</text>\n", html.EscapeString(c.y))
	fmt.Fprintf(&b, "<text class=\"about end\" x=\"%.0f\" y=\"%.0f\">%s</text>\n", w-right, h-10, html.EscapeString(c.x))
	for _, v := range ys.ticks() {
		fmt.Fprintf(&b, "<line class=\"grid\" x1=\"%.0f\" x2=\"%.0f\" y1=\"%.1f\" y2=\"%.1[3]f\"/>\n", left, w-right, ys.at(v))
		fmt.Fprintf(&b, "<text class=\"about end\" x=\"%.0f\" y=\"%.1f\">%s</text>\n", left-8, ys.at(v)+4, number(v))
	}
	for _, v := range xs.ticks() {
		fmt.Fprintf(&b, "<line class=\"grid\" x1=\"%.1f\" x2=\"%.1[1]f\" y1=\"%.0f\" y2=\"%.0f\"/>\n", xs.at(v), h-bottom, h-bottom+5)
		fmt.Fprintf(&b, "<text class=\"tick\" x=\"%.1f\" y=\"%.0f\">%s</text>\n", xs.at(v), h-bottom+19, number(v))
	}
	var labels []label
	for i, curve := range c.curves {
		if len(curve.points) == 0 {
			continue
		}
		color := colorFor(curve.name)
		var at []string
		for _, p := range curve.points {
			at = append(at, fmt.Sprintf("%.1f,%.1f", xs.at(p.x), ys.at(p.y)))
			if c.marks {
				fmt.Fprintf(&b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>\n", xs.at(p.x), ys.at(p.y), color)
			}
		}
		fmt.Fprintf(&b, "<polyline class=\"curve\" stroke=\"%s\" points=\"%s\"/>\n", color, strings.Join(at, " "))
		l := label{strings.TrimSpace(curve.name + " " + curve.label), color, top + 12 + 20*float64(i)}
		if c.atEnd {
			l.y = ys.at(curve.points[len(curve.points)-1].y)
		}
		labels = append(labels, l)
	}
	for _, l := range apart(labels) {
		fmt.Fprintf(&b, "<rect x=\"%.0f\" y=\"%.1f\" width=\"10\" height=\"10\" rx=\"2\" fill=\"%s\"/>\n", w-right+12, l.y-5, l.color)
		fmt.Fprintf(&b, "<text x=\"%.0f\" y=\"%.1f\">%s</text>\n", w-right+28, l.y+4.5, html.EscapeString(l.text))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// A label is beside the chart, at a height.
type label struct {
	text, color string
	y           float64
}

// apart moves labels so that none covers another.
func apart(labels []label) []label {
	slices.SortStableFunc(labels, func(a, b label) int { return cmp.Compare(a.y, b.y) })
	for i := len(labels) - 2; i >= 0; i-- {
		labels[i].y = min(labels[i].y, labels[i+1].y-18)
	}
	return labels
}

// save returns the name of the file, and what it shows.
func save(f figure, dir string) (file, title string, err error) {
	c, file := f.draw()
	return file, c.title, os.WriteFile(filepath.Join(dir, file), []byte(c.svg()), 0o644)
}

// An ecdf shows distributions: for each duration, the share of trials that took at most as long.
type ecdf struct {
	file, title string
	samples     map[string]sample
	order       []string
	linear      bool // else the axis of durations is logarithmic
}

func (f ecdf) draw() (chart, string) {
	c := chart{title: f.title, x: "milliseconds", y: "% of trials that took at most so long; beside the names: medians", logX: !f.linear, maxY: 100}
	for _, name := range f.order {
		sorted := slices.Sorted(slices.Values(f.samples[name]))
		if len(sorted) == 0 {
			continue
		}
		points := []point{{float64(sorted[0]) / 1e6, 0}}
		for k, d := range sorted {
			points = append(points, point{float64(d) / 1e6, 100 * float64(k+1) / float64(len(sorted))})
		}
		c.curves = append(c.curves, curve{shortName(name), inWords(f.samples[name].median()), points})
	}
	// Labels are in the order of the curves.
	middle := func(c curve) float64 { return c.points[len(c.points)/2].x }
	slices.SortStableFunc(c.curves, func(a, b curve) int { return cmp.Compare(middle(a), middle(b)) })
	return c, f.file
}

// shortName is a name that has room beside a chart.
func shortName(name string) string {
	if name == anchored.name {
		return "leader, lease kept"
	}
	return strings.TrimSuffix(name, "'s lease")
}

// A lines shows how something grows; the axis of what it grows with is logarithmic.
type lines struct {
	file, title, x, y string
	logY              bool
	curves            []curve
}

// add adds the contestant's values at xs. What is not positive cannot be shown on a logarithmic axis.
func (f *lines) add(name string, xs []int, value func(x int) float64) {
	c := curve{name: name}
	for _, x := range xs {
		if y := value(x); y > 0 || !f.logY {
			c.points = append(c.points, point{float64(x), y})
		}
	}
	f.curves = append(f.curves, c)
}

func (f lines) draw() (chart, string) {
	return chart{title: f.title, x: f.x, y: f.y, logX: true, logY: f.logY, marks: true, atEnd: true, curves: f.curves}, f.file
}

package main

import (
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A bar is one line of the picture: for how long nobody leads, or, if it is negative, two lead.
type bar struct {
	scene, name string
	contestant  contestant
	gap         time.Duration // the median
}

// The scenes of the picture, in their order.
const (
	resignation = "The leader resigns"
	crashed     = "The leader's process is killed (TTL 15 s)"
	cutFromEtcd = "The leader is cut off from etcd without a sign (TTL 2 s)"
)

const (
	width, left, right = 800, 190, 110 // of the picture, in pixels
	rowHeight          = 22
	shortest, longest  = time.Millisecond, 30 * time.Second // of the axis, which is logarithmic
)

// x is where a duration is on the axis.
func x(d time.Duration) float64 {
	share := math.Log(float64(max(d, shortest))/float64(shortest)) / math.Log(float64(longest)/float64(shortest))
	return left + share*(width-left-right)
}

// drawBars writes a picture with a bar for each median, in groups, and with its value beside it.
func drawBars(bars []bar, file string) error {
	var b strings.Builder
	y := 62
	for i, bar := range bars {
		if i == 0 || bars[i-1].scene != bar.scene {
			y += 34
			fmt.Fprintf(&b, "<text class=\"scene\" x=\"16\" y=\"%d\">%s</text>\n", y-8, html.EscapeString(bar.scene))
		}
		middle := y + rowHeight/2
		fmt.Fprintf(&b, "<text class=\"name\" x=\"%d\" y=\"%d\">%s</text>\n", left-10, middle+4, html.EscapeString(bar.name))
		if bar.gap < 0 {
			fmt.Fprintf(&b, "<text class=\"bad\" x=\"%d\" y=\"%d\">two leaders at once, for %s</text>\n", left+6, middle+4, inWords(-bar.gap))
		} else {
			end := x(bar.gap)
			fmt.Fprintf(&b, "<rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\" rx=\"2\" fill=\"%s\"/>\n",
				left, y+3, max(end-left, 2), rowHeight-6, colorFor(bar.contestant.name))
			fmt.Fprintf(&b, "<text class=\"value\" x=\"%.1f\" y=\"%d\">%s</text>\n", end+6, middle+4, inWords(bar.gap))
		}
		y += rowHeight
	}
	height := y + 34
	var axis strings.Builder
	for d := shortest; d <= longest; d *= 10 {
		fmt.Fprintf(&axis, "<line class=\"grid\" x1=\"%.1f\" x2=\"%.1f\" y1=\"66\" y2=\"%d\"/>\n", x(d), x(d), y+6)
		fmt.Fprintf(&axis, "<text class=\"tick\" x=\"%.1f\" y=\"%d\">%s</text>\n", x(d), y+22, inWords(d))
	}
	svg := fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" role="img">
<title>For how long nobody leads</title>
%s<rect class="back" width="100%%" height="100%%" rx="6"/>
<text class="title" x="16" y="30">For how long nobody leads</text>
<text class="about" x="16" y="50">Median, on a logarithmic axis: each line is ten times as long as the one before. Shorter is better.</text>
%s%s</svg>
`, width, height, style, axis.String(), b.String())
	return os.WriteFile(file, []byte(svg), 0o644)
}

// inWords is a duration for readers: two digits, in the unit that they would choose.
func inWords(d time.Duration) string {
	if d >= time.Second {
		return number2(d.Seconds()) + " s"
	}
	return number2(float64(d)/float64(time.Millisecond)) + " ms"
}

func number2(v float64) string {
	if v >= 10 || v == math.Trunc(v) {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.1f", v)
}

// picture draws all bars beside the other plots, if the run has measured each scene.
func (rep *report) picture() error {
	var bars []bar
	for _, scene := range []string{resignation, crashed, cutFromEtcd} {
		n := len(bars)
		for _, bar := range rep.bars {
			if bar.scene == scene {
				bars = append(bars, bar)
			}
		}
		if len(bars) == n {
			return nil
		}
	}
	return drawBars(bars, filepath.Join(rep.dir, "gap.svg"))
}

package main

import (
	"fmt"
	"image/color"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	_ "gonum.org/v1/plot/vg/vgsvg" // for plot.Save
)

// A figure is drawn to an SVG file.
type figure interface {
	// draw returns the plot and the name of its file.
	draw() (p *plot.Plot, file string, err error)
}

// colors tell the contestants apart for those who cannot tell all colors too: they also differ in
// lightness (Okabe and Ito's palette).
var colors = []color.Color{
	color.RGBA{0x00, 0x72, 0xb2, 0xff},
	color.RGBA{0xd5, 0x5e, 0x00, 0xff},
	color.RGBA{0x00, 0x9e, 0x73, 0xff},
	color.RGBA{0xcc, 0x79, 0xa7, 0xff},
	color.RGBA{0x00, 0x00, 0x00, 0xff},
}

func newPlot(title, x, y string) *plot.Plot {
	p := plot.New()
	p.BackgroundColor = color.White
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Title.Padding, p.Legend.Padding = vg.Points(8), vg.Points(3)
	p.Legend.Top = true
	p.Add(plotter.NewGrid())
	return p
}

// addLine draws points as the i-th contestant's.
func addLine(p *plot.Plot, i int, name string, points plotter.XYs, marks bool) error {
	line, scatter, err := plotter.NewLinePoints(points)
	if err != nil {
		return fmt.Errorf("plot %s: %w", name, err)
	}
	line.Color, line.Width = colors[i%len(colors)], vg.Points(1.75)
	scatter.Color, scatter.Shape = line.Color, draw.CircleGlyph{}
	p.Add(line)
	if marks {
		p.Add(scatter)
	}
	p.Legend.Add(name, line)
	return nil
}

func save(f figure, dir string) (file string, err error) {
	p, file, err := f.draw()
	if err != nil {
		return "", err
	}
	return file, p.Save(7*vg.Inch, 3.75*vg.Inch, filepath.Join(dir, file))
}

// An ecdf shows distributions: for each duration, the share of trials that took at most as long.
type ecdf struct {
	file, title string
	samples     map[string]sample
	order       []string
	linear      bool // else the axis of durations is logarithmic
}

func (f ecdf) draw() (*plot.Plot, string, error) {
	p := newPlot(f.title, "ms", "% of trials")
	p.Legend.Top, p.Legend.Left = false, false
	if !f.linear {
		p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	}
	for i, name := range f.order {
		sorted := slices.Sorted(slices.Values(f.samples[name]))
		points := make(plotter.XYs, len(sorted))
		for k, d := range sorted {
			points[k] = plotter.XY{X: float64(d) / 1e6, Y: 100 * float64(k+1) / float64(len(sorted))}
		}
		if len(points) == 0 {
			continue
		}
		points = append(plotter.XYs{{X: points[0].X, Y: 0}}, points...)
		if err := addLine(p, i, name, points, false); err != nil {
			return nil, "", err
		}
	}
	p.Y.Min, p.Y.Max = 0, 100
	return p, f.file, nil
}

// A lines shows how something grows; the axis of what it grows with is logarithmic.
type lines struct {
	file, title, x, y string
	logY              bool
	names             []string
	points            []plotter.XYs
}

// add adds the contestant's values at xs. What is not positive cannot be shown on a logarithmic axis.
func (f *lines) add(name string, xs []int, value func(x int) float64) {
	var points plotter.XYs
	for _, x := range xs {
		if y := value(x); y > 0 || !f.logY {
			points = append(points, plotter.XY{X: float64(x), Y: y})
		}
	}
	f.names, f.points = append(f.names, name), append(f.points, points)
}

func (f lines) draw() (*plot.Plot, string, error) {
	p := newPlot(f.title, f.x, f.y)
	p.Legend.Left = true
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	for i, name := range f.names {
		if len(f.points[i]) == 0 {
			continue
		}
		if err := addLine(p, i, name, f.points[i], true); err != nil {
			return nil, "", err
		}
	}
	// Room above for the legend.
	if f.logY {
		p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
		p.Y.Max *= 10
	} else {
		p.Y.Min, p.Y.Max = 0, 1.4*p.Y.Max
	}
	return p, f.file, nil
}

//go:build unix

package main

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// columns is how wide the timeline is. With its margin it fits a terminal of 80 columns.
const columns = 74

// print shows the handoffs as a table and the terms as a timeline.
func (d *failover) print() {
	fmt.Println()
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "event\tleader\ttoken\ttime without a leader")
	for _, h := range d.handoffs {
		fmt.Fprintf(table, "%s\t%s → %s\t%d → %d\t%v\n", h.what, h.from.worker, h.to.worker, h.from.token, h.to.token,
			h.to.begin.Sub(h.from.end).Round(100*time.Microsecond))
	}
	table.Flush()
	fmt.Println("\nA token is a revision of etcd. Each increment in between has raised it, too.")

	end := time.Now()
	step := end.Sub(d.began) / columns
	rows := make(map[string][]rune)
	draw := func(worker string, from, to time.Time, r rune) {
		if rows[worker] == nil {
			rows[worker] = []rune(strings.Repeat(" ", columns))
		}
		for i := range columns {
			middle := d.began.Add(time.Duration(i)*step + step/2)
			if !middle.Before(from) && middle.Before(to) {
				rows[worker][i] = r
			}
		}
	}
	for _, s := range d.spans {
		if !s.paused {
			draw(s.worker, s.begin, s.end, '·')
		}
	}
	for _, s := range d.spans {
		if s.paused {
			draw(s.worker, s.begin, s.end, 'z')
		}
	}
	for _, t := range d.terms {
		draw(t.worker, t.begin, t.end, '█')
	}
	fmt.Printf("\n█ leads   · waits   z is paused   one column is %v\n\n", step.Round(time.Millisecond))
	for _, worker := range slices.Sorted(maps.Keys(rows)) {
		fmt.Printf("%4s  %s\n", worker, paint(string(rows[worker])))
	}
}

// paint colours a row of the timeline, if it is for a terminal that has colours.
func paint(row string) string {
	out, err := os.Stdout.Stat()
	if err != nil || out.Mode()&os.ModeCharDevice == 0 || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return row
	}
	return regexp.MustCompile("█+|z+").ReplaceAllStringFunc(row, func(part string) string {
		if part[0] == 'z' {
			return "\x1b[33m" + part + "\x1b[0m"
		}
		return "\x1b[32m" + part + "\x1b[0m"
	})
}

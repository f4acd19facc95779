package lease

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// The table of docs/operations.md says what the schedule does.
func TestTableOfTTLs(t *testing.T) {
	guide, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := make(map[string][]string) // by what begins the row
	for line := range strings.Lines(string(guide)) {
		cells := strings.Split(line, "|")
		if len(cells) == 8 {
			rows[strings.TrimSpace(cells[1])] = cells[3:7]
		}
	}
	synctest.Test(t, func(t *testing.T) { compare(t, rows) }) // where no time passes
}

func compare(t *testing.T, rows map[string][]string) {
	for i, seconds := range []int64{2, 5, 15, 60} {
		s := Session{sent: stamp{mono: time.Now()}}
		s.setTTLLocked(seconds)
		for row, want := range map[string]time.Duration{
			"":                           s.ttl,
			"the margin":                 s.margin,
			"a renewal is sent":          s.untilDueLocked(),
			"one attempt":                s.attempt(),
			"a term ends here":           s.ttl - s.margin,
			"nobody leads after a crash": s.ttl + 500*time.Millisecond, // etcd's interval between sweeps
		} {
			found := false
			for begin, cells := range rows {
				if row == begin || row != "" && strings.HasPrefix(begin, row) {
					found = true
					number := strconv.FormatFloat(float64(want.Round(10*time.Millisecond))/1e9, 'f', -1, 64)
					if !strings.Contains(cells[i]+" ", " "+number+" s ") {
						t.Errorf("with a TTL of %d s, %q is %q, want %s s", seconds, begin, cells[i], number)
					}
				}
			}
			if !found {
				t.Errorf("the table has no row %q", row)
			}
		}
	}
}

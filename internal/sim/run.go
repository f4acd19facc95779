package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/world"
)

// A total is what all simulations have come to.
type total struct {
	mu        sync.Mutex
	seeds     int
	simulated time.Duration
	busy      time.Duration // what the simulations have taken of a core
	faults    map[string]int
	counts    world.Counts
	bad       *world.Result // the first with a violation, nil if there is none
}

func (t *total) add(r *world.Result, busy time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seeds++
	t.simulated += r.Simulated
	t.busy += busy
	t.counts.Add(r.Counts)
	for name, n := range r.Faults {
		t.faults[name] += n
	}
	if t.bad == nil && len(r.Violations) > 0 {
		t.bad = r
	}
}

// simulate runs seeds until there is no time left, or a rule is violated.
func (o *options) simulate(ctx context.Context, binary string) (*total, error) {
	if !o.quiet {
		fmt.Printf("seed %d\n", o.Seed)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	began := time.Now()
	t := &total{faults: make(map[string]int)}
	var next atomic.Uint64
	var all sync.WaitGroup
	for range o.jobs {
		all.Go(func() {
			for {
				n := next.Add(1) - 1
				if ctx.Err() != nil || o.seeds > 0 && n >= uint64(o.seeds) || o.seeds == 0 && time.Since(began) > o.length {
					return
				}
				j := world.Job{Config: o.Config, Whole: o.out != "" && o.seeds == 1}
				j.Seed += n
				r, busy, err := simulate(ctx, binary, j)
				if ctx.Err() != nil {
					return
				}
				if err != nil {
					cancel(err)
					return
				}
				t.add(r, busy)
				if !o.quiet && (len(r.Violations) > 0 || j.Whole) {
					o.show(r)
				}
				if len(r.Violations) > 0 {
					cancel(nil)
				}
			}
		})
	}
	all.Wait()
	if !o.quiet {
		t.print(time.Since(began))
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return t, cause
	}
	return t, nil
}

// show prints a result, the last of its history, and writes the whole.
func (o *options) show(r *world.Result) {
	if o.out != "" {
		var text bytes.Buffer
		for _, e := range r.History {
			text.Write(oracle.Encode(e))
		}
		if err := os.WriteFile(o.out, text.Bytes(), 0o600); err != nil {
			fmt.Fprintln(os.Stderr, "sim:", err)
		}
	}
	if len(r.Violations) == 0 {
		fmt.Printf("seed %d: no violation, history %s\n", r.Seed, r.Hash)
		return
	}
	for _, e := range r.History[max(0, len(r.History)-o.tail):] {
		fmt.Println(world.Format(e))
	}
	for _, v := range r.Violations {
		fmt.Printf("seed %d %v\n", r.Seed, v)
	}
}

func (t *total) print(took time.Duration) {
	n := 0
	var sorts []string
	for _, name := range slices.Sorted(maps.Keys(t.faults)) {
		n += t.faults[name]
		sorts = append(sorts, fmt.Sprintf("%s %d", name, t.faults[name]))
	}
	busy := max(t.busy, time.Millisecond).Seconds()
	fmt.Printf("%d simulations, %v in %v; on one core %.0f s and %.0f faults a second\n", t.seeds, t.simulated.Round(time.Second), took.Round(time.Millisecond),
		t.simulated.Seconds()/busy, float64(n)/busy)
	fmt.Printf("%d faults: %s\n", n, strings.Join(sorts, ", "))
	fmt.Printf("%+v\n", t.counts)
}

// compare runs one seed again and again.
func (o *options) compare(ctx context.Context, binary string) (differs bool, err error) {
	hashes := make(map[string]int)
	var one, other []oracle.Entry
	for range o.replay {
		r, _, err := simulate(ctx, binary, world.Job{Config: o.Config, Whole: true})
		if err != nil {
			return false, err
		}
		hashes[r.Hash]++
		if one == nil {
			one = r.History
		} else if len(hashes) > 1 && other == nil {
			other = r.History
		}
	}
	fmt.Printf("seed %d: %d runs, %d entries, histories %v\n", o.Seed, o.replay, len(one), hashes)
	for i := range min(len(one), len(other)) {
		if one[i] != other[i] {
			for _, e := range one[max(0, i-10) : i+1] {
				fmt.Println("  ", world.Format(e))
			}
			fmt.Println("or ", world.Format(other[i]))
			break
		}
	}
	return len(hashes) != 1, nil
}

// maxTime is how long a simulation may take in real time: one in which no time passes would go on for ever.
const maxTime = 5 * time.Minute

// simulate does a job in a process of its own, and returns how much of a core that has taken. A process that ends
// before it has told its result is a violation too.
func simulate(ctx context.Context, binary string, j world.Job) (_ *world.Result, busy time.Duration, _ error) {
	text, err := json.Marshal(j)
	if err != nil {
		return nil, 0, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(ctx, maxTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-test.run=^TestJob$", "-test.timeout="+(maxTime+time.Minute).String(), "-job="+string(text))
	cmd.ExtraFiles = []*os.File{w}
	// What it leaves in its temporary directory if it is killed goes with the program.
	cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Dir(binary),
		"GOMAXPROCS=1", // from the first moment: a sync.Pool has a part for each P
		// Garbage is collected in one go, and goroutines keep the stacks that they have been given.
		"GODEBUG=gcstoptheworld=2,gcshrinkstackoff=1")
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, 0, err
	}
	var result world.Result
	failed := json.NewDecoder(r).Decode(&result)
	ended := cmd.Wait()
	busy = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	if failed == nil {
		return &result, busy, nil
	}
	what := fmt.Sprintf("the program has ended: %v\n%s", ended, first(output.String(), 12_000))
	return &world.Result{Seed: j.Seed, Violations: []world.Violation{{Rule: "crash", What: what}}}, busy, nil
}

// first is the beginning of a text.
func first(s string, n int) string {
	if len(s) > n {
		return s[:n] + "\n..."
	}
	return s
}

// Sim simulates the library: years of faults in minutes.
//
//	go run ./internal/sim                       # a minute, with a seed that it prints
//	go run ./internal/sim -seed 42 -seeds 1     # one simulation again
//	go run ./internal/sim -mutations            # the safeguards that can be taken out
//	go run ./internal/sim -mutation send-time   # one is out: must be found out
//	go run ./internal/sim -mutation all         # one after the other
//	go run ./internal/sim -library DIR          # the library of another checkout
//
// It builds package world against the library, whose files are changed on the way to the compiler, and runs it in
// processes of one thread each. It exits with 1 after a violation; with -mutation, with 0 if that was found
// out.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/leader/internal/sim/world"
)

type options struct {
	world.Config
	seeds    int
	length   time.Duration
	jobs     int
	replay   int
	faults   string
	mutation string
	list     bool
	library  string
	out      string
	tail     int
	quiet    bool // the result alone is wanted
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	found, err := run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "sim:", err)
	}
	if err != nil || found {
		stop()
		os.Exit(1)
	}
}

// run returns whether what was found is not what was wanted.
func run(ctx context.Context) (bad bool, err error) {
	var o options
	flag.Uint64Var(&o.Seed, "seed", rand.Uint64N(1e9), "of the first simulation; each one after that has the next")
	flag.DurationVar(&o.length, "for", time.Minute, "how long to simulate, in real time")
	flag.IntVar(&o.seeds, "seeds", 0, "how many simulations, whatever -for says")
	flag.IntVar(&o.jobs, "jobs", runtime.NumCPU(), "how many simulations at a time")
	flag.IntVar(&o.Processes, "processes", 0, "under test; 0: the seed decides")
	flag.DurationVar(&o.TTL, "ttl", 0, "in whole seconds; 0: the seed decides")
	flag.DurationVar(&o.Every, "every", 2*time.Second, "mean time between two faults")
	flag.DurationVar(&o.Length, "length", 4*time.Minute, "simulated time with faults, in each simulation")
	flag.BoolVar(&o.Restless, "restless", false, "let all processes be back in all elections at once, over the same lease")
	flag.BoolVar(&o.Unprobed, "unprobed", false, "in calm, look only at what is left")
	flag.StringVar(&o.faults, "faults", "", "kinds of faults, with commas; after a minus, those to leave out; all: "+strings.Join(world.Sorts(), ","))
	flag.IntVar(&o.replay, "replay", 0, "how often to run the first seed, to see that its history is always the same")
	flag.StringVar(&o.mutation, "mutation", "", "take a safeguard out; all: each in turn, for as long as -for says")
	flag.BoolVar(&o.list, "mutations", false, "list the safeguards that can be taken out")
	flag.StringVar(&o.library, "library", "", "the directory of a checkout whose library is to be simulated")
	flag.StringVar(&o.out, "o", "", "the file to write the history of a violation to, or of the only simulation")
	flag.IntVar(&o.tail, "tail", 40, "how many of the last entries of a history to print")
	flag.Parse()
	if flag.NArg() > 0 {
		return false, fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if o.list {
		for _, m := range mutations {
			fmt.Printf("%-24s %s\n", m.name, m.safeguard)
		}
		return false, nil
	}
	if o.Faults, err = chooseFaults(o.faults); err != nil {
		return false, err
	}
	dir, err := os.MkdirTemp("", "sim-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	binary, why, err := target{o.library, nil}.build(ctx, dir)
	if err != nil {
		return false, err
	}
	if why != nil {
		fmt.Printf("runs cannot be repeated: %v\n", why)
	}
	switch {
	case o.mutation == "all":
		return o.mutateAll(ctx, binary, dir)
	case o.mutation != "":
		m := mutationNamed(o.mutation)
		if m == nil {
			return false, fmt.Errorf("no mutation is called %q", o.mutation)
		}
		found, err := o.mutate(ctx, binary, dir, m)
		return !found, err
	case o.replay > 0:
		if why != nil {
			return false, errors.New("there is no replay without that")
		}
		return o.compare(ctx, binary)
	}
	t, err := o.simulate(ctx, binary)
	return t.bad != nil, err
}

// mutate simulates the library without a safeguard, and reports whether that is found out. It is not, if the library as it
// is, the control, breaks a rule with the same seed.
func (o options) mutate(ctx context.Context, control, dir string, m *mutation) (found bool, err error) {
	began := time.Now()
	if m.adjust != nil {
		m.adjust(&o.Config)
	}
	binary, _, err := target{o.library, m}.build(ctx, dir)
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(filepath.Dir(binary))
	t, err := o.simulate(ctx, binary)
	took := time.Since(began).Round(100 * time.Millisecond)
	if err != nil || t.bad == nil {
		fmt.Printf("%-24s %8v  NOT FOUND OUT\n", m.name, took)
		return false, err
	}
	o.Seed = t.bad.Seed
	r, _, err := simulate(ctx, control, world.Job{Config: o.Config})
	if err != nil {
		return false, err
	}
	if len(r.Violations) > 0 {
		fmt.Printf("%-24s %8v  NOT SHOWN: with all safeguards seed %d %s\n", m.name, took, r.Seed, first(r.Violations[0].String(), 300))
		return false, nil
	}
	fmt.Printf("%-24s %8v  seed %d %s\n", m.name, took, r.Seed, first(t.bad.Violations[0].String(), 200))
	return true, nil
}

// mutateAll takes out one safeguard after the other, several at a time. It reports whether one was missed.
func (o options) mutateAll(ctx context.Context, control, dir string) (missed bool, err error) {
	together := o.jobs
	o.quiet, o.jobs = true, 1
	todo := make(chan *mutation)
	var anyMissed atomic.Bool
	var all sync.WaitGroup
	for range together {
		all.Go(func() {
			for m := range todo {
				found, err := o.mutate(ctx, control, dir, m)
				if err != nil {
					fmt.Printf("%-24s %v\n", m.name, err)
				}
				if !found {
					anyMissed.Store(true)
				}
			}
		})
	}
	for i := range mutations {
		if ctx.Err() != nil {
			break
		}
		todo <- &mutations[i]
	}
	close(todo)
	all.Wait()
	return anyMissed.Load(), ctx.Err()
}

// chooseFaults returns the sorts that a list names.
func chooseFaults(list string) ([]string, error) {
	rest, without := strings.CutPrefix(list, "-")
	if rest == "" {
		return nil, nil
	}
	named := strings.Split(rest, ",")
	all := world.Sorts()
	for _, name := range named {
		if !slices.Contains(all, name) {
			return nil, fmt.Errorf("no sort of faults is called %q: %s", name, strings.Join(all, ","))
		}
	}
	return slices.DeleteFunc(all, func(name string) bool { return slices.Contains(named, name) == without }), nil
}

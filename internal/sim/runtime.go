package main

import (
	"fmt"
	"go/version"
	"os"
	"path/filepath"
	"strings"
)

// What a run depends on beside its seed is the runtime's randomness: the order of maps, which of several ready
// cases a select takes, which of two timers of one moment fires first. Under the overlay they follow from a seed too,
// in bubbles, and a goroutine runs until it blocks. One P does the rest, and that garbage is collected once a
// simulated minute, with the world stopped.
//
// This is tied to the texts of one release of Go. With another the simulation runs as well, without replay.
const runtimeRelease = "go1.26"

// A patch replaces a text that must occur a certain number of times in a file of the standard library.
type patch struct {
	file     string
	old, new string
	times    int
}

var runtimePatches = []patch{
	// Maps, and all that asks for good randomness.
	{"runtime/rand.go", "func rand() uint64 {\n", "func rand() uint64 {\n\tif x, ok := simRand(); ok {\n\t\treturn x\n\t}\n", 1},
	{"runtime/rand.go", "// mrandinit initializes", simRand + "\n// mrandinit initializes", 1},
	// Cases of a select.
	{
		"runtime/select.go", "j := cheaprandn(uint32(norder + 1))",
		"j := uint32((uint64(simCheap()) * uint64(norder+1)) >> 32)", 1,
	},
	// Timers of one moment.
	{"runtime/time.go", "t.rand = cheaprand()", "t.rand = simCheap()", 1},
	// The place of a key in a map, which must not differ from one process to the next.
	{"runtime/alg.go", "bootstrapRand()", "0x9e3779b97f4a7c15 * uint64(i+1)", 2},
	// A goroutine runs until it blocks.
	{"runtime/proc.go", "const forcePreemptNS = 10 * 1000 * 1000 // 10ms", "const forcePreemptNS = 1 << 60", 1},
	// One that has yielded is in a queue of its own. That is looked at when no other has anything to do, and not
	// whenever the scheduler has run 61 times, which is counted since the program began.
	{"runtime/proc.go", "if pp.schedtick%61 == 0 && !sched.runq.empty() {", "if false {", 1},
	// Goroutines of the runtime's own, which come at any time, are not let in before those of a bubble.
	{
		"runtime/proc.go", "func runqput(pp *p, gp *g, next bool) {\n",
		"func runqput(pp *p, gp *g, next bool) {\n\tnext = next && gp.bubble != nil\n", 1,
	},
	// A lock is handed over in another way when somebody has waited long for it.
	{
		"runtime/sema.go", "func internal_sync_nanotime() int64 {\n",
		"func internal_sync_nanotime() int64 {\n\tif b := getg().bubble; b != nil {\n\t\treturn b.now\n\t}\n", 1,
	},
	// Goroutines start with room for a call of gRPC's: to copy stacks that grow took a tenth of the time.
	{"runtime/stack.go", "var startingStackSize uint32 = fixedStack", "var startingStackSize uint32 = 32 << 10", 1},
	{"runtime/proc.go", "newg = malg(stackMin)", "newg = malg(32 << 10)", 1},
	// The children of a context are in a map by their addresses, which differ: they are cancelled in the order in
	// which they came.
	{"context/context.go", "children map[canceler]struct{}", "children map[canceler]uint64", 1},
	{"context/context.go", "p.children = make(map[canceler]struct{})", "p.children = make(map[canceler]uint64)", 1},
	{"context/context.go", "p.children[child] = struct{}{}", "p.children[child] = births.Add(1)", 1},
	{"context/context.go", "for child := range c.children {", "for _, child := range inOrder(c.children) {", 1},
	{"context/context.go", "// cancel closes c.done,", inOrder + "\n// cancel closes c.done,", 1},
}

// simRand is splitmix64 for goroutines of bubbles. What the runtime draws elsewhere must not disturb it.
const simRand = `var simState uint64

// SimSeed makes what bubbles draw at random follow from a seed.
func SimSeed(seed uint64) { simState = seed }

//go:nosplit
func simRand() (uint64, bool) {
	gp := getg()
	if gp.bubble == nil && (gp.m.curg == nil || gp.m.curg.bubble == nil) {
		return 0, false
	}
	simState += 0x9e3779b97f4a7c15
	z := simState
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb
	return z ^ (z >> 31), true
}

//go:nosplit
func simCheap() uint32 {
	if x, ok := simRand(); ok {
		return uint32(x >> 32)
	}
	return cheaprand()
}
`

const inOrder = `var births atomic.Uint64

func inOrder(children map[canceler]uint64) []canceler {
	order := make([]canceler, 0, len(children))
	for child := range children {
		i := len(order)
		order = append(order, child)
		for ; i > 0 && children[order[i-1]] > children[child]; i-- {
			order[i] = order[i-1]
		}
		order[i] = child
	}
	return order
}
`

// patchRuntime adds the patches to an overlay. It returns an error if they are not for this release of Go.
func (o *overlay) patchRuntime(goroot, release string) error {
	if version.Lang(release) != runtimeRelease {
		return fmt.Errorf("this is %s, and the runtime's randomness is only known for %s", release, runtimeRelease)
	}
	sources := make(map[string]string)
	for _, p := range runtimePatches {
		file := filepath.Join(goroot, "src", filepath.FromSlash(p.file))
		if sources[file] == "" {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			sources[file] = string(text)
		}
		if n := strings.Count(sources[file], p.old); n != p.times {
			return fmt.Errorf("%s of %s has %q %d times, not %d", p.file, release, p.old, n, p.times)
		}
		sources[file] = strings.ReplaceAll(sources[file], p.old, p.new)
	}
	for file, text := range sources {
		if err := o.replace(file, text); err != nil {
			return err
		}
	}
	return nil
}

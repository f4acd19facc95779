// Package world is one simulation of the library: processes that take part in elections on an etcd in memory, faults that
// strike both, and rules that must hold, all in the fake time of a bubble.
//
// It uses the library through its public API alone, and is compiled with whatever library is to be judged: the
// program in internal/sim sees to that. One seed decides everything. A simulation has three parts: faults for some
// minutes, then calm, in which all must heal in its documented time, then the end, after which nothing may be left.
package world

import (
	"context"
	crand "crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/fake"
)

// Config is what a simulation is made of.
type Config struct {
	Seed      uint64
	Processes int
	TTL       time.Duration // 0: the seed decides
	Faults    []string      // sorts; all if empty
	Every     time.Duration // mean between two faults
	Length    time.Duration // of the part with faults, in simulated time
	Restless  bool          // all processes are back in all elections at once, over the same lease
	Unprobed  bool          // in calm, it is only looked at what is left
	Checks    bool          // all processes have checks of their health
	Passwords bool          // clients have one
	Filed     bool          // all processes have lease files
	Holds     float64       // the probability that a goroutine is held up at a gate; 0: each process has its own
}

// A Violation is a rule that did not hold.
type Violation struct {
	At   time.Duration // simulated
	Rule string
	What string
}

func (v Violation) String() string {
	return fmt.Sprintf("after %v: %s: %s", v.At.Round(time.Millisecond), v.Rule, v.What)
}

// A Result is what a simulation comes to. It is good if it has no violations.
type Result struct {
	Seed       uint64
	Violations []Violation
	Simulated  time.Duration
	Hash       string // of the history
	Faults     map[string]int
	Counts     Counts
	History    []oracle.Entry
	Options    oracle.Options // to judge it by
	Doubled    bool           // some requests were carried out twice
	Stuck      bool           // etcd's client has left goroutines, by a fault of its own
}

// Counts say how much has happened: rules that had nothing to object to prove nothing.
type Counts struct {
	Campaigns, GivenUp, Terms, Expired, Evicted, Renewals, Writes, Observed int
	Transferred, Unhealthy                                                  int // terms, and checks that have failed
	Requests                                                                int
	MaxPace                                                                 int // requests of one process in a second, those that clientv3 repeats included
	Excused                                                                 int // overlaps of terms
}

// Add adds what another simulation has counted.
func (c *Counts) Add(o Counts) {
	c.Campaigns += o.Campaigns
	c.GivenUp += o.GivenUp
	c.Terms += o.Terms
	c.Expired += o.Expired
	c.Evicted += o.Evicted
	c.Renewals += o.Renewals
	c.Writes += o.Writes
	c.Observed += o.Observed
	c.Transferred += o.Transferred
	c.Unhealthy += o.Unhealthy
	c.Requests += o.Requests
	c.MaxPace = max(c.MaxPace, o.MaxPace)
	c.Excused += o.Excused
}

// machineClocks is set if the library was compiled to use the clocks of machines.
var machineClocks bool

// seedRuntime makes the runtime's randomness in bubbles follow from a seed; nil if it does not.
var seedRuntime func(uint64)

// A world is a simulation under way.
type world struct {
	Config
	rng     *rand.Rand // safe for concurrent use
	began   time.Time
	ttl     time.Duration // a whole number of seconds, which etcd grants as it is
	margin  time.Duration
	names   []string // of the elections
	cluster *fake.Cluster
	procs   []*process // under test, one for each place
	evictor *evictor

	reclaiming sync.WaitGroup // those who wait to reclaim leases

	drift bool // some clocks are slower than the bound
	auth  bool
	dir   string // of the lease files

	calm atomic.Bool // no faults any more
	over atomic.Bool // all are to end
	// quiet is set in calm while nothing makes it hard for requests to be answered.
	quiet atomic.Bool
	stop  context.CancelFunc
	ctx   context.Context // ends with over
	quit  chan struct{}   // closed at the first violation

	mu     sync.Mutex // held for moments; neither the cluster nor the library is called with it
	result Result
	hash   uint64
	truth
	terms     map[string][]*term // by election, those that have not ended
	calls     map[string]*call   // by value
	resource  map[string]int64   // the largest token, by election
	observers []observer
	limits    limits
	sequence  int64
}

// locked is a source that several goroutines may use.
type locked struct {
	mu  sync.Mutex
	src rand.Source
}

func (l *locked) Uint64() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.src.Uint64()
}

func newRand(seed, stream uint64) *rand.Rand {
	return rand.New(&locked{src: rand.NewPCG(seed, stream)})
}

// A reader is what crypto/rand draws from.
type reader struct {
	mu  sync.Mutex
	src *rand.ChaCha8
}

func newReader(seed uint64) *reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return &reader{src: rand.NewChaCha8(key)}
}

func (r *reader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.src.Read(p)
}

// elections are such that one's keys lie under another's prefix.
var elections = []string{"a", "a/b", "ab", "b"}

// Run runs a simulation. It must be called in a bubble.
func Run(cfg Config) *Result {
	if seedRuntime != nil {
		seedRuntime(cfg.Seed)
	}
	defer func(reader io.Reader) { crand.Reader = reader }(crand.Reader)
	crand.Reader = newReader(cfg.Seed) // raft draws from it
	fake.EnterBubble()
	w := newWorld(cfg)
	goroutines := runtime.NumGoroutine()
	w.start()
	w.sleep(w.Length)
	w.leave()
	w.heal()
	if !w.violated() {
		w.probe()
	}
	w.end(goroutines)
	w.result.Simulated = time.Since(w.began)
	w.result.Hash = fmt.Sprintf("%016x", w.hash)
	return &w.result
}

func newWorld(cfg Config) *world {
	w := &world{
		Config: cfg,
		rng:    newRand(cfg.Seed, 1),
		began:  time.Now(),
		quit:   make(chan struct{}),
		truth:  newTruth(),
		terms:  make(map[string][]*term),
		calls:  make(map[string]*call),

		resource: make(map[string]int64),
	}
	w.ctx, w.stop = context.WithCancel(context.Background())
	w.result = Result{Seed: cfg.Seed, Faults: make(map[string]int)}
	if w.Processes == 0 {
		w.Processes = 3 + w.rng.IntN(3)
	}
	if w.ttl = w.TTL; w.ttl == 0 {
		w.ttl = []time.Duration{2, 3, 4, 5, 8, 15}[w.rng.IntN(6)] * time.Second
	}
	w.margin = w.ttl / 5
	if w.rng.IntN(4) == 0 {
		w.margin = w.ttl / 10 * time.Duration(1+w.rng.IntN(5))
	}
	w.names = elections[:1+w.rng.IntN(2)]
	if w.Restless || w.rng.IntN(8) == 0 {
		w.names = elections
	}
	w.drift = w.rng.IntN(8) == 0 && machineClocks
	w.auth = w.rng.IntN(8) == 0 || w.Passwords
	for _, name := range w.names {
		w.states[name] = []state{{since: w.began}} // nobody leads
	}
	w.result.Options = oracle.Options{TTL: w.ttl, Margin: w.margin, Elections: w.names, Data: dataRoot, Exact: true}
	if w.auth {
		w.result.Options.Patience = authPatience
	}
	w.record(oracle.Entry{Kind: oracle.Run, Proc: "world"})
	w.note("ttl %v, margin %v, %d processes, elections %q, drift beyond the bound %t, passwords %t", w.ttl, w.margin, w.Processes, w.names, w.drift, w.auth)
	w.cluster = fake.New(fake.Config{Seed: cfg.Seed, LateRequests: 0.5, OnCommit: w.committed})
	return w
}

func (w *world) start() {
	var err error
	if w.dir, err = os.MkdirTemp("", "sim"); err != nil {
		panic(err)
	}
	w.sleep(3 * time.Second) // the cluster elects a leader
	if w.auth {
		w.cluster.EnableAuth(20*time.Second, fake.User{Name: "root", Password: "root", Root: true})
	}
	if w.rng.IntN(2) == 0 { // data of strangers below the elections
		for _, name := range w.names {
			_, _ = w.cluster.Operator().Put(w.ctx, name+"/config", "x", 0)
		}
	}
	for place := range w.Processes {
		w.procs = append(w.procs, w.newProcess(place, 1))
	}
	w.evictor = w.newEvictor()
	go w.faults()
	go w.monitor()
}

// sleep blocks for d or until a rule is violated.
func (w *world) sleep(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-w.quit:
	}
}

func (w *world) violated() bool {
	select {
	case <-w.quit:
		return true
	default:
		return false
	}
}

// leave lets processes leave elections while faults strike still, one after the other. They stay in the first, for which
// they keep their lease.
func (w *world) leave() {
	for _, p := range w.processes() {
		for _, election := range w.names[1:] {
			if w.rng.IntN(2) == 0 && !w.violated() {
				(&strike{w: w, p: p, election: election}).leave()
			}
		}
	}
}

// heal ends all faults. It waits until those that are under way have seen that.
func (w *world) heal() {
	w.calm.Store(true)
	w.note("calm")
	for range 2 {
		w.cluster.Heal()
		for _, p := range w.processes() {
			p.goOn(true)
		}
		w.sleep(time.Second)
	}
}

// processes are those under test at the moment.
func (w *world) processes() []*process {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.procs)
}

// end ends all, and looks what is left.
func (w *world) end(goroutines int) {
	w.over.Store(true)
	w.note("end")
	procs := w.processes()
	for _, p := range procs {
		p.goOn(true)
	}
	w.stop()
	for _, p := range procs {
		<-p.ended
		w.record(oracle.Entry{Kind: oracle.Exit, Proc: p.name, Result: oracle.OK})
	}
	if !w.violated() {
		w.checkLeft()
	}
	w.cluster.Inspect(func(t fake.Truth) {
		rev, _ := t.Revision()
		w.record(oracle.Entry{Kind: oracle.AuditEnd, Proc: "world", Rev: rev})
	})
	for _, p := range procs {
		w.result.Counts.Requests += p.net.Counters().Total()
		p.close()
	}
	w.reclaiming.Wait()
	w.evictor.close()
	os.RemoveAll(w.dir)
	w.cluster.Stop()
	time.Sleep(2 * time.Minute) // whoever sleeps wakes up and sees that it is over
	if n := runtime.NumGoroutine(); n > goroutines && !w.violated() {
		all := stacks()
		// Where a watch is refused as the only other one on its stream ends, the stream waits for itself.
		if w.result.Stuck = strings.Contains(all, "client/v3.(*watchGRPCStream).run.func1"); !w.result.Stuck {
			w.violate("leaks", "%d goroutines are left:\n%s", n-goroutines, all)
		}
	}
}

// stacks are those of the bubble's goroutines, but the caller's.
func stacks() string {
	buf := make([]byte, 1<<20)
	all := strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")
	return strings.Join(slices.DeleteFunc(all[1:], func(s string) bool {
		head, _, _ := strings.Cut(s, "\n")
		return !strings.Contains(head, "synctest bubble") || strings.Contains(head, "synctest.Run")
	}), "\n\n")
}

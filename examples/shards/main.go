//go:build unix

// Shards shows processes that share a hundred shards evenly. Each shard has an election, and its leader does the
// shard's work. So at most one process works on a shard at a time. A process joins, one is killed, and one is asked to
// stop. Each time, shards are transferred until no process leads more than its share again.
//
//	go run ./examples/shards
//
// It starts an etcd of its own in this process, unless -endpoints names another. It exits with status 1 if two
// processes worked on a shard at a time, or if the shards were not shared evenly.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"example.com/leader/examples/internal/demo"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func main() {
	var c config
	flag.StringVar(&c.endpoints, "endpoints", "", "etcd `host:port,…`; if empty, starts an etcd of its own")
	flag.DurationVar(&c.ttl, "ttl", 3*time.Second, "time to live of a process's lease, 1s to 15s")
	flag.IntVar(&c.shards, "shards", 100, "`number` of shards, 1 to 500")
	flag.IntVar(&c.processes, "processes", 3, "`number` of processes at first, 2 to 8")
	name := flag.String("process", "", "run as the process of this `name`, for the demonstration")
	flag.Parse()

	err := c.check(flag.Args())
	switch {
	case err != nil:
	case *name != "":
		err = serve(*name, c)
	default:
		ctx, stop := demo.Interruptible()
		err = demonstrate(ctx, c)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "shards:", err)
		os.Exit(1)
	}
}

// A config holds the values of the flags.
type config struct {
	endpoints string
	ttl       time.Duration
	shards    int
	processes int
}

func (c config) check(args []string) error {
	switch {
	case len(args) > 0:
		return fmt.Errorf("%q: takes flags only", args[0])
	case c.ttl < time.Second || c.ttl > 15*time.Second:
		return fmt.Errorf("-ttl %v: must be 1s to 15s", c.ttl)
	case c.shards < 1 || c.shards > 500:
		return fmt.Errorf("-shards %d: must be 1 to 500", c.shards)
	case c.processes < 2 || c.processes > 8:
		return fmt.Errorf("-processes %d: must be 2 to 8", c.processes)
	}
	return nil
}

func (c config) client() (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:            strings.Split(c.endpoints, ","),
		DialKeepAliveTime:    10 * time.Second, // finds a connection that died without a sign; TCP may take 15 minutes
		DialKeepAliveTimeout: 2 * time.Second,
		Logger:               zap.NewNop(),
	})
}

func demonstrate(ctx context.Context, c config) error {
	if c.endpoints == "" {
		endpoint, stop, err := demo.StartEtcd("", demo.AnyPort)
		if err != nil {
			return err
		}
		defer stop()
		c.endpoints = endpoint
		fmt.Printf("embedded etcd on %s\n", endpoint)
	}
	fmt.Println("Each digit is a shard: the number of the process that leads it.")
	fmt.Println("A move gives a shard a new leader.")
	s := newShards(c)
	defer s.stopAll()
	for _, act := range []func() error{s.startFirst, s.join, s.kill, s.leave} {
		fmt.Println()
		if err := act(); err != nil {
			return err
		}
		if _, _, err := s.settle(ctx); err != nil {
			return err
		}
	}
	s.stopAll()
	return s.check()
}

// shards runs the processes and collects what they report.
type shards struct {
	config
	began  time.Time
	events chan event
	joined int // processes so far
	procs  map[string]*demo.Process[event]
	terms  [][]*term      // by shard
	moves  int            // since the shards were last shared evenly
	before map[string]int // how many shards each process led then
}

// A term is the time in which a process worked on a shard.
type term struct {
	process    string
	token      int64
	begin, end time.Time // end is zero while it lasts
}

func newShards(c config) *shards {
	return &shards{
		config: c, began: time.Now(), events: make(chan event),
		procs: make(map[string]*demo.Process[event]), terms: make([][]*term, c.shards),
	}
}

func (s *shards) say(format string, args ...any) {
	fmt.Printf("%7.3fs  %s\n", time.Since(s.began).Seconds(), fmt.Sprintf(format, args...))
}

func (s *shards) startFirst() error {
	for range s.processes {
		if err := s.join(); err != nil {
			return err
		}
	}
	return nil
}

// join starts another process.
func (s *shards) join() error {
	s.joined++
	name := fmt.Sprint(s.joined)
	p, err := demo.Start(s.events, "-process", name, "-endpoints", s.endpoints,
		"-ttl", s.ttl.String(), "-shards", fmt.Sprint(s.shards))
	if err != nil {
		return err
	}
	s.procs[name] = p
	s.say("%s joins, pid %d", name, p.PID())
	return nil
}

// kill ends a process without a chance to resign, so its lease has to expire.
func (s *shards) kill() error {
	name, p := s.any()
	killed := time.Now()
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	s.say("%s is killed: its shards wait until its lease has expired", name)
	s.reap(name)
	for _, terms := range s.terms {
		for _, t := range terms {
			if t.process == name && t.end.IsZero() {
				t.end = killed
			}
		}
	}
	return nil
}

// leave asks a process to stop.
func (s *shards) leave() error {
	name, p := s.any()
	p.Stop()
	s.say("%s is asked to stop, and resigns", name)
	s.reap(name)
	return nil
}

// any returns one of the processes.
func (s *shards) any() (name string, p *demo.Process[event]) {
	for name, p = range s.procs { // in random order
		break
	}
	return name, p
}

// reap waits for a process that was told to end, and handles what is still reported.
func (s *shards) reap(name string) {
	s.procs[name].Reap(s.handle)
	delete(s.procs, name)
}

// stopAll ends the processes.
func (s *shards) stopAll() {
	for _, p := range s.procs {
		p.Stop()
	}
	for name := range s.procs {
		s.reap(name)
	}
}

func (s *shards) handle(e event) {
	if e.Leads {
		s.moves++
		s.terms[e.Shard] = append(s.terms[e.Shard], &term{process: e.Process, token: e.Token, begin: e.At})
		return
	}
	for _, t := range s.terms[e.Shard] {
		if t.token == e.Token {
			t.end = e.At
		}
	}
}

// settle waits until every shard has one leader and no process leads more than its share. It returns how many moves
// that took, and how many it takes at least.
func (s *shards) settle(ctx context.Context) (moves, least int, err error) {
	timeout := time.NewTimer(3*s.ttl + 30*time.Second)
	defer timeout.Stop()
	row, led := s.leaders()
	most := share(s.shards, len(s.procs))
	for strings.ContainsAny(row, ".?") || slices.Max(slices.Collect(maps.Values(led))) > most {
		select {
		case e := <-s.events:
			s.handle(e)
		case <-ctx.Done():
			return 0, 0, fmt.Errorf("interrupted: %w", context.Cause(ctx))
		case <-timeout.C:
			return 0, 0, fmt.Errorf("timed out: not shared evenly; does etcd answer at %s?", s.endpoints)
		}
		row, led = s.leaders()
	}
	moves, least = s.moves, s.shards
	for name := range s.procs {
		least -= min(s.before[name], most) // it keeps these
	}
	s.moves, s.before = 0, led

	s.say("shared evenly; moves: %d, least possible: %d", moves, least)
	for digits := range slices.Chunk([]byte(row), 50) {
		fmt.Printf("%10s%s\n", "", digits)
	}
	fmt.Printf("%8s", "")
	for _, name := range slices.Sorted(maps.Keys(led)) {
		fmt.Printf("  %s: %d", name, led[name])
	}
	fmt.Println()
	return moves, least, nil
}

// leaders returns who leads each shard, as a row of digits, and how many shards each process leads. The row has a dot
// for a shard that nobody leads, and a question mark while the reports of two processes contradict each other.
func (s *shards) leaders() (row string, led map[string]int) {
	led = make(map[string]int)
	for _, terms := range s.terms {
		leader := "."
		for _, t := range terms {
			switch {
			case !t.end.IsZero() || s.procs[t.process] == nil:
			case leader == ".":
				leader = t.process
			default:
				leader = "?"
			}
		}
		row += leader
		led[leader]++
	}
	return row, led
}

// check checks that no two processes worked on a shard at a time.
func (s *shards) check() error {
	var errs []error
	count := 0
	for shard, terms := range s.terms {
		slices.SortFunc(terms, func(a, b *term) int { return cmp.Compare(a.token, b.token) })
		for i, t := range terms {
			count++
			if t.end.IsZero() {
				errs = append(errs, fmt.Errorf("shard %d: the term of %s, token %d, has not ended", shard, t.process, t.token))
			}
			if i > 0 && t.begin.Before(terms[i-1].end) {
				before := terms[i-1]
				errs = append(errs, fmt.Errorf("shard %d: terms overlap by %v: %s, token %d, and %s, token %d",
					shard, before.end.Sub(t.begin), before.process, before.token, t.process, t.token))
			}
		}
	}
	if errs == nil {
		fmt.Printf("\n%d terms of %d shards: no two terms of a shard overlap.\n", count, s.shards)
	}
	return errors.Join(errs...)
}

//go:build unix

// Shards shows three processes that share a hundred shards. Each shard has an election, and its leader holds the shard.
// So at most one process holds a shard at a time. One process is killed, and the others take over its shards.
//
//	go run ./examples/shards
//
// It starts an etcd of its own in this process, unless -endpoints names another. It exits with status 1 if a shard had
// two holders at a time, or if the shards were not shared evenly.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
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
	flag.DurationVar(&c.ttl, "ttl", 3*time.Second, "time to live of a process's lease")
	flag.IntVar(&c.shards, "shards", 100, "`number` of shards, at least 1")
	flag.IntVar(&c.processes, "processes", 3, "`number` of processes, 2 to 9")
	name := flag.String("process", "", "run as the process of this `name`; the demonstration starts its processes with it")
	flag.Parse()

	var err error
	if *name != "" {
		err = serve(*name, c)
	} else {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
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

func (c config) client() (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:            strings.Split(c.endpoints, ","),
		DialKeepAliveTime:    10 * time.Second, // finds a connection that died without a sign; TCP may take 15 minutes
		DialKeepAliveTimeout: 2 * time.Second,
		Logger:               zap.NewNop(),
	})
}

func demonstrate(ctx context.Context, c config) error {
	if c.shards < 1 {
		return fmt.Errorf("-shards %d: must be at least 1", c.shards)
	}
	if c.ttl < time.Second || c.ttl > 5*time.Second {
		return fmt.Errorf("-ttl %v: must be 1s to 5s, so that the demonstration ends soon", c.ttl)
	}
	if c.processes < 2 || c.processes > 9 {
		return fmt.Errorf("-processes %d: must be 2 to 9", c.processes)
	}
	if c.endpoints == "" {
		endpoint, stop, err := demo.StartEtcd(demo.AnyPort)
		if err != nil {
			return err
		}
		defer stop()
		c.endpoints = endpoint
		fmt.Printf("embedded etcd on %s\n", endpoint)
	}
	s := newShards(c)
	defer s.stopAll()
	fmt.Printf("each column is a shard, and shows which process holds it\n\n")
	for i := range c.processes {
		if err := s.start(fmt.Sprint(i + 1)); err != nil {
			return err
		}
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	victim := slices.Collect(maps.Keys(s.procs))[rand.IntN(c.processes)]
	if err := s.kill(victim); err != nil {
		return err
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	s.stopAll()
	return s.check()
}

// shards runs the processes and collects what they report.
type shards struct {
	config
	began  time.Time
	events chan event
	procs  map[string]*demo.Process[event]
	terms  [][]*term // by shard
	shown  string    // the last line
}

// A term is the time in which a process believed that it held a shard.
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

func (s *shards) start(name string) error {
	p, err := demo.Start(s.events, "-process", name, "-endpoints", s.endpoints, "-ttl", s.ttl.String(), "-shards", fmt.Sprint(s.shards))
	if err != nil {
		return err
	}
	s.procs[name] = p
	s.say("%s started, pid %d", name, p.PID())
	return nil
}

func (s *shards) handle(e event) {
	if e.Held {
		s.terms[e.Shard] = append(s.terms[e.Shard], &term{process: e.Process, token: e.Token, begin: e.At})
		return
	}
	for _, t := range s.terms[e.Shard] {
		if t.token == e.Token {
			t.end = e.At
		}
	}
}

// holders returns which processes hold a shard: one or none, or more if something is wrong.
func (s *shards) holders(shard int) []string {
	var names []string
	for _, t := range s.terms[shard] {
		if t.end.IsZero() {
			names = append(names, t.process)
		}
	}
	return names
}

// settle waits until every shard has one holder and no process holds more than its share.
func (s *shards) settle(ctx context.Context) error {
	timeout := time.NewTimer(3*s.ttl + 30*time.Second)
	defer timeout.Stop()
	line := time.NewTicker(200 * time.Millisecond)
	defer line.Stop()
	for !s.settled() {
		select {
		case e := <-s.events:
			s.handle(e)
		case <-line.C:
			s.print()
		case <-ctx.Done():
			return fmt.Errorf("interrupted: %w", context.Cause(ctx))
		case <-timeout.C:
			return errors.New("timed out while waiting for the shards to be shared evenly")
		}
	}
	s.print()
	s.say("every shard has a holder, and no process holds more than %d", share(s.shards, len(s.procs)))
	return nil
}

func (s *shards) settled() bool {
	held := make(map[string]int)
	for shard := range s.terms {
		names := s.holders(shard)
		if len(names) != 1 {
			return false
		}
		held[names[0]]++
	}
	for _, n := range held {
		if n > share(s.shards, len(s.procs)) {
			return false
		}
	}
	return true
}

// print prints who holds what, if that has changed.
func (s *shards) print() {
	var row strings.Builder
	held := make(map[string]int)
	for shard := range s.terms {
		names := s.holders(shard)
		switch len(names) {
		case 0:
			row.WriteString(".")
		case 1:
			row.WriteString(names[0])
			held[names[0]]++
		default:
			row.WriteString("?") // the report of the previous holder has not arrived yet
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.procs)) {
		fmt.Fprintf(&row, "  %s: %d", name, held[name])
	}
	if row.String() != s.shown {
		s.shown = row.String()
		s.say("%s", s.shown)
	}
}

// kill ends a process without a chance to resign, so its lease has to expire.
func (s *shards) kill(name string) error {
	p := s.procs[name]
	killed := time.Now()
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	s.say("%s gets SIGKILL", name)
	p.Reap(s.handle)
	delete(s.procs, name)
	for _, terms := range s.terms {
		for _, t := range terms {
			if t.process == name && t.end.IsZero() {
				t.end = killed
			}
		}
	}
	return nil
}

// stopAll ends the processes.
func (s *shards) stopAll() {
	for _, p := range s.procs {
		p.Stop()
	}
	for name, p := range s.procs {
		p.Reap(s.handle)
		delete(s.procs, name)
	}
}

// check checks that no shard had two holders at a time.
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

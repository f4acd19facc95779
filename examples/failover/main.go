//go:build unix

// Failover shows three workers, at most one of which leads at a time. Their leader is ended in four ways: it is asked to
// stop; it is killed; it is paused, so that it does not know that it was replaced; and, on Linux, it is killed while
// somebody waits beside it to reclaim its lease.
//
//	go run ./examples/failover
//
// It starts an etcd of its own in this process, unless -endpoints names another. The workers are processes. At the end
// it checks that no two terms overlapped and that no increment was lost. If one of these does not hold, it exits with
// status 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"example.com/leader"
	"example.com/leader/examples/internal/demo"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func main() {
	endpoints := flag.String("endpoints", "", "etcd `host:port,…`; if empty, starts an etcd of its own")
	ttl := flag.Duration("ttl", 3*time.Second, "time to live of the leader's lease, 1s to 1m")
	workers := flag.Int("workers", 3, "`number` of workers, 2 to 9")
	name := flag.String("worker", "", "run as the worker of this `name`; the demonstration starts its workers with it")
	leaseFile := flag.String("lease-file", "", "the worker's lease `file`")
	flag.Parse()

	var err error
	switch {
	case flag.NArg() > 0:
		err = fmt.Errorf("%q: takes flags only", flag.Arg(0))
	case *ttl < time.Second || *ttl > time.Minute:
		err = fmt.Errorf("-ttl %v: must be 1s to 1m", *ttl)
	case *workers < 2 || *workers > 9:
		err = fmt.Errorf("-workers %d: must be 2 to 9", *workers)
	case *name != "":
		err = worker(*name, *endpoints, *leaseFile, *ttl)
	default:
		ctx, stop := demo.Interruptible()
		err = demonstrate(ctx, *endpoints, *ttl, *workers)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "failover:", err)
		os.Exit(1)
	}
}

func demonstrate(ctx context.Context, endpoints string, ttl time.Duration, workers int) (err error) {
	if endpoints == "" {
		endpoint, stop, err := demo.StartEtcd("", demo.AnyPort)
		if err != nil {
			return err
		}
		defer stop()
		endpoints = endpoint
		fmt.Printf("embedded etcd on %s\n", endpoints)
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            strings.Split(endpoints, ","),
		DialKeepAliveTime:    10 * time.Second, // finds a connection that died without a sign; TCP may take 15 minutes
		DialKeepAliveTimeout: 2 * time.Second,
		Logger:               zap.NewNop(),
	})
	if err != nil {
		return err
	}
	defer client.Close()
	if err := clean(ctx, client); err != nil {
		return fmt.Errorf("reach etcd: %w", err)
	}

	dir, err := os.MkdirTemp("", "failover")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	d := &failover{
		began: time.Now(), client: client, dir: dir, endpoints: endpoints, ttl: ttl,
		procs: make(map[string]proc), events: make(chan event), acks: make(map[int64]int64),
	}
	defer d.stopAll()
	for i := range workers {
		if err := d.start(fmt.Sprintf("w%d", i+1)); err != nil {
			return err
		}
	}
	if err := d.play(ctx); err != nil {
		return err
	}
	d.stopAll()
	d.print()
	return errors.Join(d.checkTerms(), d.checkCounter(ctx, client))
}

// clean removes what an earlier run has left in an etcd that the demonstration did not start.
func clean(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err := client.Delete(ctx, "failover/", clientv3.WithPrefix())
	return err
}

// A failover runs the workers and collects what they report.
type failover struct {
	began     time.Time
	client    *clientv3.Client
	dir       string // of the lease files
	endpoints string
	ttl       time.Duration
	procs     map[string]proc
	events    chan event

	terms    []*term
	acks     map[int64]int64 // increment to token
	handoffs []handoff
	spans    []span
	findings []error
}

// A proc is a worker process.
type proc struct {
	*demo.Process[event]
	begin time.Time
}

// A term is the time in which a worker believed that it led.
type term struct {
	worker     string
	token      int64
	begin, end time.Time // end is zero while it lasts
}

// A span is a time in which a worker lived, or was paused.
type span struct {
	worker     string
	begin, end time.Time
	paused     bool
}

type handoff struct {
	what     string
	from, to *term
}

func (d *failover) say(format string, args ...any) {
	fmt.Printf("%7.3fs  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *failover) start(name string) error {
	p, err := demo.Start(d.events, "-worker", name, "-endpoints", d.endpoints, "-ttl", d.ttl.String(), "-lease-file", d.leaseFile(name))
	if err != nil {
		return err
	}
	d.procs[name] = proc{p, time.Now()}
	d.say("%s  started, pid %d", name, p.PID())
	return nil
}

func (d *failover) leaseFile(worker string) string { return filepath.Join(d.dir, worker) }

// wait handles events until it has handled the one that is wanted.
func (d *failover) wait(ctx context.Context, what string, wanted func(event) bool) error {
	timeout := time.NewTimer(3*d.ttl + 15*time.Second)
	defer timeout.Stop()
	for {
		select {
		case e := <-d.events:
			d.handle(e)
			if wanted(e) {
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("interrupted while waiting for %s", what)
		case <-timeout.C:
			return fmt.Errorf("timed out while waiting for %s", what)
		}
	}
}

func (d *failover) leader() *term { return d.terms[len(d.terms)-1] }

func (d *failover) handle(e event) {
	switch e.What {
	case "elected":
		d.terms = append(d.terms, &term{worker: e.Worker, token: e.Token, begin: e.At})
		d.say("%s  elected, token %d", e.Worker, e.Token)
	case "increment":
		if other, ok := d.acks[e.N]; ok {
			d.finding("increment %d was acknowledged twice, to tokens %d and %d", e.N, other, e.Token)
		}
		d.acks[e.N] = e.Token
		if e.N%20 == 0 {
			d.say("%s  counter is %d", e.Worker, e.N)
		}
	case "stopped", "lost":
		for _, t := range d.terms {
			if t.token == e.Token && t.end.IsZero() {
				t.end = e.At
			}
		}
		if e.What == "lost" {
			why, _, _ := strings.Cut(strings.TrimPrefix(e.Cause, "leader: "), ":")
			d.say("%s  knows that token %d is over: %s", e.Worker, e.Token, why)
		} else {
			d.say("%s  has stopped its work and resigns", e.Worker)
		}
	case "refused":
		d.say("%s  its write with token %d was refused", e.Worker, e.Token)
	case "accepted":
		d.finding("a write of %s was accepted after its token %d was over", e.Worker, e.Token)
	case "failed":
		d.say("%s  a write failed: %s", e.Worker, e.Cause)
	}
}

func (d *failover) finding(format string, args ...any) {
	d.findings = append(d.findings, fmt.Errorf(format, args...))
}

func nextLeader(after *term) func(event) bool {
	return func(e event) bool { return e.What == "elected" && e.Token > after.token }
}

// increments matches the nth increment from now.
func increments(n int) func(event) bool {
	return func(e event) bool {
		if e.What == "increment" {
			n--
		}
		return n == 0
	}
}

// play is the demonstration.
func (d *failover) play(ctx context.Context) error {
	if err := d.wait(ctx, "the first leader", func(e event) bool { return e.What == "elected" }); err != nil {
		return err
	}
	type act struct {
		what string
		end  func(ctx context.Context, old *term) error
	}
	acts := []act{{"SIGTERM", d.terminate}, {"SIGKILL", d.kill}, {"SIGSTOP", d.pause}}
	if runtime.GOOS == "linux" {
		acts = append(acts, act{"SIGKILL, reclaimed", d.reclaim})
	}
	for _, act := range acts {
		if err := d.wait(ctx, "the leader's work", increments(20)); err != nil {
			return err
		}
		old := d.leader()
		fmt.Println()
		d.say("%s  gets %s", old.worker, act.what)
		if err := act.end(ctx, old); err != nil {
			return err
		}
		d.handoffs = append(d.handoffs, handoff{act.what, old, d.leader()})
	}
	fmt.Println()
	return d.wait(ctx, "the leader's work", increments(10))
}

// terminate asks the leader to stop. It resigns, and the next one leads.
func (d *failover) terminate(ctx context.Context, old *term) error {
	if err := d.signal(old.worker, syscall.SIGTERM); err != nil {
		return err
	}
	if err := d.wait(ctx, "the next leader", nextLeader(old)); err != nil {
		return err
	}
	d.reap(old.worker)
	return d.start(old.worker)
}

// kill leaves the lease to expire, since the process cannot resign.
func (d *failover) kill(ctx context.Context, old *term) error {
	old.end = time.Now()
	if err := d.signal(old.worker, syscall.SIGKILL); err != nil {
		return err
	}
	d.reap(old.worker)
	if err := d.wait(ctx, "the next leader", nextLeader(old)); err != nil {
		return err
	}
	return d.start(old.worker)
}

// reclaim kills the leader while a reclaimer waits beside it, as a sidecar or systemd would run it. It revokes the lease.
func (d *failover) reclaim(ctx context.Context, old *term) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	reclaimed := make(chan error, 1)
	go func() { reclaimed <- leader.Reclaim(ctx, d.client, d.leaseFile(old.worker)) }()
	err := d.kill(ctx, old)
	if err != nil {
		cancel()
	}
	return errors.Join(err, <-reclaimed)
}

// pause stops the leader until another one leads, and then resumes it.
func (d *failover) pause(ctx context.Context, old *term) error {
	if err := d.signal(old.worker, syscall.SIGSTOP); err != nil {
		return err
	}
	// A stopped process believes nothing. When it resumes, it makes one late write, which must be refused. checkCounter
	// would find any other.
	old.end = time.Now()
	if err := d.wait(ctx, "the next leader", nextLeader(old)); err != nil {
		return err
	}
	if err := d.wait(ctx, "the leader's work", increments(10)); err != nil {
		return err
	}
	d.say("%s  gets SIGCONT", old.worker)
	d.spans = append(d.spans, span{old.worker, old.end, time.Now(), true})
	if err := d.signal(old.worker, syscall.SIGCONT); err != nil {
		return err
	}
	resumed := time.Now()
	return d.wait(ctx, "the stale leader's write", func(e event) bool {
		if e.What == "lost" && e.Token == old.token && e.At.Sub(resumed) > d.ttl/4 {
			d.finding("%s took %v to learn that its term is over", e.Worker, e.At.Sub(resumed))
		}
		return e.Token == old.token && (e.What == "refused" || e.What == "accepted")
	})
}

func (d *failover) signal(name string, sig os.Signal) error {
	return d.procs[name].Signal(sig)
}

// reap waits for a process that was told to end, and handles what it still reports.
func (d *failover) reap(name string) {
	p := d.procs[name]
	p.Reap(d.handle)
	d.spans = append(d.spans, span{name, p.begin, time.Now(), false})
	delete(d.procs, name)
}

// stopAll ends the workers.
func (d *failover) stopAll() {
	for _, p := range d.procs {
		p.Stop()
	}
	for name := range d.procs {
		d.reap(name)
	}
}

// checkTerms checks that tokens grow, and that no two workers believed at the same time that they led.
func (d *failover) checkTerms() error {
	errs := d.findings
	for i, t := range d.terms {
		if t.end.IsZero() {
			errs = append(errs, fmt.Errorf("the term of %s, token %d, has not ended", t.worker, t.token))
		}
		if i == 0 {
			continue
		}
		before := d.terms[i-1]
		if t.token <= before.token {
			errs = append(errs, fmt.Errorf("token %d came after token %d", t.token, before.token))
		}
		if t.begin.Before(before.end) {
			errs = append(errs, fmt.Errorf("terms overlap by %v: %s, token %d, and %s, token %d",
				before.end.Sub(t.begin), before.worker, before.token, t.worker, t.token))
		}
	}
	if errs == nil {
		fmt.Printf("\n%d terms: no two overlap, and tokens grow.\n", len(d.terms))
	}
	return errors.Join(errs...)
}

// checkCounter checks that every acknowledged increment is in etcd exactly once, and that the tokens of the increments
// never decrease.
func (d *failover) checkCounter(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	counter, err := client.Get(ctx, counterKey)
	if err != nil {
		return err
	}
	notes, err := client.Get(ctx, journal, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	var errs []error
	if len(counter.Kvs) == 0 || string(counter.Kvs[0].Value) != strconv.Itoa(len(notes.Kvs)) {
		errs = append(errs, fmt.Errorf("the counter is not the number of increments, %d", len(notes.Kvs)))
	}
	tokens := make(map[int64]int64)
	var last int64
	for i, kv := range notes.Kvs {
		token, err := strconv.ParseInt(string(kv.Value), 10, 64)
		if n := int64(i + 1); err != nil || string(kv.Key) != journalKey(n) || token < last {
			errs = append(errs, fmt.Errorf("increment %d is recorded as %q = %q after token %d", n, kv.Key, kv.Value, last))
		} else {
			tokens[n], last = token, token
		}
	}
	for n, token := range d.acks {
		if tokens[n] != token {
			errs = append(errs, fmt.Errorf("increment %d of token %d is lost", n, token))
		}
	}
	if errs == nil {
		fmt.Printf("%d increments acknowledged, none lost.\n", len(d.acks))
	}
	return errors.Join(errs...)
}

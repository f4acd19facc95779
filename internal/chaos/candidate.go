//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// A worker is the configuration of a process that takes part in elections.
type worker struct {
	Name, Dir      string
	Seed           uint64
	TTL, Margin    time.Duration
	Endpoints      []string
	Watches        string // the endpoint for watches, if it is a separate one
	User, Password string
	Resource       string   // unix socket
	Ill            string   // file that says what the process suffers from
	File           string   // lease file, or "" for none; for an election in Own see fileOf
	Shared         []string // elections to lead over one Elector
	Own            []string // elections to lead with a lease for each term
	Stock          []string // elections for concurrency.Election
	Observe        []string // elections to observe
	Ask            []string // elections for Current and Candidates, and in which to evict leaders
	Changes        bool     // use the hook LeaderChanged
}

// A candidate takes part in elections, in a process of its own.
type candidate struct {
	worker
	*Recorder
	client   *clientv3.Client
	http     http.Client
	impulses *impulses
	seq      atomic.Int64 // makes values unique
	samplers sync.WaitGroup
}

// run takes part in elections until ctx ends, and checks that nothing is left behind then.
func (w worker) run(ctx context.Context) error {
	r, err := newRecorder(w.Dir, w.Name)
	if err != nil {
		return err
	}
	client := w.dial(ctx, r, w.Endpoints)
	if client == nil {
		return nil // it has not taken part in anything
	}
	watches := client
	if w.Watches != "" {
		// The library ends the backoff of its own client's connections. It does not know this client.
		params := grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: requestTimeout}
		params.Backoff.MaxDelay = 500 * time.Millisecond
		if watches = w.dial(ctx, r, []string{w.Watches}, grpc.WithConnectParams(params)); watches == nil {
			client.Close()
			return nil
		}
		client.Watcher = watches.Watcher
	}
	c := &candidate{worker: w, Recorder: r, client: client, impulses: newImpulses()}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", w.Resource)
	}}
	c.http = http.Client{Transport: transport, Timeout: requestTimeout}

	alive := make(chan struct{})
	var beside, wg sync.WaitGroup
	beside.Go(func() { c.noticeStops(alive) })
	ctx, leave := c.leaving(ctx)
	defer leave()
	wg.Go(func() { c.share(ctx) })
	for i, name := range w.Own {
		wg.Go(func() { c.lead(ctx, c.own(name), root+name, w.rand(i+10)) })
	}
	for i, name := range w.Stock {
		wg.Go(func() { c.stock(ctx, name, w.rand(i+20)) })
	}
	wg.Wait()
	close(alive)
	beside.Wait()
	if len(w.Stock) > 0 {
		return nil // what stock leaves behind is not checked
	}
	c.samplers.Wait()
	c.impulses.close()
	for _, client := range slices.Compact([]*clientv3.Client{client, watches}) {
		if err := client.Close(); err != nil && !errors.Is(err, context.Canceled) {
			c.fail("close the client: %v", err)
		}
	}
	transport.CloseIdleConnections()
	if err := goleak.Find(); err != nil {
		c.fail("goroutines are left: %v", err)
	}
	return nil
}

// dial makes the client, or returns nil when ctx ends. r records which leases the client is granted and which it revokes.
// A client with a user authenticates at once, so it cannot be made while etcd does not answer.
func (w worker) dial(ctx context.Context, r *Recorder, endpoints []string, opts ...grpc.DialOption) *clientv3.Client {
	for {
		client, err := clientv3.New(clientv3.Config{
			Endpoints: endpoints, Username: w.User, Password: w.Password, Logger: zap.NewNop(),
			DialTimeout: requestTimeout, // of the authentication
			DialOptions: append(opts, grpc.WithChainUnaryInterceptor(r.intercept)),
		})
		if err == nil {
			return client
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
}

func (w worker) rand(n int) *rand.Rand { return rand.New(rand.NewPCG(w.Seed, uint64(n))) }

func (c *candidate) fail(format string, args ...any) {
	c.add(oracle.Entry{Kind: oracle.Failure, Err: fmt.Sprintf(format, args...)})
}

// leaving returns a context that ends with ctx, but only after it is recorded that all campaigns are now given up.
func (c *candidate) leaving(ctx context.Context) (_ context.Context, leave func()) {
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		c.add(oracle.Entry{Kind: oracle.GivingUp})
		cancel()
	})
	return inner, func() { stop(); cancel() }
}

// noticeStops records the times in which the process did not run.
func (c *candidate) noticeStops(alive <-chan struct{}) {
	ticker := time.NewTicker(oracle.PauseOf / 5)
	defer ticker.Stop()
	for last := now(); ; {
		select {
		case <-ticker.C:
		case <-alive:
			return
		}
		t := now()
		if t-last > int64(oracle.PauseOf) {
			c.add(oracle.Entry{T: t, From: last, Kind: oracle.Stopped})
		}
		last = t
	}
}

// options returns the options of an Elector, with this lease file if the process has lease files.
func (c *candidate) options(file string) []leader.Option {
	hooks := leader.Hooks{
		Campaigning: func(election string) { c.add(oracle.Entry{Kind: oracle.Campaigning, Election: election}) },
		CampaignFailed: func(election string, err error) {
			c.add(oracle.Entry{Kind: oracle.CampaignFailed, Election: election, Op: failureOf(err), Err: err.Error()})
		},
		Elected: func(election string, l *leader.Leader, _ time.Duration) {
			c.add(oracle.Entry{Kind: oracle.Elected, Election: election, Token: l.Token()})
		},
		Ended: func(election string, l *leader.Leader, cause error) {
			c.add(oracle.Entry{
				Kind: oracle.Ended, Election: election, Token: l.Token(), Op: causeOf(cause), Err: cause.Error(),
				Until: onClock(l.Deadline()),
			})
		},
		Overdue: func(election string, l *leader.Leader, late time.Duration) {
			e := oracle.Entry{T: now(), Kind: oracle.Overdue, Election: election, Token: l.Token()}
			if late > 0 {
				e.From = e.T - int64(late)
			}
			c.add(e)
		},
		Renewed: func(id clientv3.LeaseID, took time.Duration, deadline time.Time) {
			at := now()
			c.add(oracle.Entry{T: at, From: at - int64(took), Kind: oracle.Renewed, Lease: int64(id), Until: onClock(deadline)})
		},
		RenewFailed: func(id clientv3.LeaseID, _ time.Duration, err error) {
			if errors.Is(err, leader.ErrRefused) {
				c.add(oracle.Entry{Kind: oracle.Refused, Lease: int64(id)})
			}
		},
	}
	if c.Changes {
		hooks.LeaderChanged = func(election string, leads leader.Candidate) {
			c.add(asEntry(leads, oracle.Entry{Kind: oracle.Changed, Election: election}))
		}
	}
	options := []leader.Option{
		leader.WithTTL(c.TTL), leader.WithMargin(c.Margin), leader.WithHooks(hooks), leader.WithHealth(c.check),
		leader.WithLogger(slog.New(slog.NewTextHandler(os.Stderr, nil))),
	}
	if c.File != "" {
		options = append(options, leader.WithLeaseFile(file))
	}
	return options
}

// What a process suffers from.
const (
	fails  = "fails"  // its checks of health fail
	stalls = "stalls" // its work hangs, and so ignores the end of its context
	hangs  = "hangs"  // both hang
)

// ailment returns what the process suffers from, or "".
func (c *candidate) ailment() string {
	ill, _ := os.ReadFile(c.Ill) // it is not there while the process is well
	return string(ill)
}

// hang blocks for as long as the process suffers from one of these.
func (c *candidate) hang(ills ...string) {
	for slices.Contains(ills, c.ailment()) {
		time.Sleep(10 * time.Millisecond)
	}
}

// check is the check of WithHealth.
func (c *candidate) check(ctx context.Context, election string) error {
	e := oracle.Entry{Kind: oracle.Checked, From: now(), Election: election, Result: oracle.OK}
	c.hang(hangs)
	err := ctx.Err()
	if c.ailment() == fails {
		err = errors.New("ill")
	}
	if err != nil {
		e.Result, e.Err = oracle.Failed, err.Error()
	}
	c.add(e)
	return err
}

// onClock converts a time to the clock of the history. It reads both clocks at almost the same moment.
func onClock(t time.Time) int64 {
	for {
		before := now()
		left := time.Until(t)
		if now()-before < int64(time.Millisecond) {
			return before + int64(left)
		}
	}
}

// asEntry adds to an entry who leads.
func asEntry(leads leader.Candidate, e oracle.Entry) oracle.Entry {
	e.Token, e.Key, e.Value, e.Lease = leads.Token, leads.Key, leads.Value, int64(leads.Lease)
	return e
}

// causeOf returns the cause of a term's end that err matches, or "".
func causeOf(err error) string {
	switch {
	case errors.Is(err, leader.ErrUnhealthy): // it may wrap another
		return oracle.Unhealthy
	case errors.Is(err, leader.ErrTransferred):
		return oracle.Transferred
	case errors.Is(err, leader.ErrResigned):
		return oracle.Resigned
	case errors.Is(err, leader.ErrExpired):
		return oracle.Expired
	case errors.Is(err, leader.ErrEvicted):
		return oracle.Evicted
	}
	return ""
}

// failureOf returns the failure of a campaign that err matches, or "".
func failureOf(err error) string {
	switch {
	case errors.Is(err, leader.ErrHeld):
		return oracle.Held
	case errors.Is(err, leader.ErrClosed):
		return oracle.Shut
	case errors.Is(err, context.Canceled):
		return oracle.GaveUp
	case errors.Is(err, leader.ErrUnhealthy):
		return oracle.Unhealthy
	}
	return ""
}

// share takes part in elections over one Elector. Now and then it closes the Elector while it is in use.
func (c *candidate) share(ctx context.Context) {
	r := c.rand(0)
	for life := 0; ctx.Err() == nil; life++ {
		e, err := leader.New(c.client, append(c.options(c.File), leader.WithPrefix(root))...)
		if err != nil {
			c.fail("New: %v", err)
			return
		}
		var wg sync.WaitGroup
		for i, name := range c.Shared {
			wg.Go(func() { c.lead(ctx, c.over(e, name), root+name, c.rand(100*life+30+i)) })
		}
		for _, name := range c.Observe {
			wg.Go(func() { c.observe(ctx, e, name) })
		}
		for i, name := range c.Ask {
			wg.Go(func() { c.ask(ctx, e, name, c.rand(100*life+60+i)) })
		}
		if len(c.Shared) == 0 {
			wg.Wait() // an observer stays until the end, when all others have left
		} else {
			sleep(ctx, r, 3*c.TTL, 12*c.TTL)
			c.hang(stalls, hangs) // as the work does
		}
		c.close(ctx, e)
		wg.Wait()
	}
}

// close closes an Elector. What it cannot revoke expires.
func (c *candidate) close(ctx context.Context, e *leader.Elector) {
	began := now()
	for _, name := range c.Shared {
		c.add(oracle.Entry{Kind: oracle.Closing, Election: root + name})
	}
	cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	err := e.Close(cctx)
	if err != nil && (ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded)) {
		c.fail("Close: %v", err)
	}
	for _, name := range c.Shared {
		closed := oracle.Entry{Kind: oracle.Closed, From: began, Election: root + name, Result: oracle.OK}
		if err != nil {
			closed.Result, closed.Err = oracle.Unknown, err.Error()
		}
		c.add(closed)
	}
}

// ways are the calls by which a candidate leads an election.
type ways struct {
	run       func(ctx context.Context, lead func(context.Context, *leader.Leader) error) error
	campaigns []func(ctx context.Context) (*leader.Leader, error)
	closable  bool // the calls end when their Elector is closed
}

// over returns the ways of an Elector.
func (c *candidate) over(e *leader.Elector, name string) ways {
	return ways{
		run: func(ctx context.Context, lead func(context.Context, *leader.Leader) error) error {
			return e.Run(ctx, name, c.Name, lead)
		},
		campaigns: []func(context.Context) (*leader.Leader, error){
			func(ctx context.Context) (*leader.Leader, error) { return e.Campaign(ctx, name, c.Name) },
			func(ctx context.Context) (*leader.Leader, error) {
				tried := oracle.Entry{Kind: oracle.Tried, From: now(), Election: root + name}
				defer func() { c.add(tried) }()
				return e.TryCampaign(ctx, name, c.Name)
			},
		},
		closable: true,
	}
}

// own returns the ways that take a lease for each term, or for each Run.
func (c *candidate) own(name string) ways {
	election, file := root+name, c.fileOf(name)
	return ways{
		run: func(ctx context.Context, lead func(context.Context, *leader.Leader) error) error {
			return leader.Run(ctx, c.client, election, c.Name, lead, c.options(file)...)
		},
		campaigns: []func(context.Context) (*leader.Leader, error){func(ctx context.Context) (*leader.Leader, error) {
			return leader.Campaign(ctx, c.client, election, c.Name, c.options(file)...)
		}},
	}
}

// lead leads again and again, in all ways, until ctx ends or the Elector is closed.
func (c *candidate) lead(ctx context.Context, by ways, election string, r *rand.Rand) {
	for ctx.Err() == nil {
		began := now()
		campaigning, stop, cancel := c.campaigning(ctx, election, r)
		var err error
		if n := r.IntN(2 * len(by.campaigns)); n < len(by.campaigns) {
			var l *leader.Leader
			if l, err = by.campaigns[n](campaigning); err == nil {
				stop()
				c.hold(ctx, l, election, began, r)
			}
		} else {
			err = by.run(campaigning, func(ctx context.Context, l *leader.Leader) error {
				stop()
				c.term(ctx, l, true, election, began, r)
				began = now() // the beginning of the next campaign, after a lost term
				return nil
			})
		}
		cancel()
		why := failureOf(err)
		switch {
		case why == oracle.Shut && by.closable:
			return
		case err != nil && why != oracle.GaveUp && why != oracle.Held && why != oracle.Unhealthy:
			c.fail("campaign in %s: %v", election, err)
			return
		}
		if why == oracle.Unhealthy || election != root+again && r.IntN(2) == 0 {
			sleep(ctx, r, 0, 300*time.Millisecond)
		}
	}
}

// campaigning returns the context of a campaign. The context may end before the candidate is elected, which gives the
// campaign up. After stop it ends only with ctx or by cancel.
func (c *candidate) campaigning(ctx context.Context, election string, r *rand.Rand) (_ context.Context, stop, cancel func()) {
	campaigning, end := context.WithCancel(ctx)
	patience := time.Hour // as long as it takes
	switch {
	case election == root+again && r.IntN(4) != 0:
		patience = between(r, 50*time.Millisecond, 500*time.Millisecond)
	case r.IntN(4) == 0:
		patience = between(r, 0, c.TTL/2)
	}
	var once sync.Once
	giveUp := func() {
		once.Do(func() {
			c.add(oracle.Entry{Kind: oracle.GivingUp, Election: election})
			end()
		})
	}
	timer := time.AfterFunc(patience, giveUp)
	stopImpulse := context.AfterFunc(c.impulses.next(), giveUp)
	stop = func() {
		timer.Stop()
		stopImpulse()
		once.Do(func() {})
	}
	return campaigning, stop, func() { stop(); end() }
}

// giveUp is the signal that makes a worker give up all its campaigns. By default it does not end a process, so a worker
// that does not handle it yet survives.
const giveUp = syscall.SIGWINCH

// impulses returns contexts that end with the next giveUp.
type impulses struct {
	signals chan os.Signal
	done    chan struct{}

	mu     sync.Mutex
	ctx    context.Context // ends with the next signal
	cancel context.CancelFunc
}

func newImpulses() *impulses {
	i := &impulses{signals: make(chan os.Signal, 1), done: make(chan struct{})}
	i.ctx, i.cancel = context.WithCancel(context.Background())
	signal.Notify(i.signals, giveUp)
	go func() {
		defer close(i.done)
		for range i.signals {
			i.mu.Lock()
			i.cancel()
			i.ctx, i.cancel = context.WithCancel(context.Background())
			i.mu.Unlock()
		}
	}()
	return i
}

// next returns a context that ends with the next giveUp.
func (i *impulses) next() context.Context {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.ctx
}

func (i *impulses) close() {
	signal.Stop(i.signals)
	close(i.signals)
	<-i.done
	i.cancel()
}

// hold keeps a term for a while, and resigns.
func (c *candidate) hold(ctx context.Context, l *leader.Leader, election string, began int64, r *rand.Rand) {
	tctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(l.Context(), cancel)
	c.term(tctx, l, false, election, began, r)
	stop()
	cancel()
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	_ = l.Resign(rctx) // fails if etcd cannot be reached; the key then goes with the lease
}

// term records a term and works in it until ctx ends, or the term has lasted long enough. If Run has called, ctx is the
// context of Run. The caller resigns.
func (c *candidate) term(ctx context.Context, l *leader.Leader, run bool, election string, began int64, r *rand.Rand) {
	_, id, _ := strings.Cut(strings.TrimPrefix(l.Key(), election), "/")
	lease, err := strconv.ParseInt(id, 16, 64)
	if err != nil {
		c.fail("key %q of a term of %s", l.Key(), election)
	}
	c.add(oracle.Entry{
		Kind: oracle.Term, From: began, Election: election, Token: l.Token(), Key: l.Key(), Lease: lease,
		Until: onClock(l.Deadline()), Op: oracle.Ours, Value: map[bool]string{true: oracle.ByRun}[run],
	})
	// Ask only one of them, because IsLeader itself ends the contexts.
	op, believes := oracle.ByIsLeader, l.IsLeader
	switch n := r.IntN(4); {
	case n == 0:
		op, believes = oracle.ByContext, func() bool { return l.Context().Err() == nil }
	case n == 1 && run:
		leading := ctx
		op, believes = oracle.ByRun, func() bool { return leading.Err() == nil }
	}
	c.samplers.Go(func() { c.sample(oracle.Entry{Election: election, Token: l.Token(), Op: op}, believes) })
	length := between(r, 300*time.Millisecond, 3*time.Second)
	switch {
	case election == root+again:
		length = between(r, 50*time.Millisecond, 600*time.Millisecond)
	case r.IntN(2) == 0:
		length = between(r, c.TTL, 5*c.TTL) // long enough to be lost to a fault
	}
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	w := &work{candidate: c, election: election, token: l.Token(), guard: l.Guard(), rand: r, proclaim: func(string) {}}
	c.samplers.Go(func() { w.read(context.WithoutCancel(ctx), "register") }) // shows who was in the queue at first
	// Some never ask etcd whether they lead. Only their own watch can then tell them that the key is gone.
	if r.IntN(2) == 0 {
		w.proclaim = func(value string) {
			pctx, cancel := context.WithTimeout(ctx, requestTimeout)
			defer cancel()
			e := oracle.Entry{Kind: oracle.Proclaimed, From: now(), Election: election, Token: l.Token(), Value: value, Result: oracle.OK}
			if err := l.Proclaim(pctx, value); err != nil {
				e.Result, e.Err = oracle.Unknown, err.Error()
				if errors.Is(err, leader.ErrNotLeader) && l.Context().Err() == nil {
					c.fail("Proclaim in %s: %v, while the term holds", election, err)
				}
			}
			c.add(e)
		}
	}
	w.do(ctx)
	c.add(oracle.Entry{Kind: oracle.Resigning, Election: election, Token: l.Token()})
}

// sampleEvery is how often a leader asks whether it leads, and pieceEvery how often it records the answers.
const (
	sampleEvery = time.Millisecond
	pieceEvery  = 100 * time.Millisecond
)

// sample asks believes until it returns false, and records the time in which it certainly returned true: from the first
// answer to the last question.
func (c *candidate) sample(e oracle.Entry, believes func() bool) {
	e.Kind = oracle.Belief
	var answered, asked int64 // of the current piece: the time of the first answer and of the last question
	for {
		question := now()
		yes := believes()
		answer := now()
		paused := answer-asked > int64(oracle.PauseOf) // between the last two questions, or during the last one
		if answered != 0 && (!yes || paused || question-answered > int64(pieceEvery)) {
			e.From, e.T = answered, asked
			c.add(e)
			if answered = asked; paused {
				answered = 0
			}
		}
		if !yes {
			return
		}
		if answered == 0 {
			answered = answer
		}
		asked = question
		time.Sleep(sampleEvery)
	}
}

// requestTimeout bounds a request of a worker. A request can outlive its term. Guard and token are there for such late
// workers.
const requestTimeout = 2 * time.Second

// work is what a leader does, whether it leads by this package or by stock.
type work struct {
	*candidate
	election string
	token    int64
	guard    clientv3.Cmp
	rand     *rand.Rand
	proclaim func(string)
}

// do works until ctx ends. After a write without an answer it writes no more: that write may still arrive, and only the
// end of the term guarantees that it does not arrive in the middle of the next one.
func (w *work) do(ctx context.Context) {
	writes := w.rand.IntN(4) != 0 // who sends etcd no request believes the longest
	for ctx.Err() == nil {
		w.hang(stalls, hangs)
		switch n := w.rand.IntN(8); {
		case n == 0:
			w.append(ctx)
		case !writes:
		case n == 1:
			w.proclaim(w.Name + "/" + w.value())
		case n < 5:
			writes = w.write(ctx, "counter")
		default:
			writes = w.write(ctx, "register")
		}
		sleep(ctx, w.rand, time.Millisecond, 10*time.Millisecond)
	}
}

// value returns a value that nobody writes twice.
func (w *work) value() string { return fmt.Sprintf("%d:%d", w.token, w.seq.Add(1)) }

// write replaces a value in etcd by one that follows from it. The transaction of the counter also compares that nobody
// has written meanwhile. That of the register relies on the guard alone. write reports whether there was an answer.
func (w *work) write(ctx context.Context, what string) bool {
	key := data.DataKey(w.election, what)
	base, rev, ok := w.read(ctx, what)
	if !ok {
		return true
	}
	var n int64
	if base != "" {
		first, _, _ := strings.Cut(base, " ")
		var err error
		if n, err = strconv.ParseInt(first, 10, 64); err != nil {
			w.fail("value %q of %q", base, key)
			return false
		}
	}
	guards := []clientv3.Cmp{w.guard}
	if what == "counter" {
		guards = append(guards, clientv3.Compare(clientv3.ModRevision(key), "=", rev))
	}
	think := between(w.rand, 2*time.Millisecond, 20*time.Millisecond)
	time.Sleep(think)

	e := oracle.Entry{
		Kind: oracle.Write, Election: w.election, Token: w.token, Op: what,
		Base: base, Value: fmt.Sprintf("%d %s", n+1, w.value()),
	}
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	e.From = now()
	txn, err := w.client.Txn(wctx).If(guards...).Then(clientv3.OpPut(key, e.Value)).Commit()
	e.T = now()
	switch {
	case err != nil:
		e.Result, e.Err = oracle.Unknown, err.Error()
	case txn.Succeeded:
		e.Result, e.Rev = oracle.OK, txn.Header.Revision
	default:
		e.Result = oracle.Failed
	}
	w.add(e)
	return e.Result != oracle.Unknown
}

// read reads a value in etcd. rev is the revision of its last change.
func (w *work) read(ctx context.Context, what string) (value string, rev int64, ok bool) {
	e := oracle.Entry{Kind: oracle.Read, From: now(), Election: w.election, Token: w.token, Op: what}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := w.client.Get(ctx, data.DataKey(w.election, what))
	if err != nil {
		return "", 0, false
	}
	e.T, e.Rev = now(), resp.Header.Revision
	if len(resp.Kvs) > 0 {
		value, rev = string(resp.Kvs[0].Value), resp.Kvs[0].ModRevision
	}
	e.Value = value
	w.add(e)
	return value, rev, true
}

// append writes to the resource outside etcd, which knows only the token.
func (w *work) append(ctx context.Context) {
	e := oracle.Entry{Kind: oracle.Append, From: now(), Election: w.election, Token: w.token, Value: w.value()}
	form := url.Values{"election": {e.Election}, "token": {strconv.FormatInt(e.Token, 10)}, "value": {e.Value}}
	req, err := http.NewRequestWithContext(context.WithoutCancel(ctx), http.MethodPost, "http://resource/", strings.NewReader(form.Encode()))
	if err != nil {
		w.fail("append: %v", err)
		return
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := w.http.Do(req)
	e.T = now()
	switch {
	case err != nil:
		e.Result, e.Err = oracle.Unknown, err.Error()
	case resp.StatusCode == http.StatusOK:
		e.Result = oracle.OK
	case resp.StatusCode == http.StatusConflict:
		e.Result = oracle.Failed
	default:
		w.fail("append: %s", resp.Status)
	}
	if err == nil {
		resp.Body.Close() //nolint:errcheck // there is nothing in it
	}
	w.add(e)
}

// observe records who leads, until ctx ends or the Elector is closed.
func (c *candidate) observe(ctx context.Context, e *leader.Elector, name string) {
	call := oracle.Entry{Election: root + name, Op: strconv.FormatInt(now(), 10)}
	tell := func(kind oracle.Kind, e oracle.Entry) {
		e.Kind = kind
		c.add(e)
	}
	tell(oracle.Observing, call)
	for leads, err := range e.Observe(ctx, name) {
		if err != nil {
			call.Err = err.Error()
			if ctx.Err() == nil && !errors.Is(err, leader.ErrClosed) {
				c.fail("Observe of %s: %v", name, err)
			}
			continue
		}
		tell(oracle.Observed, asEntry(leads, call))
	}
	tell(oracle.ObserveEnded, call)
}

// ask asks who leads and who waits, and now and then evicts a leader.
func (c *candidate) ask(ctx context.Context, e *leader.Elector, name string, r *rand.Rand) {
	for ctx.Err() == nil {
		current := oracle.Entry{Kind: oracle.Current, From: now(), Election: root + name}
		leads, err := e.Current(ctx, name)
		if !errors.Is(err, leader.ErrNoLeader) {
			c.answered(ctx, asEntry(leads, current), err)
		} else {
			c.answered(ctx, current, nil)
		}
		candidates := oracle.Entry{Kind: oracle.Candidates, From: now(), Election: root + name}
		all, err := e.Candidates(ctx, name)
		var tokens []string
		for _, candidate := range all {
			tokens = append(tokens, strconv.FormatInt(candidate.Token, 10))
		}
		candidates.Value = strings.Join(tokens, " ")
		c.answered(ctx, candidates, err)
		if name != again && r.IntN(200) == 0 {
			c.evict(ctx, e, name, leads)
		}
		sleep(ctx, r, 100*time.Millisecond, 500*time.Millisecond)
	}
}

// answered records an answer, unless the call ended with ctx.
func (c *candidate) answered(ctx context.Context, e oracle.Entry, err error) {
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return
	default:
		e.Err = err.Error()
	}
	c.add(e)
}

// evict deletes the key of whoever leads, as an operator does. before is who led a moment ago.
func (c *candidate) evict(ctx context.Context, e *leader.Elector, name string, before leader.Candidate) {
	taken := oracle.Entry{Kind: oracle.Taken, Op: oracle.Evict, From: now(), Election: root + name, Token: before.Token, Result: oracle.OK}
	err := e.Evict(ctx, name)
	taken.T = now()
	switch {
	case err == nil:
		rctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		if resp, err := c.client.Get(rctx, root); err == nil {
			taken.Rev = resp.Header.Revision
		}
	case errors.Is(err, leader.ErrNoLeader):
		taken.Result = oracle.Failed
	default:
		taken.Result, taken.Err = oracle.Unknown, err.Error()
	}
	c.add(taken)
}

// stock is a candidate by concurrency.Election, used as its documentation says.
func (c *candidate) stock(ctx context.Context, name string, r *rand.Rand) {
	for ctx.Err() == nil {
		c.stockTerm(ctx, root+name, r)
		sleep(ctx, r, 100*time.Millisecond, 500*time.Millisecond)
	}
}

func (c *candidate) stockTerm(ctx context.Context, election string, r *rand.Rand) {
	lease, err := c.client.Grant(ctx, int64(c.TTL/time.Second))
	if err != nil {
		return
	}
	s, err := concurrency.NewSession(c.client, concurrency.WithLease(lease.ID))
	if err != nil {
		return
	}
	defer s.Close() //nolint:errcheck // if it fails, the lease expires, because nobody renews it any more
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // a candidate without a lease must give up
		select {
		case <-s.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	began := now()
	e := concurrency.NewElection(s, election)
	if e.Campaign(ctx, c.Name) != nil {
		return
	}
	c.add(oracle.Entry{Kind: oracle.Term, From: began, Election: election, Token: e.Rev(), Key: e.Key(), Lease: int64(s.Lease()), Op: "stock"})
	believes, stop := context.WithCancel(ctx)
	var sampler sync.WaitGroup
	sampler.Go(func() {
		c.sample(oracle.Entry{Election: election, Token: e.Rev(), Op: "stock"}, func() bool { return believes.Err() == nil })
	})
	tctx, done := context.WithTimeout(ctx, between(r, 300*time.Millisecond, 2*time.Second))
	defer done()
	w := &work{
		candidate: c, election: election, token: e.Rev(), rand: r, proclaim: func(string) {},
		guard: clientv3.Compare(clientv3.CreateRevision(e.Key()), "=", e.Rev()),
	}
	w.do(tctx)
	stop()
	sampler.Wait()
	c.add(oracle.Entry{Kind: oracle.Resigning, Election: election, Token: e.Rev()})
	rctx, end := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer end()
	_ = e.Resign(rctx) // if it fails, the key goes with the lease
}

// between returns a random time in from..to.
func between(r *rand.Rand, from, to time.Duration) time.Duration {
	return from + time.Duration(r.Int64N(int64(to-from)+1))
}

// sleep blocks for a random time in from..to, or until ctx ends.
func sleep(ctx context.Context, r *rand.Rand, from, to time.Duration) {
	select {
	case <-time.After(between(r, from, to)):
	case <-ctx.Done():
	}
}

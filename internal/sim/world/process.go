package world

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/fake"
	"example.com/leader/internal/sim/machine"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// A process is one under test: it takes part in all elections, as users' programs do, mistakes included.
type process struct {
	w      *world
	place  int
	name   string
	rng    *rand.Rand
	m      *machine.Machine
	shadow *machine.Machine // to ask what it believes
	net    *fake.Process

	ctx    context.Context // ends when the process is to end
	cancel context.CancelFunc
	ended  chan struct{}
	dead   atomic.Bool // it was killed
	left   atomic.Bool // it has left the election that it leaves

	slow      bool // its clocks are slower than the bound
	set       bool // its wall clock is set at times; such a machine is not suspended
	shares    bool // one Elector for all elections
	restless  bool // it holds no term for long, and is back at once
	slowHooks bool
	leaves    string  // an election that it leaves when others do
	stops     float64 // the probability that it stops at a gate
	holds     float64 // the probability that a goroutine is held up at a gate

	mu        sync.Mutex
	until     time.Time // when it goes on; zero while it runs
	resumed   time.Time // when it went on last, or its wall clock was set
	client    *clientv3.Client
	clients   []*clientv3.Client // all that were made
	impulse   context.Context    // ends when all campaigns are given up
	giveUpNow context.CancelFunc
	steps     []*step

	deadlines map[int64]time.Time // as last told; guarded by w.mu
	electors  []*elector          // in use; guarded by w.mu
	calls     int                 // in this second, and so is asked; guarded by w.mu
	asked     int
	requests  int // counted so far, by the monitor
}

// A step ends a context at the n-th gate from now.
type step struct {
	n      int
	cancel context.CancelFunc
}

func (w *world) newProcess(place, incarnation int) *process {
	p := &process{
		w: w, place: place, name: fmt.Sprintf("p%d.%d", place, incarnation),
		ended: make(chan struct{}), rng: w.rng, deadlines: make(map[int64]time.Time),
	}
	p.ctx, p.cancel = context.WithCancel(w.ctx)
	p.impulse, p.giveUpNow = context.WithCancel(p.ctx)
	rate := 1.0
	bound := 1 - float64(w.margin)/float64(w.ttl)
	switch w.rng.IntN(4) {
	case 0:
		rate = bound + (1-bound)*(0.001+0.999*w.rng.Float64()) // as slow as is allowed
	case 1:
		rate = 1 + w.rng.Float64()/2
	}
	if !machineClocks {
		rate = 1
	}
	if rate < 1 {
		w.mu.Lock()
		w.result.Options.Margin = 0 // a clock that is slow takes what it needs of it
		w.mu.Unlock()
	} else {
		w.mu.Lock()
		w.result.Options.Margin = min(w.result.Options.Margin, time.Duration(float64(w.margin)/rate)) // and by one that is fast it is shorter
		w.mu.Unlock()
	}
	if w.drift && place == 0 {
		p.slow, rate = true, bound*(0.5+0.49*w.rng.Float64())
	}
	p.set = w.rng.IntN(3) == 0
	p.shares = w.rng.IntN(3) != 0
	p.restless = w.rng.IntN(8) == 0
	if w.Restless {
		p.shares, p.restless = true, true
	}
	p.slowHooks = w.rng.IntN(4) == 0
	if place > 1 && w.rng.IntN(2) == 0 { // two stay
		p.leaves = w.names[w.rng.IntN(len(w.names))]
	}
	switch w.rng.IntN(4) {
	case 0:
		p.holds = 0.01
	case 1:
		p.stops = 0.0005
	case 2:
		p.stops, p.holds = 0.0002, 0.001
	}
	p.m = machine.New(p.name, w.rng, rate, p.whim)
	p.shadow = p.m.Shadow()
	p.net = w.cluster.Process(p.name, p.m.Gate)
	w.note("%s starts: clock %.3f, shares %t, restless %t, slow hooks %t, stops %v, holds %v", p.name, rate, p.shares, p.restless, p.slowHooks, p.stops, p.holds)
	p.m.Go(func() {
		defer close(p.ended)
		p.live()
	})
	return p
}

// whim is what happens to the process at a gate.
func (p *process) whim() time.Duration {
	if p.w.calm.Load() {
		return 0
	}
	p.countStep()
	if p.stops > 0 && p.rng.Float64() < p.stops {
		p.w.fault("stop-at-gate")
		p.halt(time.Duration(p.rng.ExpFloat64()*float64(p.w.ttl)/2), false)
	}
	if p.holds > 0 && p.rng.Float64() < p.holds {
		return time.Duration(p.rng.Int64N(int64(5 * time.Millisecond)))
	}
	return 0
}

func (p *process) countStep() {
	p.mu.Lock()
	var due []*step
	p.steps = slices.DeleteFunc(p.steps, func(s *step) bool {
		s.n--
		if s.n <= 0 {
			due = append(due, s)
		}
		return s.n <= 0
	})
	p.mu.Unlock()
	for _, s := range due {
		s.cancel()
	}
}

// halt stops the process for d, or suspends its machine.
func (p *process) halt(d time.Duration, suspend bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.until.IsZero() || p.w.calm.Load() || p.dead.Load() {
		return
	}
	p.until = time.Now().Add(d)
	p.w.note("%s stops for %v", p.name, d)
	if suspend {
		p.m.Suspend()
	} else {
		p.m.Stop()
	}
	time.AfterFunc(d, func() { p.goOn(false) })
}

// goOn ends halt, before its time if now is set.
func (p *process) goOn(now bool) {
	p.mu.Lock()
	if p.until.IsZero() || !now && time.Now().Before(p.until) {
		p.mu.Unlock()
		return
	}
	p.until = time.Time{}
	p.w.note("%s goes on", p.name)
	p.m.Resume()
	p.resumed = time.Now()
	p.mu.Unlock()
	p.w.checkResumed(p)
}

// late reports whether the timers of the process may be late still: after a pause a context ends within moments, and
// when the wall clock was set, or has gone on alone, within a second.
func (p *process) late() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Since(p.resumed) < p.m.Real(1100*time.Millisecond)
}

// giveUp ends the contexts of all campaigns.
func (p *process) giveUp() {
	p.mu.Lock()
	end := p.giveUpNow
	p.impulse, p.giveUpNow = context.WithCancel(p.ctx)
	p.mu.Unlock()
	end()
}

// current is the client to use.
func (p *process) current() *clientv3.Client {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.client
}

// connect makes a client. It returns nil if the process is to end before that has succeeded.
func (p *process) connect() *clientv3.Client {
	cfg := fake.ClientConfig{Alter: func(c *clientv3.Config) {
		c.DialKeepAliveTime, c.DialKeepAliveTimeout = 10*time.Second, 2*time.Second
		c.DialTimeout = 10 * time.Second // New authenticates, and the request or its answer may be lost
		c.Logger = zap.NewNop()
	}}
	if p.w.auth {
		cfg.Username, cfg.Password = "root", "root"
	}
	for p.ctx.Err() == nil {
		client, err := p.net.NewClient(cfg)
		if err == nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			client.KV = paced{client.KV, p}
			p.client = client
			p.clients = append(p.clients, client)
			return client
		}
		p.sleep(p.ctx, time.Second)
	}
	return nil
}

// paced counts what is asked of the client. What clientv3 makes of it, which repeats what etcd refuses at the moment up to
// 80 times a second, is not the library's pace.
type paced struct {
	clientv3.KV
	p *process
}

func (kv paced) count() {
	kv.p.w.mu.Lock()
	defer kv.p.w.mu.Unlock()
	kv.p.asked++
}

func (kv paced) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	kv.count()
	return kv.KV.Get(ctx, key, opts...)
}

func (kv paced) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	kv.count()
	return kv.KV.Do(ctx, op)
}

func (kv paced) Txn(ctx context.Context) clientv3.Txn {
	kv.count()
	return kv.KV.Txn(ctx)
}

// close closes what the process has left open.
func (p *process) close() {
	for _, client := range p.clients {
		_ = client.Close()
	}
}

// live is the program that the process runs.
func (p *process) live() {
	if p.connect() == nil {
		return
	}
	var shared *elector
	if p.shares {
		shared = p.newElector()
	}
	var all sync.WaitGroup
	for _, name := range p.w.names {
		all.Go(func() { p.takePart(shared, name) })
		if p.rng.IntN(3) == 0 {
			all.Go(func() { p.observe(name) })
		}
	}
	all.Wait()
	if shared != nil {
		shared.close(context.Background(), 30*time.Second)
	}
}

// An elector is a leader.Elector with its hooks.
type elector struct {
	p       *process
	e       *leader.Elector
	client  *clientv3.Client
	closed  atomic.Bool // Close was called
	options []leader.Option
	current map[string][]*call // calls under way, by election; guarded by w.mu
	changes map[string]*sight  // what LeaderChanged has told, by election; guarded by w.mu
}

// An oops is what a hook or lead panics with on purpose.
type oops struct{}

func (p *process) newElector() *elector {
	el := &elector{p: p, client: p.current(), current: make(map[string][]*call), changes: make(map[string]*sight)}
	el.options = []leader.Option{leader.WithTTL(p.w.ttl), leader.WithMargin(p.w.margin), leader.WithHooks(el.hooks())}
	if p.slowHooks {
		el.options = append(el.options, leader.WithHooks(el.mischief()))
	}
	if p.rng.IntN(2) == 0 {
		el.options = append(el.options, leader.WithLogger(slog.New(slog.DiscardHandler)))
	}
	e, err := leader.New(el.client, el.options...)
	if err != nil {
		panic(err)
	}
	el.e = e
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	p.electors = append(slices.DeleteFunc(p.electors, (*elector).isIdleLocked), el)
	return el
}

// isIdleLocked reports whether no call of the Elector is under way. w.mu is held.
func (el *elector) isIdleLocked() bool {
	for _, calls := range el.current {
		if len(calls) > 0 {
			return false
		}
	}
	return true
}

// isClosed reports whether Close was called, or the client is closed.
func (el *elector) isClosed() bool { return el.closed.Load() || el.client.Ctx().Err() != nil }

// close closes the Elector, within a time.
func (el *elector) close(ctx context.Context, within time.Duration) {
	el.closed.Store(true)
	quiet := el.p.w.quiet.Load()
	el.p.w.mu.Lock()
	el.p.w.resignAllLocked(func(t *term) bool { return t.call.el == el })
	el.p.w.mu.Unlock()
	cctx, cancel := withTimeout(ctx, within)
	defer cancel()
	err := el.e.Close(cctx)
	if err != nil && quiet && el.p.w.quiet.Load() && !el.p.dead.Load() && el.client.Ctx().Err() == nil {
		el.p.w.violate("error", "%s: Close: %v", el.p.name, err)
	}
}

// hooks record what the Elector tells.
func (el *elector) hooks() leader.Hooks {
	p, w := el.p, el.p.w
	h := leader.Hooks{
		Campaigning: func(election string) { w.campaigning(el, election) },
		CampaignFailed: func(election string, err error) {
			w.campaignFailed(el, election, err)
		},
		Elected: func(election string, l *leader.Leader, _ time.Duration) { w.elected(el, election, l) },
		Ended:   func(election string, l *leader.Leader, cause error) { w.ended(el, election, l, cause) },
		Renewed: func(id clientv3.LeaseID, _ time.Duration, deadline time.Time) {
			if !p.dead.Load() {
				w.renewed(p, id, deadline)
			}
		},
		RenewFailed: func(id clientv3.LeaseID, took time.Duration, err error) {
			if p.dead.Load() {
				return
			}
			if errors.Is(err, leader.ErrRefused) {
				w.record(oracle.Entry{Kind: oracle.Refused, Proc: p.name, Lease: int64(id)})
			} else {
				w.note("%s: renewal of %x failed after %v: %v", p.name, id, took, err)
			}
		},
	}
	if p.rng.IntN(2) == 0 {
		h.LeaderChanged = func(election string, c leader.Candidate) { w.changed(el, election, c) }
	}
	return h
}

// mischief is what users' hooks do wrong.
func (el *elector) mischief() leader.Hooks {
	p := el.p
	slow := func() {
		if p.rng.IntN(6) == 0 && !p.w.calm.Load() {
			p.sleep(p.w.ctx, min(p.about(p.w.ttl/3), p.w.ttl))
		}
	}
	// What ends the caller's goroutine ends the term that it was told of.
	wild := func(l *leader.Leader) {
		slow()
		n := p.rng.IntN(40)
		if n > 1 || p.w.calm.Load() {
			return
		}
		if l != nil {
			p.w.mu.Lock()
			if t := termOf(l); t != nil {
				t.resigningLocked()
			}
			p.w.mu.Unlock()
		}
		if n == 0 {
			panic(oops{})
		}
		exit()
	}
	return leader.Hooks{
		Campaigning:    func(string) { wild(nil) },
		CampaignFailed: func(string, error) { wild(nil) },
		Elected:        func(_ string, l *leader.Leader, _ time.Duration) { wild(l) },
		Ended:          func(string, *leader.Leader, error) { slow() },
		Renewed:        func(clientv3.LeaseID, time.Duration, time.Time) { slow() },
		RenewFailed:    func(clientv3.LeaseID, time.Duration, error) { slow() },
	}
}

// A call is one of Campaign, TryCampaign or Run. Its value names it.
type call struct {
	p        *process
	el       *elector
	election string
	value    string
	ctx      context.Context
	try      bool
	began    time.Time

	// Guarded by w.mu.
	campaigning bool            // between Hooks.Campaigning and what follows
	lost        time.Time       // when the function that Run has called returned from a term that was lost
	newest      int64           // token of its newest key
	bereft      bool            // it has lost a key: the next may be put by a copy of an old join, which it deletes; guarded by w.mu
	terms       map[int64]*term // those that it won
}

// callOf is the value of the call that a candidate's value belongs to: leaders proclaim others that begin with it.
func callOf(value string) string {
	parts := strings.SplitN(value, "/", 3)
	if len(parts) < 2 {
		return ""
	}
	return parts[0] + "/" + parts[1]
}

// callKey is where the context of a call has it.
type callKey struct{}

// newCall announces a call.
func (el *elector) newCall(ctx context.Context, election string, try bool) *call {
	w := el.p.w
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sequence++
	w.result.Counts.Campaigns++
	el.p.calls++
	c := &call{
		p: el.p, el: el, election: election, value: fmt.Sprintf("%s/%d", el.p.name, w.sequence), try: try,
		began: time.Now(), terms: make(map[int64]*term),
	}
	c.ctx = context.WithValue(ctx, callKey{}, c)
	w.calls[c.value] = c
	if !slices.Contains(el.p.electors, el) {
		el.p.electors = append(el.p.electors, el)
	}
	el.current[election] = append(el.current[election], c)
	return c
}

// returned says that the call has returned, or was cut short by a panic of the user's.
func (c *call) returned(cut bool) {
	w := c.p.w
	w.mu.Lock()
	defer w.mu.Unlock()
	c.el.current[c.election] = slices.DeleteFunc(c.el.current[c.election], func(o *call) bool { return o == c })
	if c.campaigning && !cut && !c.p.dead.Load() {
		w.violateLocked("hooks", "%s: %s has returned, and neither Elected nor CampaignFailed was called", c.election, c.value)
	}
	c.campaigning = false
	left := w.lives[c.newest]
	if w.quiet.Load() && !cut && !c.p.dead.Load() && left != nil && left.fate == alive && c.terms[c.newest] == nil {
		w.violateLocked("left", "%s: %s has failed in calm, and its key with token %d is there", c.election, c.value, c.newest)
	}
}

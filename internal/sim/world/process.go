package world

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strconv"
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

	slow      bool // its clocks are slower than the bound
	set       bool // its wall clock is set at times; such a machine is not suspended
	shares    bool // one Elector for all elections
	restless  bool // it holds no term for long, and is back at once
	slowHooks bool
	checks    bool    // its Electors have a check
	filed     bool    // its Electors have lease files, but for those that are used once
	dense     bool    // its client repeats what is refused at once as often as it does by default, every 25 ms: that takes most of the time
	changes   bool    // its Electors have the hook LeaderChanged
	stops     float64 // the probability that it stops at a gate
	holds     float64 // the probability that a goroutine is held up at a gate

	mu        sync.Mutex
	halted    oracle.Entry // when it was stopped last
	until     time.Time    // when it goes on; zero while it runs
	resumed   time.Time    // when it went on last, or its wall clock was set
	client    *clientv3.Client
	clients   []*clientv3.Client // all that were made
	impulse   context.Context    // ends when all campaigns are given up
	giveUpNow context.CancelFunc
	steps     []*step
	away      map[string]bool // elections that it has left
	sick      sickness
	files     []string // lease files that were used

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
		ended: make(chan struct{}), rng: w.rng, deadlines: make(map[int64]time.Time), away: make(map[string]bool),
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
	p.checks = w.rng.IntN(3) == 0 || w.Checks
	p.filed = w.rng.IntN(2) == 0 || w.Filed
	p.dense = w.rng.IntN(4) == 0
	p.changes = w.rng.IntN(2) == 0
	switch w.rng.IntN(4) {
	case 0:
		p.holds = 0.01
	case 1:
		p.stops = 0.0005
	case 2:
		p.stops, p.holds = 0.0002, 0.001
	}
	if w.Holds > 0 {
		p.stops, p.holds = 0, w.Holds
	}
	p.m = machine.New(p.name, w.rng, rate, p.whim)
	p.shadow = p.m.Shadow()
	p.net = w.cluster.Process(p.name, p.m.Gate)
	w.record(oracle.Entry{Kind: oracle.Start, Proc: p.name, Op: "process"})
	w.record(oracle.Entry{Kind: oracle.Clock, Proc: p.name, Op: oracle.Rate, Value: strconv.FormatFloat(rate, 'g', -1, 64)})
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
		d := time.Duration(p.rng.Int64N(int64(5 * time.Millisecond)))
		now := p.w.now()
		p.w.record(oracle.Entry{Kind: oracle.Stopped, Proc: p.name, From: now, T: now + int64(d)})
		return d
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
	p.halted, p.until = oracle.Entry{Kind: oracle.Stopped, Proc: p.name, From: p.w.now()}, time.Now().Add(d)
	p.w.note("%s stops for %v", p.name, d)
	if suspend {
		p.halted.Op = oracle.Suspended
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
	p.w.record(p.halted)
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

// leaves says whether the process takes part in an election no more, or again. It does not end a campaign.
func (p *process) leaves(election string, yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.away[election] = yes
}

func (p *process) isAway(election string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.away[election]
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
		if !p.dense {
			c.BackoffWaitBetween = 250 * time.Millisecond
		}
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
		shut(client)
	}
}

// shut closes a client. A stream of watches that is stuck keeps Close from ever returning.
func shut(client *clientv3.Client) {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		_ = client.Close()
	}()
	select {
	case <-closed:
	case <-time.After(time.Minute):
	}
}

// live is the program that the process runs.
func (p *process) live() {
	if p.connect() == nil {
		return
	}
	var shared *elector
	if p.shares {
		shared = p.newElector("shared")
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
	file    string // the lease file, if it has one
	p       *process
	name    string // in the history
	e       *leader.Elector
	client  *clientv3.Client
	closed  atomic.Bool // Close was called
	options []leader.Option

	// Guarded by w.mu.
	current map[string][]*call // calls under way, by election
	used    []string           // elections that it was used in
	gone    bool               // it is used no more
	closing time.Time          // when it was first told that it is to be closed, or its client was
	telling int64              // since when a hook keeps renewals from being told; 0 if none does
	healths map[string]*health // by election
}

// An oops is what a hook or lead panics with on purpose.
type oops struct{}

// newElector makes an Elector. file tells it from those that the process has at the same time, and names its lease file;
// with "" it has none.
func (p *process) newElector(file string) *elector {
	el := &elector{p: p, client: p.current(), current: make(map[string][]*call), healths: make(map[string]*health)}
	p.w.mu.Lock()
	p.w.sequence++
	el.name = fmt.Sprintf("%s.%d", p.name, p.w.sequence)
	p.w.mu.Unlock()
	el.options = []leader.Option{leader.WithTTL(p.w.ttl), leader.WithMargin(p.w.margin), leader.WithHooks(el.hooks())}
	if p.slowHooks {
		el.options = append(el.options, leader.WithHooks(el.mischief()))
	}
	if p.checks {
		el.options = append(el.options, leader.WithHealth(el.check))
	}
	if p.rng.IntN(2) == 0 {
		el.options = append(el.options, leader.WithLogger(slog.New(slog.DiscardHandler)))
	}
	if file != "" && p.filed && !p.dead.Load() {
		el.file = p.file(file)
		el.options = append(el.options, leader.WithLeaseFile(el.file))
	}
	e, err := leader.New(el.client, el.options...)
	if err != nil {
		panic(err)
	}
	el.e = e
	return el
}

// isIdleLocked reports whether the Elector is not used any more. w.mu is held.
func (el *elector) isIdleLocked() bool {
	if !el.gone {
		return false
	}
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
	w := el.p.w
	began := w.now()
	w.mu.Lock()
	el.closed.Store(true)
	el.closingLocked()
	w.mu.Unlock()
	quiet := w.quiet.Load() && el.p.sickness() != hanging // it waits for a check that hangs
	cctx, cancel := withTimeout(ctx, within)
	defer cancel()
	err := el.e.Close(cctx)
	quiet = quiet && w.quiet.Load() && el.p.sickness() != hanging
	w.mu.Lock()
	el.closedLocked(began, err)
	el.gone = true
	w.mu.Unlock()
	if err != nil && ctx.Err() == nil && quiet && !el.p.dead.Load() && el.client.Ctx().Err() == nil {
		w.violate("error", "%s: Close: %v", el.p.name, err)
	}
}

// closingLocked records that all is about to end. closedLocked records that it has, as far as that is known.
func (el *elector) closingLocked() {
	w := el.p.w
	if el.closing.IsZero() {
		el.closing = time.Now()
	}
	for _, name := range el.used {
		w.tellLocked(el, oracle.Entry{Kind: oracle.Closing, Election: name})
		for _, c := range el.current[name] {
			c.told.closing = true
		}
	}
	w.resignAllLocked(func(t *term) bool { return t.call.el == el })
}

func (el *elector) closedLocked(began int64, err error) {
	e := oracle.Entry{Kind: oracle.Closed, From: began, Result: oracle.OK}
	if err != nil {
		e.Result, e.Err = oracle.Unknown, err.Error()
	}
	for _, name := range el.used {
		e.Election = name
		el.p.w.tellLocked(el, e)
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
		Overdue: func(election string, l *leader.Leader, late time.Duration) { w.overdue(el, election, l, late) },
		Renewed: func(id clientv3.LeaseID, _ time.Duration, deadline time.Time) {
			if !p.dead.Load() {
				w.renewed(el, id, deadline)
			}
		},
		RenewFailed: func(id clientv3.LeaseID, took time.Duration, err error) {
			if p.dead.Load() {
				return
			}
			if errors.Is(err, leader.ErrRefused) {
				w.record(oracle.Entry{Kind: oracle.Refused, Proc: el.name, Lease: int64(id)})
			} else {
				w.note("%s: renewal of %x failed after %v: %v", p.name, id, took, err)
			}
		},
	}
	if p.changes {
		h.LeaderChanged = func(election string, c leader.Candidate) { w.changed(el, election, c) }
	}
	return h
}

// mischief is what users' hooks do wrong.
func (el *elector) mischief() leader.Hooks {
	p := el.p
	slow := func() {
		if p.rng.IntN(6) == 0 && !p.w.calm.Load() {
			began := p.w.now()
			p.sleep(p.w.ctx, min(p.about(p.w.ttl/3), p.w.ttl))
			p.w.tell(el, oracle.Entry{Kind: oracle.Busy, From: began})
		}
	}
	tells := func(since int64) {
		p.w.mu.Lock()
		defer p.w.mu.Unlock()
		el.telling = since
	}
	telling, told := func() { tells(p.w.now()) }, func() { tells(0) }
	// What ends the caller's goroutine ends the term that it was told of.
	wild := func(l *leader.Leader) {
		slow()
		n := p.rng.IntN(40)
		if n > 1 || p.w.calm.Load() {
			return
		}
		var until time.Time
		if l != nil {
			_, until = p.counts(l.Deadline())
		}
		p.w.mu.Lock()
		if l == nil {
			if c := currentCall(); c != nil && c.campaigning {
				c.givesUpLocked()
			}
		} else if t := termOf(l); t != nil {
			t.toldLocked(oracle.Entry{Until: int64(until.Sub(p.w.began))})
			t.resigningLocked()
		}
		p.w.mu.Unlock()
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
		Overdue:        func(string, *leader.Leader, time.Duration) { slow() },
		Renewed:        func(clientv3.LeaseID, time.Duration, time.Time) { telling(); slow(); told() },
		RenewFailed:    func(clientv3.LeaseID, time.Duration, error) { telling(); slow(); told() },
	}
}

// A call is one of Campaign, TryCampaign or Run. Its value names it.
type call struct {
	p        *process
	el       *elector
	election string
	value    string
	ctx      context.Context
	try, run bool // not Campaign
	beside   bool // another one of the same Elector
	unhook   func() bool

	// Guarded by w.mu.
	campaigning bool            // between Hooks.Campaigning and what follows
	told        stops           // of this campaign
	began       time.Time       // when its last campaign began
	newest      int64           // token of its newest key
	terms       map[int64]*term // those that it won
	stuck       bool            // its work does not end when its context does
	inLead      bool            // the function that Run has called has not returned
	overdue     bool            // it is in the history that Hooks.Overdue was called for it
}

// stops are what was told of the end of a campaign.
type stops struct {
	givingUp, closing bool // why
	end               int  // the length of the history when the end was told before its hook was called, else 0
}

// givesUpLocked records that the campaign is to end.
func (c *call) givesUpLocked() {
	if !c.told.givingUp {
		c.told.givingUp = true
		c.p.w.tellLocked(c.el, oracle.Entry{Kind: oracle.GivingUp, Election: c.election})
	}
}

// stopsLocked records why the campaign is to end, if it is.
func (c *call) stopsLocked() {
	if c.ctx.Err() != nil {
		c.givesUpLocked()
	}
	if c.el.isClosed() && !c.told.closing {
		c.told.closing = true
		c.p.w.tellLocked(c.el, oracle.Entry{Kind: oracle.Closing, Election: c.election})
	}
}

// failsLocked records the end of a campaign before its hook can: another of the election may begin as soon as it has ended.
// If it has won, and the term was over before the hook, [call.electedLocked] corrects that.
func (c *call) failsLocked() {
	c.stopsLocked()
	e := oracle.Entry{Kind: oracle.CampaignFailed, Election: c.election}
	switch {
	case c.told.givingUp:
		e.Op = oracle.GaveUp
	case c.told.closing:
		e.Op = oracle.Shut
	case c.try:
		e.Op = oracle.Held
	}
	c.p.w.tellLocked(c.el, e)
	c.told.end = len(c.p.w.result.History)
}

// electedLocked records that the campaign has won.
func (c *call) electedLocked(t *term) {
	w := c.p.w
	e := oracle.Entry{Kind: oracle.Elected, Election: c.election, Token: t.token, Value: c.value, Lease: t.lease}
	if c.told.end == 0 {
		w.tellLocked(c.el, e)
		return
	}
	if t.l.Context().Err() == nil {
		w.violateLocked("hooks", "%s: another campaign has begun beside %s, which leads with token %d", c.election, c.value, t.token)
	}
	end := &w.result.History[c.told.end-1]
	e.T, e.Proc = end.T, end.Proc
	*end = e
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
		p: el.p, el: el, election: election, value: fmt.Sprintf("%s/%d", el.name, w.sequence), try: try,
		terms: make(map[int64]*term),
	}
	c.ctx = context.WithValue(ctx, callKey{}, c)
	c.unhook = context.AfterFunc(c.ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if c.campaigning {
			c.givesUpLocked()
		}
	})
	w.calls[c.value] = c
	if !slices.Contains(el.p.electors, el) {
		if !el.p.slowHooks { // else it may have something to tell still
			el.p.electors = slices.DeleteFunc(el.p.electors, (*elector).isIdleLocked)
		}
		el.p.electors = append(el.p.electors, el)
		w.tellLocked(el, oracle.Entry{Kind: oracle.Start, Op: "elector", Value: el.p.name})
	}
	if !slices.Contains(el.used, election) {
		el.used = append(el.used, election)
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
	c.unhook()
	c.checkReturnedLocked()
	switch {
	case !c.campaigning:
	case cut: // by the user's code, in the hook Campaigning
		c.givesUpLocked()
		c.failsLocked()
	case !c.p.dead.Load():
		w.violateLocked("hooks", "%s: %s has returned, and neither Elected nor CampaignFailed was called", c.election, c.value)
	}
	c.campaigning = false
	left := w.lives[c.newest]
	if w.quiet.Load() && !cut && !c.p.dead.Load() && left != nil && left.fate == alive && c.terms[c.newest] == nil {
		w.violateLocked("left", "%s: %s has failed in calm, and its key with token %d is there", c.election, c.value, c.newest)
	}
}

package world

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/machine/clock"
	"example.com/leader/internal/sim/machine/contexts"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// withTimeout is context.WithTimeout by the clock of the machine that the goroutine belongs to.
func withTimeout(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return contexts.WithTimeout(ctx, d)
}

// sleep blocks for d or until ctx ends.
func (p *process) sleep(ctx context.Context, d time.Duration) {
	t := clock.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// about is a random time of that mean.
func (p *process) about(mean time.Duration) time.Duration {
	return time.Duration(p.rng.ExpFloat64() * float64(mean))
}

// exit ends the goroutine as a test's FailNow does.
func exit() { runtime.Goexit() }

// attempt calls f, for a call, in a goroutine of its own and waits for it. cut says that a panic or exit on purpose has ended it.
func (p *process) attempt(c *call, f func()) (cut bool) {
	done := make(chan struct{})
	cut = true
	go func() {
		p.m.With(c).Enter()
		defer close(done)
		defer func() {
			if r := recover(); r != nil {
				if _, wanted := r.(oops); !wanted {
					p.w.violate("crash", "%s: %v\n%s", p.name, r, debug.Stack())
				}
			}
		}()
		f()
		cut = false
	}()
	<-done
	return cut
}

// takePart campaigns in an election again and again, over the shared Elector or a new one each time.
func (p *process) takePart(shared *elector, election string) {
	for p.ctx.Err() == nil {
		if p.isAway(election) {
			p.sleep(p.ctx, 50*time.Millisecond)
			continue
		}
		el := shared
		if el == nil || el.isClosed() {
			el = p.newElector(election)
		}
		p.turn(el, election)
		if el != shared {
			el.close(context.Background(), 10*time.Second)
		}
		p.rest(election)
	}
}

// rest is what a process does between two turns.
func (p *process) rest(election string) {
	switch n := p.rng.IntN(24); {
	case p.w.calm.Load():
		if n == 23 {
			p.ask(election)
		}
		p.sleep(p.ctx, p.about(100*time.Millisecond)) // somebody is always there to lead
	case n == 0 && !p.hurries():
		p.sleep(p.ctx, 4*p.w.ttl) // what it has left is in the way of others alone
	case n < 8 && !p.hurries():
		p.sleep(p.ctx, p.about(p.w.ttl/3))
	case n == 23:
		p.ask(election)
	default:
		p.sleep(p.ctx, time.Millisecond)
	}
}

// turn is one campaign, and what follows.
func (p *process) turn(el *elector, election string) {
	ctx, cancel := p.patience()
	defer cancel()
	p.mu.Lock()
	impulse := p.impulse
	p.mu.Unlock()
	defer context.AfterFunc(impulse, cancel)()
	n := p.rng.IntN(20)
	if p.w.calm.Load() {
		n = p.rng.IntN(15) // no mistakes: each loss is to have a reason
	}
	switch {
	case n < 7:
		p.run(ctx, el, election)
	case n < 14:
		p.campaign(ctx, el, election, false, false)
	case n == 14:
		p.campaign(ctx, el, election, true, false)
	case n < 17:
		p.twice(ctx, el, election)
	case n == 17:
		p.closeMeanwhile(ctx, el, election)
	case n == 18:
		p.once(ctx, election)
	default:
		p.abandon(ctx, el, election)
	}
}

// patience returns the context of a campaign. It may end at any moment.
func (p *process) patience() (context.Context, context.CancelFunc) {
	ttl := p.w.ttl
	n := p.rng.IntN(16)
	switch {
	case p.w.calm.Load():
		return contexts.WithCancel(p.ctx)
	case p.hurries() && n < 10:
		return withTimeout(p.ctx, p.about(300*time.Millisecond))
	case n == 0:
		ctx, cancel := contexts.WithCancel(p.ctx)
		p.mu.Lock()
		p.steps = append(p.steps, &step{1 + p.rng.IntN(300), cancel})
		p.mu.Unlock()
		return ctx, cancel
	case n == 1:
		return withTimeout(p.ctx, time.Duration(p.rng.Int64N(int64(5*time.Millisecond))))
	case n < 4:
		return withTimeout(p.ctx, p.about(ttl/2))
	}
	return withTimeout(p.ctx, 20*ttl)
}

// hurries reports whether the process holds no term for long and is back at once. In calm nobody does.
func (p *process) hurries() bool { return p.restless && !p.w.calm.Load() }

// hold is how long a term is to last.
func (p *process) hold() time.Duration {
	switch {
	case p.hurries() || p.rng.IntN(4) == 0:
		return p.about(300 * time.Millisecond)
	case p.w.calm.Load() && p.rng.IntN(3) == 0: // who has just joined finds that nobody is there any more
		return p.about(5 * time.Millisecond)
	case p.w.calm.Load():
		return p.about(p.w.ttl)
	}
	return p.about(3 * p.w.ttl / 2)
}

// judge checks the error of a call. ctx is what bounds it.
func (c *call) judge(what string, err error) {
	switch {
	case err == nil, c.p.dead.Load():
	case c.ctx.Err() != nil && errors.Is(err, c.ctx.Err()):
	case errors.Is(err, leader.ErrClosed) && (c.el.isClosed() || c.ctx.Err() != nil):
	case errors.Is(err, leader.ErrHeld) && c.try:
	case errors.Is(err, leader.ErrUnhealthy) && c.try && c.p.checks:
	case errors.Is(err, leader.ErrCampaigning) && c.beside:
	default:
		c.p.w.violate("error", "%s: %s of %s: %v", c.election, what, c.value, err)
	}
}

// campaign leads for one term, if it is elected.
func (p *process) campaign(ctx context.Context, el *elector, election string, try, beside bool) {
	c, l := p.elected(ctx, el, election, try, beside)
	if l == nil {
		return
	}
	p.attempt(c, func() { p.work(l.Context(), l, c) })
	p.resign(c, l)
}

// elected campaigns, and returns the term that it has won, if any. beside says that another call of the Elector may
// be in the election.
func (p *process) elected(ctx context.Context, el *elector, election string, try, beside bool) (c *call, l *leader.Leader) {
	c = el.newCall(ctx, election, try)
	c.beside = beside
	cut := p.attempt(c, func() {
		var err error
		if try {
			tried := oracle.Entry{Kind: oracle.Tried, From: p.w.now(), Election: election}
			defer func() { p.w.tell(el, tried) }()
			l, err = el.e.TryCampaign(c.ctx, election, c.value)
		} else {
			l, err = el.e.Campaign(c.ctx, election, c.value)
		}
		c.judge("campaign", err)
	})
	c.returned(cut)
	return c, l
}

// resign ends a term, as users do: with patience, or without.
func (p *process) resign(c *call, l *leader.Leader) {
	p.w.sees(c, l)
	for i := range 3 {
		within := 3 * time.Second
		if i == 0 && p.rng.IntN(6) == 0 && !p.w.calm.Load() {
			within = time.Duration(p.rng.Int64N(int64(2 * time.Millisecond)))
		}
		p.resigning(c, l)
		rctx, cancel := withTimeout(context.Background(), within)
		err := l.Resign(rctx)
		cancel()
		switch {
		case p.dead.Load():
			return
		case l.IsLeader() || l.Context().Err() == nil:
			p.w.violate("resign", "%s: %s leads with token %d, although it has resigned", c.election, p.name, l.Token())
		case err == nil:
			return
		case errors.Is(err, leader.ErrNotLeader), errors.Is(err, leader.ErrClosed):
			p.w.violate("error", "%s: Resign of %s: %v", c.election, c.value, err)
		}
		if p.rng.IntN(4) == 0 {
			return // the lease takes care of it
		}
	}
}

// resigning records that a term is given up.
func (p *process) resigning(c *call, l *leader.Leader) {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if t := c.terms[l.Token()]; t != nil {
		t.resigningLocked()
	}
}

// resignAllLocked records that those terms are given up.
func (w *world) resignAllLocked(which func(*term) bool) {
	for _, name := range w.names {
		for _, t := range w.terms[name] {
			if which(t) {
				t.resigningLocked()
			}
		}
	}
}

func (t *term) resigningLocked() {
	if !t.givenUp && !t.p.dead.Load() {
		t.givenUp = true
		t.p.w.recordLocked(oracle.Entry{Kind: oracle.Resigning, Proc: t.call.el.name, Election: t.election, Token: t.token})
	}
}

// errUser is what lead fails with.
var errUser = errors.New("the work has failed")

// run leads by Run.
func (p *process) run(ctx context.Context, el *elector, election string) {
	ctx, cancel := withTimeout(ctx, p.about(8*p.w.ttl))
	defer cancel()
	c := el.newCall(ctx, election, false)
	c.run = true
	cut := p.attempt(c, func() {
		err := el.e.Run(c.ctx, election, c.value, func(ctx context.Context, l *leader.Leader) error { return p.lead(ctx, c, l) })
		if errors.Is(err, errUser) {
			err = nil
		}
		c.judge("Run", err)
	})
	c.returned(cut)
}

// lead is what Run calls.
func (p *process) lead(ctx context.Context, c *call, l *leader.Leader) error {
	defer c.enter()()
	defer p.leads(ctx, l, c)()
	p.work(ctx, l, c)
	if !l.IsLeader() && p.rng.IntN(4) == 0 {
		p.sleep(p.ctx, p.about(p.w.margin/2)) // it takes a while to stop
	}
	n := p.rng.IntN(40)
	if p.w.calm.Load() {
		n = 39
	}
	p.resigning(c, l)
	switch {
	case n == 0:
		panic(oops{})
	case n == 1:
		exit()
	case n == 2:
		p.resign(c, l)
	case n < 10:
		return errUser
	}
	return nil
}

// leads records for how long the context of the function that Run has called is live, until stop is called.
func (p *process) leads(ctx context.Context, l *leader.Leader, c *call) (stop func()) {
	p.w.sees(c, l) // first, for it may be stopped there: no belief may be told of before its term
	e := oracle.Entry{Kind: oracle.Belief, From: p.w.now(), Election: c.election, Token: l.Token(), Op: oracle.ByRun}
	told := func() { p.w.tell(c.el, e) }
	if ctx.Err() != nil {
		return func() {}
	}
	unhook := context.AfterFunc(ctx, told)
	return func() {
		if unhook() {
			told()
		}
	}
}

// twice campaigns twice at a time with one Elector, which is refused as long as the first call campaigns or leads.
func (p *process) twice(ctx context.Context, el *elector, election string) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.campaign(ctx, el, election, false, true)
	}()
	p.sleep(ctx, p.about(p.w.ttl/4))
	p.campaignSecond(ctx, el, election) // or first, if the other was stopped
	<-done
}

func (p *process) campaignSecond(ctx context.Context, el *elector, election string) {
	ctx, cancel := withTimeout(ctx, p.about(p.w.ttl/4))
	defer cancel()
	if c, l := p.elected(ctx, el, election, false, true); l != nil {
		p.resign(c, l)
	}
}

// closeMeanwhile closes the Elector, or the client, while it is in use.
func (p *process) closeMeanwhile(ctx context.Context, el *elector, election string) {
	closing := make(chan struct{})
	go func() {
		defer close(closing)
		p.sleep(ctx, p.about(p.w.ttl))
		if p.rng.IntN(2) == 0 || p.w.calm.Load() {
			el.close(p.w.ctx, p.about(2*p.w.ttl))
			return
		}
		p.closeClient(el.client)
	}()
	p.campaign(ctx, el, election, false, false)
	<-closing
	p.sleep(p.ctx, p.about(100*time.Millisecond)) // an Elector that is used after Close
	p.campaign(ctx, el, election, false, false)
}

// closeClient closes the client of the process, whoever uses it, and makes another.
func (p *process) closeClient(client *clientv3.Client) {
	w := p.w
	began := w.now()
	w.mu.Lock()
	w.noteLocked("%s closes its client", p.name)
	for _, el := range p.electors {
		if el.client == client {
			el.closingLocked()
		}
	}
	w.mu.Unlock()
	shut(client)
	w.mu.Lock()
	for _, el := range p.electors {
		if el.client == client {
			el.closedLocked(began, leader.ErrClosed) // what is left of them expires
		}
	}
	w.mu.Unlock()
	p.connect()
}

// once campaigns with an Elector that is used once.
func (p *process) once(ctx context.Context, election string) {
	el := p.newElector("") // but for its hooks
	defer func() {
		p.w.mu.Lock()
		defer p.w.mu.Unlock()
		el.gone = true
	}()
	if p.rng.IntN(2) == 0 {
		ctx, cancel := withTimeout(ctx, p.about(8*p.w.ttl))
		defer cancel()
		c := el.newCall(ctx, election, false)
		c.run = true
		cut := p.attempt(c, func() {
			err := leader.Run(c.ctx, el.client, election, c.value,
				func(ctx context.Context, l *leader.Leader) error { return p.lead(ctx, c, l) }, el.options...)
			if errors.Is(err, errUser) {
				err = nil
			}
			c.judge("package-level Run", err)
		})
		c.returned(cut)
		return
	}
	c := el.newCall(ctx, election, false)
	var l *leader.Leader
	cut := p.attempt(c, func() {
		var err error
		l, err = leader.Campaign(c.ctx, el.client, election, c.value, el.options...)
		c.judge("package-level Campaign", err)
	})
	c.returned(cut)
	if l != nil {
		p.attempt(c, func() { p.work(l.Context(), l, c) })
		p.resign(c, l)
	}
}

// abandon wins a term and forgets about it: the Elector is closed in the end.
func (p *process) abandon(ctx context.Context, el *elector, election string) {
	c, l := p.elected(ctx, el, election, false, false)
	if l == nil {
		return
	}
	p.attempt(c, func() { p.work(l.Context(), l, c) })
	if p.w.calm.Load() || p.rng.IntN(2) == 0 {
		p.resign(c, l)
		return
	}
	el.close(context.Background(), 10*time.Second)
	if l.IsLeader() {
		p.w.violate("resign", "%s: %s leads with token %d, although its Elector was closed", election, p.name, l.Token())
	}
}

// work is what a leader does until ctx ends or it has led for long enough.
func (p *process) work(ctx context.Context, l *leader.Leader, c *call) {
	t := p.w.sees(c, l)
	if t == nil {
		return
	}
	end := clock.Now().Add(p.hold())
	writes, proclaims := p.rng.IntN(4) != 0, p.rng.IntN(3) == 0
	believed := t.since
	for ctx.Err() == nil && clock.Now().Before(end) {
		asked := p.w.now()
		op, leads := oracle.ByIsLeader, l.IsLeader
		if t.byContext {
			op, leads = oracle.ByContext, func() bool { return l.Context().Err() == nil }
		}
		if !leads() {
			break
		}
		p.w.tell(c.el, oracle.Entry{Kind: oracle.Belief, From: believed, T: asked, Election: c.election, Token: l.Token(), Op: op})
		believed = asked
		clock.Now() // decided; and now it may be stopped
		switch n := p.rng.IntN(12); {
		case n == 0:
			p.append(c, l)
		case n < 6 && proclaims:
			p.proclaim(ctx, c, l)
		case n < 9 && writes:
			writes = p.write(ctx, c, l, "counter")
		case writes:
			writes = p.write(ctx, c, l, "register")
		}
		p.sleep(ctx, min(p.about(p.w.ttl/4), clock.Until(end)))
	}
	for c.isStuck() { // whatever ctx says
		p.sleep(p.w.ctx, p.w.ttl/20)
	}
}

func (p *process) unique(l *leader.Leader) string {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	p.w.sequence++
	return fmt.Sprintf("%d:%d", l.Token(), p.w.sequence)
}

// proclaim changes the leader's value.
func (p *process) proclaim(ctx context.Context, c *call, l *leader.Leader) {
	value := c.value + "/" + p.unique(l)
	if p.rng.IntN(20) == 0 {
		value += "/" + strings.Repeat("x", 100_000)
	}
	pctx, cancel := withTimeout(ctx, time.Second)
	defer cancel()
	e := oracle.Entry{Kind: oracle.Proclaimed, From: p.w.now(), Election: c.election, Token: l.Token(), Value: short(value), Result: oracle.OK}
	err := l.Proclaim(pctx, value)
	if err != nil {
		e.Result, e.Err = oracle.Unknown, err.Error()
	}
	p.w.tell(c.el, e)
	if err == nil {
		p.w.confirmed(c, l, value)
	}
	if errors.Is(err, leader.ErrNotLeader) && l.Context().Err() == nil && !p.dead.Load() {
		p.w.violate("error", "%s: Proclaim of %s: %v, while the term lasts", c.election, c.value, err)
	}
}

// confirmed notes that etcd has confirmed a value.
func (w *world) confirmed(c *call, l *leader.Leader, value string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t := c.terms[l.Token()]; t != nil {
		t.proclaimed = max(t.proclaimed, proclaimed(value))
	}
}

// requestTimeout bounds a request of a leader. It may outlive the term: that is what guard and token are for.
const requestTimeout = 2 * time.Second

// write replaces a value in etcd, under the guard, by one that follows from it. The counter's transaction compares
// that nobody has written meanwhile; the register's relies on the guard alone. It reports whether there was
// an answer.
func (p *process) write(ctx context.Context, c *call, l *leader.Leader, what string) bool {
	key := dataRoot + c.election + "/" + what
	base := oracle.Entry{Kind: oracle.Read, From: p.w.now(), Election: c.election, Token: l.Token(), Op: what}
	rctx, cancel := withTimeout(ctx, requestTimeout)
	resp, err := c.el.client.Get(rctx, key)
	cancel()
	if err != nil {
		return true
	}
	base.T, base.Rev = p.w.now(), resp.Header.Revision
	guards := []clientv3.Cmp{l.Guard()}
	var n, modified int64
	if len(resp.Kvs) > 0 {
		base.Value, modified = string(resp.Kvs[0].Value), resp.Kvs[0].ModRevision
		first, _, _ := strings.Cut(base.Value, " ")
		n, _ = strconv.ParseInt(first, 10, 64)
	}
	p.w.tell(c.el, base)
	if what == "counter" {
		guards = append(guards, clientv3.Compare(clientv3.ModRevision(key), "=", modified))
	}
	e := oracle.Entry{
		Kind: oracle.Write, Election: c.election, Token: l.Token(), Op: what,
		Base: base.Value, Value: fmt.Sprintf("%d %s", n+1, p.unique(l)), From: p.w.now(),
	}
	wctx, cancel := withTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	txn, err := c.el.client.Txn(wctx).If(guards...).Then(clientv3.OpPut(key, e.Value)).Commit()
	e.T = p.w.now()
	switch {
	case err != nil:
		e.Result, e.Err = oracle.Unknown, err.Error()
	case txn.Succeeded:
		e.Result, e.Rev = oracle.OK, txn.Header.Revision
	default:
		e.Result = oracle.Failed
	}
	p.w.tell(c.el, e)
	return e.Result != oracle.Unknown
}

// tell records what a process says, unless it was killed before it could.
func (p *process) tell(e oracle.Entry) {
	if !p.dead.Load() {
		p.w.record(e)
	}
}

// append writes to a resource outside etcd, which knows the token alone, and refuses smaller ones than the largest
// that it has seen.
func (p *process) append(c *call, l *leader.Leader) {
	e := oracle.Entry{Kind: oracle.Append, From: p.w.now(), Election: c.election, Token: l.Token(), Value: p.unique(l)}
	p.sleep(p.ctx, p.about(2*time.Millisecond))
	e.Result = p.w.accept(e)
	p.sleep(p.ctx, p.about(2*time.Millisecond))
	e.T = p.w.now()
	p.w.tell(c.el, e)
}

// accept is what the resource does.
func (w *world) accept(e oracle.Entry) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	a := oracle.Entry{Kind: oracle.Accepted, Proc: "resource", Election: e.Election, Token: e.Token, Value: e.Value, Result: oracle.OK}
	if e.Token < w.resource[e.Election] {
		a.Result = oracle.Failed
	} else {
		w.resource[e.Election] = e.Token
	}
	w.recordLocked(a)
	return a.Result
}

// ask asks who leads, as observers do that need to know once.
func (p *process) ask(election string) {
	el := p.newElector("")
	quiet := p.w.quiet.Load()
	ctx, cancel := withTimeout(p.ctx, time.Second)
	defer cancel()
	p.attempt(nil, func() {
		e := oracle.Entry{Kind: oracle.Current, Proc: p.name, From: p.w.now(), Election: election}
		var err error
		if p.rng.IntN(2) == 0 {
			var leads leader.Candidate
			if leads, err = el.e.Current(ctx, election); errors.Is(err, leader.ErrNoLeader) {
				err = nil
			}
			e = asEntry(leads, e)
		} else {
			e.Kind = oracle.Candidates
			var all []leader.Candidate
			all, err = el.e.Candidates(ctx, election)
			e.Value = tokensOf(all)
		}
		p.answered(e, err, quiet)
	})
}

// answered records the answer to a question, and checks its error. It has an answer if nothing has made that hard since it was asked.
func (p *process) answered(e oracle.Entry, err error, quiet bool) {
	if p.ctx.Err() != nil {
		return
	}
	if err != nil {
		e.Err = err.Error()
	}
	p.tell(e)
	if err != nil && quiet && p.w.quiet.Load() && p.ctx.Err() == nil && !p.dead.Load() {
		p.w.violate("error", "%s: %s: %v", p.name, e.Kind, err)
	}
}

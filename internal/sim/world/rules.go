package world

import (
	"context"
	"errors"
	"slices"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/fake"
	"example.com/leader/internal/sim/machine"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A term is one that was won.
type term struct {
	call     *call
	p        *process
	l        *leader.Leader
	election string
	token    int64
	lease    int64

	// Guarded by w.mu.
	givenUp bool // by its holder
	ended   bool // Hooks.Ended was called
	told    bool // it is in the history, since then
	since   int64
	expired bool
	// proclaimed is the number of the last value that etcd has confirmed.
	proclaimed int64
	byContext  bool // its holder looks at the context alone, and never asks IsLeader
}

// termOf is the term of that leader, nil if it was not announced. w.mu is held.
func termOf(l *leader.Leader) *term {
	c, ok := l.Context().Value(callKey{}).(*call)
	if !ok {
		return nil
	}
	return c.terms[l.Token()]
}

// passed reports whether a time has passed by the clock that says so first.
func passed(now, t time.Time) bool {
	return !now.Before(t) || !now.Round(0).Before(t.Round(0))
}

// currentCall is the call in whose goroutine a hook is called, nil if none.
func currentCall() *call {
	c, _ := machine.Current().Tag().(*call)
	return c
}

// campaigning, campaignFailed, elected, ended, renewed and changed are the hooks.
func (w *world) campaigning(el *elector, election string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if el.p.dead.Load() {
		return
	}
	c := currentCall()
	if c != nil {
		c.checkReturnedLocked()
	}
	if c == nil || c.campaigning || c.leadsLocked() {
		w.violateLocked("hooks", "%s: Campaigning was called, and %s campaigns or leads already", election, el.p.name)
		return
	}
	for _, other := range el.current[election] {
		if other != c && other.campaigning {
			other.failsLocked() // it is over, and tells so later
		}
		if other != c && other.leadsLocked() {
			w.violateLocked("hooks", "%s: %s campaigns, and the same Elector leads by %s", election, c.value, other.value)
		}
	}
	c.campaigning, c.began, c.told = true, time.Now(), stops{}
	w.tellLocked(el, oracle.Entry{Kind: oracle.Campaigning, Election: election, Value: c.value})
	c.stopsLocked()
}

// leadsLocked reports whether a term of the call holds.
func (c *call) leadsLocked() bool {
	for _, t := range c.terms {
		if !t.ended && t.l.Context().Err() == nil {
			return true
		}
	}
	return false
}

func (w *world) campaignFailed(el *elector, election string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if el.p.dead.Load() {
		return
	}
	c := currentCall()
	if c == nil || !c.campaigning {
		w.violateLocked("hooks", "%s: CampaignFailed was called, and %s does not campaign", election, el.p.name)
		return
	}
	w.result.Counts.GivenUp++
	if c.told.end == 0 {
		c.stopsLocked()
		why := failureOf(err)
		if errors.Is(err, leader.ErrUnhealthy) && c.try && (c.ctx.Err() == nil || why == "") { // and of whatever the check has failed with
			why = oracle.Unhealthy
		}
		w.tellLocked(el, oracle.Entry{Kind: oracle.CampaignFailed, Election: election, Op: why, Err: err.Error()})
	}
	c.campaigning = false
}

func (w *world) elected(el *elector, election string, l *leader.Leader) {
	c, ok := l.Context().Value(callKey{}).(*call)
	if !ok {
		w.violate("values", "%s: the context of a term has not the values of its campaign's", election)
		return
	}
	deadline := l.Deadline()
	w.mu.Lock()
	if el.p.dead.Load() {
		w.mu.Unlock()
		return
	}
	_, lease, _ := electionOf(l.Key())
	t := &term{call: c, p: el.p, l: l, election: election, token: l.Token(), lease: lease, byContext: w.rng.IntN(3) == 0}
	switch {
	case c.terms[t.token] != nil:
		w.violateLocked("token", "%s: %s is elected again with token %d", election, el.p.name, t.token)
	case w.lives[t.token] == nil || w.lives[t.token].key != l.Key():
		w.violateLocked("token", "%s: %s is elected with token %d, which is not that of its key %s", election, el.p.name, t.token, l.Key())
	case !c.campaigning:
		w.violateLocked("hooks", "%s: Elected was called, and %s does not campaign", election, c.value)
	}
	c.campaigning = false
	c.terms[t.token] = t
	if el.p.deadlines[lease].Before(deadline) {
		el.p.deadlines[lease] = deadline
	}
	w.result.Counts.Terms++
	c.electedLocked(t)
	others := slices.Clone(w.terms[election])
	w.terms[election] = append(w.terms[election], t)
	w.mu.Unlock()
	w.checkDeadline(el.p, lease, deadline)
	go func() {
		w.checkFirst(t)
		for _, other := range others {
			w.checkBoth(other, t)
		}
	}()
}

func (w *world) ended(el *elector, election string, l *leader.Leader, cause error) {
	c, ok := l.Context().Value(callKey{}).(*call)
	if !ok {
		return
	}
	_, until := el.p.counts(l.Deadline())
	w.mu.Lock()
	defer w.mu.Unlock()
	if el.p.dead.Load() {
		return
	}
	if cause == nil {
		w.violateLocked("cause", "%s: Ended was called for token %d of %s, and not told why", election, l.Token(), el.p.name)
		return
	}
	t := c.terms[l.Token()]
	if t == nil || t.ended {
		w.violateLocked("hooks", "%s: Ended was called for token %d of %s, which does not lead", election, l.Token(), el.p.name)
		return
	}
	if !t.told && c.run { // over before Run called the function
		t.toldLocked(oracle.Entry{Value: oracle.ByRun, Until: int64(until.Sub(w.began))})
		if errors.Is(cause, leader.ErrTransferred) || errors.Is(cause, leader.ErrUnhealthy) {
			t.resigningLocked() // its key waits for nobody's work
		}
	}
	t.ended = true
	w.terms[election] = slices.DeleteFunc(w.terms[election], func(o *term) bool { return o == t })
	e := oracle.Entry{Kind: oracle.Ended, Election: election, Token: t.token, Err: cause.Error(), Until: int64(until.Sub(w.began))}
	life, lease := w.lives[t.token], w.leases[t.lease]
	switch {
	case errors.Is(cause, leader.ErrResigned):
		e.Op = oracle.Resigned
		if !t.givenUp && !el.isClosed() {
			w.violateLocked("cause", "%s: %s was told that it has resigned token %d, and has not", election, el.p.name, t.token)
		}
	case errors.Is(cause, leader.ErrUnhealthy): // the oracle knows whether it was
		e.Op = oracle.Unhealthy
	case errors.Is(cause, leader.ErrTransferred): // the oracle knows whether it was asked
		e.Op = oracle.Transferred
		w.result.Counts.Transferred++
	case errors.Is(cause, leader.ErrEvicted):
		e.Op = oracle.Evicted
		w.result.Counts.Evicted++
		switch {
		case life == nil || life.fate.excuses() || lease.fate.excuses() || el.p.slow:
		default:
			w.violateLocked("cause", "%s: %s was told that somebody else has ended token %d, whose key's fate is %s", election, el.p.name, t.token, life.fate)
		}
	case errors.Is(cause, leader.ErrExpired):
		e.Op = oracle.Expired
		w.result.Counts.Expired++
		if t.expired = !errors.Is(cause, leader.ErrClosed); !t.expired && !until.Add(time.Microsecond).Before(el.closing) { // as rounding has it
			e.Op = oracle.Resigned // given up with the client, before its deadline
		}
		if deadline := el.p.deadlines[t.lease]; t.expired && !passed(el.p.m.Now(), deadline) {
			w.violateLocked("cause", "%s: %s was told that token %d has expired, %v before its deadline", election, el.p.name, t.token, deadline.Sub(el.p.m.Now()))
		}
	default:
		w.violateLocked("cause", "%s: %s was told that token %d has ended because of %v", election, el.p.name, t.token, cause)
	}
	w.tellLocked(el, e)
	if context := l.Context().Err(); context == nil {
		w.violateLocked("cause", "%s: Ended was called for token %d of %s, whose context goes on", election, t.token, el.p.name)
	}
}

// sees records a term that its campaign has returned.
func (w *world) sees(c *call, l *leader.Leader) *term {
	_, until := c.p.counts(l.Deadline())
	w.mu.Lock()
	defer w.mu.Unlock()
	t := c.terms[l.Token()]
	if t == nil || t.told || c.p.dead.Load() {
		return t
	}
	e := oracle.Entry{Until: int64(until.Sub(w.began))}
	if c.run {
		e.Value = oracle.ByRun
	}
	t.toldLocked(e)
	if l.Context().Err() != nil {
		return t
	}
	context.AfterFunc(l.Context(), func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		t.lastsLocked()
	})
	return t
}

// toldLocked records that the work of the term begins.
func (t *term) toldLocked(e oracle.Entry) {
	t.told, t.since = true, t.p.w.now()
	e.Kind, e.From, e.Election, e.Token = oracle.Term, int64(t.call.began.Sub(t.p.w.began)), t.election, t.token
	e.Key, e.Lease, e.Op = t.l.Key(), t.lease, oracle.Ours
	t.p.w.tellLocked(t.call.el, e)
}

// lastsLocked records that the context of the term was live until now.
func (t *term) lastsLocked() {
	t.p.w.tellLocked(t.call.el, oracle.Entry{
		Kind: oracle.Belief, From: t.since, Election: t.election, Token: t.token, Op: oracle.ByContext,
	})
}

func (w *world) renewed(el *elector, id clientv3.LeaseID, deadline time.Time) {
	p := el.p
	sent, until := p.counts(deadline)
	w.mu.Lock()
	if p.deadlines[int64(id)].Before(deadline) {
		p.deadlines[int64(id)] = deadline
	}
	w.result.Counts.Renewals++
	w.tellLocked(el, oracle.Entry{Kind: oracle.Renewed, From: int64(sent.Sub(w.began)), Lease: int64(id), Until: int64(until.Sub(w.began))})
	w.mu.Unlock()
	w.checkDeadline(p, int64(id), deadline)
}

// counts says in true time when the renewal was sent from which a deadline counts, and what the deadline is.
func (p *process) counts(deadline time.Time) (sent, until time.Time) {
	lasts := p.w.ttl - p.w.margin
	sent = p.truly(deadline.Add(-lasts))
	return sent, sent.Add(p.m.Real(lasts))
}

// truly is the true time of one on the process's clocks that has passed.
func (p *process) truly(sent time.Time) time.Time {
	now := p.m.Now()
	ago := now.Sub(sent)
	if !p.set { // its machine may have been suspended, and its wall clock is right but for its rate
		ago = now.Round(0).Sub(sent.Round(0))
	}
	return time.Now().Add(-p.m.Real(ago))
}

// checkDeadline compares a deadline with the lessor's: a lease lives for its TTL from when a renewal was sent that counted.
func (w *world) checkDeadline(p *process, id int64, deadline time.Time) {
	if p.dead.Load() || p.m.Stopped() {
		return
	}
	sent, _ := p.counts(deadline)
	earliest := sent.Add(w.ttl)
	var expiry time.Time
	var counted bool
	w.cluster.Inspect(func(t fake.Truth) { expiry, counted = t.LeaseExpiry(id) })
	w.mu.Lock()
	defer w.mu.Unlock()
	gone, isGone := w.leases[id]
	switch {
	case isGone && (gone.fate.excuses() || gone.fate == byRequest):
	case isGone && gone.at.Before(earliest):
		w.violateLocked("lease", "%s: lease %x is gone since %v, although it was renewed at %v", p.name, id, gone.at.Sub(w.began), sent.Sub(w.began))
	case !isGone && counted && expiry.Before(earliest.Add(-time.Microsecond)):
		w.violateLocked("lease", "%s: lease %x expires at %v at etcd, and counts from %v here, as if until %v", p.name, id,
			expiry.Sub(w.began), sent.Sub(w.began), earliest.Sub(w.began))
	}
}

// believes asks whether the term holds, as its holder does. That one may be stopped.
func (t *term) believes() (yes bool) {
	if t.byContext {
		return t.l.Context().Err() == nil && !t.p.late()
	}
	t.p.shadow.Do(func() { yes = t.l.IsLeader() })
	return yes
}

// checkFirst: whoever is elected has nobody before it, even if its own key was taken meanwhile.
func (w *world) checkFirst(t *term) {
	w.mu.Lock()
	first := w.first(t.election)
	overtaken := first != nil && first.token < t.token
	w.mu.Unlock()
	if overtaken {
		w.violate("overtaken", "%s: %s is elected with token %d, while %d is the oldest", t.election, t.p.name, t.token, first.token)
	}
}

// checkBoth: no two believe at the same time. The older one is asked first: if it still believes it did so when
// the other was elected.
func (w *world) checkBoth(a, b *term) {
	if a.token > b.token {
		a, b = b, a
	}
	if a == b || a.p.dead.Load() || b.p.dead.Load() || a.p.m.Stopped() || !a.believes() || !b.believes() {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if a.p.dead.Load() || b.p.dead.Load() {
		return
	}
	fateA, fateB := w.lives[a.token].fate, w.lives[b.token].fate
	if fateA.excuses() || fateB.excuses() || a.p.slow && fateA == byExpiry {
		w.result.Counts.Excused++
		w.noteLocked("excused: %s believes in %d of %s (%s), and %s in %d (%s)", a.p.name, a.token, a.election, fateA, b.p.name, b.token, fateB)
		return
	}
	w.violateLocked("exclusion", "%s: %s believes in token %d, whose key's fate is %s, and %s in token %d (%s)",
		a.election, a.p.name, a.token, fateA, b.p.name, b.token, fateB)
}

// checkResumed looks at what a process believes that has been stopped.
func (w *world) checkResumed(p *process) {
	var pairs [][2]*term
	w.mu.Lock()
	for _, name := range w.names {
		for _, t := range w.terms[name] {
			for _, other := range w.terms[name] {
				if t.p == p && other.p != p {
					pairs = append(pairs, [2]*term{t, other})
				}
			}
		}
	}
	w.mu.Unlock()
	for _, pair := range pairs {
		go w.checkBoth(pair[0], pair[1])
	}
}

// checkExpired: nobody believes in a term whose key etcd has let expire.
func (w *world) checkExpired(t *term) {
	if !t.p.m.Stopped() && t.believes() && !t.p.dead.Load() {
		w.violate("margin", "%s: %s believes in token %d, whose lease etcd has let expire", t.election, t.p.name, t.token)
	}
}

// checkTaken: whose key was taken believes no longer than a renewal lasts that counted before.
func (w *world) checkTaken(t *term) {
	time.Sleep(t.p.m.Real(w.ttl-w.margin) + 10*time.Millisecond)
	if !w.over.Load() && !t.p.m.Stopped() && t.believes() && !t.p.dead.Load() {
		w.violate("margin", "%s: %s believes in token %d a whole term of its lease after its key was taken", t.election, t.p.name, t.token)
	}
}

package world

import (
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
	told    bool // it is in the history
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

// minPause is how long Run waits at least before it campaigns again after a term was lost.
const minPause = 50 * time.Millisecond

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
	if c == nil || c.campaigning || c.leadsLocked() {
		w.violateLocked("hooks", "%s: Campaigning was called, and %s campaigns or leads already", election, el.p.name)
		return
	}
	for _, other := range el.current[election] {
		if other != c && other.leadsLocked() {
			w.violateLocked("hooks", "%s: %s campaigns, and the same Elector leads by %s", election, c.value, other.value)
		}
	}
	c.campaigning = true
	if paused := el.p.m.Now().Sub(c.lost); !c.lost.IsZero() && paused < minPause {
		w.violateLocked("pace", "%s: Run campaigns again %v after a term was lost", election, paused)
	}
	c.lost = time.Time{}
	w.noteLocked("%s campaigns in %s", c.value, election)
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
	c.campaigning = false
	w.result.Counts.GivenUp++
	w.noteLocked("%s has failed in %s: %v", c.value, election, err)
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
	w.result.Counts.Terms++
	w.noteLocked("%s is elected in %s with token %d on lease %x until %v", c.value, election, t.token, lease, deadline.Sub(el.p.m.Now()))
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
	w.mu.Lock()
	defer w.mu.Unlock()
	if el.p.dead.Load() {
		return
	}
	t := c.terms[l.Token()]
	if t == nil || t.ended {
		w.violateLocked("hooks", "%s: Ended was called for token %d of %s, which does not lead", election, l.Token(), el.p.name)
		return
	}
	t.ended = true
	w.terms[election] = slices.DeleteFunc(w.terms[election], func(o *term) bool { return o == t })
	e := oracle.Entry{Kind: oracle.Ended, Proc: el.p.name, Election: election, Token: t.token, Err: cause.Error()}
	life, lease := w.lives[t.token], w.leases[t.lease]
	switch {
	case errors.Is(cause, leader.ErrResigned):
		e.Op = oracle.Resigned
		if !t.givenUp && !el.isClosed() {
			w.violateLocked("cause", "%s: %s was told that it has resigned token %d, and has not", election, el.p.name, t.token)
		}
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
		if t.expired = !errors.Is(cause, leader.ErrClosed); !t.expired {
			e.Op = oracle.Resigned // given up with the client
		}
		w.result.Counts.Expired++
		deadline, renewed := el.p.deadlines[t.lease]
		if renewed && !errors.Is(cause, leader.ErrClosed) && !passed(el.p.m.Now(), deadline) {
			w.violateLocked("cause", "%s: %s was told that token %d has expired, %v before its deadline", election, el.p.name, t.token, deadline.Sub(el.p.m.Now()))
		}
	default:
		w.violateLocked("cause", "%s: %s was told that token %d has ended because of %v", election, el.p.name, t.token, cause)
	}
	if t.told {
		w.recordLocked(e)
	} else {
		w.noteLocked("%s has lost token %d in %s: %v", el.p.name, t.token, election, cause)
	}
	if context := l.Context().Err(); context == nil {
		w.violateLocked("cause", "%s: Ended was called for token %d of %s, whose context goes on", election, t.token, el.p.name)
	}
}

// sees records a term that its campaign has returned.
func (w *world) sees(c *call, l *leader.Leader) *term {
	w.mu.Lock()
	defer w.mu.Unlock()
	t := c.terms[l.Token()]
	if t == nil || t.told || c.p.dead.Load() {
		return t
	}
	t.told = true
	w.recordLocked(oracle.Entry{
		Kind: oracle.Term, Proc: c.p.name, From: int64(c.began.Sub(w.began)), Election: c.election, Token: t.token,
		Key: l.Key(), Lease: t.lease, Op: "leader",
	})
	return t
}

// leaves says that the function that Run has called is about to return.
func (w *world) leaves(c *call, l *leader.Leader) {
	if l.IsLeader() || errors.Is(contextCause(l), leader.ErrResigned) {
		c.p.resigning(c, l)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	c.lost = c.p.m.Now()
}

func (w *world) renewed(p *process, id clientv3.LeaseID, deadline time.Time) {
	w.mu.Lock()
	if p.deadlines[int64(id)].Before(deadline) {
		p.deadlines[int64(id)] = deadline
	}
	w.result.Counts.Renewals++
	now := w.now()
	sent := p.sentAt(deadline, w)
	w.recordLocked(oracle.Entry{
		Kind: oracle.Renewed, Proc: p.name, From: min(now, int64(sent.Sub(w.began))), Lease: int64(id),
		Until: int64(sent.Add(min(w.ttl, p.m.Real(w.ttl))).Sub(w.began)), // a clock that is fast comes to the end of the TTL earlier
	})
	w.mu.Unlock()
	w.checkDeadline(p, int64(id), deadline)
}

// sentAt is the true time at which the renewal was sent from which a deadline counts.
func (p *process) sentAt(deadline time.Time, w *world) time.Time {
	now, sent := p.m.Now(), deadline.Add(w.margin-w.ttl) // by the process's clocks
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
	sent := p.sentAt(deadline, w)
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

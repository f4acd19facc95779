package world

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/fake"
)

// A sort of faults.
type sortOf struct {
	name   string
	strike func(*strike)
}

// maxActive is how many faults act at a time.
const maxActive = 6

// Sorts are the names of all sorts of faults.
func Sorts() []string {
	var names []string
	for _, s := range sorts {
		names = append(names, s.name)
	}
	return names
}

var sorts = []sortOf{
	{"kill-process", (*strike).killProcess},
	{"stop-short", func(s *strike) { s.p.halt(s.ttl(0.1, 0.7), false) }},
	{"stop-long", func(s *strike) { s.p.halt(s.ttl(1, 1.8), false) }},
	{"suspend", (*strike).suspend},
	{"wall-forward", (*strike).setForward},
	{"wall-back", (*strike).setBack},
	{"give-up", (*strike).giveUp},
	{"leave-election", (*strike).leaveElection},
	{"close-client", (*strike).closeClient},
	{"watch-deaf", (*strike).deafen},

	{"link-dark", func(s *strike) { s.dark(true, true, 0.2, 2) }},
	{"link-sending", func(s *strike) { s.dark(true, false, 0.2, 2) }},
	{"link-receiving", func(s *strike) { s.dark(false, true, 0.2, 2) }},
	{"link-reset", func(s *strike) { s.links((*fake.Link).Reset) }},
	{"link-slow", (*strike).slow},
	{"link-slow-dark", (*strike).slowThenDark},
	{"link-flapping", (*strike).flap},
	{"link-lossy", (*strike).lossy},
	{"endpoint-dark", (*strike).darkEndpoint},
	{"endpoint-refuses", (*strike).refuse},
	{"endpoint-late", (*strike).late},

	{"pause-member", func(s *strike) { s.pause(s.member) }},
	{"kill-member", (*strike).killMember},
	{"pause-raft-leader", func(s *strike) { s.pause(s.leader()) }},
	{"depose-raft-leader", (*strike).depose},
	{"move-raft-leader", func(s *strike) { s.w.cluster.MoveLeader(s.member) }},
	{"partition-member", (*strike).partition},
	{"pause-follower", (*strike).pauseFollower},
	{"slow-follower", (*strike).slowFollower},
	{"lag-member", (*strike).lag},
	{"quorum-lost-short", func(s *strike) { s.loseQuorum(0.1, 0.7) }},
	{"quorum-lost-long", func(s *strike) { s.loseQuorum(1, 2) }},
	{"compact", (*strike).compact},
	{"no-space", (*strike).noSpace},
	{"rate-limit", (*strike).limit},
	{"expire-tokens", func(s *strike) { s.w.cluster.ExpireTokens() }},

	{"operator-deletes-key", (*strike).deleteKey},
	{"operator-deletes-two", (*strike).deleteTwo},
	{"operator-revokes-lease", (*strike).revokeLease},
	{"operator-evicts", func(s *strike) { s.w.evictor.evict(s.election) }},
	{"operator-transfers", (*strike).transfer},

	{"reclaim-living", (*strike).reclaim},
	{"check-fails", func(s *strike) { s.sicken(failing) }},
	{"check-hangs", func(s *strike) { s.sicken(hanging) }},
}

// transfer hands the election over to a candidate, or to whoever is next.
func (s *strike) transfer() {
	w := s.w
	ctx, cancel := context.WithTimeout(w.ctx, s.ttl(0.2, 2))
	defer cancel()
	cs, err := w.evictor.e.Candidates(ctx, s.election)
	if err != nil || len(cs) == 0 {
		return
	}
	var to leader.Candidate
	if w.rng.IntN(3) > 0 {
		to = cs[w.rng.IntN(len(cs))]
	}
	e := oracle.Entry{Kind: oracle.Transfer, Proc: evictorName, From: w.now(), Election: s.election, Token: to.Token, Result: oracle.OK}
	switch err = w.evictor.e.Transfer(ctx, s.election, to); {
	case err == nil:
	case errors.Is(err, leader.ErrNotCandidate), errors.Is(err, leader.ErrNoLeader):
		e.Result, e.Err = oracle.Failed, err.Error()
	default:
		e.Result, e.Err = oracle.Unknown, err.Error()
		if ctx.Err() == nil && !w.violated() {
			w.violate("error", "Transfer of %s: %v", s.election, err)
		}
	}
	w.record(e)
}

// A strike is one fault.
type strike struct {
	w        *world
	p        *process
	member   int
	election string
}

// fault counts a fault.
func (w *world) fault(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.result.Faults[name]++
}

// faults strikes until it is calm.
func (w *world) faults() {
	chosen := slices.DeleteFunc(slices.Clone(sorts), func(s sortOf) bool {
		return len(w.Faults) > 0 && !slices.Contains(w.Faults, s.name)
	})
	active := 0
	for {
		w.untilCalm(time.Duration(w.rng.ExpFloat64() * float64(w.Every)))
		if w.calm.Load() || w.violated() {
			return
		}
		w.mu.Lock()
		full := active >= maxActive
		if !full {
			active++
		}
		w.mu.Unlock()
		if full {
			continue
		}
		chosen := chosen[w.rng.IntN(len(chosen))]
		s := &strike{w: w, p: w.victim(), member: w.rng.IntN(3), election: w.names[w.rng.IntN(len(w.names))]}
		w.fault(chosen.name)
		began := w.now()
		w.note("fault %s: %s, member %d, %s", chosen.name, s.p.name, s.member, s.election)
		go func() {
			chosen.strike(s)
			w.mu.Lock()
			defer w.mu.Unlock()
			active--
			w.recordLocked(oracle.Entry{Kind: oracle.Fault, Proc: "world", From: began, Op: chosen.name, Value: s.p.name})
		}()
	}
}

// victim is a process, one that leads every other time.
func (w *world) victim() *process {
	w.mu.Lock()
	defer w.mu.Unlock()
	if terms := w.terms[w.names[w.rng.IntN(len(w.names))]]; len(terms) > 0 && w.rng.IntN(2) == 0 {
		return terms[w.rng.IntN(len(terms))].p
	}
	return w.procs[w.rng.IntN(len(w.procs))]
}

// last lets a fault last, but not into the calm.
func (s *strike) last(d time.Duration) { s.w.untilCalm(d) }

// untilCalm blocks for d, or until it is calm or a rule is violated.
func (w *world) untilCalm(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end) && !w.calm.Load() && !w.violated(); {
		time.Sleep(min(time.Until(end), 100*time.Millisecond))
	}
}

// ttl is a random time between two multiples of the TTL.
func (s *strike) ttl(from, to float64) time.Duration {
	return time.Duration((from + s.w.rng.Float64()*(to-from)) * float64(s.w.ttl))
}

func (s *strike) between(from, to time.Duration) time.Duration {
	return from + time.Duration(s.w.rng.Int64N(int64(to-from)))
}

// links does the same to all links of the process.
func (s *strike) links(f func(*fake.Link)) {
	for i := range 3 {
		f(s.p.net.Link(i))
	}
}

// killProcess ends a process as SIGKILL does, and starts another in its place.
func (s *strike) killProcess() {
	w, p := s.w, s.p
	w.mu.Lock()
	if p.dead.Load() || w.calm.Load() {
		w.mu.Unlock()
		return
	}
	for _, name := range w.names {
		for _, t := range w.terms[name] {
			if t.p == p && t.told && t.l.Context().Err() == nil {
				t.lastsLocked()
			}
		}
	}
	for _, el := range p.electors {
		if since := el.telling; since != 0 || p.slowHooks { // renewals may have counted that were not told
			w.tellLocked(el, oracle.Entry{Kind: oracle.Busy, From: cmp.Or(since, w.now()), Op: string(oracle.Renewed)})
		}
	}
	p.dead.Store(true)
	exit := oracle.Entry{Kind: oracle.Exit, Proc: p.name, Result: oracle.OK, Err: "killed"}
	if p.filed {
		exit.Op = oracle.Filed
	}
	w.recordLocked(exit)
	var live []*term
	for _, name := range w.names {
		w.terms[name] = slices.DeleteFunc(w.terms[name], func(t *term) bool {
			if t.p == p {
				live = append(live, t)
			}
			return t.p == p
		})
	}
	w.mu.Unlock()
	p.net.Kill()
	s.reclaim()
	p.crash()
	p.goOn(true)
	w.untold(live)
	p.cancel()
	s.last(s.ttl(0, 1.2))
	// What is left of the program ends, without effect.
	<-p.ended
	p.crash()
	p.close()
	w.mu.Lock()
	w.result.Counts.Requests += p.net.Counters().Total()
	incarnation := w.sequence + 1
	w.sequence++
	over := w.over.Load()
	w.mu.Unlock()
	if over {
		return
	}
	next := w.newProcess(p.place, int(incarnation))
	w.mu.Lock()
	defer w.mu.Unlock()
	w.procs[p.place] = next
}

// untold records renewals that had counted when their process was killed, before its hook could tell.
func (w *world) untold(terms []*term) {
	for _, t := range terms {
		var deadline time.Time
		var leads bool
		t.p.shadow.Do(func() { deadline, leads = t.l.Deadline(), t.l.IsLeader() })
		sent, until := t.p.counts(deadline)
		w.mu.Lock()
		if leads && !t.p.slowHooks && t.p.deadlines[t.lease].Before(deadline) {
			w.recordLocked(oracle.Entry{
				Kind: oracle.Renewed, Proc: t.call.el.name, From: int64(sent.Sub(w.began)), Lease: t.lease, Until: int64(until.Sub(w.began)),
			})
		}
		w.mu.Unlock()
	}
}

func (s *strike) suspend() {
	if !s.p.set && machineClocks {
		s.p.halt(s.ttl(0.2, 1.8), true)
	}
}

func (s *strike) setForward() {
	if s.p.set && machineClocks {
		s.p.setWall(s.between(0, 2*s.w.ttl))
	}
}

func (s *strike) setBack() {
	if s.p.set && machineClocks {
		s.p.setWall(-s.between(0, time.Hour))
	}
}

func (p *process) setWall(forward time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resumed = time.Now()
	if forward > 0 {
		p.w.record(oracle.Entry{Kind: oracle.Clock, Proc: p.name, Op: oracle.Set})
	}
	p.m.SetWall(forward)
}

// giveUp gives up all campaigns of a process, again and again.
func (s *strike) giveUp() {
	for range 1 + s.w.rng.IntN(5) {
		s.p.giveUp()
		s.last(s.between(0, 300*time.Millisecond))
	}
}

// leaveElection lets the process leave an election for a while, or for good if it is calm then.
func (s *strike) leaveElection() {
	if s.leave() {
		s.last(s.ttl(0.5, 2))
		if !s.w.calm.Load() {
			s.p.leaves(s.election, false)
		}
	}
}

// leave lets the process leave an election as it has asked something of members that are dark then. What that does when
// they are not dark any more is in the way of others, for as long as the process keeps the lease for other elections.
// The first two processes stay.
func (s *strike) leave() bool {
	if s.p.place < 2 {
		return false
	}
	dark := s.w.rng.Perm(3)[:1+s.w.rng.IntN(3)]
	darken := func(yes bool) {
		for _, member := range dark {
			s.p.net.Link(member).Dark(yes, yes)
		}
	}
	s.p.giveUp() // it joins again
	s.last(s.between(0, 50*time.Millisecond))
	darken(true)
	s.last(s.between(0, 500*time.Millisecond))
	s.p.leaves(s.election, true)
	s.p.giveUp()
	s.last(s.between(0, time.Second))
	darken(false)
	return true
}

func (s *strike) closeClient() {
	p := s.p
	client := p.current()
	if client == nil || p.dead.Load() {
		return
	}
	done := make(chan struct{})
	p.m.Go(func() {
		defer close(done)
		p.closeClient(client)
	})
	<-done
}

func (s *strike) deafen() {
	s.p.net.Deafen()
	s.last(s.ttl(0.5, 3))
	s.p.net.Undeafen()
}

func (s *strike) dark(sending, receiving bool, from, to float64) {
	s.links(func(l *fake.Link) { l.Dark(sending, receiving) })
	s.last(s.ttl(from, to))
	s.links(func(l *fake.Link) { l.Dark(false, false) })
}

func (s *strike) slow() {
	d := s.between(0, 500*time.Millisecond)
	s.links(func(l *fake.Link) { l.Slow(d) })
	s.last(s.ttl(0.5, 2))
	s.links(func(l *fake.Link) { l.Slow(0) })
}

// slowThenDark lets answers come late, and then nothing for longer than the lease lasts: the last renewal that counted
// is older than it looks.
func (s *strike) slowThenDark() {
	d := s.between(0, s.w.ttl/3)
	s.links(func(l *fake.Link) { l.Slow(d) })
	s.last(s.ttl(0.3, 1))
	s.links(func(l *fake.Link) { l.Slow(0) })
	s.dark(true, true, 1.1, 2)
}

func (s *strike) flap() {
	for range 4 {
		s.dark(true, true, 0.1, 0.3)
		s.last(s.between(10*time.Millisecond, 300*time.Millisecond))
	}
}

// lossy loses, doubles and delays messages.
func (s *strike) lossy() {
	lost, doubled, delayed := 0.2*s.w.rng.Float64(), 0.3*s.w.rng.Float64(), 0.3*s.w.rng.Float64()
	late := s.ttl(0, 1)
	s.w.mu.Lock()
	s.w.result.Doubled = true
	s.w.mu.Unlock()
	s.links(func(l *fake.Link) { l.Messages(lost, doubled, delayed, late) })
	s.last(s.ttl(0.5, 4))
	s.links(func(l *fake.Link) { l.Messages(0, 0, 0, 0) })
}

// darkEndpoint takes one endpoint from all processes.
func (s *strike) darkEndpoint() {
	s.all(func(l *fake.Link) { l.Dark(true, true) })
	s.last(s.ttl(0.5, 3))
	s.all(func(l *fake.Link) { l.Dark(false, false) })
}

func (s *strike) all(f func(*fake.Link)) {
	for _, p := range s.w.processes() {
		f(p.net.Link(s.member))
	}
}

func (s *strike) refuse() {
	s.all(func(l *fake.Link) { l.Refuse(true) })
	s.last(s.ttl(0.5, 3))
	s.all(func(l *fake.Link) { l.Refuse(false) })
}

// late holds what a process sends to one member while its campaigns are given up, and delivers it when others may have begun.
func (s *strike) late() {
	l := s.p.net.Link(s.member)
	l.Dark(true, true)
	if s.w.rng.IntN(2) == 0 { // just long enough for another member to have answered
		s.p.giveUp()
		s.last(s.between(200*time.Millisecond, 500*time.Millisecond))
		l.Dark(false, false)
		return
	}
	end := time.Now().Add(s.ttl(0.2, 1.2))
	for time.Now().Before(end) && !s.w.calm.Load() && !s.w.violated() {
		s.last(s.between(10*time.Millisecond, 400*time.Millisecond))
		s.p.giveUp()
	}
	s.last(s.ttl(0, 0.5))
	l.Dark(false, false)
}

// leader is the member that leads, or one by chance.
func (s *strike) leader() int {
	m := s.member
	s.w.cluster.Inspect(func(t fake.Truth) {
		if l, _, ok := t.Leader(); ok {
			m = l
		}
	})
	return m
}

func (s *strike) pause(member int) {
	paused := s.w.now()
	s.w.cluster.Pause(member)
	s.last(s.ttl(0.2, 2))
	s.resume(member, paused)
}

func (s *strike) resume(member int, paused int64) {
	s.w.cluster.Resume(member)
	s.w.record(oracle.Entry{Kind: oracle.Resumed, Proc: fmt.Sprint("m", member), From: paused})
}

func (s *strike) killMember() {
	m := s.member
	if s.w.rng.IntN(2) == 0 {
		m = s.leader()
	}
	s.w.cluster.Kill(m)
	s.last(s.ttl(0.2, 2))
	s.w.cluster.Start(m)
}

// depose pauses etcd's leader until it is deposed, and lets it go on in a partition with one process: for a moment
// it takes itself for the leader still.
func (s *strike) depose() {
	c, m, paused := s.w.cluster, s.leader(), s.w.now()
	c.Pause(m)
	s.last(s.between(2*time.Second, 3*time.Second) + s.ttl(0, 0.7))
	for i := range 3 {
		if i != m {
			c.Cut(i, m)
			c.Cut(m, i)
			s.p.net.Link(i).Dark(true, true)
		}
	}
	s.resume(m, paused)
	s.last(s.between(100*time.Millisecond, 2*time.Second))
	for i := range 3 {
		if i != m {
			c.Mend(i, m)
			c.Mend(m, i)
		}
	}
	s.last(s.ttl(0, 1.2))
	for i := range 3 {
		s.p.net.Link(i).Dark(false, false)
	}
}

func (s *strike) partition() {
	c, m, way := s.w.cluster, s.member, s.w.rng.IntN(3)
	for i := range 3 {
		if i == m {
			continue
		}
		if way != 0 {
			c.Cut(i, m)
		}
		if way != 1 {
			c.Cut(m, i)
		}
	}
	s.last(s.ttl(0.3, 2))
	for i := range 3 {
		c.Mend(i, m)
		c.Mend(m, i)
	}
}

// pauseFollower pauses a member for short moments: when it goes on, watches there begin in the past.
func (s *strike) pauseFollower() {
	m := (s.leader() + 1 + s.w.rng.IntN(2)) % 3
	for range 10 {
		paused := s.w.now()
		s.w.cluster.Pause(m)
		s.last(s.between(100*time.Millisecond, 500*time.Millisecond))
		s.resume(m, paused)
		s.last(s.between(50*time.Millisecond, 300*time.Millisecond))
	}
}

// slowFollower lets a member hear late from the others.
func (s *strike) slowFollower() {
	c, m := s.w.cluster, (s.leader()+1+s.w.rng.IntN(2))%3
	d := s.between(50*time.Millisecond, 300*time.Millisecond)
	for i := range 3 {
		c.Slow(i, m, d)
		c.Slow(m, i, d)
	}
	s.last(s.ttl(0.5, 3))
	for i := range 3 {
		c.Slow(i, m, 0)
		c.Slow(m, i, 0)
	}
}

func (s *strike) lag() {
	s.w.cluster.Lag(s.member, s.between(0, 300*time.Millisecond))
	s.last(s.ttl(0.3, 3))
	s.w.cluster.Lag(s.member, 0)
}

func (s *strike) loseQuorum(from, to float64) {
	c, m, o := s.w.cluster, s.member, (s.member+1)%3
	kill, paused := s.w.rng.IntN(2) == 0, s.w.now()
	for _, m := range []int{m, o} {
		if kill {
			c.Kill(m)
		} else {
			c.Pause(m)
		}
	}
	s.last(s.ttl(from, to))
	for _, m := range []int{m, o} {
		if kill {
			c.Start(m)
		} else {
			s.resume(m, paused)
		}
		s.last(s.between(0, time.Second))
	}
}

// operate gives the operator some time.
func (s *strike) operate(f func(context.Context, fake.Operator) error) {
	ctx, cancel := context.WithTimeout(s.w.ctx, 5*time.Second)
	defer cancel()
	if err := f(ctx, s.w.cluster.Operator()); err != nil {
		s.w.note("the operator has failed: %v", err)
	}
}

func (s *strike) compact() {
	s.operate(func(ctx context.Context, o fake.Operator) error {
		var rev int64
		s.w.cluster.Inspect(func(t fake.Truth) { rev, _ = t.Revision() })
		return o.Compact(ctx, rev)
	})
}

func (s *strike) noSpace() {
	s.w.cluster.NoSpace(true)
	s.last(s.ttl(0.3, 1.5))
	s.w.cluster.NoSpace(false)
}

func (s *strike) limit() {
	s.w.cluster.Refuse(s.member, s.w.rng.Float64())
	s.last(s.ttl(0.3, 2))
	s.w.cluster.Refuse(s.member, 0)
}

// candidates are the keys of the election in the order of the queue.
func (s *strike) candidates() []*life {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	return slices.Clone(s.w.queues[s.election])
}

// candidate is one of them, the first for the most part.
func (s *strike) candidate() *life {
	q := s.candidates()
	if len(q) == 0 {
		return nil
	}
	if s.w.rng.IntN(3) == 0 {
		return q[s.w.rng.IntN(len(q))]
	}
	return q[0]
}

func (s *strike) deleteKey() {
	if l := s.candidate(); l != nil {
		s.operate(func(ctx context.Context, o fake.Operator) error { _, err := o.Delete(ctx, l.key); return err })
	}
}

func (s *strike) revokeLease() {
	if l := s.candidate(); l != nil {
		s.operate(func(ctx context.Context, o fake.Operator) error { return o.Revoke(ctx, l.lease) })
	}
}

// deleteTwo deletes the keys of the leader and of the next in line in one transaction, and gives the campaigns of
// that one up moments later.
func (s *strike) deleteTwo() {
	q := s.candidates()
	if len(q) < 2 {
		return
	}
	if len(q) > 2 && s.w.rng.IntN(2) == 0 {
		q = q[1:] // of two who wait
	}
	deaf := q[1].owner != nil && s.w.rng.IntN(4) == 0 // it learns of both by reads
	if deaf {
		q[1].owner.p.net.Deafen()
	}
	s.operate(func(ctx context.Context, o fake.Operator) error {
		_, err := o.Delete(ctx, q[0].key, q[1].key)
		return err
	})
	if deaf {
		s.last(s.ttl(0.5, 1.5))
		q[1].owner.p.net.Undeafen()
		return
	}
	if c := q[1].owner; c != nil && s.w.rng.IntN(3) != 0 {
		s.last(s.between(0, 2*time.Millisecond))
		c.p.giveUp()
	}
}

package world

import (
	"context"
	"runtime"
	"slices"
	"strings"
	"time"

	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/fake"
)

// Limits in calm, beside the TTL where that counts.
const (
	// prompt is how long a leader or candidate may take to act on an event, when nothing hinders it.
	prompt = 700 * time.Millisecond
	// rejoinWithin is how long a candidate may take to be back in the queue after it has lost its place.
	rejoinWithin = 3 * time.Second
	// sweepWithin is what etcd takes to find a lease that has expired, and what requests take besides.
	sweepWithin = 1500 * time.Millisecond
	// authPatience is how long a watch may take that has to authenticate, before it is tried on another stream.
	authPatience = 5 * time.Second
	// slowLink is how much longer a message takes on a slow link.
	slowLink = 100 * time.Millisecond
	// maxPause is the library's longest pause after a request that has failed.
	maxPause = 2 * time.Second
	// maxPace is how many reads and transactions a process may ask for in a second for each election that it takes part in.
	maxPace = 100
	// perCall is how many more it may send for each call that it makes in that second.
	perCall = 20
)

// limits are what the monitor holds everybody to at the moment. 0: nothing.
type limits struct {
	blocked time.Duration // how long the first of a queue may not lead
	queued  time.Duration // how long a candidate may have no key
	orphan  time.Duration // how long a key may be left whose owner is gone
	fresh   time.Duration // how long an observer may not know who leads
}

// monitor looks after everybody, all the time.
func (w *world) monitor() {
	since := make(map[any]time.Time) // what is wrong, by what it is about
	lasts := func(what any, wrong bool, limit time.Duration) (long bool) {
		if !wrong {
			delete(since, what)
			return false
		}
		if since[what].IsZero() {
			since[what] = time.Now()
		}
		return limit > 0 && time.Since(since[what]) > limit
	}
	second, minute := time.Now(), time.Now()
	for !w.over.Load() && !w.violated() {
		time.Sleep(50 * time.Millisecond)
		if time.Since(second) >= time.Second {
			second = time.Now()
			w.checkPace()
		}
		if time.Since(minute) >= time.Minute {
			minute = time.Now()
			runtime.GC()
		}
		w.mu.Lock()
		if w.calm.Load() && !w.over.Load() && len(w.result.Violations) == 0 {
			w.monitorLocked(lasts)
		}
		w.mu.Unlock()
	}
}

// checkPace looks how much each process has asked for in the last second.
func (w *world) checkPace() {
	for _, p := range w.processes() {
		n := p.net.Counters().Total()
		w.mu.Lock()
		asked, calls := p.asked, p.calls
		p.asked, p.calls = 0, 0
		w.result.Counts.MaxPace = max(w.result.Counts.MaxPace, n-p.requests)
		w.mu.Unlock()
		p.requests = n
		if asked > maxPace*len(w.names)+perCall*calls && !p.dead.Load() {
			w.violate("pace", "%s has asked etcd %d times in a second, in which it has made %d calls: %v", p.name, asked, calls, p.net.Counters().Requests)
		}
	}
}

// Things that may be wrong for a while.
type (
	blockedFirst struct{ token int64 }
	unqueued     struct{ c *call }
	orphaned     struct{ token int64 }
	stale        struct{ s *sight }
)

func (w *world) monitorLocked(lasts func(any, bool, time.Duration) bool) {
	for _, election := range w.names {
		for i, l := range w.queues[election] {
			if l.owner == nil {
				continue
			}
			t := l.owner.terms[l.token]
			if i == 0 && lasts(blockedFirst{l.token}, t == nil || t.ended, w.limits.blocked) {
				w.violateLocked("blocked", "%s: the key of %s with token %d has been the oldest for %v, and does not lead", election, l.owner.value, l.token, w.limits.blocked)
				return
			}
			owned := t != nil && !t.ended && t.l.Context().Err() == nil || t == nil && l.owner.campaigning && l.owner.newest == l.token
			if lasts(orphaned{l.token}, !owned, w.limits.orphan) {
				w.violateLocked("orphan", "%s: the key of %s with token %d has had no owner for %v", election, l.owner.value, l.token, w.limits.orphan)
				return
			}
		}
	}
	for _, p := range w.procs {
		for _, name := range w.names {
			for _, c := range w.callsLocked(p, name) {
				key := w.lives[c.newest]
				if lasts(unqueued{c}, c.campaigning && !p.slow && (key == nil || key.fate != alive) && p.sickness() == well, w.limits.queued) {
					w.violateLocked("queued", "%s: %s campaigns, and has had no key for %v", name, c.value, w.limits.queued)
					return
				}
			}
		}
	}
	for _, o := range w.observers {
		states := w.states[o.election]
		now := states[len(states)-1]
		if lasts(stale{o.sight}, !o.p.dead.Load() && (o.token != now.token || o.value != now.value), w.limits.fresh) {
			w.violateLocked("observe", "%s: %s has not been told for %v that %d leads with %q; it knows of %d with %q",
				o.election, o.p.name, w.limits.fresh, now.token, short(now.value), o.token, short(o.value))
			return
		}
	}
}

// callsLocked are the calls of a process in an election that are under way, in their order.
func (w *world) callsLocked(p *process, election string) (calls []*call) {
	for _, el := range p.electors {
		calls = append(calls, el.current[election]...)
	}
	return calls
}

// longest is how long d takes on the slowest of all clocks.
func (w *world) longest(d time.Duration) time.Duration {
	longest := d
	for _, p := range w.processes() {
		longest = max(longest, p.m.Real(d))
	}
	return longest
}

func (w *world) limit(l limits) {
	if w.auth { // a stream of watches is given that long, as it takes an authentication
		for _, limit := range []*time.Duration{&l.blocked, &l.fresh} {
			if *limit > 0 {
				*limit += authPatience
			}
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.limits = l
}

// probe looks, in calm, whether all heals in its documented time.
func (w *world) probe() {
	calm := w.now() + int64(w.ttl)
	// A lease that was renewed just before the calm expires, or etcd's last change of leader has given it a whole
	// TTL anew.
	w.sleep(2*w.ttl + 5*time.Second)
	quiet := limits{prompt, rejoinWithin, w.longest(w.ttl) + sweepWithin, prompt + 2*time.Second}
	w.limit(quiet)
	w.quiet.Store(true)
	w.sleep(w.ttl)
	w.record(oracle.Entry{Kind: oracle.Calm, Proc: "world", From: calm})
	if w.Unprobed {
		w.sleep(quiet.orphan)
		return
	}
	for _, f := range []func(){w.takeAKey, w.takeAKey, w.takeDeafLeaders, w.sickenALeader, w.deafen, w.slowLinks, w.darkenEndpoint, w.prolong, w.endOutage, w.errands} {
		if w.violated() {
			return
		}
		f()
		w.limit(limits{})
		w.cluster.Heal()
		for _, p := range w.processes() {
			p.net.Undeafen()
		}
		w.sleep(2*w.ttl + 5*time.Second)
		w.quiet.Store(true)
		w.limit(quiet)
		w.sleep(time.Second)
	}
}

// takeAKey takes the key of a leader or candidate, who notices.
func (w *world) takeAKey() {
	s := &strike{w: w, election: w.names[w.rng.IntN(len(w.names))]}
	l := s.candidate()
	if l == nil || l.owner == nil {
		return
	}
	w.note("probe: the key of %s is taken", l.owner.value)
	if w.rng.IntN(2) == 0 {
		s.operate(func(ctx context.Context, o fake.Operator) error { _, err := o.Delete(ctx, l.key); return err })
	} else {
		s.operate(func(ctx context.Context, o fake.Operator) error { return o.Revoke(ctx, l.lease) })
	}
	w.sleep(prompt)
	w.mu.Lock()
	t := l.owner.terms[l.token]
	w.mu.Unlock()
	if t != nil && !w.violated() && t.believes() && !t.p.dead.Load() {
		w.violate("evicted", "%s: %s believes in token %d %v after its key was taken in calm", l.election, t.p.name, l.token, prompt)
	}
	w.sleep(rejoinWithin)
}

// takeDeafLeaders takes keys of leaders whose watches are dead. Their renewals tell them.
func (w *world) takeDeafLeaders() {
	w.limit(limits{})
	for _, election := range w.names {
		w.mu.Lock()
		terms := slices.Clone(w.terms[election])
		w.mu.Unlock()
		for _, t := range terms {
			w.note("probe: %s is deaf, and its key in %s is taken", t.p.name, election)
			t.p.net.Deafen()
			s := &strike{w: w, election: election}
			if w.rng.IntN(2) == 0 {
				s.operate(func(ctx context.Context, o fake.Operator) error { _, err := o.Delete(ctx, t.l.Key()); return err })
			} else {
				s.operate(func(ctx context.Context, o fake.Operator) error { return o.Revoke(ctx, t.lease) })
			}
			w.sleep(t.p.m.Real(w.ttl/3) + 2*time.Second)
			if !w.violated() && t.believes() {
				w.violate("evicted", "%s: %s believes in token %d a third of a TTL and 2 s after its key was taken, deaf in calm", election, t.p.name, t.token)
			}
			t.p.net.Undeafen()
		}
	}
}

// deafen lets all watches die without a sign. Who waits reads the key before it once in a TTL.
func (w *world) deafen() {
	limit := w.longest(w.ttl) + 2*time.Second
	w.limit(limits{limit, 0, 0, limit + w.longest(w.ttl)})
	w.note("probe: all watches are deaf")
	for range 3 {
		for _, p := range w.processes() {
			p.net.Deafen()
		}
		w.sleep(w.ttl)
	}
	w.sleep(w.ttl)
}

// slowLinks lets everything take longer. Nothing is lost by it but time.
func (w *world) slowLinks() {
	// An attempt of a renewal has a way there and back, or, if its token has expired, two of them and one to authenticate.
	// It needs as much again, since a new stream takes a connection, and there are other delays.
	ways := 2
	if w.auth {
		ways = 6
	}
	for _, p := range w.processes() {
		if p.m.Real((w.ttl-w.margin-w.ttl/3)/3) < time.Duration(2*ways)*slowLink {
			return
		}
	}
	w.note("probe: links are slow")
	limit := 4 * time.Second
	w.limit(limits{limit, limit + rejoinWithin, w.longest(w.ttl) + sweepWithin + limit, limit + w.longest(w.ttl)})
	w.quiet.Store(false)
	w.keeps("slow links", func() {
		for _, p := range w.processes() {
			for i := range 3 {
				p.net.Link(i).Slow(slowLink)
			}
		}
		w.sleep(8 * w.ttl)
	})
}

// darkenEndpoint takes one endpoint of three away. Nobody loses a term by it.
func (w *world) darkenEndpoint() {
	m := w.rng.IntN(3)
	w.note("probe: endpoint %d is dark", m)
	limit := w.longest(w.ttl) + 5*time.Second
	w.limit(limits{limit, limit, w.longest(w.ttl) + limit, limit + w.longest(w.ttl)})
	w.quiet.Store(false)
	w.keeps("a dark endpoint", func() {
		for _, p := range w.processes() {
			p.net.Link(m).Dark(true, true)
		}
		w.sleep(6 * w.ttl)
	})
}

// prolong lets a term expire whose lease etcd has given its whole TTL anew, since its own leader has changed. Its holder
// revokes the lease when the margin has passed, so that nobody has to wait for the TTL.
func (w *world) prolong() {
	election := w.names[w.rng.IntN(len(w.names))]
	w.mu.Lock()
	var t *term
	if terms := w.terms[election]; len(terms) == 1 && terms[0].p.m.Rate() == 1 {
		t = terms[0]
	}
	w.mu.Unlock()
	if t == nil {
		return
	}
	w.note("probe: %s loses its term in %s, and etcd prolongs its lease", t.p.name, election)
	w.limit(limits{})
	w.quiet.Store(false)
	var deadline time.Time
	t.p.shadow.Do(func() { deadline = t.l.Deadline() })
	for i := range 3 {
		t.p.net.Link(i).Dark(true, true)
	}
	w.sleep(deadline.Sub(t.p.m.Now()) - w.margin/4)
	var leader int
	w.cluster.Inspect(func(t fake.Truth) { leader, _, _ = t.Leader() })
	w.cluster.MoveLeader((leader + 1) % 3)
	w.sleep(w.margin/4 + w.margin/2)
	w.cluster.Heal()
	w.sleep(w.margin/2 + 2*time.Second) // it looks at the clocks once a second, and sends a request
	w.mu.Lock()
	life := w.lives[t.token]
	left := life.fate == alive && life.key == t.l.Key()
	w.mu.Unlock()
	if left && t.ended && !t.call.el.isClosed() && !w.violated() { // Close leaves it to the lease
		w.violate("orphan", "%s: the key of %s with token %d is left 2 s after its lease might have expired, which etcd has prolonged", election, t.p.name, t.token)
	}
}

// endOutage ends an outage in which gRPC's pauses between attempts to connect have grown. Each attempt of the library's that
// fails ends gRPC's pause, and the next one, a pause of its own later, finds a connection.
func (w *world) endOutage() {
	w.note("probe: a long outage")
	w.limit(limits{})
	w.quiet.Store(false)
	for _, p := range w.processes() {
		for i := range 3 {
			p.net.Link(i).Refuse(true)
		}
	}
	w.sleep(time.Minute + time.Duration(w.rng.Int64N(int64(time.Minute))))
	w.cluster.Heal()
	w.sleep(w.longest(2 * maxPause))
	w.limit(limits{0, prompt, 0, 0})
	w.sleep(2 * time.Second)
}

// keeps calls f, in which no term may be lost.
func (w *world) keeps(what string, f func()) {
	before := w.counts()
	f()
	if after := w.counts(); after.Expired > before.Expired && !w.violated() {
		w.violate("kept", "%d terms have expired because of %s", after.Expired-before.Expired, what)
	}
}

func (w *world) counts() Counts {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.result.Counts
}

// checkLeft looks what is left when all have ended.
func (w *world) checkLeft() {
	time.Sleep(time.Second)
	w.mu.Lock()
	for _, p := range w.procs {
		for _, name := range w.names {
			for _, t := range w.terms[name] {
				if t.p == p {
					w.violateLocked("end", "%s: Ended was not called for token %d of %s", name, t.token, p.name)
				}
			}
		}
	}
	w.mu.Unlock()
	w.cluster.Inspect(w.checkKeysLeft)
	time.Sleep(w.ttl + sweepWithin)
	w.cluster.Inspect(func(t fake.Truth) {
		w.checkKeysLeft(t)
		for _, id := range t.Leases() {
			w.violate("end", "the lease %x is left", id)
		}
	})
}

func (w *world) checkKeysLeft(t fake.Truth) {
	for _, kv := range t.Keys("") {
		if key := string(kv.Key); !strings.HasPrefix(key, dataRoot) && !strings.HasSuffix(key, "/config") {
			w.violate("end", "the key %s is left", key)
		}
	}
}

//go:build linux

package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"example.com/leader"
)

const (
	ms     = int64(time.Millisecond)
	ttl    = 2000 * ms
	margin = 400 * ms
)

// runEntry is the entry of a run of these elections.
func runEntry(t int64, elections ...string) Entry {
	parameters, err := json.Marshal(Parameters{TTL: time.Duration(ttl), Margin: time.Duration(margin), Elections: elections})
	if err != nil {
		panic(err)
	}
	return Entry{T: t, Proc: "chaos", Kind: Run, Value: string(parameters)}
}

// A world makes up the history of a correct system. Its revisions are the very times at which they came
// to be, so that whatever happens in it can be told in any order.
type world struct {
	*rand.Rand
	history []Entry
	names   int64
}

// newHistory makes up a history of three elections, one of them with peers, of so many terms each.
func newHistory(seed uint64, terms int) []Entry {
	w := &world{Rand: rand.New(rand.NewPCG(seed, 0))}
	elections := []string{"chaos/a", "chaos/a/b", "chaos/mixed"}
	w.add(runEntry(1000*ms, elections...))
	for _, name := range elections {
		e := &contest{world: w, name: name, peers: name == "chaos/mixed", now: 1000*ms + 1}
		for range terms {
			e.term()
		}
		e.end()
	}
	w.add(
		Entry{T: 1000 * ms, Kind: Start, Proc: "c1", Op: "candidate"},
		Entry{T: 4500 * ms, From: 4000 * ms, Kind: GivenUp, Proc: "c1", Election: "chaos/a"},
		Entry{T: 5000 * ms, From: 4000 * ms, Kind: Fault, Op: "cut", Value: "c1"},
		Entry{T: 5000 * ms, From: 5000 * ms, Kind: Fault, Op: "pause", Err: "nobody leads"},
	)
	slices.SortStableFunc(w.history, func(a, b Entry) int { return cmp.Compare(a.T, b.T) })
	return w.history
}

func (w *world) add(entries ...Entry) { w.history = append(w.history, entries...) }

// within is a random time from..to.
func (w *world) within(from, to int64) int64 { return from + w.Int64N(to-from+1) }

func (w *world) chance(percent int) bool { return w.IntN(100) < percent }

// A contest is one election of a world.
type contest struct {
	*world
	name     string
	peers    bool
	now      int64
	queue    []*entrant
	changes  []change
	versions map[string][]version
	seq      int
}

// An entrant is a candidate.
type entrant struct {
	state
	proc, op string
	granted  int64
	renewed  int64 // when the last renewal was sent
}

// A change is one of the queue. Its value is "" if the key is deleted.
type change struct {
	t     int64
	key   *entrant
	value string
}

type version struct {
	t     int64
	value string
}

// event is told of some time after it happened.
func (e *contest) event(rev int64, op, key string, token int64, value string, lease int64) {
	e.add(Entry{T: rev + e.within(0, 15*ms), Proc: "audit", Kind: Event, Op: op, Key: key, Token: token, Value: value, Lease: lease, Rev: rev})
}

func (e *contest) put(t int64, n *entrant, value string) {
	e.event(t, "put", n.key, n.token, value, n.lease)
	e.changes = append(e.changes, change{t, n, value})
}

func (e *contest) remove(t int64, n *entrant) {
	token := n.token
	if e.chance(20) {
		token = 0
	}
	e.event(t, "delete", n.key, token, "", 0)
	e.changes = append(e.changes, change{t, n, ""})
}

func (e *contest) join(t int64) *entrant {
	e.names++
	n := &entrant{proc: fmt.Sprintf("c%d", e.names), op: "leader", granted: t - 2*ms, renewed: t - 2*ms}
	n.state = state{token: t, lease: e.names, key: fmt.Sprintf("%s/%x", e.name, e.names)}
	if e.peers && e.chance(50) {
		n.op = []string{"stock", "etcdctl"}[e.IntN(2)]
	}
	e.put(t, n, n.proc)
	return n
}

// renew renews a lease until a time, as far as that is due.
func (e *contest) renew(n *entrant, until int64) {
	for n.renewed+ttl/3 < until {
		n.renewed += ttl / 3
		at := n.renewed + e.within(1, 20*ms)
		if n.op == "leader" {
			e.add(Entry{T: at, From: n.renewed, Until: n.renewed + ttl, Proc: n.proc, Kind: Renewed, Lease: n.lease})
		}
	}
}

// term is one term, and what else happens in it.
func (e *contest) term() {
	if len(e.queue) == 0 {
		e.now = e.within(e.now, e.now+300*ms)
		e.queue = append(e.queue, e.join(e.now))
	}
	n := e.queue[0]
	e.queue = e.queue[1:]
	won := e.within(e.now, e.now+20*ms) + 1
	tell := func(t int64, kind Kind, err string) {
		e.add(Entry{T: t, Proc: n.proc, Kind: kind, Election: e.name, Token: n.token, Err: err})
	}
	e.add(Entry{T: won, From: n.granted - ms, Proc: n.proc, Kind: Term, Election: e.name, Token: n.token, Key: n.key, Lease: n.lease, Op: n.op})
	end := won + e.within(100*ms, 2500*ms) // of whatever can end it
	e.renew(n, end)
	expiry := n.renewed + ttl + e.within(0, 500*ms)
	deadline := n.renewed + ttl - margin
	gone := expiry
	believed := end
	op := []string{opIsLeader, opContext}[e.IntN(2)]
	how := e.IntN(8)
	if n.op != "leader" {
		op, how = n.op, 0
	}
	switch how {
	case 0, 1:
		tell(end, Resigning, "")
		gone = end + e.within(1, 5*ms)
		tell(gone+e.within(1, 2*ms), Ended, leader.ErrResigned.Error())
	case 2: // cut off
		believed = deadline - 1
		tell(deadline, Ended, leader.ErrExpired.Error())
		tell(deadline+e.within(0, ms), Resigning, "")
	case 3: // killed in the middle of a write
		e.add(Entry{T: end + 5*ms, Proc: n.proc, Kind: Exit, Result: OK, Err: "signal: killed"})
	case 4: // taken by an operator
		gone = end
		taken := Entry{
			T: end + e.within(1, 5*ms), From: end - e.within(0, 5*ms), Proc: "chaos", Kind: Taken, Op: "delete",
			Election: e.name, Token: n.token, Key: n.key, Lease: n.lease, Result: OK,
		}
		if e.chance(30) {
			taken.Result = Unknown
		}
		if e.chance(50) {
			taken.Op, taken.Election, taken.Token = "revoke", "chaos/other", 1 // one of those on the lease
		}
		e.add(taken)
		believed = end + e.within(0, 100*ms)
		tell(believed+1, Ended, leader.ErrEvicted.Error())
	case 5: // taken by a deposed leader of etcd
		gone = end
		e.add(Entry{T: end - e.within(0, 1000*ms), Proc: "m0", Kind: Resumed})
		believed = end + e.within(0, 100*ms)
		tell(believed+1, Ended, leader.ErrEvicted.Error())
	case 6: // paused
		resumed := gone + e.within(0, 1500*ms)
		if op == opContext {
			e.add(Entry{T: resumed, From: resumed + 1000, Proc: n.proc, Kind: Belief, Election: e.name, Token: n.token, Op: op})
		}
		tell(resumed+ms, Ended, leader.ErrExpired.Error())
		e.add(e.write(n, "register", resumed+2*ms, resumed+4*ms, Failed))
	case 7: // closed, and the lease revoked as soon as the term was over
		believed = deadline - 1
		tell(deadline, Ended, leader.ErrResigned.Error())
		gone = deadline + 1
	}
	e.believe(n, op, won, believed)
	if n.op != "leader" { // may believe what it likes
		e.believe(n, op, gone+200*ms, gone+700*ms)
	}
	e.work(n, won, end)
	if how == 3 {
		for i, what := range []string{"counter", "register"} {
			w := e.write(n, what, end, end, Unknown)
			e.take(&w, end+int64(i))
		}
	}
	e.crowd(won, gone-1)
	e.remove(gone, n)
	if len(e.queue) > 1 && e.chance(10) { // taken in the same revision
		e.remove(gone, e.queue[0])
		e.queue = e.queue[1:]
	}
	if e.chance(30) {
		e.add(Entry{T: gone, From: won - 1, Proc: "chaos", Kind: Calm}) // too short to count, for the most part
	}
	e.now = gone
}

// believe tells pieces of belief, with a short pause now and then.
func (e *contest) believe(n *entrant, op string, from, to int64) {
	piece := Entry{Proc: n.proc, Kind: Belief, Election: e.name, Token: n.token, Op: op}
	for from < to {
		piece.From, piece.T = from, min(from+e.within(1, 40*ms), to)
		e.add(piece)
		from = piece.T
		if e.chance(3) {
			from += e.within(0, 100*ms)
		}
	}
}

// crowd has others join, and some of them leave again.
func (e *contest) crowd(from, to int64) {
	for range e.IntN(3) {
		n := e.join(e.within(from, to))
		if e.chance(20) {
			e.remove(e.within(n.token+1, to+1), n)
			continue
		}
		e.queue = append(e.queue, n)
		e.renew(n, to)
	}
	slices.SortFunc(e.queue, func(a, b *entrant) int { return cmp.Compare(a.token, b.token) })
	for _, n := range e.queue {
		e.renew(n, to)
	}
}

// work is what a leader does.
func (e *contest) work(n *entrant, from, to int64) {
	for {
		at := e.within(from, from+60*ms)
		from = at + e.within(1, 30*ms)
		if from >= to {
			return
		}
		switch e.IntN(6) {
		case 0, 1, 2:
			e.guarded(n, []string{"counter", "register"}[e.IntN(2)], at, from)
		case 3:
			e.request(n, at, from)
		case 4:
			if n.op == "leader" {
				e.seq++
				e.put(at, n, fmt.Sprintf("%s/%d", n.proc, e.seq))
			}
		case 5:
			e.read([]string{"counter", "register"}[e.IntN(2)], at, from)
		}
	}
}

// last returns the value of a register at a time.
func (e *contest) last(what string, at int64) string {
	i, _ := slices.BinarySearchFunc(e.versions[what], at+1, func(v version, t int64) int { return cmp.Compare(v.t, t) })
	if i == 0 {
		return ""
	}
	return e.versions[what][i-1].value
}

// write returns the entry of a write of the next value.
func (e *contest) write(n *entrant, what string, from, to int64, result string) Entry {
	e.seq++
	base := e.last(what, from)
	number, _, _ := parse(base)
	return Entry{
		T: to, From: from, Proc: n.proc, Kind: Write, Election: e.name, Token: n.token, Op: what,
		Base: base, Value: fmt.Sprintf("%d %d:%d", number+1, n.token, e.seq), Result: result,
	}
}

// take puts a write into effect.
func (e *contest) take(w *Entry, at int64) {
	if e.versions == nil {
		e.versions = make(map[string][]version)
	}
	w.Rev = at
	e.versions[w.Op] = append(e.versions[w.Op], version{at, w.Value})
	e.event(at, "put", dataRoot+strings.TrimPrefix(e.name, root)+"/"+w.Op, e.versions[w.Op][0].t, w.Value, 0)
}

func (e *contest) guarded(n *entrant, what string, from, to int64) {
	at := e.within(from, to)
	w := e.write(n, what, from, to, OK)
	switch {
	case e.chance(70):
		e.take(&w, at)
	case e.chance(40):
		e.take(&w, at)
		w.Rev, w.Result, w.T = 0, Unknown, e.within(from, to)
	case e.chance(50):
		w.Result = Unknown
	default:
		w.Result = Failed
	}
	e.add(w)
}

func (e *contest) request(n *entrant, from, to int64) {
	e.seq++
	a := Entry{T: to, From: from, Proc: n.proc, Kind: Append, Election: e.name, Token: n.token, Value: fmt.Sprintf("%d:%d", n.token, e.seq), Result: OK}
	accepted := a
	accepted.T, accepted.From, accepted.Proc, accepted.Kind = e.within(from, to), 0, "resource", Accepted
	switch e.IntN(6) {
	case 0:
		a.Result = Unknown
		e.add(a)
	case 1:
		a.Result = Unknown
		e.add(a, accepted)
	case 2:
		a.Result, accepted.Result = Failed, Failed
		e.add(a, accepted)
	case 3:
		e.add(accepted) // killed before it could tell
	default:
		e.add(a, accepted)
	}
}

// read is one of a reader that may have begun long ago.
func (e *contest) read(what string, from, to int64) {
	at := e.within(from, to)
	e.add(Entry{T: to, From: from, Proc: "reader", Kind: Read, Election: e.name, Op: what, Value: e.last(what, at)})
}

// end has everybody leave, and tells what readers and observers have seen.
func (e *contest) end() {
	for _, n := range e.queue {
		e.remove(e.now, n)
		e.now++
	}
	for range 300 {
		at := e.within(1000*ms, e.now)
		from, to := at-e.within(0, 30*ms), at+e.within(0, 30*ms)
		for _, what := range []string{"counter", "register"} {
			e.add(Entry{T: to, From: from, Proc: "reader", Kind: Read, Election: e.name, Op: what, Value: e.last(what, at)})
		}
	}
	e.add(Entry{T: e.now, From: 1000 * ms, Proc: "chaos", Kind: Calm})
	states := e.leaders()
	for i := range 6 {
		e.observe(states, fmt.Sprint(i))
	}
}

// A state of a contest holds from a time on.
type since struct {
	t int64
	state
}

// leaders plays the changes of the queue.
func (e *contest) leaders() []since {
	slices.SortStableFunc(e.changes, func(a, b change) int { return cmp.Compare(a.t, b.t) })
	states := []since{{}}
	values := make(map[*entrant]string)
	for i, c := range e.changes {
		if values[c.key] = c.value; c.value == "" {
			delete(values, c.key)
		}
		if i+1 < len(e.changes) && e.changes[i+1].t == c.t {
			continue
		}
		s := since{t: c.t}
		for n, value := range values {
			if s.token == 0 || n.token < s.token {
				s.state = n.state
				s.value = value
			}
		}
		if s.state != states[len(states)-1].state {
			states = append(states, s)
		}
	}
	return states
}

// observe is one call of Observe: it begins somewhere, leaves states out, and ends by its ctx, or is
// killed, or sees the last state.
func (e *contest) observe(states []since, call string) {
	last := e.chance(50)
	o := Entry{T: 1000 * ms, Proc: "observer", Kind: Observed, Election: e.name, Op: call}
	yield := func(s since) {
		o.Token, o.Key, o.Value, o.Lease = s.token, s.key, s.value, s.lease
		o.T = max(o.T, s.t) + e.within(0, 10*ms)
		e.add(o)
	}
	for i := e.IntN(len(states)); i < len(states)-1; i++ {
		if e.chance(80) {
			yield(states[i])
		}
		if !last && e.chance(5) {
			break
		}
	}
	if last {
		yield(states[len(states)-1])
		o.T = e.now + 2500*ms
	}
	if last || e.chance(50) {
		e.add(Entry{T: o.T + 1, Proc: o.Proc, Kind: Observed, Election: e.name, Op: call, Err: "context canceled"})
	}
}

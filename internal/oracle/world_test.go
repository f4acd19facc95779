package oracle

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	ms     = int64(time.Millisecond)
	ttl    = 2000 * ms
	margin = 400 * ms
)

// worldOptions are those of the histories of these tests.
var worldOptions = Options{
	TTL: time.Duration(ttl), Margin: time.Duration(margin), Data: "chaos/data/", DeposedAfter: 500 * time.Millisecond,
	Elections: []string{"chaos/a", "chaos/a/b", "chaos/mixed"},
	Require: []Kind{
		Run, Fault, Calm, CampaignFailed, Changed, Resigning, Renewed, Read, Append, Observed, ObserveEnded, Current, Candidates,
	},
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
	w.add(Entry{T: 1000 * ms, Proc: "chaos", Kind: Run})
	end, calm := int64(0), int64(never)
	for _, name := range worldOptions.Elections {
		e := &contest{world: w, name: name, peers: name == "chaos/mixed", now: 1000*ms + 1, changing: fmt.Sprint("l", name)}
		for range terms {
			e.term()
		}
		calm = min(calm, e.now)
		e.end()
		end = max(end, e.now)
	}
	w.add(
		Entry{T: 1000 * ms, Kind: Start, Proc: "c1", Op: "candidate"},
		Entry{T: 5000 * ms, From: 4000 * ms, Kind: Fault, Op: "cut", Value: "c1"},
		Entry{T: 5000 * ms, From: 5000 * ms, Kind: Fault, Op: "pause", Err: "nobody leads"},
		// All is as if there had been no faults. A call that fails is then the only thing that must not be.
		Entry{T: calm, From: 1000 * ms, Proc: "chaos", Kind: Calm},
		Entry{T: end + 20*ms, Proc: "audit", Kind: AuditEnd, Rev: end + 1},
	)
	Sort(w.history)
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

	changing string // the process whose hook LeaderChanged is called
}

// An entrant is a candidate.
type entrant struct {
	leading
	proc, op string
	began    int64 // its campaign
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

// tell is what a candidate tells of its election.
func (e *contest) tell(t int64, n *entrant, kind Kind, op string) {
	entry := Entry{T: t, Proc: n.proc, Kind: kind, Election: e.name, Op: op}
	switch kind {
	case Elected, Ended, Resigning:
		entry.Token = n.token
	}
	if kind == Ended {
		entry.Until = t
	}
	e.add(entry)
}

// join puts the key of a new candidate.
func (e *contest) join(t int64) *entrant {
	n := &entrant{op: Ours, began: t - e.within(2, 300)*ms/100}
	e.names++
	n.proc = fmt.Sprintf("c%d", e.names)
	if e.peers && len(e.changes) > 0 && e.chance(50) {
		n.op = []string{"stock", "etcdctl"}[e.IntN(2)]
		n.proc = n.op
	} else {
		e.tell(n.began, n, Campaigning, "")
	}
	e.enlist(n, t)
	return n
}

// enlist puts a key, under a lease of its own.
func (e *contest) enlist(n *entrant, t int64) {
	e.names++
	n.leading = leading{token: t, lease: e.names, key: fmt.Sprintf("%s/%x", e.name, e.names)}
	n.renewed = n.began
	e.put(t, n, n.proc)
}

// renew renews a lease until a time, as far as that is due.
func (e *contest) renew(n *entrant, until int64) {
	for n.renewed+ttl/3 < until {
		n.renewed += ttl / 3
		at := n.renewed + e.within(1, 20*ms)
		if n.op == Ours {
			e.add(Entry{T: at, From: n.renewed + e.within(0, ms), Until: n.renewed + ttl - margin, Proc: n.proc, Kind: Renewed, Lease: n.lease})
		}
	}
}

// give ends a campaign that has not been won.
func (e *contest) give(n *entrant, t int64) {
	if n.op == Ours {
		e.tell(t-1, n, GivingUp, "")
		e.tell(t+e.within(1, 100*ms), n, CampaignFailed, GaveUp)
	}
}

// term is one term, and what else happens in it.
func (e *contest) term() {
	if len(e.queue) == 0 {
		e.now = e.within(e.now+5*ms, e.now+300*ms)
		e.queue = append(e.queue, e.join(e.now))
	}
	n := e.queue[0]
	e.queue = e.queue[1:]
	won := e.within(e.now, e.now+20*ms) + 2
	e.renew(n, won)
	if n.op == Ours {
		e.tell(won-1, n, Elected, "")
	}
	e.add(Entry{
		T: won, From: n.began, Proc: n.proc, Kind: Term, Election: e.name, Token: n.token, Key: n.key, Lease: n.lease,
		Until: n.renewed + ttl - margin, Op: n.op,
	})
	if e.chance(80) {
		e.read(n, "register", won, won+e.within(0, 20*ms))
	}
	end := won + e.within(100*ms, 2500*ms) // of whatever can end it
	e.renew(n, end)
	expiry := n.renewed + ttl + e.within(0, 500*ms)
	deadline := n.renewed + ttl - margin
	gone := expiry
	believed := end
	op := []string{ByIsLeader, ByContext, ByRun}[e.IntN(3)]
	how := e.IntN(11)
	switch {
	case n.op != Ours:
		op, how = n.op, 0
	case e.peers && how == 3:
		how = 0 // somebody is to tell an end
	}
	switch how {
	case 0, 1:
		e.tell(end, n, Resigning, "")
		gone = end + e.within(1, 5*ms)
		if n.op == Ours {
			e.tell(gone+e.within(1, 2*ms), n, Ended, Resigned)
		}
	case 2: // cut off
		believed = deadline - 1
		e.tell(deadline, n, Ended, Expired)
		e.tell(deadline+e.within(0, ms), n, Resigning, "")
	case 3: // killed in the middle of a write
		exit := Entry{T: end + 5*ms, From: end, Proc: n.proc, Kind: Exit, Result: OK, Err: "signal: killed"}
		if e.chance(50) { // it has a lease file, which somebody watches
			e.add(Entry{T: n.began, Proc: n.proc, Kind: Granted, Lease: n.lease})
			exit.Op = Attended
			gone = end + e.within(5*ms, 50*ms)
			e.add(Entry{T: gone + 1, From: gone - 1, Proc: "sidecar", Kind: Revoked, Lease: n.lease},
				Entry{T: gone + 2, From: n.began, Proc: "sidecar", Kind: Reclaimed, Election: e.name, Value: n.proc, Result: OK},
				Entry{T: gone + 200*ms, From: gone + 100*ms, Proc: "sidecar", Kind: Reclaimed, Election: e.name, Value: n.proc, Result: OK})
		}
		e.add(exit)
	case 4: // taken by an operator
		gone = end
		e.taken(n, gone)
		believed = end + e.within(0, 100*ms)
		e.tell(believed+1, n, Ended, Evicted)
		if e.chance(50) {
			e.tell(believed+2, n, Resigning, "")
		}
	case 5: // taken by a deposed leader of etcd
		gone = end
		resumed := end - e.within(0, 1000*ms)
		e.add(Entry{T: resumed, From: resumed - e.within(500*ms, 3000*ms), Proc: "m0", Kind: Resumed})
		believed = end + e.within(0, 100*ms)
		e.tell(believed+1, n, Ended, Evicted)
	case 6: // stopped
		resumed := gone + e.within(0, 1500*ms)
		e.add(Entry{T: resumed, From: end, Proc: n.proc, Kind: Stopped})
		if op != ByIsLeader {
			e.add(Entry{T: resumed + e.within(0, 100*ms), From: resumed, Proc: n.proc, Kind: Belief, Election: e.name, Token: n.token, Op: op})
		}
		e.tell(resumed+101*ms, n, Ended, Expired)
		w := e.write(n, "register", resumed+2*ms, resumed+4*ms, Failed)
		e.add(w)
	case 7: // closed
		believed = end
		e.tell(end, n, Closing, "")
		gone = end + e.within(1, 5*ms)
		e.tell(end+e.within(1, 2*ms), n, Ended, Resigned)
		e.add(Entry{T: gone + e.within(1, 2*ms), From: end, Proc: n.proc, Kind: Closed, Election: e.name, Result: OK})
	case 8: // cut off, and the lease revoked when its margin was over
		believed = deadline - 1
		e.tell(deadline, n, Ended, Expired)
		gone = n.renewed + ttl + 1
	case 9: // asked to step back, and its work takes a while to stop
		e.event(end-1, "put", n.key+"/stepback", end-1, fmt.Sprint(n.token), 0)
		e.tell(end+1, n, Ended, Transferred)
		gone = end + e.within(2, 1000*ms)
		e.tell(gone-1, n, Resigning, "")
		e.renew(n, gone)
	case 10: // its checks fail, and its work hangs
		last := n.began
		for ; last+500*ms < end; last += 500 * ms {
			e.check(n, last, OK)
		}
		e.check(n, last, OK)
		e.check(n, last+500*ms, Failed)
		believed = last + ttl - margin
		e.tell(believed+1, n, Ended, Unhealthy)
		gone = believed + margin
		e.tell(gone+e.within(1, 2000*ms), n, Resigning, "")
		e.renew(n, gone)
	}
	e.believe(n, op, won, believed)
	if n.op != Ours { // may believe what it likes
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
		next := e.queue[0]
		e.queue = e.queue[1:]
		e.remove(gone, next)
		e.add(Entry{T: gone + ms, From: gone - ms, Proc: "chaos", Kind: Taken, Op: Delete, Election: e.name, Token: next.token, Result: OK, Rev: gone})
		e.give(next, gone+ms)
	}
	e.now = gone
}

// check is a check of health.
func (e *contest) check(n *entrant, t int64, result string) {
	e.add(Entry{T: t, From: t, Proc: n.proc, Kind: Checked, Election: e.name, Result: result})
}

// taken tells that an operator took a key.
func (e *contest) taken(n *entrant, gone int64) {
	taken := Entry{
		T: gone + e.within(1, 5*ms), From: gone - e.within(0, 5*ms), Proc: "chaos", Kind: Taken, Op: Delete,
		Election: e.name, Token: n.token, Key: n.key, Lease: n.lease, Result: OK, Rev: gone,
	}
	if e.chance(30) {
		taken.Result, taken.Rev = Unknown, gone+e.within(0, ms)
	}
	switch e.IntN(3) {
	case 0:
		taken.Op, taken.Election, taken.Token = Revoke, "chaos/other", 1 // one of those on the lease
	case 1:
		taken.Op, taken.Rev, taken.Key, taken.Lease = Evict, e.within(0, 1)*(gone+e.within(0, 2*ms)), "", 0
		if e.chance(50) {
			taken.Token = 0 // nobody led when that was asked
		}
	}
	e.add(taken)
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

// crowd has others join, and some of them leave again, or lose their keys and join again.
func (e *contest) crowd(from, to int64) {
	for range e.IntN(4) {
		n := e.join(e.within(from, to))
		if n.token > to-2*ms {
			e.queue = append(e.queue, n)
			continue
		}
		left := e.within(n.token+1, to)
		switch how := e.IntN(10); {
		case n.op != Ours && how < 2:
			e.remove(left, n)
			continue
		case n.op != Ours:
		case how == 0:
			e.renew(n, left)
			e.remove(left, n)
			e.give(n, left)
			continue
		case how == 1: // it was not to wait
			e.remove(n.token+1, n)
			failed := n.token + e.within(2, 20*ms)
			e.tell(failed, n, CampaignFailed, Held)
			e.add(Entry{T: failed + e.within(0, 2*ms), From: n.began - 1, Proc: n.proc, Kind: Tried, Election: e.name})
			continue
		case how == 2: // its join arrives late
			e.tell(n.token-2, n, GivingUp, "")
			e.tell(n.token-1, n, CampaignFailed, GaveUp)
			e.remove(min(left, n.token+500*ms), n)
			continue
		case how == 3: // an operator takes its key
			e.renew(n, left)
			e.remove(left, n)
			e.taken(n, left)
			again := *n
			again.began = left
			e.enlist(&again, left+e.within(1, 20*ms))
			n = &again
		case how == 4: // it was cut off, so that its session is over, and joins again
			left = n.renewed + ttl - margin
			if left < to {
				e.remove(left, n)
				again := *n
				again.began = left
				e.enlist(&again, left+e.within(1, 20*ms))
				n = &again
			}
		}
		e.queue = append(e.queue, n)
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
			if n.op == Ours {
				e.seq++
				value := fmt.Sprintf("%s/%d", n.proc, e.seq)
				result := Unknown
				if e.chance(80) {
					e.put(at, n, value)
					result = OK
				}
				e.add(Entry{T: from, From: at, Proc: n.proc, Kind: Proclaimed, Election: e.name, Token: n.token, Value: value, Result: result})
			}
		case 5:
			e.read(n, []string{"counter", "register"}[e.IntN(2)], at, from)
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
	e.event(at, "put", worldOptions.DataKey(e.name, w.Op), e.versions[w.Op][0].t, w.Value, 0)
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
	case 2: // an older leader's comes late
		refused := a
		refused.Token, refused.Value, refused.Result = a.Token-1, fmt.Sprintf("%d:%d", a.Token-1, e.seq), Failed
		late := accepted
		late.T, late.Token, late.Value, late.Result = accepted.T+1, refused.Token, refused.Value, Failed
		e.add(a, accepted, refused, late)
	case 3:
		e.add(accepted) // killed before it could tell
	default:
		e.add(a, accepted)
	}
}

// read is one of a reader that may have begun long ago.
func (e *contest) read(n *entrant, what string, from, to int64) {
	at := e.within(from, to)
	e.add(Entry{T: to, From: from, Proc: n.proc, Kind: Read, Election: e.name, Token: n.token, Op: what, Value: e.last(what, at), Rev: at})
}

// end has everybody leave, and tells what readers and observers have seen.
func (e *contest) end() {
	e.now += 5 * ms
	for _, n := range e.queue {
		e.remove(e.now, n)
		e.give(n, e.now)
		e.now++
	}
	for range 300 {
		at := e.within(1000*ms, e.now)
		from, to := at-e.within(0, 30*ms), at+e.within(0, 30*ms)
		for _, what := range []string{"counter", "register"} {
			e.add(Entry{T: to, From: from, Proc: "reader", Kind: Read, Election: e.name, Op: what, Value: e.last(what, at), Rev: at})
		}
	}
	states, lines := e.play()
	for i := range 6 {
		e.observe(states, Entry{Proc: "observer", Kind: Observed, Election: e.name, Op: fmt.Sprint(i)})
	}
	e.notice(states)
	for range 50 {
		e.ask(states, lines)
	}
	e.now += 100 * ms // for what is told late
}

// play plays the changes of the queue.
func (e *contest) play() (states []state, lines []line) {
	slices.SortStableFunc(e.changes, func(a, b change) int { return cmp.Compare(a.t, b.t) })
	states, lines = []state{{}}, []line{{}}
	values := make(map[*entrant]string)
	for i, c := range e.changes {
		if values[c.key] = c.value; c.value == "" {
			delete(values, c.key)
		}
		if i+1 < len(e.changes) && e.changes[i+1].t == c.t {
			continue
		}
		s := state{since: span{c.t, c.t}}
		var tokens []string
		for _, n := range sortedKeys(values, func(a, b *entrant) int { return cmp.Compare(a.token, b.token) }) {
			if s.token == 0 {
				s.leading = n.leading
				s.value = values[n]
			}
			tokens = append(tokens, strconv.FormatInt(n.token, 10))
		}
		if s.leading != states[len(states)-1].leading {
			states = append(states, s)
		}
		lines = append(lines, line{strings.Join(tokens, " "), span{c.t, c.t}})
	}
	return states, lines
}

// with returns the entry with whoever leads.
func (s state) with(e Entry) Entry {
	e.Token, e.Key, e.Value, e.Lease = s.token, s.key, s.value, s.lease
	return e
}

// observe is one call of Observe: it begins somewhere, leaves states out that do not last, and ends by its ctx, or is
// killed, or sees the last state.
func (e *contest) observe(states []state, call Entry) {
	i := e.IntN(len(states))
	call.T = max(1000*ms, states[i].since.to) + e.within(0, 10*ms)
	tell := func(kind Kind, err string) {
		e.add(Entry{T: call.T, Proc: call.Proc, Kind: kind, Election: call.Election, Op: call.Op, Err: err})
	}
	tell(Observing, "")
	toEnd := e.chance(50)
	told := -1
	for ; i < len(states); i++ {
		s := states[i]
		brief := i+1 < len(states) && states[i+1].since.to < s.since.to+500*ms
		if brief && e.chance(20) || told >= 0 && states[told].leading == s.leading {
			continue
		}
		told = i
		call.T = max(call.T, s.since.to) + e.within(0, 10*ms)
		e.add(s.with(call))
		if !toEnd && e.chance(5) {
			break
		}
	}
	if toEnd {
		call.T = max(call.T, e.now+2500*ms)
	}
	call.T++
	tell(ObserveEnded, "context canceled")
}

// notice is what the hook LeaderChanged is told, in campaigns of one process that never gets to lead.
func (e *contest) notice(states []state) {
	n := &entrant{proc: e.changing, op: Ours}
	last := leading{token: -1}
	i := 0
	for t := 1000 * ms; t < e.now; {
		until := e.within(t+ms, t+2900*ms)
		e.tell(t, n, Campaigning, "")
		for i+1 < len(states) && states[i+1].since.to <= t {
			i++
		}
		for ; states[i].since.to < until; i++ {
			at := max(t, states[i].since.to) + e.within(0, 10*ms)
			if at >= until {
				break
			}
			if states[i].leading != last {
				last = states[i].leading
				e.add(states[i].with(Entry{T: at, Proc: n.proc, Kind: Changed, Election: e.name}))
				t = at
			}
			if i+1 == len(states) {
				break
			}
		}
		e.give(n, until)
		t = until + e.within(200*ms, 300*ms)
	}
}

// ask is a question who leads, and who is in the queue.
func (e *contest) ask(states []state, lines []line) {
	at := e.within(1000*ms, e.now)
	from, to := at-e.within(0, 30*ms), at+e.within(0, 30*ms)
	i, _ := slices.BinarySearchFunc(states, at+1, func(s state, t int64) int { return cmp.Compare(s.since.to, t) })
	e.add(states[i-1].with(Entry{T: to, From: from, Proc: "observer", Kind: Current, Election: e.name}))
	i, _ = slices.BinarySearchFunc(lines, at+1, func(l line, t int64) int { return cmp.Compare(l.since.to, t) })
	e.add(Entry{T: to, From: from, Proc: "observer", Kind: Candidates, Election: e.name, Value: lines[i-1].tokens})
}

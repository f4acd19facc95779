package world

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/fake"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// A fate is how a key or a lease has come to its end.
type fate string

const (
	alive      fate = "alive"
	byOperator fate = "operator" // somebody took it
	byEarly    fate = "early"    // a deposed leader of etcd has revoked what had not expired
	byExpiry   fate = "expiry"
	byRequest  fate = "request" // of a process under test
)

// excuses reports whether somebody else has ended what its owner relied on.
func (f fate) excuses() bool { return f == byOperator || f == byEarly }

// A life is that of one candidate's key.
type life struct {
	election, key, value string
	token, lease         int64
	owner                *call // nil if it is nobody's
	created, gone        time.Time
	fate                 fate
}

// truth is what etcd has committed.
type truth struct {
	lives  map[int64]*life    // by token
	queues map[string][]*life // of each election, in the order of tokens
	leases map[int64]ended    // those that are gone
	states map[string][]state // who was the first of each election, one after the other
}

// ended says when and how a lease has ended.
type ended struct {
	at   time.Time
	fate fate
}

// A state is who is the first of an election.
type state struct {
	token int64 // 0: nobody
	value string
	since time.Time
}

func newTruth() truth {
	return truth{
		lives:  make(map[int64]*life),
		queues: make(map[string][]*life),
		leases: make(map[int64]ended),
		states: make(map[string][]state),
	}
}

// first is who leads by right, nil if nobody.
func (t *truth) first(election string) *life {
	if q := t.queues[election]; len(q) > 0 {
		return q[0]
	}
	return nil
}

// electionOf returns the election and the lease in a candidate's key.
func electionOf(key string) (election string, lease int64, ok bool) {
	i := strings.LastIndexByte(key, '/')
	if i < 0 || !slices.Contains(elections, key[:i]) {
		return "", 0, false
	}
	lease, err := strconv.ParseInt(key[i+1:], 16, 64)
	return key[:i], lease, err == nil && strconv.FormatInt(lease, 16) == key[i+1:]
}

// dataRoot is the prefix of what leaders write.
const dataRoot = "data/"

// committed is told of each entry of etcd's log.
func (w *world) committed(_ fake.Truth, c fake.Commit) {
	if c.Err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	how := byRequest
	switch {
	case c.Process == fake.OperatorName, c.Process == evictorName:
		how = byOperator
	case c.Expiry == fake.TrueExpiry:
		how = byExpiry
	case c.Expiry == fake.EarlyExpiry:
		how = byEarly
	}
	if r, ok := c.Request.(*pb.LeaseGrantRequest); ok {
		w.recordLocked(oracle.Entry{Kind: oracle.Granted, Proc: c.Process, Lease: r.ID})
	}
	if r, ok := c.Request.(*pb.LeaseRevokeRequest); ok {
		if how == byRequest {
			w.recordLocked(oracle.Entry{Kind: oracle.Revoked, Proc: c.Process, From: w.now(), Lease: r.ID})
		}
		w.leases[r.ID] = ended{time.Now(), how}
		w.noteLocked("lease %x is gone: %s %s", r.ID, how, c.Process)
		if how.excuses() && len(c.Events) > 0 {
			w.takenLocked(how, oracle.Entry{Op: oracle.Revoke, Lease: r.ID, Rev: c.Events[0].Kv.ModRevision})
		}
	}
	for _, ev := range c.Events {
		key := string(ev.Kv.Key)
		if election, _, ok := electionOf(key); ok {
			w.candidateChangedLocked(election, ev, how, c.Process)
		} else if strings.HasSuffix(key, "/stepback") && ev.Type == mvccpb.Event_PUT {
			w.recordLocked(oracle.Entry{Kind: oracle.Event, Proc: c.Process, Key: key, Rev: ev.Kv.ModRevision, Op: "put", Value: string(ev.Kv.Value), Token: ev.Kv.CreateRevision})
		} else if strings.HasPrefix(key, dataRoot) && ev.Type == mvccpb.Event_PUT {
			w.writtenLocked(key, ev.Kv)
		}
	}
}

func (w *world) candidateChangedLocked(election string, ev *mvccpb.Event, how fate, process string) {
	e := oracle.Entry{
		Kind: oracle.Event, Proc: process, Election: election, Key: string(ev.Kv.Key), Rev: ev.Kv.ModRevision,
		T: w.now(), Op: "put", Token: ev.Kv.CreateRevision, Value: short(string(ev.Kv.Value)), Lease: ev.Kv.Lease,
	}
	q := w.queues[election]
	i := slices.IndexFunc(q, func(l *life) bool { return l.key == e.Key })
	switch {
	case ev.Type == mvccpb.Event_DELETE:
		e.Op, e.Value, e.Lease = "delete", "", 0
		if i < 0 {
			return
		}
		l := q[i]
		e.Token = l.token
		w.queues[election] = slices.Delete(q, i, i+1)
		l.gone, l.fate = time.Now(), how
		w.recordLocked(e)
		w.noteLocked("%s with token %d is gone: %s", l.key, l.token, how)
		if how == byOperator {
			w.takenLocked(how, oracle.Entry{Op: oracle.Delete, Election: election, Token: l.token, Key: l.key, Lease: l.lease, Rev: e.Rev})
		}
		w.lostLocked(l)
	case i < 0 || q[i].token != ev.Kv.CreateRevision:
		l := &life{
			election: election, key: e.Key, value: string(ev.Kv.Value), token: ev.Kv.CreateRevision, lease: ev.Kv.Lease,
			owner: w.calls[callOf(string(ev.Kv.Value))], created: time.Now(), fate: alive,
		}
		w.recordLocked(e)
		w.lives[l.token] = l
		w.queues[election] = append(q, l)
		slices.SortFunc(w.queues[election], func(a, b *life) int { return cmp.Compare(a.token, b.token) })
		if l.owner != nil {
			l.owner.newest = l.token
			if h := l.owner.el.healthLocked(election); h != nil && !h.succeeded {
				w.violateLocked("health", "%s: %s has joined, and no check has succeeded", election, l.owner.value)
			}
		}
	default:
		q[i].value = string(ev.Kv.Value)
		w.recordLocked(e)
		w.checkValueLocked(q[i])
	}
	now := state{since: time.Now()}
	if l := w.first(election); l != nil {
		now.token, now.value = l.token, l.value
	}
	states := w.states[election]
	if states[len(states)-1].token != now.token || states[len(states)-1].value != now.value {
		w.states[election] = append(states, now)
	}
}

// takenLocked records what somebody has taken whom nobody has allowed to.
func (w *world) takenLocked(how fate, e oracle.Entry) {
	e.Kind, e.Proc, e.From, e.Result = oracle.Taken, string(how), w.now(), oracle.OK
	w.recordLocked(e)
}

// checkValueLocked: a key has the value that its owner has campaigned with or proclaimed, and not an older one
// once a later call has been confirmed.
func (w *world) checkValueLocked(l *life) {
	c := l.owner
	if c == nil || c.p.dead.Load() {
		return
	}
	if w.calls[callOf(l.value)] != c {
		w.violateLocked("value", "%s: the key of %s with token %d became %q", l.election, c.value, l.token, short(l.value))
	} else if t := c.terms[l.token]; t != nil && proclaimed(l.value) < t.proclaimed {
		w.violateLocked("value", "%s: the key of %s with token %d became %q, after a later value was confirmed", l.election, c.value, l.token, short(l.value))
	}
}

// proclaimed is the number in a value that was proclaimed, 0 if it was campaigned with.
func proclaimed(value string) int64 {
	parts := strings.Split(value, "/")
	if len(parts) < 3 {
		return 0
	}
	_, seq, _ := strings.Cut(parts[2], ":")
	n, _ := strconv.ParseInt(seq, 10, 64)
	return n
}

// short is as much of a value as a history keeps: values may be large.
func short(value string) string {
	if len(value) > 80 {
		return value[:80] + "..."
	}
	return value
}

// lostLocked checks how a key has come to its end.
func (w *world) lostLocked(l *life) {
	c := l.owner
	if c == nil || c.p.dead.Load() {
		return
	}
	t := c.terms[l.token]
	switch {
	case l.fate == byRequest && t != nil && t.expired && !c.p.m.Stopped() && !keptMargin(c.p, l.lease):
		w.violateLocked("margin", "%s: the key of %s with token %d was deleted by a request of its own before the margin had passed", l.election, c.p.name, l.token)
	case l.fate == byRequest && t != nil && !t.ended && t.l.Context().Err() == nil:
		w.violateLocked("self-harm", "%s: the key of %s with token %d was deleted by a request of a process, while the term lasted", l.election, c.p.name, l.token)
	case t != nil && !t.ended && l.fate == byExpiry && !c.p.slow:
		go w.checkExpired(t)
	case t != nil && !t.ended && l.fate.excuses():
		go w.checkTaken(t)
	}
}

// keptMargin reports whether a margin has passed since the last known deadline of a lease, as the process's clocks count that are
// never set.
func keptMargin(p *process, lease int64) bool {
	deadline, renewed := p.deadlines[lease]
	_, until := p.counts(deadline)
	return !renewed || !time.Now().Before(until.Add(p.m.Real(p.w.margin)-time.Millisecond))
}

// writtenLocked records a write that a guard has let through.
func (w *world) writtenLocked(key string, kv *mvccpb.KeyValue) {
	w.result.Counts.Writes++
	w.recordLocked(oracle.Entry{Kind: oracle.Event, Key: key, Rev: kv.ModRevision, Op: "put", Value: string(kv.Value), Token: kv.CreateRevision})
}

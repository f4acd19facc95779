//go:build linux

package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"example.com/leader"
)

// What must hold in every history, whatever faults there were. A rule is exact where the history
// is: it never objects to what a correct system may do.
const (
	// ruleExclusion is that nobody believes in a term while somebody else believes in another of
	// the election. An [Overlap] is what is excused.
	ruleExclusion = "exclusion"
	// ruleMargin is that belief ends a margin before etcd lets a lease expire, not after a key is
	// given up, and not after the term was said to have ended.
	ruleMargin = "margin"
	// ruleLease is that etcd keeps a lease for its TTL from when a renewal was sent that counted. Where
	// it does not, the renewal ought not to have counted, unless a deposed leader of etcd has revoked it.
	ruleLease = "lease"
	// ruleToken is that a term has a token of its own, the create revision of its key, and that
	// tokens grow from term to term.
	ruleToken = "token"
	// ruleData is that reads and guarded writes of a value in etcd are linearizable, a write
	// replaces what its writer has read, and answers about writes are true.
	ruleData = "data"
	// ruleUndecided is that the check for linearizability has not run out of time.
	ruleUndecided = "undecided"
	// ruleGuard is that a guarded write has had its effect during the life of its term's key.
	ruleGuard = "guard"
	// ruleOrder is that it did so when no older candidate was left.
	ruleOrder = "order"
	// ruleFencing is that the resource outside etcd has taken requests in the order of tokens, and
	// that answers about them are true.
	ruleFencing = "fencing"
	// ruleLiveness is that every election has a leader soon after faults have ceased.
	ruleLiveness = "liveness"
	// ruleObserve is that Observe yields states that were, in their order, and the last of all.
	ruleObserve = "observe"
	// ruleEnd is that nothing failed and nothing is left.
	ruleEnd = "end"
	// ruleNothing is that there was something to check.
	ruleNothing = "nothing checked"
)

// recoverTime is what an election has beside the TTL to have a leader once faults have ceased.
const recoverTime = 3 * time.Second

// lateRequest is how late a request may have its effect that was given up: etcd itself gives up on a
// proposal after 7 s, and what waits for a member that is paused comes with it.
const lateRequest = 15 * time.Second

// deposedFor is how long a leader of etcd that goes on after a pause may revoke leases: until it has heard from
// the others.
const deposedFor = 2 * time.Second

// A Verdict is what a history comes to. It is good if there are no violations.
type Verdict struct {
	Violations []Violation
	Checked    Counts
	// Overlaps are those that are excused.
	Overlaps []Overlap
	// LateContexts are pieces of belief in a context that was over by the clock, but whose timer had
	// not fired yet after a pause of the process. Each would be a violation else.
	LateContexts []Entry
}

// A Violation is one breach of a rule.
type Violation struct {
	Rule    string
	What    string  // who has done what when; times are in seconds since the run began
	Entries []Entry // that show it
}

// Counts say how much was checked: a rule that has had nothing to object to proves nothing.
type Counts struct {
	Entries, Events, Terms, PeerTerms, Beliefs int

	Resigned, Expired, Early, Taken int // how terms of ours have ended
	Evicted                         int // candidates that lost their key

	Reads, Writes int // all that were recorded
	Effects       int // writes that took effect
	Resolved      int // writes without an answer of which the audit knows better
	Recovered     int // writes that their writer was killed before it could record

	Appends, Observations, Calms int

	LastStates          int // calls of Observe that were to know the last state
	Faults, NotInjected int
}

// check checks a history, in the order of time.
func check(history []Entry) Verdict {
	c := newChecker(history)
	c.run()
	return c.Verdict
}

// A checker is a history by what its rules ask for.
type checker struct {
	Verdict
	Parameters
	began    int64
	patience time.Duration // with each check for linearizability

	by    map[Kind][]*Entry
	terms map[term]*Entry
	ended map[term]*Entry
	left  map[term]*Entry // Resigning
	taken map[term]*Entry
	// revoked and renewed are by lease.
	revoked map[int64]*Entry
	renewed map[int64][]*Entry
	*audited
	beliefs
}

// A term is known by its election and its token.
type term struct {
	election string
	token    int64
}

func (t term) String() string { return fmt.Sprintf("term %d of %s", t.token, t.election) }

func termOf(e *Entry) term { return term{e.Election, e.Token} }

func newChecker(history []Entry) *checker {
	c := &checker{
		patience: time.Minute,
		by:       make(map[Kind][]*Entry),
		terms:    make(map[term]*Entry),
		ended:    make(map[term]*Entry),
		left:     make(map[term]*Entry),
		taken:    make(map[term]*Entry),
		revoked:  make(map[int64]*Entry),
		renewed:  make(map[int64][]*Entry),
	}
	for i := range history {
		e := &history[i]
		c.by[e.Kind] = append(c.by[e.Kind], e)
		switch e.Kind {
		case Term:
			c.terms[termOf(e)] = e
		case Ended:
			c.ended[termOf(e)] = e
		case Resigning:
			c.left[termOf(e)] = e
		case Renewed:
			c.renewed[e.Lease] = append(c.renewed[e.Lease], e)
		case Taken:
			if e.Result == Failed {
				continue
			}
			earliest(c.taken, termOf(e), e)
			if e.Op == "revoke" {
				earliest(c.revoked, e.Lease, e)
			}
		}
	}
	c.Checked = Counts{
		Entries: len(history), Events: len(c.by[Event]), Beliefs: len(c.by[Belief]),
		Reads: len(c.by[Read]), Writes: len(c.by[Write]), Appends: len(c.by[Append]),
		Observations: len(c.by[Observed]), Calms: len(c.by[Calm]), Faults: len(c.by[Fault]),
	}
	for _, e := range c.by[Run] {
		c.began = e.T
		if err := json.Unmarshal([]byte(e.Value), &c.Parameters); err != nil {
			c.violate(ruleNothing, []*Entry{e}, "the parameters of the run cannot be read: %v", err)
		}
	}
	c.audited = readAudit(c.by[Event], c.by[Write])
	for _, e := range c.by[Observed] {
		if c.states[e.Election] == nil { // nothing ever happened there
			c.states[e.Election] = []state{{}}
		}
	}
	c.beliefs = readBeliefs(c.by[Belief], c.terms)
	return c
}

// earliest keeps the request that began first.
func earliest[K comparable](m map[K]*Entry, key K, e *Entry) {
	if old := m[key]; old == nil || e.From < old.From {
		m[key] = e
	}
}

func (c *checker) run() {
	c.checkAnything()
	c.checkExclusion()
	c.checkMargins()
	c.checkEvictions()
	c.checkTokens()
	c.checkData()
	c.checkFencing()
	c.checkLiveness()
	c.checkObservers()
	c.checkEnd()
}

func (c *checker) violate(rule string, entries []*Entry, format string, args ...any) {
	v := Violation{Rule: rule, What: fmt.Sprintf(format, args...)}
	for _, e := range entries {
		if e != nil {
			v.Entries = append(v.Entries, *e)
		}
	}
	c.Violations = append(c.Violations, v)
}

// at is a time as a reader of the report knows it.
func (c *checker) at(t int64) string {
	return fmt.Sprintf("%.3fs", time.Duration(t-c.began).Seconds())
}

// An ending is how a term's key has come to its end.
type ending string

const (
	alive    ending = "alive"
	operator ending = "operator"
	resigned ending = "resigned"
	// early is before etcd could let the lease expire, and by nobody that is known: etcd itself may do so
	// and, once the term has ended, the one whose term it was.
	early   ending = "early"
	expired ending = "expired"
)

// endingOf says how a key has come to its end and, if that was by an operator, by which request: one
// that began by a time at which the key was gone.
func (c *checker) endingOf(l *life, by int64) (ending, *Entry) {
	for _, e := range []*Entry{c.taken[l.term], c.revoked[l.lease]} {
		late := e != nil && e.Result == Unknown && l.gone > e.T+int64(lateRequest)
		if e != nil && e.From <= min(by, l.gone) && !late {
			return operator, e
		}
	}
	switch {
	case l.deleted == nil:
		return alive, nil
	case c.gaveUp(l):
		return resigned, nil
	case l.gone < c.expiry(l):
		return early, nil
	}
	return expired, nil
}

// gaveUp reports whether the key's holder has given up its term before the key was gone. It also says
// so of a term that was lost, so the cause of the term's end counts, where it is known.
func (c *checker) gaveUp(l *life) bool {
	left, ended := c.left[l.term], c.ended[l.term]
	return left != nil && left.T <= l.gone &&
		(ended == nil || strings.HasPrefix(ended.Err, leader.ErrResigned.Error()))
}

// checkLease objects to a renewal that counted, and in vain. Whoever has resigned may have deleted the key, unless the
// key was gone before that.
func (c *checker) checkLease(l *life) {
	ended, left := c.ended[l.term], c.left[l.term]
	resigned := ended != nil && strings.HasPrefix(ended.Err, leader.ErrResigned.Error())
	if c.deposed(l.gone) || resigned && (left == nil || left.T <= l.gone) {
		return
	}
	if e := c.renewal(l); e != nil {
		c.violate(ruleLease, []*Entry{e, l.deleted}, "%s with token %d was gone at %s, although a renewal had counted until %s",
			l.key, l.token, c.at(l.gone), c.at(c.expiry(l)))
	}
}

// deposed reports whether there may have been, at that time, a leader of etcd that did not know yet that it
// was deposed. It revokes what has expired by its own count: etcd-io/etcd#15247, which the leadership check of
// 3.5.10 and later does not prevent in one that was paused.
func (c *checker) deposed(at int64) bool {
	return slices.ContainsFunc(c.by[Resumed], func(e *Entry) bool { return e.T <= at && at <= e.T+int64(deposedFor) })
}

// renewal is the last that counted while the key was there.
func (c *checker) renewal(l *life) (last *Entry) {
	for _, e := range c.renewed[l.lease] {
		if e.T > l.gone {
			break
		}
		last = e
	}
	return last
}

// expiry is a time from which on etcd may have let the key's lease expire. Of what the holder says
// about that, a time later than a TTL after the renewal is not believed.
func (c *checker) expiry(l *life) int64 {
	e := c.renewal(l)
	if e == nil {
		return l.created.T + int64(c.TTL) // it was granted before that
	}
	sent := e.T
	if e.From != 0 {
		sent = e.From
	}
	return min(e.Until, sent+int64(c.TTL))
}

// ours reports whether the term of that entry is not one of a peer.
func ours(e *Entry) bool { return e != nil && e.Op == "leader" }

// checkAnything objects to a history that proves nothing.
func (c *checker) checkAnything() {
	for _, kind := range []Kind{Run, Term, GivenUp, Event, Calm, Read, Append, Observed} {
		if len(c.by[kind]) == 0 {
			c.violate(ruleNothing, nil, "the history has no entry of the kind %q", kind)
		}
	}
	if !slices.ContainsFunc(c.by[Fault], func(e *Entry) bool { return e.Err == "" }) {
		c.violate(ruleNothing, nil, "no fault was injected")
	}
	if !slices.ContainsFunc(c.by[Write], func(e *Entry) bool { return e.Result == OK }) {
		c.violate(ruleNothing, nil, "no guarded write has succeeded")
	}
}

func (c *checker) checkTokens() {
	seen := make(map[term]*Entry)
	elections := make(map[string][]*Entry)
	for _, e := range c.by[Term] {
		if other := seen[termOf(e)]; other != nil && (ours(e) || ours(other)) { // stock may campaign twice with one key
			c.violate(ruleToken, []*Entry{other, e}, "%s was won twice, by %s at %s and by %s at %s",
				termOf(e), other.Proc, c.at(other.T), e.Proc, c.at(e.T))
		}
		seen[termOf(e)] = e
		l := c.lives[termOf(e)]
		if l == nil && e.Token <= c.last || l != nil && l.key != e.Key {
			c.violate(ruleToken, []*Entry{e}, "%s won %s at %s with key %q, which was not created at that revision",
				e.Proc, termOf(e), c.at(e.T), e.Key)
		}
		if !ours(e) {
			c.Checked.PeerTerms++
			continue
		}
		c.Checked.Terms++
		c.checkGrows(e, elections[e.Election])
		elections[e.Election] = append(elections[e.Election], e)
	}
	strangers := make(map[term]bool)
	for _, e := range c.by[Belief] {
		if won := seen[termOf(e)]; (won == nil || won.Proc != e.Proc) && !strangers[termOf(e)] {
			strangers[termOf(e)] = true
			c.violate(ruleToken, []*Entry{won, e}, "%s believed in %s at %s, which it has not won", e.Proc, termOf(e), c.at(e.T))
		}
	}
}

// checkGrows compares a term with those won before. The entry of a term may come late, from a process
// that was paused between its victory and the entry; what it must not do is to campaign after
// another has won, or to believe after that, and yet have the smaller token.
func (c *checker) checkGrows(e *Entry, before []*Entry) {
	believed := slices.ContainsFunc(c.of[termOf(e)], func(p *piece) bool { return p.Op == opIsLeader })
	if l := c.lives[termOf(e)]; l != nil {
		how, _ := c.endingOf(l, l.gone)
		believed = believed && how != operator && how != early
	}
	for _, b := range before {
		if b.Token > e.Token && (believed || e.From > b.T) {
			c.violate(ruleToken, []*Entry{b, e}, "%s won %s at %s, after %s had won %s at %s",
				e.Proc, termOf(e), c.at(e.T), b.Proc, termOf(b), c.at(b.T))
			return
		}
	}
}

func (c *checker) checkFencing() {
	type request struct{ election, value string }
	accepted := make(map[request]*Entry)
	largest := make(map[string]*Entry)
	for _, e := range c.by[Accepted] {
		if e.Result != OK {
			continue
		}
		if l := largest[e.Election]; l != nil && l.Token > e.Token {
			c.violate(ruleFencing, []*Entry{l, e}, "%q of %s was accepted at %s, after the larger token %d at %s",
				e.Value, termOf(e), c.at(e.T), l.Token, c.at(l.T))
		} else {
			largest[e.Election] = e
		}
		r := request{e.Election, e.Value}
		if first := accepted[r]; first != nil {
			c.violate(ruleFencing, []*Entry{first, e}, "%q of %s was accepted twice, at %s and %s",
				e.Value, termOf(e), c.at(first.T), c.at(e.T))
		}
		accepted[r] = e
	}
	for _, e := range c.by[Append] {
		a := accepted[request{e.Election, e.Value}]
		if e.Result == OK && a == nil || e.Result == Failed && a != nil {
			c.violate(ruleFencing, []*Entry{e, a}, "%s was told %q of its append %q in %s at %s, which is not so",
				e.Proc, e.Result, e.Value, termOf(e), c.at(e.T))
		}
	}
}

func (c *checker) checkLiveness() {
	within := int64(c.TTL + recoverTime)
	calms := slices.DeleteFunc(slices.Clone(c.by[Calm]), func(e *Entry) bool { return e.T-e.From < within })
	led := make([]map[string]bool, len(calms))
	for i := range led {
		led[i] = make(map[string]bool)
	}
	leads := func(election string, from, to int64) {
		i, _ := slices.BinarySearchFunc(calms, from, func(e *Entry, t int64) int { return cmp.Compare(e.From+within, t) })
		for ; i < len(calms) && calms[i].From+int64(c.TTL) <= to; i++ {
			led[i][election] = true
		}
	}
	for _, e := range c.by[Term] {
		leads(e.Election, e.T, e.T)
	}
	for _, e := range c.by[Belief] {
		leads(e.Election, min(e.From, e.T), max(e.From, e.T))
	}
	for i, e := range calms {
		for _, election := range c.Elections {
			if !led[i][election] {
				c.violate(ruleLiveness, []*Entry{e}, "%s had no leader from %s to %s, though it was calm since %s",
					election, c.at(e.From+int64(c.TTL)), c.at(e.From+within), c.at(e.From))
			}
		}
	}
}

// checkEnd goes through what was said to be wrong when it happened.
func (c *checker) checkEnd() {
	for _, e := range c.by[Left] {
		c.violate(ruleEnd, []*Entry{e}, "the %s %s is left", e.Op, e.Value)
	}
	for _, e := range c.by[Exit] {
		if e.Result != OK {
			c.violate(ruleEnd, []*Entry{e}, "%s ended at %s: %s", e.Proc, c.at(e.T), e.Err)
		}
	}
	for _, e := range c.by[Failure] {
		c.violate(ruleEnd, []*Entry{e}, "%s failed at %s: %s", e.Proc, c.at(e.T), e.Err)
	}
	for _, e := range c.by[Fault] {
		if e.Err != "" {
			c.Checked.NotInjected++
		}
	}
}

// never is later than everything.
const never = math.MaxInt64

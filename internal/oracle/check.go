package oracle

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// The rules. They must hold in every history, whatever faults there were. A rule is as exact as the history: it never
// objects to what a correct system may do.
const (
	// RuleExclusion: nobody believes in a term while somebody else believes in another term of the same election. What
	// is excused is an [Overlap].
	RuleExclusion = "exclusion"
	// RuleDeadline: no deadline is later than the last renewal that counted allows, and nobody believes for longer.
	RuleDeadline = "deadline"
	// RuleMargin: belief ends a margin before etcd lets a lease expire. It does not outlast the deletion of the key by
	// its owner, nor the time at which the term was reported as ended.
	RuleMargin = "margin"
	// RuleLease: a candidate or leader loses its key only if an operator takes it, if it deletes the key itself after
	// it has said so or was asked to step back or was unhealthy, or if the TTL has passed since the last renewal that
	// counted was sent. If etcd took the key earlier, that renewal should not have counted, unless a deposed leader of
	// etcd has revoked the lease, or its process was killed and others may revoke its leases then. A term keeps its key
	// until its work has stopped, or for a margin: see [checker.until].
	RuleLease = "lease"
	// RuleReclaim: nobody but operators revokes the lease of a process that lives. Reclaim succeeds only when none of the
	// keys that there were when it was called is left. Without faults the leases of a process that is killed are revoked
	// before they expire, if somebody is there to do that.
	RuleReclaim = "reclaim"
	// RuleOrphan: no key and no lease outlives its use.
	RuleOrphan = "orphan"
	// RuleToken: each term has a token of its own, the create revision of its key, and tokens grow from term to term.
	RuleToken = "token"
	// RuleOrder: no older candidate is left when a term begins, or when its leader writes.
	RuleOrder = "order"
	// RuleCampaign: the beginning and the end of each campaign are reported, and it ends for the reason that it gives.
	// A campaign that is given up ends soon. TryCampaign does not wait. In calm a campaign has a key. Run pauses before
	// it campaigns again.
	RuleCampaign = "campaign"
	// RuleEnded: the end of each term is reported once, soon, and with the true cause. A term is transferred only if
	// that very term was asked to step back, and unhealthy only if its checks had not succeeded for long enough.
	RuleEnded = "ended"
	// RuleHealth: nobody believes for longer than TTL − margin after its last successful check began.
	RuleHealth = "health"
	// RuleOverdue: whether the function of Run ignores the end of its context is reported in time, truly, and not after
	// the function has returned.
	RuleOverdue = "overdue"
	// RuleTransfer: what Transfer says is true. Without faults it succeeds, unless a peer is in its way.
	RuleTransfer = "transfer"
	// RuleData: reads and guarded writes of a value in etcd are linearizable, a write replaces what its writer has
	// read, and answers about writes are true.
	RuleData = "data"
	// RuleUndecided: the check for linearizability has not run out of time.
	RuleUndecided = "undecided"
	// RuleGuard: every guarded write that takes effect does so while its term's key exists.
	RuleGuard = "guard"
	// RuleFencing: the resource outside etcd has accepted requests in the order of their tokens and has refused only
	// smaller tokens, and its answers are true.
	RuleFencing = "fencing"
	// RuleLiveness: every election has a leader once faults have ceased, and keeps having one.
	RuleLiveness = "liveness"
	// RuleObserve: whoever asks who leads or waits is told states that existed, in their order, and, without faults,
	// soon. Whoever was evicted is gone.
	RuleObserve = "observe"
	// RuleEnd: nothing failed and nothing is left.
	RuleEnd = "end"
	// RuleNothing: there was something to check.
	RuleNothing = "nothing checked"
)

// RecoverTime is how much longer than the TTL an election may take to have a leader once faults have ceased. It is also
// the limit for everything else that takes moments.
const RecoverTime = 3 * time.Second

const (
	// lateRequest is how late a request that was given up may take effect, for TTLs of up to half of it. etcd itself
	// gives up a proposal after 7 s. Waiting for a member that is paused, or for an endpoint that is dark, comes on
	// top.
	lateRequest = 15 * time.Second
	// deposedFor is how long a leader of etcd that resumes after a pause may revoke leases: until it has heard from the
	// others.
	deposedFor = 2 * time.Second
	// auditLag is how late an event may be seen: etcd may first have to elect a leader.
	auditLag = RecoverTime
	// rounding is the error of times that are converted from clocks of another rate.
	rounding = time.Microsecond
	// clockLag is how far apart two readings of the clock may be that are meant to be one.
	clockLag = 5 * time.Millisecond
	// giveUpTime is how long a campaign that is given up may try to delete its key.
	giveUpTime = 2 * time.Second
	// pauseOfRun is the shortest pause of Run after a term that was lost.
	pauseOfRun = 50 * time.Millisecond
	// tellTime is how long it may take to report the end of a term: two requests of 5 s.
	tellTime = 10 * time.Second
	// calmEvery is how many TTLs may pass without calm. Only in calm do the rules know how long something may take.
	calmEvery = 100
)

// Options are what a history does not say about itself.
type Options struct {
	TTL, Margin time.Duration
	// Elections are the elections that must have a leader.
	Elections []string
	// Data is the prefix of what leaders write in etcd: see [Options.DataKey].
	Data string
	// Require are kinds of entries. A history that lacks one of them proves nothing.
	Require []Kind
	// DeposedAfter is how long a leader of etcd must pause for another one to be elected.
	DeposedAfter time.Duration
	// Exact says that the recorded times are the true ones, that timers fire in time, and that every deletion by
	// somebody other than the owner is recorded. This is so in a simulation.
	Exact bool
	// Patience is how much longer than anything else the creation of a watch may take where it has to authenticate.
	Patience time.Duration
}

// DataKey is the key of a value in etcd that leaders of an election write.
func (o Options) DataKey(election, what string) string { return o.Data + election + "/" + what }

// late returns how long a request that was given up may take to have its effect.
func (o Options) late() int64 { return int64(max(lateRequest, 2*o.TTL)) }

// slack returns by how much an entry may be wrong: d, or next to nothing if the history is exact.
func (o Options) slack(d time.Duration) int64 {
	if o.Exact {
		return int64(min(d, rounding))
	}
	return int64(d)
}

// A Verdict is the result of checking a history. The history is good if there are no violations.
type Verdict struct {
	Violations []Violation
	Checked    Counts
	// Overlaps are the excused ones.
	Overlaps []Overlap
	// Late are pieces of belief in a context that was over by the clock, but whose timer had not fired yet after the
	// process was stopped. Without that excuse each would be a violation.
	Late []Entry
}

// A Violation is one breach of a rule.
type Violation struct {
	Rule    string
	What    string  // who did what when; times are in seconds since the run began
	Entries []Entry // entries that show it
}

// Counts say how much was checked: a rule that was never applied proves nothing.
type Counts struct {
	Entries, Events, Campaigns, Terms, PeerTerms, Beliefs int

	Resigned, Expired, Early, Taken int // how the keys of this library's terms ended
	Transferred, Unhealthy          int // terms that ended so
	Overdue                         int // calls of the hook
	Reclaimed                       int // keys of killed processes whose leases were revoked before they could expire
	Revocations                     int // by others, of leases of dead processes
	Waited, Lost                    int // keys of candidates that were not elected; of these, taken by an operator or etcd
	Oldest                          int // terms checked by a read: no older candidate was left

	Reads, Writes int // all that were recorded
	Effects       int // writes that took effect
	Resolved      int // writes without an answer, whose outcome the audit shows
	Recovered     int // writes whose writer was killed before it recorded them

	Appends, Calms int

	Observations int // by Observe and LeaderChanged
	Fresh        int // states that an observer had to see in time
	Asked        int // calls of Current and Candidates

	Faults int // faults that were injected
}

// Check checks a history, which must be in the order of time (see [Sort]).
func Check(history []Entry, o Options) Verdict {
	c := newChecker(history, o)
	c.run()
	return c.Verdict
}

// A checker is a history, indexed as its rules need it.
type checker struct {
	Verdict
	Options
	began    int64
	patience time.Duration // limit for each check of linearizability

	by map[Kind][]*Entry
	*clocks
	*processes
	*audited
	renewed map[int64][]*renewal // by lease, in the order of T
	takings map[target][]*Entry
	reads   map[termID]*Entry // the first in each term, by its holder
	grants  map[int64]*Entry  // by lease
	checks  map[place][]*check
	healthy map[place][]span // merged
	calms   []*Entry         // those that are long enough to show anything
}

func newChecker(history []Entry, o Options) *checker {
	c := &checker{Options: o, patience: time.Minute, by: make(map[Kind][]*Entry), takings: make(map[target][]*Entry)}
	for i := range history {
		e := &history[i]
		if e.Kind == Fault && e.Err != "" {
			continue // it was not injected
		}
		c.by[e.Kind] = append(c.by[e.Kind], e)
	}
	for _, e := range c.by[Run] {
		c.began = e.T
	}
	c.clocks = c.readClocks()
	c.renewed = c.readRenewals()
	for _, e := range c.by[Taken] {
		c.takings[targetOf(e)] = append(c.takings[targetOf(e)], e)
	}
	for _, e := range c.by[Calm] {
		if e.T-e.From >= int64(c.TTL+RecoverTime) {
			c.calms = append(c.calms, e)
		}
	}
	c.grants = make(map[int64]*Entry)
	for _, e := range c.by[Granted] {
		c.grants[e.Lease] = e
	}
	c.audited = c.readAudit()
	c.readChecks()
	c.processes = c.readProcesses(history)
	c.reads = c.readReads()
	c.Checked = Counts{
		Entries: len(history), Events: len(c.by[Event]), Campaigns: len(c.by[Campaigning]), Beliefs: len(c.by[Belief]),
		Reads: len(c.by[Read]), Writes: len(c.by[Write]), Appends: len(c.by[Append]), Calms: len(c.by[Calm]),
		Observations: len(c.by[Observed]) + len(c.by[Changed]), Asked: len(c.by[Current]) + len(c.by[Candidates]),
		Faults: len(c.by[Fault]), Overdue: len(c.by[Overdue]),
	}
	return c
}

func (c *checker) run() {
	c.checkAnything()
	c.checkCampaigns()
	c.checkBeliefs()
	c.checkExclusion()
	c.checkLives()
	c.checkRenewals()
	c.checkRevocations()
	c.checkReclaims()
	c.checkClosed()
	c.checkTokens()
	c.checkEnds()
	c.checkHealth()
	c.checkOverdue()
	c.checkTransfers()
	c.checkData()
	c.checkProclaimed()
	c.checkFencing()
	c.checkLiveness()
	c.checkObservers()
	c.checkAnswers()
	c.checkEvictions()
	c.checkRest()
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

// at formats a time as a reader of the report knows it.
func (c *checker) at(t int64) string {
	if t == never {
		return "the end"
	}
	return fmt.Sprintf("%.3fs", time.Duration(t-c.began).Seconds())
}

// checkAnything flags a history that proves nothing.
func (c *checker) checkAnything() {
	for _, kind := range c.Require {
		if len(c.by[kind]) == 0 {
			c.violate(RuleNothing, nil, "the history has no entry of the kind %q", kind)
		}
	}
	if !slices.ContainsFunc(c.by[Write], func(e *Entry) bool { return e.Result == OK }) {
		c.violate(RuleNothing, nil, "no guarded write has succeeded")
	}
	if len(c.by[AuditEnd]) == 0 {
		c.violate(RuleNothing, nil, "the audit has not reached the end")
	}
	told := make(map[Kind]map[string]bool)
	for _, kind := range []Kind{Campaigning, Term, Belief, Ended} {
		told[kind] = make(map[string]bool)
		for _, e := range c.by[kind] {
			told[kind][e.Election] = told[kind][e.Election] || c.ours(e.Proc)
		}
		for _, election := range c.Elections {
			if !told[kind][election] {
				c.violate(RuleNothing, nil, "no process under test has recorded a %q of %s", kind, election)
			}
		}
	}
	since := c.began
	end := &Entry{From: c.began}
	for _, e := range c.by[AuditEnd] {
		end = &Entry{From: e.T}
	}
	for _, e := range append(slices.Clone(c.calms), end) {
		if e.From-since > int64(calmEvery*c.TTL) {
			c.violate(RuleNothing, nil, "it was never calm for long enough from %s to %s", c.at(since), c.at(e.From))
		}
		since = e.T
	}
}

func (c *checker) checkTokens() {
	first := make(map[termID]*Entry)
	largest := make(map[string]*Entry) // token so far, by election
	for _, e := range c.by[Term] {
		id := idOf(e)
		if other := first[id]; other != nil && (e.Op == Ours || other.Op == Ours) { // stock may campaign twice with one key
			c.violate(RuleToken, []*Entry{other, e}, "%s was won twice, by %s at %s and by %s at %s",
				id, other.Proc, c.at(other.T), e.Proc, c.at(e.T))
		}
		first[id] = e
		if l := c.lives[id]; l == nil || l.key != e.Key {
			c.violate(RuleToken, []*Entry{e}, "%s won %s at %s with key %q, which was not created at that revision",
				e.Proc, id, c.at(e.T), e.Key)
		}
		if e.Op != Ours {
			c.Checked.PeerTerms++
			continue
		}
		c.Checked.Terms++
		// The entry of a term may come late, from a process that was stopped meanwhile. But a process must not begin a
		// campaign after another has won, and then get the smaller token.
		if l := largest[e.Election]; l == nil || l.Token < e.Token {
			largest[e.Election] = e
		} else if e.From > l.T {
			c.violate(RuleToken, []*Entry{l, e}, "%s won %s at %s, after %s had won %s at %s",
				e.Proc, id, c.at(e.T), l.Proc, idOf(l), c.at(l.T))
		}
	}
	strangers := make(map[termID]bool)
	for _, e := range c.by[Belief] {
		if won := first[idOf(e)]; (won == nil || won.Proc != e.Proc) && !strangers[idOf(e)] {
			strangers[idOf(e)] = true
			c.violate(RuleToken, []*Entry{won, e}, "%s believed in %s at %s, which it has not won", e.Proc, idOf(e), c.at(e.T))
		}
	}
}

func (c *checker) checkFencing() {
	type request struct{ election, value string }
	accepted := make(map[request]*Entry)
	largest := make(map[string]*Entry)
	for _, e := range c.by[Accepted] {
		l := largest[e.Election]
		smaller := l != nil && l.Token > e.Token
		if e.Result != OK {
			if !smaller {
				c.violate(RuleFencing, []*Entry{l, e}, "%q of %s was refused at %s, though no larger token had come", e.Value, idOf(e), c.at(e.T))
			}
			continue
		}
		if smaller {
			c.violate(RuleFencing, []*Entry{l, e}, "%q of %s was accepted at %s, after the larger token %d at %s",
				e.Value, idOf(e), c.at(e.T), l.Token, c.at(l.T))
		} else {
			largest[e.Election] = e
		}
		r := request{e.Election, e.Value}
		if first := accepted[r]; first != nil {
			c.violate(RuleFencing, []*Entry{first, e}, "%q of %s was accepted twice, at %s and %s",
				e.Value, idOf(e), c.at(first.T), c.at(e.T))
		}
		accepted[r] = e
	}
	for _, e := range c.by[Append] {
		a := accepted[request{e.Election, e.Value}]
		if e.Result == OK && a == nil || e.Result == Failed && a != nil {
			c.violate(RuleFencing, []*Entry{e, a}, "%s was told %q about its append %q in %s at %s, which is false",
				e.Proc, e.Result, e.Value, idOf(e), c.at(e.T))
		}
	}
}

// checkRest flags what was recorded as wrong when it happened.
func (c *checker) checkRest() {
	for _, e := range c.by[Left] {
		c.violate(RuleEnd, []*Entry{e}, "the %s %s is left", e.Op, e.Value)
	}
	for _, e := range c.by[Exit] {
		if e.Result != OK {
			c.violate(RuleEnd, []*Entry{e}, "%s ended at %s: %s", e.Proc, c.at(e.T), e.Err)
		}
	}
	for _, e := range c.by[Failure] {
		c.violate(RuleEnd, []*Entry{e}, "%s failed at %s: %s", e.Proc, c.at(e.T), e.Err)
	}
}

// never is later than everything.
const never = math.MaxInt64

// firstAfter returns the first of the entries, which are in the order of T, that is not before t, or nil.
func firstAfter(entries []*Entry, t int64) *Entry {
	i, _ := slices.BinarySearchFunc(entries, t, func(e *Entry, t int64) int { return cmp.Compare(e.T, t) })
	if i == len(entries) {
		return nil
	}
	return entries[i]
}

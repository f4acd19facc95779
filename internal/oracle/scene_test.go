package oracle

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// A scene is an election in which c1 leads with token 10 under lease 1, and c2 waits behind it with token 20 under
// lease 2, until the key of c1 is gone. Then c2 leads, until 9.8 s. It is what a correct system does, but for what extra
// changes: an entry in it replaces those of the scene that are of its kind and its process. Times are in milliseconds.
type scene struct {
	gone  int64  // when the key of c1 is deleted; 0 for 9.7 s
	cause string // why its term ended, as it was told; "" for Resigned
	drop  string // kinds and processes of which the scene is to tell nothing, as in "ended c1"
	extra []Entry
}

// history returns what the scene is. If the term of c1 expires its last renewal was sent at 4 s, so that its deadline
// is at 5.6 s and etcd may let the lease expire at 6 s; so it is if it was taken from it.
func (s scene) history() []Entry {
	const election = "chaos/a"
	gone, renewed := s.gone, int64(4000)
	if gone == 0 {
		gone, renewed = 9700, 9500
	}
	cause := cmp.Or(s.cause, Resigned)
	ended := gone + 1
	if cause == Expired {
		ended = 5600
	}
	for _, e := range s.extra {
		if e.Kind == Belief && e.Proc == "c1" && e.Token == 10 {
			ended = max(ended, e.T+1, e.From+1)
		}
	}
	h := []Entry{
		{T: 9, Proc: "c1", Kind: Campaigning},
		event(10, 10, "chaos/a/1", "c1"),
		{T: 11, Proc: "c1", Kind: Elected, Token: 10},
		first,
		{T: 13, From: 12, Proc: "c1", Kind: Read, Token: 10, Op: "register", Rev: 12},
		{T: 14, From: 14, Proc: "c1", Kind: Write, Token: 10, Op: "register", Value: "1 10:1", Rev: 14, Result: OK},
		{T: 14, Proc: "audit", Kind: Event, Op: "put", Rev: 14, Token: 14, Key: worldOptions.DataKey(election, "register"), Value: "1 10:1"},
		event(gone, 10, "chaos/a/1", ""),
		{T: ended, Proc: "c1", Kind: Ended, Token: 10, Op: cause},

		{T: 19, Proc: "c2", Kind: Campaigning},
		event(20, 20, "chaos/a/2", "c2"),
		{T: gone + 1, Proc: "c2", Kind: Elected, Token: 20},
		{T: gone + 1, From: 19, Proc: "c2", Kind: Term, Token: 20, Key: "chaos/a/2", Lease: 2, Op: Ours, Until: gone + 1},
		{T: gone + 4, From: gone + 3, Proc: "c2", Kind: Read, Token: 20, Op: "register", Value: "1 10:1", Rev: gone + 3},
		{T: 9799, Proc: "c2", Kind: Resigning, Token: 20},
		event(9800, 20, "chaos/a/2", ""),
		{T: 9801, Proc: "c2", Kind: Ended, Token: 20, Op: Resigned},
		{T: 9900, Proc: "audit", Kind: AuditEnd, Rev: 9900},
	}
	h = append(h, renewals("c1", 1, min(renewed, gone-10))...)
	h = append(h, renewals("c2", 2, 9500)...)
	if cause == Resigned {
		h = append(h, Entry{T: gone - 1, Proc: "c1", Kind: Resigning, Token: 10})
	}
	h = slices.DeleteFunc(h, func(e Entry) bool {
		return strings.Contains(s.drop, fmt.Sprint(e.Kind, " ", e.Proc)) || slices.ContainsFunc(s.extra, func(x Entry) bool {
			return x.Kind == e.Kind && x.Proc == e.Proc && e.Kind != Event
		})
	})
	h = append(h, s.extra...)
	for i := range h {
		e := &h[i]
		switch e.Kind {
		case Event, Renewed, Resumed, Stopped, Exit, AuditEnd, Calm, GivingUp:
		default:
			e.Election = cmp.Or(e.Election, election)
		}
		e.T *= ms
		e.From *= ms
		e.Until *= ms
	}
	Sort(h)
	return h
}

// event is a change of a candidate's key, at a revision that is its time. Its lease is the last digit.
func event(t, token int64, key, value string) Entry {
	e := Entry{T: t, Proc: "audit", Kind: Event, Op: "put", Rev: t, Token: token, Key: key, Value: value, Lease: int64(key[len(key)-1] - '0')}
	if value == "" {
		e.Op, e.Lease = "delete", 0
	}
	return e
}

// renewals count every half second, until the last is sent at last.
func renewals(proc string, lease, last int64) []Entry {
	var all []Entry
	for t := int64(500); t <= last; t += 500 {
		all = append(all, Entry{T: t + 10, From: t, Until: t + 1600, Proc: proc, Kind: Renewed, Lease: lease})
	}
	return all
}

func beliefOf(proc string, token int64, op string, from, to int64) Entry {
	return Entry{T: to, From: from, Proc: proc, Kind: Belief, Token: token, Op: op}
}

// both believe: c1 until to, c2 from 5000 on.
func both(to int64) []Entry {
	return []Entry{beliefOf("c1", 10, ByIsLeader, 4000, to), beliefOf("c2", 20, ByIsLeader, 5000, 9000)}
}

var (
	first     = Entry{T: 11, From: 9, Proc: "c1", Kind: Term, Token: 10, Key: "chaos/a/1", Lease: 1, Until: 1609, Op: Ours}
	deletedIt = Entry{T: 5003, From: 4990, Proc: "chaos", Kind: Taken, Op: Delete, Token: 10, Key: "chaos/a/1", Lease: 1, Result: OK, Rev: 4999}
	revokedIt = Entry{T: 5003, From: 4990, Proc: "chaos", Kind: Taken, Op: Revoke, Election: "chaos/b", Token: 50, Lease: 1, Result: OK, Rev: 4999}
	evictedIt = Entry{T: 5003, From: 4990, Proc: "observer", Kind: Taken, Op: Evict, Token: 10, Result: OK}
	// deposed is a leader of etcd that goes on and may revoke leases until 5.5 s.
	deposed = Entry{T: 3500, From: 3000, Proc: "m0", Kind: Resumed}
)

// ahead is that c2 is told that it is elected, and leads, while the key of c1 is there.
func ahead(t int64) []Entry {
	return []Entry{
		{T: t, Proc: "c2", Kind: Elected, Token: 20},
		{T: t, From: 19, Proc: "c2", Kind: Term, Token: 20, Key: "chaos/a/2", Lease: 2, Op: Ours, Until: t + 1},
	}
}

func with(e Entry, change func(*Entry)) Entry {
	change(&e)
	return e
}

func join(parts ...any) []Entry {
	var all []Entry
	for _, p := range parts {
		switch p := p.(type) {
		case Entry:
			all = append(all, p)
		case []Entry:
			all = append(all, p...)
		}
	}
	return all
}

func calm(from, to int64) Entry { return Entry{T: to, From: from, Proc: "chaos", Kind: Calm} }

// sceneOptions ask for nothing that a scene does not have.
func sceneOptions() Options {
	o := worldOptions
	o.Require, o.Elections = nil, nil
	return o
}

// An outcome is what a history comes to.
type outcome struct {
	rules    string // violated, with spaces between them
	overlaps []time.Duration
	late     int
}

func (o outcome) String() string { return fmt.Sprintf("%q %v %d", o.rules, o.overlaps, o.late) }

func violated(rules ...string) outcome {
	slices.Sort(rules)
	return outcome{rules: strings.Join(rules, " ")}
}

func overlap(milliseconds int64) outcome {
	return outcome{overlaps: []time.Duration{time.Duration(milliseconds * ms)}}
}

func late(n int) outcome { return outcome{late: n} }

func outcomeOf(v Verdict) outcome {
	var o outcome
	var rules []string
	for _, violation := range v.Violations {
		rules = append(rules, strings.ReplaceAll(violation.Rule, " ", "-"))
	}
	slices.Sort(rules)
	o.rules = strings.Join(rules, " ")
	for _, overlap := range v.Overlaps {
		o.overlaps = append(o.overlaps, overlap.Certain)
	}
	o.late = len(v.Late)
	return o
}

type sceneTest struct {
	scene
	want outcome
}

func testScenes(t *testing.T, tests map[string]sceneTest, options ...func(*Options)) {
	t.Helper()
	o := sceneOptions()
	for _, option := range options {
		option(&o)
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := Check(test.history(), o)
			if got := outcomeOf(v); got.String() != test.want.String() {
				t.Errorf("Check() = %s, want %s", got, test.want)
				for _, violation := range v.Violations {
					t.Log(violation.Rule, violation.What)
				}
			}
		})
	}
}

var good = outcome{}

func TestOverlapIsExcusedByWhatEndedTheEarlierKey(t *testing.T) {
	t.Parallel()
	exclusion, lease := RuleExclusion, RuleLease
	unknown := func(e *Entry) { e.Result, e.Rev = Unknown, 5000 }
	testScenes(t, map[string]sceneTest{
		"one after the other":            {scene{gone: 4999, extra: []Entry{beliefOf("c1", 10, ByIsLeader, 11, 4998), both(0)[1]}}, good},
		"both, and the key was given up": {scene{gone: 4999, extra: both(5500)}, violated(exclusion, RuleMargin)},
		"both, and the key has expired":  {scene{gone: 6000, cause: Expired, extra: []Entry{beliefOf("c1", 10, ByIsLeader, 11, 6100), beliefOf("c2", 20, ByIsLeader, 6001, 9000)}}, violated(RuleDeadline, exclusion, RuleMargin)},
		"both, and both keys are there":  {scene{drop: "read c2", extra: join(both(5500), ahead(5000))}, violated(exclusion, RuleOrder)},
		"both, and an unknown key": {scene{drop: "read c2", extra: join(beliefOf("c3", 5, ByIsLeader, 5000, 5500), beliefOf("c1", 10, ByIsLeader, 4000, 5500))},
			violated(exclusion, RuleToken)},
		"a peer believes too": {scene{drop: "elected c2 ended c2 campaigning c2 renewed c2 read c2 resigning c2", extra: []Entry{
			{T: 25, Proc: "c2", Kind: Term, Token: 20, Key: "chaos/a/2", Lease: 2, Op: "stock"},
			beliefOf("c2", 20, "stock", 25, 9000), beliefOf("c1", 10, ByIsLeader, 11, 4000)}}, good},

		"operator deleted it":                               {scene{4999, Evicted, "", join(both(5599), deletedIt)}, overlap(599)},
		"operator revoked its lease":                        {scene{4999, Evicted, "", join(both(5599), revokedIt)}, overlap(599)},
		"operator evicted it":                               {scene{4999, Evicted, "", join(both(5599), evictedIt)}, overlap(599)},
		"operator may have deleted it":                      {scene{4999, Evicted, "", join(both(5599), with(deletedIt, unknown))}, overlap(599)},
		"operator may have revoked its lease":               {scene{4999, Evicted, "", join(both(5599), with(revokedIt, unknown))}, overlap(599)},
		"time without belief counts not":                    {scene{4999, Evicted, "", join(both(5200), beliefOf("c1", 10, ByIsLeader, 5300, 5500), deletedIt)}, overlap(400)},
		"both ops of a term count once":                     {scene{4999, Evicted, "", join(both(5500), beliefOf("c1", 10, ByContext, 4500, 5400), deletedIt)}, overlap(500)},
		"later belief that ends earlier":                    {scene{4999, Evicted, "", join(beliefOf("c1", 10, ByIsLeader, 4000, 5599), beliefOf("c2", 20, ByIsLeader, 5000, 5300), deletedIt)}, overlap(300)},
		"later belief that begins earlier":                  {scene{4999, Evicted, "", join(beliefOf("c1", 10, ByIsLeader, 5200, 5599), beliefOf("c2", 20, ByIsLeader, 5000, 9000), deletedIt)}, overlap(399)},
		"an answer within belief":                           {scene{4999, Evicted, "", join(beliefOf("c1", 10, ByIsLeader, 5200, 5100), beliefOf("c2", 20, ByIsLeader, 5100, 5200), deletedIt)}, overlap(0)},
		"an answer that may be of before":                   {scene{4999, Evicted, "", join(beliefOf("c1", 10, ByIsLeader, 5200, 5100), beliefOf("c2", 20, ByIsLeader, 5101, 5300), deletedIt)}, good},
		"an answer that may be of after":                    {scene{4999, Evicted, "", join(beliefOf("c1", 10, ByIsLeader, 5200, 5100), beliefOf("c2", 20, ByIsLeader, 5000, 5199), deletedIt)}, good},
		"an answer in which belief begins":                  {scene{4999, Evicted, "", join(beliefOf("c1", 10, ByIsLeader, 5150, 5599), beliefOf("c2", 20, ByIsLeader, 5200, 5100), deletedIt)}, good},
		"a later answer in which belief ends":               {scene{4999, Evicted, "", join(beliefOf("c1", 10, ByIsLeader, 5000, 5150), beliefOf("c2", 20, ByIsLeader, 5200, 5100), deletedIt)}, good},
		"a later answer within belief":                      {scene{4999, Evicted, "", join(beliefOf("c1", 10, ByIsLeader, 5100, 5200), beliefOf("c2", 20, ByIsLeader, 5200, 5100), deletedIt)}, overlap(0)},
		"an answer as belief begins and ends":               {scene{4999, Evicted, "", join(beliefOf("c1", 10, ByIsLeader, 5000, 5000), beliefOf("c2", 20, ByIsLeader, 5000, 5000), deletedIt)}, overlap(0)},
		"operator failed":                                   {scene{4999, Evicted, "", join(both(5599), with(deletedIt, func(e *Entry) { e.Result = Failed }))}, violated(exclusion, lease)},
		"operator deleted something then":                   {scene{4999, Evicted, "", join(both(5599), with(deletedIt, func(e *Entry) { e.Rev = 4998 }))}, violated(exclusion, lease)},
		"operator deleted something later":                  {scene{4999, Evicted, "", join(both(5599), with(deletedIt, func(e *Entry) { e.Rev = 5000 }))}, violated(exclusion, lease)},
		"operator said so, and the key is there":            {scene{drop: "read c2", extra: join(both(5500), ahead(5000), with(deletedIt, func(e *Entry) { e.Rev = 4999 }))}, violated(exclusion, RuleOrder)},
		"operator may have deleted it before":               {scene{4999, Evicted, "", join(both(5599), with(deletedIt, func(e *Entry) { e.Result, e.Rev = Unknown, 4998 }))}, violated(exclusion, lease)},
		"operator may have deleted it in the last revision": {scene{4999, Evicted, "", join(both(5599), with(deletedIt, func(e *Entry) { e.Result, e.Rev = Unknown, 4999 }))}, overlap(599)},
		"operator came when it was gone":                    {scene{4999, Evicted, "", join(both(5599), with(deletedIt, func(e *Entry) { unknown(e); e.From = 5000 }))}, violated(exclusion, lease)},
		"operator came as it went":                          {scene{4999, Evicted, "", join(both(5599), with(deletedIt, func(e *Entry) { unknown(e); e.From = 4999 }))}, overlap(599)},
		"operator deleted another":                          {scene{4999, Evicted, "", join(both(5599), with(deletedIt, func(e *Entry) { e.Token = 20 }))}, violated(exclusion, lease)},
		"operator deleted that of another election":         {scene{4999, Evicted, "", join(both(5599), with(deletedIt, func(e *Entry) { e.Election = "chaos/b" }))}, violated(exclusion, lease)},
		"operator revoked another lease":                    {scene{4999, Evicted, "", join(both(5599), with(revokedIt, func(e *Entry) { e.Lease = 2 }))}, violated(exclusion, lease)},
		"operator came as both believed":                    {scene{5100, Evicted, "", join(both(5599), ahead(5000), with(deletedIt, func(e *Entry) { e.From, e.Rev = 5000, 5100 }))}, overlap(599)},
		"operator came after that":                          {scene{5100, Evicted, "", join(both(5599), ahead(5000), with(deletedIt, func(e *Entry) { e.From, e.Rev = 5001, 5100 }))}, violated(exclusion)},

		"evicted from another election":                 {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.Election = "chaos/b" }))}, violated(exclusion, lease)},
		"a later one was evicted":                       {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.Token = 11 }))}, violated(exclusion, lease)},
		"evicted when nobody led before":                {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.Token = 0 }))}, overlap(599)},
		"evicted, and seen late":                        {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.From, e.T = 1990, 1999 }))}, overlap(599)},
		"evicted long ago":                              {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.From, e.T = 1990, 1998 }))}, violated(exclusion, lease, RuleObserve)},
		"may have been evicted":                         {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.Result, e.From, e.T = Unknown, -10100, -10001 }))}, overlap(599)},
		"may have been evicted long ago":                {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.Result, e.From, e.T = Unknown, -10100, -10002 }))}, violated(exclusion, lease)},
		"may be evicted later":                          {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.Result, e.From = Unknown, 5000 }))}, violated(exclusion, lease)},
		"evicted as it went":                            {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.From = 4999 }))}, overlap(599)},
		"evicted when it was gone":                      {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.From = 5000 }))}, violated(exclusion, lease)},
		"evicted in the last revision that was seen":    {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.Rev = 4999 }))}, overlap(599)},
		"evicted after the last revision that was seen": {scene{4999, Evicted, "", join(both(5599), with(evictedIt, func(e *Entry) { e.Rev = 4998 }))}, violated(exclusion, lease, RuleObserve)},
		"nobody was there to be evicted":                {scene{4999, Evicted, "", join(deletedIt, with(evictedIt, func(e *Entry) { e.Result, e.T, e.From = Failed, 9, 5 }))}, good},
		"somebody was there to be evicted":              {scene{extra: join(with(evictedIt, func(e *Entry) { e.Result, e.T, e.From = Failed, 4000, 3990 }))}, violated(RuleObserve)},

		"etcd was early":                         {scene{4999, Evicted, "", join(both(5500), deposed)}, overlap(500)},
		"etcd was early, and belief lasted":      {scene{4999, Evicted, "", join(both(5501), deposed)}, violated(exclusion)},
		"etcd was early by a leader of long ago": {scene{4999, Evicted, "", join(both(5500), with(deposed, func(e *Entry) { e.T, e.From = 2998, 2000 }))}, violated(exclusion, lease)},
		"etcd was early by a leader of 2 s ago":  {scene{4999, Evicted, "", join(both(5500), with(deposed, func(e *Entry) { e.T, e.From = 2999, 2000 }))}, overlap(500)},
		"etcd was early by a leader of late":     {scene{4999, Evicted, "", join(both(5500), with(deposed, func(e *Entry) { e.T = 2999 + 2000 }))}, overlap(500)},
		"etcd was early before a leader went on": {scene{4999, Evicted, "", join(both(5500), with(deposed, func(e *Entry) { e.T = 5000 }))}, violated(exclusion, lease)},
		"etcd was early by a follower":           {scene{4999, Evicted, "", join(both(5500), with(deposed, func(e *Entry) { e.Op = Follower }))}, violated(exclusion, lease)},
		"etcd was early by a leader in office":   {scene{4999, Evicted, "", join(both(5500), with(deposed, func(e *Entry) { e.From = 3001 }))}, violated(exclusion, lease)},
	})
}

func TestBeliefEndsInTime(t *testing.T) {
	t.Parallel()
	expires := func(extra ...any) scene { return scene{gone: 6000, cause: Expired, extra: join(extra...)} }
	stopped := func(from, to int64) Entry { return Entry{T: to, From: from, Proc: "c1", Kind: Stopped} }
	held := func(op string, to int64) Entry { return beliefOf("c1", 10, op, 11, to) }
	renewed := renewals("c1", 1, 4000)
	taken := func(extra ...any) scene { return scene{4999, Evicted, "", join(deletedIt, join(extra...))} }
	at := func(t int64) []Entry {
		return []Entry{{T: t, Proc: "c1", Kind: Elected, Token: 10}, with(first, func(e *Entry) { e.T, e.Until = t, 1610 })}
	}
	oddly := func(change func(*Entry)) []Entry {
		return append(renewals("c1", 1, 3500), with(renewed[len(renewed)-1], change))
	}
	testScenes(t, map[string]sceneTest{
		"until the deadline":                 {expires(held(ByIsLeader, 5600)), good},
		"1 ms longer":                        {expires(held(ByIsLeader, 5601)), violated(RuleMargin)},
		"longer than two looks at the clock": {expires(held(ByIsLeader, 5606)), violated(RuleDeadline, RuleMargin)},
		"timer that is late":                 {expires(held(ByContext, 5700)), good},
		"timer that is later":                {expires(held(ByContext, 5701)), violated(RuleMargin)},
		"timer that is later still":          {expires(held(ByContext, 5706)), violated(RuleDeadline, RuleMargin)},
		"timer of Run that is late":          {expires(held(ByRun, 5700)), good},
		"timer of Run that is later":         {expires(held(ByRun, 5701)), violated(RuleMargin)},
		"what is of no interest":             {expires(held("else", 5900)), good},
		"answer that was asked for in time":  {expires(beliefOf("c1", 10, ByIsLeader, 7000, 5600)), good},
		"answer that was not":                {expires(beliefOf("c1", 10, ByIsLeader, 7000, 5601)), violated(RuleMargin)},

		"stopped":                    {expires(held(ByContext, 5000), beliefOf("c1", 10, ByContext, 6050, 6150), stopped(5001, 6050)), late(1)},
		"stopped, of Run":            {expires(held(ByRun, 5000), beliefOf("c1", 10, ByRun, 6050, 6150), stopped(5001, 6050)), late(1)},
		"stopped, and the key stays": {scene{extra: join(renewed, beliefOf("c1", 10, ByContext, 6050, 6150), stopped(5001, 6050))}, late(1)},
		"stopped for longer than since an operator took the key": {scene{5550, Evicted, "", join(renewed, beliefOf("c1", 10, ByContext, 6000, 7300), beliefOf("c2", 20, ByIsLeader, 5551, 9000), stopped(5000, 7250),
			with(deletedIt, func(e *Entry) { e.Rev = 5550 }))}, late(1)},
		"stopped, and two pieces":              {expires(beliefOf("c1", 10, ByContext, 6050, 6100), beliefOf("c1", 10, ByContext, 6100, 6150), stopped(5001, 6050)), late(2)},
		"stopped, and another leads":           {expires(beliefOf("c1", 10, ByContext, 6050, 6150), beliefOf("c2", 20, ByIsLeader, 6001, 9000), stopped(5001, 6050)), late(1)},
		"stopped, and 1 ms too late":           {expires(beliefOf("c1", 10, ByContext, 6050, 6151), stopped(5001, 6050)), violated(RuleDeadline, RuleMargin)},
		"stopped a moment before the deadline": {expires(held(ByContext, 5750), stopped(5600, 5650)), late(1)},
		"stopped a moment before, and later":   {expires(held(ByContext, 5751), stopped(5600, 5650)), violated(RuleDeadline, RuleMargin)},
		"stopped, by IsLeader":                 {expires(beliefOf("c1", 10, ByIsLeader, 6050, 6051), stopped(5001, 6050)), violated(RuleDeadline, RuleMargin)},
		"stopped just in time":                 {expires(beliefOf("c1", 10, ByContext, 6050, 6150), stopped(5700, 6050)), late(1)},
		"stopped too late":                     {expires(beliefOf("c1", 10, ByContext, 6050, 6150), stopped(5706, 6050)), violated(RuleDeadline, RuleMargin)},
		"stopped twice":                        {expires(beliefOf("c1", 10, ByContext, 6300, 6350), stopped(5500, 6050), stopped(6150, 6250)), late(1)},
		"stopped twice, with time to end":      {expires(beliefOf("c1", 10, ByContext, 6300, 6350), stopped(5500, 6050), stopped(6151, 6250)), violated(RuleDeadline, RuleMargin)},
		"another was stopped":                  {expires(beliefOf("c1", 10, ByContext, 6050, 6150), with(stopped(5001, 6050), func(e *Entry) { e.Proc = "c2" })), violated(RuleDeadline, RuleMargin)},
		"stopped before the deadline":          {expires(beliefOf("c1", 10, ByContext, 5300, 5800), stopped(4000, 5300)), violated(RuleDeadline, RuleMargin)},
		"not stopped, in pieces": {expires(beliefOf("c1", 10, ByContext, 11, 5600), beliefOf("c1", 10, ByContext, 6051, 6151), beliefOf("c1", 10, ByContext, 6202, 6302)),
			violated(RuleDeadline, RuleMargin)},
		"only what is late is excused": {expires(beliefOf("c1", 10, ByContext, 4000, 6150), beliefOf("c2", 20, ByIsLeader, 5000, 9000), stopped(5001, 6050)),
			outcome{rules: RuleExclusion, late: 1}},
		"later term is late": {expires(held(ByIsLeader, 5600), beliefOf("c2", 20, ByContext, 5550, 5551)), violated(RuleExclusion)},

		"renewals end and the key stays":       {scene{extra: join(renewed, held(ByIsLeader, 9000))}, violated(RuleDeadline)},
		"no renewal, until what the term said": {scene{extra: join(held(ByIsLeader, 1609)), drop: "renewed c1"}, good},
		"no renewal, and longer":               {scene{extra: join(held(ByIsLeader, 1615)), drop: "renewed c1"}, violated(RuleDeadline)},
		"no renewal, and the key is seen late": {scene{drop: "renewed c1 event audit read c1 write c1", extra: join(held(ByIsLeader, 1617), with(first, func(e *Entry) { e.Until = 1615 }),
			with(event(500, 10, "chaos/a/1", "c1"), func(e *Entry) { e.Rev = 10 }), event(9700, 10, "chaos/a/1", ""), with(event(501, 20, "chaos/a/2", "c2"), func(e *Entry) { e.Rev = 20 }),
			event(9800, 20, "chaos/a/2", ""))}, violated(RuleData, RuleDeadline, "nothing-checked")},
		"no renewal, and the term says too much":    {scene{extra: join(held(ByIsLeader, 1617), with(first, func(e *Entry) { e.Until = 9000 })), drop: "renewed c1"}, violated(RuleDeadline, RuleDeadline)},
		"renewal that was not sent yet":             {scene{extra: join(held(ByIsLeader, 9000), renewed, Entry{T: 9001, From: 9001, Until: 10601, Proc: "c1", Kind: Renewed, Lease: 1})}, violated(RuleDeadline)},
		"renewal that was sent in time":             {scene{extra: join(held(ByIsLeader, 9000), renewed, Entry{T: 9001, From: 9000, Until: 10600, Proc: "c1", Kind: Renewed, Lease: 1})}, good},
		"renewal that is told late":                 {scene{extra: join(held(ByIsLeader, 9000), renewed, Entry{T: 9099, From: 9098, Until: 10600, Proc: "c1", Kind: Renewed, Lease: 1})}, good},
		"renewal that is told late, and longer":     {expires(held(ByIsLeader, 5610), oddly(func(e *Entry) { e.From, e.T = 4060, 4061 })), violated(RuleDeadline, RuleMargin)},
		"renewal that says too much":                {scene{gone: 6000, cause: Expired, extra: join(held(ByIsLeader, 5610), oddly(func(e *Entry) { e.Until = 9000 }))}, violated(RuleDeadline, RuleDeadline, RuleMargin)},
		"renewal that says it may be a bit longer":  {scene{gone: 6000, cause: Expired, extra: join(oddly(func(e *Entry) { e.Until = 5605 }))}, good},
		"renewal that says it may be longer":        {scene{gone: 6000, cause: Expired, extra: join(oddly(func(e *Entry) { e.Until = 5606 }))}, violated(RuleDeadline)},
		"term that says it may be a bit longer":     {scene{extra: join(with(first, func(e *Entry) { e.Until = 1615 }))}, good},
		"term that says it may be longer":           {scene{extra: join(with(first, func(e *Entry) { e.Until = 1616 }))}, violated(RuleDeadline)},
		"term that a renewal has made longer":       {scene{extra: join(with(first, func(e *Entry) { e.T, e.Until = 600, 2105 }))}, good},
		"term that a renewal has made a bit longer": {scene{extra: join(with(first, func(e *Entry) { e.T, e.Until = 600, 2106 }))}, violated(RuleDeadline)},
		"renewal of less than the one before":       {scene{gone: 6000, cause: Expired, extra: join(held(ByIsLeader, 5600), renewed, Entry{T: 4200, From: 3000, Until: 4600, Proc: "c1", Kind: Renewed, Lease: 1})}, good},
		"renewal of another lease":                  {expires(held(ByIsLeader, 6000), Entry{T: 4510, From: 4500, Until: 6100, Proc: "c1", Kind: Renewed, Lease: 2}, renewed), violated(RuleDeadline, RuleMargin)},

		"until the end was told":               {scene{extra: join(held(ByIsLeader, 9697), Entry{T: 9697, Proc: "c1", Kind: Ended, Token: 10, Op: Resigned}, Entry{T: 9690, Proc: "c1", Kind: Resigning, Token: 10})}, good},
		"after the end was told":               {scene{extra: join(held(ByIsLeader, 9698), Entry{T: 9697, Proc: "c1", Kind: Ended, Token: 10, Op: Resigned}, Entry{T: 9690, Proc: "c1", Kind: Resigning, Token: 10})}, violated(RuleMargin)},
		"context after the end was told":       {scene{extra: join(held(ByContext, 9698), Entry{T: 9697, Proc: "c1", Kind: Ended, Token: 10, Op: Resigned}, Entry{T: 9690, Proc: "c1", Kind: Resigning, Token: 10})}, violated(RuleMargin)},
		"Run's context after the end was told": {scene{extra: join(held(ByRun, 9698), Entry{T: 9697, Proc: "c1", Kind: Ended, Token: 10, Op: Resigned}, Entry{T: 9690, Proc: "c1", Kind: Resigning, Token: 10})}, good},
		"after the key was given up":           {scene{extra: join(held(ByIsLeader, 9701))}, violated(RuleMargin)},
		"as the key was given up":              {scene{extra: join(held(ByIsLeader, 9700))}, good},
		"after an operator took the key":       {scene{4999, Evicted, "", join(held(ByIsLeader, 6599), deletedIt, renewed, Entry{T: 4999, From: 4999, Until: 6599, Proc: "c1", Kind: Renewed, Lease: 1})}, good},
		"long after that":                      {scene{4999, Evicted, "", join(held(ByIsLeader, 6600), deletedIt, renewed, Entry{T: 5001, From: 5001, Until: 6601, Proc: "c1", Kind: Renewed, Lease: 1})}, violated(RuleMargin)},

		"without faults, 500 ms after an operator took the key": {taken(held(ByIsLeader, 5499), calm(2999, 9000)), good},
		"without faults, later":                                 {taken(held(ByIsLeader, 5500), calm(2999, 9000)), violated(RuleMargin)},
		"without faults, by a timer":                            {taken(held(ByContext, 5599), calm(2999, 9000)), good},
		"without faults, by a timer, later":                     {taken(held(ByContext, 5600), calm(2999, 9000)), violated(RuleMargin)},
		"without faults, stopped":                               {taken(held(ByIsLeader, 5599), calm(2999, 9000), stopped(5499, 5500)), good},
		"without faults, stopped too late":                      {taken(held(ByIsLeader, 5599), calm(2999, 9000), stopped(5500, 5501)), violated(RuleMargin)},
		"without faults for less than a TTL":                    {taken(held(ByIsLeader, 5599), calm(3000, 9000)), good},
		"without faults until then":                             {taken(held(ByIsLeader, 5599), calm(0, 5499)), violated(RuleMargin)},
		"without faults until before then":                      {taken(held(ByIsLeader, 5599), calm(0, 5498)), good},
		"without faults, for a time that is too short to count": {taken(held(ByIsLeader, 5599), calm(2999, 7998)), good},
		"without faults, for one that is not":                   {taken(held(ByIsLeader, 5599), calm(2999, 7999)), violated(RuleMargin)},

		"elected at the deadline":               {scene{drop: "renewed c1 read c1 write c1", extra: at(1610)}, violated("nothing-checked")},
		"elected later":                         {scene{drop: "renewed c1 read c1 write c1", extra: at(1710)}, violated("nothing-checked")},
		"elected too late":                      {scene{drop: "renewed c1 read c1 write c1", extra: at(1711)}, violated("nothing-checked", RuleDeadline)},
		"elected too late, as it was stopped":   {scene{drop: "renewed c1 read c1 write c1", extra: join(at(2100), stopped(1700, 2000))}, violated("nothing-checked")},
		"elected too late after it was stopped": {scene{drop: "renewed c1 read c1 write c1", extra: join(at(2101), stopped(1700, 2000))}, violated("nothing-checked", RuleDeadline)},

		"resigned as the lease expired, by the cause":   {scene{gone: 6000, extra: join(held(ByIsLeader, 5600), renewed)}, good},
		"resigned, though the lease was to expire then": {scene{gone: 6000, extra: join(held(ByIsLeader, 6000), renewed)}, violated(RuleDeadline)},
		"resigned after it was lost":                    {expires(held(ByIsLeader, 5604), Entry{T: 5605, Proc: "c1", Kind: Resigning, Token: 10}), violated(RuleMargin)},
		"resigned, and nothing was told of the end": {scene{gone: 6000, drop: "ended c1", extra: join(held(ByIsLeader, 5604), renewed, Entry{T: 5604, Proc: "c1", Kind: Resigning, Token: 10})},
			violated(RuleEnded, RuleMargin)},
	})
}

func TestEndOfATermIsToldOnceSoonAndTruly(t *testing.T) {
	t.Parallel()
	ended := func(at int64, cause string) Entry { return Entry{T: at, Proc: "c1", Kind: Ended, Token: 10, Op: cause} }
	resigning := func(at int64) Entry { return Entry{T: at, Proc: "c1", Kind: Resigning, Token: 10} }
	exit := func(at int64, err string) Entry { return Entry{T: at, Proc: "c1", Kind: Exit, Result: OK, Err: err} }
	killed := "signal: killed"
	testScenes(t, map[string]sceneTest{
		"in time":                  {scene{}, good},
		"never":                    {scene{drop: "ended c1"}, violated(RuleEnded)},
		"twice":                    {scene{extra: join(ended(9701, Resigned), ended(9702, Resigned))}, violated(RuleEnded)},
		"10 s later":               {scene{extra: join(ended(10011, Resigned))}, good},
		"more than 10 s later":     {scene{extra: join(ended(10012, Resigned))}, violated(RuleEnded)},
		"10 s after belief":        {scene{extra: join(ended(10100, Resigned), beliefOf("c1", 10, ByIsLeader, 11, 100))}, good},
		"10 s after an answer":     {scene{extra: join(ended(10100, Resigned), beliefOf("c1", 10, ByIsLeader, 100, 50))}, good},
		"later, as it was stopped": {scene{extra: join(ended(11100, Resigned), Entry{T: 11000, From: 10000, Proc: "c1", Kind: Stopped})}, good},
		"of a term that was not":   {scene{extra: join(Entry{T: 9701, Proc: "c3", Kind: Ended, Token: 11, Op: Resigned})}, violated(RuleEnded)},

		"killed before it was told":       {scene{gone: 6000, drop: "ended c1 resigning c1", extra: join(exit(5000, killed), renewals("c1", 1, 4000))}, good},
		"killed long after the end":       {scene{drop: "ended c1", extra: join(exit(10012, killed))}, violated(RuleEnded)},
		"killed 10 s after the beginning": {scene{drop: "ended c1", extra: join(exit(10011, killed))}, good},
		"exited before it was told":       {scene{gone: 6000, drop: "ended c1 resigning c1", extra: join(exit(5000, ""), renewals("c1", 1, 4000))}, violated(RuleEnded)},
		"killed before the term":          {scene{drop: "ended c1", extra: join(exit(8, killed))}, violated(RuleEnded)},

		"resigned, which it has not said":       {scene{gone: 6000, extra: join(ended(5600, Resigned), renewals("c1", 1, 4000)), drop: "resigning c1"}, violated(RuleEnded)},
		"resigned, which it said later":         {scene{gone: 6000, extra: join(ended(5600, Resigned), resigning(5601), renewals("c1", 1, 4000))}, violated(RuleEnded)},
		"resigned, which it said then":          {scene{gone: 6000, extra: join(ended(5600, Resigned), resigning(5600), renewals("c1", 1, 4000))}, good},
		"resigned, as it was closed":            {scene{extra: join(resigning(9699), Entry{T: 9600, Proc: "c1", Kind: Closing}, ended(9650, Resigned))}, good},
		"resigned, as it was closed before":     {scene{extra: join(resigning(9699), Entry{T: 8, Proc: "c1", Kind: Closing}, ended(9650, Resigned))}, violated(RuleEnded)},
		"resigned, as it was closed elsewhere":  {scene{extra: join(resigning(9699), Entry{T: 9600, Proc: "c1", Kind: Closing, Election: "chaos/b"}, ended(9650, Resigned))}, violated(RuleEnded)},
		"resigned, as it was given up":          {scene{gone: 6000, drop: "resigning c1", extra: join(ended(5600, Resigned), renewals("c1", 1, 4000), Entry{T: 5500, Proc: "c1", Kind: GivingUp, Election: "chaos/a"})}, violated(RuleEnded)},
		"resigned, said again":                  {scene{extra: join(resigning(9699), resigning(9710))}, good},
		"expired at the deadline":               {scene{gone: 6000, cause: Expired}, good},
		"expired a moment before":               {scene{gone: 6000, cause: Expired, extra: join(ended(5595, Expired))}, good},
		"expired before the deadline":           {scene{gone: 6000, cause: Expired, extra: join(ended(5594, Expired))}, violated(RuleEnded)},
		"expired, though an operator took it":   {scene{gone: 4999, cause: Evicted, extra: join(ended(5001, Expired), deletedIt)}, violated(RuleEnded)},
		"expired, and an operator had taken it": {scene{gone: 4999, cause: Evicted, extra: join(ended(5600, Expired), deletedIt)}, good},
		"evicted by an operator":                {scene{gone: 4999, cause: Evicted, extra: join(deletedIt)}, good},
		"evicted, though the lease has expired": {scene{gone: 6000, cause: Expired, extra: join(ended(5601, Evicted))}, violated(RuleEnded)},
		"evicted, though it has resigned":       {scene{extra: join(ended(9701, Evicted), resigning(9699), renewals("c1", 1, 7000))}, violated(RuleEnded)},
		"evicted before that could be seen":     {scene{gone: 4999, cause: Evicted, extra: join(ended(1998, Evicted), deletedIt)}, violated(RuleEnded)},
		"evicted when that may not be seen yet": {scene{gone: 4999, cause: Evicted, extra: join(ended(1999, Evicted), deletedIt)}, good},
		"no cause":                              {scene{extra: join(ended(9701, "nonsense"), resigning(9699))}, violated(RuleEnded, RuleLease)},
		"its deadline is then":                  {scene{extra: join(with(ended(9701, Resigned), func(e *Entry) { e.Until = 9706 }), resigning(9699))}, good},
		"its deadline is later":                 {scene{extra: join(with(ended(9701, Resigned), func(e *Entry) { e.Until = 9707 }), resigning(9699))}, violated(RuleEnded)},
	})
}

func TestCampaignsAreToldFromBeginningToEnd(t *testing.T) {
	t.Parallel()
	// c3 campaigns from 5 s on, and has no key.
	tell := func(at int64, kind Kind, op string) Entry { return Entry{T: at, Proc: "c3", Kind: kind, Op: op} }
	campaigns := func(more ...any) scene { return scene{extra: join(tell(5000, Campaigning, ""), join(more...))} }
	all := func(e Entry) Entry { e.Election = ""; return e }
	elsewhere := func(e *Entry) { e.Election = "chaos/b" }
	tried := func(from, to int64) Entry {
		return Entry{T: to, From: from, Proc: "c3", Kind: Tried, Election: "chaos/a"}
	}
	elected := func(at int64, token int64) Entry { return Entry{T: at, Proc: "c1", Kind: Elected, Token: token} }
	dead := Entry{T: 6000, Proc: "c3", Kind: Exit, Result: OK, Err: "killed"}
	// own is the key of c3, which stays.
	own := func(t int64) Entry { return event(t, t, "chaos/a/3", "c3") }
	stopped := Entry{T: 8001, From: 8000, Proc: "c3", Kind: Stopped}
	// rests is that c1 has a term of Run until 5.6 s, and campaigns again some time later.
	rests := func(again int64, cause string) scene {
		extra := join(with(first, func(e *Entry) { e.Value = ByRun }), Entry{T: 5600, Proc: "c1", Kind: Resigning, Token: 10}, Entry{T: 9, Proc: "c1", Kind: Campaigning},
			Entry{T: again, Proc: "c1", Kind: Campaigning}, event(again+1, again+1, "chaos/a/9", "c1"))
		if cause == Resigned {
			return scene{gone: 5601, extra: extra}
		}
		return scene{gone: 6000, cause: Expired, extra: extra}
	}
	edited := func(s scene, kind Kind, change func(*Entry)) scene {
		for i := range s.extra {
			if s.extra[i].Kind == kind {
				change(&s.extra[i])
			}
		}
		return s
	}
	untold := func(s scene) scene { s.drop = "ended c1"; return s }
	join2 := func(s scene, extra ...Entry) scene { s.extra = append(s.extra, extra...); return s }
	with1 := func(proc string, entries ...Entry) []Entry {
		for i := range entries {
			entries[i].Proc = proc
		}
		return entries
	}
	testScenes(t, map[string]sceneTest{
		"given up": {campaigns(all(tell(5500, GivingUp, "")), tell(5501, CampaignFailed, GaveUp)), good},
		"given up in 2 s, and what a machine takes": {campaigns(all(tell(5500, GivingUp, "")), tell(10500, CampaignFailed, GaveUp)), good},
		"given up later":                    {campaigns(all(tell(5500, GivingUp, "")), tell(10501, CampaignFailed, GaveUp)), violated(RuleCampaign)},
		"given up later, as it was stopped": {campaigns(all(tell(5500, GivingUp, "")), tell(10601, CampaignFailed, GaveUp), Entry{T: 10501, From: 10500, Proc: "c3", Kind: Stopped}), good},
		"given up twice":                    {campaigns(all(tell(5500, GivingUp, "")), all(tell(6500, GivingUp, "")), tell(10501, CampaignFailed, GaveUp)), violated(RuleCampaign)},
		"given up for no reason":            {campaigns(tell(5501, CampaignFailed, GaveUp)), violated(RuleCampaign)},
		"given up before it began":          {campaigns(all(tell(4000, GivingUp, "")), tell(5501, CampaignFailed, GaveUp)), good},
		"given up elsewhere":                {campaigns(with(tell(5500, GivingUp, ""), func(e *Entry) { e.Election = "chaos/b" }), tell(5501, CampaignFailed, GaveUp)), violated(RuleCampaign)},
		"another was given up":              {campaigns(with1("c1", all(tell(5500, GivingUp, ""))), tell(5501, CampaignFailed, GaveUp)), violated(RuleCampaign)},
		"the one before was given up": {campaigns(tell(4000, Campaigning, ""), with(tell(4100, GivingUp, ""), func(e *Entry) { e.Election = "chaos/a" }), tell(4200, CampaignFailed, GaveUp), tell(5501, CampaignFailed, GaveUp)),
			violated(RuleCampaign)},
		"all were given up before":          {campaigns(tell(4000, Campaigning, ""), all(tell(4100, GivingUp, "")), tell(4200, CampaignFailed, GaveUp), tell(5501, CampaignFailed, GaveUp)), good},
		"given up in a former life":         {campaigns(with(dead, func(e *Entry) { e.T = 4500 }), all(tell(4100, GivingUp, "")), tell(5501, CampaignFailed, GaveUp)), violated(RuleCampaign)},
		"closed":                            {campaigns(tell(5500, Closing, ""), tell(5501, CampaignFailed, Shut)), good},
		"closed for no reason":              {campaigns(tell(5501, CampaignFailed, Shut)), violated(RuleCampaign)},
		"closed, though it was given up":    {campaigns(all(tell(5500, GivingUp, "")), tell(5501, CampaignFailed, Shut)), violated(RuleCampaign)},
		"given up and closed":               {campaigns(all(tell(5500, GivingUp, "")), tell(5600, Closing, ""), tell(5601, CampaignFailed, Shut)), good},
		"closed before":                     {campaigns(tell(4000, Closing, ""), with(tell(4100, Closed, ""), func(e *Entry) { e.Result = OK }), tell(5501, CampaignFailed, Shut)), violated(RuleCampaign)},
		"held":                              {campaigns(tell(5501, CampaignFailed, Held), tried(5000, 5502)), good},
		"held, and it was to wait":          {campaigns(tell(5501, CampaignFailed, Held)), violated(RuleCampaign)},
		"held, and another was not to wait": {campaigns(tell(5501, CampaignFailed, Held), with1("c1", tried(5000, 5502))), violated(RuleCampaign)},
		"held, and the next was refused":    {campaigns(tell(5501, CampaignFailed, Held), tried(5001, 5502)), violated(RuleCampaign)},
		"held, and the one before was not to wait": {scene{extra: join(tell(4001, Campaigning, ""), tell(4002, CampaignFailed, Held), tried(4000, 4003),
			tell(5000, Campaigning, ""), tell(5501, CampaignFailed, Held))}, violated(RuleCampaign)},
		"held, and killed":                            {campaigns(tell(5501, CampaignFailed, Held), with(dead, func(e *Entry) { e.T = 15501 })), good},
		"held, and killed late":                       {campaigns(tell(5501, CampaignFailed, Held), with(dead, func(e *Entry) { e.T = 15502 })), violated(RuleCampaign)},
		"held, and ended":                             {campaigns(tell(5501, CampaignFailed, Held), with(dead, func(e *Entry) { e.T, e.Err = 15501, "" })), violated(RuleCampaign)},
		"held where nobody is":                        {scene{extra: join(with(tell(5000, Campaigning, ""), elsewhere), with(tell(5501, CampaignFailed, Held), elsewhere), with(tried(5000, 5502), elsewhere))}, violated(RuleCampaign)},
		"held where somebody was":                     {scene{extra: join(tell(9801, Campaigning, ""), tell(9802, CampaignFailed, Held), tried(9801, 9803))}, violated(RuleCampaign)},
		"held where somebody was then":                {scene{extra: join(tell(9800, Campaigning, ""), tell(9802, CampaignFailed, Held), tried(9800, 9803))}, good},
		"held by what it left":                        {scene{extra: join(tell(9801, Campaigning, ""), event(9802, 9802, "chaos/a/3", "c3"), event(9803, 9802, "chaos/a/3", ""), tell(9804, CampaignFailed, Held), tried(9801, 9804))}, good},
		"held by itself":                              {scene{extra: join(tell(9801, Campaigning, ""), event(9802, 9802, "chaos/a/3", "c3"), event(9803, 9802, "chaos/a/3", ""), tell(9804, CampaignFailed, Held), tried(9801, 9804), calm(5000, 10000))}, violated(RuleCampaign)},
		"held by one that may have come":              {scene{drop: "read c1", extra: join(with(tell(3, Campaigning, ""), elsewhere), with(tell(4, CampaignFailed, Held), elsewhere), with(tried(3, 5), elsewhere), event(3004, 3004, "chaos/b/4", "stock"))}, good},
		"held by one that came later":                 {scene{extra: join(with(tell(3, Campaigning, ""), elsewhere), with(tell(4, CampaignFailed, Held), elsewhere), with(tried(3, 5), elsewhere), event(3005, 3005, "chaos/b/4", "stock"))}, violated(RuleCampaign)},
		"elected, and was not to wait":                {scene{extra: join(with1("c1", tried(9, 12)))}, good},
		"elected behind another, and was not to wait": {scene{extra: join(with1("c2", tried(19, 9702)), calm(-2000, 9999))}, violated(RuleCampaign, RuleCampaign)},
		"elected behind another by a late answer, and was not to wait": {scene{extra: join(with1("c2", tried(19, 9702)), calm(-1980, 9999))}, good},
		"elected when another had gone, and was not to wait":           {scene{extra: join(with1("c1", tried(9, 12)), event(5, 5, "chaos/a/5", "stock"), event(9, 5, "chaos/a/5", ""), calm(-2000, 9999))}, good},
		"elected as another went, and was not to wait":                 {scene{extra: join(with1("c1", tried(9, 12)), event(5, 5, "chaos/a/5", "stock"), with(event(10, 5, "chaos/a/5", ""), func(e *Entry) { e.Rev = 11 }), calm(-2000, 9999))}, violated(RuleCampaign)},
		"failed":                      {campaigns(tell(5501, CampaignFailed, "")), violated(RuleCampaign)},
		"failed as it was given up":   {campaigns(all(tell(5500, GivingUp, "")), tell(5501, CampaignFailed, "")), violated(RuleCampaign)},
		"failed as it was closed":     {campaigns(tell(5500, Closing, ""), tell(5501, CampaignFailed, "")), violated(RuleCampaign)},
		"failed, and was not to wait": {campaigns(tell(5501, CampaignFailed, ""), tried(5000, 5502)), violated(RuleCampaign)},
		"refused":                     {scene{extra: join(tried(5000, 5502))}, good},
		"given up between its election and its term": {scene{extra: join(Entry{T: 11, Proc: "c1", Kind: Elected, Token: 10}, Entry{T: 11, Proc: "c1", Kind: GivingUp, Election: "chaos/a"}, with(first, func(e *Entry) { e.T = 12 }),
			Entry{T: 9, Proc: "c1", Kind: Campaigning}, Entry{T: 9750, Proc: "c1", Kind: Campaigning}, Entry{T: 9760, Proc: "c1", Kind: CampaignFailed, Op: GaveUp})}, violated(RuleCampaign)},
		"told who leads while the next has ended": {scene{extra: join(Entry{T: 9, Proc: "c1", Kind: Campaigning}, Entry{T: 9698, Proc: "c1", Kind: Campaigning}, Entry{T: 9698, Proc: "c1", Kind: GivingUp, Election: "chaos/a"},
			Entry{T: 9699, Proc: "c1", Kind: CampaignFailed, Op: GaveUp}, changed("c1", 9701, 10))}, good},
		"never ended":                 {campaigns(), good},
		"begun twice":                 {campaigns(tell(5500, Campaigning, "")), violated(RuleCampaign)},
		"begun again in another life": {campaigns(dead, tell(6001, Campaigning, "")), good},
		"begun again elsewhere":       {campaigns(with(tell(5500, Campaigning, ""), func(e *Entry) { e.Election = "chaos/b" })), good},
		"another's death":             {campaigns(with1("c4", dead), tell(6001, Campaigning, "")), violated(RuleCampaign)},
		"failed, and not begun":       {scene{extra: join(tell(5501, CampaignFailed, GaveUp))}, violated(RuleCampaign)},
		"failed twice":                {campaigns(tell(5501, CampaignFailed, Held), tried(5000, 5502), tell(5502, CampaignFailed, Held)), violated(RuleCampaign)},

		"elected, and not begun":         {scene{drop: "campaigning c1"}, violated(RuleCampaign)},
		"elected, and not told":          {scene{drop: "elected c1"}, violated(RuleCampaign)},
		"elected, and told after it":     {scene{extra: join(elected(12, 10))}, violated(RuleCampaign)},
		"elected twice":                  {scene{extra: join(elected(11, 10), elected(11, 10))}, violated(RuleCampaign)},
		"elected, and not won":           {scene{drop: "term c1"}, violated(RuleCampaign)},
		"elected, and lost at once":      {scene{4999, Evicted, "term c1 read c1 resigning c1", join(deletedIt)}, good},
		"elected, and killed":            {scene{gone: 2500, drop: "term c1 ended c1 read c1 resigning c1 renewed c1", extra: join(with1("c1", with(dead, func(e *Entry) { e.T = 2400 })))}, good},
		"elected, and killed much later": {scene{gone: 2500, drop: "term c1 ended c1 read c1 resigning c1 renewed c1", extra: join(with1("c1", with(dead, func(e *Entry) { e.T = 10012 })))}, violated(RuleCampaign, RuleEnded)},
		"elected, and exited":            {scene{gone: 2500, drop: "term c1 ended c1 read c1 resigning c1 renewed c1", extra: join(with1("c1", with(dead, func(e *Entry) { e.T, e.Err = 2400, "" })))}, violated(RuleCampaign, RuleEnded)},

		"tried for 3 s":                       {campaigns(all(tell(8000, GivingUp, "")), tell(8000, CampaignFailed, GaveUp), tried(5000, 8000), calm(3000, 9000), own(5001), event(8000, 5001, "chaos/a/3", "")), good},
		"tried for longer":                    {campaigns(all(tell(8000, GivingUp, "")), tell(8001, CampaignFailed, GaveUp), tried(5000, 8001), calm(3000, 9000), own(5001), event(8000, 5001, "chaos/a/3", "")), violated(RuleCampaign)},
		"tried for longer, as it was stopped": {campaigns(all(tell(8000, GivingUp, "")), tell(8001, CampaignFailed, GaveUp), tried(5000, 8001), calm(3000, 9000), own(5001), event(8000, 5001, "chaos/a/3", ""), stopped), good},
		"tried for longer under faults":       {campaigns(all(tell(8000, GivingUp, "")), tell(8001, CampaignFailed, GaveUp), tried(5000, 8001), calm(3001, 9000), own(5001), event(8000, 5001, "chaos/a/3", "")), good},

		"without a key in calm for 3 s":          {campaigns(calm(1000, 9000), own(8000)), good},
		"without a key in calm for longer":       {campaigns(calm(1000, 9000), own(8001)), violated(RuleCampaign)},
		"without a key since before it was calm": {campaigns(calm(3500, 8600), own(8501)), violated(RuleCampaign)},
		"without a key since calm began":         {campaigns(calm(3500, 8600), own(8500)), good},
		"without a key until calm ends":          {campaigns(calm(3000, 8000)), good},
		"without a key until later":              {campaigns(calm(3000, 8001)), violated(RuleCampaign)},
		"with a key, beside one that came late":  {campaigns(calm(1000, 9000), own(5001), event(5100, 5100, "chaos/a/4", "c3"), event(5200, 5100, "chaos/a/4", "")), good},
		"without a key, as it was stopped":       {campaigns(calm(1000, 9000), own(8001), with(stopped, func(e *Entry) { e.From, e.T = 7999, 8000 })), good},
		"without a key, and it ended":            {campaigns(calm(1000, 9000), all(tell(7990, GivingUp, "")), tell(8000, CampaignFailed, GaveUp)), good},
		"without a key, and it ended later":      {campaigns(calm(1000, 9000), all(tell(7990, GivingUp, "")), tell(8001, CampaignFailed, GaveUp)), violated(RuleCampaign)},
		"its key is gone":                        {campaigns(calm(1000, 9000), own(5001), event(5500, 5001, "chaos/a/3", ""), with(deletedIt, func(e *Entry) { e.From, e.Token, e.Rev = 5499, 5001, 5500 })), violated(RuleCampaign)},
		"its key is gone, and it has another": {campaigns(calm(1000, 9000), own(5001), event(5500, 5001, "chaos/a/3", ""), with(deletedIt, func(e *Entry) { e.From, e.Token, e.Rev = 5499, 5001, 5500 }),
			event(8500, 8500, "chaos/a/4", "c3")), good},

		"Run rests after a lost term":              {rests(5650, Expired), good},
		"Run does not rest after a lost term":      {rests(5649, Expired), violated(RuleCampaign)},
		"Run does not rest, after other campaigns": {join2(rests(5649, Expired), Entry{T: 1, Proc: "c1", Kind: Campaigning}, Entry{T: 2, Proc: "c1", Kind: GivingUp, Election: "chaos/a"}, Entry{T: 3, Proc: "c1", Kind: CampaignFailed, Op: GaveUp}), violated(RuleCampaign)},
		"Run is killed, and campaigns again": {scene{gone: 6000, drop: "resigning c1 ended c1", extra: join(renewals("c1", 1, 4000), with(first, func(e *Entry) { e.Value = ByRun }), with(dead, func(e *Entry) { e.T, e.Proc = 5000, "c1" }),
			Entry{T: 9, Proc: "c1", Kind: Campaigning}, Entry{T: 5010, Proc: "c1", Kind: Campaigning}, event(5011, 5011, "chaos/a/9", "c1"))}, good},
		"killed as it was elected, and campaigns again": {scene{gone: 2500, drop: "term c1 ended c1 read c1 resigning c1 renewed c1", extra: join(with(dead, func(e *Entry) { e.T, e.Proc = 2400, "c1" }),
			Entry{T: 9, Proc: "c1", Kind: Campaigning}, Entry{T: 2410, Proc: "c1", Kind: Campaigning}, event(2411, 2411, "chaos/a/9", "c1"))}, good},
		"Run does not rest after it resigned":        {rests(5649, Resigned), good},
		"Campaign does not rest after a lost term":   {edited(rests(5649, Expired), Term, func(e *Entry) { e.Value = "" }), good},
		"Run does not rest as it is given up":        {join2(rests(5649, Expired), Entry{T: 5630, Proc: "c1", Kind: GivingUp}), good},
		"Run does not rest as it was closed":         {join2(rests(5649, Expired), Entry{T: 5630, Proc: "c1", Kind: Closing}, Entry{T: 5640, Proc: "c1", Kind: Closed, Result: OK}), good},
		"Run does not rest and is closed later":      {join2(rests(5649, Expired), Entry{T: 5650, Proc: "c1", Kind: Closing}, Entry{T: 5650, Proc: "c1", Kind: Closed, Result: Unknown}), violated(RuleCampaign)},
		"Run does not rest after it was closed":      {join2(rests(5649, Expired), Entry{T: 5599, Proc: "c1", Kind: Closing}, Entry{T: 5620, Proc: "c1", Kind: Closed, Result: Unknown}), good},
		"Run does not rest after another was closed": {join2(rests(5649, Expired), Entry{T: 8, Proc: "c1", Kind: Closing}, Entry{T: 8, Proc: "c1", Kind: Closed, Result: Unknown}), violated(RuleCampaign)},
		"Run does not rest, and no end was told":     {untold(rests(5649, Expired)), violated(RuleEnded)},

		"told who leads in a campaign":      {campaigns(changed("c3", 5001, 10), all(tell(5500, GivingUp, "")), tell(5501, CampaignFailed, GaveUp)), good},
		"told who leads after it":           {campaigns(changed("c3", 5502, 10), all(tell(5500, GivingUp, "")), tell(5501, CampaignFailed, GaveUp)), violated(RuleCampaign)},
		"told who leads before it":          {campaigns(changed("c3", 4999, 10)), violated(RuleCampaign)},
		"told who leads in a term":          {scene{extra: join(changed("c1", 9700, 10))}, good},
		"told who leads after it has ended": {scene{extra: join(changed("c1", 9702, 20))}, violated(RuleCampaign)},
		"told who leads, and killed":        {campaigns(changed("c3", 6001, 10), dead), violated(RuleCampaign)},
	})
}

// changed is what the hook LeaderChanged was called with.
func changed(proc string, t, token int64) Entry {
	e := observed(t, token)
	e.Proc, e.Kind, e.Op = proc, Changed, ""
	return e
}

func observed(t, token int64) Entry {
	e := Entry{T: t, Proc: "o", Kind: Observed, Op: "1"}
	if token != 0 {
		n := token / 10
		e.Token, e.Key, e.Value, e.Lease = token, fmt.Sprintf("chaos/a/%d", n), fmt.Sprintf("c%d", n), n
	}
	return e
}

// tried says that the campaign of waits was not to wait.
var tried = Entry{T: 9000, From: 29, Proc: "c3", Kind: Tried, Election: "chaos/a"}

// waits is a candidate that waits from 30 ms on, with token 30 under lease 3, until its key is gone. Its session is
// over at 5.6 s.
func waits(gone int64, extra ...any) []Entry {
	return join(
		Entry{T: 29, Proc: "c3", Kind: Campaigning}, event(30, 30, "chaos/a/3", "c3"), renewals("c3", 3, 4000),
		event(gone, 30, "chaos/a/3", ""), join(extra...),
	)
}

func unrenewed(entries []Entry) []Entry {
	return slices.DeleteFunc(entries, func(e Entry) bool { return e.Kind == Renewed })
}

func TestNobodyLosesAKeyForNoReason(t *testing.T) {
	t.Parallel()
	tell := func(at int64, kind Kind, op string) Entry {
		return Entry{T: at, Proc: "c3", Kind: kind, Election: "chaos/a", Op: op}
	}
	failed := func(at int64) Entry { return tell(at, CampaignFailed, GaveUp) }
	taken := with(deletedIt, func(e *Entry) { e.From, e.Token, e.Rev = 4490, 30, 4500 })
	lost := violated(RuleLease)
	waiting := func(gone int64, extra ...any) scene { return scene{extra: waits(gone, extra...)} }
	dead := Entry{T: 3000, Proc: "c3", Kind: Exit, Result: OK, Err: "killed"}
	// readAt shows what is later not to be there yet.
	readAt := func(t int64) Entry {
		return Entry{T: t + 1, From: t, Proc: "r", Kind: Read, Token: 10, Op: "register", Value: "1 10:1", Rev: t}
	}
	testScenes(t, map[string]sceneTest{
		"waiting, by nobody":                                         {waiting(4500), lost},
		"waiting, by an operator":                                    {waiting(4500, taken), good},
		"waiting, by a deposed leader of etcd":                       {waiting(4500, deposed), good},
		"waiting, as its session is over":                            {waiting(5600), good},
		"waiting, before its session is over":                        {waiting(5599), lost},
		"waiting, given up":                                          {waiting(4500, tell(4499, GivingUp, ""), failed(4502)), good},
		"waiting, given up then":                                     {waiting(4500, tell(4500, GivingUp, ""), failed(4502)), good},
		"waiting, given up later":                                    {waiting(4500, tell(4501, GivingUp, ""), failed(4502)), lost},
		"waiting, closed":                                            {waiting(4500, tell(4499, Closing, ""), tell(4502, CampaignFailed, Shut)), good},
		"waiting, closed later":                                      {waiting(4500, tell(4501, Closing, ""), tell(4502, CampaignFailed, Shut)), lost},
		"not to wait":                                                {waiting(4500, tell(4502, CampaignFailed, Held), tried), good},
		"waiting, and killed":                                        {waiting(4500, dead), good},
		"waiting, and killed then":                                   {waiting(4500, with(dead, func(e *Entry) { e.T = 4500 })), good},
		"waiting, and killed later":                                  {waiting(4500, with(dead, func(e *Entry) { e.T = 4501 })), lost},
		"waiting, in a campaign that begins then":                    {scene{extra: append(waits(4500)[1:], tell(30, Campaigning, ""))}, lost},
		"waiting, and it stays, though an operator says otherwise":   {scene{extra: append(slices.DeleteFunc(waits(9999), func(e Entry) bool { return e.Op == "delete" }), taken)}, good},
		"waiting, and somebody believes in it":                       {waiting(4500, tell(4499, GivingUp, ""), failed(4502), beliefOf("c3", 30, "else", 100, 200)), violated(RuleToken)},
		"left by a campaign":                                         {waiting(4500, tell(99, GivingUp, ""), failed(100), tell(101, Campaigning, "")), good},
		"of an earlier campaign, late":                               {waiting(4500, tell(20, Campaigning, ""), tell(21, GivingUp, ""), failed(22), readAt(29)), good},
		"of an earlier campaign, and the next key has another name":  {waiting(4500, tell(20, Campaigning, ""), tell(21, GivingUp, ""), failed(22), readAt(29), event(4600, 4600, "chaos/a/4", "c3")), good},
		"of an earlier campaign, and the next key has the same name": {waiting(4500, tell(20, Campaigning, ""), tell(21, GivingUp, ""), failed(22), readAt(29), readAt(4550), event(4600, 4600, "chaos/a/3", "c3")), lost},
		"of an earlier campaign, and the next key of that name is of a later one": {waiting(4500, tell(20, Campaigning, ""), tell(21, GivingUp, ""), failed(22), readAt(29),
			tell(4510, GivingUp, ""), failed(4520), tell(4530, Campaigning, ""), readAt(4550), event(4600, 4600, "chaos/a/3", "c3")), good},
		"of an earlier campaign that was won":                {waiting(4500, tell(20, Campaigning, ""), Entry{T: 22, Proc: "c3", Kind: Elected, Election: "chaos/a", Token: 5}, readAt(29), Entry{T: 23, Proc: "c3", Kind: Exit, Result: OK, Err: "killed"}), lost},
		"of an earlier campaign, 15 s before":                {waiting(4500, tell(-15000, Campaigning, ""), tell(-14980, GivingUp, ""), failed(-14970), readAt(29)), good},
		"of an earlier campaign, still before":               {waiting(4500, tell(-15000, Campaigning, ""), tell(-14980, GivingUp, ""), failed(-14971), readAt(29)), lost},
		"of another's earlier campaign":                      {waiting(4500, Entry{T: 20, Proc: "c4", Kind: Campaigning}, Entry{T: 21, Proc: "c4", Kind: GivingUp}, Entry{T: 22, Proc: "c4", Kind: CampaignFailed, Op: GaveUp}, readAt(29)), lost},
		"beside another key":                                 {waiting(4500, event(4499, 4499, "chaos/a/4", "c3")), good},
		"beside another key, which came before":              {waiting(8000, event(1000, 1000, "chaos/a/4", "c3"), event(4500, 1000, "chaos/a/4", ""), with(taken, func(e *Entry) { e.Rev = 8000 })), good},
		"beside another key, which goes before":              {waiting(4500, event(1000, 1000, "chaos/a/4", "c3"), event(4000, 1000, "chaos/a/4", ""), readAt(4200)), lost},
		"beside another key, which goes then":                {waiting(4500, event(1000, 1000, "chaos/a/4", "c3"), event(4499, 1000, "chaos/a/4", ""), readAt(4499)), good},
		"beside another key, which has gone":                 {waiting(4498, event(4500, 4500, "chaos/a/4", "c3"), readAt(4499)), lost},
		"beside the key of an earlier campaign":              {waiting(4500, Entry{T: 20, Proc: "c3", Kind: Campaigning}, event(25, 25, "chaos/a/4", "c3"), Entry{T: 26, Proc: "c3", Kind: Exit, Result: OK, Err: "killed"}, readAt(29)), lost},
		"of an earlier campaign perhaps":                     {waiting(2500, Entry{T: 20, Proc: "c3", Kind: Campaigning}, tell(21, GivingUp, ""), failed(28)), good},
		"never renewed, waiting, before its session is over": {scene{extra: unrenewed(waits(1628))}, lost},
		"never renewed, waiting, as its session is over":     {scene{extra: unrenewed(waits(1629))}, good},
		"of a peer": {scene{extra: join(event(30, 30, "chaos/a/3", "stock"), event(4500, 30, "chaos/a/3", ""))}, good},

		"leading, by nobody":                            {scene{gone: 4999, cause: Evicted}, lost},
		"leading, just elected":                         {scene{gone: 22, cause: Evicted}, lost},
		"leading, and the end says resigned":            {scene{gone: 4999, drop: "resigning c1", extra: renewals("c1", 1, 4000)}, violated(RuleEnded, RuleLease)},
		"leading, and it resigned later":                {scene{gone: 4999, extra: join(renewals("c1", 1, 4000), Entry{T: 5000, Proc: "c1", Kind: Resigning, Token: 10})}, lost},
		"leading, and it resigned then":                 {scene{gone: 4999, extra: join(renewals("c1", 1, 4000), Entry{T: 4999, Proc: "c1", Kind: Resigning, Token: 10})}, good},
		"leading, and it closed":                        {scene{gone: 4999, drop: "resigning c1", extra: join(renewals("c1", 1, 4000), Entry{T: 4999, Proc: "c1", Kind: Closing})}, good},
		"leading, and the end says expired":             {scene{gone: 5999, cause: Expired, extra: join(Entry{T: 5601, Proc: "c1", Kind: Resigning, Token: 10})}, lost},
		"leading, and killed as it resigned":            {scene{gone: 4999, drop: "ended c1", extra: join(renewals("c1", 1, 4000), Entry{T: 5000, Proc: "c1", Kind: Exit, Result: OK, Err: "killed"})}, good},
		"leading, before the lease may expire":          {scene{gone: 5999, cause: Expired}, lost},
		"leading, as the lease may expire":              {scene{gone: 6000, cause: Expired}, good},
		"leading, by a deposed leader of etcd":          {scene{gone: 4999, cause: Evicted, extra: join(deposed)}, good},
		"leading, before it was ever renewed":           {scene{gone: 2008, cause: Evicted, drop: "renewed c1"}, lost},
		"leading, if it was never renewed":              {scene{gone: 2009, cause: Expired, drop: "renewed c1", extra: join(Entry{T: 1609, Proc: "c1", Kind: Ended, Token: 10, Op: Expired})}, good},
		"leading, by a renewal that was told then":      {scene{gone: 6000, cause: Expired, extra: join(renewals("c1", 1, 4000), Entry{T: 6000, From: 5000, Until: 6600, Proc: "c1", Kind: Renewed, Lease: 1}, Entry{T: 6600, Proc: "c1", Kind: Ended, Token: 10, Op: Expired})}, lost},
		"leading, by a renewal that came later":         {scene{gone: 6000, cause: Expired, extra: join(renewals("c1", 1, 4000), Entry{T: 6001, From: 5590, Until: 7190, Proc: "c1", Kind: Renewed, Lease: 1})}, violated(RuleEnded)},
		"leading, by a renewal sent later than it says": {scene{gone: 5950, cause: Expired, extra: join(renewals("c1", 1, 3500), Entry{T: 4010, From: 4000, Until: 5550, Proc: "c1", Kind: Renewed, Lease: 1})}, good},
		"leading, granted for the campaign before": {scene{gone: 2008, cause: Expired, drop: "renewed c1", extra: join(
			Entry{T: 1609, Proc: "c1", Kind: Ended, Token: 10, Op: Expired}, Entry{T: 2, Proc: "c1", Kind: Campaigning}, Entry{T: 3, Proc: "c1", Kind: GivingUp},
			Entry{T: 5, Proc: "c1", Kind: CampaignFailed, Op: GaveUp}, Entry{T: 9, Proc: "c1", Kind: Campaigning})}, lost},
		"leading, granted for another campaign": {scene{gone: 2005, cause: Expired, drop: "renewed c1", extra: join(
			Entry{T: 1609, Proc: "c1", Kind: Ended, Token: 10, Op: Expired},
			Entry{T: 9, Proc: "c1", Kind: Campaigning}, Entry{T: 5, Proc: "c1", Kind: Campaigning, Election: "chaos/b"})}, good},
		"leading, before it may have been granted for another campaign": {scene{gone: 2004, cause: Expired, drop: "renewed c1", extra: join(
			Entry{T: 1609, Proc: "c1", Kind: Ended, Token: 10, Op: Expired},
			Entry{T: 9, Proc: "c1", Kind: Campaigning}, Entry{T: 5, Proc: "c1", Kind: Campaigning, Election: "chaos/b"})}, lost},
		"leading, granted for the key of another campaign": {scene{gone: 2006, cause: Expired, drop: "renewed c1", extra: join(
			Entry{T: 1609, Proc: "c1", Kind: Ended, Token: 10, Op: Expired}, Entry{T: 9, Proc: "c1", Kind: Campaigning},
			Entry{T: 5, Proc: "c1", Kind: Campaigning, Election: "chaos/b"}, event(7, 7, "chaos/b/1", "c1"), Entry{T: 8, Proc: "c1", Kind: GivingUp, Election: "chaos/b"},
			event(2100, 7, "chaos/b/1", ""))}, good},
		"leading, granted when another campaign had a key": {scene{gone: 2008, cause: Expired, drop: "renewed c1", extra: join(
			Entry{T: 1609, Proc: "c1", Kind: Ended, Token: 10, Op: Expired},
			Entry{T: 9, Proc: "c1", Kind: Campaigning}, Entry{T: 5, Proc: "c1", Kind: Campaigning, Election: "chaos/b"},
			event(8, 8, "chaos/b/9", "c1"))}, lost},
	})
}

func TestNoKeyAndNoLeaseOutlivesItsUse(t *testing.T) {
	t.Parallel()
	orphan := violated(RuleOrphan)
	tell := func(at int64, kind Kind, op string) Entry {
		return Entry{T: at, Proc: "c3", Kind: kind, Election: "chaos/a", Op: op}
	}
	gaveUp := func(at int64) []Entry { return join(tell(at-2001, GivingUp, ""), tell(at, CampaignFailed, GaveUp)) }
	waiting := func(gone int64, extra ...any) scene { return scene{extra: waits(gone, extra...)} }
	// seen shows that what was deleted later was there until then.
	seen := func(t int64) Entry {
		return Entry{T: t + 1, From: t, Proc: "r", Kind: Read, Token: 10, Op: "register", Value: "1 10:1", Rev: t}
	}
	closed := Entry{T: 4000, From: 3990, Proc: "c3", Kind: Closed, Election: "chaos/a", Result: OK}
	dead := Entry{T: 3000, Proc: "c3", Kind: Exit, Result: OK, Err: "killed"}
	renewed := func(proc string, lease, sent int64) Entry {
		return Entry{T: sent + 10, From: sent, Until: sent + 1600, Proc: proc, Kind: Renewed, Lease: lease}
	}
	testScenes(t, map[string]sceneTest{
		"gone in time":                               {waiting(8000, gaveUp(3000), calm(100, 9000)), good},
		"1 ms too late":                              {waiting(8001, gaveUp(3000), calm(100, 9000)), orphan},
		"not that long without faults":               {waiting(8001, gaveUp(3000), calm(3001, 9000)), good},
		"calm does not last":                         {waiting(8500, gaveUp(3000), calm(100, 7999)), good},
		"calm just lasts":                            {waiting(8500, gaveUp(3000), calm(100, 8000)), orphan},
		"it was left before it was calm":             {waiting(8501, gaveUp(3000), calm(3500, 8600)), orphan},
		"and gone 5 s after that":                    {waiting(8500, gaveUp(3000), calm(3500, 8600)), good},
		"of one that was killed":                     {waiting(8001, dead, calm(100, 9000)), orphan},
		"of a campaign that goes on":                 {waiting(9500, with(deletedIt, func(e *Entry) { e.T, e.Token, e.Rev = 9501, 30, 9500 }), calm(100, 9600)), good},
		"nobody's":                                   {scene{extra: join(waits(0)[1], event(5031, 30, "chaos/a/3", ""), tell(9000, Campaigning, ""), calm(0, 9000))}, orphan},
		"nobody's, and gone in time":                 {scene{extra: join(waits(0)[1], event(5030, 30, "chaos/a/3", ""), tell(9000, Campaigning, ""), calm(0, 9000))}, good},
		"left for another, which goes soon":          {waiting(8001, event(3000, 3000, "chaos/a/4", "c3"), event(4000, 3000, "chaos/a/4", ""), calm(100, 9000)), good},
		"left for another":                           {waiting(8001, event(3000, 3000, "chaos/a/4", "c3"), calm(100, 9000)), orphan},
		"left for another, and gone in time":         {waiting(8000, event(3000, 3000, "chaos/a/4", "c3"), calm(100, 9000)), good},
		"of a term of one that was killed":           {scene{gone: 6000, drop: "ended c1 resigning c1", extra: join(renewals("c1", 1, 4000), with(dead, func(e *Entry) { e.T, e.Proc = 5000, "c1" }), calm(11, 9000))}, good},
		"of a term that has ended":                   {scene{gone: 8001, extra: join(renewals("c1", 1, 6000), Entry{T: 3000, Proc: "c1", Kind: Ended, Token: 10, Op: Resigned}, Entry{T: 2999, Proc: "c1", Kind: Resigning, Token: 10}, calm(100, 9000))}, orphan},
		"of a term that has ended, and gone in time": {scene{gone: 8000, extra: join(renewals("c1", 1, 6000), Entry{T: 3000, Proc: "c1", Kind: Ended, Token: 10, Op: Resigned}, Entry{T: 2999, Proc: "c1", Kind: Resigning, Token: 10}, calm(100, 9000))}, good},

		"given up at once, and gone":     {waiting(6100, tell(3000, GivingUp, ""), tell(3100, CampaignFailed, GaveUp), calm(1000, 6000)), good},
		"given up at once, and not gone": {waiting(6101, tell(3000, GivingUp, ""), tell(3100, CampaignFailed, GaveUp), calm(1000, 6000)), orphan},
		"given up at once, and not gone as a read shows": {waiting(3150, tell(3000, GivingUp, ""), tell(3100, CampaignFailed, GaveUp), calm(1000, 6000),
			Entry{T: 3105, From: 3101, Proc: "r", Kind: Read, Token: 10, Op: "register", Value: "1 10:1", Rev: 3101}), orphan},
		"given up at once, and not gone, under faults":    {waiting(6101, tell(3000, GivingUp, ""), tell(3100, CampaignFailed, GaveUp), calm(1001, 6001)), good},
		"given up at once, and not gone, as faults begin": {waiting(6101, tell(3000, GivingUp, ""), tell(3100, CampaignFailed, GaveUp), calm(-2000, 3099)), good},
		"given up in vain":                 {waiting(8500, tell(3000, GivingUp, ""), tell(5000, CampaignFailed, GaveUp), calm(0, 6000)), good},
		"given up in vain, 1 ms early":     {waiting(8500, tell(3000, GivingUp, ""), tell(4999, CampaignFailed, GaveUp), calm(0, 6000)), orphan},
		"held, and not gone":               {waiting(6101, tell(1000, CampaignFailed, Held), with(tried, func(e *Entry) { e.T = 1001 }), calm(-3000, 3000)), orphan},
		"given up as it came":              {waiting(4000, tell(30, GivingUp, ""), tell(50, CampaignFailed, GaveUp), calm(-3000, 3000), seen(3000)), orphan},
		"given up before it came":          {waiting(4000, tell(29, GivingUp, ""), tell(50, CampaignFailed, GaveUp), calm(-3000, 3000), seen(3000)), good},
		"given up before it may have come": {waiting(8500, tell(28, GivingUp, ""), tell(29, CampaignFailed, GaveUp), calm(-3000, 3000)), good},
		"given up, with one of before":     {waiting(8500, tell(101, Campaigning, ""), tell(28, GivingUp, ""), tell(99, CampaignFailed, GaveUp), tell(200, GivingUp, ""), tell(201, CampaignFailed, GaveUp), calm(-1900, 3100)), good},

		"closed, and gone":                   {waiting(7000, gaveUp(3000), closed), good},
		"closed, and not gone":               {waiting(7001, gaveUp(3000), closed), orphan},
		"not closed":                         {waiting(7001, gaveUp(3000), with(closed, func(e *Entry) { e.Result = Unknown })), good},
		"closed before it came":              {waiting(7001, gaveUp(3000), with(closed, func(e *Entry) { e.T = 29 })), good},
		"closed as it came":                  {waiting(7001, gaveUp(3000), with(closed, func(e *Entry) { e.T = 30 })), orphan},
		"closed when its session was over":   {waiting(9000, gaveUp(3000), with(closed, func(e *Entry) { e.T = 5600 })), good},
		"closed before its session was over": {waiting(9000, gaveUp(3000), with(closed, func(e *Entry) { e.T = 5599 })), orphan},
		"closed elsewhere":                   {waiting(7001, gaveUp(3000), with(closed, func(e *Entry) { e.Election = "chaos/b" })), good},

		"renewed while there is a key":            {waiting(6000, gaveUp(3000), renewed("c3", 3, 5990)), good},
		"renewed for a TTL after that":            {waiting(6000, gaveUp(3000), renewed("c3", 3, 8000)), good},
		"renewed for longer":                      {waiting(6000, gaveUp(3000), renewed("c3", 3, 8001)), orphan},
		"renewed for a campaign":                  {waiting(6000, gaveUp(3000), renewed("c3", 3, 8001), tell(7000, Campaigning, "")), good},
		"renewed for a campaign elsewhere":        {waiting(6000, gaveUp(3000), renewed("c3", 3, 8001), with(tell(7000, Campaigning, ""), func(e *Entry) { e.Election = "chaos/b" })), good},
		"renewed for a campaign of another":       {waiting(6000, gaveUp(3000), renewed("c3", 3, 8001), Entry{T: 7000, Proc: "c4", Kind: Campaigning}), orphan},
		"renewed for a campaign that is over":     {waiting(4000, gaveUp(3000), renewed("c3", 3, 8001), tell(5000, Campaigning, ""), tell(5001, CampaignFailed, Held), with(tried, func(e *Entry) { e.From = 5000 })), orphan},
		"renewed before a campaign":               {waiting(4000, gaveUp(3000), renewed("c3", 3, 8001), tell(5000, Campaigning, ""), tell(5001, CampaignFailed, Held), with(tried, func(e *Entry) { e.From, e.T = 5000, 5002 }), tell(8900, Campaigning, ""), event(8950, 8950, "chaos/a/4", "c3")), orphan},
		"renewed for a campaign that has its key": {waiting(4000, gaveUp(3000), renewed("c3", 3, 8001), tell(5000, Campaigning, ""), event(5500, 5500, "chaos/a/4", "c3"), renewed("c3", 4, 7900)), orphan},
		"renewed for one whose lease has lapsed":  {waiting(4000, gaveUp(3000), renewed("c3", 3, 8001), tell(5000, Campaigning, ""), event(5500, 5500, "chaos/a/4", "c3")), good},
		"renewed for one that has lost its key":   {waiting(4000, gaveUp(3000), renewed("c3", 3, 9950), tell(5000, Campaigning, ""), event(5500, 5500, "chaos/a/4", "c3"), event(7600, 5500, "chaos/a/4", "")), good},
		"renewed, and never had a key":            {waiting(6000, gaveUp(3000), renewed("c3", 7, 8001)), orphan},
	})
}

func TestTermsBeginInTheirTurn(t *testing.T) {
	t.Parallel()
	order, token := RuleOrder, RuleToken
	read := func(proc string, token, rev int64) Entry {
		return Entry{T: 9702, From: 9701, Proc: proc, Kind: Read, Token: token, Op: "register", Value: "1 10:1", Rev: rev}
	}
	wrote := func(token, rev int64) []Entry {
		value := fmt.Sprintf("1 %d:2", token)
		return []Entry{
			{T: 9750, From: rev, Proc: "c", Kind: Write, Token: token, Op: "counter", Value: value, Rev: rev, Result: OK},
			{T: 9750, Proc: "audit", Kind: Event, Op: "put", Rev: rev, Token: rev, Key: worldOptions.DataKey("chaos/a", "counter"), Value: value},
		}
	}
	won := func(t, from, token int64, key string) Entry {
		return Entry{T: t, From: from, Proc: "c2", Kind: Term, Token: token, Key: key, Lease: token / 10, Op: Ours, Until: t + 1}
	}
	peer := func(e Entry) Entry { e.Op = "stock"; return e }
	testScenes(t, map[string]sceneTest{
		"a read shows that the older one is gone":  {scene{extra: join(read("c2", 20, 9700))}, good},
		"a read shows that it is not":              {scene{extra: join(read("c2", 20, 9699))}, violated(order)},
		"the first read counts":                    {scene{extra: join(read("c2", 20, 9701), read("c2", 20, 9699), read("c2", 20, 9702))}, violated(order)},
		"a read of another's":                      {scene{extra: join(read("c2", 20, 9701), read("c3", 20, 9699))}, good},
		"a read in another term":                   {scene{extra: join(read("c2", 20, 9701), read("c3", 21, 9699))}, good},
		"no read, and the audit shows it soon":     {scene{drop: "read c2", extra: ahead(6700)}, good},
		"no read, and the audit shows it too late": {scene{drop: "read c2", extra: ahead(6699)}, violated(order)},
		"no read, and it stays":                    {scene{drop: "read c2", extra: join(ahead(6000), event(5, 5, "chaos/a/5", "stock"))}, violated(order, order, order)},
		"the second of three stays": {scene{drop: "read c2", extra: join(Entry{T: 29, Proc: "c3", Kind: Campaigning}, event(30, 30, "chaos/a/3", "c3"), renewals("c3", 3, 9500), event(9850, 30, "chaos/a/3", ""),
			Entry{T: 9702, Proc: "c3", Kind: Elected, Token: 30}, Entry{T: 9702, From: 29, Proc: "c3", Kind: Term, Token: 30, Key: "chaos/a/3", Lease: 3, Op: Ours, Until: 9702},
			Entry{T: 9704, From: 9703, Proc: "c3", Kind: Read, Token: 30, Op: "register", Value: "1 10:1", Rev: 9703},
			Entry{T: 9849, Proc: "c3", Kind: Resigning, Token: 30}, Entry{T: 9851, Proc: "c3", Kind: Ended, Token: 30, Op: Resigned})}, violated(order)},
		"the oldest of three stays":                 {scene{extra: join(event(5, 5, "chaos/a/5", "stock"))}, violated(order, order, order)},
		"the oldest of three goes after the second": {scene{extra: join(event(5, 5, "chaos/a/5", "stock"), event(9720, 5, "chaos/a/5", ""))}, violated(order, order, order)},
		"the oldest of three goes first":            {scene{extra: join(event(5, 5, "chaos/a/5", "stock"), event(8, 5, "chaos/a/5", ""))}, good},

		"write in the last revision of the key": {scene{extra: wrote(10, 9699)}, good},
		"write in the revision without the key": {scene{extra: wrote(10, 9700)}, violated(RuleGuard)},
		"write in the revision of the key":      {scene{extra: wrote(20, 20)}, violated(RuleGuard)},
		"write as the first":                    {scene{extra: wrote(20, 9701)}, good},
		"write as the second":                   {scene{extra: wrote(20, 9700)}, violated(order)},

		"the term is told late":                          {scene{gone: 4000, extra: join(renewals("c1", 1, 3900), with(first, func(e *Entry) { e.T = 4100 }))}, good},
		"one campaigns later, and has the smaller token": {scene{gone: 4000, extra: join(renewals("c1", 1, 3900), with(first, func(e *Entry) { e.T, e.From = 4100, 4002 }))}, violated(token)},
		"one campaigns then, and has the smaller token":  {scene{gone: 4000, extra: join(renewals("c1", 1, 3900), with(first, func(e *Entry) { e.T, e.From = 4100, 4001 }))}, good},
		"one campaigns after the largest token, not the last": {scene{gone: 4000, extra: join(renewals("c1", 1, 3900), with(first, func(e *Entry) { e.T = 4100 }),
			Entry{T: 14, Proc: "c3", Kind: Campaigning}, event(15, 15, "chaos/a/3", "c3"), event(3995, 15, "chaos/a/3", ""), Entry{T: 3994, Proc: "c3", Kind: Resigning, Token: 15},
			Entry{T: 3990, Proc: "c3", Kind: Elected, Token: 15}, Entry{T: 4200, From: 4050, Proc: "c3", Kind: Term, Token: 15, Key: "chaos/a/3", Lease: 3, Op: Ours, Until: 1600},
			Entry{T: 4201, Proc: "c3", Kind: Ended, Token: 15, Op: Resigned})}, violated(RuleDeadline, token)},
		"a peer does so":          {scene{gone: 4000, extra: join(renewals("c1", 1, 3900), first, with(first, func(e *Entry) { e.T, e.From, e.Op, e.Proc = 4100, 4002, "stock", "stock" }))}, violated(token)},
		"the key is another":      {scene{extra: join(won(9701, 19, 20, "chaos/a/3"))}, violated(token)},
		"the token is of nothing": {scene{drop: "read c2 elected c2 ended c2 resigning c2", extra: join(won(9701, 19, 21, "chaos/a/2"))}, violated(RuleCampaign, RuleEnded, RuleLease, token)},
		"won twice":               {scene{extra: join(won(9701, 19, 20, "chaos/a/2"), won(9702, 19, 20, "chaos/a/2"))}, violated(token)},
		"won twice by a peer":     {scene{drop: "elected c2 ended c2 campaigning c2 renewed c2 read c2 resigning c2", extra: join(peer(won(9701, 19, 20, "chaos/a/2")), peer(won(9702, 19, 20, "chaos/a/2")))}, good},
		"won by one and a peer":   {scene{extra: join(peer(won(9701, 19, 20, "chaos/a/2")), won(9702, 19, 20, "chaos/a/2"))}, violated(token)},
		"believed in by another":  {scene{extra: join(beliefOf("c3", 10, "else", 100, 200), beliefOf("c3", 10, "else", 200, 300))}, violated(token)},
		"the token is of nothing, and it was evicted": {scene{drop: "read c2 elected c2 ended c2 resigning c2", extra: join(won(9701, 19, 21, "chaos/a/2"), Entry{T: 9702, Proc: "c2", Kind: Ended, Token: 21, Op: Evicted})},
			violated(RuleCampaign, RuleLease, token)},
		"of another name that is no candidate": {scene{extra: join(event(5, 5, "chaos/a/05", "c1"), calm(100, 9000))}, good},
	})
}

func TestWhatIsProclaimedIsTold(t *testing.T) {
	t.Parallel()
	proclaimed := func(result string) Entry {
		return Entry{T: 103, From: 100, Proc: "c1", Kind: Proclaimed, Token: 10, Value: "c1/1", Result: result}
	}
	put := event(101, 10, "chaos/a/1", "c1/1")
	second := func(result string, t int64) []Entry {
		return []Entry{with(proclaimed(result), func(e *Entry) { e.T, e.From, e.Value = t+1, t-1, "c1/2" }), event(t, 10, "chaos/a/1", "c1/2")}
	}
	wrong := violated(RuleData)
	testScenes(t, map[string]sceneTest{
		"it is":                      {scene{extra: join(proclaimed(OK), put)}, good},
		"it is not":                  {scene{extra: join(proclaimed(OK))}, wrong},
		"it is in another term":      {scene{extra: join(proclaimed(OK), with(put, func(e *Entry) { e.Token, e.Key, e.Lease = 20, "chaos/a/2", 2 }))}, violated(RuleGuard)},
		"another value is":           {scene{extra: join(proclaimed(OK), with(put, func(e *Entry) { e.Value = "c1/2" }))}, wrong},
		"elsewhere it is":            {scene{extra: join(proclaimed(OK), with(put, func(e *Entry) { e.Key = "chaos/b/1" }))}, wrong},
		"in a later term of its own": {scene{extra: join(proclaimed(Unknown), event(9750, 20, "chaos/a/2", "c1/1"))}, violated(RuleGuard)},
		"in order":                   {scene{extra: join(proclaimed(OK), put, second(OK, 150))}, good},
		"after a later value":        {scene{extra: join(proclaimed(Unknown), with(put, func(e *Entry) { e.T, e.Rev = 201, 201 }), second(OK, 150))}, wrong},
		"again after a later value":  {scene{extra: join(proclaimed(OK), put, second(OK, 150), with(put, func(e *Entry) { e.T, e.Rev = 201, 201 }))}, wrong},
		"after a later value that may have failed": {scene{extra: join(proclaimed(Unknown), with(put, func(e *Entry) { e.T, e.Rev = 201, 201 }), second(Unknown, 150))}, good},
		"after a later value of another term":      {scene{extra: join(proclaimed(Unknown), with(put, func(e *Entry) { e.T, e.Rev = 9760, 9760 }), with(proclaimed(OK), func(e *Entry) { e.T, e.Proc, e.Token, e.Value = 9750, "c2", 20, "c2/1" }), event(9740, 20, "chaos/a/2", "c2/1"))}, good},
		"touched after a later value of another":   {scene{extra: join(proclaimed(OK), put, with(put, func(e *Entry) { e.T, e.Rev = 120, 120 }), second(OK, 150))}, good},
		"nobody knows":                             {scene{extra: join(proclaimed(Unknown))}, good},
		"nobody knew":                              {scene{extra: join(proclaimed(Unknown), put)}, good},
	})
}

func TestElectionsHaveLeadersInCalm(t *testing.T) {
	t.Parallel()
	led := func(from, to int64) Entry { return beliefOf("c1", 10, ByIsLeader, from, to) }
	then := func(from, to int64) Entry { return beliefOf("c2", 20, ByIsLeader, from, to) }
	at := func(gone int64, extra ...any) scene {
		return scene{gone: gone, extra: join(renewals("c1", 1, gone-10), join(extra...))}
	}
	vacant := violated(RuleLiveness)
	testScenes(t, map[string]sceneTest{
		"all the time":                     {at(4000, led(11, 3999), then(4001, 9799), calm(11, 9799)), good},
		"a vacancy of 3 s":                 {at(6001, led(11, 6000), ahead(9000)[0], with(ahead(9000)[1], func(e *Entry) { e.T = 9000 }), then(9000, 9799), calm(0, 9799)), good},
		"a longer one":                     {at(6001, led(11, 5999), ahead(9000)[0], with(ahead(9000)[1], func(e *Entry) { e.T = 9000 }), then(9000, 9799), calm(0, 9799)), vacant},
		"one of before 5 s, until then":    {at(4001, led(11, 1001), ahead(5100)[0], ahead(5100)[1], then(5100, 9799), calm(100, 9799)), good},
		"1 ms longer":                      {at(4001, led(11, 1001), ahead(5101)[0], ahead(5101)[1], then(5101, 9799), calm(100, 9799)), vacant},
		"it begins with the calm":          {at(4001, led(11, 99), ahead(5100)[0], ahead(5100)[1], then(5100, 9799), calm(100, 9799)), good},
		"it lasts to the end":              {at(4001, led(11, 1001), then(4002, 4003), calm(100, 7003)), good},
		"it lasts to the end, 1 ms longer": {at(4001, led(11, 1001), then(4002, 4003), calm(100, 7004)), vacant},
		"too short to count":               {at(4001, led(11, 12), ahead(9000)[0], ahead(9000)[1], then(9001, 9799), calm(13, 5012)), good},
		"only just long enough":            {at(4001, led(11, 12), ahead(9000)[0], ahead(9000)[1], then(9001, 9799), calm(13, 5013)), good},
		"and not much longer":              {at(4001, led(11, 12), ahead(9000)[0], ahead(9000)[1], then(9001, 9799), calm(13, 5014)), vacant},
	}, func(o *Options) { o.Elections = []string{"chaos/a"} })

	h := scene{extra: join(led(11, 9699), calm(11, 9799))}.history()
	o := sceneOptions()
	o.Elections = []string{"chaos/a", "chaos/b"}
	var rules []string
	for _, v := range Check(h, o).Violations {
		rules = append(rules, v.Rule)
	}
	if !slices.Contains(rules, RuleLiveness) {
		t.Errorf("nobody leads chaos/b, but violated are %q", rules)
	}
}

func TestObserversAreToldWhatWasAndSoon(t *testing.T) {
	t.Parallel()
	observing := func(t int64) Entry { return Entry{T: t, Proc: "o", Kind: Observing, Op: "1"} }
	ended := func(t int64, err string) Entry { return Entry{T: t, Proc: "o", Kind: ObserveEnded, Op: "1", Err: err} }
	calls := func(from, to int64, told ...any) scene {
		return scene{gone: 6000, extra: join(renewals("c1", 1, 5900), observing(from), ended(to, "context canceled"), join(told...))}
	}
	value := func(e Entry, v string) Entry { e.Value = v; return e }
	wrong := violated(RuleObserve)
	stopped := func(from, to int64) Entry { return Entry{T: to, From: from, Proc: "o", Kind: Stopped} }
	campaigned := func(from, to int64) []Entry {
		return join(Entry{T: from, Proc: "c3", Kind: Campaigning}, event(from+1, from+1, "chaos/a/3", "c3"),
			Entry{T: to, Proc: "c3", Kind: GivingUp}, event(to, from+1, "chaos/a/3", ""), Entry{T: to, Proc: "c3", Kind: CampaignFailed, Op: GaveUp})
	}
	campaign := func(from, to int64, told ...any) scene {
		return scene{gone: 6000, extra: join(renewals("c1", 1, 5900), campaigned(from, to), join(told...))}
	}
	testScenes(t, map[string]sceneTest{
		"all":                                     {calls(5, 9900, observed(5, 0), observed(11, 10), observed(6001, 20), observed(9801, 0)), good},
		"all, to the end in calm":                 {calls(5, 12500, observed(5, 0), observed(11, 10), observed(6001, 20), observed(9801, 0), calm(100, 12500)), good},
		"an end, and no beginning":                {scene{extra: join(ended(9900, "no"))}, good},
		"what may have been so already":           {calls(5, 9900, observed(3000, 20)), good},
		"what cannot have been so yet":            {calls(5, 9900, observed(2999, 20)), wrong},
		"some":                                    {calls(5, 9900, observed(5, 0), observed(6001, 20)), good},
		"what never was":                          {calls(5, 9900, observed(5, 30)), wrong},
		"a value that never was":                  {calls(5, 9900, value(observed(11, 10), "c9")), wrong},
		"a key that never was":                    {calls(5, 9900, with(observed(11, 10), func(e *Entry) { e.Key += "0" })), wrong},
		"a lease that never was":                  {calls(5, 9900, with(observed(11, 10), func(e *Entry) { e.Lease++ })), wrong},
		"that nobody leads where somebody does":   {calls(5, 9900, observed(11, 10), observed(12, 0), observed(13, 20)), violated(RuleObserve, RuleObserve)},
		"what was before":                         {calls(5, 9900, observed(6001, 20), observed(6002, 10)), wrong},
		"what was before, in another call":        {calls(5, 9900, observed(6001, 20), with(observed(6002, 10), func(e *Entry) { e.Op = "2" })), good},
		"the same twice":                          {calls(5, 9900, observed(11, 10), observed(12, 10)), wrong},
		"the end without an error":                {scene{extra: join(observing(5), ended(9900, ""))}, wrong},
		"what leads elsewhere":                    {calls(5, 9900, with(observed(11, 10), func(e *Entry) { e.Election = "chaos/b" })), wrong},
		"that nobody leads where nobody ever did": {calls(5, 9900, with(observed(11, 0), func(e *Entry) { e.Election = "chaos/b" })), good},

		"nothing in calm, but it had no time":    {calls(3000, 4999, calm(100, 9000)), good},
		"nothing in calm":                        {calls(3000, 5000, calm(100, 9000)), wrong},
		"nothing in calm, of two states":         {calls(3000, 9000, calm(100, 9000)), wrong},
		"nothing in what is not calm":            {calls(11, 4099, calm(100, 9000)), good},
		"nothing in calm that has settled":       {calls(11, 4100, calm(100, 9000)), wrong},
		"nothing as it was not calm for so long": {calls(3000, 9000, calm(11, 5011)), wrong},
		"a change in time":                       {calls(11, 9000, observed(12, 10), observed(8000, 20), calm(100, 9000)), good},
		"a change too late":                      {calls(11, 9000, observed(12, 10), observed(8001, 20), calm(100, 9000)), wrong},
		"a change too late, as it was stopped":   {calls(11, 9000, observed(12, 10), observed(8001, 20), calm(100, 9000), stopped(7990, 8000)), good},
		"a change too late, as calm ended":       {calls(11, 9000, observed(12, 10), observed(8001, 20), calm(100, 7999)), good},
		"a change as it ended":                   {calls(11, 7999, observed(12, 10), calm(100, 9000)), good},
		"a change and a later one":               {calls(11, 9900, observed(12, 10), observed(8000, 20), calm(100, 9802)), good},
		"an old state that comes again later":    {calls(5, 9900, observed(5, 0), calm(100, 9900)), wrong},
		"killed":                                 {scene{extra: join(observing(3000), Entry{T: 4999, Proc: "o", Kind: Exit, Result: OK, Err: "killed"}, calm(100, 9000))}, good},
		"killed later":                           {scene{extra: join(observing(3000), Entry{T: 5000, Proc: "o", Kind: Exit, Result: OK, Err: "killed"}, calm(100, 9000))}, wrong},

		"the hook, in a campaign":                   {campaign(3000, 8500, changed("c3", 5000, 10), changed("c3", 8000, 20), calm(100, 9000)), good},
		"the hook, too late at first":               {campaign(3000, 8500, changed("c3", 5001, 10), changed("c3", 8000, 20), calm(100, 9000)), wrong},
		"the hook, too late":                        {campaign(3000, 8500, changed("c3", 5000, 10), changed("c3", 8001, 20), calm(100, 9000)), wrong},
		"the hook, after the campaign":              {campaign(3000, 7999, changed("c3", 5000, 10), calm(100, 9000)), good},
		"the hook, what was told in the one before": {campaign(3000, 8500, campaigned(2000, 2005), changed("c3", 2001, 10), changed("c3", 8000, 20), calm(100, 9000)), good},
		"the hook, what was before":                 {campaign(3000, 8500, changed("c3", 6001, 20), changed("c3", 6002, 10)), wrong},
		"the hook, the same twice":                  {campaign(3000, 8500, changed("c3", 3001, 10), changed("c3", 3002, 10)), good},
		"a process that has no hook":                {campaign(3000, 8500, calm(100, 9000)), good},
	})
}

func TestAnswersAreTrue(t *testing.T) {
	t.Parallel()
	current := func(from, to, token int64) Entry {
		e := observed(to, token)
		e.From, e.Kind, e.Op = from, Current, ""
		return e
	}
	candidates := func(from, to int64, tokens string) Entry {
		return Entry{T: to, From: from, Proc: "o", Kind: Candidates, Value: tokens}
	}
	fails := Entry{T: 4000, From: 3990, Proc: "o", Kind: Current, Err: "no"}
	wrong := violated(RuleObserve)
	at := func(e Entry, extra ...any) scene {
		return scene{gone: 6000, extra: join(renewals("c1", 1, 5900), e, join(extra...))}
	}
	testScenes(t, map[string]sceneTest{
		"who leads":                                                    {at(current(100, 110, 10)), good},
		"who leads, asked as it changed":                               {at(current(6000, 6010, 10)), good},
		"who led before it was asked":                                  {at(current(6001, 6010, 10)), wrong},
		"who leads, as the audit may be late":                          {at(current(2990, 3000, 20)), good},
		"who leads, as a read of that revision shows":                  {at(current(15, 20, 10), Entry{T: 31, From: 30, Proc: "r", Kind: Read, Token: 10, Op: "other", Rev: 10}), good},
		"who leads only later, as a read of the revision before shows": {at(current(15, 20, 10), Entry{T: 31, From: 30, Proc: "r", Kind: Read, Token: 10, Op: "other", Rev: 9}), wrong},
		"who leads only later":                                         {at(current(2990, 2999, 20)), wrong},
		"who never led":                                                {at(current(100, 110, 30)), wrong},
		"another value":                                                {at(with(current(100, 110, 10), func(e *Entry) { e.Value = "c9" })), wrong},
		"nobody leads, asked at the beginning":                         {at(current(0, 8, 0)), good},
		"who led last":                                                 {at(current(9850, 9860, 20)), wrong},
		"nobody leads at first":                                        {at(current(5, 8, 0)), good},
		"nobody leads in the end":                                      {at(current(9801, 9810, 0)), good},
		"nobody leads where somebody does":                             {at(current(5000, 5010, 0)), wrong},
		"nobody leads elsewhere":                                       {at(with(current(5000, 5010, 0), func(e *Entry) { e.Election = "chaos/b" })), good},
		"who waits":                                                    {at(candidates(100, 110, "10 20")), good},
		"who waited before":                                            {at(candidates(6001, 6010, "10 20")), wrong},
		"who waited as it changed":                                     {at(candidates(6000, 6010, "10 20")), good},
		"who waits only later":                                         {at(candidates(2990, 2999, "20")), wrong},
		"in the wrong order":                                           {at(candidates(100, 110, "20 10")), wrong},
		"not all who wait":                                             {at(candidates(5000, 5010, "10")), wrong},
		"nobody waits":                                                 {at(candidates(9801, 9810, "")), good},
		"nobody waits elsewhere":                                       {at(with(candidates(5000, 5010, ""), func(e *Entry) { e.Election = "chaos/b" })), good},
		"it fails":                                                     {at(fails), good},
		"it fails in calm":                                             {at(fails, calm(1990, 9000)), wrong},
		"it fails before calm has settled":                             {at(fails, calm(1991, 9000)), good},
		"it fails after calm":                                          {at(with(fails, func(e *Entry) { e.From, e.T = 6000, 7000 }), calm(100, 6999)), good},
		"it fails as calm ends":                                        {at(with(fails, func(e *Entry) { e.From, e.T = 6000, 7000 }), calm(100, 7000)), wrong},
		"evicted":                                                      {scene{4999, Evicted, "", join(evictedIt)}, good},
		"evicted, and gone some time later":                            {scene{8003, Evicted, "", join(renewals("c1", 1, 7500), with(deletedIt, func(e *Entry) { e.Rev = 8003 }), evictedIt)}, good},
		"evicted, and gone much later":                                 {scene{8004, Evicted, "", join(renewals("c1", 1, 7500), with(deletedIt, func(e *Entry) { e.Rev = 8004 }), evictedIt)}, wrong},
		"deleted, and gone much later":                                 {scene{extra: join(with(deletedIt, func(e *Entry) { e.T, e.From = 100, 90 }))}, good},
	})
}

func TestResourceIsFenced(t *testing.T) {
	t.Parallel()
	accepted := func(t, token int64, result string) Entry {
		return Entry{T: t, Proc: "resource", Kind: Accepted, Token: token, Value: fmt.Sprint(token, ":", t), Result: result}
	}
	told := func(of Entry, result string) Entry {
		return Entry{T: of.T + 1, From: of.T - 1, Proc: "c", Kind: Append, Token: of.Token, Value: of.Value, Result: result}
	}
	a, b, refused := accepted(100, 10, OK), accepted(200, 20, OK), accepted(300, 10, Failed)
	wrong := violated(RuleFencing)
	testScenes(t, map[string]sceneTest{
		"in order":                       {scene{extra: join(a, b, refused, told(a, OK), told(b, OK), told(refused, Failed))}, good},
		"out of order":                   {scene{extra: join(b, accepted(300, 10, OK))}, wrong},
		"out of order, in two elections": {scene{extra: join(b, with(accepted(300, 10, OK), func(e *Entry) { e.Election = "chaos/b" }))}, good},
		"out of order, twice":            {scene{extra: join(b, accepted(300, 10, OK), accepted(400, 15, OK))}, violated(RuleFencing, RuleFencing)},
		"the same token again":           {scene{extra: join(a, accepted(101, 10, OK))}, good},
		"twice":                          {scene{extra: join(a, a)}, wrong},
		"refused for nothing":            {scene{extra: join(a, accepted(101, 10, Failed))}, wrong},
		"refused at first":               {scene{extra: join(refused)}, wrong},
		"not accepted, and told so":      {scene{extra: join(a, told(b, OK))}, wrong},
		"accepted, and told it was not":  {scene{extra: join(a, told(a, Failed))}, wrong},
		"refused, and told it was not":   {scene{extra: join(a, b, refused, told(refused, OK))}, wrong},
		"accepted, and not told":         {scene{extra: join(a, told(a, Unknown))}, good},
		"not accepted, and not told":     {scene{extra: join(a, told(b, Unknown))}, good},
	})
}

func TestHistoryThatProvesNothing(t *testing.T) {
	t.Parallel()
	nothing := violated("nothing-checked")
	testScenes(t, map[string]sceneTest{
		"no event after the audit's end": {scene{drop: "audit-end audit"}, nothing},
		"no write":                       {scene{drop: "write c1"}, violated("nothing-checked")},
		"write that failed":              {scene{extra: join(Entry{T: 14, Proc: "c1", Kind: Write, Token: 10, Op: "counter", Value: "1 10:7", Result: Failed})}, nothing},
		"calm often enough":              {scene{extra: join(endAt(205_000), calm(0, 5000))}, good},
		"calm too seldom":                {scene{extra: join(endAt(205_001), calm(0, 5000))}, nothing},
		"calm too seldom before":         {scene{extra: join(endAt(400_000), calm(200_001, 300_000))}, nothing},
		"calm that is too short":         {scene{extra: join(endAt(205_001), calm(0, 5000), calm(100_000, 104_999))}, nothing},
		"calm in between":                {scene{extra: join(endAt(205_001), calm(0, 5000), calm(100_000, 105_000))}, good},
	})
	for _, kind := range []Kind{Campaigning, Term, Belief, Ended} {
		o := sceneOptions()
		o.Elections = []string{"chaos/a"}
		h := scene{extra: join(beliefOf("c1", 10, ByIsLeader, 11, 9699), beliefOf("c2", 20, ByIsLeader, 9701, 9799))}.history()
		if v := Check(h, o); len(v.Violations) != 0 {
			t.Fatalf("%+v", v.Violations)
		}
		h = slices.DeleteFunc(h, func(e Entry) bool { return e.Kind == kind })
		if v := Check(h, o); !slices.ContainsFunc(v.Violations, func(v Violation) bool {
			return v.Rule == RuleNothing && strings.Contains(v.What, fmt.Sprintf("%q of chaos/a", kind))
		}) {
			t.Errorf("without %s: %+v", kind, v.Violations)
		}
	}
	for _, kind := range []Kind{Calm, Fault} {
		o := sceneOptions()
		o.Require = []Kind{Fault, Calm}
		h := scene{extra: join(calm(5, 6), Entry{T: 5, Kind: Fault}, Entry{T: 6, Kind: Fault, Err: "no"})}.history()
		if v := Check(h, o); len(v.Violations) != 0 {
			t.Fatalf("%+v", v.Violations)
		}
		h = slices.DeleteFunc(h, func(e Entry) bool { return e.Kind == kind && e.Err == "" })
		if v := Check(h, o); len(v.Violations) != 1 || v.Violations[0].Rule != RuleNothing {
			t.Errorf("without %s: %+v", kind, v.Violations)
		}
	}
}

// endAt is the end of the audit.
func endAt(t int64) Entry { return Entry{T: t, Proc: "audit", Kind: AuditEnd, Rev: t} }

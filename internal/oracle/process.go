package oracle

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"
)

// processes is what the processes have recorded, by process, campaign and term.
type processes struct {
	exits     map[string][]*Entry
	campaigns map[place][]*campaign // in their order
	closings  map[place][]*Entry
	terms     map[termID]*term
	keyless   map[place][]span  // times in which a campaign had no key
	joining   map[string][]span // the same for all campaigns of a process, merged
}

// A place is a process's part in an election.
type place struct{ proc, election string }

func placeOf(e *Entry) place { return place{e.Proc, e.Election} }

// A termID identifies a term.
type termID struct {
	election string
	token    int64
}

func (t termID) String() string { return fmt.Sprintf("term %d of %s", t.token, t.election) }

func idOf(e *Entry) termID { return termID{e.Election, e.Token} }

// A span is a stretch of time, both ends included.
type span struct{ from, to int64 }

// A campaign is a campaign from its beginning to its end. The end is [Elected] or [CampaignFailed], if one was
// recorded.
type campaign struct {
	began *Entry
	end   *Entry
	until int64    // its end, or that of its process
	stops []*Entry // the [GivingUp] and [Closing] that concern it
	tries bool     // TryCampaign: it must not wait
}

// stop returns the first entry that told it to end while it lasted, or nil.
func (k *campaign) stop() *Entry { return firstAfter(k.stops, k.began.T) }

// asked reports whether it was told to end in this way.
func (k *campaign) asked(kind Kind) bool {
	return slices.ContainsFunc(k.stops, func(e *Entry) bool { return e.Kind == kind })
}

// A term is a term that somebody has recorded.
type term struct {
	termID
	won       *Entry // [Term]
	elected   *Entry
	campaign  *campaign // that elected it
	resigning *Entry
	ended     []*Entry
	overdue   []*Entry
	pieces    []*piece // in the order of T
	exit      int64    // when its process ended
	killed    bool     // its process was killed
	last      int64    // when somebody last believed in it, or when it was won
}

// proc returns the process that has won the term.
func (t *term) proc() string { return t.first().Proc }

// first returns the first entry about the term.
func (t *term) first() *Entry {
	if t.elected == nil {
		return t.won
	}
	return t.elected
}

// cutShort reports whether its process was killed by the given time.
func (t *term) cutShort(by int64) bool { return t.killed && t.exit <= by }

// cause returns the recorded reason why it ended, or "".
func (t *term) cause() string {
	if len(t.ended) == 0 {
		return ""
	}
	return t.ended[0].Op
}

// lost reports whether it was told that the term had ended without having been given up. Run does not call its function
// if that comes first.
func (t *term) lost() bool { return t.cause() != "" && t.cause() != Resigned }

// ours reports whether a process uses the library under test.
func (c *checker) ours(proc string) bool { return c.joining[proc] != nil }

// readProcesses follows the history in the order of time.
func (c *checker) readProcesses(history []Entry) *processes {
	p := &processes{
		exits: make(map[string][]*Entry), campaigns: make(map[place][]*campaign), closings: make(map[place][]*Entry),
		terms: make(map[termID]*term), keyless: make(map[place][]span), joining: make(map[string][]span),
	}
	open := make(map[place]*campaign)
	stopping := make(map[place][]*Entry) // for campaigns that may not have begun; without an election, for all
	for i := range history {
		switch e := &history[i]; e.Kind {
		case Exit:
			p.exits[e.Proc] = append(p.exits[e.Proc], e)
			for at, k := range open {
				if c.host(at.proc) == e.Proc {
					k.until = e.T
					delete(open, at)
				}
			}
			maps.DeleteFunc(stopping, func(at place, _ []*Entry) bool { return c.host(at.proc) == e.Proc })
		case Campaigning:
			at := placeOf(e)
			if k := open[at]; k != nil {
				c.violate(RuleCampaign, []*Entry{k.began, e}, "%s began a campaign in %s at %s, but had not reported the end of the previous one",
					e.Proc, e.Election, c.at(e.T))
			}
			k := &campaign{began: e, until: never, stops: slices.Concat(stopping[at], stopping[place{e.Proc, ""}])}
			open[at] = k
			p.campaigns[at] = append(p.campaigns[at], k)
		case Tried: // a call that was refused is not a campaign
			if all := p.campaigns[placeOf(e)]; len(all) > 0 && all[len(all)-1].began.T >= e.From {
				all[len(all)-1].tries = true
			}
		case GivingUp, Closing:
			stopping[placeOf(e)] = append(stopping[placeOf(e)], e)
			for at, k := range open {
				if at.proc == e.Proc && (e.Election == "" || e.Election == at.election) {
					k.stops = append(k.stops, e)
				}
			}
			if e.Kind == Closing {
				p.closings[placeOf(e)] = append(p.closings[placeOf(e)], e)
			}
		case Closed:
			delete(stopping, placeOf(e))
		case Elected, CampaignFailed:
			at := placeOf(e)
			k := open[at]
			delete(open, at)
			delete(stopping, at)
			if k == nil {
				c.violate(RuleCampaign, []*Entry{e}, "%s reported %q of %s at %s, when it did not campaign", e.Proc, e.Kind, e.Election, c.at(e.T))
			} else {
				k.end, k.until = e, e.T
			}
			if e.Kind == Elected {
				t := p.term(e)
				t.elected, t.campaign = e, k
			}
		case Term:
			p.term(e).won = e
			delete(stopping, placeOf(e))
		case Resigning:
			t := p.term(e)
			if t.resigning == nil {
				t.resigning = e
			}
		case Ended:
			t := p.term(e)
			t.ended = append(t.ended, e)
		case Overdue:
			t := p.term(e)
			t.overdue = append(t.overdue, e)
		case Belief:
			t := p.term(e)
			t.pieces = append(t.pieces, &piece{Entry: e, until: e.T})
		}
	}
	for _, t := range p.terms {
		t.exit = never
		if first := t.first(); first != nil {
			t.last = first.T
			if exit := firstAfter(p.exits[c.host(first.Proc)], first.T); exit != nil {
				t.exit, t.killed = exit.T, exit.Err != ""
			}
		}
		for _, piece := range t.pieces {
			t.last = max(t.last, piece.From, piece.T)
		}
	}
	p.readKeyless(c.audited)
	return p
}

func (p *processes) term(e *Entry) *term {
	id := idOf(e)
	t := p.terms[id]
	if t == nil {
		t = &term{termID: id}
		p.terms[id] = t
	}
	return t
}

// readKeyless finds the times in which campaigns had no key.
func (p *processes) readKeyless(a *audited) {
	for at, campaigns := range p.campaigns {
		lives := a.of[at]
		for _, k := range campaigns {
			from := k.began.T
			i, _ := slices.BinarySearchFunc(lives, from, func(l *life, t int64) int { return cmp.Compare(l.since.to, t) })
			for ; i < len(lives) && lives[i].since.to <= k.until; i++ {
				p.keyless[at] = append(p.keyless[at], span{from, max(from, lives[i].since.to)})
				from = max(from, lives[i].gone.to)
			}
			if from < k.until {
				p.keyless[at] = append(p.keyless[at], span{from, k.until})
			}
		}
		p.joining[at.proc] = append(p.joining[at.proc], p.keyless[at]...)
	}
	for proc, spans := range p.joining {
		p.joining[proc] = merge(spans)
	}
}

// merge joins spans that touch, and sorts them.
func merge(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	merged := spans[:0]
	for _, s := range spans {
		if last := len(merged) - 1; last >= 0 && s.from <= merged[last].to {
			merged[last].to = max(merged[last].to, s.to)
		} else {
			merged = append(merged, s)
		}
	}
	return merged
}

// touches returns the first of the merged spans that shares a time with s.
func touches(spans []span, s span) (span, bool) {
	i, _ := slices.BinarySearchFunc(spans, s.from, func(other span, t int64) int { return cmp.Compare(other.to, t) })
	if i < len(spans) && spans[i].from <= s.to {
		return spans[i], true
	}
	return span{}, false
}

// checkCampaigns flags campaigns that end without a reason, or late, and other things that campaigns must not do.
func (c *checker) checkCampaigns() {
	for _, at := range c.places() {
		c.checkJoins(at)
		c.checkPauses(at)
		for _, k := range c.campaigns[at] {
			if k.end == nil || k.end.Kind != CampaignFailed {
				continue
			}
			e, stop := k.end, k.stop()
			c.checkWithdrawn(at, k)
			switch {
			case e.Op == GaveUp && k.asked(GivingUp), e.Op == Shut && k.asked(Closing), e.Op == Held && c.tries(at, k) && c.held(at, k),
				e.Op == Unhealthy && c.tries(at, k) && !c.checked(at, k):
			default:
				c.violate(RuleCampaign, []*Entry{k.began, stop, e}, "campaign of %s in %s ended at %s with %q for no reason: %s",
					at.proc, at.election, c.at(e.T), e.Op, e.Err)
				continue
			}
			if stop == nil {
				continue
			}
			if e.T > c.within(at.proc, stop.T, giveUpTime+time.Duration(c.slack(RecoverTime))) {
				c.violate(RuleCampaign, []*Entry{stop, e}, "campaign of %s in %s was told to end at %s but ended at %s",
					at.proc, at.election, c.at(stop.T), c.at(e.T))
			}
		}
	}
	for _, e := range c.by[Tried] {
		if c.inCalm(e.From, e.T) && e.T > c.within(e.Proc, e.From, RecoverTime) {
			c.violate(RuleCampaign, []*Entry{e}, "%s called TryCampaign in %s, and it waited from %s to %s", e.Proc, e.Election, c.at(e.From), c.at(e.T))
		}
	}
	c.checkChanged()
}

// checkJoins flags campaigns that have no key in calm.
func (c *checker) checkJoins(at place) {
	for _, s := range c.keyless[at] {
		i, _ := slices.BinarySearchFunc(c.calms, s.from, func(e *Entry, t int64) int { return cmp.Compare(e.T, t) })
		for _, e := range c.calms[i:] {
			if e.From > s.to {
				break
			}
			from := max(s.from, e.From+int64(c.TTL))
			to := min(s.to, e.T)
			if to > c.within(at.proc, from, RecoverTime) && !c.unwell(at, span{from, to}) {
				c.violate(RuleCampaign, []*Entry{e}, "%s campaigned in %s without a key from %s to %s", at.proc, at.election, c.at(from), c.at(to))
				return
			}
		}
	}
}

// checkPauses flags a campaign that follows too soon on a lost term of Run. If the Run is closed or given up, another
// call may campaign at once.
func (c *checker) checkPauses(at place) {
	campaigns := c.campaigns[at]
	for i, k := range campaigns[:len(campaigns)-1] {
		if k.end == nil || k.end.Kind != Elected {
			continue
		}
		t, next := c.terms[idOf(k.end)], campaigns[i+1].began
		if next.Value != k.began.Value {
			continue // the next campaign is another call's
		}
		if t.won == nil || t.won.Value != ByRun || !t.lost() || t.cause() == Transferred || t.resigning == nil || next.T+c.slack(rounding) >= t.resigning.T+c.real(at.proc, pauseOfRun) {
			continue
		}
		closed := firstAfter(c.closings[at], k.began.T)
		givenUp := slices.ContainsFunc(c.by[GivingUp], func(e *Entry) bool {
			return e.Proc == at.proc && (e.Election == "" || e.Election == at.election) && k.began.T <= e.T && e.T <= next.T
		})
		if (closed == nil || closed.T > next.T) && !givenUp {
			c.violate(RuleCampaign, []*Entry{t.won, t.resigning, next}, "%s campaigned in %s again at %s, right after it had lost %s",
				at.proc, at.election, c.at(next.T), t.termID)
		}
	}
}

// checkWithdrawn flags a key that was left, in calm, although there was time to delete it. A campaign that is given
// up before its join has arrived may leave the key to the next renewal.
func (c *checker) checkWithdrawn(at place, k *campaign) {
	from, joined := k.began.T, k.until
	if stop := k.stop(); stop != nil {
		from, joined = stop.T, stop.T
	}
	lives := c.of[at]
	i, _ := slices.BinarySearchFunc(lives, joined+1, func(l *life, t int64) int { return cmp.Compare(l.since.to, t) })
	if i == 0 || lives[i-1].since.to < k.began.T || k.until-from >= int64(giveUpTime) || !c.inCalm(from, k.until) {
		return
	}
	if l := lives[i-1]; l.gone.from > k.until {
		c.violate(RuleOrphan, []*Entry{k.began, k.end, l.created, l.deleted}, "%s with token %d existed until %s, although the campaign of %s had ended at %s",
			l.key, l.token, c.at(l.gone.to), at.proc, c.at(k.until))
	}
}

// places returns all places in a fixed order.
func (c *checker) places() []place {
	return sortedKeys(c.campaigns, comparePlaces)
}

func comparePlaces(a, b place) int {
	return cmp.Or(cmp.Compare(a.election, b.election), cmp.Compare(a.proc, b.proc))
}

func sortedKeys[K comparable, V any](m map[K]V, compare func(a, b K) int) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, compare)
	return keys
}

// tries reports whether a campaign may have been by TryCampaign. Its process may be killed before it records that.
func (c *checker) tries(at place, k *campaign) bool {
	exit := firstAfter(c.exits[c.host(at.proc)], k.until)
	return k.tries || exit != nil && exit.Err != "" && exit.T <= c.within(at.proc, k.until, tellTime)
}

// held reports whether somebody else may have been in the queue during a campaign. Under faults that may be a key of
// its own process, from a join that came late.
func (c *checker) held(at place, k *campaign) bool {
	calm := c.inCalm(k.began.T, k.until)
	for _, l := range slices.Backward(c.queues[at.election]) {
		if l.since.from <= k.until && l.gone.to >= k.began.T && (l.owner != at.proc || !calm) {
			return true
		}
	}
	return false
}

// checkChanged flags calls of LeaderChanged while its process neither campaigned nor led.
func (c *checker) checkChanged() {
	busy := make(map[place][]span)
	for at, campaigns := range c.campaigns {
		for _, k := range campaigns {
			busy[at] = append(busy[at], span{k.began.T, c.endOf(k)})
		}
		busy[at] = merge(busy[at])
	}
	for _, e := range c.by[Changed] {
		// The hook runs beside those of the campaign, which may be held up.
		if _, ok := touches(busy[placeOf(e)], span{e.T, c.within(e.Proc, e.T, 0)}); !ok {
			c.violate(RuleCampaign, []*Entry{e}, "%s was told at %s who leads %s, when it neither campaigned nor led",
				e.Proc, c.at(e.T), e.Election)
		}
	}
}

// endOf returns when a campaign, or the term that it has won, was reported as over.
func (c *checker) endOf(k *campaign) int64 {
	if k.end == nil || k.end.Kind != Elected {
		return k.until
	}
	t := c.terms[idOf(k.end)]
	if len(t.ended) == 0 {
		return t.exit
	}
	return t.ended[0].T
}

// checkEnds checks what was recorded of the beginning and the end of each term.
func (c *checker) checkEnds() {
	for _, t := range c.allTerms() {
		if t.won != nil && t.won.Op != Ours {
			continue
		}
		switch {
		case t.first() == nil:
			if len(t.ended) > 0 {
				c.violate(RuleEnded, t.ended, "the end of %s was reported, though nobody had won it", t.termID)
			}
			continue
		case t.elected == nil || t.won != nil && t.elected.T > t.won.T:
			c.violate(RuleCampaign, []*Entry{t.won, t.elected}, "%s of %s had not been told to the hook Elected when it was won", t.termID, t.proc())
		case t.won != nil && t.elected.T > c.lateUntil(t.proc(), c.deadline(t, t.elected.T)+c.slack(c.Margin/4)):
			c.violate(RuleDeadline, []*Entry{t.elected, t.won}, "%s was elected in %s at %s, after its deadline at %s",
				t.proc(), t.termID, c.at(t.elected.T), c.at(c.deadline(t, t.elected.T)))
		case t.won == nil && !t.lost() && !t.cutShort(c.within(t.proc(), t.elected.T, tellTime)):
			c.violate(RuleCampaign, []*Entry{t.elected}, "%s of %s was told to the hook Elected but not won", t.termID, t.proc())
		}
		// The holder may be killed before it can record the end.
		limit := c.within(t.proc(), t.last, tellTime)
		switch n := len(t.ended); {
		case n == 0 && !t.cutShort(limit):
			c.violate(RuleEnded, []*Entry{t.won}, "the end of %s of %s was not told to the hook Ended by %s, though nobody believed in it after %s",
				t.termID, t.proc(), c.at(t.exit), c.at(t.last))
		case n > 1:
			c.violate(RuleEnded, t.ended, "the end of %s of %s was told %d times", t.termID, t.proc(), n)
		case n == 1 && t.ended[0].T > limit:
			c.violate(RuleEnded, []*Entry{t.won, t.ended[0]}, "the end of %s of %s was told at %s, though nobody believed in it after %s",
				t.termID, t.proc(), c.at(t.ended[0].T), c.at(t.last))
		}
		if t.won != nil && len(t.ended) > 0 {
			c.checkCause(t, t.ended[0])
		}
	}
}

// allTerms returns all terms in a fixed order.
func (c *checker) allTerms() []*term {
	var terms []*term
	for _, id := range sortedKeys(c.terms, func(a, b termID) int {
		return cmp.Or(cmp.Compare(a.election, b.election), cmp.Compare(a.token, b.token))
	}) {
		terms = append(terms, c.terms[id])
	}
	return terms
}

// checkCause compares the recorded cause of the end of a term with what is known.
func (c *checker) checkCause(t *term, ended *Entry) {
	l := c.lives[t.termID]
	wrong := func(why string, because ...*Entry) {
		c.violate(RuleEnded, append([]*Entry{t.won, ended}, because...), "%s of %s ended at %s with the cause %q, %s",
			t.termID, t.proc(), c.at(ended.T), ended.Op, why)
	}
	switch ended.Op {
	case Resigned:
		if given := c.given(t); given == nil || given.T > ended.T {
			wrong("though nobody has resigned", given)
		}
	case Expired:
		if deadline := c.deadline(t, ended.T); deadline < unknown && ended.T < deadline-c.slack(clockLag) && !c.set(t.proc(), deadline-c.lasts(t.proc()), ended.T) {
			wrong(fmt.Sprintf("though the deadline was %s", c.at(deadline)))
		}
	case Transferred:
		c.Checked.Transferred++
		if !c.asked(t.termID, ended.T) {
			wrong("though nobody had asked that term to step back")
		}
	case Unhealthy:
		c.Checked.Unhealthy++
		if l != nil && !c.sick(l, ended.T) {
			wrong("though its checks had succeeded")
		}
	case Evicted:
		if l == nil {
			return // another rule reports this
		}
		switch how, because := c.endingOf(l, never); {
		case how == expired && c.slow(t.proc()):
		case how != operator && how != early:
			wrong(fmt.Sprintf("though the end of its key is: %s", how), because)
		case l.gone.from > ended.T:
			wrong(fmt.Sprintf("though its key was there until %s", c.at(l.gone.to)), l.deleted)
		}
	default:
		wrong("which does not exist")
	}
	if ended.Until > ended.T+c.slack(clockLag) {
		wrong(fmt.Sprintf("but its deadline is %s", c.at(ended.Until)))
	}
}

// given returns the first entry that says that a term is given up: [Resigning], or [Closing].
func (c *checker) given(t *term) *Entry {
	given := t.resigning
	if t.campaign != nil {
		e := firstAfter(c.closings[place{t.proc(), t.election}], t.campaign.began.T)
		if e != nil && (given == nil || e.T < given.T) {
			given = e
		}
	}
	return given
}

package oracle

import (
	"cmp"
	"slices"
)

// An ending is how a candidate's key came to its end.
type ending string

const (
	alive    ending = "alive"
	operator ending = "operator"
	resigned ending = "resigned" // or withdrawn: its owner had said that it would delete the key
	expired  ending = "expired"
	// reclaimed is after its owner was killed: others have revoked the lease before it could expire.
	reclaimed ending = "reclaimed"
	// early is before etcd may let the lease expire, and not by anybody known: etcd itself may have done it.
	early ending = "early"
)

// endingOf returns how a key came to its end, and by which request an operator took it, or with which process its lease
// died. Only requests that began by the given time count.
func (c *checker) endingOf(l *life, by int64) (ending, *Entry) {
	if l.deleted == nil {
		return alive, nil
	}
	if e := c.taking(l); e != nil && e.From <= by {
		return operator, e
	}
	expiry := c.expiry(l.lease, l.gone.to)
	t := c.terms[l.termID]
	switch {
	case t != nil && t.first() != nil:
		bySelf := l.gone.to < expiry || c.Exact && l.deleted.Proc == c.host(l.owner)
		if c.until(t, l.gone.to) <= l.gone.to && (t.cause() != "" || bySelf) {
			return resigned, nil
		}
	case c.withdrawn(l):
		return resigned, nil
	default:
		// When its session is over, a candidate may delete its key.
		if c.set(l.owner, expiry-int64(c.TTL), l.gone.to) {
			return resigned, nil
		}
		expiry -= max(0, c.margin(l.owner))
	}
	switch x := c.reclaimable(l); {
	case l.gone.to >= expiry:
		return expired, nil
	case x != nil:
		return reclaimed, x
	}
	return early, nil
}

// A target is what an operator wanted to take: the key of a term, all keys of a lease, or the key of whoever led.
type target struct {
	op, election string
	number       int64 // token or lease
}

func targetOf(e *Entry) target {
	switch e.Op {
	case Delete:
		return target{e.Op, e.Election, e.Token}
	case Revoke:
		return target{e.Op, "", e.Lease}
	}
	return target{e.Op, e.Election, 0}
}

// taking returns the request by which an operator took a key, or may have taken it.
func (c *checker) taking(l *life) *Entry {
	for _, at := range []target{{Delete, l.election, l.token}, {Revoke, "", l.lease}, {Evict, l.election, 0}} {
		if c.Exact && at.op == Evict {
			continue // the deletion is recorded too
		}
		for _, e := range c.takings[at] {
			if e.Result != Failed && c.took(e, l) {
				return e
			}
		}
	}
	return nil
}

// goneBy reports whether a key was gone when an eviction was answered.
func goneBy(l *life, e *Entry) bool {
	if e.Rev != 0 {
		return l.goneBy(e.Rev)
	}
	return l.gone.from <= e.T
}

// took reports whether a request may have taken a key that it was about.
func (c *checker) took(e *Entry, l *life) bool {
	switch {
	case e.From > l.gone.to:
		return false
	case e.Op == Evict && e.Token > l.token:
		return false
	case e.Op == Evict && e.Result == Unknown:
		return l.gone.to <= e.T+c.late()
	case e.Op == Evict:
		return goneBy(l, e)
	case e.Result == Unknown:
		return l.deleted.Rev <= e.Rev
	}
	return l.deleted.Rev == e.Rev
}

// withdrawn reports whether the owner of a key that was not elected may have deleted it itself.
func (c *checker) withdrawn(l *life) bool {
	campaigns := c.campaignsOf(l)
	for _, k := range campaigns {
		if len(k.stops) > 0 && k.stops[0].T <= l.gone.to || k.until <= l.gone.to || k.tries || k.end != nil && k.end.Op == Held {
			return true
		}
	}
	return len(campaigns) == 0 || c.stray(l, campaigns[0]) || c.asked(l.termID, l.gone.to) || c.sick(l, l.gone.to)
}

// stray reports whether a key may not belong to the campaign in which it appeared. It may come from the join of an
// earlier campaign, which arrived late and which its process has looked for. That is possible if the campaign has
// another key at the same time. Otherwise it is possible unless the campaign joins again under the same name: it does
// not do that while the name may be taken.
func (c *checker) stray(l *life, k *campaign) bool {
	if k.began.Value != "" && l.created.Value != k.began.Value {
		return true // the key has the value of another call
	}
	at := place{l.owner, l.election}
	lives := c.of[at]
	i, _ := slices.BinarySearchFunc(lives, l.token, func(l *life, token int64) int { return cmp.Compare(l.token, token) })
	for _, older := range slices.Backward(lives[:i]) {
		if older.since.to < k.began.T {
			break
		}
		if older.gone.to >= l.gone.from {
			return true
		}
		if older.key == l.key { // a second copy of the campaign's join may have arrived when that key was gone
			return true
		}
	}
	for _, newer := range lives[i+1:] {
		if newer.since.from > l.gone.to {
			if newer.since.from <= k.until && newer.key == l.key {
				return false
			}
			break
		}
		if newer.gone.to >= l.gone.from {
			return true
		}
	}
	for _, before := range slices.Backward(c.campaigns[at]) {
		if before.until < l.since.to-c.late() {
			break
		}
		if before.began.T < k.began.T && before.end != nil && (before.end.Kind == CampaignFailed || before.began.Value != "") {
			return true
		}
	}
	return false
}

// campaignsOf returns the campaigns in which a key may have been put. The key was seen some time after that.
func (c *checker) campaignsOf(l *life) []*campaign {
	if t := c.terms[l.termID]; t != nil && t.campaign != nil {
		return []*campaign{t.campaign}
	}
	all := c.campaigns[place{l.owner, l.election}]
	first, _ := slices.BinarySearchFunc(all, l.since.from, func(k *campaign, t int64) int { return cmp.Compare(k.until, t) })
	last, _ := slices.BinarySearchFunc(all, l.since.to+1, func(k *campaign, t int64) int { return cmp.Compare(k.began.T, t) })
	return all[first:last]
}

// deposed reports whether there may have been, at that time, a leader of etcd that did not yet know that it was
// deposed. Such a leader revokes what has expired by its own count: etcd-io/etcd#15247. The leadership check of etcd
// 3.5.10 and later does not prevent this if the leader was paused.
func (c *checker) deposed(at int64) bool {
	return !c.Exact && slices.ContainsFunc(c.by[Resumed], func(e *Entry) bool {
		return e.Op != Follower && e.T-e.From >= int64(c.DeposedAfter) && e.T <= at && at <= e.T+int64(deposedFor)
	})
}

// counted returns the last renewal of a lease that had counted by the given time, or nil.
func (c *checker) counted(lease, by int64) *renewal {
	renewals := c.renewed[lease]
	i, _ := slices.BinarySearchFunc(renewals, by+1, func(r *renewal, t int64) int { return cmp.Compare(r.T, t) })
	if i == 0 {
		return nil
	}
	return renewals[i-1]
}

// expiry returns the earliest time at which etcd may let a lease expire, considering the renewals that had counted by
// the given time.
func (c *checker) expiry(lease, by int64) int64 {
	if r := c.counted(lease, by); r != nil {
		return r.sent + c.ttl(r.Proc)
	}
	return c.granted(lease) + c.ttl(c.leased[lease][0].owner)
}

// granted returns the earliest time at which a lease can have been requested: when its process began to campaign
// without a key, in any election.
func (c *checker) granted(lease int64) int64 {
	first := slices.MinFunc(c.leased[lease], func(x, y *life) int { return cmp.Compare(x.token, y.token) })
	campaigns := c.campaignsOf(first)
	if len(campaigns) == 0 {
		return c.began
	}
	began := campaigns[0].began.T
	joining, _ := touches(c.joining[first.owner], span{began, began})
	granted := joining.from
	for _, l := range c.leased[lease] { // it may have been requested for a campaign that was given up before it came
		if t := c.terms[l.termID]; t != nil && t.won != nil && t.won.Until > 0 {
			granted = min(granted, t.won.Until-c.lasts(l.owner))
		}
	}
	return granted
}

// checkLives checks how the key of each of our candidates came to its end, and what became of those before it.
func (c *checker) checkLives() {
	for _, election := range sortedKeys(c.queues, cmp.Compare[string]) {
		for _, l := range c.queues[election] {
			if !c.ours(l.owner) {
				continue
			}
			how, _ := c.endingOf(l, l.gone.to)
			t := c.terms[l.termID]
			if t != nil && t.first() == nil {
				t = nil
			}
			c.count(how, t != nil)
			if how == early && !c.deposed(l.gone.to) {
				shown := []*Entry{l.created, l.deleted}
				if r := c.counted(l.lease, l.gone.to); r != nil {
					shown = append(shown, r.Entry)
				}
				c.violate(RuleLease, shown, "%s with token %d was gone at %s, though nobody had said that it would delete it, and its lease had to last until %s",
					l.key, l.token, c.at(l.gone.to), c.at(c.expiry(l.lease, l.gone.to)))
			}
			c.checkOrphan(l, t)
			if t != nil {
				c.checkOrder(l, t)
			}
		}
	}
}

func (c *checker) count(how ending, elected bool) {
	n := &c.Checked
	if how == reclaimed {
		n.Reclaimed++
	}
	if !elected {
		n.Waited++
		if how == operator || how == early {
			n.Lost++
		}
		return
	}
	switch how {
	case operator:
		n.Taken++
	case early:
		n.Early++
	case resigned:
		n.Resigned++
	case expired:
		n.Expired++
	}
}

// checkOrphan flags a key that, in calm, exists for longer after its use than its lease may last or others may take
// to look for it.
func (c *checker) checkOrphan(l *life, t *term) {
	unused := l.since.to
	switch campaigns := c.campaignsOf(l); {
	case t != nil && len(t.ended) > 0:
		unused = t.ended[0].T
	case t != nil:
		unused = t.exit
	case len(campaigns) > 0:
		unused = campaigns[len(campaigns)-1].until
	}
	if e := c.lingers(unused, l.gone.to); e != nil {
		c.violate(RuleOrphan, []*Entry{l.created, l.deleted, e}, "%s with token %d was not used any more after %s but existed until %s, although it had been calm since %s",
			l.key, l.token, c.at(unused), c.at(l.gone.to), c.at(e.From))
		return
	}
	// A campaign that has lost a key may have joined again. But it uses one key at a time.
	lives := c.of[place{l.owner, l.election}]
	i, _ := slices.BinarySearchFunc(lives, l.token+1, func(l *life, token int64) int { return cmp.Compare(l.token, token) })
	for _, next := range lives[i:] {
		if next.since.to > min(unused, l.gone.to) {
			return
		}
		if e := c.lingers(next.since.to, min(l.gone.to, next.gone.to)); e != nil {
			c.violate(RuleOrphan, []*Entry{l.created, next.created, e}, "%s had two keys, with the tokens %d and %d, in %s until %s, although it had been calm since %s",
				l.owner, l.token, next.token, l.election, c.at(min(l.gone.to, next.gone.to)), c.at(e.From))
			return
		}
	}
}

// lingers returns a calm in which something unused since a time still existed when it had to be gone.
func (c *checker) lingers(unused, until int64) *Entry {
	i, _ := slices.BinarySearchFunc(c.calms, unused, func(e *Entry, t int64) int { return cmp.Compare(e.T, t) })
	for _, e := range c.calms[i:] {
		if limit := max(e.From, unused) + int64(c.TTL+RecoverTime); limit <= e.T && limit < until {
			return e
		}
		if e.T >= until {
			break
		}
	}
	return nil
}

// checkOrder flags a term that began while an older candidate existed. A read in the term shows the queue exactly.
// Without one, the audit shows it as soon as it must have caught up.
func (c *checker) checkOrder(l *life, t *term) {
	b := l.before
	// If a join was answered late, whoever was before it may have gone meanwhile.
	if k := t.campaign; k != nil && k.tries && b != nil && !b.goneBy(l.token-1) && c.inCalm(k.began.T, k.until) {
		c.violate(RuleCampaign, []*Entry{t.campaign.began, t.first(), b.created, b.deleted}, "%s called TryCampaign, which must not wait, and won %s behind %s",
			t.proc(), t.termID, b.key)
	}
	if read := c.reads[t.termID]; read != nil {
		c.Checked.Oldest++
		if b != nil && !b.goneBy(read.Rev) {
			c.violate(RuleOrder, []*Entry{t.won, read, b.created, b.deleted}, "%s won %s, and at revision %d the older candidate %s was there",
				t.proc(), t.termID, read.Rev, b.key)
		}
	} else if b != nil && b.gone.from > t.first().T {
		c.violate(RuleOrder, []*Entry{t.first(), b.created, b.deleted}, "%s won %s at %s, and the older candidate %s was there until %s",
			t.proc(), t.termID, c.at(t.first().T), b.key, c.at(b.gone.to))
	}
}

// checkRenewals flags a lease that is renewed without a key or a campaign that may put one.
func (c *checker) checkRenewals() {
	for _, lease := range sortedKeys(c.renewed, cmp.Compare[int64]) {
		var used []span
		for _, l := range c.leased[lease] {
			used = append(used, span{l.since.from, l.gone.to})
		}
		used = merge(used)
		for _, r := range c.renewed[lease] {
			// The owner does not know that a key has gone until a renewal tells it.
			when := span{r.sent - int64(c.TTL), r.T}
			if _, ok := touches(used, when); ok {
				continue
			}
			if _, ok := touches(c.joining[r.Proc], when); !ok && !c.lapsed(r) {
				c.violate(RuleOrphan, []*Entry{r.Entry}, "%s renewed the lease %x, which had no key any more, at %s", r.Proc, lease, c.at(r.sent))
				break
			}
		}
	}
}

// lapsed reports whether a campaign may need the lease that was renewed. It may if the lease of its own key was over by
// then: before it puts another key, it takes another lease.
func (c *checker) lapsed(r *renewal) bool {
	for _, election := range sortedKeys(c.queues, cmp.Compare[string]) {
		at := place{r.Proc, election}
		lives := c.of[at]
		for _, k := range c.campaigns[at] {
			if k.began.T > r.T || k.until < r.sent {
				continue
			}
			i, _ := slices.BinarySearchFunc(lives, r.T+1, func(l *life, t int64) int { return cmp.Compare(l.since.to, t) })
			if i == 0 || lives[i-1].since.to < k.began.T || lives[i-1].lease != r.Lease && !c.trusted(lives[i-1], r.T) {
				return true
			}
		}
	}
	return false
}

// checkClosed flags a key that exists although Close said that all are gone. A lease that its owner can no longer
// trust is left to expire.
func (c *checker) checkClosed() {
	for _, e := range c.by[Closed] {
		if e.Result != OK {
			continue
		}
		for _, l := range c.of[placeOf(e)] {
			if l.since.to <= e.T && l.gone.from > e.T && c.trusted(l, e.T) {
				c.violate(RuleOrphan, []*Entry{l.created, e, l.deleted}, "%s with token %d existed until %s, although Close of %s had returned at %s",
					l.key, l.token, c.at(l.gone.to), e.Proc, c.at(e.T))
			}
		}
	}
}

// trusted reports whether the owner of a key may consider its lease alive: its term is not over, by both clocks.
func (c *checker) trusted(l *life, at int64) bool {
	expiry := c.expiry(l.lease, at)
	return expiry-c.margin(l.owner) > at+c.slack(rounding) && !c.set(l.owner, expiry-int64(c.TTL), at)
}

// readReads returns the first read of the holder in each term.
func (c *checker) readReads() map[termID]*Entry {
	reads := make(map[termID]*Entry)
	for _, e := range c.by[Read] {
		t := c.terms[idOf(e)]
		if t == nil || t.first() == nil || t.proc() != e.Proc {
			continue
		}
		if first := reads[t.termID]; first == nil || e.Rev < first.Rev {
			reads[t.termID] = e
		}
	}
	return reads
}

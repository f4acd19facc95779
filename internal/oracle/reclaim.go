package oracle

import (
	"cmp"
	"slices"
)

// exitOf returns the end of the process to which a lease was granted, or nil if it has none or is not known.
func (c *checker) exitOf(lease int64) *Entry {
	granted := c.grants[lease]
	if granted == nil {
		return nil
	}
	return firstAfter(c.exits[c.host(granted.Proc)], granted.T)
}

// lived returns until when a process certainly lived. That it has ended is known only some time after it has.
func lived(exit *Entry) int64 { return cmp.Or(exit.From, exit.T) }

// reclaimable returns the end of a process that was killed before its key had gone, if others may have revoked its lease
// then. Without a renewal nobody knows when a lease would have expired: it may have gone later than it could.
func (c *checker) reclaimable(l *life) *Entry {
	if x := c.exitOf(l.lease); x != nil && x.Op != "" && x.Err != "" && lived(x) <= l.gone.to {
		return x
	}
	return nil
}

// checkRevocations flags the revocation of a lease whose process lives, by another process or by a later one of the same
// name.
func (c *checker) checkRevocations() {
	for _, e := range c.by[Revoked] {
		granted, exit := c.grants[e.Lease], c.exitOf(e.Lease)
		switch {
		case granted == nil, granted.Proc == e.Proc && (exit == nil || e.T <= exit.T): // its own
		case exit == nil || e.From < lived(exit):
			c.violate(RuleReclaim, []*Entry{granted, e, exit}, "%s revoked the lease %x at %s, though its owner, %s, was alive",
				e.Proc, e.Lease, c.at(e.From), granted.Proc)
		case e.Err == "":
			c.Checked.Revocations++
		}
	}
}

// checkReclaims flags calls of Reclaim that succeed too soon: while the process lives and has a key, or while a dead one
// has a key. A key may also come late, from a process that is dead.
func (c *checker) checkReclaims() {
	calls := make(map[place][]*Entry) // that succeeded, in their order
	for _, e := range c.by[Reclaimed] {
		if at := (place{e.Value, e.Election}); e.Result == OK {
			calls[at] = append(calls[at], e)
		} else if c.inCalm(e.T, e.T) {
			c.violate(RuleReclaim, []*Entry{e}, "in calm, the call of Reclaim for %s failed at %s: %s", e.Value, c.at(e.T), e.Err)
		}
	}
	for _, at := range sortedKeys(c.of, comparePlaces) {
		for _, l := range c.of[at] {
			exit, since := c.exitOf(l.lease), l.since.to
			if exit != nil {
				since = min(since, exit.T)
			}
			calls := calls[at]
			i, _ := slices.BinarySearchFunc(calls, since, func(e *Entry, t int64) int { return cmp.Compare(e.From, t) })
			if i < len(calls) && l.gone.from > calls[i].T {
				c.violate(RuleReclaim, []*Entry{l.created, exit, calls[i], l.deleted}, "%s with token %d was there until %s, though Reclaim had succeeded at %s",
					l.key, l.token, c.at(l.gone.to), c.at(calls[i].T))
			}
			if how, _ := c.endingOf(l, l.gone.to); how != expired || exit == nil || exit.Op != Attended {
				continue
			}
			// A lease that was renewed as usual until then lasts for longer than a reclamation may take.
			if expiry := c.expiry(l.lease, l.gone.to); expiry > exit.T+int64(c.TTL/2) && c.inCalm(lived(exit), expiry) {
				c.violate(RuleReclaim, []*Entry{l.created, exit, l.deleted}, "%s with token %d expired at %s, though somebody was there to reclaim it when %s was killed at %s",
					l.key, l.token, c.at(l.gone.to), at.proc, c.at(lived(exit)))
			}
		}
	}
}

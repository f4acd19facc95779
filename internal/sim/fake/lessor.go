package fake

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	maxTTL         = 9_000_000_000
	scanInterval   = 500 * time.Millisecond
	revokeRetry    = 3 * time.Second
	maxRevocations = 500 // in one scan
)

var (
	errNotPrimary    = errors.New("not a primary lessor")
	errLeaseNotFound = errors.New("lease not found")
)

// A lessor counts down the leases, while it is the primary one. Each member has one. That of a leader
// becomes the primary when the first entry of its term is applied, and stops being it when the member
// learns that it is deposed. So there may be two.
type lessor struct {
	primary   bool
	promoted  uint64 // raft's term then
	countdown map[int64]*countdown
}

// A countdown is what a primary lessor knows of a lease.
type countdown struct {
	lease  *lease
	expiry time.Duration
	due    time.Duration // when a scan looks at it: later than expiry while it is being revoked
	renew  []func(ttl int64, err error)
}

// promote makes the lessor the primary one. Every lease has its whole TTL anew.
func (m *member) promote() {
	m.lessor = lessor{primary: true, promoted: m.node.BasicStatus().GetTerm(), countdown: make(map[int64]*countdown)}
	for id, l := range m.leases {
		m.countdown[id] = &countdown{lease: l}
		m.refresh(m.countdown[id], m.c.electionTimeout())
	}
}

func (m *member) demote() {
	waiting := m.counting()
	m.lessor = lessor{}
	for _, d := range waiting {
		d.end(errNotPrimary)
	}
}

// counting are all countdowns, those first that are due first.
func (m *member) counting() []*countdown {
	all := make([]*countdown, 0, len(m.countdown))
	for _, d := range m.countdown {
		all = append(all, d)
	}
	slices.SortFunc(all, func(a, b *countdown) int {
		return cmp.Or(cmp.Compare(a.due, b.due), cmp.Compare(a.lease.id, b.lease.id))
	})
	return all
}

// known are all leases that the member knows, those first that expire first.
func (m *member) known() []*lease {
	known := slices.Collect(maps.Values(m.leases))
	slices.SortFunc(known, func(a, b *lease) int {
		return cmp.Or(cmp.Compare(m.remaining(a), m.remaining(b)), cmp.Compare(a.id, b.id))
	})
	return known
}

// end answers renewals that came after the lease had expired.
func (d *countdown) end(err error) {
	renew := d.renew
	d.renew = nil
	for _, done := range renew {
		done(-1, err)
	}
}

func (m *member) refresh(d *countdown, extend time.Duration) {
	d.expiry = m.c.now() + time.Duration(d.lease.ttl)*time.Second + extend
	d.due = d.expiry
}

func (m *member) granted(l *lease) {
	m.leases[l.id] = l
	if m.primary {
		d := &countdown{lease: l}
		m.countdown[l.id] = d
		m.refresh(d, 0)
	}
}

func (m *member) revoked(id int64) {
	delete(m.leases, id)
	if d := m.countdown[id]; d != nil {
		delete(m.countdown, id)
		d.end(errLeaseNotFound)
	}
}

// renew restarts a lease's TTL. If the lease has expired already, done is called once that is settled.
func (m *member) renew(id int64, done func(ttl int64, err error)) {
	if !m.primary {
		done(-1, errNotPrimary)
		return
	}
	d := m.countdown[id]
	switch {
	case d == nil:
		done(-1, errLeaseNotFound)
	case d.expiry <= m.c.now():
		d.renew = append(d.renew, done)
	default:
		m.refresh(d, 0)
		done(d.lease.ttl, nil)
	}
}

// remaining is how long the lease has to live, as this member counts.
func (m *member) remaining(l *lease) time.Duration {
	if d := m.countdown[l.id]; d != nil {
		return d.expiry - m.c.now()
	}
	return 1<<63 - 1
}

// scan has expired leases revoked. A leader that was paused and deposed does so too, once its clock has
// ticked: etcd takes that for a sign that it still leads. What it proposes is lost if it does not know
// its successor yet. Else it is forwarded, and the lease is revoked early.
func (m *member) scan() {
	if !m.primary {
		return
	}
	var expired []*lease
	for _, d := range m.counting() {
		if d.due > m.c.now() || len(expired) == maxRevocations {
			break
		}
		d.due = m.c.now() + revokeRetry
		expired = append(expired, d.lease)
	}
	if len(expired) == 0 {
		return
	}
	term := m.promoted
	m.ensureLeadership(func(leads bool) {
		if !leads {
			return
		}
		for _, l := range expired {
			m.after(m.soon(), func() { // it may learn meanwhile that it is deposed, and go on all the same
				e := m.c.newEntry(m, &pb.LeaseRevokeRequest{ID: l.id})
				e.who, e.primary = root, term
				m.propose(e, func(*entry) {}, func(error) {})
			})
		}
	})
}

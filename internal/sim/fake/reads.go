package fake

import (
	"encoding/binary"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
)

const readRetry = 500 * time.Millisecond

// reads makes reads linearizable. They wait in batches: those that come while one is under way make the
// next.
type reads struct {
	next      []*reader
	batch     []*reader // nil if none is under way
	asked     []uint64  // identifiers of the questions to the leader about this batch
	confirmed bool      // the leader has answered; what it had committed is to be applied
	retry     *timer
	timeout   *timer
}

type reader struct {
	then func(error) // nil if nobody waits any more
}

// linearizable calls then when this member has applied all that was committed before the call, or with
// an error. It returns how to stop waiting.
func (m *member) linearizable(then func(error)) (forget func()) {
	r := &reader{then}
	m.reads.next = append(m.reads.next, r)
	if m.reads.batch == nil {
		m.confirm()
	}
	return func() { r.then = nil }
}

// confirm begins the next batch.
func (m *member) confirm() {
	if len(m.reads.next) == 0 {
		return
	}
	m.reads = reads{batch: m.reads.next}
	m.reads.timeout = m.after(m.c.requestTimeout(), func() { m.settle(rpctypes.ErrGRPCTimeout) })
	m.ask()
}

// ask asks the leader what is committed.
func (m *member) ask() {
	m.reads.retry.stop()
	m.reads.retry = m.after(readRetry, m.ask)
	m.c.ids++
	m.reads.asked = append(m.reads.asked, m.c.ids)
	m.node.ReadIndex(binary.BigEndian.AppendUint64(nil, m.c.ids))
	m.pump()
}

// settle ends the batch.
func (m *member) settle(err error) {
	m.reads.retry.stop()
	m.reads.timeout.stop()
	batch := m.reads.batch
	m.reads.batch = nil
	for _, r := range batch {
		if r.then != nil {
			r.then(err)
		}
	}
	if m.reads.batch == nil {
		m.confirm()
	}
}

// confirmed is called with the leader's answer.
func (m *member) confirmed(s raft.ReadState) {
	if m.reads.batch == nil || m.reads.confirmed || !slices.Contains(m.reads.asked, binary.BigEndian.Uint64(s.RequestCtx)) {
		return
	}
	m.reads.confirmed = true
	m.reads.retry.stop()
	m.reads.timeout.stop()
	m.whenApplied(s.Index, func() { m.settle(nil) })
}

// leaderChanged is called when the member knows another leader.
func (m *member) leaderChanged() {
	if m.reads.batch != nil && !m.reads.confirmed {
		m.settle(rpctypes.ErrGRPCLeaderChanged)
	}
}

// committedInTerm is called when the first entry of a leader is applied: it answers only now.
func (m *member) committedInTerm() {
	if m.reads.batch != nil && !m.reads.confirmed {
		m.ask()
	}
}

// ensureLeadership finds out whether this member still leads, unless its clock has ticked lately.
func (m *member) ensureLeadership(then func(bool)) (forget func()) {
	if m.c.now()-m.ticked < 3*m.c.cfg.TickInterval {
		then(true)
		return func() {}
	}
	return m.linearizable(func(err error) { then(err == nil && m.leads()) })
}

package fake

import (
	"encoding/binary"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// A member is one server of etcd. All of it happens in events of the cluster's loop.
type member struct {
	c  *Cluster
	id int // raft's is one more

	killed  bool
	paused  bool
	life    int           // counts its starts; what belongs to an earlier one does not happen
	since   time.Duration // when it was paused last
	resumed time.Duration // when it went on last; 0 if never
	asleep  []func()      // timers that have fired while it was paused
	unread  queue         // what was sent to it while it was paused

	storage *raft.MemoryStorage
	node    *raft.RawNode
	busy    bool          // in pump
	lead    uint64        // who leads, as the server knows it; [raft.None] if nobody
	elected time.Duration // when this member was elected last
	ticked  time.Duration // when raft's clock ticked last
	blind   int           // how often in succession there was no leader when the streams were looked after

	committed uint64
	applied   uint64
	term      uint64 // of the last entry applied
	backlog   []*raftpb.Entry
	applying  *timer
	lag       time.Duration
	awaiting  []waiter // for entries to be applied

	waiting map[uint64]*proposal // by their entries
	unsent  []*proposal          // those that wait for a leader

	view   view
	leases map[int64]*lease
	realm  *realm
	tokens map[string]*token
	lessor
	reads reads

	watchers []*watcher // in the order of their creation
	syncing  *timer
	tied     []*task // streams that end when there is no leader
	refuse   float64
}

// A waiter waits until an entry is applied.
type waiter struct {
	index uint64
	then  func()
}

// A token is that of a user who has authenticated.
type token struct {
	user  string
	until time.Duration
}

// A timer is an event at a member. While the member is paused, it waits.
type timer struct {
	c     *Cluster
	event *event
	off   bool
}

func (t *timer) stop() {
	if t != nil {
		t.off = true
		t.c.cancel(t.event)
	}
}

// after plans what the member does, if it is not killed before.
func (m *member) after(d time.Duration, do func()) *timer {
	t := &timer{c: m.c}
	life := m.life
	var fire func()
	fire = func() {
		switch {
		case t.off || m.life != life:
		case m.paused:
			m.asleep = append(m.asleep, fire)
		default:
			do()
		}
	}
	t.event = m.c.after(d, fire)
	return t
}

// ticker does something again and again. While the member is paused it falls due once, as with a
// [time.Ticker].
func (m *member) ticker(interval time.Duration, do func()) {
	var tick func()
	tick = func() {
		m.after(interval, tick)
		do()
	}
	m.after(time.Duration(m.c.rng.Int64N(int64(interval))), tick) // members did not start at the same moment
}

// start begins a life of the member, with what it has stored.
func (m *member) start() {
	c := m.c
	m.killed = false
	m.life++
	m.lead, m.elected, m.blind = raft.None, 0, 0
	m.backlog, m.awaiting, m.applying, m.unsent = nil, nil, nil, nil
	m.waiting = make(map[uint64]*proposal)
	m.tokens = make(map[string]*token)
	m.lessor = lessor{}
	m.reads = reads{}
	m.watchers, m.syncing, m.tied = nil, nil, nil
	m.committed = m.applied
	m.ticked = c.now()
	node, err := raft.NewRawNode(&raft.Config{
		ID:              uint64(m.id + 1),
		ElectionTick:    c.cfg.ElectionTicks,
		HeartbeatTick:   1,
		Storage:         m.storage,
		Applied:         m.applied,
		MaxSizePerMsg:   512 << 10,
		MaxInflightMsgs: 512,
		CheckQuorum:     true,
		PreVote:         true,
		Logger:          silence{},
	})
	if err != nil {
		panic(err) // the configuration is wrong
	}
	m.node = node
	m.ticker(c.cfg.TickInterval, m.tick)
	m.ticker(scanInterval, m.scan)
	m.ticker(c.electionTimeout(), m.lookAfterStreams)
}

func (m *member) tick() {
	m.node.Tick()
	m.ticked = m.c.now()
	m.pump()
}

// leads is what etcd's isLeader says.
func (m *member) leads() bool { return m.lead == uint64(m.id+1) }

// step takes a message of raft.
func (m *member) step(msg *raftpb.Message) {
	if m.killed {
		return
	}
	_ = m.node.Step(msg) // refused ones are lost, as in etcd
	m.pump()
}

// pump does what raft wants done.
func (m *member) pump() {
	if m.busy {
		return
	}
	m.busy = true
	defer func() { m.busy = false }()
	for {
		if m.lead != raft.None && len(m.unsent) > 0 {
			unsent := m.unsent
			m.unsent = nil
			for _, p := range unsent {
				m.submit(p)
			}
		}
		if !m.node.HasReady() {
			return
		}
		rd := m.node.Ready()
		if rd.SoftState != nil {
			m.follow(rd.SoftState)
		}
		if n := len(rd.ReadStates); n > 0 {
			m.confirmed(rd.ReadStates[n-1])
		}
		_ = m.storage.Append(rd.Entries)
		if !raft.IsEmptyHardState(rd.HardState) {
			_ = m.storage.SetHardState(rd.HardState)
		}
		var disk time.Duration
		if len(rd.Entries) > 0 && !m.leads() { // a leader writes while it sends
			disk = around(m.c.rng, m.c.cfg.DiskDelay)
		}
		m.send(rd.Messages, disk)
		m.node.Advance(rd)
		if n := len(rd.CommittedEntries); n > 0 {
			m.committed = rd.CommittedEntries[n-1].GetIndex()
			m.backlog = append(m.backlog, rd.CommittedEntries...)
			m.apply()
		}
	}
}

// send sends raft's messages. Of answers to appended entries the last one says all.
func (m *member) send(messages []*raftpb.Message, disk time.Duration) {
	last := -1
	for i, msg := range messages {
		if msg.GetType() == raftpb.MsgAppResp {
			last = i
		}
	}
	for i, msg := range messages {
		if msg.GetType() == raftpb.MsgAppResp && i < last {
			continue
		}
		to := m.c.members[msg.GetTo()-1]
		if to.killed {
			m.node.ReportUnreachable(msg.GetTo())
			continue
		}
		p := m.c.peer(m, to)
		life := to.life
		p.lane.send(disk+p.delay(), func() {
			if to.life == life {
				to.step(msg)
			}
		})
	}
}

// follow notes who leads.
func (m *member) follow(s *raft.SoftState) {
	changed := s.Lead != raft.None && s.Lead != m.lead
	m.lead = s.Lead
	if !m.leads() {
		m.demote()
	} else if changed {
		m.elected = m.c.now()
	}
	if changed {
		m.leaderChanged()
	}
}

// apply applies what is committed, at once or, where the member lags, later.
func (m *member) apply() {
	if m.lag > 0 {
		if m.applying == nil {
			m.applying = m.after(around(m.c.rng, m.lag), func() {
				m.applying = nil
				m.applyAll()
			})
		}
		return
	}
	m.applying.stop()
	m.applying = nil
	m.applyAll()
}

func (m *member) applyAll() {
	for len(m.backlog) > 0 {
		next := m.backlog[0]
		m.backlog = m.backlog[1:]
		if len(next.GetData()) == 0 { // the first entry of a leader
			m.committedInTerm()
			if m.leads() {
				m.promote()
			}
		} else {
			m.applyEntry(m.c.entry(next))
		}
		m.applied, m.term = next.GetIndex(), next.GetTerm()
		ready := slices.IndexFunc(m.awaiting, func(w waiter) bool { return w.index > m.applied })
		if ready < 0 {
			ready = len(m.awaiting)
		}
		reached := m.awaiting[:ready:ready]
		m.awaiting = m.awaiting[ready:]
		for _, w := range reached {
			w.then()
		}
	}
}

// applyEntry makes the member see what an entry has changed.
func (m *member) applyEntry(e *entry) {
	m.view.revision = e.revision
	if e.err == nil {
		switch r := e.request.(type) {
		case *pb.LeaseGrantRequest:
			m.granted(e.lease)
		case *pb.LeaseRevokeRequest:
			m.revoked(r.ID)
		case *pb.CompactionRequest:
			m.view.compacted = r.Revision
		case *pb.InternalAuthenticateRequest:
			if m.realm.ttl > 0 {
				t := e.response.(*pb.AuthenticateResponse).Token
				m.tokens[t] = &token{user: r.Name, until: m.c.now() + m.realm.ttl}
			}
		case configure:
			m.realm = r.realm
			if !m.realm.enabled {
				clear(m.tokens)
			}
		}
	}
	m.notify(e)
	if p := m.waiting[e.id]; p != nil {
		m.forget(p)
		p.then(e)
	}
}

// whenApplied calls then as soon as an entry is applied, which may be at once.
func (m *member) whenApplied(index uint64, then func()) {
	if index <= m.applied {
		then()
		return
	}
	i, _ := slices.BinarySearchFunc(m.awaiting, index+1, func(w waiter, index uint64) int {
		return int(w.index) - int(index)
	})
	m.awaiting = slices.Insert(m.awaiting, i, waiter{index, then})
}

// A proposal is an entry that somebody at this member waits for.
type proposal struct {
	entry   *entry
	then    func(*entry) // called when this member has applied it
	failed  func(error)  // called instead. The entry may be committed all the same
	timeout *timer
}

// propose has an entry committed. It returns how to stop waiting.
func (m *member) propose(e *entry, then func(*entry), failed func(error)) (forget func()) {
	p := &proposal{entry: e, then: then, failed: failed}
	began := m.c.now()
	p.timeout = m.after(m.c.requestTimeout(), func() { m.fail(p, m.timedOut(began)) })
	m.waiting[e.id] = p
	if m.lead == raft.None {
		m.unsent = append(m.unsent, p)
	} else {
		m.submit(p)
	}
	m.pump()
	return func() { m.forget(p) }
}

func (m *member) submit(p *proposal) {
	if err := m.node.Propose(binary.BigEndian.AppendUint64(nil, p.entry.id)); err != nil {
		m.fail(p, unknown(err))
	}
}

func (m *member) fail(p *proposal, err error) {
	m.forget(p)
	p.failed(err)
}

func (m *member) forget(p *proposal) {
	p.timeout.stop()
	delete(m.waiting, p.entry.id)
	m.unsent = slices.DeleteFunc(m.unsent, func(other *proposal) bool { return other == p })
}

// timedOut is the error of a request that was not carried out in time.
func (m *member) timedOut(began time.Duration) error {
	switch lost := m.elected - 2*m.c.electionTimeout(); {
	case m.elected > 0 && began > lost && began < m.elected:
		return rpctypes.ErrGRPCTimeoutDueToLeaderFail
	case m.lead != raft.None && !m.leads() && m.c.unreachable(m, m.c.members[m.lead-1]):
		return rpctypes.ErrGRPCTimeoutDueToConnectionLost
	}
	return rpctypes.ErrGRPCTimeout
}

// silence is a logger of raft that says nothing.
type silence struct{}

func (silence) Debug(...any)            {}
func (silence) Debugf(string, ...any)   {}
func (silence) Error(...any)            {}
func (silence) Errorf(string, ...any)   {}
func (silence) Info(...any)             {}
func (silence) Infof(string, ...any)    {}
func (silence) Warning(...any)          {}
func (silence) Warningf(string, ...any) {}

func (silence) Fatal(v ...any)            { panic(v) }
func (silence) Fatalf(f string, v ...any) { panic(append([]any{f}, v...)) }
func (silence) Panic(v ...any)            { panic(v) }
func (silence) Panicf(f string, v ...any) { panic(append([]any{f}, v...)) }

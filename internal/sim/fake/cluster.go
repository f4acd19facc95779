package fake

import (
	"cmp"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	// wokenWithin is how long a member that goes on after a pause takes to look at all that has
	// happened meanwhile. Its timers come first, then what was sent to it, in an order that nobody
	// knows.
	wokenWithin = time.Millisecond
	timersFirst = wokenWithin / 20
	// silenceLimit is how long connections between members stand it that one of them is silent. After
	// that they may break: what was sent is lost, and a new one is made, which takes reconnecting on
	// average.
	silenceLimit = 5 * time.Second
	reconnecting = 50 * time.Millisecond
	// keptEntries is how many entries that all members have applied are kept in raft's logs.
	keptEntries = 1000
)

// A Cluster is an etcd. Members are numbered from 0.
type Cluster struct {
	loop
	cfg       Config
	rng       *rand.Rand
	members   []*member
	peers     [][]*peer // from, to
	processes []*Process
	state     *machine
	full      bool              // the alarm that was ordered last
	entries   map[uint64]*entry // that not all members have applied
	ids       uint64
	calls     uint64
	dropped   int64  // the revision up to which history is gone
	trimmed   uint64 // the index up to which raft's logs are gone
}

// A peer is the way from a member to another.
type peer struct {
	rng     *rand.Rand
	mean    time.Duration
	slow    time.Duration
	cut     bool
	waiting queue
	lane    *lane // of raft's messages
}

func (p *peer) delay() time.Duration { return around(p.rng, p.mean) + around(p.rng, p.slow) }

// New starts a cluster. It has a leader within milliseconds. In a bubble it must be called inside.
func New(cfg Config) *Cluster {
	cfg.Members = cmp.Or(cfg.Members, 3)
	cfg.ClientDelay = cmp.Or(cfg.ClientDelay, 200*time.Microsecond)
	cfg.PeerDelay = cmp.Or(cfg.PeerDelay, 200*time.Microsecond)
	cfg.DiskDelay = cmp.Or(cfg.DiskDelay, 300*time.Microsecond)
	cfg.TickInterval = cmp.Or(cfg.TickInterval, 100*time.Millisecond)
	cfg.ElectionTicks = cmp.Or(cfg.ElectionTicks, 10)
	cfg.MaxRequestBytes = cmp.Or(cfg.MaxRequestBytes, 3<<19)
	cfg.LateRequests = cmp.Or(cfg.LateRequests, 0.5)
	least := time.Duration(3*cfg.ElectionTicks/2) * cfg.TickInterval
	cfg.MinLeaseTTL = cmp.Or(cfg.MinLeaseTTL, int64((least+time.Second-1)/time.Second))

	c := &Cluster{
		cfg:     cfg,
		rng:     rand.New(rand.NewPCG(cfg.Seed, 0)),
		state:   newMachine(cfg.MinLeaseTTL),
		entries: make(map[uint64]*entry),
		dropped: -1,
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.start()
	var voters []uint64
	for i := range cfg.Members {
		voters = append(voters, uint64(i+1))
	}
	for i := range cfg.Members {
		m := &member{
			c: c, id: i, killed: true, storage: raft.NewMemoryStorage(),
			view: c.state.view(), leases: make(map[int64]*lease), realm: c.state.realm,
			applied: 1, term: 1,
		}
		first := &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{
			ConfState: &raftpb.ConfState{Voters: voters}, Index: proto.Uint64(1), Term: proto.Uint64(1),
		}}
		if err := m.storage.ApplySnapshot(first); err != nil {
			panic(err) // it is empty
		}
		_ = m.storage.SetHardState(&raftpb.HardState{Term: proto.Uint64(1), Commit: proto.Uint64(1), Vote: proto.Uint64(0)})
		c.members = append(c.members, m)
	}
	for _, from := range c.members {
		row := make([]*peer, cfg.Members)
		for _, to := range c.members {
			p := &peer{mean: cfg.PeerDelay, rng: rand.New(rand.NewPCG(cfg.Seed, 1<<32+uint64(from.id*cfg.Members+to.id)))}
			p.lane = &lane{c: c, blocked: func() *queue {
				switch {
				case p.cut:
					return &p.waiting
				case to.paused:
					return &to.unread
				}
				return nil
			}}
			row[to.id] = p
		}
		c.peers = append(c.peers, row)
		from.start()
	}
	first := c.members[c.rng.IntN(cfg.Members)]
	_ = first.node.Campaign() // instead of waiting for an election timeout
	first.pump()
	return c
}

// Stop ends the cluster: all calls fail, nothing happens any more.
func (c *Cluster) Stop() {
	c.mu.Lock()
	if !c.stopped {
		for _, p := range c.processes {
			for _, l := range p.links {
				l.breakLocked()
			}
		}
		c.stop()
	}
	c.mu.Unlock()
	<-c.ended
}

func (c *Cluster) peer(from, to *member) *peer { return c.peers[from.id][to.id] }

func (c *Cluster) unreachable(from, to *member) bool {
	return to.killed || to.paused || c.peer(from, to).cut || c.peer(to, from).cut
}

func (c *Cluster) electionTimeout() time.Duration {
	return time.Duration(c.cfg.ElectionTicks) * c.cfg.TickInterval
}

func (c *Cluster) requestTimeout() time.Duration { return 5*time.Second + 2*c.electionTimeout() }

func (c *Cluster) newEntry(by *member, request proto.Message) *entry {
	c.ids++
	e := &entry{id: c.ids, by: by, request: request}
	c.entries[e.id] = e
	return e
}

// entry returns one of raft's log, after it was applied to the state, if this is the first member to
// apply it.
func (c *Cluster) entry(of *raftpb.Entry) *entry {
	e := c.entries[binary.BigEndian.Uint64(of.GetData())]
	if !e.applied {
		e.applied, e.index, e.term = true, of.GetIndex(), of.GetTerm()
		expiry := c.expiryOf(e)
		c.state.apply(e)
		if c.cfg.OnCommit != nil {
			c.cfg.OnCommit(Truth{c}, Commit{
				At: time.Now(), Index: e.index, Term: e.term, Revision: e.revision, Member: e.by.id,
				Process: e.process, Call: e.call, Request: e.request, Err: e.err, Expiry: expiry, Events: e.events,
			})
		}
	}
	if of.GetIndex() > c.trimmed+2*keptEntries {
		c.after(0, c.trim) // not while raft hands out entries
		c.trimmed = of.GetIndex()
	}
	return e
}

// expiryOf says what a revocation is about that is about to be applied. A lessor is right if it is the
// primary one in the term in which its proposal was committed: no later one has given the lease its TTL
// anew.
func (c *Cluster) expiryOf(e *entry) Expiry {
	r, ok := e.request.(*pb.LeaseRevokeRequest)
	switch {
	case !ok || e.primary == 0:
		return NoExpiry
	case e.primary == e.term:
		return TrueExpiry
	}
	if at, ok := (Truth{c}).LeaseExpiry(r.ID); ok && !at.After(time.Now()) {
		return TrueExpiry
	}
	return EarlyExpiry
}

// trim forgets what all members have applied and compacted.
func (c *Cluster) trim() {
	applied, compacted := c.members[0].applied, c.members[0].view.compacted
	for _, m := range c.members {
		applied, compacted = min(applied, m.applied), min(compacted, m.view.compacted)
	}
	for id, e := range c.entries {
		if e.applied && e.index <= applied {
			delete(c.entries, id)
		}
	}
	if compacted > c.dropped {
		c.dropped = compacted
		c.state.drop(compacted)
	}
	c.trimmed = applied
	if applied <= keptEntries {
		return
	}
	for _, m := range c.members {
		if first, _ := m.storage.FirstIndex(); first < applied-keptEntries {
			_ = m.storage.Compact(applied - keptEntries)
		}
	}
}

// Inspect calls f with the truth of this moment. f must not call the cluster.
func (c *Cluster) Inspect(f func(Truth)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(Truth{c})
}

// do calls f with a member, under the lock, unless the cluster was stopped.
func (c *Cluster) do(i int, f func(*member)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stopped {
		f(c.members[i])
	}
}

// Faults of members. All may be called in any state.

// Pause stops a member where it is, as SIGSTOP does. What is sent to it waits.
func (c *Cluster) Pause(i int) {
	c.do(i, func(m *member) {
		if !m.paused && !m.killed {
			m.paused, m.since = true, c.now()
		}
	})
}

// Resume ends Pause.
func (c *Cluster) Resume(i int) { c.do(i, (*member).resume) }

func (m *member) resume() {
	if !m.paused {
		return
	}
	c := m.c
	m.paused, m.resumed = false, c.now()
	asleep := m.asleep
	m.asleep = nil
	for _, fire := range asleep {
		c.after(time.Duration(c.rng.Int64N(int64(timersFirst))), fire)
	}
	unread := m.unread
	m.unread = nil
	if c.now()-m.since > silenceLimit && c.rng.IntN(2) == 0 {
		for _, row := range c.peers {
			l := row[m.id].lane
			if i := slices.Index(unread, l); i >= 0 {
				unread = slices.Delete(unread, i, i+1)
				l.lose(c.now())
				own := queue{l}
				own.wake(func() time.Duration { return around(c.rng, reconnecting) })
			}
		}
	}
	unread.wake(m.soon)
}

// soon is how long it takes the member to come to something that it is to do now.
func (m *member) soon() time.Duration {
	if m.resumed == 0 || m.c.now()-m.resumed > wokenWithin {
		return 0
	}
	return time.Duration(m.c.rng.Int64N(int64(wokenWithin)))
}

// Kill ends a member, as SIGKILL does: its connections break, new ones are refused.
func (c *Cluster) Kill(i int) {
	c.do(i, func(m *member) {
		if m.killed {
			return
		}
		m.killed = true
		m.life++
		m.paused, m.asleep = false, nil
		m.unread.wake(func() time.Duration { return 0 })
		for _, p := range c.processes {
			l := p.links[m.id]
			for _, conn := range l.conns {
				for _, v := range conn.calls {
					for _, t := range v.tasks {
						t.finish()
					}
				}
				conn.down.send(l.delay(), conn.breakLocked)
			}
		}
	})
}

// Start starts a killed member again.
func (c *Cluster) Start(i int) { c.do(i, (*member).startAgain) }

func (m *member) startAgain() {
	if m.killed {
		m.start()
	}
}

// Cut makes messages between members wait, in one direction. What has waited for more than 5 s is lost.
func (c *Cluster) Cut(from, to int) {
	c.do(from, func(*member) { c.peers[from][to].cut = true })
}

// Mend ends Cut.
func (c *Cluster) Mend(from, to int) {
	c.do(from, func(*member) { c.peers[from][to].mend(c.now()) })
}

func (p *peer) mend(now time.Duration) {
	p.cut = false
	for _, l := range p.waiting {
		l.lose(now - silenceLimit)
	}
	p.waiting.wake(p.delay)
}

// Slow delays messages between members by d more on average, in one direction.
func (c *Cluster) Slow(from, to int, d time.Duration) {
	c.do(from, func(*member) { c.peers[from][to].slow = d })
}

// Lag makes a member take d longer on average to apply what is committed.
func (c *Cluster) Lag(i int, d time.Duration) {
	c.do(i, func(m *member) { m.lag = d })
}

// MoveLeader moves the leadership to a member. Nothing happens if there is no leader that can.
func (c *Cluster) MoveLeader(to int) {
	c.do(to, func(*member) {
		if leader, _ := c.leader(); leader != nil && !leader.paused {
			leader.node.TransferLeader(uint64(to + 1))
			leader.pump()
		}
	})
}

// NoSpace raises or ends the alarm of a full database, as soon as there is a leader.
func (c *Cluster) NoSpace(full bool) {
	c.do(0, func(*member) { c.noSpaceLocked(full) })
}

func (c *Cluster) noSpaceLocked(full bool) {
	c.full = full
	c.decree(alarm{full: full})
}

// Refuse makes a member refuse that part of the requests as too many.
func (c *Cluster) Refuse(i int, probability float64) {
	c.do(i, func(m *member) { m.refuse = probability })
}

// EnableAuth makes authentication necessary, as soon as there is a leader. Tokens end when they have
// not been used for ttl.
func (c *Cluster) EnableAuth(ttl time.Duration, users ...User) {
	c.do(0, func(*member) { c.decree(configure{realm: &realm{enabled: true, ttl: ttl, users: users}}) })
}

// DisableAuth ends EnableAuth.
func (c *Cluster) DisableAuth() {
	c.do(0, func(*member) { c.decree(configure{realm: &realm{}}) })
}

// ExpireTokens makes all tokens invalid.
func (c *Cluster) ExpireTokens() {
	c.do(0, func(*member) {
		for _, m := range c.members {
			clear(m.tokens)
		}
	})
}

// decree has an entry committed, by whichever leader there is. Until then it is tried again.
func (c *Cluster) decree(request proto.Message) {
	if a, ok := request.(alarm); ok && a.full != c.full {
		return // it was ended meanwhile, or raised
	}
	again := func() { c.after(c.cfg.TickInterval, func() { c.decree(request) }) }
	leader, _ := c.leader()
	if leader == nil || leader.paused {
		again()
		return
	}
	e := c.newEntry(leader, request)
	e.who, e.process = root, OperatorName
	leader.propose(e, func(*entry) {}, func(error) { again() })
}

// Heal ends all faults of members and links, and the alarm. Authentication stays as it is.
func (c *Cluster) Heal() {
	c.do(0, func(*member) {
		for _, m := range c.members {
			m.resume()
			m.startAgain()
			m.lag, m.refuse = 0, 0
			for _, p := range c.peers[m.id] {
				p.slow = 0
				p.mend(c.now())
			}
		}
		for _, p := range c.processes {
			for _, l := range p.links {
				l.healLocked()
			}
		}
		if c.full || c.state.full { // what was to end it may have gone with a member that was killed
			c.noSpaceLocked(false)
		}
	})
}

// leader is the member that leads in the newest term that any member knows, also one that was killed.
func (c *Cluster) leader() (leader *member, term uint64) {
	for _, m := range c.members {
		s := m.node.BasicStatus()
		if s.GetTerm() > term {
			leader, term = nil, s.GetTerm()
		}
		if s.GetTerm() == term && s.RaftState == raft.StateLeader && !m.killed {
			leader = m
		}
	}
	return leader, term
}

// Leader is the member that leads in the newest term. ok is false if there is none.
func (t Truth) Leader() (member int, term uint64, ok bool) {
	m, term := t.c.leader()
	if m == nil {
		return 0, 0, false
	}
	return m.id, term, true
}

// Member is how far a member has come.
func (t Truth) Member(member int) Progress {
	m := t.c.members[member]
	return Progress{
		Up: !m.killed && !m.paused, Paused: m.paused, Leads: !m.killed && m.leads(),
		Term: m.term, Index: m.applied, Revision: m.view.revision,
	}
}

// LeaseExpiry is when the lease expires at the lessor that counts: the primary one of the newest term.
// ok is false if the lease does not exist, or if nobody counts: then it lives for its whole TTL from
// when a leader begins.
func (t Truth) LeaseExpiry(id int64) (at time.Time, ok bool) {
	m, term := t.c.leader()
	if m == nil || !m.primary || m.promoted != term || m.countdown[id] == nil {
		return time.Time{}, false
	}
	return t.c.began.Add(m.countdown[id].expiry), true
}

// Lease returns the lease's TTL in seconds, and its keys, sorted. ok is false if it does not exist.
func (t Truth) Lease(id int64) (ttl int64, keys []string, ok bool) {
	l := t.c.state.leases[id]
	if l == nil {
		return 0, nil, false
	}
	return l.ttl, l.attached(), true
}

// Leases are the identifiers of all leases, sorted.
func (t Truth) Leases() []int64 {
	var ids []int64
	for id := range t.c.state.leases {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// Keys are all that begin with a prefix, sorted by key. They must not be changed.
func (t Truth) Keys(prefix string) []*mvccpb.KeyValue {
	s := t.c.state
	kvs := s.at(s.revision, []byte(prefix), []byte{0})
	end := slices.IndexFunc(kvs, func(kv *mvccpb.KeyValue) bool { return !strings.HasPrefix(string(kv.Key), prefix) })
	if end < 0 {
		return kvs
	}
	return kvs[:end]
}

// Revision is that of the newest entry that any member has applied, and compacted the one up to which
// history is gone.
func (t Truth) Revision() (revision, compacted int64) { return t.c.state.revision, t.c.state.compacted }

// The Operator changes the store directly, at whichever member can. Each call blocks until it is done
// or ctx ends.
type Operator interface {
	// Put puts a key, bound to a lease unless that is 0.
	Put(ctx context.Context, key, value string, lease int64) (revision int64, err error)
	// Delete deletes keys in one transaction.
	Delete(ctx context.Context, keys ...string) (revision int64, err error)
	// Revoke revokes a lease.
	Revoke(ctx context.Context, lease int64) error
	// Compact forgets history before a revision.
	Compact(ctx context.Context, revision int64) error
}

// Operator returns the operator, who may do everything and whom no fault of links concerns.
func (c *Cluster) Operator() Operator { return operator{c} }

type operator struct{ c *Cluster }

// do asks one member after another, those first that lead, until one has answered.
func (o operator) do(ctx context.Context, request proto.Message) (*pb.ResponseHeader, error) {
	for {
		a, err := o.try(ctx, request)
		switch {
		case err != nil:
			return nil, err
		case a.err == nil:
			return a.message.(interface{ GetHeader() *pb.ResponseHeader }).GetHeader(), nil
		case !unavailable(a.err):
			return nil, rpctypes.Error(a.err)
		}
	}
}

func unavailable(err error) bool { return status.Code(err) == codes.Unavailable }

func (o operator) try(ctx context.Context, request proto.Message) (answer, error) {
	c := o.c
	answers := make(chan answer, 1)
	var t *task
	c.mu.Lock()
	m, _ := c.leader()
	if m == nil || m.paused {
		m = nil
		for _, i := range c.rng.Perm(len(c.members)) {
			if other := c.members[i]; !other.killed && !other.paused {
				m = other
			}
		}
	}
	if m == nil {
		c.after(c.cfg.TickInterval, func() { answers <- answer{err: errReset} })
	} else {
		c.calls++
		from := origin{process: OperatorName, number: c.calls, root: true}
		t = &task{m: m, origin: from, respond: func(a answer) { answers <- a }}
		t.serve(request)
	}
	c.mu.Unlock()
	select {
	case a := <-answers:
		return a, nil
	case <-ctx.Done():
		if t != nil {
			c.mu.Lock()
			t.finish()
			c.mu.Unlock()
		}
		return answer{}, ctx.Err()
	case <-c.done:
		return answer{}, errStopped
	}
}

func (o operator) Put(ctx context.Context, key, value string, lease int64) (int64, error) {
	h, err := o.do(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value), Lease: lease})
	return h.GetRevision(), err
}

func (o operator) Delete(ctx context.Context, keys ...string) (int64, error) {
	r := &pb.TxnRequest{}
	for _, key := range keys {
		d := &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key)}}
		r.Success = append(r.Success, &pb.RequestOp{Request: d})
	}
	h, err := o.do(ctx, r)
	return h.GetRevision(), err
}

func (o operator) Revoke(ctx context.Context, lease int64) error {
	_, err := o.do(ctx, &pb.LeaseRevokeRequest{ID: lease})
	return err
}

func (o operator) Compact(ctx context.Context, revision int64) error {
	_, err := o.do(ctx, &pb.CompactionRequest{Revision: revision})
	return err
}

package fake

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	clusterID     = 0xfa6e
	applyTimeout  = time.Second
	forwardPause  = 50 * time.Millisecond
	passwordCheck = 60 * time.Millisecond // bcrypt's, at its default cost
	maxTxnOps     = 128
	maxGap        = 5000 // of entries that are committed and not applied
)

// unknown is what gRPC makes of an error that etcd has no code for.
func unknown(err error) error { return status.Error(codes.Unknown, err.Error()) }

// A task is what a member does for a call.
type task struct {
	m *member
	origin
	over    bool
	undo    []func() // when it is over
	respond func(answer)
	receive func(proto.Message) // of a stream
}

// accept begins a task for a call whose first message has arrived.
func (m *member) accept(v *call, begin func(*task), respond func(answer)) {
	conn := v.conn
	if m.killed || conn.life != m.life {
		conn.down.send(conn.l.delay(), conn.breakLocked)
		return
	}
	if v.ended && m.c.rng.Float64() >= m.c.cfg.LateRequests {
		return // its cancellation has been seen first
	}
	t := &task{m: m, origin: v.origin, respond: respond, receive: func(proto.Message) {}}
	v.tasks = append(v.tasks, t)
	if m.refuse > 0 && m.c.rng.Float64() < m.refuse {
		t.end(answer{err: unknown(rpctypes.ErrTooManyRequests)})
		return
	}
	if t.requireLeader && m.lead == raft.None {
		t.end(answer{err: rpctypes.ErrGRPCNoLeader})
		return
	}
	begin(t)
}

// end gives the answer, unless nobody waits for it.
func (t *task) end(a answer) {
	if !t.over {
		t.finish()
		t.respond(a)
	}
}

func (t *task) fail(err error) { t.end(answer{err: err}) }

// finish undoes what was begun for the task.
func (t *task) finish() {
	if t.over {
		return
	}
	t.over = true
	undo := t.undo
	t.undo = nil
	for _, f := range undo {
		f()
	}
}

func (t *task) undoing(f func()) {
	if t.over {
		f()
	} else {
		t.undo = append(t.undo, f)
	}
}

// answer ends the task with a response, whose header it completes.
func (t *task) answer(response proto.Message) {
	t.m.fill(response.(interface{ GetHeader() *pb.ResponseHeader }).GetHeader())
	t.end(answer{message: response})
}

// fill completes a header. The term is that of the last entry which this member has applied.
func (m *member) fill(h *pb.ResponseHeader) {
	h.ClusterId, h.MemberId, h.RaftTerm = clusterID, uint64(m.id+1), m.term
	if h.Revision == 0 {
		h.Revision = m.view.revision
	}
}

// serve carries out a unary request.
func (t *task) serve(request proto.Message) {
	m := t.m
	switch r := request.(type) {
	case *pb.RangeRequest:
		if err := checkRange(r); err != nil {
			t.fail(err)
			return
		}
		t.read(r.Serializable, func(who identity) (proto.Message, error) {
			if err := m.realm.permits(who, read, r.Key, r.RangeEnd); err != nil {
				return nil, err
			}
			if err := m.view.check(max(0, r.Revision)); err != nil { // a negative one is refused in transactions alone
				return nil, err
			}
			return m.view.read(r), nil
		})
	case *pb.PutRequest:
		if err := checkPut(r); err != nil {
			t.fail(err)
			return
		}
		t.write(r)
	case *pb.DeleteRangeRequest:
		if len(r.Key) == 0 {
			t.fail(rpctypes.ErrGRPCEmptyKey)
			return
		}
		t.write(r)
	case *pb.TxnRequest:
		if err := checkTxn(r, maxTxnOps); err != nil {
			t.fail(err)
			return
		}
		if err := checkOverlaps(r); err != nil {
			t.fail(err)
			return
		}
		reads, serializable := rangesOnly(r)
		if !reads {
			t.write(r)
			return
		}
		t.read(serializable, func(who identity) (proto.Message, error) {
			keysOf := func(int64) []string { return nil } // it puts nothing
			if err := m.realm.permitsTxn(who, r, keysOf); err != nil {
				return nil, err
			}
			return m.view.readOnly(r)
		})
	case *pb.CompactionRequest:
		t.identify(func(who identity) {
			if err := m.realm.permitsAdmin(who); err != nil {
				t.fail(err)
				return
			}
			t.propose(r, who, func(e *entry) {
				response := e.response.(*pb.CompactionResponse)
				response.Header.Revision = m.view.revision
				t.answer(response)
			})
		})
	case *pb.LeaseGrantRequest:
		if r.ID == 0 {
			r = &pb.LeaseGrantRequest{ID: m.c.rng.Int64N(1<<63 - 1), TTL: r.TTL}
		}
		t.identified(func(identity) { t.write(r) })
	case *pb.LeaseRevokeRequest:
		t.identified(func(identity) { t.write(r) })
	case *pb.LeaseTimeToLiveRequest:
		t.identified(func(who identity) { t.timeToLive(who, r) })
	case *pb.LeaseLeasesRequest:
		t.identify(t.listLeases)
	case *pb.AuthenticateRequest:
		t.authenticate(r)
	case *pb.StatusRequest:
		t.answer(&pb.StatusResponse{
			Header: &pb.ResponseHeader{}, Leader: m.lead,
			RaftTerm: m.term, RaftIndex: m.committed, RaftAppliedIndex: m.applied,
		})
	default:
		t.fail(status.Errorf(codes.Unimplemented, "not modelled: %T", request))
	}
}

// identify finds out who asks. Without a token that is nobody.
func (t *task) identify(then func(identity)) {
	m := t.m
	switch {
	case t.root:
		then(root)
		return
	case !m.realm.enabled || t.token == "":
		then(identity{})
		return
	}
	index, err := strconv.ParseUint(t.token[strings.LastIndexByte(t.token, '.')+1:], 10, 64)
	if err != nil {
		t.fail(rpctypes.ErrGRPCInvalidAuthToken)
		return
	}
	m.whenApplied(index, func() { // before that the member cannot know it
		if t.over {
			return
		}
		known := m.tokens[t.token]
		if known == nil || known.until < m.c.now() {
			delete(m.tokens, t.token)
			t.fail(rpctypes.ErrGRPCInvalidAuthToken)
			return
		}
		known.until = m.c.now() + m.realm.ttl
		then(identity{known.user, m.realm.revision})
	})
}

// identified is identify for what nobody may do without saying who they are.
func (t *task) identified(then func(identity)) {
	t.identify(func(who identity) {
		if t.m.realm.enabled && who.revision == 0 {
			t.fail(rpctypes.ErrGRPCUserEmpty)
			return
		}
		then(who)
	})
}

func (r *realm) permitsAdmin(who identity) error {
	switch {
	case r.admin(who):
		return nil
	case who.user == "":
		return rpctypes.ErrGRPCUserEmpty
	}
	return rpctypes.ErrGRPCPermissionDenied
}

// linearizable calls then when this member has applied what was committed when the task came here.
func (t *task) linearizable(then func()) {
	t.undoing(t.m.linearizable(func(err error) {
		switch {
		case t.over:
		case err != nil:
			t.fail(err)
		default:
			then()
		}
	}))
}

// read answers with what this member knows.
func (t *task) read(serializable bool, look func(identity) (proto.Message, error)) {
	then := func() {
		t.identify(func(who identity) {
			response, err := look(who)
			if err != nil {
				t.fail(err)
				return
			}
			t.answer(response)
		})
	}
	if serializable {
		then()
	} else {
		t.linearizable(then)
	}
}

// write has a request committed and answers with what came of it.
func (t *task) write(request proto.Message) {
	t.identify(func(who identity) {
		t.propose(request, who, func(e *entry) { t.answer(e.response) })
	})
}

func (t *task) propose(request proto.Message, who identity, then func(*entry)) {
	m := t.m
	if m.committed > m.applied+maxGap {
		t.fail(unknown(rpctypes.ErrTooManyRequests))
		return
	}
	if proto.Size(request) > m.c.cfg.MaxRequestBytes {
		t.fail(rpctypes.ErrGRPCRequestTooLarge)
		return
	}
	e := m.c.newEntry(m, request)
	e.who, e.process, e.call = who, t.process, t.number
	t.undoing(m.propose(e, func(e *entry) {
		switch {
		case t.over:
		case e.err != nil:
			t.fail(e.err)
		default:
			then(e)
		}
	}, t.fail))
}

// waitApplied calls then when this member has applied what it knows to be committed.
func (m *member) waitApplied(then func(), late func()) {
	waits := true
	timeout := m.after(applyTimeout, func() {
		waits = false
		late()
	})
	m.whenApplied(m.committed, func() {
		if waits {
			timeout.stop()
			then()
		}
	})
}

// leaseRenew renews a lease here, or at the leader that this member knows. done is called at most once.
func (t *task) leaseRenew(id int64, done func(ttl int64, err error)) {
	m := t.m
	if !m.leads() {
		t.forwardRenewal(id, done)
		return
	}
	t.undoing(m.ensureLeadership(func(leads bool) {
		if t.over {
			return
		}
		if !leads {
			done(-1, unknown(errNotPrimary))
			return
		}
		renew := func() {
			t.permitRenewal(id, done, func() {
				m.renew(id, func(ttl int64, err error) {
					switch {
					case t.over:
					case errors.Is(err, errNotPrimary):
						t.forwardRenewal(id, done)
					default:
						done(ttl, err)
					}
				})
			})
		}
		if m.leases[id] != nil {
			renew()
			return
		}
		m.waitApplied(renew, func() { done(0, rpctypes.ErrGRPCTimeoutWaitAppliedIndex) }) // it may have been granted just now
	}))
}

// permitRenewal calls then if whoever has opened the stream may write all keys of the lease.
func (t *task) permitRenewal(id int64, done func(int64, error), then func()) {
	m := t.m
	if !m.realm.enabled {
		then()
		return
	}
	t.identified(func(who identity) {
		if l := m.leases[id]; l != nil {
			if err := m.realm.permitsLease(who, l.attachedAt(m.view)); err != nil {
				done(0, err)
				return
			}
		}
		then()
	})
}

// forwardRenewal has the leader renew a lease.
func (t *task) forwardRenewal(id int64, done func(int64, error)) {
	t.forward(&forwarding{
		before: func(then func()) { t.permitRenewal(id, done, then) },
		ask: func(leader *member, reply func(func())) {
			leader.waitApplied(func() {
				leader.renew(id, func(ttl int64, err error) {
					if errors.Is(err, errNotPrimary) {
						reply(nil)
					} else {
						reply(func() { done(ttl, err) })
					}
				})
			}, func() { reply(nil) })
		},
		failed: func(err error) { done(-1, err) },
	})
}

// A forwarding is a question to the leader that a member knows. It is asked again until it is answered.
type forwarding struct {
	before func(then func()) // each time, at the member
	// ask is called at the leader, which replies with what is to be done at the member; nil if it
	// cannot say.
	ask    func(leader *member, reply func(func()))
	failed func(error)
	over   bool
}

func (t *task) forward(f *forwarding) {
	m := t.m
	timeout := m.after(m.c.requestTimeout(), func() {
		f.over = true
		if m.lead == raft.None {
			f.failed(rpctypes.ErrGRPCNoLeader)
		} else {
			f.failed(rpctypes.ErrGRPCTimeout)
		}
	})
	t.undoing(timeout.stop)
	var try func()
	try = func() {
		switch {
		case t.over || f.over:
			return
		case m.lead == raft.None:
			m.after(m.c.electionTimeout(), try)
			return
		}
		f.before(func() {
			leader := m.c.members[m.lead-1]
			again := func() { m.after(forwardPause, try) }
			reply := func(settle func()) {
				leader.post(m, func() {
					switch {
					case t.over || f.over:
					case settle == nil:
						again()
					default:
						f.over = true
						timeout.stop()
						settle()
					}
				}, func() {})
			}
			m.post(leader, func() { f.ask(leader, reply) }, again)
		})
	}
	try()
}

// post sends a message to another member, beside raft's. failed is called if that member is down.
func (m *member) post(to *member, arrived, failed func()) {
	p := m.c.peer(m, to)
	l := &lane{c: m.c, blocked: p.lane.blocked}
	life, toLife := m.life, to.life
	l.send(p.delay(), func() {
		switch {
		case !to.killed && to.life == toLife:
			arrived()
		case m.life == life:
			failed()
		}
	})
}

// timeToLive answers how long a lease lives.
func (t *task) timeToLive(who identity, r *pb.LeaseTimeToLiveRequest) {
	m := t.m
	if l := m.leases[r.ID]; r.Keys && l != nil && !m.realm.admin(who) {
		for _, key := range l.attachedAt(m.view) {
			if err := m.realm.permits(who, read, []byte(key), nil); err != nil {
				t.fail(err)
				return
			}
		}
	}
	if m.leads() {
		m.waitApplied(func() {
			response, err := m.lookUp(r)
			if err != nil {
				t.fail(rpctypes.ErrGRPCLeaderChanged)
				return
			}
			t.answer(response)
		}, func() { t.fail(rpctypes.ErrGRPCTimeoutWaitAppliedIndex) })
		return
	}
	t.forward(&forwarding{
		before: func(then func()) { then() },
		ask: func(leader *member, reply func(func())) {
			leader.waitApplied(func() {
				response, err := leader.lookUp(r)
				if err != nil {
					reply(nil)
				} else {
					reply(func() { t.answer(response) })
				}
			}, func() { reply(nil) })
		},
		failed: t.fail,
	})
}

func (m *member) lookUp(r *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	response := &pb.LeaseTimeToLiveResponse{Header: &pb.ResponseHeader{}, ID: r.ID, TTL: -1}
	l := m.leases[r.ID]
	if l == nil {
		return response, nil
	}
	d := m.countdown[r.ID]
	if d == nil {
		return nil, errNotPrimary
	}
	response.TTL, response.GrantedTTL = int64((d.expiry - m.c.now()).Seconds()), l.ttl
	if r.Keys {
		for _, key := range l.attachedAt(m.view) {
			response.Keys = append(response.Keys, []byte(key))
		}
	}
	return response, nil
}

// listLeases answers with all leases, those first that expire first.
func (t *task) listLeases(who identity) {
	m := t.m
	if m.realm.enabled && who.revision == 0 {
		t.fail(rpctypes.ErrGRPCUserEmpty)
		return
	}
	response := &pb.LeaseLeasesResponse{Header: &pb.ResponseHeader{}}
	for _, l := range m.known() {
		if !m.realm.admin(who) {
			for _, key := range l.attachedAt(m.view) {
				if err := m.realm.permits(who, read, []byte(key), nil); err != nil {
					t.fail(err)
					return
				}
			}
		}
		response.Leases = append(response.Leases, &pb.LeaseStatus{ID: l.id})
	}
	t.answer(response)
}

// authenticate answers with a token.
func (t *task) authenticate(r *pb.AuthenticateRequest) {
	m := t.m
	t.linearizable(func() {
		checked := m.realm.revision
		if !m.realm.enabled {
			t.fail(rpctypes.ErrGRPCAuthNotEnabled)
			return
		}
		m.after(passwordCheck, func() {
			if u, ok := m.realm.user(r.Name); !ok || u.Password != r.Password {
				t.fail(rpctypes.ErrGRPCAuthFailed)
				return
			}
			prefix := fmt.Sprintf("%016x", m.c.rng.Uint64())
			t.propose(&pb.InternalAuthenticateRequest{Name: r.Name, SimpleToken: prefix}, identity{}, func(e *entry) {
				if checked != m.realm.revision {
					t.authenticate(r)
					return
				}
				t.answer(e.response)
			})
		})
	})
}

// What etcd refuses before it proposes it.

func checkRange(r *pb.RangeRequest) error {
	_, order := pb.RangeRequest_SortOrder_name[int32(r.SortOrder)]
	_, target := pb.RangeRequest_SortTarget_name[int32(r.SortTarget)]
	switch {
	case len(r.Key) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case !order || !target:
		return rpctypes.ErrGRPCInvalidSortOption
	}
	return nil
}

func checkPut(r *pb.PutRequest) error {
	switch {
	case len(r.Key) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case r.IgnoreValue && len(r.Value) != 0:
		return rpctypes.ErrGRPCValueProvided
	case r.IgnoreLease && r.Lease != 0:
		return rpctypes.ErrGRPCLeaseProvided
	}
	return nil
}

func checkTxn(r *pb.TxnRequest, maxOps int) error {
	ops := max(len(r.Compare), len(r.Success), len(r.Failure))
	if ops > maxOps {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, c := range r.Compare {
		if len(c.Key) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	}
	for _, branch := range [][]*pb.RequestOp{r.Success, r.Failure} {
		for _, op := range branch {
			var err error
			switch op := op.Request.(type) {
			case *pb.RequestOp_RequestRange:
				err = checkRange(op.RequestRange)
			case *pb.RequestOp_RequestPut:
				err = checkPut(op.RequestPut)
			case *pb.RequestOp_RequestDeleteRange:
				if len(op.RequestDeleteRange.Key) == 0 {
					err = rpctypes.ErrGRPCEmptyKey
				}
			case *pb.RequestOp_RequestTxn:
				err = checkTxn(op.RequestTxn, maxOps-ops)
			default:
				err = rpctypes.ErrGRPCKeyNotFound
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// rangesOnly reports whether a transaction has no operations but ranges, and whether all of them are
// serializable.
func rangesOnly(r *pb.TxnRequest) (reads, serializable bool) {
	serializable = true
	for _, branch := range [][]*pb.RequestOp{r.Success, r.Failure} {
		for _, op := range branch {
			r := op.GetRequestRange()
			if r == nil {
				return false, false
			}
			serializable = serializable && r.Serializable
		}
	}
	return true, serializable
}

// changes are the keys that a branch may put and the ranges that it may delete.
type changes struct {
	puts    map[string]bool
	deletes []*pb.DeleteRangeRequest
}

// checkOverlaps refuses a transaction that may change a key twice.
func checkOverlaps(r *pb.TxnRequest) error {
	for _, branch := range [][]*pb.RequestOp{r.Success, r.Failure} {
		if _, err := changesOf(branch); err != nil {
			return err
		}
	}
	return nil
}

func changesOf(branch []*pb.RequestOp) (*changes, error) {
	all := &changes{puts: make(map[string]bool)}
	for _, op := range branch {
		if d := op.GetRequestDeleteRange(); d != nil {
			all.deletes = append(all.deletes, d)
		}
	}
	for _, op := range branch {
		t := op.GetRequestTxn()
		if t == nil {
			continue
		}
		success, err := changesOf(t.Success)
		if err != nil {
			return nil, err
		}
		failure, err := changesOf(t.Failure)
		if err != nil {
			return nil, err
		}
		for _, nested := range []*changes{success, failure} { // only one of them is carried out
			for key := range nested.puts {
				if all.puts[key] || all.deleted(key) {
					return nil, rpctypes.ErrGRPCDuplicateKey
				}
			}
		}
		for _, nested := range []*changes{success, failure} {
			for key := range nested.puts {
				all.puts[key] = true
			}
			all.deletes = append(all.deletes, nested.deletes...)
		}
	}
	for _, op := range branch {
		if p := op.GetRequestPut(); p != nil {
			if key := string(p.Key); all.puts[key] || all.deleted(key) {
				return nil, rpctypes.ErrGRPCDuplicateKey
			}
			all.puts[string(p.Key)] = true
		}
	}
	return all, nil
}

// deleted reports whether a key may be deleted. Like etcd, it does not know that an end of a zero byte
// has no end.
func (c *changes) deleted(key string) bool {
	return slices.ContainsFunc(c.deletes, func(d *pb.DeleteRangeRequest) bool {
		if len(d.RangeEnd) == 0 {
			return key == string(d.Key)
		}
		return string(d.Key) <= key && key < string(d.RangeEnd)
	})
}

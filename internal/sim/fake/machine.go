package fake

import (
	"maps"
	"slices"
	"strconv"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"
)

// An entry is one of raft's log, and what became of it.
type entry struct {
	id      uint64
	by      *member       // that proposed it
	request proto.Message // of etcd's API, or one of the types below
	who     identity
	process string
	call    uint64
	primary uint64 // the raft term in which the lessor wants the lease revoked, as it has expired; 0 for requests

	// Set when the first member applies it.
	applied  bool
	index    uint64
	term     uint64
	revision int64 // of the store after it
	events   []*mvccpb.Event
	lease    *lease // that was granted
	response proto.Message
	err      error
}

// configure is an entry that replaces the realm.
type configure struct {
	proto.Message
	realm *realm
}

// alarm is an entry that says whether the database is full.
type alarm struct {
	proto.Message
	full bool
}

// A lease is one that was granted. Members know different ones, as they have applied different entries.
type lease struct {
	id, ttl int64
	keys    map[string]bool // all that it ever had, and whether it has them still
}

// attached returns the lease's keys, sorted.
func (l *lease) attached() []string {
	if l == nil {
		return nil
	}
	var keys []string
	for key, still := range l.keys {
		if still {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// attachedAt returns the keys that the lease has in a view, sorted.
func (l *lease) attachedAt(v view) []string {
	var keys []string
	for _, key := range slices.Sorted(maps.Keys(l.keys)) {
		if h := v.history([]byte(key), false); h != nil {
			if kv := h.at(v.revision); kv != nil && kv.Lease == l.id {
				keys = append(keys, key)
			}
		}
	}
	return keys
}

// A machine is the state after all entries that any member has applied.
type machine struct {
	*store
	compacted int64
	leases    map[int64]*lease
	realm     *realm
	full      bool
	minTTL    int64
}

func newMachine(minTTL int64) *machine {
	return &machine{
		store:     &store{revision: 1},
		compacted: -1,
		leases:    make(map[int64]*lease),
		realm:     &realm{},
		minTTL:    minTTL,
	}
}

func (s *machine) view() view { return view{s.store, s.revision, s.compacted} }

// apply carries out an entry.
func (s *machine) apply(e *entry) {
	tx := &transaction{machine: s, begin: s.revision}
	e.response, e.err = tx.execute(e)
	if len(tx.events) > 0 {
		s.revision = tx.begin + 1
		s.events = append(s.events, tx.events...)
		e.events = tx.events
	}
	e.revision = s.revision
}

// A transaction is an entry that is carried out.
type transaction struct {
	*machine
	begin  int64
	events []*mvccpb.Event
}

// now is the store with what the transaction has changed.
func (tx *transaction) now() view {
	v := tx.view()
	if len(tx.events) > 0 {
		v.revision = tx.begin + 1
	}
	return v
}

func (tx *transaction) header() *pb.ResponseHeader {
	return &pb.ResponseHeader{Revision: tx.now().revision}
}

func (tx *transaction) keysOf(id int64) []string { return tx.leases[id].attached() }

// execute is etcd's chain of appliers: first the alarm, then the rights, then the store.
func (tx *transaction) execute(e *entry) (proto.Message, error) {
	switch r := e.request.(type) {
	case *pb.PutRequest:
		if tx.full {
			return nil, rpctypes.ErrGRPCNoSpace
		}
		if err := tx.realm.permitsPut(e.who, r, tx.keysOf); err != nil {
			return nil, err
		}
		if err := tx.checkPut(r); err != nil {
			return nil, err
		}
		return tx.put(r), nil
	case *pb.DeleteRangeRequest:
		if err := tx.realm.permitsDelete(e.who, r); err != nil {
			return nil, err
		}
		return tx.deleteRange(r), nil
	case *pb.TxnRequest:
		if tx.full && puts(r) {
			return nil, rpctypes.ErrGRPCNoSpace
		}
		if err := tx.realm.permitsTxn(e.who, r, tx.keysOf); err != nil {
			return nil, err
		}
		p := tx.now().path(r)
		if err := p.check(tx.now(), tx.checkPut); err != nil {
			return nil, err
		}
		resp := tx.commit(p)
		resp.Header.Revision = tx.now().revision
		return resp, nil
	case *pb.CompactionRequest:
		switch {
		case r.Revision <= tx.compacted:
			return nil, rpctypes.ErrGRPCCompacted
		case r.Revision > tx.revision:
			return nil, rpctypes.ErrGRPCFutureRev
		}
		tx.compacted = r.Revision
		return &pb.CompactionResponse{Header: tx.header()}, nil
	case *pb.LeaseGrantRequest:
		return tx.grant(e, r)
	case *pb.LeaseRevokeRequest:
		if err := tx.realm.permitsLease(e.who, tx.keysOf(r.ID)); err != nil {
			return nil, err
		}
		return tx.revoke(r)
	case *pb.InternalAuthenticateRequest:
		if !tx.realm.enabled {
			return nil, rpctypes.ErrGRPCAuthNotEnabled
		}
		token := r.SimpleToken + "." + strconv.FormatUint(e.index, 10)
		return &pb.AuthenticateResponse{Header: tx.header(), Token: token}, nil
	case configure:
		r.realm.revision = tx.realm.revision + 1
		tx.realm = r.realm
	case alarm:
		tx.full = r.full
	}
	return nil, nil
}

func (tx *transaction) grant(e *entry, r *pb.LeaseGrantRequest) (proto.Message, error) {
	switch {
	case tx.full:
		return nil, rpctypes.ErrGRPCNoSpace
	case r.TTL > maxTTL:
		return nil, rpctypes.ErrGRPCLeaseTTLTooLarge
	case tx.leases[r.ID] != nil:
		return nil, rpctypes.ErrGRPCLeaseExist
	}
	l := &lease{id: r.ID, ttl: max(r.TTL, tx.minTTL), keys: make(map[string]bool)}
	tx.leases[r.ID], e.lease = l, l
	return &pb.LeaseGrantResponse{Header: tx.header(), ID: l.id, TTL: l.ttl}, nil
}

func (tx *transaction) revoke(r *pb.LeaseRevokeRequest) (proto.Message, error) {
	l := tx.leases[r.ID]
	if l == nil {
		return nil, rpctypes.ErrGRPCLeaseNotFound
	}
	for _, key := range l.attached() {
		tx.delete([]byte(key))
	}
	delete(tx.leases, r.ID)
	return &pb.LeaseRevokeResponse{Header: tx.header()}, nil
}

// checkPut returns why a key cannot be put, in a transaction as the store was before it.
func (tx *transaction) checkPut(p *pb.PutRequest) error {
	if p.Lease != 0 && tx.leases[p.Lease] == nil {
		return rpctypes.ErrGRPCLeaseNotFound
	}
	if (p.IgnoreValue || p.IgnoreLease) && len(tx.at(tx.now().revision, p.Key, nil)) == 0 {
		return rpctypes.ErrGRPCKeyNotFound
	}
	return nil
}

func (tx *transaction) put(p *pb.PutRequest) *pb.PutResponse {
	h := tx.history(p.Key, true)
	old := h.at(tx.now().revision)
	kv := &mvccpb.KeyValue{
		Key: h.key, Value: p.Value, Lease: p.Lease,
		CreateRevision: tx.begin + 1, ModRevision: tx.begin + 1, Version: 1,
	}
	if old != nil {
		kv.CreateRevision, kv.Version = old.CreateRevision, old.Version+1
		if p.IgnoreValue {
			kv.Value = old.Value
		}
		if p.IgnoreLease {
			kv.Lease = old.Lease
		}
		tx.detach(old)
	}
	if l := tx.leases[kv.Lease]; l != nil {
		l.keys[string(kv.Key)] = true
	}
	h.versions = append(h.versions, version{kv.ModRevision, kv})
	tx.events = append(tx.events, &mvccpb.Event{Type: mvccpb.Event_PUT, Kv: kv, PrevKv: old})
	resp := &pb.PutResponse{Header: &pb.ResponseHeader{Revision: kv.ModRevision}}
	if p.PrevKv {
		resp.PrevKv = old
	}
	return resp
}

func (tx *transaction) deleteRange(d *pb.DeleteRangeRequest) *pb.DeleteRangeResponse {
	kvs := tx.at(tx.now().revision, d.Key, d.RangeEnd)
	for _, kv := range kvs {
		tx.delete(kv.Key)
	}
	resp := &pb.DeleteRangeResponse{Header: tx.header(), Deleted: int64(len(kvs))}
	if d.PrevKv {
		resp.PrevKvs = kvs
	}
	return resp
}

func (tx *transaction) delete(key []byte) {
	h := tx.history(key, false)
	old := h.at(tx.now().revision)
	tx.detach(old)
	h.versions = append(h.versions, version{tx.begin + 1, nil})
	gone := &mvccpb.KeyValue{Key: h.key, ModRevision: tx.begin + 1}
	tx.events = append(tx.events, &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: gone, PrevKv: old})
}

func (tx *transaction) detach(kv *mvccpb.KeyValue) {
	if l := tx.leases[kv.Lease]; l != nil {
		l.keys[string(kv.Key)] = false
	}
}

// A path is a transaction, with the branches to take, of it and of those in it. All are chosen before
// the first change.
type path struct {
	succeeded bool
	ops       []*pb.RequestOp
	nested    []*path // of the operations; nil for one that is no transaction
}

func (v view) path(t *pb.TxnRequest) *path {
	p := &path{succeeded: v.holds(t.Compare), ops: t.Failure}
	if p.succeeded {
		p.ops = t.Success
	}
	p.nested = make([]*path, len(p.ops))
	for i, op := range p.ops {
		if t := op.GetRequestTxn(); t != nil {
			p.nested[i] = v.path(t)
		}
	}
	return p
}

// check returns why the path cannot be taken.
func (p *path) check(v view, checkPut func(*pb.PutRequest) error) error {
	for i, op := range p.ops {
		var err error
		switch op := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			err = v.check(op.RequestRange.Revision)
		case *pb.RequestOp_RequestPut:
			err = checkPut(op.RequestPut)
		case *pb.RequestOp_RequestTxn:
			err = p.nested[i].check(v, checkPut)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (tx *transaction) commit(p *path) *pb.TxnResponse {
	resp := &pb.TxnResponse{Header: &pb.ResponseHeader{}, Succeeded: p.succeeded}
	for i, op := range p.ops {
		r := &pb.ResponseOp{}
		switch op := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			r.Response = &pb.ResponseOp_ResponseRange{ResponseRange: tx.now().read(op.RequestRange)}
		case *pb.RequestOp_RequestPut:
			r.Response = &pb.ResponseOp_ResponsePut{ResponsePut: tx.put(op.RequestPut)}
		case *pb.RequestOp_RequestDeleteRange:
			r.Response = &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: tx.deleteRange(op.RequestDeleteRange)}
		case *pb.RequestOp_RequestTxn:
			r.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: tx.commit(p.nested[i])}
		}
		resp.Responses = append(resp.Responses, r)
	}
	return resp
}

// readOnly commits a transaction that changes nothing, at a member.
func (v view) readOnly(t *pb.TxnRequest) (*pb.TxnResponse, error) {
	p := v.path(t)
	if err := p.check(v, nil); err != nil {
		return nil, err
	}
	resp := &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: v.revision}, Succeeded: p.succeeded}
	for _, op := range p.ops {
		r := &pb.ResponseOp_ResponseRange{ResponseRange: v.read(op.GetRequestRange())}
		resp.Responses = append(resp.Responses, &pb.ResponseOp{Response: r})
	}
	return resp, nil
}

// puts reports whether a transaction may put a key.
func puts(t *pb.TxnRequest) bool {
	return slices.ContainsFunc(slices.Concat(t.Success, t.Failure), func(op *pb.RequestOp) bool {
		return op.GetRequestPut() != nil || op.GetRequestTxn() != nil && puts(op.GetRequestTxn())
	})
}

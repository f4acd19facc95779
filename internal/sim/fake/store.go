package fake

import (
	"bytes"
	"cmp"
	"slices"
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// A store has the versions of all keys. There is one for all members, and each looks at it as it was
// when the last entry was applied that this member has applied too: see [view]. So an entry is carried
// out once.
type store struct {
	keys     []*history      // sorted
	revision int64           // of the newest version
	events   []*mvccpb.Event // sorted by revision
}

// A history is what became of a key.
type history struct {
	key      []byte
	versions []version // sorted by revision; of one revision the last counts
}

// A version is what a key is from a revision on.
type version struct {
	revision int64
	kv       *mvccpb.KeyValue // nil if it does not exist
}

func (h *history) at(revision int64) *mvccpb.KeyValue {
	for i := len(h.versions) - 1; i >= 0; i-- {
		if v := h.versions[i]; v.revision <= revision {
			return v.kv
		}
	}
	return nil
}

// history returns what became of a key. If that is nothing, it is added, or nil is returned.
func (s *store) history(key []byte, add bool) *history {
	i, found := slices.BinarySearchFunc(s.keys, key, func(h *history, key []byte) int { return bytes.Compare(h.key, key) })
	switch {
	case found:
		return s.keys[i]
	case !add:
		return nil
	}
	h := &history{key: key}
	s.keys = slices.Insert(s.keys, i, h)
	return h
}

// at returns the keys of a range that exist at a revision, sorted. An empty end means the one key, a
// zero byte all from key on.
func (s *store) at(revision int64, key, end []byte) []*mvccpb.KeyValue {
	if len(end) == 0 {
		if h := s.history(key, false); h != nil {
			if kv := h.at(revision); kv != nil {
				return []*mvccpb.KeyValue{kv}
			}
		}
		return nil
	}
	var found []*mvccpb.KeyValue
	i, _ := slices.BinarySearchFunc(s.keys, key, func(h *history, key []byte) int { return bytes.Compare(h.key, key) })
	for _, h := range s.keys[i:] {
		if !within(h.key, key, end) {
			break
		}
		if kv := h.at(revision); kv != nil {
			found = append(found, kv)
		}
	}
	return found
}

// within reports whether k is in a range.
func within(k, key, end []byte) bool {
	switch {
	case len(end) == 0:
		return bytes.Equal(k, key)
	case len(end) == 1 && end[0] == 0:
		return bytes.Compare(k, key) >= 0
	}
	return bytes.Compare(k, key) >= 0 && bytes.Compare(k, end) < 0
}

// drop forgets what nobody can ask for who has compacted history up to a revision.
func (s *store) drop(revision int64) {
	s.keys = slices.DeleteFunc(s.keys, func(h *history) bool {
		keep := len(h.versions)
		for keep > 0 && h.versions[keep-1].revision > revision {
			keep--
		}
		if keep > 0 && h.versions[keep-1].kv != nil {
			keep-- // the key as it was then
		}
		h.versions = slices.Clone(h.versions[keep:])
		return len(h.versions) == 0
	})
	s.events = slices.Clone(s.since(revision))
}

// since returns the events from a revision on.
func (s *store) since(revision int64) []*mvccpb.Event {
	i, _ := slices.BinarySearchFunc(s.events, revision, func(ev *mvccpb.Event, revision int64) int {
		return cmp.Compare(ev.Kv.ModRevision, revision)
	})
	return s.events[i:]
}

// A view is a store as a member sees it.
type view struct {
	*store
	revision  int64
	compacted int64 // history before it must not be asked for
}

// check returns why a revision cannot be read, if it is too old or too new.
func (v view) check(revision int64) error {
	switch {
	case revision > v.revision:
		return rpctypes.ErrGRPCFutureRev
	case revision != 0 && revision < v.compacted:
		return rpctypes.ErrGRPCCompacted
	}
	return nil
}

// before is what a key was before an event, if it was not created by it and the member still knows.
func (v view) before(ev *mvccpb.Event) *mvccpb.KeyValue {
	last := ev.Kv.ModRevision - 1
	if ev.Kv.CreateRevision == ev.Kv.ModRevision || last < v.compacted {
		return nil
	}
	return v.history(ev.Kv.Key, false).at(last)
}

// read answers a range that check has found right.
func (v view) read(r *pb.RangeRequest) *pb.RangeResponse {
	revision := v.revision
	if r.Revision > 0 {
		revision = r.Revision
	}
	kvs := v.at(revision, r.Key, r.RangeEnd)
	resp := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: v.revision}, Count: int64(len(kvs))}
	if r.CountOnly {
		return resp
	}
	filters := r.MaxModRevision != 0 || r.MinModRevision != 0 || r.MaxCreateRevision != 0 || r.MinCreateRevision != 0
	if r.Limit > 0 && int64(len(kvs)) > r.Limit && r.SortOrder == pb.RangeRequest_NONE && !filters {
		kvs = kvs[:r.Limit+1] // without an order, etcd sorts by a target what the limit has left
	}
	kvs = slices.DeleteFunc(kvs, func(kv *mvccpb.KeyValue) bool {
		return r.MaxModRevision != 0 && kv.ModRevision > r.MaxModRevision ||
			r.MinModRevision != 0 && kv.ModRevision < r.MinModRevision ||
			r.MaxCreateRevision != 0 && kv.CreateRevision > r.MaxCreateRevision ||
			r.MinCreateRevision != 0 && kv.CreateRevision < r.MinCreateRevision
	})
	sorted(kvs, r)
	if r.Limit > 0 && int64(len(kvs)) > r.Limit {
		kvs, resp.More = kvs[:r.Limit], true
	}
	if r.KeysOnly {
		for i, kv := range kvs {
			kvs[i] = &mvccpb.KeyValue{Key: kv.Key, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, Version: kv.Version}
			if r.SortTarget == pb.RangeRequest_VALUE {
				kvs[i].Lease = kv.Lease // else it is answered from the index alone, since 3.7
			}
		}
	}
	resp.Kvs = kvs
	return resp
}

// sorted sorts what was read. The sort is not stable, as etcd's is not: both get the same input.
func sorted(kvs []*mvccpb.KeyValue, r *pb.RangeRequest) {
	order := r.SortOrder
	if r.SortTarget == pb.RangeRequest_KEY && order == pb.RangeRequest_ASCEND {
		order = pb.RangeRequest_NONE
	} else if r.SortTarget != pb.RangeRequest_KEY && order == pb.RangeRequest_NONE {
		order = pb.RangeRequest_ASCEND
	}
	var less func(a, b *mvccpb.KeyValue) bool
	switch r.SortTarget {
	case pb.RangeRequest_KEY:
		less = func(a, b *mvccpb.KeyValue) bool { return bytes.Compare(a.Key, b.Key) < 0 }
	case pb.RangeRequest_VERSION:
		less = func(a, b *mvccpb.KeyValue) bool { return a.Version < b.Version }
	case pb.RangeRequest_CREATE:
		less = func(a, b *mvccpb.KeyValue) bool { return a.CreateRevision < b.CreateRevision }
	case pb.RangeRequest_MOD:
		less = func(a, b *mvccpb.KeyValue) bool { return a.ModRevision < b.ModRevision }
	case pb.RangeRequest_VALUE:
		less = func(a, b *mvccpb.KeyValue) bool { return bytes.Compare(a.Value, b.Value) < 0 }
	}
	switch order {
	case pb.RangeRequest_ASCEND:
		sort.Sort(byLess{kvs, less})
	case pb.RangeRequest_DESCEND:
		sort.Sort(sort.Reverse(byLess{kvs, less}))
	}
}

type byLess struct {
	kvs  []*mvccpb.KeyValue
	less func(a, b *mvccpb.KeyValue) bool
}

func (s byLess) Len() int           { return len(s.kvs) }
func (s byLess) Less(i, j int) bool { return s.less(s.kvs[i], s.kvs[j]) }
func (s byLess) Swap(i, j int)      { s.kvs[i], s.kvs[j] = s.kvs[j], s.kvs[i] }

// holds reports whether all comparisons of a transaction hold.
func (v view) holds(compares []*pb.Compare) bool {
	for _, c := range compares {
		kvs := v.at(v.revision, c.Key, c.RangeEnd)
		if len(kvs) == 0 {
			if c.Target == pb.Compare_VALUE {
				return false // no value equals one that is not there
			}
			kvs = []*mvccpb.KeyValue{{}}
		}
		for _, kv := range kvs {
			if !holds(c, kv) {
				return false
			}
		}
	}
	return true
}

func holds(c *pb.Compare, kv *mvccpb.KeyValue) bool {
	var result int
	switch c.Target {
	case pb.Compare_VALUE:
		result = bytes.Compare(kv.Value, c.GetValue())
	case pb.Compare_CREATE:
		result = cmp.Compare(kv.CreateRevision, c.GetCreateRevision())
	case pb.Compare_MOD:
		result = cmp.Compare(kv.ModRevision, c.GetModRevision())
	case pb.Compare_VERSION:
		result = cmp.Compare(kv.Version, c.GetVersion())
	case pb.Compare_LEASE:
		result = cmp.Compare(kv.Lease, c.GetLease())
	}
	switch c.Result {
	case pb.Compare_EQUAL:
		return result == 0
	case pb.Compare_NOT_EQUAL:
		return result != 0
	case pb.Compare_GREATER:
		return result > 0
	case pb.Compare_LESS:
		return result < 0
	}
	return true
}

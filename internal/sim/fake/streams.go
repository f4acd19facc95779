package fake

import (
	"bytes"
	"errors"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"google.golang.org/protobuf/proto"
)

const (
	maxBlind         = 3 // how many election timeouts without a leader end streams that want one
	syncInterval     = 100 * time.Millisecond
	maxSynced        = 512  // watchers that are synced at a time
	maxRevisions     = 1000 // that a watcher is told of at a time when it is synced
	noWatch          = -1   // the identifier in an answer that is about no watch, or about all
	progressInterval = 10 * time.Minute
)

// open begins a stream.
func (t *task) open(v *call) {
	m := t.m
	if t.requireLeader {
		m.tied = append(m.tied, t)
		t.undoing(func() { m.tied = slices.DeleteFunc(m.tied, func(other *task) bool { return other == t }) })
	}
	if v.method == keepAliveMethod {
		s := &keepAlives{t: t, v: v}
		t.receive = s.receive
		return
	}
	s := &watches{t: t, v: v}
	t.receive = s.receive
	t.undoing(s.close)
}

// lookAfterStreams ends streams that want a leader when there has been none for a while.
func (m *member) lookAfterStreams() {
	if m.lead != raft.None {
		m.blind = 0
		return
	}
	if m.blind++; m.blind < maxBlind {
		return
	}
	for _, t := range slices.Clone(m.tied) {
		t.fail(rpctypes.ErrGRPCNoLeader)
	}
}

// keepAlives is a stream of renewals. They are carried out one after another.
type keepAlives struct {
	t       *task
	v       *call
	waiting []*pb.LeaseKeepAliveRequest
	busy    bool
}

func (s *keepAlives) receive(message proto.Message) {
	s.waiting = append(s.waiting, message.(*pb.LeaseKeepAliveRequest))
	s.next()
}

func (s *keepAlives) next() {
	if s.busy || len(s.waiting) == 0 || s.t.over {
		return
	}
	s.busy = true
	id := s.waiting[0].ID
	s.waiting = s.waiting[1:]
	response := &pb.LeaseKeepAliveResponse{ID: id, Header: &pb.ResponseHeader{}}
	s.t.m.fill(response.Header) // before the renewal, which may take a while
	s.t.leaseRenew(id, func(ttl int64, err error) {
		if errors.Is(err, errLeaseNotFound) {
			ttl, err = 0, nil
		}
		if err != nil {
			s.t.fail(err)
			return
		}
		response.TTL = ttl
		s.v.tell(response)
		s.busy = false
		s.next()
	})
}

// watches is a stream of watches.
type watches struct {
	t        *task
	v        *call
	watchers []*watcher
	ids      int64
	progress *timer
}

// A watcher is one watch.
type watcher struct {
	s      *watches
	id     int64
	create *pb.WatchCreateRequest
	key    []byte
	end    []byte
	next   int64 // the revision from which on it has not been told anything
	synced bool
	quiet  bool // it has been told nothing since progress was looked at
}

func (s *watches) receive(message proto.Message) {
	switch r := message.(*pb.WatchRequest).RequestUnion.(type) {
	case *pb.WatchRequest_CreateRequest:
		s.t.identifyWatch(func(who identity, err error) { s.create(r.CreateRequest, who, err) })
	case *pb.WatchRequest_CancelRequest:
		i := slices.IndexFunc(s.watchers, func(w *watcher) bool { return w.id == r.CancelRequest.WatchId })
		if i >= 0 {
			s.remove(s.watchers[i])
			s.tell(&pb.WatchResponse{WatchId: r.CancelRequest.WatchId, Canceled: true})
		}
	case *pb.WatchRequest_ProgressRequest:
		s.tellProgress(s.watchers, noWatch)
	}
}

// identifyWatch is identify for a watch: what is wrong does not end the stream.
func (t *task) identifyWatch(then func(identity, error)) {
	once := &task{m: t.m, origin: t.origin, respond: func(a answer) { then(identity{}, a.err) }}
	once.identify(func(who identity) { then(who, nil) })
}

func (s *watches) create(r *pb.WatchCreateRequest, who identity, err error) {
	m := s.t.m
	if s.t.over {
		return
	}
	w := &watcher{s: s, create: r, id: r.WatchId, key: r.Key, end: r.RangeEnd, quiet: true}
	if len(w.key) == 0 {
		w.key = []byte{0}
	}
	refuse := func(why string) {
		s.tell(&pb.WatchResponse{WatchId: noWatch, Created: true, Canceled: true, CancelReason: why})
	}
	if err == nil {
		err = m.realm.permits(who, read, w.key, w.end)
	}
	switch {
	case r.StartRevision < 0:
		refuse(rpctypes.ErrCompacted.Error())
		return
	case err != nil:
		refuse(err.Error())
		return
	case len(w.end) > 0 && !bytes.Equal(w.end, []byte{0}) && bytes.Compare(w.key, w.end) >= 0:
		refuse("mvcc: watcher range is empty")
		return
	case w.id != 0 && s.has(w.id):
		refuse("mvcc: duplicate watch ID provided on the WatchStream")
		return
	case w.id == 0:
		for s.has(s.ids) {
			s.ids++
		}
		w.id = s.ids
		s.ids++
	}
	w.synced = r.StartRevision == 0 || r.StartRevision > m.view.revision
	w.next = r.StartRevision
	if w.synced {
		w.next = max(r.StartRevision, m.view.revision+1)
	}
	s.watchers = append(s.watchers, w)
	m.watchers = append(m.watchers, w)
	s.tell(&pb.WatchResponse{WatchId: w.id, Created: true})
	if !w.synced && m.syncing == nil {
		m.syncing = m.after(time.Duration(m.c.rng.Int64N(int64(syncInterval))), m.sync)
	}
	if r.ProgressNotify && s.progress == nil {
		s.notifyProgress()
	}
}

func (s *watches) has(id int64) bool {
	return slices.ContainsFunc(s.watchers, func(w *watcher) bool { return w.id == id })
}

func (s *watches) remove(w *watcher) {
	is := func(other *watcher) bool { return other == w }
	s.watchers = slices.DeleteFunc(s.watchers, is)
	s.t.m.watchers = slices.DeleteFunc(slices.Clone(s.t.m.watchers), is) // somebody may be going through the old ones
}

func (s *watches) close() {
	s.progress.stop()
	s.t.m.watchers = slices.DeleteFunc(slices.Clone(s.t.m.watchers), func(w *watcher) bool { return w.s == s })
}

// tell sends a response. The revision in its header is the member's, unless it says another one.
func (s *watches) tell(r *pb.WatchResponse) {
	if s.t.over || s.v.deaf && !r.Created && !r.Canceled {
		return
	}
	if r.Header == nil {
		r.Header = &pb.ResponseHeader{}
	}
	s.t.m.fill(r.Header)
	s.v.tell(r)
}

// tellProgress says that some watches have been told everything, if they have.
func (s *watches) tellProgress(of []*watcher, id int64) {
	revision := s.t.m.view.revision
	for _, w := range of {
		if !w.synced || revision < w.create.StartRevision {
			return
		}
	}
	if len(of) > 0 {
		s.tell(&pb.WatchResponse{WatchId: id})
	}
}

// notifyProgress tells quiet watches of their progress, now and then.
func (s *watches) notifyProgress() {
	interval := progressInterval + time.Duration(s.t.m.c.rng.Int64N(int64(progressInterval/10)))
	s.progress = s.t.m.after(interval, func() {
		for _, w := range s.watchers {
			if !w.create.ProgressNotify {
				continue
			}
			if w.quiet {
				s.tellProgress([]*watcher{w}, w.id)
			}
			w.quiet = true
		}
		s.notifyProgress()
	})
}

// notify tells the watches that are synced what an entry has changed.
func (m *member) notify(e *entry) {
	if len(e.events) == 0 {
		return
	}
	for _, w := range m.watchers {
		if w.synced {
			w.tell(w.matching(e.events), e.revision)
		}
	}
}

// matching are the events that a watch is about and has not been told, before filters.
func (w *watcher) matching(events []*mvccpb.Event) []*mvccpb.Event {
	var matching []*mvccpb.Event
	for _, ev := range events {
		if ev.Kv.ModRevision >= w.next && within(ev.Kv.Key, w.key, w.end) {
			matching = append(matching, ev)
		}
	}
	return matching
}

// tell tells a watch of events, at a revision of the member's.
func (w *watcher) tell(events []*mvccpb.Event, revision int64) {
	if len(events) == 0 {
		return
	}
	w.next = max(w.next, revision+1)
	var told []*mvccpb.Event
	for _, ev := range events {
		if w.filtered(ev) {
			continue
		}
		copied := &mvccpb.Event{Type: ev.Type, Kv: ev.Kv}
		if w.create.PrevKv {
			copied.PrevKv = w.s.t.m.view.before(ev)
		}
		told = append(told, copied)
	}
	if len(told) == 0 {
		return
	}
	w.quiet = false
	w.s.send(&pb.WatchResponse{Header: &pb.ResponseHeader{Revision: revision}, WatchId: w.id, Events: told}, w.create.Fragment)
}

func (w *watcher) filtered(ev *mvccpb.Event) bool {
	return slices.ContainsFunc(w.create.Filters, func(f pb.WatchCreateRequest_FilterType) bool {
		return f == pb.WatchCreateRequest_NOPUT && ev.Type == mvccpb.Event_PUT ||
			f == pb.WatchCreateRequest_NODELETE && ev.Type == mvccpb.Event_DELETE
	})
}

// send sends events, in pieces if they are too large and the watch takes pieces.
func (s *watches) send(r *pb.WatchResponse, fragment bool) {
	limit := s.t.m.c.cfg.MaxRequestBytes + 512<<10
	if !fragment || len(r.Events) < 2 || proto.Size(r) < limit {
		s.tell(r)
		return
	}
	for rest := r.Events; len(rest) > 0; {
		piece := &pb.WatchResponse{
			Header:  &pb.ResponseHeader{Revision: r.Header.Revision},
			WatchId: r.WatchId, Fragment: true,
		}
		for len(rest) > 0 {
			piece.Events = append(piece.Events, rest[0])
			if len(piece.Events) > 1 && proto.Size(piece) >= limit {
				piece.Events = piece.Events[:len(piece.Events)-1]
				break
			}
			rest = rest[1:]
		}
		piece.Fragment = len(rest) > 0
		s.tell(piece)
	}
}

// sync tells watches that began in the past what they have missed.
func (m *member) sync() {
	m.syncing = nil
	revision, compacted := m.view.revision, m.view.compacted
	rounds := 0
	for _, w := range m.watchers {
		if w.synced {
			continue
		}
		if rounds++; rounds > maxSynced {
			break
		}
		if w.next < compacted {
			w.s.remove(w)
			w.s.tell(&pb.WatchResponse{WatchId: w.id, Canceled: true, CompactRevision: compacted})
			continue
		}
		missed := m.view.since(w.next)
		if i := slices.IndexFunc(missed, func(ev *mvccpb.Event) bool { return ev.Kv.ModRevision > revision }); i >= 0 {
			missed = missed[:i] // this member has not applied what follows
		}
		missed, more := atMost(maxRevisions, w.matching(missed))
		w.tell(missed, revision)
		if w.synced = more == 0; w.synced {
			w.next = max(w.next, revision+1)
		} else {
			w.next = more
		}
	}
	if slices.ContainsFunc(m.watchers, func(w *watcher) bool { return !w.synced }) {
		m.syncing = m.after(syncInterval, m.sync)
	}
}

// atMost returns the events of the first n revisions, and the revision that follows, or 0.
func atMost(n int, events []*mvccpb.Event) (first []*mvccpb.Event, more int64) {
	revisions := 0
	for i, ev := range events {
		if i == 0 || ev.Kv.ModRevision > events[i-1].Kv.ModRevision {
			if revisions++; revisions > n {
				return events[:i], ev.Kv.ModRevision
			}
		}
	}
	return events, 0
}

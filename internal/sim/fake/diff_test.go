package fake

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/leader/internal/etcdtest"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
)

var (
	seed       = flag.Uint64("seed", 1, "of the random operations that the fake and etcd are compared by")
	operations = flag.Int("operations", 20_000, "how many there are")
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// A side is one of the two clusters that are compared.
type side struct {
	name   string
	client *clientv3.Client
	kv     pb.KVClient
	lease  pb.LeaseClient
}

func newSide(name string, client *clientv3.Client) *side {
	conn := client.ActiveConnection()
	return &side{name, client, pb.NewKVClient(conn), pb.NewLeaseClient(conn)}
}

// twins returns an embedded etcd of one member, and a fake one that runs in real time. Both are empty.
func twins(t *testing.T) (etcd, fake *side) {
	t.Helper()
	m := etcdtest.Start(t)
	etcd = newSide("etcd", etcdtest.NewClient(t, m.Endpoint))
	client, err := realTime(t).Process("test", nil).NewClient(ClientConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return etcd, newSide("fake", client)
}

// realTime returns a fake of one member that is as fast as it can be.
func realTime(t *testing.T) *Cluster {
	c := New(Config{
		Seed: *seed, Members: 1, ClientDelay: -1, PeerDelay: -1, DiskDelay: -1,
		TickInterval: 10 * time.Millisecond, // as etcdtest
	})
	t.Cleanup(c.Stop)
	return c
}

// differ is a comparison under way.
type differ struct {
	t          *testing.T
	etcd, fake *side
	n          int // operations
	kinds      map[string]int
	failures   int
}

// same compares what both sides answer to a request. Each gets a request of its own.
func same[Q, R proto.Message](d *differ, request Q, call func(*side, context.Context, Q) (R, error)) (R, error) {
	d.n++
	d.kinds[fmt.Sprintf("%T", request)]++
	ctx, cancel := context.WithTimeout(d.t.Context(), patience)
	defer cancel()
	a, errA := call(d.etcd, ctx, proto.Clone(request).(Q))
	b, errB := call(d.fake, ctx, proto.Clone(request).(Q))
	if errA == nil && errB == nil && proto.Equal(normal(a), normal(b)) {
		return a, errA
	}
	if x, y := text(a, errA), text(b, errB); x != y {
		d.failures++
		d.t.Errorf("operation %d, %T{%.500v}:\netcd: %.1000s\nfake: %.1000s", d.n, request, request, x, y)
	}
	return a, errA
}

func text(m proto.Message, err error) string {
	if err != nil {
		return fmt.Sprintf("%v: %v", rpctypes.Error(err), err)
	}
	// protobuf varies the blanks between fields.
	return strings.ReplaceAll(fmt.Sprintf("%T{%v}", m, normal(m)), "  ", " ")
}

// normal returns a message without what may differ.
func normal(m proto.Message) proto.Message {
	m = proto.Clone(m)
	if h, ok := m.(interface{ GetHeader() *pb.ResponseHeader }); ok && h.GetHeader() != nil {
		h.GetHeader().ClusterId, h.GetHeader().MemberId = 0, 0
	}
	switch r := m.(type) {
	case *pb.LeaseTimeToLiveResponse:
		slices.SortFunc(r.Keys, bytes.Compare) // etcd's are in no order
		if r.TTL > 0 {
			r.TTL = r.GrantedTTL // it passes
		}
	case *pb.LeaseLeasesResponse:
		slices.SortFunc(r.Leases, func(a, b *pb.LeaseStatus) int { return int(a.ID - b.ID) })
	case *mvccpb.Event:
		if len(r.Kv.Value) > 1000 {
			r.Kv.Value = fmt.Appendf(nil, "%d bytes", len(r.Kv.Value)) // so that it can be printed
		}
	}
	return m
}

// generator makes random requests.
type generator struct {
	rng       *rand.Rand
	revision  int64
	compacted int64
	leases    []int64
}

func (g *generator) chance(one int) bool { return g.rng.IntN(one) == 0 }

func pick[T any](g *generator, of ...T) T { return of[g.rng.IntN(len(of))] }

func (g *generator) key() []byte {
	if g.chance(200) {
		return nil
	}
	return []byte(pick(g, "a", "a/1", "a/2", "a/22", "a/3", "a/b/1", "b", "b/1", "b\xff", "c/1", "\x00"))
}

// end is of a range from key on.
func (g *generator) end(key []byte) []byte {
	switch g.rng.IntN(8) {
	case 0, 1:
		return []byte(clientv3.GetPrefixRangeEnd(string(key)))
	case 2:
		return []byte{0}
	case 3:
		return []byte(pick(g, "a", "a/2", "b", "c"))
	}
	return nil
}

func (g *generator) value() []byte { return []byte(pick(g, "", "v1", "v2", "v3", "w")) }

func (g *generator) lease() int64 {
	if len(g.leases) == 0 || g.chance(20) {
		return 4711
	}
	return pick(g, g.leases...)
}

// past is mostly a revision that was.
func (g *generator) past() int64 {
	switch g.rng.IntN(12) {
	case 0:
		return g.revision + 1 + g.rng.Int64N(5)
	case 1:
		return max(1, g.compacted-1+g.rng.Int64N(3))
	case 2:
		return -g.rng.Int64N(2)
	}
	return g.revision - g.rng.Int64N(min(g.revision, 40))
}

func (g *generator) ranges() *pb.RangeRequest {
	r := &pb.RangeRequest{Key: g.key()}
	r.RangeEnd = g.end(r.Key)
	if g.chance(3) {
		r.Limit = g.rng.Int64N(5)
	}
	if g.chance(4) {
		r.Revision = g.past()
	}
	if g.chance(2) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.rng.IntN(3))
		r.SortTarget = pb.RangeRequest_SortTarget(g.rng.IntN(5))
	}
	if g.chance(300) {
		r.SortTarget = 17
	}
	r.Serializable, r.KeysOnly, r.CountOnly = g.chance(4), g.chance(4), g.chance(8)
	for _, bound := range []*int64{&r.MinModRevision, &r.MaxModRevision, &r.MinCreateRevision, &r.MaxCreateRevision} {
		if g.chance(6) {
			*bound = g.past()
		}
	}
	return r
}

func (g *generator) put() *pb.PutRequest {
	p := &pb.PutRequest{Key: g.key(), Value: g.value(), PrevKv: g.chance(4)}
	if g.chance(3) {
		p.Lease = g.lease()
	}
	if g.chance(8) {
		p.IgnoreValue = true
		if !g.chance(10) {
			p.Value = nil
		}
	}
	if g.chance(8) {
		p.IgnoreLease = true
		if !g.chance(10) {
			p.Lease = 0
		}
	}
	return p
}

func (g *generator) deletes() *pb.DeleteRangeRequest {
	d := &pb.DeleteRangeRequest{Key: g.key(), PrevKv: g.chance(3)}
	if g.chance(3) {
		d.RangeEnd = g.end(d.Key)
	}
	return d
}

func (g *generator) compare() *pb.Compare {
	c := &pb.Compare{
		Result: pb.Compare_CompareResult(g.rng.IntN(4)), Target: pb.Compare_CompareTarget(g.rng.IntN(5)), Key: g.key(),
	}
	if g.chance(4) {
		c.RangeEnd = g.end(c.Key)
	}
	switch c.Target {
	case pb.Compare_VERSION:
		c.TargetUnion = &pb.Compare_Version{Version: g.rng.Int64N(4)}
	case pb.Compare_CREATE:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: pick(g, 0, g.past())}
	case pb.Compare_MOD:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: pick(g, 0, g.past())}
	case pb.Compare_VALUE:
		c.TargetUnion = &pb.Compare_Value{Value: g.value()}
	case pb.Compare_LEASE:
		c.TargetUnion = &pb.Compare_Lease{Lease: pick(g, 0, g.lease())}
	}
	if g.chance(30) {
		c.TargetUnion = nil
	}
	return c
}

func (g *generator) op(depth int) *pb.RequestOp {
	switch n := g.rng.IntN(10); {
	case n < 3:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: g.ranges()}}
	case n < 6:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: g.put()}}
	case n < 8:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: g.deletes()}}
	case depth > 0:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: g.txn(depth - 1)}}
	}
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: g.ranges()}}
}

// walk calls f with all operations of a transaction, nested ones too.
func walk(t *pb.TxnRequest, f func(*pb.RequestOp)) {
	for _, op := range slices.Concat(t.Success, t.Failure) {
		f(op)
		if nested := op.GetRequestTxn(); nested != nil {
			walk(nested, f)
		}
	}
}

// maxDepth is how deep transactions are nested.
const maxDepth = 2

func (g *generator) txn(depth int) *pb.TxnRequest {
	t := &pb.TxnRequest{}
	for range g.rng.IntN(3) {
		t.Compare = append(t.Compare, g.compare())
	}
	for range g.rng.IntN(4) {
		t.Success = append(t.Success, g.op(depth))
	}
	for range g.rng.IntN(3) {
		t.Failure = append(t.Failure, g.op(depth))
	}
	if g.chance(200) {
		for range maxTxnOps {
			t.Success = append(t.Success, g.op(0))
		}
	}
	if open := false; depth == maxDepth {
		walk(t, func(op *pb.RequestOp) {
			open = open || bytes.Equal(op.GetRequestDeleteRange().GetRangeEnd(), []byte{0})
		})
		walk(t, func(op *pb.RequestOp) {
			if p := op.GetRequestPut(); p != nil && open {
				// etcd does not see that such a range may delete the key, and crashes for lack of the
				// old value.
				p.IgnoreValue, p.IgnoreLease = false, false
			}
		})
	}
	if g.chance(6) { // read-only
		reads := func(ops []*pb.RequestOp) {
			for i := range ops {
				ops[i] = &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: g.ranges()}}
			}
		}
		reads(t.Success)
		reads(t.Failure)
	}
	return t
}

// A pair is a watch at both sides.
type pair struct {
	what   string
	failed bool
	logs   [2]*watchLog
	cancel context.CancelFunc
}

// A watchLog is what a watch has been told.
type watchLog struct {
	mu    sync.Mutex
	lines []string
	ended bool
}

func (l *watchLog) read(ch clientv3.WatchChan) {
	for r := range ch {
		l.mu.Lock()
		if r.Created {
			l.lines = append(l.lines, fmt.Sprint("created at ", r.Header.Revision))
		}
		for _, ev := range r.Events {
			l.lines = append(l.lines, text((*mvccpb.Event)(ev), nil))
		}
		if r.Canceled {
			l.lines = append(l.lines, fmt.Sprint("canceled ", r.CompactRevision, " ", r.Err()))
		}
		l.mu.Unlock()
	}
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
}

func (l *watchLog) snapshot() ([]string, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.lines), l.ended
}

// watch begins a random watch.
func (d *differ) watch(g *generator) *pair {
	key := g.key()
	opts := []clientv3.OpOption{clientv3.WithCreatedNotify()}
	if end := g.end(key); end != nil {
		opts = append(opts, clientv3.WithRange(string(end)))
	}
	if g.chance(2) {
		opts = append(opts, clientv3.WithRev(g.past()))
	}
	if g.chance(3) {
		opts = append(opts, clientv3.WithPrevKV())
	}
	if g.chance(4) {
		opts = append(opts, clientv3.WithFilterPut())
	}
	if g.chance(4) {
		opts = append(opts, clientv3.WithFilterDelete())
	}
	if g.chance(4) {
		opts = append(opts, clientv3.WithFragment())
	}
	op := clientv3.OpGet(string(key), opts...)
	ctx, cancel := context.WithCancel(d.t.Context())
	p := &pair{what: fmt.Sprintf("watch of %q to %q from %d", key, op.RangeBytes(), op.Rev()), cancel: cancel}
	for i, s := range []*side{d.etcd, d.fake} {
		p.logs[i] = &watchLog{}
		go p.logs[i].read(s.client.Watch(ctx, string(key), opts...))
	}
	return p
}

// settle waits until both sides of a watch have been told the same.
func (d *differ) settle(p *pair) {
	d.t.Helper()
	deadline := time.Now().Add(patience)
	for !p.failed {
		a, endedA := p.logs[0].snapshot()
		b, endedB := p.logs[1].snapshot()
		if endedA && slices.ContainsFunc(a, func(line string) bool { return strings.Contains(line, "watcher range is empty") }) {
			return // what a server says of a stream that the client has closed meanwhile, as its last watch has ended
		}
		n := min(len(a), len(b))
		if !slices.Equal(a[:n], b[:n]) || time.Now().After(deadline) {
			d.failures++
			p.failed = true
			i := 0
			for i < n && a[i] == b[i] {
				i++
			}
			d.t.Errorf("%s (ended: %v, %v): after %d lines\netcd: %.800v\nfake: %.800v", p.what, endedA, endedB, i, a[i:], b[i:])
			return
		}
		if len(a) == len(b) && len(a) > 0 && endedA == endedB {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// TestFakeAnswersAsEtcdDoes drives both with the same random operations, and compares each answer, each
// error and each event. It does so with several pairs at a time, since an etcd mostly waits.
func TestFakeAnswersAsEtcdDoes(t *testing.T) {
	const pairs = 4
	for i := range uint64(pairs) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			answersAsEtcdDoes(t, *seed*pairs+i, *operations/pairs)
		})
	}
}

func answersAsEtcdDoes(t *testing.T, seed uint64, operations int) {
	etcd, fake := twins(t)
	d := &differ{t: t, etcd: etcd, fake: fake, kinds: make(map[string]int)}
	g := &generator{rng: rand.New(rand.NewPCG(seed, 1)), revision: 1, compacted: -1}
	var pairs []*pair
	watched := 0
	var watchedLast time.Time
	quiesce := func() {
		// A watch that began in the past is told what it has missed within that time. What etcd adds to
		// events, it looks up then.
		time.Sleep(time.Until(watchedLast.Add(2 * syncInterval)))
		for _, p := range pairs {
			d.settle(p)
		}
	}
	note := func(h *pb.ResponseHeader) { g.revision = max(g.revision, h.GetRevision()) }
	for d.n < operations && d.failures < 5 {
		switch n := g.rng.IntN(1000); {
		case n < 300:
			r, _ := same(d, g.ranges(), func(s *side, ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
				return s.kv.Range(ctx, r)
			})
			note(r.GetHeader())
		case n < 480:
			r, _ := same(d, g.put(), func(s *side, ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
				return s.kv.Put(ctx, r)
			})
			note(r.GetHeader())
		case n < 560:
			r, _ := same(d, g.deletes(), func(s *side, ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
				return s.kv.DeleteRange(ctx, r)
			})
			note(r.GetHeader())
		case n < 800:
			r, _ := same(d, g.txn(maxDepth), func(s *side, ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
				return s.kv.Txn(ctx, r)
			})
			note(r.GetHeader())
		case n < 840:
			id := g.rng.Int64N(30) + 1
			ttl := pick[int64](g, 1000, 1000, 1000, 2000, maxTTL+1)
			r, err := same(d, &pb.LeaseGrantRequest{ID: id, TTL: ttl}, func(s *side, ctx context.Context, r *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
				return s.lease.LeaseGrant(ctx, r)
			})
			if err == nil {
				g.leases = append(g.leases, r.ID)
			}
		case n < 870:
			id := g.lease()
			r, _ := same(d, &pb.LeaseRevokeRequest{ID: id}, func(s *side, ctx context.Context, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
				return s.lease.LeaseRevoke(ctx, r)
			})
			note(r.GetHeader())
			if g.chance(3) { // else it is used although it is gone
				g.leases = slices.DeleteFunc(g.leases, func(other int64) bool { return other == id })
			}
		case n < 920:
			_, _ = same(d, &pb.LeaseKeepAliveRequest{ID: g.lease()}, func(s *side, ctx context.Context, r *pb.LeaseKeepAliveRequest) (*pb.LeaseKeepAliveResponse, error) {
				return s.keepAlive(ctx, r)
			})
		case n < 955:
			_, _ = same(d, &pb.LeaseTimeToLiveRequest{ID: g.lease(), Keys: g.chance(2)}, func(s *side, ctx context.Context, r *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
				return s.lease.LeaseTimeToLive(ctx, r)
			})
		case n < 975:
			_, _ = same(d, &pb.LeaseLeasesRequest{}, func(s *side, ctx context.Context, r *pb.LeaseLeasesRequest) (*pb.LeaseLeasesResponse, error) {
				return s.lease.LeaseLeases(ctx, r)
			})
		case n < 979:
			quiesce()
			revision := g.past()
			_, err := same(d, &pb.CompactionRequest{Revision: revision, Physical: g.chance(2)}, func(s *side, ctx context.Context, r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
				return s.kv.Compact(ctx, r)
			})
			if err == nil {
				g.compacted = revision
			}
		case n < 985:
			pairs = append(pairs, d.watch(g))
			watched++
			watchedLast = time.Now()
			if len(pairs) > 12 {
				i := g.rng.IntN(len(pairs))
				d.settle(pairs[i])
				pairs[i].cancel()
				pairs = slices.Delete(pairs, i, i+1)
			}
		default:
			large := &pb.PutRequest{Key: []byte("large"), Value: make([]byte, 3<<19-512*g.rng.IntN(2))}
			if g.chance(10) {
				_, _ = same(d, large, func(s *side, ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
					return s.kv.Put(ctx, r)
				})
				remove := &pb.DeleteRangeRequest{Key: large.Key} // else each range has it
				_, _ = same(d, remove, func(s *side, ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
					return s.kv.DeleteRange(ctx, r)
				})
			}
		}
	}
	quiesce()
	for _, p := range pairs {
		p.cancel()
	}
	lines := 0
	for _, p := range pairs {
		a, _ := p.logs[0].snapshot()
		lines += len(a)
	}
	t.Logf("seed %d: %d operations and %d watches compared, %d lines told to the last %d of them", seed, d.n, watched, lines, len(pairs))
	t.Log(d.kinds)
}

// keepAlive renews a lease once, over a stream of its own.
func (s *side) keepAlive(ctx context.Context, r *pb.LeaseKeepAliveRequest) (*pb.LeaseKeepAliveResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := s.lease.LeaseKeepAlive(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(r); err != nil {
		return nil, err
	}
	return stream.Recv()
}

// TestRightsAndAlarmsAreAsInEtcd compares what is denied to whom, and what a full database refuses.
func TestRightsAndAlarmsAreAsInEtcd(t *testing.T) {
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// Per cluster: clients of nobody, of a user and of root, and how to raise the alarm.
	type clients struct {
		nobody, user, root *clientv3.Client
		full               func(bool)
	}
	m := etcdtest.Start(t)
	nobody := etcdtest.NewClient(t, m.Endpoint)
	auth := nobody.Auth
	for name, password := range map[string]string{"root": "r", "u": "p"} {
		_, err := auth.UserAdd(ctx, name, password)
		must(err)
	}
	_, err := auth.UserGrantRole(ctx, "root", "root")
	must(err)
	_, err = auth.RoleAdd(ctx, "role")
	must(err)
	for prefix, right := range map[string]clientv3.PermissionType{
		"mine/": clientv3.PermissionType(clientv3.PermReadWrite), "seen/": clientv3.PermissionType(clientv3.PermRead),
	} {
		_, err = auth.RoleGrantPermission(ctx, "role", prefix, clientv3.GetPrefixRangeEnd(prefix), right)
		must(err)
	}
	_, err = auth.UserGrantRole(ctx, "u", "role")
	must(err)
	_, err = auth.AuthEnable(ctx)
	must(err)
	etcd := clients{
		nobody: nobody,
		user:   etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: "u", Password: "p"}),
		root:   etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: "root", Password: "r"}),
	}
	etcd.full = func(on bool) {
		r := &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, Alarm: pb.AlarmType_NOSPACE}
		if on {
			r.Action = pb.AlarmRequest_ACTIVATE
		}
		_, err := pb.NewMaintenanceClient(etcd.root.ActiveConnection()).Alarm(ctx, r)
		must(err)
	}

	c := realTime(t)
	p := c.Process("test", nil)
	client := func(name, password string) *clientv3.Client {
		client, err := p.NewClient(ClientConfig{Username: name, Password: password})
		must(err)
		t.Cleanup(func() { client.Close() })
		return client
	}
	fake := clients{nobody: client("", ""), full: c.NoSpace}
	_, err = fake.nobody.Get(ctx, "k") // there is a leader
	must(err)
	c.EnableAuth(time.Minute, User{Name: "root", Password: "r", Root: true}, User{Name: "u", Password: "p", Permissions: []Permission{
		{Prefix: "mine/", Read: true, Write: true}, {Prefix: "seen/", Read: true},
	}})
	for _, err = fake.nobody.Get(ctx, "k"); err == nil; _, err = fake.nobody.Get(ctx, "k") {
		time.Sleep(time.Millisecond) // it is not in force yet
	}
	fake.user, fake.root = client("u", "p"), client("root", "r")

	said := func(s clients) (all []string) {
		note := func(what string, err error) { all = append(all, fmt.Sprintf("%s: %v", what, rpctypes.Error(err))) }
		do := func(who string, client *clientv3.Client, ops ...clientv3.Op) {
			for _, op := range ops {
				_, err := client.Do(ctx, op)
				note(fmt.Sprintf("%s: %q to %q, get %v, put %v", who, op.KeyBytes(), op.RangeBytes(), op.IsGet(), op.IsPut()), err)
			}
		}
		pbLease := func(client *clientv3.Client) pb.LeaseClient { return pb.NewLeaseClient(client.ActiveConnection()) }
		leases := func(who string, client *clientv3.Client, id int64) {
			_, err := pbLease(client).LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: id, TTL: 1000})
			note(who+" grants", err)
			_, err = client.Put(ctx, "mine/leased", "", clientv3.WithLease(clientv3.LeaseID(id)))
			note(who+" attaches", err)
			_, err = client.KeepAliveOnce(ctx, clientv3.LeaseID(id))
			note(who+" renews", err)
			_, err = client.TimeToLive(ctx, clientv3.LeaseID(id), clientv3.WithAttachedKeys())
			note(who+" asks", err)
			_, err = client.Leases(ctx)
			note(who+" lists", err)
		}
		ops := func() []clientv3.Op {
			return []clientv3.Op{
				clientv3.OpGet("mine/1"), clientv3.OpGet("mine/", clientv3.WithPrefix()), clientv3.OpGet("m", clientv3.WithPrefix()),
				clientv3.OpGet("mine/", clientv3.WithFromKey()), clientv3.OpGet("mine/a", clientv3.WithRange("mine/b")),
				clientv3.OpGet("mine/", clientv3.WithRange("mine0")), clientv3.OpGet("mine/", clientv3.WithRange("mine1")),
				clientv3.OpGet("seen/1"), clientv3.OpGet("hidden"), clientv3.OpGet("hidden", clientv3.WithSerializable()),
				clientv3.OpPut("mine/1", ""), clientv3.OpPut("mine/1", "", clientv3.WithPrevKV()), clientv3.OpPut("seen/1", ""),
				clientv3.OpDelete("mine/1"), clientv3.OpDelete("seen/1"), clientv3.OpDelete("mine/", clientv3.WithPrefix(), clientv3.WithPrevKV()),
				clientv3.OpTxn([]clientv3.Cmp{clientv3.Compare(clientv3.Version("hidden"), "=", 0)}, nil, nil),
				clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpGet("mine/1")}, []clientv3.Op{clientv3.OpPut("hidden", "")}),
				clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpDelete("seen/2")}, nil)}, nil),
				clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpPut("mine/2", "")}, nil),
			}
		}
		do("nobody", s.nobody, ops()...)
		leases("nobody", s.nobody, 1)
		do("user", s.user, ops()...)
		leases("user", s.user, 2)
		do("root", s.root, ops()...)
		leases("root", s.root, 3)
		_, err := s.root.Put(ctx, "hidden", "", clientv3.WithLease(2))
		note("root attaches another key", err)
		leases("user, with a foreign key", s.user, 2)
		_, err = s.user.Revoke(ctx, 2)
		note("user revokes", err)
		_, err = s.user.Compact(ctx, 2)
		note("user compacts", err)
		for _, key := range []string{"mine/1", "seen/1", "hidden"} {
			wctx, cancel := context.WithCancel(ctx)
			watch := s.user.Watch(wctx, key, clientv3.WithCreatedNotify())
			r := <-watch
			note("user watches "+key, r.Err())
			cancel()
			// Until it is closed. A client whose watch is denied while the only other one on the stream ends
			// never ends the stream, and no watch there begins again (clientv3 3.7.3, watchGRPCStream.run).
			for range watch {
			}
		}
		s.full(true)
		for began := time.Now(); time.Since(began) < patience; time.Sleep(time.Millisecond) {
			if _, err := s.root.Put(ctx, "mine/1", ""); err != nil {
				break // the alarm is raised
			}
		}
		do("user, full", s.user, ops()...)
		leases("user, full", s.user, 4)
		s.full(false)
		return all
	}
	a, b := said(etcd), said(fake)
	refused := 0
	for i := range a {
		if !strings.HasSuffix(a[i], "<nil>") {
			refused++
		}
		if a[i] != b[i] {
			t.Errorf("etcd: %s\nfake: %s", a[i], b[i])
		}
	}
	t.Logf("%d answers compared, %d of them refusals", len(a), refused)
}

package queue

import (
	"context"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// reread is long, so that nothing but what a test is about happens before.
const reread = time.Minute

// A fakeEtcd is one in a bubble. It has keys and answers reads of them; the test creates the watches, each when and
// if it likes, and sends their events.
type fakeEtcd struct {
	clientv3.KV
	clientv3.Watcher
	client *clientv3.Client

	closed  context.Context // as the client
	close   func()
	opened  chan *fakeWatch
	running atomic.Int64 // reads, and watches that are being opened

	mu   sync.Mutex
	rev  int64
	kvs  []*mvccpb.KeyValue // by create revision
	asks []clientv3.Op      // the reads so far

	now, most struct{ key, queue int } // reads of either at a time

	// If not nil these are called in each read, before it has seen the keys and after it, and must end with ctx.
	before, after hook
	// lag is how long a request takes to end when its context has.
	lag time.Duration
}

// newEtcd returns an etcd with the candidates jobs/1 and jobs/2, whose create revisions are 5 and 6.
func newEtcd(t *testing.T) *fakeEtcd {
	e := &fakeEtcd{rev: 4, opened: make(chan *fakeWatch, 100)}
	e.closed, e.close = context.WithCancel(t.Context())
	e.client = clientv3.NewCtxClient(t.Context())
	e.client.KV, e.client.Watcher = e, e
	e.put("jobs/1", "one")
	e.put("jobs/2", "two")
	return e
}

func (e *fakeEtcd) queue() *Queue { return New(e.client, "jobs") }

// put changes a key, or creates it, and returns the event of that.
func (e *fakeEtcd) put(key, value string) *clientv3.Event { return e.putWithLease(key, value, 0) }

func (e *fakeEtcd) putWithLease(key, value string, lease int64) *clientv3.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.rev++
	kv := &mvccpb.KeyValue{
		Key: []byte(key), Value: []byte(value), Lease: lease, CreateRevision: e.rev, ModRevision: e.rev, Version: 1,
	}
	if i := e.find(key); i < 0 {
		e.kvs = append(e.kvs, kv)
	} else {
		kv.CreateRevision, kv.Version = e.kvs[i].CreateRevision, e.kvs[i].Version+1
		e.kvs[i] = kv
	}
	return &clientv3.Event{Type: clientv3.EventTypePut, Kv: kv}
}

// del deletes a key and returns the event of that.
func (e *fakeEtcd) del(key string) *clientv3.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.rev++
	i := e.find(key)
	e.kvs = slices.Delete(e.kvs, i, i+1)
	return deletion(key, e.rev)
}

func deletion(key string, rev int64) *clientv3.Event {
	return &clientv3.Event{Type: clientv3.EventTypeDelete, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: rev}}
}

func (e *fakeEtcd) find(key string) int {
	return slices.IndexFunc(e.kvs, func(kv *mvccpb.KeyValue) bool { return string(kv.Key) == key })
}

// A hook is called in a read.
type hook = func(ctx context.Context, read clientv3.Op) error

func (e *fakeEtcd) set(before, after hook) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.before, e.after = before, after
}

// until is a hook that blocks until c is closed.
func until(c <-chan struct{}) hook {
	return func(ctx context.Context, _ clientv3.Op) error {
		select {
		case <-c:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// hang lets the reads of which isSilent is true have no answer.
func (e *fakeEtcd) hang(isSilent func(clientv3.Op) bool) {
	e.set(func(ctx context.Context, read clientv3.Op) error {
		if !isSilent(read) {
			return nil
		}
		<-ctx.Done()
		return ctx.Err()
	}, nil)
}

// fail lets all reads fail, or none if err is nil.
func (e *fakeEtcd) fail(err error) {
	e.set(func(context.Context, clientv3.Op) error { return err }, nil)
}

func all(clientv3.Op) bool { return true }

// reads counts the reads so far of the key, and of the queue.
func (e *fakeEtcd) reads() (key, queue int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, op := range e.asks {
		if ofQueue(op) {
			queue++
		} else {
			key++
		}
	}
	return key, queue
}

func ofQueue(read clientv3.Op) bool {
	return len(read.RangeBytes()) > 0 && string(read.KeyBytes()) == "jobs/"
}

func (e *fakeEtcd) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return e.read(ctx, clientv3.OpGet(key, opts...))
}

func (e *fakeEtcd) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	resp, err := e.read(ctx, op)
	return resp.OpResponse(), err
}

func (e *fakeEtcd) read(ctx context.Context, op clientv3.Op) (*clientv3.GetResponse, error) {
	e.running.Add(1)
	defer e.running.Add(-1)
	now, most := &e.now.key, &e.most.key
	if ofQueue(op) {
		now, most = &e.now.queue, &e.most.queue
	}
	defer func() {
		if ctx.Err() != nil {
			time.Sleep(e.lag)
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		*now--
	}()
	e.mu.Lock()
	*now++
	*most = max(*most, *now)
	e.asks = append(e.asks, op)
	before, after := e.before, e.after
	e.mu.Unlock()
	if before != nil {
		if err := before(ctx, op); err != nil {
			return nil, err
		}
	}
	if e.closed.Err() != nil {
		return nil, context.Canceled
	}
	e.mu.Lock()
	resp := e.get(op)
	e.mu.Unlock()
	if after != nil {
		if err := after(ctx, op); err != nil {
			return nil, err
		}
	}
	return resp, ctx.Err()
}

// get answers a read, as far as this package reads.
func (e *fakeEtcd) get(op clientv3.Op) *clientv3.GetResponse {
	resp := &clientv3.GetResponse{Header: &etcdserverpb.ResponseHeader{Revision: e.rev}}
	for _, kv := range e.kvs {
		key, first, end := string(kv.Key), string(op.KeyBytes()), string(op.RangeBytes())
		if end == "" && key != first || end != "" && (key < first || key >= end) {
			continue
		}
		if newest := op.MaxCreateRev(); newest > 0 && kv.CreateRevision > newest {
			continue
		}
		if op.IsKeysOnly() {
			kv = &mvccpb.KeyValue{
				Key: kv.Key, Lease: kv.Lease,
				CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, Version: kv.Version,
			}
		}
		resp.Kvs = append(resp.Kvs, kv)
	}
	if sort := reflect.ValueOf(op).FieldByName("sort"); !sort.IsNil() &&
		clientv3.SortOrder(sort.Elem().FieldByName("Order").Int()) == clientv3.SortDescend {
		slices.Reverse(resp.Kvs)
	}
	if limit := int(op.Limit()); limit > 0 {
		resp.Kvs = resp.Kvs[:min(limit, len(resp.Kvs))]
	}
	return resp
}

func (e *fakeEtcd) Txn(context.Context) clientv3.Txn { return &fakeJoin{etcd: e} }

// A fakeJoin is a transaction that puts a key which must not be there, and that is all.
type fakeJoin struct {
	clientv3.Txn
	etcd         *fakeEtcd
	key          string
	then, orElse []clientv3.Op
}

func (j *fakeJoin) If(cs ...clientv3.Cmp) clientv3.Txn {
	j.key = string(cs[0].KeyBytes())
	return j
}

func (j *fakeJoin) Then(ops ...clientv3.Op) clientv3.Txn { j.then = ops; return j }
func (j *fakeJoin) Else(ops ...clientv3.Op) clientv3.Txn { j.orElse = ops; return j }

func (j *fakeJoin) Commit() (*clientv3.TxnResponse, error) {
	ops, absent := j.orElse, j.etcd.find(j.key) < 0
	if absent {
		ops = j.then
	}
	resp := &clientv3.TxnResponse{Succeeded: absent}
	for _, op := range ops {
		if op.IsPut() {
			lease := reflect.ValueOf(op).FieldByName("leaseID").Int()
			j.etcd.putWithLease(string(op.KeyBytes()), string(op.ValueBytes()), lease)
			resp.Responses = append(resp.Responses, &etcdserverpb.ResponseOp{})
			continue
		}
		resp.Responses = append(resp.Responses, &etcdserverpb.ResponseOp{
			Response: &etcdserverpb.ResponseOp_ResponseRange{
				ResponseRange: (*etcdserverpb.RangeResponse)(j.etcd.get(op)),
			},
		})
	}
	resp.Header = &etcdserverpb.ResponseHeader{Revision: j.etcd.rev}
	return resp, nil
}

// Close is called when the client is closed.
func (e *fakeEtcd) Close() error {
	e.close()
	return nil
}

// A fakeWatch is one watch.
type fakeWatch struct {
	ctx     context.Context
	op      clientv3.Op
	at      time.Time // when it was asked for
	created chan bool
	events  chan clientv3.WatchResponse
	lock    chan struct{} // guards what follows; a bubble's time stands still while a goroutine waits for a mutex
	ended   bool
}

// Watch opens a watch. As clientv3's does it returns when the watch is created, and closes its channel when ctx ends.
func (e *fakeEtcd) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	e.running.Add(1)
	defer e.running.Add(-1)
	w := &fakeWatch{
		ctx: ctx, op: clientv3.OpWatch(key, opts...), at: time.Now(), created: make(chan bool, 1),
		events: make(chan clientv3.WatchResponse, 1), lock: make(chan struct{}, 1),
	}
	context.AfterFunc(ctx, w.end)
	context.AfterFunc(e.closed, w.end)
	e.opened <- w
	select {
	case ok := <-w.created:
		if ok && ctx.Err() == nil {
			w.events <- clientv3.WatchResponse{Created: true}
		} else {
			w.end()
		}
	case <-e.closed.Done():
		w.end()
	case <-ctx.Done():
		time.Sleep(e.lag)
		w.end()
	}
	return w.events
}

func (w *fakeWatch) end() {
	w.lock <- struct{}{}
	defer func() { <-w.lock }()
	if !w.ended {
		w.ended = true
		close(w.events)
	}
}

// watch awaits the next watch.
func (e *fakeEtcd) watch(t *testing.T) *fakeWatch {
	t.Helper()
	select {
	case w := <-e.opened:
		return w
	case <-time.After(time.Hour):
		t.Fatal("no watch was opened")
		return nil
	}
}

// wantNoWatch checks that no other watch is being opened.
func (e *fakeEtcd) wantNoWatch(t *testing.T) {
	t.Helper()
	synctest.Wait()
	select {
	case <-e.opened:
		t.Fatal("another watch was opened")
	default:
	}
}

// create lets the watch be created, and waits until what follows has been done.
func (w *fakeWatch) create() {
	w.created <- true
	synctest.Wait()
}

// refuse ends a watch that has not been created.
func (w *fakeWatch) refuse() {
	w.created <- false
	synctest.Wait()
}

// send sends events, and waits until what follows has been done.
func (w *fakeWatch) send(t *testing.T, events ...*clientv3.Event) {
	t.Helper()
	w.lock <- struct{}{}
	if w.ended {
		t.Fatal("the watch has ended")
	}
	select {
	case w.events <- clientv3.WatchResponse{Events: events}:
	case <-time.After(time.Hour):
		t.Fatal("nobody takes the watch's events")
	}
	<-w.lock
	synctest.Wait()
}

// stream is what clientv3 tells the streams of watches by.
func (w *fakeWatch) stream() string {
	md, _ := metadata.FromOutgoingContext(w.ctx)
	return fmt.Sprint(md)
}

// A waitCall is a call that waits, in a goroutine of its own.
type waitCall struct {
	loop     *retry.Loop
	warnings int
	result   chan error
	took     time.Duration // since the call, once it has a result
}

func (e *fakeEtcd) wait(wait func(loop *retry.Loop) error) *waitCall {
	w := &waitCall{result: make(chan error, 1)}
	w.loop = &retry.Loop{Client: e.client, Warn: func(error) { w.warnings++ }}
	began := time.Now()
	go func() {
		err := wait(w.loop)
		w.took = time.Since(began)
		w.result <- err
	}()
	return w
}

// behind waits as jobs/2 for its turn.
func (e *fakeEtcd) behind(t *testing.T) *waitCall {
	return e.wait(func(loop *retry.Loop) error {
		return e.queue().Wait(t.Context(), loop, Place{Token: 6, before: "jobs/1", rev: 5}, reread, nil, nil)
	})
}

// deleted waits for the end of jobs/1.
func (e *fakeEtcd) deleted(t *testing.T) *waitCall {
	return e.wait(func(loop *retry.Loop) error {
		return e.queue().WatchOwn(t.Context(), loop, "jobs/1", 5).Wait()
	})
}

// returned awaits the result of a call. It gives up after a day of the bubble's time, since tickers would let that run
// for ever.
func returned(t *testing.T, result <-chan error) error {
	t.Helper()
	select {
	case err := <-result:
		return err
	case <-time.After(24 * time.Hour):
		t.Fatal("has not returned")
		return nil
	}
}

func (w *waitCall) wantGoingOn(t *testing.T) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-w.result:
		t.Fatalf("has returned: %v", err)
	default:
	}
}

// wantNow checks that the wait has ended, in this very moment.
func (w *waitCall) wantNow(t *testing.T) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-w.result:
		if err != nil {
			t.Fatalf("returned %v", err)
		}
	default:
		t.Fatal("has not returned")
	}
}

// An observeCall is a call of Observe in a goroutine of its own.
type observeCall struct {
	result chan error

	mu       sync.Mutex
	states   []Candidate
	warnings []error
}

// observe observes until yield, if not nil, returns false.
func (e *fakeEtcd) observe(ctx context.Context, yield func(Candidate) bool) *observeCall {
	return e.observeEvery(ctx, reread, yield)
}

func (e *fakeEtcd) observeEvery(ctx context.Context, every time.Duration, yield func(Candidate) bool) *observeCall {
	o := &observeCall{result: make(chan error, 1)}
	go func() {
		warn := func(err error) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.warnings = append(o.warnings, err)
		}
		o.result <- e.queue().Observe(ctx, warn, every, func(c Candidate) bool {
			o.mu.Lock()
			o.states = append(o.states, c)
			o.mu.Unlock()
			return yield == nil || yield(c)
		})
	}()
	return o
}

// take returns the states that were yielded since the last time.
func (o *observeCall) take() []Candidate {
	synctest.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	states := o.states
	o.states = nil
	return states
}

// want checks the values of these states.
func (o *observeCall) want(t *testing.T, values ...string) {
	t.Helper()
	var got []string
	for _, c := range o.take() {
		got = append(got, c.Value)
	}
	if !slices.Equal(got, values) {
		t.Errorf("observed %q, want %q", got, values)
	}
}

// wantOneWarning checks that there was one, as for one streak of failures.
func (o *observeCall) wantOneWarning(t *testing.T) {
	t.Helper()
	synctest.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.warnings) != 1 {
		t.Errorf("warned of %v, want one warning", o.warnings)
	}
}

// wantNoMoreReads checks that a read without an answer is not joined by others as time passes, apart from its own
// repetitions.
func (e *fakeEtcd) wantNoMoreReads(t *testing.T) {
	t.Helper()
	var most [2]struct{ key, queue int }
	for i := range most {
		time.Sleep(reread*time.Duration(1+2*i) - time.Second)
		synctest.Wait()
		e.mu.Lock()
		most[i] = e.most
		e.mu.Unlock()
	}
	if most[0] != most[1] {
		t.Errorf("reads at a time: %+v, and later %+v", most[0], most[1])
	}
}

// bubble is a subtest in a bubble.
func bubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// goroutine names the goroutine that it is called in.
func goroutine() string {
	buf := make([]byte, 64)
	name, _, _ := strings.Cut(string(buf[:runtime.Stack(buf, false)]), " [")
	return name
}

// restore takes the etcd back to a revision at which there were only these of its keys.
func (e *fakeEtcd) restore(rev int64, keys ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.rev = rev
	e.kvs = slices.DeleteFunc(e.kvs, func(kv *mvccpb.KeyValue) bool { return !slices.Contains(keys, string(kv.Key)) })
}

// tell sends a response with etcd's revision, and waits until it was received.
func (w *fakeWatch) tell(rev int64, events ...*clientv3.Event) {
	w.events <- clientv3.WatchResponse{Header: &etcdserverpb.ResponseHeader{Revision: rev}, Events: events}
	synctest.Wait()
}

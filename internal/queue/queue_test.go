package queue

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// An outage is one streak of failures, though a watch takes long to fail.
func TestOutageIsOneStreak(t *testing.T) {
	for name, wait := range map[string]func(context.Context, *Queue, *retry.Loop) error{
		"waiting": func(ctx context.Context, q *Queue, loop *retry.Loop) error {
			return q.waitDeleted(ctx, loop, target{key: "jobs/1", rev: 1, reread: time.Second})
		},
		"observing": func(ctx context.Context, q *Queue, loop *retry.Loop) error {
			return q.Observe(ctx, loop, time.Second, func(Candidate) bool { return true })
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := clientv3.NewCtxClient(t.Context())
				client.KV, client.Watcher = absent{}, absent{}
				warnings := 0
				loop := &retry.Loop{Client: client, Warn: func(error) { warnings++ }}
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
				defer cancel()
				if err := wait(ctx, New(client, "jobs"), loop); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("returned %v", err)
				}
				if warnings != 1 || !errors.Is(loop.Last(), rpctypes.ErrNoLeader) {
					t.Errorf("%d warnings, the last failure %v", warnings, loop.Last())
				}
			})
		})
	}
}

// A watch says only in words why it is refused; the read that follows says it in a way to act on.
func TestWatchThatIsRefusedIsNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := clientv3.NewCtxClient(t.Context())
		client.KV, client.Watcher = denied{}, denied{}
		err := New(client, "jobs").WaitDeleted(t.Context(), &retry.Loop{Client: client}, "jobs/1", 1)
		if !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("WaitDeleted returned %v", err)
		}
		err = New(client, "jobs").Observe(t.Context(), &retry.Loop{Client: client}, time.Second, func(Candidate) bool { return true })
		if !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("Observe returned %v", err)
		}
	})
}

// denied is an etcd that refuses everything.
type denied struct {
	clientv3.KV
	clientv3.Watcher
}

func (denied) Get(context.Context, string, ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return nil, rpctypes.ErrPermissionDenied
}

func (denied) Watch(context.Context, string, ...clientv3.OpOption) clientv3.WatchChan {
	c := make(chan clientv3.WatchResponse, 1)
	c <- clientv3.WatchResponse{Canceled: true, CancelReason: "rpc error: code = PermissionDenied desc = etcdserver: permission denied"}
	close(c)
	return c
}

// The queue is read once the watch exists, so that events may tell again what the read has told;
// and what happens in one revision happens at once.
func TestObserveTellsNothingTwiceAndNothingThatNeverWas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		put := func(key string, created, modified int64) *clientv3.Event {
			return &clientv3.Event{Type: clientv3.EventTypePut, Kv: &mvccpb.KeyValue{Key: []byte(key), CreateRevision: created, ModRevision: modified, Value: []byte(key)}}
		}
		del := func(key string, modified int64) *clientv3.Event {
			return &clientv3.Event{Type: clientv3.EventTypeDelete, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: modified}}
		}
		events := make(chan clientv3.WatchResponse, 10)
		events <- clientv3.WatchResponse{Created: true}
		events <- clientv3.WatchResponse{Events: []*clientv3.Event{
			put("jobs/1", 5, 5),                      // known already
			del("jobs/1", 11), put("jobs/2", 11, 11), // one hands over to two, in one transaction
			del("jobs/2", 12),
			put("jobs/3", 13, 13),
			put("jobs/4", 14, 14), // is no change
			put("jobs/3", 13, 15),
		}}
		client := clientv3.NewCtxClient(t.Context())
		client.KV, client.Watcher = present{rev: 10, kv: put("jobs/1", 5, 5).Kv}, present{events: events}
		var tokens []int64
		_ = New(client, "jobs").Observe(t.Context(), &retry.Loop{Client: client}, time.Hour, func(c Candidate) bool {
			tokens = append(tokens, c.Token)
			return c.Token != 13
		})
		if want := []int64{5, 11, 0, 13}; !slices.Equal(tokens, want) {
			t.Errorf("observed tokens %v, want %v", tokens, want)
		}
	})
}

// present is an etcd with one key, and with the events that it is given.
type present struct {
	clientv3.KV
	clientv3.Watcher
	rev    int64
	kv     *mvccpb.KeyValue
	events chan clientv3.WatchResponse
}

func (p present) Get(context.Context, string, ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return &clientv3.GetResponse{Header: &etcdserverpb.ResponseHeader{Revision: p.rev}, Kvs: []*mvccpb.KeyValue{p.kv}}, nil
}

func (p present) Watch(context.Context, string, ...clientv3.OpOption) clientv3.WatchChan {
	return p.events
}

// The touch may come before the watch that would tell of it.
func TestTouchBeforeTheWatchIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv := &line{touched: true}
		elected, events := wait(t, kv)
		events <- clientv3.WatchResponse{Created: true}
		synctest.Wait() // it has looked
		events <- happened(clientv3.EventTypeDelete)
		if err := <-elected; err != nil || kv.reads != 1 {
			t.Errorf("Wait returned %v after %d reads of the queue, want the look ahead alone", err, kv.reads)
		}
	})
}

// A leader may proclaim as often as it likes, and what was seen once needs no other look.
func TestLookAheadIsMadeOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv := &line{touched: true}
		elected, events := wait(t, kv)
		events <- clientv3.WatchResponse{Created: true}
		for range 10 {
			events <- happened(clientv3.EventTypePut)
			synctest.Wait()
		}
		time.Sleep(10 * reread)
		synctest.Wait()
		events <- happened(clientv3.EventTypeDelete)
		if err := <-elected; err != nil || kv.reads != 1 {
			t.Errorf("Wait returned %v after %d reads of the queue, want 1", err, kv.reads)
		}
	})
}

// Neither a read of the key nor one ahead keeps the event waiting that elects.
func TestElectionWaitsForNoRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv := &line{silent: true}
		elected, events := wait(t, kv)
		events <- clientv3.WatchResponse{Created: true}
		events <- happened(clientv3.EventTypePut)
		time.Sleep(3*reread + time.Second) // a read that takes that long is not joined by another
		synctest.Wait()
		began := time.Now()
		events <- happened(clientv3.EventTypeDelete)
		if err := <-elected; err != nil || time.Since(began) > 0 {
			t.Errorf("Wait returned %v after %v", err, time.Since(began))
		}
		if kv.most != 1 {
			t.Errorf("%d reads of the key at a time", kv.most)
		}
	})
}

const reread = time.Minute

// wait waits behind the candidate 5 of a line.
func wait(t *testing.T, kv *line) (elected <-chan error, events chan<- clientv3.WatchResponse) {
	client := clientv3.NewCtxClient(t.Context())
	watched := make(chan clientv3.WatchResponse)
	client.KV, client.Watcher = kv, present{events: watched}
	result := make(chan error)
	go func() {
		place := Place{Token: 6, before: "jobs/1", rev: 5}
		result <- New(client, "jobs").Wait(t.Context(), &retry.Loop{Client: client}, place, reread)
	}()
	return result, watched
}

// happened is what a watch of the candidate 5 tells.
func happened(kind mvccpb.Event_EventType) clientv3.WatchResponse {
	return clientv3.WatchResponse{Events: []*clientv3.Event{{Type: kind, Kv: &mvccpb.KeyValue{Key: []byte("jobs/1"), CreateRevision: 5}}}}
}

// A line is an etcd with the candidate 5, and behind it 6.
type line struct {
	clientv3.KV
	touched bool // 5 has been
	silent  bool // answers nothing but what is asked when 5 has gone
	reads   int  // of the queue

	mu        sync.Mutex
	now, most int // reads of the key at a time
}

func (l *line) Get(ctx context.Context, _ string, _ ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	l.mu.Lock()
	l.now++
	l.most = max(l.most, l.now)
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		l.now--
		l.mu.Unlock()
	}()
	if l.silent {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	version := int64(1)
	if l.touched {
		version++
	}
	return &clientv3.GetResponse{Kvs: []*mvccpb.KeyValue{{Key: []byte("jobs/1"), CreateRevision: 5, Version: version}}}, nil
}

func (l *line) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	l.reads++
	if l.silent && op.MaxCreateRev() == 5 {
		<-ctx.Done()
		return clientv3.OpResponse{}, ctx.Err()
	}
	return (&clientv3.GetResponse{Kvs: []*mvccpb.KeyValue{{CreateRevision: op.MaxCreateRev()}}}).OpResponse(), nil
}

// absent is an etcd that cannot be reached.
type absent struct {
	clientv3.KV
	clientv3.Watcher
}

func (absent) Get(context.Context, string, ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return nil, rpctypes.ErrNoLeader
}

func (absent) Watch(ctx context.Context, _ string, _ ...clientv3.OpOption) clientv3.WatchChan {
	<-ctx.Done() // as clientv3's does
	closed := make(chan clientv3.WatchResponse)
	close(closed)
	return closed
}

// A key is a candidate's if and only if it is the one that a lease would give it.
func FuzzParseKey(f *testing.F) {
	for _, seed := range [][2]string{
		{"jobs", "jobs/694d8a2b3c4d5e6f"},
		{"jobs", "jobs/1"},
		{"jobs", "jobs/7fffffffffffffff"},
		{"jobs", "jobs/8000000000000000"},
		{"jobs", "jobs/0"},
		{"jobs", "jobs/01"},
		{"jobs", "jobs/-1"},
		{"jobs", "jobs/+1"},
		{"jobs", "jobs/0x1"},
		{"jobs", "jobs/1_0"},
		{"jobs", "jobs/BEEF"},
		{"jobs", "jobs/"},
		{"jobs", "jobs/1/2"},
		{"jobs", "jobs/beef/1"},
		{"jobs", "jobs2/1"},
		{"job", "jobs/1"},
		{"a/b", "a/b/1"},
		{"", "/1"},
		{"jobs", ""},
		{"j\x00bs", "j\x00bs/1"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, name, key string) {
		q := New(nil, name)
		id, ok := q.ParseKey(key)
		if ok && (id <= 0 || q.Key(id) != key) {
			t.Errorf("in election %q the key %q is of lease %d, whose key is %q", name, key, id, q.Key(id))
		}
		if !ok && strings.HasPrefix(key, q.Prefix()) {
			for _, id := range []clientv3.LeaseID{1, 0xbeef, 1<<63 - 1} {
				if q.Key(id) == key {
					t.Errorf("in election %q the key %q of lease %d is not recognised", name, key, id)
				}
			}
		}
	})
}

func FuzzKeysOfLeasesAreCandidates(f *testing.F) {
	for _, id := range []int64{1, 9, 10, 15, 16, 0xdeadbeef, 1<<63 - 1} {
		f.Add("jobs", id)
		f.Add("a/b", id)
	}
	f.Fuzz(func(t *testing.T, name string, id int64) {
		if id <= 0 {
			t.Skip("etcd grants positive leases")
		}
		q := New(nil, name)
		if got, ok := q.ParseKey(q.Key(clientv3.LeaseID(id))); !ok || int64(got) != id {
			t.Errorf("the key %q of lease %d is taken for that of %d, %v", q.Key(clientv3.LeaseID(id)), id, got, ok)
		}
		if _, ok := New(nil, name+"/x").ParseKey(q.Key(clientv3.LeaseID(id))); ok {
			t.Errorf("the key of an election is a candidate of one below it")
		}
	})
}

package queue

import (
	"context"
	"errors"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// An outage is one streak of failures, though a watch takes long to fail.
func TestOutageIsOneStreak(t *testing.T) {
	outage := func(t *testing.T) (*clientv3.Client, context.Context) {
		client := clientv3.NewCtxClient(t.Context())
		client.KV, client.Watcher = absent{}, absent{}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		t.Cleanup(cancel)
		return client, ctx
	}
	bubble(t, "waiting", func(t *testing.T) {
		client, ctx := outage(t)
		warnings := 0
		loop := &retry.Loop{Client: client, Warn: func(error) { warnings++ }}
		err := New(client, "jobs").Wait(ctx, loop, Place{Token: 2, before: "jobs/1", rev: 1}, time.Second, nil, nil)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("returned %v", err)
		}
		if warnings != 1 || !errors.Is(loop.Last(), rpctypes.ErrNoLeader) {
			t.Errorf("%d warnings, the last failure %v", warnings, loop.Last())
		}
	})
	bubble(t, "observing", func(t *testing.T) {
		client, ctx := outage(t)
		var warnings []error
		warn := func(err error) { warnings = append(warnings, err) }
		err := New(client, "jobs").Observe(ctx, warn, time.Second, func(Candidate) bool { return true })
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("returned %v", err)
		}
		if len(warnings) != 1 || !errors.Is(warnings[0], rpctypes.ErrNoLeader) {
			t.Errorf("warned of %v, want one of %v", warnings, rpctypes.ErrNoLeader)
		}
	})
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

// A watch says only in words why it is refused; the read that follows says it in a way to act on.
func TestWatchThatIsRefusedIsNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := clientv3.NewCtxClient(t.Context())
		client.KV, client.Watcher = denied{}, denied{}
		began := time.Now()
		err := New(client, "jobs").WatchOwn(t.Context(), &retry.Loop{Client: client}, "jobs/1", 1).Wait()
		if !errors.Is(err, rpctypes.ErrPermissionDenied) || time.Since(began) > 0 {
			t.Errorf("Wait returned %v after %v", err, time.Since(began))
		}
		warn := func(err error) { t.Errorf("warned of %v", err) }
		err = New(client, "jobs").Observe(t.Context(), warn, time.Second, func(Candidate) bool { return true })
		if !errors.Is(err, rpctypes.ErrPermissionDenied) || time.Since(began) > 0 {
			t.Errorf("Observe returned %v after %v", err, time.Since(began))
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
	const reason = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
	c <- clientv3.WatchResponse{Canceled: true, CancelReason: reason}
	close(c)
	return c
}

// The reply to a join may be lost; the next one finds the key.
func TestJoinThatFindsItsKeyAdoptsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		loop := &retry.Loop{Client: e.client}
		join := e.queue().Join(3, "three")
		var places []Place
		for range 2 {
			joining, err := join(t.Context())
			if err != nil || joining.Token != 7 {
				t.Fatalf("joined: %+v, %v, want the token 7", joining, err)
			}
			place, err := e.queue().Place(t.Context(), loop, joining, 3, "three")
			if err != nil {
				t.Fatalf("Place() = %v", err)
			}
			places = append(places, place)
		}
		if want := (Place{Token: 7, before: "jobs/2", rev: 6}); places[0] != want || places[1] != want {
			t.Errorf("its places are %+v, want both %+v", places, want)
		}
	})
}

func TestJoinThatFindsTheKeyOfAnotherIsRefused(t *testing.T) {
	for name, found := range map[string]struct {
		value string
		lease int64
	}{
		"another value": {"3", 3},
		"another lease": {"three", 4},
		"no lease":      {"three", 0},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.putWithLease("jobs/3", found.value, found.lease)
			joining, err := e.queue().Join(3, "three")(t.Context())
			if err != nil || joining.Token != 7 {
				t.Fatalf("joined: %+v, %v, want the token 7", joining, err)
			}
			place, err := e.queue().Place(t.Context(), &retry.Loop{Client: e.client}, joining, 3, "three")
			if !errors.Is(err, ErrTaken) {
				t.Errorf("Place() = %+v, %v, want %v", place, err, ErrTaken)
			}
		})
	}
}

// An adopted key may be deleted before its place is known.
func TestPlaceOfAKeyThatIsGoneIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		join := e.queue().Join(3, "three")
		_, _ = join(t.Context())
		joining, _ := join(t.Context())
		e.del("jobs/3")
		_, err := e.queue().Place(t.Context(), &retry.Loop{Client: e.client}, joining, 3, "three")
		if !errors.Is(err, ErrGone) {
			t.Errorf("Place() = %v, want %v", err, ErrGone)
		}
	})
}

func TestKeyIsACandidatesIfItIsAsALeaseWouldGiveIt(t *testing.T) {
	q := New(nil, "jobs")
	for key, want := range map[string]clientv3.LeaseID{
		"jobs/1":                 1,
		"jobs/beef":              0xbeef,
		"jobs/7fffffffffffffff":  math.MaxInt64,
		"jobs/-1":                -1, // etcd grants any id that it is asked for
		"jobs/-beef":             -0xbeef,
		"jobs/-8000000000000000": math.MinInt64,
	} {
		if id, ok := q.ParseKey(key); !ok || id != want || q.Key(want) != key {
			t.Errorf("%q is of lease %d, %v, want %d, whose key is %q", key, id, ok, want, q.Key(want))
		}
	}
	for _, key := range []string{
		"jobs/0", "jobs/-0", "jobs/00", "jobs/01", "jobs/-01", "jobs/+1", "jobs/--1", "jobs/-", "jobs/BEEF",
		"jobs/-BEEF", "jobs/8000000000000000", "jobs/-8000000000000001", "jobs/0x1", "jobs/1_0", "jobs/",
		"jobs/1/2", "jobs2/1", "jobs", "",
	} {
		if id, ok := q.ParseKey(key); ok {
			t.Errorf("%q is taken for the key of lease %d", key, id)
		}
	}
}

// A key is a candidate's if and only if it is the one that a lease would give it.
func FuzzParseKey(f *testing.F) {
	for _, seed := range [][2]string{
		{"jobs", "jobs/694d8a2b3c4d5e6f"},
		{"jobs", "jobs/1"},
		{"jobs", "jobs/7fffffffffffffff"},
		{"jobs", "jobs/8000000000000000"},
		{"jobs", "jobs/-8000000000000000"},
		{"jobs", "jobs/-8000000000000001"},
		{"jobs", "jobs/0"},
		{"jobs", "jobs/-0"},
		{"jobs", "jobs/01"},
		{"jobs", "jobs/-01"},
		{"jobs", "jobs/-1"},
		{"jobs", "jobs/-beef"},
		{"jobs", "jobs/--1"},
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
		if ok && (id == 0 || q.Key(id) != key) {
			t.Errorf("in election %q the key %q is of lease %d, whose key is %q", name, key, id, q.Key(id))
		}
		if !ok && strings.HasPrefix(key, q.Prefix()) {
			for _, id := range []clientv3.LeaseID{1, 0xbeef, math.MaxInt64, -1, -0xbeef, math.MinInt64} {
				if q.Key(id) == key {
					t.Errorf("in election %q the key %q of lease %d is not recognised", name, key, id)
				}
			}
		}
	})
}

func FuzzKeysOfLeasesAreCandidates(f *testing.F) {
	for _, id := range []int64{1, 9, 10, 15, 16, 0xdeadbeef, math.MaxInt64, -1, -16, -0xdeadbeef, math.MinInt64} {
		f.Add("jobs", id)
		f.Add("a/b", id)
	}
	f.Fuzz(func(t *testing.T, name string, id int64) {
		if id == 0 {
			t.Skip("is no lease")
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

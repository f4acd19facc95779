package fake

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
)

// bubble enters a bubble, and returns what to call when all clients in it are closed.
func bubble() func() {
	leave := EnterBubble()
	return func() {
		synctest.Wait()
		leave()
	}
}

// A bench is a cluster in a bubble, a process and a client of it.
type bench struct {
	*testing.T
	c       *Cluster
	p       *Process
	client  *clientv3.Client
	history []Commit // guarded by the cluster
}

// inBubble runs a test in a bubble. It fails if anything is left running there.
func inBubble(t *testing.T, cfg Config, client ClientConfig, test func(*bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		defer bubble()()
		b := &bench{T: t}
		cfg.OnCommit = func(_ Truth, e Commit) { b.history = append(b.history, e) }
		b.c = New(cfg)
		defer b.c.Stop()
		time.Sleep(time.Second) // there is a leader, and all know it
		b.p = b.c.Process("p", nil)
		b.client = b.newClient(b.p, client)
		defer b.client.Close()
		test(b)
	})
}

// commits are all up to now.
func (b *bench) commits() (commits []Commit) {
	b.c.Inspect(func(Truth) { commits = slices.Clone(b.history) })
	return commits
}

func (b *bench) newClient(p *Process, cfg ClientConfig) *clientv3.Client {
	b.Helper()
	client, err := p.NewClient(cfg)
	if err != nil {
		b.Fatal(err)
	}
	return client
}

// leader waits for a leader and returns it.
func (b *bench) leader() (leader int) {
	b.Helper()
	for range 100 {
		ok := false
		b.c.Inspect(func(t Truth) { leader, _, ok = t.Leader() })
		if ok {
			return leader
		}
		time.Sleep(100 * time.Millisecond)
	}
	b.Fatal("no leader")
	return 0
}

// followers are the other members.
func (b *bench) followers() []int {
	leader := b.leader()
	var others []int
	for i := range b.c.members {
		if i != leader {
			others = append(others, i)
		}
	}
	return others
}

// within returns a context that ends after a while.
func (b *bench) within(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(b.Context(), d)
	b.Cleanup(cancel)
	return ctx
}

func (b *bench) put(key, value string, opts ...clientv3.OpOption) *clientv3.PutResponse {
	b.Helper()
	r, err := b.client.Put(b.within(patience), key, value, opts...)
	if err != nil {
		b.Fatalf("put %s: %v", key, err)
	}
	return r
}

func (b *bench) value(key string) string {
	b.Helper()
	r, err := b.client.Get(b.within(patience), key)
	if err != nil {
		b.Fatalf("get %s: %v", key, err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

func (b *bench) grant(ttl int64) clientv3.LeaseID {
	b.Helper()
	l, err := b.client.Grant(b.within(patience), ttl)
	if err != nil {
		b.Fatalf("grant: %v", err)
	}
	return l.ID
}

// all does something with all links of the process.
func (b *bench) all(do func(*Link)) {
	for _, l := range b.p.links {
		do(l)
	}
}

func (b *bench) puts(key string) (n int) {
	for _, e := range b.commits() {
		if r, ok := e.Request.(*pb.PutRequest); ok && string(r.Key) == key && e.Err == nil {
			n++
		}
	}
	return n
}

func TestRequestOnADarkLinkArrivesAfterItsCallerHasGivenUp(t *testing.T) {
	for _, late := range []float64{1, -1} {
		t.Run(fmt.Sprint(late), func(t *testing.T) {
			inBubble(t, Config{LateRequests: late}, ClientConfig{}, func(b *bench) {
				b.put("k", "1")
				b.all(func(l *Link) { l.Dark(true, false) })
				if _, err := b.client.Put(b.within(time.Second), "k", "2"); !errors.Is(err, context.DeadlineExceeded) {
					b.Errorf("put on a dark link: %v", err)
				}
				if n := b.puts("k"); n != 1 {
					b.Errorf("%d puts while the link was dark", n)
				}
				b.all(func(l *Link) { l.Dark(false, false) })
				time.Sleep(time.Second)
				if n := b.puts("k"); n != 1 && late < 0 || n != 2 && late > 0 {
					b.Errorf("%d puts when it was light again", n)
				}
			})
		})
	}
}

func TestAnswerOnADarkLinkIsLate(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		b.put("k", "1")
		b.all(func(l *Link) { l.Dark(false, true) })
		began := time.Now()
		time.AfterFunc(3*time.Second, func() {
			if n := b.puts("k"); n != 2 {
				b.Errorf("%d puts when it was light again", n)
			}
			b.all(func(l *Link) { l.Dark(false, false) })
		})
		b.put("k", "2")
		if took := time.Since(began); took < 3*time.Second || took > 3100*time.Millisecond {
			b.Errorf("answered after %v", took)
		}
	})
}

func TestMessagesAreLostDoubledAndLate(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		b.put("k", "1")
		b.all(func(l *Link) { l.Messages(0, 1, 0, 0) })
		b.put("k", "2")
		time.Sleep(time.Second)
		if n := b.puts("k"); n != 3 {
			b.Errorf("%d puts, one of them doubled", n)
		}
		commits := b.commits()
		if a, z := commits[len(commits)-2], commits[len(commits)-1]; a.Call != z.Call || a.Process != "p" {
			b.Errorf("the doubled request has numbers %d and %d", a.Call, z.Call)
		}
		b.all(func(l *Link) { l.Messages(1, 0, 0, 0) })
		if _, err := b.client.Put(b.within(time.Second), "k", "3"); !errors.Is(err, context.DeadlineExceeded) {
			b.Errorf("put that is lost: %v", err)
		}
		b.all(func(l *Link) { l.Messages(0, 0, 1, 10*time.Second) })
		began := time.Now()
		b.put("k", "4")
		if took := time.Since(began); took < time.Second {
			b.Errorf("late messages took %v", took)
		}
		if n := b.puts("k"); n != 4 {
			b.Errorf("%d puts in the end", n)
		}
	})
}

func TestLostAnswerLeavesTheRequestCarriedOut(t *testing.T) {
	carriedOut := 0
	for seed := range uint64(20) {
		inBubble(t, Config{Seed: seed}, ClientConfig{}, func(b *bench) {
			b.put("k", "1")
			b.all(func(l *Link) { l.Messages(0.5, 0, 0, 0) })
			_, err := b.client.Put(b.within(time.Second), "k", "2")
			if n := b.puts("k"); n == 2 && err != nil {
				carriedOut++
			} else if n == 1 && err == nil {
				b.Error("answered, and not carried out")
			}
		})
	}
	if carriedOut == 0 {
		t.Error("no answer was lost in 20 tries")
	}
}

func TestCallsGoRoundAllMembersThatAreConnected(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		asked := func() map[uint64]int {
			members := make(map[uint64]int)
			for range 300 {
				r, err := b.client.Get(b.within(patience), "k")
				if err != nil {
					b.Fatal(err)
				}
				members[r.Header.MemberId]++
			}
			return members
		}
		b.put("k", "1")
		time.Sleep(time.Second) // all are connected
		if m := asked(); m[1] != 100 || m[2] != 100 || m[3] != 100 {
			b.Errorf("members were asked %v times", m)
		}
		b.p.Link(1).Refuse(true)
		time.Sleep(time.Second)
		if m := asked(); m[1] < 148 || m[2] != 0 || m[3] < 148 {
			b.Errorf("members were asked %v times while the second was down", m)
		}
	})
}

func TestBackOffOfAConnectionGrowsAndCanBeReset(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{Endpoints: []int{0}}, func(b *bench) {
		b.put("k", "1")
		l := b.p.Link(0)
		l.Refuse(true)
		time.Sleep(10 * time.Minute)
		for last := b.p.Counters().Dials; b.p.Counters().Dials == last; { // the next attempt is far away then
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(100 * time.Millisecond)
		l.Refuse(false)
		_, err := b.client.Get(b.within(5*time.Second), "k")
		if !errors.Is(err, context.DeadlineExceeded) {
			b.Errorf("5 s after an outage of 10 minutes: %v", err)
		}
		if s := b.client.ActiveConnection().GetState(); s != connectivity.TransientFailure {
			b.Errorf("state %v", s)
		}
		b.client.ActiveConnection().ResetConnectBackoff()
		if _, err := b.client.Get(b.within(5*time.Second), "k"); err != nil {
			b.Errorf("with the back-off reset: %v", err)
		}
		dials := b.p.Counters().Dials
		if dials < 8 || dials > 20 {
			b.Errorf("dialled %d times", dials)
		}
	})
}

func TestKeepaliveFindsAConnectionThatHasDiedWithoutASign(t *testing.T) {
	alter := func(cfg *clientv3.Config) {
		cfg.DialKeepAliveTime, cfg.DialKeepAliveTimeout, cfg.PermitWithoutStream = 10*time.Second, 2*time.Second, true
	}
	inBubble(t, Config{}, ClientConfig{Alter: alter}, func(b *bench) {
		b.put("k", "1")
		time.Sleep(time.Minute)
		if n := b.p.Counters().Dials; n != 3 {
			b.Errorf("dialled %d times although pings are answered", n)
		}
		b.p.Link(2).Dark(true, true)
		time.Sleep(13 * time.Second)
		b.c.Inspect(func(Truth) {
			if len(b.p.Link(2).conns) != 0 {
				b.Error("the dead connection is still open")
			}
		})
	})
}

func TestResetFailsCallsThatWait(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		b.put("k", "1")
		b.all(func(l *Link) { l.Dark(false, true) })
		time.AfterFunc(time.Second, func() { b.all((*Link).Reset) })
		_, err := b.client.Put(b.within(patience), "k", "2")
		if status.Code(err) != codes.Unavailable {
			b.Errorf("put on a connection that was reset: %v", err)
		}
		b.all(func(l *Link) { l.Dark(false, false) })
		b.put("k", "3")
	})
}

// events reads events of a watch until there are so many.
func (b *bench) events(w clientv3.WatchChan, n int) (events []*clientv3.Event) {
	b.Helper()
	deadline := time.After(patience)
	for len(events) < n {
		select {
		case r := <-w:
			if r.Err() != nil {
				b.Fatalf("watch: %v", r.Err())
			}
			events = append(events, r.Events...)
		case <-deadline:
			b.Fatalf("%d events of %d", len(events), n)
		}
	}
	return events
}

func TestWatchLosesNothingWhenItsConnectionBreaks(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		w := b.client.Watch(b.Context(), "k", clientv3.WithCreatedNotify())
		<-w
		for i := range 20 {
			b.put("k", fmt.Sprint(i))
			b.all((*Link).Reset)
			time.Sleep(50 * time.Millisecond)
		}
		for i, ev := range b.events(w, 20) {
			if string(ev.Kv.Value) != fmt.Sprint(i) {
				b.Errorf("event %d is %v", i, ev)
			}
		}
	})
}

func TestDeafWatchIsToldNothingUntilItIsBroken(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		w := b.client.Watch(b.Context(), "k", clientv3.WithCreatedNotify())
		<-w
		b.p.Deafen()
		b.put("k", "1")
		later := b.client.Watch(b.Context(), "k", clientv3.WithCreatedNotify())
		if r := <-later; !r.Created {
			b.Errorf("a watch on a deaf stream: %v", r)
		}
		b.put("k", "2")
		select {
		case r := <-w:
			b.Errorf("a deaf watch was told %v", r)
		case <-time.After(time.Minute):
		}
		b.p.Undeafen()
		b.events(w, 2)
		b.events(later, 1)
	})
}

func TestPausedMemberAnswersWhenItGoesOn(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{Endpoints: []int{0}}, func(b *bench) {
		b.put("k", "1")
		b.c.Pause(0)
		began := time.Now()
		time.AfterFunc(3*time.Second, func() { b.c.Resume(0) })
		if v := b.value("k"); v != "1" {
			b.Errorf("value %q", v)
		}
		if took := time.Since(began); took < 3*time.Second {
			b.Errorf("answered after %v", took)
		}
	})
}

func TestKilledMemberIsNotAsked(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		b.put("k", "1")
		killed := b.leader()
		b.c.Kill(killed)
		next := b.leader()
		if next == killed {
			b.Fatal("the killed member leads")
		}
		for i := range 30 {
			b.put("k", fmt.Sprint(i))
		}
		b.c.Start(killed)
		time.Sleep(3 * time.Second)
		b.c.Inspect(func(t Truth) {
			if t.Member(killed).Revision != t.Member(next).Revision {
				b.Errorf("the member that was started again is at %v, others at %v", t.Member(killed), t.Member(next))
			}
		})
	})
}

func TestStreamsThatWantALeaderEndWithoutOne(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{Endpoints: []int{0}}, func(b *bench) {
		ctx := clientv3.WithRequireLeader(b.Context())
		with := b.client.Watch(ctx, "k", clientv3.WithCreatedNotify())
		without := b.client.Watch(b.Context(), "k", clientv3.WithCreatedNotify())
		<-with
		<-without
		began := time.Now()
		b.c.Kill(1)
		b.c.Kill(2)
		r := <-with
		if took := time.Since(began); !errors.Is(r.Err(), rpctypes.ErrNoLeader) || took < 3*time.Second || took > 7*time.Second {
			b.Errorf("after %v: %v", took, r.Err())
		}
		if _, err := b.client.Get(clientv3.WithRequireLeader(b.within(time.Second)), "k"); !errors.Is(err, rpctypes.ErrNoLeader) && !errors.Is(err, context.DeadlineExceeded) {
			b.Errorf("read that wants a leader: %v", err)
		}
		select {
		case r := <-without:
			b.Errorf("a watch that wants no leader: %v", r)
		case <-time.After(time.Minute):
		}
	})
}

func TestGateIsCalledAroundEachMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer bubble()()
		c := New(Config{})
		defer c.Stop()
		var calls atomic.Int64
		var closed sync.RWMutex // whoever is to wait at the gate locks it
		p := c.Process("p", func() {
			calls.Add(1)
			closed.RLock()
			defer closed.RUnlock()
		})
		client, err := p.NewClient(ClientConfig{Endpoints: []int{0}})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		time.Sleep(time.Second)
		if _, err := client.Get(t.Context(), "k"); err != nil {
			t.Fatal(err)
		}
		if n := calls.Load(); n != 3 { // to dial, before and after
			t.Errorf("the gate was called %d times", n)
		}
		closed.Lock()
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			_, _ = client.Get(t.Context(), "k")
		}()
		for calls.Load() == 3 {
			runtime.Gosched() // waiting for a mutex is not durable, so time stands still
		}
		if n := p.Counters().Requests["Range"]; n != 1 {
			t.Errorf("%d requests were sent behind a closed gate", n-1)
		}
		closed.Unlock()
		<-answered
	})
}

func TestKilledProcessIsNotHeardOfAgain(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		b.put("k", "1")
		b.p.Kill()
		if _, err := b.client.Put(b.within(time.Minute), "k", "2"); err == nil {
			b.Error("a killed process was answered")
		}
		if n := b.puts("k"); n != 1 {
			b.Errorf("%d puts", n)
		}
	})
}

func TestOperatorNeedsNoLink(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		id := b.grant(60)
		b.put("a", "1", clientv3.WithLease(id))
		b.put("b", "1")
		b.put("c", "1")
		b.all(func(l *Link) { l.Refuse(true) })
		o := b.c.Operator()
		if _, err := o.Delete(b.Context(), "b", "c"); err != nil {
			b.Error(err)
		}
		if err := o.Revoke(b.Context(), int64(id)); err != nil {
			b.Error(err)
		}
		if err := o.Revoke(b.Context(), int64(id)); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			b.Errorf("revoked twice: %v", err)
		}
		rev, err := o.Put(b.Context(), "d", "1", 0)
		if err != nil || rev != 7 {
			b.Errorf("put at %d: %v", rev, err)
		}
		if err := o.Compact(b.Context(), rev); err != nil {
			b.Error(err)
		}
		b.c.Inspect(func(t Truth) {
			if kvs := t.Keys(""); len(kvs) != 1 || string(kvs[0].Key) != "d" {
				b.Errorf("keys %v", kvs)
			}
			if _, compacted := t.Revision(); compacted != rev || len(t.Leases()) != 0 {
				b.Errorf("compacted to %d, leases %v", compacted, t.Leases())
			}
		})
		commits := b.commits()
		if last := commits[len(commits)-1]; last.Process != OperatorName {
			b.Errorf("the last commit is %v's", last.Process)
		}
		if i := slices.IndexFunc(commits, func(e Commit) bool { return len(e.Events) == 2 }); i < 0 {
			b.Error("no commit deleted two keys")
		}
	})
}

func TestLargeAnswersEndCallsThatDoNotTakeThem(t *testing.T) {
	alter := func(cfg *clientv3.Config) { cfg.MaxCallSendMsgSize, cfg.MaxCallRecvMsgSize = 1<<16, 1<<16 }
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		small := b.newClient(b.p, ClientConfig{Alter: alter})
		defer small.Close()
		w := small.Watch(b.Context(), "k", clientv3.WithCreatedNotify())
		<-w
		large := string(make([]byte, 1<<17))
		b.put("k", large)
		if _, err := small.Get(b.Context(), "k"); status.Code(err) != codes.ResourceExhausted {
			b.Errorf("a large answer: %v", err)
		}
		if _, err := small.Put(b.Context(), "k", large); status.Code(err) != codes.ResourceExhausted {
			b.Errorf("a large request: %v", err)
		}
		if r := <-w; r.Err() == nil {
			b.Errorf("a large event: %v", r)
		}
	})
}

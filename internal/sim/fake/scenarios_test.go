//go:build linux

package fake

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/etcdtest"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestMain(m *testing.M) {
	etcdtest.Main()
	os.Exit(m.Run())
}

// A stage is where a scenario is played: a cluster of real members, each a process, or a fake one in a
// bubble.
type stage struct {
	testing.TB
	members int
	client  func(members ...int) *clientv3.Client
	pause   func(int)
	resume  func(int)
	kill    func(int)
	start   func(int)

	clients []*clientv3.Client
	seen    []string // what was observed, without times
}

func (s *stage) note(format string, args ...any) {
	s.seen = append(s.seen, fmt.Sprintf(format, args...))
}

// A scenario is played on both stages.
type scenario struct {
	name  string
	luck  string // what is observed now and then
	tries int    // with real members, at most, until it is
	play  func(*stage)
}

var scenarios = []scenario{
	{name: "terms", play: playTerms},
	{name: "promotion", play: playPromotion},
	{name: "lagging watch", luck: "the watch began in the past", tries: 10, play: playLaggingWatch},
	{name: "deposed acknowledgement", luck: "acknowledged in the old term", tries: 8, play: playDeposedAcknowledgement},
	{name: "early revocation", luck: "revoked early", tries: 4, play: playEarlyRevocation},
	{name: "no quorum", play: playNoQuorum},
}

// TestScenariosGoAsWithRealMembers plays each scenario with fake members, for many seeds, and with real
// ones. What is seen with real ones must be seen with the fake too. What takes luck must be seen with
// the fake at least.
func TestScenariosGoAsWithRealMembers(t *testing.T) {
	fakes := make([]map[string]int, len(scenarios)) // what was seen, and how often
	for i, sc := range scenarios {
		fakes[i] = make(map[string]int)
		lucky := false
		for seed := range uint64(50) {
			seen := playWithFakes(t, sc, seed)
			fakes[i][seen]++
			lucky = lucky || strings.Contains(seen, sc.luck)
		}
		if !lucky {
			t.Errorf("%s: the fake never had %q", sc.name, sc.luck)
		}
	}
	for i, sc := range scenarios {
		t.Run(strings.ReplaceAll(sc.name, " ", "-"), func(t *testing.T) {
			t.Parallel() // they mostly wait
			members := etcdtest.StartProcesses(t, 3)
			lucky := false
			for range max(1, sc.tries) {
				seen := playWithProcesses(t, sc, members)
				if fakes[i][seen] == 0 {
					t.Errorf("etcd:\n%s\nfake, that many times each: %v", seen, fakes[i])
				}
				if lucky = strings.Contains(seen, sc.luck); lucky {
					break
				}
			}
			t.Logf("fake: %v", fakes[i])
			if !lucky {
				t.Logf("etcd did not have %q in %d tries", sc.luck, sc.tries)
			}
		})
	}
}

// playWithFakes plays a scenario in a bubble and returns what was seen.
func playWithFakes(t *testing.T, sc scenario, seed uint64) (seen string) {
	synctest.Test(t, func(t *testing.T) {
		defer bubble()()
		c := New(Config{Seed: seed, TickInterval: 50 * time.Millisecond}) // as etcdtest
		defer c.Stop()
		s := &stage{TB: t, members: 3, pause: c.Pause, resume: c.Resume, kill: c.Kill, start: c.Start}
		p := c.Process("test", nil)
		s.client = func(members ...int) *clientv3.Client {
			client, err := p.NewClient(ClientConfig{Endpoints: members})
			s.must(err)
			s.clients = append(s.clients, client)
			return client
		}
		defer s.close()
		sc.play(s)
		seen = strings.Join(s.seen, "\n")
	})
	return seen
}

// playWithProcesses plays a scenario with real members and returns what was seen.
func playWithProcesses(t *testing.T, sc scenario, members []*etcdtest.Member) (seen string) {
	s := &stage{TB: t, members: len(members)}
	do := func(f func(*etcdtest.Member) error) func(int) {
		return func(i int) { s.must(f(members[i])) }
	}
	s.pause, s.resume = do((*etcdtest.Member).Pause), do((*etcdtest.Member).Resume)
	s.kill = do(func(m *etcdtest.Member) error { m.Stop(); return nil })
	s.start = do((*etcdtest.Member).Start)
	s.client = func(of ...int) *clientv3.Client {
		var endpoints []string
		for _, i := range of {
			endpoints = append(endpoints, members[i].Endpoint)
		}
		client := etcdtest.NewClient(t, endpoints...)
		s.clients = append(s.clients, client)
		return client
	}
	defer s.close()
	sc.play(s)
	return strings.Join(s.seen, "\n")
}

func (s *stage) close() {
	for _, client := range s.clients {
		client.Close()
	}
}

func (s *stage) ctx(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	s.Cleanup(cancel)
	return ctx
}

// status is what a member says of itself.
func (s *stage) status(client *clientv3.Client) *pb.StatusResponse {
	r, err := pb.NewMaintenanceClient(client.ActiveConnection()).Status(s.ctx(patience), &pb.StatusRequest{})
	if err != nil {
		s.Fatal(err)
	}
	return r
}

// leader waits until some members agree on who leads, and returns it.
func (s *stage) leader(ask ...int) int {
	s.Helper()
	clients := make([]*clientv3.Client, s.members)
	for i := range clients {
		clients[i] = s.client(i)
		defer clients[i].Close()
	}
	for began := time.Now(); time.Since(began) < patience; time.Sleep(20 * time.Millisecond) {
		ids := make(map[uint64]int)
		var leaders []uint64
		for _, i := range ask {
			r := s.status(clients[i])
			ids[r.Header.MemberId] = i
			leaders = append(leaders, r.Leader)
		}
		if slices.Min(leaders) == slices.Max(leaders) {
			if i, ok := ids[leaders[0]]; ok {
				return i
			}
		}
	}
	s.Fatal("no leader")
	return 0
}

func others(members, than int) (others []int) {
	for i := range members {
		if i != than {
			others = append(others, i)
		}
	}
	return others
}

func (s *stage) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// put puts a key, again if that fails: it may meet a leader that was killed.
func (s *stage) put(client *clientv3.Client, key, value string) *clientv3.PutResponse {
	s.Helper()
	for began := time.Now(); ; {
		r, err := client.Put(s.ctx(patience), key, value)
		if err == nil {
			return r
		}
		if time.Since(began) > patience {
			s.Fatal(err)
		}
	}
}

// playTerms: the term in headers is that of what the answering member has applied. It grows with each
// leader.
func playTerms(s *stage) {
	old := s.leader(0, 1, 2)
	rest := others(s.members, old)
	client := s.client(rest...)
	before := s.put(client, "k", "1")
	lease, err := client.Grant(s.ctx(patience), 60)
	s.must(err)
	s.kill(old)
	s.leader(rest...)
	ack, err := client.KeepAliveOnce(s.ctx(patience), lease.ID)
	s.must(err)
	r, err := client.Get(s.ctx(patience), "k")
	s.must(err)
	w, err := client.Get(s.ctx(patience), "k", clientv3.WithSerializable())
	s.must(err)
	s.note("put, read, local read: %v", []bool{
		r.Header.RaftTerm > before.Header.RaftTerm, ack.RaftTerm <= r.Header.RaftTerm, w.Header.RaftTerm >= before.Header.RaftTerm,
	})
	after := s.put(client, "k", "2")
	s.note("put again: %v", after.Header.RaftTerm == r.Header.RaftTerm)
	s.start(old)
	s.leader(0, 1, 2)
	back := s.client(old)
	r, err = back.Get(s.ctx(patience), "k")
	s.must(err)
	s.note("the old leader: %s, in a term as new: %v", r.Kvs[0].Value, r.Header.RaftTerm >= after.Header.RaftTerm)
}

// playPromotion: a new leader gives a lease its whole TTL.
func playPromotion(s *stage) {
	old := s.leader(0, 1, 2)
	rest := others(s.members, old)
	client := s.client(rest...)
	lease, err := client.Grant(s.ctx(patience), 30)
	s.must(err)
	time.Sleep(4 * time.Second)
	before, err := client.TimeToLive(s.ctx(patience), lease.ID)
	s.must(err)
	s.pause(old)
	s.leader(rest...)
	after, err := client.TimeToLive(s.ctx(patience), lease.ID)
	s.must(err)
	s.resume(old)
	s.leader(0, 1, 2)
	s.note("granted %d, less later %v, more after the election %v", lease.TTL, before.TTL <= 26, after.TTL >= 29)
}

// playLaggingWatch: a watch that begins now, at a member that lags, is told what was before.
func playLaggingWatch(s *stage) {
	leader := s.leader(0, 1, 2)
	slow := others(s.members, leader)[0]
	client := s.client(others(s.members, slow)...)
	lagging := s.client(slow)
	s.put(client, "k", "1")
	_, err := lagging.Get(s.ctx(patience), "k")
	s.must(err)
	watch := lagging.Watch(s.ctx(patience), "k", clientv3.WithCreatedNotify())
	<-watch
	s.pause(slow)
	deleted, err := client.Delete(s.ctx(patience), "k")
	s.must(err)
	created := s.put(client, "k", "2")
	began := make(chan clientv3.WatchChan, 1)
	go func() { // it is not before the member answers, and on a stream of its own
		began <- lagging.Watch(clientv3.WithRequireLeader(s.ctx(patience)), "k", clientv3.WithCreatedNotify())
	}()
	time.Sleep(100 * time.Millisecond)
	s.resume(slow)
	late := <-began
	var values []string
	for len(values) < 2 {
		r, open := <-watch
		if s.must(r.Err()); !open {
			s.Fatal("the watch has ended")
		}
		for _, ev := range r.Events {
			values = append(values, fmt.Sprint(ev.Type, string(ev.Kv.Value)))
		}
	}
	s.note("the watch from before: %v", values)
	first := <-late
	if s.must(first.Err()); !first.Created {
		s.Fatalf("%v", first)
	}
	if at := first.Header.Revision; at < created.Header.Revision {
		s.note("the watch began in the past")
		r := <-late
		s.must(r.Err())
		s.note("and is told of what came then: %v", r.Events[0].Kv.ModRevision == at+1 && at+1 >= deleted.Header.Revision)
	} else {
		s.note("the watch began in the present")
	}
}

// playDeposedAcknowledgement: a leader that was paused and deposed acknowledges a renewal that its
// successor knows nothing of. A linearizable read after that is not answered in the same term.
func playDeposedAcknowledgement(s *stage) {
	old := s.leader(0, 1, 2)
	rest := others(s.members, old)
	client := s.client(old)
	lease, err := client.Grant(s.ctx(patience), 60)
	s.must(err)
	acks, err := client.KeepAlive(s.ctx(patience), lease.ID)
	s.must(err)
	term := (<-acks).RaftTerm
	witness := s.client(rest...)
	s.pause(old)
	next := s.leader(rest...)
	_ = next
	time.Sleep(2 * time.Second)
	before, err := witness.TimeToLive(s.ctx(patience), lease.ID)
	s.must(err)
	answered := make(chan *clientv3.LeaseKeepAliveResponse, 1)
	go func() {
		ack, _ := client.KeepAliveOnce(s.ctx(patience), lease.ID)
		answered <- ack
	}()
	time.Sleep(time.Second)
	s.resume(old)
	ack := <-answered
	r, err := client.Get(s.ctx(patience), "k")
	s.must(err)
	after, err := witness.TimeToLive(s.ctx(patience), lease.ID)
	s.must(err)
	s.leader(0, 1, 2)
	switch {
	case ack == nil:
		s.note("not acknowledged")
	case after.TTL < before.TTL:
		s.note("acknowledged in the old term: %v; the read in a newer: %v", ack.RaftTerm == term, r.Header.RaftTerm > term)
	default:
		s.note("acknowledged and renewed")
	}
}

// playEarlyRevocation: a leader that was paused and deposed revokes a lease that its successor has
// renewed.
func playEarlyRevocation(s *stage) {
	old := s.leader(0, 1, 2)
	client := s.client(others(s.members, old)...)
	lease, err := client.Grant(s.ctx(patience), 3)
	s.must(err)
	s.pause(old)
	s.leader(others(s.members, old)...)
	for range 10 {
		time.Sleep(500 * time.Millisecond)
		_, err := client.KeepAliveOnce(s.ctx(patience), lease.ID)
		s.must(err)
	}
	s.resume(old)
	early := false
	for range 8 {
		time.Sleep(250 * time.Millisecond)
		if _, err := client.KeepAliveOnce(s.ctx(patience), lease.ID); errors.Is(err, rpctypes.ErrLeaseNotFound) {
			early = true
			break
		}
	}
	if early {
		s.note("revoked early")
	} else {
		s.note("kept")
		_, err := client.Revoke(s.ctx(patience), lease.ID)
		s.must(err)
	}
	s.leader(0, 1, 2)
}

// playNoQuorum: what a member without a leader answers.
func playNoQuorum(s *stage) {
	s.leader(0, 1, 2)
	client := s.client(0)
	s.put(client, "k", "1")
	lease, err := client.Grant(s.ctx(patience), 60)
	s.must(err)
	s.kill(1)
	s.kill(2)
	time.Sleep(4 * time.Second)
	kind := func(err error) string {
		switch {
		case err == nil:
			return "done"
		case errors.Is(err, rpctypes.ErrNoLeader):
			return "no leader"
		case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.DeadlineExceeded:
			return "no answer" // a member knows the deadline too, and may be the first to say so
		}
		return err.Error()
	}
	_, err = client.Revoke(s.ctx(time.Second), lease.ID)
	s.note("revoke: %s", kind(err))
	_, err = client.Get(s.ctx(time.Second), "k")
	s.note("read: %s", kind(err))
	_, err = client.Get(s.ctx(time.Second), "k", clientv3.WithSerializable())
	s.note("local read: %s", kind(err))
	_, err = client.KeepAliveOnce(s.ctx(time.Second), lease.ID)
	s.note("renewal: %s", kind(err))
	_, err = client.KeepAliveOnce(clientv3.WithRequireLeader(s.ctx(patience)), lease.ID)
	s.note("renewal that wants a leader: %s", kind(err))
	_, err = client.Put(clientv3.WithRequireLeader(s.ctx(patience)), "k", "2")
	s.note("put that wants a leader: %s", kind(err))
	r := <-client.Watch(clientv3.WithRequireLeader(s.ctx(patience)), "k")
	s.note("watch that wants a leader: %s", kind(r.Err()))
	s.start(1)
	s.start(2)
	s.leader(0, 1, 2)
	left, err := client.TimeToLive(s.ctx(patience), lease.ID)
	s.must(err)
	s.note("the lease lives: %v", left.TTL > 0)
}

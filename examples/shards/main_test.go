//go:build unix

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "-process" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// And nobody works on a shard that another leads.
func TestShardsAreSharedEvenlyAgain(t *testing.T) {
	m := etcdtest.Start(t)
	client := etcdtest.NewClient(t, m.Endpoint)
	elector, err := leader.New(client, leader.WithPrefix("shards"))
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		change func(*shards) error
		times  int // that a shard may move which has to
	}{
		"after a process has joined, in the fewest moves": {(*shards).join, 1},
		"after a process was killed":                      {(*shards).kill, 2}, // to the next in line, and on
		"after a process has left":                        {(*shards).leave, 2},
	} {
		t.Run(what, func(t *testing.T) {
			s := newShards(config{endpoints: m.Endpoint, ttl: 15 * time.Second, shards: 20, processes: 3})
			defer s.stopAll()
			if err := s.startFirst(); err != nil {
				t.Fatal(err)
			}
			if _, _, err := s.settle(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := c.change(s); err != nil {
				t.Fatal(err)
			}
			revokeLeasesOfTheDead(t, s, client, elector)
			moves, least, err := s.settle(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			wantLeadersToWork(t, s, elector)
			if least < 5 || moves < least || moves > c.times*least {
				t.Errorf("%d moves, and the least possible is %d", moves, least)
			}
			s.stopAll()
			if err := s.check(); err != nil {
				t.Error(err)
			}
			wantNothingLeft(t, client)
		})
	}
}

// revokeLeasesOfTheDead does what etcd does when they expire.
func revokeLeasesOfTheDead(t *testing.T, s *shards, client *clientv3.Client, elector *leader.Elector) {
	t.Helper()
	queue, err := elector.Candidates(t.Context(), "balancer")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range queue {
		if s.procs[c.Value] == nil {
			if _, err := client.Revoke(t.Context(), c.Lease); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// wantLeadersToWork waits until those who work on the shards are those who lead them.
func wantLeadersToWork(t *testing.T, s *shards, elector *leader.Elector) {
	t.Helper()
	for {
		works, _ := s.leaders()
		leads := ""
		for shard := range s.shards {
			c, _ := elector.Current(t.Context(), election(shard)) // after an error it is nobody
			leads += c.Value
		}
		if leads == works {
			return
		}
		select { // a transfer may be under way
		case e := <-s.events:
			s.handle(e)
		case <-time.After(etcdtest.Patience):
			t.Fatalf("%s work on the shards, and %s lead them", works, leads)
		}
	}
}

// wantNothingLeft waits until etcd is empty: at once, or when leases have expired if etcd could not answer in time.
func wantNothingLeft(t *testing.T, client *clientv3.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), etcdtest.Patience)
	defer cancel()
	for range client.Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithCreatedNotify()) {
		keys, err := client.Get(ctx, "", clientv3.WithPrefix())
		if err == nil && keys.Count == 0 {
			return
		}
	}
	t.Error("keys are left in etcd")
}

func TestInterruptedDemonstrationLeavesNothing(t *testing.T) {
	m := etcdtest.Start(t)
	client := etcdtest.NewClient(t, m.Endpoint)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	ended := make(chan error, 1)
	go func() {
		ended <- demonstrate(ctx, config{endpoints: m.Endpoint, ttl: 15 * time.Second, shards: 20, processes: 2})
	}()
	etcdtest.Await(t, "a candidate", client.Watch(t.Context(), "shards/", clientv3.WithPrefix(), clientv3.WithRev(1)))
	interrupt()
	if err := etcdtest.Await(t, "the end", ended); err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("the demonstration ended with %v", err)
	}
	wantNothingLeft(t, client)
}

func TestTwoWhoWorkOnAShardAtATimeAreFound(t *testing.T) {
	at := func(seconds int64) time.Time { return time.Unix(seconds, 0) }
	s := newShards(config{shards: 2})
	s.terms[1] = []*term{{"1", 7, at(10), at(20)}, {"2", 9, at(19), at(30)}}
	if err := s.check(); err == nil || !strings.Contains(err.Error(), "shard 1: terms overlap by 1s") {
		t.Errorf("error is %v", err)
	}
	s.terms[1][1].begin = at(20)
	if err := s.check(); err != nil {
		t.Error(err)
	}
}

func TestPlanHasTheFewestMovesAndNobodyLeadsTooManyAfterIt(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		processes := 1 + r.IntN(9)
		queues := make([][]leader.Candidate, r.IntN(100))
		leads := make([]int, processes)
		first := 1 + r.IntN(processes) // the others wait alone
		for shard := range queues {
			order := append([]int{r.IntN(first)}, r.Perm(processes)...)
			leads[order[0]]++
			for i, process := range order {
				if i == 0 || process != order[0] {
					queues[shard] = append(queues[shard], leader.Candidate{Value: fmt.Sprint(process), Token: int64(i)})
				}
			}
		}
		most := share(len(queues), processes)
		excess := 0
		for _, n := range leads {
			excess += max(n-most, 0)
		}
		moves := plan(queues)
		for _, m := range moves {
			i := slices.Index(queues[m.shard], m.to)
			if i < 1 {
				t.Fatalf("seed %d: %+v is not in %+v, or leads", seed, m.to, queues[m.shard])
			}
			queues[m.shard][0], queues[m.shard][i] = m.to, queues[m.shard][0]
		}
		if left := plan(queues); len(moves) != excess || len(left) > 0 {
			t.Errorf("seed %d: %d moves for an excess of %d, and then %d", seed, len(moves), excess, len(left))
		}
	}
}

func TestShardsThatNobodyLeadsAreNotMoved(t *testing.T) {
	for _, queues := range [][][]leader.Candidate{nil, {nil}, {nil, {{Value: "1"}}, nil, {{Value: "1"}}}} {
		if moves := plan(queues); len(moves) > 0 {
			t.Errorf("%+v: %+v", queues, moves)
		}
	}
}

func TestBadSettingsAreRefused(t *testing.T) {
	good := config{ttl: 3 * time.Second, shards: 100, processes: 3}
	if err := good.check(nil); err != nil {
		t.Errorf("%+v: %v", good, err)
	}
	for want, change := range map[string]func(*config){
		"-ttl 999ms: must be 1s to 15s":  func(c *config) { c.ttl = 999 * time.Millisecond },
		"-ttl 1h0m0s: must be 1s to 15s": func(c *config) { c.ttl = time.Hour },
		"-shards 0: must be 1 to 500":    func(c *config) { c.shards = 0 },
		"-shards 501: must be 1 to 500":  func(c *config) { c.shards = 501 },
		"-processes 1: must be 2 to 8":   func(c *config) { c.processes = 1 },
		"-processes 9: must be 2 to 8":   func(c *config) { c.processes = 9 },
	} {
		c := good
		change(&c)
		if err := c.check(nil); err == nil || err.Error() != want {
			t.Errorf("%+v: error is %v, want %q", c, err, want)
		}
	}
	if err := good.check([]string{"50"}); err == nil {
		t.Error("an argument is not refused")
	}
}

//go:build unix

package main

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "-process" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestEachShardHasOneHolderBeforeAndAfterAProcessIsKilled(t *testing.T) {
	m := etcdtest.Start(t)
	elector, err := leader.New(etcdtest.NewClient(t, m.Endpoint), leader.WithPrefix("shards"))
	if err != nil {
		t.Fatal(err)
	}
	s := newShards(config{endpoints: m.Endpoint, ttl: 3 * time.Second, shards: 20, processes: 3})
	t.Cleanup(s.stopAll)
	for _, name := range []string{"1", "2", "3"} {
		if err := s.start(name); err != nil {
			t.Fatal(err)
		}
	}
	awaitHolders(t, s, elector)

	if err := s.kill("2"); err != nil {
		t.Fatal(err)
	}
	awaitHolders(t, s, elector)

	s.stopAll()
	if err := s.check(); err != nil {
		t.Error(err)
	}
	for shard := range s.shards {
		if queue, err := elector.Candidates(t.Context(), election(shard)); err != nil || len(queue) > 0 {
			t.Errorf("shard %d: candidates are left: %v, %v", shard, queue, err)
		}
	}
}

// awaitHolders waits until the shards are shared, and etcd says the same of each as the processes.
func awaitHolders(t *testing.T, s *shards, elector *leader.Elector) {
	t.Helper()
	for {
		if err := s.settle(t.Context()); err != nil {
			t.Fatal(err)
		}
		var differ []int
		for shard := range s.shards {
			holder, err := elector.Current(t.Context(), election(shard))
			if err != nil || !slices.Equal(s.holders(shard), []string{holder.Value}) {
				differ = append(differ, shard)
			}
		}
		if differ == nil {
			return
		}
		select { // a handoff is under way: somebody will tell
		case e := <-s.events:
			s.handle(e)
		case <-time.After(30 * time.Second):
			t.Fatalf("etcd and the processes differ about who holds %v", differ)
		}
	}
}

func TestBadSettingsAreRefused(t *testing.T) {
	for want, c := range map[string]config{
		"-shards 0: must be at least 1":  {ttl: time.Second, processes: 2},
		"-processes 1: must be 2 to 9":   {ttl: time.Second, processes: 1, shards: 1},
		"-ttl 1h0m0s: must be 1s to 5s,": {ttl: time.Hour, processes: 2, shards: 1},
	} {
		if err := demonstrate(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error is %v, want one with %q", c, err, want)
		}
	}
}

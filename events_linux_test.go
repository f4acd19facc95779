package leader_test

import (
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
)

// A member that really lags. It was paused while a leader resigned and joined again, and the candidate's watch is
// opened there: "now" is before the key was created that the watch is for.
func TestWatchAtAMemberThatWasPausedElectsNobody(t *testing.T) {
	t.Parallel()
	const ttl = 6 * time.Second
	members := etcdtest.StartProcesses(t, 3)
	raftLeader := raftLeaderOf(t, members)
	var follower *etcdtest.Member
	var others []string
	for _, m := range members {
		if follower == nil && m != raftLeader {
			follower = m
		} else {
			others = append(others, m.Endpoint)
		}
	}
	client := etcdtest.NewClient(t, others...)
	at := etcdtest.NewClient(t, follower.Endpoint)
	e := newElector(t, client, leader.WithTTL(ttl))
	lead(t, e, "other", "") // keeps the lease, so that the key has the same name again
	// The member has to open the watch before it catches up, which it does not always.
	for trial := range 4 {
		first := lead(t, e, "jobs", "first")
		if _, err := at.Get(t.Context(), "x"); err != nil { // it is connected
			t.Fatal(err)
		}
		watches := wrapped(client)
		watches.Watcher = at.Watcher // as a client of all members may have it
		if err := follower.Pause(); err != nil {
			t.Fatal(err)
		}
		resign(t, first)
		first = lead(t, e, "jobs", "first again")
		next := campaign(t.Context(), newElector(t, watches, leader.WithTTL(ttl)), "jobs", "second")
		awaitQueue(t, client, "jobs", queued(2))
		time.Sleep(300 * time.Millisecond) // the request for a watch waits in the socket of the member
		if err := follower.Resume(); err != nil {
			t.Fatal(err)
		}
		if _, err := at.Get(t.Context(), "x"); err != nil { // it has caught up
			t.Fatal(err)
		}
		select {
		case o := <-next:
			t.Fatalf("trial %d: two leaders: err %v, tokens %d and %d, IsLeader %v and %v, guards hold %v and %v", trial, o.err, first.Token(),
				o.l.Token(), first.IsLeader(), o.l.IsLeader(), guarded(t, client, first), guarded(t, client, o.l))
		case <-time.After(300 * time.Millisecond): // what must not happen has no event
		}
		resign(t, first)
		resign(t, awaitLeader(t, next))
	}
}

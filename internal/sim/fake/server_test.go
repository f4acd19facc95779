package fake

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// expiry is what the true lessor says.
func (b *bench) expiry(id clientv3.LeaseID) (at time.Time, ok bool) {
	b.c.Inspect(func(t Truth) { at, ok = t.LeaseExpiry(int64(id)) })
	return at, ok
}

func (b *bench) keepAlive(id clientv3.LeaseID) (*clientv3.LeaseKeepAliveResponse, error) {
	return b.client.KeepAliveOnce(b.within(patience), id)
}

// expired returns the commits that are about expiry.
func (b *bench) expired(of Expiry) (n int) {
	for _, e := range b.commits() {
		if e.Expiry == of && e.Err == nil {
			n++
		}
	}
	return n
}

func TestLeaseExpiresWhenItsTTLHasPassedAndAScanSeesIt(t *testing.T) {
	for seed := range uint64(20) {
		inBubble(t, Config{Seed: seed}, ClientConfig{}, func(b *bench) {
			id := b.grant(5)
			b.put("k", "1", clientv3.WithLease(id))
			time.Sleep(3 * time.Second)
			if _, err := b.keepAlive(id); err != nil {
				b.Fatal(err)
			}
			renewed := time.Now()
			at, ok := b.expiry(id)
			if !ok || at.Sub(renewed) > 5*time.Second || at.Sub(renewed) < 4900*time.Millisecond {
				b.Errorf("renewed at %v, expires at %v (%v)", renewed, at, ok)
			}
			w := b.client.Watch(b.Context(), "k")
			b.events(w, 1)
			if late := time.Since(at); late < 0 || late > scanInterval+100*time.Millisecond {
				b.Errorf("deleted %v after the lease has expired", late)
			}
			if b.expired(TrueExpiry) != 1 {
				b.Errorf("commits %v", b.commits())
			}
			if _, err := b.keepAlive(id); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
				b.Errorf("renewal of an expired lease: %v", err)
			}
		})
	}
}

func TestShortTTLIsMadeLonger(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		l, err := b.client.Grant(b.Context(), 1)
		if err != nil || l.TTL != 2 {
			b.Errorf("granted %v: %v", l, err)
		}
	})
}

func TestLimitedNumberOfLeasesIsRevokedAtATime(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		const leases = 1200
		for range leases {
			b.grant(60)
		}
		// Those who follow give all leases the same time.
		b.c.MoveLeader(b.followers()[0])
		time.Sleep(61 * time.Second)
		var left []int
		for range 6 {
			time.Sleep(scanInterval)
			b.c.Inspect(func(t Truth) { left = append(left, len(t.Leases())) })
		}
		for i, n := range left {
			if i > 0 && left[i-1]-n > maxRevocations {
				b.Errorf("leases left after each scan: %v", left)
			}
		}
		if left[0] == 0 || left[len(left)-1] != 0 {
			b.Errorf("leases left after each scan: %v", left)
		}
	})
}

func TestNewLeaderGivesEachLeaseItsWholeTTL(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		id := b.grant(10)
		time.Sleep(6 * time.Second)
		before, _ := b.expiry(id)
		b.c.MoveLeader(b.followers()[0])
		moved := time.Now()
		time.Sleep(time.Second)
		after, ok := b.expiry(id)
		if left := after.Sub(moved); !ok || left < 11*time.Second || left > 11100*time.Millisecond {
			b.Errorf("%v after the move the lease lives, before it was %v", left, before.Sub(moved))
		}
		r, err := b.client.TimeToLive(b.Context(), id)
		if err != nil || r.TTL < 9 || r.TTL > 10 {
			b.Errorf("time to live %v: %v", r, err)
		}
	})
}

func TestFollowerForwardsRenewals(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		id := b.grant(10)
		for _, i := range b.followers() {
			client := b.newClient(b.p, ClientConfig{Endpoints: []int{i}})
			time.Sleep(time.Second)
			if _, err := client.KeepAliveOnce(b.Context(), id); err != nil {
				b.Error(err)
			}
			if at, _ := b.expiry(id); time.Until(at) < 9900*time.Millisecond {
				b.Errorf("renewed at a follower, it expires in %v", time.Until(at))
			}
			client.Close()
		}
	})
}

func TestRenewalIsNotForwardedWithoutALeader(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{Endpoints: []int{0}}, func(b *bench) {
		id := b.grant(60)
		b.c.Kill(1)
		b.c.Kill(2)
		time.Sleep(3 * time.Second)
		if r, err := b.keepAlive(id); err == nil {
			b.Errorf("renewed without a quorum: %v", r)
		}
		b.c.Start(1)
		time.Sleep(5 * time.Second)
		if _, err := b.keepAlive(id); err != nil {
			b.Errorf("with a quorum again: %v", err)
		}
	})
}

// deposed pauses the leader for a while, and returns it and its term.
func (b *bench) depose(pause time.Duration) (old int, term uint64) {
	old = b.leader()
	b.c.Inspect(func(t Truth) { _, term, _ = t.Leader() })
	b.c.Pause(old)
	time.Sleep(pause)
	if b.leader() == old {
		b.Fatal("the paused leader was not deposed")
	}
	return old, term
}

// TestDeposedLeaderAcknowledgesRenewals shows that the fake can do what etcd can: an acknowledgement
// that says nothing about the lease. And that the read which follows tells.
func TestDeposedLeaderAcknowledgesRenewals(t *testing.T) {
	deceived := 0
	for seed := range uint64(100) {
		inBubble(t, Config{Seed: seed}, ClientConfig{}, func(b *bench) {
			id := b.grant(30)
			b.put("k", "1", clientv3.WithLease(id))
			client := b.newClient(b.p, ClientConfig{Endpoints: []int{b.leader()}})
			defer client.Close()
			if _, err := client.Get(b.Context(), "k"); err != nil { // it is connected
				b.Fatal(err)
			}
			old, term := b.depose(3 * time.Second)
			time.AfterFunc(time.Second, func() { b.c.Resume(old) })
			before, _ := b.expiry(id)
			ack, err := client.KeepAliveOnce(b.within(patience), id)
			after, _ := b.expiry(id)
			r, errRead := client.Get(b.within(patience), "k")
			switch {
			case err != nil:
				return // it knew already, or did not dare
			case after.After(before):
				return // it was forwarded
			case ack.RaftTerm != term:
				b.Errorf("seed %d: acknowledged in term %d, not by the deposed leader of %d, without a renewal", seed, ack.RaftTerm, term)
			case errRead == nil && r.Header.RaftTerm == ack.RaftTerm:
				b.Errorf("seed %d: a linearizable read after it was answered in the same term", seed)
			default:
				deceived++
			}
		})
	}
	t.Logf("%d of 100 deposed leaders acknowledged", deceived)
	if deceived < 5 {
		t.Errorf("%d of 100 deposed leaders acknowledged", deceived)
	}
}

// TestDeposedLeaderRevokesEarly shows the same of etcd#15247.
func TestDeposedLeaderRevokesEarly(t *testing.T) {
	early := 0
	for seed := range uint64(100) {
		inBubble(t, Config{Seed: seed}, ClientConfig{}, func(b *bench) {
			id := b.grant(5)
			others := b.newClient(b.p, ClientConfig{Endpoints: b.followers()})
			defer others.Close()
			old := b.leader()
			b.c.Pause(old)
			for range 8 {
				time.Sleep(time.Second)
				_, _ = others.KeepAliveOnce(b.within(time.Second), id) // it may still be forwarded to the paused one
			}
			b.c.Resume(old)
			time.Sleep(time.Second)
			early += b.expired(EarlyExpiry)
			if n := b.expired(TrueExpiry); n != 0 {
				b.Errorf("seed %d: %d leases are said to have expired that were renewed", seed, n)
			}
		})
	}
	t.Logf("%d of 100 deposed leaders revoked early", early)
	if early < 5 {
		t.Errorf("%d of 100 deposed leaders revoked early", early)
	}
}

func TestLessorOfADeposedLeaderDoesNotCountWhoeverElseIsKilled(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		id := b.grant(30)
		old, _ := b.depose(5 * time.Second)
		for i := range 3 {
			if i != old {
				b.c.Kill(i)
			}
		}
		if at, ok := b.expiry(id); ok {
			b.Errorf("the lease expires at %v although no lessor counts", at)
		}
		b.c.Inspect(func(t Truth) {
			if leader, term, ok := t.Leader(); ok {
				b.Errorf("member %d leads in term %d", leader, term)
			}
		})
	})
}

func TestPartitionedLeaderAnswersNoLinearizableRead(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		b.put("k", "old")
		old := b.leader()
		client := b.newClient(b.p, ClientConfig{Endpoints: []int{old}})
		defer client.Close()
		if _, err := client.Get(b.Context(), "k"); err != nil {
			b.Fatal(err)
		}
		for i := range 3 {
			if i != old {
				b.c.Cut(old, i)
				b.c.Cut(i, old)
			}
		}
		time.Sleep(5 * time.Second)
		next := b.newClient(b.p, ClientConfig{Endpoints: b.followers()[:1]})
		defer next.Close()
		r, err := client.Get(b.within(3*time.Second), "k", clientv3.WithSerializable())
		if err != nil || string(r.Kvs[0].Value) != "old" {
			b.Errorf("serializable read: %v, %v", r, err)
		}
		if r, err := client.Get(b.within(10*time.Second), "k"); err == nil {
			b.Errorf("linearizable read of a partitioned leader: %v", r)
		}
		b.c.Heal()
		time.Sleep(3 * time.Second)
		if _, err := client.Get(b.within(patience), "k"); err != nil {
			b.Errorf("healed: %v", err)
		}
	})
}

func TestMemberThatLagsServesThePast(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		b.put("k", "1")
		i := b.followers()[0]
		lagging := b.newClient(b.p, ClientConfig{Endpoints: []int{i}})
		defer lagging.Close()
		if _, err := lagging.Get(b.Context(), "k"); err != nil {
			b.Fatal(err)
		}
		b.c.Lag(i, time.Hour)
		leader := b.newClient(b.p, ClientConfig{Endpoints: []int{b.leader()}})
		defer leader.Close()
		if _, err := leader.Delete(b.Context(), "k"); err != nil {
			b.Fatal(err)
		}
		r, err := lagging.Get(b.Context(), "k", clientv3.WithSerializable())
		if err != nil || len(r.Kvs) != 1 {
			b.Errorf("serializable read: %v, %v", r, err)
		}
		w := lagging.Watch(b.Context(), "k", clientv3.WithCreatedNotify()) // from now, as it thinks
		created := <-w
		b.c.Lag(i, 0)
		if _, err := leader.Put(b.Context(), "k", "2"); err != nil {
			b.Fatal(err)
		}
		events := b.events(w, 2)
		if events[0].Type != clientv3.EventTypeDelete || events[0].Kv.ModRevision <= created.Header.Revision {
			b.Errorf("created at %d, then %v", created.Header.Revision, events)
		}
	})
}

func TestTermInAHeaderIsThatOfTheLastEntryApplied(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		b.put("k", "1")
		i := b.followers()[0]
		lagging := b.newClient(b.p, ClientConfig{Endpoints: []int{i}})
		defer lagging.Close()
		term := func() uint64 {
			r, err := lagging.Get(b.Context(), "k", clientv3.WithSerializable())
			if err != nil {
				b.Fatal(err)
			}
			return r.Header.RaftTerm
		}
		before := term()
		b.c.Lag(i, time.Hour)
		b.c.MoveLeader(b.followers()[1])
		time.Sleep(time.Second)
		if after := term(); after != before {
			b.Errorf("term %d, then %d although nothing of it was applied", before, after)
		}
		b.c.Lag(i, 0)
		b.put("k", "2")
		time.Sleep(time.Second)
		if after := term(); after <= before {
			b.Errorf("term %d, then %d", before, after)
		}
	})
}

func TestProposalThatTimedOutMayBeCommitted(t *testing.T) {
	committed := 0
	for seed := range uint64(20) {
		inBubble(t, Config{Seed: seed}, ClientConfig{}, func(b *bench) {
			b.put("k", "1")
			i := b.followers()[0]
			client := b.newClient(b.p, ClientConfig{Endpoints: []int{i}})
			defer client.Close()
			b.c.Cut(b.leader(), i) // it can propose, and does not hear what comes of it
			_, err := client.Put(b.within(patience), "k", "2")
			if err == nil {
				b.Error("answered by a member that hears nothing")
			}
			committed += b.puts("k") - 1
		})
	}
	if committed == 0 {
		t.Error("no proposal was committed")
	}
}

func TestCompactionEndsWatchesThatBeganBefore(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		for i := range 10 {
			b.put("k", fmt.Sprint(i))
		}
		if _, err := b.client.Compact(b.Context(), 8); err != nil {
			b.Fatal(err)
		}
		time.Sleep(time.Second)
		for rev, compacted := range map[int64]bool{7: true, 8: false, 9: false} {
			w := b.client.Watch(b.Context(), "k", clientv3.WithRev(rev))
			r := <-w
			if compacted && r.CompactRevision != 8 || !compacted && (r.CompactRevision != 0 || r.Events[0].Kv.ModRevision != rev) {
				b.Errorf("watch from %d: %v", rev, r)
			}
		}
		if _, err := b.client.Get(b.Context(), "k", clientv3.WithRev(7)); !errors.Is(err, rpctypes.ErrCompacted) {
			b.Errorf("read at 7: %v", err)
		}
	})
}

func TestProgressIsToldWhereNothingHappens(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		w := b.client.Watch(b.Context(), "k", clientv3.WithProgressNotify(), clientv3.WithCreatedNotify())
		<-w
		b.put("other", "1")
		began := time.Now()
		r := <-w
		if took := time.Since(began); !r.IsProgressNotify() || r.Header.Revision != 2 || took < progressInterval || took > 12*time.Minute {
			b.Errorf("after %v: %v", took, r)
		}
		if err := b.client.RequestProgress(b.Context()); err != nil {
			b.Fatal(err)
		}
		if r := <-w; !r.IsProgressNotify() || r.Header.Revision != 2 {
			b.Errorf("asked for: %v", r)
		}
	})
}

func TestLargeResponsesComeInPieces(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		const n = 20
		for i := range n {
			b.put("k", fmt.Sprint(i)+string(bytes.Repeat([]byte("x"), 250_000)))
		}
		stream, err := pb.NewWatchClient(b.client.ActiveConnection()).Watch(b.within(patience))
		if err != nil {
			b.Fatal(err)
		}
		create := &pb.WatchCreateRequest{Key: []byte("k"), StartRevision: 1, Fragment: true}
		if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}}); err != nil {
			b.Fatal(err)
		}
		events, pieces := 0, 0
		for more := true; more; {
			r, err := stream.Recv()
			if err != nil {
				b.Fatal(err)
			}
			events += len(r.Events)
			if !r.Created {
				pieces++
				more = r.Fragment
			}
		}
		if events != n || pieces != 3 {
			b.Errorf("%d events in %d pieces", events, pieces)
		}
	})
}

func TestRequestsAreRefused(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		if _, err := b.client.Put(b.Context(), "k", string(make([]byte, 1800<<10))); !errors.Is(err, rpctypes.ErrRequestTooLarge) {
			b.Errorf("too large: %v", err)
		}
		for i := range 3 {
			b.c.Refuse(i, 1)
		}
		if _, err := b.client.Put(b.Context(), "k", "1"); !errors.Is(err, rpctypes.ErrTooManyRequests) {
			b.Errorf("too many: %v", err)
		}
		b.c.Heal()
		id := b.grant(60)
		b.c.NoSpace(true)
		time.Sleep(time.Second)
		if _, err := b.client.Put(b.Context(), "k", "1"); !errors.Is(err, rpctypes.ErrNoSpace) {
			b.Errorf("put without space: %v", err)
		}
		if _, err := b.client.Grant(b.Context(), 60); !errors.Is(err, rpctypes.ErrNoSpace) {
			b.Errorf("grant without space: %v", err)
		}
		if _, err := b.client.Delete(b.Context(), "k"); err != nil {
			b.Errorf("delete without space: %v", err)
		}
		if _, err := b.keepAlive(id); err != nil {
			b.Errorf("renewal without space: %v", err)
		}
		b.c.Heal()
		time.Sleep(time.Second)
		b.put("k", "1")
	})
}

func TestRightsAreChecked(t *testing.T) {
	users := []User{
		{Name: "root", Password: "r", Root: true},
		{Name: "u", Password: "p", Permissions: []Permission{{Prefix: "mine/", Read: true, Write: true}, {Prefix: "seen/", Read: true}}},
	}
	inBubble(t, Config{}, ClientConfig{}, func(b *bench) {
		b.c.EnableAuth(10*time.Second, users...)
		time.Sleep(time.Second)
		if _, err := b.client.Get(b.Context(), "mine/1"); !errors.Is(err, rpctypes.ErrUserEmpty) {
			b.Errorf("read by nobody: %v", err)
		}
		if _, err := b.p.NewClient(ClientConfig{Username: "u", Password: "wrong"}); !errors.Is(err, rpctypes.ErrAuthFailed) {
			b.Errorf("wrong password: %v", err)
		}
		u := b.newClient(b.p, ClientConfig{Username: "u", Password: "p"})
		defer u.Close()
		root := b.newClient(b.p, ClientConfig{Username: "root", Password: "r"})
		defer root.Close()
		l, err := u.Grant(b.Context(), 60)
		if err != nil {
			b.Fatal(err)
		}
		denied := func(what string, err error) {
			b.Helper()
			if !errors.Is(err, rpctypes.ErrPermissionDenied) {
				b.Errorf("%s: %v", what, err)
			}
		}
		_, err = u.Put(b.Context(), "mine/1", "", clientv3.WithLease(l.ID))
		if err != nil {
			b.Error(err)
		}
		_, err = u.Put(b.Context(), "seen/1", "")
		denied("put without the right", err)
		if _, err = u.Get(b.Context(), "seen/", clientv3.WithPrefix()); err != nil {
			b.Error(err)
		}
		_, err = u.Get(b.Context(), "m", clientv3.WithPrefix())
		denied("read of more than the right covers", err)
		_, err = u.Txn(b.Context()).If(clientv3.Compare(clientv3.Version("hidden"), "=", 0)).Commit()
		denied("comparison without the right", err)
		_, err = u.Delete(b.Context(), "seen/1")
		denied("delete without the right", err)
		r := <-u.Watch(b.Context(), "hidden")
		if !errors.Is(r.Err(), rpctypes.ErrPermissionDenied) && r.Err() == nil {
			b.Errorf("watch without the right: %v", r.Err())
		}
		if _, err := root.Put(b.Context(), "hidden", "", clientv3.WithLease(l.ID)); err != nil {
			b.Error(err)
		}
		_, err = u.KeepAliveOnce(b.Context(), l.ID)
		denied("renewal of a lease with a key that must not be written", err)
		_, err = u.Revoke(b.Context(), l.ID)
		denied("its revocation", err)
		_, err = u.Put(b.Context(), "mine/2", "", clientv3.WithLease(l.ID))
		denied("another key on it", err)
		if _, err := root.KeepAliveOnce(b.Context(), l.ID); err != nil {
			b.Error(err)
		}
		time.Sleep(20 * time.Second) // tokens have ended; the client authenticates again
		if _, err := u.Get(b.Context(), "mine/1"); err != nil {
			b.Errorf("after the token's end: %v", err)
		}
		b.c.ExpireTokens()
		if _, err := u.Get(b.Context(), "mine/1"); err != nil {
			b.Errorf("with an invalid token: %v", err)
		}
		b.c.DisableAuth()
		time.Sleep(time.Second)
		if _, err := u.Put(b.Context(), "hidden", "2"); err != nil {
			b.Errorf("without authentication: %v", err)
		}
	})
}

func TestProposalsWaitForALeader(t *testing.T) {
	inBubble(t, Config{}, ClientConfig{Endpoints: []int{0}}, func(b *bench) {
		b.put("k", "1")
		b.c.Kill(1)
		b.c.Kill(2)
		time.Sleep(4 * time.Second)
		time.AfterFunc(time.Second, func() { b.c.Start(1) })
		began := time.Now()
		b.put("k", "2")
		if took := time.Since(began); took < time.Second {
			b.Errorf("put without a quorum after %v", took)
		}
		_, err := b.client.Put(b.within(time.Second), "k", "3")
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			b.Error(err)
		}
	})
}

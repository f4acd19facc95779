package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The join may arrive at any later time. A new term on that key would have the token of an earlier one.
func TestNameIsNotLentAgainWhileAJoinIsUnanswered(t *testing.T) {
	for name, answer := range map[string]error{
		"no answer":      rpctypes.ErrTimeout,
		"no raft leader": rpctypes.ErrNoLeader,
		"its ctx ended":  context.DeadlineExceeded,
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			p := newPool(e)
			k, other := lend(t, p, "k"), lend(t, p, "other")
			_, err := Attempt(t.Context(), k, func(context.Context) (int, error) { return 0, answer })
			if !errors.Is(err, answer) {
				t.Errorf("Attempt() = %v, want %v", err, answer)
			}
			k.Drop()
			if !k.Abandoned() {
				t.Error("forgotten although it may be in etcd, now or later")
			}
			if again := lend(t, p, "k"); again.Session() == k.Session() {
				t.Error("the name was lent again on the same lease")
			} else if len(e.log().asked) != 2 {
				t.Errorf("%d leases granted, want 2", len(e.log().asked))
			}
			if third := lend(t, p, "third"); third.Session() != other.Session() {
				t.Error("other names are not lent on the lease any more")
			}
			e.waitUntil(time.Minute) // it does not heal with time
			if !k.Abandoned() {
				t.Error("forgotten although no answer has come")
			}
		})
	}
}

func TestNameIsLentAgainIfNoJoinIsUnanswered(t *testing.T) {
	for name, join := range map[string]func(t *testing.T, k *Key){
		"none was sent": func(*testing.T, *Key) {},
		"it was refused": func(t *testing.T, k *Key) {
			for _, refusal := range []error{rpctypes.ErrPermissionDenied, rpctypes.ErrTooManyRequests, rpctypes.ErrLeaseNotFound} {
				_, err := Attempt(t.Context(), k, func(context.Context) (int, error) { return 0, refusal })
				if !errors.Is(err, refusal) {
					t.Errorf("Attempt() = %v, want %v", err, refusal)
				}
			}
		},
		"it was answered": func(t *testing.T, k *Key) {
			rev, err := Attempt(t.Context(), k, func(context.Context) (int64, error) { return 7, nil })
			if rev != 7 || err != nil {
				t.Errorf("Attempt() = %v, %v, want 7 and no error", rev, err)
			}
			k.Joined(rev)
		},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			p := newPool(e)
			k := lend(t, p, "k")
			lend(t, p, "other")
			join(t, k)
			k.Drop()
			if k.Abandoned() {
				t.Error("abandoned")
			}
			if again := lend(t, p, "k"); again == nil || again.Session() != k.Session() {
				t.Error("the name was not lent again on the same lease")
			}
		})
	}
}

// An etcd that has just filled up carries a join out and refuses it.
func TestKeyWhoseJoinWasRefusedForLackOfSpaceIsLookedFor(t *testing.T) {
	for name, put := range map[string]bool{"it was put": true, "it was not": false} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			p := newPool(e)
			lend(t, p, "other")
			k := lend(t, p, "k")
			_, err := Attempt(t.Context(), k, func(context.Context) (int64, error) { return 0, rpctypes.ErrNoSpace })
			if !errors.Is(err, rpctypes.ErrNoSpace) {
				t.Fatal(err)
			}
			if put {
				e.put(k.Name(), 7)
			}
			k.Drop()
			if !k.Abandoned() {
				t.Error("forgotten although it may be in etcd")
			}
			e.waitUntil(third + 1)
			if e.revision(k.Name()) != 0 || k.Abandoned() {
				t.Errorf("create revision %d, Abandoned() = %v after a renewal, want 0 and false", e.revision(k.Name()), k.Abandoned())
			}
		})
	}
}

func TestAbandonedKeyIsForgottenByAReadThatWasSentAfterTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = takes[read](soon)
		p := newPool(e)
		k := lend(t, p, "k")
		lend(t, p, "other")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		const answered = third + soon + soon/2 // in the middle of the read for abandoned keys
		_, err := Attempt(ctx, k, func(context.Context) (int64, error) {
			time.Sleep(answered - e.at())
			return 7, nil // and somebody has deleted it since
		})
		if !errors.Is(err, context.DeadlineExceeded) || e.at() != time.Second {
			t.Errorf("Attempt() = %v after %v, want %v after 1s", err, e.at(), context.DeadlineExceeded)
		}
		k.Drop()

		e.waitUntil(2*third - 1)
		if log := e.log(); !k.Abandoned() || len(log.reads) != 2 || !slices.Equal(log.reads[1], []string{k.Name()}) {
			t.Errorf("Abandoned() = %v after the reads %v, want true: the only one of the key was sent before the answer",
				k.Abandoned(), log.reads)
		}
		e.waitUntil(2*third + 2*soon)
		if log := e.log(); k.Abandoned() || len(log.reads) != 4 {
			t.Errorf("Abandoned() = %v after the reads %v", k.Abandoned(), log.reads)
		}
		if again := lend(t, p, "k"); again.Session() != k.Session() {
			t.Error("the name is not lent again")
		}
	})
}

// Its owner cannot know that it is in etcd, so its Drop is a guess.
func TestKeyOfAJoinThatIsAnsweredWhenNobodyWaitsAnyMoreIsNotForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := newPool(e)
		k := lend(t, p, "k")
		lend(t, p, "other")
		ctx, cancel := context.WithCancel(t.Context())
		_, err := Attempt(ctx, k, func(context.Context) (int64, error) {
			cancel()
			time.Sleep(soon) // until nobody waits for the answer any more
			e.put(k.Name(), 7)
			return 7, nil
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("Attempt() = %v, want %v", err, context.Canceled)
		}
		e.waitUntil(soon) // the answer has come
		k.Drop()
		if !k.Abandoned() {
			t.Error("forgotten although it is in etcd")
		}
		if again := lend(t, p, "k"); again.Session() == k.Session() {
			t.Error("the name was lent again on the same lease")
		}
		bound, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := k.Remove(bound); err != nil || e.revision(k.Name()) != 0 {
			t.Errorf("Remove() = %v, and the key has revision %d", err, e.revision(k.Name()))
		}
		if again := lend(t, p, "k"); k.Abandoned() || again.Session() != k.Session() {
			t.Error("the name is not lent again although the key was deleted and every join answered")
		}
	})
}

func TestAttemptEndsWithItsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		k := lend(t, newPool(e), "k")
		time.AfterFunc(time.Second, func() { k.Session().end(ErrClosed) })
		_, err := Attempt(t.Context(), k, func(ctx context.Context) (struct{}, error) {
			<-ctx.Done()
			return struct{}{}, ctx.Err()
		})
		// It tells what a user needs to know, and not that it was cut short.
		if want := retry.Silence(e.client, time.Second); err == nil || err.Error() != want.Error() || e.at() != time.Second {
			t.Errorf("Attempt() = %v after %v, want %v after 1s", err, e.at(), want)
		}
	})
}

func TestCloseOfAPoolWaitsForAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := newPool(e)
		k := lend(t, p, "k")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, _ = Attempt(ctx, k, func(context.Context) (struct{}, error) {
			time.Sleep(3 * time.Second) // whatever its context does
			return struct{}{}, nil
		})
		k.Drop()
		if err := k.Session().Finish(t.Context()); err != nil {
			t.Errorf("Finish() = %v", err)
		}
		bound, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := p.Close(bound); !errors.Is(err, context.DeadlineExceeded) || e.at() != time.Second {
			t.Errorf("Close() = %v after %v, want %v after 1s", err, e.at(), context.DeadlineExceeded)
		}
		if err := p.Close(t.Context()); err != nil || e.at() != 3*time.Second {
			t.Errorf("Close() = %v after %v, want nil after 3s, when the request has ended", err, e.at())
		}
		e.waitUntil(time.Minute)
	})
}

// A session that was given back is not kept for ever, but what it has started is waited for.
func TestCloseOfAPoolWaitsForAttemptsOfSessionsThatAreLongGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := newPool(e)
		for i := range 2 {
			k := lend(t, p, "k")
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, _ = Attempt(ctx, k, func(context.Context) (struct{}, error) {
				time.Sleep(time.Duration(3-i) * time.Second) // whatever its context does
				return struct{}{}, nil
			})
			k.Drop()
			if err := k.Session().Finish(t.Context()); err != nil {
				t.Errorf("Finish() = %v", err)
			}
		}
		if err := p.Close(t.Context()); err != nil || e.at() != 3*time.Second {
			t.Errorf("Close() = %v after %v, want nil after 3s, when the first request has ended", err, e.at())
		}
		e.waitUntil(time.Minute)
	})
}

// It may be that of a later term by then.
func TestAbandonedKeyThatIsReplacedBeforeItsDeletionIsNotDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onDelete = func(_ context.Context, n int) error {
			if n == 1 {
				e.put("orphan", 9)
			}
			return nil
		}
		s := start(t, e, Config{})
		orphaned := e.track(s, "orphan", 7)
		attemptUnanswered(t, orphaned)
		orphaned.Abandon()
		e.waitUntil(third)
		if got, want := e.log().deletes, []orphan{{"orphan", 7}}; !slices.Equal(got, want) || e.revision("orphan") != 9 {
			t.Errorf("deletions sent: %v, want %v; the key has revision %d, want 9", got, want, e.revision("orphan"))
		}
		e.waitUntil(2 * third) // it is found again
		if got, want := e.log().deletes, []orphan{{"orphan", 7}, {"orphan", 9}}; !slices.Equal(got, want) {
			t.Errorf("deletions sent: %v, want %v", got, want)
		}
	})
}

func TestAbandonedKeyThatWasDeletedIsForgottenUnlessAJoinIsUnanswered(t *testing.T) {
	for _, unanswered := range []bool{false, true} {
		bubble(t, fmt.Sprint(unanswered), func(t *testing.T) {
			e := newEtcd(t)
			s := start(t, e, Config{})
			k := e.track(s, "orphan", 7)
			if unanswered {
				attemptUnanswered(t, k)
			}
			k.Abandon()
			e.waitUntil(third)
			if e.revision("orphan") != 0 || k.Abandoned() != unanswered {
				t.Errorf("the key has revision %d, Abandoned() = %v, want 0 and %v",
					e.revision("orphan"), k.Abandoned(), unanswered)
			}
		})
	}
}

// A proxy between client and etcd may have sent the join twice.
func TestDroppedKeyThatAppearsAgainIsFoundAndDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		s := start(t, e, Config{})
		for range 2 { // under the same name, which is remembered once
			dropped := e.track(s, "dropped", 7)
			e.put("dropped", 0)
			dropped.Drop()
		}
		if !slices.Equal(s.past, []string{"dropped"}) {
			t.Errorf("remembered %v, want the name once", s.past)
		}
		e.waitUntil(third)
		e.put("dropped", 9)
		e.waitUntil(2 * third)
		e.waitUntil(3 * third)
		log := e.log()
		if want := []orphan{{"dropped", 9}}; !slices.Equal(log.deletes, want) || e.revision("dropped") != 0 {
			t.Errorf("deletions sent: %v, want %v", log.deletes, want)
		}
		if len(log.reads) != 3 {
			t.Errorf("%d reads sent by 3 renewals: the names that were dropped are read with the others", len(log.reads))
		}
		e.put("dropped", 11)
		e.waitUntil(4 * third)
		if e.revision("dropped") != 0 {
			t.Error("not looked for any more once it was found")
		}
	})
}

func TestNamesOfTheLastDroppedKeysAreRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		s := start(t, e, Config{})
		var want []string
		for i := range maxPast + 5 {
			name := fmt.Sprint("dropped ", i)
			k := e.track(s, name, 7)
			k.Drop()
			if i >= 5 {
				want = append(want, name)
			}
		}
		e.waitUntil(third)
		if got := e.log().reads; len(got) != 1 || !slices.Equal(got[0], append([]string{"k"}, want...)) {
			t.Errorf("read %v, want k and the last %d that were dropped", got, maxPast)
		}
		for i := range maxReads {
			e.track(s, fmt.Sprint("held ", i), 1)
		}
		e.waitUntil(2 * third)
		dropped := func(key string) bool { return slices.Contains(want, key) }
		if got := e.log().reads[1]; len(got) != maxReads || slices.ContainsFunc(got, dropped) {
			t.Errorf("read %v, want %d keys that are held: those come first", got, maxReads)
		}
	})
}

// It may not be allowed to read it. That would cost the other keys their place in each request.
func TestNameWhoseJoinsWereAllRefusedIsNotReadAnyMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.denied = "denied"
		s := start(t, e, Config{})
		e.track(s, "l", 1)
		k := s.track("denied", func() {})
		_, err := Attempt(t.Context(), k, func(context.Context) (int64, error) { return 0, rpctypes.ErrPermissionDenied })
		if !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("Attempt() = %v", err)
		}
		k.Drop()
		e.waitUntil(third)
		if got := e.log().reads; len(got) != 1 || len(got[0]) != 2 {
			t.Errorf("read %v, want the two keys that have joined at once", got)
		}
	})
}

// The worst case: it has the same revision, so that the guard would hold.
// The session is not closed in between, although it has no other key.
func TestKeyThatRejoinsKeepsItsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		p := newPool(e)
		k := lend(t, p, "k")
		k.Joined(5)
		again := k.Rejoin(func() { t.Error("gone called for a key that is there") })
		if again == nil || again.Session() != k.Session() || again.Name() != k.Name() {
			t.Fatalf("Rejoin() = %+v, want a key of the same name and session", again)
		}
		k.Drop() // it has no owner any more, so this does nothing
		if err := k.Session().Finish(t.Context()); err != nil || !k.Session().Valid() {
			t.Fatalf("the session was closed, error %v", err)
		}
		e.put(again.Name(), 7)
		again.Joined(7)
		e.waitUntil(3*third + soon)
		if log := e.log(); len(log.deletes) != 0 || len(log.asked) != 1 || !again.Session().Valid() {
			t.Errorf("deleted %v, asked for %d leases, valid: %v", log.deletes, len(log.asked), again.Session().Valid())
		}
		again.Drop()
		if err := again.Session().Finish(t.Context()); err != nil || again.Session().Valid() {
			t.Errorf("the session was not closed after its last key, error %v", err)
		}
	})
}

// A read that was sent before the key was deleted, and is answered afterwards, is about the earlier key.
func TestOldReadSaysNothingAboutAKeyThatHasRejoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = takes[read](soon)
		p := newPool(e)
		gone := false
		k, err := p.Track(t.Context(), &retry.Loop{Client: p.client}, func(clientv3.LeaseID) string { return "k" }, func() { gone = true })
		if err != nil {
			t.Fatal(err)
		}
		cleanUp(t, k)
		k.Joined(5) // and was deleted
		e.waitUntil(third + soon/2)
		again := k.Rejoin(func() { t.Error("gone called for a key that is there") })
		e.put("k", 7)
		again.Joined(7)
		e.waitUntil(2*third + 2*soon)
		if !gone {
			t.Error("the read was not answered after the key had joined again")
		}
	})
}

func TestKeyDoesNotRejoinWhereItsNameOrLeaseIsOfNoMoreUse(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, k *Key){
		"a join is unanswered": func(t *testing.T, k *Key) {
			_, _ = Attempt(t.Context(), k, func(context.Context) (int, error) { return 0, rpctypes.ErrTimeout })
		},
		"nobody has waited for the answer to a join": func(t *testing.T, k *Key) {
			ctx, cancel := context.WithCancel(t.Context())
			_, _ = Attempt(ctx, k, func(context.Context) (int, error) { cancel(); time.Sleep(soon); return 0, nil })
			time.Sleep(2 * soon)
		},
		"it may have been put":    func(_ *testing.T, k *Key) { k.put, k.rev = true, 0 },
		"it was abandoned":        func(_ *testing.T, k *Key) { k.Abandon() },
		"it was dropped":          func(_ *testing.T, k *Key) { k.Drop() },
		"it has rejoined":         func(_ *testing.T, k *Key) { k.Rejoin(nil) },
		"the lease is gone":       func(_ *testing.T, k *Key) { k.Session().Revoked() },
		"the lease is denied":     func(_ *testing.T, k *Key) { k.Session().Deny() },
		"the session was retired": func(t *testing.T, k *Key) { _ = k.Session().Close(t.Context()) },
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			p := newPool(e)
			lend(t, p, "other")
			k := lend(t, p, "k")
			k.Joined(5)
			spoil(t, k)
			if again := k.Rejoin(func() {}); again != nil {
				t.Error("it rejoins")
			}
		})
	}
}

func TestNameThatIsUsedAgainWhileItIsReadIsNotDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = takes[read](soon) // how it was before
		s := start(t, e, Config{})
		old := e.track(s, "name", 5)
		old.Drop()
		e.put("name", 7) // a copy of its join has arrived
		e.waitUntil(third + soon/2)
		successor := s.track("name", func() { t.Error("gone called for a key that is there") })
		if successor == nil {
			t.Fatal("the name of a dropped key is not lent")
		}
		successor.Joined(7)
		e.waitUntil(3*third + soon)
		log := e.log()
		for _, keys := range log.reads {
			slices.Sort(keys)
			if want := []string{"k", "name"}; !slices.Equal(keys, want) {
				t.Errorf("read %v, want %v before and after the name was used again", keys, want)
			}
		}
		if len(log.reads) != 3 {
			t.Errorf("%d reads sent by 3 renewals", len(log.reads))
		}
		if len(log.deletes) != 0 {
			t.Errorf("deleted %v, which has a new owner", log.deletes)
		}
	})
}

func TestRemoveDeletesAnAbandonedKeyAtOnce(t *testing.T) {
	for name, rev := range map[string]int64{"it is there": 9, "it is not": 0} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			p := newPool(e)
			k := lend(t, p, "k")
			lend(t, p, "other")
			k.Joined(7)
			e.put(k.Name(), rev)
			k.Abandon()
			left := p.Abandoned(func(id clientv3.LeaseID) string { return fmt.Sprintf("k/%x", id) })
			if !slices.Equal(left, []*Key{k}) {
				t.Fatalf("Abandoned() = %v, want the key", left)
			}
			bound, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := k.Remove(bound); err != nil {
				t.Errorf("Remove() = %v", err)
			}
			if e.at() != 0 || e.revision(k.Name()) != 0 || k.Abandoned() {
				t.Errorf("after %v the key has revision %d, Abandoned() = %v, want 0 and false at once",
					e.at(), e.revision(k.Name()), k.Abandoned())
			}
			if left := p.Abandoned(func(id clientv3.LeaseID) string { return fmt.Sprintf("k/%x", id) }); len(left) != 0 {
				t.Errorf("Abandoned() = %v, want none", left)
			}
		})
	}
}

func TestRemoveReturnsTheErrorOfWhatMayNotBeDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onDelete = func(context.Context, int) error { return rpctypes.ErrPermissionDenied }
		s := start(t, e, Config{})
		k := e.track(s, "orphan", 7)
		k.Abandon()
		if err := k.Remove(t.Context()); !errors.Is(err, rpctypes.ErrPermissionDenied) || !k.Abandoned() {
			t.Errorf("Remove() = %v, Abandoned() = %v, want %v and true", err, k.Abandoned(), rpctypes.ErrPermissionDenied)
		}
	})
}

func TestAbandonedKeyThatMayNotBeDeletedDoesNotKeepTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onDelete = func(_ context.Context, n int) error {
			if n == 1 {
				return rpctypes.ErrPermissionDenied
			}
			return nil
		}
		s := start(t, e, Config{})
		for _, name := range []string{"a", "b"} {
			k := e.track(s, name, 7)
			attemptUnanswered(t, k)
			k.Abandon()
		}
		e.waitUntil(third)
		if a, b := e.revision("a"), e.revision("b"); (a == 0) == (b == 0) {
			t.Errorf("after a renewal the keys have revisions %d and %d, want one of them deleted", a, b)
		}
	})
}

func TestEachRenewalLooksForAbandonedKeysAlsoIfItCannotReadAllOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		s := grant(t, e, Config{})
		for i := range maxReads + 1 {
			e.track(s, strconv.Itoa(i), 1)
		}
		var want []string
		for i := range maxAbandoned { // as many as there may be before names are refused
			name := fmt.Sprint("orphan ", i)
			k := s.track(name, func() { t.Error("gone called for an abandoned key") })
			attemptUnanswered(t, k)
			k.Abandon()
			want = append(want, name)
		}
		slices.Sort(want)
		for n := range 3 {
			e.waitUntil(time.Duration(n+1) * third)
			reads := e.log().reads
			if len(reads) != 2*(n+1) {
				t.Fatalf("%d reads sent by %d renewals, want two for each", len(reads), n+1)
			}
			held, abandoned := reads[2*n], slices.Sorted(slices.Values(reads[2*n+1]))
			orphaned := func(key string) bool { return strings.HasPrefix(key, "orphan") }
			if len(held) != maxReads || slices.ContainsFunc(held, orphaned) {
				t.Errorf("the read that makes the renewal count is of %v, want %d keys with an owner", held, maxReads)
			}
			if !slices.Equal(abandoned, want) {
				t.Errorf("looked for %v, want all that were abandoned", abandoned)
			}
		}
	})
}

func TestAbandonedKeysAreLookedForInTurnIfOneRequestCannotReadAll(t *testing.T) {
	for _, orphans := range []int{2, 3} {
		bubble(t, fmt.Sprint(orphans), func(t *testing.T) {
			e := newEtcd(t)
			e.onRead = allow(1)
			s := start(t, e, Config{})
			for i := range orphans {
				k := s.track(fmt.Sprint("orphan ", i), func() {})
				attemptUnanswered(t, k)
				k.Abandon()
			}
			e.waitUntil(third) // finds out how many keys one request may read
			before := len(e.log().reads)
			e.waitUntil(time.Duration(1+orphans) * third)
			looked := make(map[string]bool)
			for _, keys := range e.log().reads[before:] {
				if len(keys) != 1 {
					t.Errorf("read %v, want one key", keys)
				}
				looked[keys[0]] = true
			}
			if len(looked) != orphans+1 {
				t.Errorf("%d renewals have read %v, want %d abandoned keys and another", orphans, looked, orphans)
			}
		})
	}
}

func TestRequestsReadHalfAsManyKeysOnceAServerAllowsNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = allow(30)
		s := grant(t, e, Config{})
		for i := range maxReads {
			e.track(s, strconv.Itoa(i), 1)
		}
		for i := range 30 {
			k := s.track(fmt.Sprint("orphan ", i), func() {})
			attemptUnanswered(t, k)
			k.Abandon()
		}
		e.waitUntil(3 * third)
		var sizes []int
		for _, keys := range e.log().reads {
			sizes = append(sizes, len(keys))
		}
		// 100 and 50 were refused in the first renewal alone; each renewal also looks for abandoned keys.
		if want := []int{100, 50, 25, 25, 25, 25, 25, 25}; !slices.Equal(sizes, want) {
			t.Errorf("requests have read %v keys, want %v", sizes, want)
		}
		for _, r := range e.log().renewals {
			if r.Err != nil {
				t.Errorf("reported a failure: %v", r.Err)
			}
		}
		e.wantDeadline(s, 3*third+deadline)
	})
}

// A server that allows one operation only is asked for one key.
func TestRequestsReadOneKeyWhereAServerAllowsNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.onRead = allow(1)
		s := start(t, e, Config{})
		for i := range 4 {
			e.track(s, strconv.Itoa(i), 1)
		}
		e.waitUntil(third)
		e.wantDeadline(s, third+deadline)
		before := len(e.log().reads)
		e.waitUntil(6 * third)
		read := make(map[string]bool)
		for _, keys := range e.log().reads[before:] {
			if len(keys) == 1 {
				read[keys[0]] = true
			}
		}
		if len(read) != 5 || len(e.log().reads) != before+5 {
			t.Errorf("5 renewals have read %v, want 5 keys in as many requests", e.log().reads[before:])
		}
	})
}

// The next attempt is about another one.
func TestUnreadableKeyFailsNoTwoAttemptsInARow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.denied = "unreadable"
		s := start(t, e, Config{})
		e.track(s, "unreadable", 1)
		e.waitUntil(100 * third)
		if !s.Valid() {
			t.Fatalf("%v although one of two keys may be read", s.Cause())
		}
		for _, r := range e.log().renewals {
			if r.Failures > 1 {
				t.Fatalf("%d attempts in a row have failed: %v", r.Failures, r.Err)
			}
		}
	})
}

func TestGuardIsOfTransactionsOfTheElectionAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		s := start(t, e, Config{})
		guard := clientv3.Compare(clientv3.ModRevision("name/k"), "=", 5)
		guarded := WithGuard(t.Context(), guard)
		own := clientv3.Compare(clientv3.CreateRevision("name/k"), "=", int64(1))
		for name, test := range map[string]struct {
			ctx  context.Context
			kv   clientv3.KV // nil: of an election
			want []clientv3.Cmp
		}{
			"Proclaim of an election": {guarded, nil, []clientv3.Cmp{own, guard}},
			"Proclaim without guard":  {t.Context(), nil, []clientv3.Cmp{own}},
			"of the user's client":    {guarded, s.client, []clientv3.Cmp{own}},
		} {
			e.puts = nil
			if test.kv == nil {
				if err := s.Election("name/", "name/k", 1).Proclaim(test.ctx, "value"); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			} else if _, err := test.kv.Txn(test.ctx).If(own).Then(clientv3.OpPut("name/k", "value")).Commit(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if len(e.puts) != 1 || comparisons(e.puts[0]) != comparisons(test.want) {
				t.Errorf("%s has the comparisons %v, want %v", name, comparisons(slices.Concat(e.puts...)), comparisons(test.want))
			}
		}
		// A guard is not written into the caller's list of comparisons.
		cs := append(make([]clientv3.Cmp, 0, 2), own)
		s.Election("name/", "name/k", 1) // makes the client that the guard is of
		if _, err := s.stock.Client().Txn(guarded).If(cs...).Then(clientv3.OpPut("name/k", "value")).Commit(); err != nil {
			t.Error(err)
		}
		if got, want := comparisons(cs[:2]), comparisons([]clientv3.Cmp{own, {}}); got != want {
			t.Errorf("the caller's list has become %v, want %v", got, want)
		}
		e.waitUntil(third) // renewals have none: the fake would complain
		e.wantDeadline(s, third+deadline)
	})
}

// comparisons is readable, and the same for those that are the same to etcd.
func comparisons(cs []clientv3.Cmp) string {
	var all strings.Builder
	for _, c := range cs {
		fmt.Fprintf(&all, "<%v>", c.GetCompare())
	}
	return all.String()
}

// allow is a server that takes so many operations in one transaction.
func allow(most int) func(context.Context, int, *read) (*read, error) {
	return func(_ context.Context, _ int, r *read) (*read, error) {
		if len(r.Responses) > most {
			return nil, rpctypes.ErrTooManyOps
		}
		return r, nil
	}
}

package queue

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// waits are those of this package for the end of jobs/1.
var waits = map[string]func(*fakeEtcd, *testing.T) *waitCall{
	"predecessor": (*fakeEtcd).behind,
	"own key":     (*fakeEtcd).deleted,
}

func TestEndOfTheKeyEndsTheWait(t *testing.T) {
	for name, begin := range waits {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			waiting := begin(e, t)
			w := e.watch(t)
			w.create()
			waiting.wantGoingOn(t)
			w.send(t, e.del("jobs/1"))
			waiting.wantNow(t)
		})
	}
}

// A member that lags begins the watch in the past, where a key of the same name may have been deleted: an earlier
// candidate with this lease.
func TestEndOfAnEarlierKeyOfTheSameNameIsIgnored(t *testing.T) {
	for name, begin := range waits {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			waiting := begin(e, t)
			w := e.watch(t)
			w.create()
			earlier := &mvccpb.KeyValue{Key: []byte("jobs/1"), CreateRevision: 2, ModRevision: 2, Version: 1}
			created := &mvccpb.KeyValue{Key: []byte("jobs/1"), CreateRevision: 5, ModRevision: 5, Version: 1}
			w.send(t,
				&clientv3.Event{Type: clientv3.EventTypePut, Kv: earlier},
				deletion("jobs/1", 4),
				deletion("jobs/1", 5), // and put again in the same revision
				&clientv3.Event{Type: clientv3.EventTypePut, Kv: created},
			)
			waiting.wantGoingOn(t)
			e.wantNoWatch(t) // its own creation is no touch either
			w.send(t, e.del("jobs/1"))
			waiting.wantNow(t)
		})
	}
}

func TestKeyThatIsThereAnewIsGone(t *testing.T) {
	bubble(t, "by an event", func(t *testing.T) {
		e := newEtcd(t)
		waiting := e.behind(t)
		w := e.watch(t)
		w.create()
		e.del("jobs/1") // of which no event comes: a watch that is resumed after a compaction has none
		w.send(t, e.put("jobs/1", "anew"))
		waiting.wantNow(t)
	})
	for name, begin := range waits {
		bubble(t, "by a read, "+name, func(t *testing.T) {
			e := newEtcd(t)
			waiting := begin(e, t)
			e.del("jobs/1")
			e.put("jobs/1", "anew")
			e.watch(t).create()
			waiting.wantNow(t)
		})
	}
}

// The key may go while the watch is being created.
func TestKeyIsReadOnceItIsWatched(t *testing.T) {
	for name, begin := range waits {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			waiting := begin(e, t)
			w := e.watch(t)
			synctest.Wait()
			if key, _ := e.reads(); key > 0 {
				t.Errorf("the key was read %d times before it was watched", key)
			}
			e.del("jobs/1")
			waiting.wantGoingOn(t)
			w.create()
			waiting.wantNow(t)
		})
	}
}

// A read that was sent before the watch existed may have found the key before it was deleted.
func TestKeyIsReadOnceItIsWatchedThoughAReadIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting := e.wait(func(loop *retry.Loop) error { // it is read again before the watch must be there
			return e.queue().Wait(t.Context(), loop, Place{Token: 6, before: "jobs/1", rev: 5}, watchPatience/2, nil, nil)
		})
		w := e.watch(t)
		answer := make(chan struct{})
		e.set(nil, until(answer))
		time.Sleep(watchPatience / 2)
		synctest.Wait()
		if key, _ := e.reads(); key != 1 {
			t.Fatalf("%d reads of the key are under way, want 1", key)
		}
		e.del("jobs/1")
		e.set(nil, nil)
		w.create()
		close(answer)
		waiting.wantNow(t)
	})
}

// A watch that dies silently tells nothing.
func TestPredecessorIsReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting := e.behind(t)
		e.watch(t).create()
		e.del("jobs/1")
		if err := returned(t, waiting.result); err != nil || waiting.took != reread {
			t.Errorf("returned %v after %v, want nil after %v", err, waiting.took, reread)
		}
	})
}

// The touch may come before the watch that would tell of it.
func TestTouchBeforeTheWatchIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting := e.behind(t)
		e.put("jobs/1", "touched")
		e.watch(t).create()
		w := e.watch(t)
		w.create() // it has looked ahead
		w.send(t, e.del("jobs/1"))
		waiting.wantNow(t)
		if _, queue := e.reads(); queue != 1 {
			t.Errorf("%d reads of the queue, want the look ahead alone", queue)
		}
	})
}

// A predecessor that was not touched, as stock's is not, says nothing about those before it.
func TestQueueIsReadWhenNothingWasSeenAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting := e.behind(t)
		w := e.watch(t)
		w.create()
		w.send(t, e.del("jobs/1"))
		waiting.wantNow(t)
		if _, queue := e.reads(); queue != 1 {
			t.Errorf("%d reads of the queue, want 1", queue)
		}
	})
}

// readPlace waits behind a predecessor that was touched: the first watch is there, and the second is being opened.
func readPlace(t *testing.T, e *fakeEtcd) (waiting *waitCall, first, second *fakeWatch) {
	t.Helper()
	waiting = e.behind(t)
	first = e.watch(t)
	first.create()
	first.send(t, e.put("jobs/1", "touched"))
	return waiting, first, e.watch(t)
}

// A leader may proclaim as often as it likes, and each value would reach the whole of the first watch.
func TestLookAheadMovesToAWatchWithoutValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting, first, second := readPlace(t, e)
		if one, two := first.op.IsFilterPut(), second.op.IsFilterPut(); one || !two {
			t.Errorf("values are filtered: %v by the first watch and %v by the second", one, two)
		}
		second.create()
		if first.ctx.Err() == nil || second.ctx.Err() != nil {
			t.Errorf("the first watch has ended: %v, and the second: %v", first.ctx.Err(), second.ctx.Err())
		}
		second.send(t, e.del("jobs/1"))
		waiting.wantNow(t)
	})
}

// Read before, it would miss an end of the key that comes between the read and the watch.
func TestLookAheadReadsOnceTheSecondWatchExists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting, first, second := readPlace(t, e)
		for range 3 {
			first.send(t, e.put("jobs/1", "value"))
		}
		e.wantNoWatch(t)
		if _, queue := e.reads(); queue != 0 {
			t.Errorf("%d reads of the queue before the second watch exists", queue)
		}
		second.create()
		if _, queue := e.reads(); queue != 1 {
			t.Errorf("%d reads of the queue once the second watch exists, want 1", queue)
		}
		waiting.wantGoingOn(t)
	})
}

// What was seen once needs no other look.
func TestLookAheadIsMadeOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting, _, second := readPlace(t, e)
		second.create()
		for range 10 { // it is read again, and has been touched
			e.put("jobs/1", "value")
			time.Sleep(reread)
		}
		e.wantNoWatch(t)
		second.send(t, e.del("jobs/1"))
		waiting.wantNow(t)
		if key, queue := e.reads(); key < 10 || queue != 1 {
			t.Errorf("%d reads of the key and %d of the queue, want 10 and 1", key, queue)
		}
	})
}

// That nobody is before the predecessor stays true, also for a watch that takes the place of one that has broken.
func TestLookAheadIsNotRepeatedWhenTheWatchBreaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting, _, second := readPlace(t, e)
		second.create()
		second.end()
		third := e.watch(t)
		third.create()
		e.wantNoWatch(t)
		if !third.op.IsFilterPut() {
			t.Error("the values reach a watch that was opened after the look ahead")
		}
		third.send(t, e.del("jobs/1"))
		waiting.wantNow(t)
		if _, queue := e.reads(); queue != 1 {
			t.Errorf("%d reads of the queue, want 1", queue)
		}
	})
}

func TestLookAheadThatFindsAnotherIsMadeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.put("jobs/3", "three")
		waiting := e.wait(func(loop *retry.Loop) error { // behind jobs/2, which is behind jobs/1
			return e.queue().Wait(t.Context(), loop, Place{Token: 7, before: "jobs/2", rev: 6}, reread, nil, nil)
		})
		first := e.watch(t)
		first.create()
		first.send(t, e.put("jobs/2", "touched")) // by somebody who is not the first
		second := e.watch(t)
		second.create()
		if first.ctx.Err() != nil || second.ctx.Err() == nil {
			t.Errorf("the first watch has ended: %v, and the second: %v", first.ctx.Err(), second.ctx.Err())
		}
		e.del("jobs/1")
		first.send(t, e.put("jobs/2", "touched"))
		third := e.watch(t)
		third.create()
		third.send(t, e.del("jobs/2"))
		waiting.wantNow(t)
		if _, queue := e.reads(); queue != 2 {
			t.Errorf("%d reads of the queue, want one for each look ahead", queue)
		}
	})
}

func TestEndOfTheKeyBetweenTwoWatchesIsNotMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting, _, second := readPlace(t, e)
		e.del("jobs/1") // of which the first watch has not heard yet
		waiting.wantGoingOn(t)
		second.create()
		waiting.wantNow(t)
	})
}

func TestFirstWatchTellsOfTheEndOfTheKeyDuringTheLookAhead(t *testing.T) {
	bubble(t, "while the second is being opened", func(t *testing.T) {
		e := newEtcd(t)
		waiting, first, _ := readPlace(t, e)
		first.send(t, e.del("jobs/1"))
		waiting.wantNow(t)
	})
	bubble(t, "while the queue is being read", func(t *testing.T) {
		e := newEtcd(t)
		waiting, first, second := readPlace(t, e)
		e.hang(func(read clientv3.Op) bool { return read.MaxCreateRev() == 5 })
		second.create()
		first.send(t, e.del("jobs/1"))
		waiting.wantNow(t)
	})
}

// The first watch may be served by a member that lags, or have died.
func TestSecondWatchTellsWhatHappensDuringTheLookAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting, _, second := readPlace(t, e)
		answer := make(chan struct{})
		e.set(nil, until(answer))
		second.create()
		second.send(t, e.del("jobs/1"))
		close(answer)
		waiting.wantNow(t)
	})
}

func TestFirstWatchServesWhereThereIsNoSecond(t *testing.T) {
	test := func(t *testing.T, end func(e *fakeEtcd, second *fakeWatch)) (second, third *fakeWatch) {
		e := newEtcd(t)
		waiting, first, second := readPlace(t, e)
		end(e, second)
		synctest.Wait()
		if first.ctx.Err() != nil || second.ctx.Err() == nil {
			t.Errorf("the first watch has ended: %v, and the second: %v", first.ctx.Err(), second.ctx.Err())
		}
		first.send(t, e.put("jobs/1", "value"))
		third = e.watch(t) // the next chance
		first.send(t, e.del("jobs/1"))
		waiting.wantNow(t)
		if waiting.warnings > 0 {
			t.Errorf("%d warnings", waiting.warnings)
		}
		return second, third
	}
	bubble(t, "it is refused", func(t *testing.T) {
		test(t, func(_ *fakeEtcd, second *fakeWatch) { second.refuse() })
	})
	bubble(t, "it is not created in time", func(t *testing.T) {
		second, third := test(t, func(*fakeEtcd, *fakeWatch) { time.Sleep(watchPatience) })
		if second.stream() == third.stream() {
			t.Errorf("both have the stream %s", second.stream())
		}
	})
	bubble(t, "the queue cannot be read", func(t *testing.T) {
		test(t, func(e *fakeEtcd, second *fakeWatch) {
			e.hang(ofQueue)
			second.create()
			time.Sleep(retry.RequestTimeout)
			e.hang(func(clientv3.Op) bool { return false })
		})
	})
	bubble(t, "the right to read the queue is gone", func(t *testing.T) {
		test(t, func(e *fakeEtcd, second *fakeWatch) {
			e.fail(rpctypes.ErrPermissionDenied)
			second.create()
			e.fail(nil)
		})
	})
}

// Neither a read of the key nor one ahead keeps the event waiting that elects.
func TestElectionWaitsForNoRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.hang(func(read clientv3.Op) bool { return read.MaxCreateRev() != 6 }) // all but the one after the election
		waiting := e.behind(t)
		first := e.watch(t)
		first.create()
		first.send(t, e.put("jobs/1", "touched"))
		e.watch(t).create()
		e.wantNoMoreReads(t)
		first.send(t, e.del("jobs/1"))
		waiting.wantNow(t)
	})
}

// A stream stays at one endpoint, which may be dark.
func TestWatchThatIsNotCreatedInTimeIsTriedOnAnotherStream(t *testing.T) {
	for name, begin := range waits {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			waiting := begin(e, t)
			first, second := e.watch(t), e.watch(t)
			if took := second.at.Sub(first.at); took < watchPatience || took > watchPatience+50*time.Millisecond {
				t.Errorf("another watch was tried after %v, want %v", took, watchPatience)
			}
			if first.ctx.Err() == nil {
				t.Error("the first watch has not ended")
			}
			if first.stream() == second.stream() {
				t.Errorf("both watches have the stream %s", first.stream())
			}
			second.create()
			e.deleted(t)
			third := e.watch(t)
			if third.stream() != second.stream() { // the first may be stuck for good
				t.Errorf("a later watch has the stream %s, want that of the one that was created, %s", third.stream(), second.stream())
			}
			third.create()
			time.Sleep(time.Hour + reread/2) // it is there, and may stay; no read of the key is under way
			second.send(t, e.del("jobs/1"))
			waiting.wantNow(t)
		})
	}
}

// Its timer may have fired by then.
func TestWatchThatIsCreatedAtTheLastMomentStays(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			e := newEtcd(t)
			e.deleted(t)
			last := e.watch(t)
			e.deleted(t)
			other := e.watch(t)
			time.Sleep(watchPatience / 2)
			other.create() // so that the stream is alive, and the timer of the last watch is set again
			time.Sleep(watchPatience / 2)
			last.create()
			time.Sleep(10 * watchPatience)
			if last.ctx.Err() != nil {
				t.Error("a watch that was created has ended")
			}
		})
		if t.Failed() {
			return
		}
	}
}

// On an etcd with much to do an authentication may take seconds, and each stream takes one.
func TestWatchThatTakesAnAuthenticationIsGivenTheTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.client.Username = "root"
		e.deleted(t)
		for range 3 {
			w := e.watch(t)
			<-w.ctx.Done()
			if took := time.Since(w.at); took != maxWatchPatience {
				t.Errorf("a watch had %v to be created, want %v", took, maxWatchPatience)
			}
		}
	})
}

// clientv3 creates the watches of a stream one by one: after an outage, thousands have to wait for their turn.
func TestWatchThatWaitsForItsTurnIsGivenTheTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		var watches []*fakeWatch
		for range 10 {
			e.deleted(t)
			watches = append(watches, e.watch(t))
		}
		for i, w := range watches[:9] {
			time.Sleep(watchPatience * 9 / 10)
			if w.ctx.Err() != nil {
				t.Fatalf("the watch %d has ended while others were being created", i)
			}
			w.create()
		}
		time.Sleep(watchPatience)
		synctest.Wait()
		if watches[9].ctx.Err() == nil {
			t.Error("the last watch has not ended, though nothing happens on its stream")
		}
	})
}

func TestPatienceWithAWatchGrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.deleted(t)
		streams := make(map[string]bool)
		for _, want := range []time.Duration{1, 2, 4, 5, 5, 5, 5, 5, 5} {
			w := e.watch(t)
			streams[w.stream()] = true
			<-w.ctx.Done()
			if took := time.Since(w.at); took != want*time.Second {
				t.Errorf("a watch had %v to be created, want %v", took, want*time.Second)
			}
		}
		if len(streams) != 4 {
			t.Errorf("%d streams were opened, want 4", len(streams))
		}
	})
}

func TestKeyIsReadWhileNoWatchCanBeCreated(t *testing.T) {
	for name, begin := range waits {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			waiting := begin(e, t)
			e.watch(t)
			e.del("jobs/1")
			if err := returned(t, waiting.result); err != nil || waiting.took != watchPatience {
				t.Errorf("returned %v after %v, want nil after %v", err, waiting.took, watchPatience)
			}
		})
	}
}

// watchErrors end all watches of a stream. The reason may be what one of them has asked for, or the limit of a proxy.
var watchErrors = []error{
	status.Error(codes.ResourceExhausted, "too many streams"),
	rpctypes.ErrGRPCPermissionDenied,
	rpctypes.ErrGRPCEmptyKey,
	rpctypes.ErrGRPCLeaseNotFound,
}

func TestErrorOfAWatchEndsNoWait(t *testing.T) {
	for _, err := range watchErrors {
		for name, begin := range waits {
			bubble(t, name+" "+err.Error(), func(t *testing.T) {
				e := newEtcd(t)
				e.client.Watcher = clientv3.NewWatchFromWatchClient(refusing{err: err}, e.client)
				waiting := begin(e, t)
				time.Sleep(10 * time.Minute)
				waiting.wantGoingOn(t)
				if waiting.warnings != 1 || waiting.loop.Last() == nil || retry.Permanent(waiting.loop.Last()) {
					t.Errorf("%d warnings, the last failure %v", waiting.warnings, waiting.loop.Last())
				}
				e.del("jobs/1")
				deleted := time.Now()
				if err := returned(t, waiting.result); err != nil || time.Since(deleted) > 2*time.Second {
					t.Errorf("returned %v after %v", err, time.Since(deleted))
				}
			})
		}
	}
}

// refusing refuses streams of watches.
type refusing struct {
	etcdserverpb.WatchClient
	err error
}

func (r refusing) Watch(context.Context, ...grpc.CallOption) (etcdserverpb.Watch_WatchClient, error) {
	return nil, r.err
}

func TestReadThatIsRefusedEndsTheWait(t *testing.T) {
	for name, begin := range waits {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			waiting := begin(e, t)
			w := e.watch(t)
			e.fail(rpctypes.ErrPermissionDenied)
			w.create()
			if err := returned(t, waiting.result); !errors.Is(err, rpctypes.ErrPermissionDenied) || waiting.took > 0 {
				t.Errorf("returned %v after %v, want %v at once", err, waiting.took, rpctypes.ErrPermissionDenied)
			}
		})
	}
}

// One endpoint failing a read says nothing about the watch, which may use another endpoint.
func TestReadThatFailsLeavesTheWatchAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		waiting := e.behind(t)
		w := e.watch(t)
		e.fail(rpctypes.ErrNoLeader)
		w.create()
		time.Sleep(10 * time.Minute)
		e.wantNoWatch(t)
		if waiting.warnings != 1 || !errors.Is(waiting.loop.Last(), rpctypes.ErrNoLeader) {
			t.Errorf("%d warnings, the last failure %v", waiting.warnings, waiting.loop.Last())
		}
		e.fail(nil)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if waiting.loop.Last() != nil {
			t.Errorf("a streak goes on after a success: %v", waiting.loop.Last())
		}
		w.send(t, e.del("jobs/1"))
		waiting.wantNow(t)
	})
}

func TestWaitEndsWithItsContextAndLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.lag = time.Second
		e.hang(all)
		ctx, cancel := context.WithCancel(t.Context())
		waiting := e.wait(func(loop *retry.Loop) error {
			err := e.queue().Wait(ctx, loop, Place{Token: 6, before: "jobs/1", rev: 5}, reread, nil, nil)
			if running := e.running.Load(); running != 0 {
				t.Errorf("%d requests go on", running)
			}
			return err
		})
		first := e.watch(t)
		time.Sleep(time.Millisecond)
		first.create() // a read hangs
		first.send(t, e.put("jobs/1", "touched"))
		e.watch(t) // a second watch is being opened
		cancel()
		if err := returned(t, waiting.result); !errors.Is(err, context.Canceled) {
			t.Errorf("returned %v", err)
		}
	})
}

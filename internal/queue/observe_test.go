package queue

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The queue is read once the watch exists, so that events may tell again what the read has told;
// and what happens in one revision happens at once.
func TestObserveTellsNothingTwiceAndNothingThatNeverWas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		old := e.put("jobs/1", "outdated already")
		e.put("jobs/1", "known already")
		o := e.observe(t.Context(), nil)
		w := e.watch(t)
		w.create()
		o.want(t, "known already")
		w.send(t, old)
		gone := e.del("jobs/1")
		e.rev-- // jobs/1 hands over to jobs/2, in one transaction
		touched := e.put("jobs/2", "hands over")
		w.send(t, gone, touched)
		o.want(t, "hands over")
		w.send(t, e.del("jobs/2"), e.put("jobs/3", "three"), e.put("jobs/4", "is no change"), e.put("jobs/3", "3"))
		o.want(t, "", "three", "3")
	})
}

func TestObserveIgnoresKeysThatAreNoCandidates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.del("jobs/1")
		e.del("jobs/2")
		e.put("jobs/config", "of others")
		o := e.observe(t.Context(), nil)
		w := e.watch(t)
		w.create()
		o.want(t, "")
		w.send(t, e.put("jobs/config", "changed"), e.put("jobs/1/2", "of another election"), e.put("jobs/3", "three"))
		o.want(t, "three")
		time.Sleep(10 * reread) // it is read again, and is what is known
		o.want(t)
	})
}

// What was true when one watch ended may not be true when the next one begins. An event applied to the old state would
// show a candidate as the leader that never was.
func TestObserveAppliesNoEventToACopyThatHasMissedOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		o := e.observe(t.Context(), nil)
		first := e.watch(t)
		first.create()
		o.want(t, "one")
		first.end()
		second := e.watch(t) // jobs/1 and jobs/2 were read once more before
		e.del("jobs/2")
		e.put("jobs/3", "three")
		answer := make(chan struct{})
		e.set(nil, until(answer))
		second.create()
		second.send(t, e.del("jobs/1"))
		o.want(t)
		close(answer)
		o.want(t, "three")
	})
}

func TestObserveMissesNothingThatHappensBeforeItIsWatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		o := e.observeEvery(t.Context(), watchPatience/2, nil) // the leader may be read before the watch must be there
		e.watch(t)                                             // is never created
		second := e.watch(t)
		o.want(t, "one")
		e.put("jobs/1", "changed")
		answer := make(chan struct{})
		e.set(nil, func(ctx context.Context, read clientv3.Op) error {
			if read.Limit() == 1 { // of the leader alone
				return nil
			}
			return until(answer)(ctx, read)
		})
		time.Sleep(watchPatience / 2) // the leader has another value: the queue may be being read
		synctest.Wait()
		e.put("jobs/1", "changed again") // before it is watched
		second.create()
		close(answer)
		states := o.take()
		if last := len(states) - 1; last < 0 || states[last].Value != "changed again" {
			t.Errorf("observed %v, want the latest value at last", states)
		}
	})
}

// The read and the watch may be answered by different members.
func TestEventsDuringAReadAreMerged(t *testing.T) {
	// reading observes while the first read has seen the queue, and has no answer yet.
	reading := func(t *testing.T, before func(*fakeEtcd, *fakeWatch)) (*fakeEtcd, *observeCall, *fakeWatch, func()) {
		e := newEtcd(t)
		read, answer := make(chan struct{}), make(chan struct{})
		e.set(until(read), until(answer))
		o := e.observe(t.Context(), nil)
		w := e.watch(t)
		w.create()
		before(e, w)
		close(read)
		o.want(t)
		return e, o, w, func() { close(answer) }
	}
	bubble(t, "older than what it has seen", func(t *testing.T) {
		var late *clientv3.Event
		_, o, w, answer := reading(t, func(e *fakeEtcd, w *fakeWatch) {
			w.send(t, e.put("jobs/1", "earlier"))
			late = e.put("jobs/1", "seen")
		})
		answer()
		o.want(t, "seen")
		w.send(t, late)
		o.want(t)
	})
	bubble(t, "newer than what it has seen", func(t *testing.T) {
		e, o, w, answer := reading(t, func(*fakeEtcd, *fakeWatch) {})
		w.send(t, e.put("jobs/3", "three"), e.del("jobs/1"))
		w.send(t, e.put("jobs/2", "newer"), e.del("jobs/3"), e.put("jobs/4", "four"))
		answer()
		o.want(t, "newer")
		w.send(t, e.del("jobs/2"))
		o.want(t, "four")
	})
	bubble(t, "both", func(t *testing.T) {
		e, o, w, answer := reading(t, func(e *fakeEtcd, w *fakeWatch) {
			w.send(t, e.del("jobs/1"))
			w.send(t, e.put("jobs/1", "anew"))
		})
		w.send(t, e.del("jobs/2"))
		answer()
		o.want(t, "anew")
	})
}

func TestReadThatHangsHoldsUpNoEvent(t *testing.T) {
	bubble(t, "of the leader", func(t *testing.T) {
		e := newEtcd(t)
		o := e.observe(t.Context(), nil)
		w := e.watch(t)
		w.create()
		o.want(t, "one")
		e.hang(all)
		time.Sleep(reread + time.Second)
		w.send(t, e.put("jobs/1", "changed"))
		o.want(t, "changed")
		e.wantNoMoreReads(t)
	})
	bubble(t, "of the queue", func(t *testing.T) {
		e := newEtcd(t)
		o := e.observe(t.Context(), nil)
		w := e.watch(t)
		w.create()
		o.want(t, "one")
		late := e.put("jobs/1", "changed") // its event is still under way when the leader is read again
		e.hang(func(read clientv3.Op) bool { return read.Limit() == 0 })
		time.Sleep(reread + time.Second)
		w.send(t, late)
		o.want(t, "changed")
		w.send(t, e.put("jobs/1", "changed again"))
		o.want(t, "changed again")
		e.hang(func(clientv3.Op) bool { return false })
		time.Sleep(time.Minute)
		o.want(t)
	})
}

func TestObserveTellsTheFirstStateThoughNoWatchCanBeCreated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		o := e.observe(t.Context(), nil)
		first := e.watch(t)
		time.Sleep(watchPatience)
		o.want(t, "one")
		if second := e.watch(t); first.stream() == second.stream() {
			t.Errorf("both watches have the stream %s", first.stream())
		}
		e.put("jobs/1", "changed")
		time.Sleep(10 * time.Second)
		o.want(t, "changed")
		o.wantOneWarning(t)
	})
}

// A watch that dies silently tells nothing.
func TestObserveReadsTheLeaderAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		o := e.observe(t.Context(), nil)
		w := e.watch(t)
		w.create()
		o.want(t, "one")
		e.put("jobs/1", "changed")
		o.want(t)
		time.Sleep(reread)
		o.want(t, "changed")
		w.send(t, e.put("jobs/1", "changed again"))
		o.want(t, "changed again")
	})
}

// clientv3 resumes a watch where it ended, and an etcd that has gone back in time has no events for it until its
// revisions have grown. That the leader is the same one does not show that etcd has not gone back.
func TestEtcdThatHasGoneBackIsNoticedThoughTheLeaderIsTheSame(t *testing.T) {
	for what, told := range map[string]bool{"the watch has come further": true, "only a read has come further": false} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newEtcd(t)
				o := e.observe(t.Context(), nil)
				w := e.watch(t)
				if !told {
					e.put("other", "of others")
				}
				w.create()
				o.want(t, "one")
				if told {
					w.tell(7, e.put("jobs/3", "three"))
				}
				e.restore(6, "jobs/1", "jobs/2")
				time.Sleep(2 * reread)
				e.watch(t).create() // it is watched anew
				o.want(t)
			})
		})
	}
}

// An event that was kept for a read is dropped if that read shows that etcd has gone back in time.
func TestEventFromBeforeEtcdHasGoneBackIsNotApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		o := e.observe(t.Context(), nil)
		w := e.watch(t)
		w.create()
		o.want(t, "one")
		answer := make(chan struct{})
		e.set(func(ctx context.Context, read clientv3.Op) error {
			if read.Limit() == 1 { // of the leader alone
				return nil
			}
			return until(answer)(ctx, read)
		}, nil)
		one := e.del("jobs/1") // its event is under way when the leader is read, so the queue is read, too
		time.Sleep(reread)
		synctest.Wait()
		two, three := e.del("jobs/2"), e.put("jobs/3", "three")
		w.tell(three.Kv.ModRevision, one, two, three)
		o.want(t, "two", "", "three")
		e.restore(2) // it is empty
		close(answer)
		o.want(t, "")
	})
}

func TestErrorOfAWatchDoesNotEndObserve(t *testing.T) {
	for _, err := range watchErrors {
		bubble(t, err.Error(), func(t *testing.T) {
			e := newEtcd(t)
			e.client.Watcher = clientv3.NewWatchFromWatchClient(refusing{err: err}, e.client)
			o := e.observe(t.Context(), nil)
			o.want(t, "one")
			time.Sleep(10 * time.Minute)
			o.want(t)
			e.del("jobs/1")
			time.Sleep(2 * time.Second)
			o.want(t, "two")
			o.wantOneWarning(t)
		})
	}
}

func TestReadThatIsRefusedEndsObserveAfterTheStatesBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		consume := make(chan struct{})
		o := e.observe(t.Context(), func(Candidate) bool { <-consume; return true })
		w := e.watch(t)
		w.create()
		w.send(t, e.put("jobs/1", "changed"))
		e.fail(rpctypes.ErrPermissionDenied)
		w.end()
		synctest.Wait()
		close(consume)
		if err := returned(t, o.result); !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("returned %v, want %v", err, rpctypes.ErrPermissionDenied)
		}
		o.want(t, "one", "changed")
	})
}

// slowly observes changes of jobs/1 while the consumer is busy with the first state. It returns what follows.
func slowly(t *testing.T, values []string) []Candidate {
	e := newEtcd(t)
	consume := make(chan struct{})
	o := e.observe(t.Context(), func(Candidate) bool { <-consume; return true })
	w := e.watch(t)
	w.create()
	for _, value := range values {
		w.send(t, e.put("jobs/1", value))
	}
	o.want(t, "one")
	close(consume)
	return o.take()
}

func TestSlowConsumerGetsTheLatestStates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		values := make([]string, 1000)
		for i := range values {
			values[i] = strconv.Itoa(i)
		}
		var got []string
		for _, c := range slowly(t, values) {
			got = append(got, c.Value)
		}
		if want := values[1000-maxPending:]; !slices.Equal(got, want) {
			t.Errorf("%d states wait for the consumer, %q, want the last %d in their order", len(got), got, maxPending)
		}
	})
}

func TestSlowConsumerIsNotToldAgainWhatItKnows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		values := []string{"left out", "one"} // the consumer has got "one"
		for i := range maxPending - 1 {
			values = append(values, strconv.Itoa(i))
		}
		if states := slowly(t, values); len(states) != maxPending-1 || states[0].Value != "0" {
			t.Errorf("told of %d states, the first of which is %q, want %d, from %q on", len(states), states[0].Value, maxPending-1, "0")
		}
	})
}

func TestSlowConsumerKeepsABoundedAmountOfValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		value := func(i, size int) string { return strconv.Itoa(i) + strings.Repeat(".", size-1) }
		var values []string
		for i := range 9 {
			values = append(values, value(i, maxPendingBytes/4))
		}
		states := slowly(t, values)
		if len(states) != 4 || states[3].Value != values[8] {
			t.Errorf("%d states of a quarter of the bound each are kept, want the last 4", len(states))
		}
		states = slowly(t, []string{value(1, 2*maxPendingBytes), value(2, 3*maxPendingBytes)})
		if len(states) != 1 || states[0].Value[0] != '2' {
			t.Errorf("%d states over the bound are kept, want the last", len(states))
		}
		// What the consumer has got does not count any more.
		states = slowly(t, []string{value(1, maxPendingBytes-10), "a", "b", "c", "d"})
		if len(states) != 5 {
			t.Errorf("%d states within the bound are kept, want 5", len(states))
		}
	})
}

func TestConsumedStatesCountNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		consume := make(chan struct{})
		o := e.observe(t.Context(), func(Candidate) bool { <-consume; return true })
		w := e.watch(t)
		w.create()
		for range 10 {
			w.send(t, e.put("jobs/1", strings.Repeat("a", maxPendingBytes/2-1)))
			w.send(t, e.put("jobs/1", strings.Repeat("b", maxPendingBytes/2-1)))
			for range 2 {
				consume <- struct{}{}
				synctest.Wait()
			}
		}
		if states := o.take(); len(states) != 21 {
			t.Errorf("got %d states, want 21", len(states))
		}
		close(consume)
	})
}

func TestStatesComeInTheOrderOfRevisions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		o := e.observe(t.Context(), func(Candidate) bool {
			time.Sleep(time.Millisecond) // it is slower than the changes
			return true
		})
		w := e.watch(t)
		w.create()
		for i := range 500 {
			leader := string(e.kvs[0].Key)
			switch i % 5 {
			case 0:
				w.send(t, e.put(fmt.Sprintf("jobs/%x", 100+i), "joins"))
			case 1:
				w.send(t, e.put(leader, strconv.Itoa(i)))
			case 2:
				w.send(t, e.del(leader))
			case 3: // its event is late: a read tells it before
				late := e.put(leader, strconv.Itoa(i))
				time.Sleep(reread)
				w.send(t, late)
			case 4:
				w.send(t, e.put(leader, strconv.Itoa(i)), e.put(leader, strconv.Itoa(i)+" again"))
			}
		}
		time.Sleep(time.Second)
		states := o.take()
		for i := 1; i < len(states); i++ {
			if states[i].Token < states[i-1].Token {
				t.Errorf("%v comes after %v", states[i], states[i-1])
			}
		}
		if last := states[len(states)-1]; last.Key != string(e.kvs[0].Key) || last.Value != string(e.kvs[0].Value) {
			t.Errorf("the last state is %v, want %v", last, e.kvs[0])
		}
	})
}

// Both are the user's code, in the end, which may panic: only in its own goroutine can it recover from that.
func TestObserveCallsBackInTheCallersGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		e.client.Watcher = absent{} // of which it warns, once the queue was read
		caller := goroutine()
		var warned, yielded string
		warn := func(error) { warned = goroutine() }
		err := e.queue().Observe(t.Context(), warn, reread, func(Candidate) bool {
			yielded = goroutine()
			e.put("jobs/1", strconv.Itoa(int(e.rev))) // for another state
			return warned == ""
		})
		if err != nil || warned != caller || yielded != caller {
			t.Errorf("Observe() = %v, warn was called in %q and yield in %q, want %q", err, warned, yielded, caller)
		}
	})
}

func TestNothingIsLeftWhenObserveHasReturned(t *testing.T) {
	for name, end := range map[string]func(cancel func()) bool{
		"as yield returns false":    func(func()) bool { return false },
		"as yield panics":           func(func()) bool { panic("yield") },
		"as yield calls Goexit":     func(func()) bool { runtime.Goexit(); return true },
		"as its context has ended":  func(cancel func()) bool { cancel(); return true },
		"as its context ends later": func(cancel func()) bool { time.AfterFunc(time.Second, cancel); return true },
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			e.lag = time.Second
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error)
			go func() {
				defer close(done)
				defer func() {
					_ = recover()
					if running := e.running.Load(); running != 0 {
						t.Errorf("%d requests go on", running)
					}
				}()
				_ = e.queue().Observe(ctx, func(error) {}, reread, func(c Candidate) bool {
					return c.Value != "changed" || end(cancel)
				})
			}()
			w := e.watch(t)
			time.Sleep(time.Millisecond)
			w.create()
			e.hang(all)
			time.Sleep(reread + time.Second) // a read is under way
			if e.running.Load() == 0 {
				t.Fatal("no read is under way")
			}
			w.send(t, e.put("jobs/1", "changed"))
			_ = returned(t, done)
			if w.ctx.Err() == nil {
				t.Error("the watch has not ended")
			}
		})
	}
}

func TestObserveEndsWithItsContextsError(t *testing.T) {
	bubble(t, "while nothing happens", func(t *testing.T) {
		e := newEtcd(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		o := e.observe(ctx, nil)
		e.watch(t).create()
		if err := returned(t, o.result); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("returned %v", err)
		}
	})
	bubble(t, "before it begins", func(t *testing.T) {
		e := newEtcd(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		o := e.observe(ctx, nil)
		if err := returned(t, o.result); !errors.Is(err, context.Canceled) {
			t.Errorf("returned %v", err)
		}
		o.want(t)
	})
	bubble(t, "though states wait for the consumer", func(t *testing.T) {
		e := newEtcd(t)
		ctx, cancel := context.WithCancel(t.Context())
		consume := make(chan struct{})
		o := e.observe(ctx, func(Candidate) bool { <-consume; return true })
		w := e.watch(t)
		w.create()
		w.send(t, e.put("jobs/1", "changed"))
		cancel()
		close(consume)
		if err := returned(t, o.result); !errors.Is(err, context.Canceled) {
			t.Errorf("returned %v", err)
		}
		o.want(t, "one")
	})
	bubble(t, "though a request was refused before", func(t *testing.T) {
		e := newEtcd(t)
		ctx, cancel := context.WithCancel(t.Context())
		consume := make(chan struct{})
		o := e.observe(ctx, func(Candidate) bool { <-consume; return true })
		w := e.watch(t)
		w.create()
		e.fail(rpctypes.ErrPermissionDenied)
		w.end()
		synctest.Wait()
		cancel()
		close(consume)
		if err := returned(t, o.result); !errors.Is(err, context.Canceled) {
			t.Errorf("returned %v", err)
		}
	})
	bubble(t, "or with the client", func(t *testing.T) {
		e := newEtcd(t)
		o := e.observe(t.Context(), nil)
		e.watch(t).create()
		_ = e.client.Close()
		if err := returned(t, o.result); !errors.Is(err, context.Canceled) {
			t.Errorf("returned %v", err)
		}
	})
}

package queue

import (
	"errors"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"example.com/leader/internal/retry"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A candidacy is that of jobs/2, which waits behind jobs/1 and looks after its own key.
type candidacy struct {
	*waitCall
	own, before *fakeWatch
	ownWarnings int // about the own key's watch
	relied      int // how often the wait has asked for a goroutine that looks after the own key
	rely        func()
	elsewhere   chan error // what that goroutine has found
}

// candidacy begins to wait. Both watches exist when it returns.
func (e *fakeEtcd) candidacy(t *testing.T) *candidacy {
	t.Helper()
	return e.candidacyIn(t, Place{Token: 6, before: "jobs/1", rev: 5, oldest: true})
}

func (e *fakeEtcd) candidacyIn(t *testing.T, p Place) *candidacy {
	t.Helper()
	c := &candidacy{elsewhere: make(chan error, 1)}
	loop := &retry.Loop{Client: e.client, Warn: func(error) { c.ownWarnings++ }}
	own := e.queue().WatchOwn(t.Context(), loop, "jobs/2", 6)
	c.rely = func() {
		c.relied++
		go func() { c.elsewhere <- own.Wait() }()
	}
	c.waitCall = e.wait(func(loop *retry.Loop) error {
		return e.queue().Wait(t.Context(), loop, p, reread, own, c.rely)
	})
	for range 2 {
		if w := e.watch(t); string(w.op.KeyBytes()) == "jobs/2" {
			c.own = w
		} else {
			c.before = w
		}
	}
	c.own.create()
	c.before.create()
	return c
}

func TestWaitEndsWhenTheCandidatesOwnKeyIsGone(t *testing.T) {
	bubble(t, "by an event", func(t *testing.T) {
		e := newEtcd(t)
		c := e.candidacy(t)
		c.own.send(t, e.del("jobs/2"))
		c.wantOwnGone(t)
	})
	bubble(t, "before its watch existed", func(t *testing.T) {
		e := newEtcd(t)
		e.del("jobs/2")
		e.candidacy(t).wantOwnGone(t)
	})
	bubble(t, "but not by the end of an earlier key of the same name", func(t *testing.T) {
		e := newEtcd(t)
		c := e.candidacy(t)
		c.own.send(t, deletion("jobs/2", 3))
		c.wantGoingOn(t)
	})
}

func (c *candidacy) wantOwnGone(t *testing.T) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-c.result:
		if !errors.Is(err, ErrGone) {
			t.Errorf("returned %v, want %v", err, ErrGone)
		}
	default:
		t.Error("has not returned")
	}
	if c.relied != 0 {
		t.Error("a goroutine was asked for")
	}
}

// What is known when the one before has gone must not be found out after the election.
func TestOwnEndWinsWhereBothEndsHaveBeenTold(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // the candidate goes on when it has been sent both
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		c := e.candidacy(t)
		before, own := e.del("jobs/1"), e.del("jobs/2")
		c.before.events <- clientv3.WatchResponse{Events: []*clientv3.Event{before}}
		c.own.events <- clientv3.WatchResponse{Events: []*clientv3.Event{own}}
		c.wantOwnGone(t)
	})
}

// A process that was stopped may find the end of the one before first.
func TestOwnEndIsLookedForWhereverItMayHaveBeenTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		own := e.queue().WatchOwn(t.Context(), &retry.Loop{Client: e.client}, "jobs/2", 6)
		defer own.Close()
		w := &wait{own: own, rely: func() { t.Error("a goroutine was asked for") }}
		e.del("jobs/2")
		e.watch(t).create()
		if w.ownOver() != nil {
			return // the read was that fast
		}
		synctest.Wait() // it has been read
		if w.ownOver() == nil {
			t.Error("not known to be gone")
		}
	})
}

// The own watch must be served whatever is the matter with the other one.
func TestOwnKeyIsLeftToAnotherGoroutineBeforeTheWaitMayBlock(t *testing.T) {
	for name, block := range map[string]func(*testing.T, *fakeEtcd, *candidacy){
		"in a read, as the watch of the key before has ended": func(_ *testing.T, e *fakeEtcd, c *candidacy) {
			e.hang(all)
			c.before.end()
		},
		"in a read of its place, as the key before has gone": func(t *testing.T, e *fakeEtcd, c *candidacy) {
			e.hang(all)
			c.before.send(t, e.del("jobs/1"))
		},
		"in the logger, as the key before could not be read": func(t *testing.T, e *fakeEtcd, c *candidacy) {
			blocked := make(chan struct{})
			t.Cleanup(func() { close(blocked) })
			c.loop.Warn = func(error) { <-blocked }
			e.fail(errors.New("no answer"))
			time.Sleep(reread)
		},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			c := e.candidacyIn(t, Place{Token: 6, before: "jobs/1", rev: 5})
			block(t, e, c)
			synctest.Wait()
			c.own.send(t, e.del("jobs/2"))
			select {
			case err := <-c.elsewhere:
				if err != nil {
					t.Errorf("Wait of the own key returned %v", err)
				}
			default:
				t.Error("nobody has looked after the own key")
			}
			if c.relied != 1 {
				t.Errorf("asked for a goroutine %d times, want once", c.relied)
			}
		})
	}
}

func TestTroubleWithTheOwnWatchIsLeftToAnotherGoroutine(t *testing.T) {
	bubble(t, "watch ends", func(t *testing.T) {
		e := newEtcd(t)
		c := e.candidacy(t)
		c.own.end()
		synctest.Wait()
		again := e.watch(t)
		again.create()
		if c.relied != 1 || c.ownWarnings != 1 || c.warnings != 0 {
			t.Errorf("asked for a goroutine %d times, %d warnings of the own watch and %d of the other, want 1, 1, 0",
				c.relied, c.ownWarnings, c.warnings)
		}
		c.wantGoingOn(t)
		again.send(t, e.del("jobs/2"))
		if err := <-c.elsewhere; err != nil {
			t.Errorf("Wait of the own key returned %v", err)
		}
		c.wantGoingOn(t)
		c.before.send(t, e.del("jobs/1"))
		c.wantNow(t)
	})
	bubble(t, "key cannot be read", func(t *testing.T) {
		e := newEtcd(t)
		e.hang(func(read clientv3.Op) bool { return string(read.KeyBytes()) == "jobs/2" })
		c := e.candidacy(t)
		time.Sleep(2 * retry.RequestTimeout)
		synctest.Wait()
		if c.relied != 1 || c.ownWarnings != 1 {
			t.Errorf("asked for a goroutine %d times, warned %d times, want 1 and 1", c.relied, c.ownWarnings)
		}
		c.before.send(t, e.del("jobs/1"))
		c.wantNow(t)
		c.own.send(t, e.del("jobs/2"))
		if err := <-c.elsewhere; err != nil {
			t.Errorf("Wait of the own key returned %v", err)
		}
	})
}

func TestOwnKeyIsWatchedByTheSameWatchAfterTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		c := e.candidacy(t)
		c.before.send(t, e.del("jobs/1"))
		c.wantNow(t)
		c.rely()
		c.own.send(t, e.del("jobs/2"))
		if err := <-c.elsewhere; err != nil {
			t.Errorf("Wait of the own key returned %v", err)
		}
		e.wantNoWatch(t)
	})
}

// A request counts only if a read finds it: the event of one that was withdrawn, or is about an earlier term, does not.
func TestCandidateIsAskedToStepBackOnlyByARequestThatIsThere(t *testing.T) {
	for name, test := range map[string]struct {
		request string // its value; "" if it is not there any more
		asked   bool
	}{
		"a request":                    {"6", true},
		"one that was withdrawn":       {"", false},
		"one about an earlier term":    {"5", false},
		"one that is none":             {"6x", false},
		"one about a term to come":     {"7", false},
		"one with a number that grows": {"06", false},
	} {
		bubble(t, name, func(t *testing.T) {
			e := newEtcd(t)
			loop := &retry.Loop{Client: e.client}
			own := e.queue().WatchOwn(t.Context(), loop, "jobs/2", 6)
			w := e.watch(t)
			w.create()
			done := make(chan error, 1)
			go func() { done <- own.Wait() }()
			synctest.Wait()
			ev := e.put("jobs/2/stepback", test.request)
			if test.request == "" {
				e.del("jobs/2/stepback")
			}
			w.send(t, ev)
			synctest.Wait()
			select {
			case err := <-done:
				if !test.asked || !errors.Is(err, ErrAsked) {
					t.Errorf("Wait() = %v", err)
				}
			default:
				if test.asked {
					t.Error("the request was not seen")
				}
				w.send(t, e.del("jobs/2"))
				if err := <-done; err != nil {
					t.Errorf("Wait() = %v after the key was deleted", err)
				}
			}
		})
	}
}

// While no watch can be created, only the reads between the attempts find a request.
func TestRequestToStepBackIsFoundThoughNoWatchOfTheOwnKeyCanBeCreated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEtcd(t)
		own := e.queue().WatchOwn(t.Context(), &retry.Loop{Client: e.client}, "jobs/2", 6)
		done := make(chan error, 1)
		go func() { done <- own.Wait() }()
		w := e.watch(t)
		e.put("jobs/2/stepback", "6")
		w.refuse()
		if err := returned(t, done); !errors.Is(err, ErrAsked) {
			t.Errorf("Wait() = %v", err)
		}
	})
}

package leader_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The tests of this file are about hooks, log handlers and functions that lead which panic, exit their
// goroutine or block.

// A misdeed is what the user's code does in one place, once it is armed, and only once.
type misdeed struct {
	place string // a hook's name, or "log: " and a message
	do    func()
	armed atomic.Bool
	done  chan struct{} // closed just before
}

func newMisdeed(place string, do func()) *misdeed {
	return &misdeed{place: place, do: do, done: make(chan struct{})}
}

func (m *misdeed) at(place string) {
	if place == m.place && m.armed.CompareAndSwap(true, false) {
		close(m.done)
		m.do()
	}
}

// loseRepliesUntilDone makes transactions fail as if their replies were lost, until it is done.
func (m *misdeed) loseRepliesUntilDone(kv *brokenKV) {
	after := func(resp *clientv3.TxnResponse, err error) (*clientv3.TxnResponse, error) {
		select {
		case <-m.done:
			return resp, err
		default:
			return nil, rpctypes.ErrTimeoutDueToConnectionLost
		}
	}
	kv.after.Store(&after)
}

// options are those of an Elector whose user does it.
func (m *misdeed) options() []leader.Option {
	return []leader.Option{
		leader.WithHooks(leader.Hooks{
			Campaigning:    func(string) { m.at("Campaigning") },
			CampaignFailed: func(string, error) { m.at("CampaignFailed") },
			Elected:        func(string, *leader.Leader, time.Duration) { m.at("Elected") },
			Ended:          func(string, *leader.Leader, error) { m.at("Ended") },
			LeaderChanged:  func(string, leader.Candidate) { m.at("LeaderChanged") },
			Renewed:        func(clientv3.LeaseID, time.Duration, time.Time) { m.at("Renewed") },
			RenewFailed:    func(clientv3.LeaseID, time.Duration, error) { m.at("RenewFailed") },
		}),
		leader.WithLogger(slog.New(handler(func(rec slog.Record) { m.at("log: " + rec.Message) }))),
	}
}

// ending calls f in a goroutine and says how that ends: by returning, by Goexit, or by a panic with this
// value.
func ending(f func()) <-chan any {
	c := make(chan any, 1)
	go func() {
		var how any = "Goexit"
		defer func() {
			if r := recover(); r != nil {
				how = r
			}
			c <- how
		}()
		f()
		how = "return"
	}()
	return c
}

// What was begun is ended before a panic goes on. The TTL is so long that nothing of it expires.
func TestPanicAndGoexitReachTheCallerAndLeaveNothing(t *testing.T) {
	_, client := start(t)
	for _, test := range []struct{ place, by string }{
		{"Campaigning", "Campaign"},
		{"CampaignFailed", "Campaign"},
		{"CampaignFailed", "TryCampaign"},
		{"CampaignFailed", "Run"},
		{"Elected", "Campaign"},
		{"Elected", "TryCampaign"},
		{"Elected", "Run"},
		{"log: elected", "Campaign"},
		{"log: elected", "Run"},
		{"log: campaign is being retried", "Campaign"},
		{"log: requests of the campaign work again", "Campaign"},
		{"log: joined the queue", "Campaign"},
		{"log: joined the queue", "Run"},
		{"log: candidacy was lost, joining again", "Campaign"},
		{"log: campaigning again after a lost term", "Run"},
		{"lead", "Run"},
	} {
		for _, how := range []string{"panic", "Goexit"} {
			for _, shared := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s at %s of %s, shared %v", how, test.place, test.by, shared), func(t *testing.T) {
					m := newMisdeed(test.place, func() {
						if how == "panic" {
							panic("panic")
						}
						runtime.Goexit()
					})
					broken := wrapped(client)
					kv := &brokenKV{KV: client.KV}
					broken.KV = kv
					e, others := newElector(t, broken, m.options()...), newElector(t, client)
					name := t.Name()
					if shared {
						lead(t, e, name+"-other", "") // keeps the lease
					}
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					m.armed.Store(true)
					var first *leader.Leader
					waits := test.place == "CampaignFailed" || test.place == "log: candidacy was lost, joining again" || test.place == "log: joined the queue"
					switch {
					case waits:
						first = lead(t, others, name, "")
					case test.place == "log: campaign is being retried":
						m.loseRepliesUntilDone(kv)
					case test.place == "log: requests of the campaign work again":
						kv.loseReplies(1)
					}
					ended := ending(func() {
						switch test.by {
						case "Campaign":
							_, _ = e.Campaign(ctx, name, "")
						case "TryCampaign":
							_, _ = e.TryCampaign(ctx, name, "")
						case "Run":
							_ = e.Run(ctx, name, "", func(ctx context.Context, _ *leader.Leader) error {
								m.at("lead")
								if err := others.Evict(t.Context(), name); err != nil { //nolint:contextcheck // as an operator would
									t.Errorf("Evict: %v", err)
								}
								<-ctx.Done()
								return nil
							})
						}
					})
					switch {
					case test.place == "log: candidacy was lost, joining again":
						own := awaitQueue(t, client, name, queued(2))[1].Key
						if _, err := client.Delete(t.Context(), own); err != nil {
							t.Fatal(err)
						}
					case test.place == "log: joined the queue": // the candidate leaves by itself
					case waits && test.by != "TryCampaign":
						awaitQueue(t, client, name, queued(2))
						cancel()
					}
					if got := etcdtest.Await(t, "the caller's end", ended); got != how {
						t.Errorf("the call has ended by %v, want %v", got, how)
					}
					if first != nil {
						if cs := awaitQueue(t, client, name, queued(1)); cs[0].Token != first.Token() {
							t.Errorf("the queue is %+v", cs)
						}
						resign(t, first)
					}
					awaitQueue(t, client, name, queued(0))
					resign(t, lead(t, e, name, ""))
				})
			}
		}
	}
}

// A breakingWatcher ends all its watches once, when broken is closed.
type breakingWatcher struct {
	clientv3.Watcher
	broken  chan struct{}
	created atomic.Int64
}

func (w *breakingWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	select {
	case <-w.broken:
		return w.Watcher.Watch(ctx, key, opts...)
	default:
	}
	ctx, cancel := context.WithCancel(ctx)
	in, out := w.Watcher.Watch(ctx, key, opts...), make(chan clientv3.WatchResponse)
	go func() {
		defer close(out)
		defer cancel()
		for {
			select {
			case resp, ok := <-in:
				if !ok {
					return
				}
				select {
				case out <- resp:
				case <-ctx.Done():
				}
				if resp.Created {
					w.created.Add(1)
				}
			case <-w.broken:
				return
			}
		}
	}()
	return out
}

// wildTTL leaves time to look at many terms that are renewed side by side.
const wildTTL = 2 * ttl

// A wild is an Elector whose user misbehaves in an election.
type wild struct {
	*misdeed
	e       *leader.Elector
	name    string // of the election
	lease   *brokenLease
	kv      *brokenKV
	watch   *breakingWatcher
	elected chan *leader.Leader // as Elected was told
	ended   chan error          // causes, as Ended was told
}

func newWild(t *testing.T, client *clientv3.Client, name, place string, do func()) *wild {
	t.Helper()
	w := &wild{
		misdeed: newMisdeed(place, do), name: name,
		lease: &brokenLease{Lease: client.Lease}, kv: &brokenKV{KV: client.KV},
		watch:   &breakingWatcher{Watcher: client.Watcher, broken: make(chan struct{})},
		elected: make(chan *leader.Leader, 100), ended: make(chan error, 100),
	}
	c := wrapped(client)
	c.KV, c.Lease, c.Watcher = w.kv, w.lease, w.watch
	w.e = newElector(t, c, append([]leader.Option{leader.WithTTL(wildTTL), leader.WithHooks(leader.Hooks{
		Elected: func(election string, l *leader.Leader, _ time.Duration) {
			if election == w.name {
				w.elected <- l
			}
		},
		Ended: func(election string, _ *leader.Leader, cause error) {
			if election == w.name {
				w.ended <- cause
			}
		},
	})}, w.options()...)...)
	return w
}

// reach lets what the place is about happen, when the Elector leads so many elections.
func (w *wild) reach(t *testing.T, elections int64) {
	t.Helper()
	switch w.place {
	case "RenewFailed", "log: renewal of the lease is being retried":
		fail := func(context.Context) (*clientv3.LeaseKeepAliveResponse, error) {
			w.lease.keepAlive.Store(nil)
			return nil, rpctypes.ErrNoLeader
		}
		w.lease.keepAlive.Store(&fail)
	case "log: watch of the own key is being retried", "log: observing is being retried":
		awaitCalls(t, w.watch.created.Load, 2*elections) // of the own key, and for LeaderChanged
		close(w.watch.broken)
	}
}

// expire lets no renewal succeed.
func (w *wild) expire() {
	fail := func(context.Context) (*clientv3.LeaseKeepAliveResponse, error) { return nil, rpctypes.ErrNoLeader }
	w.lease.keepAlive.Store(&fail)
}

// awaitRenewed waits until a renewal has counted that was sent after since. It returns false if the term is lost instead.
func awaitRenewed(t *testing.T, what string, l *leader.Leader, since time.Time) bool {
	t.Helper()
	for until := since.Add(wildTTL - wildTTL/5); !l.Deadline().After(until); time.Sleep(time.Millisecond) {
		if !l.IsLeader() {
			t.Errorf("%s: the term was lost: %v", what, context.Cause(l.Context()))
			return false
		}
	}
	return true
}

// Hooks and log handlers that are called in goroutines of the library. (A panic there ends the process.)
func TestGoexitInAHookOrALogHandlerLosesNothing(t *testing.T) {
	goexit(t, map[string][]error{
		"Ended":          {leader.ErrResigned, leader.ErrEvicted, leader.ErrExpired},
		"LeaderChanged":  {leader.ErrResigned, leader.ErrEvicted, leader.ErrExpired},
		"Renewed":        {leader.ErrResigned, leader.ErrExpired},
		"RenewFailed":    {leader.ErrResigned, leader.ErrExpired},
		"log: resigned":  {leader.ErrResigned},
		"log: lost":      {leader.ErrEvicted, leader.ErrExpired},
		renewalIsRetried: {leader.ErrResigned, leader.ErrExpired},
		observingRetried: {leader.ErrResigned, leader.ErrEvicted, leader.ErrExpired},
	})
}

// The same for what is logged of a broken watch.
func TestGoexitInALogHandlerThatIsToldOfABrokenWatchLosesNothing(t *testing.T) {
	goexit(t, map[string][]error{watchIsRetried: {leader.ErrExpired, leader.ErrEvicted, leader.ErrResigned}})
}

const (
	campaignRetried  = "log: campaign is being retried"
	renewalIsRetried = "log: renewal of the lease is being retried"
	watchIsRetried   = "log: watch of the own key is being retried"
	observingRetried = "log: observing is being retried"
)

// goexit has terms that end by each cause, of Electors whose user exits the goroutine at the place. They
// are side by side, so that they wait together.
func goexit(t *testing.T, places map[string][]error) {
	_, client := start(t)
	type term struct {
		*wild
		what  string
		cause error
		l     *leader.Leader
	}
	var terms []*term
	for _, place := range slices.Sorted(maps.Keys(places)) {
		for _, cause := range places[place] {
			w := newWild(t, client, fmt.Sprintf("jobs-%d", len(terms)), place, runtime.Goexit)
			w.armed.Store(true)
			what := fmt.Sprintf("Goexit at %q in a term that ends with %q", place, cause)
			terms = append(terms, &term{w, what, cause, lead(t, w.e, w.name, "")})
		}
	}
	atEnd := func(l *term) bool { return l.place == "Ended" || l.place == "log: resigned" || l.place == "log: lost" }
	for _, l := range terms {
		l.reach(t, 1)
	}
	for _, l := range terms {
		if !atEnd(l) {
			etcdtest.Await(t, l.what, l.done)
		}
	}
	reached := time.Now()
	for _, l := range terms {
		if !awaitRenewed(t, l.what, l.l, reached) {
			t.FailNow()
		}
	}
	for _, l := range terms {
		switch {
		case errors.Is(l.cause, leader.ErrResigned):
			resign(t, l.l)
		case errors.Is(l.cause, leader.ErrEvicted):
			if err := l.e.Evict(t.Context(), l.name); err != nil {
				t.Fatalf("%s: Evict: %v", l.what, err)
			}
		case errors.Is(l.cause, leader.ErrExpired):
			l.expire()
		}
	}
	for _, l := range terms {
		etcdtest.Await(t, "the end after "+l.what, l.l.Context().Done())
		awaitEnd(t, l.l, l.cause)
		if atEnd(l) {
			etcdtest.Await(t, l.what, l.done)
		}
		if cause := etcdtest.Await(t, "Ended after "+l.what, l.ended); !errors.Is(cause, l.cause) {
			t.Errorf("%s: Ended was told %v", l.what, cause)
		}
	}
	for _, l := range terms {
		awaitQueue(t, client, l.name, queued(0))
		l.lease.keepAlive.Store(nil)
		resign(t, lead(t, l.e, l.name, "")) // the next one is like any other
		if cause := etcdtest.Await(t, "Ended after "+l.what, l.ended); !errors.Is(cause, leader.ErrResigned) {
			t.Errorf("%s: of the next term Ended was told %v", l.what, cause)
		}
	}
}

// While the user's code blocks, its Elector's other terms are renewed and end in time, keys are deleted, and the next
// campaign begins.
func TestUserCodeThatBlocksHoldsUpNothingElse(t *testing.T) {
	_, client := start(t)
	others := newElector(t, client)
	blocked, release := context.WithCancel(t.Context())
	defer release()
	type scene struct {
		*wild
		other *leader.Leader     // a term in another election, on the same lease
		late  chan time.Duration // how late that has ended
		l     *leader.Leader     // the term; nil if the user cannot have it yet
		again *leader.Leader     // the term of the next campaign
		calls []<-chan error     // that return in the end
	}
	var scenes []*scene // side by side, so that they wait together
	for i, place := range []string{
		"Campaigning", "CampaignFailed", "Elected", "Ended", "LeaderChanged", "Renewed", "RenewFailed", "lead",
		"log: elected", "log: resigned", "log: lost", campaignRetried, renewalIsRetried, watchIsRetried, observingRetried,
	} {
		s := &scene{
			wild: newWild(t, client, fmt.Sprintf("jobs-%d", i), place, func() { <-blocked.Done() }),
			late: make(chan time.Duration, 1),
		}
		scenes = append(scenes, s)
		s.other = lead(t, s.e, s.name+"-other", "")
		context.AfterFunc(s.other.Context(), func() { s.late <- time.Since(s.other.Deadline()) })
		s.armed.Store(true)
		call := func(f func() error) {
			returned := make(chan error, 1)
			go func() { returned <- f() }()
			s.calls = append(s.calls, returned)
		}
		switch place {
		case "Campaigning", "Elected", "log: elected", campaignRetried:
			if place == campaignRetried {
				s.loseRepliesUntilDone(s.kv)
			}
			call(func() error {
				l, err := s.e.Campaign(t.Context(), s.name, "")
				if err == nil {
					err = l.Resign(t.Context())
				}
				return err
			})
			if place == "Elected" {
				s.l = etcdtest.Await(t, "a term", s.elected)
			}
		case "CampaignFailed":
			s.l = lead(t, others, s.name, "")
			call(func() error {
				if _, err := s.e.TryCampaign(t.Context(), s.name, ""); !errors.Is(err, leader.ErrHeld) {
					return fmt.Errorf("TryCampaign: %w", err)
				}
				return nil
			})
		case "lead":
			call(func() error {
				return s.e.Run(t.Context(), s.name, "", func(context.Context, *leader.Leader) error { s.at("lead"); return nil })
			})
			s.l = etcdtest.Await(t, "a term", s.elected)
		default:
			s.l = lead(t, s.e, s.name, "")
			s.reach(t, 2)
		}
		switch place {
		case "Ended", "log: resigned":
			call(func() error { return s.l.Resign(t.Context()) })
		case "log: elected", "log: lost":
			awaitQueue(t, client, s.name, queued(1))
			if err := others.Evict(t.Context(), s.name); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, s := range scenes {
		etcdtest.Await(t, s.place, s.done)
	}
	reached := time.Now()
	for _, s := range scenes {
		awaitRenewed(t, s.place+" blocks", s.other, reached)
		if s.l != nil {
			go func() { _ = s.l.Resign(t.Context()) }() // it may wait for the user's code
		}
		name := s.name
		if s.place == "Campaigning" || s.place == campaignRetried {
			name += "-next" // that campaign waits for the user's code
		} else {
			awaitQueue(t, client, s.name, queued(0))
		}
		s.again = lead(t, s.e, name, "")
	}
	for _, s := range scenes {
		s.expire()
	}
	for _, s := range scenes {
		awaitEnd(t, s.other, leader.ErrExpired)
		awaitEnd(t, s.again, leader.ErrExpired)
		if late := etcdtest.Await(t, "the end", s.late); late > wildTTL/5 {
			t.Errorf("%s blocks: the term ended %v late, more than the margin", s.place, late)
		}
	}
	for _, s := range scenes {
		s.lease.keepAlive.Store(nil)
	}
	release()
	for _, s := range scenes {
		for _, returned := range s.calls {
			if err := etcdtest.Await(t, "a call, after "+s.place+" was released", returned); err != nil {
				t.Errorf("%s blocked, and then a call returned %v", s.place, err)
			}
		}
		resign(t, lead(t, s.e, s.name, ""))
	}
	awaitExpiry(t, client)
}

func TestGoexitInLeaderChangedLosesNoLaterChange(t *testing.T) {
	_, client := start(t)
	told := make(chan string, 10)
	e := newElector(t, client, leader.WithHooks(leader.Hooks{LeaderChanged: func(_ string, c leader.Candidate) {
		told <- c.Value
		if c.Value == "first" {
			runtime.Goexit()
		}
	}}))
	l := lead(t, e, "jobs", "first")
	for value := ""; value != "first"; {
		value = etcdtest.Await(t, "LeaderChanged", told)
	}
	if err := l.Proclaim(t.Context(), "second"); err != nil {
		t.Fatal(err)
	}
	if got := etcdtest.Await(t, "LeaderChanged, though an earlier call has ended its goroutine", told); got != "second" {
		t.Errorf("told of %q, want %q", got, "second")
	}
	resign(t, l)
}

// A refusingLease refuses the first grant.
type refusingLease struct {
	clientv3.Lease
	grants atomic.Int64
}

func (l *refusingLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	if l.grants.Add(1) == 1 {
		return nil, rpctypes.ErrNoLeader
	}
	return l.Lease.Grant(ctx, ttl)
}

func TestLogHandlerThatIsToldOfAGrantAndBlocksHoldsUpNoOtherCampaign(t *testing.T) {
	_, client := start(t)
	c := wrapped(client)
	c.Lease = &refusingLease{Lease: client.Lease}
	reached, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	e := newElector(t, c, leader.WithLogger(slog.New(handler(func(r slog.Record) {
		if r.Message == "campaign is being retried" {
			once.Do(func() {
				close(reached)
				<-release
			})
		}
	}))))
	held := campaign(t.Context(), e, "a", "")
	etcdtest.Await(t, "the log handler", reached)
	resign(t, lead(t, e, "b", ""))
	close(release)
	resign(t, awaitLeader(t, held))
}

// failingReads fails the reads that are of a whole election: those of Observe.
type failingReads struct {
	clientv3.KV
	err   error
	reads atomic.Int64
}

func (kv *failingReads) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if op := clientv3.OpGet(key, opts...); len(op.RangeBytes()) > 0 && !op.IsKeysOnly() {
		kv.reads.Add(1)
		return nil, kv.err
	}
	return kv.KV.Get(ctx, key, opts...)
}

func TestGoexitInALogHandlerThatIsToldOfAFailedObserveIsNoLoop(t *testing.T) {
	for message, err := range map[string]error{
		"changes of the leader are not reported any more": rpctypes.ErrPermissionDenied,
		"observing is being retried":                      rpctypes.ErrNoLeader,
	} {
		t.Run(message, func(t *testing.T) {
			_, client := start(t)
			kv := &failingReads{KV: client.KV, err: err}
			broken := wrapped(client)
			broken.KV = kv
			var exits atomic.Int64
			e := newElector(t, broken, leader.WithLogger(slog.New(handler(func(r slog.Record) {
				if r.Message == message {
					exits.Add(1)
					runtime.Goexit()
				}
			}))), leader.WithHooks(leader.Hooks{LeaderChanged: func(string, leader.Candidate) {}}))
			l := lead(t, e, "jobs", "")
			time.Sleep(time.Second)
			if reads := kv.reads.Load(); reads == 0 || reads > 20 {
				t.Errorf("%d reads in a second, want some, with pauses", reads)
			}
			if exits.Load() == 0 {
				t.Error("the log handler was not told")
			}
			resign(t, l)
		})
	}
}

func TestHookThatEndsItsGoroutineKeepsNothingFromTheNext(t *testing.T) {
	_, client := start(t)
	ended := make(chan error, 1)
	e := newElector(t, client,
		leader.WithHooks(leader.Hooks{Ended: func(string, *leader.Leader, error) { runtime.Goexit() }}),
		leader.WithHooks(leader.Hooks{Ended: func(_ string, _ *leader.Leader, cause error) { ended <- cause }}))
	resign(t, lead(t, e, "jobs", ""))
	if cause := etcdtest.Await(t, "the next hook", ended); !errors.Is(cause, leader.ErrResigned) {
		t.Errorf("cause %v, want %v", cause, leader.ErrResigned)
	}
}

func TestResignReturnsThoughAHookBlocks(t *testing.T) {
	_, client := start(t)
	released, reached := make(chan struct{}), make(chan struct{}, 10)
	e := newElector(t, client, leader.WithHooks(leader.Hooks{LeaderChanged: func(string, leader.Candidate) {
		reached <- struct{}{}
		<-released
	}}))
	l := lead(t, e, "jobs", "")
	etcdtest.Await(t, "LeaderChanged", reached)
	if err := l.Resign(context.Background()); err != nil { // the key is gone, though not all hooks were told
		t.Errorf("Resign() = %v", err)
	}
	close(released)
}

// A blockingContext is of a type of the user's, and blocks when it is asked for anything.
type blockingContext struct {
	context.Context
	asked   func()
	forever chan struct{}
}

func (c blockingContext) Value(any) any { c.asked(); <-c.forever; return nil }

func TestAContextThatBlocksHoldsUpNoTerm(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	l := lead(t, e, "jobs", "")
	forever, asked := make(chan struct{}), make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	other := campaign(blockingContext{ctx, sync.OnceFunc(func() { close(asked) }), forever}, e, "other", "")
	etcdtest.Await(t, "the context to block", asked)
	if _, ok := e.Leading("jobs"); !ok {
		t.Error("the Elector does not know its term")
	}
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	etcdtest.Await(t, "the term to end", l.Context().Done())
	cancel()
	close(forever)
	<-other
}

// net/http recovers from such a panic, and the process goes on.
func TestAPanicOfTheContextLeavesNoCampaignBehind(t *testing.T) {
	_, client := start(t)
	e, err := leader.New(client)
	if err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		_, _ = e.Campaign(nil, "jobs", "") //nolint:staticcheck // that is the panic
	}()
	if err := e.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// A log handler that exits the goroutine that watches the own key loses neither requests to step back nor deletions.
func TestTheOwnKeyIsWatchedAgainAfterALogHandlerHasExited(t *testing.T) {
	_, client := start(t)
	w := newWild(t, client, "jobs", watchIsRetried, runtime.Goexit)
	w.armed.Store(true)
	l := lead(t, w.e, "jobs", "")
	w.reach(t, 1)
	etcdtest.Await(t, "the log handler", w.done)
	next := campaign(t.Context(), newElector(t, client), "jobs", "next")
	awaitQueue(t, client, "jobs", queued(2))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // requests that nobody sees are waited for
	defer cancel()
	if err := newElector(t, client).Transfer(ctx, "jobs", leader.Candidate{}); err != nil {
		t.Error(err)
	}
	if cause := context.Cause(l.Context()); !errors.Is(cause, leader.ErrTransferred) {
		t.Errorf("the term has ended by %v, want ErrTransferred", cause)
	}
	resign(t, l)
	resign(t, awaitLeader(t, next))
}

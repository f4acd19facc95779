package leader_test

import (
	"context"
	"log/slog"
	"runtime"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A call is one of Hooks.Overdue.
type overdueCall struct {
	l    *leader.Leader
	late time.Duration
}

func TestWorkThatIgnoresTheEndOfItsTermIsReportedUntilItReturns(t *testing.T) {
	_, client := start(t)
	calls, log, release := make(chan overdueCall, 100), make(logChannel, 100), make(chan struct{})
	const ttl, margin = 3 * time.Second, 500 * time.Millisecond
	e := newElector(t, client, leader.WithTTL(ttl), leader.WithMargin(margin), leader.WithLogger(slog.New(log)),
		leader.WithHooks(leader.Hooks{Overdue: func(election string, l *leader.Leader, late time.Duration) {
			if election != "jobs" {
				t.Errorf("reported for %q", election)
			}
			calls <- overdueCall{l, late}
		}}))
	terms, ran := runHeld(t.Context(), e, "", release)
	l := etcdtest.Await(t, "the term", terms)
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	first, second := etcdtest.Await(t, "a report", calls), etcdtest.Await(t, "another", calls)
	if first.l != l || second.l != l || first.late < margin || second.late < first.late+ttl {
		t.Errorf("reported %v and %v late, want the margin, and a TTL later", first.late, second.late)
	}
	if r := awaitRecord(t, log, "the function that leads has not returned", nil); r.Level != slog.LevelWarn {
		t.Errorf("logged at %v, want WARN: the term is over", r.Level)
	}
	close(release)
	if last := etcdtest.Await(t, "the last report", calls); last.l != l || last.late != 0 {
		t.Errorf("reported %v late after the function has returned", last.late)
	}
	etcdtest.Await(t, "the next term", terms)
	if err := etcdtest.Await(t, "Run", ran); err != nil {
		t.Errorf("Run: %v", err)
	}
	select {
	case call := <-calls:
		t.Errorf("reported %v late, of a function that returned in time", call.late)
	default:
	}
}

// As long as lead has not returned Run does not resign, so nobody else works.
func TestWorkThatIgnoresTheEndOfRunsContextIsReportedWhileItsTermLasts(t *testing.T) {
	_, client := start(t)
	calls, log, release := make(chan overdueCall, 100), make(logChannel, 100), make(chan struct{})
	e := newElector(t, client, leader.WithMargin(100*time.Millisecond), leader.WithLogger(slog.New(log)),
		leader.WithHooks(leader.Hooks{Overdue: func(_ string, l *leader.Leader, late time.Duration) { calls <- overdueCall{l, late} }}))
	ctx, stop := context.WithCancel(t.Context())
	terms, ran := runHeld(ctx, e, "", release)
	l := etcdtest.Await(t, "the term", terms)
	stop()
	if call := etcdtest.Await(t, "a report", calls); call.l != l || !l.IsLeader() {
		t.Errorf("reported of %v; it leads: %v", call.l, l.IsLeader())
	}
	if r := awaitRecord(t, log, "the function that leads has not returned", nil); r.Level != slog.LevelInfo {
		t.Errorf("logged at %v, want INFO: the term is not over", r.Level)
	}
	close(release)
	etcdtest.Await(t, "the last report", calls)
	_ = etcdtest.Await(t, "Run", ran)
}

// The key of a term that is over must not wait for a hook, and Run must not go on before it has returned.
func TestOverdueHookThatBlocksOrExitsHoldsUpNoKey(t *testing.T) {
	for name, do := range map[string]func(block <-chan struct{}){
		"blocks": func(block <-chan struct{}) { <-block },
		"exits":  func(<-chan struct{}) { runtime.Goexit() },
	} {
		t.Run(name, func(t *testing.T) {
			_, client := start(t)
			called, block, release := make(chan time.Duration, 10), make(chan struct{}), make(chan struct{})
			e := newElector(t, client, leader.WithMargin(50*time.Millisecond), leader.WithHooks(leader.Hooks{
				Overdue: func(_ string, _ *leader.Leader, late time.Duration) {
					called <- late
					if late > 0 {
						do(block)
					}
				},
			}))
			ctx, stop := context.WithCancel(t.Context())
			terms, ran := runHeld(ctx, e, "", release)
			etcdtest.Await(t, "the term", terms)
			stop()
			etcdtest.Await(t, "the report", called)
			close(release)
			awaitQueue(t, client, "jobs", queued(0))
			if name == "blocks" {
				select {
				case err := <-ran:
					t.Errorf("Run has returned %v while the hook blocks", err)
				case <-time.After(50 * time.Millisecond):
				}
			}
			close(block)
			_ = etcdtest.Await(t, "Run", ran)
			if late := etcdtest.Await(t, "the last report", called); late != 0 {
				t.Errorf("reported %v late after the function has returned", late)
			}
		})
	}
}

func TestLeadingIsTheTermThatHoldsNow(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client, leader.WithPrefix("svc"))
	wantNone := func(when, name string) {
		t.Helper()
		if l, ok := e.Leading(name); ok || l != nil {
			t.Errorf("Leading(%q) = %v, %v %s", name, l, ok, when)
		}
	}
	wantNone("before a campaign", "jobs")
	for _, bad := range []string{"", "jobs/"} {
		wantNone("for a bad name", bad)
	}
	first := lead(t, newElector(t, client, leader.WithPrefix("svc")), "jobs", "")
	next := campaign(t.Context(), e, "jobs", "")
	awaitQueue(t, client, "svc/jobs", queued(2))
	wantNone("while it waits", "jobs")
	resign(t, first)
	l := awaitLeader(t, next)
	if got, ok := e.Leading("jobs"); !ok || got != l {
		t.Errorf("Leading() = %v, %v, want %v", got, ok, l)
	}
	wantNone("of another election", "other")
	wantNone("of the name with the prefix", "svc/jobs")
	resign(t, l)
	l = lead(t, e, "jobs", "")
	if got, ok := e.Leading("jobs"); !ok || got != l {
		t.Errorf("Leading() = %v, %v in the next term, want %v", got, ok, l)
	}
}

// Whatever ends the term, and though its key may still be there while the work winds down.
func TestLeadingIsOverWithTheTerm(t *testing.T) {
	for _, end := range []string{"resigned", "evicted", "transferred", "unhealthy", "expired", "closed"} {
		t.Run(end, func(t *testing.T) {
			_, client := start(t)
			var p patient
			broken, lease := wrapped(client), &brokenLease{Lease: client.Lease}
			broken.Lease = lease
			e := newExpiring(t, broken, leader.WithMargin(ttl/2), leader.WithHealth(p.check))
			l := lead(t, e, "jobs", "")
			next := campaign(t.Context(), newElector(t, client), "jobs", "")
			awaitQueue(t, client, "jobs", queued(2))
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var err error
			switch end {
			case "resigned":
				err = l.Resign(ctx)
			case "evicted":
				err = e.Evict(ctx, "jobs")
			case "transferred":
				transfer(ctx, e, "jobs", leader.Candidate{})
			case "unhealthy":
				p.fail(errSick)
			case "expired":
				fail := func(context.Context) (*clientv3.LeaseKeepAliveResponse, error) { return nil, rpctypes.ErrNoLeader }
				lease.keepAlive.Store(&fail)
			case "closed":
				err = e.Close(ctx)
			}
			if err != nil {
				t.Errorf("%s: %v", end, err)
			}
			etcdtest.Await(t, "the end of the term", l.Context().Done())
			if got, ok := e.Leading("jobs"); ok || got != nil {
				t.Errorf("Leading() = %v, %v when the term has ended", got, ok)
			}
			resign(t, awaitLeader(t, next))
			if got, ok := e.Leading("jobs"); ok || got != nil {
				t.Errorf("Leading() = %v, %v when another one has led", got, ok)
			}
		})
	}
}

// Whatever has ended the function's context, and however the function ends.
func TestOverdueIsReportedWhateverEndsContextAndFunction(t *testing.T) {
	for _, test := range []struct{ context, function string }{
		{"transferred", "return"}, {"closed", "return"}, {"evicted", "panic"}, {"evicted", "Goexit"},
	} {
		t.Run(test.context+", "+test.function, func(t *testing.T) {
			_, client := start(t)
			calls, release := make(chan overdueCall, 100), make(chan struct{})
			e := newElector(t, client, leader.WithMargin(100*time.Millisecond), leader.WithHooks(leader.Hooks{
				Overdue: func(_ string, l *leader.Leader, late time.Duration) { calls <- overdueCall{l, late} },
			}))
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			terms := make(chan *leader.Leader, 10)
			ended := ending(func() {
				_ = e.Run(ctx, "jobs", "", func(_ context.Context, l *leader.Leader) error {
					terms <- l
					<-release
					switch test.function {
					case "panic":
						panic("panic")
					case "Goexit":
						runtime.Goexit()
					}
					return nil
				})
			})
			l := etcdtest.Await(t, "the term", terms)
			ops := newElector(t, client)
			next := campaign(ctx, newElector(t, client), "jobs", "")
			awaitQueue(t, client, "jobs", queued(2))
			closed := make(chan error, 1)
			switch test.context {
			case "transferred":
				transfer(ctx, ops, "jobs", leader.Candidate{})
			case "closed":
				go func() { closed <- e.Close(t.Context()) }()
			case "evicted":
				if err := ops.Evict(ctx, "jobs"); err != nil {
					t.Fatal(err)
				}
			}
			if call := etcdtest.Await(t, "the report", calls); call.l != l || call.late < 100*time.Millisecond {
				t.Errorf("reported %v late", call.late)
			}
			close(release)
			awaitThat(t, "the last report", calls, func(call overdueCall) bool { return call.late == 0 })
			if test.context == "closed" {
				if err := etcdtest.Await(t, "Close", closed); err != nil {
					t.Errorf("Close: %v", err)
				}
			}
			second := awaitLeader(t, next)
			stop()
			if how := etcdtest.Await(t, "the end of Run", ended); how != test.function {
				t.Errorf("Run has ended by %v, want %v", how, test.function)
			}
			resign(t, second)
		})
	}
}

// An exit in a hook loses nothing.
func TestOverdueIsReportedAgainAfterAHookThatExits(t *testing.T) {
	_, client := start(t)
	calls, release := make(chan time.Duration, 10), make(chan struct{})
	e := newExpiring(t, client, leader.WithMargin(50*time.Millisecond), leader.WithHooks(leader.Hooks{
		Overdue: func(_ string, _ *leader.Leader, late time.Duration) {
			calls <- late
			if late > 0 {
				runtime.Goexit()
			}
		},
	}))
	ctx, stop := context.WithCancel(t.Context())
	terms, ran := runHeld(ctx, e, "", release)
	etcdtest.Await(t, "the term", terms)
	stop()
	etcdtest.Await(t, "the report", calls)
	select {
	case <-calls:
	case <-time.After(2 * ttl):
		t.Error("not reported again a TTL later")
	}
	close(release)
	_ = etcdtest.Await(t, "Run", ran)
}

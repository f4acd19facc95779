package leader_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestRunReturnsWhatLeadReturns(t *testing.T) {
	_, client := start(t)
	boom := errors.New("boom")
	for _, want := range []error{nil, boom} {
		err := leader.Run(t.Context(), client, "jobs", "", func(context.Context, *leader.Leader) error { return want }, leader.WithTTL(ttl))
		if !errors.Is(err, want) {
			t.Errorf("Run returned %v, want %v", err, want)
		}
	}
	// A lead that resigns by itself has not lost its term.
	err := leader.Run(t.Context(), client, "jobs", "", func(ctx context.Context, l *leader.Leader) error {
		if err := l.Resign(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
		return boom
	}, leader.WithTTL(ttl))
	if !errors.Is(err, boom) {
		t.Errorf("Run returned %v, want %v", err, boom)
	}
}

func TestRunReturnsCtxErrorJoinedWithLeads(t *testing.T) {
	_, client := start(t)
	boom := errors.New("boom")
	ctx, cancel := context.WithCancel(t.Context())
	err := leader.Run(ctx, client, "jobs", "", func(ctx context.Context, _ *leader.Leader) error {
		cancel()
		<-ctx.Done()
		return boom
	}, leader.WithTTL(ttl))
	if !errors.Is(err, context.Canceled) || !errors.Is(err, boom) {
		t.Errorf("Run returned %v", err)
	}
	// A campaign's end by ctx is Run's too.
	l := lead(t, newElector(t, client), "jobs", "")
	ctx, cancel = context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() {
		ran <- leader.Run(ctx, client, "jobs", "", func(context.Context, *leader.Leader) error { return nil }, leader.WithTTL(ttl))
	}()
	awaitQueue(t, client, "jobs", queued(2))
	cancel()
	if err := etcdtest.Await(t, "Run", ran); !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
	onlyKey(t, client, "jobs/")
	resign(t, l)
}

// elastic/elastic-agent#4543, kubernetes/client-go#1155: the process stays up and never leads again.
func TestRunCampaignsAgainAfterALostTerm(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	terms := make(chan *leader.Leader)
	boom := errors.New("not returned, for the term was lost")
	ran := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		ran <- e.Run(ctx, "jobs", "", func(ctx context.Context, l *leader.Leader) error {
			terms <- l
			<-ctx.Done()
			if ctxErr, termErr := context.Cause(ctx), context.Cause(l.Context()); termErr != nil && !errors.Is(ctxErr, termErr) {
				t.Errorf("lead's context was cancelled with %v, the term's with %v", ctxErr, termErr)
			}
			return boom
		})
	}()
	operator := newElector(t, client)
	var last int64
	for range 4 {
		l := etcdtest.Await(t, "lead", terms)
		if l.Token() <= last {
			t.Errorf("token %d came after %d", l.Token(), last)
		}
		last = l.Token()
		if err := operator.Evict(t.Context(), "jobs"); err != nil {
			t.Fatal(err)
		}
	}
	etcdtest.Await(t, "lead", terms)
	cancel()
	if err := etcdtest.Await(t, "Run", ran); !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
}

// What lead returns after its term was lost is not returned by Run. It is nothing new if its context was cancelled.
func TestErrorOfLeadAfterALostTermIsAWarning(t *testing.T) {
	evict := func(e *leader.Elector) error { return e.Evict(t.Context(), "jobs") }
	handOver := func(e *leader.Elector) error { return e.Transfer(t.Context(), "jobs", leader.Candidate{}) }
	for name, test := range map[string]struct {
		err  error
		ends func(e *leader.Elector) error
		want string
	}{
		"of its own":                   {errors.New("broken"), evict, "WARN"},
		"none":                         {nil, evict, "INFO"},
		"its context's":                {context.Canceled, evict, "INFO"},
		"of its own, after a transfer": {errors.New("broken"), handOver, "WARN"},
		"none, after a transfer":       {nil, handOver, "INFO"},
	} {
		t.Run(name, func(t *testing.T) {
			_, client := start(t)
			log := make(logChannel, 100)
			e := newElector(t, client, leader.WithLogger(slog.New(log)))
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			terms, ran := make(chan *leader.Leader, 10), make(chan outcome, 1)
			go func() {
				ran <- outcome{err: e.Run(ctx, "jobs", "", func(ctx context.Context, l *leader.Leader) error {
					terms <- l
					<-ctx.Done()
					return test.err
				})}
			}()
			etcdtest.Await(t, "the term", terms)
			next := campaign(t.Context(), newElector(t, client), "jobs", "")
			awaitQueue(t, client, "jobs", queued(2))
			if err := test.ends(e); err != nil {
				t.Fatal(err)
			}
			r := awaitRecord(t, log, "campaigning again after a lost term", ran)
			resign(t, awaitLeader(t, next))
			if got := attr(r, "error"); r.Level.String() != test.want || (got != "") != (test.want == "WARN") {
				t.Errorf("logged at %v with error %q, want %s", r.Level, got, test.want)
			}
			etcdtest.Await(t, "the next term", terms)
			stop()
			etcdtest.Await(t, "Run", ran)
		})
	}
}

func TestRunCallsLeadForNoTermThatIsOver(t *testing.T) {
	_, client := start(t)
	operator := newElector(t, client)
	var over []int64 // tokens
	e := newElector(t, client, leader.WithHooks(leader.Hooks{Elected: func(_ string, l *leader.Leader, _ time.Duration) {
		if len(over) == 2 {
			return
		}
		over = append(over, l.Token())
		if err := operator.Evict(t.Context(), "jobs"); err != nil {
			t.Error(err)
		}
		<-l.Context().Done()
	}}))
	calls := 0
	err := e.Run(t.Context(), "jobs", "", func(_ context.Context, l *leader.Leader) error {
		if calls++; !l.IsLeader() || slices.Contains(over, l.Token()) {
			t.Errorf("lead was called for the term %d, and those that are over are %v", l.Token(), over)
		}
		return nil
	})
	if err != nil || calls != 1 || len(over) != 2 {
		t.Errorf("Run returned %v after %d calls of lead and %d terms that were over before, want nil, 1 and 2", err, calls, len(over))
	}
}

// kubernetes/kubernetes#139991, kubernetes/client-go#728: the next leader begins while work of the old one goes on.
func TestRunLetsGoOnlyAfterLeadHasReturned(t *testing.T) {
	_, client := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	working, stopping, finish := make(chan struct{}), make(chan struct{}), make(chan struct{})
	ran := make(chan error, 1)
	go func() {
		ran <- leader.Run(ctx, client, "jobs", "", func(ctx context.Context, l *leader.Leader) error {
			close(working)
			<-ctx.Done()
			close(stopping)
			<-finish
			if !l.IsLeader() {
				t.Error("the term ended before lead returned")
			}
			return nil
		}, leader.WithTTL(ttl))
	}()
	etcdtest.Await(t, "lead", working)
	next := campaign(t.Context(), newElector(t, client), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	cancel()
	etcdtest.Await(t, "lead's context", stopping)
	select {
	case <-next:
		t.Error("another was elected while lead was still at work")
	case <-time.After(100 * time.Millisecond):
	}
	close(finish)
	awaitLeader(t, next)
	if err := etcdtest.Await(t, "Run", ran); !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
}

func TestRunResignsBeforeAPanicGoesOn(t *testing.T) {
	_, client := start(t)
	func() {
		defer func() {
			if r := recover(); r != "boom" {
				t.Errorf("recovered %v", r)
			}
			if resp, err := client.Get(t.Context(), "jobs/", clientv3.WithPrefix()); err != nil || len(resp.Kvs) != 0 {
				t.Errorf("keys after the panic: %v, %v", resp, err)
			}
		}()
		_ = leader.Run(t.Context(), client, "jobs", "", func(context.Context, *leader.Leader) error { panic("boom") }, leader.WithTTL(ttl))
	}()
}

// Close lets go of an election only after the function that works under it has returned.
func TestCloseWaitsForRun(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	working, finish, ran := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ran <- e.Run(t.Context(), "jobs", "", func(ctx context.Context, l *leader.Leader) error {
			close(working)
			<-ctx.Done()
			if !errors.Is(context.Cause(ctx), leader.ErrClosed) {
				t.Errorf("lead's context was cancelled with %v", context.Cause(ctx))
			}
			if !l.IsLeader() {
				t.Error("the term ended before lead returned")
			}
			<-finish
			return nil
		})
	}()
	etcdtest.Await(t, "lead", working)
	next := campaign(t.Context(), newElector(t, client), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Close whose ctx ended while lead was running: %v", err)
	}
	select {
	case <-next:
		t.Error("another was elected while lead was running")
	default:
	}
	close(finish)
	if err := e.Close(t.Context()); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := etcdtest.Await(t, "Run", ran); !errors.Is(err, leader.ErrClosed) {
		t.Errorf("Run of a closed Elector: %v", err)
	}
	awaitLeader(t, next)
}

func TestRunDoesNotJoinTheCauseOfItsContextWithItself(t *testing.T) {
	_, client := start(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	err := newElector(t, client).Run(ctx, "jobs", "", func(ctx context.Context, _ *leader.Leader) error {
		cancel(errors.New("SIGTERM"))
		<-ctx.Done()
		return context.Cause(ctx)
	})
	if err == nil || strings.Count(err.Error(), "SIGTERM") != 1 {
		t.Errorf("Run returns %q, want the cause once", err)
	}
}

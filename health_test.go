package leader_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
)

// A patient is what a check says.
type patient struct {
	err    atomic.Pointer[error]
	hung   atomic.Pointer[chan struct{}]
	checks atomic.Int64
	inside atomic.Int64
	most   atomic.Int64
}

func (p *patient) fail(err error) {
	if err == nil {
		p.err.Store(nil)
	} else {
		p.err.Store(&err)
	}
}

// hang lets checks hang whatever their context says, until the returned function is called.
func (p *patient) hang() (goOn func()) {
	c := make(chan struct{})
	p.hung.Store(&c)
	return func() {
		p.hung.Store(nil)
		close(c)
	}
}

func (p *patient) check(context.Context, string) error {
	p.checks.Add(1)
	if n := p.inside.Add(1); n > p.most.Load() {
		p.most.Store(n)
	}
	defer p.inside.Add(-1)
	if c := p.hung.Load(); c != nil {
		<-*c
	}
	if err := p.err.Load(); err != nil {
		return *err
	}
	return nil
}

var errSick = errors.New("the work makes no progress")

func TestLeaderThatIsUnhealthyForTooLongLosesItsTermAndLetsTheNextLead(t *testing.T) {
	_, client := start(t)
	const ttl, margin = 3 * time.Second, 600 * time.Millisecond
	for name, ill := range map[string]func(p *patient) (end func()){
		"the check fails": func(p *patient) func() { p.fail(errSick); return func() { p.fail(nil) } },
		"the check hangs": func(p *patient) func() { return p.hang() },
	} {
		t.Run(name, func(t *testing.T) {
			var p patient
			e := newElector(t, client, leader.WithTTL(ttl), leader.WithMargin(margin), leader.WithHealth(p.check))
			l := lead(t, e, t.Name(), "")
			next := campaign(t.Context(), newElector(t, client), t.Name(), "")
			awaitQueue(t, client, t.Name(), queued(2))
			end := ill(&p)
			began := time.Now()
			etcdtest.Await(t, "the end of the term", l.Context().Done())
			if took := time.Since(began); took > ttl {
				t.Errorf("the term ended after %v, want TTL - margin from the last success", took)
			}
			cause := context.Cause(l.Context())
			if !errors.Is(cause, leader.ErrUnhealthy) {
				t.Errorf("the term ended with %v", cause)
			}
			if name == "the check fails" && !errors.Is(cause, errSick) || name == "the check hangs" && !strings.Contains(cause.Error(), "not returned") {
				t.Errorf("the cause %v does not say why", cause)
			}
			if _, err := e.Campaign(t.Context(), t.Name(), ""); !errors.Is(err, leader.ErrCampaigning) {
				t.Errorf("Campaign while the work winds down: %v", err)
			}
			resign(t, awaitLeader(t, next)) // a margin later
			if p.most.Load() > 1 {
				t.Errorf("%d checks at a time", p.most.Load())
			}
			end()
			// The election is released when etcd has confirmed that the key is gone, a moment after the next one leads.
			again, err := e.Campaign(t.Context(), t.Name(), "")
			for deadline := time.Now().Add(patience); errors.Is(err, leader.ErrCampaigning) && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
				again, err = e.Campaign(t.Context(), t.Name(), "")
			}
			if err != nil {
				t.Fatalf("Campaign of one that is healthy again: %v", err)
			}
			resign(t, again)
		})
	}
}

func TestResignLetsTheNextLeadAtOnceAfterATermThatWasUnhealthy(t *testing.T) {
	_, client := start(t)
	var p patient
	e := newElector(t, client, leader.WithTTL(3*time.Second), leader.WithMargin(1500*time.Millisecond), leader.WithHealth(p.check))
	l := lead(t, e, "jobs", "")
	p.fail(errSick)
	etcdtest.Await(t, "the end of the term", l.Context().Done())
	resign(t, l)
	awaitQueue(t, client, "jobs", queued(0))
}

func TestCandidateThatIsUnhealthyLeavesTheQueueAndComesBack(t *testing.T) {
	_, client := start(t)
	l := lead(t, newElector(t, client), "jobs", "leads")
	var p patient
	p.fail(errSick)
	e := newElector(t, client, leader.WithTTL(3*time.Second), leader.WithHealth(p.check))
	if _, err := e.TryCampaign(t.Context(), "jobs", ""); !errors.Is(err, leader.ErrUnhealthy) || !errors.Is(err, errSick) {
		t.Errorf("TryCampaign of one that is unhealthy: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := e.Campaign(ctx, "jobs", ""); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, errSick) {
		t.Errorf("Campaign of one that is unhealthy: %v", err)
	}
	log := make(logChannel, 100)
	e = newElector(t, client, leader.WithTTL(3*time.Second), leader.WithHealth(p.check), leader.WithLogger(slog.New(log)))
	next := campaign(t.Context(), e, "jobs", "waits")
	says := func() {
		t.Helper()
		if why := attr(awaitRecord(t, log, "unhealthy, not in the queue", next), "error"); !strings.Contains(why, errSick.Error()) {
			t.Errorf("logged %q, want it to say %q", why, errSick)
		}
	}
	says()
	p.fail(nil)
	awaitQueue(t, client, "jobs", queued(2))
	p.fail(errSick)
	awaitQueue(t, client, "jobs", queued(1))
	says()
	p.fail(nil)
	awaitQueue(t, client, "jobs", queued(2))
	resign(t, l)
	resign(t, awaitLeader(t, next))
}

func TestRunCampaignsAgainWhenItIsHealthyAgain(t *testing.T) {
	_, client := start(t)
	var p patient
	e := newElector(t, client, leader.WithTTL(3*time.Second), leader.WithHealth(p.check))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	terms, ran := make(chan *leader.Leader, 10), make(chan error, 1)
	go func() {
		ran <- e.Run(ctx, "jobs", "", func(ctx context.Context, l *leader.Leader) error {
			terms <- l
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	l := etcdtest.Await(t, "the term", terms)
	p.fail(errSick)
	etcdtest.Await(t, "the end of the term", l.Context().Done())
	awaitQueue(t, client, "jobs", queued(0))
	p.fail(nil)
	etcdtest.Await(t, "the next term", terms)
	stop()
	_ = etcdtest.Await(t, "Run", ran)
}

func TestChecksOfManyElectionsAreSpreadAndNeedNoGoroutines(t *testing.T) {
	_, client := start(t)
	var p patient
	e := newElector(t, client, leader.WithTTL(3*time.Second), leader.WithHealth(p.check))
	lead(t, e, "first", "")
	before := runtime.NumGoroutine()
	const n = 100
	for i := range n {
		lead(t, e, "jobs-"+string(rune('a'+i/26))+string(rune('a'+i%26)), "")
	}
	if more := runtime.NumGoroutine() - before; more > 4*n {
		t.Errorf("%d goroutines more for %d elections", more, n)
	}
	checks := p.checks.Load()
	time.Sleep(3 * time.Second)
	if made := p.checks.Load() - checks; made < 2*n || made > 6*n {
		t.Errorf("%d checks of %d elections in a TTL, want about three each", made, n)
	}
}

// A check that hangs is not called again before it has returned, in the next campaign either.
func TestCheckThatHangsIsNotCalledAgainByTheNextCampaign(t *testing.T) {
	_, client := start(t)
	var p patient
	e := newElector(t, client, leader.WithTTL(time.Second), leader.WithHealth(p.check))
	goOn := p.hang()
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if _, err := e.TryCampaign(ctx, "jobs", ""); !errors.Is(err, leader.ErrUnhealthy) {
			t.Errorf("TryCampaign: %v", err)
		}
		cancel()
	}
	if n := p.most.Load(); n != 1 {
		t.Errorf("%d checks at a time", n)
	}
	goOn()
	resign(t, lead(t, e, "jobs", ""))
}

// What the check returns may wrap an error of another term.
func TestCheckThatFailsWithTheErrorOfAnEarlierTermEndsTheTermAsUnhealthy(t *testing.T) {
	for name, earlier := range map[string]error{"resigned": leader.ErrResigned, "transferred": leader.ErrTransferred} {
		t.Run(name, func(t *testing.T) {
			_, client := start(t)
			var p patient
			e := newElector(t, client, leader.WithTTL(3*time.Second), leader.WithMargin(200*time.Millisecond), leader.WithHealth(p.check))
			l := lead(t, e, "jobs", "")
			p.fail(fmt.Errorf("worker: %w", earlier))
			etcdtest.Await(t, "the end of the term", l.Context().Done())
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			for {
				cs, err := e.Candidates(ctx, "jobs")
				if err != nil {
					t.Errorf("the key of the term is left: %v", err)
					break
				}
				if len(cs) == 0 {
					break
				}
				time.Sleep(20 * time.Millisecond)
			}
			p.fail(nil)
			resign(t, l)

			// a candidate
			l = lead(t, newElector(t, client), "jobs", "")
			next := campaign(t.Context(), e, "jobs", "")
			awaitQueue(t, client, "jobs", queued(2))
			p.fail(fmt.Errorf("worker: %w", earlier))
			awaitQueue(t, client, "jobs", queued(1))
			p.fail(nil)
			resign(t, l)
			select {
			case o := <-next:
				if o.err != nil {
					t.Fatalf("Campaign: %v", o.err)
				}
				resign(t, o.l)
			case <-time.After(patience):
				t.Fatal("no term")
			}

			// a candidate that does not wait
			p.fail(fmt.Errorf("worker: %w", earlier))
			tried := make(chan error, 1)
			go func() {
				_, err := e.TryCampaign(t.Context(), "jobs", "")
				tried <- err
			}()
			if err := etcdtest.Await(t, "TryCampaign", tried); !errors.Is(err, leader.ErrUnhealthy) || !errors.Is(err, earlier) {
				t.Errorf("TryCampaign: %v", err)
			}
		})
	}
}

// A check that takes less time than it may, and always succeeds, and one that fails once.
func TestHealthSurvivesOneFailureWithAnyMargin(t *testing.T) {
	_, client := start(t)
	var checks atomic.Int64
	e := newElector(t, client, leader.WithTTL(3*time.Second), leader.WithMargin(1500*time.Millisecond), leader.WithHealth(func(context.Context, string) error {
		if checks.Add(1) == 3 {
			return errSick
		}
		return nil
	}))
	l := lead(t, e, "jobs", "")
	select {
	case <-l.Context().Done():
		t.Errorf("one failed check has ended the term: %v", context.Cause(l.Context()))
	case <-time.After(4 * time.Second):
	}
	resign(t, l)
}

package leader_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
)

// A patient is what a check says. The zero value is healthy.
type patient struct {
	does   atomic.Pointer[func(context.Context) error]
	checks atomic.Int64
	inside atomic.Int64
	most   atomic.Int64
}

// do makes checks do that, nil for a success.
func (p *patient) do(check func(context.Context) error) {
	if check == nil {
		p.does.Store(nil)
	} else {
		p.does.Store(&check)
	}
}

func (p *patient) fail(err error) { p.do(func(context.Context) error { return err }) }

// hang lets checks hang whatever their context says, until the returned function is called.
func (p *patient) hang() (goOn func()) {
	c := make(chan struct{})
	p.do(func(context.Context) error { <-c; return nil })
	return func() {
		p.do(nil)
		close(c)
	}
}

func (p *patient) check(ctx context.Context, _ string) error {
	p.checks.Add(1)
	if n := p.inside.Add(1); n > p.most.Load() {
		p.most.Store(n)
	}
	defer p.inside.Add(-1)
	if check := p.does.Load(); check != nil {
		return (*check)(ctx)
	}
	return nil
}

var errSick = errors.New("the work makes no progress")

// An Elector that is not healthy does not join; it leaves the queue; it loses its term, and the next one leads a margin
// later. Each time it is back when it is healthy.
func TestWhoeverIsUnhealthyNeitherJoinsNorWaitsNorLeads(t *testing.T) {
	_, client := start(t)
	const ttl, margin = 3 * time.Second, 600 * time.Millisecond
	for name, test := range map[string]struct {
		ill  func(p *patient) (heal func())
		says string
	}{
		"the check fails": {func(p *patient) func() { p.fail(errSick); return func() { p.do(nil) } }, errSick.Error()},
		"the check hangs": {(*patient).hang, "has not returned"},
		"the check takes too long and fails": {func(p *patient) func() {
			p.do(func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("work: %w", ctx.Err()) })
			return func() { p.do(nil) }
		}, "work: context deadline exceeded"},
		"the check takes too long and succeeds": {func(p *patient) func() {
			p.do(func(ctx context.Context) error { <-ctx.Done(); return nil })
			return func() { p.do(nil) }
		}, "the check took"},
		"the check ends its goroutine": {func(p *patient) func() {
			p.do(func(context.Context) error { runtime.Goexit(); return nil })
			return func() { p.do(nil) }
		}, "ended its goroutine"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			election := t.Name()
			var p patient
			e := newElector(t, client, leader.WithTTL(ttl), leader.WithMargin(margin), leader.WithHealth(p.check))

			// It starts.
			heal := test.ill(&p)
			if _, err := e.TryCampaign(t.Context(), election, ""); !errors.Is(err, leader.ErrUnhealthy) {
				t.Errorf("TryCampaign: %v", err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if _, err := e.Campaign(ctx, election, ""); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, leader.ErrUnhealthy) {
				t.Errorf("Campaign: %v", err)
			}
			first := lead(t, newElector(t, client), election, "")
			second := campaign(t.Context(), e, election, "")

			// It waits.
			heal()
			awaitQueue(t, client, election, queued(2))
			heal = test.ill(&p)
			awaitQueue(t, client, election, queued(1))
			heal()
			awaitQueue(t, client, election, queued(2))

			// It leads.
			resign(t, first)
			l := awaitLeader(t, second)
			third := campaign(t.Context(), newElector(t, client), election, "")
			awaitQueue(t, client, election, queued(2))
			heal = test.ill(&p)
			began := time.Now()
			awaitEnd(t, l, leader.ErrUnhealthy)
			ended := time.Now()
			if took := ended.Sub(began); took > ttl {
				t.Errorf("the term ended after %v, want TTL - margin from the last success", took)
			}
			if cause := context.Cause(l.Context()); !strings.Contains(cause.Error(), test.says) {
				t.Errorf("the cause %q does not say %q", cause, test.says)
			}
			if _, err := e.Campaign(t.Context(), election, ""); !errors.Is(err, leader.ErrCampaigning) {
				t.Errorf("Campaign while the work winds down: %v", err)
			}
			next := awaitLeader(t, third)
			if took := time.Since(ended); took < margin-50*time.Millisecond { // the end is seen a moment late
				t.Errorf("the next one was elected %v after the end, want a margin", took)
			}
			heal()
			resign(t, next)
			resign(t, l) // waits until etcd has confirmed that the key is gone
			resign(t, lead(t, e, election, ""))
			if p.most.Load() > 1 {
				t.Errorf("%d checks at a time", p.most.Load())
			}
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

func TestCandidateThatIsUnhealthySaysSoBeforeItJoinsAndWhenItHasLeft(t *testing.T) {
	_, client := start(t)
	l := lead(t, newElector(t, client), "jobs", "leads")
	var p patient
	p.fail(errSick)
	log := make(logChannel, 100)
	next := campaign(t.Context(), newElector(t, client, leader.WithTTL(3*time.Second), leader.WithHealth(p.check), leader.WithLogger(slog.New(log))), "jobs", "")
	for range 2 {
		if why := attr(awaitRecord(t, log, "unhealthy, not in the queue", next), "error"); !strings.Contains(why, errSick.Error()) {
			t.Errorf("logged %q, want it to say %q", why, errSick)
		}
		p.do(nil)
		awaitQueue(t, client, "jobs", queued(2))
		p.fail(errSick)
	}
	p.do(nil)
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
	p.do(nil)
	etcdtest.Await(t, "the next term", terms)
	stop()
	_ = etcdtest.Await(t, "Run", ran)
}

// At rest they are timers. That they are spread over time is shown by TestChecksOfManyElectionsAreSpread.
func TestChecksOfAThousandElectionsNeedNoGoroutines(t *testing.T) {
	_, client := start(t)
	const n = 1000
	var mu sync.Mutex
	checked := make(map[string]int)
	all := make(chan struct{})
	e := newElector(t, client, leader.WithTTL(leader.DefaultTTL), leader.WithHealth(func(_ context.Context, election string) error {
		mu.Lock()
		defer mu.Unlock()
		// The first check is that of the campaign.
		if checked[election]++; checked[election] == 2 {
			if checked[""]++; checked[""] == n {
				close(all)
			}
		}
		return nil
	}))
	before := runtime.NumGoroutine()
	for i := range n {
		lead(t, e, fmt.Sprint("jobs-", i), "")
	}
	etcdtest.Await(t, "another check of each election", all)
	if more := runtime.NumGoroutine() - before; more > 4*n {
		t.Errorf("%d goroutines more for %d elections", more, n)
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
			p.do(nil)
			resign(t, l)

			// a candidate
			l = lead(t, newElector(t, client), "jobs", "")
			next := campaign(t.Context(), e, "jobs", "")
			awaitQueue(t, client, "jobs", queued(2))
			p.fail(fmt.Errorf("worker: %w", earlier))
			awaitQueue(t, client, "jobs", queued(1))
			p.do(nil)
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

// Close waits for the function of Run as long as it takes, and until then nobody else may lead.
func TestFunctionThatCloseWaitsForStaysHealthy(t *testing.T) {
	_, client := start(t)
	var p patient
	e := newExpiring(t, client, leader.WithHealth(p.check))
	release := make(chan struct{})
	terms, ran := runHeld(t.Context(), e, "", release)
	l := etcdtest.Await(t, "the term", terms)
	next := campaign(t.Context(), newElector(t, client), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	closed := make(chan error, 1)
	go func() { closed <- e.Close(t.Context()) }()
	select {
	case <-l.Context().Done():
		t.Errorf("the term of a healthy leader has ended: %v", context.Cause(l.Context()))
	case <-time.After(2 * ttl):
	}
	close(release)
	if err := etcdtest.Await(t, "Run", ran); !errors.Is(err, leader.ErrClosed) {
		t.Errorf("Run: %v", err)
	}
	if err := etcdtest.Await(t, "Close", closed); err != nil {
		t.Errorf("Close: %v", err)
	}
	resign(t, awaitLeader(t, next))
}

// Nobody needs the answer any more, and Close waits for the check.
func TestCheckThatIsUnderWayIsToldWhenItsElectionIsOver(t *testing.T) {
	_, client := start(t)
	var p patient
	checking := make(chan struct{}, 10)
	e := newElector(t, client, leader.WithHealth(p.check))
	p.do(func(ctx context.Context) error { checking <- struct{}{}; <-ctx.Done(); return ctx.Err() })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	waits := campaign(ctx, e, "jobs", "")
	etcdtest.Await(t, "a check", checking)
	cancel()
	if o := etcdtest.Await(t, "Campaign", waits); !errors.Is(o.err, context.Canceled) {
		t.Errorf("Campaign: %v", o.err)
	}
	closing, stop := context.WithTimeout(t.Context(), 5*time.Second) // a check may take 20 s
	defer stop()
	if err := e.Close(closing); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// The function of Run hangs while its check fails: the others do not wait for it, and it is reported.
func TestFunctionThatHangsWhileItsCheckFailsHoldsUpNobody(t *testing.T) {
	_, client := start(t)
	var p patient
	calls, release := make(chan overdueCall, 100), make(chan struct{})
	const margin = 600 * time.Millisecond
	e := newElector(t, client, leader.WithTTL(3*time.Second), leader.WithMargin(margin), leader.WithHealth(p.check),
		leader.WithHooks(leader.Hooks{Overdue: func(_ string, l *leader.Leader, late time.Duration) { calls <- overdueCall{l, late} }}))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	terms, ran := runHeld(ctx, e, "", release)
	l := etcdtest.Await(t, "the term", terms)
	next := campaign(t.Context(), newElector(t, client), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	p.fail(errSick)
	awaitEnd(t, l, leader.ErrUnhealthy)
	if call := etcdtest.Await(t, "the report", calls); call.l != l || call.late < margin {
		t.Errorf("reported %v late, want the margin", call.late)
	}
	second := awaitLeader(t, next)
	p.do(nil)
	select {
	case again := <-terms:
		t.Errorf("%v began while the function of the term before has not returned", again)
	case <-time.After(time.Second): // longer than Run pauses
	}
	close(release)
	awaitQueue(t, client, "jobs", queued(2))
	resign(t, second)
	if again := etcdtest.Await(t, "the next term", terms); again.Token() <= second.Token() {
		t.Errorf("token %d leads after %d", again.Token(), second.Token())
	}
	stop()
	_ = etcdtest.Await(t, "Run", ran)
}

// Checks go on while etcd cannot be reached. Whoever is unhealthy does not come back with etcd.
func TestChecksGoOnDuringAnOutage(t *testing.T) {
	t.Parallel()
	m := etcdtest.StartProcesses(t, 1)[0]
	client := etcdtest.NewClient(t, m.Endpoint)
	leavesNothing(t, client)
	var p patient
	e := newElector(t, client, leader.WithTTL(3*time.Second), leader.WithHealth(p.check))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	l, ran := leadBy(ctx, t, e, "Run", "jobs")
	if err := m.Pause(); err != nil {
		t.Fatal(err)
	}
	p.fail(errSick)
	etcdtest.Await(t, "the end of the term", l.Context().Done())
	if cause := context.Cause(l.Context()); !errors.Is(cause, leader.ErrUnhealthy) && !errors.Is(cause, leader.ErrExpired) {
		t.Errorf("the term ended with %v", cause)
	}
	awaitCalls(t, p.checks.Load, p.checks.Load()+3)
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	awaitQueue(t, client, "jobs", queued(0))
	awaitCalls(t, p.checks.Load, p.checks.Load()+2)
	awaitQueue(t, client, "jobs", queued(0))
	p.do(nil)
	awaitQueue(t, client, "jobs", queued(1))
	stop()
	_ = etcdtest.Await(t, "Run", ran)
}

// panicEnv makes the test's own binary a process whose check panics. It contains etcd's endpoint.
const panicEnv = "LEADER_TEST_PANIC"

func TestPanicOfACheckEndsTheProgram(t *testing.T) {
	if endpoint := os.Getenv(panicEnv); endpoint != "" {
		e, err := leader.New(etcdtest.NewClient(t, endpoint), leader.WithHealth(func(context.Context, string) error { panic("the check panics") }))
		if err == nil {
			_, err = e.Campaign(t.Context(), "jobs", "")
		}
		t.Fatalf("Campaign: %v", err)
	}
	m, _ := start(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, "-test.run=^"+t.Name()+"$")
	cmd.Env = append(cmd.Environ(), panicEnv+"="+m.Endpoint)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "panic: the check panics") {
		t.Errorf("the program has ended with %v:\n%s", err, out)
	}
}

// A blockingError is what a check may fail with: its methods ask the hung work.
type blockingError struct{ forever chan struct{} }

func (e blockingError) Error() string   { <-e.forever; return "the work hangs" }
func (e blockingError) Is(error) bool   { <-e.forever; return false }
func (e blockingError) Unwrap() []error { <-e.forever; return nil }

// The error of a check may block on the very work that has made the check fail. That keeps neither the term of this
// election nor those of others.
func TestATermEndsAlthoughTheErrorOfItsCheckBlocks(t *testing.T) {
	_, client := start(t)
	var p patient
	e := newElector(t, client, leader.WithTTL(4*time.Second), leader.WithHealth(func(ctx context.Context, election string) error {
		if election == "jobs" {
			return p.check(ctx, election)
		}
		return nil
	}))
	l, other := lead(t, e, "jobs", ""), lead(t, e, "other", "")
	forever := make(chan struct{})
	p.fail(blockingError{forever})
	next := campaign(t.Context(), newElector(t, client), "jobs", "next")
	n := awaitLeader(t, next)
	if l.Context().Err() == nil || l.IsLeader() {
		t.Error("another leads, and the term has not ended")
	}
	if _, ok := e.Leading("other"); !ok {
		t.Errorf("the term in the other election has ended: %v", context.Cause(other.Context()))
	}
	close(forever)
	if err := context.Cause(l.Context()); !errors.Is(err, leader.ErrUnhealthy) {
		t.Errorf("the cause is %v, want ErrUnhealthy", err)
	}
	resign(t, n)
	resign(t, other)
}

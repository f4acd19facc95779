package leader

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader/internal/lease"
	"example.com/leader/internal/queue"
	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"
)

// An Elector takes part in any number of elections, over one client, one lease and one set of options.
// Most services call its [Elector.Run], or [Elector.Campaign] for a single term. It is safe for concurrent
// use.
//
// The lease is granted at the first campaign, replaced when it is lost, and revoked when nobody campaigns or leads any
// more. All terms on it end together when it cannot be renewed. Withdrawing the permission to write one of their keys
// ends them too: etcd then refuses to renew the lease.
//
// There may be more than one lease, but at most eight. If a campaign is given up while etcd has not answered its join,
// and other terms keep the lease alive, the join may still arrive. So the next campaign in the same election takes
// another lease. It also does so if another user of etcd has attached a key to the lease.
//
// An Elector that is not in use has no goroutines and nothing in etcd, so it need not be closed, unless it has a lease
// file ([WithLeaseFile]). Three things may continue after the use: it waits up to 5 s for the answer to a grant that was
// cut short, to revoke the lease; it tries for up to 7 s to revoke the lease of a Transfer that could not; and it tries
// for up to an hour to revoke the lease of a term that expired, or of a dead owner of the lease file.
type Elector struct {
	client   *clientv3.Client
	opts     options
	pool     *lease.Pool
	release  func() // says, the first time, that this Elector does not own its lease file any more
	once     bool   // for one campaign: then the lease file is not used any more
	identity string
	ctx      context.Context // ends when Close is called
	cancel   context.CancelFunc
	closed   error       // ErrClosed of this Elector: the cause of the contexts of bind
	watching retry.Group // goroutines that watch own keys, remove lost terms, or call Hooks.LeaderChanged

	mu        sync.Mutex
	calls     int               // campaigns and Runs under way
	idle      chan struct{}     // made by Close, closed when there are no more calls
	claims    map[string]*claim // who campaigns or leads, by election
	observers map[string]*claim // whose report has not returned; in each election the newest
	reports   reports
	checking  map[string]time.Time // since when a check of WithHealth is under way, by election
}

// New returns an Elector, or an error for a nil client or a bad option. It sends no request, and blocks only for up to
// 1 s, if another process has locked the file of [WithLeaseFile]. The client must stay open while the Elector is in
// use; the Elector never closes it. A client whose KV, Watcher and Lease are those of
// go.etcd.io/etcd/client/v3/namespace works too.
func New(client *clientv3.Client, opts ...Option) (*Elector, error) {
	if client == nil {
		return nil, errors.New("leader: client: must not be nil")
	}
	o, err := newOptions(opts)
	if err != nil {
		return nil, err
	}
	e := &Elector{
		client:    client,
		opts:      o,
		identity:  newIdentity(),
		closed:    fmt.Errorf("%w", ErrClosed),
		claims:    make(map[string]*claim),
		observers: make(map[string]*claim),
		checking:  make(map[string]time.Time),
	}
	file, err := o.openLeaseFile()
	if err != nil {
		return nil, err
	}
	e.release = sync.OnceFunc(file.Release) // a second call would release it for the Elector that owns it by then
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.pool = lease.NewPool(client, lease.Config{TTL: o.ttl, Margin: o.margin, Renewal: e.renewal, File: file, Log: o.log})
	return e, nil
}

// Campaign blocks until this instance is elected in the election name, and returns its term. value is what
// others see of it, for example its address; "" means a default identity, <hostname>-<unix milliseconds>-<pid>,
// which is the same for all calls of an Elector.
//
// ctx bounds the campaign, not the term, as a dialer's context does. Its values reach [Leader.Context]. If ctx
// ends just as the election is won, the term or ctx's error may be returned. Call [Leader.Resign] in the end,
// also when the process is about to exit. Otherwise nobody leads until the lease has expired.
//
// Campaign retries every transient failure: etcd that is unreachable or has no quorum, an expired auth token,
// the loss of the candidate's own lease or key. After such a loss the candidate joins again, at the end of the
// queue. Campaign fails only
//   - when ctx ends: the error wraps ctx's error and the last failure;
//   - when the Elector or its client is closed: [ErrClosed];
//   - for what retrying cannot change: [ErrInvalidName], [ErrCampaigning], a value of more than 1 MiB,
//     permission denied, failed authentication, a request that etcd rejects as invalid.
//
// A campaign that fails leaves no candidate behind. If etcd cannot be reached it tries for 2 s; then the key disappears
// when its lease expires. A request that has no answer after 0.25 s is sent again, to the next endpoint, while the
// first one waits.
func (e *Elector) Campaign(ctx context.Context, name, value string) (*Leader, error) {
	return e.campaignOnce(ctx, name, value, byCampaign)
}

// TryCampaign is [Elector.Campaign], except that it does not wait behind other candidates: it returns
// [ErrHeld] if somebody leads or is before it in the queue. It retries requests as Campaign does, so give
// ctx a deadline.
func (e *Elector) TryCampaign(ctx context.Context, name, value string) (*Leader, error) {
	return e.campaignOnce(ctx, name, value, byTryCampaign)
}

func (e *Elector) campaignOnce(ctx context.Context, name, value string, by caller) (*Leader, error) {
	ctx, end, err := e.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	return e.campaign(ctx, name, value, by)
}

// Run campaigns in the election name and calls lead each time this instance is elected. It blocks until lead
// returns during a term, until ctx ends, or until a campaign fails. name, value and the failures are those of
// [Elector.Campaign].
//
// lead gets a context that ends with the term or with ctx. ([Leader.Context] ends with the term alone.) lead must
// return soon after its context has ended: within the margin ([WithMargin]) if its work must not overlap with the
// next leader's. If ctx has ended, nobody else is elected before lead has returned, because Run resigns only then.
//
//   - lead returns during a term, or resigns the term itself: Run resigns and returns lead's error.
//   - The term is lost: Run waits for lead, logs its error, campaigns again after a pause, and calls lead
//     again. If lead returns just as the term is lost, the loss counts. lead is not called for a term that
//     ended before the call, as may happen while a hook blocks.
//   - ctx ends: Run waits for lead, resigns within 2 s, and returns ctx's error, joined with lead's error
//     if that is another one.
//   - The Elector or its client is closed: the same, with [ErrClosed].
//   - lead panics: Run resigns before the panic continues.
//
// If Run cannot resign it logs that and does not return it. The key disappears when its lease expires.
func (e *Elector) Run(ctx context.Context, name, value string, lead func(ctx context.Context, l *Leader) error) error {
	if lead == nil {
		return errors.New("leader: Run: lead must not be nil")
	}
	ctx, end, err := e.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	backoff := retry.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for {
		l, err := e.campaign(ctx, name, value, byRun)
		if err != nil {
			return err
		}
		elected := time.Now()
		lost, err := e.runTerm(ctx, l, lead)
		if !lost {
			return err
		}
		_ = retry.Wait(ctx, l.claim.released) // another Resign of a term that winds down may be under way
		log := e.log(l.claim.election).With("token", l.token)
		if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(l.ctx)) {
			log.Info("campaigning again after a lost term")
		} else {
			log.Warn("campaigning again after a lost term", "error", err)
		}
		if transferred(context.Cause(l.ctx)) {
			continue // to the end of the queue, which is pause enough
		}
		if time.Since(elected) > e.opts.ttl {
			backoff.Reset() // a term of that length ends the streak of short ones
		}
		if backoff.Wait(ctx) != nil {
			return e.whyEnded(ctx)
		}
	}
}

// runTerm calls lead for one term and resigns. lost says that the term ended before lead did.
func (e *Elector) runTerm(ctx context.Context, l *Leader, lead func(context.Context, *Leader) error) (lost bool, err error) {
	lctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(l.ctx, func() { cancel(context.Cause(l.ctx)) })
	overdue := l.watchOverdue(lctx)
	defer overdue.report() // when the term was resigned, which must not wait for a hook
	defer func() {         // also if lead panics
		overdue.stop()
		stop()
		cancel(nil)
		l.letGo(ctx)
	}()
	if l.IsLeader() { // Hooks.Elected may have blocked, or resigned
		err = lead(lctx, l)
	}
	switch {
	case ctx.Err() != nil:
		why := e.whyEnded(ctx)
		if err == nil || errors.Is(err, why) || errors.Is(err, ctx.Err()) || errors.Is(err, context.Cause(ctx)) {
			return false, why
		}
		return false, errors.Join(why, err)
	case !l.IsLeader() && !resigned(context.Cause(l.ctx)):
		return true, err
	}
	return false, err
}

// Leading returns the term in which this Elector leads the election name now. ok is false if it does not
// lead, and for a bad name. It is for code outside the function that Run calls, such as request handlers and
// schedulers. It reads the clocks, sends no request and does not block.
//
// The term may end right after Leading has returned, as with [Leader.IsLeader]. Run does not wait for what
// such code has begun: the function that Run calls must wait for it before it returns, or [Leader.Guard] or
// [Leader.Token] must protect what it writes.
func (e *Elector) Leading(name string) (l *Leader, ok bool) {
	election, err := e.opts.election(name)
	if err != nil {
		return nil, false
	}
	e.mu.Lock()
	if c := e.claims[election]; c != nil {
		l = c.term
	}
	e.mu.Unlock()
	if l == nil || !l.IsLeader() {
		return nil, false
	}
	return l, true
}

// Current returns the candidate that leads, or [ErrNoLeader]. It sends one request, or two if there is
// other data below the election's name, and blocks for at most 5 s each. A request that has no answer
// is sent again, to the next endpoint, while the first one waits.
func (e *Elector) Current(ctx context.Context, name string) (Candidate, error) {
	q, err := e.queue(name)
	if err != nil {
		return Candidate{}, err
	}
	c, err := q.Leader(ctx, nil)
	if err != nil {
		return Candidate{}, fmt.Errorf("leader: read who leads %q: %w", name, e.orClosed(ctx, err))
	}
	if c == (queue.Candidate{}) {
		return Candidate{}, ErrNoLeader
	}
	return Candidate(c), nil
}

// Candidates returns all candidates in the order of the queue, the leader first. An election without
// candidates is no error. It sends one request, as [Elector.Current] does, and blocks for at most 5 s.
func (e *Elector) Candidates(ctx context.Context, name string) ([]Candidate, error) {
	q, err := e.queue(name)
	if err != nil {
		return nil, err
	}
	list, err := retry.First(ctx, e.client, q.List)
	if err != nil {
		return nil, fmt.Errorf("leader: read the candidates of %q: %w", name, e.orClosed(ctx, err))
	}
	cs := make([]Candidate, len(list))
	for i, c := range list {
		cs[i] = Candidate(c)
	}
	return cs, nil
}

// Observe yields who leads the election name: the present state at once, then each change of the leader
// or of its value, in order and never going back. The zero Candidate means that nobody leads.
//
// Disconnects, compactions and changes of etcd's leader do not end it. It may leave out states that came
// and went meanwhile, but never the latest one. It also leaves out states if the loop's body is slow: up to
// 64 of them, or 1 MiB of values, wait for it.
//
// The loop ends with a last pair that carries an error: ctx's error when ctx ends, [ErrClosed] when the
// Elector or its client is closed, or what retrying cannot change, such as permission denied. Breaking out
// of the loop ends it without an error.
//
// Observe needs no lease and is no candidate. Each loop over what it returns begins with the present state, and keeps
// the list of all candidates in memory. A state may be outdated when it arrives, so do not decide by it whether this
// instance leads: use [Elector.Leading].
func (e *Elector) Observe(ctx context.Context, name string) iter.Seq2[Candidate, error] {
	return func(yield func(Candidate, error) bool) {
		q, err := e.queue(name)
		if err == nil {
			bound, unbind := e.bind(ctx)
			defer unbind()
			err = q.Observe(bound, e.warn(q.Name(), "observing is being retried"), e.opts.ttl, func(c queue.Candidate) bool {
				return yield(Candidate(c), nil)
			})
			if why := e.whyEnded(bound); err != nil && (bound.Err() != nil || e.client.Ctx().Err() != nil) && !errors.Is(err, why) {
				err = why // else err also says what has failed last
			}
		}
		switch {
		case errors.Is(err, ErrClosed), errors.Is(err, ErrInvalidName):
			yield(Candidate{}, err)
		case err != nil:
			yield(Candidate{}, fmt.Errorf("leader: observe %q: %w", name, err))
		}
	}
}

// Evict ends the present term of the election, whoever leads, by deleting the leader's key. It is an
// operator's tool: the next candidate is elected at once, while the leader learns of it from its watch,
// milliseconds later, or, if its watch is dead, by a renewal. Until then only Guard and Token protect
// what it does. A leader by stock concurrency.Election never learns of it, so stop such a process first.
//
// Evict ends only the term that it finds, not a later one. It returns [ErrNoLeader] if nobody leads. It
// blocks for as long as a few requests take, each at most 5 s.
func (e *Elector) Evict(ctx context.Context, name string) error {
	c, err := e.Current(ctx, name)
	if err != nil {
		return err
	}
	q, err := e.queue(name)
	if err == nil {
		_, err = retry.First(ctx, e.client, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, q.Remove(ctx, c.Key, c.Token)
		})
	}
	if err != nil {
		return fmt.Errorf("leader: evict %q from %q: %w", c.Key, name, e.orClosed(ctx, err))
	}
	return nil
}

// An overdue reports, by the log and by Hooks.Overdue, that the function that Run has called ignores the end of its
// context.
type overdue struct {
	l        *Leader
	unhook   func() bool   // forgets the function's context
	returned chan struct{} // closed when the function has returned
	done     chan struct{} // closed when the goroutine that the context's end has started is over
	since    time.Time     // when the context ended
	told     bool          // Hooks.Overdue was called
}

// watchOverdue begins to watch over a function whose context is ctx. It takes a goroutine only once ctx has ended.
func (l *Leader) watchOverdue(ctx context.Context) *overdue {
	o := &overdue{l: l, returned: make(chan struct{}), done: make(chan struct{})}
	o.unhook = context.AfterFunc(ctx, o.watch)
	return o
}

func (o *overdue) watch() {
	o.since = time.Now()
	o.wait(o.l.session.Margin())
}

// wait reports when first has passed, and then once per TTL, until the function has returned.
func (o *overdue) wait(first time.Duration) {
	returned := false
	defer func() {
		if returned {
			close(o.done)
		} else { // the hook or the log handler has ended this goroutine
			go o.wait(o.l.session.TTL())
		}
	}()
	timer := time.NewTimer(first)
	defer timer.Stop()
	for {
		select {
		case <-o.returned:
			returned = true
			return
		case <-timer.C:
			o.tell()
			timer.Reset(o.l.session.TTL())
		}
	}
}

func (o *overdue) tell() {
	l, late := o.l, time.Since(o.since)
	o.told = true
	defer l.e.opts.hooks.overdue(l, late) // also if the log handler ends this goroutine
	log := l.e.log(l.claim.election).With("token", l.token)
	if l.IsLeader() {
		log.Info("the function that leads has not returned", "late", late)
	} else {
		log.Warn("the function that leads has not returned", "late", late)
	}
}

// stop says that the function has returned.
func (o *overdue) stop() {
	if o.unhook() {
		close(o.done)
	}
	close(o.returned)
}

// report waits for the last call of the hook. If there was one, it reports that the function has returned.
func (o *overdue) report() {
	<-o.done
	if o.told {
		defer o.l.e.opts.hooks.overdue(o.l, 0)
		o.l.e.log(o.l.claim.election).Info("the function that leads has returned", "token", o.l.token, "late", time.Since(o.since))
	}
}

// Close ends all terms and campaigns of the Elector and revokes the lease. Terms of Campaign end at once,
// with [ErrResigned]. Campaigns and Runs return [ErrClosed]. Close waits for them, and so for the functions
// that Runs have called, before it gives up their elections.
//
// It blocks until etcd has confirmed and all goroutines of the Elector have ended, or until ctx ends. After
// an error it may be called again. A lease that it could not revoke expires. The function that Run has called
// must not call Close without a deadline: each would wait for the other.
func (e *Elector) Close(ctx context.Context) error {
	e.mu.Lock()
	if e.idle == nil {
		e.idle = make(chan struct{})
		if e.calls == 0 {
			close(e.idle)
		}
	}
	e.mu.Unlock()
	e.cancel()
	for _, l := range e.leading() {
		if l.by != byRun {
			l.abandon()
		}
	}
	// Also after an error: the next Elector of this process may use the file, together with what this one has left in it.
	defer e.release()
	if err := retry.Wait(ctx, e.idle); err != nil {
		_ = e.pool.Close(ctx) // it fails, as ctx has ended, but stops the renewals of leases that nobody uses
		return fmt.Errorf("leader: close: a campaign or Run has not returned: %w", err)
	}
	for _, l := range e.leading() {
		l.abandon()
	}
	// Nobody uses the lease any more, so one revocation deletes all keys. Then terms that were lost a moment ago are
	// waited for, which may leave another lease to revoke.
	if err := errors.Join(e.pool.Close(ctx), e.watching.Wait(ctx), e.pool.Close(ctx)); err != nil {
		return fmt.Errorf("leader: close: %w", err)
	}
	return nil
}

// leading returns the terms that have not ended.
func (e *Elector) leading() []*Leader {
	e.mu.Lock()
	defer e.mu.Unlock()
	var terms []*Leader
	for _, c := range e.claims {
		if c.term != nil {
			terms = append(terms, c.term)
		}
	}
	return terms
}

// begin counts a campaign or Run, so that Close waits for it, and binds its context. end ends both.
func (e *Elector) begin(ctx context.Context) (bound context.Context, end func(), err error) {
	bound, unbind := e.bind(ctx) // before the lock, because ctx may be of a type of the user's
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.closedLocked(); err != nil {
		unbind()
		return nil, nil, err
	}
	e.calls++
	return bound, func() {
		unbind()
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.calls--; e.calls == 0 && e.idle != nil {
			close(e.idle)
		}
	}, nil
}

func (e *Elector) closedLocked() error {
	if e.idle != nil || e.client.Ctx().Err() != nil {
		return ErrClosed
	}
	return nil
}

// bind returns a context that also ends when the Elector or its client is closed.
func (e *Elector) bind(ctx context.Context) (bound context.Context, unbind func()) {
	bound, cancel := context.WithCancelCause(ctx)
	closed := func() { cancel(e.closed) }
	stop1 := context.AfterFunc(e.ctx, closed)
	stop2 := context.AfterFunc(e.client.Ctx(), closed)
	return bound, func() { stop1(); stop2(); cancel(nil) }
}

// whyEnded is the error for a context of bind that has ended, or is about to end because the client is closed. The
// caller's context may have ended because another Elector was closed.
func (e *Elector) whyEnded(bound context.Context) error {
	switch cause := context.Cause(bound); {
	case cause == nil, cause == e.closed: //nolint:errorlint // that of another Elector is another
		return ErrClosed
	case !errors.Is(cause, bound.Err()):
		return fmt.Errorf("%w: %w", bound.Err(), cause)
	}
	return bound.Err()
}

// over reports whether a call has failed with err because its context or the client has ended. What it had found out
// before stays the reason, though they may have ended while it cleaned up.
func (e *Elector) over(bound context.Context, err error) bool {
	for _, found := range []error{ErrHeld, ErrUnhealthy, ErrNoLeader, ErrNotCandidate} {
		if errors.Is(err, found) {
			return false
		}
	}
	if retry.Permanent(err) && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return false
	}
	return bound.Err() != nil || e.client.Ctx().Err() != nil // either may be the first
}

// orClosed returns ErrClosed if that the client is closed explains err, and err otherwise.
func (e *Elector) orClosed(ctx context.Context, err error) error {
	if ctx.Err() == nil && e.client.Ctx().Err() != nil {
		return ErrClosed
	}
	return err
}

// queue returns the queue of the election name, or an error for a bad name or a closed Elector.
func (e *Elector) queue(name string) (*queue.Queue, error) {
	election, err := e.opts.election(name)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return queue.New(e.client, election), e.closedLocked()
}

func (e *Elector) log(election string) *slog.Logger { return e.opts.log.With("election", election) }

// loop returns a loop that warns of streaks of failures.
func (e *Elector) loop(election, warning string) *retry.Loop {
	return &retry.Loop{Client: e.client, Warn: e.warn(election, warning)}
}

func (e *Elector) warn(election, warning string) func(error) {
	return func(err error) { e.log(election).Warn(warning, "error", err) }
}

// maxSilent is after how many renewals in a row without an answer on an open connection a warning is logged.
const maxSilent = 2

// renewal logs a renewal of a lease and calls the hooks.
func (e *Elector) renewal(r lease.Renewal) {
	// The hooks are deferred so that they are called even if the log handler ends this goroutine.
	log := func() *slog.Logger { return e.opts.log.With("lease", fmt.Sprintf("%x", r.Lease)) }
	if r.Err == nil {
		defer e.opts.hooks.renewed(r.Lease, r.Took, r.Deadline)
		if r.Before > 0 {
			log().Info("renewals of the lease work again", "failures", r.Before, "deadline", r.Deadline)
		}
		return
	}
	defer e.opts.hooks.renewFailed(r.Lease, r.Took, renewalError(r.Err))
	if r.Failures == 1 {
		log().Warn("renewal of the lease is being retried", "deadline", r.Deadline, "error", r.Err)
	}
	if state, ok := retry.Connection(e.client); r.Silent == maxSilent && ok && state == connectivity.Ready {
		log().Warn("etcd does not answer on an open connection", "cure", retry.Cure)
	}
}

// renewalError is the error of a renewal in errors that users can match.
func renewalError(err error) error {
	switch {
	case errors.Is(err, lease.ErrRefused):
		return ErrRefused
	case errors.Is(err, lease.ErrRevoked), errors.Is(err, rpctypes.ErrLeaseNotFound): // which a read has confirmed
		return fmt.Errorf("%w: %w", ErrEvicted, err)
	case errors.Is(err, lease.ErrExpired):
		return ErrExpired
	}
	return err
}

// lastIdentity is the time of the newest default identity, in milliseconds.
var lastIdentity atomic.Int64

// newIdentity returns <hostname>-<unix milliseconds>-<pid>. No two of a process have the same
// millisecond, and the pid tells apart the processes of a machine.
func newIdentity() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	for {
		last := lastIdentity.Load()
		now := max(time.Now().UnixMilli(), last+1)
		if lastIdentity.CompareAndSwap(last, now) {
			return fmt.Sprintf("%s-%d-%d", host, now, os.Getpid())
		}
	}
}

// value returns the value to campaign with or to proclaim.
func (e *Elector) value(value string) (string, error) {
	if value == "" {
		return e.identity, nil
	}
	if len(value) > maxValue {
		return "", fmt.Errorf("leader: value of %d bytes: must be at most %d", len(value), maxValue)
	}
	return value, nil
}

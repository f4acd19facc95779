package leader

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader/internal/lease"
	"example.com/leader/internal/queue"
	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"
)

// An Elector takes part in elections, in any number of them, over one client, one lease and one
// set of options. Most services want its [Elector.Run], or [Elector.Campaign] for a single term.
//
// The lease is granted at the first campaign, replaced when it is lost, and revoked when the last
// leader has resigned. All terms on it end together when it cannot be renewed, which is also so when
// the right to write the key of one is withdrawn: etcd refuses the renewal of the whole lease then.
//
// There is more than one lease only after a campaign was given up while etcd had not answered its join, and
// others kept the lease: that join may still arrive, so the next campaign in the same election takes another
// lease, of eight at most. So it does where a stranger has attached a key to the lease.
//
// An Elector is safe for concurrent use. One that is not in use has no goroutines and nothing in etcd,
// so it need not be closed. Two things may outlast the use: a grant that was cut short is waited for,
// for 5 s at most, and revoked; and the lease of a term that has expired is revoked as soon as etcd can
// be reached, which is tried for an hour.
type Elector struct {
	client   *clientv3.Client
	opts     options
	pool     *lease.Pool
	identity string
	ctx      context.Context // ends when Close is called
	cancel   context.CancelFunc
	watching retry.Group // watches of own keys, and what they do at a term's end

	mu        sync.Mutex
	calls     int                  // campaigns and Runs under way
	idle      chan struct{}        // made by Close, closed when there are no more calls
	claims    map[string]*claim    // who campaigns or leads, by election
	observers map[string]*claim    // whose observe has not returned, the newest of each election
	terms     map[*Leader]struct{} // elected, and not ended
	reports   reports
}

// New returns an Elector, or an error for a nil client or a bad option. It sends no request. The
// client is borrowed: it must stay open while the Elector is in use, and is never closed by it. A
// client whose KV, Watcher and Lease are those of go.etcd.io/etcd/client/v3/namespace works too.
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
		claims:    make(map[string]*claim),
		observers: make(map[string]*claim),
		terms:     make(map[*Leader]struct{}),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.pool = lease.NewPool(client, lease.Config{TTL: o.ttl, Margin: o.margin, Renewal: e.renewal})
	return e, nil
}

// Campaign blocks until this instance is elected and returns its term. value is what others see
// of it; "" means a default identity, <hostname>-<unix milliseconds>-<pid>, which stays the same
// for the Elector.
//
// ctx bounds the campaign and not the term, as a dialer's does; its values reach [Leader.Context].
// If ctx ends just as the election is won, either may be returned. Whoever has won must
// [Leader.Resign] in the end, also when the process is about to exit: else nobody leads until the
// lease has expired.
//
// Campaign outlives whatever may heal: etcd out of reach or without a quorum, the candidate's own
// lease lost, its key deleted, an expired auth token. If lease or key were lost it joins again, at
// the end of the queue. It returns early only
//   - when ctx ends: the error wraps ctx's and the last failure seen;
//   - when the Elector or its client is closed, with [ErrClosed];
//   - for what cannot heal: [ErrInvalidName], [ErrCampaigning], a value of more than 1 MiB,
//     permission denied, failed authentication, a request that etcd rejects as invalid.
//
// However it fails, it leaves no candidate behind; where etcd cannot be reached it tries for 2 s and
// leaves the rest to the lease. A request that is not answered is sent again after 0.25 s, to the next
// endpoint, while the first one waits.
func (e *Elector) Campaign(ctx context.Context, name, value string) (*Leader, error) {
	return e.campaign(ctx, name, value, how{})
}

// TryCampaign is like [Elector.Campaign] but does not wait behind others: it returns [ErrHeld] if
// somebody leads or is before it in the queue. It waits for etcd as Campaign does, so ctx should
// have a deadline.
func (e *Elector) TryCampaign(ctx context.Context, name, value string) (*Leader, error) {
	return e.campaign(ctx, name, value, how{try: true})
}

// Run campaigns in the election and calls lead while this instance leads it. It blocks until lead
// has returned while it still led, until ctx ends, or until campaigning fails for good. name, value
// and what cannot heal are those of [Elector.Campaign].
//
// lead gets a context that ends with the term or with ctx, while [Leader.Context] ends with the
// term alone, and must return soon after it: within the margin ([WithMargin]) if work must not
// overlap with the next leader's. Nobody else is let in before that if ctx has ended, since Run
// resigns only after lead has returned.
//
//   - lead returned while leading, or resigned itself: Run resigns and returns lead's error.
//   - The term was lost: Run waits for lead, logs its error, campaigns again, with backoff, and
//     calls lead again. If lead returned just as the term was lost, the loss counts. lead is not
//     called for a term that is over already, because a hook has taken its time.
//   - ctx ended: Run waits for lead, resigns within 2 s, and returns ctx's error, joined with that
//     of lead if lead's is another.
//   - The Elector or its client is closed: the same, with [ErrClosed].
//   - lead panics: Run resigns before the panic goes on.
//
// A failure to resign is logged, not returned: the lease takes care of it.
func (e *Elector) Run(ctx context.Context, name, value string, lead func(ctx context.Context, l *Leader) error) error {
	if lead == nil {
		return errors.New("leader: Run: lead must not be nil")
	}
	if err := e.enter(); err != nil {
		return err
	}
	defer e.exit()
	bound, unbind := e.bind(ctx)
	defer unbind()
	backoff := retry.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for {
		l, err := e.campaign(ctx, name, value, how{run: true})
		if err != nil {
			return err
		}
		elected := time.Now()
		lost, err := e.runTerm(ctx, bound, l, lead)
		if !lost {
			return err
		}
		e.log(l.claim.election).Info("campaigning again after a lost term", "token", l.token, "lead", err)
		if time.Since(elected) > e.opts.ttl {
			backoff.Reset() // it was a success
		}
		if backoff.Wait(bound) != nil {
			return boundError(ctx)
		}
	}
}

// runTerm calls lead for one term and resigns. lost says that the term ended before lead did.
func (e *Elector) runTerm(ctx, bound context.Context, l *Leader, lead func(context.Context, *Leader) error) (lost bool, err error) {
	lctx, cancel := context.WithCancelCause(bound)
	stop := context.AfterFunc(l.ctx, func() { cancel(context.Cause(l.ctx)) })
	defer func() { // also when lead panics
		stop()
		cancel(nil)
		l.letGo(ctx)
	}()
	if l.IsLeader() { // Hooks.Elected may have taken its time, or resigned
		err = lead(lctx, l)
	}
	switch {
	case bound.Err() != nil:
		berr := boundError(ctx)
		if err == nil || errors.Is(err, berr) || errors.Is(err, bound.Err()) {
			return false, berr
		}
		return false, errors.Join(berr, err)
	case !l.IsLeader() && !errors.Is(context.Cause(l.ctx), ErrResigned):
		return true, err
	}
	return false, err
}

// Current returns the candidate that leads, or [ErrNoLeader]. It sends one request, or two if other
// data lies under the election's prefix, and blocks for at most 5 s each. A request that has no answer
// is sent again, to the next endpoint, while the first one waits.
func (e *Elector) Current(ctx context.Context, name string) (Candidate, error) {
	q, err := e.queue(name)
	if err != nil {
		return Candidate{}, err
	}
	c, err := q.Leader(ctx, func(ctx context.Context, read queue.Read) ([]*mvccpb.KeyValue, error) {
		return retry.First(ctx, e.client, read)
	})
	if err != nil {
		return Candidate{}, fmt.Errorf("leader: read who leads %q: %w", name, e.orClosed(ctx, err))
	}
	if c == (queue.Candidate{}) {
		return Candidate{}, ErrNoLeader
	}
	return Candidate(c), nil
}

// Candidates returns all candidates in the order of the queue, the leader first; none is not an
// error. It sends one request, as [Elector.Current] does, and blocks for at most 5 s.
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

// Observe yields who leads the election: the present state at once, then every change of the
// leader or its value, in order and never going back. The zero Candidate means that nobody leads.
//
// It goes on through disconnects, compactions and changes of etcd's leader; states that came and went
// meanwhile may be left out, the latest never is. So it is with states that the loop's body is too slow
// for: up to 64 of them, or 1 MiB of values, wait for it. It ends with a last pair that carries an
// error, when ctx ends (ctx's), on what cannot heal, such as permission denied, or when the Elector or
// its client is closed ([ErrClosed]). Breaking out of the loop ends it without one.
//
// It needs no lease and is no candidate. Each loop over what it returns observes anew, and keeps
// the list of all candidates in memory. What it says may be outdated when it arrives: it must not
// be used to decide whether oneself leads.
func (e *Elector) Observe(ctx context.Context, name string) iter.Seq2[Candidate, error] {
	return func(yield func(Candidate, error) bool) {
		q, err := e.queue(name)
		if err == nil {
			bound, unbind := e.bind(ctx)
			defer unbind()
			err = q.Observe(bound, e.warn(q.Name(), "observing is being retried"), e.opts.ttl, func(c queue.Candidate) bool {
				return yield(Candidate(c), nil)
			})
			if err != nil && (bound.Err() != nil || e.client.Ctx().Err() != nil) {
				err = boundError(ctx)
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

// Evict ends the present term of the election, whoever leads, by deleting the leader's key. It is
// an operator's tool: the leader learns of it through its watch, milliseconds later or, where its
// watch is dead, at its next renewal; only Guard and Token protect what it does until then. A
// leader by stock concurrency.Election never learns of it: such a process is to be stopped first.
// Evict ends no later term than the one it finds. It returns [ErrNoLeader] if nobody leads, and
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

// Close ends all terms and campaigns of the Elector and revokes the lease. Campaigns and Runs
// return [ErrClosed]; Close waits for them, and so for the functions that Runs have called, before
// it lets go of their elections. Terms of Campaign end here at once, with [ErrResigned].
//
// It blocks until etcd has confirmed and all goroutines of the Elector have ended, or until ctx ends,
// and may then be called again to retry. What it could not revoke expires. The function that Run has
// called must not call it without a bound: each would wait for the other.
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
		if !l.run {
			l.abandon()
		}
	}
	if err := retry.Wait(ctx, e.idle); err != nil {
		_ = e.pool.Close(ctx) // fails, but ends the renewals of what nobody uses
		return fmt.Errorf("leader: close: a campaign or Run has not returned: %w", err)
	}
	for _, l := range e.leading() {
		l.abandon()
	}
	// Nobody uses a lease any more: one revocation deletes the keys of all.
	// What a term that was lost a moment ago still does comes after that, and may leave something to revoke.
	if err := errors.Join(e.pool.Close(ctx), e.watching.Wait(ctx), e.pool.Close(ctx)); err != nil {
		return fmt.Errorf("leader: close: %w", err)
	}
	return nil
}

// leading returns the terms that have not ended.
func (e *Elector) leading() []*Leader {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Keys(e.terms))
}

// enter counts a campaign or Run, for Close to wait for.
func (e *Elector) enter() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.closed(); err != nil {
		return err
	}
	e.calls++
	return nil
}

func (e *Elector) exit() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.calls--; e.calls == 0 && e.idle != nil {
		close(e.idle)
	}
}

// closed is called with e.mu held.
func (e *Elector) closed() error {
	if e.idle != nil || e.client.Ctx().Err() != nil {
		return ErrClosed
	}
	return nil
}

// bind returns a context that ends with ctx and when the Elector or its client is closed.
func (e *Elector) bind(ctx context.Context) (bound context.Context, unbind func()) {
	bound, cancel := context.WithCancelCause(ctx)
	closed := func() { cancel(ErrClosed) }
	stop1 := context.AfterFunc(e.ctx, closed)
	stop2 := context.AfterFunc(e.client.Ctx(), closed)
	return bound, func() { stop1(); stop2(); cancel(nil) }
}

// boundError is why a context of bind has ended.
func boundError(ctx context.Context) error {
	if ctx.Err() == nil {
		return ErrClosed
	}
	if cause := context.Cause(ctx); !errors.Is(cause, ctx.Err()) {
		return fmt.Errorf("%w: %w", ctx.Err(), cause)
	}
	return ctx.Err()
}

// orClosed returns err, or ErrClosed if what has ended by it did so because the client is closed.
func (e *Elector) orClosed(ctx context.Context, err error) error {
	if ctx.Err() == nil && e.client.Ctx().Err() != nil {
		return ErrClosed
	}
	return err
}

// queue returns the queue of the election name, if it is a name and the Elector is open.
func (e *Elector) queue(name string) (*queue.Queue, error) {
	election, err := e.opts.election(name)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return queue.New(e.client, election), e.closed()
}

func (e *Elector) log(election string) *slog.Logger { return e.opts.log.With("election", election) }

func (e *Elector) loop(election, warning string) *retry.Loop {
	return &retry.Loop{Client: e.client, Warn: e.warn(election, warning)}
}

func (e *Elector) warn(election, warning string) func(error) {
	return func(err error) { e.log(election).Warn(warning, "error", err) }
}

// maxSilent is how many renewals in a row go without an answer on an open connection before that is
// worth a warning.
const maxSilent = 2

// renewal is told of every renewal of a lease.
func (e *Elector) renewal(r lease.Renewal) {
	// The hooks are called also when the log handler ends this goroutine.
	log := func() *slog.Logger { return e.opts.log.With("lease", fmt.Sprintf("%x", r.Lease)) }
	if r.Err == nil {
		defer e.opts.hooks.Renewed(r.Lease, r.Took, r.Deadline)
		if r.Before > 0 {
			log().Info("renewals of the lease work again", "failures", r.Before, "deadline", r.Deadline)
		}
		return
	}
	defer e.opts.hooks.RenewFailed(r.Lease, r.Took, r.Err)
	if r.Failures == 1 {
		log().Warn("renewal of the lease is being retried", "deadline", r.Deadline, "error", r.Err)
	}
	if state, ok := retry.Connection(e.client); r.Silent == maxSilent && ok && state == connectivity.Ready {
		log().Warn("etcd does not answer on an open connection", "cure", retry.Cure)
	}
}

// lastIdentity is the time of the newest default identity, in milliseconds.
var lastIdentity atomic.Int64

// newIdentity returns <hostname>-<unix milliseconds>-<pid>. No two of a process are of the same
// millisecond, and the pid tells the processes of a machine apart.
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

// value returns what to campaign with or to proclaim.
func (e *Elector) value(value string) (string, error) {
	if value == "" {
		return e.identity, nil
	}
	if len(value) > maxValue {
		return "", fmt.Errorf("leader: value of %d bytes: must be at most %d", len(value), maxValue)
	}
	return value, nil
}

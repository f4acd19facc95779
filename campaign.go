package leader

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"slices"
	"sync"
	"time"

	"example.com/leader/internal/lease"
	"example.com/leader/internal/queue"
	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// A claim is an Elector's part in an election, from the beginning of a campaign to the end of the term.
// There is at most one at a time.
type claim struct {
	e         *Elector
	election  string
	stop      context.CancelFunc // ends observe
	observing sync.WaitGroup     // until observe has returned
	term      *Leader            // nil until it is elected; guarded by e.mu

	// Used by report and observe alone, one of which runs at a time.
	over  bool          // there is nothing more to observe
	pause retry.Backoff // before observe is started again
}

func (e *Elector) claim(election string) (*claim, error) {
	c := &claim{e: e, election: election, stop: func() {}, pause: retry.Backoff{Min: 50 * time.Millisecond, Max: 5 * time.Second}}
	e.mu.Lock()
	_, taken := e.claims[election]
	var former *claim
	if !taken {
		e.claims[election] = c
		former = e.observers[election]
	}
	e.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("%w: %q", ErrCampaigning, election)
	}
	if e.opts.hooks.watchLeader() {
		var ctx context.Context
		ctx, c.stop = context.WithCancel(e.ctx)
		c.observing.Add(1)
		e.mu.Lock()
		e.observers[election] = c
		e.mu.Unlock()
		e.watching.Go(func() {
			if former != nil { // what it reports is older, and comes first
				former.observing.Wait()
			}
			c.report(ctx)
		})
	}
	return c, nil
}

// report calls Hooks.LeaderChanged until ctx ends.
func (c *claim) report(ctx context.Context) {
	defer func() {
		if !c.over && ctx.Err() == nil { // the hook or the log handler has ended this goroutine
			c.e.watching.Go(func() {
				_ = c.pause.Wait(ctx)
				c.report(ctx)
			})
			return
		}
		c.e.mu.Lock()
		if c.e.observers[c.election] == c {
			delete(c.e.observers, c.election)
		}
		c.e.mu.Unlock()
		c.observing.Done()
	}()
	c.observe(ctx)
}

// release lets the next campaign begin. It may be called again. Its caller then waits for observing.
func (c *claim) release() {
	e := c.e
	e.mu.Lock()
	if e.claims[c.election] == c {
		delete(e.claims, c.election)
		e.reports.unclaimed(c.election)
	}
	e.mu.Unlock()
	c.stop()
}

// observe calls Hooks.LeaderChanged. A campaign does not repeat what the campaign before it has reported.
func (c *claim) observe(ctx context.Context) {
	e := c.e
	err := queue.New(e.client, c.election).Observe(ctx, e.warn(c.election, "observing is being retried"), e.opts.ttl,
		func(leader queue.Candidate) bool {
			e.mu.Lock()
			current := e.claims[c.election] == c
			news := current && e.reports.news(c.election, leader)
			e.mu.Unlock()
			if news {
				e.opts.hooks.leaderChanged(c.election, Candidate(leader))
				c.pause.Reset()
			}
			return current
		})
	c.over = true
	if err != nil && ctx.Err() == nil && e.client.Ctx().Err() == nil {
		e.log(c.election).Warn("changes of the leader are not reported any more", "error", err)
	}
}

// maxReports is for how many elections in which the Elector has no part reports are remembered.
const maxReports = 100

// reports is what Hooks.LeaderChanged was last called with in each election.
type reports struct {
	seed maphash.Seed
	last map[string]report
	idle []string // elections without a claim, in the order in which they lost it
}

// A report is what it takes to recognise a candidate.
type report struct {
	token int64
	value uint64 // a hash: the value itself may be 1 MiB
}

// news reports whether this leader was not the last one that was reported, and remembers it.
func (r *reports) news(election string, leader queue.Candidate) bool {
	if r.last == nil {
		r.seed, r.last = maphash.MakeSeed(), make(map[string]report)
	}
	r.idle = slices.DeleteFunc(r.idle, func(name string) bool { return name == election })
	now := report{leader.Token, maphash.String(r.seed, leader.Value)}
	last, known := r.last[election]
	r.last[election] = now
	return !known || last != now
}

func (r *reports) unclaimed(election string) {
	if _, known := r.last[election]; !known {
		return
	}
	r.idle = slices.DeleteFunc(r.idle, func(name string) bool { return name == election })
	r.idle = append(r.idle, election)
	if len(r.idle) > maxReports {
		delete(r.last, r.idle[0])
		r.idle = r.idle[1:]
	}
}

// A caller is the method that campaigns.
type caller int

const (
	byCampaign    caller = iota
	byTryCampaign        // does not wait behind other candidates
	byRun                // resigns the term itself
)

// campaign campaigns in the election. ctx is that of begin.
func (e *Elector) campaign(ctx context.Context, name, value string, by caller) (*Leader, error) {
	election, err := e.opts.election(name)
	if err != nil {
		return nil, err
	}
	if value, err = e.value(value); err != nil {
		return nil, err
	}
	c, err := e.claim(election) //nolint:contextcheck // a claim lasts as long as the term, not as ctx
	if err != nil {
		return nil, err
	}
	// The rule "what the user's code does cannot lose anything" is enforced here, in announce, in joinAndWait, in
	// watch and in runTerm. Hooks and the logger may panic or exit the goroutine. The panic reaches the caller, but
	// claim, key and lease are seen to first.
	returned := false
	defer func() {
		if !returned {
			c.release()
		}
	}()
	started := time.Now()
	e.opts.hooks.campaigning(election)
	l, err := e.newCampaign(ctx, c, value, by).win() //nolint:contextcheck // the campaign has it
	if err != nil {
		c.release()
		c.observing.Wait()
		e.opts.hooks.campaignFailed(election, err)
	} else {
		l.announce(ctx, value, time.Since(started))
	}
	returned = true
	return l, err
}

// maxLogged is how much of a value is logged, in bytes.
const maxLogged = 100

func logged(value string) string { return value[:min(len(value), maxLogged)] }

// announce reports that the term has begun. If the logger or a hook panics, the term is resigned.
func (l *Leader) announce(ctx context.Context, value string, waited time.Duration) {
	told := false
	defer func() {
		l.beginning.Done()
		if !told {
			l.letGo(ctx)
		}
	}()
	func() {
		defer l.e.opts.hooks.elected(l, waited) // also if the log handler ends this goroutine, because Ended follows
		l.e.log(l.claim.election).Info("elected", "token", l.token, "key", l.key, "value", logged(value), "waited", waited)
	}()
	told = true
}

// A campaign makes one candidacy after another, until a candidate is elected.
type campaign struct {
	e     *Elector
	ctx   context.Context
	claim *claim
	value string
	by    caller

	requests *retry.Loop
	rejoins  *retry.Loop // of candidacies, each of which was lost
	denials  *retry.Loop // of leases, to each of which somebody else has attached a key
}

func (e *Elector) newCampaign(ctx context.Context, c *claim, value string, by caller) *campaign {
	k := &campaign{
		e: e, ctx: ctx, claim: c, value: value, by: by,
		requests: e.loop(c.election, "campaign is being retried"),
		rejoins:  e.loop(c.election, "candidacy was lost, joining again"),
		denials:  e.loop(c.election, "campaign is being retried"),
	}
	k.requests.Over = func(failures int, lasted time.Duration) {
		e.log(c.election).Info("requests of the campaign work again", "failures", failures, "lasted", lasted)
	}
	return k
}

// win returns the candidate that is elected, or why none can be.
func (k *campaign) win() (*Leader, error) {
	for {
		joined := time.Now()
		l, err := k.candidate()
		if err == nil {
			err = l.joinAndWait(k)
		}
		if err == nil {
			return l, nil
		}
		if time.Since(joined) > k.e.opts.ttl {
			k.rejoins.OK() // a candidacy that lasted so long ends the streak of lost ones
		}
		switch {
		case errors.Is(err, errAttached):
			err = k.denials.Retry(k.ctx, retry.Passing(err))
		case errors.Is(err, errLost):
			err = k.rejoins.Retry(k.ctx, retry.Passing(err))
		}
		if err != nil {
			return nil, k.failure(err)
		}
	}
}

// failure is what Campaign returns if err has ended it.
func (k *campaign) failure(err error) error {
	last := cmp.Or(k.requests.Last(), k.rejoins.Last(), k.denials.Last())
	over := k.ctx.Err() != nil || k.e.client.Ctx().Err() != nil // either may be the first
	if over {
		err = whyEnded(k.ctx)
	}
	switch election := k.claim.election; {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrHeld):
		return fmt.Errorf("%w: campaign in %q", err, election)
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return fmt.Errorf("leader: campaign in %q: %w: it needs the permission to read and write the keys below %q", election, err, election+"/")
	case over && last != nil:
		return fmt.Errorf("leader: campaign in %q: %w", election, retry.WithLast(err, last))
	default:
		return fmt.Errorf("leader: campaign in %q: %w", election, err)
	}
}

// errLost says that a candidate has lost its lease or its key before it was elected.
var errLost = errors.New("candidacy lost")

// errAttached says that a join was denied although the client may write the key. Any user may attach a key of
// their own to a lease that has no key yet, and etcd then denies the lease to those who may not write that key.
// The campaign takes another lease.
var errAttached = errors.New("somebody else has attached a key to the lease")

// candidate returns a candidate with a lease, which has not joined yet.
func (k *campaign) candidate() (*Leader, error) {
	e, q := k.e, queue.New(k.e.client, k.claim.election)
	e.removeLeft(k.ctx, q)
	if k.by == byTryCampaign { // do not ask for a lease if somebody leads
		leader, err := q.Leader(k.ctx, k.requests)
		if err != nil {
			return nil, err
		}
		if leader != (queue.Candidate{}) {
			return nil, ErrHeld
		}
	}

	l := &Leader{
		e: e, by: k.by, claim: k.claim, queue: q,
		done: make(chan struct{}), resigning: make(chan struct{}, 1),
	}
	l.ctx, l.cancel = context.WithCancelCause(context.WithoutCancel(k.ctx))
	for l.tracked == nil {
		var err error
		l.tracked, err = e.pool.Track(k.ctx, k.requests, q.Key, l.evict)
		if errors.Is(err, lease.ErrCrowded) {
			err = k.requests.Retry(k.ctx, err)
		}
		if err != nil {
			return nil, err
		}
	}
	l.session, l.key = l.tracked.Session(), l.tracked.Name()
	return l, nil
}

// joinAndWait joins the queue and waits. It returns nil when the candidate is elected. If its lease or its key was lost,
// or the campaign is over, it removes the candidate and returns why.
func (l *Leader) joinAndWait(k *campaign) (err error) {
	watched, unwatch := context.WithCancel(context.WithoutCancel(l.session.Context()))
	l.mu.Lock()
	l.unwatch = unwatch
	l.unhook = context.AfterFunc(l.session.Context(), func() { l.end(l.sessionCause()) })
	l.mu.Unlock()
	// The candidacy ends with the campaign as well, the term does not.
	unbind := context.AfterFunc(k.ctx, func() { l.end(ErrResigned) })
	defer unbind()
	elected := false
	defer func() { // also if the logger panics
		if !elected {
			l.withdraw(k.ctx)
		}
	}()
	watch := func() {
		l.watching = true
		l.e.watching.Go(func() { l.watch(watched) }) //nolint:contextcheck // the watch has it
	}

	place, err := l.join(k.requests, k.value)
	if err == nil {
		k.denials.OK()
	}
	switch {
	case err != nil:
	case k.by == byTryCampaign && !place.First():
		err = ErrHeld
	default:
		loop := l.e.loop(l.claim.election, "watch of the own key is being retried")
		l.deletion = l.queue.WatchDeletion(watched, loop, l.key, l.token)
		if !place.First() {
			l.logPlace(place)
		}
		err = l.queue.Wait(l.ctx, k.requests, place, l.session.TTL(), l.deletion, watch)
	}
	if errors.Is(err, queue.ErrGone) {
		l.evict() // sets the cause, which lost returns
	}
	if err == nil && !unbind() {
		err = k.ctx.Err() // the end of ctx wins over the election
	}
	if err == nil {
		err = l.elect()
	}
	if err != nil {
		return l.lost(err)
	}
	elected = true
	if !l.watching {
		watch()
	}
	if !place.First() { // else nobody waits behind this candidate for a touch: who joins finds it the oldest
		l.beginning.Go(l.touch)
	}
	return nil
}

// lost returns errLost with the reason if the candidate has lost its lease or its key, and err otherwise.
func (l *Leader) lost(err error) error {
	cause := context.Cause(l.ctx)
	switch {
	case errors.Is(cause, ErrResigned): // the campaign is over, and failure says why
		return err
	case cause != nil, errors.Is(err, errLost), errors.Is(err, rpctypes.ErrLeaseNotFound),
		errors.Is(err, queue.ErrGone), errors.Is(err, queue.ErrTaken):
		return fmt.Errorf("%w: %w", errLost, cmp.Or(cause, l.session.Cause(), err))
	}
	return err
}

// removeLeft deletes the keys that earlier terms or campaigns of this Elector have left in the election, so
// that the next candidate does not wait behind them. It blocks for at most the time of a request. Renewals delete
// what it could not delete.
func (e *Elector) removeLeft(ctx context.Context, q *queue.Queue) {
	left := e.pool.Abandoned(q.Key)
	if len(left) == 0 {
		return
	}
	rctx, cancel := retry.Request(ctx)
	defer cancel()
	for _, k := range left {
		_ = k.Remove(rctx)
	}
}

// join puts the key and returns its place in the queue.
func (l *Leader) join(loop *retry.Loop, value string) (queue.Place, error) {
	put := l.queue.Join(l.session.ID(), value)
	joining, err := retry.Do(l.ctx, loop, func(ctx context.Context) (queue.Joining, error) {
		return lease.Attempt(ctx, l.tracked, put)
	})
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		l.session.Revoked()
		return queue.Place{}, err
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		_, denied := retry.Do(l.ctx, loop, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, l.queue.MayJoin(ctx, l.session.ID())
		})
		if denied != nil {
			return queue.Place{}, denied
		}
		l.session.Deny()
		return queue.Place{}, errAttached
	case err != nil:
		return queue.Place{}, err
	}
	l.token, l.modified = joining.Token, joining.Token
	l.tracked.Joined(l.token)
	return l.queue.Place(l.ctx, loop, joining, l.session.ID(), value)
}

// logPlace logs that the candidate waits, and for whom. It costs a request, so it is skipped if nothing is logged.
func (l *Leader) logPlace(place queue.Place) {
	log := l.e.log(l.claim.election)
	if !log.Enabled(l.ctx, slog.LevelInfo) {
		return
	}
	leader, err := l.queue.Leader(l.ctx, nil)
	said := []any{"token", l.token}
	if place.Number > 0 {
		said = append(said, "place", place.Number)
	}
	if err == nil && leader.Token != l.token { // else nobody knows, or it is this one by now
		said = append(said, "leader", logged(leader.Value))
	}
	log.Info("joined the queue", said...)
}

// elect makes the candidate the leader. If its lease or its key is lost it returns why instead.
func (l *Leader) elect() error {
	if !l.session.Valid() {
		return fmt.Errorf("%w: %w", errLost, l.sessionCause())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return fmt.Errorf("%w: %w", errLost, context.Cause(l.ctx))
	}
	l.elected = true
	l.beginning.Add(1) // until Hooks.Elected has returned
	l.e.mu.Lock()
	defer l.e.mu.Unlock()
	l.claim.term = l
	return nil
}

// withdraw removes a candidate that was not elected. The key comes first, because closing the watch may wait for the
// user's logger.
func (l *Leader) withdraw(ctx context.Context) {
	l.end(ErrResigned)
	cctx, cancel := retry.Cleanup(ctx)
	defer cancel()
	err := l.remove(cctx)
	switch {
	case l.watching:
		<-l.done
	case l.deletion != nil:
		l.deletion.Close()
	}
	if err != nil {
		l.e.log(l.claim.election).Warn("candidate could not be withdrawn, the lease will expire", "key", l.key, "error", err)
	}
}

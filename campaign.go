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
	released  chan struct{}      // closed by free
	health    *health            // nil without WithHealth
	standing  *Leader            // the present candidate or leader; guarded by e.mu

	// Used by report and observe alone, one of which runs at a time.
	over  bool          // there is nothing more to observe
	pause retry.Backoff // before observe is started again
}

func (e *Elector) claim(election string) (*claim, error) {
	c := &claim{e: e, election: election, stop: func() {}, released: make(chan struct{}), pause: retry.Backoff{Min: 50 * time.Millisecond, Max: 5 * time.Second}}
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
	if e.opts.health != nil {
		c.health = e.newHealth(election, c.unhealthy)
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

// free lets the next campaign begin. It may be called again.
func (c *claim) free() {
	e := c.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.claims[c.election] == c {
		close(c.released)
		delete(e.claims, c.election)
		e.reports.unclaimed(c.election)
	}
}

// quit ends what serves the claim. It may be called again. Its caller then waits for observing.
func (c *claim) quit() {
	c.stop()
	if c.health != nil {
		c.health.stop()
	}
}

// release frees the claim, and gives the lease file up if this was its only one. It may be called again, and blocks for
// as long as the file's disk does.
func (c *claim) release() {
	c.free()
	c.quit()
	if c.e.once {
		c.e.release()
	}
}

// unhealthy ends the present candidacy or term.
func (c *claim) unhealthy(err error) {
	c.e.mu.Lock()
	l := c.standing
	c.e.mu.Unlock()
	if l == nil {
		return
	}
	l.end(err)
	l.mu.Lock()
	defer l.mu.Unlock()
	// It has ended for another cause before, and Run waits for its function, which may hang.
	if l.elected && l.by == byRun && transferred(context.Cause(l.ctx)) {
		l.e.watching.Go(l.vacate)
	}
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
	k, err := e.newCampaign(ctx, name, value, by)
	if err != nil {
		return nil, err
	}
	// The rule "what the user's code does cannot lose anything" is enforced here, in announce, in joinAndWait, in
	// watch and in runTerm. Hooks and the logger may panic or exit the goroutine. The panic reaches the caller, but
	// claim, key and lease are seen to first.
	returned := false
	defer func() {
		if !returned {
			k.claim.release()
		}
	}()
	e.opts.hooks.campaigning(k.claim.election)
	l, err := k.win() //nolint:contextcheck // k has it
	k.tell(l, err)
	returned = true
	return l, err
}

// tell reports how the campaign has ended.
func (k *campaign) tell(l *Leader, err error) {
	if err == nil {
		l.announce(k.ctx, k.value, time.Since(k.began))
		return
	}
	k.claim.release()
	k.claim.observing.Wait()
	k.e.opts.hooks.campaignFailed(k.claim.election, err)
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
	began time.Time
	unfit bool // it was logged that it is not in the queue because of its health

	// The candidate that has stepped back, until the next one has taken its lease over. To revoke that lease and be
	// granted another would slow the handoff that is under way: see bench/README.md, row 14.
	former *Leader

	requests *retry.Loop
	rejoins  *retry.Loop // of candidacies, each of which was lost
	denials  *retry.Loop // of leases, to each of which somebody else has attached a key
}

func (e *Elector) newCampaign(ctx context.Context, name, value string, by caller) (*campaign, error) {
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
	k := &campaign{
		e: e, ctx: ctx, claim: c, value: value, by: by, began: time.Now(),
		requests: e.loop(c.election, "campaign is being retried"),
		rejoins:  e.loop(c.election, "candidacy was lost, joining again"),
		denials:  e.loop(c.election, "campaign is being retried"),
	}
	k.requests.Over = func(failures int, lasted time.Duration) {
		e.log(c.election).Info("requests of the campaign work again", "failures", failures, "lasted", lasted)
	}
	return k, nil
}

// win returns the candidate that is elected, or why none can be.
func (k *campaign) win() (*Leader, error) {
	k.e.pool.Inherit(k.ctx)
	defer k.finishFormer() // also if the logger panics
	for {
		joined := time.Now()
		l, err := k.candidate()
		if err == nil {
			err = l.joinAndWait(k)
		}
		if err == nil {
			return l, nil
		}
		if err = k.retry(err, joined); err != nil {
			return nil, err
		}
	}
}

// retry blocks for a pause after the end of a candidacy, and returns nil if another one is worth a try, else what the
// campaign fails with.
func (k *campaign) retry(err error, joined time.Time) error {
	if time.Since(joined) > k.e.opts.ttl {
		k.rejoins.OK() // a candidacy that lasted so long ends the streak of lost ones
	}
	switch {
	case transferred(err): // join again at once, at the end of the queue
		return nil
	case unhealthy(err) && k.by != byTryCampaign:
		k.unhealthy(err)
		return nil
	case errors.Is(err, errAttached):
		err = k.denials.Retry(k.ctx, retry.Passing(err))
	case errors.Is(err, errLost):
		err = k.rejoins.Retry(k.ctx, retry.Passing(err))
	}
	if err != nil {
		return k.failure(err)
	}
	return nil
}

// failure is what Campaign returns if err has ended it.
func (k *campaign) failure(err error) error {
	last := cmp.Or(k.requests.Last(), k.rejoins.Last(), k.denials.Last())
	if h := k.claim.health; h != nil {
		last = cmp.Or(h.err(), last)
	}
	over := k.e.over(k.ctx, err)
	if over {
		err = k.e.whyEnded(k.ctx)
	}
	switch election := k.claim.election; {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrHeld), errors.Is(err, ErrUnhealthy):
		return fmt.Errorf("%w: campaign in %q", err, election)
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return fmt.Errorf("leader: campaign in %q: %w: it needs the permission to read and write the keys below %q", election, err, election+"/")
	case over && last != nil:
		return fmt.Errorf("leader: campaign in %q: %w", election, retry.WithLast(err, last))
	default:
		return fmt.Errorf("leader: campaign in %q: %w", election, err)
	}
}

// unhealthy reports that the campaign has left the queue because of its health, or cannot join.
func (k *campaign) unhealthy(err error) {
	k.finishFormer() // the next candidate may be long in coming
	if !k.unfit {
		k.unfit = true
		k.e.log(k.claim.election).Warn("unhealthy, not in the queue", "error", err)
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
	if h := k.claim.health; h != nil {
		if err := h.wait(k.ctx, k.by == byTryCampaign, k.unhealthy); err != nil {
			return nil, err
		}
		k.unfit = false
	}
	if k.ctx.Err() != nil { // a candidate that has stepped back might join once more
		return nil, k.ctx.Err()
	}
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
	if k.former != nil {
		l.tracked = k.former.tracked.Rejoin(l.evict)
		k.finishFormer()
	}
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

// finishFormer gives back the lease of the candidate that has stepped back, unless another candidate uses it.
func (k *campaign) finishFormer() {
	l := k.former
	if k.former = nil; l == nil {
		return
	}
	cctx, cancel := retry.Cleanup(k.ctx)
	defer cancel()
	if err := l.giveBack(cctx, nil); err != nil {
		l.warnLeft(err)
	}
}

// joinAndWait joins the queue and waits. It returns nil when the candidate is elected. If its lease or its key was
// lost, or the campaign is over, it removes the candidate and returns why.
//
// A candidate may wait for hours in here. So what takes much of a stack is in other functions: see bench/README.md,
// row 9.
func (l *Leader) joinAndWait(k *campaign) error {
	l.stand(k.ctx)
	defer l.settle(k) // also if the logger panics
	err := l.take(k)
	if err == nil {
		err = l.wait(k.requests)
	}
	return l.decide(k.ctx, err)
}

func (l *Leader) wait(loop *retry.Loop) error {
	return l.queue.Wait(l.ctx, loop, l.place, l.session.TTL(), l.deletion, l.startWatch)
}

// stand begins a candidacy. It ends with the session, with ctx, which is the campaign's, or with health.
func (l *Leader) stand(ctx context.Context) {
	l.mu.Lock()
	l.watched, l.unwatch = context.WithCancel(context.WithoutCancel(l.session.Context()))
	l.unhook = context.AfterFunc(l.session.Context(), func() { l.end(l.sessionCause()) })
	l.mu.Unlock()
	if h := l.claim.health; h != nil {
		l.e.mu.Lock()
		l.claim.standing = l
		l.e.mu.Unlock()
		if err := h.err(); err != nil { // health may have been lost before there was a candidate to tell
			l.end(err)
		}
	}
	l.unbind = context.AfterFunc(ctx, func() { l.end(ErrResigned) }) // a term does not end with it
}

// settle withdraws the candidate unless it was elected.
func (l *Leader) settle(k *campaign) {
	l.unbind()
	l.mu.Lock()
	elected := l.elected
	l.mu.Unlock()
	if !elected {
		l.withdraw(k)
	}
}

// take joins the queue, and watches the own key.
func (l *Leader) take(k *campaign) error {
	k.requests.OK() // there is a lease. This may call the user's logger, so it is here, where a panic loses nothing
	if err := l.join(k.requests, k.value); err != nil {
		return err
	}
	k.denials.OK()
	l.waited = !l.place.First()
	if k.by == byTryCampaign && l.waited {
		return ErrHeld
	}
	if l.waited {
		l.logPlace() // before the watch, which is late if nobody receives from it while the logger blocks
	}
	l.deletion = l.queue.WatchOwn(l.watched, l.ownLoop(), l.key, l.token)
	return nil
}

func (l *Leader) ownLoop() *retry.Loop {
	return l.e.loop(l.claim.election, "watch of the own key is being retried")
}

// startWatch hands the own key over to a goroutine, for good.
func (l *Leader) startWatch() {
	l.watching = true
	l.e.watching.Go(l.watch)
}

// decide elects the candidate whose wait has ended with err, or returns why not.
func (l *Leader) decide(ctx context.Context, err error) error {
	switch { // these set the cause, which lost returns
	case errors.Is(err, queue.ErrGone):
		l.evict()
	case errors.Is(err, queue.ErrAsked):
		l.stepBack()
	case err == nil && !l.unbind():
		err = ctx.Err() // the end of ctx wins over the election
	}
	if err == nil {
		err = l.elect()
	}
	if err != nil {
		return l.lost(err)
	}
	if !l.watching {
		l.startWatch()
	}
	if l.waited { // else nobody waits behind this candidate for a touch: who joins finds it the oldest
		l.beginning.Go(l.touch)
	}
	return nil
}

// lost returns errLost with the reason if the candidate has lost its lease or its key, and err otherwise.
func (l *Leader) lost(err error) error {
	cause := context.Cause(l.ctx)
	switch {
	case resigned(cause): // the campaign is over, and failure says why
		return err
	case winding(cause):
		return cause
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

// join puts the key and finds out its place in the queue.
func (l *Leader) join(loop *retry.Loop, value string) error {
	put := l.queue.Join(l.session.ID(), value)
	joining, err := retry.Do(l.ctx, loop, func(ctx context.Context) (queue.Joining, error) {
		return lease.Attempt(ctx, l.tracked, put)
	})
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		l.session.Revoked()
		return err
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		_, denied := retry.Do(l.ctx, loop, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, l.queue.MayJoin(ctx, l.session.ID())
		})
		if denied != nil {
			return denied
		}
		l.session.Deny()
		return errAttached
	case err != nil:
		return err
	}
	l.token, l.modified = joining.Token, joining.Token
	l.tracked.Joined(l.token)
	l.place, err = l.queue.Place(l.ctx, loop, joining, l.session.ID(), value)
	return err
}

// maxLogging is for how long the answer to what is only logged is awaited.
const maxLogging = 250 * time.Millisecond

// logPlace logs that the candidate waits, and for whom. It costs a request, so it is skipped if nothing is logged.
func (l *Leader) logPlace() {
	log := l.e.log(l.claim.election)
	if !log.Enabled(l.ctx, slog.LevelInfo) {
		return
	}
	ctx, cancel := context.WithTimeout(l.ctx, maxLogging) // the election must not wait for longer
	defer cancel()
	leader, err := l.queue.Oldest(ctx)
	said := []any{"token", l.token}
	if l.place.Number > 0 {
		said = append(said, "place", l.place.Number)
	}
	if err == nil && leader.Token != 0 && leader.Token != l.token { // else nobody knows, or it is this one by now
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

// withdraw removes a candidate that was not elected. One that has stepped back keeps its lease for the next candidate of
// the campaign. The key comes first, because closing the watch may wait for the user's logger.
func (l *Leader) withdraw(k *campaign) {
	l.end(ErrResigned)
	cctx, cancel := retry.Cleanup(k.ctx)
	defer cancel()
	err := l.leaveQueue(cctx)
	if err == nil && transferred(context.Cause(l.ctx)) {
		k.former = l
	} else {
		err = l.giveBack(cctx, err)
	}
	switch {
	case l.watching:
		<-l.done
	case l.deletion != nil:
		l.deletion.Close()
	}
	if err != nil {
		l.warnLeft(err)
	}
}

func (l *Leader) warnLeft(err error) {
	l.e.log(l.claim.election).Warn("candidate could not be withdrawn, the lease will expire", "key", l.key, "error", err)
}

package leader

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"sync"
	"time"

	"example.com/leader/internal/lease"
	"example.com/leader/internal/queue"
	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// A claim is an Elector's part in an election, from the begin of a campaign to the end of the
// term: there may be one at a time.
type claim struct {
	e         *Elector
	election  string
	stop      context.CancelFunc // ends observe
	observing sync.WaitGroup     // until observe has returned

	// Of report and observe alone, which run once at a time.
	over  bool          // there is nothing more to observe
	pause retry.Backoff // before it begins again
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
	if e.opts.hooks.LeaderChanged != nil {
		var ctx context.Context
		ctx, c.stop = context.WithCancel(e.ctx)
		c.observing.Add(1)
		e.mu.Lock()
		e.observers[election] = c
		e.mu.Unlock()
		e.watching.Go(func() {
			if former != nil { // what it tells is older
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

// release lets the next campaign in. It may be called again. Whoever calls it waits for observing then.
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

// observe calls Hooks.LeaderChanged. A campaign after a lost term does not repeat what the one
// before it has reported.
func (c *claim) observe(ctx context.Context) {
	e := c.e
	err := queue.New(e.client, c.election).Observe(ctx, e.warn(c.election, "observing is being retried"), e.opts.ttl,
		func(leader queue.Candidate) bool {
			e.mu.Lock()
			current := e.claims[c.election] == c
			news := current && e.reports.news(c.election, leader)
			e.mu.Unlock()
			if news {
				e.opts.hooks.LeaderChanged(c.election, Candidate(leader))
				c.pause.Reset()
			}
			return current
		})
	c.over = true
	if err != nil && ctx.Err() == nil && e.client.Ctx().Err() == nil {
		e.log(c.election).Warn("changes of the leader are not reported any more", "error", err)
	}
}

// maxReports is how many elections without a campaign or term reports remembers.
const maxReports = 100

// reports is what Hooks.LeaderChanged was last called with, by election.
type reports struct {
	seed maphash.Seed
	last map[string]report
	idle []string // elections without a claim, the longest without one first
}

// A report is as much of a candidate as it takes to know it again.
type report struct {
	token int64
	value uint64 // a hash: the value itself may be 1 MiB
}

// news reports whether the leader is not the one that was reported last, and remembers it.
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

// how says what is special about a campaign.
type how struct {
	try bool // it does not wait behind others
	run bool // Run looks after the term
}

func (e *Elector) campaign(ctx context.Context, name, value string, how how) (*Leader, error) {
	election, err := e.opts.election(name)
	if err != nil {
		return nil, err
	}
	if value, err = e.value(value); err != nil {
		return nil, err
	}
	if err := e.enter(); err != nil {
		return nil, err
	}
	defer e.exit()
	c, err := e.claim(election) //nolint:contextcheck // a claim lasts as long as the term, not as ctx
	if err != nil {
		return nil, err
	}
	// Here is the rule "what the user's code does cannot lose anything": hooks and the logger may panic or
	// exit the goroutine. That goes on to the caller, but what was begun is ended first: here, in announce, in
	// stand, in watch and in runTerm.
	returned := false
	defer func() {
		if !returned {
			c.release()
		}
	}()
	started := time.Now()
	e.opts.hooks.Campaigning(election)
	l, err := e.candidate(ctx, c, value, how)
	if err != nil {
		c.release()
		c.observing.Wait()
		e.opts.hooks.CampaignFailed(election, err)
	} else {
		l.announce(ctx, value, time.Since(started))
	}
	returned = true
	return l, err
}

// maxLogged is how much of a value is logged, in bytes.
const maxLogged = 100

// announce tells that the term has begun. If the logger or the hook panics it is resigned.
func (l *Leader) announce(ctx context.Context, value string, waited time.Duration) {
	told := false
	defer func() {
		l.beginning.Done()
		if !told {
			l.letGo(ctx)
		}
	}()
	func() {
		defer l.e.opts.hooks.Elected(l.claim.election, l, waited) // also when the log handler ends this goroutine: Ended follows
		l.e.log(l.claim.election).Info("elected", "token", l.token, "key", l.key, "value", value[:min(len(value), maxLogged)], "waited", waited)
	}()
	told = true
}

// A campaigning is a campaign under way: one candidacy after another, until one is elected.
type campaigning struct {
	e     *Elector
	claim *claim
	value string
	how   how

	ctx    context.Context // the caller's
	bound  context.Context // ends with ctx and with the Elector or its client
	loop   *retry.Loop     // of requests
	again  *retry.Loop     // of candidacies
	denied *retry.Loop     // of leases to which somebody else has attached a key
	stood  time.Time       // when the present candidacy began
}

// newCampaigning returns a campaign, and what ends its context.
func (e *Elector) newCampaigning(ctx context.Context, c *claim, value string, how how) (k *campaigning, unbind func()) {
	bound, unbind := e.bind(ctx)
	return &campaigning{
		e: e, claim: c, value: value, how: how, ctx: ctx, bound: bound,
		loop:   e.loop(c.election, "campaign is being retried"),
		again:  e.loop(c.election, "candidacy was lost, joining again"),
		denied: e.loop(c.election, "campaign is being retried"),
	}, unbind
}

// candidate stands until it is elected, or cannot be.
func (e *Elector) candidate(ctx context.Context, c *claim, value string, how how) (*Leader, error) {
	k, unbind := e.newCampaigning(ctx, c, value, how)
	defer unbind()
	for {
		l, err := k.stand() //nolint:contextcheck // k has it
		if err == nil {
			return l, nil
		}
		if err := k.retry(err); err != nil {
			return nil, err
		}
	}
}

func (k *campaigning) stand() (*Leader, error) {
	k.stood = time.Now()
	l, err := k.enlist()
	if err != nil {
		return nil, err
	}
	return l, l.stand(k)
}

// retry blocks for a pause after the end of a candidacy, and returns nil if another one is worth a try.
func (k *campaigning) retry(err error) error {
	if time.Since(k.stood) > k.e.opts.ttl {
		k.again.OK() // what lasted that long is no streak
	}
	again := k.again
	switch {
	case errors.Is(err, errAttached):
		again = k.denied
	case !errors.Is(err, errLost):
		return k.failure(err)
	}
	if err := again.Again(k.bound, retry.Passing(err)); err != nil {
		return k.failure(err)
	}
	return nil
}

// failure is what Campaign returns for its end by err.
func (k *campaigning) failure(err error) error {
	last := cmp.Or(k.loop.Last(), k.again.Last(), k.denied.Last())
	over := k.bound.Err() != nil || k.e.client.Ctx().Err() != nil // the one may come a moment before the other
	if over {
		err = boundError(k.ctx)
	}
	switch election := k.claim.election; {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrHeld):
		return fmt.Errorf("%w: campaign in %q", err, election)
	case over && last != nil:
		return fmt.Errorf("leader: campaign in %q: %w", election, retry.WithLast(err, last))
	default:
		return fmt.Errorf("leader: campaign in %q: %w", election, err)
	}
}

// errLost says that a candidate lost its lease or its key before it was elected.
var errLost = errors.New("candidacy lost")

// errAttached says that a join was denied although the key may be written: any user may attach a key of
// their own to a lease that has none yet, and then etcd denies the lease to those who may not write
// that key. It takes another lease.
var errAttached = errors.New("somebody else has attached a key to the lease")

// enlist returns a candidate with a lease.
func (k *campaigning) enlist() (*Leader, error) {
	e, q := k.e, queue.New(k.e.client, k.claim.election)
	e.removeLeft(k.bound, q)
	if k.how.try { // do not ask for a lease in vain
		leader, err := q.Leader(k.bound, func(ctx context.Context, read queue.Read) ([]*mvccpb.KeyValue, error) {
			return retry.Do(ctx, k.loop, read)
		})
		if err != nil {
			return nil, err
		}
		if leader != (queue.Candidate{}) {
			return nil, ErrHeld
		}
	}

	l := &Leader{
		e: e, run: k.how.run, claim: k.claim, queue: q,
		done: make(chan struct{}), resigning: make(chan struct{}, 1),
	}
	l.ctx, l.cancel = context.WithCancelCause(context.WithoutCancel(k.ctx))
	for l.tracked == nil {
		var err error
		l.tracked, err = e.pool.Track(k.bound, k.loop, q.Key, l.evict)
		if errors.Is(err, lease.ErrCrowded) {
			err = k.loop.Again(k.bound, err)
		}
		if err != nil {
			return nil, err
		}
	}
	l.session, l.key = l.tracked.Session(), l.tracked.Name()
	return l, nil
}

// stand is one candidacy: it returns nil when the candidate is elected. Otherwise its lease or its key was
// lost, or it has to give up: then it has left no key behind, and the lease to those who still use it.
func (l *Leader) stand(k *campaigning) error {
	// watched ends when the lease or the key is lost, and with the term.
	watched, unwatch := context.WithCancel(l.session.Context())
	l.unwatch = unwatch
	elected := false
	defer func() { // also when the logger panics
		if !elected {
			l.withdraw(k.ctx)
		}
	}()
	standing, cancel := context.WithCancel(k.bound)
	defer cancel()
	defer context.AfterFunc(watched, cancel)()
	watch := func() {
		l.watching = true
		l.e.watching.Go(func() { l.watch(watched) }) //nolint:contextcheck // so does the watch
	}

	place, err := l.join(standing, k.loop, k.value)
	if err == nil {
		k.denied.OK()
	}
	switch {
	case err != nil:
	case k.how.try && !place.First():
		err = ErrHeld
	default:
		loop := l.e.loop(l.claim.election, "watch of the own key is being retried")
		l.deletion = l.queue.WatchDeletion(watched, loop, l.key, l.token)
		err = l.queue.Wait(standing, k.loop, place, l.session.TTL(), l.deletion, watch)
	}
	if errors.Is(err, queue.ErrGone) {
		l.evict() // says why the candidacy is lost
	}
	if err == nil {
		err = l.elect()
	}
	if err != nil {
		return l.lost(standing, k.bound, err)
	}
	elected = true
	if !l.watching {
		watch()
	}
	if !place.First() { // else nobody was there to be behind
		l.beginning.Go(l.touch)
	}
	return nil
}

// lost returns err, or errLost if the candidate has lost its lease or its key.
func (l *Leader) lost(standing, bound context.Context, err error) error {
	lost := standing.Err() != nil || errors.Is(err, errLost) || errors.Is(err, rpctypes.ErrLeaseNotFound) ||
		errors.Is(err, queue.ErrGone) || errors.Is(err, queue.ErrTaken)
	if lost && bound.Err() == nil {
		return fmt.Errorf("%w: %w", errLost, cmp.Or(context.Cause(l.ctx), l.session.Cause(), err))
	}
	return err
}

// removeLeft deletes keys that former terms or campaigns of this Elector have left in the election, so
// that it does not wait behind itself. What it cannot delete in the time of a request, renewals delete.
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

// join puts the key and says where in the queue that is.
func (l *Leader) join(ctx context.Context, loop *retry.Loop, value string) (queue.Place, error) {
	put := l.queue.Join(l.session.ID(), value)
	joining, err := retry.Do(ctx, loop, func(ctx context.Context) (queue.Joining, error) {
		return lease.Attempt(ctx, l.tracked, put)
	})
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		l.session.Revoked()
		return queue.Place{}, err
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		_, denied := retry.Do(ctx, loop, func(ctx context.Context) (struct{}, error) {
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
	return l.queue.Place(ctx, loop, joining, l.session.ID(), value)
}

// elect makes the candidate a leader, unless its lease or key is lost: then it returns why.
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
	l.e.terms[l] = struct{}{}
	return nil
}

// withdraw tidies up after a candidate that was not elected. The key comes first, and only then what
// may wait for the user's code.
func (l *Leader) withdraw(ctx context.Context) {
	l.end(ErrResigned)
	l.unwatch()
	cctx, cancel := retry.Cleanup(ctx)
	defer cancel()
	var err error
	if l.token != 0 && !l.session.Gone() {
		err = retry.Persist(cctx, l.e.client, func(ctx context.Context) error {
			return l.queue.Remove(ctx, l.key, l.token)
		})
	}
	if err == nil {
		l.tracked.Drop() // abandons it if a join has no answer yet
	} else {
		l.tracked.Abandon()
	}
	l.tracked.Release()
	err = errors.Join(err, l.session.Finish(cctx))
	switch {
	case l.session.Gone():
		err = nil
	case err == nil && l.tracked.Abandoned(): // others use the lease
		err = l.tracked.Remove(cctx)
	}
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

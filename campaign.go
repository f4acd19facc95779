package leader

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"example.com/leader/internal/lease"
	"example.com/leader/internal/queue"
	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// A claim is an Elector's part in an election, from the begin of a campaign to the end of the
// term: there may be one at a time.
type claim struct {
	e         *Elector
	election  string
	stop      context.CancelFunc // ends observe
	observing sync.WaitGroup     // done when observe has returned
}

func (e *Elector) claim(election string) (*claim, error) {
	c := &claim{e: e, election: election, stop: func() {}}
	e.mu.Lock()
	_, taken := e.claims[election]
	if !taken {
		e.claims[election] = c
	}
	e.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("%w: %q", ErrCampaigning, election)
	}
	if e.opts.hooks.LeaderChanged != nil {
		var ctx context.Context
		ctx, c.stop = context.WithCancel(e.ctx)
		c.observing.Go(func() { c.observe(ctx) })
	}
	return c, nil
}

// release lets the next campaign in. Whoever calls it waits for observing then.
func (c *claim) release() {
	c.e.mu.Lock()
	delete(c.e.claims, c.election)
	c.e.mu.Unlock()
	c.stop()
}

// observe calls Hooks.LeaderChanged. A campaign after a lost term does not repeat what the one
// before it has reported.
func (c *claim) observe(ctx context.Context) {
	e := c.e
	err := queue.New(e.client, c.election).Observe(ctx, e.loop(c.election, "observing is being retried"), e.opts.ttl,
		func(leader queue.Candidate) bool {
			e.mu.Lock()
			last, known := e.reported[c.election]
			current := e.claims[c.election] == c
			if current {
				e.reported[c.election] = Candidate(leader)
			}
			e.mu.Unlock()
			if current && (!known || last != Candidate(leader)) {
				e.opts.hooks.LeaderChanged(c.election, Candidate(leader))
			}
			return current
		})
	if err != nil && ctx.Err() == nil {
		e.log(c.election).Warn("changes of the leader are not reported any more", "error", err)
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
	started := time.Now()
	e.opts.hooks.Campaigning(election)
	bound, unbind := e.bind(ctx)
	defer unbind()
	loop := e.loop(election, "campaign is being retried")
	again := e.loop(election, "candidacy was lost, joining again")
	for {
		stood := time.Now()
		l, err := e.stand(ctx, bound, loop, c, value, how)
		if errors.Is(err, errLost) {
			if time.Since(stood) > e.opts.ttl {
				again.OK() // what lasted that long is no streak
			}
			if err = again.Again(bound, err); err == nil {
				continue
			}
		}
		if err != nil {
			err = campaignError(ctx, bound, election, err, cmp.Or(loop.Last(), again.Last()))
			c.release()
			c.observing.Wait()
			e.opts.hooks.CampaignFailed(election, err)
			return nil, err
		}
		waited := time.Since(started)
		e.log(election).Info("elected", "token", l.token, "key", l.key, "waited", waited)
		e.opts.hooks.Elected(election, l, waited)
		l.beginning.Done()
		return l, nil
	}
}

// campaignError is what Campaign returns for the end of a campaign by err; last is the last failure
// before it.
func campaignError(ctx, bound context.Context, election string, err, last error) error {
	if bound.Err() != nil {
		err = boundError(ctx)
	}
	switch {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrHeld):
		return fmt.Errorf("%w: campaign in %q", err, election)
	case bound.Err() != nil && last != nil:
		return fmt.Errorf("leader: campaign in %q: %w (last failure: %w)", election, err, last)
	}
	return fmt.Errorf("leader: campaign in %q: %w", election, err)
}

// errLost says that a candidate lost its lease or its key before it was elected.
var errLost = errors.New("candidacy lost")

// stand is one candidacy: from a lease until elected, or until the lease or the key is lost. When
// it fails it leaves no key behind, and the lease to those who still use it.
func (e *Elector) stand(ctx, bound context.Context, loop *retry.Loop, c *claim, value string, how how) (*Leader, error) {
	q := queue.New(e.client, c.election)
	if how.try { // do not ask for a lease in vain
		var leader queue.Candidate
		err := loop.Do(bound, func(ctx context.Context) (err error) {
			leader, err = q.Leader(ctx)
			return err
		})
		if err != nil {
			return nil, err
		}
		if leader != (queue.Candidate{}) {
			return nil, ErrHeld
		}
	}
	var session *lease.Lent
	err := loop.Do(bound, func(ctx context.Context) (err error) {
		session, err = e.pool.Get(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}

	l := &Leader{
		e: e, run: how.run, claim: c, queue: q, session: session, key: q.Key(session.ID()),
		done: make(chan struct{}), resigning: make(chan struct{}, 1),
	}
	l.ctx, l.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	// watched ends when the lease or the key is lost, and with the term.
	watched, unwatch := context.WithCancel(session.Context())
	l.unwatch = unwatch
	var left bool
	l.tracked, left = session.Track(l.key, l.evict)

	standing, cancel := context.WithCancel(bound)
	defer cancel()
	defer context.AfterFunc(watched, cancel)()

	place, err := l.join(standing, loop, value, left)
	if err != nil {
		close(l.done) // nobody watches the key yet
	} else {
		l.token = place.Token
		l.tracked.Joined(l.token)
		go l.watch(watched) //nolint:contextcheck // so does the watch
		if how.try && !place.First() {
			err = ErrHeld
		} else {
			err = q.Wait(standing, loop, place, session.TTL())
		}
	}
	l.beginning.Add(1)
	if err == nil && l.elect() {
		if !place.First() { // else nobody was there to be behind
			l.beginning.Go(l.touch)
		}
		return l, nil
	}
	lost := err == nil || standing.Err() != nil || errors.Is(err, rpctypes.ErrLeaseNotFound) || errors.Is(err, queue.ErrGone)
	if lost && bound.Err() == nil {
		err = fmt.Errorf("%w: %w", errLost, cmp.Or(context.Cause(l.ctx), session.Cause(), err))
	}
	l.withdraw(ctx)
	return nil, err
}

// join puts the key, after deleting what an earlier owner may have left under its name.
func (l *Leader) join(ctx context.Context, loop *retry.Loop, value string, left bool) (queue.Place, error) {
	if left {
		err := loop.Do(ctx, func(ctx context.Context) error { return l.queue.Remove(ctx, l.key, 0) })
		if err != nil {
			return queue.Place{}, err
		}
	}
	place, err := l.queue.Join(ctx, loop, l.session.ID(), value)
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		l.session.Revoked()
	}
	return place, err
}

// elect makes the candidate a leader, unless its lease or key is lost.
func (l *Leader) elect() bool {
	if !l.session.Valid() {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return false
	}
	l.elected = true
	l.e.mu.Lock()
	defer l.e.mu.Unlock()
	l.e.terms[l] = struct{}{}
	return true
}

// withdraw tidies up after a candidate that was not elected.
func (l *Leader) withdraw(ctx context.Context) {
	l.end(ErrResigned)
	l.unwatch()
	<-l.done
	cctx, cancel := retry.Cleanup(ctx)
	defer cancel()
	var err error
	if !l.session.Gone() {
		err = retry.Persist(cctx, l.e.client, func(ctx context.Context) error {
			return l.queue.Remove(ctx, l.key, l.token)
		})
	}
	denied := l.token == 0 && err != nil && retry.Permanent(err) // so was the join, and there is no key
	switch {
	case denied:
		err = nil
		l.tracked.Drop()
	case err == nil && l.token != 0:
		l.tracked.Drop()
	default:
		l.tracked.Abandon() // a join without an answer may still come, after the deletion
	}
	l.giveBack()
	if err := errors.Join(err, l.session.Finish(cctx)); err != nil {
		l.e.log(l.claim.election).Warn("candidate could not be withdrawn, the lease will expire", "key", l.key, "error", err)
	}
}

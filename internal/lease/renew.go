package lease

import (
	"context"
	"errors"
	"slices"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// untilDue is how long the next renewal has to wait: the first third of the TTL passes in peace.
// s.mu is held.
func (s *Session) untilDue() time.Duration { return time.Until(s.sent.mono.Add(s.ttl / 3)) }

// attempt is how long one attempt to renew may take. What is left until the deadline after a third
// of the TTL is enough for a renewal and two retries, so that one endpoint that does not answer
// costs an attempt and not the lease.
func (s *Session) attempt() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return min((s.ttl-s.margin-s.ttl/3)/3, maxAttempt)
}

// renewal renews the lease, with as many attempts as that takes, unless the session ends. It runs
// when due fires and sets due anew when all is done: there is never more than one, and no goroutine
// in between.
func (s *Session) renewal() {
	attempt := s.attempt()
	backoff := retry.Backoff{Min: attempt / 16, Max: attempt / 2}
	for s.ctx.Err() == nil {
		sent := s.now()
		orphans, err := s.renew(sent, attempt)
		if errors.Is(err, context.Canceled) && s.ctx.Err() != nil {
			err = s.Cause() // that is why
		}
		s.report(sent, err)
		if err == nil {
			s.sweep(orphans, attempt)
			break
		}
		retry.Reconnect(s.client)
		_ = backoff.Wait(s.ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil {
		s.endRenewalsLocked()
		return
	}
	s.due.Reset(s.untilDue())
}

// maxUntold is how many renewals are kept for [Config].Renewal while it does not return.
const maxUntold = 100

// report tells how an attempt went, unless it was cut short by the session's close. It does not wait: what
// is told is the user's code, which may block, panic or exit its goroutine.
func (s *Session) report(sent stamp, err error) {
	if s.cfg.Renewal == nil || err != nil && errors.Is(s.Cause(), ErrClosed) {
		return
	}
	r := Renewal{Lease: s.id, Took: time.Since(sent.mono), Deadline: s.Deadline(), Err: err}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		r.Failures = s.last.Failures + 1
	}
	if errors.Is(err, context.DeadlineExceeded) {
		r.Silent = s.last.Silent + 1
	}
	if err == nil {
		r.Before = s.last.Failures
	}
	if s.cause == nil || !errors.Is(err, s.cause) {
		s.failure = err
	}
	s.last = r
	if len(s.untold) == maxUntold {
		s.untold = slices.Delete(s.untold, 0, 1)
	}
	s.untold = append(s.untold, r)
	s.tellLocked()
}

func (s *Session) tellLocked() {
	if s.telling || len(s.untold) == 0 {
		return
	}
	s.telling = true
	s.started.Go(func() {
		defer func() { // the user's code may have ended this goroutine
			s.mu.Lock()
			defer s.mu.Unlock()
			s.telling = false
			s.tellLocked()
		}()
		for {
			s.mu.Lock()
			if len(s.untold) == 0 {
				s.mu.Unlock()
				return
			}
			r := s.untold[0]
			s.untold = s.untold[1:]
			s.mu.Unlock()
			s.cfg.Renewal(r)
		}
	})
}

// renew makes one attempt: the renewal, then the read that makes its answer count. It returns the
// abandoned keys that the read has found.
func (s *Session) renew(sent stamp, attempt time.Duration) ([]reading, error) {
	answer, err := s.keepAlive(attempt)
	if err != nil {
		return nil, err
	}
	// The answer stays good for as long as the raft term does, so a read that fails is repeated
	// alone.
	var silent time.Time
	failed := func(err error) {
		if errors.Is(err, context.DeadlineExceeded) {
			if time.Since(silent) < attempt {
				return // it was sent beside the one that was reported
			}
			silent = time.Now()
		}
		s.report(sent, err)
	}
	seen, err := s.readSome(s.ctx, attempt, failed, s.sample)
	switch {
	case s.ctx.Err() != nil && err != nil:
		return nil, s.Cause()
	case err != nil:
		return nil, err
	case answer.ttl == 0 && s.lacks(seen, answer.term):
		s.Revoked()
		return nil, rpctypes.ErrLeaseNotFound
	case answer.ttl == 0, seen.term != answer.term:
		return s.found(seen), ErrRefused // what the read says of the keys is true all the same
	}
	return s.found(seen), s.extend(sent, answer.ttl)
}

// lacks reports whether a read confirms an answer that there is no such lease, which was given before it in this
// raft term (0: not known). An etcd leader that was deposed gives it too, of a lease that its successor has granted.
//
// If one of the lease's keys is there, so is the lease. If all that have an owner were put and are gone, the terms on
// them are lost whether the lease lives or not. Else the raft terms must be the same.
func (s *Session) lacks(seen sighting, term uint64) bool {
	gone := make(map[*Key]bool)
	for i, k := range seen.keys {
		if k.rev != 0 && k.rev == seen.revs[i] {
			return false
		}
		gone[k.Key] = k.rev != 0
	}
	if seen.term == term {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	lost := false
	for _, k := range s.keys {
		if !k.abandoned && !gone[k] {
			return false
		}
		lost = lost || !k.abandoned
	}
	return lost
}

// An acknowledgement is etcd's answer to a renewal.
type acknowledgement struct {
	ttl  int64  // in seconds; 0 if etcd knows no such lease
	term uint64 // raft term of the member that has answered; 0 if the client does not tell
}

// keepAlive sends the renewal and waits for its answer.
func (s *Session) keepAlive(attempt time.Duration) (acknowledgement, error) {
	ctx, cancel := context.WithTimeout(retry.RequireLeader(s.ctx), attempt)
	defer cancel()
	if s.keeper == nil { // only renewals use it, and there is one at a time
		k := keeperOf(s.client)
		s.mu.Lock()
		s.keeper = k
		s.mu.Unlock()
	}
	var answer acknowledgement
	var err error
	if s.keeper != nil {
		answer, err = s.keeper.renew(ctx, s.id)
	} else {
		answer, err = renewOnce(paced{ctx, attempt / 8}, s.client, s.id)
	}
	if err != nil && ctx.Err() != nil && s.ctx.Err() == nil {
		err = retry.Silence(s.client, attempt)
	}
	return answer, err
}

// renewOnce renews by KeepAliveOnce, which does not tell who says that there is no such lease.
func renewOnce(ctx context.Context, client *clientv3.Client, id clientv3.LeaseID) (acknowledgement, error) {
	resp, err := client.KeepAliveOnce(ctx, id)
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		return acknowledgement{}, nil
	case err != nil:
		return acknowledgement{}, err
	case resp == nil || resp.ResponseHeader == nil || resp.TTL <= 0:
		return acknowledgement{}, errors.New("the client answered a renewal with neither TTL nor error")
	}
	return acknowledgement{resp.TTL, resp.RaftTerm}, nil
}

// paced is a context for clientv3's KeepAliveOnce, which repeats a request that fails at once
// (connection refused, no raft leader) without a pause for as long as its context lives: tens
// of thousands of times a second. It asks Err before each repetition, so Err is where to wait.
// Whoever else asks Err waits too, which costs time and nothing else.
type paced struct {
	context.Context
	pause time.Duration
}

func (p paced) Err() error {
	_ = retry.Sleep(p.Context, p.pause)
	return p.Context.Err()
}

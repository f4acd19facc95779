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

// untilDueLocked returns how long to wait before the next renewal: renewals start after a third of the TTL.
func (s *Session) untilDueLocked() time.Duration { return time.Until(s.sent.mono.Add(s.ttl / 3)) }

// attempt returns how long one attempt to renew may take: a third of the time from the first attempt to the deadline.
// So there is time for a renewal and two retries, and an endpoint that does not answer costs one attempt, not the
// lease.
func (s *Session) attempt() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return min((s.ttl-s.margin-s.ttl/3)/3, maxAttempt)
}

// renewal renews the lease. It makes attempts until one counts or the session ends. It runs when due fires, and sets
// due again at its end. So two renewals never overlap, and between renewals there is no goroutine.
func (s *Session) renewal() {
	attempt := s.attempt()
	backoff := retry.Backoff{Min: attempt / 16, Max: attempt / 2}
	for s.ctx.Err() == nil {
		sent := s.now()
		orphans, err := s.renew(sent, attempt)
		if errors.Is(err, context.Canceled) && s.ctx.Err() != nil {
			err = s.Cause() // the end of the session has cancelled the attempt
		}
		s.report(sent, err)
		if err == nil {
			// Only after a renewal that counted, because the lease comes first.
			s.sweep(orphans, attempt)
			break
		}
		retry.Reconnect(s.client)
		_ = backoff.Wait(s.ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil { // endLocked could not stop due, and has left this to us
		s.endRenewalsLocked()
		return
	}
	s.due.Reset(s.untilDueLocked())
}

// maxUntold is how many attempts are kept for [Config].Renewal while it has not returned.
const maxUntold = 100

// report passes the result of an attempt to Config.Renewal, unless the session's Close has cut the attempt short. It
// does not wait for Config.Renewal, which is the user's code: it may block, panic or exit its goroutine.
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
	if s.cause == nil || !errors.Is(err, s.cause) { // otherwise err is that end itself, and not the reason for it
		s.failure = err
	}
	s.last = r
	if len(s.untold) == maxUntold {
		s.untold = slices.Delete(s.untold, 0, 1)
	}
	s.untold = append(s.untold, r)
	s.tellLocked()
}

// tellLocked starts a goroutine that calls Config.Renewal for what is untold, unless one is doing that.
func (s *Session) tellLocked() {
	if s.telling || len(s.untold) == 0 {
		return
	}
	s.telling = true
	s.started.Go(func() {
		defer func() { // the user's code may have ended this goroutine; then another one continues
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

// renew makes one attempt: the renewal, then the read that makes its answer count. It returns the abandoned keys that
// the read has found.
func (s *Session) renew(sent stamp, attempt time.Duration) ([]reading, error) {
	answer, err := s.keepAlive(attempt)
	if err != nil {
		return nil, err
	}
	// The acknowledgement stays valid as long as the raft term lasts. So if the read fails, only the read is repeated.
	var silent time.Time
	failed := func(err error) {
		if errors.Is(err, context.DeadlineExceeded) {
			if time.Since(silent) < attempt {
				return // a read that was sent while the reported one waited: both are one silence
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
		return s.found(seen), ErrRefused // what the read says about the keys is true all the same
	}
	// It counts from sent, not from now: all we know about when etcd restarted the TTL is that it was after sent.
	return s.found(seen), s.extend(sent, answer.ttl)
}

// lacks reports whether a read confirms the earlier answer that there is no such lease. term is the raft term of that
// answer, 0 if unknown. A deposed leader of etcd gives the same answer for a lease that its successor has granted.
//
//   - If one of the lease's keys is there, so is the lease: not confirmed.
//   - Otherwise the answer is confirmed if the read has the same raft term.
//   - It is also confirmed if there are keys with an owner, all of them were put, and the read shows that all of them
//     are gone: then their terms are lost whether or not the lease lives.
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
		if k.state == owned && !gone[k] { // not read, or not known to be put: it may be in etcd, and the lease alive
			return false
		}
		lost = lost || k.state == owned
	}
	return lost
}

// An acknowledgement is etcd's answer to a renewal.
type acknowledgement struct {
	ttl  int64  // in seconds; 0 if etcd knows no such lease
	term uint64 // raft term of the member that answered; 0 if unknown
}

// keepAlive sends the renewal and waits for its answer.
func (s *Session) keepAlive(attempt time.Duration) (acknowledgement, error) {
	ctx, cancel := context.WithTimeout(retry.RequireLeader(s.ctx), attempt)
	defer cancel()
	if s.keeper == nil { // read without the lock: only renewals and Grant set it, one at a time
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

// renewOnce renews by KeepAliveOnce. If there is no such lease, the raft term of that answer is unknown.
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

// paced is a context for clientv3's KeepAliveOnce. As long as its context lives, KeepAliveOnce repeats a request that
// fails at once (connection refused, no raft leader) without a pause: tens of thousands of times a second. It calls Err
// before each repetition, so Err is where to pause. Other callers of Err pause too, which only costs time.
type paced struct {
	context.Context
	pause time.Duration
}

func (p paced) Err() error {
	_ = retry.Sleep(p.Context, p.pause)
	return p.Context.Err()
}

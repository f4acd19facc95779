package lease

import (
	"context"
	"errors"
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
		close(s.done)
		return
	}
	s.due.Reset(s.untilDue())
}

// report tells how an attempt went, unless it was cut short by the session's close.
func (s *Session) report(sent stamp, err error) {
	if s.cfg.Renewal == nil || err != nil && errors.Is(s.Cause(), ErrClosed) {
		return
	}
	s.cfg.Renewal(Renewal{Lease: s.id, Took: time.Since(sent.mono), Deadline: s.Deadline(), Err: err})
}

// renew makes one attempt: the renewal, then the read that makes it count. It returns the
// abandoned keys that the read has found.
func (s *Session) renew(sent stamp, attempt time.Duration) ([]orphan, error) {
	ack, err := s.keepAlive(attempt)
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		s.Revoked() // the deadline has not come: somebody revoked it
		return nil, err
	}
	if err != nil {
		return nil, err
	}
	if ack == nil || ack.ResponseHeader == nil || ack.TTL <= 0 {
		return nil, errors.New("the client answered a renewal with neither TTL nor error")
	}
	// The acknowledgement stays good for as long as the raft term does, so a read that fails
	// is repeated alone.
	backoff := retry.Backoff{Min: attempt / 16, Max: attempt / 2}
	most := maxReads
	for {
		term, orphans, err := s.readKeys(most, attempt)
		switch {
		case err == nil && term != ack.RaftTerm:
			return nil, ErrRefused
		case err == nil:
			return orphans, s.extend(sent, ack.TTL)
		case retry.Permanent(err) && most > 1:
			// One key that may not be read must not cost all the others their lease. (One that may
			// not be written does: etcd itself refuses the renewal then.)
			most = 1
			continue
		case retry.Permanent(err):
			return nil, err
		}
		s.report(sent, err)
		retry.Reconnect(s.client)
		if backoff.Wait(s.ctx) != nil {
			return nil, s.Cause()
		}
	}
}

func (s *Session) keepAlive(attempt time.Duration) (*clientv3.LeaseKeepAliveResponse, error) {
	ctx, cancel := context.WithTimeout(retry.RequireLeader(s.ctx), attempt)
	defer cancel()
	return s.client.KeepAliveOnce(paced{ctx, attempt / 8}, s.id)
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

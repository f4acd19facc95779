package lease

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader/internal/retry"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// maxSessions is how many sessions a pool lends. It lends more than one only if a name cannot be used again on the
	// first one (see [Key]), or if etcd denies its lease to candidates (see [Session.Deny]).
	maxSessions = 8

	// minRetry and maxRetry bound the pause after a grant that has failed. The pause is for all callers.
	minRetry, maxRetry = 50 * time.Millisecond, time.Second

	// maxLate is how long a pool tries to revoke the lease of an expired session.
	maxLate = time.Hour
)

// ErrCrowded says that others use all leases that the pool may have, and that none of them can take the key that was
// asked for. It passes when one of them can, or ends.
var ErrCrowded = errors.New("no lease can take the candidate's key: earlier requests on each of them are unanswered")

// A Pool shares sessions among their users. A session is granted for the first user, replaced when it is over, and
// closed after the last one. Usually a pool has one session.
type Pool struct {
	client   *clientv3.Client
	cfg      Config
	granting chan struct{}   // holds a token while a session is being granted
	failing  retry.Backoff   // pauses after failed grants; guarded by granting
	retryAt  time.Time       // when the next grant may be sent, after a failed one; guarded by granting
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc

	// Goroutines of sessions, requests whose answers nobody waits for any more, and revocations after an expiry.
	late retry.Group

	mu       sync.Mutex
	sessions []*Session // those that may be lent
	closing  []*Session // unused, and perhaps not yet revoked: at most maxSessions
	failure  error      // of the last grant; nil if it succeeded
	failed   time.Time  // when the last grant ended

	inheriting context.Context // ends when Inherit need not be waited for any more; nil before the first use
}

// NewPool returns a pool that has no session yet.
func NewPool(client *clientv3.Client, cfg Config) *Pool {
	p := &Pool{client: client, cfg: cfg, granting: make(chan struct{}, 1), failing: retry.Backoff{Min: minRetry, Max: maxRetry}}
	p.cfg.started = &p.late
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// Track returns a key of a session that can take it: one that the pool has, or else a new one. name returns the name of
// the key under a lease. Track blocks until a lease is granted, which it retries with loop, or until ctx ends.
//
// gone is called when a renewal finds that the key with the revision given to [Key.Joined] does not exist. It is called
// at most a few times, without locks held.
func (p *Pool) Track(ctx context.Context, loop *retry.Loop, name func(clientv3.LeaseID) string, gone func()) (*Key, error) {
	for {
		// loop calls the user's code, which may block. So it is used here, and not in track, which holds granting. Its OK
		// is left to the caller, who sees to the key if that code panics.
		k, err := p.track(ctx, loop, name, gone)
		if err == nil || errors.Is(err, ErrCrowded) {
			return k, err
		}
		if err := loop.Retry(ctx, err); err != nil {
			return nil, err
		}
	}
}

// track makes one attempt at Track. Only one caller at a time asks for a grant: the others get the session that this
// one is granted.
func (p *Pool) track(ctx context.Context, loop *retry.Loop, name func(clientv3.LeaseID) string, gone func()) (*Key, error) {
	if ctx.Err() != nil { // etcd was not asked, so givenUp must not blame it
		return nil, ctx.Err()
	}
	// Look before waiting for granting: its holder may wait long for another session, while one that can take this key
	// is there.
	if k, _ := p.lend(name, gone); k != nil {
		return k, nil
	}
	began := time.Now()
	select {
	case p.granting <- struct{}{}:
		defer func() { <-p.granting }()
	case <-ctx.Done():
		p.givenUp(loop, began)
		return nil, ctx.Err()
	}
	k, room := p.lend(name, gone) // again: the last holder of granting may have added a session
	if k != nil {
		return k, nil
	}
	if !room {
		return nil, ErrCrowded
	}
	s, err := p.grantInTime(ctx)
	if err != nil {
		if ctx.Err() != nil {
			p.givenUp(loop, began)
		}
		return nil, err
	}
	p.note(s) // before a key can be put on the lease
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sessions = append(p.sessions, s)
	return s.track(name(s.id), gone), nil
}

// lend returns a key of one of the pool's sessions, or nil if none can take it. room says whether the pool may have
// another session.
func (p *Pool) lend(name func(clientv3.LeaseID) string, gone func()) (k *Key, room bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sessions = slices.DeleteFunc(p.sessions, func(s *Session) bool { return !s.Valid() })
	lendable := 0
	for _, s := range p.sessions {
		if s.isDenied() {
			continue
		}
		lendable++
		if k := s.track(name(s.id), gone); k != nil {
			return k, true
		}
	}
	return nil, lendable < maxSessions
}

// Deny says that etcd denies the session's lease to candidates that join. It is not lent any more.
func (s *Session) Deny() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.denied = true
}

func (s *Session) isDenied() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.denied
}

// grantInTime waits for the pause after the last failed grant, and then calls grant. The pause is shared because an
// Elector may have many campaigns, which all ask for the same lease. p.granting is held.
func (p *Pool) grantInTime(ctx context.Context) (*Session, error) {
	if err := retry.Sleep(ctx, time.Until(p.retryAt)); err != nil {
		return nil, err
	}
	s, err := p.grant(ctx)
	switch {
	case err != nil && ctx.Err() != nil: // the caller has given up, etcd has not failed: no pause for the others
		return nil, err
	case err == nil || retry.Permanent(err):
		p.failing.Reset()
		p.retryAt = time.Time{}
	default:
		p.retryAt = time.Now().Add(p.failing.Next())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failure, p.failed = err, time.Now()
	return s, err
}

// givenUp notes in loop why the caller, which has waited since began and now gives up, has got no lease. The last grant
// that failed is the reason, even if another caller asked for it: it was for all.
func (p *Pool) givenUp(loop *retry.Loop, began time.Time) {
	p.mu.Lock()
	failure, failed := p.failure, p.failed
	p.mu.Unlock()
	// A failure that ended more than maxRetry before began has not delayed this caller, not even by its pause.
	if failure == nil || failed.Add(maxRetry).Before(began) {
		loop.Unanswered(began)
		return
	}
	loop.Waited(failure)
}

// grant asks for a lease, and asks again while the first request has no answer. It revokes a lease that is granted too
// late, after ctx has ended or another grant was answered.
func (p *Pool) grant(ctx context.Context) (granted *Session, _ error) {
	var taken atomic.Pointer[Session]
	revoke := func(s *Session, err error) {
		if err == nil {
			cctx, cancel := retry.Cleanup(context.Background())
			defer cancel()
			_ = s.Close(cctx) // if that fails, the lease expires; it has no keys
		}
	}
	defer func() {
		// The first answer may have been taken just as ctx ended. Then it was not returned, and nobody else revokes it.
		if s := taken.Load(); s != nil && s != granted {
			p.late.Go(func() { revoke(s, nil) })
		}
	}()
	return retry.First(ctx, p.client, func(ctx context.Context) (*Session, error) {
		s, err := retry.Outlive(ctx, &p.late, func(ctx context.Context) (*Session, error) {
			return Grant(ctx, p.client, p.cfg)
		}, revoke)
		if err != nil {
			return nil, err
		}
		// Two grants may be answered before retry.First returns one of them. The first to get here wins.
		if !taken.CompareAndSwap(nil, s) {
			p.late.Go(func() { revoke(s, nil) })
			return nil, errors.New("another grant was answered first")
		}
		s.pool = p
		return s, nil
	})
}

// Abandoned returns the abandoned keys with this name, at most one of each session. It leaves out the keys of sessions
// that are over: they must stay for the margin, and then go with their lease.
func (p *Pool) Abandoned(name func(clientv3.LeaseID) string) []*Key {
	p.mu.Lock()
	defer p.mu.Unlock()
	var keys []*Key
	for _, s := range p.sessions {
		s.mu.Lock()
		if k := s.keys[name(s.id)]; k != nil && k.state == abandoned && s.validLocked() {
			keys = append(keys, k)
		}
		s.mu.Unlock()
	}
	return keys
}

// Remove looks for an abandoned key in etcd and deletes it. It sends its requests until they are answered or ctx ends.
func (k *Key) Remove(ctx context.Context) error {
	seen, err := k.s.readSome(ctx, retry.RequestTimeout, nil, func(int) []reading {
		k.s.mu.Lock()
		defer k.s.mu.Unlock()
		return []reading{{Key: k, name: k.name, abandoned: true, certain: k.unanswered == 0}}
	})
	if err != nil {
		return err
	}
	for _, o := range k.s.found(seen) {
		if err := k.s.delete(ctx, o); err != nil {
			return err
		}
	}
	return nil
}

// retire stops lending a session, because none of its keys has an owner any more.
func (p *Pool) retire(s *Session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sessions = slices.DeleteFunc(p.sessions, func(other *Session) bool { return other == s })
	p.closing = slices.DeleteFunc(p.closing, func(s *Session) bool { return s.Gone() && s.stopped() })
	if len(p.closing) == maxSessions {
		p.closing = slices.Delete(p.closing, 0, 1) // it expires
	}
	p.closing = append(p.closing, s)
}

// stopped reports whether the last renewal has returned.
func (s *Session) stopped() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// Finish closes the session if none of its keys has an owner any more. It may be called again after an error.
//
// An expired session keeps its lease for the margin, in which work has to stop. After that the lease is revoked, if it
// is still there: an etcd that has changed leader gives it the whole TTL again, during which nobody could lead.
func (s *Session) Finish(ctx context.Context) error {
	s.mu.Lock()
	unowned := s.unowned
	s.mu.Unlock()
	if !unowned {
		return nil
	}
	err := s.Close(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.gone && errors.Is(s.cause, ErrExpired) && s.pool.ctx.Err() == nil && !s.revoking {
		s.revoking = true
		s.pool.late.Go(s.revokeLate)
	}
	return err
}

// revokeLate revokes the lease of an expired session when S + TTL has passed by both clocks. It tries until etcd has
// answered, the pool or the client is closed, or maxLate has passed.
func (s *Session) revokeLate() {
	ctx, cancel := context.WithTimeout(s.pool.ctx, maxLate)
	defer cancel()
	defer context.AfterFunc(s.client.Ctx(), cancel)()
	for wait := s.untilExpiry(); wait > 0; wait = s.untilExpiry() {
		if retry.Sleep(ctx, min(wait, clockCheck)) != nil {
			return
		}
	}
	if revoke(ctx, s.client, s.id) == nil {
		s.confirmed()
	}
}

// untilExpiry returns how long it is until S + TTL, when etcd may let the lease expire, by the clock on which that is
// later.
func (s *Session) untilExpiry() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	return s.ttl - min(now.mono.Sub(s.sent.mono), now.wall.Sub(s.sent.wall))
}

// Close revokes the leases of sessions that nobody uses. It waits until everything that the pool has started has ended,
// or until ctx ends. It may be called again after an error.
func (p *Pool) Close(ctx context.Context) error {
	p.mu.Lock()
	p.cancel()
	closing := slices.Clone(p.closing)
	p.mu.Unlock()
	errs := make([]error, len(closing))
	var closes sync.WaitGroup
	for i, s := range closing { // at once: each may wait until ctx ends
		closes.Go(func() { errs[i] = s.Close(ctx) })
	}
	closes.Wait()
	p.mu.Lock()
	p.closing = slices.DeleteFunc(p.closing, func(s *Session) bool {
		return s.stopped() && (s.Gone() || errors.Is(s.Cause(), ErrExpired))
	})
	p.mu.Unlock()
	errs = append(errs, p.late.Wait(ctx))
	return errors.Join(errs...)
}

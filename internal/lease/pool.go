package lease

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// maxSessions is how many sessions a pool lends. There is more than one only where a name cannot be used
	// again on the first, see [Key].
	maxSessions = 8

	// minRetry and maxRetry bound the pause after a grant that has failed, whoever asks for the next.
	minRetry, maxRetry = 50 * time.Millisecond, time.Second

	// maxLate is how long a pool tries to revoke the lease of a session that has expired.
	maxLate = time.Hour
)

// ErrCrowded says that each lease of a pool is in use by others and cannot have the key that was asked
// for. It heals when one of them ends.
var ErrCrowded = errors.New("joins that were not answered keep every lease from being used again")

// A Pool shares sessions among their users: granted for the first, replaced when it is over,
// closed after the last. As a rule it has one.
type Pool struct {
	client   *clientv3.Client
	cfg      Config
	granting chan struct{}   // holds a token while a session is being granted
	failing  retry.Backoff   // of grants; guarded by granting
	retryAt  time.Time       // when a grant may be asked for again, as the last has failed; guarded by granting
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc
	late     retry.Group // what sessions have started, requests whose answers nobody waits for any more, revocations after an expiry

	mu       sync.Mutex
	sessions []*Session // that may be lent
	closing  []*Session // unused, and perhaps not yet revoked: at most maxSessions
	failure  error      // of the last grant; nil if it has succeeded
	failed   time.Time  // when that was
}

// NewPool returns a pool without a session.
func NewPool(client *clientv3.Client, cfg Config) *Pool {
	p := &Pool{client: client, cfg: cfg, granting: make(chan struct{}, 1), failing: retry.Backoff{Min: minRetry, Max: maxRetry}}
	p.cfg.started = &p.late
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// Track returns a key of a session that can have it: of one that the pool has, or else of a new one. name is
// the name of the key under a lease. It blocks for the grant, which is asked for in loop and bounded by ctx.
//
// gone is called, at most a few times and without locks held, when a renewal finds that the key with
// the revision given to [Key.Joined] does not exist.
func (p *Pool) Track(ctx context.Context, loop *retry.Loop, name func(clientv3.LeaseID) string, gone func()) (*Key, error) {
	for {
		k, err := p.track(ctx, loop, name, gone)
		if err == nil || errors.Is(err, ErrCrowded) {
			return k, err
		}
		if err := loop.Again(ctx, err); err != nil { // it calls the user's code, which may block: not in track
			return nil, err
		}
	}
}

// track is one attempt at Track. There is one at a time, as the others are to have the session that it is granted.
func (p *Pool) track(ctx context.Context, loop *retry.Loop, name func(clientv3.LeaseID) string, gone func()) (*Key, error) {
	if ctx.Err() != nil { // etcd is not to blame
		return nil, ctx.Err()
	}
	if k, _ := p.lend(name, gone); k != nil { // though somebody may wait for another one
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
	k, room := p.lend(name, gone)
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
	loop.OK()
	p.mu.Lock()
	defer p.mu.Unlock()
	s.users = 1
	p.sessions = append(p.sessions, s)
	return s.track(name(s.id), gone), nil
}

// lend returns nil if no session can have the key. room says whether there may be another session.
func (p *Pool) lend(name func(clientv3.LeaseID) string, gone func()) (k *Key, room bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sessions = slices.DeleteFunc(p.sessions, func(s *Session) bool { return !s.Valid() })
	lendable := 0
	for _, s := range p.sessions {
		if s.denied {
			continue
		}
		lendable++
		if k := s.track(name(s.id), gone); k != nil {
			s.users++
			return k, true
		}
	}
	return nil, lendable < maxSessions
}

// Deny says that etcd denies the session's lease to those who join: it is not lent any more.
func (s *Session) Deny() {
	s.pool.mu.Lock()
	defer s.pool.mu.Unlock()
	s.denied = true
}

// grantInTime is grant, after the pause that follows the last one if that has failed: the campaigns of an Elector, which
// may be many, ask for one lease. p.granting is held.
func (p *Pool) grantInTime(ctx context.Context) (*Session, error) {
	if err := retry.Sleep(ctx, time.Until(p.retryAt)); err != nil {
		return nil, err
	}
	s, err := p.grant(ctx)
	switch {
	case err != nil && ctx.Err() != nil: // etcd has not failed
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

// givenUp notes what a campaign has waited for in vain since it began: whoever asks for the lease, it is for all.
func (p *Pool) givenUp(loop *retry.Loop, began time.Time) {
	p.mu.Lock()
	failure, failed := p.failure, p.failed
	p.mu.Unlock()
	if failure == nil || failed.Add(maxRetry).Before(began) { // older than the pause that it has begun with
		loop.Unanswered(began)
		return
	}
	loop.Waited(failure)
}

// grant asks for a lease, and again while the first request has no answer. A lease that is granted when
// it is not wanted any more, as ctx has ended or another answer came first, is revoked.
func (p *Pool) grant(ctx context.Context) (granted *Session, _ error) {
	var taken atomic.Pointer[Session]
	revoke := func(s *Session, err error) {
		if err == nil {
			cctx, cancel := retry.Cleanup(context.Background())
			defer cancel()
			_ = s.Close(cctx) // it has no keys, and expires
		}
	}
	defer func() {
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
		if !taken.CompareAndSwap(nil, s) {
			p.late.Go(func() { revoke(s, nil) })
			return nil, errors.New("another grant was answered first")
		}
		s.pool = p
		return s, nil
	})
}

// Abandoned returns the keys with this name that were abandoned, one for each session at most. Those of a session
// that is over are not among them: its margin is kept, and then its lease takes the keys along.
func (p *Pool) Abandoned(name func(clientv3.LeaseID) string) []*Key {
	p.mu.Lock()
	defer p.mu.Unlock()
	var keys []*Key
	for _, s := range p.sessions {
		s.mu.Lock()
		if k := s.keys[name(s.id)]; k != nil && k.abandoned && s.validLocked() {
			keys = append(keys, k)
		}
		s.mu.Unlock()
	}
	return keys
}

// Remove looks for an abandoned key in etcd and deletes it, with requests that are sent until they are answered
// or ctx ends.
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

// Release gives the use of the session back, once. Whoever does so calls [Session.Finish] when the key
// has been seen to.
func (k *Key) Release() {
	s, p := k.s, k.s.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if k.released {
		return
	}
	k.released = true
	if s.users--; s.users > 0 {
		return
	}
	p.sessions = slices.DeleteFunc(p.sessions, func(other *Session) bool { return other == s })
	p.closing = slices.DeleteFunc(p.closing, (*Session).Gone)
	if len(p.closing) == maxSessions {
		p.closing = slices.Delete(p.closing, 0, 1) // it expires
	}
	p.closing = append(p.closing, s)
}

// Finish closes the session if it is unused. It may be called again after an error.
//
// A session that has expired keeps its lease for the margin, which is promised to work that has to stop. After
// that the lease is revoked, if it is still there: an etcd that has a new leader gives it the whole TTL anew,
// in which nobody could lead.
func (s *Session) Finish(ctx context.Context) error {
	s.pool.mu.Lock()
	unused := s.users == 0
	s.pool.mu.Unlock()
	if !unused {
		return nil
	}
	err := s.Close(ctx)
	s.pool.mu.Lock()
	defer s.pool.mu.Unlock()
	if !s.Gone() && errors.Is(s.Cause(), ErrExpired) && s.pool.ctx.Err() == nil && !s.revoking {
		s.revoking = true
		s.pool.late.Go(s.revokeLate)
	}
	return err
}

// revokeLate revokes the lease of an expired session when the margin has passed by both clocks. It
// tries until etcd has answered, the pool or the client is closed, or maxLate has passed.
func (s *Session) revokeLate() {
	ctx, cancel := context.WithTimeout(s.pool.ctx, maxLate)
	defer cancel()
	defer context.AfterFunc(s.client.Ctx(), cancel)()
	for wait := s.untilExpiry(); wait > 0; wait = s.untilExpiry() {
		if retry.Sleep(ctx, min(wait, clockCheck)) != nil {
			return
		}
	}
	_, err := retry.Ask(ctx, s.client, nil, func(ctx context.Context) (struct{}, error) {
		_, err := s.client.Revoke(ctx, s.id)
		return struct{}{}, err
	})
	if err == nil || errors.Is(err, rpctypes.ErrLeaseNotFound) {
		s.mu.Lock()
		s.gone = true
		s.mu.Unlock()
	}
}

// untilExpiry is how long it takes until etcd may have let the lease expire, by the clock that says more.
func (s *Session) untilExpiry() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	return s.ttl - min(now.mono.Sub(s.sent.mono), now.wall.Sub(s.sent.wall))
}

// Close revokes the leases of sessions that nobody uses, and waits until all that the pool has
// started has ended, or until ctx ends. It may be called again after an error.
func (p *Pool) Close(ctx context.Context) error {
	p.mu.Lock()
	p.cancel()
	closing := slices.Clone(p.closing)
	p.mu.Unlock()
	var errs []error
	for _, s := range closing {
		errs = append(errs, s.Close(ctx))
	}
	p.mu.Lock()
	p.closing = slices.DeleteFunc(p.closing, func(s *Session) bool { return s.Gone() || errors.Is(s.Cause(), ErrExpired) })
	p.mu.Unlock()
	errs = append(errs, p.late.Wait(ctx))
	return errors.Join(errs...)
}

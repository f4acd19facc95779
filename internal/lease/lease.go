// Package lease keeps a lease alive and knows until when it can be trusted.
//
// A [Session] ends before etcd can let the lease expire, where a [concurrency.Session] is done up to
// a second after. It is valid until
//
//	S + TTL − margin
//
// where TTL is what etcd granted and S is the local time just before the last counted renewal
// was sent. etcd restarts the lease's TTL when the renewal arrives, which is later than S, so
// that the lease outlives the session by the margin at least. A renewal counts only if
//
//   - etcd acknowledged it,
//   - a linearizable read sent after the acknowledgement was answered in the same raft term, and
//   - all of that came before the present deadline.
//
// The read is what makes the acknowledgement worth something. Renewals do not go through raft:
// an etcd leader that was paused and deposed acknowledges them for a moment after it resumes,
// while its successor counts the lease down. A read in the same term shows that no successor
// had been elected by then. The read asks for the lease's own keys, so it also finds those that
// somebody else deleted, and needs no right that the election does not need.
//
// That there is no such lease is believed on the same terms, since a deposed leader does not know the
// leases that its successor grants; a key that the read finds disproves it.
//
// Two clocks are asked, the monotonic and the wall clock, and the earlier verdict stands: the
// monotonic clock of Linux stands still while the machine is suspended (golang/go#24595). What
// remains is the assumption that the local clock runs slower than etcd's by less than
// margin/TTL.
package lease

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// Why a session is over.
var (
	ErrExpired = errors.New("lease expired")
	ErrRevoked = errors.New("lease revoked")
	ErrClosed  = errors.New("client or session closed")
)

// ErrRefused is the failure of a renewal whose answer the read that followed did not confirm: it was
// answered in another raft term, or found a key of a lease that there is said not to be.
var ErrRefused = errors.New("renewal answered by an etcd leader that may have been deposed")

// maxAttempt is the longest that one attempt to renew waits for an answer.
const maxAttempt = 3 * time.Second

// clockCheck is how often the wall clock is asked, unless the deadline is nearer.
const clockCheck = time.Second

// maxArming is how late the timer may be because of the time that it took to set it.
const maxArming = time.Millisecond

// Config says how to keep a lease.
type Config struct {
	// TTL is asked of etcd in whole seconds, rounded up. etcd may grant more.
	TTL time.Duration
	// Margin is how long before etcd's earliest expiry the session ends; 0 means a fifth of
	// the granted TTL.
	Margin time.Duration
	// Renewal, if not nil, is told of every renewal, one at a time and in their order, in a goroutine that no
	// renewal waits for. While it does not return only the newest are kept for it.
	Renewal func(Renewal)
	// Wall replaces the wall clock in tests.
	Wall func() time.Time

	// started owns the goroutines that a session starts; nil means a group of its own.
	started *retry.Group
}

// A Renewal is one attempt to renew a lease.
type Renewal struct {
	Lease    clientv3.LeaseID
	Took     time.Duration // from just before it was sent until it counted or failed
	Deadline time.Time     // of the session, after it
	Err      error         // nil if it counted
	Failures int           // how many in a row have failed
	Before   int           // if it counted: how many in a row had failed before it
	Silent   int           // how many in a row had no answer
}

// A Session is a lease that is being kept alive. It is safe for concurrent use.
type Session struct {
	id     clientv3.LeaseID
	client *clientv3.Client
	cfg    Config
	ctx    context.Context // ends with the session
	cancel context.CancelFunc
	done   chan struct{} // closed when the last renewal has returned
	unhook func() bool   // forgets the client's context

	pool     *Pool
	users    int          // guarded by pool.mu
	revoking bool         // revokeLate was started; guarded by pool.mu
	denied   bool         // etcd denies the lease to those who join; guarded by pool.mu
	started  *retry.Group // attempts to join, and Config.Renewal

	mu       sync.Mutex
	sent     stamp // S
	ttl      time.Duration
	margin   time.Duration
	timer    *time.Timer // asks the clocks
	due      *time.Timer // begins the next renewal; not set while one is under way
	cause    error       // why the session is over; nil while it is not
	gone     bool        // etcd has confirmed that there is no such lease
	keys     map[string]*Key
	past     []string        // names of keys that were dropped, the last ones
	reads    int64           // of keys, so far
	maxReads int             // how many keys a request may read
	keeper   *keeper         // nil until a renewal needs it
	streams  <-chan struct{} // closed when the keeper has ended; nil if others use it
	last     Renewal
	failure  error // of the last renewal that was answered or ran out of time, nil if it counted
	untold   []Renewal
	telling  bool                 // a goroutine tells them
	stock    *concurrency.Session // nil until Election needs it
}

// stamp is one moment on both clocks.
type stamp struct{ mono, wall time.Time }

// Grant asks etcd for a lease and starts to keep it alive. It sends one request, bounded by ctx
// and [retry.RequestTimeout]. ctx does not bound the session, which goes on until Close.
func Grant(ctx context.Context, client *clientv3.Client, cfg Config) (*Session, error) {
	if cfg.started == nil {
		cfg.started = new(retry.Group)
	}
	s := &Session{
		client:   client,
		cfg:      cfg,
		started:  cfg.started,
		done:     make(chan struct{}),
		keys:     make(map[string]*Key),
		maxReads: maxReads,
	}
	s.sent = s.now()
	rctx, cancel := retry.Request(ctx)
	defer cancel()
	seconds := int64((cfg.TTL + time.Second - 1) / time.Second)
	granted, err := client.Grant(rctx, seconds)
	if err != nil {
		return nil, fmt.Errorf("grant a lease: %w", err)
	}
	if granted == nil || granted.ID == clientv3.NoLease || granted.TTL <= 0 {
		return nil, errors.New("grant a lease: the client answered with neither lease nor error")
	}
	s.id = granted.ID
	s.setTTL(granted.TTL)

	if client.Username != "" { // an authentication takes etcd long enough for many of them to be late
		if s.keeper = keeperOf(client); s.keeper != nil {
			s.keeper.warm()
		}
	}

	// The session outlives ctx, and ends in endLocked alone.
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(client.Ctx())) //nolint:contextcheck
	s.mu.Lock()
	s.timer = time.AfterFunc(clockCheck, s.checkClocks)
	s.armLocked()
	s.due = time.AfterFunc(s.untilDue(), s.renewal) //nolint:contextcheck
	s.unhook = context.AfterFunc(client.Ctx(), func() { s.end(ErrClosed) })
	s.mu.Unlock()
	return s, nil
}

// ID is the lease's.
func (s *Session) ID() clientv3.LeaseID { return s.id }

// Context ends with the session.
func (s *Session) Context() context.Context { return s.ctx }

// Election gives the [concurrency.Election] of a key under this lease. Its methods keep state
// that is not safe for concurrent use, so each use takes a fresh one.
func (s *Session) Election(prefix, key string, rev int64) *concurrency.Election {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stock == nil {
		s.stock = s.newStock()
	}
	return concurrency.ResumeElection(s.stock, prefix, key, rev)
}

// newStock makes the [concurrency.Session], which costs a goroutine for as long as this one lives: a
// candidate that waits has no use for it. It sends no request, so it cannot fail.
func (s *Session) newStock() *concurrency.Session {
	// The derived client must not be closed: that would close the user's Watcher and Lease.
	derived := clientv3.NewCtxClient(s.ctx, clientv3.WithZapLogger(s.client.GetLogger()))
	derived.KV, derived.Watcher, derived.Lease = guardedKV{s.client.KV}, s.client.Watcher, silentLease{s.client.Lease}
	stock, _ := concurrency.NewSession(derived, concurrency.WithLease(s.id), concurrency.WithContext(s.ctx))
	return stock
}

// WithGuard returns a context in which transactions of an [Session.Election] have one more comparison.
// With it a Proclaim that arrives late does not replace the value of a later one.
func WithGuard(ctx context.Context, guard clientv3.Cmp) context.Context {
	return context.WithValue(ctx, guardKey{}, guard)
}

type guardKey struct{}

type guardedKV struct{ clientv3.KV }

func (kv guardedKV) Txn(ctx context.Context) clientv3.Txn {
	txn := kv.KV.Txn(ctx)
	if guard, ok := ctx.Value(guardKey{}).(clientv3.Cmp); ok {
		return guardedTxn{txn, guard}
	}
	return txn
}

type guardedTxn struct {
	clientv3.Txn
	guard clientv3.Cmp
}

func (t guardedTxn) If(cs ...clientv3.Cmp) clientv3.Txn {
	return t.Txn.If(append(cs[:len(cs):len(cs)], t.guard)...)
}

// silentLease is the Lease of the derived client: what [concurrency.NewSession] takes for keepalive
// responses is a channel that ends when the session does.
type silentLease struct{ clientv3.Lease }

func (silentLease) KeepAlive(ctx context.Context, _ clientv3.LeaseID) (<-chan *clientv3.LeaseKeepAliveResponse, error) {
	alive := make(chan *clientv3.LeaseKeepAliveResponse)
	context.AfterFunc(ctx, func() { close(alive) })
	return alive, nil
}

// Valid asks both clocks now. Once it has said no it does not say yes again.
func (s *Session) Valid() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.validLocked()
}

// validLocked is where the deadline wins: whatever comes at the deadline or later finds the session expired,
// though the process may have been stopped and the timer not fired yet.
func (s *Session) validLocked() bool {
	if s.cause == nil && s.left() <= 0 {
		s.endLocked(ErrExpired)
	}
	return s.cause == nil
}

// Deadline is until when the session is valid if nothing more is heard from etcd.
func (s *Session) Deadline() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent.mono.Add(s.ttl - s.margin)
}

// TTL is the time to live that etcd granted.
func (s *Session) TTL() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ttl
}

// Cause says why the session is over: [ErrExpired], [ErrRevoked] or [ErrClosed]. It is nil
// while the session is not over.
func (s *Session) Cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cause
}

// Failure is why the last renewal did not count, nil if it did. That the session has ended meanwhile is no reason.
func (s *Session) Failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failure
}

// Revoked tells the session that etcd does not know the lease any more. Before the deadline that is somebody
// else's doing.
func (s *Session) Revoked() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = true
	if s.validLocked() {
		s.endLocked(ErrRevoked)
	}
}

// Gone reports whether etcd is known to have no such lease any more, and so none of its keys.
func (s *Session) Gone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gone
}

// Close ends the session and revokes the lease, unless that is known to be gone. A session that
// has expired here keeps its lease for the margin, which is promised to work that has to stop: see
// [Session.Finish]. Close returns when etcd has confirmed and the renewals have stopped, or
// when ctx ends. It may be called again after an error.
func (s *Session) Close(ctx context.Context) error {
	s.end(ErrClosed)
	if err := s.revoke(ctx); err != nil {
		return err
	}
	// A Lease that ignores its context must not hold up Close.
	if err := retry.Wait(ctx, s.done); err != nil {
		return err
	}
	s.mu.Lock()
	streams := s.streams
	s.mu.Unlock()
	if streams == nil {
		return nil
	}
	return retry.Wait(ctx, streams)
}

func (s *Session) revoke(ctx context.Context) error {
	if s.Gone() || errors.Is(s.Cause(), ErrExpired) && s.untilExpiry() > 0 {
		return nil
	}
	rctx, cancel := retry.Request(ctx)
	defer cancel()
	err := retry.Persist(rctx, s.client, func(ctx context.Context) error {
		_, err := s.client.Revoke(ctx, s.id)
		return err
	})
	if errors.Is(err, rpctypes.ErrPermissionDenied) {
		return nil // somebody else has attached a key to the lease when it had none any more; it expires
	}
	if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return fmt.Errorf("revoke lease %x: %w", s.id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = true
	return nil
}

// end ends the session; the first cause stands.
func (s *Session) end(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause == nil {
		s.endLocked(cause)
	}
}

func (s *Session) endLocked(cause error) {
	s.cause = cause
	s.timer.Stop()
	if s.due.Stop() { // else a renewal is under way, and ends them
		s.endRenewalsLocked()
	}
	s.unhook()
	s.cancel()
}

func (s *Session) endRenewalsLocked() {
	if s.keeper != nil {
		s.streams = s.keeper.release()
	}
	close(s.done)
}

// now reads both clocks at once: of a pause between two readings one of them would not know.
func (s *Session) now() stamp {
	now := time.Now()
	wall := now
	if s.cfg.Wall != nil {
		wall = s.cfg.Wall()
	}
	return stamp{now, wall.Round(0)}
}

// left is how long the session is still valid by the clock that says less. s.mu is held.
func (s *Session) left() time.Duration {
	now := s.now()
	age := max(now.mono.Sub(s.sent.mono), now.wall.Sub(s.sent.wall))
	return s.ttl - s.margin - age
}

// checkClocks runs when the timer fires.
func (s *Session) checkClocks() {
	if !s.Valid() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause == nil {
		s.armLocked()
	}
}

// armLocked sets the timer. If the process is stopped between a look at the clocks and the timer's start, the
// timer is late by as much. So the clocks are asked again afterwards, and the timer is set anew if time has passed.
func (s *Session) armLocked() {
	for until := s.untilCheck(); ; {
		s.timer.Reset(until)
		before := until
		if until = s.untilCheck(); before-until < maxArming {
			return
		}
	}
}

func (s *Session) untilCheck() time.Duration { return min(s.left(), clockCheck) }

func (s *Session) setTTL(seconds int64) {
	s.ttl = time.Duration(seconds) * time.Second
	s.margin = s.cfg.Margin
	if s.margin == 0 {
		s.margin = s.ttl / 5
	}
}

// extend counts a renewal. Where it races with the deadline, the deadline wins.
func (s *Session) extend(sent stamp, ttl int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.validLocked() {
		s.sent = sent
		s.setTTL(ttl)
		s.armLocked()
	}
	return s.cause
}

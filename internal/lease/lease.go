// Package lease keeps a lease alive and knows until when it can be trusted.
//
// A [Session] ends before etcd can let the lease expire. (A [concurrency.Session] ends up to a second after that.) It
// is valid until
//
//	S + TTL − margin
//
// TTL is what etcd granted. S is the local time just before the last counted renewal was sent. etcd restarts the TTL
// when the renewal arrives, which is later than S. So the lease outlives the session by at least the margin. A renewal
// counts only if
//
//   - etcd acknowledged it,
//   - a linearizable read that was sent after the acknowledgement was answered in the same raft term, and
//   - all of that came before the present deadline.
//
// An acknowledgement alone proves nothing, because renewals do not go through raft: a leader of etcd that was paused
// and deposed acknowledges them for a moment after it resumes, while its successor counts the lease down. A read in the
// same raft term shows that no successor had been elected by then. The read asks for the lease's own keys. So it also
// finds out which of them somebody else deleted, and it needs no right that the election does not need.
//
// The answer that there is no such lease needs the same proof, because a deposed leader does not know the leases that
// its successor grants. A key of the lease that the read finds disproves the answer.
//
// The session reads the monotonic clock and the wall clock, and ends when the deadline has passed by either: the
// monotonic clock of Linux stands still while the machine is suspended (golang/go#24595). One assumption remains: if
// the local clock runs slower than etcd's, then by less than margin/TTL.
package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"example.com/leader/internal/leasefile"
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

// ErrRefused is the failure of a renewal whose answer was not confirmed by the read that followed: the read was
// answered in another raft term, or etcd said that there is no such lease and the read does not prove it.
var ErrRefused = errors.New("renewal answered by an etcd leader that may have been deposed")

// maxAttempt is the longest that one attempt to renew waits for an answer.
const maxAttempt = 3 * time.Second

// clockCheck is how often the clocks are read. If the deadline is nearer, they are read at the deadline.
const clockCheck = time.Second

// maxArming bounds how late the timer may be because setting it took time.
const maxArming = time.Millisecond

// Config says how to keep a lease.
type Config struct {
	// TTL is what etcd is asked for, rounded up to whole seconds. etcd may grant more.
	TTL time.Duration
	// Margin is how long before etcd's earliest possible expiry the session ends. 0 means a fifth of the granted TTL.
	Margin time.Duration
	// Renewal, if not nil, is called with each attempt to renew, one at a time and in order. No renewal waits for it:
	// while it has not returned, only the newest maxUntold attempts are kept for it.
	Renewal func(Renewal)
	// SharedNames says that others put keys of the same names, on other leases. So a name that was dropped is not
	// looked for.
	SharedNames bool
	// File, if not nil, is told of each lease of a pool from before a key is put on it until it is known to be gone. Log,
	// which goes with it, is told what happens to the file and to the leases that a dead owner has left in it.
	File *leasefile.File
	Log  *slog.Logger
	// Wall replaces the wall clock in tests.
	Wall func() time.Time

	// started owns the goroutines that a session starts; nil means a group of its own.
	started *retry.Group
}

// A Renewal is one attempt to renew a lease.
type Renewal struct {
	Lease    clientv3.LeaseID
	Took     time.Duration // from just before it was sent until it counted or failed
	Deadline time.Time     // of the session, after this attempt
	Err      error         // nil if it counted
	Failures int           // how many in a row have failed, this one included
	Before   int           // if it counted: how many in a row had failed before it
	Silent   int           // how many in a row had no answer, this one included
}

// A Session is a lease that is being kept alive. It is safe for concurrent use.
type Session struct {
	id      clientv3.LeaseID
	cluster uint64 // ID of the cluster that has granted it; 0 if unknown
	client  *clientv3.Client
	cfg     Config
	ctx     context.Context // ends with the session
	cancel  context.CancelFunc
	done    chan struct{} // closed when the last renewal has returned
	unhook  func() bool   // unregisters the session from the client's context

	pool    *Pool
	started *retry.Group // attempts to join, and Config.Renewal

	mu       sync.Mutex
	sent     stamp // S
	ttl      time.Duration
	margin   time.Duration
	timer    *time.Timer          // makes checkClocks read the clocks
	due      *time.Timer          // starts the next renewal; not set while one is under way
	cause    error                // why the session is over; nil while it is not
	gone     bool                 // etcd has confirmed that there is no such lease
	keys     map[string]*Key      // those that are not dropped
	owners   int                  // how many of them have an owner
	unowned  bool                 // the last owner has left: the session is not lent again
	denied   bool                 // etcd denies the lease to candidates that join
	revoking bool                 // revokeLate was started
	past     []string             // names of the last keys that were dropped
	reads    int64                // numbers the reads that could not ask for all keys
	maxReads int                  // how many keys one request may read
	keeper   *keeper              // nil until it is needed
	streams  <-chan struct{}      // closed when the keeper has ended; nil if others use it
	last     Renewal              // the last one that was reported
	failure  error                // of the last renewal that was answered or timed out; nil if it counted
	untold   []Renewal            // not yet passed to Config.Renewal
	telling  bool                 // a goroutine is passing them
	stock    *concurrency.Session // nil until Election needs it
}

// stamp is one moment on both clocks.
type stamp struct{ mono, wall time.Time }

// Grant asks etcd for a lease and starts to keep it alive. It sends one request, bounded by ctx and
// [retry.RequestTimeout]. ctx does not bound the session, which lasts until Close.
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
	if granted.ResponseHeader != nil {
		s.cluster = granted.ClusterId
	}
	s.setTTLLocked(granted.TTL)

	// With a password, opening the stream takes an authentication. It may take longer than an attempt to renew, so the
	// stream is opened now.
	if client.Username != "" {
		if s.keeper = keeperOf(client); s.keeper != nil {
			s.keeper.warm()
		}
	}

	// The session outlives ctx. Only endLocked ends it.
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(client.Ctx())) //nolint:contextcheck
	s.mu.Lock()
	s.timer = time.AfterFunc(clockCheck, s.checkClocks)
	s.armLocked()
	s.due = time.AfterFunc(s.untilDueLocked(), s.renewal) //nolint:contextcheck
	s.unhook = context.AfterFunc(client.Ctx(), func() { s.end(ErrClosed) })
	s.mu.Unlock()
	return s, nil
}

// ID returns the ID of the lease.
func (s *Session) ID() clientv3.LeaseID { return s.id }

// Context returns a context that ends with the session.
func (s *Session) Context() context.Context { return s.ctx }

// Election returns the [concurrency.Election] of a key under this lease. An Election is not safe for concurrent use, so
// take a new one for each use.
func (s *Session) Election(prefix, key string, rev int64) *concurrency.Election {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stock == nil {
		s.stock = s.newStock()
	}
	return concurrency.ResumeElection(s.stock, prefix, key, rev)
}

// newStock creates the [concurrency.Session]. It sends no request, so it cannot fail. It costs a goroutine as long as s
// lives, so it is created only when needed: a candidate that waits has no use for it.
func (s *Session) newStock() *concurrency.Session {
	// Do not close the derived client: that would close the user's Watcher and Lease.
	derived := clientv3.NewCtxClient(s.ctx, clientv3.WithZapLogger(s.client.GetLogger()))
	derived.KV, derived.Watcher, derived.Lease = guardedKV{s.client.KV}, s.client.Watcher, silentLease{s.client.Lease}
	stock, _ := concurrency.NewSession(derived, concurrency.WithLease(s.id), concurrency.WithContext(s.ctx))
	return stock
}

// WithGuard returns a context that adds a comparison to each transaction of a [Session.Election]. So a Proclaim that
// arrives late does not replace the value of a later one.
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

// silentLease is the Lease of the derived client. It sends no keepalives: [concurrency.NewSession] gets a channel that
// is closed when the session ends.
type silentLease struct{ clientv3.Lease }

func (silentLease) KeepAlive(ctx context.Context, _ clientv3.LeaseID) (<-chan *clientv3.LeaseKeepAliveResponse, error) {
	alive := make(chan *clientv3.LeaseKeepAliveResponse)
	context.AfterFunc(ctx, func() { close(alive) })
	return alive, nil
}

// Valid reports whether the session is valid by both clocks, which it reads now. Once false it stays false.
func (s *Session) Valid() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.validLocked()
}

// validLocked ends the session if the deadline has passed. It makes the deadline win: whatever comes at the deadline or
// later finds the session expired, even if the process was stopped and the timer has not fired yet.
func (s *Session) validLocked() bool {
	if s.cause == nil && s.leftLocked() <= 0 {
		s.endLocked(ErrExpired)
	}
	return s.cause == nil
}

// Deadline returns until when the session is valid if no further renewal counts.
func (s *Session) Deadline() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent.mono.Add(s.ttl - s.margin)
}

// TTL returns the time to live that etcd granted.
func (s *Session) TTL() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ttl
}

// Margin is how long before etcd's earliest expiry of the lease the session ends.
func (s *Session) Margin() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.margin
}

// Cause returns why the session is over: [ErrExpired], [ErrRevoked] or [ErrClosed]. It is nil while the session is not
// over.
func (s *Session) Cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cause
}

// Failure returns why the last renewal did not count, or nil if it did. A renewal that failed only because the session
// ended is left out.
func (s *Session) Failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failure
}

// Revoked tells the session that the lease is gone. If that comes before the deadline, somebody else has revoked it,
// and the session ends with [ErrRevoked]; at the deadline or later it ends with [ErrExpired].
func (s *Session) Revoked() {
	defer s.confirmed()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = true
	if s.validLocked() {
		s.endLocked(ErrRevoked)
	}
}

// confirmed says that the lease is gone from etcd.
func (s *Session) confirmed() {
	s.mu.Lock()
	s.gone = true
	s.mu.Unlock()
	// Not under the lock: a disk may be slow. A lease that is gone and still named does no harm.
	s.cfg.told(s.cfg.File.Remove(int64(s.id)))
}

// Gone reports whether it is known that the lease is gone from etcd, and all its keys with it.
func (s *Session) Gone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gone
}

// Close ends the session and revokes the lease, unless the lease is known to be gone. A session that has expired
// locally keeps its lease for the margin, in which work has to stop: see [Session.Finish]. Close returns when etcd has
// confirmed and the renewals have stopped, or when ctx ends. It may be called again after an error.
func (s *Session) Close(ctx context.Context) error {
	s.end(ErrClosed)
	err := s.revoke(ctx)
	// Wait for the renewals even if revoke has failed, but only until ctx ends: the user's Lease may ignore its
	// context.
	waited := retry.Wait(ctx, s.done)
	s.mu.Lock()
	streams := s.streams
	s.mu.Unlock()
	if waited == nil && streams != nil {
		waited = retry.Wait(ctx, streams)
	}
	return cmp.Or(err, waited)
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
		// The lease had no key left, and somebody else attached one that this user may not delete. The lease expires.
		return nil
	}
	if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return fmt.Errorf("revoke lease %x: %w", s.id, err)
	}
	s.confirmed()
	return nil
}

// end ends the session. The first cause stays.
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
	if s.due.Stop() { // otherwise a renewal is under way, which calls endRenewalsLocked when it has finished
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

// now reads both clocks from one call of time.Now. If the process were paused between two calls, only one of the
// readings would show the pause.
func (s *Session) now() stamp {
	now := time.Now()
	wall := now
	if s.cfg.Wall != nil {
		wall = s.cfg.Wall()
	}
	return stamp{now, wall.Round(0)}
}

// leftLocked returns how long the session is still valid, by the clock on which less time is left.
func (s *Session) leftLocked() time.Duration {
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

// armLocked sets the timer. If the process is stopped after it has read the clocks and before the timer starts, the
// timer fires late by as much. So armLocked reads the clocks again afterwards, and sets the timer again if time passed.
func (s *Session) armLocked() {
	for until := s.untilCheckLocked(); ; {
		s.timer.Reset(until)
		before := until
		if until = s.untilCheckLocked(); before-until < maxArming {
			return
		}
	}
}

func (s *Session) untilCheckLocked() time.Duration { return min(s.leftLocked(), clockCheck) }

func (s *Session) setTTLLocked(seconds int64) {
	s.ttl = time.Duration(seconds) * time.Second
	s.margin = s.cfg.Margin
	if s.margin == 0 {
		s.margin = s.ttl / 5
	}
}

// extend counts a renewal. If the deadline has passed, the deadline wins and the renewal does not count.
func (s *Session) extend(sent stamp, ttl int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.validLocked() {
		s.sent = sent
		s.setTTLLocked(ttl)
		s.armLocked()
	}
	return s.cause
}

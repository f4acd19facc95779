// Package leader lets exactly one of several instances of a service do the work, by an election
// on etcd.
//
// It does not make it impossible that two instances work at the same time: work that ignores its
// context goes on after the term has ended, and a process that was paused in the middle of a write
// finishes that write when it goes on. What the package guarantees is that an instance knows in
// time: its context is cancelled and [Leader.IsLeader] is false before etcd lets another one win.
// To protect a resource from what knows too late, use [Leader.Guard] if the resource is in etcd and
// [Leader.Token] if it is elsewhere.
//
// A service calls [Run], which campaigns, calls a function while it leads, and campaigns again when
// leadership is lost; or [Campaign], for one term. An [Elector] does the same for many elections
// over one lease, and observes them.
//
// The argument behind "in time" needs etcd to keep a lease for its TTL. Where it does not, because
// an operator deletes the key or revokes the lease, or because a leader of etcd that was paused
// for longer than the TTL goes on and revokes what its successor has renewed
// (etcd-io/etcd#15247), two terms overlap until the watch event arrives that ends the first one:
// milliseconds, in which guard and token hold all the same.
//
// Elections are those of go.etcd.io/etcd/client/v3/concurrency: same keys, same order, so that
// candidates of this package, of [concurrency.Election] and of etcdctl elect can compete in one
// election. A candidate of the election "name" is whatever key is called name/<lease in hex>, so other
// data must not be; anything else under name/ is left alone.
//
// Set DialKeepAliveTime and DialKeepAliveTimeout in the client's configuration, to 10 s and 2 s for
// example. Without them a connection that dies without a sign, because a NAT or a load balancer has
// forgotten it, is noticed only when TCP gives up: nobody leads for up to 15 minutes.
//
// The values of a context that is given to a call reach [Leader.Context] and the call's own requests.
// They, and outgoing gRPC metadata among them, do not reach watches and renewals, which are shared.
package leader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"example.com/leader/internal/lease"
	"example.com/leader/internal/queue"
	"example.com/leader/internal/retry"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// Errors of calls.
var (
	// ErrNotLeader is returned, wrapped, by [Leader.Proclaim] once the term has ended. It also
	// matches [concurrency.ErrElectionNotLeader].
	ErrNotLeader = fmt.Errorf("leader: %w", concurrency.ErrElectionNotLeader)

	// ErrNoLeader is returned by [Elector.Current] and [Elector.Evict] when nobody leads. It also
	// matches [concurrency.ErrElectionNoLeader].
	ErrNoLeader = fmt.Errorf("leader: %w", concurrency.ErrElectionNoLeader)

	// ErrHeld is returned, wrapped, by [Elector.TryCampaign] when somebody leads or is before this
	// candidate in the queue.
	ErrHeld = errors.New("leader: election is held by another candidate")

	// ErrCampaigning is returned, wrapped, for a campaign in an election in which the same Elector
	// campaigns or leads already: both would be one and the same candidate.
	ErrCampaigning = errors.New("leader: this Elector campaigns or leads in the election already")

	// ErrClosed is returned, wrapped, when the Elector or its client is closed.
	ErrClosed = errors.New("leader: Elector or client is closed")

	// ErrInvalidName is returned, wrapped, for an election name that is empty or ends in a slash.
	ErrInvalidName = errors.New("leader: invalid election name")

	// ErrRefused is given to [Hooks].RenewFailed when etcd answered a renewal and the answer does not
	// count, since etcd's own leader changed meanwhile: it may come from one that was already deposed
	// and whose word about a lease is worth nothing.
	ErrRefused = lease.ErrRefused
)

// Why a term ended: the [context.Cause] of [Leader.Context], possibly wrapped.
var (
	// ErrResigned says that it was given up, by [Leader.Resign], [Elector.Close] or the end of Run.
	ErrResigned = errors.New("leadership resigned")

	// ErrExpired says that the lease could not be renewed in time, or that the client was closed, so
	// that it can be renewed no more: then the cause matches [ErrClosed] as well.
	ErrExpired = errors.New("leadership expired: the lease could not be renewed in time")

	// ErrEvicted says that somebody else deleted the key or revoked the lease.
	ErrEvicted = errors.New("leadership ended by somebody else")
)

// maxValue is how long a value may be: less than what etcd takes in a request by default.
const maxValue = 1 << 20

// A Candidate is a candidate as the others see it. The zero value is nobody.
type Candidate struct {
	Value string           // what it campaigned with or proclaimed last
	Token int64            // its fencing token, the create revision of its key
	Key   string           // its key in etcd
	Lease clientv3.LeaseID // the lease in the key's name
}

// Campaign blocks until this instance is elected in the election name, as [Elector.Campaign] of
// an Elector that is used once: [Leader.Resign] also revokes the lease.
func Campaign(ctx context.Context, client *clientv3.Client, name, value string, opts ...Option) (*Leader, error) {
	e, err := New(client, opts...)
	if err != nil {
		return nil, err
	}
	return e.Campaign(ctx, name, value)
}

// Run calls lead while this instance leads the election name, and again when it leads again after
// its term was lost. It blocks until lead has returned while it still led, or ctx ends, as
// [Elector.Run] of an Elector that is used once.
func Run(ctx context.Context, client *clientv3.Client, name, value string, lead func(ctx context.Context, l *Leader) error, opts ...Option) error {
	e, err := New(client, opts...)
	if err != nil {
		return err
	}
	return e.Run(ctx, name, value, lead)
}

// A Leader is one term of leadership. A term that has ended stays so: whoever wants to lead again
// campaigns again and gets another.
//
// A Leader is safe for concurrent use. Of its methods only Proclaim and Resign send requests or
// block.
type Leader struct {
	e       *Elector
	run     bool // Run looks after the term
	claim   *claim
	queue   *queue.Queue
	session *lease.Session
	tracked *lease.Key
	key     string
	token   int64

	ctx       context.Context // the term's
	cancel    context.CancelCauseFunc
	beginning sync.WaitGroup     // Hooks.Elected and touch, in a term
	deletion  *queue.Deletion    // of the key, until watch or withdraw has seen to it
	watching  bool               // watch has begun: with the term, or before if it may block
	unwatch   context.CancelFunc // ends watch
	done      chan struct{}      // closed when watch has returned
	resigning chan struct{}      // holds a token while Resign talks to etcd

	left bool // the key is known to be gone; guarded by resigning

	tidying   sync.WaitGroup // tidy
	unrevoked error          // what it has failed with

	mu       sync.Mutex
	elected  bool      // set only while ctx has not ended
	ended    time.Time // set before ctx ends
	modified int64     // revision of the key's last change, as far as is known
}

// Context returns a context that is cancelled when the term ends, with a [context.Cause] that is
// [ErrResigned], [ErrExpired] or [ErrEvicted]. It carries the values of Campaign's context but does
// not end with it. It is for the work that a leader does. A timer cancels it, so in a process that
// goes on after a pause it is live for a moment even if the term is over; IsLeader has no such
// moment.
func (l *Leader) Context() context.Context { return l.ctx }

// IsLeader reports whether the term still holds. It asks the clocks now and does not wait for a
// timer to fire, so it is right even if the process or the machine was suspended a moment ago. It
// sends no request and does not block. Once false it stays false.
//
// Even so, what is done after it has returned true may come too late: see [Leader.Guard].
func (l *Leader) IsLeader() bool {
	if l.ctx.Err() == nil && !l.session.Valid() {
		l.end(l.sessionCause())
	}
	return l.ctx.Err() == nil
}

// Deadline is until when the term holds if nothing more is heard from etcd. Each renewal moves it,
// about three times per TTL. It is not after the term's end if that came earlier.
func (l *Leader) Deadline() time.Time {
	deadline := l.session.Deadline()
	if l.IsLeader() {
		return deadline
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended.Before(deadline) {
		return l.ended
	}
	return deadline
}

// Token is the term's fencing token, the create revision of its key. It is positive and larger than
// that of every earlier term of the election. (One exception: if somebody deletes the keys of a leader
// and of the candidate behind it together, that candidate may lead for milliseconds without a key, with
// a token below that of the next term, which may have begun already.) A resource that remembers the
// largest token it has seen and refuses smaller ones is safe, from the new term's first write on, from
// a leader that does not know yet that its own term is over.
func (l *Leader) Token() int64 { return l.token }

// Key is the term's key in etcd, <name>/<lease in hex>, the name with the prefix of [WithPrefix].
func (l *Leader) Key() string { return l.key }

// Guard returns a comparison for the If of an etcd transaction. It holds only while this term does:
// not after its key is gone, not in a later term of the same process. The transaction must be sent
// to the same etcd, with the same namespace if there is one.
func (l *Leader) Guard() clientv3.Cmp {
	return clientv3.Compare(clientv3.CreateRevision(l.key), "=", l.token)
}

// Proclaim changes the value that others see of the leader, to one of at most 1 MiB; "" means the
// default identity of [Elector.Campaign]. It returns nil if the term still held when etcd had
// confirmed, so it also serves to ask etcd whether one still leads. It returns [ErrNotLeader], with
// the cause, once the term has ended, and ends the term if it finds the key gone. Any other error
// leaves the term as it is, and open whether the value was changed.
//
// A call that was not answered may still change the value later, but not once a later call has succeeded.
//
// It sends one request, or a few if an earlier call was not answered, and blocks until they are
// answered, ctx or the term ends, or 5 s have passed.
func (l *Leader) Proclaim(ctx context.Context, value string) error {
	value, err := l.e.value(value)
	if err != nil {
		return err
	}
	if l.IsLeader() {
		rctx, cancel := retry.Request(ctx)
		defer cancel()
		defer context.AfterFunc(l.ctx, cancel)()
		err = l.proclaim(rctx, value)
		if errors.Is(err, queue.ErrGone) {
			l.evict()
		}
	}
	if !l.IsLeader() {
		return fmt.Errorf("%w: %w", ErrNotLeader, context.Cause(l.ctx))
	}
	if err != nil {
		return fmt.Errorf("leader: proclaim: %w", err)
	}
	return nil
}

// proclaim changes the value if nobody has changed the key since this term did so last. Else a request
// of an earlier call, which was not answered and arrives late, would replace the value of a later one.
func (l *Leader) proclaim(ctx context.Context, value string) error {
	for {
		l.mu.Lock()
		modified := l.modified
		l.mu.Unlock()
		election := l.session.Election(l.queue.Prefix(), l.key, l.token)
		guarded := lease.WithGuard(ctx, clientv3.Compare(clientv3.ModRevision(l.key), "=", modified))
		err := election.Proclaim(guarded, value)
		if err == nil {
			l.changed(election.Header().Revision)
			return nil
		}
		if !errors.Is(err, concurrency.ErrElectionNotLeader) {
			return err
		}
		// The key is gone, or was changed by an earlier call or by a touch.
		modified, err = retry.First(ctx, l.e.client, func(ctx context.Context) (int64, error) {
			return l.queue.Revision(ctx, l.key, l.token)
		})
		if err != nil {
			return err
		}
		l.changed(modified)
	}
}

// changed notes the revision of a change of the key.
func (l *Leader) changed(rev int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.modified = max(l.modified, rev)
}

// Resign ends the term. Its context is cancelled, with [ErrResigned], and IsLeader is false before
// etcd is asked to delete the key and then, if nothing else uses it, to revoke the lease. Another
// candidate may lead before Resign returns, so work must have stopped before it is called.
//
// It blocks until etcd has confirmed, ctx ends, or 5 s have passed. If it fails it may be called again
// to retry; the term is over all the same. A key that is left goes with its lease, which is not renewed
// on its behalf; where other terms of the Elector share the lease, their renewals delete the key. It
// returns nil for a term that was lost or resigned before.
func (l *Leader) Resign(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, retry.RequestTimeout)
	defer cancel()
	l.end(ErrResigned)
	select {
	case l.resigning <- struct{}{}: // wins over ctx: the lease is to be given back in any case
	default:
		select {
		case l.resigning <- struct{}{}:
		case <-ctx.Done():
			return fmt.Errorf("leader: resign: %w", ctx.Err())
		}
	}
	defer func() { <-l.resigning }()
	if errors.Is(context.Cause(l.ctx), ErrResigned) { // else watch finishes the term
		if err := l.leave(ctx); err != nil {
			return fmt.Errorf("leader: resign: %w", err)
		}
	}
	select {
	case <-l.done: // in moments: it has nothing to ask etcd for
	case <-ctx.Done():
	}
	return nil
}

// end ends the term, or the candidacy. The first cause stands.
func (l *Leader) end(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return
	}
	if l.elected {
		l.ended = time.Now()
		l.e.mu.Lock()
		delete(l.e.terms, l)
		l.e.mu.Unlock()
		l.claim.release() // first: who waits for the term's end may campaign at once
		if !errors.Is(cause, ErrResigned) {
			l.tidying.Add(1)
			l.e.watching.Go(l.tidy)
		}
	}
	l.cancel(cause)
	if !errors.Is(cause, ErrResigned) {
		l.unwatch() // else whoever resigns does, once the key has been seen to: nothing is to come in between
	}
}

// evict ends the term because its key is gone: deleted by somebody else, unless by etcd since the
// lease had expired.
func (l *Leader) evict() {
	if l.session.Valid() {
		l.end(fmt.Errorf("%w: key %q deleted", ErrEvicted, l.key))
	} else {
		l.end(l.sessionCause())
	}
}

// sessionCause is why the term ends with its session.
func (l *Leader) sessionCause() error {
	switch cause := l.session.Cause(); {
	case errors.Is(cause, lease.ErrRevoked):
		return fmt.Errorf("%w: %w", ErrEvicted, cause)
	case errors.Is(cause, lease.ErrClosed):
		return fmt.Errorf("%w: %w", ErrExpired, ErrClosed)
	}
	return ErrExpired
}

// watch ends the term when its key or its session is gone, and tells of the end. ctx ends with the
// session and with the term.
func (l *Leader) watch(ctx context.Context) {
	defer close(l.done)
	// The context must not end later than it says because a request does.
	defer context.AfterFunc(l.session.Context(), func() { l.end(l.sessionCause()) })()
	defer func() {
		if r := recover(); r != nil { // the logger panics, which ends the program: nobody is to wait for the lease then
			l.end(ErrResigned)
			select {
			case l.resigning <- struct{}{}:
				cctx, cancel := retry.Cleanup(ctx)
				_ = l.leave(cctx) // else the lease expires
				cancel()
				<-l.resigning
			default: // somebody is at it
			}
			panic(r)
		}
		// It may also have ended this goroutine.
		<-ctx.Done()
		l.end(l.sessionCause()) // unless the term has ended for another reason
		l.mu.Lock()
		elected := l.elected
		l.mu.Unlock()
		if elected {
			l.tell()
		}
	}()
	l.watchKey(ctx)
}

// watchKey ends the term when its key is gone.
func (l *Leader) watchKey(ctx context.Context) {
	if err := l.deletion.Wait(); err == nil { //nolint:contextcheck // it has ctx
		l.evict()
	} else if ctx.Err() == nil && l.e.client.Ctx().Err() == nil { // not allowed to watch: the renewals still read the key
		l.e.log(l.claim.election).Warn("own key cannot be watched", "key", l.key, "error", err)
	}
}

// tidy gives the lease of a lost term back. No code of the user's can hold it up.
func (l *Leader) tidy() {
	defer l.tidying.Done()
	l.tracked.Drop() // deleted, or about to be with its lease, which nobody renews any more
	l.tracked.Release()
	cctx, cancel := retry.Cleanup(l.e.client.Ctx())
	defer cancel()
	l.unrevoked = l.session.Finish(cctx)
}

// tell tells of the end of a term.
func (l *Leader) tell() {
	l.beginning.Wait()
	l.claim.observing.Wait()
	cause := context.Cause(l.ctx)
	var log *slog.Logger
	defer l.tidying.Wait() // also when the log handler or the hook panics
	func() {
		defer l.e.opts.hooks.Ended(l.claim.election, l, cause) // also when the log handler ends this goroutine
		log = l.e.log(l.claim.election).With("token", l.token)
		if errors.Is(cause, ErrResigned) {
			log.Info("resigned")
			return
		}
		if failure := l.session.Failure(); failure != nil && errors.Is(cause, ErrExpired) {
			log = log.With("renewal", failure)
		}
		log.Warn("lost", "cause", cause)
	}()
	l.tidying.Wait()
	if l.unrevoked != nil {
		log.Warn("lease could not be revoked, it will expire", "error", l.unrevoked)
	}
}

// touch tells the next candidate that this one leads. Where that fails, or comes too late, a request
// more elects the next one. It also tells whether the key is still there: if it was taken together with
// that of the candidate before, either event may have come first.
func (l *Leader) touch() {
	rctx, cancel := retry.Request(l.ctx)
	defer cancel()
	rev, err := retry.Ask(rctx, l.e.client, nil, func(ctx context.Context) (int64, error) {
		rev, err := l.queue.Touch(ctx, l.key, l.token)
		if errors.Is(err, queue.ErrGone) {
			l.evict()
			return 0, nil
		}
		return rev, err
	})
	if err == nil {
		l.changed(rev)
	}
}

// leave deletes the key of a term that was resigned. l.resigning is held.
func (l *Leader) leave(ctx context.Context) error {
	if l.left {
		return nil
	}
	l.tracked.Release()
	rctx, cancel := retry.Request(ctx)
	defer cancel()
	// The deletion comes first and alone: on a cluster a revocation hands over more slowly.
	var err error
	if !l.session.Gone() {
		err = retry.Persist(rctx, l.e.client, func(ctx context.Context) error {
			return l.session.Election(l.queue.Prefix(), l.key, l.token).Resign(ctx)
		})
	}
	l.unwatch()
	if err == nil {
		l.tracked.Drop()
	} else {
		l.tracked.Abandon()
	}
	err = errors.Join(err, l.session.Finish(rctx))
	if err != nil && !l.session.Gone() {
		return err
	}
	l.left = true
	return nil
}

// abandon ends the term and leaves its key to whoever renews the lease, or to the lease's end.
func (l *Leader) abandon() {
	l.end(ErrResigned)
	l.unwatch()
	l.tracked.Abandon()
	l.tracked.Release()
}

// letGo resigns for a caller who cannot: what is left then, the lease takes care of.
func (l *Leader) letGo(ctx context.Context) {
	rctx, cancel := retry.Cleanup(ctx)
	defer cancel()
	if err := l.Resign(rctx); err != nil {
		l.e.log(l.claim.election).Warn("resignation failed, the lease will expire", "token", l.token, "error", err)
	}
}

// Package leader elects a leader among the instances of a service, on etcd: at most one instance works at a time, and
// it is told to stop before another can be elected.
//
// A service calls [Run], which campaigns and calls a function each time this instance is elected; or [Campaign], for
// one term. An [Elector] takes part in many elections over one lease, and observes them.
//
// # What is guaranteed, and what is not
//
// When a term ends, its context is cancelled and [Leader.IsLeader] is false before etcd lets another candidate win.
// This rests on etcd keeping a lease for its TTL. etcd does not do so if an operator deletes the key or revokes the
// lease, or if a leader of etcd that was paused for longer than the TTL resumes and revokes what its successor has
// renewed (etcd-io/etcd#15247). Then two terms overlap until the leader has received the event of its key's deletion:
// milliseconds. If its watch is dead, they overlap until a renewal has read its key. With up to 100 elections on the
// Elector that is the next renewal. Before etcd is restored from a backup, stop all candidates.
//
// The package cannot stop work. Work that ignores its context continues after the term, and a process that is paused in
// the middle of a write finishes that write when it resumes. To protect a resource from such work, use [Leader.Guard]
// if the resource is in etcd and [Leader.Token] if it is elsewhere. Both also protect it while two terms overlap.
//
// # Elections
//
// Elections are those of go.etcd.io/etcd/client/v3/concurrency: the same keys in the same order. Candidates of this
// package, of [concurrency.Election] and of etcdctl elect can compete in one election. Each key name/<lease in hex> is a
// candidate of the election "name". Do not store other data under such a key. Other keys under name/ are ignored.
//
// # The client
//
// Set DialKeepAliveTime and DialKeepAliveTimeout in the client's configuration, for example to 10 s and 2 s. Without
// them a connection that died without a sign, because a NAT or a load balancer forgot it, is noticed only when TCP
// gives up: nobody leads for up to 15 minutes. If you set Username, set DialTimeout as well. Without it clientv3.New
// blocks, and logs nothing, until etcd can be reached.
//
// The values of a context that is given to a call reach [Leader.Context] and the call's own requests. They do not reach
// watches and renewals, which several calls share; nor does outgoing gRPC metadata.
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
	// ErrNotLeader is returned, wrapped, by [Leader.Proclaim] after the term has ended. It also
	// matches [concurrency.ErrElectionNotLeader].
	ErrNotLeader = fmt.Errorf("leader: %w", concurrency.ErrElectionNotLeader)

	// ErrNoLeader is returned by [Elector.Current], [Elector.Evict] and [Elector.Transfer] when nobody
	// leads. It also matches [concurrency.ErrElectionNoLeader].
	ErrNoLeader = fmt.Errorf("leader: %w", concurrency.ErrElectionNoLeader)

	// ErrHeld is returned, wrapped, by [Elector.TryCampaign] when somebody leads or is before this
	// candidate in the queue.
	ErrHeld = errors.New("leader: election is held by another candidate")

	// ErrCampaigning is returned, wrapped, for a campaign in an election in which the same Elector campaigns or leads
	// already: the two would share a key. It is also returned until the key of a term that was transferred or became
	// unhealthy is gone; [Leader.Resign] deletes it at once.
	ErrCampaigning = errors.New("leader: this Elector campaigns or leads in the election already")

	// ErrClosed is returned, wrapped, when the Elector or its client is closed.
	ErrClosed = errors.New("leader: Elector or client is closed")

	// ErrInvalidName is returned, wrapped, for an election name that is empty or ends in a slash.
	ErrInvalidName = errors.New("leader: invalid election name")

	// ErrNotCandidate is returned, wrapped, by [Elector.Transfer] if the candidate that is to lead is not in the
	// queue, or nobody waits.
	ErrNotCandidate = errors.New("leader: no such candidate in the queue")

	// ErrRefused is given to [Hooks].RenewFailed when etcd answered a renewal but the answer does not count, because
	// etcd changed its own leader meanwhile. The answer may come from a leader that was already deposed, which cannot
	// know whether the lease lives.
	ErrRefused = errors.New("leader: renewal answered by an etcd leader that may have been deposed")
)

// Why a term ended: the [context.Cause] of [Leader.Context], possibly wrapped.
var (
	// ErrResigned says that the term was given up, by [Leader.Resign], [Elector.Close] or the end of Run.
	ErrResigned = errors.New("leader: term resigned")

	// ErrExpired says that the lease could not be renewed in time. If the reason is that the client was
	// closed, the cause also matches [ErrClosed].
	ErrExpired = errors.New("leader: term expired: the lease could not be renewed in time")

	// ErrTransferred says that [Elector.Transfer], or another tool that speaks its protocol, asked the leader to
	// step back. Nobody else is elected before the work has had time to stop: under Run until the function has
	// returned, under Campaign until Resign is called, or for the margin.
	ErrTransferred = errors.New("leader: term transferred")

	// ErrUnhealthy says that the check of [WithHealth] has not succeeded for too long. It wraps the last failure. It is
	// in the error of a Campaign whose ctx ends while it waits for a success, and of a TryCampaign that is unhealthy.
	ErrUnhealthy = errors.New("leader: unhealthy")

	// ErrEvicted says that somebody else deleted the key or revoked the lease.
	ErrEvicted = errors.New("leader: term ended by somebody else")
)

// maxValue is how long a value may be, in bytes: less than etcd's default limit for a request.
const maxValue = 1 << 20

// A Candidate is a candidate as the others see it. The zero value is nobody.
type Candidate struct {
	Value string           // what it campaigned with, or has proclaimed since
	Token int64            // its fencing token, the create revision of its key
	Key   string           // its key in etcd
	Lease clientv3.LeaseID // the lease in the key's name
}

// Campaign blocks until this instance is elected in the election name, and returns its term. It is
// [Elector.Campaign] of an Elector that is used once, so [Leader.Resign] also revokes the lease.
func Campaign(ctx context.Context, client *clientv3.Client, name, value string, opts ...Option) (*Leader, error) {
	e, err := New(client, opts...)
	if err != nil {
		return nil, err
	}
	e.once = true
	l, err := e.Campaign(ctx, name, value)
	if err != nil {
		e.release()
	}
	return l, err
}

// Run campaigns in the election name and calls lead each time this instance is elected, until lead
// returns during a term or ctx ends. It is [Elector.Run] of an Elector that is used once.
func Run(ctx context.Context, client *clientv3.Client, name, value string, lead func(ctx context.Context, l *Leader) error, opts ...Option) error {
	e, err := New(client, opts...)
	if err != nil {
		return err
	}
	defer e.release()
	return e.Run(ctx, name, value, lead)
}

// A Leader is one term of leadership. A term that has ended does not begin again: campaign again to
// get another.
//
// A Leader is safe for concurrent use. Only its methods Proclaim and Resign send requests or block.
type Leader struct {
	// A Leader is a candidate first. Its life, of which each step is taken once at most:
	//
	//	waits     from campaign.candidate; ctx is live, elected is false
	//	leads     from elect; ctx is live, elected is true
	//	ended     from end, by whoever calls it first; ctx is cancelled, with the cause
	//	removed   from remove; the key is dropped or abandoned, and the lease given back if nobody else uses it
	//	told      from tell, if it has led; Hooks.Ended has returned, and done is closed

	e       *Elector
	by      caller
	claim   *claim
	queue   *queue.Queue
	session *lease.Session
	tracked *lease.Key
	key     string
	token   int64

	ctx       context.Context // of the candidacy, then of the term
	cancel    context.CancelCauseFunc
	unhook    func() bool     // forgets the session's context, with which ctx ends
	unbind    func() bool     // forgets the campaign's, with which a candidacy ends
	watched   context.Context // of watch
	beginning sync.WaitGroup  // Hooks.Elected and touch, in a term
	place     queue.Place
	waited    bool               // it was not the first when it joined
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
	endedAt  time.Time // set before ctx ends
	modified int64     // revision of the key's last change, as far as is known
}

// Context returns a context for the work that a leader does. It is cancelled when the term ends, with a [context.Cause]
// that is [ErrResigned], [ErrTransferred], [ErrUnhealthy], [ErrExpired] or [ErrEvicted], possibly wrapped. It carries
// the values of Campaign's context but does not end with it. A timer cancels it: in a process that resumes after a
// pause it may be live for a moment although the term is over. IsLeader is right even in that moment.
func (l *Leader) Context() context.Context { return l.ctx }

// IsLeader reports whether the term still holds. It reads the clocks and does not wait for a timer,
// so it is right even if the process or the machine was suspended a moment ago. It sends no request
// and does not block. Once false it stays false.
//
// The term may end right after IsLeader has returned true: see [Leader.Guard].
func (l *Leader) IsLeader() bool {
	if l.ctx.Err() == nil && !l.session.Valid() {
		l.end(l.sessionCause())
	}
	return l.ctx.Err() == nil
}

// Deadline is the latest time at which the term ends unless another renewal succeeds. Each renewal moves it, about
// three times per TTL. Once the term has ended, Deadline is no later than that end.
func (l *Leader) Deadline() time.Time {
	deadline := l.session.Deadline()
	if l.IsLeader() {
		return deadline
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.endedAt.Before(deadline) {
		return l.endedAt
	}
	return deadline
}

// Token is the term's fencing token, the create revision of its key. It is positive and larger than
// that of every earlier term of the election. A resource that remembers the largest token it has seen
// and refuses smaller ones is protected from a leader that does not yet know it was replaced, from the
// new term's first write on.
//
// There is one exception to the order. If somebody deletes the keys of a leader and of the candidate
// behind it together, that candidate may lead for milliseconds without a key, while the next term,
// which has a larger token, may have begun.
func (l *Leader) Token() int64 { return l.token }

// Key is the term's key in etcd, <name>/<lease in hex>, the name with the prefix of [WithPrefix].
func (l *Leader) Key() string { return l.key }

// Guard returns a comparison for the If of an etcd transaction. It holds for as long as the term's key
// is there, so it fails before another candidate is elected, and in a later term of the same process.
// The transaction must be sent to the same etcd, with the same namespace if there is one.
func (l *Leader) Guard() clientv3.Cmp {
	return clientv3.Compare(clientv3.CreateRevision(l.key), "=", l.token)
}

// Proclaim changes the value that others see of the leader. The value has at most 1 MiB; "" means the
// default identity of [Elector.Campaign].
//
// It returns nil if the term still held when etcd had confirmed the change, so it can also be used to
// ask etcd whether one still leads. After the term has ended it returns [ErrNotLeader], with the cause.
// If it finds the key gone, it ends the term. After any other error the term is as before, and the
// value may or may not have changed: it may even change later, but not after a later call has succeeded.
//
// It sends one request, or a few if an earlier call was not answered. It blocks until they are
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

// proclaim changes the value if the key has not changed since this term knew its revision. Without that, a request
// of an earlier call that was not answered and arrives late would replace the value of a later call.
func (l *Leader) proclaim(ctx context.Context, value string) error {
	l.mu.Lock()
	modified := l.modified
	l.mu.Unlock()
	for {
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
		// The key is gone, or was changed by an earlier call or by a touch. Or etcd was restored from a backup: then the
		// key's revision is smaller than l.modified, which only grows, so what is read here counts.
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

// Resign ends the term. First the context is cancelled with [ErrResigned], and IsLeader is false. Then
// etcd is asked to delete the key and, if nothing else uses the lease, to revoke it. Another candidate
// may lead before Resign returns, so stop the work before you call it.
//
// It blocks until etcd has confirmed, ctx ends, or 5 s have passed. Even if it fails the term is over, and Resign may
// be called again to retry. A key that is left is deleted by the renewals of other terms on the lease; if there are
// none, nobody renews the lease, and the key disappears when it expires. Resign returns nil for a term that was lost,
// or has been resigned before.
func (l *Leader) Resign(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, retry.RequestTimeout)
	defer cancel()
	l.end(ErrResigned)
	select {
	case l.resigning <- struct{}{}: // wins over ctx: the renewals must stop in any case
	default:
		select {
		case l.resigning <- struct{}{}:
		case <-ctx.Done():
			return fmt.Errorf("leader: resign: %w", ctx.Err())
		}
	}
	defer func() { <-l.resigning }()
	if keepsKey(context.Cause(l.ctx)) { // else tidy does it
		if err := l.leave(ctx); err != nil {
			return fmt.Errorf("leader: resign: %w", err)
		}
	}
	select {
	case <-l.done: // soon, unless a hook blocks: watch has nothing to ask etcd for
	case <-ctx.Done():
	}
	return nil
}

// end ends the term, or the candidacy. The first cause wins.
//
// Rule: nothing that the user's code or a disk can hold up comes before the end of ctx. So no lock that is taken here is
// ever held while the user's code is called, which includes the methods of the user's errors and contexts, or while a
// file is written.
func (l *Leader) end(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return
	}
	if l.elected {
		l.endedAt = time.Now()
		if winding(cause) { // the key stays, and so does the claim
			l.claim.stop() // Hooks.Ended comes after the last LeaderChanged, and must not wait for the work
			if l.by != byRun || unhealthy(cause) {
				l.e.watching.Go(l.vacate)
			}
		} else {
			l.claim.free() // before ctx ends: who waits for that may campaign at once
		}
		if !keepsKey(cause) {
			l.tidying.Add(1)
			l.e.watching.Go(l.tidy)
		}
	}
	l.unhook()
	l.cancel(cause)
	if l.elected && !winding(cause) {
		l.claim.quit()
		if l.e.once {
			l.e.watching.Go(l.e.release) // a disk may hang
		}
	}
	if !resigned(cause) {
		l.unwatch() // remove does so on a resignation: the deletion must not wait behind the watch's cancellation
	}
}

// evict ends the term because its key is gone. Somebody else has deleted it, or etcd has because the lease expired.
func (l *Leader) evict() {
	if l.session.Valid() {
		l.end(fmt.Errorf("%w: key %q deleted", ErrEvicted, l.key))
	} else {
		l.end(l.sessionCause())
	}
}

// stepBack gives the place up because somebody has asked for that. Whether it is a candidate that ends, and joins again,
// or a term, is decided under l.mu.
func (l *Leader) stepBack() { l.end(ErrTransferred) }

// unhealthy reports whether the cause is that of health. It does not call the methods of what a check has failed with,
// which is the user's and may wrap the cause of another term. So the others ask for it first.
func unhealthy(cause error) bool {
	var u *unhealthyError
	return errors.As(cause, &u)
}

// transferred reports whether the cause is a request to step back.
func transferred(cause error) bool { return !unhealthy(cause) && errors.Is(cause, ErrTransferred) }

// winding reports whether a term that has ended for this cause keeps its key while its work winds down.
func winding(cause error) bool { return unhealthy(cause) || transferred(cause) }

// resigned reports whether the cause is a resignation.
func resigned(cause error) bool { return !winding(cause) && errors.Is(cause, ErrResigned) }

// keepsKey reports whether a term that has ended for this cause still has its key, which its owner deletes.
func keepsKey(cause error) bool { return resigned(cause) || winding(cause) }

// vacate removes a term that winds down a margin after its end, unless that is done, or the Elector is closed, before.
func (l *Leader) vacate() {
	timer := time.NewTimer(l.session.Margin())
	defer timer.Stop()
	select {
	case <-timer.C:
		l.letGo(l.e.ctx)
	case <-l.claim.released:
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

// watch ends the term when its key is gone, and reports the end. Its context is cancelled by end, or on a resignation by
// remove.
func (l *Leader) watch() {
	ctx, returned := l.watched, false
	defer func() {
		if r := recover(); r != nil { // the logger panics, which ends the program: give the lease back before
			l.end(ErrResigned)
			select {
			case l.resigning <- struct{}{}:
				cctx, cancel := retry.Cleanup(ctx)
				_ = l.leave(cctx) // else the lease expires
				cancel()
				<-l.resigning
			default: // somebody is at it
			}
			close(l.done)
			panic(r)
		}
		if !returned && ctx.Err() == nil { // the logger has ended this goroutine
			l.e.watching.Go(func() {
				_ = retry.Sleep(ctx, rewatch) // the next failure may end the next one
				l.deletion = l.queue.WatchOwn(ctx, l.ownLoop(), l.key, l.token)
				l.watch() //nolint:contextcheck // it has ctx
			})
			return
		}
		defer close(l.done)
		<-ctx.Done()
		l.mu.Lock()
		elected := l.elected
		l.mu.Unlock()
		if elected {
			l.tell()
		}
	}()
	l.watchKey(ctx)
	returned = true
}

// rewatch is the pause before the own key is watched again after a log handler has ended the goroutine that did so.
const rewatch = time.Second

// watchKey ends the term when its key is gone.
func (l *Leader) watchKey(ctx context.Context) {
	switch err := l.deletion.Wait(); { //nolint:contextcheck // it has ctx
	case err == nil:
		l.evict()
	case errors.Is(err, queue.ErrAsked):
		l.stepBack()
	case ctx.Err() == nil && l.e.client.Ctx().Err() == nil: // not allowed to watch: the renewals still read the key
		l.e.log(l.claim.election).Warn("own key cannot be watched", "key", l.key, "error", err)
	}
}

// tidy removes a lost term. It runs in a goroutine of its own, where no code of the user's can hold it up.
func (l *Leader) tidy() {
	defer l.tidying.Done()
	cctx, cancel := retry.Cleanup(l.e.client.Ctx())
	defer cancel()
	l.unrevoked = l.remove(cctx)
}

// tell reports the end of a term, to the log and to Hooks.Ended.
func (l *Leader) tell() {
	l.beginning.Wait()
	l.claim.observing.Wait()
	cause := context.Cause(l.ctx)
	var log *slog.Logger
	defer l.tidying.Wait() // also when the log handler or the hook panics
	func() {
		defer l.e.opts.hooks.ended(l, cause) // also when the log handler ends this goroutine
		log = l.e.log(l.claim.election).With("token", l.token)
		if resigned(cause) {
			log.Info("resigned")
			return
		}
		if transferred(cause) {
			log.Info("transferred")
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

// touch rewrites the key once, so that the next candidate learns that this one leads. If that fails or
// comes too late, the next election costs one more request. touch also finds out if the key is gone: if it was
// deleted together with that of the candidate before, the other event may have come first.
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

// leave removes a term that was resigned or winds down. l.resigning is held.
func (l *Leader) leave(ctx context.Context) error {
	if l.left {
		return nil
	}
	err := l.remove(ctx)
	l.left = err == nil
	l.claim.release() // of a term that winds down; of the others only the lease file may be left
	return err
}

// remove sees to key and lease at the end of a candidacy or a term, in this order:
//
//  1. It deletes the key. That of a lost term is gone, or goes with the lease, whose margin is promised to work that
//     has to stop. The deletion comes alone: on a cluster a revocation hands over more slowly.
//  2. It ends the watch. The deletion must not wait behind its cancellation.
//  3. It drops the key, or abandons it if the deletion had no answer: renewals on behalf of others delete it then.
//  4. It gives the lease back, unless others use it. Then it deletes what a join without an answer may have put.
//
// It may be called again after an error.
func (l *Leader) remove(ctx context.Context) error {
	return l.giveBack(ctx, l.leaveQueue(ctx))
}

// leaveQueue takes the first two steps of remove.
func (l *Leader) leaveQueue(ctx context.Context) error {
	defer l.unwatch()
	elected, lost, cause := l.ending()
	if l.token == 0 || lost || l.session.Gone() {
		return nil
	}
	return retry.Persist(ctx, l.e.client, func(ctx context.Context) error {
		switch {
		case transferred(cause):
			return l.queue.StepBack(ctx, l.key, l.token)
		case !elected: // a candidate needs no [concurrency.Session], which costs a goroutine
			return l.queue.Remove(ctx, l.key, l.token)
		}
		return l.session.Election(l.queue.Prefix(), l.key, l.token).Resign(ctx) // it forgets the key, answered or not
	})
}

// giveBack takes the last two steps of remove. err is what leaveQueue has returned.
func (l *Leader) giveBack(ctx context.Context, err error) error {
	if err == nil {
		l.tracked.Drop()
	} else {
		l.tracked.Abandon()
	}
	err = errors.Join(err, l.session.Finish(ctx))
	_, lost, _ := l.ending()
	switch {
	case l.session.Gone():
		return nil
	case err == nil && !lost && l.tracked.Abandoned():
		return l.tracked.Remove(ctx)
	}
	return err
}

// ending says how the candidacy or the term has ended. lost means that it was a term, whose key is gone or goes with the
// lease.
func (l *Leader) ending() (elected, lost bool, cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	cause = context.Cause(l.ctx)
	return l.elected, l.elected && !keepsKey(cause), cause
}

// abandon ends the term and leaves its key to whoever renews the lease, or to the lease's end.
func (l *Leader) abandon() {
	l.end(ErrResigned)
	l.unwatch()
	l.tracked.Abandon()
	l.claim.release()
}

// letGo resigns on behalf of a caller that cannot handle an error. What is left goes with the lease.
func (l *Leader) letGo(ctx context.Context) {
	rctx, cancel := retry.Cleanup(ctx)
	defer cancel()
	if err := l.Resign(rctx); err != nil {
		l.e.log(l.claim.election).Warn("resignation failed, the lease will expire", "token", l.token, "error", err)
	}
}

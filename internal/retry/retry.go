// Package retry decides what a failed request to etcd means and when to send it again.
//
// No other package decides which errors are permanent. It goes by gRPC codes and rpctypes, never by text.
package retry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	// RequestTimeout bounds a request that has no shorter deadline. A request that has waited for 5 s is better sent to
	// another member; etcd itself gives up a proposal only after 7 s.
	RequestTimeout = 5 * time.Second

	// CleanupTimeout bounds the requests that clean up after a campaign or a term. If etcd cannot be reached, the
	// expiry of the lease cleans up.
	CleanupTimeout = 2 * time.Second
)

const (
	// minPause is the first pause after a failure.
	minPause = 50 * time.Millisecond

	// silence is how long [Ask] waits for an answer before it sends the request a second time, while the first one
	// still waits. maxSilence bounds the wait before each further time.
	silence    = 250 * time.Millisecond
	maxSilence = 500 * time.Millisecond

	// maxPause bounds the pauses of [Ask] and of a [Loop] after a failure.
	maxPause = 2 * time.Second

	// maxBeside is how many attempts of one [Ask] may wait for an answer at a time.
	maxBeside = 8
)

// RequireLeader returns a context for requests that a member refuses at once while it knows no raft leader. It is
// [clientv3.WithRequireLeader] at a third of the memory.
func RequireLeader(ctx context.Context) context.Context {
	if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get(rpctypes.MetadataRequireLeaderKey)) > 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
}

// valuesOf is a context that has the values of another context.
type valuesOf struct {
	context.Context
	values context.Context
}

func (c valuesOf) Value(key any) any { return c.values.Value(key) }

// Request returns a context for one request. It ends after [RequestTimeout], and a member that knows no raft leader
// refuses the request at once instead of holding it for 7 s.
func Request(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(RequireLeader(ctx), RequestTimeout)
}

// Cleanup returns a context for cleaning up by [Persist]. It does not end with ctx, because the end of ctx is often the
// reason to clean up. It ends after [CleanupTimeout].
func Cleanup(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(RequireLeader(context.WithoutCancel(ctx)), CleanupTimeout)
}

// Ask sends a request until etcd answers it, and returns the answer. It gives up in three cases: with the error of a
// permanent failure (see [Permanent]), with ctx's error when ctx ends, and with [context.Canceled] when the client is
// closed. An attempt that has succeeded by then wins over all three.
//
// Rule: one attempt is one request, and a request that somebody waits for is sent again, to another endpoint. An
// attempt without an answer continues while the next one is sent: an endpoint that does not answer must not use up the
// time in which another one would, and a slow endpoint must get the time that it needs. While there is no connection, one
// attempt waits for it.
//
// gRPC sends each request to the next endpoint in turn. So an attempt must be a single request: if it were two in a
// row, the second would go to the dark one of two endpoints each time. The request must do no harm if it is carried out
// twice, and must end with its context.
//
// failed, if not nil, is called for every failure that is not returned, in the caller's goroutine. Each attempt has a
// deadline of its own, [RequestTimeout] after it was sent.
func Ask[T any](ctx context.Context, client *clientv3.Client, failed func(error), request func(context.Context) (T, error)) (T, error) {
	first, attempt := silence, RequestTimeout
	if deadline, ok := ctx.Deadline(); ok { // leave time for another endpoint
		first = min(first, max(time.Until(deadline)/8, time.Millisecond))
	}
	return ask(ctx, client, first, attempt, failed, request)
}

// AskWithin is [Ask] with another deadline for each attempt. It waits at most a quarter of this deadline for an answer
// before it sends the request again.
func AskWithin[T any](ctx context.Context, client *clientv3.Client, attempt time.Duration, failed func(error), request func(context.Context) (T, error)) (T, error) {
	return ask(ctx, client, min(silence, attempt/4), attempt, failed, request)
}

func ask[T any](ctx context.Context, client *clientv3.Client, first, attempt time.Duration, failed func(error), request func(context.Context) (T, error)) (T, error) {
	var none T
	value, err := askAny(ctx, client, first, attempt, failed, func(ctx context.Context) (any, error) { return request(ctx) })
	if err != nil {
		return none, err
	}
	return value.(T), nil
}

// An asking is the state of askAny. It is on the heap, and of one type for all answers, to keep stacks small: a
// goroutine that has called Ask may wait for hours afterwards with the stack that the call needed. See bench/README.md,
// row 9.
type asking struct {
	ctx      context.Context // of the attempts
	cancel   context.CancelFunc
	client   *clientv3.Client
	traffic  *traffic
	request  func(context.Context) (any, error)
	attempt  time.Duration // how long an attempt may take
	attempts sync.WaitGroup
	answers  chan answer[any]
	waiting  int // attempts without an answer
}

type answer[T any] struct {
	value T
	err   error
}

func askAny(ctx context.Context, client *clientv3.Client, first, attempt time.Duration, failed func(error), request func(context.Context) (any, error)) (any, error) {
	a := &asking{client: client, traffic: trafficOf(client), request: request, attempt: attempt, answers: make(chan answer[any], maxBeside)}
	a.ctx, a.cancel = context.WithCancel(ctx)
	defer context.AfterFunc(client.Ctx(), a.cancel)()
	defer a.stop() // no attempt outlives askAny, even if failed panics

	beside := &Backoff{Min: first, Max: max(first, maxSilence)}
	failing := &Backoff{Min: min(minPause, first), Max: maxPause}
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		var got answer[any]
		select {
		// Take an answer before anything else: select picks at random, and a request that was carried out must not be
		// reported as one that was not.
		case got = <-a.answers:
		default:
			select {
			case got = <-a.answers:
			case <-next.C:
				if a.sendNext() { //nolint:contextcheck // a has ctx
					next.Reset(beside.Next())
				} else {
					// There is no connection or no token, or maxBeside attempts wait. All may change soon, so the pause does not
					// grow.
					next.Reset(first)
				}
				continue
			case <-a.ctx.Done():
				return a.end(a.ctx.Err())
			}
		}
		if value, over, err := a.answered(got, failed); over {
			return value, err
		}
		// A failure sets the pause even while other attempts wait: they may still be answered, and an etcd that fails
		// must not get requests without a pause.
		next.Reset(failing.Next())
	}
}

// sendNext sends the request. If other attempts wait and there are several endpoints, it sends it twice at once, so
// that one of the two avoids a dark endpoint. One request at a time may meet the dark endpoint each time, because other
// requests of the client take turns in between. It reports whether it sent any.
func (a *asking) sendNext() bool {
	beside := a.waiting > 0
	if beside {
		// clientv3 may be the one that is silent: if there is no connection, it retries without returning an error. Another
		// attempt would wait for the connection as well, and etcd would get all of them as soon as it is back.
		Reconnect(a.client)
		if state, ok := Connection(a.client); ok && state != connectivity.Ready {
			return false
		}
	}
	if !a.send() {
		return false
	}
	if beside && len(a.client.Endpoints()) > 1 {
		a.send()
	}
	return true
}

// send sends the request, if it may be sent now, and reports whether it did.
func (a *asking) send() bool {
	if a.ctx.Err() != nil || a.waiting == maxBeside || !a.traffic.send(a.waiting > 0) {
		return false
	}
	a.waiting++
	a.attempts.Go(func() {
		ctx, cancel := context.WithTimeout(RequireLeader(a.ctx), a.attempt)
		defer cancel()
		sent := time.Now()
		value, err := a.request(ctx)
		if err != nil && a.ctx.Err() == nil && (ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded)) {
			err = Silence(a.client, time.Since(sent)) // the request's own error says less
		}
		a.traffic.ended(err == nil)
		a.answers <- answer[any]{value, err} // never blocks: it has room for maxBeside
	})
	return true
}

// answered handles the answer of an attempt. over means that no more attempts follow.
func (a *asking) answered(got answer[any], failed func(error)) (value any, over bool, err error) {
	a.waiting--
	switch {
	case got.err == nil:
		return got.value, true, nil
	case a.ctx.Err() != nil: // got.err only reflects that end
		value, err = a.end(a.ctx.Err())
		return value, true, err
	case Permanent(got.err):
		value, err = a.end(got.err)
		return value, true, err
	case failed != nil:
		failed(got.err)
	}
	Reconnect(a.client)
	return nil, false, nil
}

// end waits for the attempts that remain. It returns err, unless one of them has succeeded: that wins, because the
// request was carried out.
func (a *asking) end(err error) (any, error) {
	a.stop()
	for {
		select {
		case got := <-a.answers:
			if got.err == nil {
				return got.value, nil
			}
		default:
			return nil, err
		}
	}
}

func (a *asking) stop() {
	a.cancel()
	a.attempts.Wait()
}

// First sends a request, sends it again while the first one has no answer, and returns the first answer, even if that
// is a failure. It blocks for at most [RequestTimeout].
func First[T any](ctx context.Context, client *clientv3.Client, request func(context.Context) (T, error)) (T, error) {
	began := time.Now()
	bound, cancel := context.WithTimeout(ctx, RequestTimeout)
	defer cancel()
	a, err := Ask(bound, client, nil, func(ctx context.Context) (answer[T], error) {
		value, err := request(ctx)
		if err != nil && (ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded)) {
			// A timeout is no answer. It may come a moment before the end of ctx itself.
			return answer[T]{}, context.DeadlineExceeded
		}
		return answer[T]{value, err}, nil
	})
	if waited := time.Since(began); errors.Is(err, ctx.Err()) && ctx.Err() != nil && waited >= silence {
		err = WithLast(err, Silence(client, waited))
	}
	if bound.Err() != nil && ctx.Err() == nil && errors.Is(err, bound.Err()) {
		err = Silence(client, RequestTimeout) // the context's own error says less
	}
	if err != nil {
		return a.value, err
	}
	return a.value, a.err
}

// WithLast adds the last failure to err, the reason why no more requests are sent. If last is a silence, the result
// does not match [context.DeadlineExceeded] because of it.
func WithLast(err, last error) error {
	if errors.Is(last, context.DeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
		last = Passing(last)
	}
	return fmt.Errorf("%w (last failure: %w)", err, last)
}

// Persist is [Ask] for cleaning up. ctx must have a deadline, and the error includes the last failure.
func Persist(ctx context.Context, client *clientv3.Client, request func(context.Context) error) error {
	var last error
	_, err := Ask(ctx, client, func(err error) { last = err }, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, request(ctx)
	})
	if err != nil && last != nil && !Permanent(err) {
		return WithLast(err, last)
	}
	return err
}

// A Group owns goroutines. The zero value has none.
type Group struct {
	mu      sync.Mutex
	running int
	idle    chan struct{} // closed when the last one has returned; nil while nobody waits
}

// Go runs f in a goroutine of the group.
func (g *Group) Go(f func()) {
	g.mu.Lock()
	g.running++
	g.mu.Unlock()
	go func() {
		defer func() {
			g.mu.Lock()
			defer g.mu.Unlock()
			if g.running--; g.running == 0 && g.idle != nil {
				close(g.idle)
				g.idle = nil
			}
		}()
		f()
	}()
}

// Wait blocks until no goroutine of the group is running, or until ctx ends. If both are so, it returns nil.
func (g *Group) Wait(ctx context.Context) error {
	g.mu.Lock()
	if g.running == 0 {
		g.mu.Unlock()
		return nil
	}
	if g.idle == nil {
		g.idle = make(chan struct{})
	}
	idle := g.idle
	g.mu.Unlock()
	return Wait(ctx, idle)
}

// Wait blocks until c is closed or ctx ends. If both are so, it returns nil.
func Wait(ctx context.Context, c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	default:
	}
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Outlive sends a request in a goroutine of owner and returns its answer, or ctx's error if ctx ends first. In that
// case the request continues, for at most [RequestTimeout] after it was sent, and late is called with its answer: etcd
// may carry it out although nobody waits for it any more.
func Outlive[T any](ctx context.Context, owner *Group, request func(context.Context) (T, error), late func(T, error)) (T, error) {
	answers := make(chan answer[T])
	owner.Go(func() {
		rctx, cancel := Request(context.WithoutCancel(ctx))
		defer cancel()
		value, err := request(rctx)
		select {
		case answers <- answer[T]{value, err}:
		case <-ctx.Done():
			late(value, err)
		}
	})
	select {
	case a := <-answers:
		return a.value, a.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// Permanent reports whether it is useless to send the same request again after err: permission denied, failed
// authentication, a lease that is gone, a request that etcd rejects as invalid. Every other error may pass: no
// connection, no quorum, no space, a compacted revision, an expired auth token, a limit on the rate of requests.
//
// Use it for the error of the caller's own request. The error of a watch may be about another watch, with which it
// shares a stream: see [Passing].
func Permanent(err error) bool {
	err = etcds(err)
	switch {
	case errors.Is(err, rpctypes.ErrAuthOldRevision):
		return false // InvalidArgument by code, but the next request has the new revision
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		return true // for this request; the campaign continues with another lease
	}
	switch code(err) {
	case codes.PermissionDenied, codes.InvalidArgument:
		return true
	}
	return false
}

// Refused reports whether err means that etcd will not carry out the request later. After any other error it still may.
// (An etcd that lacks space may have carried it out already.)
func Refused(err error) bool {
	err = etcds(err)
	for _, refusal := range []error{
		rpctypes.ErrNoSpace, rpctypes.ErrTooManyRequests, rpctypes.ErrAuthOldRevision, rpctypes.ErrInvalidAuthToken,
	} {
		if errors.Is(err, refusal) {
			return true
		}
	}
	return Permanent(err)
}

// Unauthenticated reports whether a watch has ended because the auth token of its stream has expired, or is older than
// etcd's users and rights. etcd's client gives the reason for the end of a watch as a text, so here the text decides.
func Unauthenticated(err error) bool {
	return err != nil && (strings.Contains(err.Error(), rpctypes.ErrInvalidAuthToken.Error()) ||
		strings.Contains(err.Error(), rpctypes.ErrAuthOldRevision.Error()))
}

// Passing returns an error with the text of err for which [Permanent] is false.
func Passing(err error) error { return errors.New(err.Error()) }

// etcds turns a gRPC status from etcd into an EtcdError.
func etcds(err error) error {
	var raw interface{ GRPCStatus() *status.Status }
	if errors.As(err, &raw) {
		return rpctypes.Error(raw.GRPCStatus().Err())
	}
	return err
}

func code(err error) codes.Code {
	var etcd rpctypes.EtcdError
	if errors.As(err, &etcd) {
		return etcd.Code()
	}
	return status.Code(err)
}

// Reconnect resets gRPC's pause between attempts to connect. The pause grows to two minutes, which would keep the
// client away from an etcd that is long back. A client without a connection of its own is left alone.
func Reconnect(client *clientv3.Client) {
	conn := client.ActiveConnection()
	if conn != nil && trafficOf(client).mayReset(conn.GetState(), client.Endpoints()) {
		conn.ResetConnectBackoff()
	}
}

// A Backoff says how long to wait before the next attempt. The pause starts at Min and doubles after each failure, up
// to Max. A random part of up to a half is subtracted, so that many clients do not return all at once. It is not safe
// for concurrent use.
type Backoff struct {
	Min, Max time.Duration

	streak int
	pause  time.Duration
}

// Wait blocks for the next pause and returns nil. If ctx ends first it returns ctx's error.
func (b *Backoff) Wait(ctx context.Context) error { return Sleep(ctx, b.Next()) }

// Next returns the next pause.
func (b *Backoff) Next() time.Duration {
	b.streak++
	d := max(b.pause, b.Min)
	b.pause = min(2*d, b.Max)
	return d - rand.N(d/2+1)
}

// Reset starts again at Min. Call it after a success.
func (b *Backoff) Reset() { b.streak, b.pause = 0, 0 }

// Streak returns the number of pauses since the last success.
func (b *Backoff) Streak() int { return b.streak }

// Sleep blocks for d and returns nil. If ctx ends first it returns ctx's error.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A Loop retries requests after failures that may pass. Failures without a success in between are a streak. It is not
// safe for concurrent use.
type Loop struct {
	Client *clientv3.Client
	// Warn, if not nil, is called with the first failure of each streak. It is called again when the reason has changed,
	// for example if an etcd that is back refuses the client: at the earliest when the streak has lasted for a minute, and
	// then for twice as long each time.
	Warn func(error)
	// Over, if not nil, is called when a success ends a streak, with the number of failures and how long it lasted.
	Over func(failures int, lasted time.Duration)

	backoff Backoff
	streak  int           // of failures
	began   time.Time     // when the first of them was noted
	last    error         // the last failure of the streak
	warned  string        // what the last warning was about
	quiet   time.Duration // how long the streak must last until there may be another
}

// Retry notes the failure err, blocks for a pause, and returns nil if the caller should try again. Otherwise it returns
// the reason not to: err if that is permanent, or ctx's error if ctx has ended.
func (l *Loop) Retry(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err() // err only reflects that end
	}
	if Permanent(err) {
		l.last = err
		return err
	}
	l.Failed(err)
	Reconnect(l.Client)
	l.backoff.Min, l.backoff.Max = minPause, maxPause
	return l.backoff.Wait(ctx)
}

// Failed notes a failure without a pause, for callers that retry by themselves.
func (l *Loop) Failed(err error) {
	l.last = err
	if l.streak++; l.streak == 1 {
		l.began, l.quiet, l.warned = time.Now(), 0, ""
	}
	if lasted := time.Since(l.began); l.Warn != nil && lasted >= l.quiet && err.Error() != l.warned {
		l.quiet, l.warned = max(time.Minute, 2*lasted), err.Error()
		l.Warn(err)
	}
}

// OK ends a streak of failures.
func (l *Loop) OK() {
	failures := l.streak
	l.Forget()
	if failures > 0 && l.Over != nil {
		l.Over(failures, time.Since(l.began))
	}
}

// Forget ends a streak of failures without a success.
func (l *Loop) Forget() {
	l.backoff.Reset()
	l.streak, l.last = 0, nil
}

// Last returns the last failure of the present streak, or nil.
func (l *Loop) Last() error { return l.last }

// Do is [Ask], with the failures noted in l.
func Do[T any](ctx context.Context, l *Loop, request func(context.Context) (T, error)) (T, error) {
	if ctx.Err() != nil { // etcd is not asked, so its silence is no failure
		var none T
		return none, ctx.Err()
	}
	sent := time.Now()
	value, err := Ask(ctx, l.Client, l.Failed, request)
	switch {
	case err == nil:
		l.OK()
	case ctx.Err() == nil:
		l.last = err
	default:
		l.Unanswered(sent)
	}
	return value, err
}

// Unanswered notes, as the last failure, that a request that was sent at this time had no answer. A failure that was
// noted before stays the last one.
func (l *Loop) Unanswered(sent time.Time) {
	if l.last == nil {
		l.last = Silence(l.Client, time.Since(sent))
	}
}

// Waited notes, as the last failure, that of another caller's request whose success would have served this one, too. A
// failure that was noted before stays the last one.
func (l *Loop) Waited(failure error) {
	if l.last == nil {
		l.last = failure
	}
}

// Silence returns the error of a request that ended without an answer. The request's own error does not say why,
// because clientv3 retries by itself and does not report the reasons. It matches [context.DeadlineExceeded].
func Silence(client *clientv3.Client, waited time.Duration) error {
	waited = max(waited.Round(time.Millisecond), time.Millisecond)
	switch state, ok := Connection(client); {
	case ok && state != connectivity.Ready:
		return newSilent(codes.Unavailable, "no connection to etcd: "+cmp.Or(connectionError(client, state), state.String()))
	case ok && waited >= time.Second:
		return newSilent(codes.DeadlineExceeded, fmt.Sprintf("no answer from etcd for %v on an open connection, %s", waited, Cure))
	}
	return newSilent(codes.DeadlineExceeded, fmt.Sprintf("no answer from etcd for %v", waited))
}

// silent is the error of a request without an answer. Its code is for metrics.
type silent struct{ status *status.Status }

func newSilent(code codes.Code, text string) error { return silent{status.New(code, text)} }

func (s silent) Error() string              { return s.status.Message() }
func (s silent) Is(target error) bool       { return target == context.DeadlineExceeded }
func (s silent) GRPCStatus() *status.Status { return s.status }

// Cure tells the user how to detect a connection that has died without a sign. The library cannot make a borrowed
// client dial again: Reconnect does not touch a connection that seems to work, and setting the endpoints would race
// with the user's own SetEndpoints.
const Cure = "set DialKeepAliveTime and DialKeepAliveTimeout in the client's clientv3.Config to detect a dead connection"

// maxExplanation is how long gRPC may take to say why there is no connection. It knows the reason already.
const maxExplanation = 50 * time.Millisecond

// connectionError returns why gRPC failed to connect: connection refused, no such host, an unknown authority. It is ""
// in any other state. gRPC tells the reason to a request that does not wait for a connection; without a connection that
// request is never sent. (If there is one by then, the request reads a key that does not exist.)
//
//nolint:contextcheck // it takes maxExplanation at most, and works after the caller's context has ended
func connectionError(client *clientv3.Client, state connectivity.State) string {
	if state != connectivity.TransientFailure {
		return ""
	}
	ctx, cancel := context.WithTimeout(client.Ctx(), maxExplanation)
	defer cancel()
	_, err := etcdserverpb.NewKVClient(client.ActiveConnection()).Range(ctx,
		&etcdserverpb.RangeRequest{Key: []byte{0}, Serializable: true}, grpc.WaitForReady(false))
	if status.Code(err) != codes.Unavailable {
		return ""
	}
	why := strings.TrimPrefix(status.Convert(err).Message(), "last connection error: ")
	why = strings.TrimPrefix(why, "connection error: desc = ")
	if text, err := strconv.Unquote(why); err == nil {
		why = text
	}
	return why
}

// Connection returns the state of the client's connection. ok is false if it has none of its own.
func Connection(client *clientv3.Client) (state connectivity.State, ok bool) {
	conn := client.ActiveConnection()
	if conn == nil {
		return 0, false
	}
	return conn.GetState(), true
}

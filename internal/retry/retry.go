// Package retry decides what a failed request to etcd means and when to ask again.
//
// It is the one place that tells what cannot heal from what can, by gRPC code and rpctypes,
// never by text.
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
	// RequestTimeout bounds one request that no shorter deadline bounds. etcd itself gives up
	// on a proposal after 7 s; a request that has waited for 5 s is better asked of another member.
	RequestTimeout = 5 * time.Second

	// CleanupTimeout bounds the requests that tidy up after a campaign or a term. Where etcd
	// cannot be reached the lease does the tidying.
	CleanupTimeout = 2 * time.Second
)

const (
	// minPause is the first pause after a failure.
	minPause = 50 * time.Millisecond

	// silence is how long [Ask] waits for an answer before it sends the request again beside the first,
	// and maxSilence how long before each further time.
	silence    = 250 * time.Millisecond
	maxSilence = 500 * time.Millisecond

	// maxPause bounds the pauses of [Ask] and of a [Loop] after a failure.
	maxPause = 2 * time.Second

	// maxBeside is how many requests of one [Ask] wait for an answer at a time.
	maxBeside = 8
)

// RequireLeader returns a context for requests that a member refuses at once while it knows of no
// raft leader. It is [clientv3.WithRequireLeader] at a third of the memory.
func RequireLeader(ctx context.Context) context.Context {
	if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get(rpctypes.MetadataRequireLeaderKey)) > 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
}

// valuesOf is a context with the values of another one.
type valuesOf struct {
	context.Context
	values context.Context
}

func (c valuesOf) Value(key any) any { return c.values.Value(key) }

// Request returns a context for one request: it has a deadline of its own, and a member that
// knows of no raft leader refuses the request at once instead of keeping it for 7 s.
func Request(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(RequireLeader(ctx), RequestTimeout)
}

// Cleanup returns a context for tidying up, by [Persist]. It outlives ctx, whose end is often the reason
// to tidy up, and is bounded by [CleanupTimeout].
func Cleanup(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(RequireLeader(context.WithoutCancel(ctx)), CleanupTimeout)
}

// Ask sends a request until etcd has answered it, and returns the answer. It gives up when the request
// is refused for good, see [Permanent], when the client is closed or when ctx ends: then it returns ctx's
// error. An answer that has come by then wins over the end.
//
// Here is the rule "one request, one attempt, and what another waits for is sent again elsewhere". A
// request that has no answer yet goes on while the next is sent: an endpoint that does not answer must
// not take the time in which another would, and one that is slow must be given the time. gRPC sends
// each request to the next endpoint in turn, so an attempt must be a single request: of two, the second
// would meet the same dark endpoint of two each time. So a request must do no harm if it is done twice,
// and must end with its context.
//
// failed, if not nil, is told of every failure that is not returned, in the caller's goroutine. Each attempt
// has a deadline of its own, [RequestTimeout] after it was sent.
func Ask[T any](ctx context.Context, client *clientv3.Client, failed func(error), request func(context.Context) (T, error)) (T, error) {
	first, attempt := silence, RequestTimeout
	if deadline, ok := ctx.Deadline(); ok { // there must be time for another endpoint
		first = min(first, max(time.Until(deadline)/8, time.Millisecond))
	}
	return ask(ctx, client, first, attempt, failed, request)
}

// AskWithin is [Ask] with another deadline for each attempt. It sends the request again beside one that
// has had no answer for a quarter of it.
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

// An asking is the state of askAny. It is on the heap, and the same for all types: a goroutine that asks may
// wait for hours afterwards, and its stack does not shrink again. See bench/README.md, row 9.
type asking struct {
	ctx      context.Context // of the attempts
	cancel   context.CancelFunc
	client   *clientv3.Client
	traffic  *traffic
	request  func(context.Context) (any, error)
	attempt  time.Duration // for which an attempt may go on
	attempts sync.WaitGroup
	answers  chan answer
	waiting  int // attempts without an answer
}

type answer struct {
	value any
	err   error
}

func askAny(ctx context.Context, client *clientv3.Client, first, attempt time.Duration, failed func(error), request func(context.Context) (any, error)) (any, error) {
	a := &asking{client: client, traffic: trafficOf(client), request: request, attempt: attempt, answers: make(chan answer, maxBeside)}
	a.ctx, a.cancel = context.WithCancel(ctx)
	defer context.AfterFunc(client.Ctx(), a.cancel)()
	defer a.stop() // also if failed panics

	beside := &Backoff{Min: first, Max: max(first, maxSilence)}
	failing := &Backoff{Min: min(minPause, first), Max: maxPause}
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		var got answer
		select {
		case got = <-a.answers: // an answer is looked at before anything else
		default:
			select {
			case got = <-a.answers:
			case <-next.C:
				if a.sendNext() { //nolint:contextcheck // a has ctx
					next.Reset(beside.Next())
				} else {
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
		next.Reset(failing.Next())
	}
}

// sendNext sends the request for the first time, or twice beside those that have no answer: of two that are sent
// together to several endpoints in turn, one does not meet the one that does not answer. One alone may meet it each
// time, as other requests of the client come in between. It reports whether it did send.
func (a *asking) sendNext() bool {
	if !a.send() {
		return false
	}
	if a.waiting > 1 {
		// The silence may be clientv3's, which repeats by itself what fails for want of a connection.
		Reconnect(a.client)
		if len(a.client.Endpoints()) > 1 {
			a.send()
		}
	}
	return true
}

// send sends the request, unless it may not be sent now. It reports whether it did.
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
			err = Silence(a.client, time.Since(sent)) // its own error says no more than that
		}
		a.traffic.ended(err == nil)
		a.answers <- answer{value, err}
	})
	return true
}

// answered deals with the answer of an attempt. over says that nothing more is to be asked.
func (a *asking) answered(got answer, failed func(error)) (value any, over bool, err error) {
	a.waiting--
	switch {
	case got.err == nil:
		return got.value, true, nil
	case a.ctx.Err() != nil: // got.err is only what that looks like from inside a request
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

// end waits for the attempts. One of them may have succeeded in the meantime.
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

// First sends a request, and again beside the first while that has no answer, and returns the first answer, be
// it a failure. It blocks for at most [RequestTimeout].
func First[T any](ctx context.Context, client *clientv3.Client, request func(context.Context) (T, error)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	bound, cancel := context.WithTimeout(ctx, RequestTimeout)
	defer cancel()
	a, err := Ask(bound, client, nil, func(ctx context.Context) (answer, error) {
		value, err := request(ctx)
		if err != nil && (ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded)) {
			return answer{}, context.DeadlineExceeded // that is no answer; its deadline may have come a moment before ctx's
		}
		return answer{value, err}, nil
	})
	if bound.Err() != nil && ctx.Err() == nil && errors.Is(err, bound.Err()) {
		err = Silence(client, RequestTimeout) // its own error says no more than that
	}
	if err != nil {
		return a.value, err
	}
	return a.value, a.err
}

// WithLast adds the last failure to err, which says why nothing more is asked. A silence, which matches
// [context.DeadlineExceeded], does not make err that.
func WithLast(err, last error) error {
	if errors.Is(last, context.DeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
		last = Passing(last)
	}
	return fmt.Errorf("%w (last failure: %w)", err, last)
}

// Persist is [Ask] for what tidies up: ctx must have a deadline, and the error tells the last failure.
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
	idle    chan struct{} // closed when none is running any more; nil while nobody waits
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

// Wait blocks until no goroutine of the group is running, which wins, or ctx ends.
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

// Wait blocks until c is closed, which wins, or ctx ends.
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

// Outlive makes a request in a goroutine of owner's and returns its answer, or ctx's error if ctx ends
// before. The request itself goes on then, for at most [RequestTimeout], and late is called with its
// answer: etcd may carry it out although nobody waits for it any more.
func Outlive[T any](ctx context.Context, owner *Group, request func(context.Context) (T, error), late func(T, error)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	answers := make(chan answer)
	owner.Go(func() {
		rctx, cancel := Request(context.WithoutCancel(ctx))
		defer cancel()
		value, err := request(rctx)
		select {
		case answers <- answer{value, err}:
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

// Permanent reports whether err cannot heal by sending the same request again: permission
// denied, failed authentication, a lease that is gone, a request that etcd rejects as invalid.
// Everything else may: no connection, no quorum, no space, a compacted revision,
// an expired auth token, a limit on the rate of requests.
//
// It is for the error of a request of one's own. That of a watch is about something else: what others
// have written, or the stream that it shares, see [Passing].
func Permanent(err error) bool {
	err = etcds(err)
	switch {
	case errors.Is(err, rpctypes.ErrAuthOldRevision):
		return false // InvalidArgument by code, but the next request has the new revision
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		return true // the campaign goes on, with another lease
	}
	switch code(err) {
	case codes.PermissionDenied, codes.InvalidArgument:
		return true
	}
	return false
}

// Refused reports whether err says that etcd will not carry out the request later. After any other error it may
// still do so. (If it lacked space it may have done so already.)
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

// Passing returns err without what [Permanent] looks at.
func Passing(err error) error { return errors.New(err.Error()) }

// etcds makes a status of etcd's an EtcdError.
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

// Reconnect makes gRPC forget its reconnect backoff, which grows to two minutes and would
// keep the client away from an etcd that has long come back. A client without a connection
// of its own is left alone.
func Reconnect(client *clientv3.Client) {
	conn := client.ActiveConnection()
	if conn != nil && trafficOf(client).mayReset(conn.GetState(), client.Endpoints()) {
		conn.ResetConnectBackoff()
	}
}

// A Backoff says how long to wait before the next try: twice as long after each failure, from
// Min up to Max, less a random part of up to a half so that many clients do not come back as
// one. It is not safe for concurrent use.
type Backoff struct {
	Min, Max time.Duration

	streak int
	pause  time.Duration
}

// Wait blocks for the next pause or until ctx ends, and returns ctx's error then.
func (b *Backoff) Wait(ctx context.Context) error { return Sleep(ctx, b.Next()) }

// Next is the next pause.
func (b *Backoff) Next() time.Duration {
	b.streak++
	d := max(b.pause, b.Min)
	b.pause = min(2*d, b.Max)
	return d - rand.N(d/2+1)
}

// Reset starts over, after a success.
func (b *Backoff) Reset() { b.streak, b.pause = 0, 0 }

// Streak is the number of pauses since the last success.
func (b *Backoff) Streak() int { return b.streak }

// Sleep blocks for d or until ctx ends, and returns ctx's error then.
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

// A Loop repeats requests that fail in a way that may heal. It is not safe for concurrent use.
type Loop struct {
	Client *clientv3.Client
	// Warn, if not nil, is told of the first failure of each streak.
	Warn func(error)

	backoff Backoff
	streak  int   // of failures
	last    error // of the streak
}

// Again blocks for a pause after the failure err and returns nil if it is worth another try.
// Otherwise it returns why not: err itself if that is permanent, ctx's error if ctx ended.
func (l *Loop) Again(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err() // err is only what that looks like from inside a request
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

// Failed notes a failure after which the caller goes on by itself.
func (l *Loop) Failed(err error) {
	l.last = err
	if l.streak++; l.streak == 1 && l.Warn != nil {
		l.Warn(err)
	}
}

// OK ends a streak of failures.
func (l *Loop) OK() {
	l.backoff.Reset()
	l.streak, l.last = 0, nil
}

// Last is the last failure of the present streak.
func (l *Loop) Last() error { return l.last }

// Do is [Ask] with the failures noted in the loop.
func Do[T any](ctx context.Context, l *Loop, request func(context.Context) (T, error)) (T, error) {
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

// Unanswered notes that nothing was heard of a request, if nothing has failed before: that is why one that was
// sent then is given up.
func (l *Loop) Unanswered(sent time.Time) {
	if l.last == nil {
		l.last = Silence(l.Client, time.Since(sent))
	}
}

// Waited notes the failure of somebody else's request, whose success would have been the caller's as well.
func (l *Loop) Waited(failure error) {
	if l.last == nil {
		l.last = failure
	}
}

// Silence is the error of a request that has ended without an answer, whose own error says no more than that:
// clientv3 retries what it can by itself and keeps the reasons. It matches [context.DeadlineExceeded].
func Silence(client *clientv3.Client, waited time.Duration) error {
	waited = waited.Round(time.Millisecond)
	switch state, ok := Connection(client); {
	case ok && state != connectivity.Ready:
		return silent("no connection to etcd: " + cmp.Or(connectionError(client, state), state.String()))
	case ok && waited >= time.Second:
		return silent(fmt.Sprintf("no answer from etcd for %v on an open connection, %s", waited, Cure))
	}
	return silent(fmt.Sprintf("no answer from etcd for %v", waited))
}

type silent string

func (s silent) Error() string        { return string(s) }
func (s silent) Is(target error) bool { return target == context.DeadlineExceeded }

// Cure is what ends the silence of a connection that has died without a sign. A borrowed client cannot be
// made to dial anew: Reconnect leaves connections alone that seem to work, and to set the endpoints would
// race with the user's own SetEndpoints.
const Cure = "which may have died without a sign: set DialKeepAliveTime and DialKeepAliveTimeout in the client's clientv3.Config"

// maxExplanation is how long gRPC may take to say why there is no connection, which it knows.
const maxExplanation = 50 * time.Millisecond

// connectionError is why gRPC has failed to connect: connection refused, no such host, an unknown authority. It says so to
// a request that does not wait for a connection, and so is not sent. (If there is one by then, that is a read of a key
// which does not exist.) It is "" in another state.
//
//nolint:contextcheck // it says so at once, also when the caller's context has ended
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

// Connection is the state of the client's connection. ok is false if it has none of its own.
func Connection(client *clientv3.Client) (state connectivity.State, ok bool) {
	conn := client.ActiveConnection()
	if conn == nil {
		return 0, false
	}
	return conn.GetState(), true
}

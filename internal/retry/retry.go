// Package retry decides what a failed request to etcd means and when to ask again.
//
// It is the one place that tells what cannot heal from what can, by gRPC code and rpctypes,
// never by text.
package retry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
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

// RequireLeader returns a context for requests that a member refuses at once while it knows of no
// raft leader. It is [clientv3.WithRequireLeader] at a third of the memory, which a watch holds for
// as long as it lives.
func RequireLeader(ctx context.Context) context.Context {
	if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get(rpctypes.MetadataRequireLeaderKey)) > 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
}

// Request returns a context for one request: it has a deadline of its own, and a member that
// knows of no raft leader refuses the request at once instead of keeping it for 7 s.
func Request(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(RequireLeader(ctx), RequestTimeout)
}

// Aside calls f in a goroutine of its own and waits for it. A request takes a deep stack, and a
// stack shrinks no further than to four times of what is in use, so what goes on to wait for hours
// makes its requests aside.
func Aside(f func()) {
	var done sync.WaitGroup
	done.Go(f)
	done.Wait()
}

// Cleanup returns a context for tidying up, by [Persist]. It outlives ctx, whose end is often the reason
// to tidy up, and is bounded by [CleanupTimeout].
func Cleanup(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(RequireLeader(context.WithoutCancel(ctx)), CleanupTimeout)
}

// Persist repeats a request that tidies up until etcd has answered it, it cannot heal, the client is
// closed, or ctx ends, which must have a deadline. A request that has no answer yet goes on while
// the next is sent: an endpoint that does not answer must not take the time in which another would,
// and one that is slow must be given the time. So the request must do no harm if it is done twice,
// and must end with its context.
func Persist(ctx context.Context, client *clientv3.Client, request func(context.Context) error) error {
	var attempts sync.WaitGroup
	defer attempts.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(client.Ctx(), cancel)()

	deadline, _ := ctx.Deadline()
	budget := max(time.Until(deadline), 16*time.Millisecond) // it may have passed
	backoff := Backoff{Min: budget / 16, Max: budget / 4}
	answers := make(chan error)
	var last error
	for {
		attempts.Go(func() {
			err := request(ctx)
			select {
			case answers <- err:
			case <-ctx.Done():
			}
		})
		pause := time.NewTimer(backoff.next())
		for waiting := true; waiting; {
			select {
			case err := <-answers:
				if err == nil || Permanent(err) {
					return err
				}
				last = err
			case <-pause.C:
				waiting = false
			case <-ctx.Done():
				if last == nil || errors.Is(last, ctx.Err()) {
					return ctx.Err()
				}
				return fmt.Errorf("%w (last failure: %w)", ctx.Err(), last)
			}
		}
		Reconnect(client)
	}
}

// Permanent reports whether err cannot heal by sending the same request again: permission
// denied, failed authentication, a lease that is gone, a request that etcd rejects as invalid.
// Everything else may: no connection, no quorum, no space, a compacted revision,
// an expired auth token.
func Permanent(err error) bool {
	var raw interface{ GRPCStatus() *status.Status }
	if errors.As(err, &raw) {
		err = rpctypes.Error(raw.GRPCStatus().Err()) // a status of etcd's becomes an EtcdError
	}
	switch {
	case errors.Is(err, rpctypes.ErrAuthOldRevision):
		return false // InvalidArgument by code, but the next request has the new revision
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		return true // the campaign goes on, with another lease
	case errors.Is(err, rpctypes.ErrNoSpace), errors.Is(err, rpctypes.ErrTooManyRequests):
		return false // ResourceExhausted, as is a message over gRPC's limit: that stays too large
	}
	switch code(err) {
	case codes.PermissionDenied, codes.InvalidArgument, codes.ResourceExhausted:
		return true
	}
	return false
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
	if conn := client.ActiveConnection(); conn != nil {
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
func (b *Backoff) Wait(ctx context.Context) error { return Sleep(ctx, b.next()) }

func (b *Backoff) next() time.Duration {
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
	last    error
}

// Again blocks for a pause after the failure err and returns nil if it is worth another try.
// Otherwise it returns why not: err itself if that is permanent, ctx's error if ctx ended.
func (l *Loop) Again(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err() // err is only what that looks like from inside a request
	}
	l.last = err
	if Permanent(err) {
		return err
	}
	if l.backoff.Streak() == 0 && l.Warn != nil {
		l.Warn(err)
	}
	Reconnect(l.Client)
	l.backoff.Min, l.backoff.Max = 50*time.Millisecond, 2*time.Second
	return l.backoff.Wait(ctx)
}

// OK ends a streak of failures.
func (l *Loop) OK() {
	l.backoff.Reset()
	l.last = nil
}

// Last is the last failure of the present streak.
func (l *Loop) Last() error { return l.last }

// Do calls request, each time with a context of its own, until it succeeds or is not worth
// another try.
func (l *Loop) Do(ctx context.Context, request func(context.Context) error) error {
	for {
		sent := time.Now()
		var err error
		Aside(func() {
			rctx, cancel := Request(ctx)
			defer cancel()
			err = request(rctx)
		})
		if err == nil {
			l.OK()
			return nil
		}
		if ctx.Err() != nil && l.last == nil {
			l.last = unanswered(l.Client, time.Since(sent))
		}
		if err := l.Again(ctx, err); err != nil {
			return err
		}
	}
}

// unanswered tells of a request that ctx ended, whose own error says no more than that: clientv3
// retries what it can by itself and keeps the reasons.
func unanswered(client *clientv3.Client, waited time.Duration) error {
	if conn := client.ActiveConnection(); conn != nil {
		if state := conn.GetState(); state != connectivity.Ready {
			return fmt.Errorf("no connection to etcd: %v", state)
		}
	}
	return fmt.Errorf("no answer from etcd for %v", waited.Round(time.Millisecond))
}

// Package leaderclient connects gRPC clients to the leader, and lets servers answer only while they lead. Each instance
// serves all the time, and campaigns with its address as value:
//
//	var gate leaderclient.Gate
//	server := grpc.NewServer(grpc.UnaryInterceptor(gate.Unary)) // and serve
//	err := leader.Run(ctx, client, "my-service/leader", "10.0.0.1:8443", gate.Lead)
//
// A client only observes:
//
//	conn, err := grpc.NewClient("leader:///my-service/leader",
//		grpc.WithResolvers(&leaderclient.Builder{Elector: elector}),
//		grpc.WithAuthority("my-service.example.com"), // the name in the servers' certificates
//		grpc.WithTransportCredentials(creds))
//
// While nobody leads, a call fails at once with codes.Unavailable. With grpc.WaitForReady(true) it waits for the next
// leader instead, for as long as its context allows. A call may still meet a server that does not lead any more, or has
// just been elected. Its gate refuses such a call with codes.Unavailable, before anything was done.
package leaderclient

import (
	"context"
	"errors"
	"sync"

	"example.com/leader"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"
)

// A Builder makes resolvers for targets of the form leader:///<election>.
type Builder struct{ Elector *leader.Elector }

// Scheme is part of [resolver.Builder].
func (*Builder) Scheme() string { return "leader" }

// Build is part of [resolver.Builder]. gRPC calls it again when an idle connection is used again.
func (b *Builder) Build(t resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	ctx, cancel := context.WithCancel(context.Background())
	f := &follower{cancel: cancel}
	f.done.Go(func() { f.follow(ctx, cc, b.Elector, t.Endpoint()) })
	return f, nil
}

type follower struct {
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// follow needs no retries, since Observe lasts until ctx ends or something fails that retrying cannot change.
func (f *follower) follow(ctx context.Context, cc resolver.ClientConn, elector *leader.Elector, election string) {
	for c, err := range elector.Observe(ctx, election) {
		var state resolver.State
		if c.Token != 0 {
			state.Addresses = []resolver.Address{{Addr: c.Value}}
		} else if err == nil {
			err = errors.New("nobody leads " + election)
		}
		// An empty state matters as much as an address: an error alone would leave the connection to the last leader open.
		_ = cc.UpdateState(state) // it refuses an empty state, having closed the connection
		if err != nil {
			cc.ReportError(err) // what calls fail with
		}
	}
}

// ResolveNow is part of [resolver.Resolver]. There is nothing to do: Observe already watches.
func (*follower) ResolveNow(resolver.ResolveNowOptions) {}

// Close is part of [resolver.Resolver].
func (f *follower) Close() {
	f.cancel()
	f.done.Wait()
}

// A Gate is open while this instance leads. One Gate is for one election. The zero value is closed.
type Gate struct {
	mu   sync.RWMutex // each handler holds it for reading as long as it runs
	term *term        // nil while the gate is closed
}

type term struct {
	ctx    context.Context // of Lead
	leader *leader.Leader
}

// Lead is for [leader.Run]. It returns when the term is over and all handlers have returned.
func (g *Gate) Lead(ctx context.Context, l *leader.Leader) error {
	g.set(&term{ctx, l})
	<-ctx.Done()
	g.set(nil)
	return ctx.Err()
}

func (g *Gate) set(t *term) {
	g.mu.Lock() // waits for the handlers
	defer g.mu.Unlock()
	g.term = t
}

// Unary is for grpc.UnaryInterceptor; one for streams looks the same. The context of a handler ends with the term. What
// a handler writes, it protects by the term's token or guard, which leader.Elector.Leading gives it.
//
//nolint:contextcheck // of its two contexts, either may end first
func (g *Gate) Unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	refused := status.Error(codes.Unavailable, "this instance does not lead")
	if !g.mu.TryRLock() { // not RLock, with which a call would wait for those that wind down
		return nil, refused
	}
	defer g.mu.RUnlock()
	t := g.term
	if t == nil || t.ctx.Err() != nil || !t.leader.IsLeader() {
		return nil, refused
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(t.ctx, func() { cancel(context.Cause(t.ctx)) })()
	return handler(ctx, req)
}

package leaderclient_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/examples/recipes/internal/recipetest"
	"example.com/leader/examples/recipes/leaderclient"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const election = "shop/api"

// A server answers with its name, or, if it is asked for "wait", when its context has ended and finish is closed.
type server struct {
	health.UnimplementedHealthServer
	name            string
	waiting, finish chan struct{}
}

func (s *server) Check(ctx context.Context, r *health.HealthCheckRequest) (*health.HealthCheckResponse, error) {
	if r.Service == "wait" {
		s.waiting <- struct{}{}
		<-ctx.Done()
		<-s.finish
		return nil, context.Cause(ctx)
	}
	return &health.HealthCheckResponse{}, grpc.SetHeader(ctx, metadata.Pairs("name", s.name))
}

type instance struct {
	*server
	client  *clientv3.Client
	gate    leaderclient.Gate
	address string
}

// serve begins to serve; campaign makes the instance a candidate.
func serve(t *testing.T, client *clientv3.Client, name string) *instance {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	i := &instance{
		server:  &server{name: name, waiting: make(chan struct{}, 1), finish: make(chan struct{})},
		client:  client,
		address: listener.Addr().String(),
	}
	s := grpc.NewServer(grpc.UnaryInterceptor(i.gate.Unary))
	health.RegisterHealthServer(s, i)
	served := make(chan error, 1)
	go func() { served <- s.Serve(listener) }()
	t.Cleanup(func() {
		s.Stop()
		if err := etcdtest.Await(t, "the end of a server", served); err != nil {
			t.Error(err)
		}
	})
	return i
}

func (i *instance) campaign(t *testing.T) (stop func()) {
	return recipetest.Go(t, func(ctx context.Context) error {
		return leader.Run(ctx, i.client, election, i.address, i.gate.Lead)
	})
}

func dial(t *testing.T, target string, opts ...grpc.DialOption) *grpc.ClientConn {
	conn, err := grpc.NewClient(target, append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// ask returns the name of who has answered.
func ask(ctx context.Context, conn *grpc.ClientConn, service string, opts ...grpc.CallOption) (string, error) {
	var header metadata.MD
	r := &health.HealthCheckRequest{Service: service}
	if _, err := health.NewHealthClient(conn).Check(ctx, r, append(opts, grpc.Header(&header))...); err != nil {
		return "", err
	}
	return header.Get("name")[0], nil
}

func TestCallsReachTheLeaderAndWaitForOne(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), etcdtest.Patience)
	defer cancel()
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	a, b := serve(t, client, "a"), serve(t, client, "b")
	builder := &leaderclient.Builder{Elector: recipetest.NewElector(t, client)}
	conn := dial(t, "leader:///"+election, grpc.WithResolvers(builder))
	expect := func(want string) {
		t.Helper()
		for {
			got, err := ask(ctx, conn, "", grpc.WaitForReady(true))
			if got == want {
				return
			}
			if status.Code(err) != codes.Unavailable { // which a gate says that is not open yet, or not any more
				t.Fatalf("%q has answered, want %q (%v)", got, want, err)
			}
		}
	}
	expectNobody := func() {
		t.Helper()
		for s := conn.GetState(); s != connectivity.TransientFailure; s = conn.GetState() {
			if !conn.WaitForStateChange(ctx, s) {
				t.Fatalf("the connection is %v", s)
			}
		}
		if _, err := ask(ctx, conn, ""); status.Code(err) != codes.Unavailable {
			t.Fatalf("without a leader: %v", err)
		}
	}

	conn.Connect()
	expectNobody()
	stop := a.campaign(t)
	expect("a")
	stop()
	expectNobody()
	b.campaign(t)
	expect("b")

	a.campaign(t) // and waits
	recipetest.Transfer(t, client, election)
	expect("a") // also if the client has seen no vacancy
}

func TestGateEndsTheCallsOfATermAndRefusesOthers(t *testing.T) {
	t.Parallel()
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	a, b := serve(t, client, "a"), serve(t, client, "b")
	toA, toB := dial(t, a.address), dial(t, b.address)
	a.campaign(t)
	recipetest.AwaitQueue(t, client, election, 1)
	asked := make(chan error, 1)
	go func() {
		for { // until the gate has opened
			if _, err := ask(t.Context(), toA, "wait"); status.Code(err) != codes.Unavailable {
				asked <- err
				return
			}
		}
	}()
	b.campaign(t)
	if _, err := ask(t.Context(), toB, ""); status.Code(err) != codes.Unavailable {
		t.Errorf("b, which does not lead: %v", err)
	}
	etcdtest.Await(t, "a's handler", a.waiting)
	recipetest.AwaitQueue(t, client, election, 2)
	brief, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err := recipetest.NewElector(t, client).Transfer(brief, election, leader.Candidate{})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Transfer while a handler runs: %v", err)
	}
	close(a.finish)
	err = etcdtest.Await(t, "a's answer", asked)
	if status.Code(err) != codes.Unknown || status.Convert(err).Message() != leader.ErrTransferred.Error() {
		t.Errorf("a call when the term ends: %v", err)
	}
	if _, err := ask(t.Context(), toA, ""); status.Code(err) != codes.Unavailable {
		t.Errorf("a, which does not lead any more: %v", err)
	}
}

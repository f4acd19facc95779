// Package leadertest serves tests of what depends on leadership, as net/http/httptest serves those of
// HTTP: it runs an etcd for a test, and takes the network away from a leader.
//
// For a service like
//
//	// work is the service. Of all instances the one that leads sends its name.
//	func work(ctx context.Context, client *clientv3.Client, name string, working chan<- string) error {
//		lead := func(ctx context.Context, _ *leader.Leader) error {
//			for {
//				select {
//				case <-ctx.Done():
//					return ctx.Err()
//				case working <- name:
//				}
//			}
//		}
//		return leader.Run(ctx, client, "example/work", name, lead, leader.WithTTL(2*time.Second))
//	}
//
// this test shows that another instance takes over when the one that leads is cut off:
//
//	func TestWorkGoesOnWhenTheLeaderIsCutOff(t *testing.T) {
//		server := leadertest.NewServer(t)
//		clients := map[string]*clientv3.Client{
//			"a": server.NewClient(t),
//			"b": server.NewClient(t),
//		}
//		working := make(chan string)
//		var instances sync.WaitGroup
//		for name, client := range clients {
//			instances.Go(func() {
//				if err := work(t.Context(), client, name, working); !errors.Is(err, context.Canceled) {
//					t.Error(err)
//				}
//			})
//		}
//		t.Cleanup(instances.Wait) // t.Context has ended before
//
//		first := <-working
//		leadertest.Disconnect(t, clients[first])
//		for name := range working {
//			if name != first {
//				return // the other instance has taken over
//			}
//		}
//	}
//
// The whole of it, with its imports, is example_test.go next to this file.
//
// # How a term ends
//
// The instance that leads learns why from the [context.Cause] of its context. A test ends its term in
// the way that it is about:
//
//   - The instance is asked to stop: end the context of Run. The next candidate leads as soon as the
//     instance has stopped.
//   - It is evicted: call leader.Elector.Evict. Within milliseconds it sees leader.ErrEvicted and the
//     next candidate leads, in either order. A test that only needs the term to end does this.
//   - It loses its lease: revoke the Lease that leader.Elector.Current returns. That evicts it, with
//     leader.ErrEvicted, from all elections of its Elector at once.
//   - It loses the network: call [Disconnect]. After about half to four fifths of the TTL it sees
//     leader.ErrExpired, if the margin is the default. The others see nothing until etcd takes the
//     lease, a TTL and up to half a second after the last renewal; then the next candidate leads.
//   - It crashes: the others see what they see when it loses the network, so call Disconnect. The
//     instance itself, which a crash would leave nothing of, goes on until it sees leader.ErrExpired.
//   - etcd is out of reach: disconnect every client. Each term ends with leader.ErrExpired, and nobody
//     leads until a client is reconnected.
//
// The last three take as long as they do in production. Nothing shortens that: to revoke the lease of
// an instance that is disconnected lets the next one lead while it still does, as an expiry does not.
// So let the TTL of the service be set, and set 2 s with leader.WithTTL, or 1 s where the machine is
// never busy.
//
// # What it is not
//
// It is not a mock. A server is a real etcd in the test's process, with its data in a temporary
// folder. It starts in about 0.1 s, so each test can have its own; it listens on loopback only, at
// ports that are free, so tests can run in parallel; and it leaves nothing behind, no goroutine either.
//
// It is not for measuring, since it does not wait for the disk, and not for bubbles of
// testing/synctest, since its network and clock are real.
package leadertest

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A Server is an etcd of one member that runs inside the test's process until the test ends. It
// grants leases from 1 s on, where an etcd with its default settings does from 2 s on.
type Server struct {
	member *etcdtest.Member

	mu    sync.Mutex
	links []*etcdtest.Link // of the clients
}

// NewServer starts an etcd and blocks until it is ready. It fails the test if that is not possible,
// or takes more than a minute. When tb ends, the etcd is stopped, after its clients are closed, and
// its data is deleted.
func NewServer(tb testing.TB) *Server {
	tb.Helper()
	s, stop, err := Start()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(stop)
	return s
}

// Start is NewServer where there is no testing.TB: in TestMain, for a server that all tests share, or
// in an example. stop stops the etcd, once, and deletes its data; the clients should be closed before.
func Start() (s *Server, stop func(), err error) {
	members, stopEtcd, err := etcdtest.Run(1)
	if err != nil {
		return nil, nil, fmt.Errorf("leadertest: start etcd: %w", err)
	}
	s = &Server{member: members[0]}
	return s, func() {
		stopEtcd()
		s.closeLinks()
	}, nil
}

// Endpoint is where the server listens, for a client that the test or a process that it starts makes
// itself. The network of such a client cannot be taken away.
func (s *Server) Endpoint() string { return s.member.Endpoint }

// closeLinks is called once the etcd has stopped: a link waits for its connections, which the service
// may have left open and which the etcd breaks.
func (s *Server) closeLinks() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, link := range s.links {
		link.Close()
	}
}

// NewClient returns a client that reaches the server over a network of its own, which [Disconnect]
// takes away. It does not block. tb is that of the server or of a subtest. The client is closed when
// tb ends, after the cleanups that tb was given later: an instance that one of them stops can still
// resign.
//
// Each instance of a service should get a client of its own, as it has in production. One that makes its
// client itself can be given the Endpoints of this one, which are Unix sockets, and shares its network.
func (s *Server) NewClient(tb testing.TB) *clientv3.Client {
	tb.Helper()
	link, err := etcdtest.StartLink(s.member.Endpoint)
	if err != nil {
		tb.Fatalf("leadertest: connect a client: %v", err)
	}
	s.mu.Lock()
	s.links = append(s.links, link)
	s.mu.Unlock()
	return etcdtest.NewClientFrom(tb, clientv3.Config{
		Endpoints: []string{link.Endpoint},
		Context:   context.WithValue(context.Background(), networkKey{}, &network{link: link}),
	})
}

// NewClient starts an etcd for the test and returns a client of it: [Server.NewClient] of a
// [NewServer], for a test that needs one client.
func NewClient(tb testing.TB) *clientv3.Client {
	tb.Helper()
	return NewServer(tb).NewClient(tb)
}

// Disconnect takes away the network between a client of [Server.NewClient] and its etcd: nothing
// arrives any more, in either direction, and no connection breaks, until reconnect is called or
// tb ends. What was on its way arrives then, late. A term on the client ends with leader.ErrExpired
// before a candidate on another client leads; the package's documentation says when.
//
// Neither Disconnect nor reconnect blocks. A second call of either changes nothing, and they may be
// called concurrently. Disconnect fails the test if the client is not of Server.NewClient.
func Disconnect(tb testing.TB, client *clientv3.Client) (reconnect func()) {
	tb.Helper()
	if client == nil {
		tb.Fatal("leadertest: Disconnect: client must not be nil")
	}
	n, ok := client.Ctx().Value(networkKey{}).(*network)
	if !ok {
		tb.Fatal("leadertest: Disconnect: client must be one of leadertest's NewClient")
	}
	n.disconnect()
	// A service that is stopped then need not wait in vain, nor the etcd for what a connection that was
	// made meanwhile has to say.
	tb.Cleanup(n.reconnect)
	return n.reconnect
}

// networkKey is the key of a client's *network in the client's context.
type networkKey struct{}

// A network is what lies between a client and the server.
type network struct {
	link *etcdtest.Link

	mu   sync.Mutex
	dark bool // to darken the link again would let through what waits
}

func (n *network) disconnect() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.dark {
		n.dark = true
		n.link.Darken()
	}
}

func (n *network) reconnect() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dark = false
	n.link.Heal()
}

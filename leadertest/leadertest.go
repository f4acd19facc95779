// Package leadertest helps to test code that depends on leadership. It runs an etcd for a test, as net/http/httptest
// runs a server, and can cut a leader off from it.
//
// For a service like
//
//	// work is the service. Only the instance that leads sends its name.
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
//	func TestWorkContinuesWhenTheLeaderIsCutOff(t *testing.T) {
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
//		t.Cleanup(instances.Wait) // after the end of t.Context
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
// The file example_test.go of this package contains the complete test, one of a transfer, and one of work that hangs.
//
// # How a term ends
//
// The [context.Cause] of the leader's context tells it why its term ended. A test can end a term in these ways:
//
//   - Stop the instance: end the context of Run. The next candidate leads as soon as the instance has stopped.
//   - Hand over: call leader.Elector.Transfer while another candidate waits. The instance sees leader.ErrTransferred,
//     and joins again at the end of the queue. The next candidate leads when the function of Run has returned.
//   - Evict it: call leader.Elector.Evict. Within milliseconds the instance sees leader.ErrEvicted and the next
//     candidate leads, in either order. Use this if the test only needs the term to end.
//   - Take its lease: revoke the Lease that leader.Elector.Current returns. The instance sees leader.ErrEvicted in
//     every election of its Elector at once.
//   - Make its work hang, if the service uses leader.WithHealth. With the default margin, the instance sees
//     leader.ErrUnhealthy about half to four fifths of the TTL after its check has begun to fail. The next candidate
//     leads when the function of Run has returned, or a margin later.
//   - Cut its network: call [Disconnect]. With the default margin, the instance sees leader.ErrExpired after about half
//     to four fifths of the TTL. The others notice nothing until etcd expires the lease, up to half a second more than
//     a TTL after the last renewal. Then the next candidate leads.
//   - Crash it: call [Disconnect], which looks the same to the others. Unlike after a crash, the instance itself keeps
//     working until it sees leader.ErrExpired.
//   - Make etcd unreachable: disconnect every client. Each term ends with leader.ErrExpired, and nobody leads until a
//     client is reconnected.
//
// The last four take as long as in production, and there is no way to shorten them. Do not revoke the lease of an
// instance that is disconnected: the next candidate would lead while the instance still does, which an expiry never
// allows. Make the TTL of the service configurable instead, and use leader.WithTTL(2 * time.Second) in tests, or 1 s on
// a machine that is never busy.
//
// # What to expect of the server
//
// It is a real etcd, inside the test's process. It starts in about 0.1 s, so each test can have its own. It listens on
// free ports of loopback only, so tests can run in parallel. It leaves nothing behind, not even a goroutine.
//
// Its data is in a temporary folder. It takes about 2 MB, and more as the test writes. For that, importing this package
// sets wal.SegmentSizeBytes of etcd to 1 MB in the whole process; this also affects an etcd that the test starts
// itself.
//
// If etcd cannot write its data, because the disk is full for example, the test fails with the reason. From then on
// requests fail, or get no answer. Such a server takes up to 8 s to stop, and leaves goroutines behind.
//
// Do not measure performance with it: it does not wait for the disk. Do not use it in a bubble of testing/synctest: its
// network and clock are real.
package leadertest

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"

	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A Server is an etcd of one member that runs inside the test's process until the test ends. It grants leases of 1 s
// and more. An etcd with default settings grants none below 2 s.
type Server struct {
	member *etcdtest.Member

	mu    sync.Mutex
	links []*etcdtest.Link // of the clients
}

// NewServer starts an etcd and waits until it is ready. It fails the test if etcd does not start within a minute. When
// tb ends, the etcd stops, after its clients are closed, and its data is deleted.
//
// If the etcd fails while tb runs, tb is marked as failed, and requests fail from then on or get no answer.
func NewServer(tb testing.TB) *Server {
	tb.Helper()
	s, stop, err := start(func(err error) { tb.Errorf("leadertest: %v", err) })
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(stop)
	return s
}

// Start is NewServer without a testing.TB, for an example, or for a TestMain that starts one server for all tests. stop
// stops the etcd and deletes its data. Call it once, after closing the clients.
//
// If the etcd fails before stop, the process prints why and exits with status 1.
func Start() (s *Server, stop func(), err error) {
	return start(func(err error) {
		fmt.Fprintln(os.Stderr, "leadertest:", err)
		os.Exit(1)
	})
}

// start calls failed if the etcd fails after it has started.
func start(failed func(error)) (s *Server, stop func(), err error) {
	members, stopEtcd, err := etcdtest.RunWatched(1, failed)
	if err != nil {
		return nil, nil, fmt.Errorf("leadertest: start etcd: %w", err)
	}
	s = &Server{member: members[0]}
	return s, func() {
		stopEtcd()
		s.closeLinks()
	}, nil
}

// Endpoint is the address of the server, host:port. Use it for a client that the test makes itself, or that a process
// makes which the test starts. [Disconnect] cannot cut off such a client.
func (s *Server) Endpoint() string { return s.member.Endpoint }

// closeLinks must be called after the etcd has stopped, because a link waits for its connections. The service may have
// left some open; they break when the etcd stops.
func (s *Server) closeLinks() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, link := range s.links {
		link.Close()
	}
}

// NewClient returns a client that reaches the server over a network of its own, which [Disconnect] can cut. It does not
// block. tb is the server's or that of a subtest. The client is closed when tb ends, after the cleanups that were
// registered later, so an instance that such a cleanup stops can still resign.
//
// Give each instance of a service a client of its own, as in production. If the service makes its client itself, give
// it the Endpoints of a client from here. They are unix sockets. The two clients share one network.
func (s *Server) NewClient(tb testing.TB) *clientv3.Client {
	tb.Helper()
	link, err := etcdtest.StartLink(s.member.Endpoint)
	if err != nil {
		tb.Fatalf("leadertest: connect a client: %v", err)
	}
	s.mu.Lock()
	s.links = append(s.links, link)
	s.mu.Unlock()
	n := &network{link: link, cutBy: make(map[testing.TB]bool)}
	return etcdtest.NewClientFrom(tb, clientv3.Config{
		Endpoints: []string{link.Endpoint},
		Context:   context.WithValue(context.Background(), networkKey{}, n),
	})
}

// NewClient starts an etcd for the test and returns a client for it: [Server.NewClient] of a [NewServer]. Use it if the
// test needs one client.
func NewClient(tb testing.TB) *clientv3.Client {
	tb.Helper()
	return NewServer(tb).NewClient(tb)
}

// Disconnect cuts the network between a client of [Server.NewClient] and its etcd, until reconnect is called or tb
// ends. Nothing arrives, in either direction, and no connection breaks. What was sent arrives late, after the network
// is back. A term on the client ends with leader.ErrExpired before a candidate on another client leads; the package
// documentation says when.
//
// If several tests disconnect a client, such as a test and its subtest, the network is back when each of them has
// reconnected it or ended. Within one test a second call of Disconnect or reconnect has no effect.
//
// Neither function blocks, and both may be called concurrently. Disconnect fails the test if the client is not from
// Server.NewClient.
func Disconnect(tb testing.TB, client *clientv3.Client) (reconnect func()) {
	tb.Helper()
	if client == nil {
		tb.Fatal("leadertest: Disconnect: client must not be nil")
	}
	n, ok := client.Ctx().Value(networkKey{}).(*network)
	if !ok {
		tb.Fatal("leadertest: Disconnect: client must be one of leadertest's NewClient")
	}
	n.disconnect(tb)
	reconnect = func() { n.reconnect(tb) }
	// Without this, a service that stops after the test would wait for an answer that cannot come, and etcd for the
	// rest of a handshake.
	tb.Cleanup(reconnect)
	return reconnect
}

// networkKey is the key of a client's *network in the client's context.
type networkKey struct{}

// A network is what lies between a client and the server. It is dark while cutBy is not empty.
type network struct {
	link *etcdtest.Link

	mu    sync.Mutex
	cutBy map[testing.TB]bool
}

func (n *network) disconnect(tb testing.TB) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.cutBy) == 0 { // darkening a dark link again would let through what it holds back
		n.link.Darken()
	}
	n.cutBy[tb] = true
}

func (n *network) reconnect(tb testing.TB) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.cutBy, tb)
	if len(n.cutBy) == 0 {
		n.link.Heal()
	}
}

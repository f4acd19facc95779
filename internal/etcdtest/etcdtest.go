// Package etcdtest runs real etcd servers inside a test, and faults between them and a client.
//
// Everything listens on loopback or on a unix socket, writes to temporary folders, logs nothing,
// and ends with the test.
package etcdtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/pkg/v3/proxy"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// startTimeout bounds how long a member may take to become ready.
const startTimeout = time.Minute

// A Member is a running etcd server.
type Member struct {
	// Endpoint is where it serves clients. It stays the same across Stop and Start.
	Endpoint string

	cfg embed.Config
	etc *embed.Etcd // nil while stopped
}

// Start runs a cluster of one member until the test ends. It grants leases from 1 s on.
func Start(tb testing.TB, configure ...func(*embed.Config)) *Member {
	tb.Helper()
	return StartCluster(tb, 1, configure...)[0]
}

// StartCluster runs a cluster of n members until the test ends.
func StartCluster(tb testing.TB, n int, configure ...func(*embed.Config)) []*Member {
	tb.Helper()
	members, stop, err := Run(n, configure...)
	if err != nil {
		tb.Fatalf("start etcd: %v", err)
	}
	tb.Cleanup(stop)
	return members
}

// Run runs a cluster of n members until stop is called, which also removes their data.
func Run(n int, configure ...func(*embed.Config)) (members []*Member, stop func(), err error) {
	dir, err := os.MkdirTemp("", "etcdtest-")
	if err != nil {
		return nil, nil, err
	}
	stop = func() {
		for _, m := range members {
			m.Stop()
		}
		os.RemoveAll(dir)
	}
	// The ports are free when they are chosen; should somebody take one before etcd does, others
	// are chosen.
	for try := range 5 {
		members, err = run(filepath.Join(dir, fmt.Sprint(try)), n, configure)
		if err == nil {
			return members, stop, nil
		}
	}
	stop()
	return nil, nil, err
}

func run(dir string, n int, configure []func(*embed.Config)) ([]*Member, error) {
	specs, err := newSpecs(dir, n)
	if err != nil {
		return nil, err
	}
	members := make([]*Member, n)
	for i, s := range specs {
		cfg := s.config()
		for _, f := range configure {
			f(cfg)
		}
		members[i] = &Member{Endpoint: s.Client, cfg: *cfg}
	}
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i, m := range members {
		wg.Go(func() { errs[i] = m.Start() })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		for _, m := range members {
			m.Stop()
		}
		return nil, err
	}
	return members, nil
}

// A spec is what makes one member of a cluster differ from others.
type spec struct {
	Name, Dir    string
	Client, Peer string // addresses
	Cluster      string // names and peer addresses of all members, as etcd takes them
	Members      int
}

// newSpecs chooses free ports for the members of a cluster, and folders in dir.
func newSpecs(dir string, n int) ([]spec, error) {
	addresses, err := freeAddresses(2 * n)
	if err != nil {
		return nil, err
	}
	specs := make([]spec, n)
	var cluster []string
	for i := range specs {
		name := fmt.Sprintf("m%d", i)
		specs[i] = spec{Name: name, Dir: filepath.Join(dir, name), Client: addresses[2*i], Peer: addresses[2*i+1], Members: n}
		cluster = append(cluster, name+"=http://"+specs[i].Peer)
	}
	for i := range specs {
		specs[i].Cluster = strings.Join(cluster, ",")
	}
	return specs, nil
}

func (m spec) config() *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.InitialCluster = m.Name, m.Dir, m.Cluster
	cfg.ListenClientUrls = []url.URL{{Scheme: "http", Host: m.Client}}
	cfg.ListenPeerUrls = []url.URL{{Scheme: "http", Host: m.Peer}}
	cfg.AdvertiseClientUrls, cfg.AdvertisePeerUrls = cfg.ListenClientUrls, cfg.ListenPeerUrls
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.UnsafeNoFsync = true // a test outlives no power cut
	cfg.TickMs, cfg.ElectionMs = 10, 100
	if m.Members > 1 {
		cfg.TickMs, cfg.ElectionMs = 50, 500 // busy machines must not elect for lack of a core
	}
	return cfg
}

func freeAddresses(n int) ([]string, error) {
	var addresses []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // only at the end, so that no port is chosen twice
		addresses = append(addresses, l.Addr().String())
	}
	return addresses, nil
}

// Start runs a stopped member again, on the same ports and data.
func (m *Member) Start() error {
	cfg := m.cfg
	etc, err := embed.StartEtcd(&cfg)
	if err != nil {
		return err
	}
	m.etc = etc
	select {
	case <-etc.Server.ReadyNotify():
		return nil
	case err := <-etc.Err():
		m.Stop()
		return err
	case <-time.After(startTimeout):
		m.Stop()
		return fmt.Errorf("not ready after %v", startTimeout)
	}
}

// Stop ends the member. Connections to it are refused until Start.
func (m *Member) Stop() {
	if m.etc == nil {
		return
	}
	m.etc.Server.HardStop() // no graceful transfer of leadership: faults are not graceful either
	m.etc.Close()
	m.etc = nil
}

// Embed gives the server itself.
func (m *Member) Embed() *embed.Etcd { return m.etc }

// NewClient returns a client of the endpoints. It is closed with the test.
func NewClient(tb testing.TB, endpoints ...string) *clientv3.Client {
	tb.Helper()
	return NewClientFrom(tb, clientv3.Config{Endpoints: endpoints})
}

// NewClientFrom is NewClient with other settings.
func NewClientFrom(tb testing.TB, cfg clientv3.Config) *clientv3.Client {
	tb.Helper()
	cfg.Logger = zap.NewNop()
	client, err := clientv3.New(cfg)
	if err != nil {
		tb.Fatalf("new client: %v", err)
	}
	tb.Cleanup(func() { client.Close() }) // an error says that the test has closed it already
	return client
}

// A Link is a connection between clients and a member that can fail. Clients use its Endpoint.
type Link struct {
	proxy.Server
	Endpoint string
}

// NewLink returns a working link to a member.
func NewLink(tb testing.TB, m *Member) *Link {
	tb.Helper()
	dir, err := os.MkdirTemp("", "link") // not tb.TempDir: a unix socket's path must be short
	if err != nil {
		tb.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	server := proxy.NewServer(proxy.ServerConfig{
		Logger: zap.NewNop(),
		From:   url.URL{Scheme: "unix", Host: socket},
		To:     url.URL{Scheme: "tcp", Host: m.Endpoint},
	})
	ctx, cancel := context.WithCancel(context.Background())
	drained := make(chan struct{})
	go func() { // the proxy stops when nobody reads its errors
		defer close(drained)
		for {
			select {
			case err := <-server.Error():
				_ = err // its connections fail, as they are made to
			case <-ctx.Done():
				return
			}
		}
	}()
	select {
	case <-server.Ready():
	case <-time.After(startTimeout):
		tb.Fatal("proxy is not ready")
	}
	tb.Cleanup(func() {
		server.Close() // also when it was closed before
		cancel()
		<-drained
		os.RemoveAll(dir)
	})
	return &Link{Server: server, Endpoint: "unix://" + socket}
}

// Darken drops everything, both ways and without a sign, until Heal: what is on its way then
// arrives late, as TCP would have it.
func (l *Link) Darken() {
	l.PauseAccept()
	l.PauseTx()
	l.PauseRx()
}

// Cut breaks every connection, old or new, as soon as the member answers on it, until Heal.
func (l *Link) Cut() {
	l.ModifyRx(func(b []byte) []byte { return make([]byte, len(b)) })
}

// Heal ends Darken and Cut.
func (l *Link) Heal() {
	l.UnmodifyRx()
	l.UnpauseAccept()
	l.UnpauseTx()
	l.UnpauseRx()
}

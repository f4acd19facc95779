// Package etcdtest runs real etcd servers for a test, and faults between them and a client.
//
// A server is the one that the test is linked with, and runs inside it, unless ETCDTEST_ETCD names
// a binary of etcd, of any version from 3.4 on, to run instead. Everything listens on loopback or on
// a unix socket, writes to temporary folders, logs nothing, and ends with the test.
package etcdtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
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

// binaryEnv names the binary of etcd to run, if not the one that the test is linked with.
const binaryEnv = "ETCDTEST_ETCD"

// startTimeout bounds how long a member may take to become ready.
const startTimeout = time.Minute

// Settings are what a test wants to be otherwise in the configuration file of etcd. A version that
// does not know a setting ignores it.
type Settings map[string]any

// A Member is a running etcd server.
type Member struct {
	// Endpoint is where it serves clients. It stays the same across Stop and Start.
	Endpoint string

	binary string // of etcd; "" for the one that runs inside this process
	config string // path of the configuration file
	health string // address that tells whether it is ready
	server server // nil while stopped
}

// A server is a started etcd.
type server interface {
	// stop ends it without a graceful transfer of leadership: faults are not graceful either.
	stop()
}

// Start runs a cluster of one member until the test ends. It grants leases from 1 s on.
func Start(tb testing.TB, settings ...Settings) *Member {
	tb.Helper()
	return StartCluster(tb, 1, settings...)[0]
}

// StartCluster runs a cluster of n members until the test ends.
func StartCluster(tb testing.TB, n int, settings ...Settings) []*Member {
	tb.Helper()
	return startCluster(tb, os.Getenv(binaryEnv), n, settings...)
}

func startCluster(tb testing.TB, binary string, n int, settings ...Settings) []*Member {
	tb.Helper()
	members, stop, err := run(binary, n, settings...)
	if err != nil {
		tb.Fatalf("start etcd: %v", err)
	}
	tb.Cleanup(stop)
	return members
}

// Run runs a cluster of n members until stop is called, which also removes their data.
func Run(n int, settings ...Settings) (members []*Member, stop func(), err error) {
	return run(os.Getenv(binaryEnv), n, settings...)
}

func run(binary string, n int, settings ...Settings) (members []*Member, stop func(), err error) {
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
		members, err = tryRun(filepath.Join(dir, fmt.Sprint(try)), binary, n, settings)
		if err == nil {
			return members, stop, nil
		}
	}
	stop()
	return nil, nil, err
}

func tryRun(dir, binary string, n int, settings []Settings) ([]*Member, error) {
	members, err := newMembers(dir, binary, n, settings)
	if err != nil {
		return nil, err
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

// newMembers chooses free ports for the members of a cluster, and writes their configuration to dir.
func newMembers(dir, binary string, n int, settings []Settings) ([]*Member, error) {
	addresses, err := FreeAddresses(3 * n)
	if err != nil {
		return nil, err
	}
	clients, peers, healths := addresses[:n], addresses[n:2*n], addresses[2*n:]
	cluster := make([]string, n)
	for i, peer := range peers {
		cluster[i] = fmt.Sprintf("m%d=http://%s", i, peer)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	members := make([]*Member, n)
	for i := range members {
		name := fmt.Sprintf("m%d", i)
		file := Settings{
			"name":                name,
			"data-dir":            filepath.Join(dir, name),
			"initial-cluster":     strings.Join(cluster, ","),
			"listen-peer-urls":    "http://" + peers[i],
			"listen-metrics-urls": "http://" + healths[i],
			"heartbeat-interval":  10,
			"election-timeout":    100,
			"unsafe-no-fsync":     true, // a test outlives no power cut
			"logger":              "zap",
			"log-outputs":         []string{"stderr"},
			"log-level":           "fatal",
		}
		if n > 1 { // busy machines must not elect for lack of a core
			file["heartbeat-interval"], file["election-timeout"] = 50, 500
		}
		for _, s := range settings {
			maps.Copy(file, s)
		}
		scheme := "http://"
		if file["client-transport-security"] != nil {
			scheme = "https://"
		}
		file["listen-client-urls"] = scheme + clients[i]
		file["advertise-client-urls"] = file["listen-client-urls"]
		file["initial-advertise-peer-urls"] = file["listen-peer-urls"]
		text, err := json.Marshal(file)
		if err != nil {
			return nil, err
		}
		members[i] = &Member{Endpoint: clients[i], binary: binary, config: filepath.Join(dir, name+".json"), health: healths[i]}
		if err := os.WriteFile(members[i].config, text, 0o600); err != nil {
			return nil, err
		}
	}
	return members, nil
}

// FreeAddresses returns n addresses on loopback that nobody listens on.
func FreeAddresses(n int) ([]string, error) {
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
func (m *Member) Start() (err error) {
	if m.binary == "" {
		m.server, err = startEmbedded(m.config)
	} else {
		m.server, err = startProcess(m)
	}
	return err
}

// Stop ends the member. Connections to it are refused until Start.
func (m *Member) Stop() {
	if m.server != nil {
		m.server.stop()
		m.server = nil
	}
}

// An embedded is a server inside this process.
type embedded struct{ *embed.Etcd }

func startEmbedded(config string) (server, error) {
	cfg, err := embed.ConfigFromFile(config)
	if err != nil {
		return nil, err
	}
	etc, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, err
	}
	s := embedded{etc}
	select {
	case <-etc.Server.ReadyNotify():
		return s, nil
	case err = <-etc.Err():
	case <-time.After(startTimeout):
		err = fmt.Errorf("not ready after %v", startTimeout)
	}
	s.stop()
	return nil, err
}

func (s embedded) stop() {
	s.Server.HardStop()
	s.Close()
}

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

	close func()
}

// NewLink returns a working link to a member. It is closed with the test.
func NewLink(tb testing.TB, m *Member) *Link {
	tb.Helper()
	l, err := StartLink(m.Endpoint)
	if err != nil {
		tb.Fatalf("start a link: %v", err)
	}
	tb.Cleanup(l.Close)
	return l
}

// StartLink returns a working link to an address, host:port, until its Close.
func StartLink(to string) (*Link, error) {
	dir, err := os.MkdirTemp("", "link") // not tb.TempDir: a unix socket's path must be short
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "s")
	server := proxy.NewServer(proxy.ServerConfig{
		Logger: zap.NewNop(),
		From:   url.URL{Scheme: "unix", Host: socket},
		To:     url.URL{Scheme: "tcp", Host: to},
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
	l := &Link{Server: server, Endpoint: "unix://" + socket}
	l.close = sync.OnceFunc(func() {
		server.Close()
		cancel()
		<-drained
		os.RemoveAll(dir)
	})
	select {
	case <-server.Ready():
		return l, nil
	case <-time.After(startTimeout):
		l.Close()
		return nil, fmt.Errorf("not ready after %v", startTimeout)
	}
}

// Close ends the link, also if it has ended before.
func (l *Link) Close() { l.close() }

// Darken drops everything, both ways and without a sign, until Heal: what is on its way then
// arrives late, as TCP would have it. A link that was paused before goes on for a moment, since the
// proxy would forget what waits.
func (l *Link) Darken() {
	l.UnpauseAccept()
	l.UnpauseTx()
	l.UnpauseRx()
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

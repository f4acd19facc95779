// Package etcdtest runs real etcd servers for a test, and injects faults between them and their clients.
//
// By default a server is the etcd that the test is linked with, and runs inside the test's process. To run another
// version, 3.4 or later, set ETCDTEST_ETCD to the path of its binary. Everything listens on loopback or on a unix
// socket, writes to temporary folders, logs only why an etcd ends, and ends with the test.
//
// A server needs about 2 MB of disk, not the 128 MB that etcd takes by default: the package sets wal.SegmentSizeBytes
// for the whole process.
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
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/pkg/v3/proxy"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// binaryEnv names the binary of etcd to run, if not the one that the test is linked with.
const binaryEnv = "ETCDTEST_ETCD"

// startTimeout bounds how long a member may take to become ready.
const startTimeout = time.Minute

// stopTimeout bounds how long it may take to stop an etcd inside this process that has failed. It is a little longer
// than etcd waits for its handlers.
const stopTimeout = 8 * time.Second

// errFailed wraps why an etcd inside this process has failed, while it starts or later.
var errFailed = errors.New("etcd has failed")

// errNotReady is returned when a member is not ready after startTimeout.
var errNotReady = fmt.Errorf("etcd is not ready after %v", startTimeout)

// errGivenUp is returned when a member is not ready and another one of the cluster has failed.
var errGivenUp = errors.New("etcd is not ready, since another member has failed")

// etcd allocates two segments of its log in advance, 64 MB each. The size is a variable, not a setting. It is set here
// because nothing reads it yet: no other goroutine runs while packages are initialized.
func init() { wal.SegmentSizeBytes = 1 << 20 }

// Settings replace values in the configuration file of etcd. A version that does not know a setting ignores it.
type Settings map[string]any

// A Member is a running etcd server.
type Member struct {
	// Endpoint is where it serves clients. It stays the same across Stop and Start.
	Endpoint string

	binary string      // of etcd; "" for the one that runs inside this process
	config string      // path of the configuration file
	health string      // address of its health check
	failed func(error) // called if the etcd inside this process fails after its start
	server server      // nil while stopped
}

// A server is a started etcd.
type server interface {
	// stop ends it without a transfer of leadership, because a fault would not transfer it either.
	stop()
}

// Start runs a cluster of one member until the test ends. It grants leases of 1 s and more.
func Start(tb testing.TB, settings ...Settings) *Member {
	tb.Helper()
	return StartCluster(tb, 1, settings...)[0]
}

// StartCluster runs a cluster of n members until the test ends. If one of them fails while it runs, because the disk
// is full for example, the test is marked as failed, and requests to the member fail or get no answer.
func StartCluster(tb testing.TB, n int, settings ...Settings) []*Member {
	tb.Helper()
	return startCluster(tb, os.Getenv(binaryEnv), n, settings...)
}

func startCluster(tb testing.TB, binary string, n int, settings ...Settings) []*Member {
	tb.Helper()
	members, stop, err := run(binary, n, func(err error) { tb.Error(err) }, settings...)
	if err != nil {
		tb.Fatalf("start etcd: %v", err)
	}
	tb.Cleanup(stop)
	return members
}

// Run runs a cluster of n members until stop is called, which also removes their data. If one of them fails while it
// runs, the process prints why and exits, as an etcd of its own would, because Run has no test to report it to.
func Run(n int, settings ...Settings) (members []*Member, stop func(), err error) {
	return RunWatched(n, exit, settings...)
}

// RunWatched is Run for a caller that wants to know when a member fails while it runs. failed is called on a goroutine
// of its own, at most once for each start of a member, and never after stop has returned. It must not call stop.
func RunWatched(n int, failed func(error), settings ...Settings) (members []*Member, stop func(), err error) {
	return run(os.Getenv(binaryEnv), n, failed, settings...)
}

func exit(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func run(binary string, n int, failed func(error), settings ...Settings) (members []*Member, stop func(), err error) {
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
	// The ports were free when they were chosen. If another process has taken one before etcd does, choose others.
	for try := range 5 {
		members, err = tryRun(filepath.Join(dir, fmt.Sprint(try)), binary, n, failed, settings)
		if err == nil {
			return members, stop, nil
		}
		if errors.Is(err, errFailed) || errors.Is(err, errNotReady) {
			break // other ports do not help
		}
	}
	stop()
	return nil, nil, err
}

func tryRun(dir, binary string, n int, failed func(error), settings []Settings) ([]*Member, error) {
	members, err := newMembers(dir, binary, n, failed, settings)
	if err != nil {
		return nil, err
	}
	if err := startAll(members); err != nil {
		for _, m := range members {
			m.Stop()
		}
		return nil, err
	}
	return members, nil
}

// startAll starts the members of a cluster. If one of them fails, it does not wait for the others.
func startAll(members []*Member) error {
	var wg sync.WaitGroup
	errs := make([]error, len(members))
	giveUp := make(chan struct{})
	fail := sync.OnceFunc(func() { close(giveUp) })
	for i, m := range members {
		wg.Go(func() {
			if errs[i] = m.start(giveUp); errs[i] != nil {
				fail()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// newMembers chooses free ports for the members of a cluster, and writes their configuration to dir.
func newMembers(dir, binary string, n int, failed func(error), settings []Settings) ([]*Member, error) {
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
			"unsafe-no-fsync":     true, // a test need not survive a power cut
			"logger":              "zap",
			"log-outputs":         []string{"stderr"},
			"log-level":           "fatal",
		}
		if n > 1 { // on a busy machine, slow heartbeats must not cause an election
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
		members[i] = &Member{
			Endpoint: clients[i],
			binary:   binary,
			config:   filepath.Join(dir, name+".json"),
			health:   healths[i],
			failed:   failed,
		}
		if err := os.WriteFile(members[i].config, text, 0o600); err != nil {
			return nil, err
		}
	}
	return members, nil
}

// FreeAddresses returns n addresses on loopback on which nobody listens.
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
func (m *Member) Start() error { return m.start(nil) }

// start is Start, and gives up when the channel is closed.
func (m *Member) start(giveUp <-chan struct{}) (err error) {
	if m.binary == "" {
		m.server, err = startEmbedded(m.config, giveUp, m.failed)
	} else {
		m.server, err = startProcess(m, giveUp)
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
type embedded struct {
	etcd     *embed.Etcd
	failure  *failure
	stopping chan struct{}
	watch    sync.WaitGroup // of the goroutine that closes the etcd when it fails or stop is called
}

// startEmbedded runs an etcd until stop is called. If the etcd fails after startEmbedded has returned, failed is called
// and the etcd is closed.
func startEmbedded(config string, giveUp <-chan struct{}, failed func(error)) (server, error) {
	cfg, err := embed.ConfigFromFile(config)
	if err != nil {
		return nil, err
	}
	f := newFailure()
	logger := cfg.GetLogger().WithOptions(zap.WithPanicHook(f), zap.WithFatalHook(f))
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(logger)
	var etcd *embed.Etcd
	returned := make(chan struct{})
	go func() { // a failure ends the goroutine it happens on, and then returned is closed too
		defer close(returned)
		etcd, err = embed.StartEtcd(cfg)
	}()
	select {
	case <-returned:
	case <-f.known:
		select {
		case <-returned:
		case <-time.After(stopTimeout):
			return nil, f.err
		}
	}
	if etcd == nil {
		if err == nil {
			err = f.err // StartEtcd leaves its listeners open, and nothing can close them
		}
		return nil, err
	}
	s := &embedded{etcd: etcd, failure: f, stopping: make(chan struct{})}
	select {
	case <-etcd.Server.ReadyNotify():
		s.watch.Go(func() {
			select {
			case <-f.known:
				failed(f.err)
				s.close()
			case <-s.stopping:
				if s.close(); f.happened() {
					failed(f.err)
				}
			}
		})
		return s, nil
	case err = <-etcd.Err():
	case <-f.known:
		err = f.err
	case <-giveUp:
		err = errGivenUp
	case <-time.After(startTimeout):
		err = errNotReady
	}
	s.close()
	return nil, err
}

func (s *embedded) stop() {
	close(s.stopping)
	s.watch.Wait()
}

// close returns once etcd has closed. An etcd that has failed may never close, because the goroutine that failed may
// hold locks. close then returns after stopTimeout; by then at least the clients are disconnected.
func (s *embedded) close() {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		if !s.failure.happened() {
			s.etcd.Server.HardStop()
		}
		s.etcd.Close()
	}()
	select {
	case <-closed:
	case <-s.failure.known:
		select {
		case <-closed:
		case <-time.After(stopTimeout):
		}
	}
}

// A failure is the first message that etcd has logged at level panic or fatal. etcd does so when it cannot write to its
// disk, for example. By default that ends the process. As a hook of the logger, a failure ends only the goroutine: etcd
// relies on not running any further there.
type failure struct {
	once  sync.Once
	known chan struct{}
	err   error // once known is closed
}

func newFailure() *failure { return &failure{known: make(chan struct{})} }

func (f *failure) happened() bool {
	select {
	case <-f.known:
		return true
	default:
		return false
	}
}

// OnWrite is called by the logger after it has written the message.
func (f *failure) OnWrite(message *zapcore.CheckedEntry, fields []zapcore.Field) {
	f.once.Do(func() {
		f.err = fmt.Errorf("%w: %s", errFailed, message.Message)
		for _, field := range fields {
			if err, ok := field.Interface.(error); ok {
				f.err = fmt.Errorf("%w: %w", f.err, err)
			}
		}
		close(f.known)
	})
	runtime.Goexit()
}

// NewClient returns a client of the endpoints. It is closed with the test.
func NewClient(tb testing.TB, endpoints ...string) *clientv3.Client {
	tb.Helper()
	return NewClientFrom(tb, clientv3.Config{Endpoints: endpoints})
}

// NewClientFrom is NewClient with other settings for the client.
func NewClientFrom(tb testing.TB, cfg clientv3.Config) *clientv3.Client {
	tb.Helper()
	cfg.Logger = zap.NewNop()
	client, err := clientv3.New(cfg)
	if err != nil {
		tb.Fatalf("new client: %v", err)
	}
	tb.Cleanup(func() { client.Close() }) // it fails if the test has closed it already
	return client
}

// Patience is how long a test waits for an event that must come. It says nothing of how soon the event should come.
const Patience = 30 * time.Second

// Await returns what comes from a channel, or its zero value when the channel is closed. The test fails if that takes
// longer than [Patience]; what names in the message what was waited for. As Fatalf, it must be called in the test's
// goroutine.
func Await[T any](tb testing.TB, what string, c <-chan T) T {
	tb.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(Patience):
		tb.Fatalf("waited in vain for %s", what)
		panic("not reached")
	}
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
	dir, err := socketDir()
	if err != nil {
		return nil, err
	}
	return startLink(to, dir)
}

// maxSocketPath is the length of the longest path that macOS and the BSDs accept for a unix socket. Linux accepts 107.
const maxSocketPath = 103

// socketDir makes a folder for a socket whose name is one letter. The folder is in the one for temporary files, or in
// /tmp if the path would be too long there. It cannot be tb.TempDir, whose path contains the name of the test.
func socketDir() (string, error) {
	const pattern, longest = "link", "link4294967295"
	if len(filepath.Join(os.TempDir(), longest, "s")) <= maxSocketPath {
		return os.MkdirTemp("", pattern)
	}
	dir, err := os.MkdirTemp("/tmp", pattern)
	if err != nil {
		return "", fmt.Errorf("%s is too long for the path of a unix socket, and /tmp fails: %w", os.TempDir(), err)
	}
	return dir, nil
}

// startLink is StartLink with a folder for its socket. Close removes the folder.
func startLink(to, dir string) (*Link, error) {
	socket := filepath.Join(dir, "s")
	server := proxy.NewServer(proxy.ServerConfig{
		Logger: zap.NewNop(),
		From:   url.URL{Scheme: "unix", Host: socket},
		To:     url.URL{Scheme: "tcp", Host: to},
	})
	select {
	case <-server.Ready():
	case <-server.Done(): // it cannot listen
		os.RemoveAll(dir)
		return nil, <-server.Error()
	}
	ctx, cancel := context.WithCancel(context.Background())
	drained := make(chan struct{})
	go func() { // the proxy stops when nobody reads its errors
		defer close(drained)
		for {
			select {
			case err := <-server.Error():
				_ = err // its connections fail on purpose
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
	return l, nil
}

// Close ends the link. A second call does nothing.
func (l *Link) Close() { l.close() }

// Darken holds everything back, in both directions and without a sign, until Heal. As with TCP, what is held back
// arrives late, after Heal. If the link was paused before, Darken lets data through for a moment: the proxy would
// otherwise drop what it holds.
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

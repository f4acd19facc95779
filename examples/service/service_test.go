//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
)

// instanceEnv tells a process of the test's own binary to be an instance of the service. So it has
// the race detector if the test has it.
const instanceEnv = "SERVICE_TEST_INSTANCE"

func TestMain(m *testing.M) {
	if os.Getenv(instanceEnv) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// An instance is a process of the service.
type instance struct {
	cmd     *exec.Cmd
	address chan string // of its listener; closed when the instance has ended
	url     string      // once it listens
	log     bytes.Buffer
	exited  chan struct{} // closed when the process has ended, after which log is complete
}

// start runs an instance until the test ends, and waits until it listens. env is name=value each.
func start(t *testing.T, env ...string) *instance {
	t.Helper()
	i := launch(t, env...)
	select {
	case a, ok := <-i.address:
		if !ok {
			t.Fatal("the instance has ended")
		}
		i.url = "http://" + a
	case <-time.After(patience):
		t.Fatal("the instance does not listen")
	}
	return i
}

// launch is start without the wait.
func launch(t *testing.T, env ...string) *instance {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	i := &instance{
		cmd:     exec.Command(self, "-listen", "127.0.0.1:0"),
		address: make(chan string, 1),
		exited:  make(chan struct{}),
	}
	i.cmd.Env = append(os.Environ(), append(env, instanceEnv+"=1")...)
	i.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stderr, err := i.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := i.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(i.exited)
		defer close(i.address)
		lines := bufio.NewScanner(stderr)
		lines.Buffer(nil, 10<<20) // a line that is too long must not stop the instance
		for lines.Scan() {
			i.log.WriteString(lines.Text() + "\n")
			var line struct{ Msg, Address string }
			if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "listening" {
				i.address <- line.Address
			}
		}
		_ = i.cmd.Wait() // the exit code says it
	}()
	t.Cleanup(func() {
		_ = i.cmd.Process.Kill() // an error says that it has ended
		<-i.exited
		if strings.Contains(i.log.String(), "DATA RACE") {
			t.Error("an instance has a data race")
		}
		if t.Failed() {
			t.Logf("log of pid %d:\n%s", i.cmd.Process.Pid, i.log.String())
		}
	})
	return i
}

// exitCode waits until the instance has ended.
func (i *instance) exitCode(t *testing.T) int {
	t.Helper()
	select {
	case <-i.exited:
	case <-time.After(patience):
		t.Fatal("the instance goes on")
	}
	return i.cmd.ProcessState.ExitCode()
}

func (i *instance) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := i.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// get returns the answer to a request, or 0 if there is none.
func (i *instance) get(path string) (code int, body string) {
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(i.url + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(text)
}

func (i *instance) ready() bool {
	code, _ := i.get("/readyz")
	return code == http.StatusOK
}

// leads returns what the instance says of the leader, and whether that is itself.
func (i *instance) leads() (s status, self bool) {
	code, body := i.get("/leader")
	if code != http.StatusOK || json.Unmarshal([]byte(body), &s) != nil {
		return status{}, false
	}
	return s, s.Self
}

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

func await(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for began := time.Now(); !happened(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// pair starts two instances, and returns them when one leads and the other knows it.
func pair(t *testing.T, env ...string) (leader, follower *instance, led status) {
	t.Helper()
	leader, follower = start(t, env...), start(t, env...)
	await(t, "one of two to lead", func() bool {
		s, self := leader.leads()
		other, otherSelf := follower.leads()
		if otherSelf {
			leader, follower = follower, leader
		}
		led = s
		return self != otherSelf && s.Token != 0 && s.Token == other.Token && s.Leader == other.Leader
	})
	if !leader.ready() || !follower.ready() {
		t.Error("leader or follower is not ready")
	}
	return leader, follower, led
}

// ticks returns how many ticks there are.
func ticks(t *testing.T, client *clientv3.Client) int64 {
	t.Helper()
	resp, err := client.Get(t.Context(), ticksKey("service/leader"))
	if err != nil {
		t.Fatal(err)
	}
	if resp.Count == 0 {
		return 0
	}
	return resp.Kvs[0].Version
}

func TestFollowerTakesOverWhenTheLeaderIsKilled(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	client := etcdtest.NewClient(t, m.Endpoint)
	leader, follower, led := pair(t, "SERVICE_ENDPOINTS="+m.Endpoint, "SERVICE_TTL=2s")
	await(t, "the leader's work", func() bool { return ticks(t, client) > 1 })

	leader.signal(t, syscall.SIGKILL)
	<-leader.exited
	done := ticks(t, client)
	await(t, "the follower to lead", func() bool { _, self := follower.leads(); return self })
	if s, _ := follower.leads(); s.Token <= led.Token {
		t.Errorf("token %d came after token %d", s.Token, led.Token)
	}
	await(t, "the work to go on", func() bool { return ticks(t, client) > done })
	if _, body := follower.get("/metrics"); !strings.Contains(body, `leader_is_leader{election="service/leader"} 1`) {
		t.Errorf("the metrics do not say that it leads:\n%s", body)
	}
}

// Nobody would wait for this TTL.
func TestFollowerTakesOverAtOnceWhenTheLeaseOfAKilledLeaderIsReclaimed(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	path := filepath.Join(t.TempDir(), "lease")
	env := []string{"SERVICE_ENDPOINTS=" + m.Endpoint, "SERVICE_TTL=5m"}
	first := start(t, append(env, "SERVICE_LEASE_FILE="+path)...)
	await(t, "the first to lead", func() bool { _, self := first.leads(); return self })
	follower := start(t, env...)
	await(t, "the other to know that", func() bool { s, _ := follower.leads(); return s.Token != 0 })

	first.signal(t, syscall.SIGKILL)
	if err := leader.Reclaim(t.Context(), etcdtest.NewClient(t, m.Endpoint), path); err != nil { // as a sidecar does
		t.Fatal(err)
	}
	await(t, "the follower to lead", func() bool { _, self := follower.leads(); return self })
}

func TestWritesReachTheLeaderThroughEachInstance(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	leader, follower, led := pair(t, "SERVICE_ENDPOINTS="+m.Endpoint)
	for _, i := range []*instance{leader, follower} {
		resp, err := http.Post(i.url+"/ticks", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		var answer struct{ Ticks, Token int64 }
		err = json.NewDecoder(resp.Body).Decode(&answer)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || answer.Token != led.Token || answer.Ticks == 0 {
			t.Errorf("a write was answered %s with %+v, %v; want the token %d", resp.Status, answer, err, led.Token)
		}
	}
}

// Nobody would wait for this TTL.
func TestSIGTERMHandsOverAtOnceAndExitsWithZero(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	leader, follower, led := pair(t, "SERVICE_ENDPOINTS="+m.Endpoint, "SERVICE_TTL=5m")
	leader.signal(t, syscall.SIGTERM)
	await(t, "the follower to lead", func() bool { _, self := follower.leads(); return self })
	if s, _ := follower.leads(); s.Token <= led.Token {
		t.Errorf("token %d came after token %d", s.Token, led.Token)
	}
	if code := leader.exitCode(t); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}

func TestWithoutEtcdTheServiceLivesAndIsNotReadyUntilItIsThere(t *testing.T) {
	t.Parallel()
	link := etcdtest.NewLink(t, etcdtest.Start(t))
	link.Darken()
	i := start(t, "SERVICE_ENDPOINTS="+link.Endpoint)
	for path, want := range map[string]int{
		"/livez":   http.StatusOK,
		"/metrics": http.StatusOK,
		"/readyz":  http.StatusServiceUnavailable,
		"/leader":  http.StatusServiceUnavailable,
	} {
		if code, body := i.get(path); code != want {
			t.Errorf("%s without etcd: %d %s, want %d", path, code, body, want)
		}
	}
	link.Heal()
	await(t, "the instance to be ready", i.ready)

	link.Darken()
	if !i.ready() {
		t.Error("the loss of etcd took an instance that knew who leads out of service")
	}
	i.signal(t, syscall.SIGTERM)
	if code := i.exitCode(t); code != 0 {
		t.Errorf("exit code %d without etcd, want 0", code)
	}
}

// It waits for etcd then, which has the password to check. The test waits for its connection, so that the signal
// comes neither before that nor before the process handles signals.
func TestSIGTERMEndsAnInstanceWithAPasswordThatEtcdDoesNotAnswer(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	i := launch(t, "SERVICE_ENDPOINTS="+silent.Addr().String(), "SERVICE_USER=root", "SERVICE_PASSWORD=open sesame")
	if err := silent.(*net.TCPListener).SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	conn, err := silent.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	began := time.Now()
	i.signal(t, syscall.SIGTERM)
	if code := i.exitCode(t); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it ended %v after the signal, as its wait for etcd did", took)
	}
}

func TestLargeValueOfAnotherCandidateIsCutInAnswerAndLog(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	session, err := concurrency.NewSession(etcdtest.NewClient(t, m.Endpoint))
	if err != nil {
		t.Fatal(err)
	}
	value := "x" + strings.Repeat("é", 1<<19) // the byte at which it is cut is the second of an é
	if err := concurrency.NewElection(session, "service/leader").Campaign(t.Context(), value); err != nil {
		t.Fatal(err)
	}
	i := start(t, "SERVICE_ENDPOINTS="+m.Endpoint)
	await(t, "the instance to be ready", i.ready)

	code, body := i.get("/leader")
	var s status
	if err := json.Unmarshal([]byte(body), &s); err != nil || code != http.StatusOK {
		t.Fatalf("/leader: %d, %v", code, err)
	}
	const shown = 255
	if s.Leader != value[:shown] || s.Cut != len(value)-shown || s.Token == 0 || s.Self || len(body) > 1000 {
		t.Errorf("/leader answers %d bytes: %d bytes of the value, token %d, self %v, and %d bytes are missing; want %d and %d",
			len(body), len(s.Leader), s.Token, s.Self, s.Cut, shown, len(value)-shown)
	}

	i.signal(t, syscall.SIGTERM)
	i.exitCode(t)
	for line := range strings.Lines(i.log.String()) {
		if len(line) > 1000 {
			t.Errorf("a line of %d bytes is logged: %.200s…", len(line), line)
		}
	}
	if missing := fmt.Sprintf(`"cut":%d`, len(value)-shown); !strings.Contains(i.log.String(), missing) {
		t.Errorf("no line of the log says %s", missing)
	}
}

// A nat forwards connections. When it forgets those that there are, it drops what either end sends and tells neither.
// New connections work.
type nat struct {
	net.Listener
	dropping atomic.Pointer[atomic.Bool] // shared by the connections since the last forget
}

// startNAT forwards to an address, host:port, until the test ends. Clients must end before.
func startNAT(t *testing.T, to string) *nat {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &nat{Listener: listener}
	n.dropping.Store(new(atomic.Bool))
	var loops sync.WaitGroup
	loops.Go(func() {
		for {
			client, err := n.Accept()
			if err != nil {
				return // the test has ended
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				client.Close()
				continue
			}
			dropping := n.dropping.Load()
			loops.Go(func() { forward(server, client, dropping) })
			loops.Go(func() { forward(client, server, dropping) })
		}
	})
	t.Cleanup(func() {
		n.Close()
		loops.Wait()
	})
	return n
}

// forward copies until one of the connections ends, and closes the one that it copies to.
func forward(to, from net.Conn, dropping *atomic.Bool) {
	defer to.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if dropping.Load() {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

func (n *nat) forget() { n.dropping.Swap(new(atomic.Bool)).Store(true) }

// Without keepalive it would not lead again for as long as TCP tries.
func TestInstanceLeadsAgainAfterItsConnectionDiedWithoutASign(t *testing.T) {
	t.Parallel()
	n := startNAT(t, etcdtest.Start(t).Endpoint)
	i := start(t, "SERVICE_ENDPOINTS="+n.Addr().String(), "SERVICE_TTL=2s")
	var led status
	await(t, "the instance to lead", func() (self bool) { led, self = i.leads(); return self })
	n.forget()
	await(t, "the instance to lead again", func() bool {
		s, self := i.leads()
		return self && s.Token > led.Token
	})
}

func TestTLSAndPassword(t *testing.T) {
	t.Parallel()
	certificate, err := transport.SelfCert(zap.NewNop(), t.TempDir(), []string{"127.0.0.1:0"}, 1, x509.ExtKeyUsageClientAuth)
	if err != nil {
		t.Fatal(err)
	}
	m := etcdtest.Start(t, cheapPasswords, etcdtest.Settings{"client-transport-security": etcdtest.Settings{
		"cert-file":        certificate.CertFile,
		"key-file":         certificate.KeyFile,
		"trusted-ca-file":  certificate.CertFile,
		"client-cert-auth": true,
	}})
	cfg := config{endpoints: []string{m.Endpoint}, ca: certificate.CertFile, cert: certificate.CertFile, key: certificate.KeyFile}
	client, err := cfg.client(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	enableAuth(t, client)
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("open sesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	i := start(t, "SERVICE_ENDPOINTS=https://"+m.Endpoint, "SERVICE_CA="+certificate.CertFile, "SERVICE_CERT="+certificate.CertFile,
		"SERVICE_KEY="+certificate.KeyFile, "SERVICE_USER=root", "SERVICE_PASSWORD_FILE="+password)
	await(t, "the instance to lead", func() bool { _, self := i.leads(); return self })
}

func TestInstanceWithoutPermissionExitsWithOne(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, cheapPasswords)
	enableAuth(t, etcdtest.NewClient(t, m.Endpoint))
	i := start(t, "SERVICE_ENDPOINTS="+m.Endpoint, "SERVICE_USER=guest", "SERVICE_PASSWORD=open sesame")
	if code := i.exitCode(t); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
}

// cheapPasswords keeps etcd from spending seconds on a password, as it does under the race detector.
var cheapPasswords = etcdtest.Settings{"bcrypt-cost": 4}

// enableAuth makes etcd ask for a password, which is "open sesame", of root, and of a guest without any
// permission.
func enableAuth(t *testing.T, client *clientv3.Client) {
	t.Helper()
	var err error
	for _, user := range []string{"root", "guest"} {
		_, uerr := client.UserAdd(t.Context(), user, "open sesame")
		err = errors.Join(err, uerr)
	}
	_, rerr := client.UserGrantRole(t.Context(), "root", "root")
	_, aerr := client.AuthEnable(t.Context())
	if err := errors.Join(err, rerr, aerr); err != nil {
		t.Fatal(err)
	}
}

// The service resigns after SIGTERM has ended its context.
func TestClientDoesNotEndWithTheContextThatItWasMadeUnder(t *testing.T) {
	cfg := config{endpoints: []string{"127.0.0.1:1"}}
	ctx, cancel := context.WithCancel(t.Context())
	client, err := cfg.client(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	cancel()
	if err := client.Ctx().Err(); err != nil {
		t.Errorf("the client has ended: %v", err)
	}
	if _, err := cfg.client(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a client under a context that has ended: %v, want %v", err, context.Canceled)
	}
}

func TestFlagWinsOverEnvironment(t *testing.T) {
	env := map[string]string{"SERVICE_TTL": "7s", "SERVICE_LISTEN": "127.0.0.1:1"}
	c, err := parse([]string{"-listen", "127.0.0.1:2", "-embedded"}, func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	if c.ttl != 7*time.Second || c.listen != "127.0.0.1:2" {
		t.Errorf("ttl is %v and listen %s, want 7s from the environment and 127.0.0.1:2 from the flag", c.ttl, c.listen)
	}
}

func TestBadSettingsAreRefused(t *testing.T) {
	for _, c := range []struct {
		args []string
		env  string // of SERVICE_TTL
		want string
	}{
		{args: []string{"serve"}, want: `"serve" is not a flag`},
		{env: "soon", want: "SERVICE_TTL=soon: parse error"},
		{args: []string{"-endpoints", "a:1,,b:2"}, want: "-endpoints a:1,,b:2: must not have an empty one"},
		{want: "-endpoints: must be given, or -embedded"},
		{args: []string{"-endpoints", "a:1", "-embedded"}, want: "and not both"},
		{args: []string{"-embedded", "-ca", "ca.pem"}, want: "must be given with -endpoints"},
		{args: []string{"-endpoints", "a:1", "-advertise", "a:1"}, want: "-advertise a:1: must be a URL with http:// or https://"},
		{args: []string{"-endpoints", "a:1", "-advertise", "http://fd00::1:8080"}, want: "an IPv6 address in brackets"},
		{args: []string{"-endpoints", "a:1", "-listen", ":8080"}, want: "-advertise: must be given with -listen :8080"},
		{args: []string{"-endpoints", "a:1", "-listen", "[::]:8080"}, want: "-advertise: must be given with -listen [::]:8080"},
		{args: []string{"-endpoints", "a:1", "-key", "key.pem"}, want: "-cert and -key: must be given together"},
		{args: []string{"-endpoints", "http://a:1", "-ca", "ca.pem"}, want: "must not be http:// with -ca"},
		{args: []string{"-endpoints", "a:1", "-user", "root"}, want: "-user: must be given together with a password"},
		{args: []string{"-password-file", "/nonexistent"}, want: "-password-file: open /nonexistent"},
		{args: []string{"-embedded", "-election", "jobs/"}, want: `-election "jobs/": must not be empty or end in a slash`},
	} {
		_, err := parse(c.args, func(name string) string {
			if name == "SERVICE_TTL" {
				return c.env
			}
			return ""
		})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: error is %v, want one with %q", c.args, err, c.want)
		}
	}
}

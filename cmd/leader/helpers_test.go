//go:build unix

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// selfEnv makes a process of the test's own binary the command.
const selfEnv = "LEADER_TEST_COMMAND"

// member is the etcd of most tests. Each test has elections of its own there.
var member *etcdtest.Member

func TestMain(m *testing.M) {
	if os.Getenv(selfEnv) != "" {
		os.Exit(execute())
	}
	members, stop, err := etcdtest.Run(1)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	member = members[0]
	status := m.Run()
	stop()
	os.Exit(status)
}

// command returns the command with these arguments, for the shared etcd.
func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "ETCDCTL_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, selfEnv+"=1", "ETCDCTL_ENDPOINTS="+member.Endpoint,
		"ETCDCTL_DIAL_TIMEOUT=30s", "ETCDCTL_COMMAND_TIMEOUT=30s", "GORACE=halt_on_error=1")
	return cmd
}

// A result is what a command has printed, and its status.
type result struct {
	out, err string
	status   int
}

func outcome(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	ctx, cancel := context.WithTimeout(t.Context(), etcdtest.Patience)
	defer cancel()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
	_ = cmd.Wait() // its status says it
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

// leaderDo runs the command to its end.
func leaderDo(t *testing.T, args ...string) result {
	t.Helper()
	return outcome(t, command(t, args...))
}

// want checks a status and what is printed on either stream.
func (r result) want(t *testing.T, status int, parts ...string) {
	t.Helper()
	if r.status != status {
		t.Errorf("status %d, want %d\n%s%s", r.status, status, r.out, r.err)
	}
	for _, part := range parts {
		if !strings.Contains(r.out+r.err, part) {
			t.Errorf("%q is missing in\n%s%s", part, r.out, r.err)
		}
	}
}

// A running is a command under way.
type running struct {
	*exec.Cmd
	lines chan string // of both streams
	ended chan struct{}

	mu  sync.Mutex
	all strings.Builder
}

// begin starts a command, which is killed at the end of the test.
func begin(t *testing.T, cmd *exec.Cmd) *running {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	p := &running{Cmd: cmd}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	p.follow(t, r)
	return p
}

func (p *running) follow(t *testing.T, r io.ReadCloser) {
	p.lines, p.ended = make(chan string, 10000), make(chan struct{})
	go func() {
		_ = p.Wait() // its status says it
		close(p.ended)
	}()
	go func() {
		for s := bufio.NewScanner(r); s.Scan(); {
			p.mu.Lock()
			p.all.WriteString(s.Text() + "\n")
			p.mu.Unlock()
			p.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		_ = p.Process.Signal(syscall.SIGTERM) // fails if it has ended
		select {
		case <-p.ended:
		case <-time.After(etcdtest.Patience):
			_ = p.Process.Kill()
			<-p.ended
		}
		r.Close()
		if t.Failed() {
			t.Logf("%s:\n%s", strings.Join(p.Args[1:], " "), p.said())
		}
	})
}

func leaderBegin(t *testing.T, args ...string) *running {
	t.Helper()
	return begin(t, command(t, args...))
}

func (p *running) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.all.String()
}

// line waits for a line with this part.
func (p *running) line(t *testing.T, part string) string {
	t.Helper()
	timeout := time.After(etcdtest.Patience)
	for {
		select {
		case line := <-p.lines:
			if strings.Contains(line, part) {
				return line
			}
		case <-timeout:
			t.Fatalf("waited in vain for %q in\n%s", part, p.said())
		}
	}
}

func (p *running) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// end waits for the end and checks the status.
func (p *running) end(t *testing.T, status int) {
	t.Helper()
	etcdtest.Await(t, "the end of the command", p.ended)
	if got := p.ProcessState.ExitCode(); got != status {
		t.Errorf("status %d, want %d\n%s", got, status, p.said())
	}
}

// await polls until a condition holds that no event tells.
func await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for began := time.Now(); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > etcdtest.Patience {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// alive reports whether a process runs. A zombie does not.
func alive(pid string) bool {
	id, err := strconv.Atoi(strings.TrimSpace(pid))
	if err != nil || errors.Is(syscall.Kill(id, 0), syscall.ESRCH) {
		return false
	}
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(id), "stat"))
	_, state, ok := strings.Cut(string(stat), ") ")
	return err != nil || !ok || state[0] != 'Z'
}

// keys returns the keys of an election.
func keys(t *testing.T, name string) []string {
	t.Helper()
	resp, err := etcdtest.NewClient(t, member.Endpoint).Get(t.Context(), name+"/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		t.Fatal(err)
	}
	var ks []string
	for _, kv := range resp.Kvs {
		ks = append(ks, string(kv.Key))
	}
	return ks
}

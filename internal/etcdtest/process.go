//go:build unix

package etcdtest

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// memberEnv tells a process of the test's own binary to be a member.
const memberEnv = "ETCDTEST_MEMBER"

// Main runs the process as a member of a cluster if [StartProcesses] has started it as one, and
// does not return then. A TestMain of a package that uses StartProcesses begins with it.
func Main() {
	text := os.Getenv(memberEnv)
	if text == "" {
		return
	}
	if err := serve(text); err != nil {
		fmt.Fprintln(os.Stderr, "etcd member:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serve runs a member until standard input ends, as it does when the test ends, in whatever way.
func serve(text string) error {
	var s spec
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return err
	}
	m := &Member{cfg: *s.config()}
	if err := m.Start(); err != nil {
		return err
	}
	fmt.Println("ready")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err // without Stop: the test removes the data
}

// A Process is a member that runs in a process of its own, which can be paused.
type Process struct {
	Endpoint string

	cmd *exec.Cmd
}

// StartProcesses runs a cluster of n members, each in a process of its own, until the test ends.
func StartProcesses(tb testing.TB, n int) []*Process {
	tb.Helper()
	specs, err := newSpecs(tb.TempDir(), n)
	if err != nil {
		tb.Fatal(err)
	}
	processes, ready := make([]*Process, n), make([]<-chan error, n)
	for i, s := range specs {
		processes[i], ready[i] = startProcess(tb, s)
	}
	for _, r := range ready {
		select {
		case err := <-r:
			if err != nil {
				tb.Fatalf("etcd member is not ready: %v", err)
			}
		case <-time.After(startTimeout):
			tb.Fatalf("etcd member is not ready after %v", startTimeout)
		}
	}
	return processes
}

func startProcess(tb testing.TB, s spec) (*Process, <-chan error) {
	tb.Helper()
	text, err := json.Marshal(s)
	if err != nil {
		tb.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), memberEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	if _, err := cmd.StdinPipe(); err != nil { // open for as long as this process lives
		tb.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	ready := make(chan error, 1)
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, err := io.ReadFull(stdout, make([]byte, len("ready\n")))
		ready <- err
	}()
	tb.Cleanup(func() {
		_ = cmd.Process.Kill() // paused or not; an error says that it has ended
		<-read
		_ = cmd.Wait() // says that it was killed
	})
	return &Process{Endpoint: s.Client, cmd: cmd}, ready
}

// Pause stops the process where it is, until Resume.
func (p *Process) Pause() error { return p.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume lets a paused process go on.
func (p *Process) Resume() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

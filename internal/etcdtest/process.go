//go:build linux

package etcdtest

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// memberEnv makes a process of the test's own binary a member. It contains the path of the member's configuration.
const memberEnv = "ETCDTEST_MEMBER"

// Main runs the process as a member of a cluster if [StartProcesses] has started it as one. It then never returns. If a
// package uses StartProcesses, its TestMain must call Main first.
func Main() {
	config := os.Getenv(memberEnv)
	if config == "" {
		return
	}
	if _, err := startEmbedded(config, nil, exit); err != nil {
		exit(err)
	}
	select {} // until the process is killed
}

// StartProcesses is [StartCluster] with each member in a process of its own, which can be paused.
func StartProcesses(tb testing.TB, n int, settings ...Settings) []*Member {
	tb.Helper()
	self, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	return startCluster(tb, cmp.Or(os.Getenv(binaryEnv), self), n, settings...)
}

// Pause stops the process of a member until Resume.
func (m *Member) Pause() error { return m.signal(syscall.SIGSTOP) }

// Resume continues a paused process.
func (m *Member) Resume() error { return m.signal(syscall.SIGCONT) }

func (m *Member) signal(s os.Signal) error {
	p, ok := m.server.(*process)
	if !ok {
		return errors.New("etcdtest: not a running process")
	}
	return p.cmd.Process.Signal(s)
}

// A process is a server in a process of its own.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

// startProcess runs a member's binary until stop is called, or until this process ends for any reason.
func startProcess(m *Member, giveUp <-chan struct{}) (server, error) {
	cmd := exec.Command(m.binary, "--config-file", m.config)
	cmd.Env = append(os.Environ(), memberEnv+"="+m.config)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	go func() {
		defer close(p.exited)
		_ = cmd.Wait() // the error is that it was killed; otherwise stderr says why it ended
	}()
	for began := time.Now(); time.Since(began) < startTimeout; {
		if healthy(m.health) {
			return p, nil
		}
		select {
		case <-p.exited:
			return nil, fmt.Errorf("%s has ended: %v: %s", m.binary, cmd.ProcessState, stderr.String())
		case <-giveUp:
			p.stop()
			return nil, errGivenUp
		case <-time.After(20 * time.Millisecond):
		}
	}
	p.stop()
	return nil, fmt.Errorf("%w: %s", errNotReady, stderr.String())
}

func (p *process) stop() {
	_ = p.cmd.Process.Kill() // works while it is paused too; fails if it has ended
	<-p.exited
}

// healthy reports whether a member answers linearizable reads.
func healthy(address string) bool {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + address + "/health")
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

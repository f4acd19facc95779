//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"example.com/leader/internal/oracle"
)

// Kinds of processes: members of etcd, candidates that use this package, and what reclaims the leases of one of these.
const (
	sortMember    = "member"
	sortCandidate = "candidate"
	sortSidecar   = "sidecar"
)

// A process is a process of the system under test. It can be started again after it has ended.
type process struct {
	name, sort string
	command    func() *exec.Cmd
	dir        string   // for its output
	asks       int      // to how many members, counted from the first, a worker sends requests
	sidecar    *process // of a worker that has a lease file
	recorder   *Recorder

	mu      sync.Mutex
	cmd     *exec.Cmd
	asked   bool // was asked to end
	killed  bool
	told    int64         // when it was told to end, or 0
	heirs   string        // what becomes of its leases then
	exited  chan struct{} // closed when the end has been recorded
	started int           // how many times
}

// start runs the process. It is killed when the process that runs the campaign dies, even while paused.
func (p *process) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.started++
	output, err := os.OpenFile(filepath.Join(p.dir, p.name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer output.Close()
	cmd := p.command()
	cmd.Stderr = output
	if cmd.Stdout == nil {
		cmd.Stdout = output
	}
	// A process group of its own, so that Ctrl-C reaches only the campaign.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	p.cmd = cmd
	p.recorder.add(oracle.Entry{Kind: oracle.Start, Proc: p.name, Op: p.sort})
	p.asked, p.killed, p.told, p.heirs, p.exited = false, false, 0, "", make(chan struct{})
	go p.wait(p.cmd, p.exited)
	return nil
}

// wait records the end of the process.
func (p *process) wait(cmd *exec.Cmd, exited chan struct{}) {
	defer close(exited)
	err := cmd.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	e := oracle.Entry{Kind: oracle.Exit, Proc: p.name, From: p.told, Op: p.heirs, Result: oracle.OK}
	if err != nil {
		e.Err = err.Error()
	}
	if !p.killed && (!p.asked || err != nil) {
		e.Result = oracle.Failed
		e.Err = fmt.Sprintf("%s, see %s.log", e.Err, p.name)
	}
	p.recorder.add(e)
}

// end notes that the process is now told to end, and who can revoke its leases then.
func (p *process) end() {
	p.told = now()
	switch {
	case p.sidecar == nil:
	case p.sidecar.alive():
		p.heirs = oracle.Attended
	default:
		p.heirs = oracle.Filed
	}
}

// alive reports whether the process runs.
func (p *process) alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// signal sends a signal. The process may die of it.
func (p *process) signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Signal(s)
}

// disown allows the process to end in any way.
func (p *process) disown() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.killed = true
}

// kill ends the process at once, if it was ever started.
func (p *process) kill() {
	if p == nil {
		return
	}
	p.mu.Lock()
	if p.cmd == nil {
		p.mu.Unlock()
		return
	}
	p.killed = true
	p.end()
	_ = p.cmd.Process.Kill() // fails if it has ended, which is recorded
	exited := p.exited
	p.mu.Unlock()
	<-exited
}

// stop asks the process to end. It must end without an error, and within the given time.
func (p *process) stop(with syscall.Signal, within time.Duration) error {
	p.mu.Lock()
	p.asked = true
	p.end()
	exited := p.exited
	p.mu.Unlock()
	if err := p.signal(with); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-exited:
	case <-time.After(within):
		_ = p.signal(syscall.SIGQUIT) // it then writes the stacks of its goroutines to the log
		<-exited
		return fmt.Errorf("%s has not ended within %v of a signal, see %s.log", p.name, within, p.name)
	}
	return nil
}

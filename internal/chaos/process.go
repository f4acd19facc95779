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

// sortMember is the sort of a process that is a member of etcd.
const sortMember = "member"

// A process is one of the system under test. It can be started again after it has ended.
type process struct {
	name, sort string
	command    func() *exec.Cmd
	dir        string // for what it prints
	asks       int    // how many members a worker sends requests to, the first ones
	recorder   *Recorder

	mu      sync.Mutex
	cmd     *exec.Cmd
	asked   bool // to end
	killed  bool
	exited  chan struct{} // closed when the end has been recorded
	started int           // how often
}

// start runs the process. It dies with the one that runs the campaign, paused or not.
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
	// A group of its own, so that Ctrl-C is for the campaign alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	p.cmd = cmd
	p.recorder.add(oracle.Entry{Kind: oracle.Start, Proc: p.name, Op: p.sort})
	p.asked, p.killed, p.exited = false, false, make(chan struct{})
	go p.wait(p.cmd, p.exited)
	return nil
}

// wait records the end of the process.
func (p *process) wait(cmd *exec.Cmd, exited chan struct{}) {
	defer close(exited)
	err := cmd.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	e := oracle.Entry{Kind: oracle.Exit, Proc: p.name, Result: oracle.OK}
	if err != nil {
		e.Err = err.Error()
	}
	if !p.killed && (!p.asked || err != nil) {
		e.Result = oracle.Failed
		e.Err = fmt.Sprintf("%s, see %s.log", e.Err, p.name)
	}
	p.recorder.add(e)
}

// signal sends a signal that the process need not survive.
func (p *process) signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Signal(s)
}

// disown lets the process end as it likes.
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
	_ = p.cmd.Process.Kill() // an error says that it has ended, which is recorded
	exited := p.exited
	p.mu.Unlock()
	<-exited
}

// stop asks the process to end. It must do so without an error, within a time.
func (p *process) stop(with syscall.Signal, within time.Duration) error {
	p.mu.Lock()
	p.asked = true
	exited := p.exited
	p.mu.Unlock()
	if err := p.signal(with); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-exited:
	case <-time.After(within):
		_ = p.signal(syscall.SIGQUIT) // for its goroutines' stacks in the log
		<-exited
		return fmt.Errorf("%s has not ended within %v of a signal, see %s.log", p.name, within, p.name)
	}
	return nil
}

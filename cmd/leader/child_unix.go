//go:build unix

package main

import (
	"errors"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// A child is a command in a process group of its own.
type child struct {
	pid      int         // of the command, and of its group
	terminal bool        // it is in the foreground of the terminal
	modes    *term.State // of the terminal, before the command
	exited   chan struct{}
	status   int // as a shell has it, once exited is closed

	mu     sync.Mutex
	reaped bool // the pid may belong to another process
}

// startChild starts a command. It must be called in a goroutine that is locked to its thread until exited is closed.
func startChild(cmd *exec.Cmd) (*child, error) {
	c := &child{exited: make(chan struct{})}
	stdin := int(os.Stdin.Fd())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if term.IsTerminal(stdin) {
		front, err := unix.IoctlGetInt(stdin, unix.TIOCGPGRP)
		c.terminal = err == nil && front == unix.Getpgrp() && term.IsTerminal(int(os.Stdout.Fd()))
		if !c.terminal {
			cmd.Stdin = nil // the kernel would stop a process in the background that reads from the terminal
		} else if c.modes, err = term.GetState(stdin); err != nil {
			return nil, err
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	protect(cmd.SysProcAttr)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c.pid = cmd.Process.Pid
	_ = cmd.Process.Release() // wait reaps it
	if c.terminal {
		_ = unix.IoctlSetPointerInt(stdin, unix.TIOCSPGRP, c.pid) // fails if the command has ended already
		c.signal(syscall.SIGCONT)                                 // it may have read from the terminal before
	}
	go func() {
		c.wait()
		if c.terminal {
			c.leaveTerminal(stdin)
		}
		close(c.exited)
	}()
	return c, nil
}

// leaveTerminal takes the terminal back from the group, which has ended, and restores its modes, which a command that is
// killed leaves as they are. Another group may have the terminal by now, such as the shell while this process was
// stopped: then it keeps it.
func (c *child) leaveTerminal(fd int) {
	front, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	// Other systems than Linux forget a group that is gone: they return 0, or a number that no group has.
	gone := front == c.pid || front == 0 || errors.Is(unix.Kill(-front, 0), unix.ESRCH)
	if err != nil || !gone {
		return
	}
	_ = unix.IoctlSetPointerInt(fd, unix.TIOCSPGRP, unix.Getpgrp()) // fails if the terminal is gone
	_ = term.Restore(fd, c.modes)
}

// wait returns when the command has ended and no process is left in its group. On Linux this process is the parent of
// all orphans of the command (see protect), so it also reaps those that have left the group.
func (c *child) wait() {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WUNTRACED, nil)
		switch {
		case errors.Is(err, syscall.EINTR), err == nil && pid != c.pid:
		case err == nil && ws.Stopped():
			if c.terminal && ws.StopSignal() == syscall.SIGTSTP {
				newLog(false).Warn(cannotSuspend)
				c.signal(syscall.SIGCONT)
			}
		case err != nil: // not while the command is a child of this process
			c.status = exitRun
			return
		default:
			if c.status = ws.ExitStatus(); ws.Signaled() {
				c.status = exitSignalled + int(ws.Signal())
			}
			c.signal(syscall.SIGKILL) // the group exists as long as a process is in it
			c.mu.Lock()
			c.reaped = true
			c.mu.Unlock()
			for err = nil; err == nil || errors.Is(err, syscall.EINTR); {
				_, err = syscall.Wait4(-c.pid, nil, 0, nil)
			}
			return
		}
	}
}

// signal sends a signal to the group, and reports whether it was sent. A group that is gone is no error. The kernel
// refuses the signal if no process of the group may get it, as when the command runs as another user.
func (c *child) signal(s syscall.Signal) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reaped {
		return false
	}
	err := syscall.Kill(-c.pid, s)
	if err != nil && !errors.Is(err, syscall.ESRCH) {
		newLog(false).Warn("the command cannot be killed, so it works on while another instance may lead", "signal", s, "error", err)
	}
	return err == nil
}

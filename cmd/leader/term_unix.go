//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"example.com/leader"
)

// errOver ends a campaign whose command has ended, or which is not to run it again.
var errOver = errors.New("the command has ended")

// A runner is one "leader run".
type runner struct {
	runFlags
	name    string
	command []string
	log     *slog.Logger
	cancel  context.CancelCauseFunc // ends the campaign; while a command runs nobody calls it

	mu      sync.Mutex
	child   *child         // nil while no command runs
	lost    bool           // the term is over, so child is being stopped
	stopped syscall.Signal // has asked this process to end; 0 if none has
	result  error          // what to exit with; nil until the campaign is over
}

func (f runFlags) run(ctx context.Context, a *app, name string, command []string) error {
	if _, err := exec.LookPath(command[0]); err != nil {
		return notRun(err)
	}
	if f.value == "" {
		host, _ := os.Hostname()
		f.value = fmt.Sprintf("%s-%d-%d", host, time.Now().UnixMilli(), os.Getpid())
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r := &runner{runFlags: f, name: name, command: command, log: newLog(!f.quiet), cancel: cancel}
	defer r.handleSignals()()
	client, err := a.connect(ctx, true)
	if err == nil {
		defer func() { _ = client.Close() }() // everything was given back
		opts := []leader.Option{leader.WithTTL(f.ttl), leader.WithMargin(f.margin), leader.WithLogger(r.log)}
		if f.leaseFile != "" {
			opts = append(opts, leader.WithLeaseFile(f.leaseFile))
		}
		err = leader.Run(ctx, client, name, f.value, r.lead, opts...)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.result != nil:
		return r.result
	case r.stopped != 0:
		return signalled{r.stopped}.quietly()
	}
	return a.who(err)
}

// lead runs the command in one term. The context ends only with the term: nothing ends the campaign while the command
// runs.
func (r *runner) lead(ctx context.Context, l *leader.Leader) error {
	// The kernel kills the command when the thread that has started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c, err := r.start(l)
	if err != nil || c == nil {
		return err
	}
	select {
	case <-c.exited: // wins over the end of the term: a command that has ended by itself is not run again
	default:
		select {
		case <-c.exited:
		case <-ctx.Done():
			r.mu.Lock()
			r.lost = true
			r.mu.Unlock()
			r.stop(c, l, context.Cause(ctx))
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.child = nil
	switch {
	case !r.lost || r.stopped != 0:
		r.log.Info("the command has ended", "status", c.status)
		r.result = quietly(c.status)
	case !r.restart:
		r.result = statusError{exitLost, fmt.Errorf("the command was stopped: %w", context.Cause(ctx))}
	default:
		return nil
	}
	r.cancel(errOver)
	return nil
}

// start starts the command, unless a signal has come before.
func (r *runner) start(l *leader.Leader) (*child, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped != 0 {
		return nil, nil
	}
	cmd := exec.Command(r.command[0], r.command[1:]...)
	cmd.Env = append(os.Environ(),
		"LEADER_ELECTION="+r.name,
		"LEADER_VALUE="+r.value,
		"LEADER_KEY="+l.Key(),
		"LEADER_TOKEN="+strconv.FormatInt(l.Token(), 10),
		"LEADER_DEADLINE="+strconv.FormatInt(l.Deadline().Unix(), 10))
	c, err := startChild(cmd)
	if err != nil {
		r.result = notRun(err)
		r.cancel(errOver)
		return nil, err
	}
	r.child, r.lost = c, false
	r.log.Info("the command runs", "pid", c.pid)
	return c, nil
}

// stop stops the command because the term is over. It returns when no process of the command's group is left.
//
// The command is dead before another instance can be elected: nobody is while less than the margin has passed since the
// end of the term. A quarter of the margin is left for the kernel, and for clocks that do not agree. If the machine was
// suspended the monotonic clock may have stood still, so the wall clock counts too.
func (r *runner) stop(c *child, l *leader.Leader, cause error) {
	end := l.Deadline().Add(r.margin * 3 / 4)
	c.signal(syscall.SIGTERM)
	c.signal(syscall.SIGCONT) // a process that is stopped does not see the other one
	r.log.Warn("the command is being stopped", "cause", cause)
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-c.exited:
			return
		case <-ticker.C:
			if now := time.Now(); now.After(end) || now.Round(0).After(end.Round(0)) {
				if c.signal(syscall.SIGKILL) {
					r.log.Warn("the command has ignored SIGTERM and got SIGKILL")
				}
				<-c.exited
				return
			}
		}
	}
}

// handleSignals passes signals on to the command, until the function that it returns is called. It also takes those
// that would stop this process while the command runs, or end it without a resignation.
func (r *runner) handleSignals() (stop func()) {
	signal.Ignore(syscall.SIGTTOU) // of a message to a terminal that another process group has
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, wanted(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH, syscall.SIGTSTP, syscall.SIGPIPE)...)
	done := make(chan struct{})
	var handling sync.WaitGroup
	handling.Go(func() {
		for {
			select {
			case s := <-signals:
				r.handle(s.(syscall.Signal))
			case <-done:
				return
			}
		}
	})
	return func() {
		signal.Stop(signals)
		close(done)
		handling.Wait()
	}
}

func (r *runner) handle(s syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch s {
	case syscall.SIGPIPE: // nobody reads what this process writes
		return
	case syscall.SIGTSTP:
		r.log.Warn(cannotSuspend)
		return
	case syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT:
		// Many commands read their configuration on SIGHUP, or print a trace on SIGQUIT, and continue. One that dies of them,
		// as when a terminal is closed, ends the campaign by its exit. It cannot do so once its term is lost.
		if s == syscall.SIGINT || s == syscall.SIGTERM || r.child == nil || r.lost {
			r.stopped = s
		}
		if r.child == nil {
			r.cancel(signalled{s})
		} else {
			r.log.Info("passed on to the command, which still runs", "signal", s)
		}
	}
	if r.child != nil {
		r.child.signal(s)
	}
}

const cannotSuspend = "cannot be suspended: the command must be stopped when its term ends"

// notRun returns the error of a command that could not be started, with the status that shells use.
func notRun(err error) error {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return statusError{exitNotFound, err}
	}
	return statusError{exitNotRun, err}
}

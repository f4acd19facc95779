//go:build unix

package demo

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"
)

// A Process runs this program again, with other arguments. It reports what happens to it: each line of its standard
// output is an event E in JSON.
type Process[E any] struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	events chan E
	said   chan struct{} // closed when all its output has been read
}

// Start runs a process and sends its events to a channel, which all processes may share. Somebody must receive from it
// until Reap has returned.
func Start[E any](events chan E, args ...string) (*Process[E], error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the demonstration, which stops them
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Process[E]{cmd: cmd, stdin: stdin, events: events, said: make(chan struct{})}
	go func() { // Reap waits for this goroutine
		defer close(p.said)
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			var e E
			if json.Unmarshal(lines.Bytes(), &e) == nil {
				events <- e
			}
		}
	}()
	return p, nil
}

// PID is the process's id.
func (p *Process[E]) PID() int { return p.cmd.Process.Pid }

// Signal sends a signal to the process.
func (p *Process[E]) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Stop asks the process to end, even if it is paused.
func (p *Process[E]) Stop() {
	_ = p.Signal(syscall.SIGCONT) // fails if it has ended by itself
	_ = p.Signal(syscall.SIGTERM)
	_ = p.stdin.Close()
}

// Reap waits for the end of a process that was told to end, and kills it after 5 s. Meanwhile it calls handle with the
// events that the processes still send.
func (p *Process[E]) Reap(handle func(E)) {
	defer time.AfterFunc(5*time.Second, func() { _ = p.cmd.Process.Kill() }).Stop()
	for said := false; !said; {
		select {
		case e := <-p.events:
			handle(e)
		case <-p.said:
			said = true
		}
	}
	_ = p.cmd.Wait() // the error is the signal that ended it
}

// Interruptible returns a context for the demonstration itself. It ends when the demonstration is interrupted or its
// terminal is gone, and when nobody reads its output any more, so that nothing is left behind.
func Interruptible() (ctx context.Context, stop context.CancelFunc) {
	return signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
}

// Context returns a context for a process of Start. The context ends when the process is asked to end, or when the
// process that started it is gone.
func Context() (ctx context.Context, stop context.CancelFunc) {
	ctx, stop = signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt, syscall.SIGHUP, syscall.SIGPIPE)
	go func() { // runs until the process ends
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	return ctx, stop
}

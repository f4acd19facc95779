package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// childEnv tells a process of this binary which child to be.
const childEnv = "BENCH_CHILD"

// A task is what a child does.
type task struct {
	Role      string // a key of roles
	Kind      string // of contestant
	Endpoints []string
	N         int
	Seconds   int
	Election  string
	File      string // the lease file
}

// roles is what a child can be. It reports one JSON value, and ends when the parent says so or dies.
var roles = map[string]func(ctx context.Context, t task) (any, error){
	"victim":  lead,
	"owner":   own,
	"load":    loadElections,
	"waiting": loadCandidates,
}

// beChild does the task the process was started for, if it was, and does not return then.
func beChild() {
	text := os.Getenv(childEnv)
	if text == "" {
		return
	}
	var t task
	err := json.Unmarshal([]byte(text), &t)
	if err == nil {
		var answer any
		if answer, err = roles[t.Role](context.Background(), t); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(answer)
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", t.Role, err)
		os.Exit(1)
	}
	select {}
}

// A child is a process that does a task.
type child struct{ cmd *exec.Cmd }

// startChild starts a child, waits for its answer and stores that in answer. The child goes on
// until killed.
func startChild(ctx context.Context, t task, answer any) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{cmd}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, answer)
	}
	if err != nil {
		c.kill()
		return nil, fmt.Errorf("a child (%s, %s) ended: %w", t.Role, t.Kind, err)
	}
	return c, nil
}

// kill ends the child with SIGKILL and waits for its end.
func (c *child) kill() {
	_ = c.cmd.Process.Kill() // an error says that it has ended
	_ = c.cmd.Wait()
}

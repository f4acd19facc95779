//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"example.com/leader/internal/oracle"
)

// A mutation switches off one safeguard of the library, for a run that must detect it. It changes the source that the
// compiler sees, so the library itself needs no switch.
type mutation struct {
	name, safeguard string
	file, old, new  string
	// The faults that the safeguard is for, the rule that they break without it, and the TTL and the duration with
	// which they break it.
	faults   []string
	rule     string
	ttl      time.Duration
	duration time.Duration
}

var mutations = []mutation{
	{
		name: "same-term", safeguard: "a renewal counts only if a read in the same raft term follows",
		file:   "internal/lease/renew.go",
		old:    "case answer.ttl == 0, seen.term != answer.term:",
		new:    "case answer.ttl == 0:",
		faults: []string{"depose-raft-leader"}, rule: oracle.RuleLease, ttl: 15 * time.Second, duration: 2 * time.Minute,
	},
	{
		name: "old-event", safeguard: "an event counts only if it is newer than the key that it is about",
		file:   "internal/queue/wait.go",
		old:    "if ev.Kv.ModRevision <= w.rev {",
		new:    "if ev.Kv.ModRevision < 0 {",
		faults: []string{"slow-follower"}, rule: oracle.RuleExclusion, ttl: 3 * time.Second, duration: 2 * time.Minute,
	},
	{
		name: "late-deletion", safeguard: "a deletion names the create revision of what it deletes",
		file:   "internal/queue/queue.go",
		old:    "If(clientv3.Compare(clientv3.CreateRevision(key), \"=\", token)).\n\t\tThen(clientv3.OpDelete(key)).",
		new:    "Then(clientv3.OpDelete(key)).",
		faults: []string{"endpoint-late"}, rule: oracle.RuleLease, ttl: 3 * time.Second, duration: time.Minute,
	},
	{
		name: "run-context", safeguard: "the context of the function that Run calls ends with the term",
		file:   "elector.go",
		old:    "stop := context.AfterFunc(l.ctx, func() { cancel(context.Cause(l.ctx)) })",
		new:    "stop := func() bool { return true }",
		faults: []string{"link-dark"}, rule: oracle.RuleDeadline, ttl: 3 * time.Second, duration: 90 * time.Second,
	},
	{
		name: "ended", safeguard: "the end of each term is reported",
		file:   "leader.go",
		old:    "\t\t\tl.tell()\n",
		new:    "\t\t\tl.claim.observing.Wait()\n\t\t\tl.tidying.Wait()\n",
		faults: []string{"link-dark"}, rule: oracle.RuleEnded, ttl: 3 * time.Second, duration: 30 * time.Second,
	},
	{
		name: "observe", safeguard: "Observe yields who leads",
		file:   "elector.go",
		old:    "return yield(Candidate(c), nil)",
		new:    "return true",
		faults: []string{"move-raft-leader"}, rule: oracle.RuleObserve, ttl: 3 * time.Second, duration: 30 * time.Second,
	},
	{
		name: "given-up", safeguard: "a campaign that is given up deletes its key",
		file:   "leader.go",
		old:    "if l.token == 0 || lost || l.session.Gone() {",
		new:    "if l.token == 0 || lost || !elected || l.session.Gone() {",
		faults: []string{"link-slow-given-up"}, rule: oracle.RuleOrphan, ttl: 3 * time.Second, duration: time.Minute,
	},
	{
		name: "shared-lock", safeguard: "the owner of a lease file locks it against all others",
		file:   "internal/leasefile/file_linux.go",
		old:    "lock(fd, syscall.LOCK_EX)",
		new:    "lock(fd, syscall.LOCK_SH)",
		faults: []string{"kill-candidate-reclaimed"}, rule: oracle.RuleReclaim, ttl: 3 * time.Second, duration: 30 * time.Second,
	},
	{
		name: "unnamed-lease", safeguard: "a lease is in the lease file before a key is put on it",
		file:   "internal/lease/reclaim.go",
		old:    "\tp.cfg.told(p.cfg.File.Add(s.cluster, int64(s.id)))\n",
		new:    "",
		faults: []string{"kill-candidate-reclaimed"}, rule: oracle.RuleReclaim, ttl: 3 * time.Second, duration: 30 * time.Second,
	},
}

// mutationNamed returns the mutation with this name, or nil.
func mutationNamed(name string) *mutation {
	i := slices.IndexFunc(mutations, func(m mutation) bool { return m.name == name })
	if i < 0 {
		return nil
	}
	return &mutations[i]
}

// build builds the program of the workers and returns its path. It is this program, with the race detector or a
// mutation if one is asked for.
func build(ctx context.Context, dir string, race bool, m *mutation) (string, error) {
	if !race && m == nil {
		return os.Executable()
	}
	module, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("run it inside the module: %w", err)
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	binary := filepath.Join(dir, "worker")
	args := []string{"build", "-o", binary}
	if race {
		args = append(args, "-race")
	}
	if m != nil {
		overlay, err := m.overlay(dir, strings.TrimSpace(string(module)))
		if err != nil {
			return "", err
		}
		args = append(args, "-overlay", overlay)
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "example.com/leader/internal/chaos")...)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build the workers: %w", err)
	}
	return binary, nil
}

// overlay writes the changed file, and the overlay file that makes the compiler use it.
func (m *mutation) overlay(dir, module string) (string, error) {
	file := filepath.Join(module, m.file)
	source, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(source), m.old); n != 1 {
		return "", fmt.Errorf("mutation %s is out of date: %s has %q %d times", m.name, m.file, m.old, n)
	}
	changed := filepath.Join(dir, "mutation.go.txt")
	if err := os.WriteFile(changed, []byte(strings.Replace(string(source), m.old, m.new, 1)), 0o600); err != nil {
		return "", err
	}
	text, err := json.Marshal(map[string]map[string]string{"Replace": {file: changed}})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, text, 0o600)
}

//go:build unix

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/leader/internal/etcdtest"
	"github.com/creack/pty"
)

func TestTheTermIsInTheCommandsEnvironment(t *testing.T) {
	t.Parallel()
	const name = "run/environment"
	leaderDo(t, "run", name, "--value", "host a", "--", "sh", "-c",
		`[ "$LEADER_KEY" = "$(echo "$LEADER_KEY" | grep "^run/environment/[0-9a-f]*$")" ] && [ "$LEADER_TOKEN" -gt 0 ] &&
		 [ "$LEADER_DEADLINE" -gt "$(date +%s)" ] && echo "$LEADER_ELECTION, $LEADER_VALUE"`).
		want(t, 0, "run/environment, host a\n")
	leaderDo(t, "run", name, "--", "sh", "-c", `echo "by default $LEADER_VALUE"`).want(t, 0, "by default "+hostname(t)+"-")
}

func hostname(t *testing.T) string {
	t.Helper()
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	return host
}

func TestRunExitsWithTheStatusOfItsCommand(t *testing.T) {
	t.Parallel()
	notExecutable := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(notExecutable, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for status, args := range map[int][]string{
		0:   {"run", "run/status0", "--", "true"},
		2:   {"run", "run/status2", "--", "sh", "-c", "exit 2"},
		137: {"run", "run/status137", "--", "sh", "-c", "kill -9 $$"},
		126: {"run", "run/status126", "--", notExecutable},
		127: {"run", "run/status127", "--", "no-such-command"},
	} {
		leaderDo(t, args...).want(t, status)
		if ks := keys(t, args[1]); ks != nil {
			t.Errorf("left: %v", ks)
		}
	}
	for _, args := range [][]string{
		{"run", "run/usage"}, {"run", "run/usage", "true"}, {"run", "--", "true"}, {"run", "a", "b", "--", "true"},
		{"run", "run/usage/", "--", "true"}, {"run", "run/usage", "--nonsense", "--", "true"},
	} {
		leaderDo(t, args...).want(t, 125, "leader: ")
	}
}

func TestAFlagThatIsRefusedIsNamed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, c := range []struct{ flag, value, want string }{
		{"--ttl", "0", "leader: --ttl 0s: must"},
		{"--ttl", "1ms", "leader: --ttl 1ms: must"},
		{"--margin", "0", "leader: --margin 0s: must"},
		{"--margin", "14s", "leader: --margin 14s: must"},
		{"--lease-file", dir, `leader: --lease-file "` + dir + `": must`},
	} {
		leaderDo(t, "run", "run/refused", c.flag, c.value, "--", "true").want(t, 125, c.want)
	}
}

// The TTL is longer than the test waits.
func TestTheNextLeadsAtOnceWhenTheCommandExits(t *testing.T) {
	t.Parallel()
	const name = "run/next"
	cmd := command(t, "run", name, "--ttl", "5m", "--", "sh", "-c", "read line; exit 3")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	first := begin(t, cmd)
	first.line(t, "the command runs")
	second := leaderBegin(t, "run", name, "--", "echo", "I lead")
	second.line(t, "joined the queue")
	if _, err := stdin.Write([]byte("a line\n")); err != nil {
		t.Fatal(err)
	}
	second.line(t, "I lead")
	first.end(t, 3)
	second.end(t, 0)
}

func TestTheCommandIsStoppedWhenItsTermEnds(t *testing.T) {
	t.Parallel()
	const name = "run/stopped"
	p := leaderBegin(t, "run", name, "--", "sh", "-c", `trap 'echo stopping; exit 0' TERM; echo ready; while :; do sleep 0.05; done`)
	p.line(t, "ready")
	leaderDo(t, "evict", name, "--yes").want(t, 0)
	p.line(t, "stopping")
	p.end(t, 124)
	if !strings.Contains(p.said(), "ended by somebody else") {
		t.Error("the reason is missing")
	}
}

func TestRestartRunsTheCommandAgainInALaterTerm(t *testing.T) {
	t.Parallel()
	const name = "run/restart"
	p := leaderBegin(t, "run", name, "--restart", "--", "sh", "-c", `trap 'exit 5' USR1; echo "token=$LEADER_TOKEN;"; while :; do sleep 0.05; done`)
	first := p.line(t, "token=")
	leaderDo(t, "evict", name, "--yes").want(t, 0)
	p.line(t, "lost")
	for second := first; second == first; {
		second = p.line(t, ";")
	}
	p.signal(t, syscall.SIGUSR1)
	p.end(t, 5) // a command that exits by itself is not run again
}

// The second instance looks for the processes of the first one as soon as it is elected.
func TestWhatIgnoresSIGTERMIsDeadBeforeTheNextLeads(t *testing.T) {
	t.Parallel()
	const name = "run/stubborn"
	link := etcdtest.NewLink(t, member)
	pids := filepath.Join(t.TempDir(), "pids")
	stubborn := `trap '' TERM; sh -c 'trap "" TERM; echo $$ >>` + pids + `; while :; do sleep 0.1; done' & echo $$ >>` + pids + `
		while :; do sleep 0.1; done`
	first := leaderBegin(t, "run", name, "--endpoints", link.Endpoint, "--ttl", "6s", "--margin", "3s", "--", "sh", "-c", stubborn)
	first.line(t, "the command runs")
	await(t, "two processes", func() bool { text, _ := os.ReadFile(pids); return strings.Count(string(text), "\n") == 2 })
	text, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range strings.Fields(string(text)) {
		if !alive(pid) {
			t.Fatalf("process %s does not run", pid)
		}
	}
	second := leaderBegin(t, "run", name, "--", "sh", "-c", `for p in $(cat `+pids+`); do
		if kill -0 $p && ! grep -q ') Z' /proc/$p/stat; then echo "$p is alive"; fi; done; echo looked`)
	second.line(t, "joined the queue")
	link.Darken()
	second.line(t, "looked")
	link.Heal()
	if strings.Contains(second.said(), "is alive") {
		t.Error("the first command, or its child, works while the second one leads")
	}
	first.end(t, 124)
}

func TestWhatTheCommandLeavesInItsGroupIsKilled(t *testing.T) {
	t.Parallel()
	r := leaderDo(t, "run", "run/group", "-q", "--", "sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!; exit 4")
	r.want(t, 4)
	if alive(r.out) {
		t.Errorf("process %s is alive", r.out)
	}
}

// As with sudo, when "leader run" is not root's. Here it is root's, but without the right to signal other users' processes.
func TestACommandThatCannotBeKilledIsReported(t *testing.T) {
	setpriv, err := exec.LookPath("setpriv")
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs root and setpriv")
	}
	t.Parallel()
	const other = `setpriv --reuid=65534 --regid=65534 --clear-groups sh -c 'echo pid $$; exec sleep 1000'`
	for name, script := range map[string]string{
		"run/unkillable":       "exec " + other,
		"run/unkillable/child": other + " & wait", // the shell can be killed
	} {
		p := begin(t, program(t, setpriv, "--bounding-set=-kill", os.Args[0], "run", name, "--ttl", "2s", "--", "sh", "-c", script))
		pid, err := strconv.Atoi(strings.TrimPrefix(p.line(t, "pid "), "pid "))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) }) // before that of p, which waits for it
		leaderDo(t, "evict", name, "--yes").want(t, 0)
		p.line(t, "cannot be killed, so it works on while another instance may lead (signal=killed): operation not permitted")
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Errorf("%s: the process was killed", name)
		}
		p.end(t, 124)
		if strings.Contains(p.said(), "got SIGKILL") {
			t.Error("a signal that was refused is reported as sent")
		}
	}
}

// A signal is the command's affair: it may ignore SIGINT, and it has the lead as long as it works.
func TestSignalsReachTheCommandBeforeTheResignation(t *testing.T) {
	t.Parallel()
	const name = "run/signals"
	p := leaderBegin(t, "run", name, "--value", "me", "--", "sh", "-c", `trap 'echo interrupted' INT; trap '`+os.Args[0]+` list `+name+`; exit 9' USR1
		echo ready; while :; do sleep 0.05; done`)
	p.line(t, "ready")
	p.signal(t, syscall.SIGINT)
	p.line(t, "passed on to the command, which still runs (signal=interrupt)")
	p.line(t, "interrupted")
	p.signal(t, syscall.SIGUSR1)
	p.line(t, "\tme")
	p.end(t, 9)
	if ks := keys(t, name); ks != nil {
		t.Errorf("left: %v", ks)
	}
}

// SIGHUP often asks a program to read its configuration again, and SIGQUIT to print a trace.
func TestASignalThatTheCommandSurvivesDoesNotStopRun(t *testing.T) {
	t.Parallel()
	const survivor = `trap 'echo hung up' HUP; trap 'echo quit' QUIT; trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done`
	disturb := func(name string, args ...string) *running {
		p := leaderBegin(t, append(append([]string{"run", name}, args...), "--", "sh", "-c", survivor)...)
		p.line(t, "ready")
		p.signal(t, syscall.SIGHUP)
		p.line(t, "hung up")
		p.signal(t, syscall.SIGQUIT)
		p.line(t, "quit")
		leaderDo(t, "evict", name, "--yes").want(t, 0)
		return p
	}
	disturb("run/survived").end(t, 124)
	disturb("run/survived/restart", "--restart").line(t, "ready")
}

func TestACommandThatDiesOfASignalIsNotRunAgain(t *testing.T) {
	t.Parallel()
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGQUIT} { // SIGHUP as when a terminal is closed
		p := leaderBegin(t, "run", "run/dies", "--restart", "--", "sh", "-c", "ulimit -c 0; echo ready; exec sleep 1000")
		p.line(t, "ready")
		p.signal(t, s)
		p.end(t, 128+int(s))
	}
}

// The command ignores SIGTERM for a while. SIGHUP counts too once the term is lost: the command cannot say any more by
// its exit that it is not to be run again.
func TestAfterASignalThatStopsALostTermIsNotFollowedByAnother(t *testing.T) {
	t.Parallel()
	const stubborn = `trap 'echo terminated' TERM; trap 'exit 7' USR1 HUP; echo ready; while :; do sleep 0.05; done`
	begin := func(name string) *running {
		p := leaderBegin(t, "run", name, "--ttl", "5m", "--margin", "2m", "--restart", "--", "sh", "-c", stubborn)
		p.line(t, "ready")
		return p
	}
	p := begin("run/stays")
	p.signal(t, syscall.SIGTERM)
	p.line(t, "terminated")
	leaderDo(t, "evict", "run/stays", "--yes").want(t, 0)
	p.line(t, "terminated")
	p.signal(t, syscall.SIGUSR1)
	p.end(t, 7)

	p = begin("run/stays/hangup")
	leaderDo(t, "evict", "run/stays/hangup", "--yes").want(t, 0)
	p.line(t, "terminated")
	p.signal(t, syscall.SIGHUP)
	p.end(t, 7)
}

func TestASignalInTheQueueWithdrawsTheCandidate(t *testing.T) {
	t.Parallel()
	const name = "run/withdraw"
	first := leaderBegin(t, "run", name, "--ttl", "5m", "--", "sleep", "1000")
	first.line(t, "the command runs")
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		p := leaderBegin(t, "run", name, "--ttl", "5m", "--", "true")
		p.line(t, "joined the queue")
		p.signal(t, s)
		p.end(t, 128+int(s))
		if ks := keys(t, name); len(ks) != 1 {
			t.Errorf("after %v: %v", s, ks)
		}
	}
}

func TestAKilledRunTakesItsCommandWithItAndTheNextLeadsAtOnce(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has lease files and PDEATHSIG")
	}
	t.Parallel()
	const name = "run/killed"
	file := filepath.Join(t.TempDir(), "lease")
	first := leaderBegin(t, "run", name, "--ttl", "5m", "--lease-file", file, "--", "sh", "-c", "echo pid $$; exec sleep 1000")
	pid := strings.TrimPrefix(first.line(t, "pid "), "pid ")
	second := leaderBegin(t, "run", name, "--ttl", "5m", "--", "echo", "I lead")
	second.line(t, "joined the queue")
	if !alive(pid) {
		t.Fatal("the command does not run")
	}
	lasting := leaderBegin(t, "reclaim", filepath.Join(t.TempDir(), "nothing"), file)
	once := leaderBegin(t, "reclaim", "--once", file)
	lasting.line(t, "waits until the owner is dead and its leases are gone (file="+file+")")
	once.line(t, "waits until")
	first.signal(t, syscall.SIGKILL)
	second.line(t, "I lead")
	once.line(t, "no lease of a dead owner is left")
	once.end(t, 0)
	lasting.line(t, "no lease of a dead owner is left (file="+file+")")
	await(t, "the command's end", func() bool { return !alive(pid) })
}

func TestRunResignsEvenIfNobodyReadsItsMessages(t *testing.T) {
	t.Parallel()
	const name = "run/unread"
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	cmd := command(t, "run", name, "--", "sh", "-c", "exit 6")
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	_ = cmd.Wait() // its status says it
	if got := cmd.ProcessState.ExitCode(); got != 6 {
		t.Errorf("status %d, want 6", got)
	}
	if ks := keys(t, name); ks != nil {
		t.Errorf("left: %v", ks)
	}
}

// As with a terminal that is held by Ctrl-S, or a pipe whose reader hangs.
func TestTheCommandIsStoppedEvenIfMessagesBlock(t *testing.T) {
	t.Parallel()
	const name = "run/blocked"
	messages, file := filepath.Join(t.TempDir(), "messages"), filepath.Join(t.TempDir(), "pid")
	if err := syscall.Mkfifo(messages, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(flags int) *os.File {
		f, err := os.OpenFile(messages, flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	reader := open(os.O_RDONLY | syscall.O_NONBLOCK)
	cmd := command(t, "run", name, "--", "sh", "-c", "echo $$ >"+file+"; exec sleep 1000")
	cmd.Stderr = open(os.O_WRONLY)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // its status says it
	}()
	defer func() {
		_ = cmd.Process.Kill() // fails if it has ended
		<-ended
	}()
	var pid string
	await(t, "the command", func() bool {
		text, _ := os.ReadFile(file)
		pid = strings.TrimSpace(string(text))
		return alive(pid)
	})
	filler := open(os.O_WRONLY | syscall.O_NONBLOCK)
	if err := filler.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := filler.Write(make([]byte, 1<<24)); !errors.Is(err, os.ErrDeadlineExceeded) { // more than a pipe holds
		t.Fatal(err)
	}
	leaderDo(t, "evict", name, "--yes").want(t, 0)
	await(t, "the command's end", func() bool { return !alive(pid) })
	go func() { _, _ = io.Copy(io.Discard, reader) }() // until the test closes it
	etcdtest.Await(t, "the end of leader run", ended)
	if got := cmd.ProcessState.ExitCode(); got != 124 {
		t.Errorf("status %d, want 124", got)
	}
}

// onTerminal starts a command on a terminal of its own.
func onTerminal(t *testing.T, args ...string) (p *running, keyboard func(string)) {
	t.Helper()
	return beginOnTerminal(t, command(t, args...), 80)
}

// shell starts a script on a terminal, in which $leader is the command.
func shell(t *testing.T, script string) (p *running, keyboard func(string)) {
	t.Helper()
	return beginOnTerminal(t, program(t, "/bin/sh", "-c", script), 80)
}

// program returns a program in whose environment $leader is the command.
func program(t *testing.T, path string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := command(t)
	cmd.Env = append(cmd.Env, "leader="+cmd.Path)
	cmd.Path, cmd.Args = path, append([]string{path}, args...)
	return cmd
}

func beginOnTerminal(t *testing.T, cmd *exec.Cmd, columns uint16) (p *running, keyboard func(string)) {
	t.Helper()
	terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: columns})
	if err != nil {
		t.Fatal(err)
	}
	p = &running{Cmd: cmd}
	p.follow(t, terminal)
	return p, func(text string) {
		t.Helper()
		if _, err := terminal.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTheCommandHasTheTerminalAndGivesItBack(t *testing.T) {
	t.Parallel()
	p, keyboard := shell(t, `$leader run run/terminal -- sh -c 'echo ready; read a; echo "got:$a"'; read b; echo "back:$b"`)
	p.line(t, "ready")
	keyboard("one\n")
	p.line(t, "got:one")
	p.line(t, "resigned")
	keyboard("two\n")
	p.line(t, "back:two")
	p.end(t, 0)
}

func TestCtrlCEndsTheCommandAndResigns(t *testing.T) {
	t.Parallel()
	const name = "run/interrupt"
	p, keyboard := shell(t, `trap : INT; $leader run `+name+` -- sleep 1000; echo "status:$?"`)
	p.line(t, "the command runs")
	keyboard("\x03")
	p.line(t, "status:130")
	p.end(t, 0)
	if ks := keys(t, name); ks != nil {
		t.Errorf("left: %v", ks)
	}
}

func TestCtrlZDoesNotSuspendTheCommand(t *testing.T) {
	t.Parallel()
	p, keyboard := shell(t, `$leader run run/suspend -- sh -c 'echo ready; read a; echo "got:$a"'`)
	p.line(t, "ready")
	keyboard("\x1a")
	p.line(t, "cannot be suspended")
	keyboard("one\n")
	p.line(t, "got:one")
	p.end(t, 0)
}

// The question has no end of line to wait for, but it changes the terminal's modes.
func TestCtrlCAtTheQuestionForThePasswordEndsAndRestoresTheModes(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"list --user somebody", "run run/password --user somebody -- true"} {
		p, keyboard := shell(t, `trap : INT; before=$(stty -g)
			(while [ "$(stty -g </dev/tty)" = "$before" ]; do sleep 0.02; done; echo asked) &
			$leader `+args+`; echo "status:$?"; [ "$(stty -g)" = "$before" ] && echo restored`)
		p.line(t, "asked")
		keyboard("\x03")
		p.line(t, "status:130")
		p.line(t, "restored")
		p.end(t, 0)
	}
}

// A command that reads from the terminal in the background would be stopped by the kernel, for ever.
func TestInAPipelineTheCommandDoesNotReadFromTheTerminal(t *testing.T) {
	t.Parallel()
	p, _ := shell(t, `$leader run run/pipeline -- sh -c 'read a || echo nothing to read' | cat`)
	p.line(t, "nothing to read")
	p.end(t, 0)
}

func TestTheModesOfTheTerminalAreRestored(t *testing.T) {
	t.Parallel()
	p, _ := shell(t, `before=$(stty -g); $leader run run/modes -- sh -c 'stty -echo; echo "changed:$(stty -g)"; kill -9 $$'
		echo "status:$?"; [ "$(stty -g)" = "$before" ] && echo restored`)
	p.line(t, "changed:")
	p.line(t, "status:137")
	p.line(t, "restored")
	p.end(t, 0)
}

// The shell takes the terminal when "leader run" is stopped. It would end if it could not read from it any more.
func TestAShellThatHasTakenTheTerminalBackKeepsIt(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pids")
	cmd := program(t, "/bin/bash", "--noprofile", "--norc", "-i")
	if _, err := exec.LookPath(cmd.Path); err != nil {
		t.Skip("needs bash")
	}
	cmd.Env = append(cmd.Env, "HISTFILE=")
	p, keyboard := beginOnTerminal(t, cmd, 80)
	keyboard("$leader run run/taken -- sh -c 'echo $PPID $$ >" + file + "; exec sleep 1000'\n")
	var run, child int
	await(t, "two processes", func() bool {
		text, _ := os.ReadFile(file)
		n, _ := fmt.Sscan(string(text), &run, &child)
		return n == 2
	})
	kill := func(pid int, s syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(pid, s); err != nil {
			t.Fatal(err)
		}
	}
	kill(run, syscall.SIGSTOP)
	p.line(t, "Stopped")
	kill(run, syscall.SIGCONT)
	kill(child, syscall.SIGKILL)
	p.line(t, "resigned")
	await(t, "the end of leader run", func() bool { return !alive(fmt.Sprint(run)) })
	keyboard("echo sum:$((40 + 2))\n")
	p.line(t, "sum:42")
	keyboard("exit 0\n")
	p.end(t, 0)
}

//go:build unix

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"example.com/leader/internal/retry"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// lead makes a candidate lead until the end of the test.
func lead(t *testing.T, name, value string) *leader.Leader {
	t.Helper()
	l, err := leader.Campaign(t.Context(), etcdtest.NewClient(t, member.Endpoint), name, value)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// enqueue makes a candidate wait until the end of the test. It returns when it is in the queue.
func enqueue(t *testing.T, name, value string) {
	t.Helper()
	before := len(keys(t, name))
	client := etcdtest.NewClient(t, member.Endpoint)
	elector, err := leader.New(client)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = elector.Run(t.Context(), name, value, func(ctx context.Context, _ *leader.Leader) error { <-ctx.Done(); return nil })
	}()
	t.Cleanup(func() { <-done })
	await(t, "a candidate in the queue", func() bool { return len(keys(t, name)) > before })
}

func put(t *testing.T, key, value string, opts ...clientv3.OpOption) {
	t.Helper()
	if _, err := etcdtest.NewClient(t, member.Endpoint).Put(t.Context(), key, value, opts...); err != nil {
		t.Fatal(err)
	}
}

func TestListShowsEachElectionAndNothingElse(t *testing.T) {
	t.Parallel()
	b := lead(t, "list/some/b", "bee")
	a := lead(t, "list/some", "ay")
	enqueue(t, "list/some", "second")
	enqueue(t, "list/some", "third")
	lead(t, "list/somewhere", "else")
	put(t, "list/some/config", "data")
	put(t, "list/some/users/1f", "data that looks like a candidate but for its lease")
	put(t, b.Key()+"/stepback", "1")

	r := leaderDo(t, "list", "list/some")
	r.want(t, 0)
	if r.err != "" {
		t.Errorf("standard error has %q", r.err)
	}
	var fields [][]string
	for line := range strings.Lines(r.out) {
		fields = append(fields, strings.Split(strings.TrimSuffix(line, "\n"), "\t"))
	}
	if len(fields) != 4 {
		t.Fatalf("list prints %q", r.out)
	}
	for i, want := range []string{"list/some 1 ay", "list/some 2 second", "list/some 3 third", "list/some/b 1 bee"} {
		if f := fields[i]; len(f) != 7 || f[0]+" "+f[1]+" "+f[6] != want {
			t.Errorf("line %d is %q, want %s", i+1, f, want)
		}
	}
	if f := fields[0]; f[2] != fmt.Sprint(a.Token()) || "list/some/"+f[3] != a.Key() || f[5] != "15" {
		t.Errorf("the leader is %q", f)
	}

	var got []election
	if err := json.Unmarshal([]byte(leaderDo(t, "list", "list/some/", "-o", "json").out), &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].Name != "list/some" || len(got[0].Candidates) != 3 || got[0].Candidates[0].Token != a.Token() ||
		got[0].Candidates[0].TTL != 15 || got[1].Candidates[0].Value != "bee" {
		t.Errorf("the JSON is %+v", got)
	}
	all := leaderDo(t, "list")
	all.want(t, 0, "list/somewhere", "list/some/b")

	leaderDo(t, "list", "list/nothing").want(t, 0, "no elections")
	if r := leaderDo(t, "list", "list/nothing", "-o", "json"); r.out != "[]\n" {
		t.Errorf("no elections are %q in JSON", r.out)
	}
}

// Whoever campaigns in the election that is named waits for it.
func TestListShowsALoneKeyWithoutALeaseInTheElectionThatIsNamed(t *testing.T) {
	t.Parallel()
	put(t, "list/lone/1f", "stale")
	leaderDo(t, "list", "list/lone").want(t, 0, "stale")
	leaderDo(t, "list", "list/lone/").want(t, 0, "stale")
	if r := leaderDo(t, "list", "list"); strings.Contains(r.out, "list/lone") {
		t.Errorf("what may be mere data is taken for an election: %q", r.out)
	}
}

// The others wait for it for ever.
func TestListShowsACandidateWithoutALease(t *testing.T) {
	t.Parallel()
	put(t, "list/stuck/1f", "stale")
	enqueue(t, "list/stuck", "waits")
	p, _ := onTerminal(t, "list", "list/stuck")
	p.line(t, "stale")
	p.end(t, 0)
	if !strings.Contains(p.said(), "never") {
		t.Error("it does not say that the key never expires")
	}
}

const wild = "\x1b[31mred\x07\u202e\u009b2J\xff\n"

// What others write must not be obeyed by the terminal.
func TestControlCharactersDoNotReachTheTerminal(t *testing.T) {
	t.Parallel()
	const name = "list/wild\x1b]0;"
	lead(t, name, wild)
	for _, args := range [][]string{
		{"list", "list"}, {"list", "list", "-o", "json"}, {"wait", name}, {"wait", name, "-o", "json"},
		{"transfer", name}, {"transfer", name, "--to", "x\x1b"}, {"evict", name, "--yes"},
		{"list", "--user", "some\x1body"},
	} {
		r := leaderDo(t, args...)
		for _, c := range r.out + r.err {
			if c != '\n' && c != '\t' && escaped(string(c)) != string(c) {
				t.Errorf("%q prints %q", args, r.out+r.err)
				break
			}
		}
	}
}

func TestTablesFitTheTerminal(t *testing.T) {
	t.Parallel()
	lead(t, "list/wide", strings.Repeat("wide ", 50))
	for _, args := range [][]string{{"list", "list/wide"}, {"--help"}, {"run", "--help"}, {"list", "--help"}, {"watch", "--help"},
		{"wait", "--help"}, {"transfer", "--help"}, {"evict", "--help"}, {"reclaim", "--help"}} {
		p, _ := onTerminal(t, args...)
		p.end(t, 0)
		await(t, "the output", func() bool { return strings.Count(p.said(), "\n") > 2 })
		for line := range strings.Lines(p.said()) {
			for _, style := range []string{"\x1b[1m", "\x1b[0m"} {
				line = strings.ReplaceAll(line, style, "")
			}
			if len([]rune(strings.TrimRight(line, "\r\n"))) > 80 {
				t.Errorf("%q prints a line of more than 80 columns: %q", args, line)
			}
		}
	}
}

func TestANarrowTableHasTheValue(t *testing.T) {
	t.Parallel()
	const name = "list/narrow"
	lead(t, name, "the value")
	for columns, head := range map[uint16]string{40: "TOKEN  VALUE", 60: "TOKEN  LEFT", 80: "TOKEN  LEASE"} {
		p, _ := beginOnTerminal(t, command(t, "list", name), columns)
		p.line(t, head)
		p.line(t, "the value")
		p.end(t, 0)
	}
}

func TestWatchPrintsEachChangeAndVacancy(t *testing.T) {
	t.Parallel()
	const name = "watch/changes"
	text, lines := leaderBegin(t, "watch", name), leaderBegin(t, "watch", name, "-o", "json")
	text.line(t, "\t-\tnobody leads")
	lines.line(t, `"leader":null`)
	l := lead(t, name, "first")
	text.line(t, fmt.Sprintf("\t%d\tfirst", l.Token()))
	lines.line(t, `"value":"first"`)
	if err := l.Proclaim(t.Context(), "other"); err != nil {
		t.Fatal(err)
	}
	text.line(t, "other")
	if err := l.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	text.line(t, "nobody leads")
	for line := lines.line(t, `"other"`); line != ""; line = "" {
		var v struct {
			Election string
			Leader   candidate
		}
		if err := json.Unmarshal([]byte(line), &v); err != nil || v.Election != name || v.Leader.Key != l.Key() {
			t.Errorf("%s: %v", line, err)
		}
	}
	text.signal(t, syscall.SIGINT)
	text.end(t, 130)
	lines.signal(t, syscall.SIGTERM)
	lines.end(t, 143)
}

// Nothing changes after the first line.
func TestWatchEndsWhenNobodyReadsIt(t *testing.T) {
	t.Parallel()
	cmd := command(t)
	cmd.Path, cmd.Args = "/bin/bash", []string{"bash", "-c", `"$0" watch watch/head | head -n 1; echo ${PIPESTATUS[0]}`, cmd.Path}
	if _, err := exec.LookPath(cmd.Path); err != nil {
		t.Skip("needs bash")
	}
	r := outcome(t, cmd)
	r.want(t, 0, "nobody leads\n141\n")
	if r.err != "" {
		t.Errorf("it prints %q", r.err)
	}
}

func TestWaitReturnsWhenSomebodyLeads(t *testing.T) {
	t.Parallel()
	const name = "wait/leader"
	leaderDo(t, "wait", name, "--timeout", "100ms").want(t, 4, "nobody was seen to lead")
	p := leaderBegin(t, "wait", name)
	lead(t, name, "the value")
	p.line(t, "the value")
	p.end(t, 0)
	leaderDo(t, "wait", name, "-o", "json").want(t, 0, `"value":"the value"`)
}

func TestWrongUsageHasAStatusOfItsOwn(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"frobnicate"}, {"--nonsense"}, {"list", "a", "b"}, {"list", "-o", "yaml"}, {"watch"}, {"watch", ""}, {"watch", "a/"},
		{"wait", "a/"}, {"transfer", "a/"}, {"evict", "a/", "--yes"}, {"reclaim"}, {"list", "--dial-timeout", "soon"},
		{"list", "--user", "somebody"}, {"list", "--cacert", "/nowhere"},
		{"list", "--user", "somebody:"}, {"list", "--user", ":x"}, {"list", "--password", "x"},
		{"list", "--dial-timeout", "0"}, {"list", "--command-timeout", "-1s"},
		{"transfer", "a", "--to", ""}, {"transfer", "a", "--timeout", "0"},
	} {
		r := leaderDo(t, args...)
		r.want(t, 2, "leader: ", "--help")
		if r.out != "" {
			t.Errorf("%q prints %q as data", args, r.out)
		}
	}
}

func TestAMistakenCallIsExplained(t *testing.T) {
	t.Parallel()
	for want, args := range map[string][]string{
		"needs one name":   {"watch"},
		"at most one":      {"list", "a", "b"},
		"needs a lease":    {"reclaim"},
		"comes after --\n": {"run", "t", "sh", "-c", "true"},
	} {
		r := leaderDo(t, args...)
		r.want(t, r.status, want)
		if r.status == 0 {
			t.Errorf("%q succeeds", args)
		}
	}
}

func TestTheVersionIsPrinted(t *testing.T) {
	t.Parallel()
	leaderDo(t, "--version").want(t, 0, "leader version ")
}

func TestASlipOfTheKeyboardGetsASuggestion(t *testing.T) {
	t.Parallel()
	leaderDo(t, "lst").want(t, 2, "\n\nDid you mean this?\n  list\n")
}

func TestCompletionKnowsTheSubcommands(t *testing.T) {
	t.Parallel()
	leaderDo(t, "completion", "bash").want(t, 0, "complete")
	leaderDo(t, "__complete", "tr").want(t, 0, "transfer\t")
	leaderDo(t, "__complete", "list", "-o", "").want(t, 0, "json")
	leaderDo(t, "__complete", "run", "").want(t, 0, "NoFileComp")
	leaderDo(t, "__complete", "run", "name", "--", "").want(t, 0, "ShellCompDirectiveDefault")
	leaderDo(t, "__complete", "transfer", "--to", "").want(t, 0, "newest\n", "NoFileComp")
	leaderDo(t, "__complete", "reclaim", "").want(t, 0, "ShellCompDirectiveDefault")
}

func TestAnEtcdThatIsAwayIsNamedWithTheReason(t *testing.T) {
	t.Parallel()
	addresses, err := etcdtest.FreeAddresses(1)
	if err != nil {
		t.Fatal(err)
	}
	away := addresses[0]
	for _, args := range [][]string{{"list"}, {"transfer", "a"}, {"evict", "a", "--yes"}, {"list", "--user", "u:p"}} {
		r := leaderDo(t, append(args, "--endpoints", away, "--command-timeout", "2s", "--dial-timeout", "1s")...)
		r.want(t, 4, away, "connection refused")
		if strings.Count(r.err, "\n") != 1 {
			t.Errorf("%q prints %q", args, r.err)
		}
	}
	for _, user := range []string{"", "u:p"} {
		leaderDo(t, "wait", "a", "--timeout", "2s", "--user", user, "--endpoints", away, "--dial-timeout", "1s").
			want(t, 4, "nobody was seen to lead within 2s", "connection refused")
	}
	for _, args := range [][]string{{"watch", "a"}, {"wait", "a"}, {"reclaim", "/nowhere"}, {"run", "a", "--", "true"}, {"watch", "a", "--user", "u:p"}} {
		p := leaderBegin(t, append([]string{"--endpoints", away, "--command-timeout", "2s", "--dial-timeout", "1s"}, args...)...)
		p.line(t, "no connection to etcd")
		p.signal(t, syscall.SIGINT)
		p.end(t, 130)
	}
}

func TestADarkEtcdEndsWithTheCommandTimeout(t *testing.T) {
	t.Parallel()
	link := etcdtest.NewLink(t, member)
	link.Darken()
	leaderDo(t, "list", "--endpoints", link.Endpoint, "--command-timeout", "1s").want(t, 4, link.Endpoint)
	link.Heal()
	leaderDo(t, "list", "--endpoints", link.Endpoint).want(t, 0)
}

func TestRightsArePutInWords(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	client := etcdtest.NewClient(t, m.Endpoint)
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(client.UserAdd(ctx, "root", "root"))
	must(client.UserGrantRole(ctx, "root", "root"))
	must(client.RoleAdd(ctx, "candidate"))
	must(client.RoleGrantPermission(ctx, "candidate", "svc/jobs/", clientv3.GetPrefixRangeEnd("svc/jobs/"), clientv3.PermissionType(clientv3.PermReadWrite)))
	must(client.UserAdd(ctx, "jobs", "secret"))
	must(client.UserGrantRole(ctx, "jobs", "candidate"))
	must(client.AuthEnable(ctx))

	as := func(user string, args ...string) result {
		cmd := command(t, args...)
		cmd.Env = append(cmd.Env, "ETCDCTL_ENDPOINTS="+m.Endpoint, "ETCDCTL_USER="+user)
		return outcome(t, cmd)
	}
	as("jobs:secret", "list", "svc/jobs").want(t, 0)
	as("jobs:secret", "run", "svc/jobs", "--", "sh", "-c", "echo works").want(t, 0, "works\n")
	as("jobs", "list", "svc/jobs", "--password", "secret").want(t, 0)
	as("jobs:secret", "list").want(t, 1, "permission denied", "PREFIX")
	as("jobs:secret", "list", "other").want(t, 1, "permission denied", "other/", `user "jobs"`)
	as("jobs:secret", "watch", "other").want(t, 1, "permission denied")
	as("jobs:secret", "wait", "other").want(t, 1, "permission denied")
	as("jobs:secret", "transfer", "other").want(t, 1, "permission denied")
	as("jobs:secret", "evict", "other", "--yes").want(t, 1, "permission denied")
	as("jobs:secret", "run", "other", "--", "true").want(t, 125, "permission denied", `user "jobs"`)
	as("jobs:wrong", "list", "svc/jobs").want(t, 1, `"jobs"`, "authentication failed")
	as("", "list", "svc/jobs").want(t, 1, "user name is empty", "there is no --user")

	both := func(args ...string) result {
		cmd := command(t, args...)
		cmd.Env = append(cmd.Env, "ETCDCTL_ENDPOINTS="+m.Endpoint, "ETCDCTL_USER=jobs:hidden", "ETCDCTL_PASSWORD=secret")
		return outcome(t, cmd)
	}
	both("list", "--user", "root:root").want(t, 0) // flags win over variables
	both("list", "--user", "jobs").want(t, 1, "permission denied")
	if r := both("list"); r.status != 1 || strings.Contains(r.err, "hidden") || !strings.Contains(r.err, `as "jobs"`) {
		t.Errorf("status %d: %s", r.status, r.err)
	}
}

func TestMessagesAreForTheUserOfTheCommand(t *testing.T) {
	t.Parallel()
	r := slog.NewRecord(time.Time{}, slog.LevelWarn, "lost", 0)
	r.Add("cause", errors.Join(errors.New("leader: term expired"), errors.New("second line")), "cure", retry.Cure)
	h := logHandler{}.WithAttrs([]slog.Attr{slog.Any("renewal", errors.New("no answer from etcd for 5s, "+retry.Cure))})
	want := `leader: warning: lost (renewal="no answer from etcd for 5s"): term expired; second line`
	if got := h.(logHandler).lineOf(r); got != want {
		t.Errorf("the line is\n%s\nwant\n%s", got, want)
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"client-transport-security": etcdtest.Settings{"auto-tls": true}})
	leaderDo(t, "list", "--endpoints", m.Endpoint, "--insecure-skip-tls-verify").want(t, 0)
	await(t, "an error that says why", func() bool { // gRPC may try again at that moment, and then does not know
		r := leaderDo(t, "list", "--endpoints", "https://"+m.Endpoint, "--command-timeout", "2s")
		return r.status == 4 && strings.Contains(r.err, "certificate")
	})
}

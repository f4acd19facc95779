package leader_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// documents returns README.md and docs/*.md by their paths.
func documents(t *testing.T) map[string]string {
	t.Helper()
	paths, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	texts := make(map[string]string)
	for _, path := range append(paths, "README.md") {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		texts[path] = string(text)
	}
	return texts
}

// goFiles returns the text of every Go file, of nested modules too, by path.
func goFiles(t *testing.T) map[string]string {
	t.Helper()
	texts := make(map[string]string)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) == ".go" {
			text, err := os.ReadFile(path)
			texts[path] = string(text)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return texts
}

// blocks returns the fenced blocks of a language.
func blocks(text, language string) []string {
	var bs []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
		bs = append(bs, m[1])
	}
	return bs
}

// Go in the documents either is a program that builds, or stands, but for its indentation, in a file
// that is compiled.
func TestGoOfTheDocumentsCompiles(t *testing.T) {
	t.Parallel()
	unindented := func(text string) string {
		return regexp.MustCompile(`(?m)^[ \t]+`).ReplaceAllString(text, "")
	}
	var compiled strings.Builder
	for _, text := range goFiles(t) {
		compiled.WriteString(unindented(text))
	}
	dir, programs := t.TempDir(), 0
	for path, text := range documents(t) {
		for _, block := range blocks(text, "go") {
			if !strings.HasPrefix(block, "package ") {
				if !strings.Contains(compiled.String(), unindented(block)) {
					t.Errorf("%s: not in a Go file of the repository:\n%s", path, block)
				}
				continue
			}
			programs++
			file := filepath.Join(dir, fmt.Sprintf("%d.go", programs))
			if err := os.WriteFile(file, []byte(block), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("go", "vet", file).CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s\n%s", path, err, out, block)
			}
		}
	}
	if programs == 0 {
		t.Error("README.md has no program")
	}
}

// What the documents name is there: tests, and files with their headings.
func TestNamesAndLinksOfTheDocumentsExist(t *testing.T) {
	t.Parallel()
	var source strings.Builder
	for _, text := range goFiles(t) {
		source.WriteString(text)
	}
	anchor := func(heading string) string { // as GitHub makes it
		heading = regexp.MustCompile(`[^\pL\pN _-]`).ReplaceAllString(strings.ToLower(heading), "")
		return strings.ReplaceAll(heading, " ", "-")
	}
	for path, text := range documents(t) {
		for _, name := range regexp.MustCompile(`\b(Test|Example|Benchmark)[A-Z]\w+`).FindAllString(text, -1) {
			if name != "TestName" && !strings.Contains(source.String(), "func "+name+"(") {
				t.Errorf("%s names %s, which is not there", path, name)
			}
		}
		for _, m := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			file, fragment, _ := strings.Cut(m[1], "#")
			target := path
			if file != "" {
				target = filepath.Join(filepath.Dir(path), file)
			}
			linked, err := os.ReadFile(target)
			if info, serr := os.Stat(target); serr == nil && info.IsDir() {
				continue
			}
			if err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
				continue
			}
			var anchors []string
			for _, h := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(string(linked), -1) {
				anchors = append(anchors, anchor(h[1]))
			}
			if fragment != "" && !slices.Contains(anchors, fragment) {
				t.Errorf("%s links to %s, which has no such heading", path, m[1])
			}
		}
	}
}

func TestEachLogLineIsInTheOperationsGuide(t *testing.T) {
	t.Parallel()
	var logged []string
	for path, text := range goFiles(t) {
		if dir := filepath.Dir(path); dir != "." && dir != "internal/lease" || strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, text, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			method, ok := call.Fun.(*ast.SelectorExpr)
			// The message is the first argument; loop and warn, which warn with it, have the election before it.
			levels := map[string]string{"Info": "INFO", "Warn": "WARN", "loop": "WARN", "warn": "WARN", "Debug": "DEBUG", "Error": "ERROR"}
			if !ok || levels[method.Sel.Name] == "" || len(call.Args) == 0 {
				return true
			}
			message := call.Args[0]
			if method.Sel.Name == "loop" || method.Sel.Name == "warn" {
				message = call.Args[1]
			}
			if lit, ok := message.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				logged = append(logged, fmt.Sprintf("| %s | %s |", levels[method.Sel.Name], strings.Trim(lit.Value, `"`)))
			}
			return true
		})
	}
	described := regexp.MustCompile(`(?m)^\| [A-Z]{4,5} \| [^|]+ \|`).FindAllString(documents(t)["docs/operations.md"], -1)
	slices.Sort(logged)
	slices.Sort(described)
	if logged = slices.Compact(logged); !slices.Equal(logged, described) {
		t.Errorf("the source logs\n%s\nand docs/operations.md describes\n%s", strings.Join(logged, "\n"), strings.Join(described, "\n"))
	}
}

// The commands of docs/operations.md, as they stand there, do what it says of them.
func TestCommandsOfTheOperationsGuide(t *testing.T) {
	if _, err := exec.LookPath("etcdctl"); err != nil {
		t.Skip("etcdctl is not installed (Debian: apt-get install etcd-client); the commands of docs/operations.md are not tested")
	}
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	var user string
	commands := make(map[string][]string)
	for _, c := range regexp.MustCompile("(?ms)^<!-- run: (\\w+) -->\n```sh\n(.*?)^```$").FindAllStringSubmatch(documents(t)["docs/operations.md"], -1) {
		commands[c[1]] = append(commands[c[1]], c[2])
	}
	command := func(script string) *exec.Cmd {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		t.Cleanup(cancel)
		cmd := exec.CommandContext(ctx, "sh", "-eu", "-c", script)
		cmd.Env = append(cmd.Environ(), "ETCDCTL_API=3", "ETCDCTL_ENDPOINTS="+m.Endpoint,
			"ROOT_PASSWORD=root", "JOBS_PASSWORD=jobs", "WATCHER_PASSWORD=watcher")
		if user != "" {
			cmd.Env = append(cmd.Env, "ETCDCTL_USER="+user+":"+user)
		}
		return cmd
	}
	run := func(section string) string {
		t.Helper()
		var all bytes.Buffer
		if commands[section] == nil {
			t.Fatalf("no commands are marked %q", section)
		}
		for _, script := range commands[section] {
			out, err := command(script).CombinedOutput()
			if err != nil {
				t.Fatalf("%s%v\n%s", script, err, out)
			}
			all.Write(out)
		}
		return all.String()
	}
	says := func(section string, parts ...string) {
		t.Helper()
		out := run(section)
		rest := out
		for _, part := range parts {
			_, after, ok := strings.Cut(rest, part)
			if !ok {
				t.Fatalf("%s: %q is missing, or not in its place:\n%s", section, part, out)
			}
			rest = after
		}
	}

	run("auth")
	user = "root"
	as := func(user string) *clientv3.Client {
		return etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: user, Password: user})
	}
	const name = "svc/jobs"
	first := lead(t, newElector(t, as("jobs")), name, "first")
	second := campaign(t.Context(), newElector(t, as("jobs")), name, "second")
	awaitQueue(t, as("watcher"), name, queued(2))
	if err := newElector(t, as("watcher")).Evict(t.Context(), name); err == nil {
		t.Error("who may only read has evicted the leader")
	}

	says("look",
		first.Key(), "first", // the leader alone
		first.Key(), "first", "second", // all
		fmt.Sprintf(`"CreateRevision" : %d`, first.Token()), "attached keys(["+first.Key()+"])")
	says("stepback", "SUCCESS")
	awaitEnd(t, first, leader.ErrTransferred)
	resign(t, first)
	l := awaitLeader(t, second)

	maintenance := command("exec " + strings.Join(commands["maintenance"], ""))
	if err := maintenance.Start(); err != nil {
		t.Fatal(err)
	}
	operator := newElector(t, as("jobs"))
	transferred := make(chan error, 1)
	go func() { transferred <- handOver(t.Context(), operator, name, "maintenance") }()
	awaitEnd(t, l, leader.ErrTransferred)
	resign(t, l)
	if err := etcdtest.Await(t, "the transfer", transferred); err != nil {
		t.Errorf("handOver: %v", err)
	}
	third := campaign(t.Context(), newElector(t, as("jobs")), name, "third")
	awaitQueue(t, as("watcher"), name, queued(2))
	fourth := campaign(t.Context(), newElector(t, as("jobs")), name, "fourth")
	if cs := awaitQueue(t, as("watcher"), name, queued(3)); cs[0].Value != "maintenance" {
		t.Errorf("the queue is %+v", cs)
	}
	if err := errors.Join(maintenance.Process.Signal(os.Interrupt), maintenance.Wait()); err != nil {
		t.Errorf("etcdctl elect: %v", err)
	}

	l = awaitLeader(t, third)
	says("evict", "SUCCESS")
	awaitEnd(t, l, leader.ErrEvicted)
	l = awaitLeader(t, fourth)
	says("revoke", "revoked")
	awaitEnd(t, l, leader.ErrEvicted)
	run("space")
	if _, err := newElector(t, as("watcher")).Current(t.Context(), name); !errors.Is(err, leader.ErrNoLeader) {
		t.Errorf("Current: %v", err)
	}
}

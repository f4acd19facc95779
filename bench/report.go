package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	_ "embed"
)

//go:embed README.md
var readme string

// A report writes results to README.md, as they come.
type report struct {
	dir, command string
	all          []string // lines of targets
	bars         []bar
	began        time.Time
}

// add writes a row's tables between its markers, and its plots beside the file.
func (rep *report) add(row row, res *result, took time.Duration) error {
	if rep.began.IsZero() {
		rep.began = time.Now().Add(-took)
	}
	text := fmt.Sprintf("*%s, `%s`, %v*\n%s", time.Now().Format(time.DateOnly), rep.command, took.Round(time.Second), res)
	for _, f := range res.figures {
		file, title, err := save(f, rep.dir)
		if err != nil {
			return err
		}
		text += fmt.Sprintf("\n![%s](%s)\n", title, file)
	}
	rep.bars = append(rep.bars, res.bars...)
	for _, t := range res.targets {
		rep.all = append(rep.all, fmt.Sprintf("| %d %s", row.number, t))
	}
	return rep.write(fmt.Sprint("row ", row.number), text)
}

// summarize writes what all rows have to reach, and where they were measured.
func (rep *report) summarize() error {
	text := fmt.Sprintf("`%s`, %s, %v. %s.\n\n| row | target | bound | value | reference | |\n|---|---|---|---|---|---|\n%s\n", rep.command,
		rep.began.Format(time.DateOnly), time.Since(rep.began).Round(time.Minute), machine(), strings.Join(rep.all, "\n"))
	return rep.write("summary", text)
}

// write replaces what is between the markers <!-- name --> and <!-- /name -->.
func (rep *report) write(name, text string) error {
	file := filepath.Join(rep.dir, "README.md")
	old, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		old, err = []byte(readme), nil
	}
	if err != nil {
		return err
	}
	begin, end := fmt.Sprintf("<!-- %s -->\n", name), fmt.Sprintf("<!-- /%s -->\n", name)
	before, rest, ok := strings.Cut(string(old), begin)
	_, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		return fmt.Errorf("%s: the markers of %s are missing", file, name)
	}
	return os.WriteFile(file, []byte(before+begin+text+end+after), 0o644)
}

// machine says what the figures are of.
func machine() string {
	model := "unknown CPU"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if m := regexp.MustCompile(`model name\s*: (.*)`).FindSubmatch(info); m != nil {
			model = string(m[1])
		}
	}
	system := runtime.GOOS
	if release, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		system += " " + strings.TrimSpace(string(release))
	}
	versions := []string{runtime.Version()}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			switch dep.Path {
			case "go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/client/v3", "k8s.io/client-go", "github.com/mailgun/holster/v4":
				versions = append(versions, dep.Path+" "+dep.Version)
			}
		}
	}
	return fmt.Sprintf("%s, %d cores, %s, %s; %s", model, runtime.NumCPU(), runtime.GOARCH, system, strings.Join(versions, ", "))
}

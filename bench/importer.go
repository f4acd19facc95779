package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

func measureImporter(ctx context.Context, r *run) (*result, error) {
	dir, err := os.MkdirTemp("", "importer-")
	if err != nil {
		return nil, err
	}
	r.onStop(func() { os.RemoveAll(dir) })
	type program struct {
		modules     int
		plain, bare int64
	}
	build := func(name string) (p program, err error) {
		file := filepath.Join(dir, name)
		if p.bare, err = buildSize(ctx, file, name, "-s -w"); err != nil {
			return p, err
		}
		if p.plain, err = buildSize(ctx, file, name, ""); err != nil {
			return p, err
		}
		info, err := buildinfo.ReadFile(file)
		if err == nil {
			p.modules = len(info.Deps)
		}
		return p, err
	}
	const logging = "stock, with log/slog"
	programs := make(map[string]program)
	t := table{
		caption: "A program that campaigns and resigns, built with -trimpath.",
		header:  []string{"imports", "modules", "bytes", "bytes with -s -w"},
	}
	for _, p := range []struct{ imports, directory string }{{stock.name, "stock"}, {logging, "logging"}, {ours.name, "leader"}} {
		built, err := build(p.directory)
		if err != nil {
			return nil, err
		}
		programs[p.imports] = built
		t.add(p.imports, fmt.Sprint(built.modules), fmt.Sprint(built.plain), fmt.Sprint(built.bare))
	}
	own, other, reference := programs[ours.name], programs[stock.name], programs[logging]
	res := &result{tables: []table{t}}
	res.atMost(1, exact(float64(own.modules-other.modules)), "modules that leader adds, itself included")
	more := func(n, than int64) float64 { return 100 * float64(n-than) / float64(than) }
	res.atMost(1, exact(more(own.plain, other.plain)), "bytes that leader adds, in %% of stock's").
		beside(logging, exact(more(reference.plain, other.plain)))
	res.atMost(1, exact(more(own.bare, other.bare)), "the same, with -s -w").
		beside(logging, exact(more(reference.bare, other.bare)))
	return res, nil
}

// buildSize builds one of the importers and returns its size.
func buildSize(ctx context.Context, file, name, ldflags string) (int64, error) {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags="+ldflags, "-o", file, "example.com/leader/bench/internal/importer/"+name)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("build %s: %w: %s", name, err, output.String())
	}
	info, err := os.Stat(file)
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

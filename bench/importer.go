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
	stock, err := build("stock")
	if err != nil {
		return nil, err
	}
	own, err := build("leader")
	if err != nil {
		return nil, err
	}
	t := table{
		caption: "A program that campaigns and resigns, built with -trimpath",
		header:  []string{"imports", "modules", "bytes", "bytes with -s -w"},
	}
	t.add("stock", fmt.Sprint(stock.modules), fmt.Sprint(stock.plain), fmt.Sprint(stock.bare))
	t.add("leader", fmt.Sprint(own.modules), fmt.Sprint(own.plain), fmt.Sprint(own.bare))
	res := &result{tables: []table{t}}
	res.atMost(1, float64(own.modules-stock.modules), "modules of leader's that stock's has not (itself)")
	res.atMost(1.01, float64(own.plain)/float64(stock.plain), "bytes of leader's / of stock's")
	res.atMost(1.01, float64(own.bare)/float64(stock.bare), "the same with -s -w")
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

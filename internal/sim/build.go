package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

const (
	module   = "example.com/leader"
	worldPkg = module + "/internal/sim/world"
)

// instead is what the library is compiled with in place of packages of the standard library, so that a process can
// be paused wherever it uses them.
var instead = map[string]string{
	"time":    module + "/internal/sim/machine/clock",
	"sync":    module + "/internal/sim/machine/locks",
	"context": module + "/internal/sim/machine/contexts",
}

// What is added to the package of the world tells it how it was compiled: that the library uses the clocks of
// machines, and where the runtime's randomness follows from a seed, how to set that.
const (
	clocksFile = "package world\n\nfunc init() { machineClocks = true }\n"
	seedFile   = "package world\n\nimport \"runtime\"\n\nfunc init() { seedRuntime = runtime.SimSeed }\n"
)

// An overlay is what the compiler takes in place of files.
type overlay struct {
	dir     string
	Replace map[string]string
}

func (o *overlay) replace(file, text string) error {
	name := filepath.Join(o.dir, strconv.Itoa(len(o.Replace))+".go")
	o.Replace[file] = name
	return os.WriteFile(name, []byte(text), 0o600)
}

// A core is the source of the library: the package at the root of a module and those of the module that it imports.
type core struct {
	dir   string
	files map[string]string // by their paths below dir, with slashes
}

// readCore reads the core of the module in dir.
func readCore(dir string) (*core, error) {
	c := &core{dir, make(map[string]string)}
	return c, c.read(".", make(map[string]bool))
}

func (c *core) read(pkg string, seen map[string]bool) error {
	if seen[pkg] {
		return nil
	}
	seen[pkg] = true
	files, err := fs.Glob(os.DirFS(c.dir), path.Join(pkg, "*.go"))
	if err != nil {
		return err
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(c.dir, filepath.FromSlash(file)))
		if err != nil {
			return err
		}
		c.files[file] = string(text)
		parsed, err := parser.ParseFile(token.NewFileSet(), file, text, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range parsed.Imports {
			if imported, ok := strings.CutPrefix(strings.Trim(spec.Path.Value, `"`), module+"/"); ok {
				if err := c.read(imported, seen); err != nil {
					return err
				}
			}
		}
	}
	if len(files) == 0 {
		return fmt.Errorf("%s has no package %s", c.dir, pkg)
	}
	return nil
}

// mutate makes the changes of a mutation. Each text must be there, once.
func (c *core) mutate(m *mutation) error {
	for _, change := range m.changes {
		if n := strings.Count(c.files[change.file], change.old); n != 1 {
			return fmt.Errorf("mutation %s is out of date: %s has %q %d times", m.name, change.file, change.old, n)
		}
		c.files[change.file] = strings.Replace(c.files[change.file], change.old, change.new, 1)
	}
	return nil
}

// pausable makes the core import what lets its goroutines be paused.
func (c *core) pausable() error {
	for file, text := range c.files {
		fset := token.NewFileSet()
		parsed, err := parser.ParseFile(fset, file, text, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range slices.Backward(parsed.Imports) { // what comes later in the file is not moved by this
			name := strings.Trim(spec.Path.Value, `"`)
			other, ok := instead[name]
			if !ok {
				continue
			}
			if spec.Name != nil {
				name = spec.Name.Name
			}
			from, to := fset.Position(spec.Pos()).Offset, fset.Position(spec.End()).Offset
			text = fmt.Sprintf("%s%s %q%s", text[:from], name, other, text[to:])
		}
		c.files[file] = text
	}
	return nil
}

// A target is what is to be built.
type target struct {
	library  string // the directory of another checkout, or empty
	mutation *mutation
}

// build builds the simulation with the target's library, in a new directory in dir, and returns the program. why says
// why its runs cannot be repeated, nil if they can.
func (t target) build(ctx context.Context, dir string) (binary string, why, err error) {
	if dir, err = os.MkdirTemp(dir, ""); err != nil {
		return "", nil, err
	}
	env, err := goEnv(ctx)
	if err != nil {
		return "", nil, err
	}
	home, err := readCore(env.module)
	if err != nil {
		return "", nil, err
	}
	library := home
	if t.library != "" {
		if library, err = readCore(t.library); err != nil {
			return "", nil, err
		}
	}
	files := maps.Clone(home.files)
	if t.mutation != nil {
		if err := library.mutate(t.mutation); err != nil {
			return "", nil, err
		}
	}
	if err := library.pausable(); err != nil {
		return "", nil, err
	}
	o := &overlay{dir, make(map[string]string)}
	for file := range files {
		if _, ok := library.files[file]; !ok {
			o.Replace[filepath.Join(env.module, filepath.FromSlash(file))] = "" // it has no such file
		}
	}
	for file, text := range library.files {
		if err := o.replace(filepath.Join(env.module, filepath.FromSlash(file)), text); err != nil {
			return "", nil, err
		}
	}
	world := filepath.Join(env.module, "internal", "sim", "world")
	if err := o.replace(filepath.Join(world, "compiled_clocks.go"), clocksFile); err != nil {
		return "", nil, err
	}
	if why = o.patchRuntime(env.goroot, env.release); why == nil {
		if err := o.replace(filepath.Join(world, "compiled_seed.go"), seedFile); err != nil {
			return "", nil, err
		}
	}
	binary = filepath.Join(dir, "world.test")
	return binary, why, o.compile(ctx, binary)
}

// compile builds the tests of the world. Their test of that name is the simulation: a bubble takes a *testing.T.
func (o *overlay) compile(ctx context.Context, binary string) error {
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	file := filepath.Join(o.dir, "overlay.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-overlay", file, "-vet", "off", "-o", binary, worldPkg)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build the simulation: %w", err)
	}
	return nil
}

// environment is what the go command says of itself and of the module.
type environment struct{ module, goroot, release string }

func goEnv(ctx context.Context) (environment, error) {
	dir, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		return environment{}, fmt.Errorf("the module is not here: %w", err)
	}
	env, err := exec.CommandContext(ctx, "go", "env", "GOROOT", "GOVERSION").Output()
	if err != nil {
		return environment{}, fmt.Errorf("go env: %w", err)
	}
	goroot, release, _ := bytes.Cut(bytes.TrimSpace(env), []byte("\n"))
	return environment{string(bytes.TrimSpace(dir)), string(goroot), string(release)}, nil
}

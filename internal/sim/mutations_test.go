package main

import (
	"os/exec"
	"strings"
	"testing"
)

func TestEachMutationIsOfTheSourceAsItIs(t *testing.T) {
	dir, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, m := range mutations {
		if names[m.name] {
			t.Errorf("there are two mutations %s", m.name)
		}
		names[m.name] = true
		library, err := readCore(strings.TrimSpace(string(dir)))
		if err != nil {
			t.Fatal(err)
		}
		if err := library.mutate(&m); err != nil {
			t.Error(err)
		}
	}
}

func TestRuntimeIsTheOneThatReplayIsTiedTo(t *testing.T) {
	env, err := goEnv(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	o := &overlay{t.TempDir(), make(map[string]string)}
	if err := o.patchRuntime(env.goroot, env.release); err != nil {
		t.Skip("the simulation says so, and runs without replay:", err)
	}
}

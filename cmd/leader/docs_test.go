package main

import (
	"os"
	"strings"
	"testing"
)

func TestCommandsOfTheDocumentsExist(t *testing.T) {
	t.Parallel()
	found := 0
	for _, path := range []string{"../../README.md", "../../docs/operations.md"} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		code := false
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "```") {
				code = line == "```sh\n"
			}
			if !code || !strings.HasPrefix(line, "leader ") {
				continue
			}
			found++
			cmd, args, err := newRoot().Find(strings.Fields(line)[1:])
			if err == nil {
				err = cmd.ParseFlags(args)
			}
			if err == nil {
				err = cmd.ValidateArgs(cmd.Flags().Args())
			}
			if err != nil {
				t.Errorf("%s: %s%v", path, line, err)
			}
		}
	}
	if found == 0 {
		t.Error("the documents name no command")
	}
}

//go:build unix

package main

import (
	"database/sql"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The program itself checks what the prices are in the end, and says so by its status.
func TestStoryEndsAsTold(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "fencing")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	began := time.Now()
	out, err := exec.Command(program).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("took %v", took)
	}
	rest := string(out)
	for _, part := range []string{
		"A  leads", "A  asks whether it leads, before it writes 110: true", "A  is paused",
		"B  leads", "B  writes 200 to fenced: done",
		"A  gets SIGCONT", "A  writes 110 to unfenced: done", "A  writes 110 to fenced: refused", "A  knows that its term is over: leader: term expired",
		"without the token the price is 110", "with the token the price is 200",
	} {
		_, after, ok := strings.Cut(rest, part)
		if !ok {
			t.Fatalf("%q is missing, or not in its place:\n%s", part, out)
		}
		rest = after
	}
}

// The statements of docs/guarantees.md do what it says of them.
func TestStatementsOfTheGuide(t *testing.T) {
	t.Parallel()
	guide, err := os.ReadFile("../../docs/guarantees.md")
	if err != nil {
		t.Fatal(err)
	}
	var statements []string
	for _, block := range regexp.MustCompile("(?s)```sql\n(.*?)```").FindAllStringSubmatch(string(guide), -1) {
		statements = append(statements, block[1])
	}
	if len(statements) != 3 {
		t.Fatalf("%d blocks of SQL, want 3", len(statements))
	}
	for _, statement := range statements {
		db, err := open(filepath.Join(t.TempDir(), "db"))
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		_, err = db.Exec(`
			CREATE TABLE prices (id INTEGER PRIMARY KEY, price INTEGER NOT NULL, token INTEGER NOT NULL);
			CREATE TABLE fences (election TEXT PRIMARY KEY, token INTEGER NOT NULL);
			INSERT INTO prices VALUES (1, 0, 0);
			INSERT INTO fences VALUES ('shop/prices', 0)`)
		if err != nil {
			t.Fatal(err)
		}
		for _, write := range []struct {
			token int64
			want  int64
		}{{5, 1}, {5, 1}, {7, 1}, {5, 0}, {6, 0}, {7, 1}, {8, 1}} {
			var args []any
			for name, value := range map[string]any{"id": 1, "price": 10, "token": write.token, "election": "shop/prices"} {
				if strings.Contains(statement, "$"+name) {
					args = append(args, sql.Named(name, value))
				}
			}
			result, err := db.Exec(statement, args...)
			if err != nil {
				t.Fatalf("%s: %v", statement, err)
			}
			if got, err := result.RowsAffected(); err != nil || got != write.want {
				t.Errorf("%swith token %d changes %d rows, want %d (%v)", statement, write.token, got, write.want, err)
			}
		}
	}
}

//go:build unix

// Fencing shows what a fencing token is for. An instance decides to write and is then paused until its term is over.
// When it resumes, it writes all the same. A row without a token accepts the late write, so the new leader's write is
// lost. A row with a token refuses it.
//
//	go run .
//
// The two instances are processes, and SIGSTOP pauses one. The database is SQLite, which takes no part in the election.
// etcd runs in this process. If the story ends in another way, the program exits with status 1.
package main

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"example.com/leader/internal/etcdtest"
	_ "modernc.org/sqlite"
)

// How an instance sets the price.
const (
	// withoutToken is the wrong way.
	withoutToken = `UPDATE unfenced SET price = ? WHERE id = 1`

	// withToken changes nothing if the row has seen a larger token. One statement both compares and changes: with a
	// separate read, another write could come in between.
	withToken = `UPDATE fenced SET price = ?1, token = ?2 WHERE id = 1 AND token <= ?2`
)

const schema = `
	CREATE TABLE unfenced (id INTEGER PRIMARY KEY, price INTEGER NOT NULL);
	CREATE TABLE fenced (id INTEGER PRIMARY KEY, price INTEGER NOT NULL, token INTEGER NOT NULL);
	INSERT INTO unfenced (id, price) VALUES (1, 0);
	INSERT INTO fenced (id, price, token) VALUES (1, 0, 0)`

func main() {
	name := flag.String("instance", "", "run as the instance of this `name`; the demonstration starts its instances with it")
	endpoint := flag.String("endpoint", "", "etcd's `address`, for an instance")
	database := flag.String("database", "", "the database's `file`, for an instance")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if *name != "" {
		err = instance(ctx, *name, *endpoint, *database)
	} else {
		err = demonstrate(ctx)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fencing:", err)
		os.Exit(1)
	}
}

func demonstrate(ctx context.Context) (err error) {
	// The pause, the handoff and the rest take about two TTLs.
	ctx, cancel := context.WithTimeout(ctx, 25*time.Second)
	defer cancel()
	members, stopEtcd, err := etcdtest.Run(1)
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	defer stopEtcd()
	dir, err := os.MkdirTemp("", "fencing-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	d := demo{began: time.Now(), endpoint: members[0].Endpoint, database: filepath.Join(dir, "shop.db")}
	db, err := open(d.database)
	if err != nil {
		return err
	}
	defer db.Close()
	if _, err := db.ExecContext(ctx, schema); err != nil {
		return err
	}
	return d.play(ctx, db)
}

func open(file string) (*sql.DB, error) {
	return sql.Open("sqlite", "file:"+file+"?_pragma=busy_timeout(5000)")
}

// A demo tells the story of two instances.
type demo struct {
	began    time.Time
	endpoint string
	database string
}

func (d *demo) say(format string, args ...any) {
	fmt.Printf("%6.3fs  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) play(ctx context.Context, db *sql.DB) error {
	d.say("two tables hold a price: unfenced, and fenced, which also has a column for the token")
	a, err := d.start(ctx, "A")
	if err != nil {
		return err
	}
	defer a.kill()
	if err := d.until(ctx, a, "paused"); err != nil {
		return err
	}
	// From here on A is stopped, or about to be, because it has sent itself SIGSTOP.
	b, err := d.start(ctx, "B")
	if err != nil {
		return err
	}
	defer b.kill()
	if err := d.until(ctx, b, "wrote"); err != nil {
		return err
	}
	d.say("A  gets SIGCONT and continues with its write")
	if err := a.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		return err
	}
	if err := d.until(ctx, a, "over"); err != nil {
		return err
	}
	if err := errors.Join(a.stop(), b.stop()); err != nil {
		return err
	}

	var unfenced, fenced int
	row := db.QueryRowContext(ctx, `SELECT unfenced.price, fenced.price FROM unfenced, fenced`)
	if err := row.Scan(&unfenced, &fenced); err != nil {
		return err
	}
	fmt.Println()
	fmt.Printf("without the token the price is %d: A's late write has replaced B's price\n", unfenced)
	fmt.Printf("with the token the price is %d: the database has refused A's late write\n", fenced)
	if unfenced != latePrice || fenced != newPrice {
		return fmt.Errorf("prices are %d and %d, want %d and %d", unfenced, fenced, latePrice, newPrice)
	}
	return nil
}

// A proc is an instance's process.
type proc struct {
	name  string
	cmd   *exec.Cmd
	lines chan string // of its output; closed when it ends
}

func (d *demo) start(ctx context.Context, name string) (*proc, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "-instance", name, "-endpoint", d.endpoint, "-database", d.database)
	cmd.Stderr = os.Stderr
	// A process group of its own, for two reasons. Ctrl-C reaches only the demonstration, which ends the instances. And
	// if the demonstration is killed, the system ends a stopped process, because nobody is left who could resume it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &proc{name: name, cmd: cmd, lines: make(chan string, 100)}
	go func() {
		defer close(p.lines)
		for in := bufio.NewScanner(stdout); in.Scan(); {
			p.lines <- in.Text()
		}
	}()
	return p, nil
}

// until prints what an instance says, line by line, each of the form "mark text", up to and including the line with
// this mark.
func (d *demo) until(ctx context.Context, p *proc, mark string) error {
	for {
		select {
		case line, ok := <-p.lines:
			if !ok {
				return fmt.Errorf("%s has ended before %q", p.name, mark)
			}
			got, text, _ := strings.Cut(line, " ")
			d.say("%s  %s", p.name, text)
			if got == mark {
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("timed out while waiting for %q of %s: %w", mark, p.name, ctx.Err())
		}
	}
}

// stop asks the instance to resign and waits for its end.
func (p *proc) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	for range p.lines { // until the output ends: only then may Wait close the pipe
	}
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	return nil
}

// kill ends the instance, stopped or not, if it has not ended.
func (p *proc) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

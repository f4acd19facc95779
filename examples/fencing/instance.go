//go:build unix

package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"syscall"
	"time"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	firstPrice = 100 // A's, while it leads
	latePrice  = 110 // A's, written after its term
	newPrice   = 200 // B's
)

// instance is what both processes do: they lead, and set the price while they lead.
func instance(ctx context.Context, name, endpoint, database string) error {
	db, err := open(database)
	if err != nil {
		return err
	}
	defer db.Close()
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            []string{endpoint},
		DialKeepAliveTime:    10 * time.Second, // finds a connection that died without a sign; TCP may take 15 minutes
		DialKeepAliveTimeout: 2 * time.Second,
		Logger:               zap.NewNop(),
	})
	if err != nil {
		return err
	}
	defer client.Close()
	w := &worker{name: name, db: db}
	err = leader.Run(ctx, client, "shop/prices", name, w.lead, leader.WithTTL(3*time.Second))
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}

type worker struct {
	name string
	db   *sql.DB
	done bool // this instance has played its part
}

// say reports to the demonstration, which may wait for the mark.
func say(mark, format string, args ...any) { fmt.Println(mark, fmt.Sprintf(format, args...)) }

func (w *worker) lead(ctx context.Context, l *leader.Leader) error {
	if w.done {
		<-ctx.Done()
		return ctx.Err()
	}
	w.done = true
	say("leads", "leads, with token %d", l.Token())
	if w.name == "B" {
		if err := w.write(ctx, l, newPrice); err != nil {
			return err
		}
		say("wrote", "continues to lead")
		<-ctx.Done()
		return ctx.Err()
	}
	if err := w.write(ctx, l, firstPrice); err != nil {
		return err
	}
	say("asked", "asks whether it leads, before it writes %d: %v", latePrice, l.IsLeader())
	say("paused", "is paused by SIGSTOP, between the answer and the write")
	if err := pause(); err != nil {
		return err
	}
	// However close to the write a check comes, a pause fits in between.
	if err := w.write(ctx, l, latePrice); err != nil {
		return err
	}
	<-ctx.Done()
	say("over", "knows that its term is over: %v", context.Cause(ctx))
	return ctx.Err()
}

// pause stops the process at this point until SIGCONT. A debugger, a frozen container or the migration of a virtual
// machine also stops a process, but not at so well-chosen a moment.
func pause() error {
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGSTOP); err != nil {
		return err
	}
	time.Sleep(50 * time.Millisecond) // this thread may run for a moment until it is stopped too
	return nil
}

// write sets the price in both tables.
func (w *worker) write(ctx context.Context, l *leader.Leader, price int) error {
	for _, table := range []struct {
		name, statement string
		args            []any
	}{
		{"unfenced", withoutToken, []any{price}},
		{"fenced", withToken, []any{price, l.Token()}},
	} {
		changed, err := w.exec(ctx, table.statement, table.args...)
		if err != nil {
			return err
		}
		if changed == 0 {
			say("write", "writes %d to %s: refused, the row has seen a larger token", price, table.name)
		} else {
			say("write", "writes %d to %s: done", price, table.name)
		}
	}
	return nil
}

// exec runs a statement and returns how many rows it has changed. The statement does not end with the term: the
// database must refuse it, rather than a cancellation that happens to come in time.
func (w *worker) exec(ctx context.Context, statement string, args ...any) (int64, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	result, err := w.db.ExecContext(ctx, statement, args...)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

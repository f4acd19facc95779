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

// instance is what both processes do: lead, and set the price while leading.
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
	done bool // A's part of the story is told
}

// say tells the demonstration; mark is what it may wait for.
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
		say("wrote", "goes on leading")
		<-ctx.Done()
		return ctx.Err()
	}
	if err := w.write(ctx, l, firstPrice); err != nil {
		return err
	}
	say("asked", "asks whether it leads, before it writes %d: %v", latePrice, l.IsLeader())
	say("paused", "is paused just then, by SIGSTOP")
	if err := pause(); err != nil {
		return err
	}
	// No check comes so close to the write that there is no room for a pause in between.
	if err := w.write(ctx, l, latePrice); err != nil {
		return err
	}
	<-ctx.Done()
	say("over", "knows that its term is over: %v", context.Cause(ctx))
	return ctx.Err()
}

// pause stops the process where it is until SIGCONT, as a debugger, a frozen container or a machine that
// is moved would, at a moment that they would not choose so well.
func pause() error {
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGSTOP); err != nil {
		return err
	}
	time.Sleep(50 * time.Millisecond) // this thread may run on until the others have been stopped
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

// exec runs a statement and returns how many rows it has changed. It does not end with the term, so that
// it is the database that refuses, not luck that cancels in time.
func (w *worker) exec(ctx context.Context, statement string, args ...any) (int64, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	result, err := w.db.ExecContext(ctx, statement, args...)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

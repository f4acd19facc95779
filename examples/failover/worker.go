//go:build unix

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"example.com/leader"
	"example.com/leader/examples/internal/demo"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	election   = "failover/election"
	counterKey = "failover/counter"
	journal    = "failover/journal/" // one key for each increment: the token of the term that made it
)

// An event is what a worker reports to the demonstration, as a line of JSON on its standard output.
type event struct {
	Worker string
	At     time.Time
	What   string // elected, increment, stopped, lost, refused, accepted, failed
	Token  int64
	N      int64  `json:",omitempty"` // of an increment
	Cause  string `json:",omitempty"`
}

// worker is a service as a user would write it: main calls [leader.Run] and works while it leads.
func worker(name, endpoints, leaseFile string, ttl time.Duration) error {
	ctx, stop := demo.Context() // in a service this is signal.NotifyContext
	defer stop()

	client, err := clientv3.New(clientv3.Config{
		Endpoints:            strings.Split(endpoints, ","),
		DialKeepAliveTime:    10 * time.Second, // finds a connection that died without a sign; TCP may take 15 minutes
		DialKeepAliveTimeout: 2 * time.Second,
		Logger:               zap.NewNop(),
	})
	if err != nil {
		return err
	}
	defer client.Close()

	w := &work{name: name, client: client, out: json.NewEncoder(os.Stdout)}
	err = leader.Run(ctx, client, election, name, w.lead, leader.WithTTL(ttl), leader.WithLeaseFile(leaseFile))
	if errors.Is(err, context.Canceled) {
		return nil // we were asked to stop, and have resigned
	}
	return err
}

type work struct {
	name   string
	client *clientv3.Client
	out    *json.Encoder
}

func (w *work) report(e event) {
	e.Worker, e.At = w.name, time.Now()
	_ = w.out.Encode(e) // fails when nobody listens any more; the end of standard input shows that
}

// lead increments a counter, twenty times a second, until the term ends.
func (w *work) lead(ctx context.Context, l *leader.Leader) error {
	w.report(event{What: "elected", Token: l.Token()})
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for l.IsLeader() && ctx.Err() == nil {
		n, err := w.increment(ctx, l)
		switch {
		case err == nil:
			w.report(event{What: "increment", Token: l.Token(), N: n})
		case ctx.Err() == nil && l.IsLeader():
			w.report(event{What: "failed", Token: l.Token(), Cause: err.Error()}) // the next tick tries again
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	if l.IsLeader() {
		w.report(event{What: "stopped", Token: l.Token()})
		return ctx.Err()
	}
	w.report(event{What: "lost", Token: l.Token(), Cause: fmt.Sprint(context.Cause(l.Context()))})

	// A real service would stop here. To show what the guard is for, this worker writes all the same.
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	switch n, err := w.increment(late, l); {
	case errors.Is(err, errRefused):
		w.report(event{What: "refused", Token: l.Token()})
	case err != nil:
		w.report(event{What: "failed", Token: l.Token(), Cause: err.Error()})
	default:
		w.report(event{What: "accepted", Token: l.Token(), N: n})
	}
	return nil
}

var errRefused = errors.New("refused by the guard")

// increment adds one to the counter and records the token, in a transaction that takes effect only while the term
// holds.
func (w *work) increment(ctx context.Context, l *leader.Leader) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	got, err := w.client.Get(ctx, counterKey)
	if err != nil {
		return 0, err
	}
	var n, rev int64
	if len(got.Kvs) > 0 {
		rev = got.Kvs[0].ModRevision
		if n, err = strconv.ParseInt(string(got.Kvs[0].Value), 10, 64); err != nil {
			return 0, err
		}
	}
	n++
	resp, err := w.client.Txn(ctx).
		If(l.Guard(), clientv3.Compare(clientv3.ModRevision(counterKey), "=", rev)).
		Then(
			clientv3.OpPut(counterKey, strconv.FormatInt(n, 10)),
			clientv3.OpPut(journalKey(n), strconv.FormatInt(l.Token(), 10)),
		).
		Commit()
	if err != nil {
		return 0, err
	}
	if !resp.Succeeded {
		return 0, errRefused
	}
	return n, nil
}

func journalKey(n int64) string { return fmt.Sprintf("%s%09d", journal, n) }

// Package recipetest has what the tests of the recipes share.
package recipetest

import (
	"context"
	"errors"
	"sync"
	"testing"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// NewElector returns an Elector, which needs no Close once it is out of use.
func NewElector(tb testing.TB, client *clientv3.Client, opts ...leader.Option) *leader.Elector {
	tb.Helper()
	e, err := leader.New(client, opts...)
	if err != nil {
		tb.Fatal(err)
	}
	return e
}

// Go runs an instance until stop is called or the test ends, and waits for its end.
func Go(tb testing.TB, run func(context.Context) error) (stop func()) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := etcdtest.Await(tb, "the end of an instance", ended); !errors.Is(err, context.Canceled) {
			tb.Errorf("an instance has returned %v", err)
		}
	})
	tb.Cleanup(stop)
	return stop
}

// AwaitQueue waits until n candidates are in an election.
func AwaitQueue(tb testing.TB, client *clientv3.Client, election string, n int64) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), etcdtest.Patience)
	defer cancel()
	for {
		resp, err := client.Get(ctx, election+"/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			tb.Fatalf("the queue has not become %d long: %v", n, err)
		}
		if resp.Count == n {
			return
		}
		watch, stop := context.WithCancel(ctx)
		<-client.Watch(watch, election+"/", clientv3.WithPrefix(), clientv3.WithRev(resp.Header.Revision+1))
		stop()
	}
}

// Transfer hands an election over to whoever is next, and waits until that one leads.
func Transfer(tb testing.TB, client *clientv3.Client, election string) {
	tb.Helper()
	AwaitQueue(tb, client, election, 2)
	ctx, cancel := context.WithTimeout(tb.Context(), etcdtest.Patience)
	defer cancel()
	if err := NewElector(tb, client).Transfer(ctx, election, leader.Candidate{}); err != nil {
		tb.Fatal(err)
	}
}

// Expect waits for events and checks that they come in this order, with no other in between.
func Expect(tb testing.TB, events <-chan string, want ...string) {
	tb.Helper()
	for _, w := range want {
		if got := etcdtest.Await(tb, w, events); got != w {
			tb.Fatalf("%q, want %q", got, w)
		}
	}
}

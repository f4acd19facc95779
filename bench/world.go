package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"example.com/leader/internal/etcdtest"
	"example.com/leader/internal/retry"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// A size says how many trials to make.
type size int

const (
	full size = iota
	few
	single // for the tests: that each row runs, not what it says
)

// patience bounds every wait for something that must happen.
const patience = 2 * time.Minute

// request bounds one request to etcd.
func request(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, 5*time.Second)
}

// A run is the measuring of one row.
type run struct {
	size  size
	log   func(format string, args ...any)
	stops []func()
}

// pick returns the number for the size of the run.
func (r *run) pick(ofFull, ofFew, ofSingle int) int {
	return [...]int{full: ofFull, few: ofFew, single: ofSingle}[r.size]
}

// onStop calls f when the row has been measured, the last one first.
func (r *run) onStop(f func()) { r.stops = append(r.stops, f) }

func (r *run) stop() {
	for len(r.stops) > 0 {
		last := len(r.stops) - 1
		f := r.stops[last]
		r.stops = r.stops[:last]
		f()
	}
}

// cluster starts an etcd of so many members and returns their endpoints.
func (r *run) cluster(members int, settings ...etcdtest.Settings) ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// As processes, so that etcd's memory and garbage collection are not the contestants'.
	if err := os.Setenv("ETCDTEST_ETCD", self); err != nil {
		return nil, err
	}
	started, stop, err := etcdtest.Run(members, append(settings, etcdtest.Settings{"unsafe-no-fsync": false})...)
	if err != nil {
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	r.onStop(stop)
	var endpoints []string
	for _, m := range started {
		endpoints = append(endpoints, m.Endpoint)
	}
	return endpoints, nil
}

// client returns a connected client.
func (r *run) client(ctx context.Context, endpoints []string, opts ...grpc.DialOption) (*clientv3.Client, error) {
	client, err := newClient(ctx, endpoints, opts...)
	if err == nil {
		r.onStop(func() { client.Close() })
	}
	return client, err
}

func (r *run) clients(ctx context.Context, n int, endpoints []string, opts ...grpc.DialOption) ([]*clientv3.Client, error) {
	clients := make([]*clientv3.Client, n)
	var errs error
	for i := range clients {
		var err error
		clients[i], err = r.client(ctx, endpoints, opts...)
		errs = errors.Join(errs, err)
	}
	return clients, errs
}

func newClient(ctx context.Context, endpoints []string, opts ...grpc.DialOption) (*clientv3.Client, error) {
	return connect(ctx, clientv3.Config{Endpoints: endpoints, DialOptions: opts})
}

// connected is the key that connect reads.
const connected = "connected"

// connect returns a client that has had an answer.
func connect(ctx context.Context, cfg clientv3.Config) (*clientv3.Client, error) {
	cfg.Logger = zap.NewNop()
	client, err := clientv3.New(cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := client.Get(ctx, connected); err != nil {
		return nil, errors.Join(fmt.Errorf("connect to etcd: %w", err), client.Close())
	}
	return client, nil
}

// queued blocks until at least n keys are under the prefix.
func queued(ctx context.Context, client *clientv3.Client, prefix string, n int) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		resp, err := client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return fmt.Errorf("wait for %d keys under %q: %w", n, prefix, err)
		}
		if resp.Count >= int64(n) {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
}

// receive is <-ch, bounded.
func receive[T any](ctx context.Context, what string, ch <-chan T) (v T, err error) {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case v = <-ch:
		return v, nil
	case <-timer.C:
		return v, fmt.Errorf("%s: not within %v", what, patience)
	case <-ctx.Done():
		return v, ctx.Err()
	}
}

// sleep is time.Sleep, unless ctx ends.
func sleep(ctx context.Context, d time.Duration) { _ = retry.Sleep(ctx, d) }

// each calls f for 0 to n-1, at most so many at a time, and returns what went wrong.
func each(n, together int, f func(i int) error) error {
	errs := make(chan error, n)
	slots := make(chan struct{}, together)
	for i := range n {
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			errs <- f(i)
		}()
	}
	var all error
	for range n {
		if err := <-errs; all == nil { // the first says enough
			all = err
		}
	}
	return all
}

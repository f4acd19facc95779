package leadertest_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/leadertest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The package documentation quotes the code below.

// work is the service. Only the instance that leads sends its name.
func work(ctx context.Context, client *clientv3.Client, name string, working chan<- string) error {
	lead := func(ctx context.Context, _ *leader.Leader) error {
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case working <- name:
			}
		}
	}
	return leader.Run(ctx, client, "example/work", name, lead, leader.WithTTL(2*time.Second))
}

func TestWorkContinuesWhenTheLeaderIsCutOff(t *testing.T) {
	server := leadertest.NewServer(t)
	clients := map[string]*clientv3.Client{
		"a": server.NewClient(t),
		"b": server.NewClient(t),
	}
	working := make(chan string)
	var instances sync.WaitGroup
	for name, client := range clients {
		instances.Go(func() {
			if err := work(t.Context(), client, name, working); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	t.Cleanup(instances.Wait) // after the end of t.Context

	first := <-working
	leadertest.Disconnect(t, clients[first])
	for name := range working {
		if name != first {
			return // the other instance has taken over
		}
	}
}

// A Transfer ends a term as a rolling update does: the next instance works only after this one has stopped.
func TestAnotherInstanceWorksAfterATransfer(t *testing.T) {
	server := leadertest.NewServer(t)
	working := make(chan string)
	var instances sync.WaitGroup
	for _, name := range []string{"a", "b"} {
		client := server.NewClient(t)
		instances.Go(func() {
			if err := work(t.Context(), client, name, working); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	t.Cleanup(instances.Wait)
	operator, err := leader.New(server.NewClient(t))
	if err != nil {
		t.Fatal(err)
	}

	first := <-working
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := operator.Transfer(ctx, "example/work", leader.Candidate{}) // to whoever is next
		if err == nil {
			break
		}
		if !errors.Is(err, leader.ErrNotCandidate) { // the other instance does not wait yet
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if next := <-working; next == first {
		t.Errorf("%s still works", first)
	}
}

// perform is a service that performs tasks. Only the instance that leads does so. Its health ends when a task hangs.
func perform(ctx context.Context, client *clientv3.Client, tasks <-chan func()) error {
	var began atomic.Int64 // when the present task began; 0 if there is none
	check := func(context.Context, string) error {
		if b := began.Load(); b != 0 && time.Since(time.Unix(0, b)) > 500*time.Millisecond {
			return errors.New("a task hangs")
		}
		return nil
	}
	lead := func(ctx context.Context, _ *leader.Leader) error {
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case task := <-tasks:
				began.Store(time.Now().UnixNano())
				task()
				began.Store(0)
			}
		}
	}
	return leader.Run(ctx, client, "example/perform", "", lead, leader.WithTTL(2*time.Second), leader.WithHealth(check))
}

// A test that makes the work hang also tests the service's check.
func TestAnotherInstancePerformsTheNextTaskWhenOneHangs(t *testing.T) {
	server := leadertest.NewServer(t)
	tasks := make(chan func())
	var instances sync.WaitGroup
	for range 2 {
		client := server.NewClient(t)
		instances.Go(func() {
			if err := perform(t.Context(), client, tasks); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	t.Cleanup(instances.Wait)

	tasks <- func() { <-t.Context().Done() } // hangs, whatever the context of the term says
	performed := make(chan struct{})
	tasks <- func() { close(performed) } // blocks until the other instance leads
	<-performed
}

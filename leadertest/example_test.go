package leadertest_test

import (
	"context"
	"errors"
	"sync"
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

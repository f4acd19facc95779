package standby_test

import (
	"context"
	"errors"
	"strconv"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/examples/recipes/internal/recipetest"
	"example.com/leader/examples/recipes/standby"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const election = "shop/standby"

// A lagging watcher delivers each change of the state late, as a member of etcd that lags does.
type lagging struct{ clientv3.Watcher }

func (w lagging) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	watch := w.Watcher.Watch(ctx, key, opts...)
	if key != "state/" {
		return watch
	}
	late := make(chan clientv3.WatchResponse, 100)
	go func() {
		defer close(late)
		for resp := range watch {
			time.Sleep(50 * time.Millisecond)
			late <- resp
		}
	}()
	return late
}

func TestNextLeaderBeginsWithTheLastWriteOfTheFormer(t *testing.T) {
	t.Parallel()
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	if _, err := client.Put(t.Context(), "state/orders", "0"); err != nil {
		t.Fatal(err)
	}
	type term struct {
		state  *standby.State
		leader *leader.Leader
		orders string // as the term has found it
	}
	terms := make(chan term, 10)
	start := func(name string, client *clientv3.Client) {
		s := &standby.State{Client: client, Prefix: "state/"}
		recipetest.Go(t, func(ctx context.Context) error {
			return s.Run(ctx, election, name, func(ctx context.Context, l *leader.Leader) error {
				found := s.Get("orders")
				terms <- term{s, l, found}
				<-ctx.Done()
				// Until it returns, it may write.
				orders, err := strconv.Atoi(found)
				if err != nil {
					return err
				}
				for range 3 {
					orders++
					if err := s.Put(context.WithoutCancel(ctx), l, "orders", strconv.Itoa(orders)); err != nil {
						t.Errorf("a write before lead has returned: %v", err)
						return err
					}
				}
				return ctx.Err()
			})
		})
	}
	start("a", client)
	first := etcdtest.Await(t, "a's term", terms)
	late := etcdtest.NewClient(t, client.Endpoints()...)
	late.Watcher = lagging{late.Watcher}
	start("b", late)
	for i, want := range []string{"3", "6"} {
		recipetest.Transfer(t, client, election)
		if next := etcdtest.Await(t, "the next term", terms); next.orders != want || first.orders != "0" {
			t.Errorf("term %d finds %s orders, want %s", i+2, next.orders, want)
		}
	}
	if err := first.state.Put(t.Context(), first.leader, "orders", "late"); !errors.Is(err, leader.ErrNotLeader) {
		t.Errorf("a write after the term: %v", err)
	}
}

package standby_test

import (
	"context"
	"errors"
	"strconv"
	"testing"

	"example.com/leader"
	"example.com/leader/examples/recipes/internal/recipetest"
	"example.com/leader/examples/recipes/standby"
	"example.com/leader/internal/etcdtest"
)

const election = "shop/standby"

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
	start := func(name string) {
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
				for range 10 {
					orders++
					if err := s.Put(context.WithoutCancel(ctx), l, "orders", strconv.Itoa(orders)); err != nil {
						return err
					}
				}
				return ctx.Err()
			})
		})
	}
	start("a")
	first := etcdtest.Await(t, "a's term", terms)
	start("b")
	for i, want := range []string{"10", "20"} {
		recipetest.Transfer(t, client, election)
		if next := etcdtest.Await(t, "the next term", terms); next.orders != want || first.orders != "0" {
			t.Errorf("term %d finds %s orders, want %s", i+2, next.orders, want)
		}
	}
	if err := first.state.Put(t.Context(), first.leader, "orders", "late"); !errors.Is(err, leader.ErrNotLeader) {
		t.Errorf("a write after the term: %v", err)
	}
}

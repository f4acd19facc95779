package drain_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"example.com/leader"
	"example.com/leader/examples/recipes/drain"
	"example.com/leader/examples/recipes/internal/recipetest"
	"example.com/leader/internal/etcdtest"
)

const election = "shop/drain"

func TestDrainedInstanceHasStoppedAndCampaignsAgainOnceUndrained(t *testing.T) {
	t.Parallel()
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	events := make(chan string, 100)
	start := func(name string) (tell func(method string, want int)) {
		s := drain.New()
		server := httptest.NewServer(s)
		t.Cleanup(server.Close)
		recipetest.Go(t, func(ctx context.Context) error {
			return s.Run(ctx, func(ctx context.Context) error {
				return leader.Run(ctx, client, election, name, func(ctx context.Context, _ *leader.Leader) error {
					events <- name + " begins"
					<-ctx.Done()
					events <- name + " ends"
					return ctx.Err()
				})
			})
		})
		return func(method string, want int) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), etcdtest.Patience)
			defer cancel()
			r, err := http.NewRequestWithContext(ctx, method, server.URL, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != want {
				t.Errorf("%s: %s", method, resp.Status)
			}
		}
	}
	a := start("a")
	recipetest.Expect(t, events, "a begins")
	b := start("b")
	recipetest.AwaitQueue(t, client, election, 2)

	a(http.MethodGet, http.StatusMethodNotAllowed)
	a(http.MethodPut, http.StatusOK)
	recipetest.Expect(t, events, "a ends", "b begins")
	recipetest.AwaitQueue(t, client, election, 1)
	a(http.MethodPut, http.StatusOK) // it is drained already

	b(http.MethodPut, http.StatusOK)
	if c, err := recipetest.NewElector(t, client).Current(t.Context(), election); !errors.Is(err, leader.ErrNoLeader) {
		t.Errorf("after b was drained: %v, %v", c, err)
	}
	recipetest.Expect(t, events, "b ends")
	a(http.MethodDelete, http.StatusOK)
	recipetest.Expect(t, events, "a begins")
	b(http.MethodDelete, http.StatusOK)
	recipetest.AwaitQueue(t, client, election, 2)
	b(http.MethodPut, http.StatusOK) // a candidate leaves the queue
	recipetest.AwaitQueue(t, client, election, 1)
}

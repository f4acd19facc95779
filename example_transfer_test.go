package leader_test

import (
	"context"
	"fmt"
	"log"
	"slices"
	"strings"
	"sync"
	"time"

	"example.com/leader"
)

// handOver transfers the election to the first candidate whose value begins with prefix, once there is one.
func handOver(ctx context.Context, elector *leader.Elector, election, prefix string) error {
	for {
		candidates, err := elector.Candidates(ctx, election)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(candidates, func(c leader.Candidate) bool { return strings.HasPrefix(c.Value, prefix) })
		if i >= 0 {
			return elector.Transfer(ctx, election, candidates[i]) // nil if it leads already
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// A rolling update hands over to the first instance of the new version, and not to one that is stopped next. Each
// instance campaigns with its version in its value.
func ExampleElector_Transfer() {
	client, stop := newClient()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	works := make(chan string)
	var instances sync.WaitGroup
	start := func(value string) {
		instances.Go(func() {
			err := leader.Run(ctx, client, "svc/jobs", value, func(ctx context.Context, _ *leader.Leader) error {
				works <- value
				<-ctx.Done()
				fmt.Println(value, "stops:", context.Cause(ctx))
				return nil
			})
			if ctx.Err() == nil {
				log.Print(err)
			}
		})
	}
	start("v1 on host a")
	fmt.Println(<-works, "works")
	start("v1 on host b")
	start("v2 on host c")

	operator, err := leader.New(client) // it need not be a candidate
	if err != nil {
		log.Fatal(err)
	}
	if err := handOver(ctx, operator, "svc/jobs", "v2 "); err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-works, "works")
	cancel()
	instances.Wait()
	// Output:
	// v1 on host a works
	// v1 on host a stops: leader: term transferred
	// v2 on host c works
	// v2 on host c stops: context canceled
}

package cron_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/examples/recipes/cron"
	"example.com/leader/examples/recipes/internal/recipetest"
	"example.com/leader/internal/etcdtest"
	"github.com/go-co-op/gocron/v2"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const election = "shop/cron"

// start runs an instance with one job, which is due all the time. When its context ends the job waits for finish.
func start(
	t *testing.T, client *clientv3.Client, name string, events chan<- string, finish <-chan struct{},
) *cron.Elector {
	e := cron.New(recipetest.NewElector(t, client), election)
	scheduler, err := gocron.NewScheduler(gocron.WithDistributedElector(e))
	if err != nil {
		t.Fatal(err)
	}
	job := e.Job(func(ctx context.Context, l *leader.Leader) error {
		if !l.IsLeader() {
			t.Error("the job has begun after the term")
		}
		events <- name + " begins"
		<-ctx.Done()
		<-finish
		events <- name + " ends"
		return ctx.Err()
	})
	_, err = scheduler.NewJob(gocron.DurationJob(10*time.Millisecond), gocron.NewTask(job),
		gocron.WithSingletonMode(gocron.LimitModeReschedule))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := scheduler.Shutdown(); err != nil {
			t.Error(err)
		}
	})
	scheduler.Start()
	recipetest.Go(t, func(ctx context.Context) error { return e.Run(ctx, name) })
	return e
}

func TestNextLeaderRunsJobsOnlyAfterTheFormerLeadersJobHasReturned(t *testing.T) {
	t.Parallel()
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	events, finish := make(chan string, 100), make(chan struct{})
	a := start(t, client, "a", events, finish)
	recipetest.Expect(t, events, "a begins")
	b := start(t, client, "b", events, finish)
	recipetest.AwaitQueue(t, client, election, 2)
	if a.IsLeader(t.Context()) != nil || !errors.Is(b.IsLeader(t.Context()), leader.ErrNotLeader) {
		t.Error("gocron is told the wrong leader")
	}

	brief, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err := recipetest.NewElector(t, client).Transfer(brief, election, leader.Candidate{})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Transfer while the job runs: %v", err)
	}
	finish <- struct{}{}
	recipetest.Expect(t, events, "a ends", "b begins")
	close(finish)
	recipetest.Transfer(t, client, election)
	recipetest.Expect(t, events, "b ends", "a begins")
}

package periodic_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"example.com/leader/examples/recipes/internal/recipetest"
	"example.com/leader/examples/recipes/periodic"
	"example.com/leader/internal/etcdtest"
	"github.com/alicebob/miniredis/v2"
	"github.com/hibiken/asynq"
)

const election = "shop/periodic"

func TestOneOfTwoSchedulersEnqueuesEachTaskOnce(t *testing.T) {
	t.Parallel()
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	redis := asynq.RedisClientOpt{Addr: miniredis.RunT(t).Addr()}
	task, unique := asynq.NewTask("report", nil), asynq.Unique(time.Hour)
	tasks := []asynq.PeriodicTaskConfig{{Cronspec: "@every 1s", Task: task, Opts: []asynq.Option{unique}}}
	events := make(chan string, 100)
	start := func(name string) {
		settings := &asynq.SchedulerOpts{LogLevel: asynq.FatalLevel, PostEnqueueFunc: func(_ *asynq.TaskInfo, err error) {
			switch {
			case err == nil:
				events <- name + " enqueues"
			case errors.Is(err, asynq.ErrDuplicateTask):
				events <- name + " is refused"
			default:
				t.Error(err)
			}
		}}
		recipetest.Go(t, func(ctx context.Context) error {
			return periodic.Run(ctx, client, election, name, redis, settings, tasks)
		})
	}
	start("a")
	recipetest.Expect(t, events, "a enqueues")
	start("b")
	recipetest.Transfer(t, client, election)
	events <- "transferred"
	for event := ""; event != "transferred"; event = etcdtest.Await(t, "the transfer", events) {
		if event == "b enqueues" {
			t.Error(event)
		}
	}
	recipetest.Expect(t, events, "b is refused") // since the task is still queued
	recipetest.Transfer(t, client, election)
	events <- "transferred"
	for event := ""; event != "transferred"; event = etcdtest.Await(t, "the transfer", events) {
		if event == "a enqueues" {
			t.Error(event)
		}
	}
	recipetest.Expect(t, events, "a is refused") // its second Scheduler
}

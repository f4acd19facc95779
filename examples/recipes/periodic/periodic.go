// Package periodic runs asynq's scheduler on the leader only, so that each periodic task is enqueued once, however many
// instances there are:
//
//	tasks := []asynq.PeriodicTaskConfig{{
//		Cronspec: "*/5 * * * *", // with "@every 5m" each term would count from its own start
//		Task:     asynq.NewTask("report", nil),
//		Opts:     []asynq.Option{asynq.Unique(4 * time.Minute)},
//	}}
//	err := periodic.Run(ctx, client, "my-service/periodic", "", asynq.RedisClientOpt{Addr: addr}, nil, tasks)
//
// Redis knows no token, so it accepts a late task from a process that was paused during its term. asynq.Unique makes
// Redis refuse such a task if it has the same type and payload as one that was enqueued a short time ago. Beyond that,
// the task's handler must be idempotent, as asynq demands anyway.
package periodic

import (
	"context"
	"fmt"

	"example.com/leader"
	"github.com/hibiken/asynq"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Run campaigns and, while this instance leads, enqueues the tasks on their schedules. It blocks until ctx ends, or a
// campaign or the start of the scheduler fails. When the term ends, it waits for a task that is being enqueued; so keep
// the timeouts of the connection to Redis shorter than the margin.
func Run(ctx context.Context, client *clientv3.Client, election, value string, redis asynq.RedisConnOpt,
	settings *asynq.SchedulerOpts, tasks []asynq.PeriodicTaskConfig, opts ...leader.Option,
) error {
	lead := func(ctx context.Context, _ *leader.Leader) error {
		// A new one for each term, because a Scheduler that was shut down cannot be started again.
		scheduler := asynq.NewScheduler(redis, settings)
		for _, t := range tasks {
			if _, err := scheduler.Register(t.Cronspec, t.Task, t.Opts...); err != nil {
				return fmt.Errorf("register %q at %q: %w", t.Task.Type(), t.Cronspec, err)
			}
		}
		// Not scheduler.Run: it waits for signals of its own, and not for the end of the term.
		if err := scheduler.Start(); err != nil {
			return err
		}
		defer scheduler.Shutdown()
		<-ctx.Done()
		return ctx.Err()
	}
	return leader.Run(ctx, client, election, value, lead, opts...)
}

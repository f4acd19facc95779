// Package cron runs the jobs of gocron on the leader only. Every instance has a scheduler and the same jobs:
//
//	e := cron.New(elector, "my-service/cron")
//	scheduler, err := gocron.NewScheduler(gocron.WithDistributedElector(e))
//	_, err = scheduler.NewJob(gocron.CronJob("*/5 * * * *", false), gocron.NewTask(e.Job(report)))
//	scheduler.Start()
//	err = e.Run(ctx, "") // until ctx ends, or campaigning fails
//	err = errors.Join(err, scheduler.Shutdown())
package cron

import (
	"context"
	"sync"

	"example.com/leader"
	"github.com/go-co-op/gocron/v2"
)

var _ gocron.Elector = (*Elector)(nil)

// An Elector tells gocron whether this instance leads, and ends the jobs with the term.
type Elector struct {
	elector  *leader.Elector
	election string

	mu   sync.RWMutex // each job holds it for reading as long as it runs
	term *term        // nil while the function that leads does not run
}

type term struct {
	ctx    context.Context // of the function that leads
	leader *leader.Leader
}

// New returns an Elector for gocron. It takes part in the election only in Run.
func New(elector *leader.Elector, election string) *Elector {
	return &Elector{elector: elector, election: election}
}

// Run campaigns and leads until ctx ends or a campaign fails. When a term ends, it waits for the jobs: nobody else is
// elected before they have returned, unless the term was lost and a job ignores that for longer than the margin.
func (e *Elector) Run(ctx context.Context, value string) error {
	return e.elector.Run(ctx, e.election, value, func(ctx context.Context, l *leader.Leader) error {
		e.set(&term{ctx, l})
		<-ctx.Done()
		e.set(nil)
		return ctx.Err()
	})
}

// set waits for the jobs that run.
func (e *Elector) set(t *term) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.term = t
}

// IsLeader is what gocron calls before each job. It reads the clocks and sends no request.
func (e *Elector) IsLeader(context.Context) error {
	if _, ok := e.elector.Leading(e.election); !ok {
		return leader.ErrNotLeader
	}
	return nil
}

// Job makes a function for gocron.NewTask. The context of job ends with the term and with the scheduler. What job
// writes, it protects by the token or guard of l: a process may be paused between any check and the write.
func (e *Elector) Job(job func(ctx context.Context, l *leader.Leader) error) func(context.Context) error {
	return func(ctx context.Context) error { //nolint:contextcheck // of its two contexts, either may end first
		e.mu.RLock()
		defer e.mu.RUnlock()
		t := e.term // it may have ended since gocron asked
		if t == nil || t.ctx.Err() != nil || !t.leader.IsLeader() {
			return leader.ErrNotLeader
		}
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(t.ctx, func() { cancel(context.Cause(t.ctx)) })()
		return job(ctx, t.leader)
	}
}

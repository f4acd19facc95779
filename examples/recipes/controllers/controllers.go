// Package controllers runs a manager of controller-runtime while this instance leads an election in etcd, instead of
// one in the Kubernetes API:
//
//	err := controllers.Run(ctx, client, "my-operator/leader", "", ctrl.GetConfigOrDie(), manager.Options{Scheme: scheme},
//		func(m manager.Manager) error { return (&Reconciler{Client: m.GetClient()}).SetupWithManager(m) })
//
// Kubernetes knows no token. What protects an object from a late write is its resource version: write with Update, or
// with a Patch that has client.MergeFromWithOptimisticLock. A forced apply and a plain Patch are not protected.
package controllers

import (
	"context"
	"fmt"
	"time"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/manager"
)

// Run campaigns and, each time this instance is elected, makes a manager, sets it up and runs it until the term ends.
// It blocks until ctx ends, or a campaign or the manager fails. What must also run in an instance that waits does not
// belong in the manager: probes, metrics, webhooks.
func Run(ctx context.Context, client *clientv3.Client, election, value string, config *rest.Config,
	options manager.Options, setup func(manager.Manager) error, opts ...leader.Option,
) error {
	// The term is the election.
	options.LeaderElection = false
	// Without this the manager gives up after 30 s, and leaves behind reconcilers that still work. Hooks.Overdue and a
	// warning in the log report them.
	forever := time.Duration(-1)
	options.GracefulShutdownTimeout = &forever
	// Otherwise the second term of a process fails, because the names of its controllers are taken by the first.
	skip := true
	options.Controller.SkipNameValidation = &skip
	// Its port could still be in use when the next term begins. Serve controller-runtime's metrics.Registry elsewhere.
	options.Metrics.BindAddress = "0"

	lead := func(ctx context.Context, _ *leader.Leader) error {
		m, err := manager.New(config, options) // one per term, because a manager cannot be started again
		if err != nil {
			return fmt.Errorf("make the manager: %w", err)
		}
		if err := setup(m); err != nil {
			return fmt.Errorf("set up the manager: %w", err)
		}
		return m.Start(ctx) // returns when all its reconcilers have returned
	}
	return leader.Run(ctx, client, election, value, lead, opts...)
}

// Package migrating holds the code of docs/migrating.md, so that it is compiled and run. It lies in
// this module since the peers that it migrates from are here.
package migrating

import (
	"context"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

func electionBefore(ctx context.Context, client *clientv3.Client, work func(context.Context)) error {
	session, err := concurrency.NewSession(client, concurrency.WithTTL(15))
	if err != nil {
		return err
	}
	defer session.Close()
	election := concurrency.NewElection(session, "svc/jobs")
	if err := election.Campaign(ctx, "instance-1"); err != nil {
		return err
	}
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-session.Done(): // may come after another has won
			cancel()
		case <-wctx.Done():
		}
	}()
	work(wctx)
	return election.Resign(context.WithoutCancel(ctx))
}

func electionAfter(ctx context.Context, client *clientv3.Client, work func(context.Context)) error {
	lead := func(ctx context.Context, _ *leader.Leader) error {
		work(ctx)
		return nil
	}
	return leader.Run(ctx, client, "svc/jobs", "instance-1", lead)
}

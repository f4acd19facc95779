package migrating

import (
	"context"
	"log"
	"os"
	"time"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	coordinationv1 "k8s.io/client-go/kubernetes/typed/coordination/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

func clientGoBefore(ctx context.Context, client coordinationv1.LeasesGetter, work func(context.Context)) {
	leaderelection.RunOrDie(ctx, leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: "svc", Name: "jobs"},
			Client:     client,
			LockConfig: resourcelock.ResourceLockConfig{Identity: "instance-1"},
		},
		LeaseDuration:   15 * time.Second,
		RenewDeadline:   10 * time.Second,
		RetryPeriod:     2 * time.Second,
		ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: work,
			OnStoppedLeading: func() { os.Exit(1) }, // nobody has waited for work
			OnNewLeader:      func(identity string) { log.Println("leader:", identity) },
		},
	})
}

func clientGoAfter(ctx context.Context, client *clientv3.Client, work func(context.Context)) error {
	lead := func(ctx context.Context, _ *leader.Leader) error {
		work(ctx)
		return nil
	}
	return leader.Run(ctx, client, "svc/jobs", "instance-1", lead,
		leader.WithTTL(15*time.Second),
		leader.WithMargin(5*time.Second),
		leader.WithHooks(leader.Hooks{LeaderChanged: func(_ string, c leader.Candidate) { log.Println("leader:", c.Value) }}))
}

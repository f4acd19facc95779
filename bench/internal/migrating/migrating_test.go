package migrating

import (
	"context"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const patience = 30 * time.Second

// client-go's side is compiled and not run: it needs Kubernetes.
var _ = clientGoBefore

func awaitQueue(t *testing.T, client *clientv3.Client, name string, n int) {
	t.Helper()
	e, err := leader.New(client)
	if err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); time.Since(began) < patience; time.Sleep(10 * time.Millisecond) {
		cs, err := e.Candidates(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if len(cs) == n {
			return
		}
	}
	t.Fatalf("waited in vain for %d candidates in %s", n, name)
}

// Processes of a service are replaced one by one: old and new ones wait in one queue, and one works at
// a time.
func TestElectionRollsOver(t *testing.T) {
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	type instance struct {
		working chan struct{}
		stop    context.CancelFunc
		ended   chan struct{}
	}
	var instances []instance
	versions := []func(context.Context, *clientv3.Client, func(context.Context)) error{
		electionBefore, electionAfter, electionBefore, electionAfter, clientGoAfter,
	}
	for n, run := range versions {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		i := instance{make(chan struct{}), cancel, make(chan struct{})}
		instances = append(instances, i)
		go func() {
			defer close(i.ended)
			_ = run(ctx, client, func(ctx context.Context) {
				close(i.working)
				<-ctx.Done()
			})
		}()
		awaitQueue(t, client, "svc/jobs", n+1)
	}
	for n, i := range instances {
		select {
		case <-i.working:
		case <-time.After(patience):
			t.Fatalf("instance %d does not work", n)
		}
		if n+1 < len(instances) {
			select {
			case <-instances[n+1].working:
				t.Fatalf("instance %d works beside instance %d", n+1, n)
			case <-time.After(100 * time.Millisecond): // what must not happen has no event
			}
		}
		i.stop()
		<-i.ended
	}
	awaitQueue(t, client, "svc/jobs", 0)
}

// A lock's keys are those of an election.
func TestLockRollsOver(t *testing.T) {
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	holder, err := leader.Campaign(t.Context(), client, "svc/report", "")
	if err != nil {
		t.Fatal(err)
	}
	versions := []func(context.Context, *clientv3.Client, string) (bool, error){lockBefore, lockAfter, lockBefore, lockAfter}
	results := make(chan error, len(versions))
	for n, run := range versions {
		go func() {
			done, err := run(t.Context(), client, "text")
			if err == nil && !done {
				t.Error("was not the owner")
			}
			results <- err
		}()
		awaitQueue(t, client, "svc/report", n+2)
	}
	select {
	case err := <-results:
		t.Fatalf("did not wait for the holder: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if err := holder.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range versions {
		select {
		case err := <-results:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatal("the lock is not handed over")
		}
	}
	awaitQueue(t, client, "svc/report", 0)
}

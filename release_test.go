package leader

import (
	"context"
	"testing"
	"time"

	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A silentLease is not renewed.
type silentLease struct{ clientv3.Lease }

func (silentLease) KeepAliveOnce(context.Context, clientv3.LeaseID) (*clientv3.LeaseKeepAliveResponse, error) {
	return nil, rpctypes.ErrNoLeader
}

// A term of the function Campaign gives its lease file up. That may take as long as the file's disk hangs, and nothing
// that ends the term waits for it.
func TestATermEndsAlthoughTheDiskOfItsLeaseFileHangs(t *testing.T) {
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	c := clientv3.NewCtxClient(client.Ctx())
	c.KV, c.Watcher, c.Lease = client.KV, client.Watcher, silentLease{client.Lease}
	e, err := New(c, WithTTL(3*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	hangs := make(chan struct{})
	e.once, e.release = true, func() { <-hangs }
	l, err := e.Campaign(t.Context(), "jobs", "")
	if err != nil {
		t.Fatal(err)
	}
	other, err := New(client)
	if err != nil {
		t.Fatal(err)
	}
	next, err := other.Campaign(t.Context(), "jobs", "") // when the lease has expired
	if err != nil {
		t.Fatal(err)
	}
	if l.Context().Err() == nil {
		t.Error("another leads, and the term has not ended")
	}
	close(hangs)
	for _, closing := range []*Elector{e, other} {
		if err := closing.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if next.IsLeader() {
		t.Error("a term has outlived its Elector")
	}
}

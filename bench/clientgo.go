package main

import (
	"context"
	"encoding/json"
	"fmt"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// clientGoTTL is the LeaseDuration that Kubernetes' own components use, with a RenewDeadline of 10 s
// and a RetryPeriod of 2 s. Other durations keep these ratios.
const clientGoTTL = 15 * time.Second

func joinClientGo(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (*candidate, error) {
	ctx, cancel := context.WithCancel(ctx)
	c := &candidate{won: make(chan time.Time, 1)}
	le, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock:            newEtcdLock(client, "client-go/"+election),
		LeaseDuration:   ttl,
		RenewDeadline:   ttl * 10 / 15,
		RetryPeriod:     ttl * 2 / 15,
		ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(context.Context) { c.won <- time.Now() },
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		cancel()
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		le.Run(ctx)
	}()
	c.close = func() error { cancel(); <-done; return nil }
	c.resign = c.close
	return c, nil
}

// An etcdLock keeps client-go's record in etcd as the Kubernetes API server keeps a Lease object: by
// optimistic concurrency on the modification revision.
type etcdLock struct {
	client   *clientv3.Client
	key      string
	identity string
	rev      int64 // of the record that was read or written last
}

var identities atomic.Int64

func newEtcdLock(client *clientv3.Client, key string) *etcdLock {
	return &etcdLock{client: client, key: key, identity: fmt.Sprint("candidate-", identities.Add(1), "-", time.Now().UnixNano())}
}

var leases = schema.GroupResource{Group: "coordination.k8s.io", Resource: "leases"}

// Get implements resourcelock.Interface.
func (l *etcdLock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	ctx, cancel := request(ctx)
	defer cancel()
	resp, err := l.client.Get(ctx, l.key)
	if err != nil {
		return nil, nil, err
	}
	if len(resp.Kvs) == 0 {
		return nil, nil, errors.NewNotFound(leases, l.key)
	}
	var record resourcelock.LeaderElectionRecord
	if err := json.Unmarshal(resp.Kvs[0].Value, &record); err != nil {
		return nil, nil, err
	}
	l.rev = resp.Kvs[0].ModRevision
	return &record, resp.Kvs[0].Value, nil
}

// Create implements resourcelock.Interface.
func (l *etcdLock) Create(ctx context.Context, record resourcelock.LeaderElectionRecord) error {
	return l.put(ctx, record, 0)
}

// Update implements resourcelock.Interface.
func (l *etcdLock) Update(ctx context.Context, record resourcelock.LeaderElectionRecord) error {
	return l.put(ctx, record, l.rev)
}

func (l *etcdLock) put(ctx context.Context, record resourcelock.LeaderElectionRecord, rev int64) error {
	value, err := json.Marshal(record)
	if err != nil {
		return err
	}
	ctx, cancel := request(ctx)
	defer cancel()
	resp, err := l.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(l.key), "=", rev)).
		Then(clientv3.OpPut(l.key, string(value))).
		Commit()
	if err != nil {
		return err
	}
	if !resp.Succeeded {
		return errors.NewConflict(leases, l.key, fmt.Errorf("not at revision %d any more", rev))
	}
	l.rev = resp.Header.Revision
	return nil
}

// RecordEvent implements resourcelock.Interface.
func (l *etcdLock) RecordEvent(string) {}

// Identity implements resourcelock.Interface.
func (l *etcdLock) Identity() string { return l.identity }

// Describe implements resourcelock.Interface.
func (l *etcdLock) Describe() string { return l.key }

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Who revokes the lease of a process with a lease file that was killed.
const (
	bySidecar = "leader with a lease file, reclaimed"
	byRestart = "leader with a lease file, restarted"
	ofReclaim = "one revocation and its watch event" // no way to end a lease is faster
)

// own is a child that leads an election with a lease file until it is killed. One that is started again with the file
// revokes the lease of the one before, and waits behind the successor.
func own(ctx context.Context, t task) (any, error) {
	client, err := newClient(ctx, t.Endpoints)
	if err != nil {
		return nil, err
	}
	e, err := leader.New(client, leader.WithTTL(time.Duration(t.Seconds)*time.Second), leader.WithLeaseFile(t.File))
	if err != nil {
		return nil, err
	}
	if t.Kind == byRestart {
		go func() { _, _ = e.Campaign(ctx, t.Election, "") }()
		return true, nil
	}
	_, err = e.Campaign(ctx, t.Election, "")
	return true, err
}

// reclaims kills a process with a lease file again and again, and adds what it took until the successor was elected.
func reclaims(ctx context.Context, took map[string]sample, endpoints []string, seconds, trials int) error {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	client, err := newClient(ctx, endpoints)
	if err != nil {
		return err
	}
	defer client.Close()
	for trial := range trials {
		for _, by := range []string{bySidecar, byRestart} {
			t := task{
				Role: "owner", Endpoints: endpoints, Seconds: seconds, Election: fmt.Sprintf("reclaim%d-%d-%s", seconds, trial, by),
				File: filepath.Join(dir, "lease"),
			}
			won, err := reclaimOnce(ctx, client, t, by)
			if err != nil {
				return err
			}
			took[by] = append(took[by], won)
		}
		revoked, err := revokeOnce(ctx, client)
		if err != nil {
			return err
		}
		took[ofReclaim] = append(took[ofReclaim], revoked)
	}
	return nil
}

func reclaimOnce(ctx context.Context, client *clientv3.Client, t task, by string) (won time.Duration, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var leads bool
	victim, err := startChild(ctx, t, &leads)
	if err != nil {
		return 0, err
	}
	defer victim.kill()
	successor, err := ours.join(ctx, client, t.Election, time.Duration(t.Seconds)*time.Second)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, successor.close()) }()
	if err := ours.awaitQueued(ctx, client, t.Election, 2); err != nil {
		return 0, err
	}
	sleep(ctx, 50*time.Millisecond) // for all to be at rest
	done := make(chan error, 1)
	if by == bySidecar {
		go func() { done <- leader.Reclaim(ctx, client, t.File) }()
	}
	killed := time.Now()
	victim.kill()
	if by == byRestart {
		t.Kind = byRestart
		restarted, err := startChild(ctx, t, &leads)
		if err != nil {
			return 0, err
		}
		defer restarted.kill()
		done <- nil
	}
	at, err := receive(ctx, "the successor to be elected", successor.won)
	return at.Sub(killed), errors.Join(err, <-done)
}

// revokeOnce measures the limit.
func revokeOnce(ctx context.Context, client *clientv3.Client) (time.Duration, error) {
	ctx, cancel := request(ctx)
	defer cancel()
	granted, err := client.Grant(ctx, 60)
	if err != nil {
		return 0, err
	}
	if _, err := client.Put(ctx, "limit", "", clientv3.WithLease(granted.ID)); err != nil {
		return 0, err
	}
	events := client.Watch(ctx, "limit", clientv3.WithFilterPut(), clientv3.WithCreatedNotify())
	if _, err := receive(ctx, "a watch", events); err != nil {
		return 0, err
	}
	began := time.Now()
	if _, err := client.Revoke(ctx, granted.ID); err != nil {
		return 0, err
	}
	_, err = receive(ctx, "the deletion", events)
	return time.Since(began), err
}

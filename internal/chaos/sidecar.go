//go:build linux

package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
)

// fileOf is the lease file for an election for which the worker takes a lease of its own.
func (w worker) fileOf(name string) string { return w.File + "-" + name }

// sidecarOf is the name of a worker's sidecar.
func sidecarOf(worker string) string { return worker + "-sidecar" }

// reclaim is the sidecar of a worker: whenever a process of the worker has died, it revokes its leases, until ctx ends.
// It reaches etcd as the worker does.
func (w worker) reclaim(ctx context.Context) error {
	r, err := newRecorder(w.Dir, sidecarOf(w.Name))
	if err != nil {
		return err
	}
	client := w.dial(ctx, r, w.Endpoints)
	if client == nil {
		return nil
	}
	files := make(map[string][]string) // the elections whose leases are in each file
	for _, name := range w.Own {
		files[w.fileOf(name)] = []string{name}
	}
	if len(w.Shared) > 0 {
		files[w.File] = w.Shared
	}
	var wg sync.WaitGroup
	for file, elections := range files {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(w.Seed, 0))
			for ctx.Err() == nil {
				e := oracle.Entry{Kind: oracle.Reclaimed, From: now(), Value: w.Name, Result: oracle.OK}
				if err := leader.Reclaim(ctx, client, file); err != nil {
					e.Result, e.Err = oracle.Unknown, err.Error()
				}
				if ctx.Err() != nil {
					return
				}
				e.T = now()
				for _, name := range elections {
					e.Election = root + name
					r.add(e)
				}
				sleep(ctx, random, 10*time.Millisecond, 100*time.Millisecond) // Reclaim may return at once
			}
		})
	}
	wg.Wait()
	if err := client.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return goleak.Find()
}

// intercept records which leases are granted, before the library knows them, and which ones are revoked.
func (r *Recorder) intercept(
	ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	began := now()
	err := invoke(ctx, method, req, reply, conn, opts...)
	if granted, ok := reply.(*etcdserverpb.LeaseGrantResponse); ok && err == nil {
		r.add(oracle.Entry{Kind: oracle.Granted, Lease: granted.ID})
	}
	if revoke, ok := req.(*etcdserverpb.LeaseRevokeRequest); ok {
		e := oracle.Entry{Kind: oracle.Revoked, From: began, Lease: revoke.ID}
		if err != nil {
			e.Err = err.Error()
		}
		r.add(e)
	}
	return err
}

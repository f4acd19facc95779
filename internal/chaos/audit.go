//go:build linux

package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"example.com/leader/internal/oracle"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// An audit records every change in etcd under root, as soon as one of the members reports it.
type audit struct {
	*Recorder
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu  sync.Mutex
	rev int64 // recorded so far
}

func startAudit(s *system) (*audit, error) {
	r, err := newRecorder(s.dir, "audit")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	a := &audit{Recorder: r, cancel: cancel}
	for _, m := range s.members {
		a.wg.Go(func() {
			for ctx.Err() == nil {
				a.follow(ctx, s, m)
				select {
				case <-time.After(200 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		})
	}
	s.closers = append(s.closers, func() { cancel(); a.wg.Wait() })
	return a, nil
}

// follow records what a member reports, until its watch ends.
func (a *audit) follow(ctx context.Context, s *system, m *member) {
	client, err := s.newRootClient(m)
	if err != nil {
		return
	}
	defer client.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// This watch does not require a leader: a member that has lost its leader still reports what it knows.
	for resp := range client.Watch(ctx, root, clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithRev(a.recorded()+1)) {
		if err := resp.Err(); err != nil {
			if err == rpctypes.ErrCompacted && resp.CompactRevision > a.recorded()+1 { //nolint:errorlint // never wrapped
				a.add(oracle.Entry{Kind: oracle.Failure, Err: fmt.Sprintf("the audit is at revision %d, and the history is compacted at %d", a.recorded(), resp.CompactRevision)})
			}
			return
		}
		a.record(resp.Events)
	}
}

func (a *audit) record(events []*clientv3.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	known, t := a.rev, now()
	for _, ev := range events {
		if ev.Kv.ModRevision <= known {
			continue // another member has already reported it
		}
		e := oracle.Entry{T: t, Kind: oracle.Event, Op: "put", Rev: ev.Kv.ModRevision, Key: string(ev.Kv.Key), Token: ev.Kv.CreateRevision, Value: string(ev.Kv.Value), Lease: ev.Kv.Lease}
		if ev.Type == clientv3.EventTypeDelete {
			e.Op = "delete"
			if ev.PrevKv != nil {
				e.Token = ev.PrevKv.CreateRevision
			}
		}
		a.add(e)
		a.rev = ev.Kv.ModRevision
	}
}

func (a *audit) recorded() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.rev
}

// stop waits until everything up to a revision has been recorded, and ends the audit.
func (a *audit) stop(rev int64) error {
	deadline := time.Now().Add(patience)
	for a.recorded() < rev && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	a.cancel()
	a.wg.Wait()
	if recorded := a.recorded(); recorded < rev {
		return fmt.Errorf("the audit has reached revision %d of %d", recorded, rev)
	}
	a.add(oracle.Entry{Kind: oracle.AuditEnd, Rev: rev})
	return nil
}

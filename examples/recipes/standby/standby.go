// Package standby has an instance load its state before it may lead, and keep it up to date while it waits. When it is
// elected, it starts work at once:
//
//	state := &standby.State{Client: client, Prefix: "my-service/state/"}
//	err := state.Run(ctx, "my-service/leader", "", func(ctx context.Context, l *leader.Leader) error {
//		... // state.Get has all that former leaders wrote; write with state.Put
//	})
package standby

import (
	"context"
	"fmt"
	"sync"
	"time"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// State is a copy of the keys below a prefix in etcd. Use a new one for each Run.
type State struct {
	Client *clientv3.Client
	Prefix string

	mu       sync.Mutex
	values   map[string]string
	revision int64     // of the last change in values
	changed  sync.Cond // of revision
}

// Run loads the state and only then campaigns, so that nobody waits behind an instance that is not ready. It blocks
// until ctx ends, lead returns during a term, or the state cannot be loaded or followed: then start the process again.
func (s *State) Run(ctx context.Context, election, value string, lead func(context.Context, *leader.Leader) error,
	opts ...leader.Option,
) error {
	s.values, s.changed.L = make(map[string]string), &s.mu
	resp, err := s.Client.Get(ctx, s.Prefix, clientv3.WithPrefix())
	if err != nil {
		return fmt.Errorf("load the state: %w", err)
	}
	for _, kv := range resp.Kvs {
		s.values[string(kv.Key)] = string(kv.Value)
	}
	watching, stop := context.WithCancel(context.WithoutCancel(ctx)) // since lead may write until it has returned
	ctx, cancel := context.WithCancelCause(ctx)
	var following sync.WaitGroup
	following.Go(func() { cancel(s.follow(watching, resp.Header.Revision+1)) }) // who cannot follow must not lead
	defer following.Wait()
	defer stop()
	return leader.Run(ctx, s.Client, election, value, func(ctx context.Context, l *leader.Leader) error {
		// The copy may lack the last writes of former leaders. It has them as soon as it has this one, which is newer.
		if err := s.Put(ctx, l, "leader", fmt.Sprint(l.Token())); err != nil {
			return fmt.Errorf("catch up with the state: %w", err)
		}
		return lead(ctx, l)
	}, opts...)
}

// follow returns an error if etcd has compacted the history that it needs. In an outage it waits. An instance that is
// elected while its watch is still behind fails to catch up.
func (s *State) follow(ctx context.Context, from int64) error {
	for w := range s.Client.Watch(ctx, s.Prefix, clientv3.WithPrefix(), clientv3.WithRev(from)) {
		if err := w.Err(); err != nil {
			return fmt.Errorf("follow the state: %w", err)
		}
		s.mu.Lock()
		for _, ev := range w.Events {
			s.revision = ev.Kv.ModRevision // not that of the header, which may be ahead of the events
			if s.values[string(ev.Kv.Key)] = string(ev.Kv.Value); ev.Type == clientv3.EventTypeDelete {
				delete(s.values, string(ev.Kv.Key))
			}
		}
		s.mu.Unlock()
		s.changed.Broadcast()
	}
	return nil // ctx has ended
}

// Get returns the value of a key, "" if there is none.
func (s *State) Get(key string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.values[s.Prefix+key]
}

// Put writes a key if the term l still holds, and waits until Get has the new value, 5 s at most.
func (s *State) Put(ctx context.Context, l *leader.Leader, key, value string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := s.Client.Txn(ctx).If(l.Guard()).Then(clientv3.OpPut(s.Prefix+key, value)).Commit()
	if err != nil {
		return err
	} else if !resp.Succeeded {
		return leader.ErrNotLeader
	}
	// It takes the lock so that it cannot come between the check of ctx and the wait.
	defer context.AfterFunc(ctx, func() { s.mu.Lock(); defer s.mu.Unlock(); s.changed.Broadcast() })()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.revision < resp.Header.Revision && ctx.Err() == nil {
		s.changed.Wait()
	}
	return ctx.Err()
}

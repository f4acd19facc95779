package lease

import (
	"context"
	"errors"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A Key is a key in etcd that is bound to a session's lease. Renewals read it: they tell its
// owner when it is gone, and delete it when it was abandoned.
type Key struct {
	s    *Session
	name string
	gone func()

	// Guarded by s.mu.
	rev       int64 // create revision; 0 until known
	abandoned bool
}

// Track makes renewals read the key, from before it is put until it is dropped or, if it may be
// left in etcd without an owner, abandoned. gone is called, at most a few times and without
// locks held, when a renewal finds that the key with the revision given to Joined does not exist.
//
// left says that an earlier owner may have left the key in etcd. It must be deleted before it is
// put again: a new term on an old create revision would bring the old term's token back to life.
func (s *Session) Track(name string, gone func()) (k *Key, left bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, left = s.keys[name]
	k = &Key{s: s, name: name, gone: gone}
	s.keys[name] = k
	return k, left
}

// Joined says that the key exists, with this create revision.
func (k *Key) Joined(rev int64) {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	k.rev = rev
}

// Drop says that the key is known not to be in etcd any more.
func (k *Key) Drop() {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	if k.s.keys[k.name] == k { // else a successor tracks the name
		delete(k.s.keys, k.name)
	}
}

// Abandon says that nobody owns the key any more although it may be in etcd, now or later (a
// request without an answer may still be on its way). For as long as others keep the lease
// alive, renewals delete it.
func (k *Key) Abandon() {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	k.abandoned = true
}

// orphan is an abandoned key that was found in etcd.
type orphan struct {
	name string
	rev  int64
}

// sample returns up to most of the keys, in random order, as they are now. It prefers those that
// are known to have been put: one that was not may be refused for lack of permission. Of a single
// key a renewal may depend, so that an abandoned one is the last choice then.
func (s *Session) sample(most int) []Key {
	s.mu.Lock()
	defer s.mu.Unlock()
	var keys []Key
	var unsure *Key
	for _, k := range s.keys {
		if k.rev == 0 && !k.abandoned || most == 1 && k.abandoned {
			unsure = k
			continue
		}
		if keys = append(keys, *k); len(keys) == most {
			return keys
		}
	}
	if len(keys) == 0 && unsure != nil {
		keys = append(keys, *unsure)
	}
	return keys
}

// readKeys reads up to most of the lease's keys with one linearizable request, reports those
// that are gone to their owners, and returns the raft term of the answer and the abandoned keys
// that it found.
func (s *Session) readKeys(most int, timeout time.Duration) (term uint64, orphans []orphan, err error) {
	keys := s.sample(most)
	if len(keys) == 0 {
		return 0, nil, errors.New("no key to read") // a read of nothing would not be linearizable
	}
	gets := make([]clientv3.Op, len(keys))
	for i, k := range keys {
		gets[i] = clientv3.OpGet(k.name, clientv3.WithKeysOnly())
	}
	ctx, cancel := context.WithTimeout(retry.RequireLeader(s.ctx), timeout)
	defer cancel()
	resp, err := s.client.Txn(ctx).Then(gets...).Commit()
	if err != nil {
		return 0, nil, err
	}
	if resp == nil || resp.Header == nil || len(resp.Responses) != len(keys) {
		return 0, nil, errors.New("the client answered a read with neither keys nor error")
	}
	for i, k := range keys {
		rev := createRevision(resp.Responses[i])
		switch {
		case k.abandoned:
			if rev != 0 {
				orphans = append(orphans, orphan{k.name, rev})
			}
		case k.rev != 0 && k.rev != rev:
			k.gone()
		}
	}
	return resp.Header.RaftTerm, orphans, nil
}

func createRevision(resp *etcdserverpb.ResponseOp) int64 {
	if kvs := resp.GetResponseRange().GetKvs(); len(kvs) > 0 {
		return kvs[0].CreateRevision
	}
	return 0
}

// sweep deletes abandoned keys, for as long as one attempt to renew may take: it must not hold up
// the next renewal. What is left then is found again.
func (s *Session) sweep(orphans []orphan, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(retry.RequireLeader(s.ctx), timeout)
	defer cancel()
	for _, o := range orphans {
		s.mu.Lock()
		k := s.keys[o.name]
		mine := k != nil && k.abandoned
		s.mu.Unlock()
		if !mine {
			continue // a new campaign has taken it over, and deletes it itself
		}
		_, err := s.client.Txn(ctx).
			If(clientv3.Compare(clientv3.CreateRevision(o.name), "=", o.rev)).
			Then(clientv3.OpDelete(o.name)).
			Commit()
		if err != nil {
			return
		}
	}
}

// Package queue is an election's queue of candidates in etcd.
//
// A candidate is a key `<name>/<lease in hex>`, bound to that lease, as
// [concurrency.NewElection] and `etcdctl elect` write it. The candidate with the lowest create
// revision leads; the others wait, each for the one before it alone, so that a handoff wakes
// one of them and not all.
package queue

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A Candidate is one key of the queue. The zero value is nobody.
type Candidate struct {
	Value string
	Token int64 // create revision
	Key   string
	Lease clientv3.LeaseID
}

// A Queue is the queue of one election. Its methods may be called concurrently, as long as each
// call has a [retry.Loop] of its own.
type Queue struct {
	client *clientv3.Client
	name   string
	prefix string
}

// New returns the queue of the election with this name.
func New(client *clientv3.Client, name string) *Queue {
	return &Queue{client: client, name: name, prefix: name + "/"}
}

// Name is the election's.
func (q *Queue) Name() string { return q.name }

// Prefix is what all keys of the queue begin with. Not every key that does is of the queue:
// other elections and other data may lie under it.
func (q *Queue) Prefix() string { return q.prefix }

// Key is the key of the candidate with this lease.
func (q *Queue) Key(id clientv3.LeaseID) string {
	return q.prefix + strconv.FormatInt(int64(id), 16)
}

// ParseKey returns the lease in a candidate's key, and whether it is one.
func (q *Queue) ParseKey(key string) (clientv3.LeaseID, bool) {
	hex, ok := strings.CutPrefix(key, q.prefix)
	if !ok {
		return 0, false
	}
	id, err := strconv.ParseInt(hex, 16, 64)
	if err != nil || id <= 0 || strconv.FormatInt(id, 16) != hex {
		return 0, false
	}
	return clientv3.LeaseID(id), true
}

func (q *Queue) candidate(kv *mvccpb.KeyValue) (Candidate, bool) {
	id, ok := q.ParseKey(string(kv.Key))
	return Candidate{Value: string(kv.Value), Token: kv.CreateRevision, Key: string(kv.Key), Lease: id}, ok
}

// list returns the candidates among kvs.
func (q *Queue) list(kvs []*mvccpb.KeyValue) []Candidate {
	cs := make([]Candidate, 0, len(kvs))
	for _, kv := range kvs {
		if c, ok := q.candidate(kv); ok {
			cs = append(cs, c)
		}
	}
	return cs
}

// A Place is a candidate's place in the queue.
type Place struct {
	Token int64 // of the candidate itself

	// The candidate before it; before is empty if there is none, and the place wins.
	before string
	rev    int64
	oldest bool // nobody was before that one when the queue was last read
}

// First reports whether the place is the first of the queue, as far as it was last read.
func (p Place) First() bool { return p.before == "" }

// Join puts the candidate's key, unless it is there already: then a former try whose reply was
// lost has put it. The key must not have been left behind by somebody else, see [Queue.Remove].
func (q *Queue) Join(ctx context.Context, loop *retry.Loop, id clientv3.LeaseID, value string) (Place, error) {
	key := q.Key(id)
	var place Place
	err := loop.Do(ctx, func(ctx context.Context) error {
		resp, err := q.client.Txn(ctx).
			If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
			Then(
				clientv3.OpPut(key, value, clientv3.WithLease(id)),
				q.newest(2), // the candidate itself and the one before it
				q.oldest(),
			).
			Else(clientv3.OpGet(key, clientv3.WithKeysOnly())).
			Commit()
		if err != nil {
			return err
		}
		if resp.Succeeded {
			newest := resp.Responses[1].GetResponseRange().Kvs
			oldest := resp.Responses[2].GetResponseRange().Kvs
			place, err = q.place(ctx, resp.Header.Revision, newest[1:], oldest)
			return err
		}
		place, err = q.behind(ctx, resp.Responses[0].GetResponseRange().Kvs[0].CreateRevision)
		return err
	})
	return place, err
}

// Remove deletes the candidate's key if its create revision is token, or in any case if token
// is 0. It sends one request, bounded by ctx.
func (q *Queue) Remove(ctx context.Context, key string, token int64) error {
	var cmps []clientv3.Cmp
	if token != 0 {
		cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(key), "=", token))
	}
	rctx, cancel := retry.Request(ctx)
	defer cancel()
	_, err := q.client.Txn(rctx).If(cmps...).Then(clientv3.OpDelete(key)).Commit()
	return err
}

func (q *Queue) newest(n int64, opts ...clientv3.OpOption) clientv3.Op {
	opts = append(opts, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(n),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend))
	return clientv3.OpGet(q.prefix, opts...)
}

func (q *Queue) oldest() clientv3.Op {
	return clientv3.OpGet(q.prefix, append(clientv3.WithFirstCreate(), clientv3.WithKeysOnly())...)
}

// ErrGone is returned when a candidate's own key turns out to be gone.
var ErrGone = errors.New("the candidate's key is gone")

// behind reads the place of the candidate with this token.
func (q *Queue) behind(ctx context.Context, token int64) (Place, error) {
	resp, err := q.client.Txn(ctx).Then(q.newest(2, clientv3.WithMaxCreateRev(token)), q.oldest()).Commit()
	if err != nil {
		return Place{}, err
	}
	newest := resp.Responses[0].GetResponseRange().Kvs
	oldest := resp.Responses[1].GetResponseRange().Kvs
	if len(newest) == 0 || newest[0].CreateRevision != token {
		return Place{}, ErrGone
	}
	return q.place(ctx, token, newest[1:], oldest)
}

// place works out the place of the candidate with this token from the newest key before it and
// the oldest key of all. Where the newest is no candidate it reads all keys; that is the price
// of an election whose name is the beginning of another's.
func (q *Queue) place(ctx context.Context, token int64, before, oldest []*mvccpb.KeyValue) (Place, error) {
	if len(before) == 0 {
		return Place{Token: token}, nil
	}
	if c, ok := q.candidate(before[0]); ok {
		return Place{Token: token, before: c.Key, rev: c.Token, oldest: c.Token == oldest[0].CreateRevision}, nil
	}
	resp, err := q.client.Get(ctx, q.prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(),
		clientv3.WithMaxCreateRev(token-1), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	if err != nil {
		return Place{}, err
	}
	cs := q.list(resp.Kvs)
	if len(cs) == 0 {
		return Place{Token: token}, nil
	}
	last := cs[len(cs)-1]
	return Place{Token: token, before: last.Key, rev: last.Token, oldest: len(cs) == 1}, nil
}

// Wait blocks until nobody is before the candidate, and returns nil then, or until ctx ends or
// a request fails for good. Whether the candidate's own key is still there is for another watch to
// tell; where that key is deleted together with the one before it, either watch may be the first.
func (q *Queue) Wait(ctx context.Context, loop *retry.Loop, p Place, reread time.Duration) error {
	for !p.First() {
		if err := q.WaitDeleted(ctx, loop, p.before, p.rev, reread); err != nil {
			return err
		}
		if p.oldest {
			// Create revisions only grow, so nobody can have come before the oldest since: the
			// watch event alone elects, without another read.
			return nil
		}
		token, gone := p.Token, false
		err := loop.Do(ctx, func(ctx context.Context) (err error) {
			p, err = q.behind(ctx, token)
			if gone = errors.Is(err, ErrGone); gone {
				return nil // asking again would not bring it back
			}
			return err
		})
		if gone {
			return ErrGone
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// errWatch is a watch that ended without saying why.
var errWatch = errors.New("watch ended")

// WaitDeleted blocks until the key with this create revision is gone, and returns nil then, or
// until ctx ends or a request fails for good. A watch that has died silently would hide the
// end of the key, so it is read again at the interval reread, if that is not 0.
func (q *Queue) WaitDeleted(ctx context.Context, loop *retry.Loop, key string, rev int64, reread time.Duration) error {
	for {
		lived, err := q.watchDeleted(ctx, key, rev, reread)
		if err == nil {
			return nil
		}
		if lived > retry.RequestTimeout {
			loop.OK() // that was no part of a streak
		}
		// A watch gives its reasons as text. A read that is refused for the same reason says so in
		// a way that a program can tell.
		if ctx.Err() == nil {
			gone, rerr := q.gone(ctx, key, rev)
			if gone {
				return nil
			}
			err = cmp.Or(rerr, err)
		}
		if err := loop.Again(ctx, fmt.Errorf("watch %q: %w", key, err)); err != nil {
			return err
		}
	}
}

// watchDeleted is WaitDeleted as long as one watch lives. It returns how long that was.
//
// The watch has no start revision, and the key is read once the watch exists: a watch that
// starts in the past, by a single revision even, is served by etcd's loop for slow watchers,
// up to 100 ms late.
func (q *Queue) watchDeleted(ctx context.Context, key string, rev int64, reread time.Duration) (lived time.Duration, err error) {
	events, cancel := q.watch(ctx, key, clientv3.WithFilterPut())
	defer cancel()
	began := time.Now()
	defer func() { lived = time.Since(began) }()
	var again <-chan time.Time
	if reread > 0 {
		ticker := time.NewTicker(reread)
		defer ticker.Stop()
		again = ticker.C
	}
	for {
		select {
		case resp, ok := <-events:
			if !ok {
				return 0, errWatch
			}
			if err := resp.Err(); err != nil {
				return 0, err
			}
			if len(resp.Events) > 0 {
				return 0, nil
			}
			if !resp.Created {
				continue
			}
		case <-again:
		}
		if gone, err := q.gone(ctx, key, rev); gone || err != nil {
			return 0, err
		}
	}
}

// watch opens a watch that says when it has been created. If that takes too long, it ends.
func (q *Queue) watch(ctx context.Context, key string, opts ...clientv3.OpOption) (clientv3.WatchChan, context.CancelFunc) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	late := time.AfterFunc(retry.RequestTimeout, cancel)
	events := q.client.Watch(ctx, key, append(opts, clientv3.WithCreatedNotify())...) // blocks until created
	late.Stop()
	return events, cancel
}

func (q *Queue) gone(ctx context.Context, key string, rev int64) (bool, error) {
	rctx, cancel := retry.Request(ctx)
	defer cancel()
	resp, err := q.client.Get(rctx, key, clientv3.WithKeysOnly())
	if err != nil {
		return false, err
	}
	return len(resp.Kvs) == 0 || resp.Kvs[0].CreateRevision != rev, nil
}

// List returns the candidates in the order of the queue. It sends one request.
func (q *Queue) List(ctx context.Context) ([]Candidate, error) {
	cs, _, err := q.read(ctx)
	return cs, err
}

func (q *Queue) read(ctx context.Context) ([]Candidate, int64, error) {
	rctx, cancel := retry.Request(ctx)
	defer cancel()
	resp, err := q.client.Get(rctx, q.prefix, clientv3.WithPrefix(),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	if err != nil {
		return nil, 0, err
	}
	return q.list(resp.Kvs), resp.Header.Revision, nil
}

// Leader returns the first candidate, the zero value if there is none.
func (q *Queue) Leader(ctx context.Context) (Candidate, error) {
	rctx, cancel := retry.Request(ctx)
	defer cancel()
	resp, err := q.client.Get(rctx, q.prefix, clientv3.WithFirstCreate()...)
	if err != nil || len(resp.Kvs) == 0 {
		return Candidate{}, err
	}
	if c, ok := q.candidate(resp.Kvs[0]); ok {
		return c, nil
	}
	cs, err := q.List(ctx) // a stranger's key is the oldest under the prefix
	if err != nil || len(cs) == 0 {
		return Candidate{}, err
	}
	return cs[0], nil
}

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
	"sync"
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
	oldest bool // it is known that nobody is before that one
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
				q.newest(3), // the candidate itself and two before it
			).
			Else(clientv3.OpGet(key, clientv3.WithKeysOnly())).
			Commit()
		if err != nil {
			return err
		}
		if resp.Succeeded {
			newest := resp.Responses[1].GetResponseRange().Kvs
			place, err = q.place(ctx, resp.Header.Revision, newest[1:])
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

// Touch tells the candidate behind this one, which has become the first, to look who is first: see
// [Queue.Wait]. It changes the key's revision and nothing else. It sends one request, bounded by ctx.
func (q *Queue) Touch(ctx context.Context, key string, token int64) error {
	rctx, cancel := retry.Request(ctx)
	defer cancel()
	_, err := q.client.Txn(rctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", token)).
		Then(clientv3.OpPut(key, "", clientv3.WithIgnoreValue(), clientv3.WithIgnoreLease())).
		Commit()
	return err
}

func (q *Queue) newest(n int64, opts ...clientv3.OpOption) clientv3.Op {
	opts = append(opts, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(n),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend))
	return clientv3.OpGet(q.prefix, opts...)
}

// ErrGone is returned when a candidate's own key turns out to be gone.
var ErrGone = errors.New("the candidate's key is gone")

// behind reads the place of the candidate with this token.
func (q *Queue) behind(ctx context.Context, token int64) (Place, error) {
	resp, err := q.client.Do(ctx, q.newest(3, clientv3.WithMaxCreateRev(token)))
	if err != nil {
		return Place{}, err
	}
	newest := resp.Get().Kvs
	if len(newest) == 0 || newest[0].CreateRevision != token {
		return Place{}, ErrGone
	}
	return q.place(ctx, token, newest[1:])
}

// place works out the place of the candidate with this token from the two newest keys before it.
// Where the newest is no candidate it reads all keys; that is the price of an election whose name is
// the beginning of another's.
func (q *Queue) place(ctx context.Context, token int64, before []*mvccpb.KeyValue) (Place, error) {
	if len(before) == 0 {
		return Place{Token: token}, nil
	}
	if c, ok := q.candidate(before[0]); ok {
		return Place{Token: token, before: c.Key, rev: c.Token, oldest: len(before) == 1}, nil
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
//
// If it is known that nobody is before the one before it, the watch event of that one's end elects,
// without another read: create revisions only grow, so nobody can have come there since. The place
// knows it where it was read when there were just two. Otherwise the one before says so, by
// [Queue.Touch], when it is elected itself: then its place is read ahead. Where it does not, as stock's
// candidates do not, the queue is read when it has gone, which takes etcd the longer the longer the
// queue is.
func (q *Queue) Wait(ctx context.Context, loop *retry.Loop, p Place, reread time.Duration) error {
	for !p.First() {
		before := target{key: p.before, rev: p.rev, reread: reread}
		if !p.oldest {
			var looking sync.Mutex // guards p.oldest
			before.touched = func(ctx context.Context) {
				if !looking.TryLock() {
					return // one look at a time is enough
				}
				defer looking.Unlock()
				if p.oldest {
					return
				}
				rctx, cancel := retry.Request(ctx)
				defer cancel()
				ahead, err := q.behind(rctx, p.rev)
				p.oldest = err == nil && ahead.First()
			}
		}
		if err := q.waitDeleted(ctx, loop, before); err != nil {
			return err
		}
		if p.oldest {
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

// A target is a key that is waited for until it is gone.
type target struct {
	key string
	rev int64 // create revision

	// A watch that has died silently would hide the end of the key, so it is read again at this
	// interval, if that is not 0.
	reread time.Duration

	// touched, if not nil, is called in a goroutine of its own whenever the key is put, and when a read
	// finds that it has been since it was created. Its ctx ends, and it is awaited, before the wait does.
	touched func(ctx context.Context)
}

// WaitDeleted blocks until the key with this create revision is gone, and returns nil then, or
// until ctx ends or a request fails for good.
func (q *Queue) WaitDeleted(ctx context.Context, loop *retry.Loop, key string, rev int64) error {
	return q.waitDeleted(ctx, loop, target{key: key, rev: rev})
}

func (q *Queue) waitDeleted(ctx context.Context, loop *retry.Loop, t target) error {
	for {
		lived, err := q.watchDeleted(ctx, loop, t)
		if err == nil {
			return nil
		}
		if lived > retry.RequestTimeout {
			loop.OK() // that was no part of a streak
		}
		// A watch gives its reasons as text. A read that is refused for the same reason says so in
		// a way that a program can tell.
		if ctx.Err() == nil {
			now := q.look(ctx, t)
			if now.gone {
				return nil
			}
			err = cmp.Or(now.err, err)
		}
		if err := loop.Again(ctx, fmt.Errorf("watch %q: %w", t.key, err)); err != nil {
			return err
		}
	}
}

// watchDeleted is waitDeleted as long as one watch lives. It returns how long that was.
//
// The watch has no start revision, and the key is read once the watch exists: a watch that
// starts in the past, by a single revision even, is served by etcd's loop for slow watchers,
// up to 100 ms late. Neither that read nor a later one keeps an event waiting.
func (q *Queue) watchDeleted(ctx context.Context, loop *retry.Loop, t target) (lived time.Duration, err error) {
	var reads sync.WaitGroup
	defer reads.Wait()
	ctx, cancel := context.WithCancel(retry.RequireLeader(ctx))
	defer cancel()
	var opts []clientv3.OpOption
	if t.touched == nil {
		opts = append(opts, clientv3.WithFilterPut())
	}
	events := q.watch(ctx, cancel, t.key, opts...)
	began := time.Now()
	defer func() { lived = time.Since(began) }()
	var again <-chan time.Time
	if t.reread > 0 {
		ticker := time.NewTicker(t.reread)
		defer ticker.Stop()
		again = ticker.C
	}
	var looked chan sight // nil while the key is not being read
	for {
		var look, touched bool
		select {
		case resp, ok := <-events:
			if !ok {
				return 0, errWatch
			}
			if err := resp.Err(); err != nil {
				return 0, err
			}
			for _, ev := range resp.Events {
				if ev.Type == clientv3.EventTypeDelete {
					return 0, nil
				}
				touched = true
			}
			look = resp.Created
		case <-again:
			look = true
		case now := <-looked:
			if now.gone || now.err != nil {
				return 0, now.err
			}
			looked, touched = nil, now.touched
		}
		if look && looked == nil {
			found := make(chan sight, 1)
			reads.Go(func() { found <- q.lookAgain(ctx, loop, t) })
			looked = found
		}
		if touched && t.touched != nil {
			reads.Go(func() { t.touched(ctx) })
		}
	}
}

// watch opens a watch that says when it has been created. If that takes too long, it calls cancel,
// which has to end ctx.
func (q *Queue) watch(ctx context.Context, cancel func(), key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	late := time.AfterFunc(retry.RequestTimeout, cancel)
	defer late.Stop()
	var events clientv3.WatchChan
	retry.Aside(func() { // blocks until created
		events = q.client.Watch(ctx, key, append(opts, clientv3.WithCreatedNotify())...)
	})
	return events
}

// A sight is what a read of a key has found.
type sight struct {
	gone    bool
	touched bool // put again since it was created
	err     error
}

func (q *Queue) look(ctx context.Context, t target) sight {
	rctx, cancel := retry.Request(ctx)
	defer cancel()
	resp, err := q.client.Get(rctx, t.key, clientv3.WithKeysOnly())
	if err != nil {
		return sight{err: err}
	}
	if len(resp.Kvs) == 0 || resp.Kvs[0].CreateRevision != t.rev {
		return sight{gone: true}
	}
	return sight{touched: resp.Kvs[0].Version > 1}
}

// lookAgain looks until that succeeds or is not worth another try: a read that one endpoint does not
// answer says nothing about the watch, which may have another.
func (q *Queue) lookAgain(ctx context.Context, loop *retry.Loop, t target) sight {
	for failed := false; ; failed = true {
		now := q.look(ctx, t)
		if now.err == nil {
			if failed {
				loop.OK()
			}
			return now
		}
		if err := loop.Again(ctx, fmt.Errorf("read %q: %w", t.key, now.err)); err != nil {
			return sight{err: err}
		}
	}
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

// Package queue is an election's queue of candidates in etcd.
//
// A candidate is a key `<name>/<lease in hex>`, bound to that lease, as
// [concurrency.NewElection] and `etcdctl elect` write it. The candidate with the lowest create
// revision leads; the others wait, each for the one before it alone, so that a handoff wakes
// one of them and not all.
package queue

import (
	"context"
	"errors"
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
	if err != nil || id == 0 || strconv.FormatInt(id, 16) != hex { // etcd grants negative ids on request
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

// ErrTaken is returned by Join if the key is there and not as it was to be put: somebody else has put it.
var ErrTaken = errors.New("somebody else has put the candidate's key")

// A Joining is the answer to a join.
type Joining struct {
	Token  int64              // of the key that is there now
	found  bool               // the key was there already
	before []*mvccpb.KeyValue // the two newest keys before it, unless it was found
	kv     *mvccpb.KeyValue   // if it was found
}

// Join returns the request that puts the candidate's key, unless it is there already. It may be sent
// more than once; [Queue.Place] says what its answer means.
func (q *Queue) Join(id clientv3.LeaseID, value string) func(context.Context) (Joining, error) {
	key := q.Key(id)
	return func(ctx context.Context) (Joining, error) {
		resp, err := q.client.Txn(ctx).
			If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
			Then(
				clientv3.OpPut(key, value, clientv3.WithLease(id)),
				q.newest(3), // the candidate itself and two before it
			).
			Else(clientv3.OpGet(key)).
			Commit()
		if err != nil {
			return Joining{}, err
		}
		if resp.Succeeded {
			newest := resp.Responses[1].GetResponseRange().Kvs
			return Joining{Token: resp.Header.Revision, before: newest[1:]}, nil
		}
		kv := resp.Responses[0].GetResponseRange().Kvs[0]
		return Joining{Token: kv.CreateRevision, found: true, kv: kv}, nil
	}
}

// MayJoin returns nil if the client has the right to put the candidate's key. Its request changes nothing: etcd
// asks for the right before it looks at the comparison, which never holds.
func (q *Queue) MayJoin(ctx context.Context, id clientv3.LeaseID) error {
	key := q.Key(id)
	_, err := q.client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", -1)).Then(clientv3.OpPut(key, "")).Commit()
	return err
}

// Place returns the place of a candidate that has joined. A key that was found is its own if it has the
// value and the lease that it was to be put with: then an earlier attempt has put it.
func (q *Queue) Place(ctx context.Context, loop *retry.Loop, j Joining, id clientv3.LeaseID, value string) (Place, error) {
	if !j.found {
		return q.place(ctx, loop, j.Token, j.before)
	}
	if string(j.kv.Value) != value || j.kv.Lease != int64(id) {
		return Place{}, ErrTaken
	}
	return q.behind(ctx, loop, j.Token)
}

// Remove deletes the candidate's key if its create revision is token. It sends one request, bounded by ctx.
//
// Here is the rule that no deletion is without a guard: it may arrive when the key is that of a later term.
func (q *Queue) Remove(ctx context.Context, key string, token int64) error {
	_, err := q.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", token)).
		Then(clientv3.OpDelete(key)).
		Commit()
	return err
}

// Touch tells the candidate behind this one, which has become the first, to look who is first: see
// [Queue.Wait]. It changes the key's revision and nothing else, and returns it, or [ErrGone] if the key
// is gone. It sends one request, bounded by ctx.
func (q *Queue) Touch(ctx context.Context, key string, token int64) (rev int64, err error) {
	resp, err := q.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", token)).
		Then(clientv3.OpPut(key, "", clientv3.WithIgnoreValue(), clientv3.WithIgnoreLease())).
		Commit()
	if err != nil {
		return 0, err
	}
	if !resp.Succeeded {
		return 0, ErrGone
	}
	return resp.Header.Revision, nil
}

// Revision returns the revision in which the key with this create revision was changed last, or [ErrGone].
func (q *Queue) Revision(ctx context.Context, key string, token int64) (int64, error) {
	resp, err := q.client.Get(ctx, key, clientv3.WithKeysOnly())
	if err != nil {
		return 0, err
	}
	if len(resp.Kvs) == 0 || resp.Kvs[0].CreateRevision != token {
		return 0, ErrGone
	}
	return resp.Kvs[0].ModRevision, nil
}

func (q *Queue) newest(n int64, opts ...clientv3.OpOption) clientv3.Op {
	opts = append(opts, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(n),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend))
	return clientv3.OpGet(q.prefix, opts...)
}

// ErrGone is returned when a candidate's own key turns out to be gone.
var ErrGone = errors.New("the candidate's key is gone")

// behind reads the place of the candidate with this token.
func (q *Queue) behind(ctx context.Context, loop *retry.Loop, token int64) (Place, error) {
	newest, err := retry.Do(ctx, loop, func(ctx context.Context) ([]*mvccpb.KeyValue, error) {
		resp, err := q.client.Do(ctx, q.newest(3, clientv3.WithMaxCreateRev(token)))
		if err != nil {
			return nil, err
		}
		return resp.Get().Kvs, nil
	})
	if err != nil {
		return Place{}, err
	}
	if len(newest) == 0 || newest[0].CreateRevision != token {
		return Place{}, ErrGone
	}
	return q.place(ctx, loop, token, newest[1:])
}

// place works out the place of the candidate with this token from the two newest keys before it.
// Where the newest is no candidate it reads all keys; that is the price of an election whose name is
// the beginning of another's.
func (q *Queue) place(ctx context.Context, loop *retry.Loop, token int64, before []*mvccpb.KeyValue) (Place, error) {
	if len(before) == 0 {
		return Place{Token: token}, nil
	}
	if c, ok := q.candidate(before[0]); ok {
		return Place{Token: token, before: c.Key, rev: c.Token, oldest: len(before) == 1}, nil
	}
	resp, err := retry.Do(ctx, loop, func(ctx context.Context) (*clientv3.GetResponse, error) {
		return q.client.Get(ctx, q.prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(),
			clientv3.WithMaxCreateRev(token-1), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	})
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
// a request fails for good. It looks after the candidate's own key too, and returns [ErrGone] when that is
// gone. It may leave that to its caller: it calls rely then, once, and somebody has to call own.Wait. Where
// the own key is deleted together with the one before it, either watch may be the first to tell; of two that
// have told already, the own one wins.
//
// If it is known that nobody is before the one before it, the watch event of that one's end elects,
// without another read: create revisions only grow, so nobody can have come there since. The place
// knows it where it was read when there were just two. Otherwise the one before says so, by
// [Queue.Touch], when it is elected itself: then its place is read ahead. Where it does not, as stock's
// candidates do not, the queue is read when it has gone, which takes etcd the longer the longer the
// queue is.
//
// A watch that dies silently would hide the end of the one before, so its key is read again at the
// interval reread.
func (q *Queue) Wait(ctx context.Context, loop *retry.Loop, p Place, reread time.Duration, own *Deletion, rely func()) error {
	for !p.First() {
		w := &wait{q: q, loop: loop, key: p.before, rev: p.rev, reread: reread, ahead: !p.oldest, own: own, rely: rely}
		if err := w.wait(w.open(ctx), nil); err != nil { //nolint:contextcheck // what is opened has ctx
			return err
		}
		if w.ownGone() { //nolint:contextcheck // own has its own
			return ErrGone
		}
		if p.oldest || w.oldest {
			return nil
		}
		w.leaveOwn(nil)
		own = nil
		var err error
		if p, err = q.behind(ctx, loop, p.Token); err != nil {
			return err
		}
	}
	return nil
}

// List returns the candidates in the order of the queue. It sends one request, bounded by ctx.
func (q *Queue) List(ctx context.Context) ([]Candidate, error) {
	cs, _, err := q.read(ctx)
	return cs, err
}

func (q *Queue) read(ctx context.Context) ([]Candidate, int64, error) {
	resp, err := q.client.Get(ctx, q.prefix, clientv3.WithPrefix(),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	if err != nil {
		return nil, 0, err
	}
	return q.list(resp.Kvs), resp.Header.Revision, nil
}

// Leader returns the first candidate, the zero value if there is none. Its requests, of which ask sends
// each, are one or, where a stranger's key is the oldest under the prefix, two.
func (q *Queue) Leader(ctx context.Context, ask func(context.Context, Read) ([]*mvccpb.KeyValue, error)) (Candidate, error) {
	kvs, err := ask(ctx, func(ctx context.Context) ([]*mvccpb.KeyValue, error) {
		resp, err := q.client.Get(ctx, q.prefix, clientv3.WithFirstCreate()...)
		if err != nil {
			return nil, err
		}
		return resp.Kvs, nil
	})
	if err != nil || len(kvs) == 0 {
		return Candidate{}, err
	}
	if c, ok := q.candidate(kvs[0]); ok {
		return c, nil
	}
	kvs, err = ask(ctx, func(ctx context.Context) ([]*mvccpb.KeyValue, error) {
		resp, err := q.client.Get(ctx, q.prefix, clientv3.WithPrefix(),
			clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
		if err != nil {
			return nil, err
		}
		return resp.Kvs, nil
	})
	cs := q.list(kvs)
	if err != nil || len(cs) == 0 {
		return Candidate{}, err
	}
	return cs[0], nil
}

// A Read is one request for keys.
type Read = func(context.Context) ([]*mvccpb.KeyValue, error)

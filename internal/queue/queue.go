// Package queue is an election's queue of candidates in etcd.
//
// A candidate is a key `<name>/<lease in hex>`, bound to that lease, as [concurrency.NewElection] and `etcdctl elect`
// write it. The candidate with the lowest create revision leads. Each of the others watches only the key before its
// own, so a handoff wakes only one.
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

// A Candidate is one key of the queue. The zero value means nobody.
type Candidate struct {
	Value string
	Token int64 // create revision
	Key   string
	Lease clientv3.LeaseID
}

// Is reports whether both are the same candidacy, whatever their values.
func (c Candidate) Is(other Candidate) bool { return c.Key == other.Key && c.Token == other.Token }

// A Queue is the queue of one election. Its methods may be called concurrently if each call has a [retry.Loop] of its
// own.
type Queue struct {
	client *clientv3.Client
	name   string
	prefix string
}

// New returns the queue of the election with this name.
func New(client *clientv3.Client, name string) *Queue {
	return &Queue{client: client, name: name, prefix: name + "/"}
}

// Name returns the name of the election.
func (q *Queue) Name() string { return q.name }

// Prefix returns the prefix of all keys of the queue. Other elections and other data may have keys under it, too.
func (q *Queue) Prefix() string { return q.prefix }

// Key returns the key of the candidate with this lease.
func (q *Queue) Key(id clientv3.LeaseID) string {
	return q.prefix + strconv.FormatInt(int64(id), 16)
}

// ParseKey returns the lease in a candidate's key, and whether key is a candidate's.
func (q *Queue) ParseKey(key string) (clientv3.LeaseID, bool) {
	hex, ok := strings.CutPrefix(key, q.prefix)
	if !ok {
		return 0, false
	}
	id, err := strconv.ParseInt(hex, 16, 64)
	if err != nil || id == 0 || strconv.FormatInt(id, 16) != hex { // ids may be negative: etcd grants them on request
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
	Token  int64 // of the candidate itself
	Number int64 // counted from 1, the leader's place; 0 if unknown. Keys that are not candidates count, too.

	// The candidate before this one. If before is empty there is none, and this candidate is elected.
	before string
	rev    int64
	oldest bool // it is known that nobody is before that candidate
}

// First reports whether the place was the first of the queue when it was read.
func (p Place) First() bool { return p.before == "" }

// ErrTaken is returned by Place if the candidate's key exists with another value or lease: somebody else has put it.
var ErrTaken = errors.New("somebody else has put the candidate's key")

// A Joining is the answer to a join.
type Joining struct {
	Token  int64 // of the key, whether it was put or found
	number int64
	found  bool               // the key was there already
	before []*mvccpb.KeyValue // the two newest keys before it, if it was put
	kv     *mvccpb.KeyValue   // the key, if it was found
}

// Join returns the request that puts the candidate's key, unless it is there already. It may be sent more than once.
// [Queue.Place] says what its answer means.
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
			newest := resp.Responses[1].GetResponseRange()
			return Joining{Token: resp.Header.Revision, number: newest.Count, before: newest.Kvs[1:]}, nil
		}
		kv := resp.Responses[0].GetResponseRange().Kvs[0]
		return Joining{Token: kv.CreateRevision, found: true, kv: kv}, nil
	}
}

// MayJoin returns nil if the client has the right to put the candidate's key. Its request changes nothing: its
// comparison never holds, but etcd checks the right before the comparison.
func (q *Queue) MayJoin(ctx context.Context, id clientv3.LeaseID) error {
	key := q.Key(id)
	_, err := q.client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", -1)).Then(clientv3.OpPut(key, "")).Commit()
	return err
}

// MayAsk returns nil if the client has the right to ask c to step back. It changes nothing either.
func (q *Queue) MayAsk(ctx context.Context, c Candidate) error {
	_, err := q.client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(c.Key), "=", -1)).
		Then(clientv3.OpPut(Request(c), ""), clientv3.OpGet(Request(c))).Commit()
	return err
}

// Place returns the place of a candidate that has joined. If the key was found with the value and the lease of this
// candidate, an earlier attempt has put it. Otherwise Place returns [ErrTaken].
func (q *Queue) Place(ctx context.Context, loop *retry.Loop, j Joining, id clientv3.LeaseID, value string) (Place, error) {
	if !j.found {
		p, err := q.place(ctx, loop, j.Token, j.before)
		p.Number = j.number
		return p, err
	}
	if string(j.kv.Value) != value || j.kv.Lease != int64(id) {
		return Place{}, ErrTaken
	}
	return q.behind(ctx, loop, j.Token)
}

// Remove deletes the candidate's key if its create revision is token. It sends one request, bounded by ctx.
//
// Rule: no deletion without a guard. It may arrive late, when the key already belongs to a later term.
func (q *Queue) Remove(ctx context.Context, key string, token int64) error {
	_, err := q.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", token)).
		Then(clientv3.OpDelete(key)).
		Commit()
	return err
}

// Touch is for a candidate that has become the first. It makes the candidate behind check that nobody else is before
// it: see [Queue.Wait]. It changes only the key's mod revision and returns that, or [ErrGone] if the key is gone. It
// sends one request, bounded by ctx.
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

// request is the key by which the candidate with this key is asked to step back. It is no candidate's, because its last
// part is no lease in hex. Its value is the token of the candidate that is asked, in decimal, so that it is not about
// the next candidate under the same key.
func request(key string) string { return key + stepback }

const stepback = "/stepback"

// ErrAsked is returned when somebody asks the candidate to step back.
var ErrAsked = errors.New("the candidate is asked to step back")

// Request is the key by which c is asked to step back.
func Request(c Candidate) string { return request(c.Key) }

// Ask asks c to step back, by a key on the lease id. It returns the create revision of that key, or 0 if c is gone or,
// unless it is the zero value, successor is. It sends one request, bounded by ctx.
func (q *Queue) Ask(ctx context.Context, id clientv3.LeaseID, c, successor Candidate) (rev int64, err error) {
	there := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(c.Key), "=", c.Token)}
	if successor != (Candidate{}) {
		there = append(there, clientv3.Compare(clientv3.CreateRevision(successor.Key), "=", successor.Token))
	}
	resp, err := q.client.Txn(ctx).If(there...).Then(
		clientv3.OpPut(Request(c), strconv.FormatInt(c.Token, 10), clientv3.WithLease(id)),
		clientv3.OpGet(Request(c), clientv3.WithKeysOnly()),
	).Commit()
	if err != nil || !resp.Succeeded {
		return 0, err
	}
	return resp.Responses[1].GetResponseRange().Kvs[0].CreateRevision, nil
}

// StepBack deletes the candidate's key if its create revision is token, and with it the request to step back. It sends
// one request, bounded by ctx.
func (q *Queue) StepBack(ctx context.Context, key string, token int64) error {
	_, err := q.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", token)).
		Then(clientv3.OpDelete(key), clientv3.OpDelete(request(key))).
		Commit()
	return err
}

// Revision returns the mod revision of the key with this create revision, or [ErrGone].
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

// newest returns the read of the n newest keys under the prefix, the newest first.
func (q *Queue) newest(n int64, opts ...clientv3.OpOption) clientv3.Op {
	opts = append(opts, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(n),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend))
	return clientv3.OpGet(q.prefix, opts...)
}

// ErrGone is returned if a candidate's own key is gone.
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

// place returns the place of the candidate with this token, given the two newest keys before it. If the newest is not a
// candidate, it reads all keys before the candidate. That is the price if one election's name begins with another's.
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

// Wait blocks until nobody is before the candidate and returns nil. It returns an error if ctx ends or a request fails
// for good.
//
// It watches the candidate's own key as well, by own, and returns [ErrGone] if that is gone. It may stop doing so
// before it returns: then it calls rely, once, and the caller must make sure that own.Wait is called. If the own key
// and the one before it are deleted together, either event may arrive first. If both have arrived, the own key's wins.
//
// If it is known that nobody is before the candidate before, the event of that key's deletion elects, without another
// read: create revisions only grow, so nobody can have joined there since. This is known in two ways. Either only one
// candidate was before this one when its place was read. Or the candidate before has touched its key ([Queue.Touch])
// when it was elected, and its place was read then. Stock's candidates do not touch their keys; behind one of them, the
// place is read when its key has gone. That read takes etcd longer the longer the queue is.
//
// A watch may die without a sign and hide the deletion. So the key before is also read at the interval reread. If a
// read, and not an event, shows that the key has gone, the place is read again: the key may have gone long ago, and the
// own one with it, while the caller's logger blocked.
func (q *Queue) Wait(ctx context.Context, loop *retry.Loop, p Place, reread time.Duration, own *Deletion, rely func()) error {
	for !p.First() {
		w := &wait{q: q, loop: loop, key: p.before, rev: p.rev, reread: reread, ahead: !p.oldest, own: own, rely: rely}
		if err := w.wait(w.open(ctx), nil); err != nil { //nolint:contextcheck // what is opened has ctx
			return err
		}
		// select has picked at random among the events that had arrived. Check the own key once more, so that it wins.
		if err := w.ownOver(); err != nil { //nolint:contextcheck // own has its own
			return err
		}
		if (p.oldest || w.oldest) && !w.byRead {
			return nil
		}
		w.leaveOwn(nil) // the read below may block
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

// A Listing is the candidates in the order of the queue, and the create revisions of the requests to step back, by their
// keys.
type Listing struct {
	Candidates []Candidate
	Requests   map[string]int64
}

// ListWithRequests returns what a transfer has to know. It sends one request, bounded by ctx.
func (q *Queue) ListWithRequests(ctx context.Context) (Listing, error) {
	resp, err := q.all(ctx)
	if err != nil {
		return Listing{}, err
	}
	requests := make(map[string]int64)
	for _, kv := range resp.Kvs {
		if key, ok := strings.CutSuffix(string(kv.Key), stepback); ok {
			if _, ok := q.ParseKey(key); ok {
				requests[string(kv.Key)] = kv.CreateRevision
			}
		}
	}
	return Listing{q.list(resp.Kvs), requests}, nil
}

func (q *Queue) read(ctx context.Context) ([]Candidate, int64, error) {
	resp, err := q.all(ctx)
	if err != nil {
		return nil, 0, err
	}
	return q.list(resp.Kvs), resp.Header.Revision, nil
}

func (q *Queue) all(ctx context.Context) (*clientv3.GetResponse, error) {
	return q.client.Get(ctx, q.prefix, clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
}

// Oldest returns the candidate with the oldest key below the election's name, or the zero value if that key is no
// candidate or there is none. It sends one request, again if it has no answer.
func (q *Queue) Oldest(ctx context.Context) (Candidate, error) {
	first, _, err := q.first(ctx, nil, clientv3.WithFirstCreate()...)
	return first, err
}

// Leader returns the first candidate, the zero value if there is none. It sends one request, or two if a key that is no
// candidate is the oldest below the election's name. Requests that fail are repeated in loop; without a loop Leader
// returns the first failure, after at most [retry.RequestTimeout] each.
func (q *Queue) Leader(ctx context.Context, loop *retry.Loop) (Candidate, error) {
	first, _, err := q.leader(ctx, loop)
	return first, err
}

// leader is Leader, and also returns etcd's revision.
func (q *Queue) leader(ctx context.Context, loop *retry.Loop) (first Candidate, rev int64, err error) {
	first, resp, err := q.first(ctx, loop, clientv3.WithFirstCreate()...)
	if err == nil && len(resp.Kvs) > 0 && first == (Candidate{}) {
		first, resp, err = q.first(ctx, loop, clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	}
	if err != nil {
		return Candidate{}, 0, err
	}
	return first, resp.Header.Revision, nil
}

// first returns the first candidate among the keys that a read with these options finds, and the answer to the read.
func (q *Queue) first(ctx context.Context, loop *retry.Loop, opts ...clientv3.OpOption) (first Candidate, resp *clientv3.GetResponse, err error) {
	read := func(ctx context.Context) (*clientv3.GetResponse, error) { return q.client.Get(ctx, q.prefix, opts...) }
	if loop != nil {
		resp, err = retry.Do(ctx, loop, read)
	} else {
		resp, err = retry.First(ctx, q.client, read)
	}
	if err != nil {
		return Candidate{}, nil, err
	}
	if cs := q.list(resp.Kvs); len(cs) > 0 {
		first = cs[0]
	}
	return first, resp, nil
}

package lease

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// maxReads is how many keys one request of a renewal reads, below etcd's default limit of 128
	// operations in a transaction. Where a server allows fewer it is halved until they fit.
	maxReads = 100

	// maxAbandoned is how many abandoned keys a session may have and still be lent: as many as one
	// request looks for, so that each renewal looks for all of them.
	maxAbandoned = maxReads

	// maxPast is how many names of keys that were dropped are remembered, to be read with the others.
	maxPast = 20
)

// A Key is a candidate's key in etcd, bound to a session's lease, and one use of that session. Its life:
//
//	joining    from Pool.Track: its owner puts it, see Attempt
//	held       from Joined: it has a create revision
//	abandoned  from Abandon: nobody owns it, but it may be in etcd, now or later; renewals delete it
//	dropped    from Drop: it is not in etcd, and no request that is under way can put it there
//
// Renewals read it until it is dropped.
//
// Here is the rule "a request that arrives at any later time does no harm", as far as joins go. A join
// may arrive after the owner has given it up, for as long as the lease lives. So while an attempt to
// join has no answer, Drop only abandons the key, and its name is not used again: [Pool.Track] lends
// another lease.
type Key struct {
	s    *Session
	name string
	gone func()

	released bool // guarded by s.pool.mu

	// Guarded by s.mu.
	rev        int64 // create revision; 0 until known
	unanswered int   // attempts to join without an answer
	put        bool  // an attempt was answered: it has put the key or found it, or may have
	unheard    int   // attempts that were answered so when nobody waited any more
	abandoned  bool
	read       int64 // the number of the read that was the last to read it
}

// Session is the session whose use the key is.
func (k *Key) Session() *Session { return k.s }

// Name is the key's name in etcd.
func (k *Key) Name() string { return k.name }

// Abandoned reports whether nobody owns the key, though it may be in etcd.
func (k *Key) Abandoned() bool {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	return k.abandoned && k.s.keys[k.name] == k
}

// track makes renewals read the key, from before it is put. It returns nil if the session cannot have
// it: the name is still in use, or too many keys are being looked for already.
func (s *Session) track(name string, gone func()) *Key {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, used := s.keys[name]; used {
		return nil
	}
	abandoned := 0
	for _, k := range s.keys {
		if k.abandoned {
			abandoned++
		}
	}
	if abandoned >= maxAbandoned {
		return nil
	}
	k := &Key{s: s, name: name, gone: gone}
	s.keys[name] = k
	return k
}

// Attempt sends a request that may put the key. If ctx ends first it returns ctx's error; the request
// goes on then, since its answer tells whether the key is in etcd.
func Attempt[T any](ctx context.Context, k *Key, request func(context.Context) (T, error)) (T, error) {
	k.s.mu.Lock()
	k.unanswered++
	k.s.mu.Unlock()
	answer, err := retry.Outlive(ctx, k.s.started, func(ctx context.Context) (T, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(k.s.ctx, cancel)()
		answer, err := request(ctx)
		if err == nil || retry.Refused(err) {
			k.s.mu.Lock()
			k.unanswered--
			if errors.Is(err, rpctypes.ErrNoSpace) {
				k.put = true // it may have: etcd carries out what it then refuses, if it has just filled up (quotaApplierV3)
			}
			if err == nil {
				k.put = true
				k.unheard++ // before Drop can find it neither unanswered nor unheard
			}
			k.s.mu.Unlock()
		}
		return answer, err
	}, func(T, error) {})
	if err == nil {
		k.s.mu.Lock()
		k.unheard--
		k.s.mu.Unlock()
	}
	return answer, err
}

// Joined says that the key exists, with this create revision.
func (k *Key) Joined(rev int64) {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	k.rev = rev
}

// Drop says that the key is not in etcd any more. If an attempt to join has no answer yet it may come
// back, and after an answer that nobody has heard it may be there: then it is abandoned.
func (k *Key) Drop() {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	if k.unanswered > 0 || k.unheard > 0 || k.put && k.rev == 0 {
		k.abandoned = true
		return
	}
	k.dropLocked()
}

// forget drops an abandoned key of which a read, sent when all attempts were answered, has shown that
// it is not there.
func (k *Key) forget() {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	if k.unanswered == 0 {
		k.dropLocked()
	}
}

// dropLocked forgets the key. Its name is read for a while yet: neither gRPC nor etcd's client sends a
// request again once it is answered, but a proxy in between may, and the copy of a join would put the key
// again. That of a refused join is refused too, and so may be a read of its name, which would keep a
// renewal from reading more than one key.
func (k *Key) dropLocked() {
	s := k.s
	if s.keys[k.name] != k {
		return
	}
	delete(s.keys, k.name)
	if k.rev == 0 && !k.put {
		return
	}
	s.past = slices.DeleteFunc(s.past, func(name string) bool { return name == k.name })
	if len(s.past) == maxPast {
		s.past = slices.Delete(s.past, 0, 1)
	}
	s.past = append(s.past, k.name)
}

// Abandon says that nobody owns the key any more although it may be in etcd, now or later (a
// request without an answer may still be on its way). For as long as others keep the lease
// alive, renewals look for it and delete it. It is dropped when it is known not to come again.
func (k *Key) Abandon() {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	k.abandoned = true
}

// A reading is a key as it was when a read of it was sent.
type reading struct {
	*Key // nil for a name that was dropped
	name string
	rev  int64

	abandoned, certain bool // certain: no attempt to join is unanswered
}

// sample returns up to most of the keys that have an owner, those first that were read least recently,
// so that each is read once in as many renewals as it takes to read all. It prefers those that are
// known to have been put: one that was not may be refused for lack of permission. Room that is left
// goes to names that were dropped.
func (s *Session) sample(most int) []reading {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys := s.leastReadLocked(most, func(k *Key) bool { return !k.abandoned && k.rev != 0 })
	if len(keys) == 0 {
		keys = s.leastReadLocked(1, func(k *Key) bool { return !k.abandoned })
	}
	if len(keys) == 0 {
		keys = s.leastReadLocked(1, func(*Key) bool { return true })
	}
	for _, name := range s.past {
		if len(keys) < most && most > 1 && s.keys[name] == nil {
			keys = append(keys, reading{name: name, abandoned: true, certain: true})
		}
	}
	return keys
}

// abandoned returns up to most of the keys that were abandoned, those first that were read least recently.
func (s *Session) abandoned(most int) []reading {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leastReadLocked(most, func(k *Key) bool { return k.abandoned })
}

func (s *Session) hasAbandoned() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.keys {
		if k.abandoned {
			return true
		}
	}
	return false
}

func (s *Session) leastReadLocked(most int, wanted func(*Key) bool) []reading {
	var keys []*Key
	for _, k := range s.keys {
		if wanted(k) {
			keys = append(keys, k)
		}
	}
	if len(keys) > most {
		keys = leastRead(keys, most)
		s.reads++ // a read of all leaves the order alone: it may be refused because of one, which then is not to come first
		for _, k := range keys {
			k.read = s.reads
		}
	}
	readings := make([]reading, len(keys), len(keys)+len(s.past))
	for i, k := range keys {
		readings[i] = reading{Key: k, name: k.name, rev: k.rev, abandoned: k.abandoned, certain: k.unanswered == 0}
	}
	return readings
}

// leastRead returns the n keys that were read least recently. A read is of many keys, so there are few
// different numbers to sort, where there may be thousands of keys.
func leastRead(keys []*Key, n int) []*Key {
	byRead := make(map[int64][]*Key)
	for _, k := range keys {
		byRead[k.read] = append(byRead[k.read], k)
	}
	least := make([]*Key, 0, n)
	for _, read := range slices.Sorted(maps.Keys(byRead)) {
		some := byRead[read]
		least = append(least, some[:min(len(some), n-len(least))]...)
	}
	return least
}

// read reads keys with one linearizable request. It returns the raft term of the answer and the keys'
// create revisions, 0 for those that do not exist.
func (s *Session) read(ctx context.Context, keys []reading) (term uint64, revs []int64, err error) {
	if len(keys) == 0 {
		return 0, nil, errors.New("no key to read") // a read of nothing would not be linearizable
	}
	gets := make([]clientv3.Op, len(keys))
	for i, k := range keys {
		gets[i] = clientv3.OpGet(k.name, clientv3.WithKeysOnly())
	}
	resp, err := s.client.Txn(ctx).Then(gets...).Commit()
	if err != nil {
		return 0, nil, err
	}
	if resp == nil || resp.Header == nil || len(resp.Responses) != len(keys) {
		return 0, nil, errors.New("the client answered a read with neither keys nor error")
	}
	revs = make([]int64, len(keys))
	for i := range keys {
		revs[i] = createRevision(resp.Responses[i])
	}
	return resp.Header.RaftTerm, revs, nil
}

func createRevision(resp *etcdserverpb.ResponseOp) int64 {
	if kvs := resp.GetResponseRange().GetKvs(); len(kvs) > 0 {
		return kvs[0].CreateRevision
	}
	return 0
}

// found deals with what a read has found: it tells the owners whose keys are gone, and forgets the
// abandoned keys that will not come back. It returns those to be deleted.
func (s *Session) found(seen sighting) (orphans []reading) {
	for i, k := range seen.keys {
		rev := seen.revs[i]
		switch {
		case k.abandoned && rev != 0:
			if s.unowned(k) {
				k.rev = rev
				orphans = append(orphans, k)
			}
		case k.abandoned && k.certain && k.Key != nil:
			k.forget()
		case !k.abandoned && k.rev != 0 && k.rev != rev:
			k.gone()
		}
	}
	return orphans
}

// unowned reports whether the key that was read is still nobody's: the name of one that was dropped may
// have been used again while the read was under way.
func (s *Session) unowned(k reading) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys[k.name] == k.Key
}

// A sighting is what a read of keys has found.
type sighting struct {
	term uint64
	keys []reading
	revs []int64
}

// readSome reads as many of the keys that pick chooses as the server allows.
func (s *Session) readSome(ctx context.Context, attempt time.Duration, failed func(error), pick func(most int) []reading) (sighting, error) {
	most := s.most()
	for {
		picked := pick(most) // once, as the answer to one of several requests counts: keys must not lose their turn to the others
		seen, err := retry.AskWithin(ctx, s.client, attempt, failed, func(ctx context.Context) (sighting, error) {
			keys := picked
			if len(keys) == 0 {
				keys = pick(most) // one may have come since
			}
			term, revs, err := s.read(ctx, keys)
			return sighting{term, keys, revs}, err
		})
		switch {
		case err == nil, most == 1, !retry.Permanent(err):
			return seen, err
		case errors.Is(err, rpctypes.ErrTooManyOps):
			most = s.halve(most)
		default:
			// One key that may not be read must not cost all the others their lease. (One that may
			// not be written does: etcd itself refuses the renewal then.)
			most = 1
		}
	}
}

// sweep deletes the orphans, and looks for abandoned keys and deletes them, for as long as one attempt to renew
// may take: it must not hold up the next renewal. What is left is found again.
func (s *Session) sweep(orphans []reading, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	if s.hasAbandoned() {
		if seen, err := s.readSome(ctx, timeout/2, nil, s.abandoned); err == nil {
			orphans = append(orphans, s.found(seen)...)
		}
	}
	for _, o := range orphans {
		if s.unowned(o) {
			_ = s.delete(ctx, o) // one that may not be deleted must not keep the others
		}
	}
}

// delete deletes the abandoned key that was found, and no other of that name.
func (s *Session) delete(ctx context.Context, o reading) error {
	_, err := retry.Ask(ctx, s.client, nil, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return s.client.Txn(ctx).
			If(clientv3.Compare(clientv3.CreateRevision(o.name), "=", o.rev)).
			Then(clientv3.OpDelete(o.name)).
			Commit()
	})
	if err == nil && o.certain && o.Key != nil {
		o.forget()
	}
	return err
}

// most is how many keys a request may read.
func (s *Session) most() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.maxReads
}

// halve makes requests read fewer keys, since the server takes fewer operations in a transaction, and
// returns how many.
func (s *Session) halve(refused int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.maxReads = max(1, min(s.maxReads, refused/2))
	return s.maxReads
}

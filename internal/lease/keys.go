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
	// maxReads is how many keys one request of a renewal reads. It is below etcd's default limit of 128 operations in a
	// transaction. If a server allows fewer, it is halved until they fit.
	maxReads = 100

	// maxAbandoned is how many abandoned keys a session may have before it takes no more names. One request can look
	// for that many, so each renewal looks for all of them.
	maxAbandoned = maxReads

	// maxPast is how many names of dropped keys are remembered. They are read with the other keys.
	maxPast = 20
)

// A Key is a candidate's key in etcd, bound to a session's lease. A session is kept as long as one of its keys has an
// owner. When none has, [Session.Finish] closes the session.
//
// Rule, for joins: a request does no harm whenever it arrives. A join may arrive after its owner has given it up, as
// long as the lease lives. So while an attempt to join has no answer, Drop only abandons the key, and its name is not
// used again on this lease: [Pool.Track] lends another lease.
type Key struct {
	s    *Session
	name string
	gone func()

	// Guarded by s.mu.
	state      keyState
	rev        int64 // create revision; 0 until Joined
	unanswered int   // attempts to join without an answer
	put        bool  // by its answer, an attempt has put the key or found it, or may have put it
	unheard    int   // attempts that succeeded after their caller had stopped waiting
	read       int64 // number of the last read that asked for it, see Session.reads
}

// A keyState is a stage in a key's life. Renewals read the key until it is dropped.
type keyState int

const (
	owned     keyState = iota // since Pool.Track: the owner puts it by Attempt, and then calls Joined
	abandoned                 // it may be in etcd, now or later; renewals delete it
	dropped                   // it is not in etcd, and no request that is under way can put it there
)

// Session returns the session on whose lease the key is.
func (k *Key) Session() *Session { return k.s }

// Name returns the key's name in etcd.
func (k *Key) Name() string { return k.name }

// Abandoned reports whether the key has no owner and may be in etcd.
func (k *Key) Abandoned() bool {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	return k.state == abandoned
}

// track creates a key. Renewals read it from now on, before it is put. It returns nil if the session cannot take the
// key: its last owner has left, the name is still in use, or maxAbandoned keys are being looked for.
func (s *Session) track(name string, gone func()) *Key {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, used := s.keys[name]; used || s.unowned {
		return nil
	}
	if len(s.keys)-s.owners >= maxAbandoned {
		return nil
	}
	k := &Key{s: s, name: name, gone: gone}
	s.keys[name] = k
	s.owners++
	return k
}

// disown takes the key from its owner. If it was the session's last owner, the session is not lent again.
func (k *Key) disown(to keyState) {
	k.s.mu.Lock()
	last := k.disownLocked(to)
	k.s.mu.Unlock()
	if last {
		k.s.pool.retire(k.s)
	}
}

func (k *Key) disownLocked(to keyState) (last bool) {
	s := k.s
	if k.state == owned {
		s.owners--
		last = s.owners == 0 && s.pool != nil // without a pool the session may get other keys later
		s.unowned = s.unowned || last
	}
	switch {
	case k.state == dropped:
	// The owner says that the key is not in etcd, but it cannot know: a join may still arrive, or may have been carried
	// out without the owner hearing of it, even after the owner deleted the key.
	case to == dropped && k.uncertainLocked():
		k.state = abandoned
	case to == dropped:
		k.dropLocked()
	default:
		k.state = to
	}
	return last
}

// uncertainLocked reports whether the key may be in etcd although its owner says that it is not.
func (k *Key) uncertainLocked() bool { return k.unanswered > 0 || k.unheard > 0 || k.put && k.rev == 0 }

// Rejoin is Drop and [Pool.Track] in one. It returns a key that takes this one's place, with the same name, so that the
// session is not closed in between. It returns nil, and k keeps its owner, if the session cannot take the name again.
func (k *Key) Rejoin(gone func()) *Key {
	s := k.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if k.state != owned || k.uncertainLocked() || s.denied || !s.validLocked() {
		return nil
	}
	k.dropLocked()
	again := &Key{s: s, name: k.name, gone: gone}
	s.keys[k.name] = again
	return again
}

// Attempt sends a request that may put the key. If ctx ends first it returns ctx's error. The request continues then,
// because its answer tells whether the key is in etcd.
func Attempt[T any](ctx context.Context, k *Key, request func(context.Context) (T, error)) (T, error) {
	k.s.mu.Lock()
	k.unanswered++
	k.s.mu.Unlock()
	answer, err := retry.Outlive(ctx, k.s.started, func(ctx context.Context) (T, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		// Once the session is over nobody needs the answer: the key goes with its lease.
		defer context.AfterFunc(k.s.ctx, cancel)()
		sent := time.Now()
		answer, err := request(ctx)
		// After any other error etcd may still carry out the request, at any time. So it stays unanswered for good.
		if err == nil || retry.Refused(err) {
			k.s.mu.Lock()
			k.unanswered--
			if errors.Is(err, rpctypes.ErrNoSpace) {
				// An etcd that has just filled up carries out the request and then refuses it (quotaApplierV3).
				k.put = true
			}
			if err == nil {
				k.put = true
				// Under the same lock, so that Drop never finds this attempt neither unanswered nor unheard.
				k.unheard++
			}
			k.s.mu.Unlock()
		} else if k.s.ctx.Err() != nil {
			err = retry.Silence(k.s.client, time.Since(sent)) // its own error only says that it was cut short
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

// Joined says that the key is in etcd, with this create revision.
func (k *Key) Joined(rev int64) {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	k.rev = rev
}

// Drop says that the key is not in etcd any more. If an attempt to join may have put it again, or still may, Drop only
// abandons it. Call [Session.Finish] after Drop or Abandon.
func (k *Key) Drop() { k.disown(dropped) }

// forget drops an abandoned key. A read or a deletion that was sent when all attempts were answered has shown that the
// key is not in etcd.
func (k *Key) forget() {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	if k.unanswered == 0 && k.state == abandoned {
		k.dropLocked()
	}
}

// dropLocked removes the key from the session. Renewals read its name for a while longer: neither gRPC nor etcd's
// client repeats a request once it is answered, but a proxy in between may, and the copy of a join would put the key
// again.
func (k *Key) dropLocked() {
	s := k.s
	k.state = dropped
	delete(s.keys, k.name)
	if s.cfg.SharedNames || k.rev == 0 && !k.put {
		// No join, or only refused ones: etcd refuses a copy, too. A read of the name may be refused as well, and then
		// the renewal could read only one key.
		return
	}
	s.past = slices.DeleteFunc(s.past, func(name string) bool { return name == k.name })
	if len(s.past) == maxPast {
		s.past = slices.Delete(s.past, 0, 1)
	}
	s.past = append(s.past, k.name)
}

// Abandon says that the key has no owner any more although it may be in etcd, now or later: a request without an answer
// may still be on its way. As long as others keep the lease alive, renewals look for the key and delete it. It is
// dropped when no request can put it any more.
func (k *Key) Abandon() { k.disown(abandoned) }

// A reading is the state of a key when a read of it was sent.
type reading struct {
	*Key // nil for the name of a key that was dropped
	name string
	rev  int64

	abandoned, certain bool // certain: no attempt to join was unanswered
}

// sample returns the keys that a renewal reads: up to most of the keys that have an owner and have joined. Those that
// were read least recently come first, so that each is read once in as many renewals as it takes to read all. Room that
// is left goes to the names of dropped keys.
func (s *Session) sample(most int) []reading {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys := s.leastReadLocked(most, func(k *Key) bool { return k.state == owned && k.rev != 0 })
	// A renewal counts only with a read of some key. A key that has not joined is a last resort, and read alone:
	// reading it may be denied, which would refuse the whole request.
	if len(keys) == 0 {
		keys = s.leastReadLocked(1, func(k *Key) bool { return k.state == owned })
	}
	if len(keys) == 0 {
		keys = s.leastReadLocked(1, func(*Key) bool { return true })
	}
	for _, name := range s.past {
		// If a request may read only one key, that key confirms the renewal, and there is no room for names.
		if len(keys) < most && most > 1 && s.keys[name] == nil {
			keys = append(keys, reading{name: name, abandoned: true, certain: true})
		}
	}
	return keys
}

// abandonedKeys returns up to most of the abandoned keys. Those that were read least recently come first.
func (s *Session) abandonedKeys(most int) []reading {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leastReadLocked(most, func(k *Key) bool { return k.state == abandoned })
}

func (s *Session) hasAbandoned() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.keys) > s.owners
}

func (s *Session) leastReadLocked(most int, wanted func(*Key) bool) []reading {
	var keys []*Key
	for _, k := range s.keys {
		if wanted(k) {
			keys = append(keys, k)
		}
	}
	// A read of all keys does not count as a turn. If it is refused because of one key, keys are read one at a time,
	// and the order must survive: otherwise the same unreadable key could fail two attempts in a row.
	if len(keys) > most {
		keys = leastRead(keys, most)
		s.reads++
		for _, k := range keys {
			k.read = s.reads
		}
	}
	readings := make([]reading, len(keys), len(keys)+len(s.past))
	for i, k := range keys {
		readings[i] = reading{Key: k, name: k.name, rev: k.rev, abandoned: k.state == abandoned, certain: k.unanswered == 0}
	}
	return readings
}

// leastRead returns the n keys that were read least recently. It sorts the numbers of the reads, not the keys: there
// may be thousands of keys, but one read asks for many, so there are few numbers.
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

// read reads keys with one linearizable request. It returns the raft term of the answer and the keys' create revisions,
// 0 for a key that does not exist.
func (s *Session) read(ctx context.Context, keys []reading) (term uint64, revs []int64, err error) {
	if len(keys) == 0 {
		// A read of nothing would not be linearizable, so it would confirm nothing.
		return 0, nil, errors.New("the lease has no key whose read could confirm the renewal")
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

// found handles the result of a read. It tells the owners whose keys are gone, and forgets the abandoned keys that
// cannot come back. It returns the abandoned keys that are in etcd, to be deleted.
func (s *Session) found(seen sighting) (orphans []reading) {
	for i, k := range seen.keys {
		rev := seen.revs[i]
		switch {
		case k.abandoned && rev != 0:
			if s.orphaned(k) {
				k.rev = rev
				orphans = append(orphans, k)
			}
		case k.abandoned && k.certain && k.Key != nil:
			k.forget()
		// k.rev is from when the read was sent. A key that has joined since may rightly be missing in this read.
		case !k.abandoned && k.rev != 0 && k.rev != rev:
			k.gone()
		}
	}
	return orphans
}

// orphaned reports whether the key that was read still has no owner. The name of a dropped key may have been used again
// while the read was under way.
func (s *Session) orphaned(k reading) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys[k.name] == k.Key
}

// A sighting is the result of a read of keys.
type sighting struct {
	term uint64
	keys []reading
	revs []int64
}

// readSome reads the keys that pick chooses, as many as the server allows.
func (s *Session) readSome(ctx context.Context, attempt time.Duration, failed func(error), pick func(most int) []reading) (sighting, error) {
	most := s.most()
	for {
		// Pick once, not for each request: the request may be sent several times, and only one answer counts. The keys
		// of the others would lose their turn.
		picked := pick(most)
		seen, err := retry.AskWithin(ctx, s.client, attempt, failed, func(ctx context.Context) (sighting, error) {
			keys := picked
			if len(keys) == 0 {
				keys = pick(most) // a key may have been added since
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
			// One key that may not be read must not cost the others their lease, so only one key is read. (A key that
			// may not be written costs them the lease all the same: then etcd itself refuses the renewal.)
			most = 1
		}
	}
}

// sweep looks for abandoned keys, and deletes those that it finds as well as the orphans. It takes at most timeout, the
// length of one attempt to renew, so that it does not delay the next renewal. That renewal finds what is left.
func (s *Session) sweep(orphans []reading, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	if s.hasAbandoned() {
		if seen, err := s.readSome(ctx, timeout/2, nil, s.abandonedKeys); err == nil {
			orphans = append(orphans, s.found(seen)...)
		}
	}
	for _, o := range orphans {
		if s.orphaned(o) {
			_ = s.delete(ctx, o) // after an error, still delete the others
		}
	}
}

// delete deletes the abandoned key that was found. A later key of the same name has another create revision, and stays.
func (s *Session) delete(ctx context.Context, o reading) error {
	_, err := retry.Ask(ctx, s.client, nil, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return s.client.Txn(ctx).
			If(clientv3.Compare(clientv3.CreateRevision(o.name), "=", o.rev)).
			Then(clientv3.OpDelete(o.name)).
			Commit()
	})
	if err == nil && o.certain && o.Key != nil { // otherwise a join may still put it, and renewals keep looking
		o.forget()
	}
	return err
}

// most returns how many keys a request may read.
func (s *Session) most() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.maxReads
}

// halve makes later requests read half as many keys, because the server has refused a transaction with that many
// operations. It returns how many they read.
func (s *Session) halve(refused int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.maxReads = max(1, min(s.maxReads, refused/2))
	return s.maxReads
}

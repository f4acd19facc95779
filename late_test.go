package leader_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The tests of this file are about requests that reach etcd when nobody waits for them any more, or twice.
// A request that lies in the socket of an endpoint that does not answer arrives when that endpoint is
// back; a proxy may send one twice. In either case etcd carries it out, whatever has happened since it was
// sent.

// A delay is what happens to a request.
type delay string

const (
	silent  delay = "without an answer until it arrives" // its sender waits for as long as its ctx lets it
	lost    delay = "after its connection has broken"    // its sender gets an error at once
	doubled delay = "a second time"                      // its sender gets the answer to the first
)

// A courier carries a client's mutations to etcd, and delays those that it is told to.
type courier struct {
	clientv3.KV
	clientv3.Lease

	mu   sync.Mutex
	what string // kind of the mutation to be delayed next
	name string // its election; "" for requests about leases
	how  delay
	kept chan func()
}

// couriered returns a client on the same connection whose mutations go by a courier.
func couriered(client *clientv3.Client) (*clientv3.Client, *courier) {
	c := &courier{KV: client.KV, Lease: client.Lease}
	by := wrapped(client)
	by.KV, by.Lease = c, c
	return by, c
}

// delay delays the next mutation of a kind in an election. What it sends lets that mutation reach etcd,
// and returns when etcd has dealt with it.
func (c *courier) delay(what, name string, how delay) <-chan func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.what, c.name, c.how, c.kept = what, name, how, make(chan func(), 1)
	return c.kept
}

// delayed returns where to send the mutation if it is the one to be delayed, or else nil.
func (c *courier) delayed(what, key string) (kept chan<- func(), how delay) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if what != c.what || key != "" && !strings.HasPrefix(key, c.name+"/") {
		return nil, ""
	}
	c.what = ""
	return c.kept, c.how
}

func carry[T any](ctx context.Context, c *courier, what, key string, send func(context.Context) (T, error)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	late := func() answer { //nolint:contextcheck // it arrives after its caller has gone
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		value, err := send(ctx)
		return answer{value, err} // an error says that etcd has refused it, as it may
	}
	var none T
	switch kept, how := c.delayed(what, key); {
	case kept == nil:
		return send(ctx)
	case how == doubled:
		value, err := send(ctx)
		kept <- func() { late() }
		return value, err
	case how == lost:
		kept <- func() { late() }
		return none, rpctypes.ErrTimeoutDueToConnectionLost
	default:
		answers := make(chan answer, 1)
		kept <- func() { answers <- late() }
		select {
		case a := <-answers:
			return a.value, a.err
		case <-ctx.Done():
			return none, ctx.Err()
		}
	}
}

func (c *courier) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	return carry(ctx, c, "grant", "", func(ctx context.Context) (*clientv3.LeaseGrantResponse, error) {
		return c.Lease.Grant(ctx, ttl)
	})
}

func (c *courier) Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	return carry(ctx, c, "revoke", "", func(ctx context.Context) (*clientv3.LeaseRevokeResponse, error) {
		return c.Lease.Revoke(ctx, id)
	})
}

func (c *courier) Txn(ctx context.Context) clientv3.Txn { return &letter{c: c, ctx: ctx} }

// A letter is a transaction that goes by courier.
type letter struct {
	c                 *courier
	ctx               context.Context
	ifs               []clientv3.Cmp
	thens, otherwises []clientv3.Op
}

func (l *letter) If(cs ...clientv3.Cmp) clientv3.Txn   { l.ifs = append(l.ifs, cs...); return l }
func (l *letter) Then(ops ...clientv3.Op) clientv3.Txn { l.thens = append(l.thens, ops...); return l }
func (l *letter) Else(ops ...clientv3.Op) clientv3.Txn {
	l.otherwises = append(l.otherwises, ops...)
	return l
}

func (l *letter) Commit() (*clientv3.TxnResponse, error) {
	send := func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return l.c.KV.Txn(ctx).If(l.ifs...).Then(l.thens...).Else(l.otherwises...).Commit()
	}
	op := l.thens[0]
	what := "read"
	switch {
	case op.IsDelete():
		what = "delete"
	case op.IsPut() && strings.HasSuffix(string(op.KeyBytes()), "/stepback"):
		what = "request"
	case op.IsPut() && len(l.thens) > 1:
		what = "join"
	case op.IsPut() && len(op.ValueBytes()) == 0:
		what = "touch"
	case op.IsPut():
		what = "proclaim"
	}
	return carry(l.ctx, l.c, what, string(op.KeyBytes()), send)
}

// A stage is what a mutation is sent on.
type stage struct {
	client  *clientv3.Client
	courier *courier
	how     delay
	name    string           // of the election
	e       *leader.Elector  // its mutations go by courier
	others  *leader.Elector  // another process
	by      *clientv3.Client // that of e
}

// mutations are all that the library sends. Each send lets e have a term or a campaign that ends, in which
// one of its mutations is delayed, and returns what lets that arrive.
var mutations = []struct {
	what  string
	alone bool // nothing else uses e's lease, so that the next term is on another
	send  func(t *testing.T, s *stage) (arrive func())
}{
	{"grant", true, func(t *testing.T, s *stage) func() {
		kept := s.courier.delay("grant", "", s.how)
		resign(t, lead(t, s.e, s.name, "first"))
		return etcdtest.Await(t, "a grant", kept)
	}},
	{"join", false, func(t *testing.T, s *stage) func() {
		kept := s.courier.delay("join", s.name, s.how)
		resign(t, lead(t, s.e, s.name, "first"))
		return etcdtest.Await(t, "a join", kept)
	}},
	{"join on a lease that is revoked", true, func(t *testing.T, s *stage) func() {
		kept := s.courier.delay("join", s.name, s.how)
		resign(t, lead(t, s.e, s.name, "first"))
		return etcdtest.Await(t, "a join", kept)
	}},
	{"join of a campaign that is given up", false, func(t *testing.T, s *stage) func() {
		first := lead(t, s.others, s.name, "other")
		kept := s.courier.delay("join", s.name, s.how)
		ctx, cancel := context.WithCancel(t.Context())
		next := campaign(ctx, s.e, s.name, "first")
		arrive := etcdtest.Await(t, "a join", kept)
		cancel()
		etcdtest.Await(t, "Campaign", next)
		resign(t, first)
		return arrive
	}},
	{"touch", false, func(t *testing.T, s *stage) func() {
		first := lead(t, s.others, s.name, "other")
		next := campaign(t.Context(), s.e, s.name, "first")
		awaitQueue(t, s.client, s.name, queued(2))
		kept := s.courier.delay("touch", s.name, s.how)
		resign(t, first)
		l := awaitLeader(t, next)
		arrive := etcdtest.Await(t, "a touch", kept)
		resign(t, l)
		return arrive
	}},
	{"proclaim", false, func(t *testing.T, s *stage) func() {
		l := lead(t, s.e, s.name, "first")
		arrive := proclaimLate(t, s.courier, l, s.name, "late", s.how)
		resign(t, l)
		return arrive
	}},
	{"resignation", false, func(t *testing.T, s *stage) func() {
		l := lead(t, s.e, s.name, "first")
		kept := s.courier.delay("delete", s.name, s.how)
		resign(t, l)
		return etcdtest.Await(t, "a deletion", kept)
	}},
	{"withdrawal", false, func(t *testing.T, s *stage) func() {
		first := lead(t, s.others, s.name, "other")
		ctx, cancel := context.WithCancel(t.Context())
		next := campaign(ctx, s.e, s.name, "first")
		awaitQueue(t, s.client, s.name, queued(2))
		kept := s.courier.delay("delete", s.name, s.how)
		cancel()
		etcdtest.Await(t, "Campaign", next)
		arrive := etcdtest.Await(t, "a deletion", kept)
		resign(t, first)
		return arrive
	}},
	{"sweep by a renewal", false, func(t *testing.T, s *stage) func() {
		kept := s.courier.delay("delete", s.name, s.how)
		leaveKey(t, s.e, s.name)
		arrive := etcdtest.Await(t, "a deletion", kept)
		awaitQueue(t, s.client, s.name, queued(0))
		return arrive
	}},
	{"clean-up before a join", false, func(t *testing.T, s *stage) func() {
		kept := s.courier.delay("delete", s.name, s.how)
		leaveKey(t, s.e, s.name)
		resign(t, lead(t, s.e, s.name, "first"))
		return etcdtest.Await(t, "a deletion", kept)
	}},
	{"eviction", false, func(t *testing.T, s *stage) func() {
		l := lead(t, s.e, s.name, "first")
		kept := s.courier.delay("delete", s.name, s.how)
		err := newElector(t, s.by).Evict(t.Context(), s.name)
		arrive := etcdtest.Await(t, "a deletion", kept)
		if err != nil { // it is for the operator to repeat
			err = newElector(t, s.by).Evict(t.Context(), s.name)
		}
		if err != nil {
			t.Errorf("Evict: %v", err)
		}
		awaitEnd(t, l, leader.ErrEvicted)
		return arrive
	}},
	{"request to step back", false, func(t *testing.T, s *stage) func() {
		l := lead(t, s.e, s.name, "first")
		next := campaign(t.Context(), s.others, s.name, "other")
		cs := awaitQueue(t, s.client, s.name, queued(2))
		kept := s.courier.delay("request", s.name, s.how)
		transferred := transfer(t.Context(), newElector(t, s.by), s.name, cs[1])
		arrive := etcdtest.Await(t, "a request", kept)
		awaitEnd(t, l, leader.ErrTransferred)
		resign(t, l)
		wantTransferred(t, transferred)
		resign(t, awaitLeader(t, next))
		return arrive
	}},
	{"step back of a leader", false, func(t *testing.T, s *stage) func() {
		l := lead(t, s.e, s.name, "first")
		next := campaign(t.Context(), s.others, s.name, "other")
		cs := awaitQueue(t, s.client, s.name, queued(2))
		transferred := transfer(t.Context(), newElector(t, s.client), s.name, cs[1])
		awaitEnd(t, l, leader.ErrTransferred)
		kept := s.courier.delay("delete", s.name, s.how)
		resign(t, l)
		arrive := etcdtest.Await(t, "a deletion", kept)
		wantTransferred(t, transferred)
		resign(t, awaitLeader(t, next))
		return arrive
	}},
	{"step back of a candidate", false, func(t *testing.T, s *stage) func() {
		l := lead(t, s.others, s.name, "other")
		next := campaign(t.Context(), s.e, s.name, "first")
		awaitQueue(t, s.client, s.name, queued(2))
		last := campaign(t.Context(), newElector(t, s.client), s.name, "last")
		cs := awaitQueue(t, s.client, s.name, queued(3))
		kept := s.courier.delay("delete", s.name, s.how)
		transferred := transfer(t.Context(), newElector(t, s.client), s.name, cs[2])
		arrive := etcdtest.Await(t, "a deletion", kept)
		awaitEnd(t, l, leader.ErrTransferred)
		resign(t, l)
		wantTransferred(t, transferred)
		resign(t, awaitLeader(t, last))
		resign(t, awaitLeader(t, next))
		return arrive
	}},
	{"revocation", true, func(t *testing.T, s *stage) func() {
		l := lead(t, s.e, s.name, "first")
		kept := s.courier.delay("revoke", "", s.how)
		resign(t, l)
		return etcdtest.Await(t, "a revocation", kept)
	}},
}

// proclaimLate proclaims a value with a request that is delayed.
func proclaimLate(t *testing.T, c *courier, l *leader.Leader, name, value string, how delay) (arrive func()) {
	t.Helper()
	kept := c.delay("proclaim", name, how)
	ctx, cancel := context.WithCancel(t.Context())
	proclaimed := make(chan error, 1)
	go func() { proclaimed <- l.Proclaim(ctx, value) }()
	arrive = etcdtest.Await(t, "a proclamation", kept)
	if how != doubled {
		cancel()
	}
	if err := etcdtest.Await(t, "Proclaim", proclaimed); (err == nil) != (how == doubled) {
		t.Errorf("Proclaim returned %v", err)
	}
	cancel()
	return arrive
}

// leaveKey lets e lead and leave its key behind, as a Resign does whose ctx ends before etcd has answered.
func leaveKey(t *testing.T, e *leader.Elector, name string) {
	t.Helper()
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := lead(t, e, name, "left").Resign(cancelled); !errors.Is(err, context.Canceled) {
		t.Fatalf("Resign with a cancelled ctx returned %v", err)
	}
}

// Whatever has been sent may arrive late: when its term is over, it leaves nothing; in the next term of the process, it
// does no harm to that.
func TestMutationsThatArriveLateOrTwiceDoNoHarm(t *testing.T) {
	_, client := start(t)
	t.Run("all", func(t *testing.T) {
		for _, m := range mutations {
			for _, how := range []delay{silent, lost, doubled} {
				begin := func(t *testing.T) (s *stage, arrive func()) {
					t.Parallel()
					by, c := couriered(client)
					s = &stage{
						client: client, courier: c, how: how, name: t.Name(),
						by: by, e: newExpiring(t, by), others: newExpiring(t, client),
					}
					if !m.alone {
						lead(t, s.e, s.name+"-other", "") // keeps the lease
					}
					return s, m.send(t, s)
				}
				t.Run(m.what+" arrives "+string(how)+", when its term is over", func(t *testing.T) {
					s, arrive := begin(t)
					arrive()
					awaitQueue(t, client, s.name, queued(0)) // what it has put is deleted again
					resign(t, lead(t, s.others, s.name, "another"))
					if resp, err := client.Get(t.Context(), s.name+"/", clientv3.WithPrefix()); err != nil || resp.Count != 0 {
						t.Errorf("left below the name: %v, %v", resp, err)
					}
				})
				t.Run(m.what+" arrives "+string(how)+", in the next term of the process", func(t *testing.T) {
					s, arrive := begin(t)
					l := lead(t, s.e, s.name, "again")
					next := campaign(t.Context(), s.others, s.name, "next")
					awaitQueue(t, client, s.name, queued(2))
					arrive()
					if !guarded(t, client, l) {
						<-l.Context().Done()
						t.Fatalf("the key of the next term is gone: %v", context.Cause(l.Context()))
					}
					cs := awaitQueue(t, client, s.name, queued(2))
					if cs[0].Token != l.Token() || cs[0].Value != "again" || cs[1].Value != "next" {
						t.Errorf("the queue is %+v", cs)
					}
					resign(t, l)
					resign(t, awaitLeader(t, next))
				})
			}
		}
	})
	awaitExpiry(t, client) // nobody knows of a lease whose grant was carried out twice
}

// While other elections keep the lease, nothing else would end what the late join has put.
func TestLateJoinAfterItsTermIsDeleted(t *testing.T) {
	_, client := start(t)
	by, c := couriered(client)
	e := newExpiring(t, by)
	other := lead(t, e, "other", "")
	kept := c.delay("join", "jobs", silent)
	resign(t, lead(t, e, "jobs", "first")) // its second join was answered
	etcdtest.Await(t, "a join", kept)()
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	l := awaitLeader(t, next)
	if !other.IsLeader() {
		t.Errorf("the term in the other election has ended: %v", context.Cause(other.Context()))
	}
	resign(t, l)
}

func TestLateJoinOfACampaignThatWasGivenUpIsDeletedAfterALaterTerm(t *testing.T) {
	_, client := start(t)
	by, c := couriered(client)
	e := newExpiring(t, by)
	lead(t, e, "other", "") // keeps the lease
	kept := c.delay("join", "jobs", silent)
	ctx, cancel := context.WithCancel(t.Context())
	given := campaign(ctx, e, "jobs", "first")
	arrive := etcdtest.Await(t, "a join", kept)
	cancel()
	if o := etcdtest.Await(t, "Campaign", given); !errors.Is(o.err, context.Canceled) {
		t.Errorf("Campaign returned %v", o.err)
	}
	resign(t, lead(t, e, "jobs", "second"))
	arrive()
	awaitQueue(t, client, "jobs", queued(0))
	resign(t, lead(t, newElector(t, client), "jobs", "third"))
}

// A campaign that is given up while its join has no answer does not know whether it has a key. What it
// sends to be sure must not meet the key of a later campaign.
func TestLateCleanUpOfACampaignDoesNotDeleteTheKeyOfTheNext(t *testing.T) {
	_, client := start(t)
	by, c := couriered(client)
	e := newElector(t, by)
	lead(t, e, "other", "") // keeps the lease
	joins := c.delay("join", "jobs", lost)
	ctx, cancel := context.WithCancel(t.Context())
	given := campaign(ctx, e, "jobs", "first")
	join := etcdtest.Await(t, "a join", joins)
	deletions := c.delay("delete", "jobs", silent)
	cancel()
	etcdtest.Await(t, "Campaign", given)
	l := lead(t, e, "jobs", "second")
	next := campaign(t.Context(), newElector(t, client), "jobs", "third")
	awaitQueue(t, client, "jobs", func(cs []leader.Candidate) bool { return len(cs) > 1 })
	join()
	select {
	case deletion := <-deletions: // one that is sent later deletes nothing either
		deletion()
	default:
	}
	if !l.IsLeader() || !guarded(t, client, l) {
		t.Error("the term has lost its key to the clean-up of an earlier campaign")
	}
	resign(t, l)
	resign(t, awaitLeader(t, next))
}

// A join that was given up for lost may reach etcd after the clean-up. While other elections keep the lease, a renewal
// must find it.
func TestJoinThatArrivesAfterItsCampaignFailedIsSweptAway(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	kv := &brokenKV{KV: client.KV}
	broken.KV = kv
	e := newExpiring(t, broken)
	l := lead(t, e, "other", "")
	ctx, cancel := context.WithCancel(t.Context())
	fail := func(*clientv3.TxnResponse, error) (*clientv3.TxnResponse, error) {
		kv.after.Store(nil)
		cancel()
		return nil, rpctypes.ErrTimeoutDueToConnectionLost
	}
	kv.after.Store(&fail)
	if _, err := e.Campaign(ctx, "jobs", ""); !errors.Is(err, context.Canceled) {
		t.Fatalf("Campaign returned %v", err)
	}
	id := awaitQueue(t, client, "other", queued(1))[0].Lease
	if _, err := client.Put(t.Context(), fmt.Sprintf("jobs/%x", id), "late", clientv3.WithLease(id)); err != nil {
		t.Fatal(err)
	}
	awaitQueue(t, client, "jobs", queued(0))
	if !l.IsLeader() {
		t.Error("the term in the other election has ended")
	}
}

// Others must see the value that the leader has campaigned with, whose ever the key is that its join finds.
func TestLeaderHasTheValueOfItsOwnCampaign(t *testing.T) {
	_, client := start(t)
	for _, how := range []delay{silent, lost, doubled} {
		t.Run(string(how), func(t *testing.T) {
			by, c := couriered(client)
			e, name := newExpiring(t, by), t.Name()
			lead(t, e, name+"-other", "") // keeps the lease
			kept := c.delay("join", name, how)
			ctx, cancel := context.WithCancel(t.Context())
			given := campaign(ctx, e, name, "old")
			arrive := etcdtest.Await(t, "a join", kept)
			if how == doubled {
				resign(t, awaitLeader(t, given))
			} else {
				cancel()
				etcdtest.Await(t, "Campaign", given)
			}
			cancel()
			kept = c.delay("join", name, silent)
			next := campaign(t.Context(), e, name, "new")
			join := etcdtest.Await(t, "a join", kept)
			arrive() // just before it
			join()
			l := awaitLeader(t, next)
			if cs := awaitQueue(t, client, name, queued(1)); cs[0].Value != "new" || cs[0].Token != l.Token() {
				t.Errorf("the leader with token %d campaigned with %q, and others see %+v", l.Token(), "new", cs)
			}
			resign(t, l)
		})
	}
}

// Nor does it replace one that came from a term that has been touched meanwhile.
func TestLateProclaimDoesNotReplaceALaterValue(t *testing.T) {
	_, client := start(t)
	for _, how := range []delay{silent, lost, doubled} {
		t.Run(string(how), func(t *testing.T) {
			by, c := couriered(client)
			name := t.Name()
			first := lead(t, newElector(t, client), name, "")
			next := campaign(t.Context(), newElector(t, by), name, "zero")
			awaitQueue(t, client, name, queued(2))
			resign(t, first)
			l := awaitLeader(t, next)
			arrive := proclaimLate(t, c, l, name, "one", how)
			if err := l.Proclaim(t.Context(), "two"); err != nil {
				t.Fatalf("Proclaim: %v", err)
			}
			arrive()
			if kv := onlyKey(t, client, name+"/"); string(kv.Value) != "two" || kv.CreateRevision != l.Token() {
				t.Errorf("the value is %q after %q was proclaimed last", kv.Value, "two")
			}
			resign(t, l)
		})
	}
}

// Here a lease that is gone has been revoked, as its TTL is longer than the test waits.
func TestLeaseIsRevokedWhenItsGrantWasCutShort(t *testing.T) {
	_, client := start(t)
	by, c := couriered(client)
	e := newExpiring(t, by)
	kept := c.delay("grant", "", silent)
	ctx, cancel := context.WithCancel(t.Context())
	given := campaign(ctx, e, "jobs", "")
	arrive := etcdtest.Await(t, "a grant", kept)
	cancel()
	if o := etcdtest.Await(t, "Campaign, which does not wait for the grant", given); !errors.Is(o.err, context.Canceled) {
		t.Errorf("Campaign returned %v", o.err)
	}
	arrive()
	awaitExpiry(t, client)
}

func TestLeaseThatIsGrantedLateIsRevokedWhileTheTermIsOnAnother(t *testing.T) {
	_, client := start(t)
	by, c := couriered(client)
	kept := c.delay("grant", "", silent)
	l := lead(t, newElector(t, by), "jobs", "")
	etcdtest.Await(t, "a grant", kept)()
	own := awaitQueue(t, client, "jobs", queued(1))[0].Lease
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		leases, err := client.Leases(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(leases.Leases) == 1 && leases.Leases[0].ID == own {
			break
		}
		if time.Since(began) > patience/3 {
			t.Fatalf("the term is on lease %x, and there are %v", own, leases.Leases)
		}
	}
	resign(t, l)
}

// A heldGrant holds the answers to grants back. etcd carries the grants out even if their contexts end, as it does with
// every request that has reached it.
type heldGrant struct {
	clientv3.Lease
	granted chan clientv3.LeaseID
	answer  chan struct{}
}

func (g *heldGrant) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	sent, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	resp, err := g.Lease.Grant(sent, ttl)
	if err != nil {
		return nil, err
	}
	g.granted <- resp.ID
	select {
	case <-g.answer:
		return resp, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func TestLeaseThatIsGrantedAfterItsCampaignHasEndedIsRevoked(t *testing.T) {
	_, client := start(t)
	for _, try := range []bool{false, true} {
		slow := wrapped(client)
		grant := &heldGrant{Lease: client.Lease, granted: make(chan clientv3.LeaseID, 100), answer: make(chan struct{})}
		slow.Lease = grant
		e := newElector(t, slow, leader.WithTTL(5*time.Minute)) // longer than anybody waits here
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			var err error
			if try {
				_, err = e.TryCampaign(ctx, "jobs", "")
			} else {
				_, err = e.Campaign(ctx, "jobs", "")
			}
			ended <- err
		}()
		etcdtest.Await(t, "a grant", grant.granted)
		cancel()
		if err := etcdtest.Await(t, "the end of the campaign", ended); !errors.Is(err, context.Canceled) {
			t.Errorf("the campaign ended with %v", err)
		}
		close(grant.answer)
		awaitExpiry(t, client)
		if err := e.Close(t.Context()); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
}

// A process that exits after Close leaves nothing.
func TestCloseWaitsForALeaseThatIsBeingGranted(t *testing.T) {
	_, client := start(t)
	slow := wrapped(client)
	grant := &heldGrant{Lease: client.Lease, granted: make(chan clientv3.LeaseID, 100), answer: make(chan struct{})}
	slow.Lease = grant
	e := newElector(t, slow, leader.WithTTL(5*time.Minute))
	campaigns := campaign(t.Context(), e, "jobs", "")
	etcdtest.Await(t, "a grant", grant.granted)
	closed := make(chan error, 1)
	go func() { closed <- e.Close(t.Context()) }()
	if o := etcdtest.Await(t, "Campaign", campaigns); !errors.Is(o.err, leader.ErrClosed) {
		t.Errorf("Campaign of a closed Elector: %v", o.err)
	}
	close(grant.answer)
	if err := etcdtest.Await(t, "Close", closed); err != nil {
		t.Errorf("Close: %v", err)
	}
	if resp, err := client.Leases(t.Context()); err != nil || len(resp.Leases) != 0 {
		t.Errorf("leases after Close: %v, %v", resp.Leases, err)
	}
}

func TestTryCampaignIsNotHeldByAKeyOfItsOwn(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client) // no renewal comes
	lead(t, e, "other", "")    // keeps the lease
	leaveKey(t, e, "jobs")
	l, err := e.TryCampaign(t.Context(), "jobs", "me")
	if err != nil {
		t.Fatalf("TryCampaign beside its own key, which nobody leads with: %v", err)
	}
	if cs := awaitQueue(t, client, "jobs", queued(1)); cs[0].Token != l.Token() || cs[0].Value != "me" {
		t.Errorf("the queue is %+v", cs)
	}
	resign(t, l)
}

// A fullKV answers the joins of an election as an etcd that fills up while the first is under way, which it carries
// out and refuses.
type fullKV struct {
	clientv3.KV
	prefix string
	joins  atomic.Int64
}

func (kv *fullKV) Txn(ctx context.Context) clientv3.Txn { return &fullTxn{Txn: kv.KV.Txn(ctx), kv: kv} }

type fullTxn struct {
	clientv3.Txn
	kv   *fullKV
	join bool
}

func (x *fullTxn) If(cs ...clientv3.Cmp) clientv3.Txn   { x.Txn = x.Txn.If(cs...); return x }
func (x *fullTxn) Else(ops ...clientv3.Op) clientv3.Txn { x.Txn = x.Txn.Else(ops...); return x }

func (x *fullTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	x.join = ops[0].IsPut() && strings.HasPrefix(string(ops[0].KeyBytes()), x.kv.prefix)
	x.Txn = x.Txn.Then(ops...)
	return x
}

func (x *fullTxn) Commit() (*clientv3.TxnResponse, error) {
	switch {
	case !x.join:
		return x.Txn.Commit()
	case x.kv.joins.Add(1) == 1:
		if _, err := x.Txn.Commit(); err != nil {
			return nil, err
		}
	}
	return nil, rpctypes.ErrNoSpace
}

func TestJoinThatIsCarriedOutAndRefusedForLackOfSpaceIsDeleted(t *testing.T) {
	_, client := start(t)
	full := wrapped(client)
	full.KV = &fullKV{KV: client.KV, prefix: "jobs/"}
	e := newElector(t, full)
	keep := lead(t, e, "keep", "") // keeps the lease alive
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := e.Campaign(ctx, "jobs", ""); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatalf("Campaign: %v", err)
	}
	resign(t, lead(t, newElector(t, client), "jobs", ""))
	if !keep.IsLeader() {
		t.Error("the other term was lost")
	}
}

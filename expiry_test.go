package leader_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The tests of this file are about what terms and campaigns leave behind, and about what the next in line is sent.

// moveRaftLeader makes another member etcd's leader, and returns when it is.
func moveRaftLeader(t *testing.T, members []*etcdtest.Member) {
	t.Helper()
	old := raftLeaderOf(t, members)
	client := etcdtest.NewClient(t, old.Endpoint)
	list, err := client.MemberList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	to := list.Members[0].ID
	if to == list.Header.MemberId {
		to = list.Members[1].ID
	}
	if _, err := client.MoveLeader(t.Context(), to); err != nil {
		t.Fatal(err)
	}
	if raftLeaderOf(t, members) == old {
		t.Fatal("etcd's leader has not moved")
	}
}

// A new leader of etcd restarts the TTL of every lease. So the owner of a term that has expired revokes the lease
// itself, as soon as it can. It first waits for the margin, which belongs to the work that has to stop.
func TestOwnerDeletesTheKeyOfAnExpiredTermThatEtcdHasProlonged(t *testing.T) {
	t.Parallel()
	members := etcdtest.StartCluster(t, 3)
	const ttl = 8 * time.Second
	for what, test := range map[string]struct {
		margin, blind time.Duration
		shared        bool
	}{
		"the network is back before the margin has passed": {margin: 3 * time.Second},
		"the network is back after it":                     {margin: 3 * time.Second, blind: 7 * time.Second / 2},
		// It gives the lease back when it has tried for 2 s to delete its key.
		"a candidate has the lease too": {margin: time.Second, blind: 4 * time.Second, shared: true},
	} {
		t.Run(what, func(t *testing.T) {
			margin := test.margin
			var near, far []string
			var links []*etcdtest.Link
			for _, m := range members {
				link := etcdtest.NewLink(t, m)
				links, near, far = append(links, link), append(near, m.Endpoint), append(far, link.Endpoint)
			}
			client := etcdtest.NewClient(t, near...)
			ended := make(chan struct{})
			e := newElector(t, etcdtest.NewClient(t, far...), leader.WithTTL(ttl), leader.WithMargin(margin),
				leader.WithHooks(leader.Hooks{Ended: func(string, *leader.Leader, error) { close(ended) }}))
			l := lead(t, e, "jobs", "old")
			if test.shared {
				lead(t, newElector(t, client, leader.WithTTL(time.Minute)), "other", "")
				ctx, cancel := context.WithCancel(t.Context())
				candidate := campaign(ctx, e, "other", "")
				defer await(t, "Campaign", candidate)
				defer cancel()
				awaitQueue(t, client, "other", queued(2))
			}
			next := campaign(t.Context(), newElector(t, client, leader.WithTTL(time.Minute)), "jobs", "next")
			awaitQueue(t, client, "jobs", queued(2))
			for _, link := range links {
				link.Darken()
			}
			awaitEnd(t, l, leader.ErrExpired)
			deadline := l.Deadline()
			await(t, "Ended", ended)
			moveRaftLeader(t, members)
			prolonged := time.Now()
			time.Sleep(time.Until(deadline.Add(test.blind)))
			for _, link := range links {
				link.Heal()
			}
			o := await(t, "Campaign", next)
			if o.err != nil {
				t.Fatal(o.err)
			}
			t.Logf("the next leader was elected %v after the end of the term, %v after etcd's leader had moved",
				o.at.Sub(deadline).Round(time.Millisecond), o.at.Sub(prolonged).Round(time.Millisecond))
			if o.at.Before(deadline.Add(margin)) {
				t.Errorf("that is %v before the margin has passed", deadline.Add(margin).Sub(o.at))
			}
			if o.at.After(prolonged.Add(ttl - time.Second/2)) {
				t.Error("the key blocked the election for a TTL anew")
			}
			resign(t, o.l)
			if !test.shared {
				awaitExpiry(t, client)
			}
		})
	}
}

func TestLeaseOfAnExpiredTermIsRevokedWhenTheMarginHasPassed(t *testing.T) {
	_, client := start(t)
	broken := wrapped(client)
	reporter := revocationReporter{client.Lease, make(chan revocation, 100)}
	lease := &brokenLease{Lease: reporter}
	broken.Lease = lease
	const ttl, margin = 4 * time.Second, 2 * time.Second
	refuse := func(context.Context) (*clientv3.LeaseKeepAliveResponse, error) { return nil, rpctypes.ErrNoLeader }
	lease.keepAlive.Store(&refuse)
	l := lead(t, newElector(t, broken, leader.WithTTL(ttl), leader.WithMargin(margin)), "jobs", "")
	awaitEnd(t, l, leader.ErrExpired)
	deadline := l.Deadline()
	for {
		r := await(t, "the revocation", reporter.revocations)
		if l.Key() != fmt.Sprintf("jobs/%x", r.id) {
			continue // on a busy machine more than one lease may have been granted
		}
		if r.at.Before(deadline.Add(margin)) {
			t.Errorf("the lease was revoked %v before the margin had passed", deadline.Add(margin).Sub(r.at))
		}
		break
	}
	awaitExpiry(t, client)
}

type revocation struct {
	id clientv3.LeaseID
	at time.Time
}

// A revocationReporter reports each lease that is to be revoked.
type revocationReporter struct {
	clientv3.Lease
	revocations chan revocation
}

func (r revocationReporter) Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	r.revocations <- revocation{id, time.Now()}
	return r.Lease.Revoke(ctx, id)
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
		await(t, "a grant", grant.granted)
		cancel()
		if err := await(t, "the end of the campaign", ended); !errors.Is(err, context.Canceled) {
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
	await(t, "a grant", grant.granted)
	closed := make(chan error, 1)
	go func() { closed <- e.Close(t.Context()) }()
	if o := await(t, "Campaign", campaigns); !errors.Is(o.err, leader.ErrClosed) {
		t.Errorf("Campaign of a closed Elector: %v", o.err)
	}
	close(grant.answer)
	if err := await(t, "Close", closed); err != nil {
		t.Errorf("Close: %v", err)
	}
	if resp, err := client.Leases(t.Context()); err != nil || len(resp.Leases) != 0 {
		t.Errorf("leases after Close: %v, %v", resp.Leases, err)
	}
}

// A valueCounter counts the bytes of the values that the watches of a key deliver, and reports the watches' contexts.
type valueCounter struct {
	clientv3.Watcher
	key     string
	bytes   atomic.Int64
	watches chan context.Context
}

func (c *valueCounter) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	if key != c.key {
		return c.Watcher.Watch(ctx, key, opts...)
	}
	in, out := c.Watcher.Watch(ctx, key, opts...), make(chan clientv3.WatchResponse)
	c.watches <- ctx
	go func() {
		defer close(out)
		for resp := range in {
			for _, ev := range resp.Events {
				c.bytes.Add(int64(len(ev.Kv.Value)))
			}
			select {
			case out <- resp:
			case <-ctx.Done():
			}
		}
	}()
	return out
}

// A candidate watches the puts of the one before it until that one's touch says that it leads. Later puts carry the
// values that the leader proclaims, and nobody needs them: a watch of deletions alone replaces the first watch.
func TestWhatALeaderThatHadWaitedProclaimsDoesNotReachTheNextInLine(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	won := campaign(t.Context(), newElector(t, client), "jobs", "second")
	second := awaitQueue(t, client, "jobs", queued(2))[1]
	counter := &valueCounter{Watcher: client.Watcher, key: second.Key, watches: make(chan context.Context, 10)}
	counting := wrapped(client)
	counting.Watcher = counter
	next := campaign(t.Context(), newElector(t, counting), "jobs", "third")
	awaitQueue(t, client, "jobs", queued(3))
	before := await(t, "the watch of the one before", counter.watches)
	resign(t, first)
	l := awaitLeader(t, won)
	replaced := true
	select {
	case <-before.Done():
	case <-time.After(5 * time.Second):
		replaced = false
	}
	const n, size = 10, 100_000
	for i := range n {
		if err := l.Proclaim(t.Context(), fmt.Sprint(i)+strings.Repeat("v", size)); err != nil {
			t.Fatal(err)
		}
	}
	resign(t, l)
	resign(t, awaitLeader(t, next))
	// All that the watch delivered came before the deletion.
	if got := counter.bytes.Load(); got > size {
		t.Errorf("the next in line got %d bytes of the %d values of %d bytes that the leader has proclaimed", got, n, size)
	}
	if !replaced {
		t.Error("the next in line went on to watch the values of the leader")
	}
}

// A selectiveWatcher passes on the events of one key only.
type selectiveWatcher struct {
	clientv3.Watcher
	key string
}

func (w selectiveWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	in := w.Watcher.Watch(ctx, key, opts...)
	if key == w.key {
		return in
	}
	out := make(chan clientv3.WatchResponse)
	go func() {
		defer close(out)
		for resp := range in {
			if resp.Events = nil; !resp.Created {
				continue
			}
			select {
			case out <- resp:
			case <-ctx.Done():
			}
		}
	}()
	return out
}

// If the keys of leader and candidate are deleted together, the first deletion may elect the candidate before it knows
// of the second.
func TestTouchThatFindsTheKeyGoneEndsTheTerm(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	var calls rpcCounter
	deaf := wrapped(etcdtest.NewClientFrom(t, calls.config(m.Endpoint)))
	deaf.Watcher = selectiveWatcher{deaf.Watcher, first.Key()}
	renewed := make(chan struct{}, 1000)
	e := newElector(t, deaf, leader.WithTTL(5*time.Minute), leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	}))
	won := campaign(t.Context(), e, "jobs", "second")
	own := awaitQueue(t, client, "jobs", queued(2))[1]
	awaitCalls(t, calls.reads, 2) // it watches both keys
	resp, err := client.Txn(t.Context()).Then(clientv3.OpDelete(first.Key()), clientv3.OpDelete(own.Key)).Commit()
	if err != nil || len(resp.Responses) != 2 {
		t.Fatal(resp, err)
	}
	l := awaitLeader(t, won)
	awaitEnd(t, l, leader.ErrEvicted)
	if len(renewed) > 0 {
		t.Error("a renewal may have found out")
	}
	awaitEnd(t, first, leader.ErrEvicted)
}

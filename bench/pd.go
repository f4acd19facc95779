package main

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// A pdElection is one as the services of github.com/tikv/pd hold it on etcd (pkg/mcs/utils/expected_primary.go,
// pkg/election). There is no queue: everybody watches the key of who leads, and campaigns when it is gone, unless
// another key says that somebody else is expected to lead. A transfer changes that other key, which the leader
// watches.
//
// It sends the requests that pd sends, but for renewals and for what a transfer reads of pd's registry of services.
type pdElection struct {
	*lineup
	primary, expected string
	expects           atomic.Int64 // the lease of expected
	waiting           atomic.Int64
}

// pdPause is how long somebody waits before it looks again who leads if somebody else is expected to.
const pdPause = 200 * time.Millisecond

func lineUpPD(l *lineup) error {
	p := &pdElection{lineup: l, primary: "pd/" + l.election + "/primary", expected: "pd/" + l.election + "/expected_primary"}
	wait := func(n int) error {
		ctx, cancel := context.WithTimeout(l.ctx, patience)
		defer cancel()
		for p.waiting.Load() < int64(n) {
			if ctx.Err() != nil {
				return fmt.Errorf("wait until %d wait: %w", n, context.Cause(ctx))
			}
			sleep(ctx, time.Millisecond)
		}
		return nil
	}
	l.move = p.transfer
	l.whole = func() error { return wait(l.waiters + 1) }
	return l.inTurn(func(who role, client *clientv3.Client) error {
		name := "other"
		if who == chosen {
			name = "chosen"
		}
		l.start(func() error { return p.takePart(client, who, name) })
		return nil
	}, func(n int) error { return wait(n - 1) })
}

// takePart waits and leads, in turn.
func (p *pdElection) takePart(client *clientv3.Client, who role, name string) error {
	for p.ctx.Err() == nil {
		leads, err := p.get(client, p.primary)
		if err != nil {
			return err
		}
		if len(leads.Kvs) > 0 {
			if _, err := p.get(client, "health"); err != nil {
				return err
			}
			if err := p.awaitDeletion(client, p.primary, leads.Kvs[0].ModRevision, &p.waiting); err != nil {
				return err
			}
		}
		expected, err := p.get(client, p.expected)
		if err != nil {
			return err
		}
		if len(expected.Kvs) > 0 && string(expected.Kvs[0].Value) != name {
			sleep(p.ctx, pdPause)
			continue
		}
		if err := p.campaign(client, who, name); err != nil {
			return err
		}
	}
	return nil
}

// campaign leads until somebody else is expected to, unless somebody else leads already.
func (p *pdElection) campaign(client *clientv3.Client, who role, name string) error {
	lease, err := p.grant(client)
	if err != nil {
		return err
	}
	defer p.revoke(client, lease)
	ctx, cancel := request(p.ctx)
	defer cancel()
	put, err := client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(p.primary), "=", 0)).
		Then(clientv3.OpPut(p.primary, name, clientv3.WithLease(lease))).
		Commit()
	if err != nil || !put.Succeeded {
		return err
	}
	p.leads(who)
	rev, err := p.expect(client, name)
	if err != nil {
		return err
	}
	defer p.ends(who)
	defer p.revoke(client, clientv3.LeaseID(p.expects.Load()))
	if who == waiter { // it has looked before the transfer had said who is expected, so the operator transfers again
		if err := p.transfer(); err != nil {
			return err
		}
	}
	return p.awaitDeletion(client, p.expected, rev+1, nil)
}

// expect says who is expected to lead.
func (p *pdElection) expect(client *clientv3.Client, name string) (rev int64, err error) {
	lease, err := p.grant(client)
	if err != nil {
		return 0, err
	}
	return p.flag(client, name, lease)
}

func (p *pdElection) flag(client *clientv3.Client, name string, lease clientv3.LeaseID) (rev int64, err error) {
	ctx, cancel := request(p.ctx)
	defer cancel()
	put, err := client.Put(ctx, p.expected, name, clientv3.WithLease(lease))
	if err != nil {
		return 0, err
	}
	p.expects.Store(int64(lease))
	return put.Header.Revision, nil
}

// transfer is what the process that leads does when an operator asks it to hand over.
func (p *pdElection) transfer() error {
	lease, err := p.grant(p.from)
	if err != nil {
		return err
	}
	p.revoke(p.from, clientv3.LeaseID(p.expects.Load()))
	_, err = p.flag(p.from, "chosen", lease)
	return err
}

func (p *pdElection) get(client *clientv3.Client, key string) (*clientv3.GetResponse, error) {
	ctx, cancel := request(p.ctx)
	defer cancel()
	return client.Get(ctx, key)
}

func (p *pdElection) grant(client *clientv3.Client) (clientv3.LeaseID, error) {
	ctx, cancel := request(p.ctx)
	defer cancel()
	lease, err := client.Grant(ctx, int64(seconds(longTTL)))
	if err != nil {
		return 0, err
	}
	return lease.ID, nil
}

// revoke may fail: the lease may have been revoked by somebody else.
func (p *pdElection) revoke(client *clientv3.Client, lease clientv3.LeaseID) {
	ctx, cancel := request(context.WithoutCancel(p.ctx))
	defer cancel()
	_, _ = client.Revoke(ctx, lease)
}

// awaitDeletion blocks until the key is deleted, and counts who does.
func (p *pdElection) awaitDeletion(client *clientv3.Client, key string, rev int64, waiting *atomic.Int64) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(p.ctx))
	defer cancel()
	events := client.Watch(ctx, key, clientv3.WithRev(rev))
	if waiting != nil {
		waiting.Add(1)
		defer waiting.Add(-1)
	}
	for resp := range events {
		if err := resp.Err(); err != nil {
			return err
		}
		for _, ev := range resp.Events {
			if ev.Type == clientv3.EventTypeDelete {
				return nil
			}
		}
	}
	return p.ctx.Err()
}

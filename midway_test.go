package leader_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A midway is a Transfer that has asked somebody who has not left: a stock candidate between the leader and the target,
// or the leader, whose function has not returned.
type midway struct {
	t           *testing.T
	m           *etcdtest.Member
	client      *clientv3.Client
	l           *leader.Leader
	target      *etcdtest.Link // of the target's client
	check       patient        // of the target
	asker       *leader.Elector
	askerClient *clientv3.Client
	askerLink   *etcdtest.Link
	dead        bool // the asker is, so what it has put stays until its lease has expired
	cs          []leader.Candidate

	stopLeader, giveUp, cancel context.CancelFunc // of the leader's Run, the target's Campaign, and Transfer
}

// revoke revokes the lease of a key.
func (h *midway) revoke(key string) {
	h.t.Helper()
	resp, err := h.client.Get(h.t.Context(), key)
	if err != nil || resp.Count != 1 {
		h.t.Fatalf("%q: %v, %v", key, resp, err)
	}
	if _, err := h.client.Revoke(h.t.Context(), clientv3.LeaseID(resp.Kvs[0].Lease)); err != nil {
		h.t.Fatal(err)
	}
}

// Whoever takes part dies, leaves or is cut off: nothing hangs, nothing is left, and a leader that was not asked stays.
func TestWhatHappensMidwayThroughATransfer(t *testing.T) {
	type want struct {
		err   error
		leads string
	}
	const ttl = 3 * time.Second // of the target
	for event, test := range map[string]struct {
		do              func(h *midway)
		between, leader want // by who has been asked
	}{
		"the target's lease is revoked": {
			func(h *midway) { h.revoke(h.cs[len(h.cs)-2].Key) },
			want{leader.ErrNotCandidate, "leads"}, want{leader.ErrNotCandidate, "third"},
		},
		"the target gives up": {
			func(h *midway) { h.giveUp() },
			want{leader.ErrNotCandidate, "leads"}, want{leader.ErrNotCandidate, "third"},
		},
		"the target is unhealthy": {
			func(h *midway) { h.check.fail(errSick) },
			want{leader.ErrNotCandidate, "leads"}, want{leader.ErrNotCandidate, "third"},
		},
		"the target is cut off": { // if the leader leaves then, the target is first, and leads as far as etcd knows
			func(h *midway) { h.target.Darken() },
			want{leader.ErrNotCandidate, "leads"}, want{nil, "third"},
		},
		"the asker gives up": {
			func(h *midway) { h.cancel() },
			want{context.Canceled, "leads"}, want{context.Canceled, "target"},
		},
		"the asker is closed": {
			func(h *midway) {
				if err := h.asker.Close(h.t.Context()); err != nil {
					h.t.Errorf("Close: %v", err)
				}
			},
			want{leader.ErrClosed, "leads"}, want{leader.ErrClosed, "target"},
		},
		"the asker's client is closed": {
			func(h *midway) { h.dead = true; _ = h.askerClient.Close() },
			want{leader.ErrClosed, "leads"}, want{leader.ErrClosed, "target"},
		},
		"the asker is cut off, and gives up": {
			func(h *midway) { h.dead = true; h.askerLink.Darken(); h.cancel() },
			want{context.Canceled, "leads"}, want{context.Canceled, "target"},
		},
		"the asker's lease is revoked": {
			func(h *midway) { h.revoke(h.cs[len(h.cs)-3].Key + "/stepback") },
			want{nil, "target"}, want{nil, "target"},
		},
		"the leader's lease is revoked": {
			func(h *midway) { h.revoke(h.cs[0].Key) },
			want{nil, "target"}, want{nil, "target"},
		},
		"the leader's Run ends": {
			func(h *midway) { h.stopLeader() },
			want{nil, "target"}, want{nil, "target"},
		},
		"etcd does not answer for a while": {
			func(h *midway) {
				if err := h.m.Pause(); err != nil {
					h.t.Fatal(err)
				}
				time.Sleep(time.Second)
				if err := h.m.Resume(); err != nil {
					h.t.Fatal(err)
				}
			},
			want{nil, "target"}, want{nil, "target"},
		},
	} {
		for asked, want := range map[string]want{"one between": test.between, "the leader": test.leader} {
			t.Run(event+", "+asked+" was asked", func(t *testing.T) {
				t.Parallel()
				h := &midway{t: t, m: etcdtest.StartProcesses(t, 1)[0]}
				h.client = etcdtest.NewClient(t, h.m.Endpoint)
				leavesNothing(t, h.client)
				h.target, h.askerLink = etcdtest.NewLink(t, h.m), etcdtest.NewLink(t, h.m)
				h.askerClient = etcdtest.NewClient(t, h.askerLink.Endpoint)
				h.asker = newElector(t, h.askerClient)

				rctx, stopLeader := context.WithCancel(t.Context())
				defer stopLeader()
				h.stopLeader = stopLeader
				release := make(chan struct{})
				terms, ran := runHeld(rctx, newElector(t, h.client), "leads", release)
				h.l = etcdtest.Await(t, "the term", terms)
				waiting, stockLeaves := 2, func() {}
				if asked == "one between" {
					stockLeaves = standStock(t, h.m, h.client)
					awaitQueue(t, h.client, "jobs", queued(2))
					waiting++
				}
				tctx, giveUp := context.WithCancel(t.Context())
				defer giveUp()
				h.giveUp = giveUp
				target := campaign(tctx, newElector(t, etcdtest.NewClient(t, h.target.Endpoint), leader.WithTTL(ttl), leader.WithHealth(h.check.check)), "jobs", "target")
				awaitQueue(t, h.client, "jobs", queued(waiting))
				ctx, stop := context.WithCancel(t.Context())
				defer stop()
				third := campaign(ctx, newElector(t, h.client), "jobs", "third")
				h.cs = awaitQueue(t, h.client, "jobs", queued(waiting+1))
				actx, cancel := context.WithCancel(ctx)
				defer cancel()
				h.cancel = cancel
				transferred := transfer(actx, h.asker, "jobs", h.cs[waiting-1])
				etcdtest.Await(t, "the request", h.client.Watch(ctx, h.cs[waiting-2].Key+"/stepback", clientv3.WithRev(1)))
				if asked == "the leader" {
					etcdtest.Await(t, "the end of the term", h.l.Context().Done())
				}

				test.do(h)
				if want.err != nil {
					if err := etcdtest.Await(t, "Transfer", transferred); !errors.Is(err, want.err) {
						t.Errorf("Transfer: %v, want %v", err, want.err)
					}
					if !h.dead {
						wantNoRequest(t, h.client, "jobs")
					}
					if asked == "one between" && !h.l.IsLeader() {
						t.Errorf("the leader was not asked, and its term has ended: %v", context.Cause(h.l.Context()))
					}
				} else {
					stockLeaves()
				}
				if want.leads != "leads" {
					close(release)
				}
				if want.err == nil {
					wantTransferred(t, transferred)
				}
				awaitQueue(t, h.client, "jobs", func(cs []leader.Candidate) bool { return len(cs) > 0 && cs[0].Value == want.leads })
				switch want.leads {
				case "target":
					target = won(awaitLeader(t, target))
				case "third":
					third = won(awaitLeader(t, third))
				}

				h.target.Heal()
				h.askerLink.Heal()
				stockLeaves()
				stopLeader()
				giveUp()
				stop()
				if want.leads == "leads" {
					close(release)
				}
				_ = etcdtest.Await(t, "Run", ran)
				leave(t, []<-chan outcome{target, third})
				awaitQueue(t, h.client, "jobs", queued(0))
				awaitExpiry(t, h.client) // of what those who were cut off or closed have left
			})
		}
	}
}

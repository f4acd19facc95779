package leader_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// The tests of this file are about who leads and who waits, as Current, Candidates, Observe and the hook LeaderChanged
// tell it. That Observe tells vacancies and survives a compaction is in pitfalls_test.go.

func TestCurrentCandidatesAndEvict(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	if _, err := e.Current(t.Context(), "jobs"); !errors.Is(err, leader.ErrNoLeader) || !errors.Is(err, concurrency.ErrElectionNoLeader) {
		t.Errorf("Current of an empty election: %v", err)
	}
	if err := e.Evict(t.Context(), "jobs"); !errors.Is(err, leader.ErrNoLeader) {
		t.Errorf("Evict from an empty election: %v", err)
	}
	if cs, err := e.Candidates(t.Context(), "jobs"); err != nil || len(cs) != 0 {
		t.Errorf("Candidates of an empty election: %v, %v", cs, err)
	}
	l := lead(t, e, "jobs", "first")
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	cs := awaitQueue(t, client, "jobs", queued(2))
	current, err := e.Current(t.Context(), "jobs")
	if err != nil || current != cs[0] || current.Value != "first" || current.Token != l.Token() || current.Key != l.Key() {
		t.Errorf("Current is %+v, %v; the queue %+v", current, err, cs)
	}
	if cs[1].Value != "second" || cs[1].Token <= cs[0].Token || cs[1].Key != fmt.Sprintf("jobs/%x", cs[1].Lease) {
		t.Errorf("the second candidate is %+v", cs[1])
	}
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Errorf("Evict: %v", err)
	}
	awaitEnd(t, l, leader.ErrEvicted)
	awaitLeader(t, next)
}

// An etcd that is restored from a backup, or replaced by an empty one, has smaller revisions. A watch that is resumed
// where it ended sees nothing until they have grown. Each change would be seen only when the leader is read again.
func TestObserveFollowsAnEtcdThatHasGoneBackInTime(t *testing.T) {
	data := t.TempDir()
	m := etcdtest.Start(t, etcdtest.Settings{"data-dir": data})
	client := etcdtest.NewClient(t, m.Endpoint)
	for range 1000 { // more than there are changes below
		if _, err := client.Put(t.Context(), "revisions", "grow"); err != nil {
			t.Fatal(err)
		}
	}
	observed := observe(t, newExpiring(t, client), "jobs") // it reads the leader again once in a TTL
	etcdtest.Await(t, "the vacancy", observed)
	old := lead(t, newExpiring(t, client), "jobs", "before")
	awaitThat(t, "the leader", observed, func(c leader.Candidate) bool { return c.Value == "before" })
	wipe(t, m, data)
	etcdtest.Await(t, "the end of the term", old.Context().Done())
	l := lead(t, newElector(t, client), "jobs", "after")
	awaitThat(t, "the leader", observed, func(c leader.Candidate) bool { return c.Value == "after" })
	ctx, cancel := context.WithCancel(t.Context())
	var proclaiming sync.WaitGroup
	defer proclaiming.Wait()
	defer cancel()
	proclaiming.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			_ = l.Proclaim(ctx, fmt.Sprint(i))
			time.Sleep(100 * time.Millisecond)
		}
	})
	seen, last := 0, -1
	awaitThat(t, "two values in succession", observed, func(c leader.Candidate) bool {
		i, err := strconv.Atoi(c.Value)
		if err != nil {
			return false
		}
		if seen++; seen > 5 { // what is read once in a TTL are about twenty values apart
			t.Fatal("changes are still observed only when the leader is read again")
		}
		next := seen > 1 && i == last+1
		last = i
		return next
	})
}

// etcd-io/etcd#18163: when several changes come at once, stock may report one that does not lead.
func TestObserveReportsOnlyWhoLed(t *testing.T) {
	m, client := start(t)
	link := etcdtest.NewLink(t, m)
	observed := observe(t, newElector(t, etcdtest.NewClient(t, link.Endpoint)), "jobs")
	etcdtest.Await(t, "the vacancy", observed)
	truth := []int64{0}
	link.Darken() // so that the changes arrive together
	var next []<-chan outcome
	for i := range 6 {
		next = append(next, campaign(t.Context(), newElector(t, client), "jobs", fmt.Sprint(i)))
		awaitQueue(t, client, "jobs", queued(i+1))
	}
	for _, c := range next {
		l := awaitLeader(t, c)
		truth = append(truth, l.Token())
		resign(t, l)
	}
	last := lead(t, newElector(t, client), "jobs", "last")
	truth = append(truth, last.Token())
	link.Heal()
	at := 0
	for at < len(truth)-1 {
		c := etcdtest.Await(t, "a change", observed)
		i := slices.Index(truth, c.Token)
		if i < 0 || c.Token != 0 && i < at {
			t.Fatalf("observed token %d, who led were %v in that order", c.Token, truth)
		}
		at = max(at, i)
	}
	resign(t, last)
}

func TestObserveEndsWithCtxError(t *testing.T) {
	_, client := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	e := newElector(t, client)
	var got []error
	for c, err := range e.Observe(ctx, "jobs") {
		got = append(got, err)
		if c != (leader.Candidate{}) {
			t.Errorf("observed %+v in an empty election", c)
		}
		cancel()
	}
	if len(got) != 2 || got[0] != nil || !errors.Is(got[1], context.Canceled) {
		t.Errorf("Observe yielded errors %v, want nil and then ctx's", got)
	}
	for _, err := range e.Observe(t.Context(), "jobs") {
		if err != nil {
			t.Error(err)
		}
		break // and yields no more
	}
}

func TestHookReportsWhoLeadsWhileCampaigning(t *testing.T) {
	_, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "first")
	changes := make(chan string, 100)
	e := newElector(t, client, leader.WithHooks(leader.Hooks{
		LeaderChanged: func(election string, c leader.Candidate) { changes <- election + "=" + c.Value },
	}))
	next := campaign(t.Context(), e, "jobs", "second")
	if got := etcdtest.Await(t, "the leader", changes); got != "jobs=first" {
		t.Errorf("the hook said %q", got)
	}
	awaitQueue(t, client, "jobs", queued(2))
	resign(t, first)
	second := awaitLeader(t, next)
	if got := etcdtest.Await(t, "the next leader", changes); got != "jobs=second" {
		t.Errorf("the hook said %q", got)
	}
	resign(t, second)
}

func TestEndIsToldAfterTheLastChange(t *testing.T) {
	_, client := start(t)
	changes, goOn, ended := make(chan leader.Candidate), make(chan struct{}), make(chan struct{}, 1)
	e := newElector(t, client, leader.WithHooks(leader.Hooks{
		LeaderChanged: func(_ string, c leader.Candidate) {
			if c.Value == "busy" {
				changes <- c
				<-goOn
			}
		},
		Ended: func(string, *leader.Leader, error) { ended <- struct{}{} },
	}))
	l := lead(t, e, "jobs", "")
	if err := l.Proclaim(t.Context(), "busy"); err != nil {
		t.Fatal(err)
	}
	etcdtest.Await(t, "the change", changes)
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	etcdtest.Await(t, "the end of the term", l.Context().Done())
	select {
	case <-ended:
		t.Error("Ended was called while LeaderChanged had not returned")
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	etcdtest.Await(t, "Ended", ended)
}

// A campaign waits for what observes on its behalf, and nothing changes here that would wake that.
func TestCampaignThatEndsStopsObserving(t *testing.T) {
	_, client := start(t)
	lead(t, newElector(t, client), "jobs", "first")
	changes := make(chan leader.Candidate, 10)
	e := newElector(t, client, leader.WithHooks(leader.Hooks{
		LeaderChanged: func(_ string, c leader.Candidate) { changes <- c },
	}))
	campaigned := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		_, err := e.Campaign(ctx, "jobs", "second")
		campaigned <- err
	}()
	etcdtest.Await(t, "the leader", changes)
	awaitQueue(t, client, "jobs", queued(2)) // a grant that is cut short would leave a lease to expire
	cancel()
	if err := etcdtest.Await(t, "the end of the campaign", campaigned); !errors.Is(err, context.Canceled) {
		t.Errorf("Campaign: %v", err)
	}
	if _, err := e.TryCampaign(t.Context(), "jobs", "second"); !errors.Is(err, leader.ErrHeld) {
		t.Errorf("TryCampaign: %v", err)
	}
}

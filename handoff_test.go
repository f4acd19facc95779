package leader_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// BenchmarkHandoff measures the time from before a leader resigns until the Campaign of the next
// candidate has returned, for a candidate that has waited for 15 ms and for 250 ms: with this
// package, with stock concurrency.Election, and, as what no election on etcd can beat, one guarded
// delete and its watch event at another client. The three take turns in one run.
//
//	go test -run '^$' -bench Handoff -benchtime 50x .
func BenchmarkHandoff(b *testing.B) {
	for _, members := range []int{1, 3} {
		for _, waited := range []time.Duration{15 * time.Millisecond, 250 * time.Millisecond} {
			b.Run(fmt.Sprintf("members=%d/waited=%v", members, waited), func(b *testing.B) {
				benchmarkHandoff(b, members, waited)
			})
		}
	}
}

func benchmarkHandoff(b *testing.B, members int, waited time.Duration) {
	var endpoints []string
	for _, m := range etcdtest.StartCluster(b, members, etcdtest.Settings{"unsafe-no-fsync": false}) {
		endpoints = append(endpoints, m.Endpoint)
	}
	from, to := etcdtest.NewClient(b, endpoints...), etcdtest.NewClient(b, endpoints...)
	contestants := []struct {
		name    string
		handoff func(b *testing.B, from, to *clientv3.Client, waited time.Duration) time.Duration
		took    []time.Duration
	}{
		{name: "own", handoff: ownHandoff},
		{name: "stock", handoff: stockHandoff},
		{name: "limit", handoff: limitHandoff},
	}
	for b.Loop() {
		for i := range contestants {
			c := &contestants[i]
			c.took = append(c.took, c.handoff(b, from, to, waited))
		}
	}
	median := make(map[string]float64)
	for _, c := range contestants {
		slices.Sort(c.took)
		median[c.name] = float64(c.took[len(c.took)/2])
		b.ReportMetric(median[c.name]/1e6, c.name+"-ms")
	}
	b.ReportMetric(0, "ns/op") // of all three, with the waits: says nothing
	b.ReportMetric(median["own"]/median["stock"], "own/stock")
	b.ReportMetric(median["own"]/median["limit"], "own/limit")
}

func ownHandoff(b *testing.B, from, to *clientv3.Client, waited time.Duration) time.Duration {
	first, err := leader.Campaign(b.Context(), from, "own", "")
	if err != nil {
		b.Fatal(err)
	}
	e, err := leader.New(to)
	if err != nil {
		b.Fatal(err)
	}
	won := campaign(b.Context(), e, "own", "")
	awaitQueue(b, to, "own", queued(2))
	time.Sleep(waited)
	sent := time.Now()
	if err := first.Resign(b.Context()); err != nil {
		b.Fatal(err)
	}
	second := await(b, "Campaign", won)
	if second.err != nil {
		b.Fatal(second.err)
	}
	if err := second.l.Resign(b.Context()); err != nil {
		b.Fatal(err)
	}
	return second.at.Sub(sent)
}

func stockHandoff(b *testing.B, from, to *clientv3.Client, waited time.Duration) time.Duration {
	s1, first, won := stock(b, from, "stock", "", time.Minute)
	if err := await(b, "stock Campaign", won).err; err != nil {
		b.Fatal(err)
	}
	s2, _, won := stock(b, to, "stock", "", time.Minute)
	awaitQueue(b, to, "stock", queued(2))
	time.Sleep(waited)
	sent := time.Now()
	if err := first.Resign(b.Context()); err != nil {
		b.Fatal(err)
	}
	second := await(b, "stock Campaign", won)
	if second.err != nil {
		b.Fatal(second.err)
	}
	for _, s := range []*concurrency.Session{s1, s2} {
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
	return second.at.Sub(sent)
}

// limitHandoff is one guarded delete and its event at another client, whose watch is as old as the
// candidates' are.
func limitHandoff(b *testing.B, from, to *clientv3.Client, waited time.Duration) time.Duration {
	const key = "limit/key"
	put, err := from.Put(b.Context(), key, "")
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	events := to.Watch(ctx, key, clientv3.WithCreatedNotify())
	<-events
	arrived := make(chan time.Time, 1)
	go func() {
		<-events
		arrived <- time.Now()
	}()
	time.Sleep(waited)
	sent := time.Now()
	created := clientv3.Compare(clientv3.CreateRevision(key), "=", put.Header.Revision)
	if _, err := from.Txn(b.Context()).If(created).Then(clientv3.OpDelete(key)).Commit(); err != nil {
		b.Fatal(err)
	}
	return await(b, "the event", arrived).Sub(sent)
}

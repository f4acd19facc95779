package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// lead is a child that leads elections until it is killed. Each has a client and a lease of its own, as
// in a process of its own: stock renews all leases of a client together.
func lead(ctx context.Context, t task) (any, error) {
	contestants := []contestant{ours, stock, clientGo}
	n := t.N * len(contestants)
	return t.N, each(n, n, func(i int) error {
		ttl := time.Duration(t.Seconds) * time.Second
		sleep(ctx, rand.N(ttl)) // or they would be renewed at the same time
		client, err := newClient(ctx, t.Endpoints)
		if err != nil {
			return err
		}
		c := contestants[i/t.N]
		_, err = c.lead(ctx, client, victimElection(t.Election, c, i%t.N), ttl)
		return err
	})
}

func victimElection(kill string, c contestant, i int) string {
	return fmt.Sprintf("%s/%s/%04d", kill, c.name, i)
}

func measureCrash(ctx context.Context, r *run) (*result, error) {
	res := &result{}
	t := table{
		caption: "Time in ms from the SIGKILL of a process that leads, at a random moment, until the waiting successor has been elected. 1 member.",
		header:  []string{"TTL", "contestant", "median (p10 – p90)", "trials", "× limit", "× stock"},
	}
	endpoints, err := r.cluster(1)
	if err != nil {
		return nil, err
	}
	for _, s := range []struct{ seconds, kills, leaders int }{
		{3, r.pick(12, 2, 1), r.pick(60, 20, 2)},
		{15, r.pick(4, 0, 0), 150},
	} {
		if s.kills == 0 {
			continue
		}
		took := make(map[string]sample)
		for kill := range s.kills {
			r.log("TTL %d s: kill %d of %d", s.seconds, kill+1, s.kills)
			if err := crash(ctx, took, task{
				Role: "victim", Endpoints: endpoints, N: s.leaders, Seconds: s.seconds, Election: fmt.Sprintf("kill%d-%02d", s.seconds, kill),
			}); err != nil {
				return nil, err
			}
		}
		r.log("TTL %d s: processes with a lease file", s.seconds)
		if err := reclaims(ctx, took, endpoints, s.seconds, r.pick(100, 10, 2)); err != nil {
			return nil, err
		}
		for _, name := range []string{ours.name, expiryOf(ours), bySidecar, byRestart, ofReclaim, stock.name, expiryOf(stock), clientGo.name} {
			own := took[name]
			expiry := "–"
			if c, ok := took[expiryOf(contestant{name: name})]; ok {
				expiry = number(own.over(c))
			}
			if name == bySidecar || name == byRestart {
				expiry = number(own.over(took[ofReclaim]))
			}
			t.add(append(append([]string{fmt.Sprint(s.seconds, " s"), name}, own.cells()...), expiry, number(own.over(took[stock.name])))...)
		}
		res.atMost(1.02, took[ours.name].ratio(took[stock.name]), "TTL %d s: leader / stock", s.seconds).
			beside(expiryOf(ours), took[expiryOf(ours)].ratio(took[stock.name]))
		if s.seconds == 15 {
			res.bars = []bar{
				{crashed, "leader, with a lease file", ours, took[bySidecar].median()},
				{crashed, ours.name, ours, took[ours.name].median()},
				{crashed, stock.name, stock, took[stock.name].median()},
				{crashed, clientGo.name, clientGo, took[clientGo.name].median()},
			}
			res.atMost(0.01, took[bySidecar].ratio(took[stock.name]), "TTL %d s: %s / stock", s.seconds, bySidecar).
				beside(ofReclaim, took[ofReclaim].ratio(took[stock.name]))
		}
		res.figures = append(res.figures, ecdf{
			file: fmt.Sprintf("crash-%d.svg", s.seconds), title: fmt.Sprintf("Time without a leader after SIGKILL, TTL %d s", s.seconds),
			samples: took, order: []string{ours.name, expiryOf(ours), stock.name, expiryOf(stock), clientGo.name}, linear: true,
		})
	}
	res.tables = []table{t}
	return res, nil
}

// expiryOf names the limit of a contestant: when its leader's key was seen to go with its lease.
func expiryOf(c contestant) string { return "expiry of " + c.name + "'s lease" }

// crash kills one child and adds what it took until successors were elected.
func crash(ctx context.Context, took map[string]sample, t task) error {
	var leaders int
	victim, err := startChild(ctx, t, &leaders)
	if err != nil {
		return err
	}
	defer victim.kill()
	client, err := newClient(ctx, t.Endpoints)
	if err != nil {
		return err
	}
	defer client.Close()
	ttl := time.Duration(t.Seconds) * time.Second

	contestants := []contestant{ours, stock, clientGo}
	successors := make([][]*candidate, len(contestants))
	for k, c := range contestants {
		for i := range t.N {
			cand, err := c.join(ctx, client, victimElection(t.Election, c, i), ttl)
			if err != nil {
				return err
			}
			defer cand.close()
			successors[k] = append(successors[k], cand)
		}
		if c.prefix != nil {
			if err := queued(ctx, client, path.Join(t.Election, c.name)+"/", 2*t.N); err != nil {
				return err
			}
		}
	}
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	expired := make(chan map[string]time.Time, 1)
	events := client.Watch(wctx, t.Election+"/", clientv3.WithPrefix(), clientv3.WithFilterPut(), clientv3.WithCreatedNotify())
	if _, err := receive(ctx, "a watch", events); err != nil {
		return err
	}
	go func() { expired <- deletions(events, 2*t.N) }()
	sleep(ctx, 500*time.Millisecond+rand.N(ttl))

	killed := time.Now()
	victim.kill()
	for k, c := range contestants {
		for _, cand := range successors[k] {
			won, err := receive(ctx, c.name+" to be elected after a kill", cand.won)
			if err != nil {
				return err
			}
			took[c.name] = append(took[c.name], won.Sub(killed))
		}
	}
	gone, err := receive(ctx, "the leases to expire", expired)
	for election, at := range maps.All(gone) {
		c := contestant{name: path.Base(path.Dir(election))}
		took[expiryOf(c)] = append(took[expiryOf(c)], at.Sub(killed))
	}
	return errors.Join(err, ctx.Err())
}

// deletions returns when the first key of each of n elections was seen to go.
func deletions(events clientv3.WatchChan, n int) map[string]time.Time {
	at := make(map[string]time.Time)
	for resp := range events {
		now := time.Now()
		for _, ev := range resp.Events {
			election := path.Dir(string(ev.Kv.Key))
			if _, again := at[election]; !again {
				at[election] = now
			}
		}
		if len(at) == n {
			break
		}
	}
	return at
}

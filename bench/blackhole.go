package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// A believer is a leader of which is known until when it believes in its term.
type believer struct {
	contestant
	// believe leads the election from the far side of the link and returns what gets the end of its
	// belief.
	believe func(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (<-chan time.Time, error)
}

func believeOurs(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (<-chan time.Time, error) {
	l, err := leader.Campaign(ctx, client, election, "", leader.WithTTL(ttl))
	if err != nil {
		return nil, err
	}
	end := make(chan time.Time, 1)
	context.AfterFunc(l.Context(), func() { end <- time.Now() })
	return end, nil
}

func believeStock(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (<-chan time.Time, error) {
	s, err := concurrency.NewSession(client, concurrency.WithTTL(seconds(ttl)))
	if err != nil {
		return nil, err
	}
	if err := concurrency.NewElection(s, election).Campaign(ctx, ""); err != nil {
		return nil, err
	}
	end := make(chan time.Time, 1)
	go func() {
		<-s.Done()
		end <- time.Now()
	}()
	return end, nil
}

func measureBlackhole(ctx context.Context, r *run) (*result, error) {
	const ttl = 2 * time.Second
	endpoints, err := r.cluster(1)
	if err != nil {
		return nil, err
	}
	near, err := r.client(ctx, endpoints)
	if err != nil {
		return nil, err
	}
	believers := []believer{{ours, believeOurs}, {stock, believeStock}}
	overlaps := make(map[string]sample) // negative: nobody led in between
	batches, together := r.pick(8, 2, 1), r.pick(32, 10, 2)
	for batch := range batches {
		r.log("batch %d of %d", batch+1, batches)
		if err := cutOff(ctx, overlaps, believers, near, endpoints[0], fmt.Sprint("batch", batch), together, ttl); err != nil {
			return nil, err
		}
	}
	t := table{
		caption: "Leaders are cut off from etcd without a sign, TTL 2 s: how long, in ms, the old leader still believes that it leads after its successor was elected.",
		header:  []string{"contestant", "overlaps", "the longest", "median (p10 – p90), negative if nobody led in between", "trials"},
	}
	res := &result{}
	for _, b := range believers {
		n := 0
		for _, d := range overlaps[b.name] {
			if d > 0 {
				n++
			}
		}
		longest := max(0, overlaps[b.name].quantile(1))
		t.add(append([]string{b.name, fmt.Sprint(n), milliseconds(longest)}, overlaps[b.name].cells()...)...)
		res.bars = append(res.bars, bar{cutFromEtcd, b.name, b.contestant, -overlaps[b.name].median()})
		if b.name == ours.name {
			res.atMost(0, exact(float64(n)), "overlaps of leader in %d trials", len(overlaps[b.name]))
		}
	}
	res.tables = []table{t}
	return res, nil
}

// cutOff darkens a link with so many leaders of each kind behind it and adds their overlaps.
func cutOff(ctx context.Context, overlaps map[string]sample, believers []believer, near *clientv3.Client, endpoint, batch string, together int, ttl time.Duration) error {
	link, err := etcdtest.StartLink(endpoint)
	if err != nil {
		return err
	}
	defer link.Close()
	type trial struct {
		end  <-chan time.Time
		next *candidate
	}
	trials := make([][]trial, len(believers))
	for k, b := range believers {
		far, err := newClient(ctx, []string{link.Endpoint})
		if err != nil {
			return err
		}
		defer far.Close()
		trials[k] = make([]trial, together)
		err = each(together, together, func(i int) (err error) {
			sleep(ctx, rand.N(ttl)) // so that each is cut off at another point of its interval
			election := fmt.Sprint(batch, "/", b.name, "/", i)
			t := &trials[k][i]
			if t.end, err = b.believe(ctx, far, election, ttl); err != nil {
				return err
			}
			t.next, err = b.join(ctx, near, election, ttl)
			return err
		})
		for _, t := range trials[k] {
			if t.next != nil {
				defer t.next.close()
			}
		}
		if err != nil {
			return fmt.Errorf("%s: %w", b.name, err)
		}
		if err := queued(ctx, near, batch+"/"+b.name+"/", 2*together); err != nil {
			return err
		}
	}
	sleep(ctx, rand.N(ttl))
	link.Darken()
	for k, b := range believers {
		for _, t := range trials[k] {
			won, err := receive(ctx, b.name+" to be elected after a blackhole", t.next.won)
			if err != nil {
				return err
			}
			end, err := receive(ctx, b.name+" to believe no more", t.end)
			if err != nil {
				return err
			}
			overlaps[b.name] = append(overlaps[b.name], end.Sub(won))
		}
	}
	return nil
}

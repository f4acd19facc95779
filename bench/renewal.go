package main

import (
	"context"
	"fmt"
	"time"

	"example.com/leader"
)

func measureRenewal(ctx context.Context, r *run) (*result, error) {
	endpoints, err := r.cluster(1)
	if err != nil {
		return nil, err
	}
	window := time.Duration(r.pick(60, 30, 5)) * time.Second
	leaders := []struct {
		contestant
		ttl time.Duration
	}{{ours, leader.DefaultTTL}, {stock, leader.DefaultTTL}, {stock, time.Minute}, {clientGo, clientGoTTL}}
	meters := make([]*meter, len(leaders))
	for i, l := range leaders {
		meters[i] = newMeter()
		client, err := r.client(ctx, endpoints, meters[i].options()...)
		if err != nil {
			return nil, err
		}
		cand, err := l.lead(ctx, client, fmt.Sprint("renewal", i), l.ttl)
		if err != nil {
			return nil, err
		}
		defer cand.close()
	}
	meters[0].renewed(ctx) // ours opens its stream then, stock at once
	sent, bytes := make([]int, len(leaders)), make([]int64, len(leaders))
	for i, m := range meters {
		sent[i], bytes[i] = m.count(), m.bytes.Load()
	}
	sleep(ctx, window)
	t := table{
		caption: fmt.Sprintf("What one leader costs per minute while it only renews, measured over %v. Each message on a stream is one request. Bytes are those of its connection, in both directions.", window),
		header:  []string{"contestant", "TTL", "requests", "bytes"},
	}
	for i, l := range leaders {
		per := window.Minutes()
		t.add(l.name, l.ttl.String(), number(float64(meters[i].count()-sent[i])/per), number(float64(meters[i].bytes.Load()-bytes[i])/per))
	}
	return &result{tables: []table{t}}, nil
}

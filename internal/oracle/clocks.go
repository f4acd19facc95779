package oracle

import (
	"cmp"
	"math"
	"slices"
	"strconv"
	"time"
)

// timerLength is the longest time for which the timer that ends a term's context is set.
const timerLength = time.Second

// maxArming is how much later than the clocks say the timer that ends a term's context may fire, if its process was
// stopped while it set the timer.
const maxArming = time.Millisecond

// clocks is what is known of the processes' machines: when they ran, and how correct their clocks were.
type clocks struct {
	hosts    map[string]string // the process that another one is a part of
	rates    map[string]float64
	sets     map[string][]*Entry
	untold   map[string]int64  // when it was killed while it could not report renewals
	stops    map[string][]span // merged, as are the two below
	suspends map[string][]span // times in which timers stood still
	hindered map[string][]span // times in which its work did not continue
}

func (c *checker) readClocks() *clocks {
	k := &clocks{
		hosts: make(map[string]string), rates: make(map[string]float64), sets: make(map[string][]*Entry),
		untold: make(map[string]int64), stops: make(map[string][]span), suspends: make(map[string][]span),
		hindered: make(map[string][]span),
	}
	for _, e := range c.by[Start] {
		if e.Value != "" {
			k.hosts[e.Proc] = e.Value
		}
	}
	for _, e := range c.by[Clock] {
		if rate, err := strconv.ParseFloat(e.Value, 64); e.Op == Rate && err == nil {
			k.rates[e.Proc] = rate
		} else if e.Op == Set {
			k.sets[e.Proc] = append(k.sets[e.Proc], e)
		}
	}
	for _, e := range c.by[Stopped] {
		k.stops[e.Proc] = append(k.stops[e.Proc], span{e.From, e.T})
		if e.Op == Suspended {
			k.suspends[e.Proc] = append(k.suspends[e.Proc], span{e.From, e.T})
		}
	}
	for proc, spans := range k.suspends {
		k.suspends[proc] = merge(spans)
	}
	for proc, spans := range k.stops {
		k.stops[proc] = merge(spans)
	}
	busy := make(map[string][]span)
	for _, e := range c.by[Busy] {
		busy[e.Proc] = append(busy[e.Proc], span{e.From, e.T})
		for _, exit := range c.by[Exit] {
			if e.Op == string(Renewed) && exit.Proc == k.host(e.Proc) && exit.Err != "" && exit.T <= e.T {
				k.untold[e.Proc] = exit.T
			}
		}
	}
	for proc, spans := range busy {
		k.hindered[proc] = merge(slices.Concat(spans, k.stops[k.host(proc)]))
	}
	return k
}

// host returns the process that proc is a part of, or proc itself.
func (k *clocks) host(proc string) string { return cmp.Or(k.hosts[proc], proc) }

// real returns how long it takes until d has passed on the clocks of a process.
func (k *clocks) real(proc string, d time.Duration) int64 {
	rate, ok := k.rates[k.host(proc)]
	if !ok || rate == 1 {
		return int64(d)
	}
	return int64(math.Ceil(float64(d) / rate))
}

// lasts returns how long a term lasts after a renewal was sent.
func (c *checker) lasts(proc string) int64 { return c.real(proc, c.TTL-c.Margin) }

// ttl returns how long nobody may take a lease after a renewal was sent: neither etcd, nor its owner by its own clocks.
func (c *checker) ttl(proc string) int64 { return min(int64(c.TTL), c.real(proc, c.TTL)) }

// margin returns how long before the end of ttl a term is over. It is negative if a clock is slower than the margin
// covers.
func (c *checker) margin(proc string) int64 { return c.ttl(proc) - c.lasts(proc) }

// slow reports whether the clocks of a process are slower than the margin covers.
func (c *checker) slow(proc string) bool { return c.margin(proc) < 0 }

// set reports whether the wall clock of a process was set forward in that time. What the process measures by it then
// ends early.
func (k *clocks) set(proc string, from, to int64) bool {
	e := firstAfter(k.sets[k.host(proc)], from)
	return e != nil && e.T <= to
}

// lateUntil returns until when a timer of a process that was due at t may be late: because the process was stopped
// then, or because its machine was suspended while the timer was set. In a simulation the timer may also be late by
// maxArming.
func (c *checker) lateUntil(proc string, t int64) int64 {
	stops, late := c.stops[c.host(proc)], c.slack(lateTimer)
	length := c.real(proc, timerLength)
	t = ranSince(c.suspends[c.host(proc)], t-length, length, 0)
	if c.Exact {
		t += c.real(proc, maxArming)
	}
	i, _ := slices.BinarySearchFunc(stops, t-late, func(s span, t int64) int { return cmp.Compare(s.to, t) })
	for _, s := range stops[i:] {
		if s.from > t {
			break
		}
		t = s.to + late
	}
	return t
}

// ranSince returns when somebody who has been hindered at times has had time d since then. Each hindrance adds late.
func ranSince(hindered []span, since, d, late int64) int64 {
	t := since + d
	i, _ := slices.BinarySearchFunc(hindered, since, func(s span, t int64) int { return cmp.Compare(s.to, t) })
	for _, s := range hindered[i:] {
		if s.from > t {
			break
		}
		t += s.to - max(s.from, since) + late
	}
	return t
}

// within returns by when a process has had time d, by its clocks, for something that it had to do since a time.
func (c *checker) within(proc string, since int64, d time.Duration) int64 {
	spans, ok := c.hindered[proc]
	if !ok {
		spans = c.stops[c.host(proc)]
	}
	return ranSince(spans, since, max(int64(d), c.real(proc, d)), c.slack(lateTimer))
}

package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"syscall"
	"time"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// A load is what a process that takes part in elections costs, measured in itself.
type load struct {
	Requests   int     // sent in the window
	CPU        float64 // used in the window, in seconds
	Goroutines float64 // for each election or candidate, as are the following
	Heap       float64 // in KiB, live
	Stack      float64 // in KiB
}

func (l load) memory() float64 { return l.Heap + l.Stack }

// Kinds of load besides the contestants.
const (
	oneElector   = "leader, one Elector"
	manySessions = "stock, a session each"
	oneSession   = "stock, one session"
	watched      = "stock, with a watch of its own key" // and a session each
)

// enlist returns the client of a child, which counts on m, and how the child makes its candidates.
func enlist(ctx context.Context, t task, m *meter) (client *clientv3.Client, join func(election string) (*candidate, error), err error) {
	const ttl = leader.DefaultTTL
	if client, err = newClient(ctx, t.Endpoints, m.options()...); err != nil {
		return nil, nil, err
	}
	each := func(c contestant) func(string) (*candidate, error) {
		return func(election string) (*candidate, error) { return c.join(ctx, client, election, ttl) }
	}
	switch t.Kind {
	case ours.name:
		return client, each(ours), nil
	case stock.name, manySessions:
		return client, each(stock), nil
	case watched:
		return client, each(contestant{name: watched, join: joinWatched}), nil
	case oneElector:
		e, err := leader.New(client, leader.WithTTL(ttl))
		return client, func(election string) (*candidate, error) { return campaignOurs(ctx, e, election), nil }, err
	case oneSession:
		s, err := concurrency.NewSession(client, concurrency.WithTTL(seconds(ttl)))
		return client, func(election string) (*candidate, error) { return campaignStock(ctx, s, election), nil }, err
	}
	return nil, nil, fmt.Errorf("unknown kind %q", t.Kind)
}

// joinWatched is joinStock with what it costs at least to notice in time that somebody has deleted the
// candidate's key: a watch, and a goroutine that waits for its event.
func joinWatched(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (*candidate, error) {
	s, err := concurrency.NewSession(client, concurrency.WithTTL(seconds(ttl)))
	if err != nil {
		return nil, err
	}
	c := campaignStock(ctx, s, election)
	wctx, stop := context.WithCancel(ctx)
	events := client.Watch(wctx, fmt.Sprintf("%s/%x", election, s.Lease()), clientv3.WithFilterPut())
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-events
	}()
	leave := c.close
	c.close = func() error {
		stop()
		<-done
		return errors.Join(leave(), s.Close())
	}
	return c, nil
}

// A weighing measures the memory of what is made between its begin and its end.
type weighing struct {
	goroutines  int
	heap, stack uint64
}

func weigh() weighing {
	for range 4 { // each halves the stacks that have become too large
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return weighing{runtime.NumGoroutine(), m.HeapAlloc, m.StackInuse}
}

// per is what each of n has added since before.
func (w weighing) per(n int, before weighing) load {
	return load{
		Goroutines: float64(w.goroutines-before.goroutines) / float64(n),
		Heap:       (float64(w.heap) - float64(before.heap)) / 1024 / float64(n),
		Stack:      (float64(w.stack) - float64(before.stack)) / 1024 / float64(n),
	}
}

// loadElections is a child that leads N elections and measures for how much.
func loadElections(ctx context.Context, t task) (any, error) {
	m := newMeter()
	_, join, err := enlist(ctx, t, m)
	if err != nil {
		return nil, err
	}
	candidates := make([]*candidate, t.N)
	win := func(from, to int) error {
		return each(to-from, 64, func(i int) (err error) {
			if candidates[from+i], err = join(fmt.Sprintf("%s/%05d", t.Election, from+i)); err == nil {
				_, err = receive(ctx, "to be elected", candidates[from+i].won)
			}
			return err
		})
	}
	// Of many, the first is not counted, so that what all share is not: the stream of renewals too, which
	// this library opens with the first of them.
	shared := min(1, t.N-1)
	if shared > 0 {
		if err := win(0, shared); err != nil {
			return nil, err
		}
		m.renewed(ctx)
	}
	before := weigh()
	if err := win(shared, t.N); err != nil {
		return nil, err
	}
	m.renewed(ctx)
	l := weigh().per(t.N-shared, before)
	sent, used := m.count(), cpu()
	sleep(ctx, time.Duration(t.Seconds)*time.Second)
	l.Requests, l.CPU = m.count()-sent, (cpu() - used).Seconds()
	runtime.KeepAlive(candidates)
	return l, nil
}

// cpu is the time this process has used.
func cpu() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// loadCandidates is a child in which N candidates wait in one election.
func loadCandidates(ctx context.Context, t task) (any, error) {
	m := newMeter()
	client, join, err := enlist(ctx, t, m)
	if err != nil {
		return nil, err
	}
	candidates := make([]*candidate, t.N+2)
	grow := func(from, to int) error {
		err := each(to-from, 16, func(i int) (err error) {
			candidates[from+i], err = join(t.Election)
			return err
		})
		if err == nil {
			err = queued(ctx, client, t.Election+"/", to)
		}
		m.settle(ctx, time.Second)
		return err
	}
	// First one that leads and one that waits, so that what all share is not counted.
	if err := grow(0, 2); err != nil {
		return nil, err
	}
	m.renewed(ctx)
	before := weigh()
	if err := grow(2, t.N+2); err != nil {
		return nil, err
	}
	l := weigh().per(t.N, before)
	runtime.KeepAlive(candidates)
	return l, nil
}

// loads measures processes of several kinds at the same time.
func loads(ctx context.Context, t task, kinds ...string) (map[string]load, error) {
	var mu sync.Mutex
	all := make(map[string]load)
	err := each(len(kinds), len(kinds), func(i int) error {
		own := t
		own.Kind, own.Election = kinds[i], fmt.Sprintf("%s/%d/%d", t.Role, t.N, i)
		var l load
		c, err := startChild(ctx, own, &l)
		if err != nil {
			return err
		}
		c.kill()
		mu.Lock()
		defer mu.Unlock()
		all[own.Kind] = l
		return nil
	})
	return all, err
}

func measureElections(ctx context.Context, r *run) (*result, error) {
	window := r.pick(20, 10, 5) // seconds: whole thirds of the TTL
	t := table{
		caption: fmt.Sprintf("Elections that one process leads, TTL %v. Requests and CPU are means over %d s in which only renewals happen; each message on a stream is one request. Goroutines and memory are per election, without the first one unless it is the only one.", leader.DefaultTTL, window),
		header:  []string{"elections", "contestant", "requests per s", "CPU, ms per s", "goroutines", "heap, KiB", "stack, KiB", "both, × stock", "both, × stock with a watch"},
	}
	kinds := []string{oneElector, manySessions, oneSession, watched}
	counts := []int{1, 100, 1000, 10000}[:r.pick(4, 3, 2)]
	byKind := make(map[string]map[int]load)
	for _, kind := range kinds {
		byKind[kind] = make(map[int]load)
	}
	for _, n := range counts {
		r.log("elections: %d", n)
		endpoints, err := r.cluster(1) // for each, since the leases of killed processes go in the background
		if err != nil {
			return nil, err
		}
		all, err := loads(ctx, task{Role: "load", Endpoints: endpoints, N: n, Seconds: window}, kinds...)
		r.stop()
		if err != nil {
			return nil, err
		}
		for _, kind := range kinds {
			l := all[kind]
			byKind[kind][n] = l
			t.add(fmt.Sprint(n), kind, number(float64(l.Requests)/float64(window)), number(l.CPU*1000/float64(window)),
				number(l.Goroutines), number(l.Heap), number(l.Stack), number(l.memory()/all[manySessions].memory()), number(l.memory()/all[watched].memory()))
		}
	}
	res := &result{tables: []table{t}}
	n := counts[min(2, len(counts)-1)]
	own, stock, reference := byKind[oneElector][n], byKind[manySessions][n], byKind[watched][n]
	res.atMost(0.01, exact(float64(own.Requests)/float64(stock.Requests)), "%d elections: requests of leader / of stock with a session each", n)
	res.atMost(1, exact(own.Goroutines/stock.Goroutines), "%d elections: goroutines of leader / of stock", n).
		beside(watched, exact(reference.Goroutines/stock.Goroutines))
	res.atMost(1, exact(own.memory()/stock.memory()), "%d elections: heap and stack of leader / of stock", n).
		beside(watched, exact(reference.memory()/stock.memory()))

	requests := lines{file: "elections-requests.svg", title: "Renewals of one process by elections it leads, TTL 15 s", x: "elections", y: "requests per second", logY: true}
	memory := lines{file: "elections-memory.svg", title: "Memory for each election that a process leads", x: "elections", y: "KiB of heap and stack", logY: true}
	for _, kind := range kinds {
		requests.add(kind, counts, func(n int) float64 { return float64(byKind[kind][n].Requests) / float64(window) })
		memory.add(kind, counts, func(n int) float64 { return byKind[kind][n].memory() })
	}
	res.figures = []figure{requests, memory}
	return res, nil
}

func measureWaiting(ctx context.Context, r *run) (*result, error) {
	endpoints, err := r.cluster(1)
	if err != nil {
		return nil, err
	}
	n := r.pick(1000, 300, 20)
	kinds := []string{ours.name, stock.name, watched}
	all, err := loads(ctx, task{Role: "waiting", Endpoints: endpoints, N: n}, kinds...)
	if err != nil {
		return nil, err
	}
	t := table{
		caption: fmt.Sprintf("A waiting candidate with a lease of its own: the mean of %d candidates over one client.", n),
		header:  []string{"contestant", "goroutines", "heap, KiB", "stack, KiB", "both, × stock", "both, × stock with a watch"},
	}
	own, other, reference := all[ours.name], all[stock.name], all[watched]
	for _, kind := range kinds {
		l := all[kind]
		t.add(kind, number(l.Goroutines), number(l.Heap), number(l.Stack), number(l.memory()/other.memory()), number(l.memory()/reference.memory()))
	}
	res := &result{tables: []table{t}}
	res.atMost(1, exact(own.Goroutines/other.Goroutines), "goroutines of leader / of stock").
		beside(watched, exact(reference.Goroutines/other.Goroutines))
	res.atMost(1, exact(own.memory()/other.memory()), "heap and stack of leader / of stock").
		beside(watched, exact(reference.memory()/other.memory()))
	return res, nil
}

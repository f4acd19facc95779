package leader_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
)

// The tests of this file are about endpoints that do not answer, beside others that do.

// awaitBefore waits for something that must come before a request has run into its own deadline, and so
// whatever its length.
func awaitBefore[T any](t *testing.T, what string, c <-chan T, kv *darkKV) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-kv.expired:
		t.Errorf("%s had to wait until the time of a request to a dark endpoint was up", what)
	case <-time.After(patience):
	}
	return etcdtest.Await(t, what, c)
}

// Round robin sends every other request to the dark one of two endpoints. A join whose answer was lost
// finds its key, and then its place has to be read. If that were part of the same attempt, it would meet
// the dark endpoint every time.
func TestJoinThatTakesTwoRequestsNeedsOneEndpointOfTwo(t *testing.T) {
	_, client := start(t)
	n := 0
	dark, kv := darkened(client, func(string) bool { n++; return n%2 == 0 })
	broken := wrapped(dark)
	losing := &brokenKV{KV: dark.KV}
	broken.KV = losing
	losing.loseReplies(1)
	next := campaign(t.Context(), newElector(t, broken), "jobs", "")
	o := awaitBefore(t, "Campaign", next, kv)
	if o.err != nil {
		t.Fatal(o.err)
	}
	resign(t, o.l)
}

// Other requests of the client, such as renewals, may keep step with the reads of the key that a candidate waits for.
// Then these reads meet the dark endpoint again and again.
func TestDeadWatchIsNoticedThoughReadsMeetTheDarkEndpoint(t *testing.T) {
	m, client := start(t)
	first := lead(t, newElector(t, client), "jobs", "")
	var calls rpcCounter
	dark, kv := darkened(etcdtest.NewClientFrom(t, calls.config(m.Endpoint)), func(string) bool { return false })
	watcher := &deafWatcher{Watcher: dark.Watcher}
	dark.Watcher = watcher
	next := campaign(t.Context(), newExpiring(t, dark), "jobs", "")
	awaitQueue(t, client, "jobs", queued(2))
	awaitCalls(t, calls.reads, 2) // it watches the key before it and its own
	watcher.deaf.Store(true)
	met := 0
	kv.set(func(key string) bool {
		if key == first.Key() {
			met++
			return met <= 3
		}
		return false
	})
	resign(t, first)
	o := awaitBefore(t, "the next in line", next, kv)
	if o.err != nil {
		t.Fatal(o.err)
	}
	resign(t, o.l)
}

// An event that the watch has delivered does not wait for a read.
func TestChangesAreToldWhileAReadIsNotAnswered(t *testing.T) {
	_, client := start(t)
	for _, by := range []string{"Observe", "LeaderChanged"} {
		t.Run(by, func(t *testing.T) {
			name := t.Name()
			l := lead(t, newElector(t, client), name, "one")
			dark, kv := darkened(client, func(string) bool { return false })
			var told <-chan leader.Candidate
			if by == "Observe" {
				told = observe(t, newExpiring(t, dark), name)
			} else {
				changes := make(chan leader.Candidate, 100)
				e := newExpiring(t, dark, leader.WithHooks(leader.Hooks{
					LeaderChanged: func(_ string, c leader.Candidate) { changes <- c },
				}))
				ctx, cancel := context.WithCancel(t.Context())
				next := campaign(ctx, e, name, "two")
				defer func() { cancel(); etcdtest.Await(t, "Campaign", next) }()
				told = changes
			}
			if c := etcdtest.Await(t, "the leader", told); c.Value != "one" {
				t.Errorf("told %+v", c)
			}
			kv.set(func(key string) bool { return key == name+"/" })
			etcdtest.Await(t, "the regular read of the leader", kv.hung)
			if err := l.Proclaim(t.Context(), "news"); err != nil {
				t.Fatal(err)
			}
			if c := awaitBefore(t, "the news", told, kv); c.Value != "news" {
				t.Errorf("told %+v", c)
			}
			kv.set(func(string) bool { return false })
		})
	}
}

// A fan is a client of several endpoints, of which one can go dark.
type fan struct {
	client *clientv3.Client
	links  map[string]*etcdtest.Link // by the address of the endpoint
	heal   func()                    // what darken has darkened

	mu      sync.Mutex
	met     map[string]bool // endpoints that have answered
	watches string          // the endpoint that has the stream of watches
}

// newFan returns a client of n endpoints, to all of which it is connected.
func newFan(t *testing.T, members []*etcdtest.Member, n int) *fan {
	t.Helper()
	f := &fan{links: make(map[string]*etcdtest.Link), met: make(map[string]bool)}
	var endpoints []string
	for i := range n {
		link := etcdtest.NewLink(t, members[i%len(members)])
		f.links[strings.TrimPrefix(link.Endpoint, "unix://")] = link
		endpoints = append(endpoints, link.Endpoint)
	}
	f.client = etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: endpoints, DialOptions: []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			var p peer.Peer
			err := invoker(ctx, method, req, reply, cc, append(opts, grpc.Peer(&p))...)
			if err == nil {
				f.mu.Lock()
				f.met[p.Addr.String()] = true
				f.mu.Unlock()
			}
			return err
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			stream, err := streamer(ctx, desc, cc, method, opts...)
			if err == nil && strings.HasSuffix(method, "/Watch") {
				if p, ok := peer.FromContext(stream.Context()); ok { //nolint:contextcheck // the stream has its own
					f.mu.Lock()
					f.watches = p.Addr.String()
					f.mu.Unlock()
				}
			}
			return stream, err
		}),
	}})
	for range 1000 {
		if _, err := f.client.Get(t.Context(), "x"); err != nil {
			t.Fatal(err)
		}
		if len(f.met) == n {
			return f
		}
	}
	t.Fatalf("connected to %v of %d endpoints", f.met, n)
	return nil
}

// darken lets an endpoint go dark: the one that has the watches, if there are any.
func (f *fan) darken(t *testing.T) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	link, ok := f.links[f.watches]
	if f.watches != "" && !ok {
		t.Fatalf("the watches are at %q, the links %v", f.watches, f.links)
	}
	if !ok {
		for _, link = range f.links {
			break
		}
	}
	link.Darken()
	f.heal = link.Heal
}

// requestTimeout is how long a request waits for an answer before its time is up.
const requestTimeout = 5 * time.Second

// within fails the test if something took longer than it may.
func within(t *testing.T, what string, began time.Time, most time.Duration) {
	t.Helper()
	if took := time.Since(began); took > most {
		t.Errorf("%s took %v, want at most %v", what, took, most)
	} else {
		t.Logf("%s took %v", what, took)
	}
}

// Where one endpoint of several is dark, nothing takes as long as a single request to it would. (Before each request
// was sent again beside the first, a start took up to 10 s, a join 15 s, a handoff 28 s, and the first state of Observe
// more than 30 s.)
func TestOneDarkEndpointHoldsUpNothing(t *testing.T) {
	t.Parallel()
	for _, n := range []int{2, 3} {
		t.Run(fmt.Sprintf("of %d", n), func(t *testing.T) {
			t.Parallel()
			members := etcdtest.StartCluster(t, n)
			client := etcdtest.NewClient(t, members[0].Endpoint)
			f := newFan(t, members, n)
			f.darken(t)
			name, ttl := t.Name(), leader.WithTTL(leader.DefaultTTL)

			began := time.Now()
			first := lead(t, newElector(t, f.client, ttl), name, "first")
			within(t, "the start", began, requestTimeout)

			began = time.Now()
			next := campaign(t.Context(), newElector(t, f.client, ttl), name, "next")
			awaitQueue(t, client, name, queued(2))
			within(t, "joining", began, requestTimeout)

			began = time.Now()
			observed := observe(t, newElector(t, f.client, ttl), name)
			if c := etcdtest.Await(t, "the leader", observed); c.Value != "first" {
				t.Errorf("observed %+v", c)
			}
			within(t, "observing", began, requestTimeout)

			began = time.Now()
			resign(t, first)
			l := awaitLeader(t, next)
			within(t, "the handoff", began, 2*requestTimeout) // it waits for a watch and for a read
			if c := etcdtest.Await(t, "the next leader", observed); c.Value != "next" {
				t.Errorf("observed %+v", c)
			}
			within(t, "observing the handoff", began, 2*requestTimeout)
			f.heal()
			resign(t, l)
		})
	}
}

// A request that happens to go to the dark endpoint must not be the only one that a resignation sends: nobody would
// lead until the lease has expired.
func TestResignationAsksAnotherEndpointWhereOneIsDark(t *testing.T) {
	t.Parallel()
	members := etcdtest.StartCluster(t, 3)
	var endpoints []string
	var links []*etcdtest.Link
	for _, m := range members {
		links = append(links, etcdtest.NewLink(t, m))
		endpoints = append(endpoints, links[len(links)-1].Endpoint)
	}
	client := etcdtest.NewClient(t, endpoints...)
	// Should a busy machine make etcd itself lose its leader just then, the next trial has it again.
	for trial := range 3 {
		var terms []*leader.Leader
		for i := range 4 { // each resignation sends two requests: some go to the dark endpoint
			terms = append(terms, lead(t, newElector(t, client), fmt.Sprintf("jobs%d-%d", trial, i), ""))
		}
		links[0].Darken()
		resigned := make(chan error, len(terms))
		for _, l := range terms {
			go func() { resigned <- l.Resign(t.Context()) }()
		}
		var err error
		for range terms {
			err = errors.Join(err, etcdtest.Await(t, "a resignation", resigned))
		}
		links[0].Heal()
		if err == nil {
			return
		}
		t.Logf("trial %d: %v", trial, err)
	}
	t.Error("a resignation failed in each trial")
}

// Requests that are sent at the same time do not keep each other from the endpoint that answers. (Before each request
// was sent again beside the first, this took 27 s.)
func TestManyElectionsNeedOneEndpointOfTwo(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t)
	f := newFan(t, []*etcdtest.Member{m}, 2)
	f.darken(t)
	e := newElector(t, f.client, leader.WithTTL(leader.DefaultTTL))
	began := time.Now()
	var won []<-chan outcome
	for i := range 20 {
		won = append(won, campaign(t.Context(), e, fmt.Sprintf("jobs-%d", i), ""))
	}
	for _, won := range won {
		awaitLeader(t, won)
	}
	within(t, "the start of 20 elections", began, requestTimeout)
	f.heal()
}

// A watch that goes dark with its endpoint is noticed by the next read of the key, after a TTL, wherever that read is
// sent first.
func TestDeadWatchesAreNoticedInATTLThoughAnEndpointIsDark(t *testing.T) {
	m, client := start(t)
	ttl := leader.WithTTL(leader.DefaultTTL)
	for _, n := range []int{2, 3} {
		t.Run(fmt.Sprintf("of %d", n), func(t *testing.T) {
			t.Parallel()
			f := newFan(t, []*etcdtest.Member{m}, n)
			var first []*leader.Leader
			var next []<-chan outcome
			var tokens []int64
			var observed []<-chan leader.Candidate
			e, observer, others := newElector(t, f.client, ttl), newElector(t, f.client, ttl), newElector(t, client, ttl)
			for i := range 4 {
				name := fmt.Sprintf("%s-%d", t.Name(), i)
				first = append(first, lead(t, others, name, "first"))
				next = append(next, campaign(t.Context(), e, name, "next"))
				tokens = append(tokens, awaitQueue(t, client, name, queued(2))[1].Token)
				observed = append(observed, observe(t, observer, name))
				if c := etcdtest.Await(t, "the leader", observed[i]); c.Value != "first" {
					t.Errorf("observed %+v", c)
				}
			}
			f.darken(t)
			began := time.Now()
			for _, l := range first {
				resign(t, l)
			}
			var second []*leader.Leader
			for i, won := range next {
				l := awaitLeader(t, won)
				if l.Token() != tokens[i] { // its lease was renewed meanwhile, through the other endpoint
					t.Errorf("it had token %d while it waited, and leads with %d", tokens[i], l.Token())
				}
				second = append(second, l)
				within(t, "until the next in line has noticed", began, leader.DefaultTTL+requestTimeout/2)
				for etcdtest.Await(t, "the next leader", observed[i]).Value != "next" {
					continue // the vacancy
				}
				within(t, "until an observer has noticed", began, leader.DefaultTTL+requestTimeout/2)
			}
			f.heal()
			for _, l := range second {
				resign(t, l)
			}
		})
	}
}

// One endpoint is dark from the client's start, so that nobody has told yet of the other's failures, between which gRPC's
// pauses grow.
func TestCampaignIsBackSoonThoughItsClientHasStartedBesideADarkEndpoint(t *testing.T) {
	m, direct := start(t)
	dark, failing := etcdtest.NewLink(t, m), etcdtest.NewLink(t, m)
	dark.Darken()
	failing.Cut()
	waiting := campaign(t.Context(), newExpiring(t, etcdtest.NewClient(t, dark.Endpoint, failing.Endpoint)), "jobs", "")
	time.Sleep(11500 * time.Millisecond) // gRPC's pause is 4 s or more by now
	began := time.Now()
	failing.Heal()
	l := awaitLeader(t, waiting)
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("elected %v after the endpoint was back, want the longest pause of a campaign, 2 s, and a few requests", took)
	}
	resign(t, l)
	dark.Heal()
	awaitExpiry(t, direct) // of a lease whose grant arrives only now
}

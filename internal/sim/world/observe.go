package world

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/fake"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// A sight is what somebody was told of an election last.
type sight struct {
	token int64
	value string
}

// changed is the hook LeaderChanged.
func (w *world) changed(el *elector, election string, c leader.Candidate) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if el.p.dead.Load() {
		return
	}
	w.result.Counts.Observed++
	w.tellLocked(el, asEntry(c, oracle.Entry{Kind: oracle.Changed, Election: election}))
}

// asEntry says in an entry who leads.
func asEntry(c leader.Candidate, e oracle.Entry) oracle.Entry {
	e.Token, e.Key, e.Value, e.Lease = c.Token, c.Key, short(c.Value), int64(c.Lease)
	return e
}

// tokensOf is a queue as a history has it.
func tokensOf(all []leader.Candidate) string {
	var tokens []string
	for _, c := range all {
		tokens = append(tokens, strconv.FormatInt(c.Token, 10))
	}
	return strings.Join(tokens, " ")
}

// observe follows an election for a while, again and again, as a consumer that is slow at times.
func (p *process) observe(election string) {
	w := p.w
	for p.ctx.Err() == nil {
		el := p.newElector("")
		if client := p.current(); client.Ctx().Err() != nil {
			p.sleep(p.ctx, 100*time.Millisecond)
			continue
		}
		ctx, cancel := withTimeout(p.ctx, p.about(10*w.ttl))
		if w.calm.Load() {
			cancel()
			ctx, cancel = context.WithCancel(p.ctx)
		}
		w.mu.Lock()
		w.sequence++
		id := strconv.FormatInt(w.sequence, 10)
		w.mu.Unlock()
		s := new(sight)
		p.attempt(nil, func() { p.follow(ctx, el, election, id, s) })
		w.mu.Lock()
		w.observers = removeSight(w.observers, s)
		w.mu.Unlock()
		cancel()
	}
}

// An observer is a call of Observe under way.
type observer struct {
	*sight
	p        *process
	election string
}

func removeSight(all []observer, s *sight) (kept []observer) {
	for _, o := range all {
		if o.sight != s {
			kept = append(kept, o)
		}
	}
	return kept
}

func (p *process) follow(ctx context.Context, el *elector, election, id string, s *sight) {
	w := p.w
	s.token = -1 // it knows nothing yet
	w.mu.Lock()
	w.observers = append(w.observers, observer{s, p, election})
	w.mu.Unlock()
	call := oracle.Entry{Proc: p.name, Election: election, Op: id}
	tell := func(kind oracle.Kind, e oracle.Entry) {
		e.Kind = kind
		p.tell(e)
	}
	tell(oracle.Observing, call)
	left := call
	left.Err = "enough was seen"
	defer func() { tell(oracle.ObserveEnded, left) }()
	for c, err := range el.e.Observe(ctx, election) {
		left.Err = ""
		if err != nil {
			left.Err = err.Error()
			if ctx.Err() == nil && !errors.Is(err, leader.ErrClosed) && !p.dead.Load() {
				w.violate("error", "%s: %s: Observe: %v", election, p.name, err)
			}
			return
		}
		tell(oracle.Observed, asEntry(c, call))
		w.mu.Lock()
		w.result.Counts.Observed++
		s.token, s.value = c.Token, c.Value
		w.mu.Unlock()
		if p.rng.IntN(8) == 0 && !w.calm.Load() {
			p.sleep(ctx, min(p.about(w.ttl/2), w.ttl))
		}
		if p.rng.IntN(50) == 0 && !w.calm.Load() {
			left.Err = "enough was seen"
			return
		}
	}
}

// evictorName is the process of the operator who evicts leaders with the library.
const evictorName = "evictor"

// An evictor is that operator. No fault strikes it.
type evictor struct {
	w         *world
	client    *clientv3.Client
	reclaimer *clientv3.Client // of whoever reclaims leases
	e         *leader.Elector
}

// outsider returns the network and the client of a program that no fault strikes.
func (w *world) outsider(name string) (*fake.Process, *clientv3.Client) {
	net := w.cluster.Process(name, nil)
	cfg := fake.ClientConfig{Alter: func(c *clientv3.Config) { c.Logger = zap.NewNop() }}
	if w.auth {
		cfg.Username, cfg.Password = "root", "root"
	}
	client, err := net.NewClient(cfg)
	if err != nil {
		panic(fmt.Sprintf("%s has no client: %v", name, err))
	}
	return net, client
}

func (w *world) newEvictor() *evictor {
	v := &evictor{w: w}
	_, v.client = w.outsider(evictorName)
	_, v.reclaimer = w.outsider("reclaimer")
	var err error
	if v.e, err = leader.New(v.client, leader.WithTTL(w.ttl)); err != nil {
		panic(err)
	}
	return v
}

// evict ends the present term of an election.
func (v *evictor) evict(election string) {
	ctx, cancel := context.WithTimeout(v.w.ctx, 10*time.Second)
	defer cancel()
	w := v.w
	w.mu.Lock()
	e := oracle.Entry{Kind: oracle.Taken, Proc: evictorName, Op: oracle.Evict, From: w.now(), Election: election, Result: oracle.OK}
	if l := w.first(election); l != nil {
		e.Token = l.token
	}
	w.mu.Unlock()
	switch err := v.e.Evict(ctx, election); {
	case err == nil:
	case errors.Is(err, leader.ErrNoLeader):
		e.Result = oracle.Failed
	default:
		e.Result, e.Err = oracle.Unknown, err.Error()
	}
	w.record(e)
}

func (v *evictor) close() {
	_ = v.client.Close()
	_ = v.reclaimer.Close()
}

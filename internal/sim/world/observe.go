package world

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"example.com/leader"
	"example.com/leader/internal/oracle"
	"example.com/leader/internal/sim/fake"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func contextCause(l *leader.Leader) error { return context.Cause(l.Context()) }

// A sight is what somebody was told of an election last.
type sight struct {
	next  int // of w.states
	token int64
	value string
	at    time.Time
}

// seen notes that somebody was told who leads. What is told are states that were, in their order.
func (w *world) seenLocked(who, election string, s *sight, c leader.Candidate) {
	w.result.Counts.Observed++
	s.token, s.value, s.at = c.Token, c.Value, time.Now()
	states := w.states[election]
	for i := s.next; i < len(states); i++ {
		if states[i].token == c.Token && states[i].value == c.Value {
			s.next = i
			return
		}
	}
	w.violateLocked("observe", "%s: %s was told that %d leads with %q, which was not so after the state that it was told before", election, who, c.Token, short(c.Value))
}

// changed is the hook LeaderChanged.
func (w *world) changed(el *elector, election string, c leader.Candidate) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if el.p.dead.Load() {
		return
	}
	s := el.changes[election]
	if s == nil {
		s = new(sight)
		el.changes[election] = s
	}
	w.seenLocked(el.p.name+" (LeaderChanged)", election, s, c)
}

// observe follows an election for a while, again and again, as a consumer that is slow at times.
func (p *process) observe(election string) {
	w := p.w
	for p.ctx.Err() == nil {
		el := p.newElector()
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
	for c, err := range el.e.Observe(ctx, election) {
		e := oracle.Entry{
			Kind: oracle.Observed, Proc: p.name, Election: election, Op: id,
			Token: c.Token, Key: c.Key, Value: short(c.Value), Lease: int64(c.Lease),
		}
		if err != nil {
			e.Err = err.Error()
			if ctx.Err() == nil && !errors.Is(err, leader.ErrClosed) && !p.dead.Load() {
				w.violate("error", "%s: %s: Observe: %v", election, p.name, err)
			}
			p.tell(e)
			return
		}
		w.mu.Lock()
		if !p.dead.Load() {
			w.recordLocked(e)
			w.seenLocked(p.name+" (Observe)", election, s, c)
		}
		w.mu.Unlock()
		if p.rng.IntN(8) == 0 && !w.calm.Load() {
			p.sleep(ctx, p.about(w.ttl/2))
		}
		if p.rng.IntN(50) == 0 && !w.calm.Load() {
			return
		}
	}
}

// evictorName is the process of the operator who evicts leaders with the library.
const evictorName = "evictor"

// An evictor is that operator. No fault strikes it.
type evictor struct {
	w      *world
	net    *fake.Process
	client *clientv3.Client
	e      *leader.Elector
	ended  chan struct{}
}

func (w *world) newEvictor() *evictor {
	v := &evictor{w: w, net: w.cluster.Process(evictorName, nil), ended: make(chan struct{})}
	cfg := fake.ClientConfig{Alter: func(c *clientv3.Config) { c.Logger = zap.NewNop() }}
	if w.auth {
		cfg.Username, cfg.Password = "root", "root"
	}
	var err error
	if v.client, err = v.net.NewClient(cfg); err != nil {
		panic(fmt.Sprintf("the evictor has no client: %v", err))
	}
	if v.e, err = leader.New(v.client, leader.WithTTL(w.ttl)); err != nil {
		panic(err)
	}
	close(v.ended)
	return v
}

// evict ends the present term of an election.
func (v *evictor) evict(election string) {
	ctx, cancel := context.WithTimeout(v.w.ctx, 10*time.Second)
	defer cancel()
	if err := v.e.Evict(ctx, election); err != nil {
		v.w.note("evict %s: %v", election, err)
	}
}

func (v *evictor) close() { _ = v.client.Close() }

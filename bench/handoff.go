package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"google.golang.org/grpc"
)

// longTTL is for rows in which no lease expires. Stock sessions have it by default.
const longTTL = time.Minute

// A pair is a leader and the candidate that waits behind it, at a client each.
type pair struct{ first, next *candidate }

// pair makes a pair; it returns when the second one can be seen to wait.
func (c contestant) pair(ctx context.Context, from, to *clientv3.Client, election string, ttl time.Duration) (p pair, err error) {
	if p.first, err = c.lead(ctx, from, election, ttl); err != nil {
		return p, err
	}
	if p.next, err = c.join(ctx, to, election, ttl); err != nil {
		return p, fmt.Errorf("%s: %w", c.name, err)
	}
	return p, c.awaitQueued(ctx, to, election, 2)
}

// handoff is the time from before the first resigns until the next one's campaign has returned.
func (p pair) handoff(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	if err := p.first.resign(); err != nil {
		return 0, err
	}
	won, err := receive(ctx, "the successor", p.next.won)
	return won.Sub(began), err
}

func (p pair) close() error { return errors.Join(p.first.close(), p.next.close()) }

// A setting is where a row's trials are made.
type setting struct {
	members, writers int
}

func (s setting) String() string {
	load := "idle"
	if s.writers > 0 {
		load = fmt.Sprintf("%d writers", s.writers)
	}
	if s.members == 1 {
		return "1 member, " + load
	}
	return fmt.Sprintf("%d members, %s", s.members, load)
}

// A stage is a setting's etcd with two clients at each member, of which one is for those who resign
// and the other for successors.
type stage struct{ from, to []*clientv3.Client }

// clients returns those of a trial. All contestants get the same, since it matters which member serves
// a request or a watch; the trials go through all pairs of members.
func (s stage) clients(trial int) (from, to *clientv3.Client) {
	n := len(s.from)
	return s.from[trial%n], s.to[trial/n%n]
}

func newStage(ctx context.Context, r *run, endpoints []string, opts ...grpc.DialOption) (*stage, error) {
	st := &stage{}
	for _, endpoint := range endpoints {
		clients, err := r.clients(ctx, 2, []string{endpoint}, opts...)
		if err != nil {
			return nil, err
		}
		st.from, st.to = append(st.from, clients[0]), append(st.to, clients[1])
	}
	return st, nil
}

// start runs the setting's etcd and its writers.
func (s setting) start(ctx context.Context, r *run) (*stage, error) {
	endpoints, err := r.cluster(s.members)
	if err != nil {
		return nil, err
	}
	st, err := newStage(ctx, r, endpoints)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var writers sync.WaitGroup
	r.onStop(func() { cancel(); writers.Wait() })
	for i := range s.writers {
		client, err := r.client(ctx, endpoints)
		if err != nil {
			return nil, err
		}
		writers.Go(func() { write(ctx, client, fmt.Sprint("written/", i)) })
	}
	return st, nil
}

// write puts the key over and over until ctx ends.
func write(ctx context.Context, client *clientv3.Client, key string) {
	for ctx.Err() == nil {
		rctx, cancel := request(ctx)
		_, err := client.Put(rctx, key, "")
		cancel()
		if err != nil { // a moment without this writer's load is better than a storm of failures
			sleep(ctx, 100*time.Millisecond)
		}
	}
}

func measureHandoff(ctx context.Context, r *run) (*result, error) {
	res := &result{}
	t := table{
		caption: "Time in ms from just before the leader resigns until the successor's campaign has returned. The successor has waited for 250 ms, client-go's for a random time.",
		header:  []string{"etcd", "contestant", "median (p10 – p90)", "trials", "× limit", "× stock"},
	}
	for _, s := range []setting{{members: 1}, {members: 3}} {
		took, err := handoffs(ctx, r, s)
		if err != nil {
			return nil, err
		}
		contestants := []contestant{ours, anchored, stock, holster, clientGo, limit}
		addHandoffs(&t, s, took, contestants...)
		if s.members == 3 {
			for _, c := range []contestant{ours, stock, clientGo} {
				res.bars = append(res.bars, bar{resignation, c.name, c, took[c.name].median()})
			}
		}
		res.atMost(1.10, took[ours.name].ratio(took[limit.name]), "%v: leader / limit", s).
			beside(anchored.name, took[anchored.name].ratio(took[limit.name]))
		res.atMost(0.85, took[ours.name].ratio(took[stock.name]), "%v: leader / stock", s).
			beside(limit.name, took[limit.name].ratio(took[stock.name]))
		res.figures = append(res.figures, ecdf{
			file: fmt.Sprintf("handoff-%d.svg", s.members), title: fmt.Sprintf("Handoff by resignation, %v, successor has waited 250 ms", s),
			samples: took, order: names(contestants),
		})
	}
	res.tables = []table{t}
	return res, nil
}

func names(contestants []contestant) (names []string) {
	for _, c := range contestants {
		names = append(names, c.name)
	}
	return names
}

func addHandoffs(t *table, s setting, took map[string]sample, contestants ...contestant) {
	for _, c := range contestants {
		own := took[c.name]
		line := append([]string{s.String(), c.name}, own.cells()...)
		t.add(append(line, number(own.over(took[limit.name])), number(own.over(took[stock.name])))...)
	}
}

// handoffs lets all contestants wait at the same time, and hand over one after the other.
func handoffs(ctx context.Context, r *run, s setting) (map[string]sample, error) {
	defer r.stop()
	stage, err := s.start(ctx, r)
	if err != nil {
		return nil, err
	}
	took := make(map[string]sample)
	contestants := []contestant{ours, anchored, stock, holster, limit}
	trials := r.pick(150, 15, 1)
	for trial := range trials {
		from, to := stage.clients(trial)
		if trial%max(trials/3, 1) == 0 {
			r.log("%v: trial %d of %d", s, trial+1, trials)
			polled, err := polledHandoffs(ctx, from, to, fmt.Sprintf("polled%04d", trial), r.pick(20, 5, 1))
			if err != nil {
				return nil, err
			}
			took[clientGo.name] = append(took[clientGo.name], polled...)
		}
		pairs := make([]pair, len(contestants))
		for i, c := range contestants {
			if pairs[i], err = c.pair(ctx, from, to, fmt.Sprintf("%s%04d", c.name, trial), longTTL); err != nil {
				return nil, err
			}
		}
		sleep(ctx, 250*time.Millisecond)
		for _, i := range rand.Perm(len(contestants)) {
			d, err := pairs[i].handoff(ctx)
			if err := errors.Join(err, pairs[i].close()); err != nil {
				return nil, fmt.Errorf("%s: %w", contestants[i].name, err)
			}
			took[contestants[i].name] = append(took[contestants[i].name], d)
		}
	}
	return took, nil
}

// polledHandoffs makes handoffs by client-go, whose candidates ask every 2 to 4.4 s and send next to
// nothing meanwhile, so that many can wait at once. Each waits for a random time, since it would
// otherwise be measured at the same point of its period.
func polledHandoffs(ctx context.Context, from, to *clientv3.Client, election string, n int) (sample, error) {
	took := make(sample, n)
	err := each(n, n, func(i int) error {
		p, err := clientGo.pair(ctx, from, to, fmt.Sprint(election, "-", i), clientGoTTL)
		if err != nil {
			return err
		}
		sleep(ctx, 250*time.Millisecond+rand.N(4*time.Second))
		took[i], err = p.handoff(ctx)
		return errors.Join(err, p.close())
	})
	return took, err
}

func measureFreshSuccessor(ctx context.Context, r *run) (*result, error) {
	res := &result{}
	t := table{
		caption: "The same, but the successor joined only 15 ms before the leader resigned.",
		header:  []string{"etcd", "contestant", "median (p10 – p90)", "trials", "× limit", "× stock"},
	}
	for _, s := range []setting{{members: 1}, {members: 3}, {members: 1, writers: 4}, {members: 3, writers: 4}} {
		took, err := freshHandoffs(ctx, r, s)
		if err != nil {
			return nil, err
		}
		addHandoffs(&t, s, took, ours, stock, limit)
		if s != (setting{members: 3}) {
			res.atMost(0.05, took[ours.name].ratio(took[stock.name]), "%v: leader / stock", s).
				beside(limit.name, took[limit.name].ratio(took[stock.name]))
		}
		res.figures = append(res.figures, ecdf{
			file:    fmt.Sprintf("fresh-%d-%d.svg", s.members, s.writers),
			title:   fmt.Sprintf("Handoff by resignation, %v, successor has joined 15 ms before", s),
			samples: took, order: []string{ours.name, stock.name, limit.name},
		})
	}
	res.tables = []table{t}
	return res, nil
}

func freshHandoffs(ctx context.Context, r *run, s setting) (map[string]sample, error) {
	defer r.stop()
	stage, err := s.start(ctx, r)
	if err != nil {
		return nil, err
	}
	return takeTurns(r, s, r.pick(200, 15, 1), []contestant{ours, stock, limit}, func(trial int, c contestant) (time.Duration, error) {
		from, to := stage.clients(trial)
		p, err := c.pair(ctx, from, to, fmt.Sprintf("%s%04d", c.name, trial), longTTL)
		if err != nil {
			return 0, err
		}
		sleep(ctx, 15*time.Millisecond)
		d, err := p.handoff(ctx)
		return d, errors.Join(err, p.close())
	})
}

// takeTurns makes so many trials, in each of which every contestant has its turn, in random order.
func takeTurns(r *run, s setting, trials int, contestants []contestant, turn func(trial int, c contestant) (time.Duration, error)) (map[string]sample, error) {
	took := make(map[string]sample)
	for trial := range trials {
		if trial%100 == 0 {
			r.log("%v: trial %d of %d", s, trial+1, trials)
		}
		for _, i := range rand.Perm(len(contestants)) {
			c := contestants[i]
			d, err := turn(trial, c)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			took[c.name] = append(took[c.name], d)
		}
	}
	return took, nil
}

func measurePingPong(ctx context.Context, r *run) (*result, error) {
	stage, err := setting{members: 1}.start(ctx, r)
	if err != nil {
		return nil, err
	}
	slice := time.Duration(r.pick(1000, 500, 200)) * time.Millisecond
	players := []struct {
		name string
		play func(ctx context.Context, client *clientv3.Client, election string) (terms int, err error)
	}{{ours.name, playOurs}, {stock.name, playStock}, {anchored.name, playAnchored}, {limit.name, playLimit}}
	rates := make(map[string]sample) // per second, written as if they were milliseconds
	for round := range r.pick(20, 4, 1) {
		for _, i := range rand.Perm(len(players)) {
			p := players[i]
			var terms [2]int
			began := time.Now()
			err := each(2, 2, func(k int) (err error) {
				// No deadline: etcd is told of those, and may say that one has passed before it has here.
				sctx, cancel := context.WithCancel(ctx)
				defer cancel()
				defer time.AfterFunc(time.Until(began.Add(slice)), cancel).Stop()
				terms[k], err = p.play(sctx, []*clientv3.Client{stage.from[0], stage.to[0]}[k], fmt.Sprintf("players%d/%d", i, round))
				return err
			})
			if err != nil {
				return nil, fmt.Errorf("%s: %w", p.name, err)
			}
			rates[p.name] = append(rates[p.name], time.Duration(float64(terms[0]+terms[1])/slice.Seconds()*1e6))
		}
	}
	t := table{
		caption: "Terms per second of two candidates, each of which resigns as soon as it is elected, and campaigns again. 1 member. For the limit, each of the two grants a lease, puts one key and revokes the lease, again and again, and neither waits for the other.",
		header:  []string{"contestant", "median (p10 – p90)", "rounds", "× limit", "× stock"},
	}
	for _, p := range players {
		own := rates[p.name]
		t.add(append(append([]string{p.name}, own.cells()...), number(own.over(rates[limit.name])), number(own.over(rates[stock.name])))...)
	}
	res := &result{tables: []table{t}}
	res.atLeast(20, rates[ours.name].ratio(rates[stock.name]), "leader / stock").
		beside(limit.name, rates[limit.name].ratio(rates[stock.name]))
	res.atLeast(20, rates[anchored.name].ratio(rates[stock.name]), "%s / stock", anchored.name)
	return res, nil
}

func playOurs(ctx context.Context, client *clientv3.Client, election string) (terms int, err error) {
	e, err := leader.New(client, leader.WithTTL(longTTL))
	if err != nil {
		return 0, err
	}
	defer e.Close(context.WithoutCancel(ctx))
	return takeTerms(ctx, e, election)
}

func playAnchored(ctx context.Context, client *clientv3.Client, election string) (terms int, err error) {
	e, err := newAnchored(ctx, client, longTTL)
	if err != nil {
		return 0, err
	}
	defer e.Close(context.WithoutCancel(ctx))
	return takeTerms(ctx, e, election)
}

func takeTerms(ctx context.Context, e *leader.Elector, election string) (terms int, err error) {
	for {
		l, err := e.Campaign(ctx, election, "")
		if err != nil {
			return terms, unless(ctx, err)
		}
		terms++
		if err := l.Resign(ctx); err != nil {
			return terms, unless(ctx, err)
		}
	}
}

func playStock(ctx context.Context, client *clientv3.Client, election string) (terms int, err error) {
	s, err := concurrency.NewSession(client, concurrency.WithTTL(seconds(longTTL)))
	if err != nil {
		return 0, err
	}
	defer s.Close()
	e := concurrency.NewElection(s, election)
	for {
		if err := e.Campaign(ctx, ""); err != nil {
			return terms, unless(ctx, err)
		}
		terms++
		if err := e.Resign(ctx); err != nil {
			return terms, unless(ctx, err)
		}
	}
}

// playLimit takes terms in an election of its own. An election that gives its lease back after each
// term cannot do with less, and has to wait for the other one besides. The revocation deletes the key.
func playLimit(ctx context.Context, client *clientv3.Client, election string) (terms int, err error) {
	election = fmt.Sprint(election, "/", rand.Int64())
	for {
		c, err := joinGranted(ctx, client, election, longTTL)
		if err != nil {
			return terms, unless(ctx, err)
		}
		terms++
		if err := c.close(); err != nil {
			return terms, unless(ctx, err)
		}
	}
}

// unless returns err, but nil if ctx has ended, which explains it.
func unless(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func measureStart(ctx context.Context, r *run) (*result, error) {
	res := &result{}
	t := table{
		caption: "Time in ms from the call until elected, in an election without other candidates, with a client that has just connected. The limit is the grant of a lease and one put.",
		header:  []string{"etcd", "contestant", "median (p10 – p90)", "trials", "× limit", "× stock"},
	}
	contestants := []contestant{ours, stock, holster, clientGo, {limit.name, joinGranted, nil}}
	for _, s := range []setting{{members: 1}, {members: 3}} {
		took, err := starts(ctx, r, s, contestants)
		if err != nil {
			return nil, err
		}
		addHandoffs(&t, s, took, contestants...)
		res.atMost(0.85, took[ours.name].ratio(took[stock.name]), "%v: leader / stock", s).
			beside(limit.name, took[limit.name].ratio(took[stock.name]))
	}
	res.tables = []table{t}
	return res, nil
}

func starts(ctx context.Context, r *run, s setting, contestants []contestant) (map[string]sample, error) {
	endpoints, err := r.cluster(s.members)
	if err != nil {
		return nil, err
	}
	defer r.stop()
	return takeTurns(r, s, r.pick(200, 20, 1), contestants, func(trial int, c contestant) (time.Duration, error) {
		client, err := newClient(ctx, endpoints)
		if err != nil {
			return 0, err
		}
		defer client.Close()
		began := time.Now()
		cand, err := c.join(ctx, client, fmt.Sprintf("%s%04d", c.name, trial), longTTL)
		if err != nil {
			return 0, err
		}
		won, err := receive(ctx, "the election", cand.won)
		return won.Sub(began), errors.Join(err, cand.close())
	})
}

// joinGranted is what an election on a lease cannot do without: the grant and a put.
func joinGranted(ctx context.Context, client *clientv3.Client, election string, ttl time.Duration) (*candidate, error) {
	rctx, cancel := request(ctx)
	defer cancel()
	lease, err := client.Grant(rctx, int64(seconds(ttl)))
	if err != nil {
		return nil, err
	}
	key := "granted/" + election
	rctx, cancel = request(ctx)
	defer cancel()
	_, err = client.Txn(rctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, "", clientv3.WithLease(lease.ID))).
		Commit()
	if err != nil {
		return nil, err
	}
	c := &candidate{won: make(chan time.Time, 1)}
	c.won <- time.Now()
	c.close = func() error {
		rctx, cancel := request(ctx)
		defer cancel()
		_, err := client.Revoke(rctx, lease.ID)
		return err
	}
	return c, nil
}

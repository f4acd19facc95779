package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A way is one to make a candidate lead that others wait before.
type way struct {
	name   string
	lineUp func(l *lineup) error
}

var (
	byTransfer = way{"leader, by Transfer", func(l *lineup) error { return lineUpOurs(l, transfer) }}
	byEvict    = way{"leader, by Evict", func(l *lineup) error { return lineUpOurs(l, evict) }}
	byPD       = way{"pd", lineUpPD}
)

// byResign is the name of this library's handoff to whoever is next.
const byResign = "leader, by Resign"

// A hall has the clients of one way, and a meter that counts what they send.
type hall struct {
	way
	*stage                      // for who leads and who is chosen
	waiters  []*clientv3.Client // for one waiter each
	operator *clientv3.Client
	meter    *meter
	outside  *clientv3.Client // its requests do not count
}

func newHall(ctx context.Context, r *run, w way, endpoints []string, waiters int) (*hall, error) {
	h := &hall{way: w, meter: newMeter()}
	var err, werr, oerr, uerr error
	h.stage, err = newStage(ctx, r, endpoints, h.meter.options()...)
	h.waiters, werr = r.clients(ctx, waiters, endpoints, h.meter.options()...)
	h.operator, oerr = r.client(ctx, endpoints, h.meter.options()...)
	h.outside, uerr = r.client(ctx, endpoints)
	return h, errors.Join(err, werr, oerr, uerr)
}

// A role is one in a lineup.
type role int

const (
	first  role = iota // leads at the beginning
	waiter             // waits before the chosen one
	chosen             // is to lead
)

// A lineup is an election with a leader, others that wait, and the chosen one behind them. Whoever has led
// joins again.
type lineup struct {
	ctx        context.Context
	cancel     context.CancelCauseFunc
	candidates sync.WaitGroup
	hall       *hall
	from, to   *clientv3.Client // of who leads and of who is chosen
	election   string
	waiters    int

	led     [chosen + 1]chan time.Time
	ended   chan time.Time // gets the moment in which the first one's work ended
	between atomic.Int64   // terms of waiters

	move  func() error // makes the chosen one lead; need not wait until it does
	whole func() error // blocks until all others wait again
	shut  func() error // ends what ctx does not
}

func (h *hall) lineUp(ctx context.Context, trial, waiters int) (*lineup, error) {
	l := &lineup{hall: h, election: fmt.Sprintf("%s%d/%04d", h.name, waiters, trial), waiters: waiters, ended: make(chan time.Time, 1)}
	l.ctx, l.cancel = context.WithCancelCause(ctx)
	l.from, l.to = h.clients(trial)
	for who := range l.led {
		l.led[who] = make(chan time.Time, 1)
	}
	return l, h.way.lineUp(l)
}

// start lets a candidate take part until ctx ends. An error ends the lineup.
func (l *lineup) start(part func() error) {
	l.candidates.Go(func() {
		if err := unless(l.ctx, part()); err != nil {
			l.cancel(err)
		}
	})
}

// inTurn calls add for the first one, then for all waiters, and then for the chosen one, each time when those
// before stand in the election.
func (l *lineup) inTurn(add func(who role, client *clientv3.Client) error, stand func(n int) error) error {
	if err := add(first, l.from); err != nil {
		return err
	}
	if _, err := l.await("the first one to be elected", l.led[first]); err != nil {
		return err
	}
	for _, client := range l.hall.waiters[:l.waiters] {
		if err := add(waiter, client); err != nil {
			return err
		}
	}
	if err := stand(l.waiters + 1); err != nil {
		return err
	}
	return errors.Join(add(chosen, l.to), stand(l.waiters+2))
}

func (l *lineup) leads(who role) {
	if who == waiter {
		l.between.Add(1)
		return
	}
	tell(l.led[who])
}

func (l *lineup) ends(who role) {
	if who == first {
		tell(l.ended)
	}
}

// tell sends the time, unless nobody has received the last one.
func tell(c chan time.Time) {
	select {
	case c <- time.Now():
	default:
	}
}

func (l *lineup) await(what string, c <-chan time.Time) (time.Time, error) {
	at, err := receive(l.ctx, what, c)
	if cause := context.Cause(l.ctx); cause != nil {
		err = cause
	}
	return at, err
}

func (l *lineup) close() error {
	l.cancel(nil)
	var err error
	if l.shut != nil {
		err = l.shut()
	}
	l.candidates.Wait()
	return err
}

// A moves is what the trials of one way have shown.
type moves struct {
	gaps, wholes               sample
	between, requests, watches []int
}

// measure makes the chosen one lead.
func (m *moves) measure(l *lineup) error {
	meter := l.hall.meter
	count := func() (requests, watches int) {
		return meter.count(keepAlive, renewalRead, watching), meter.of(watching)
	}
	requests, watches := count()
	began := time.Now()
	if err := l.move(); err != nil {
		return err
	}
	won, err := l.await("the chosen one to be elected", l.led[chosen])
	if err != nil {
		return err
	}
	between := l.between.Load()
	ended, err := l.await("the end of the first one's work", l.ended)
	if err != nil {
		return err
	}
	if err := l.whole(); err != nil {
		return err
	}
	meter.settle(l.ctx, 50*time.Millisecond)
	nowRequests, nowWatches := count()
	m.gaps, m.wholes = append(m.gaps, won.Sub(ended)), append(m.wholes, won.Sub(began))
	m.between = append(m.between, int(between))
	m.requests, m.watches = append(m.requests, nowRequests-requests), append(m.watches, nowWatches-watches)
	return nil
}

func measureTransfer(ctx context.Context, r *run) (*result, error) {
	res := &result{}
	t := table{
		caption: "A leader, so many waiters behind it, and behind those the candidate that is to lead. All have waited for 250 ms. Times in ms. " +
			"Without a leader: from the end of the old leader's context until the campaign of the chosen one has returned; negative if both led at once. " +
			"Others that led are those that led in this time. Whole: from the operator's call until the same moment. " +
			"Requests and watches (begun or ended) are those of all clients until all others wait again, without renewals (medians).",
		header: []string{"etcd", "waiters", "contestant", "without a leader, median (p10 – p90)", "trials", "× limit", "whole, median (p10 – p90)", "others that led", "requests", "watches"},
	}
	for _, s := range []setting{{members: 1}, {members: 3}} {
		if err := transfers(ctx, r, s, res, &t); err != nil {
			return nil, err
		}
	}
	res.tables = []table{t}
	return res, nil
}

func transfers(ctx context.Context, r *run, s setting, res *result, t *table) error {
	defer r.stop()
	endpoints, err := r.cluster(s.members)
	if err != nil {
		return err
	}
	pairs, err := newStage(ctx, r, endpoints)
	if err != nil {
		return err
	}
	sizes := []int{0, 1, 10, 100}[:r.pick(4, 4, 2)]
	if s.members > 1 {
		sizes = sizes[:min(3, len(sizes))] // a hundred take minutes
	}
	ways := []way{byTransfer, byEvict, byPD}
	halls := make([]*hall, len(ways))
	for i, w := range ways {
		if halls[i], err = newHall(ctx, r, w, endpoints, slices.Max(sizes)); err != nil {
			return err
		}
	}
	moved := make(map[string]map[int]*moves)
	for _, w := range ways {
		moved[w.name] = make(map[int]*moves)
		for _, n := range sizes {
			moved[w.name][n] = &moves{}
		}
	}
	handed := make(map[string]sample)
	trials := r.pick(50, 5, 1)
	for trial := range trials {
		if trial%10 == 0 {
			r.log("%v: trial %d of %d", s, trial+1, trials)
		}
		if err := transferTrial(ctx, halls, pairs, trial, sizes, moved, handed); err != nil {
			return err
		}
	}
	least := handed[limit.name]
	for _, n := range sizes {
		for _, w := range ways {
			m := moved[w.name][n]
			line := append([]string{s.String(), fmt.Sprint(n), w.name}, m.gaps.cells()...)
			t.add(append(line, number(m.gaps.over(least)), m.wholes.cells()[0],
				fmt.Sprint(medianInt(m.between)), fmt.Sprint(medianInt(m.requests)), fmt.Sprint(medianInt(m.watches)))...)
		}
		res.atMost(1.2, moved[byTransfer.name][n].gaps.ratio(least), "%v, waiters: %d: without a leader, Transfer / limit", s, n).
			beside(byResign, handed[byResign].ratio(least))
	}
	for _, name := range []string{byResign, limit.name} {
		line := append([]string{s.String(), "–", name}, handed[name].cells()...)
		t.add(append(line, number(handed[name].over(least)), "", "", "", "")...)
	}
	return nil
}

// transferTrial lets every way have a turn past each number of waiters, and the handoffs that they are compared with
// as many.
func transferTrial(ctx context.Context, halls []*hall, pairs *stage, trial int, sizes []int, moved map[string]map[int]*moves, handed map[string]sample) error {
	var turns []func() error
	from, to := pairs.clients(trial)
	for _, n := range sizes {
		for _, h := range halls {
			l, err := h.lineUp(ctx, trial, n)
			if err != nil {
				return fmt.Errorf("%s: %w", h.name, errors.Join(err, l.close()))
			}
			turns = append(turns, func() error {
				if err := errors.Join(moved[h.name][n].measure(l), l.close()); err != nil {
					return fmt.Errorf("%s: %w", h.name, err)
				}
				return nil
			})
		}
		for name, c := range map[string]contestant{byResign: ours, limit.name: limit} {
			p, err := c.pair(ctx, from, to, fmt.Sprintf("pair%d/%04d", n, trial), longTTL)
			if err != nil {
				return err
			}
			turns = append(turns, func() error {
				took, err := p.handoff(ctx)
				handed[name] = append(handed[name], took)
				return errors.Join(err, p.close())
			})
		}
	}
	sleep(ctx, 250*time.Millisecond)
	for _, i := range rand.Perm(len(turns)) {
		if err := turns[i](); err != nil {
			return err
		}
	}
	return nil
}

// lineUpOurs lines up candidates of this library. move makes the last one of the queue lead.
func lineUpOurs(l *lineup, move func(l *lineup, operator *leader.Elector, queue []leader.Candidate) error) error {
	operator, err := leader.New(l.hall.operator, leader.WithTTL(longTTL))
	if err != nil {
		return err
	}
	electors := []*leader.Elector{operator}
	l.shut = func() error {
		return each(len(electors), len(electors), func(i int) error { return electors[i].Close(context.WithoutCancel(l.ctx)) })
	}
	stand := func(n int) error { return queued(l.ctx, l.hall.outside, ours.prefix(l.election), n) }
	err = l.inTurn(func(who role, client *clientv3.Client) error {
		e, err := leader.New(client, leader.WithTTL(longTTL))
		if err != nil {
			return err
		}
		electors = append(electors, e)
		l.start(func() error { return l.serve(e, who) })
		return nil
	}, stand)
	if err != nil {
		return err
	}
	queue, err := operator.Candidates(l.ctx, l.election)
	l.move = func() error { return move(l, operator, queue) }
	l.whole = func() error { return stand(l.waiters + 2) }
	return err
}

// serve campaigns again and again, and leads for as long as each term lasts.
func (l *lineup) serve(e *leader.Elector, who role) error {
	for {
		term, err := e.Campaign(l.ctx, l.election, "")
		if err != nil {
			return err
		}
		l.leads(who)
		<-term.Context().Done()
		l.ends(who)
		if err := term.Resign(l.ctx); err != nil {
			return err
		}
	}
}

func transfer(l *lineup, operator *leader.Elector, queue []leader.Candidate) error {
	return operator.Transfer(l.ctx, l.election, queue[len(queue)-1])
}

// evict evicts everybody before the chosen one.
func evict(l *lineup, operator *leader.Elector, queue []leader.Candidate) error {
	for range queue[1:] {
		if err := operator.Evict(l.ctx, l.election); err != nil {
			return err
		}
	}
	return nil
}

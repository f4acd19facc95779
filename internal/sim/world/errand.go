package world

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"example.com/leader"
	"example.com/leader/internal/sim/fake"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// errandLate is how late an errand's messages may be.
	errandLate = time.Second
	// minErrandTTL is of the shortest lease that survives what an errand does to it.
	minErrandTTL = 8 * time.Second
	// requestPatience is how long a request may take at most.
	requestPatience = 5 * time.Second
)

// An errand is a program of its own, in elections of its own, on a machine that no fault strikes. It brings about on
// purpose what faults bring about too seldom.
type errand struct {
	w      *world
	name   string // of the errand, and of its election
	net    *fake.Process
	client *clientv3.Client
	e      *leader.Elector
}

// errands runs all of them, at the same time.
func (w *world) errands() {
	var all sync.WaitGroup
	for _, f := range []struct {
		name string
		run  func(*errand)
	}{
		{"given-up join", (*errand).giveUpJoins},
		{"resignation at a dark endpoint", (*errand).resignBesideADarkEndpoint},
		{"failed resignation", (*errand).failToResign},
		{"doubled join", (*errand).doubleJoins},
		{"late deletion", (*errand).deleteLate},
		{"late proclaim", (*errand).proclaimLate},
		{"revoked lease", (*errand).joinOnARevokedLease},
		{"term that is over", (*errand).runInATermThatIsOver},
		{"crowd at a dark endpoint", (*errand).askBesideADarkEndpoint},
		{"watch at a dark endpoint", (*errand).watchBesideADarkEndpoint},
		{"spectator", (*errand).askAfterAnOutage},
	} {
		r := w.newErrand(f.name)
		all.Go(func() {
			f.run(r)
			r.close()
		})
	}
	all.Wait()
}

func (w *world) newErrand(name string) *errand {
	r := &errand{w: w, name: name}
	r.net, r.client = w.outsider("errand: " + name)
	var err error
	if r.e, err = leader.New(r.client, leader.WithTTL(w.ttl), leader.WithMargin(w.margin)); err != nil {
		panic(err)
	}
	return r
}

func (r *errand) close() {
	r.links(func(l *fake.Link) {
		l.Dark(false, false)
		l.Refuse(false)
		l.Messages(0, 0, 0, 0)
	})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := r.e.Close(ctx); err != nil {
		r.violate("error", "Close: %v", err)
	}
	shut(r.client)
}

func (r *errand) violate(rule, format string, args ...any) {
	if !r.w.violated() {
		r.w.violate(rule, "errand %q: %s", r.name, fmt.Sprintf(format, args...))
	}
}

func (r *errand) links(f func(*fake.Link)) {
	for i := range 3 {
		f(r.net.Link(i))
	}
}

// lead campaigns in an election in which nobody else is. It returns nil if it is not elected within a time.
func (r *errand) lead(name string, within time.Duration) *leader.Leader {
	ctx, cancel := context.WithTimeout(r.w.ctx, within)
	defer cancel()
	l, err := r.e.Campaign(ctx, name, "")
	if err != nil {
		r.violate("blocked", "not elected within %v, though nobody else is there: %v", within, err)
		return nil
	}
	return l
}

// resign gives a term up.
func (r *errand) resign(l *leader.Leader) {
	ctx, cancel := context.WithTimeout(r.w.ctx, requestPatience)
	defer cancel()
	if err := l.Resign(ctx); err != nil {
		r.violate("error", "Resign: %v", err)
	}
}

// keepsLease holds a term, and so the Elector's lease, while f runs. A short lease does not outlast what f does to it.
func (r *errand) keepsLease(f func(kept *leader.Leader)) {
	if r.w.ttl < minErrandTTL {
		return
	}
	if kept := r.lead(r.name+", the lease", requestPatience); kept != nil {
		f(kept)
		r.resign(kept)
	}
}

// wantNoKey wants the renewals to find the key that was left in the election, and to delete it.
func (r *errand) wantNoKey(kept *leader.Leader) {
	within := r.w.ttl/3 + 4*time.Second // one renewal may fail
	for end := time.Now().Add(within); time.Now().Before(end) && r.hasKey() && !r.w.violated(); {
		r.w.sleep(100 * time.Millisecond)
	}
	if r.hasKey() && kept.IsLeader() {
		r.violate("orphan", "the key is left %v after the last message", within)
	}
}

func (r *errand) hasKey() bool { return len(r.keys(r.name+"/")) > 0 }

func (r *errand) keys(prefix string) (kvs []*mvccpb.KeyValue) {
	r.w.cluster.Inspect(func(t fake.Truth) { kvs = t.Keys(prefix) })
	return kvs
}

// giveUpJoin gives a campaign up while the answer to its join, or the join itself, is still under way.
func (r *errand) giveUpJoin() {
	request := r.w.rng.IntN(2) == 0
	r.links(func(l *fake.Link) { l.Dark(request, true) })
	ctx, cancel := context.WithTimeout(r.w.ctx, 100*time.Millisecond)
	defer cancel()
	if _, err := r.e.Campaign(ctx, r.name, ""); err == nil {
		r.violate("error", "Campaign has succeeded without etcd's answer")
	}
	r.links(func(l *fake.Link) { l.Dark(false, false) })
}

// giveUpJoins looks what becomes of the keys of campaigns that were given up.
func (r *errand) giveUpJoins() {
	r.keepsLease(func(kept *leader.Leader) {
		r.giveUpJoin()
		r.wantNoKey(kept)
	})
}

// deleteLate lets what deletes such a key arrive late, when there is another key of that name.
func (r *errand) deleteLate() {
	r.keepsLease(func(*leader.Leader) {
		for range 4 {
			r.giveUpJoin()
			r.links(func(l *fake.Link) { l.Messages(0, 0, 0.5, errandLate) })
			r.w.sleep(time.Duration(r.w.rng.Int64N(int64(time.Second))))
			l := r.lead(r.name, 2*requestPatience)
			if l == nil {
				return
			}
			r.w.sleep(2 * errandLate)
			if cause := context.Cause(l.Context()); errors.Is(cause, leader.ErrEvicted) {
				r.violate("self-harm", "token %d: %v, though nobody was there to do it", l.Token(), cause)
			}
			r.links(func(l *fake.Link) { l.Messages(0, 0, 0, 0) })
			r.resign(l)
		}
	})
}

// resignBesideADarkEndpoint resigns, with requests that the dark endpoint may get first.
func (r *errand) resignBesideADarkEndpoint() {
	const within = 1500 * time.Millisecond // a few silences: for the deletion, and for the revocation
	dark := r.net.Link(r.w.rng.IntN(3))
	for range 5 {
		l := r.lead(r.name, requestPatience)
		if l == nil {
			return
		}
		dark.Dark(true, true)
		began := time.Now()
		r.resign(l)
		if took := time.Since(began); took > within {
			r.violate("answered", "one endpoint is dark: Resign has taken %v", took)
		}
		dark.Dark(false, false)
		r.w.sleep(time.Second)
	}
}

// failToResign resigns in vain. The key that is left must not be taken for that of the next term.
func (r *errand) failToResign() {
	r.keepsLease(func(*leader.Leader) {
		l := r.lead(r.name, requestPatience)
		if l == nil {
			return
		}
		r.links(func(l *fake.Link) { l.Refuse(true) })
		ctx, cancel := context.WithTimeout(r.w.ctx, 300*time.Millisecond)
		defer cancel()
		if l.Resign(ctx) == nil {
			r.violate("error", "Resign has succeeded without etcd")
		}
		r.links(func(l *fake.Link) { l.Refuse(false) })
		next := r.lead(r.name, 2*requestPatience)
		if next == nil {
			return
		}
		if next.Token() <= l.Token() {
			r.violate("token", "a term has the token %d, and the one before it %d", next.Token(), l.Token())
		}
		r.resign(next)
	})
}

// doubleJoins lets copies of joins arrive when their terms are over.
func (r *errand) doubleJoins() {
	r.keepsLease(func(kept *leader.Leader) {
		for range 4 {
			r.links(func(l *fake.Link) { l.Messages(0, 1, 0.5, errandLate) })
			l := r.lead(r.name, requestPatience)
			if l == nil {
				return
			}
			r.resign(l)
			r.w.sleep(errandLate + 100*time.Millisecond)
			r.links(func(l *fake.Link) { l.Messages(0, 0, 0, 0) })
			r.wantNoKey(kept)
		}
	})
}

// proclaimLate lets values that were given up arrive after one that was confirmed.
func (r *errand) proclaimLate() {
	l := r.lead(r.name, requestPatience)
	if l == nil {
		return
	}
	r.links(func(l *fake.Link) { l.Messages(0, 0, 0.5, errandLate) })
	for range 4 {
		_ = r.proclaim(l, "given up", 50*time.Millisecond)
	}
	err := r.proclaim(l, "confirmed", requestPatience)
	r.w.sleep(errandLate + 100*time.Millisecond)
	r.links(func(l *fake.Link) { l.Messages(0, 0, 0, 0) })
	if kvs := r.keys(l.Key()); err == nil && len(kvs) > 0 && string(kvs[0].Value) != "confirmed" {
		r.violate("value", "a value that was given up has replaced one that was confirmed")
	}
	r.resign(l)
}

func (r *errand) proclaim(l *leader.Leader, value string, within time.Duration) error {
	ctx, cancel := context.WithTimeout(r.w.ctx, within)
	defer cancel()
	return l.Proclaim(ctx, value)
}

// joinOnARevokedLease campaigns as soon as somebody has revoked the lease, which nobody has told the Elector.
func (r *errand) joinOnARevokedLease() {
	r.keepsLease(func(kept *leader.Leader) {
		r.w.sleep(time.Second + time.Duration(r.w.rng.Int64N(int64(r.w.ttl/3)))) // there is a watch now
		r.net.Deafen()
		if kvs := r.keys(kept.Key()); len(kvs) > 0 {
			s := &strike{w: r.w}
			s.operate(func(ctx context.Context, o fake.Operator) error { return o.Revoke(ctx, kvs[0].Lease) })
		}
		if l := r.lead(r.name, time.Second); l != nil {
			r.resign(l)
		}
		r.net.Undeafen()
	})
}

// runInATermThatIsOver loses a term while the hook is told of its beginning. Run does not call the function for that one.
func (r *errand) runInATermThatIsOver() {
	first := true
	e, err := leader.New(r.client, leader.WithTTL(r.w.ttl), leader.WithHooks(leader.Hooks{
		Elected: func(_ string, l *leader.Leader, _ time.Duration) {
			if first {
				first = false
				s := &strike{w: r.w}
				s.operate(func(ctx context.Context, o fake.Operator) error { _, err := o.Delete(ctx, l.Key()); return err })
				<-l.Context().Done()
			}
		},
	}))
	if err != nil {
		panic(err)
	}
	ctx, cancel := context.WithTimeout(r.w.ctx, 2*requestPatience)
	defer cancel()
	err = e.Run(ctx, r.name, "", func(_ context.Context, l *leader.Leader) error {
		if !l.IsLeader() {
			r.violate("run", "the function was called when the term was over")
		}
		return nil
	})
	if err != nil {
		r.violate("error", "Run: %v", err)
	}
}

// askBesideADarkEndpoint asks three questions at a time, one for each endpoint.
func (r *errand) askBesideADarkEndpoint() {
	const within = 400 * time.Millisecond // one silence, and etcd's answer
	dark := r.net.Link(r.w.rng.IntN(3))
	for range 5 {
		dark.Dark(true, true)
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() {
				began := time.Now()
				_, err := r.e.Current(r.w.ctx, r.name)
				if took := time.Since(began); took > within || !errors.Is(err, leader.ErrNoLeader) {
					r.violate("answered", "one endpoint is dark: Current has taken %v: %v", took, err)
				}
			})
		}
		all.Wait()
		dark.Dark(false, false)
		r.w.sleep(time.Second)
	}
}

// watchBesideADarkEndpoint opens watches beside one that lives, whose stream they share, while one endpoint after the other is
// dark: that of the stream too. Once a watch was late they are opened on another stream, most of which are at other endpoints.
func (r *errand) watchBesideADarkEndpoint() {
	const tries, prompt = 6, 700 * time.Millisecond
	within := 1500 * time.Millisecond // the patience with a watch, and a silence
	if r.w.auth {
		within += authPatience
	}
	ctx, cancel := context.WithCancel(r.w.ctx)
	var beside sync.WaitGroup
	defer beside.Wait()
	defer cancel()
	beside.Go(func() {
		for _, err := range r.e.Observe(ctx, r.name+", beside") {
			if err != nil && ctx.Err() == nil {
				r.violate("observe", "one endpoint is dark: %v", err)
			}
		}
	})
	for i := range 3 {
		r.w.sleep(time.Second)
		r.net.Link(i).Dark(true, true)
		fastest := within
		for range tries {
			began := time.Now()
			ctx, cancel := context.WithTimeout(ctx, within)
			for _, err := range r.e.Observe(ctx, r.name) {
				if err != nil {
					r.violate("observe", "one endpoint is dark: no state within %v: %v", within, err)
				}
				break
			}
			cancel()
			fastest = min(fastest, time.Since(began))
		}
		if fastest > prompt && !r.w.auth { // else each stream takes an authentication, which may meet the dark endpoint too
			r.violate("observe", "one endpoint is dark: the first state takes %v each time", fastest)
		}
		r.net.Link(i).Dark(false, false)
	}
}

// askAfterAnOutage asks when a long outage is over, and nothing else has made gRPC connect again.
func (r *errand) askAfterAnOutage() {
	r.links(func(l *fake.Link) { l.Refuse(true) })
	r.w.sleep(time.Minute + time.Duration(r.w.rng.Int64N(int64(time.Minute))))
	r.links(func(l *fake.Link) { l.Refuse(false) })
	if _, err := r.e.Current(r.w.ctx, r.name); !errors.Is(err, leader.ErrNoLeader) {
		r.violate("answered", "Current after an outage: %v", err)
	}
}

//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// A worker is what a process that takes part in elections is told.
type worker struct {
	Name, Dir      string
	Seed           uint64
	TTL, Margin    time.Duration
	Endpoints      []string
	Watches        string // the endpoint of watches, if they have one of their own
	User, Password string
	Resource       string   // unix socket
	Run            []string // elections for Elector.Run, all over one Elector
	Campaign       []string // elections for leader.Campaign, each over a lease of its own
	Stock          []string // elections for concurrency.Election
	Observe        []string // elections to observe
}

// A member of the elections, in its own process.
type candidate struct {
	worker
	*Recorder
	client   *clientv3.Client
	http     http.Client
	impulses *impulses
	seq      atomic.Int64 // makes values unique
	samplers sync.WaitGroup
}

// run takes part in elections until ctx ends, and sees to it that nothing is left behind then.
func (w worker) run(ctx context.Context) error {
	r, err := newRecorder(w.Dir, w.Name)
	if err != nil {
		return err
	}
	client := w.dial(ctx, w.Endpoints)
	if client == nil {
		return nil // it has had no part in anything
	}
	watches := client
	if w.Watches != "" {
		// The library ends the backoff of its client's connections. It does not know this client.
		params := grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: requestTimeout}
		params.Backoff.MaxDelay = 500 * time.Millisecond
		if watches = w.dial(ctx, []string{w.Watches}, grpc.WithConnectParams(params)); watches == nil {
			client.Close()
			return nil
		}
		client.Watcher = watches.Watcher
	}
	c := &candidate{worker: w, Recorder: r, client: client, impulses: newImpulses()}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", w.Resource)
	}}
	c.http = http.Client{Transport: transport, Timeout: requestTimeout}

	var wg sync.WaitGroup
	e, err := leader.New(client, append(c.options(), leader.WithPrefix(root))...)
	if err != nil {
		return err
	}
	for i, name := range w.Run {
		wg.Go(func() { c.runElection(ctx, e, name, w.rand(i)) })
	}
	for i, name := range w.Campaign {
		wg.Go(func() { c.campaign(ctx, name, w.rand(i+10)) })
	}
	for i, name := range w.Stock {
		wg.Go(func() { c.stock(ctx, name, w.rand(i+20)) })
	}
	for _, name := range w.Observe {
		wg.Go(func() { c.observe(ctx, e, name) })
	}
	wg.Wait()
	cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err := e.Close(cctx); err != nil {
		c.fail("Close: %v", err)
	}
	if len(w.Stock) > 0 {
		return nil // what stock leaves behind is its own affair
	}
	c.samplers.Wait()
	c.impulses.close()
	for _, client := range slices.Compact([]*clientv3.Client{client, watches}) {
		if err := client.Close(); err != nil && !errors.Is(err, context.Canceled) {
			c.fail("close the client: %v", err)
		}
	}
	transport.CloseIdleConnections()
	if err := goleak.Find(); err != nil {
		c.fail("goroutines are left: %v", err)
	}
	return nil
}

// dial makes the client, or returns nil when ctx ends. A client with a user authenticates at once, and cannot
// be made while etcd does not answer.
func (w worker) dial(ctx context.Context, endpoints []string, opts ...grpc.DialOption) *clientv3.Client {
	for {
		client, err := clientv3.New(clientv3.Config{
			Endpoints: endpoints, Username: w.User, Password: w.Password, Logger: zap.NewNop(),
			DialTimeout: requestTimeout, // of the authentication
			DialOptions: opts,
		})
		if err == nil {
			return client
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
}

func (w worker) rand(n int) *rand.Rand { return rand.New(rand.NewPCG(w.Seed, uint64(n))) }

func (c *candidate) fail(format string, args ...any) {
	c.add(Entry{Kind: Failure, Err: fmt.Sprintf(format, args...)})
}

func (c *candidate) options() []leader.Option {
	return []leader.Option{
		leader.WithTTL(c.TTL),
		leader.WithMargin(c.Margin),
		leader.WithLogger(slog.New(evictions{slog.NewTextHandler(os.Stderr, nil), c, ""})),
		leader.WithHooks(leader.Hooks{
			Ended: func(election string, l *leader.Leader, cause error) {
				c.add(Entry{Kind: Ended, Election: election, Token: l.Token(), Err: cause.Error()})
			},
			Renewed: func(id clientv3.LeaseID, took time.Duration, deadline time.Time) {
				left := time.Until(deadline)
				at := now()
				until := at + int64(left+c.Margin)
				c.add(Entry{T: at, From: at - int64(took), Kind: Renewed, Lease: int64(id), Until: until})
			},
			RenewFailed: func(id clientv3.LeaseID, _ time.Duration, err error) {
				if errors.Is(err, leader.ErrRefused) {
					c.add(Entry{Kind: Refused, Lease: int64(id)})
				}
			},
		}),
	}
}

// evictions is a log handler that records which candidates lost their key to somebody else. The library reports that
// to the log alone, as the candidate joins again.
type evictions struct {
	slog.Handler
	c        *candidate
	election string
}

func (h evictions) WithAttrs(attrs []slog.Attr) slog.Handler {
	for _, a := range attrs {
		if a.Key == "election" {
			h.election = a.Value.String()
		}
	}
	h.Handler = h.Handler.WithAttrs(attrs)
	return h
}

func (h evictions) Handle(ctx context.Context, r slog.Record) error {
	for a := range r.Attrs {
		if a.Key == "error" && strings.Contains(a.Value.String(), leader.ErrEvicted.Error()) {
			h.c.add(Entry{Kind: Evicted, Election: h.election, Err: a.Value.String()})
		}
	}
	return h.Handler.Handle(ctx, r)
}

// runElection leads again and again with Elector.Run. A term that was not lost ends Run, so it is
// called again.
func (c *candidate) runElection(ctx context.Context, e *leader.Elector, name string, r *rand.Rand) {
	for ctx.Err() == nil {
		began, elected := now(), false
		campaigning, stop := c.campaigning(ctx, name, r)
		err := e.Run(campaigning, name, c.Name, func(ctx context.Context, l *leader.Leader) error {
			stop()
			elected = true
			c.term(ctx, l, root+name, began, r)
			began = now() // of the campaign after a lost term
			return nil
		})
		stop()
		switch {
		case err == nil || ctx.Err() != nil && errors.Is(err, context.Canceled):
		case campaigning.Err() != nil && errors.Is(err, context.Canceled):
			if !elected {
				c.add(Entry{Kind: GivenUp, From: began, Election: root + name})
			}
		default:
			c.fail("Run of %s: %v", name, err)
			return
		}
		c.pause(ctx, name, r)
	}
}

// campaigning returns the context of a campaign. It may end before the candidate is elected: that gives the campaign
// up. After stop it ends with ctx alone.
func (c *candidate) campaigning(ctx context.Context, name string, r *rand.Rand) (_ context.Context, stop func()) {
	campaigning, cancel := context.WithCancel(ctx)
	patience := time.Hour // as long as it takes
	switch {
	case name == again && r.IntN(4) != 0:
		patience = between(r, 50*time.Millisecond, 500*time.Millisecond)
	case r.IntN(4) == 0:
		patience = between(r, 0, c.TTL/2)
	}
	timer := time.AfterFunc(patience, cancel)
	stopImpulse := context.AfterFunc(c.impulses.next(), cancel)
	return campaigning, func() { stopImpulse(); timer.Stop() }
}

// pause is that between a term or a campaign and the next campaign.
func (c *candidate) pause(ctx context.Context, name string, r *rand.Rand) {
	if name != again && r.IntN(2) == 0 {
		sleep(ctx, r, 0, 300*time.Millisecond)
	}
}

// giveUp is the signal that makes a worker give up all its campaigns. A process that does not handle it yet
// survives it.
const giveUp = syscall.SIGWINCH

// impulses hands out contexts that end with the next giveUp.
type impulses struct {
	signals chan os.Signal
	done    chan struct{}

	mu     sync.Mutex
	ctx    context.Context // ends with the next one
	cancel context.CancelFunc
}

func newImpulses() *impulses {
	i := &impulses{signals: make(chan os.Signal, 1), done: make(chan struct{})}
	i.ctx, i.cancel = context.WithCancel(context.Background())
	signal.Notify(i.signals, giveUp)
	go func() {
		defer close(i.done)
		for range i.signals {
			i.mu.Lock()
			i.cancel()
			i.ctx, i.cancel = context.WithCancel(context.Background())
			i.mu.Unlock()
		}
	}()
	return i
}

// next returns a context that ends with the next impulse.
func (i *impulses) next() context.Context {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.ctx
}

func (i *impulses) close() {
	signal.Stop(i.signals)
	close(i.signals)
	<-i.done
	i.cancel()
}

// campaign leads again and again with leader.Campaign, with a lease for each term.
func (c *candidate) campaign(ctx context.Context, name string, r *rand.Rand) {
	for ctx.Err() == nil {
		began := now()
		campaigning, stopCampaign := c.campaigning(ctx, name, r)
		l, err := leader.Campaign(campaigning, c.client, root+name, c.Name, c.options()...)
		stopCampaign()
		switch {
		case err == nil:
		case campaigning.Err() != nil && errors.Is(err, context.Canceled):
			if ctx.Err() == nil {
				c.add(Entry{Kind: GivenUp, From: began, Election: root + name})
			}
			c.pause(ctx, name, r)
			continue
		default:
			c.fail("Campaign in %s: %v", name, err)
			return
		}
		tctx, cancel := context.WithCancel(ctx)
		stop := context.AfterFunc(l.Context(), cancel)
		c.term(tctx, l, root+name, began, r)
		stop()
		cancel()
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		_ = l.Resign(rctx) // fails where etcd is out of reach; the lease takes care of it
		cancel()
		c.pause(ctx, name, r)
	}
}

// term records a term and works in it until ctx ends or the term has lasted long enough. The caller
// resigns.
func (c *candidate) term(ctx context.Context, l *leader.Leader, election string, began int64, r *rand.Rand) {
	_, id, _ := strings.Cut(strings.TrimPrefix(l.Key(), election), "/")
	lease, err := strconv.ParseInt(id, 16, 64)
	if err != nil {
		c.fail("key %q of a term of %s", l.Key(), election)
	}
	c.add(Entry{Kind: Term, From: began, Election: election, Token: l.Token(), Key: l.Key(), Lease: lease, Op: "leader"})
	// One of both, for IsLeader ends the context by itself.
	op, believes := "IsLeader", l.IsLeader
	if r.IntN(2) == 0 {
		op, believes = "Context", func() bool { return l.Context().Err() == nil }
	}
	c.samplers.Go(func() { c.sample(Entry{Election: election, Token: l.Token(), Op: op}, believes) })
	length := between(r, 300*time.Millisecond, 3*time.Second)
	switch {
	case election == root+again:
		length = between(r, 50*time.Millisecond, 600*time.Millisecond)
	case r.IntN(2) == 0:
		length = between(r, c.TTL, 5*c.TTL) // long enough to be lost
	}
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	w := &work{candidate: c, election: election, token: l.Token(), guard: l.Guard(), rand: r, proclaim: func(string) {}}
	// Some never ask etcd whether they lead: their own watch alone can tell that the key is gone.
	if r.IntN(2) == 0 {
		w.proclaim = func(value string) {
			pctx, cancel := context.WithTimeout(ctx, requestTimeout)
			defer cancel()
			err := l.Proclaim(pctx, value)
			if errors.Is(err, leader.ErrNotLeader) && l.Context().Err() == nil {
				c.fail("Proclaim in %s: %v, while the term holds", election, err)
			}
		}
	}
	w.do(ctx)
	c.add(Entry{Kind: Resigning, Election: election, Token: l.Token()})
}

// sampleEvery is how often a leader asks itself, and pieceEvery how often it tells.
const (
	sampleEvery = time.Millisecond
	pieceEvery  = 100 * time.Millisecond
)

// sample asks believes until it says no, and records the time in which it certainly said yes: from
// the first answer to the last question.
func (c *candidate) sample(e Entry, believes func() bool) {
	e.Kind = Belief
	var answered, asked int64 // of the present piece: the first answer, the last question
	for {
		question := now()
		yes := believes()
		answer := now()
		paused := answer-asked > int64(pauseOf) // between these, or within the last one
		if answered != 0 && (!yes || paused || question-answered > int64(pieceEvery)) {
			e.From, e.T = answered, asked
			c.add(e)
			if answered = asked; paused {
				answered = 0
			}
		}
		if !yes {
			return
		}
		if answered == 0 {
			answered = answer
		}
		asked = question
		time.Sleep(sampleEvery)
	}
}

// requestTimeout bounds a request of a worker. It outlives the term: a worker that is late is what
// guard and token are for.
const requestTimeout = 2 * time.Second

// work is what a leader does, of this package or of stock.
type work struct {
	*candidate
	election string
	token    int64
	guard    clientv3.Cmp
	rand     *rand.Rand
	proclaim func(string)
}

// do works until ctx ends. Once a write has had no answer it writes no more: it may come yet, and only the
// term's end makes sure that it does not come in the middle of the next.
func (w *work) do(ctx context.Context) {
	writes := w.rand.IntN(4) != 0 // who does not ask etcd for anything believes the longest
	for ctx.Err() == nil {
		switch n := w.rand.IntN(8); {
		case n == 0:
			w.append(ctx)
		case !writes:
		case n == 1:
			w.proclaim(w.Name + "/" + w.value())
		case n < 5:
			writes = w.write(ctx, "counter")
		default:
			writes = w.write(ctx, "register")
		}
		sleep(ctx, w.rand, time.Millisecond, 10*time.Millisecond)
	}
}

// value is one that nobody writes twice.
func (w *work) value() string { return fmt.Sprintf("%d:%d", w.token, w.seq.Add(1)) }

// write replaces a value in etcd by one that follows from it. The counter's transaction compares that
// nobody has written meanwhile; the register's relies on the guard alone. It reports whether there
// was an answer.
func (w *work) write(ctx context.Context, what string) bool {
	name := strings.TrimPrefix(w.election, root)
	key := dataRoot + name + "/" + what
	base := Entry{Kind: Read, From: now(), Election: w.election, Token: w.token, Op: what}
	rctx, cancel := context.WithTimeout(ctx, requestTimeout)
	resp, err := w.client.Get(rctx, key)
	cancel()
	if err != nil {
		return true
	}
	base.T = now()
	guards := []clientv3.Cmp{w.guard}
	var n int64
	if len(resp.Kvs) > 0 {
		base.Value, base.Rev = string(resp.Kvs[0].Value), resp.Kvs[0].ModRevision
		first, _, _ := strings.Cut(base.Value, " ")
		if n, err = strconv.ParseInt(first, 10, 64); err != nil {
			w.fail("value %q of %q", base.Value, key)
			return false
		}
	}
	w.add(base)
	if what == "counter" {
		guards = append(guards, clientv3.Compare(clientv3.ModRevision(key), "=", base.Rev))
	}
	think := between(w.rand, 2*time.Millisecond, 20*time.Millisecond)
	time.Sleep(think)

	e := Entry{
		Kind: Write, Election: w.election, Token: w.token, Op: what,
		Base: base.Value, Value: fmt.Sprintf("%d %s", n+1, w.value()),
	}
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	e.From = now()
	txn, err := w.client.Txn(wctx).If(guards...).Then(clientv3.OpPut(key, e.Value)).Commit()
	e.T = now()
	switch {
	case err != nil:
		e.Result, e.Err = Unknown, err.Error()
	case txn.Succeeded:
		e.Result, e.Rev = OK, txn.Header.Revision
	default:
		e.Result = Failed
	}
	w.add(e)
	return e.Result != Unknown
}

// append writes to the resource outside etcd, which knows the token alone.
func (w *work) append(ctx context.Context) {
	e := Entry{Kind: Append, From: now(), Election: w.election, Token: w.token, Value: w.value()}
	form := url.Values{"election": {e.Election}, "token": {strconv.FormatInt(e.Token, 10)}, "value": {e.Value}}
	req, err := http.NewRequestWithContext(context.WithoutCancel(ctx), http.MethodPost, "http://resource/", strings.NewReader(form.Encode()))
	if err != nil {
		w.fail("append: %v", err)
		return
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := w.http.Do(req)
	e.T = now()
	switch {
	case err != nil:
		e.Result, e.Err = Unknown, err.Error()
	case resp.StatusCode == http.StatusOK:
		e.Result = OK
	case resp.StatusCode == http.StatusConflict:
		e.Result = Failed
	default:
		w.fail("append: %s", resp.Status)
	}
	if err == nil {
		resp.Body.Close() //nolint:errcheck // there is nothing in it
	}
	w.add(e)
}

// observe records who leads until ctx ends.
func (c *candidate) observe(ctx context.Context, e *leader.Elector, name string) {
	call := strconv.FormatInt(now(), 10)
	for leads, err := range e.Observe(ctx, name) {
		o := Entry{
			Kind: Observed, Election: root + name, Op: call,
			Token: leads.Token, Key: leads.Key, Value: leads.Value, Lease: int64(leads.Lease),
		}
		if err != nil {
			o.Err = err.Error()
			if ctx.Err() == nil {
				c.fail("Observe of %s: %v", name, err)
			}
		}
		c.add(o)
	}
}

// stock is a candidate by concurrency.Election, used as its documentation has it.
func (c *candidate) stock(ctx context.Context, name string, r *rand.Rand) {
	for ctx.Err() == nil {
		c.stockTerm(ctx, root+name, r)
		sleep(ctx, r, 100*time.Millisecond, 500*time.Millisecond)
	}
}

func (c *candidate) stockTerm(ctx context.Context, election string, r *rand.Rand) {
	lease, err := c.client.Grant(ctx, int64(c.TTL/time.Second))
	if err != nil {
		return
	}
	s, err := concurrency.NewSession(c.client, concurrency.WithLease(lease.ID))
	if err != nil {
		return
	}
	defer s.Close() //nolint:errcheck // then the lease expires: nobody renews it any more
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // a candidate without a lease is to give up
		select {
		case <-s.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	began := now()
	e := concurrency.NewElection(s, election)
	if e.Campaign(ctx, c.Name) != nil {
		return
	}
	c.add(Entry{Kind: Term, From: began, Election: election, Token: e.Rev(), Key: e.Key(), Lease: int64(s.Lease()), Op: "stock"})
	believes, stop := context.WithCancel(ctx)
	var sampler sync.WaitGroup
	sampler.Go(func() {
		c.sample(Entry{Election: election, Token: e.Rev(), Op: "stock"}, func() bool { return believes.Err() == nil })
	})
	tctx, done := context.WithTimeout(ctx, between(r, 300*time.Millisecond, 2*time.Second))
	defer done()
	w := &work{
		candidate: c, election: election, token: e.Rev(), rand: r, proclaim: func(string) {},
		guard: clientv3.Compare(clientv3.CreateRevision(e.Key()), "=", e.Rev()),
	}
	w.do(tctx)
	stop()
	sampler.Wait()
	c.add(Entry{Kind: Resigning, Election: election, Token: e.Rev()})
	rctx, end := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer end()
	_ = e.Resign(rctx) // else the key goes with the lease
}

// between is a random time from..to.
func between(r *rand.Rand, from, to time.Duration) time.Duration {
	return from + time.Duration(r.Int64N(int64(to-from)+1))
}

// sleep blocks for a random time from..to, or until ctx ends.
func sleep(ctx context.Context, r *rand.Rand, from, to time.Duration) {
	select {
	case <-time.After(between(r, from, to)):
	case <-ctx.Done():
	}
}

package queue

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader/internal/retry"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// errWatch is a watch that ended without saying why.
var errWatch = errors.New("watch ended")

const (
	// watchPatience is how long a watch may take to be created, before another one is tried on another
	// stream; each time it may take twice as long, up to maxWatchPatience.
	watchPatience    = time.Second
	maxWatchPatience = retry.RequestTimeout
)

// A wait is for a key to be gone.
type wait struct {
	q    *Queue
	loop *retry.Loop
	key  string
	rev  int64 // create revision

	reread time.Duration // interval at which the key is read again, beside the watch; 0: never
	ahead  bool          // find out whether nobody is before the key's candidate, once it is touched
	oldest bool          // it is known that nobody is

	tries int // to have a watch created

	own  *Deletion // of the candidate's own key; nil if nobody looks after it here
	rely func()    // begins a goroutine that does
}

// A Deletion is what watches for a key to be gone. Whoever has one calls Wait or Close, once.
//
// To save memory a candidate that waits looks after both keys, its own and the one before, in one goroutine.
// Before anything there may block it leaves its own key to another goroutine, for good.
type Deletion struct {
	watching *watching
	pending  func() (over bool, err error) // what has come already
}

// WatchDeletion begins to watch for the key with this create revision to be gone, until ctx ends.
func (q *Queue) WatchDeletion(ctx context.Context, loop *retry.Loop, key string, rev int64) *Deletion {
	w := &wait{q: q, loop: loop, key: key, rev: rev}
	return &Deletion{watching: w.open(ctx)}
}

// Wait blocks until the key is gone, and returns nil then, or until ctx ends or a request fails for good.
func (d *Deletion) Wait() error { return d.watching.wait.wait(d.watching, d.pending) }

// Close ends the watch.
func (d *Deletion) Close() { d.watching.close() }

// patience is how long a watch may take to be created. Where a stream takes an authentication, that may
// take long on an etcd with much to do, and another stream would only add to it.
func (q *Queue) patience(tries int) time.Duration {
	if q.client.Username != "" {
		return maxWatchPatience
	}
	return min(watchPatience<<min(tries, 10), maxWatchPatience)
}

// gone says what an event of the watch means.
//
// Here is the rule "an event counts only if it is newer than what it is about". The watch starts now,
// but at a member that lags that is in the past: it may tell of the deletion of an earlier key of the
// same name. Everything about the key that is awaited came after its creation. (A read needs no such
// rule: it is linearizable, and sent when the key was known to exist.)
func (w *wait) gone(ev *clientv3.Event) (gone, touched bool) {
	if ev.Kv.ModRevision <= w.rev {
		return false, false
	}
	if ev.Type == clientv3.EventTypeDelete || ev.Kv.CreateRevision != w.rev {
		return true, false
	}
	return false, true
}

// wait blocks until the key is gone, and returns nil then, or until the context of s ends or a request fails
// for good. s is the first watch; pending, if not nil, is what has come of it already.
func (w *wait) wait(s *watching, pending func() (over bool, err error)) error {
	for {
		lived, err := s.run(pending)
		if err == nil || errors.Is(err, ErrGone) { // the key that is awaited, or one's own
			return err
		}
		if s.ctx.Err() == nil {
			w.leaveOwn(nil)
		}
		if over, err := w.ended(s.ctx, lived, err); over {
			return err
		}
		s, pending = w.open(s.ctx), nil
	}
}

// ended deals with the end of a watch by err. over says that the key is gone, or with an error that the
// wait cannot go on.
func (w *wait) ended(ctx context.Context, lived time.Duration, err error) (over bool, _ error) {
	if lived > retry.RequestTimeout {
		w.loop.OK() // that was no part of a streak
	}
	// The error of a watch may be about others, with which it shares a stream. A read that is refused is about
	// the key.
	now, rerr := retry.Ask(ctx, w.q.client, w.loop.Failed, w.look)
	switch {
	case ctx.Err() != nil:
		return true, ctx.Err()
	case rerr != nil:
		return true, fmt.Errorf("read %q: %w", w.key, rerr)
	case now.gone:
		return true, nil
	}
	err = w.loop.Again(ctx, retry.Passing(fmt.Errorf("watch %q: %w", w.key, err)))
	return err != nil, err
}

// A sight is what a read of a key has found.
type sight struct {
	gone    bool
	touched bool // put again since it was created
}

func (w *wait) look(ctx context.Context) (sight, error) {
	resp, err := w.q.client.Get(ctx, w.key, clientv3.WithKeysOnly())
	if err != nil {
		return sight{}, err
	}
	if len(resp.Kvs) == 0 || resp.Kvs[0].CreateRevision != w.rev {
		return sight{gone: true}, nil
	}
	return sight{touched: resp.Kvs[0].Version > 1}, nil
}

// run is wait as long as one watch lives. It returns how long that was.
//
// The watch has no start revision, and the key is read once the watch exists: a watch that
// starts in the past, by a single revision even, is served by etcd's loop for slow watchers,
// up to 100 ms late. Neither that read nor a later one keeps an event waiting.
//
// Where it has to see a touch the watch gets puts, and so each value that the key's candidate proclaims.
// After the first one, another watch that gets no puts takes its place. The read that says whether nobody
// is before the candidate is sent when that one exists, so that it also shows that no end of the key was
// missed in between.
func (s *watching) run(pending func() (over bool, err error)) (lived time.Duration, err error) {
	defer s.close()
	over := false
	if pending != nil {
		over, err = pending()
	}
	for !over {
		over, err = s.step()
	}
	return s.current.lived(), err
}

// watching is one watch of what is awaited. It is apart from that, as what waits for hours in a goroutine must
// not be large: a stack shrinks no further than to four times of what is in use.
type watching struct {
	*wait
	ctx     context.Context
	beside  sync.WaitGroup // requests, and openings of watches
	ticker  *time.Ticker   // nil if the key is not to be read again
	current *opening
	looked  chan looking       // nil while the key is not being read
	unlook  context.CancelFunc // ends that read
	aheads  chan ahead         // nil while nobody looks ahead
	unahead context.CancelFunc // ends that
	next    *opening           // the watch that takes over then
	failing bool               // the last read of the key has failed, and is being repeated
}

// looking is what comes of a read of the key: failures, and in the end what it has found.
type looking struct {
	sight
	err error
	end bool
}

// ahead is what the look ahead has found.
type ahead struct {
	place Place
	err   error
}

func (w *wait) open(ctx context.Context) *watching {
	s := &watching{wait: w, ctx: ctx}
	s.current = s.watchKey(!w.ahead)
	if w.reread > 0 {
		s.ticker = time.NewTicker(w.reread)
	}
	return s
}

func (s *watching) close() {
	s.stopLooking()
	s.current.cancel()
	if s.next != nil {
		s.unahead()
		s.next.cancel()
	}
	s.beside.Wait()
	s.current.close()
	s.next.close()
	if s.ticker != nil {
		s.ticker.Stop()
	}
}

// again fires when the key is to be read again.
func (s *watching) again() <-chan time.Time {
	if s.ticker == nil {
		return nil
	}
	return s.ticker.C
}

// step deals with the next thing that happens. over says that the watch has ended with err or, if that is nil,
// that the key is gone.
func (s *watching) step() (over bool, err error) {
	own := none
	if s.own != nil {
		own = s.own.watching
	}
	select {
	case s.current.events = <-s.current.opened:
		s.current.opened = nil
	case resp, ok := <-s.current.events:
		return s.heard(&resp, ok)
	case found := <-s.looked:
		return s.lookedAside(found)
	case found := <-s.aheads:
		return s.lookedAhead(found)
	case <-s.again():
		s.lookAside()
	case own.current.events = <-own.current.opened:
		own.current.opened = nil
	case resp, ok := <-own.current.events:
		return s.heardOfOwn(&resp, ok)
	case found := <-own.looked:
		return s.lookedAtOwn(found)
	case <-s.ctx.Done():
		return true, s.ctx.Err()
	}
	return false, nil
}

// none is the watch of nobody's key.
var none = &watching{current: new(opening)}

// ownGone reports whether it has been told already that the candidate's own key is gone.
func (w *wait) ownGone() bool {
	for w.own != nil {
		own, over := w.own.watching, false
		select {
		case own.current.events = <-own.current.opened:
			own.current.opened = nil
		case resp, ok := <-own.current.events:
			over, _ = w.heardOfOwn(&resp, ok)
		case found := <-own.looked:
			over, _ = w.lookedAtOwn(found)
		default:
			return false
		}
		if over {
			return true
		}
	}
	return false
}

func (w *wait) heardOfOwn(resp *clientv3.WatchResponse, ok bool) (over bool, err error) {
	switch over, err := w.own.watching.heard(resp, ok); {
	case over && err == nil:
		return true, ErrGone
	case over:
		w.leaveOwn(func() (bool, error) { return true, err })
	}
	return false, nil
}

func (w *wait) lookedAtOwn(found looking) (over bool, err error) {
	own := w.own.watching
	if !found.end || found.err != nil {
		w.leaveOwn(func() (bool, error) { return own.lookedAside(found) })
		return false, nil
	}
	if over, _ := own.lookedAside(found); over {
		return true, ErrGone
	}
	return false, nil
}

// leaveOwn leaves the candidate's own key to another goroutine, as something may block here now. pending, if not
// nil, is what has come of that key's watch already.
func (w *wait) leaveOwn(pending func() (over bool, err error)) {
	if w.own == nil {
		return
	}
	w.own.pending = pending
	w.own = nil
	w.rely()
}

// heard deals with what the watch says.
func (s *watching) heard(resp *clientv3.WatchResponse, ok bool) (over bool, err error) {
	if !ok {
		return true, errWatch
	}
	if err := resp.Err(); err != nil {
		return true, err
	}
	touched := false
	for _, ev := range resp.Events {
		gone, t := s.gone(ev)
		if gone {
			return true, nil
		}
		touched = touched || t
	}
	if resp.Created {
		s.current.exists()
		s.tries = 0
		s.stopLooking() // a read that is under way may have found the key before it was watched
		s.lookAside()
	}
	if touched {
		s.lookAhead()
	}
	return false, nil
}

// lookAside reads the key beside the watch, if that is not being done.
func (s *watching) lookAside() {
	if s.looked != nil {
		return
	}
	ctx, cancel := context.WithCancel(s.ctx)
	looked := make(chan looking)
	s.looked, s.unlook = looked, cancel
	tell := func(l looking) {
		select {
		case looked <- l:
		case <-ctx.Done():
		}
	}
	s.beside.Go(func() {
		// Failures are noted where the watch is looked after, since what notes them is the user's logger.
		now, err := retry.Ask(ctx, s.q.client, func(err error) { tell(looking{err: err}) }, s.look)
		tell(looking{now, err, true})
	})
}

func (s *watching) stopLooking() {
	if s.looked != nil {
		s.unlook()
		s.looked, s.unlook = nil, nil
	}
}

func (s *watching) lookedAside(found looking) (over bool, err error) {
	if !found.end {
		s.failing = true
		s.leaveOwn(nil)
		s.loop.Failed(found.err) // the user's logger
		return false, nil
	}
	s.stopLooking()
	if found.gone || found.err != nil {
		return true, found.err
	}
	if s.failing {
		s.failing = false
		s.loop.OK()
	}
	if found.touched {
		s.lookAhead()
	}
	return false, nil
}

// lookAhead opens a watch that gets no puts and then reads who is before the key, unless that is known
// or being done.
func (s *watching) lookAhead() {
	if !s.ahead || s.next != nil {
		return
	}
	found := make(chan ahead, 1)
	next := s.watchKey(true)
	ctx, cancel := context.WithCancel(s.ctx)
	s.aheads, s.unahead, s.next = found, cancel, next
	s.beside.Go(func() {
		a := ahead{err: next.await(ctx)}
		if a.err == nil {
			rctx, cancel := context.WithTimeout(ctx, retry.RequestTimeout)
			defer cancel()
			a.place, a.err = s.q.behind(rctx, &retry.Loop{Client: s.q.client}, s.rev)
		}
		found <- a
	})
}

func (s *watching) lookedAhead(found ahead) (over bool, err error) {
	s.unahead()
	next := s.next
	s.aheads, s.unahead, s.next = nil, nil, nil
	if found.err == nil && found.place.First() {
		s.oldest, s.ahead, s.tries = true, false, 0
		s.current.close()
		s.current = next
		return false, nil
	}
	next.close()
	// The key may be gone. Otherwise the next touch is another chance.
	return errors.Is(found.err, ErrGone), nil
}

// watchKey opens a watch of the key, of its end alone if puts are filtered out.
func (s *watching) watchKey(filter bool) *opening {
	var opts []clientv3.OpOption
	if filter {
		opts = append(opts, clientv3.WithFilterPut())
	}
	return s.q.open(s.ctx, &s.beside, &s.tries, s.key, opts...)
}

// An opening is a watch that is being opened, or open.
type opening struct {
	opened  chan clientv3.WatchChan // nil once it has been received
	events  clientv3.WatchChan
	created time.Time
	cancel  context.CancelFunc
	stream  retry.Stream
	late    *time.Timer // ends a watch that is not created in time; nil once it is
	settled atomic.Bool // late is not to do so any more, though it may be about to
}

// open opens a watch that says when it has been created. That is done in a goroutine of its own, as it
// blocks until then, and takes a deep stack.
func (q *Queue) open(ctx context.Context, beside *sync.WaitGroup, tries *int, key string, opts ...clientv3.OpOption) *opening {
	patience := q.patience(*tries)
	*tries++
	stream := retry.StreamOf(q.client)
	wctx, cancel := stream.Watching(ctx)
	opened := make(chan clientv3.WatchChan, 1)
	o := &opening{opened: opened, cancel: cancel, stream: stream}
	beside.Go(func() {
		opened <- q.client.Watch(wctx, key, append(opts, clientv3.WithCreatedNotify())...)
	})
	began := time.Now()
	var late *time.Timer
	late = time.AfterFunc(time.Hour, func() {
		idle := o.stream.Idle(began)
		switch {
		case o.settled.Load():
		case idle >= patience:
			stream.Late()
			cancel()
		default:
			late.Reset(patience - idle)
		}
	})
	o.late = late
	late.Reset(patience)
	return o
}

// await blocks until the watch was created.
func (o *opening) await(ctx context.Context) error {
	select {
	case o.events = <-o.opened:
		o.opened = nil
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case resp, ok := <-o.events:
		if !ok {
			return errWatch
		}
		if err := resp.Err(); err != nil {
			return err
		}
		o.exists()
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// exists says that the watch was created.
func (o *opening) exists() {
	o.created = time.Now()
	o.settled.Store(true)
	o.stream.Created()
	o.late.Stop()
	o.late = nil
}

func (o *opening) close() {
	if o == nil {
		return
	}
	if o.late != nil {
		o.late.Stop()
	}
	o.cancel()
}

// lived is how long the watch has lived since it was created.
func (o *opening) lived() time.Duration {
	if o.created.IsZero() {
		return 0
	}
	return time.Since(o.created)
}

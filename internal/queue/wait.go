package queue

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"example.com/leader/internal/retry"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// errWatch is the error of a watch that ended without giving a reason.
var errWatch = errors.New("watch ended")

const (
	// watchPatience is how long a watch may take to be created before another one is tried on another stream. The time
	// doubles with each attempt, up to maxWatchPatience.
	watchPatience    = time.Second
	maxWatchPatience = retry.RequestTimeout
)

// A wait waits until a key is gone.
type wait struct {
	q    *Queue
	loop *retry.Loop
	key  string
	rev  int64 // create revision

	reread time.Duration // interval at which the key is read in addition to the watch; 0 means never
	ahead  bool          // once the key is touched, find out whether nobody is before its candidate
	byRead bool          // a read, not an event, has shown that the key is gone
	oldest bool          // it is known that nobody is before the key's candidate

	asks bool // the key is the candidate's own, so somebody may ask the candidate to step back

	tries int // how often a watch was opened without being created

	own  *Deletion // of the candidate's own key; nil if this goroutine does not watch it
	rely func()    // starts a goroutine that watches it
}

// A Deletion watches for the deletion of a key. Its owner must call Wait or Close, once.
//
// To save memory, a waiting candidate watches both keys, its own and the one before, in one goroutine. Before that
// goroutine does anything that may block, it hands the own key over to another goroutine, for good.
type Deletion struct {
	watching *watching
	pending  func() (over bool, err error) // handles what was received but not handled before that; may be nil
}

// WatchOwn starts to watch for the deletion of the candidate's own key, which has this create revision, and for a
// request to step back, until ctx ends.
func (q *Queue) WatchOwn(ctx context.Context, loop *retry.Loop, key string, rev int64) *Deletion {
	w := &wait{q: q, loop: loop, key: key, rev: rev, asks: true}
	return &Deletion{watching: w.open(ctx)}
}

// Wait blocks until the key is gone and returns nil. It returns [ErrAsked] if somebody asks the candidate to step back,
// and another error if ctx ends or a request fails for good.
func (d *Deletion) Wait() error { return d.watching.wait.wait(d.watching, d.pending) }

// Close ends the watch.
func (d *Deletion) Close() { d.watching.close() }

// patience returns how long a watch may take to be created. With a password a stream needs an authentication, which may
// take long on a busy etcd. Another stream would only add to the load, so then it is maxWatchPatience from the start.
func (q *Queue) patience(tries int) time.Duration {
	if q.client.Username != "" {
		return maxWatchPatience
	}
	return min(watchPatience<<min(tries, 10), maxWatchPatience)
}

// gone returns what an event of the watch means for the awaited key: it is gone, or it was touched.
//
// Rule: an event counts only if it is newer than what it is about. The watch starts from now, but at a member that lags
// this is in the past, so it may show the deletion of an earlier key of the same name. Every event about the awaited
// key has a larger revision than its creation. (A read needs no such rule: it is linearizable, and sent when the key is
// known to exist.)
func (w *wait) gone(ev *clientv3.Event) (gone, touched bool) {
	if ev.Kv.ModRevision <= w.rev {
		return false, false
	}
	// A put with another create revision means that the key was deleted and put again. The event of the deletion may be
	// missing: a watch that is resumed after a compaction does not get it.
	if ev.Type == clientv3.EventTypeDelete || ev.Kv.CreateRevision != w.rev {
		return true, false
	}
	return false, true
}

// wait blocks until the key is gone and returns nil. It returns [ErrGone] if the own key is gone, and another error if
// the context of s ends or a request fails for good. s is the first watch. pending, if not nil, handles what was
// received from it but not handled.
func (w *wait) wait(s *watching, pending func() (over bool, err error)) error {
	for {
		lived, err := s.run(pending)
		if err == nil || errors.Is(err, ErrGone) || errors.Is(err, ErrAsked) {
			return err
		}
		// watchEnded may block, in a request, a pause or the user's logger. If ctx has ended it does not, and the
		// caller of Wait closes the own key's Deletion.
		if s.ctx.Err() == nil {
			w.leaveOwn(nil)
		}
		if over, err := w.watchEnded(s.ctx, lived, err); over {
			return err
		}
		s, pending = w.open(s.ctx), nil
	}
}

// watchEnded handles the end of a watch by err. over with nil means that the key is gone, over with an error that the
// wait has failed.
func (w *wait) watchEnded(ctx context.Context, lived time.Duration, err error) (over bool, _ error) {
	if lived > retry.RequestTimeout {
		w.loop.Forget() // a watch that lived that long does not continue a streak of failures
	}
	// The watch's error may be about another watch on its stream, so it decides nothing. A read does: if it is refused,
	// that is about the key. It comes before the pause, because while no watch can be created, only reads find out that
	// the key is gone.
	now, rerr := retry.Ask(ctx, w.q.client, w.loop.Failed, w.read)
	switch {
	case ctx.Err() != nil:
		return true, ctx.Err()
	case rerr != nil:
		return true, fmt.Errorf("read %q: %w", w.key, rerr)
	case now.gone:
		w.byRead = true
		return true, nil
	case now.asked:
		return true, ErrAsked
	}
	err = w.loop.Retry(ctx, retry.Passing(fmt.Errorf("watch %q: %w", w.key, err)))
	return err != nil, err
}

func (w *wait) read(ctx context.Context) (keyReading, error) {
	if w.asks {
		return w.readOwn(ctx)
	}
	resp, err := w.q.client.Get(ctx, w.key, clientv3.WithKeysOnly())
	if err != nil {
		return keyReading{}, err
	}
	if len(resp.Kvs) == 0 || resp.Kvs[0].CreateRevision != w.rev {
		return keyReading{gone: true, end: true}, nil
	}
	return keyReading{touched: resp.Kvs[0].Version > 1, end: true}, nil
}

// readOwn reads the own key and what lies below it, with their values.
func (w *wait) readOwn(ctx context.Context) (keyReading, error) {
	resp, err := w.q.client.Get(ctx, w.key, clientv3.WithRange(w.key+"0"))
	if err != nil {
		return keyReading{}, err
	}
	found := keyReading{gone: true, end: true}
	for _, kv := range resp.Kvs {
		switch string(kv.Key) {
		case w.key:
			found.gone = kv.CreateRevision != w.rev
		case request(w.key):
			// One that was not withdrawn may be about an earlier term under the same key.
			found.asked = string(kv.Value) == strconv.FormatInt(w.rev, 10)
		}
	}
	return found, nil
}

// run waits as long as one watch lives, and returns how long that was. A nil error means that the key is gone, ErrGone
// that the own key is.
//
// The watch has no start revision. If it started in the past, even by a single revision, etcd's loop for slow watchers
// would serve it, up to 100 ms late. So the key is read once the watch exists. Events do not wait for that read, nor
// for any other.
//
// If the watch has to see a touch it gets puts, and with them each value that the key's candidate proclaims. After the
// first put a second watch is opened, which gets no puts. When the second watch exists, a read finds out whether nobody
// is before the key's candidate. If so, the second watch replaces the first. The order matters: the read also shows
// that the key still existed when the second watch did, so no deletion was missed in between.
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

// A watching is one watch of the awaited key. It is a type of its own, on the heap, because a goroutine that waits for
// hours must have a small stack: a stack shrinks only to four times what is in use.
type watching struct {
	*wait
	ctx     context.Context
	beside  sync.WaitGroup // goroutines that send requests or open watches
	ticker  *time.Ticker   // nil if the key is not read at intervals
	current *opening
	next    *opening // the second watch; replaces current when the place is known

	// The answers to requests beside the watch, each nil while there is no such request, and the functions that end
	// them.
	keyReadings   chan keyReading
	stopKey       context.CancelFunc
	placeReadings chan placeReading
	stopPlace     context.CancelFunc

	failing bool // an attempt to read the key has failed, and none has succeeded since
}

// A keyReading is what comes of reading the key: failures, and in the end what was found.
type keyReading struct {
	gone    bool
	touched bool // put again since it was created
	asked   bool // its candidate is asked to step back
	err     error
	end     bool
}

// A placeReading is the place of the key's candidate.
type placeReading struct {
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

// close ends all requests and watches, and waits for them. It cancels the watches before it waits, because opening one
// blocks until it is created or cancelled. It closes them after that: until then a goroutine may be in next.await.
func (s *watching) close() {
	s.stopReading()
	s.current.cancel()
	if s.next != nil {
		s.stopPlace()
		s.next.cancel()
	}
	s.beside.Wait()
	s.current.close()
	s.next.close()
	if s.ticker != nil {
		s.ticker.Stop()
	}
}

// rereadDue returns a channel that receives when the key must be read again.
func (s *watching) rereadDue() <-chan time.Time {
	if s.ticker == nil {
		return nil
	}
	return s.ticker.C
}

// step handles the next thing that happens. over says that the watch has ended with err or, if err is nil, that the key
// is gone.
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
	case found := <-s.keyReadings:
		return s.keyRead(found)
	case found := <-s.placeReadings:
		return s.placeRead(found)
	case <-s.rereadDue():
		s.readKey()
	case own.current.events = <-own.current.opened:
		own.current.opened = nil
	case resp, ok := <-own.current.events:
		return s.ownHeard(&resp, ok)
	case found := <-own.keyReadings:
		return s.ownKeyRead(found)
	case <-s.ctx.Done():
		return true, s.ctx.Err()
	}
	return false, nil
}

// none stands for the own key's watch if this goroutine has none. Its channels are nil, so select ignores them.
var none = &watching{current: new(opening)}

// ownOver returns [ErrGone] or [ErrAsked] if the news that the candidate's own key is gone, or that it is asked to step
// back, has arrived already, else nil. It does not block.
func (w *wait) ownOver() error {
	for w.own != nil { // until nothing more has arrived: the deletion may be behind other things
		own, over := w.own.watching, false
		var err error
		select {
		case own.current.events = <-own.current.opened:
			own.current.opened = nil
		case resp, ok := <-own.current.events:
			over, err = w.ownHeard(&resp, ok)
		case found := <-own.keyReadings:
			over, err = w.ownKeyRead(found)
		default:
			return nil
		}
		if over {
			return err
		}
	}
	return nil
}

// ownHeard is heard for the own key. If that key's watch has ended it leaves the key to the other goroutine, because
// opening another watch includes requests and pauses.
func (w *wait) ownHeard(resp *clientv3.WatchResponse, ok bool) (over bool, err error) {
	switch over, err := w.own.watching.heard(resp, ok); {
	case over && err == nil:
		return true, ErrGone
	case over:
		w.leaveOwn(func() (bool, error) { return true, err })
	}
	return false, nil
}

// ownKeyRead is keyRead for the own key. It leaves a failure to the other goroutine, because the logger may block.
func (w *wait) ownKeyRead(found keyReading) (over bool, err error) {
	own := w.own.watching
	if !found.end || found.err != nil {
		w.leaveOwn(func() (bool, error) { return own.keyRead(found) })
		return false, nil
	}
	if over, err := own.keyRead(found); over {
		return true, cmp.Or(err, ErrGone)
	}
	return false, nil
}

// leaveOwn hands the candidate's own key over to another goroutine, because this one may block now. pending, if not
// nil, handles what was received for that key and not handled yet.
func (w *wait) leaveOwn(pending func() (over bool, err error)) {
	if w.own == nil {
		return
	}
	w.own.pending = pending
	w.own = nil
	w.rely() // last: from here on the Deletion belongs to the other goroutine
}

// heard handles a response of the watch.
func (s *watching) heard(resp *clientv3.WatchResponse, ok bool) (over bool, err error) {
	if !ok {
		return true, errWatch
	}
	if err := s.current.failed(resp); err != nil {
		return true, err
	}
	touched, asked := false, false
	for _, ev := range resp.Events {
		if key := string(ev.Kv.Key); s.asks && key != s.key {
			asked = asked || key == request(s.key) && ev.Type == clientv3.EventTypePut
			continue
		}
		gone, t := s.gone(ev)
		if gone { // wins over a touch in the same response
			return true, nil
		}
		touched = touched || t
	}
	if resp.Created {
		s.current.exists()
		s.tries = 0
	}
	// The event of a request does not count: a watch that is resumed repeats it, though the request was withdrawn, or was
	// about an earlier term. A read that is sent now does.
	if resp.Created || asked {
		s.stopReading() // a read that is under way may have found the key before it was watched, and deleted since
		s.readKey()
	}
	if touched {
		s.readPlace()
	}
	return false, nil
}

// readKey starts a read of the key beside the watch, unless one is under way.
func (s *watching) readKey() {
	if s.keyReadings != nil {
		return
	}
	ctx, cancel := context.WithCancel(s.ctx)
	readings := make(chan keyReading)
	s.keyReadings, s.stopKey = readings, cancel
	tell := func(l keyReading) {
		select {
		case readings <- l:
		case <-ctx.Done():
		}
	}
	s.beside.Go(func() {
		// Failures are noted in the goroutine that runs step, because noting them calls the user's logger.
		now, err := retry.Ask(ctx, s.q.client, func(err error) { tell(keyReading{err: err}) }, s.read)
		now.err, now.end = err, true
		tell(now)
	})
}

// stopReading ends the read of the key that is under way, if any. Its result is dropped.
func (s *watching) stopReading() {
	if s.keyReadings != nil {
		s.stopKey()
		s.keyReadings, s.stopKey = nil, nil
	}
}

// keyRead handles a message from the read of the key.
func (s *watching) keyRead(found keyReading) (over bool, err error) {
	if !found.end {
		s.failing = true
		s.leaveOwn(nil)
		s.loop.Failed(found.err) // calls the user's logger, which may block
		return false, nil
	}
	s.stopReading()
	if found.gone || found.err != nil {
		s.byRead = found.gone
		return true, found.err
	}
	if found.asked {
		return true, ErrAsked
	}
	if s.failing || s.loop.Last() != nil && s.current.lived() > retry.RequestTimeout {
		s.failing = false
		s.leaveOwn(nil) // OK may call the logger, too
		s.loop.OK()
	}
	if found.touched { // the touch may have come before the watch
		s.readPlace()
	}
	return false, nil
}

// readPlace looks ahead: it opens a watch that gets no puts, and then reads who is before the key's candidate. It does
// nothing if that is known or under way.
func (s *watching) readPlace() {
	if !s.ahead || s.next != nil {
		return
	}
	found := make(chan placeReading, 1)
	next := s.watchKey(true)
	ctx, cancel := context.WithCancel(s.ctx)
	s.placeReadings, s.stopPlace, s.next = found, cancel, next
	s.beside.Go(func() {
		a := placeReading{err: next.await(ctx)}
		if a.err == nil {
			// A failure is not reported: the look ahead only saves the read after the election.
			rctx, cancel := context.WithTimeout(ctx, retry.RequestTimeout)
			defer cancel()
			a.place, a.err = s.q.behind(rctx, &retry.Loop{Client: s.q.client}, s.rev)
		}
		found <- a
	})
}

// placeRead handles the result of a look ahead.
func (s *watching) placeRead(found placeReading) (over bool, err error) {
	s.stopPlace()
	next := s.next
	s.placeReadings, s.stopPlace, s.next = nil, nil, nil
	if found.err == nil && found.place.First() {
		s.oldest, s.ahead, s.tries = true, false, 0
		s.current.close()
		s.current = next
		return false, nil
	}
	// The first watch stays, because it sees the next touch, which is another chance. If the read has found that the
	// key is gone, the wait is over.
	next.close()
	s.byRead = errors.Is(found.err, ErrGone)
	return s.byRead, nil
}

// watchKey opens a watch of the key. With filter it gets no puts, only the deletion.
func (s *watching) watchKey(filter bool) *opening {
	var opts []clientv3.OpOption
	switch {
	case s.asks: // the key, and what lies below it
		opts = append(opts, clientv3.WithRange(s.key+"0"))
	case filter:
		opts = append(opts, clientv3.WithFilterPut())
	}
	return s.q.open(s.ctx, &s.beside, &s.tries, s.key, opts...)
}

// An opening is a watch that is being opened, or open.
type opening struct {
	opened  chan clientv3.WatchChan // nil once events was received from it
	events  clientv3.WatchChan      // nil before that
	created time.Time               // zero until then
	cancel  context.CancelFunc
	stream  retry.Stream
	late    *time.Timer // ends the watch if it is not created in time; nil once it is
	settled atomic.Bool // the watch was created: late must not end it, even if it has fired already
}

// open opens a watch that sends a response when it has been created. Watch is called in a goroutine of its own, because
// it blocks until then and needs a deep stack.
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
	// The function uses late, so the timer is set to its real time only after late has been assigned.
	var late *time.Timer
	late = time.AfterFunc(time.Hour, func() {
		idle := o.stream.Idle(began)
		switch {
		case o.settled.Load():
		case idle >= patience:
			// Before cancel, so that the next watch is opened on another stream.
			stream.Late()
			cancel()
		default: // other watches of the stream were created meanwhile, so this one only waits for its turn
			late.Reset(patience - idle)
		}
	})
	o.late = late
	late.Reset(patience)
	return o
}

// await blocks until the watch has been created.
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
		if err := o.failed(&resp); err != nil {
			return err
		}
		o.exists()
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// failed returns why the watch has ended, if resp says so. etcd checks the auth token of a stream at each watch, and a
// stream keeps the token with which it was opened for as long as any watch is on it. So if that has expired, the next
// watch is opened on another stream.
func (o *opening) failed(resp *clientv3.WatchResponse) error {
	err := resp.Err()
	if retry.Unauthenticated(err) {
		o.stream.Late()
	}
	return err
}

// exists notes that the watch has been created.
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

// lived returns how long ago the watch was created, or 0 if it was not.
func (o *opening) lived() time.Duration {
	if o.created.IsZero() {
		return 0
	}
	return time.Since(o.created)
}

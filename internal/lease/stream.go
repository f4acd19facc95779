package lease

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"time"

	"example.com/leader/internal/retry"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/namespace"
)

// A keeper sends the renewals of all sessions of one client over one stream. KeepAliveOnce would open a
// stream for each, and clientv3 authenticates for each stream, by user and password: a password hash
// and a raft entry at etcd (etcd#15764).
//
// etcd answers the requests of a stream one after another, so answers are matched to requests by their
// order. A stream that has not answered in time gets no more requests: the next one opens another, at
// the next endpoint. Those who still wait for an answer of the old one go on to do so.
type keeper struct {
	client *clientv3.Client
	users  int // guarded by keepers.mu

	mu      sync.Mutex
	streams []*stream // for the next request; none if that has to open one
	failed  bool      // the last one was given up
	running int       // streams that have not ended
	closed  bool
	ended   chan struct{} // closed when it is closed and no stream is running
}

// keepers are the keepers in use. They belong to clients, which have no room for them.
var keepers = struct {
	mu sync.Mutex
	of map[*clientv3.Client]*keeper
}{of: make(map[*clientv3.Client]*keeper)}

// plainLeases are the types of Lease that send renewals as they are. Whoever has wrapped another around
// them wants to see them, and so does a client without a connection of its own: these renew by
// KeepAliveOnce.
var plainLeases = map[reflect.Type]bool{
	reflect.TypeOf(clientv3.NewLeaseFromLeaseClient(nil, nil, 0)): true,
	reflect.TypeOf(namespace.NewLease(nil, "")):                   true,
}

// keeperOf returns the client's keeper, to be released, or nil if it must renew by KeepAliveOnce.
func keeperOf(client *clientv3.Client) *keeper {
	if client.ActiveConnection() == nil || !plainLeases[reflect.TypeOf(client.Lease)] {
		return nil
	}
	keepers.mu.Lock()
	defer keepers.mu.Unlock()
	k := keepers.of[client]
	if k == nil {
		k = &keeper{client: client, ended: make(chan struct{})}
		keepers.of[client] = k
	}
	k.users++
	return k
}

// release ends the stream after the last user, who waits for what it returns.
func (k *keeper) release() (ended <-chan struct{}) {
	keepers.mu.Lock()
	k.users--
	last := k.users == 0
	if last {
		delete(keepers.of, k.client)
	}
	keepers.mu.Unlock()
	if !last {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	for _, st := range k.streams {
		st.cancel()
	}
	if k.running == 0 {
		close(k.ended)
	}
	return k.ended
}

// renew sends one renewal and waits for its answer or until ctx ends.
func (k *keeper) renew(ctx context.Context, id clientv3.LeaseID) (acknowledgement, error) {
	streams, opened := k.current()
	resp, err := k.ask(ctx, id, streams)
	if err != nil && !opened && ctx.Err() == nil && !retry.Permanent(err) {
		// It may have ended since the last renewal: a member was restarted, a token has expired.
		streams, _ = k.current()
		resp, err = k.ask(ctx, id, streams)
	}
	if err != nil {
		return acknowledgement{}, rpctypes.Error(err)
	}
	return acknowledgement{max(resp.TTL, 0), resp.GetHeader().GetRaftTerm()}, nil
}

// ask sends a renewal over each of the streams. Only the first that answers is used again.
func (k *keeper) ask(ctx context.Context, id clientv3.LeaseID, streams []*stream) (*pb.LeaseKeepAliveResponse, error) {
	type result struct {
		st   *stream
		resp *pb.LeaseKeepAliveResponse
		err  error
	}
	var asking sync.WaitGroup
	defer asking.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan result, len(streams))
	for _, st := range streams {
		asking.Go(func() {
			resp, err := st.renew(ctx, id)
			results <- result{st, resp, err}
		})
	}
	var err error
	for range streams {
		r := <-results
		if r.err == nil {
			k.keep(r.st)
			return r.resp, nil
		}
		err = r.err
	}
	k.fail(streams)
	return nil, err
}

// current returns the streams to use, and whether they were opened for that.
func (k *keeper) current() (streams []*stream, opened bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.streams = slices.DeleteFunc(k.streams, func(st *stream) bool { return st.ctx.Err() != nil })
	opened = len(k.streams) == 0
	open := 0
	if k.failed {
		open = k.besideLocked()
	} else if opened {
		open = 1
	}
	k.failed = false
	for range open {
		k.streams = append(k.streams, k.openLocked())
	}
	return slices.Clone(k.streams), opened
}

// maxOpening is how long a stream may take to be opened before others are opened in its place.
const maxOpening = retry.RequestTimeout

// besideLocked returns how many streams to open after a failure, together and beside those that have
// not answered.
//
// The endpoint whose turn it is may be the one that does not answer, so others are asked at the same
// time. With a password each stream takes two requests, and round robin sends the authentication to one
// endpoint and the stream to the next: of two endpoints, one of them dark, one stream alone would
// always meet that one. Of three streams one does not, if they are opened together: their
// authentications come first, and then an odd number of requests lies between its own two.
//
// Streams that have not answered stay in use until another one has: etcd may be slow, and an
// authentication may take longer than an attempt to renew. To give them up and to authenticate again
// would make a slow etcd slower. So as many authentications are under way at most, and as many streams
// are kept that are open and do not answer.
func (k *keeper) besideLocked() int {
	want := 1
	if len(k.client.Endpoints()) > 1 {
		if want = 2; k.client.Username != "" {
			want = 3
		}
	}
	opening := 0
	k.streams = slices.DeleteFunc(k.streams, func(st *stream) bool {
		if !st.opening() {
			return false
		}
		if time.Since(st.began) > maxOpening {
			st.cancel() // its authentication has met an endpoint that does not answer
			return true
		}
		opening++
		return false
	})
	silent := len(k.streams) - opening
	k.streams = slices.DeleteFunc(k.streams, func(st *stream) bool {
		if silent <= want || st.opening() {
			return false
		}
		silent--
		st.retire()
		return true
	})
	return max(0, want-opening)
}

// warm opens the first stream before it is needed.
func (k *keeper) warm() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.streams) == 0 {
		k.streams = append(k.streams, k.openLocked())
	}
}

func (k *keeper) openLocked() *stream {
	st := &stream{began: time.Now(), requests: make(chan *call), ended: make(chan struct{})}
	st.ctx, st.cancel = context.WithCancel(retry.RequireLeader(k.client.Ctx()))
	k.running++
	go func() {
		st.run(k.client)
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.running--; k.running == 0 && k.closed {
			close(k.ended)
		}
	}()
	return st
}

// keep makes the next request use a stream that has answered, and no other.
func (k *keeper) keep(st *stream) {
	k.mu.Lock()
	var others []*stream
	if slices.Contains(k.streams, st) {
		others = slices.DeleteFunc(k.streams, func(other *stream) bool { return other == st })
		k.streams = []*stream{st}
	}
	k.mu.Unlock()
	for _, other := range others {
		other.retire()
	}
}

// fail makes the next request try other streams too, if none of these has answered and no other was
// opened since.
func (k *keeper) fail(asked []*stream) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if n := len(k.streams); n == 0 || slices.Contains(asked, k.streams[n-1]) {
		k.failed = true
	}
}

// A stream is one LeaseKeepAlive of etcd.
type stream struct {
	ctx      context.Context
	cancel   context.CancelFunc
	began    time.Time
	requests chan *call
	ended    chan struct{} // closed when run has returned; err is set by then

	mu      sync.Mutex
	open    bool    // it has been opened
	sent    []*call // without an answer, in their order
	waiting int     // calls that somebody waits for
	retired bool
	err     error // why it has ended
}

// A call is one renewal on a stream.
type call struct {
	id     clientv3.LeaseID
	answer chan answer // has room for one
}

type answer struct {
	resp *pb.LeaseKeepAliveResponse
	err  error
}

// errEnded is what a call gets when its stream has ended, and not because of it.
var errEnded = errors.New("the stream of renewals has ended")

func (st *stream) renew(ctx context.Context, id clientv3.LeaseID) (*pb.LeaseKeepAliveResponse, error) {
	st.mu.Lock()
	st.waiting++
	st.mu.Unlock()
	defer func() {
		st.mu.Lock()
		st.waiting--
		st.endIfUnusedLocked()
		st.mu.Unlock()
	}()
	c := &call{id: id, answer: make(chan answer, 1)}
	select {
	case st.requests <- c:
	case <-st.ended:
		return nil, st.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case a := <-c.answer:
		return a.resp, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// opening reports whether the stream is being opened, which may take an authentication.
func (st *stream) opening() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return !st.open && st.err == nil
}

func (st *stream) retire() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.retired = true
	st.endIfUnusedLocked()
}

func (st *stream) endIfUnusedLocked() {
	if st.retired && st.waiting == 0 {
		st.cancel()
	}
}

// run opens the stream and sends what is asked of it until it ends.
func (st *stream) run(client *clientv3.Client) {
	var receiving sync.WaitGroup
	defer close(st.ended)
	defer receiving.Wait()
	defer st.cancel()
	rpc, err := pb.NewLeaseClient(client.ActiveConnection()).LeaseKeepAlive(st.ctx)
	if err != nil {
		st.fail(err)
		return
	}
	st.mu.Lock()
	st.open = true
	st.mu.Unlock()
	receiving.Go(func() {
		for {
			resp, err := rpc.Recv()
			if err == nil {
				err = st.answered(resp)
			}
			if err != nil {
				st.fail(err)
				return
			}
		}
	})
	for {
		select {
		case c := <-st.requests:
			st.mu.Lock()
			st.sent = append(st.sent, c)
			failed := st.err
			st.mu.Unlock()
			if failed == nil {
				_ = rpc.Send(&pb.LeaseKeepAliveRequest{ID: int64(c.id)}) // Recv tells the error
			} else {
				c.answer <- answer{err: errEnded}
			}
		case <-st.ctx.Done():
			return
		}
	}
}

// answered gives an answer to the oldest request that has none.
func (st *stream) answered(resp *pb.LeaseKeepAliveResponse) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.sent) == 0 || int64(st.sent[0].id) != resp.ID {
		return fmt.Errorf("an answer about lease %x that was not asked for", resp.ID)
	}
	st.sent[0].answer <- answer{resp: resp}
	st.sent = st.sent[1:]
	return nil
}

// fail ends the stream. The error is about the oldest request, as etcd deals with one at a time; it may
// be about all, and for the others it heals.
func (st *stream) fail(err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.err == nil {
		st.err = retry.Passing(fmt.Errorf("%w: %w", errEnded, err))
		for i, c := range st.sent {
			if i > 0 {
				err = st.err
			}
			c.answer <- answer{err: err}
		}
		st.sent = nil
	}
	st.cancel()
}

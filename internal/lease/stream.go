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

// A keeper sends the renewals of all sessions of one client over one stream. KeepAliveOnce would open a stream for each
// renewal. For each stream, a client with a password authenticates again, which costs etcd a password hash and a raft
// entry (etcd#15764).
//
// etcd answers the requests of a stream in their order, so answers are matched to requests by that order. If a stream
// has not answered in time, the next renewal opens others beside it, at the next endpoints, and is sent over all of
// them. The first stream that answers is kept. The others end when nobody waits for their answers any more.
type keeper struct {
	client *clientv3.Client
	users  int // guarded by keepers.mu

	mu      sync.Mutex
	streams []*stream // for the next renewal; if there is none, it opens one
	failed  bool      // none of the streams answered the last renewal
	running int       // streams that have not ended
	closed  bool
	ended   chan struct{} // closed when the keeper is closed and no stream is running
}

// keepers holds the keeper of each client that has one.
var keepers = struct {
	mu sync.Mutex
	of map[*clientv3.Client]*keeper
}{of: make(map[*clientv3.Client]*keeper)}

// plainLeases are the types of Lease that a keeper may bypass, because they send renewals unchanged. If the user has
// wrapped such a Lease, the wrapper must see the renewals, so they are sent by KeepAliveOnce. The same goes for a
// client without a connection of its own.
var plainLeases = map[reflect.Type]bool{
	reflect.TypeOf(clientv3.NewLeaseFromLeaseClient(nil, nil, 0)): true,
	reflect.TypeOf(namespace.NewLease(nil, "")):                   true,
}

// keeperOf returns the client's keeper, or nil if the client must renew by KeepAliveOnce. The caller must release it.
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

// release gives the keeper back. The last user ends the streams, and must wait until the returned channel is closed.
// For the others the channel is nil.
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

// renew sends one renewal and waits until it is answered or ctx ends.
func (k *keeper) renew(ctx context.Context, id clientv3.LeaseID) (acknowledgement, error) {
	streams, opened := k.current()
	resp, err := k.ask(ctx, id, streams)
	if err != nil && !opened && ctx.Err() == nil && (errors.Is(err, errEnded) || !retry.Permanent(err)) {
		// The streams may have ended since the last renewal: a member was restarted, or a token has expired. That must
		// not cost an attempt.
		streams, _ = k.current()
		resp, err = k.ask(ctx, id, streams)
	}
	if err != nil {
		return acknowledgement{}, rpctypes.Error(err)
	}
	return acknowledgement{max(resp.TTL, 0), resp.GetHeader().GetRaftTerm()}, nil
}

// ask sends a renewal over each of the streams and returns the first answer. Only the stream that gave it is used
// again.
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

// current returns the streams to use. opened says that there were none before, so all of them are new.
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

// maxOpening is how long opening a stream may take before others are opened in its place.
const maxOpening = retry.RequestTimeout

// besideLocked returns how many streams to open after a failure: all at once, beside those that have not answered.
//
// With one endpoint it wants one. With several it wants two, because the endpoint whose turn it is may be the dark one.
//
// With several endpoints and a password it wants three. Then opening a stream takes two requests, and round robin sends
// the authentication to one endpoint and the stream to the next. If one of two endpoints is dark, a stream that is
// opened alone meets it with one of its two requests. Of three streams that are opened at once, one avoids it: the
// three authentications come first, and then an odd number of requests lies between its own two, so both go to the same
// endpoint.
//
// Streams that have not answered stay in use until another one has answered: etcd may be slow, and an authentication
// may take longer than an attempt to renew. Giving them up and authenticating again would make a slow etcd slower. So
// at most as many streams as it wants are being opened at a time, and at most as many are kept that are open and do not
// answer.
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
			st.cancel() // its authentication was sent to a dark endpoint
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

// keep makes the next renewal use a stream that has answered, and no other.
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

// fail makes the next renewal open other streams too, because none of these has answered. If other streams were opened
// meanwhile, it does nothing: several renewals that fail together must not each open more.
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
	sent    []*call // requests without an answer, in the order in which they were sent
	waiting int     // calls that somebody waits for
	retired bool    // ends when nobody waits for a call any more
	err     error   // why it has ended
}

// A call is one renewal on a stream.
type call struct {
	id     clientv3.LeaseID
	answer chan answer // has room for one, so that nobody blocks if the caller has left
}

type answer struct {
	resp *pb.LeaseKeepAliveResponse
	err  error
}

// errEnded is the error of a call whose stream ended for another reason than this call.
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

// opening reports whether the stream is still being opened, which may include an authentication.
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

// run opens the stream and sends the requests until the stream ends.
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
				_ = rpc.Send(&pb.LeaseKeepAliveRequest{ID: int64(c.id)}) // Recv returns the error
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
		return fmt.Errorf("etcd sent an answer for lease %x, which was not asked for", resp.ID)
	}
	st.sent[0].answer <- answer{resp: resp}
	st.sent = st.sent[1:]
	return nil
}

// fail ends the stream. err goes to the oldest request, because etcd handles one at a time. The others get errEnded,
// which is sent again whatever err is, although err may concern them as well.
func (st *stream) fail(err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.err == nil {
		st.err = fmt.Errorf("%w: %w", errEnded, err)
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

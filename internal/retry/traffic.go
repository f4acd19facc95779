package retry

import (
	"context"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"
	"weak"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
)

// traffic is what the requests and watches of one client know of each other. It lives as long as the client.
//
// It limits how many attempts are sent while an earlier attempt of the same request waits. An etcd that is slow because
// it has too many requests must not get several times as many. So each such attempt takes a token. Each answer adds
// half a token, and each second adds ten. If one of several endpoints is dark, the others answer, so there are tokens.
type traffic struct {
	waiting int // attempts of [Ask] that have no answer
	tokens  float64
	filled  time.Time                     // when the tokens that come with time were last added
	stream  int                           // number of the stream on which new watches are opened
	created [watchStreams]time.Time       // when the last watch was created on each stream
	streams [watchStreams]context.Context // metadata of each stream, shared by all its watches to save memory

	// Used by mayReset.
	begun     time.Time // when gRPC was first seen to make its connections; zero while it is idle
	connected bool      // one of them is ready or has failed, or maxBegin has passed
	endpoints []string  // the client's, when reset was set
	reset     time.Time // when minReset last began
}

const (
	minTokens       = 16 // how many there are at first; their limit is never lower
	tokensPerSecond = 10
	tokensPerAnswer = 0.5
)

// traffics holds the traffic of each client, and the mutex that guards all of them.
var traffics = struct {
	mu sync.Mutex
	of map[weak.Pointer[clientv3.Client]]*traffic
}{of: make(map[weak.Pointer[clientv3.Client]]*traffic)}

func trafficOf(client *clientv3.Client) *traffic {
	key := weak.Make(client)
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	t := traffics.of[key]
	if t == nil {
		t = &traffic{tokens: minTokens, filled: time.Now()}
		traffics.of[key] = t
		runtime.AddCleanup(client, forget, key)
	}
	return t
}

// forget removes the traffic of a client that was garbage-collected.
func forget(key weak.Pointer[clientv3.Client]) {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	delete(traffics.of, key)
}

// send reports whether an attempt may be sent, and counts it if so. beside says that an earlier attempt of the same
// request waits: then it takes a token, and is refused if there is none.
func (t *traffic) send(beside bool) bool {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	if beside {
		now := time.Now()
		t.fillLocked(now.Sub(t.filled).Seconds() * tokensPerSecond)
		t.filled = now
		if t.tokens < 1 {
			return false
		}
		t.tokens--
	}
	t.waiting++
	return true
}

// ended counts an attempt that has ended, with an answer or without.
func (t *traffic) ended(answered bool) {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	if answered {
		t.fillLocked(tokensPerAnswer)
	}
	t.waiting--
}

func (t *traffic) fillLocked(tokens float64) {
	t.tokens = min(t.tokens+tokens, max(minTokens, float64(t.waiting)))
}

const (
	// minReset is the least time between two resets of gRPC's connections.
	minReset = 100 * time.Millisecond

	// maxBegin is how long gRPC is given to make its connections while none of them is ready or has failed.
	maxBegin = time.Second
)

// mayReset reports whether gRPC may be told now to connect again. gRPC then goes through its connections without a lock
// (grpc/grpc-go#9155), so none may be added or removed meanwhile, or the program crashes. That could happen when the
// client begins to connect, and when somebody changes its endpoints.
func (t *traffic) mayReset(state connectivity.State, endpoints []string) bool {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	now := time.Now()
	switch state {
	case connectivity.Idle:
		t.begun, t.connected = time.Time{}, false
	case connectivity.Connecting:
		if t.begun.IsZero() {
			t.begun = now
		}
		t.connected = t.connected || now.Sub(t.begun) >= maxBegin
	default:
		t.connected = true
	}
	if now.Sub(t.reset) < minReset {
		return false
	}
	t.reset = now
	if !slices.Equal(t.endpoints, endpoints) {
		// gRPC may be changing its connections right now. The next reset is possible after minReset.
		t.endpoints = endpoints
		return false
	}
	return t.connected
}

// watchStreams is how many streams of watches the library may open for a client. Usually it opens one.
const watchStreams = 4

// A Stream is one of the streams that the watches of a client share.
//
// A stream stays at one endpoint, which may have stopped answering. It may also be stuck for good: if a watch is
// refused while the only other one ends, clientv3 3.7.3 neither ends the stream nor creates another watch on it
// (watchGRPCStream.run). So once a watch was not created in time, all later watches are opened on another stream.
type Stream struct {
	client  *clientv3.Client
	traffic *traffic
	number  int // it only grows; numbers that are equal modulo watchStreams mean the same stream
}

// StreamOf returns the stream on which to open a watch.
func StreamOf(client *clientv3.Client) Stream {
	t := trafficOf(client)
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	return Stream{client, t, t.stream}
}

// Late reports that a watch was not created in time on the stream. No more watches are opened on it until all other
// streams were late, too. Several late watches of one stream count as one, so that no stream is skipped.
func (s Stream) Late() {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	s.traffic.stream = max(s.traffic.stream, s.number+1)
}

// Watching returns a context for a watch on the stream. It ends with ctx and when cancel is called. A member that knows
// no raft leader ends the watch. The values and the outgoing metadata of ctx do not reach the watch, because clientv3
// opens one stream for each set of metadata and shares it among the watches.
func (s Stream) Watching(ctx context.Context) (watching context.Context, cancel func()) {
	ctx, cancel = context.WithCancel(ctx)
	return valuesOf{ctx, s.values()}, cancel
}

// values returns a context with the metadata of the stream.
func (s Stream) values() context.Context {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	number := s.number % watchStreams
	values := &s.traffic.streams[number]
	if *values == nil {
		*values = RequireLeader(s.client.Ctx())
		if number > 0 {
			*values = metadata.AppendToOutgoingContext(*values, "leader-watch-stream", strconv.Itoa(number))
		}
	}
	return *values
}

// Created reports that a watch was created on the stream.
func (s Stream) Created() {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	s.traffic.created[s.number%watchStreams] = time.Now()
}

// Idle returns for how long no watch has been created on the stream, counted from since or from the last creation,
// whichever is later. clientv3 creates the watches of a stream one by one, so while others are created, a watch only
// waits for its turn.
func (s Stream) Idle(since time.Time) time.Duration {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	if last := s.traffic.created[s.number%watchStreams]; last.After(since) {
		since = last
	}
	return time.Since(since)
}

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

// traffic is what the requests and watches of one client know of each other. It lasts as long as the client.
//
// It limits how many attempts are sent beside others. An etcd that is slow, since much is asked of it,
// must not be asked for a multiple of that. So each such attempt takes a token, and there is half a
// token for each answer, and some a second: where one endpoint of several is dark the others answer,
// and so there are tokens.
type traffic struct {
	waiting int // attempts of [Ask] that have no answer
	tokens  float64
	filled  time.Time                     // when tokens had all that time brings
	stream  int                           // number of that on which watches are opened at the moment
	created [watchStreams]time.Time       // when a watch was created last on each stream
	streams [watchStreams]context.Context // with the metadata of each stream: one for all watches, to save memory

	begun     time.Time // when gRPC was first seen to make its connections; zero while it does not
	connected bool      // it has made them
	endpoints []string  // when gRPC was last made to connect again
	reset     time.Time // when that was
}

const (
	minTokens       = 16 // as many as there are at first, and may always be
	tokensPerSecond = 10
	tokensPerAnswer = 0.5
)

// traffics has the traffic of each client, and guards it.
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

// forget forgets a client that there is no more.
func forget(key weak.Pointer[clientv3.Client]) {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	delete(traffics.of, key)
}

// send counts an attempt and reports whether it may be sent: always, unless it is beside another one.
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
	// minReset is how long gRPC's connections are left alone after they were made to connect again.
	minReset = 100 * time.Millisecond

	// maxBegin is how long gRPC may take to make its connections, before any of them is there or has failed.
	maxBegin = time.Second
)

// mayReset reports whether gRPC may be made to connect again now. It goes through its connections without a lock then
// (grpc/grpc-go#9155), so none must come or go meanwhile: that is when the client begins to connect, and when
// somebody changes its endpoints.
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
		t.endpoints = endpoints
		return false
	}
	return t.connected
}

// watchStreams is how many streams of watches a client may have of the library. It has one, as a rule.
const watchStreams = 4

// A Stream is one of the streams that the watches of a client share.
//
// It stays at one endpoint, which may have stopped to answer. And it may be stuck for good: where a watch is refused
// as the only other one ends, clientv3 3.7.3 neither ends the stream nor creates another watch on it
// (watchGRPCStream.run). So once a watch was not created in time, all are opened on another stream.
type Stream struct {
	client  *clientv3.Client
	traffic *traffic
	number  int // it grows; of those that are the same modulo watchStreams the stream is one
}

// StreamOf returns the stream on which to open a watch.
func StreamOf(client *clientv3.Client) Stream {
	t := trafficOf(client)
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	return Stream{client, t, t.stream}
}

// Late says that a watch was not created in time on the stream: no more are opened on it.
func (s Stream) Late() {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	s.traffic.stream = max(s.traffic.stream, s.number+1)
}

// Watching returns a context for a watch on the stream, which ends with ctx and when cancel is called, and which a
// member ends that knows of no raft leader. The values and the outgoing metadata of ctx do not reach the watch:
// clientv3 opens a stream for each metadata, and shares it among the watches.
func (s Stream) Watching(ctx context.Context) (watching context.Context, cancel func()) {
	ctx, cancel = context.WithCancel(ctx)
	return valuesOf{ctx, s.values()}, cancel
}

// values has the metadata of the stream.
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

// Created says that a watch was created on the stream.
func (s Stream) Created() {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	s.traffic.created[s.number%watchStreams] = time.Now()
}

// Idle is how long ago a watch was created on the stream, at most since. clientv3 creates one watch of
// a stream after another, so while others are created a watch has to wait for its turn.
func (s Stream) Idle(since time.Time) time.Duration {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	if last := s.traffic.created[s.number%watchStreams]; last.After(since) {
		since = last
	}
	return time.Since(since)
}

package retry

import (
	"context"
	"strconv"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// traffic is what the requests and watches of one client know of each other. It exists while there are any.
//
// It limits how many attempts are sent beside others. An etcd that is slow, since much is asked of it,
// must not be asked for a multiple of that. So each such attempt takes a token, and there is half a
// token for each answer, and some a second: where one endpoint of several is dark the others answer,
// and so there are tokens.
type traffic struct {
	client  *clientv3.Client
	users   int // requests and watches
	waiting int // attempts of [Ask] that have no answer
	tokens  float64
	filled  time.Time                     // when tokens had all that time brings
	stream  int                           // number of that on which watches are opened at the moment
	created [watchStreams]time.Time       // when a watch was created last on each stream
	streams [watchStreams]context.Context // with the metadata of each stream: one for all watches, to save memory
}

const (
	minTokens       = 16 // as many as there are at first, and may always be
	tokensPerSecond = 10
	tokensPerAnswer = 0.5
)

// traffics has the traffic of each client, and guards it.
var traffics = struct {
	mu sync.Mutex
	of map[*clientv3.Client]*traffic
}{of: make(map[*clientv3.Client]*traffic)}

func trafficOf(client *clientv3.Client) *traffic {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	t := traffics.of[client]
	if t == nil {
		t = &traffic{client: client, tokens: minTokens, filled: time.Now()}
		traffics.of[client] = t
	}
	t.users++
	return t
}

func (t *traffic) leave() {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	if t.users--; t.users == 0 {
		delete(traffics.of, t.client)
	}
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

func (t *traffic) streamContext(number int) context.Context {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	number %= watchStreams
	if t.streams[number] == nil {
		t.streams[number] = RequireLeader(t.client.Ctx())
		if number > 0 {
			t.streams[number] = metadata.AppendToOutgoingContext(t.streams[number], "leader-watch-stream", strconv.Itoa(number))
		}
	}
	return t.streams[number]
}

// watchStreams is how many streams of watches a client may have of the library. It has one, as a rule.
const watchStreams = 4

// A Stream is one of the streams that the watches of a client share.
//
// It stays at one endpoint, which may have stopped to answer. And it may be stuck for good: where a watch is refused
// as the only other one ends, clientv3 3.7.3 neither ends the stream nor creates another watch on it
// (watchGRPCStream.run). So once a watch was not created in time, all are opened on another stream.
type Stream struct {
	traffic *traffic
	number  int // it grows; of those that are the same modulo watchStreams the stream is one
}

// StreamOf returns the stream on which to open a watch, to be left.
func StreamOf(client *clientv3.Client) Stream {
	t := trafficOf(client)
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	return Stream{t, t.stream}
}

// Other returns the stream on which to open a watch that was not created in time on this one, to be left.
func (s Stream) Other() Stream {
	t := trafficOf(s.traffic.client) // this one may have been left, as the last
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	t.stream = max(t.stream, s.number+1)
	return Stream{t, t.stream}
}

// Watching returns a context for a watch on the stream, which ends with ctx and when cancel is called, and which a
// member ends that knows of no raft leader. The values and the outgoing metadata of ctx do not reach the watch:
// clientv3 opens a stream for each metadata, and shares it among the watches.
func (s Stream) Watching(ctx context.Context) (watching context.Context, cancel func()) {
	ctx, cancel = context.WithCancel(ctx)
	return valuesOf{ctx, s.traffic.streamContext(s.number)}, cancel
}

// Leave says that the stream is not looked at any more.
func (s Stream) Leave() { s.traffic.leave() }

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

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
	if t.streams[number] == nil {
		t.streams[number] = RequireLeader(t.client.Ctx())
		if number > 0 {
			t.streams[number] = metadata.AppendToOutgoingContext(t.streams[number], "leader-watch-stream", strconv.Itoa(number))
		}
	}
	return t.streams[number]
}

// A Stream is the stream of watches that a context of [Watching] with the same try belongs to.
type Stream struct {
	traffic *traffic
	number  int
}

// StreamOf returns the stream, to be left.
func StreamOf(client *clientv3.Client, try int) Stream {
	return Stream{trafficOf(client), try % watchStreams}
}

// Leave says that the stream is not looked at any more.
func (s Stream) Leave() { s.traffic.leave() }

// Created says that a watch was created on the stream.
func (s Stream) Created() {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	s.traffic.created[s.number] = time.Now()
}

// Idle is how long ago a watch was created on the stream, at most since. clientv3 creates one watch of
// a stream after another, so while others are created a watch has to wait for its turn.
func (s Stream) Idle(since time.Time) time.Duration {
	traffics.mu.Lock()
	defer traffics.mu.Unlock()
	if last := s.traffic.created[s.number]; last.After(since) {
		since = last
	}
	return time.Since(since)
}

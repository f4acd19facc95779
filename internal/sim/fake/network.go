package fake

import (
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// A Process is a machine with clients, and its links to the members.
type Process struct {
	c     *Cluster
	name  string
	gate  func()
	links []*Link
	dead  bool
	sent  Counters
}

// Process returns a new process. gate, if not nil, is called by the caller's goroutine when a message
// is about to be sent and when one was received: a paused process is held there.
func (c *Cluster) Process(name string, gate func()) *Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	if gate == nil {
		gate = func() {}
	}
	p := &Process{c: c, name: name, gate: gate, sent: Counters{Requests: make(map[string]int)}}
	c.processes = append(c.processes, p)
	for _, m := range c.members {
		seed := uint64(len(c.processes)*len(c.members) + m.id)
		p.links = append(p.links, &Link{p: p, m: m, rng: rand.New(rand.NewPCG(c.cfg.Seed, seed))})
	}
	return p
}

// Kill ends the process as SIGKILL does: its connections break, and its calls get no answer any more.
// What it has sent is under way still.
func (p *Process) Kill() {
	p.c.mu.Lock()
	defer p.c.mu.Unlock()
	p.dead = true
	for _, l := range p.links {
		l.breakLocked()
	}
}

// Link is the connection to a member.
func (p *Process) Link(member int) *Link { return p.links[member] }

// Counters are what the process has sent up to now.
func (p *Process) Counters() Counters {
	p.c.mu.Lock()
	defer p.c.mu.Unlock()
	sent := p.sent
	sent.Requests = maps.Clone(sent.Requests)
	return sent
}

// Deafen makes all watch streams that are open now lose every event without a sign, until they end.
// What is said about watches, that they are created or canceled, still arrives.
func (p *Process) Deafen() {
	p.c.mu.Lock()
	defer p.c.mu.Unlock()
	for _, l := range p.links {
		for _, conn := range l.conns {
			for _, k := range conn.calls {
				k.deaf = k.method == watchMethod
			}
		}
	}
}

// Undeafen breaks the streams that are deaf.
func (p *Process) Undeafen() {
	p.c.mu.Lock()
	defer p.c.mu.Unlock()
	for _, l := range p.links {
		for _, conn := range l.conns {
			for _, k := range slices.Clone(conn.calls) {
				if k.deaf {
					k.fail()
				}
			}
		}
	}
}

// The directions of a link.
const (
	sending = iota // to the member
	receiving
)

// A Link is the network between a process and a member.
type Link struct {
	p     *Process
	m     *member
	rng   *rand.Rand
	conns []*connection // open

	dark    [2]bool
	waiting [2]queue // for light
	slow    time.Duration
	refused bool

	lost, doubled, delayed float64
	late                   time.Duration
}

// Dark makes what is sent in a direction wait until it is light again.
func (l *Link) Dark(send, receive bool) {
	l.p.c.mu.Lock()
	defer l.p.c.mu.Unlock()
	l.darkenLocked(send, receive)
}

func (l *Link) darkenLocked(send, receive bool) {
	l.dark = [2]bool{sending: send, receiving: receive}
	for direction, dark := range l.dark {
		if !dark {
			l.waiting[direction].wake(l.delay)
		}
	}
}

// Slow delays each message by d more on average.
func (l *Link) Slow(d time.Duration) {
	l.p.c.mu.Lock()
	defer l.p.c.mu.Unlock()
	l.slow = d
}

// Reset breaks the connections.
func (l *Link) Reset() {
	l.p.c.mu.Lock()
	defer l.p.c.mu.Unlock()
	l.breakLocked()
}

// Refuse breaks the connections and refuses new ones, until it is called with false.
func (l *Link) Refuse(refuse bool) {
	l.p.c.mu.Lock()
	defer l.p.c.mu.Unlock()
	l.refused = refuse
	if refuse {
		l.breakLocked()
	}
}

// Messages are the probabilities that a request or its answer is lost without a sign, that a request is
// carried out twice, and that a message takes up to late longer. Streams are not affected: they are in
// order, and complete.
func (l *Link) Messages(lost, doubled, delayed float64, late time.Duration) {
	l.p.c.mu.Lock()
	defer l.p.c.mu.Unlock()
	l.lost, l.doubled, l.delayed, l.late = lost, doubled, delayed, late
}

func (l *Link) healLocked() {
	l.darkenLocked(false, false)
	l.slow, l.refused = 0, false
	l.lost, l.doubled, l.delayed, l.late = 0, 0, 0, 0
}

func (l *Link) breakLocked() {
	for _, conn := range slices.Clone(l.conns) {
		conn.breakLocked()
	}
}

func (l *Link) delay() time.Duration {
	return around(l.rng, l.p.c.cfg.ClientDelay) + around(l.rng, l.slow)
}

// delayOne is the delay of a message that has to keep no order.
func (l *Link) delayOne() time.Duration {
	d := l.delay()
	if l.late > 0 && l.rng.Float64() < l.delayed {
		d += time.Duration(l.rng.Int64N(int64(l.late)))
	}
	return d
}

// around draws a duration whose mean is given, from an exponential distribution.
func around(rng *rand.Rand, mean time.Duration) time.Duration {
	if mean <= 0 {
		return 0
	}
	return time.Duration(rng.ExpFloat64() * float64(mean))
}

// lane returns a new lane in a direction.
func (l *Link) lane(direction int) *lane {
	return &lane{c: l.p.c, blocked: func() *queue {
		switch {
		case l.dark[direction]:
			return &l.waiting[direction]
		case direction == sending && l.m.paused:
			return &l.m.unread
		}
		return nil
	}}
}

var (
	errRefused = errors.New("connection refused")
	errStopped = errors.New("the cluster was stopped")
)

// dial opens a connection. It blocks until the member's server has answered, which takes as long as a
// message there and one back.
func (l *Link) dial(ctx context.Context) (*connection, error) {
	c := l.p.c
	answered := make(chan error, 1)
	conn := &connection{
		l: l, closed: make(chan struct{}), readable: make(chan struct{}, 1),
		up: l.lane(sending), down: l.lane(receiving),
	}
	c.mu.Lock()
	l.p.sent.Dials++
	if c.stopped || l.p.dead {
		c.mu.Unlock()
		return nil, errStopped
	}
	conn.up.send(l.delay(), func() {
		var err error
		if l.refused || l.m.killed {
			err = errRefused
		}
		conn.life = l.m.life
		conn.down.send(l.delay(), func() {
			if err == nil && (l.refused || l.p.dead || conn.life != l.m.life) {
				err = errRefused
			}
			if err == nil && ctx.Err() == nil {
				l.conns = append(l.conns, conn)
				conn.writeLocked(func(f *http2.Framer) error { return f.WriteSettings() })
			}
			answered <- err
		})
	})
	c.mu.Unlock()
	select {
	case err := <-answered:
		if err != nil {
			return nil, err
		}
		return conn, nil
	case <-ctx.Done():
		_ = conn.Close() // it never fails
		return nil, ctx.Err()
	case <-c.done:
		return nil, errStopped
	}
}

// A connection is what gRPC takes for TCP, with a server of HTTP/2 behind it that knows how to say
// hello and to answer pings. Calls go beside it: see [client].
type connection struct {
	l        *Link
	life     int     // of the member
	up, down *lane   // for pings
	calls    []*call // that wait for an answer
	closed   chan struct{}
	isClosed bool

	readable chan struct{}
	mu       sync.Mutex // guards what follows
	toRead   []byte
	written  []byte // the beginning of a frame
	greeted  bool   // the client's preface was read
}

// breakLocked ends the connection at this side. Calls that wait fail. The member gets to know, if the
// link lets it.
func (conn *connection) breakLocked() {
	if conn.isClosed {
		return
	}
	conn.isClosed = true
	close(conn.closed)
	conn.l.conns = slices.DeleteFunc(conn.l.conns, func(other *connection) bool { return other == conn })
	for _, v := range slices.Clone(conn.calls) {
		v.fail()
	}
}

func (conn *connection) forget(k *call) {
	conn.calls = slices.DeleteFunc(conn.calls, func(other *call) bool { return other == k })
}

// Close implements [net.Conn].
func (conn *connection) Close() error {
	conn.l.p.c.mu.Lock()
	defer conn.l.p.c.mu.Unlock()
	conn.breakLocked()
	return nil
}

// Read implements [net.Conn].
func (conn *connection) Read(b []byte) (int, error) {
	for {
		conn.mu.Lock()
		n := copy(b, conn.toRead)
		conn.toRead = conn.toRead[n:]
		conn.mu.Unlock()
		if n > 0 {
			return n, nil
		}
		select {
		case <-conn.readable:
		case <-conn.closed:
			return 0, net.ErrClosed
		}
	}
}

// writeLocked writes a frame to the client.
func (conn *connection) writeLocked(frame func(*http2.Framer) error) {
	conn.mu.Lock()
	defer conn.mu.Unlock()
	_ = frame(http2.NewFramer(appender{&conn.toRead}, nil)) // to memory
	select {
	case conn.readable <- struct{}{}:
	default:
	}
}

type appender struct{ to *[]byte }

func (a appender) Write(b []byte) (int, error) {
	*a.to = append(*a.to, b...)
	return len(b), nil
}

// Write implements [net.Conn]. Of what the client writes only pings matter.
func (conn *connection) Write(b []byte) (int, error) {
	select {
	case <-conn.closed:
		return 0, net.ErrClosed
	default:
	}
	for _, data := range conn.pings(b) {
		conn.ping(data)
	}
	return len(b), nil
}

// pings takes what the client has written and returns the data of the pings in it.
func (conn *connection) pings(b []byte) (pings [][8]byte) {
	const frameHeader = 9
	conn.mu.Lock()
	defer conn.mu.Unlock()
	conn.written = append(conn.written, b...)
	if !conn.greeted && len(conn.written) >= len(http2.ClientPreface) {
		conn.written, conn.greeted = conn.written[len(http2.ClientPreface):], true
	}
	for conn.greeted && len(conn.written) >= frameHeader {
		length := frameHeader + int(binary.BigEndian.Uint32(conn.written)>>8)
		if len(conn.written) < length {
			break
		}
		frame := conn.written[:length]
		conn.written = conn.written[length:]
		if http2.FrameType(frame[3]) == http2.FramePing && !http2.Flags(frame[4]).Has(http2.FlagPingAck) {
			pings = append(pings, [8]byte(frame[frameHeader:]))
		}
	}
	return pings
}

func (conn *connection) ping(data [8]byte) {
	l := conn.l
	l.p.c.mu.Lock()
	defer l.p.c.mu.Unlock()
	conn.up.send(l.delay(), func() {
		conn.down.send(l.delay(), func() {
			conn.writeLocked(func(f *http2.Framer) error { return f.WritePing(true, data) })
		})
	})
}

// LocalAddr implements [net.Conn].
func (conn *connection) LocalAddr() net.Addr { return &net.TCPAddr{} }

// RemoteAddr implements [net.Conn].
func (conn *connection) RemoteAddr() net.Addr { return &net.TCPAddr{} }

// SetDeadline implements [net.Conn]. gRPC sets none once it is connected.
func (conn *connection) SetDeadline(time.Time) error { return nil }

// SetReadDeadline implements [net.Conn].
func (conn *connection) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline implements [net.Conn].
func (conn *connection) SetWriteDeadline(time.Time) error { return nil }

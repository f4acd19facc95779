package etcdtest

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// A ForgetfulLink is a connection between clients and a member that can forget the connections it carries. A NAT or a
// load balancer that loses its table does the same. Clients use its Endpoint.
//
// It differs from a network in one way: the kernel still acknowledges what a client sends on a forgotten connection. So
// TCP never gives such a connection up. Only a client that misses an answer can notice.
type ForgetfulLink struct {
	// Endpoint is where the link listens: host:port, on loopback.
	Endpoint string

	forwarder *forwarder
}

// NewForgetfulLink returns a working link to a member. It is closed with the test.
func NewForgetfulLink(tb testing.TB, m *Member) *ForgetfulLink {
	tb.Helper()
	f := newForwarder(tb, m)
	return &ForgetfulLink{Endpoint: f.listener.Addr().String(), forwarder: f}
}

// Forget makes every connection that the link has accepted carry nothing any more, in either direction. Once Forget has
// returned, no byte arrives on them. If one side closes its end, the other gets neither FIN nor RST, and stays open
// until the test ends. Connections that are accepted later work.
func (l *ForgetfulLink) Forget() { l.forwarder.hold(false) }

// A HoldingLink is a connection between clients and a member that can hold back what it carries for a while. A network
// that loses packets and heals does the same. Requests that clients have given up then arrive late. Clients use its
// Endpoint.
//
// [Link.Darken] does the same as long as the client stays open. Once the client closes, a Link drops what it holds.
type HoldingLink struct {
	// Endpoint is where the link listens: host:port, on loopback.
	Endpoint string

	forwarder *forwarder
}

// NewHoldingLink returns a working link to a member. It is closed with the test, and drops what it then still holds.
func NewHoldingLink(tb testing.TB, m *Member) *HoldingLink {
	tb.Helper()
	f := newForwarder(tb, m)
	return &HoldingLink{Endpoint: f.listener.Addr().String(), forwarder: f}
}

// Hold holds back everything that clients or the member send, until Release. Once Hold has returned, no byte arrives.
// Connections that clients make meanwhile are accepted and held too; the member sees them after Release.
func (l *HoldingLink) Hold() { l.forwarder.hold(true) }

// Release delivers what was held, each connection's bytes in order, and then whatever is sent. What a client sent
// before it closed its connection is delivered too, and then the close. Release does not wait for the delivery.
//
// Release repeats the sender's pauses between the held pieces, up to 0.1 s each. What is sent later follows 0.1 s after
// them. The pauses matter, because a member that reads a request together with its cancellation often ignores the
// request. TCP also delivers over time: it sends lost data again, in several round trips.
func (l *HoldingLink) Release() { l.forwarder.release() }

// A forwarder carries bytes between clients, which connect to its listener, and a member. While it holds a connection,
// it stores what both sides send, and neither writes nor closes anything.
type forwarder struct {
	to       string
	listener net.Listener
	ctx      context.Context // ends when the forwarder closes
	cancel   context.CancelFunc
	wg       sync.WaitGroup // of all goroutines

	mu      sync.Mutex // guards all fields below, and those of conns
	changed *sync.Cond
	holding bool // new connections are held
	conns   map[*forwarded]struct{}
}

// A forwarded is a connection of a client. Each direction has a goroutine that reads, whether the connection is held or
// not, so that nothing is lost when the sender closes, and one that writes.
type forwarded struct {
	client, server     net.Conn // server is nil until it is dialled
	toClient, toServer direction
	held               bool
	open               int // directions that can still be written to
}

// A direction is what goes from one side of a connection to the other.
type direction struct {
	kept            []piece // read and not yet written, in order
	late            bool    // the last piece was read while the connection was held
	writing         bool
	read, delivered time.Time // when that last happened to a piece
}

// A piece is what was read at once.
type piece struct {
	data  []byte        // nil if the sender has closed its side
	pause time.Duration // the least time between the delivery of the previous piece and of this one
}

// maxPause is long enough for etcd to propose a request that it has read.
const maxPause = 100 * time.Millisecond

func newForwarder(tb testing.TB, m *Member) *forwarder {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatalf("start a link: %v", err)
	}
	f := &forwarder{to: m.Endpoint, listener: listener, conns: make(map[*forwarded]struct{})}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.changed = sync.NewCond(&f.mu)
	f.wg.Go(f.accept)
	tb.Cleanup(f.close)
	return f
}

// close ends every connection and waits for all goroutines.
func (f *forwarder) close() {
	f.mu.Lock()
	f.cancel()
	f.listener.Close()
	for c := range f.conns {
		c.close()
	}
	f.changed.Broadcast()
	f.mu.Unlock()
	f.wg.Wait()
}

func (f *forwarder) closed() bool { return f.ctx.Err() != nil }

// hold holds every connection and, if andNew is true, also those that are made later. It returns once nothing is being
// written.
func (f *forwarder) hold(andNew bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.holding = andNew
	for c := range f.conns {
		c.held = true
		c.setWriteDeadline(time.Unix(1, 0)) // a write under way returns, with the number of bytes it has written
	}
	for c := range f.conns {
		for c.toClient.writing || c.toServer.writing {
			f.changed.Wait()
		}
	}
}

func (f *forwarder) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.holding = false
	for c := range f.conns {
		c.held = false
		c.setWriteDeadline(time.Time{})
	}
	f.changed.Broadcast()
}

func (f *forwarder) accept() {
	for {
		client, err := f.listener.Accept()
		if err != nil {
			return // the forwarder has closed
		}
		f.mu.Lock()
		c := &forwarded{client: client, held: f.holding, open: 2}
		f.conns[c] = struct{}{}
		if f.closed() {
			c.close()
		}
		f.mu.Unlock()
		f.wg.Go(func() { f.read(c, c.client, &c.toServer) })
		f.wg.Go(func() { f.serve(c) })
	}
}

// serve dials the server for a connection as soon as the connection is not held, and then forwards in both directions.
func (f *forwarder) serve(c *forwarded) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waitWhile(func() bool { return c.held })
	f.mu.Unlock()
	server, err := new(net.Dialer).DialContext(f.ctx, "tcp", f.to)
	f.mu.Lock()
	if err != nil {
		f.waitWhile(func() bool { return c.held })
		c.close()
		delete(f.conns, c)
		return
	}
	c.server = server
	if f.closed() {
		c.close()
	}
	f.wg.Go(func() { f.read(c, c.server, &c.toClient) })
	f.wg.Go(func() { f.write(c, c.client, &c.toClient) })
	f.wg.Go(func() { f.write(c, c.server, &c.toServer) })
}

// waitWhile returns when blocked reports false or the forwarder has closed. f.mu is locked.
func (f *forwarder) waitWhile(blocked func() bool) {
	for !f.closed() && blocked() {
		f.changed.Wait()
	}
}

// read stores what one side of a connection sends, until that side ends.
func (f *forwarder) read(c *forwarded, from net.Conn, d *direction) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		f.mu.Lock()
		var pause time.Duration
		if c.held {
			pause = min(time.Since(d.read), maxPause)
		} else if d.late {
			pause = maxPause // this may cancel what was held
		}
		d.read, d.late = time.Now(), c.held
		if n > 0 {
			d.kept = append(d.kept, piece{bytes.Clone(buf[:n]), pause})
		}
		if err != nil {
			d.kept = append(d.kept, piece{nil, pause})
		}
		f.changed.Broadcast()
		f.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// write delivers to one side of a connection what the other has sent, except while the connection is held. It closes
// the connection only when both directions are done, so that the requests of a client that has gone still arrive.
func (f *forwarder) write(c *forwarded, to net.Conn, d *direction) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() {
		if c.open--; c.open == 0 {
			c.close()
			delete(f.conns, c)
		}
	}()
	for {
		f.waitWhile(func() bool { return c.held || len(d.kept) == 0 })
		if f.closed() {
			return
		}
		next := &d.kept[0]
		if wait := next.pause - time.Since(d.delivered); wait > 0 {
			f.sleep(wait)
			continue // the connection may be held again
		}
		if next.data == nil {
			_ = to.(*net.TCPConn).CloseWrite() // it fails if this side is gone too
			return
		}
		data := next.data
		d.writing = true
		f.mu.Unlock()
		n, err := to.Write(data)
		f.mu.Lock()
		d.writing, d.delivered = false, time.Now()
		f.changed.Broadcast()
		if n < len(data) {
			d.kept[0].data = data[n:]
		} else {
			d.kept = d.kept[1:]
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return // that side is gone
		}
	}
}

// sleep waits for d or until the forwarder closes. f.mu is locked, but not during the wait.
func (f *forwarder) sleep(d time.Duration) {
	f.mu.Unlock()
	defer f.mu.Lock()
	select {
	case <-time.After(d):
	case <-f.ctx.Done():
	}
}

func (c *forwarded) close() {
	c.client.Close()
	if c.server != nil {
		c.server.Close()
	}
}

func (c *forwarded) setWriteDeadline(t time.Time) {
	_ = c.client.SetWriteDeadline(t) // it fails if it is closed
	if c.server != nil {
		_ = c.server.SetWriteDeadline(t)
	}
}

package etcdtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const (
	// patience is how long a test waits for what must happen.
	patience = Patience
	// silence is how long a test waits to see that nothing happens.
	silence = 200 * time.Millisecond
)

// A peer is a member as far as a link is concerned: a listener whose connections the test reads and writes.
type peer struct {
	*Member
	accepted chan *net.TCPConn
}

func newPeer(t *testing.T) *peer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	p := &peer{Member: &Member{Endpoint: l.Addr().String()}, accepted: make(chan *net.TCPConn, 100)}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.accepted <- c.(*net.TCPConn)
		}
	}()
	return p
}

func (p *peer) accept(t *testing.T) *net.TCPConn {
	t.Helper()
	select {
	case c := <-p.accepted:
		t.Cleanup(func() { c.Close() })
		return c
	case <-time.After(patience):
		t.Fatal("no connection arrived")
		panic("not reached")
	}
}

// dial returns the client's end of a new connection, which is closed with the test.
func dial(t *testing.T, endpoint string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", endpoint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// connect returns both ends of a new connection through a link.
func connect(t *testing.T, endpoint string, server *peer) (client, atServer *net.TCPConn) {
	t.Helper()
	client = dial(t, endpoint)
	atServer = server.accept(t)
	send(t, client, "hello")
	arrives(t, atServer, "hello")
	return client, atServer
}

func send(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

// readFor lets reads of c fail after d.
func readFor(t *testing.T, c net.Conn, d time.Duration) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		t.Fatal(err)
	}
}

// arrives fails the test unless the next that arrives on c is text.
func arrives(t *testing.T, c net.Conn, text string) {
	t.Helper()
	readFor(t, c, patience)
	got := make([]byte, len(text))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Fatalf("%q arrived, and then %v; want %q", got[:n], err, text)
	}
}

// silent fails the test if something arrives on c, the end of the connection included.
func silent(t *testing.T, c net.Conn) {
	t.Helper()
	readFor(t, c, silence)
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%d bytes arrived, and then %v", n, err)
	}
}

// ends fails the test unless the other side of c closes before it sends anything.
func ends(t *testing.T, c net.Conn) {
	t.Helper()
	readFor(t, c, patience)
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("%d bytes arrived, and then %v, want the end", n, err)
	}
}

func TestForgottenConnectionsStayOpenAndCarryNothing(t *testing.T) {
	server := newPeer(t)
	link := NewForgetfulLink(t, server.Member)
	a, atA := connect(t, link.Endpoint, server)
	b, atB := connect(t, link.Endpoint, server)
	send(t, atA, "answer")
	arrives(t, a, "answer")

	link.Forget()
	send(t, a, "more")
	silent(t, atA)
	send(t, atA, "more")
	silent(t, a)
	b.Close()
	silent(t, atB)
	atA.Close()
	silent(t, a)

	c, atC := connect(t, link.Endpoint, server)
	send(t, atC, "answer")
	arrives(t, c, "answer")
	c.Close()
	ends(t, atC)
}

func TestClientNeedsANewConnectionAfterForget(t *testing.T) {
	m := Start(t)
	link := NewForgetfulLink(t, m)
	client := NewClient(t, link.Endpoint)
	if _, err := client.Get(t.Context(), "key"); err != nil {
		t.Fatal(err)
	}
	link.Forget()
	ctx, cancel := context.WithTimeout(t.Context(), silence)
	defer cancel()
	if _, err := client.Get(ctx, "key"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("on the forgotten connection Get returned %v", err)
	}
	if _, err := NewClient(t, link.Endpoint).Get(t.Context(), "key"); err != nil {
		t.Errorf("on a new connection: %v", err)
	}
}

func TestHeldBytesArriveOnReleaseInOrder(t *testing.T) {
	server := newPeer(t)
	link := NewHoldingLink(t, server.Member)
	stays, atStays := connect(t, link.Endpoint, server)
	leaves, atLeaves := connect(t, link.Endpoint, server)

	link.Hold()
	for i := range 10 {
		send(t, stays, fmt.Sprint(i))
		send(t, leaves, fmt.Sprint(i))
		send(t, atStays, fmt.Sprint(9-i))
	}
	comes := dial(t, link.Endpoint)
	send(t, comes, "comes")
	comesAndLeaves := dial(t, link.Endpoint)
	send(t, comesAndLeaves, "comes and leaves")
	comesAndLeaves.Close()
	silent(t, atStays)
	silent(t, atLeaves)
	silent(t, stays)
	// What is for a client that is gone fails before what is from it has been delivered.
	for range 3 {
		send(t, atLeaves, "x")
		time.Sleep(10 * time.Millisecond) // so that the link does not read all at once
	}
	send(t, leaves, "last")
	leaves.Close()
	silent(t, atLeaves)
	select {
	case <-server.accepted:
		t.Error("a connection arrived while held")
	default:
	}

	link.Release()
	arrives(t, atStays, "0123456789")
	arrives(t, stays, "9876543210")
	arrives(t, atLeaves, "0123456789last")
	ends(t, atLeaves)
	for range 2 { // which of the two arrives first is open
		c := server.accept(t)
		arrives(t, c, "comes")
		readFor(t, c, silence)
		rest, err := io.ReadAll(c)
		if left := len(rest) > 0; left && string(rest) != " and leaves" || left != (err == nil) {
			t.Errorf("%q arrived, and then %v", rest, err)
		}
	}
	send(t, stays, "after")
	arrives(t, atStays, "after")
	send(t, atStays, "answer")
	arrives(t, stays, "answer")
}

// A receiver that does not read must not keep Hold waiting, and what it has not read yet must not be lost or doubled.
func TestHoldInterruptsAWrite(t *testing.T) {
	server := newPeer(t)
	link := NewHoldingLink(t, server.Member)
	client := dial(t, link.Endpoint)
	sent := make([]byte, 32<<20) // more than the kernel takes
	for i := range sent {
		sent[i] = byte(i / 1000)
	}
	if _, err := client.Write(sent); err != nil {
		t.Fatal(err)
	}
	client.Close()
	atServer := server.accept(t)
	for kept := -1; ; time.Sleep(silence) {
		last := kept
		link.forwarder.mu.Lock()
		for c := range link.forwarder.conns {
			kept = len(c.toServer.kept)
		}
		link.forwarder.mu.Unlock()
		if kept == last {
			break // the link waits in a write
		}
	}

	held := make(chan struct{})
	go func() {
		link.Hold()
		close(held)
	}()
	select {
	case <-held:
	case <-time.After(patience):
		t.Fatal("Hold waits for the receiver")
	}
	readFor(t, atServer, silence)
	got, err := io.ReadAll(atServer)
	if !errors.Is(err, os.ErrDeadlineExceeded) || len(got) >= len(sent) {
		t.Fatalf("while held, %d bytes arrived, and then %v", len(got), err)
	}
	link.Release()
	readFor(t, atServer, patience)
	rest, err := io.ReadAll(atServer)
	if err != nil || !bytes.Equal(append(got, rest...), sent) {
		t.Errorf("of %d bytes %d arrived, or others: %v", len(sent), len(got)+len(rest), err)
	}
}

func TestRequestsGivenUpArriveOnRelease(t *testing.T) {
	m := Start(t)
	direct := NewClient(t, m.Endpoint)
	for _, closed := range []bool{false, true} {
		key := fmt.Sprint("closed ", closed)
		link := NewHoldingLink(t, m)
		client := NewClient(t, link.Endpoint)
		if _, err := client.Get(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		link.Hold()
		ctx, cancel := context.WithTimeout(t.Context(), silence)
		defer cancel()
		if _, err := client.Put(ctx, key, "value"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("while held, Put returned %v", err)
		}
		if closed {
			client.Close()
		}
		arrived := direct.Watch(t.Context(), key)
		if resp, err := direct.Get(t.Context(), key); err != nil || len(resp.Kvs) > 0 {
			t.Fatalf("while held: %v, %v", resp, err)
		}
		link.Release()
		select {
		case <-arrived:
		case <-time.After(patience):
			t.Errorf("%s: the request did not arrive", key)
		}
	}
}

func TestLinksLeaveNoGoroutine(t *testing.T) {
	server := newPeer(t)
	running := goleak.IgnoreCurrent()
	t.Run("links", func(tb *testing.T) {
		forgetful, holding := NewForgetfulLink(tb, server.Member), NewHoldingLink(tb, server.Member)
		for range 3 { // both ends of the connections stay open until t ends
			for _, endpoint := range []string{forgetful.Endpoint, holding.Endpoint} {
				connect(t, endpoint, server)
			}
			forgetful.Forget()
			holding.Hold()
			send(t, dial(t, holding.Endpoint), "late")
			holding.Release()
			arrives(t, server.accept(t), "late")
		}
		send(t, dial(t, forgetful.Endpoint), strings.Repeat("unread", 6<<20)) // more than the kernel takes
		holding.Hold()
		send(t, dial(t, holding.Endpoint), "never")
		ends(t, dial(t, NewHoldingLink(tb, &Member{Endpoint: "127.0.0.1:1"}).Endpoint)) // nobody listens there
	})
	goleak.VerifyNone(t, running)
}

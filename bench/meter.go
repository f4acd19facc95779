package main

import (
	"context"
	"net"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
)

// A meter counts what clients send, by kind of request, the events that their watches get, and the
// bytes on their connections.
//
// Each message that is sent on a stream counts as a request. Stock renews over one stream for each client,
// and so does this library: a renewal counts the same for both, whether a stream was opened for it
// or not. To open one counts nothing, but for the authentication that it takes where there are passwords.
type meter struct {
	mu   sync.Mutex
	sent map[string]int

	events atomic.Int64
	bytes  atomic.Int64
}

func newMeter() *meter { return &meter{sent: make(map[string]int)} }

// options make a client count on the meter.
func (m *meter) options() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithStatsHandler(m),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
			return meteredConn{conn, m}, err
		}),
	}
}

// What a request is counted as, besides the last part of its method's name.
const (
	keepAlive    = "LeaseKeepAlive"
	authenticate = "Authenticate"
	renewalRead  = "renewal's read" // the Txn without condition and of gets alone with which a renewal here ends
	watching     = "Watch"          // the begin or end of a watch, not its events
)

func (m *meter) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, methodKey{}, path.Base(info.FullMethodName))
}

type methodKey struct{}

func (m *meter) HandleRPC(ctx context.Context, s stats.RPCStats) {
	switch s := s.(type) {
	case *stats.InPayload:
		if watch, ok := s.Payload.(*etcdserverpb.WatchResponse); ok {
			m.events.Add(int64(len(watch.Events)))
		}
	case *stats.OutPayload:
		kind := ctx.Value(methodKey{}).(string)
		if txn, ok := s.Payload.(*etcdserverpb.TxnRequest); ok && isRenewalRead(txn) {
			kind = renewalRead
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.sent[kind]++
	}
}

func isRenewalRead(txn *etcdserverpb.TxnRequest) bool {
	for _, op := range txn.Success {
		if get := op.GetRequestRange(); get == nil || len(get.RangeEnd) > 0 {
			return false
		}
	}
	return len(txn.Compare) == 0
}

func (m *meter) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (m *meter) HandleConn(context.Context, stats.ConnStats)                       {}

// count is how many requests were sent so far, other than these.
func (m *meter) count(except ...string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	total := 0
	for _, n := range m.sent {
		total += n
	}
	for _, kind := range except {
		total -= m.sent[kind]
	}
	return total
}

// of is how many requests of the kind were sent so far.
func (m *meter) of(kind string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sent[kind]
}

// renewed blocks until a renewal has been sent and then as settle does. All streams are open by then.
func (m *meter) renewed(ctx context.Context) {
	for ctx.Err() == nil && m.of(keepAlive) == 0 {
		sleep(ctx, 10*time.Millisecond)
	}
	m.settle(ctx, time.Second)
}

// settle blocks until nothing but renewals has been sent for so long: a client opens one watch at a
// time, so that many take a while.
func (m *meter) settle(ctx context.Context, quiet time.Duration) {
	for last := -1; ctx.Err() == nil; {
		now := m.count(keepAlive, renewalRead)
		if now == last {
			return
		}
		last = now
		sleep(ctx, quiet)
	}
}

type meteredConn struct {
	net.Conn
	m *meter
}

func (c meteredConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.m.bytes.Add(int64(n))
	return n, err
}

func (c meteredConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.m.bytes.Add(int64(n))
	return n, err
}

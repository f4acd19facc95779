package fake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/roundrobin"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	_ "unsafe" // for go:linkname
)

// valCtxCh is what clientv3's watches select on beside a stream's context. It is never closed. A
// goroutine that waits for a channel from outside the bubble is not durably blocked, and so the
// bubble's clock would stand still.
//
//go:linkname valCtxCh go.etcd.io/etcd/client/v3.valCtxCh
var valCtxCh chan struct{}

// EnterBubble must be called in a bubble before the first client is made in it. Clients that watch must
// not live in two bubbles at a time, or in one and outside. If clients are made outside later, leave is
// to be called at the end, when all clients are closed and all goroutines of the bubble wait: see
// synctest.Wait.
func EnterBubble() (leave func()) {
	outside := selectOn(make(chan struct{}))
	return func() { selectOn(outside) }
}

// selectOn sets valCtxCh, and returns what it was. A goroutine of a client that was used outside before, and is closed,
// has read it. It has ended, but nothing that the race detector sees says that it has.
//
//go:norace
func selectOn(c chan struct{}) (before chan struct{}) {
	before, valCtxCh = valCtxCh, c
	return before
}

var (
	// errReset is what gRPC says of a call whose connection has broken.
	errReset = status.Error(codes.Unavailable, "error reading from server: EOF")
	// errClosing is what it says of a call whose client was closed.
	errClosing = status.Error(codes.Canceled, "grpc: the client connection is closing")
)

const (
	watchMethod     = pb.Watch_Watch_FullMethodName
	keepAliveMethod = pb.Lease_LeaseKeepAlive_FullMethodName
)

// A client is the remote side of a clientv3.Client: the interceptors in which its calls end, and its
// connections.
type client struct {
	p *Process

	mu      sync.Mutex
	conns   map[string]*connection // the newest to each address
	subs    map[balancer.SubConn]string
	picker  balancer.Picker // nil at first, and when closed
	closed  bool
	changed chan struct{} // closed when there is another picker
	idle    bool          // nobody has called yet
	token   string        // that clientv3 sends
}

// NewClient is clientv3.New for a client whose network is the process's. Close it before the cluster is
// stopped.
func (p *Process) NewClient(cfg ClientConfig) (*clientv3.Client, error) {
	k := &client{
		p: p, idle: true, changed: make(chan struct{}),
		conns: make(map[string]*connection), subs: make(map[balancer.SubConn]string),
	}
	c := clientv3.Config{
		Username: cfg.Username, Password: cfg.Password,
		Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{
			grpc.WithContextDialer(k.dial),
			grpc.WithChainUnaryInterceptor(k.unary),
			grpc.WithChainStreamInterceptor(k.stream),
			grpc.WithDisableServiceConfig(), // clientv3's own names round_robin itself
			grpc.WithDefaultServiceConfig(fmt.Sprintf(`{"loadBalancingConfig":[{%q:{}}]}`, balancerName)),
			grpc.WithIdleTimeout(0), // gRPC sees no calls
			grpc.WithReadBufferSize(0), grpc.WithWriteBufferSize(0),
		},
	}
	if cfg.Endpoints == nil {
		for i := range p.links {
			cfg.Endpoints = append(cfg.Endpoints, i)
		}
	}
	for _, i := range cfg.Endpoints {
		c.Endpoints = append(c.Endpoints, Endpoint(i))
	}
	if cfg.Alter != nil {
		cfg.Alter(&c)
	}
	return clientv3.New(c)
}

// Endpoint is what clients know a member by.
func Endpoint(member int) string { return fmt.Sprintf("member%d:2379", member) }

// dial is also how a balancer finds its client.
func (k *client) dial(ctx context.Context, address string) (net.Conn, error) {
	if b, ok := ctx.Value(clientKey{}).(*pickers); ok {
		b.k = k
		return nil, nil
	}
	k.p.gate()
	for i, l := range k.p.links {
		if address != Endpoint(i) {
			continue
		}
		conn, err := l.dial(ctx)
		if err != nil {
			return nil, err
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		k.conns[address] = conn
		return conn, nil
	}
	return nil, errors.New("no such host")
}

type clientKey struct{}

// balancerName is that of a balancer that is gRPC's round robin, and tells the client who is picked.
const balancerName = "fake_round_robin"

func init() { balancer.Register(pickersBuilder{}) }

type pickersBuilder struct{}

func (pickersBuilder) Name() string { return balancerName }

func (pickersBuilder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	b := &pickers{ClientConn: cc}
	_, _ = opts.Dialer(context.WithValue(context.Background(), clientKey{}, b), "") // sets b.k
	b.Balancer = balancer.Get(roundrobin.Name).Build(b, opts)
	return b
}

// pickers stands between gRPC and its round robin.
type pickers struct {
	balancer.ClientConn
	balancer.Balancer
	k *client
}

func (b *pickers) NewSubConn(addresses []resolver.Address, opts balancer.NewSubConnOptions) (balancer.SubConn, error) {
	var sub balancer.SubConn
	listener := opts.StateListener
	opts.StateListener = func(s balancer.SubConnState) {
		if s.ConnectivityState == connectivity.Shutdown {
			b.k.mu.Lock()
			delete(b.k.subs, sub)
			b.k.mu.Unlock()
		}
		listener(s)
	}
	sub, err := b.ClientConn.NewSubConn(addresses, opts) //nolint:staticcheck // gRPC's round robin calls it
	if err == nil {
		b.k.mu.Lock()
		b.k.subs[sub] = addresses[0].Addr
		b.k.mu.Unlock()
	}
	return sub, err
}

func (b *pickers) UpdateState(s balancer.State) {
	b.ClientConn.UpdateState(s)
	b.k.update(s.Picker, false)
}

func (b *pickers) Close() {
	b.Balancer.Close()
	b.k.update(nil, true)
}

func (k *client) update(p balancer.Picker, closed bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.picker, k.closed = p, closed
	close(k.changed)
	k.changed = make(chan struct{})
}

// pick returns the connection whose turn it is, as gRPC does. It blocks until there is one, or, if the
// call is to fail fast, until it is known that there is none.
func (k *client) pick(ctx context.Context, cc *grpc.ClientConn, method string, failFast bool) (*connection, error) {
	k.mu.Lock()
	idle := k.idle
	k.idle = false
	k.mu.Unlock()
	if idle {
		cc.Connect()
	}
	var latest error
	for {
		k.mu.Lock()
		picker, closed, changed := k.picker, k.closed, k.changed
		k.mu.Unlock()
		if closed {
			return nil, errClosing
		}
		if picker != nil {
			result, err := picker.Pick(balancer.PickInfo{FullMethodName: method, Ctx: ctx})
			switch {
			case err == nil:
				k.mu.Lock()
				conn := k.conns[k.subs[result.SubConn]]
				k.mu.Unlock()
				if conn != nil && conn.open() {
					return conn, nil
				}
			case errors.Is(err, balancer.ErrNoSubConnAvailable):
			case failFast:
				return nil, status.Error(codes.Unavailable, err.Error())
			default:
				latest = err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			why := "while waiting for connections to become ready"
			if latest != nil {
				why = "latest balancer error: " + latest.Error()
			}
			return nil, status.Error(status.FromContextError(ctx.Err()).Code(), ctx.Err().Error()+" "+why)
		}
	}
}

func (conn *connection) open() bool {
	select {
	case <-conn.closed:
		return false
	default:
		return true
	}
}

// options are what matters here of a call's options.
type options struct {
	failFast         bool
	maxSend, maxRecv int // sizes of messages; 0 if there is no limit
}

func optionsOf(opts []grpc.CallOption) options {
	o := options{failFast: true}
	for _, opt := range opts {
		switch opt := opt.(type) {
		case grpc.FailFastCallOption:
			o.failFast = opt.FailFast
		case grpc.MaxSendMsgSizeCallOption:
			o.maxSend = opt.MaxSendMsgSize
		case grpc.MaxRecvMsgSizeCallOption:
			if opt.MaxRecvMsgSize < math.MaxInt32 { // which is clientv3's
				o.maxRecv = opt.MaxRecvMsgSize
			}
		}
	}
	return o
}

func (o options) checkSend(m proto.Message) error {
	if size := proto.Size(m); o.maxSend > 0 && size > o.maxSend {
		return status.Errorf(codes.ResourceExhausted, "trying to send message larger than max (%d vs. %d)", size, o.maxSend)
	}
	return nil
}

func (o options) checkRecv(m proto.Message) error {
	if o.maxRecv == 0 {
		return nil
	}
	if size := proto.Size(m); size > o.maxRecv {
		return status.Errorf(codes.ResourceExhausted, "grpc: received message larger than max (%d vs. %d)", size, o.maxRecv)
	}
	return nil
}

// A call is a request, or a stream, at its caller.
type call struct {
	conn   *connection
	method string
	origin origin
	ended  bool        // with an answer, or given up
	tasks  []*task     // what members do for it
	answer chan answer // nil for a stream

	// Of a stream.
	in       []answer      // what was received
	more     chan struct{} // there is more in it
	up, down *lane
	deaf     bool // the events of a watch are lost
}

// An origin is who calls.
type origin struct {
	process       string
	number        uint64 // of the call
	token         string
	requireLeader bool
	root          bool // may do everything
}

type answer struct {
	message proto.Message
	err     error
}

// begin makes a call. c.mu is held.
func (k *client) begin(ctx context.Context, conn *connection, method string) *call {
	k.p.c.calls++
	md, _ := metadata.FromOutgoingContext(ctx)
	leader := md.Get(rpctypes.MetadataRequireLeaderKey)
	v := &call{conn: conn, method: method, origin: origin{
		process: k.p.name, number: k.p.c.calls, token: k.token,
		requireLeader: len(leader) > 0 && leader[0] == rpctypes.MetadataHasLeader,
	}}
	conn.calls = append(conn.calls, v)
	k.p.sent.Requests[method[strings.LastIndexByte(method, '/')+1:]]++
	k.p.sent.Messages++
	return v
}

// end gives the caller the last answer, if it waits for one.
func (v *call) end(a answer) {
	if v.ended {
		return
	}
	v.ended = true
	v.conn.forget(v)
	if v.answer != nil {
		v.answer <- a
	} else {
		v.push(a)
	}
}

// fail is what the end of a connection does to a call.
func (v *call) fail() {
	if !v.ended {
		v.end(answer{err: errReset})
		v.leave()
	}
}

// giveUp is what the end of a context does to a call.
func (v *call) giveUp() {
	if !v.ended {
		v.ended = true
		v.conn.forget(v)
		v.leave()
	}
}

// leave tells the members that nobody waits any more.
func (v *call) leave() {
	l := v.conn.l
	leave := func() {
		for _, t := range v.tasks {
			t.finish()
		}
	}
	if v.up != nil {
		v.up.send(l.delay(), leave)
	} else {
		l.lane(sending).send(l.delay(), leave)
	}
}

// unary is the interceptor in which unary calls end.
func (k *client) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, _ grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	k.p.gate()
	if err := ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	request, o := req.(proto.Message), optionsOf(opts)
	if err := o.checkSend(request); err != nil {
		return err
	}
	conn, err := k.pick(ctx, cc, method, o.failFast)
	if err != nil {
		return err
	}
	c := k.p.c
	c.mu.Lock()
	v := k.begin(ctx, conn, method)
	v.send(request)
	c.mu.Unlock()
	var a answer
	select {
	case a = <-v.answer:
	case <-ctx.Done():
		a.err = status.FromContextError(ctx.Err()).Err()
		c.mu.Lock()
		v.giveUp()
		c.mu.Unlock()
	}
	k.p.gate()
	if method == pb.Auth_Authenticate_FullMethodName {
		k.authenticated(a)
	}
	if a.err == nil {
		a.err = o.checkRecv(a.message)
	}
	if a.err != nil {
		return closing(cc, a.err)
	}
	proto.Merge(reply.(proto.Message), a.message)
	return nil
}

// authenticated notes the token that clientv3 sends from now on. gRPC adds it below the interceptors.
func (k *client) authenticated(a answer) {
	k.p.c.mu.Lock()
	defer k.p.c.mu.Unlock()
	if a.err == nil {
		k.token = a.message.(*pb.AuthenticateResponse).Token
	} else if errors.Is(a.err, rpctypes.ErrGRPCAuthNotEnabled) {
		k.token = ""
	}
}

// closing is the error of a call that has ended with its client.
func closing(cc *grpc.ClientConn, err error) error {
	if errors.Is(err, errReset) && cc.GetState() == connectivity.Shutdown {
		return errClosing
	}
	return err
}

// send sends a unary call.
func (v *call) send(request proto.Message) {
	v.answer = make(chan answer, 1)
	l := v.conn.l
	if v.conn.isClosed {
		v.end(answer{err: errReset})
		return
	}
	copies := 1
	if l.rng.Float64() < l.doubled {
		copies = 2
	}
	for range copies {
		if l.rng.Float64() < l.lost {
			continue
		}
		l.lane(sending).send(l.delayOne(), func() {
			l.m.accept(v, func(t *task) { t.serve(request) }, func(a answer) {
				if l.rng.Float64() >= l.lost {
					l.lane(receiving).send(l.delayOne(), func() { v.end(a) })
				}
			})
		})
	}
}

// stream is the interceptor in which streams end.
func (k *client) stream(ctx context.Context, _ *grpc.StreamDesc, cc *grpc.ClientConn, method string, _ grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	k.p.gate()
	if err := ctx.Err(); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	if method != watchMethod && method != keepAliveMethod {
		return nil, status.Error(codes.Unimplemented, "not modelled: "+method)
	}
	o := optionsOf(opts)
	conn, err := k.pick(ctx, cc, method, o.failFast)
	if err != nil {
		return nil, err
	}
	c, l := k.p.c, conn.l
	c.mu.Lock()
	defer c.mu.Unlock()
	if conn.isClosed {
		return nil, errReset
	}
	v := k.begin(ctx, conn, method)
	v.more = make(chan struct{}, 1)
	v.up, v.down = l.lane(sending), l.lane(receiving)
	v.up.send(l.delay(), func() {
		l.m.accept(v, func(t *task) { t.open(v) }, func(a answer) {
			v.down.send(l.delay(), func() { v.end(a) })
		})
	})
	s := &clientStream{k: k, cc: cc, ctx: ctx, options: o, call: v}
	s.stop = context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		v.giveUp()
	})
	return s, nil
}

// push gives the caller of a stream something to receive.
func (v *call) push(a answer) {
	v.in = append(v.in, a)
	select {
	case v.more <- struct{}{}:
	default:
	}
}

// tell sends a message of a stream to the caller.
func (v *call) tell(message proto.Message) {
	v.down.send(v.conn.l.delay(), func() {
		if !v.ended {
			v.push(answer{message: message})
		}
	})
}

// A clientStream is a stream as clientv3 has it.
type clientStream struct {
	k       *client
	cc      *grpc.ClientConn
	ctx     context.Context
	options options
	call    *call
	stop    func() bool
	err     error // that RecvMsg has returned
}

// SendMsg implements [grpc.ClientStream]. RecvMsg has the error.
func (s *clientStream) SendMsg(m any) error {
	s.k.p.gate()
	c, v := s.k.p.c, s.call
	c.mu.Lock()
	defer c.mu.Unlock()
	if v.ended {
		return io.EOF
	}
	s.k.p.sent.Messages++
	v.up.send(v.conn.l.delay(), func() {
		for _, t := range v.tasks {
			t.receive(m.(proto.Message))
		}
	})
	return nil
}

// RecvMsg implements [grpc.ClientStream].
func (s *clientStream) RecvMsg(m any) error {
	defer s.k.p.gate()
	if s.err != nil {
		return s.err
	}
	c, v := s.k.p.c, s.call
	for {
		c.mu.Lock()
		var a answer
		received := len(v.in) > 0
		if received {
			a = v.in[0]
			v.in = v.in[1:]
		}
		c.mu.Unlock()
		if received && a.err == nil {
			if a.err = s.options.checkRecv(a.message); a.err != nil {
				c.mu.Lock()
				v.giveUp()
				c.mu.Unlock()
			}
		}
		switch {
		case received && a.err == nil:
			proto.Reset(m.(proto.Message))
			proto.Merge(m.(proto.Message), a.message)
			return nil
		case received:
			s.stop()
			s.err = closing(s.cc, a.err)
			return s.err
		}
		select {
		case <-v.more:
		case <-s.ctx.Done():
			c.mu.Lock()
			v.giveUp()
			c.mu.Unlock()
			s.err = status.FromContextError(s.ctx.Err()).Err()
			return s.err
		}
	}
}

// CloseSend implements [grpc.ClientStream]. etcd's streams end when their context does.
func (s *clientStream) CloseSend() error {
	c, v := s.k.p.c, s.call
	c.mu.Lock()
	defer c.mu.Unlock()
	if !v.ended {
		v.up.send(v.conn.l.delay(), func() {
			for _, t := range v.tasks {
				t.end(answer{err: io.EOF})
			}
		})
	}
	return nil
}

// Context implements [grpc.ClientStream].
func (s *clientStream) Context() context.Context { return s.ctx }

// Header implements [grpc.ClientStream].
func (s *clientStream) Header() (metadata.MD, error) { return nil, nil }

// Trailer implements [grpc.ClientStream].
func (s *clientStream) Trailer() metadata.MD { return nil }

// Package leaderhttp sends HTTP requests to the instance that leads, whichever instance a client has reached.
//
// Wrap the handler that only the leader may run, and campaign with the instance's own base URL as the value:
//
//	http.Handle("/jobs/", leaderhttp.Forward(ctx, elector, "my-service/leader", jobs))
//	err := elector.Run(ctx, "my-service/leader", "http://10.0.0.7:8080", work)
//
// The instance that leads serves a request itself. Every other instance forwards it to the leader, through a
// [net/http/httputil.ReverseProxy], and refuses it while nobody leads. [Forward] says what a client sees.
//
// # A request is sent once
//
// It makes at most one hop. A forwarded request carries the header Leader-Forwarded, which names the election and the
// token of the term that the forwarder knew. A receiver that does not lead refuses such a request and never forwards
// it. A receiver that leads serves it, even if its term began after the one that is named. It refuses it if the one
// that is named began later: that one proves that the receiver's own term is over. A client that sends the header
// itself can only get its own request refused.
//
// It is never sent twice. If the connection breaks before the answer has arrived, nobody knows whether the leader has
// carried out the request, so the client gets 502. This is so for methods that are idempotent too, which
// [http.Transport] by itself sends again. A transport given to [WithTransport] must not undo this. So that no request
// meets a connection that the leader is closing, let servers keep idle connections for longer than the 10 s that
// forwarders keep them.
//
// # What the leader sees
//
// The leader gets method, path, query, body, trailers that the client has announced, and headers as the client sent
// them, with these exceptions:
//
//   - The path of the base URL is put in front, as [httputil.ProxyRequest.SetURL] does. The rest is the path that the
//     handler of Forward sees. So put Forward around http.StripPrefix, not inside it, or let base URLs end in the
//     prefix.
//   - The header Host is the client's, not that of the base URL, so that the leader routes and redirects as if the
//     client had reached it directly.
//   - X-Forwarded-For, X-Forwarded-Host and X-Forwarded-Proto are set to the client's address, the Host that it asked
//     for, and http or https. What the client has sent in them and in Forwarded is dropped, because anybody can send
//     anything. If clients come through a proxy of yours that sets them, use [WithTrustedProxy].
//   - Hop-by-hop headers are removed, but upgrades are passed on, so websockets work.
//
// A request that has reached the leader directly is as its client has sent it. So the leader must not take a client's
// X-Forwarded-* for true, because it cannot tell who has set them.
//
// Answers are passed on as they arrive, at the latest after 10 ms, with trailers and informational (1xx) responses. If
// the client goes away, the leader's request is cancelled. Redirects are not followed.
//
// # What happens at a handoff
//
// A request that the leader serves has a context that ends with the term, with the cause that [leader.Leader.Context]
// has. [Term] returns the term from it. The handler must stop changing things when its context ends. What it writes
// needs [leader.Leader.Guard] or [leader.Leader.Token] where two writes of two leaders would do harm: the term may end
// right after the handler was called, and leader.Run does not wait for requests under way. To let them finish at a
// handoff, run them under [context.WithoutCancel], and let the function of Run wait for them before it returns, within
// the margin ([leader.WithMargin]). A websocket's handler must end with the context too, or the connection stays with
// an instance that does not lead.
//
// A forwarded request lasts until the leader has answered it or the client gives up, even if another leads by then. No
// other time limit applies, because streams and long polls have none. To set one, give [WithTransport] a
// [http.Transport] with a ResponseHeaderTimeout. While etcd cannot be reached, requests go to the leader that was known
// last, which serves them for as long as its term holds.
package leaderhttp

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/leader"
)

const (
	// forwardedFor marks a forwarded request. Its value is a query string, so that a name cannot break out of it.
	forwardedFor = "Leader-Forwarded"
	// refusedBy is in the refusal of a forwarded request, and names who refuses, and which request. Only the forwarder
	// reads it. No client can pretend that a request has come back, because none can know what its forwarder calls it.
	refusedBy = "Leader-Refused-By"
)

const (
	// pause is how long to wait before an election is observed again for which that was denied.
	pause = 5 * time.Second
	// grace is how long after a candidate was observed it may be this instance, before it knows of its election.
	grace = 5 * time.Second
	// flushInterval is how late a part of an answer may arrive if the leader has announced the length. To flush at once
	// would make a small request take a fifth longer. Answers without a length are flushed at once.
	flushInterval = 10 * time.Millisecond
	// maxLogged is how much of a value is logged, in bytes.
	maxLogged = 100
	// maxWarned bounds how many values are remembered for which there was a warning.
	maxWarned = 1000
)

// An Option changes a default of [Forward]. If an option is repeated, the last one wins.
type Option struct{ apply func(*forwarder) }

// WithURL sets the function that maps the leader to its base URL, and so decides where requests may be sent. The
// default takes the leader's value as the URL. Whoever may write below the election's name in etcd chooses that value,
// so use WithURL to allow only hosts of your own if that is not you alone.
//
// toURL is called once for each leader and each of its values, one call at a time, and must not block. If it returns an
// error, requests are refused. The rules for a URL, which [Forward] lists, apply to what it returns, except the one for
// addresses.
func WithURL(toURL func(leader.Candidate) (*url.URL, error)) Option {
	mustBeSet("WithURL", toURL == nil)
	return Option{func(f *forwarder) { f.toURL = toURL }}
}

// WithTransport sets what sends the forwarded requests, for example an [http.Transport] with the certificates of your
// own authority. It is never closed. The default is an http.Transport that uses no proxy, takes at most 5 s to connect,
// closes connections that were idle for 10 s, and does not connect to the addresses that [Forward] refuses, whatever a
// name resolves to.
func WithTransport(transport http.RoundTripper) Option {
	mustBeSet("WithTransport", transport == nil)
	return Option{func(f *forwarder) { f.transport = transport }}
}

// WithTrustedProxy sets the function that tells whether a request comes from a proxy of yours, by its RemoteAddr for
// example. The Forwarded, X-Forwarded-Host and X-Forwarded-Proto of such a request are passed on, and the proxy's
// address is appended to its X-Forwarded-For.
func WithTrustedProxy(trusted func(r *http.Request) bool) Option {
	mustBeSet("WithTrustedProxy", trusted == nil)
	return Option{func(f *forwarder) { f.trusted = trusted }}
}

// WithLogger sets where to log; by default nothing is logged. Level Warn has, once for each value, that the leader's
// value is no usable URL; that the election may not be observed; and the first request that a leader fails to answer.
// Level Debug has the other such requests.
func WithLogger(log *slog.Logger) Option {
	mustBeSet("WithLogger", log == nil)
	return Option{func(f *forwarder) { f.log = log }}
}

func mustBeSet(what string, missing bool) {
	if missing {
		panic("leaderhttp: " + what + ": must not be nil")
	}
}

// Forward returns a handler that serves with local while e leads the election name, forwards to the leader, whose value
// is its base URL, while another does, and answers 503 with Retry-After while nobody does.
//
// Each request asks [leader.Elector.Leading], so local is called only while this instance leads. Who else leads is
// known from [leader.Elector.Observe]: one watch serves all requests. It runs in a goroutine that ends with ctx, or
// when e is closed. Nobody waits for that goroutine; it holds nothing but the watch and idle connections, which end
// with it. After ctx has ended, local still serves while e leads, and other requests get 503.
//
// A client sees, other than what the leader answers:
//
//   - 503 with Retry-After: no instance has served the request, so it can be sent again. Nobody leads, or it is not
//     known who does, or that one cannot be reached, or its URL is not usable, or the receiver does not lead. The text
//     says which. (Let local not answer in the same way after it has changed something.)
//   - 502: the leader did not answer, and may have carried out the request. 504: the same, because a timeout of the
//     transport or of the request's context has passed. If the answer had begun, the connection is closed.
//
// A base URL is http or https, with a host, and without user, query and fragment. It does not have an address that is
// link-local (as that of a cloud's metadata service), multicast or unspecified. If it leads to this instance, which
// does not lead, requests are refused and nothing loops.
//
// If observing the election is denied, requests are refused while e does not lead, and it is tried again every 5 s.
//
// Forward panics if e, local or an option's argument is nil. It does not block.
func Forward(ctx context.Context, e *leader.Elector, name string, local http.Handler, opts ...Option) http.Handler {
	mustBeSet("Forward: e", e == nil)
	mustBeSet("Forward: local", local == nil)
	f := &forwarder{
		ctx: ctx, e: e, name: name, local: local,
		toURL:  valueURL,
		log:    slog.New(slog.DiscardHandler),
		id:     rand.Text(),
		warned: make(map[string]bool),
	}
	for _, opt := range opts {
		mustBeSet("Option{}", opt.apply == nil)
		opt.apply(f)
	}
	if f.transport == nil {
		f.own = newTransport()
		f.transport = f.own
	}
	go f.observe()
	return f
}

type termKey struct{}

// Term returns the term in which [Forward] serves a request, from the context of the request. ok is false for any other
// context.
func Term(ctx context.Context) (l *leader.Leader, ok bool) {
	l, ok = ctx.Value(termKey{}).(*leader.Leader)
	return l, ok
}

type forwarder struct {
	ctx       context.Context
	e         *leader.Elector
	name      string
	local     http.Handler
	toURL     func(leader.Candidate) (*url.URL, error)
	transport http.RoundTripper
	own       *http.Transport // the transport, if it is not the user's
	trusted   func(*http.Request) bool
	log       *slog.Logger
	id        string // of this forwarder, to recognise its own refusals

	seen atomic.Pointer[view] // nil until something was observed
	led  atomic.Int64         // token of a term of this instance, the latest that is known

	mu     sync.Mutex
	warned map[string]bool // for which values
}

// A view is what was observed: one leader with one value, or why there is none to forward to.
type view struct {
	f       *forwarder
	refusal string // why requests cannot be forwarded; "" if they can
	leader  leader.Candidate
	url     *url.URL
	mark    string // value of the header, but for the request's name
	proxy   *httputil.ReverseProxy
	since   time.Time
	itself  atomic.Bool // a request has come back to the forwarder that sent it
	failed  atomic.Bool // there was a warning about a request
}

// observe keeps f.seen up to date until ctx ends or e is closed.
func (f *forwarder) observe() {
	if f.own != nil {
		defer f.own.CloseIdleConnections() // those in use now are closed when they become idle
	}
	for f.ctx.Err() == nil {
		for c, err := range f.e.Observe(f.ctx, f.name) {
			switch {
			case err == nil:
				f.seen.Store(f.view(c))
			case f.ctx.Err() != nil:
				return
			default:
				f.seen.Store(&view{refusal: "it is not known who leads"})
				if errors.Is(err, leader.ErrClosed) {
					return
				}
				f.warnOnce(err.Error(), "election cannot be observed, requests are refused", "error", err)
			}
		}
		select {
		case <-f.ctx.Done():
		case <-time.After(pause):
		}
	}
}

// view is that of an observed leader; the zero Candidate is nobody.
func (f *forwarder) view(c leader.Candidate) *view {
	if c == (leader.Candidate{}) {
		return &view{refusal: "nobody leads"}
	}
	if l, ok := f.e.Leading(f.name); ok {
		f.note(l)
	}
	u, err := f.toURL(c)
	if err == nil {
		err = usable(u)
	}
	if err != nil {
		f.warnOnce(c.Value, "the leader's URL is not usable, requests are refused", "value", logged(c.Value), "error", loggedError(err))
		return &view{refusal: "the leader's address is not usable"}
	}
	mark := url.Values{"election": {f.name}, "token": {strconv.FormatInt(c.Token, 10)}}
	v := &view{f: f, leader: c, url: u, mark: mark.Encode(), since: time.Now()}
	v.proxy = &httputil.ReverseProxy{
		Rewrite:        v.rewrite,
		ModifyResponse: v.answered,
		Transport:      f.transport,
		FlushInterval:  flushInterval,
		ErrorHandler:   v.fail,
		ErrorLog:       slog.NewLogLogger(f.log.Handler(), slog.LevelDebug),
		BufferPool:     buffers,
	}
	return v
}

func (f *forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	hop := f.hop(r)
	l, leads := f.e.Leading(f.name)
	if leads {
		f.note(l)
		if hop.token <= l.Token() {
			f.serve(w, r, l)
			return
		}
	}
	v := f.seen.Load()
	switch {
	case hop.made:
		w.Header().Set(refusedBy, f.id+hop.request)
		refuse(w, "forwarded to an instance that does not lead")
	case f.ctx.Err() != nil:
		refuse(w, "this instance does not lead and has stopped forwarding")
	case v == nil:
		refuse(w, "it is not known yet who leads")
	case v.refusal != "":
		refuse(w, v.refusal)
	case v.leader.Token <= f.led.Load(): // what was observed is over, though the key of our term may stay for a while
		refuse(w, "the term of this instance is over, and nobody leads yet")
	case v.itself.Load():
		// Without the grace this would also warn while this instance is being elected.
		if time.Since(v.since) > grace {
			f.warnOnce(v.leader.Value, "the leader's URL leads to this instance, which does not lead; requests are refused",
				"value", logged(v.leader.Value), "url", logged(v.url.String()))
		}
		refuse(w, "the leader's address is that of an instance that does not lead")
	default:
		v.proxy.ServeHTTP(w, r)
	}
}

// note notes a term of this instance. Callers may come late, so it keeps the largest token.
func (f *forwarder) note(l *leader.Leader) {
	for led := f.led.Load(); l.Token() > led && !f.led.CompareAndSwap(led, l.Token()); {
		led = f.led.Load()
	}
}

// A hop is what a request says of how it was forwarded in an election.
type hop struct {
	made    bool
	token   int64  // the largest that it names
	request string // what the last forwarder calls it
}

// hop returns what the request says. What cannot be read is no proof of anything but that it was forwarded.
func (f *forwarder) hop(r *http.Request) (h hop) {
	for _, line := range r.Header[forwardedFor] {
		for mark := range strings.SplitSeq(line, ",") { // a proxy may join lines
			q, err := url.ParseQuery(strings.TrimSpace(mark))
			if err == nil && q.Has("election") && q.Get("election") != f.name {
				continue // a handler of another election has forwarded it
			}
			h.made, h.request = true, q.Get("request")
			if t, err := strconv.ParseInt(q.Get("token"), 10, 64); err == nil {
				h.token = max(h.token, t)
			}
		}
	}
	return h
}

func (f *forwarder) serve(w http.ResponseWriter, r *http.Request, l *leader.Leader) {
	ctx, cancel := context.WithCancelCause(context.WithValue(r.Context(), termKey{}, l))
	defer cancel(nil)
	defer context.AfterFunc(l.Context(), func() { cancel(context.Cause(l.Context())) })()
	served := r.WithContext(ctx)
	defer func() { // net/http does this only for the request that it has made
		if form := served.MultipartForm; form != nil && form != r.MultipartForm {
			_ = form.RemoveAll()
		}
	}()
	f.local.ServeHTTP(w, served)
}

// rewrite turns a client's request into the leader's.
func (v *view) rewrite(pr *httputil.ProxyRequest) {
	in, out := pr.In, pr.Out
	out.URL.RawQuery = in.URL.RawQuery // also what ReverseProxy cannot parse: local would see it
	pr.SetURL(v.url)
	out.Host = in.Host
	out.Header.Add(forwardedFor, v.mark+"&request="+rand.Text())
	out.Trailer = in.Trailer // not a copy: the values come after the body

	trusted := v.f.trusted != nil && v.f.trusted(in)
	if trusted {
		out.Header["X-Forwarded-For"] = in.Header["X-Forwarded-For"]
	}
	pr.SetXForwarded()
	if trusted {
		for _, name := range []string{"Forwarded", "X-Forwarded-Host", "X-Forwarded-Proto"} {
			if values := in.Header[name]; len(values) > 0 {
				out.Header[name] = values
			}
		}
	}

	// A transport sends again, on a new connection, a request without a body or with a GetBody. So there is always a
	// body, which cannot be had twice. An empty one is not to be announced as chunked.
	out.GetBody = nil
	if out.Body == nil || out.Body == http.NoBody {
		out.Body = io.NopCloser(strings.NewReader(""))
		out.TransferEncoding = []string{"identity"}
	}
}

// answered looks at the leader's answer. What it removes is not for those further back.
func (v *view) answered(res *http.Response) error {
	r := res.Request // a user's transport may leave it out
	if r != nil && res.Header.Get(refusedBy) == v.f.id+v.f.hop(r).request {
		v.itself.Store(true)
	}
	res.Header.Del(refusedBy)
	return nil
}

// fail answers a request that the leader did not answer.
func (v *view) fail(w http.ResponseWriter, r *http.Request, err error) {
	level := slog.LevelDebug
	if r.Context().Err() == nil && v.failed.CompareAndSwap(false, true) {
		level = slog.LevelWarn
	}
	v.f.log.Log(r.Context(), level, "request could not be forwarded", "election", v.f.name, "token", v.leader.Token,
		"url", logged(v.url.String()), "error", loggedError(err))
	var op *net.OpError
	var timeout net.Error
	switch {
	case errors.As(err, &op) && op.Op == "dial":
		refuse(w, "the leader cannot be reached")
	case errors.As(err, &timeout) && timeout.Timeout():
		http.Error(w, "the leader did not answer in time, and may have carried out the request", http.StatusGatewayTimeout)
	default:
		http.Error(w, "the leader did not answer, and may have carried out the request", http.StatusBadGateway)
	}
}

// refuse answers a request that nobody has served.
func refuse(w http.ResponseWriter, why string) {
	w.Header().Set("Retry-After", "1")
	http.Error(w, why, http.StatusServiceUnavailable)
}

func (f *forwarder) warnOnce(value, message string, args ...any) {
	if f.firstOf(logged(value)) { // without f.mu, because a log handler may block
		f.log.With("election", f.name).Warn(message, args...)
	}
}

func (f *forwarder) firstOf(value string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.warned[value] {
		return false
	}
	if len(f.warned) == maxWarned {
		clear(f.warned)
	}
	f.warned[value] = true
	return true
}

func logged(value string) string { return value[:min(len(value), maxLogged)] }

// loggedError is for an error that may repeat a value, or a part of it.
func loggedError(err error) string {
	text := err.Error()
	return text[:min(len(text), 5*maxLogged)]
}

func valueURL(c leader.Candidate) (*url.URL, error) {
	u, err := url.Parse(c.Value)
	if err != nil {
		var parsing *url.Error
		if errors.As(err, &parsing) {
			err = parsing.Err // without the value, which is logged beside it
		}
		return nil, err
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil && !allowed(ip) {
		return nil, errAddress
	}
	return u, nil
}

// usable returns an error unless u is a base URL.
func usable(u *url.URL) error {
	switch {
	case u == nil:
		return errors.New("there is none")
	case u.Scheme != "http" && u.Scheme != "https":
		return errors.New("it must begin with http:// or https://")
	case u.Hostname() == "":
		return errors.New("it must have a host")
	case u.User != nil:
		return errors.New("it must not have a user")
	case u.RawQuery != "" || u.ForceQuery:
		return errors.New("it must not have a query")
	case u.Fragment != "":
		return errors.New("it must not have a fragment")
	}
	return nil
}

var errAddress = errors.New("its address is link-local, multicast or unspecified")

func allowed(ip netip.Addr) bool {
	ip = ip.Unmap()
	return !ip.IsLinkLocalUnicast() && !ip.IsMulticast() && !ip.IsUnspecified()
}

func newTransport() *http.Transport {
	dialer := &net.Dialer{
		Timeout: 5 * time.Second,
		Control: func(_, address string, _ syscall.RawConn) error { // after names were resolved
			to, err := netip.ParseAddrPort(address)
			if err != nil {
				return fmt.Errorf("leaderhttp: %w", err)
			}
			if !allowed(to.Addr()) {
				return errAddress
			}
			return nil
		},
	}
	return &http.Transport{
		DialContext:           dialer.DialContext,
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   100,
		IdleConnTimeout:       10 * time.Second,
		TLSHandshakeTimeout:   5 * time.Second,
		ExpectContinueTimeout: time.Second,
		DisableCompression:    true, // pass answers on as they are
	}
}

// buffers are for copying answers.
var buffers = bufferPool{&sync.Pool{New: func() any { return new([32 << 10]byte) }}}

type bufferPool struct{ pool *sync.Pool }

func (b bufferPool) Get() []byte { return b.pool.Get().(*[32 << 10]byte)[:] }

func (b bufferPool) Put(buf []byte) { b.pool.Put((*[32 << 10]byte)(buf)) }

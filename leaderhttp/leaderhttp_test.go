package leaderhttp_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"example.com/leader/leaderhttp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for an event that must come.
const patience = etcdtest.Patience

// header is the one that marks a forwarded request.
const header = "Leader-Forwarded"

func start(t *testing.T) (*etcdtest.Member, *clientv3.Client) {
	t.Helper()
	t.Parallel()
	m := etcdtest.Start(t)
	return m, etcdtest.NewClient(t, m.Endpoint)
}

// newElector returns an Elector that is closed with the test.
func newElector(tb testing.TB, client *clientv3.Client) *leader.Elector {
	tb.Helper()
	e, err := leader.New(client, leader.WithTTL(time.Minute))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := e.Close(ctx); err != nil && !tb.Failed() {
			tb.Errorf("Close: %v", err)
		}
	})
	return e
}

// lead campaigns and must win.
func lead(tb testing.TB, e *leader.Elector, value string) *leader.Leader {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	l, err := e.Campaign(ctx, "jobs", value)
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

func resign(t *testing.T, l *leader.Leader) {
	t.Helper()
	if err := l.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// serve runs a server on loopback until the test ends.
func serve(tb testing.TB, h http.Handler) (base string) {
	tb.Helper()
	s := httptest.NewServer(h)
	tb.Cleanup(s.Close)
	return s.URL
}

// An instance is one of a service, with a server that forwards.
type instance struct {
	e   *leader.Elector
	url string
}

func newInstance(tb testing.TB, client *clientv3.Client, local http.HandlerFunc, opts ...leaderhttp.Option) instance {
	tb.Helper()
	e := newElector(tb, client)
	return instance{e, serve(tb, leaderhttp.Forward(tb.Context(), e, "jobs", local, opts...))}
}

// newFollower returns an instance that never leads.
func newFollower(tb testing.TB, client *clientv3.Client, opts ...leaderhttp.Option) instance {
	tb.Helper()
	return newInstance(tb, client, func(http.ResponseWriter, *http.Request) {
		tb.Error("served by an instance that does not lead")
	}, opts...)
}

// say answers with a text.
func say(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "%s", text) }
}

// An answer is a response that was read.
type answer struct {
	*http.Response
	text string
}

func newRequest(tb testing.TB, method, url string, body io.Reader) *http.Request {
	tb.Helper()
	r, err := http.NewRequestWithContext(tb.Context(), method, url, body)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// send sends a request on a connection of its own, so that no client sends it twice.
func send(tb testing.TB, r *http.Request) answer {
	tb.Helper()
	r.Close = true
	resp, err := (&http.Transport{DisableCompression: true}).RoundTrip(r)
	if err != nil {
		tb.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		tb.Fatal(err)
	}
	return answer{resp, string(text)}
}

func get(tb testing.TB, url string) answer {
	tb.Helper()
	return send(tb, newRequest(tb, http.MethodGet, url, nil))
}

// await sends requests until the answer is as wanted.
func await(tb testing.TB, url, what string, wanted func(answer) bool) answer {
	tb.Helper()
	for began := time.Now(); time.Since(began) < patience; time.Sleep(time.Millisecond) {
		if a := get(tb, url); wanted(a) {
			return a
		}
	}
	tb.Fatalf("%s: never", what)
	panic("not reached")
}

// awaitText waits until requests are answered with a text.
func awaitText(tb testing.TB, url, text string) {
	tb.Helper()
	await(tb, url, text, func(a answer) bool { return strings.TrimSpace(a.text) == text })
}

// wantRefused fails the test unless nobody has served the request.
func wantRefused(t *testing.T, a answer, why string) {
	t.Helper()
	if a.StatusCode != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" || strings.TrimSpace(a.text) != why {
		t.Errorf("%s %v %q, want a refusal: %s", a.Status, a.Header, a.text, why)
	}
}

const (
	nobody    = "nobody leads"
	unusable  = "the leader's address is not usable"
	hopped    = "forwarded to an instance that does not lead"
	itself    = "the leader's address is that of an instance that does not lead"
	unreached = "the leader cannot be reached"
	unknown   = "it is not known who leads"
)

// A journal is a log that can be read while it is written.
type journal struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.Write(p)
}

// warnings are the lines of level WARN that contain a text.
func (j *journal) warnings(text string) (found []string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for line := range strings.Lines(j.buf.String()) {
		if strings.Contains(line, "level=WARN") && strings.Contains(line, text) {
			found = append(found, line)
		}
	}
	return found
}

func (j *journal) option() leaderhttp.Option {
	return leaderhttp.WithLogger(slog.New(slog.NewTextHandler(j, nil)))
}

func TestTheLeaderServesAndTheOthersForwardToIt(t *testing.T) {
	_, client := start(t)
	a := newInstance(t, client, say("a"))
	b := newInstance(t, client, say("b"))
	awaitText(t, a.url, nobody)
	awaitText(t, b.url, nobody)
	wantRefused(t, get(t, b.url), nobody)

	l := lead(t, a.e, a.url)
	awaitText(t, b.url, "a")
	awaitText(t, a.url, "a")
	resign(t, l)
	awaitText(t, b.url, nobody)
	l = lead(t, b.e, b.url)
	awaitText(t, a.url, "b")
	if err := l.Proclaim(t.Context(), serve(t, say("elsewhere"))); err != nil {
		t.Fatal(err)
	}
	awaitText(t, a.url, "elsewhere")
	awaitText(t, b.url, "b")
}

// A fake is a leader whose server is the test's.
func newFake(t *testing.T, client *clientv3.Client, h http.HandlerFunc) *leader.Leader {
	t.Helper()
	return lead(t, newElector(t, client), serve(t, h))
}

func TestAForwardedRequestIsNotForwardedAgain(t *testing.T) {
	_, client := start(t)
	var hits atomic.Int32
	marks := make(chan string, 100)
	l := newFake(t, client, func(_ http.ResponseWriter, r *http.Request) {
		hits.Add(1)
		marks <- r.Header.Get(header)
	})
	b, c := newFollower(t, client), newFollower(t, client)
	awaitText(t, b.url, "")
	awaitText(t, c.url, "")
	mark := <-marks
	if q, err := url.ParseQuery(mark); err != nil || q.Get("token") != fmt.Sprint(l.Token()) || q.Get("election") != "jobs" {
		t.Errorf("the header is %q, %v; the token %d", mark, err, l.Token())
	}

	before := hits.Load()
	for _, value := range []string{mark, "", "x", "token=x", "%", "election=other, " + mark, mark + "," + mark, strings.Repeat("a&", 20_000)} {
		r := newRequest(t, http.MethodGet, c.url, nil)
		r.Header.Set(header, value)
		wantRefused(t, send(t, r), hopped)
		r.Header["Connection"] = []string{header} // a hop-by-hop header must not lose its effect
		wantRefused(t, send(t, r), hopped)
	}
	if after := hits.Load(); after != before {
		t.Errorf("%d forwarded requests were forwarded again", after-before)
	}

	// A request that comes back late says nothing about the leader of today.
	resign(t, l)
	newFake(t, client, say("next"))
	awaitText(t, b.url, "next")
	r := newRequest(t, http.MethodGet, b.url, nil)
	r.Header.Set(header, mark)
	wantRefused(t, send(t, r), hopped)
	if got := get(t, b.url); got.text != "next" {
		t.Errorf("after a late request: %s %q", got.Status, got.text)
	}
}

func TestAReceiverServesUnlessALaterTermThanItsOwnIsNamed(t *testing.T) {
	_, client := start(t)
	a := newInstance(t, client, say("a"))
	l := lead(t, a.e, a.url)
	for _, test := range []struct {
		mark   string
		served bool
	}{
		{fmt.Sprintf("election=jobs&token=%d", l.Token()), true},
		{fmt.Sprintf("election=jobs&token=%d", l.Token()-1), true},
		{fmt.Sprintf("election=jobs&token=%d", l.Token()+1), false},
		{fmt.Sprintf("election=other&token=%d", l.Token()+1), true},
		{"garbage", true},
	} {
		r := newRequest(t, http.MethodGet, a.url, nil)
		r.Header.Set(header, test.mark)
		if got := send(t, r); test.served && got.text != "a" {
			t.Errorf("%s: %s %q", test.mark, got.Status, got.text)
		} else if !test.served {
			wantRefused(t, got, hopped)
		}
	}
}

func TestARequestMayHopOnceForEachElection(t *testing.T) {
	_, client := start(t)
	a, b, c := newElector(t, client), newElector(t, client), newElector(t, client)
	// Whoever leads "jobs" needs who leads "a/b, c&d".
	node := func(e *leader.Elector, name string) string {
		inner := leaderhttp.Forward(t.Context(), e, "a/b, c&d", say(name))
		return serve(t, leaderhttp.Forward(t.Context(), e, "jobs", inner))
	}
	atA, atB, atC := node(a, "a"), node(b, "b"), node(c, "c")
	lead(t, a, atA)
	if _, err := b.Campaign(t.Context(), "a/b, c&d", atB); err != nil {
		t.Fatal(err)
	}
	awaitText(t, atA, hopped) // b does not lead "jobs", so this would be the second hop of it
	awaitText(t, atC, hopped)
	inner := serve(t, leaderhttp.Forward(t.Context(), c, "a/b, c&d", say("c")))
	awaitText(t, inner, hopped)

	// If each handler has a server, or a path, of its own, both hops are made.
	first := serve(t, leaderhttp.Forward(t.Context(), b, "a/b, c&d", say("b")))
	if _, err := newElector(t, client).Campaign(t.Context(), "third", first); err != nil {
		t.Fatal(err)
	}
	third := leaderhttp.Forward(t.Context(), c, "third", say("none"))
	r := newRequest(t, http.MethodGet, serve(t, third), nil)
	r.Header.Set(header, "election=other&token=1")
	await(t, r.URL.String(), "b", func(a answer) bool { return a.text == "b" })
	if got := send(t, r); got.text != "b" {
		t.Errorf("after a hop of another election: %s %q", got.Status, got.text)
	}
}

// http.Transport by itself sends a request again when a connection that was used before breaks, if the method is
// idempotent or there is an Idempotency-Key.
func TestARequestThatTheLeaderHasReceivedIsNotSentAgain(t *testing.T) {
	_, client := start(t)
	var lost atomic.Int32
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	t.Cleanup(conns.Wait)
	t.Cleanup(func() { listener.Close() })
	conns.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				br := bufio.NewReader(c)
				for {
					r, err := http.ReadRequest(br)
					if err != nil {
						return
					}
					_, _ = io.Copy(io.Discard, r.Body)
					if r.URL.Path == "/lost" {
						lost.Add(1)
						return // the leader has carried it out, and dies
					}
					fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				}
			})
		}
	})
	lead(t, newElector(t, client), "http://"+listener.Addr().String())
	forward := leaderhttp.Forward(t.Context(), newElector(t, client), "jobs", say("served here"))
	base := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
		if r.Body, err = r.GetBody(); err != nil {
			t.Error(err)
		}
		forward.ServeHTTP(w, r)
	}))
	awaitText(t, base, "ok")
	for _, method := range []string{"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "POST", "PATCH", "ODD"} {
		for _, body := range []string{"", "body"} {
			if method == "TRACE" && body != "" {
				continue
			}
			awaitText(t, base, "ok") // there is a connection that is used again
			r := newRequest(t, method, base+"/lost", strings.NewReader(body))
			r.Header.Set("Idempotency-Key", "1")
			r.Header.Set("X-Idempotency-Key", "1")
			lost.Store(0)
			got := send(t, r)
			if n := lost.Load(); n != 1 || got.StatusCode != http.StatusBadGateway || got.Header.Get("Retry-After") != "" {
				t.Errorf("%s with body %q arrived %d times, and was answered %s", method, body, n, got.Status)
			}
		}
	}
}

func TestTheLeaderGetsTheRequestOfTheClient(t *testing.T) {
	_, client := start(t)
	type seen struct {
		*http.Request
		body string
	}
	requests := make(chan seen, 1)
	l := newFake(t, client, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		requests <- seen{r, string(body)}
		w.WriteHeader(http.StatusTeapot)
	})
	b := newFollower(t, client)
	await(t, b.url, "forwarded", func(a answer) bool { return a.StatusCode == http.StatusTeapot })
	<-requests
	base, err := leader.New(client)
	if err != nil {
		t.Fatal(err)
	}
	current, err := base.Current(t.Context(), "jobs")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Proclaim(t.Context(), current.Value+"/base%2Fpath"); err != nil {
		t.Fatal(err)
	}
	await(t, b.url+"/probe", "the new value", func(answer) bool { return strings.HasPrefix((<-requests).URL.Path, "/base") })

	for _, method := range []string{"GET", "HEAD", "POST", "DELETE", "ODD"} {
		for _, body := range []string{"", "body"} {
			r := newRequest(t, method, b.url+"//x/../y%2Fz?a=1;b=2&%zz", strings.NewReader(body))
			r.Host = "service.example"
			r.Header.Set("X-Forwarded-For", "6.6.6.6")
			r.Header.Set("X-Forwarded-Host", "evil")
			r.Header.Set("X-Forwarded-Proto", "https")
			r.Header.Set("Forwarded", "for=6.6.6.6")
			r.Header.Set("Connection", "X-Forwarded-Proto, Leader-Forwarded")
			r.Header.Set("Cookie", "c=1")
			if got := send(t, r); got.StatusCode != http.StatusTeapot {
				t.Fatalf("%s %q: %s %q", method, body, got.Status, got.text)
			}
			got := <-requests
			if got.Method != method || got.body != body || got.RequestURI != "/base%2Fpath//x/../y%2Fz?a=1;b=2&%zz" {
				t.Errorf("%s %s with body %q", got.Method, got.RequestURI, got.body)
			}
			if got.ContentLength != int64(len(body)) || len(got.TransferEncoding) > 0 {
				t.Errorf("%s: length %d, encoding %v", method, got.ContentLength, got.TransferEncoding)
			}
			if got.Header.Get("Accept-Encoding") != "" { // an answer must not be uncompressed on its way
				t.Errorf("%s: %v", method, got.Header)
			}
			if got.Host != "service.example" || got.Header.Get("Cookie") != "c=1" || got.Header.Get(header) == "" {
				t.Errorf("%s: host %s, %v", method, got.Host, got.Header)
			}
			h := got.Header
			if h.Get("X-Forwarded-For") != "127.0.0.1" || h.Get("X-Forwarded-Host") != "service.example" ||
				h.Get("X-Forwarded-Proto") != "http" || h.Get("Forwarded") != "" {
				t.Errorf("%s: %v", method, h)
			}
		}
	}
}

func TestHeadersOfATrustedProxyArePassedOn(t *testing.T) {
	_, client := start(t)
	requests := make(chan http.Header, 1)
	newFake(t, client, func(_ http.ResponseWriter, r *http.Request) { requests <- r.Header })
	b := newFollower(t, client, leaderhttp.WithTrustedProxy(func(r *http.Request) bool {
		return strings.HasPrefix(r.RemoteAddr, "127.0.0.1:") && r.Header.Get("Cookie") != ""
	}))
	await(t, b.url, "forwarded", func(a answer) bool { return a.StatusCode == http.StatusOK })
	<-requests
	r := newRequest(t, http.MethodGet, b.url, nil)
	set := map[string]string{
		"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Host": "public", "X-Forwarded-Proto": "https",
		"Forwarded": "for=6.6.6.6", "Cookie": "proxy",
	}
	for name, value := range set {
		r.Header.Set(name, value)
	}
	send(t, r)
	set["X-Forwarded-For"] += ", 127.0.0.1"
	got := <-requests
	for name, value := range set {
		if got.Get(name) != value {
			t.Errorf("%s: %q", name, got.Get(name))
		}
	}
	r = newRequest(t, http.MethodGet, b.url, nil)
	r.Header.Set("Cookie", "proxy")
	send(t, r)
	if got := <-requests; got.Get("X-Forwarded-For") != "127.0.0.1" || got.Get("X-Forwarded-Proto") != "http" {
		t.Errorf("without headers of the proxy: %v", got)
	}
}

func TestAURLThatIsNotUsableRefusesRequestsAndWarnsOnce(t *testing.T) {
	_, client := start(t)
	target := strings.TrimPrefix(serve(t, func() http.HandlerFunc {
		return func(http.ResponseWriter, *http.Request) { t.Error("a request was sent") }
	}()), "http://")
	var log journal
	b := newFollower(t, client, log.option())
	e := newElector(t, client)
	for _, value := range []string{
		"", "name", target, "//" + target, "/path", "ftp://" + target, "file:///etc/passwd", "javascript:alert(1)",
		"http:" + target, "http://", "http://:80", "http:///path", "http://user@" + target, "http://user:secret@" + target,
		"http://@" + target, "http://" + target + "?a=b", "http://" + target + "?", "http://" + target + "#top",
		"http://" + target + "\r\nX: y", " http://" + target, "http://[::1", "http://" + target + "/%zz", "unix:///run/x.sock",
		"http://169.254.169.254/latest/meta-data/", "http://[fe80::1]/", "http://[fe80::1%25lo]/", "http://[::ffff:169.254.169.254]/",
		"http://0.0.0.0:80/", "http://[::ffff:0.0.0.0]/", "http://[::]/", "http://224.0.0.1/", "http://[ff02::1]/", strings.Repeat("x", 1000),
	} {
		for range 2 { // two terms
			l := lead(t, e, value)
			awaitText(t, b.url, unusable)
			wantRefused(t, get(t, b.url), unusable)
			resign(t, l)
			awaitText(t, b.url, nobody)
		}
		if warned := log.warnings("not usable"); len(warned) != 1 {
			t.Errorf("%q: %d warnings: %v", value, len(warned), warned)
		} else if len(warned[0]) > 1000 {
			t.Errorf("%q: a warning of %d bytes", value, len(warned[0]))
		}
		log.mu.Lock()
		log.buf.Reset()
		log.mu.Unlock()
	}
}

func TestWithURLDecidesWhereRequestsAreSent(t *testing.T) {
	_, client := start(t)
	target, err := url.Parse(serve(t, say("ok")))
	if err != nil {
		t.Fatal(err)
	}
	urls := map[string]*url.URL{
		"good": target,
		"none": nil,
		"file": {Scheme: "file", Path: "/etc/passwd"},
		"user": {Scheme: "http", Host: target.Host, User: url.User("x")},
		"void": {},
		"meta": {Scheme: "http", Host: "169.254.169.254"}, // the transport does not connect to it
	}
	var log journal
	b := newFollower(t, client, log.option(), leaderhttp.WithURL(func(c leader.Candidate) (*url.URL, error) {
		if c.Token == 0 || c.Key == "" {
			t.Errorf("asked for %+v", c)
		}
		u, ok := urls[c.Value]
		if !ok {
			return target, errors.New("a stranger")
		}
		return u, nil
	}))
	l := lead(t, newElector(t, client), "good")
	for _, step := range []struct{ value, text string }{
		{"good", "ok"}, {"http://127.0.0.1:1", unusable}, {"good", "ok"}, {"none", unusable}, {"good", "ok"}, {"file", unusable},
		{"good", "ok"}, {"user", unusable}, {"good", "ok"}, {"void", unusable}, {"good", "ok"}, {"meta", unreached},
	} {
		if err := l.Proclaim(t.Context(), step.value); err != nil {
			t.Fatal(err)
		}
		awaitText(t, b.url, step.text)
	}
	if w := log.warnings("could not be forwarded"); len(w) != 1 || !strings.Contains(w[0], "link-local") {
		t.Errorf("warnings: %v", w)
	}
}

func TestAURLThatLeadsBackDoesNotLoop(t *testing.T) {
	_, client := start(t)
	var log journal
	b, c := newFollower(t, client, log.option()), newFollower(t, client, log.option())
	l := lead(t, newElector(t, client), b.url)
	awaitText(t, c.url, hopped) // from b
	if got := get(t, c.url); got.Header.Get("Leader-Refused-By") != "" {
		t.Errorf("the client is told who has refused: %v", got.Header)
	}
	awaitText(t, b.url, itself)
	await(t, b.url, "a warning", func(answer) bool { return len(log.warnings("leads to this instance")) > 0 })
	for range 100 {
		wantRefused(t, get(t, b.url), itself)
	}
	// In another term it is tried again, since the name may lead elsewhere by then, but there is no other warning.
	resign(t, l)
	awaitText(t, b.url, nobody)
	lead(t, newElector(t, client), b.url)
	awaitText(t, b.url, itself)
	for began := time.Now(); time.Since(began) < 6*time.Second; time.Sleep(50 * time.Millisecond) {
		get(t, b.url)
	}
	if w := log.warnings(""); len(w) != 1 {
		t.Errorf("warnings: %v", w)
	}
}

// The key of a term that was transferred stays while its work winds down.
func TestAnInstanceDoesNotForwardToItselfAfterItsTerm(t *testing.T) {
	_, client := start(t)
	var log journal
	var arrived atomic.Int32
	e := newElector(t, client)
	forward := leaderhttp.Forward(t.Context(), e, "jobs", say("a"), log.option())
	base := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get(header) != "" {
			arrived.Add(1)
		}
		forward.ServeHTTP(w, r)
	}))
	ended, release, ran := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ran <- e.Run(t.Context(), "jobs", base, func(ctx context.Context, _ *leader.Leader) error {
			<-ctx.Done()
			close(ended)
			<-release
			return nil
		})
	}()
	awaitText(t, base, "a")
	before := arrived.Load() // some may have met the election
	next := make(chan error, 1)
	b := newElector(t, client)
	go func() {
		_, err := b.Campaign(t.Context(), "jobs", serve(t, say("b")))
		next <- err
	}()
	for began := time.Now(); time.Since(began) < patience; time.Sleep(time.Millisecond) {
		if cs, err := b.Candidates(t.Context(), "jobs"); err == nil && len(cs) == 2 {
			break
		}
	}
	transferred := make(chan error, 1)
	go func() { transferred <- b.Transfer(t.Context(), "jobs", leader.Candidate{}) }()
	etcdtest.Await(t, "the end of the term", ended)
	for range 100 {
		wantRefused(t, get(t, base), "the term of this instance is over, and nobody leads yet")
	}
	if n := arrived.Load() - before; n > 0 {
		t.Errorf("%d requests of its own arrived", n)
	}
	close(release)
	if err := etcdtest.Await(t, "the transfer", transferred); err != nil {
		t.Error(err)
	}
	if err := etcdtest.Await(t, "the next term", next); err != nil {
		t.Error(err)
	}
	awaitText(t, base, "b")
	if w := log.warnings(""); len(w) > 0 {
		t.Errorf("warnings: %v", w)
	}
}

// The same, if the only sign of the term was that it was observed.
func TestATermWithoutRequestsIsNotedToo(t *testing.T) {
	_, client := start(t)
	e, observed := newElector(t, client), make(chan string, 10)
	h := leaderhttp.Forward(t.Context(), e, "jobs", say("a"), leaderhttp.WithURL(func(c leader.Candidate) (*url.URL, error) {
		observed <- c.Value
		return url.Parse("http://127.0.0.1:1") // nothing is sent there
	}))
	base := serve(t, h)
	l := lead(t, e, "first")
	if err := l.Proclaim(t.Context(), "second"); err != nil { // the first may be observed before the election is won
		t.Fatal(err)
	}
	for value := ""; value != "second"; {
		value = etcdtest.Await(t, "the value", observed)
	}
	other := newElector(t, client)
	ctx, cancel := context.WithCancel(t.Context())
	waited, transferred := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := other.Campaign(ctx, "jobs", "other")
		waited <- err
	}()
	go func() {
		err := leader.ErrNotCandidate
		for errors.Is(err, leader.ErrNotCandidate) {
			err = other.Transfer(ctx, "jobs", leader.Candidate{})
		}
		transferred <- err
	}()
	etcdtest.Await(t, "the end of the term", l.Context().Done())
	wantRefused(t, get(t, base), "the term of this instance is over, and nobody leads yet")
	resign(t, l)
	if err := etcdtest.Await(t, "the next term", waited); err != nil {
		t.Error(err)
	}
	if err := etcdtest.Await(t, "the transfer", transferred); err != nil {
		t.Error(err)
	}
	cancel()
}

func TestARequestEndsWithTheTermOfTheLeaderThatServesIt(t *testing.T) {
	_, client := start(t)
	serving, causes := make(chan int64), make(chan error, 1)
	a := newInstance(t, client, func(w http.ResponseWriter, r *http.Request) {
		l, ok := leaderhttp.Term(r.Context())
		if !ok {
			t.Error("no term in the context")
			return
		}
		if r.URL.Path != "/work" {
			return
		}
		serving <- l.Token()
		<-r.Context().Done()
		causes <- context.Cause(r.Context())
		fmt.Fprintf(w, "stopped")
	})
	if _, ok := leaderhttp.Term(t.Context()); ok {
		t.Error("a term in a context that is no request's")
	}
	b := newFollower(t, client)
	l := lead(t, a.e, a.url)
	awaitText(t, b.url, "")
	for _, via := range []string{b.url, a.url} {
		answers := make(chan answer, 1)
		go func() { answers <- get(t, via+"/work") }()
		if token := etcdtest.Await(t, "the request", serving); token != l.Token() {
			t.Errorf("token %d, want %d", token, l.Token())
		}
		resign(t, l)
		if cause := etcdtest.Await(t, "the end", causes); !errors.Is(cause, leader.ErrResigned) {
			t.Errorf("ended with %v", cause)
		}
		if got := etcdtest.Await(t, "the answer", answers); got.text != "stopped" {
			t.Errorf("answered %s %q", got.Status, got.text)
		}
		l = lead(t, a.e, a.url)
		awaitText(t, b.url, "")
	}
}

func TestACancelledRequestIsCancelledAtTheLeader(t *testing.T) {
	_, client := start(t)
	serving, cancelled := make(chan struct{}), make(chan struct{})
	newFake(t, client, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/work" {
			close(serving)
			<-r.Context().Done()
			close(cancelled)
		}
	})
	var log journal
	b := newFollower(t, client, log.option())
	awaitText(t, b.url, "")
	ctx, cancel := context.WithCancel(t.Context())
	work := newRequest(t, http.MethodGet, b.url+"/work", nil).WithContext(ctx)
	failed := make(chan error, 1)
	go func() {
		resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(work)
		if err == nil {
			resp.Body.Close()
		}
		failed <- err
	}()
	etcdtest.Await(t, "the request", serving)
	cancel()
	etcdtest.Await(t, "the cancellation", cancelled)
	if err := etcdtest.Await(t, "the client", failed); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if w := log.warnings(""); len(w) > 0 {
		t.Errorf("warnings: %v", w)
	}
}

func TestFailuresSayWhetherTheRequestMayHaveBeenServed(t *testing.T) {
	_, client := start(t)
	addresses, err := etcdtest.FreeAddresses(1)
	if err != nil {
		t.Fatal(err)
	}
	l := lead(t, newElector(t, client), "http://"+addresses[0]) // nobody listens
	var log journal
	b := newFollower(t, client, log.option(), leaderhttp.WithTransport(&http.Transport{
		DisableKeepAlives: true, ResponseHeaderTimeout: 50 * time.Millisecond,
	}))
	awaitText(t, b.url, unreached)
	wantRefused(t, get(t, b.url), unreached)
	wantRefused(t, get(t, b.url), unreached)
	if w := log.warnings("could not be forwarded"); len(w) != 1 {
		t.Errorf("warnings: %v", w)
	}

	hang := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	if err := l.Proclaim(t.Context(), hang); err != nil {
		t.Fatal(err)
	}
	got := await(t, b.url, "a timeout", func(a answer) bool { return a.StatusCode != http.StatusServiceUnavailable })
	if got.StatusCode != http.StatusGatewayTimeout || got.Header.Get("Retry-After") != "" {
		t.Errorf("timeout: %s", got.Status)
	}

	breaks := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/midway" {
			w.Header().Set("Content-Length", "10")
			fmt.Fprintf(w, "half")
			w.(http.Flusher).Flush()
		}
		panic(http.ErrAbortHandler)
	}))
	if err := l.Proclaim(t.Context(), breaks); err != nil {
		t.Fatal(err)
	}
	got = await(t, b.url, "a failure", func(a answer) bool { return a.StatusCode == http.StatusBadGateway })
	if got.Header.Get("Retry-After") != "" || !strings.Contains(got.text, "may have carried out") {
		t.Errorf("%v %q", got.Header, got.text)
	}
	r := newRequest(t, http.MethodGet, b.url+"/midway", nil)
	r.Close = true
	if resp, err := (&http.Transport{}).RoundTrip(r); err == nil { // else the forwarder had sent nothing yet
		defer resp.Body.Close()
		if text, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("an answer that broke off: %q", text)
		}
	}
}

func TestAnswersArriveAsTheLeaderWritesThem(t *testing.T) {
	_, client := start(t)
	read := make(chan struct{})
	newFake(t, client, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/sse":
			w.Header().Set("Content-Type", "text/event-stream")
		case "/sized":
			w.Header().Set("Content-Length", "30")
		case "/chunked":
		default:
			return
		}
		for range 3 {
			fmt.Fprintf(w, "%-10s", "event")
			w.(http.Flusher).Flush()
			<-read
		}
	})
	b := newFollower(t, client)
	awaitText(t, b.url, "")
	for _, path := range []string{"/sse", "/sized", "/chunked"} {
		r := newRequest(t, http.MethodGet, b.url+path, nil)
		r.Close = true
		resp, err := (&http.Transport{}).RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			event := make([]byte, 10)
			if _, err := io.ReadFull(resp.Body, event); err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			read <- struct{}{} // the leader waits until the client has read
		}
		resp.Body.Close()
	}
}

func TestTrailersAndInformationalAnswersArePassedOn(t *testing.T) {
	_, client := start(t)
	newFake(t, client, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style>")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Trailer", "Sum")
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		fmt.Fprintf(w, "%s %s", body, r.Trailer.Get("Check"))
		w.Header().Set("Sum", "5")
		w.Header().Set(http.TrailerPrefix+"Late", "6")
	})
	b := newFollower(t, client)
	await(t, b.url, "forwarded", func(a answer) bool { return a.StatusCode == http.StatusOK })
	r := newRequest(t, http.MethodPost, b.url, io.NopCloser(strings.NewReader("body")))
	r.ContentLength = -1
	r.Trailer = http.Header{"Check": {"7"}}
	got := send(t, r)
	if got.text != "body 7" || got.Trailer.Get("Sum") != "5" || got.Trailer.Get("Late") != "6" {
		t.Errorf("%q, trailers %v", got.text, got.Trailer)
	}
}

func TestConnectionsAreUpgraded(t *testing.T) {
	_, client := start(t)
	newFake(t, client, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "echo" {
			return
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_, _ = io.Copy(conn, rw)
	})
	b := newFollower(t, client)
	awaitText(t, b.url, "")
	conn, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v, %v", resp, err)
	}
	for _, text := range []string{"one", "two"} {
		fmt.Fprintf(conn, "%s", text)
		got := make([]byte, len(text))
		if _, err := io.ReadFull(br, got); err != nil || string(got) != text {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

func TestTLSAndHTTP2WithATransportOfTheUser(t *testing.T) {
	_, client := start(t)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s%v", r.Proto, body, err)
	}))
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	transport := s.Client().Transport.(*http.Transport)
	t.Cleanup(transport.CloseIdleConnections)
	b := newFollower(t, client, leaderhttp.WithTransport(transport))
	var log journal
	c := newFollower(t, client, log.option())
	lead(t, newElector(t, client), s.URL)
	awaitText(t, b.url, "HTTP/2.0 <nil>")
	if got := send(t, newRequest(t, http.MethodPost, b.url, strings.NewReader("body"))); got.text != "HTTP/2.0 body<nil>" {
		t.Errorf("%s %q", got.Status, got.text)
	}
	// The certificate is not checked less strictly by default.
	await(t, c.url, "a refused certificate", func(a answer) bool { return a.StatusCode == http.StatusBadGateway })
	if w := log.warnings(x509.UnknownAuthorityError{}.Error()); len(w) != 1 {
		t.Errorf("warnings: %v", log.warnings(""))
	}
}

func TestAfterTheEndOfCtxOnlyTheLeaderServes(t *testing.T) {
	_, client := start(t)
	const stopped = "this instance does not lead and has stopped forwarding"
	a, b := newElector(t, client), newElector(t, client)
	ctx, cancel := context.WithCancel(t.Context())
	atA := serve(t, leaderhttp.Forward(ctx, a, "jobs", say("a")))
	atB := serve(t, leaderhttp.Forward(ctx, b, "jobs", say("b")))
	l := lead(t, a, atA)
	awaitText(t, atB, "a")
	cancel()
	wantRefused(t, get(t, atB), stopped)
	if got := get(t, atA); got.text != "a" {
		t.Errorf("the leader answers %s %q", got.Status, got.text)
	}
	resign(t, l)
	wantRefused(t, get(t, atA), stopped)
	lead(t, b, atB)
	if got := get(t, atB); got.text != "b" {
		t.Errorf("the leader answers %s %q", got.Status, got.text)
	}
	late := serve(t, leaderhttp.Forward(ctx, a, "jobs", say("a")))
	wantRefused(t, get(t, late), stopped)
}

func TestForwardLeavesNothingWhenCtxHasEnded(t *testing.T) {
	m := etcdtest.Start(t)
	client := etcdtest.NewClient(t, m.Endpoint)
	serving, finish := make(chan struct{}), make(chan struct{})
	base := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			serving <- struct{}{}
			<-finish
		}
		fmt.Fprintf(w, "ok")
	}))
	if _, err := client.Put(t.Context(), "jobs/1", base); err != nil { // a candidate without goroutines
		t.Fatal(err)
	}
	e := newElector(t, client)
	running := goleak.IgnoreCurrent()
	ctx, cancel := context.WithCancel(t.Context())
	h := leaderhttp.Forward(ctx, e, "jobs", say("none"))
	ask := func(path string) string {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return strings.TrimSpace(w.Body.String())
	}
	for ask("/") != "ok" {
		time.Sleep(time.Millisecond)
	}
	slow := make(chan string)
	go func() { slow <- ask("/slow") }()
	etcdtest.Await(t, "the request", serving)
	cancel()
	close(finish)
	if got := etcdtest.Await(t, "the answer", slow); got != "ok" { // it was under way
		t.Errorf("answered %q", got)
	}
	// The server's side of a connection ends after that of the forwarder.
	goleak.VerifyNone(t, running)
}

func TestAClosedElectorRefuses(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	h := serve(t, leaderhttp.Forward(t.Context(), e, "jobs", say("none")))
	newFake(t, client, say("ok"))
	awaitText(t, h, "ok")
	if err := e.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitText(t, h, unknown)
}

func TestADeniedObservationRefusesAndIsTriedAgain(t *testing.T) {
	t.Parallel()
	m := etcdtest.Start(t, etcdtest.Settings{"bcrypt-cost": 4})
	root := etcdtest.NewClient(t, m.Endpoint)
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, user := range []string{"root", "service"} {
		must(root.UserAdd(ctx, user, user))
		must(root.RoleAdd(ctx, user))
		must(root.UserGrantRole(ctx, user, user))
	}
	must(root.AuthEnable(ctx))
	as := func(user string) *clientv3.Client {
		return etcdtest.NewClientFrom(t, clientv3.Config{Endpoints: []string{m.Endpoint}, Username: user, Password: user})
	}
	admin := as("root")
	newFake(t, admin, say("ok"))
	var log journal
	b := newFollower(t, as("service"), log.option())
	awaitText(t, b.url, unknown)
	wantRefused(t, get(t, b.url), unknown)
	must(admin.RoleGrantPermission(ctx, "service", "jobs/", "jobs0", clientv3.PermissionType(clientv3.PermRead)))
	awaitText(t, b.url, "ok")
	if w := log.warnings("permission denied"); len(w) != 1 {
		t.Errorf("warnings: %v", w)
	}
}

// A counter counts the watches that its client opens.
type counter struct {
	clientv3.Watcher
	n atomic.Int32
}

func (c *counter) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	c.n.Add(1)
	return c.Watcher.Watch(ctx, key, opts...)
}

func TestOneWatchServesAllRequests(t *testing.T) {
	m, client := start(t)
	newFake(t, client, say("ok"))
	mine := etcdtest.NewClient(t, m.Endpoint)
	watches := &counter{Watcher: mine.Watcher}
	mine.Watcher = watches
	b := newFollower(t, mine)
	awaitText(t, b.url, "ok")
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for range 50 {
				get(t, b.url)
			}
		})
	}
	clients.Wait()
	if n := watches.n.Load(); n != 1 {
		t.Errorf("%d watches", n)
	}
}

// net/http removes the files of a form from the request that it has made, and local gets a copy of that.
func TestFilesOfAFormAreRemovedAfterTheRequest(t *testing.T) {
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	local := func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseMultipartForm(1); err != nil {
			t.Error(err)
		}
		found, _ := filepath.Glob(filepath.Join(dir, "multipart-*"))
		if len(found) != 1 {
			t.Errorf("the form is not on disk: %v", found)
		}
		say("ok")(w, r)
	}
	upload := func(url string) {
		var body bytes.Buffer
		form := multipart.NewWriter(&body)
		part, err := form.CreateFormFile("file", "name")
		if err != nil {
			t.Fatal(err)
		}
		_, err = part.Write(make([]byte, 100<<10))
		if err := errors.Join(err, form.Close()); err != nil {
			t.Fatal(err)
		}
		r := newRequest(t, http.MethodPost, url, &body)
		r.Header.Set("Content-Type", form.FormDataContentType())
		if a := send(t, r); a.text != "ok" {
			t.Fatalf("%s %q", a.Status, a.text)
		}
	}
	left := func() int {
		found, _ := filepath.Glob(filepath.Join(dir, "multipart-*"))
		for _, f := range found {
			if err := os.Remove(f); err != nil {
				t.Error(err)
			}
		}
		return len(found)
	}
	plain := httptest.NewServer(http.HandlerFunc(local))
	upload(plain.URL)
	plain.Close() // waits for the handler's connection
	if n := left(); n != 0 {
		t.Errorf("without Forward: %d files are left", n)
	}
	e := newElector(t, client)
	lead(t, e, "http://127.0.0.1:1")
	forwarding := httptest.NewServer(leaderhttp.Forward(t.Context(), e, "jobs", http.HandlerFunc(local)))
	upload(forwarding.URL)
	forwarding.Close()
	if n := left(); n != 0 {
		t.Errorf("with Forward: %d files are left", n)
	}
}

// The error of url.Parse has the whole value in it.
func TestAValueThatCannotBeParsedIsNotLoggedWhole(t *testing.T) {
	_, client := start(t)
	var log journal
	b := newFollower(t, client, log.option())
	l := lead(t, newElector(t, client), "http://host/%zz"+strings.Repeat("x", 500_000))
	awaitText(t, b.url, unusable)
	for _, line := range log.warnings("not usable") {
		if len(line) > 1000 {
			t.Errorf("a warning of %d bytes", len(line))
		}
	}
	resign(t, l)
}

// A client learns the name that is meant for the forwarder only, and has the leader's handler answer with it.
func TestAClientCannotPretendThatARequestHasComeBack(t *testing.T) {
	_, client := start(t)
	a := newInstance(t, client, func(w http.ResponseWriter, r *http.Request) {
		for k, v := range r.URL.Query() { // as a handler does that passes on the answer of another server
			w.Header()[k] = v
		}
		say("leads")(w, r)
	})
	lead(t, a.e, a.url)
	b := newFollower(t, client)
	awaitText(t, b.url, "leads")
	r := newRequest(t, http.MethodGet, b.url, nil)
	r.Header.Set(header, "election=jobs&token=0")
	id := send(t, r).Header.Get("Leader-Refused-By")
	get(t, b.url+"/?Leader-Refused-By="+id)
	if got := get(t, b.url); got.StatusCode != http.StatusOK {
		t.Errorf("from now on: %s %q", got.Status, got.text)
	}
}

func TestMissingArgumentsPanic(t *testing.T) {
	_, client := start(t)
	e := newElector(t, client)
	for name, f := range map[string]func(){
		"e":                func() { leaderhttp.Forward(t.Context(), nil, "jobs", say("")) },
		"local":            func() { leaderhttp.Forward(t.Context(), e, "jobs", nil) },
		"Option{}":         func() { leaderhttp.Forward(t.Context(), e, "jobs", say(""), leaderhttp.Option{}) },
		"WithURL":          func() { leaderhttp.WithURL(nil) },
		"WithTransport":    func() { leaderhttp.WithTransport(nil) },
		"WithTrustedProxy": func() { leaderhttp.WithTrustedProxy(nil) },
		"WithLogger":       func() { leaderhttp.WithLogger(nil) },
	} {
		func() {
			defer func() {
				if r := fmt.Sprint(recover()); !strings.Contains(r, name+": must not be nil") {
					t.Errorf("%s: %v", name, r)
				}
			}()
			f()
		}()
	}
}

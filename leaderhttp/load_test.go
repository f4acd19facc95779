package leaderhttp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"example.com/leader/leaderhttp"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A trial is a service of several instances whose leader changes again and again.
type trial struct {
	client  *clientv3.Client
	calls   sync.Map     // how often the handler was called, by the id of the request
	largest atomic.Int64 // token of a term in which a request was served
	terms   atomic.Int64

	mu      sync.Mutex
	serving *leader.Leader
	quota   int           // how many requests are still to be served in the term
	met     chan struct{} // closed when they were
}

// begin says that a term ends after some requests.
func (tr *trial) begin(l *leader.Leader) (met <-chan struct{}) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.serving, tr.quota, tr.met = l, 1+int(tr.terms.Add(1)%20), make(chan struct{})
	return tr.met
}

func (tr *trial) served(l *leader.Leader) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.serving == l {
		if tr.quota--; tr.quota == 0 {
			close(tr.met)
		}
	}
}

// handler counts the calls for each request, and writes what it serves to etcd under the guard of its term.
func (tr *trial) handler(tb testing.TB) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l, ok := leaderhttp.Term(r.Context())
		if !ok {
			tb.Error("served without a term")
			return
		}
		// Once a later term has served a request, this one must be over.
		if largest := tr.largest.Load(); l.Token() < largest && l.IsLeader() {
			tb.Errorf("%d and %d lead at a time", l.Token(), largest)
		}
		for largest := tr.largest.Load(); l.Token() > largest && !tr.largest.CompareAndSwap(largest, l.Token()); {
			largest = tr.largest.Load()
		}
		id, err := io.ReadAll(r.Body)
		if err != nil {
			tb.Errorf("read a request: %v", err)
		}
		n, _ := tr.calls.LoadOrStore(string(id), new(atomic.Int32))
		n.(*atomic.Int32).Add(1)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), patience)
		defer cancel()
		put, err := tr.client.Txn(ctx).If(l.Guard()).Then(clientv3.OpPut("served/"+string(id), fmt.Sprint(l.Token()))).Commit()
		switch {
		case err != nil:
			tb.Errorf("write: %v", err)
		case !put.Succeeded:
			w.WriteHeader(http.StatusConflict)
		}
		tr.served(l)
	})
}

// campaign leads again and again. Each term ends when its quota is met, by a resignation or by a transfer.
func (tr *trial) campaign(ctx context.Context, tb testing.TB, e, operator *leader.Elector, value string) {
	for ctx.Err() == nil {
		var asked sync.WaitGroup
		err := e.Run(ctx, "jobs", value, func(ctx context.Context, l *leader.Leader) error {
			met := tr.begin(l)
			select {
			case <-met:
			case <-ctx.Done():
				return nil
			}
			if tr.terms.Load()%2 == 0 {
				return nil
			}
			asked.Go(func() {
				if err := operator.Transfer(ctx, "jobs", leader.Candidate{}); err != nil && ctx.Err() == nil {
					_ = l.Resign(ctx) // nobody waits
				}
			})
			<-ctx.Done()
			return nil
		})
		asked.Wait()
		if err != nil && !errors.Is(err, context.Canceled) {
			tb.Errorf("Run: %v", err)
			return
		}
	}
}

func TestEachRequestIsServedOnceByTheLeaderOrRefusedWhileTheLeaderChanges(t *testing.T) {
	const requests, nodes, clients = 10_000, 3, 16
	m, client := start(t)
	tr := &trial{client: client}
	var log journal
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var campaigns sync.WaitGroup
	var urls []string
	for range nodes {
		e := newElector(t, etcdtest.NewClient(t, m.Endpoint))
		base := serve(t, leaderhttp.Forward(t.Context(), e, "jobs", tr.handler(t), log.option()))
		urls = append(urls, base)
		operator := newElector(t, client)
		campaigns.Go(func() { tr.campaign(ctx, t, e, operator, base) })
	}

	var sent, refused, fenced atomic.Int64
	transport := &http.Transport{MaxIdleConnsPerHost: clients}
	defer transport.CloseIdleConnections()
	var clientsDone sync.WaitGroup
	var answers sync.Map // status by id
	for range clients {
		clientsDone.Go(func() {
			for {
				n := sent.Add(1)
				if n > requests || t.Failed() {
					return
				}
				id := strconv.FormatInt(n, 10)
				for attempt := 0; ; attempt++ { // what was refused is sent again under another id
					id := id + "." + strconv.Itoa(attempt)
					r := newRequest(t, http.MethodPost, urls[(int(n)+attempt)%nodes], strings.NewReader(id))
					resp, err := transport.RoundTrip(r)
					if err != nil {
						t.Errorf("request %s: %v", id, err)
						return
					}
					_, _ = io.Copy(io.Discard, resp.Body) // so that the connection is used again
					resp.Body.Close()
					answers.Store(id, resp.StatusCode)
					if resp.StatusCode != http.StatusServiceUnavailable {
						break
					}
					refused.Add(1)
					time.Sleep(100 * time.Microsecond) // leave the machine to the election
				}
			}
		})
	}
	clientsDone.Wait()
	stop()
	campaigns.Wait()
	if t.Failed() {
		return
	}

	stored, err := client.Get(t.Context(), "served/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		t.Fatal(err)
	}
	written := make(map[string]bool)
	for _, kv := range stored.Kvs {
		written[strings.TrimPrefix(string(kv.Key), "served/")] = true
	}
	answers.Range(func(id, status any) bool {
		var calls int32
		if n, ok := tr.calls.Load(id); ok {
			calls = n.(*atomic.Int32).Load()
		}
		want := map[any]int32{http.StatusOK: 1, http.StatusConflict: 1, http.StatusServiceUnavailable: 0}
		if n, ok := want[status]; !ok || calls != n || written[id.(string)] != (status == http.StatusOK) {
			t.Errorf("request %s was answered %d, served %d times, written %v", id, status, calls, written[id.(string)])
		}
		if status == http.StatusConflict {
			fenced.Add(1)
		}
		return true
	})
	t.Logf("%d requests were served in %d terms, %d met the end of their term, %d were refused first",
		len(written), tr.terms.Load(), fenced.Load(), refused.Load())
	if w := log.warnings(""); len(w) > 0 {
		t.Errorf("warnings: %v", w)
	}
	if len(written) < requests/2 || tr.terms.Load() < requests/100 {
		t.Errorf("%d requests were served in %d terms", len(written), tr.terms.Load())
	}
}

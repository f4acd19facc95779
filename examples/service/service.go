package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"example.com/leader"
	"example.com/leader/leaderhttp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// drainTimeout bounds how long the service waits for open requests when it stops. Before that it stops the worker and
// resigns, which takes moments, or 2 s if etcd does not answer. The grace period of whoever stops the service must
// cover both.
const drainTimeout = 10 * time.Second

// A service is one instance.
type service struct {
	client   *clientv3.Client
	elector  *leader.Elector
	election string
	url      string // at which the other instances reach this one: its value in the election
	log      *slog.Logger

	leader atomic.Pointer[observed] // nil until the first observation
	worked atomic.Int64             // when the work last made an attempt, in Unix nanoseconds; 0 while there is none
}

// An observed is what this instance knows about the leader.
type observed struct {
	value string // its value in the election, cut to maxValue bytes; "" if nobody leads
	cut   int    // how many bytes of the value are missing
	token int64  // 0 if nobody leads
}

// maxValue is how many bytes of a leader's value the service keeps, logs and returns. Whoever may write below the
// election's name chooses the value, and etcd accepts 1.5 MB. The value that this service campaigns with is far
// shorter.
const maxValue = 256

// run serves and takes part in the election until ctx ends, which is not an error, or until something fails
// permanently. It stops in this order: the worker, then leadership, then the rest. So another instance can continue the
// work while this one still answers open requests.
func (s *service) run(ctx context.Context, listener net.Listener, metrics prometheus.Gatherer) error {
	running, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	observing, blind := context.WithCancel(context.WithoutCancel(ctx))
	defer blind()
	server := &http.Server{
		Handler:           s.handler(running, observing, metrics),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
	var parts sync.WaitGroup
	parts.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			fail(fmt.Errorf("serve: %w", err))
		}
	})
	parts.Go(func() {
		if err := s.observe(observing); observing.Err() == nil {
			fail(err)
		}
	})

	err := s.elector.Run(running, s.election, s.url, s.work)
	fail(err) // from now on the instance is not ready
	if ctx.Err() != nil {
		s.log.Info("draining", "cause", context.Cause(ctx))
		err = nil
	}

	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if derr := server.Shutdown(drain); derr != nil {
		s.log.Warn("open requests were cut off", "error", derr)
		server.Close()
	}
	blind()
	parts.Wait()
	return err
}

// observe stores who leads, until ctx ends or observing fails permanently.
func (s *service) observe(ctx context.Context) error {
	for c, err := range s.elector.Observe(ctx, s.election) {
		if err != nil {
			return err
		}
		o := &observed{token: c.Token}
		o.value, o.cut = cut(c.Value)
		log := s.log
		if o.cut > 0 {
			log = log.With("cut", o.cut)
		}
		log.Info("leader observed", "leader", o.value, "token", o.token)
		s.leader.Store(o)
	}
	return nil
}

// cut returns the first maxValue bytes of a value, or a few fewer so that it does not cut a character, and the number
// of bytes that are missing.
func cut(value string) (beginning string, missing int) {
	if len(value) <= maxValue {
		return value, 0
	}
	end := maxValue
	for end > maxValue-utf8.UTFMax && !utf8.RuneStart(value[end]) {
		end--
	}
	return strings.Clone(value[:end]), len(value) - end // a clone, so that the rest does not stay in memory
}

// handler returns the handler of all requests. /readyz fails once running has ended. Writes are forwarded until observing
// ends.
func (s *service) handler(running, observing context.Context, metrics prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	write := http.HandlerFunc(s.serveTick)
	mux.Handle("POST /ticks", leaderhttp.Forward(observing, s.elector, s.election, write, leaderhttp.WithLogger(s.log)))
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /leader", s.serveLeader)

	// A process is alive if it answers. This says nothing about etcd: a restart would not bring etcd back.
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })

	// An instance is ready, as leader or follower, once it knows who leads. So an instance that cannot reach etcd from
	// the start stops a rollout. If it loses etcd later it stays ready, and answers with what it knows. Otherwise an
	// outage of etcd would take away all instances at once.
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		switch {
		case running.Err() != nil:
			http.Error(w, "stopping", http.StatusServiceUnavailable)
		case s.leader.Load() == nil:
			http.Error(w, "leader not observed yet", http.StatusServiceUnavailable)
		default:
			fmt.Fprintln(w, "ready")
		}
	})
	return mux
}

// A status is the answer of /leader.
type status struct {
	Leader string `json:"leader"`        // its value in the election, cut to maxValue bytes; "" if nobody leads
	Cut    int    `json:"cut,omitempty"` // how many bytes of the value are missing
	Token  int64  `json:"token"`         // 0 if nobody leads
	Self   bool   `json:"self"`          // the leader is this instance, and its term holds
}

func (s *service) serveLeader(w http.ResponseWriter, _ *http.Request) {
	o := s.leader.Load()
	if o == nil {
		http.Error(w, "leader not observed yet", http.StatusServiceUnavailable)
		return
	}
	term, leads := s.elector.Leading(s.election)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(status{ // fails if the client is gone
		Leader: o.value,
		Cut:    o.cut,
		Token:  o.token,
		Self:   leads && term.Token() == o.token, // the observation may be outdated
	})
}

// serveTick adds a tick. leaderhttp.Forward calls it on the leader alone, whichever instance has got the request.
func (s *service) serveTick(w http.ResponseWriter, r *http.Request) {
	term, ok := leaderhttp.Term(r.Context())
	if !ok {
		http.Error(w, "must be called by leaderhttp.Forward", http.StatusInternalServerError)
		return
	}
	n, err := s.tick(r.Context(), term)
	switch {
	case errors.Is(err, errRefused): // nothing was written, so the client may try again
		w.Header().Set("Retry-After", "1")
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
	case err != nil: // it is not known whether it was written
		http.Error(w, "no answer from etcd", http.StatusBadGateway)
	default:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]int64{"ticks": n, "token": term.Token()})
	}
}

// stuck is after how long without progress the work counts as stuck. An attempt takes 2 s at most, and a pause of 1 s
// follows.
const stuck = 10 * time.Second

// healthy is the check of leader.WithHealth. It asks about this process alone: while etcd is away the work still makes
// attempts.
func (s *service) healthy(context.Context, string) error {
	if at := s.worked.Load(); at != 0 && time.Since(time.Unix(0, at)) > stuck {
		return fmt.Errorf("the work has made no attempt for more than %v", stuck)
	}
	return nil
}

// close unlocks the lease file. The terms have ended before.
func (s *service) close(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := s.elector.Close(ctx); err != nil {
		s.log.Warn("the lease will expire", "error", err)
	}
}

// work is what the leader does: one tick per second. It returns as soon as ctx ends, with the term or the service. Its
// requests end with ctx too, so any margin is long enough for it.
func (s *service) work(ctx context.Context, l *leader.Leader) error {
	defer s.worked.Store(0)
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for {
		s.worked.Store(time.Now().UnixNano())
		n, err := s.tick(ctx, l)
		if err == nil {
			s.log.Info("tick", "n", n, "token", l.Token())
		} else if ctx.Err() == nil {
			s.log.Warn("tick failed, next one follows in a second", "token", l.Token(), "error", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-second.C:
		}
	}
}

var errRefused = errors.New("refused by the guard: the term is over")

// tick adds a tick to those in etcd and returns how many there are. The guard refuses the tick of a leader that does
// not yet know that it was replaced. If the answer is lost, the tick may still have been added.
func (s *service) tick(ctx context.Context, l *leader.Leader) (n int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	key := ticksKey(s.election)
	resp, err := s.client.Txn(ctx).
		If(l.Guard()).
		Then(clientv3.OpPut(key, time.Now().Format(time.RFC3339Nano)), clientv3.OpGet(key)).
		Commit()
	if err != nil {
		return 0, err
	}
	if !resp.Succeeded {
		return 0, errRefused
	}
	return resp.Responses[1].GetResponseRange().Kvs[0].Version, nil // etcd counts how often the key was put
}

// ticksKey is outside the election: the keys below its name are candidates.
func ticksKey(election string) string { return election + "-ticks" }

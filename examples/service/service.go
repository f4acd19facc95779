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
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// drainTimeout bounds the requests that are under way when the service stops. To stop the worker and
// to resign comes before that and takes moments, or 2 s if etcd is away: the grace period of whoever
// stops the service must have room for both.
const drainTimeout = 10 * time.Second

// A service is one instance.
type service struct {
	client   *clientv3.Client
	elector  *leader.Elector
	election string
	log      *slog.Logger

	leader atomic.Pointer[observed]      // nil until the first observation
	term   atomic.Pointer[leader.Leader] // of this instance, the last one
}

// An observed is what this instance knows of the leader.
type observed struct {
	value string // its value in the election, cut to maxValue bytes; "" if nobody leads
	cut   int    // how many bytes of the value are missing
	token int64  // 0 if nobody leads
}

// maxValue is how many bytes of a leader's value are kept, logged and answered. Whoever may write below the election's
// name chooses a value, and etcd takes 1.5 MB of it; what this service campaigns with is far shorter.
const maxValue = 256

// run serves and takes part in the election until ctx ends, which is no error, or something fails for
// good. It stops in the order in which that is missed: the worker first, then leadership, so that
// another instance goes on while this one answers the requests it still has, and then the rest.
func (s *service) run(ctx context.Context, listener net.Listener, metrics prometheus.Gatherer) error {
	running, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	observing, blind := context.WithCancel(context.WithoutCancel(ctx))
	defer blind()
	server := &http.Server{
		Handler:           s.handler(running, metrics),
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

	err := s.elector.Run(running, s.election, "", s.work)
	fail(err) // not ready any more, whatever the reason
	if ctx.Err() != nil {
		s.log.Info("draining", "cause", context.Cause(ctx))
		err = nil
	}

	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if derr := server.Shutdown(drain); derr != nil {
		s.log.Warn("requests are cut off", "error", derr)
		server.Close()
	}
	blind()
	parts.Wait()
	return err
}

// observe keeps in mind who leads, until ctx ends or for good.
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

// cut returns the first maxValue bytes of a value, or a few less so as not to end within a character, and how many
// bytes are missing.
func cut(value string) (beginning string, missing int) {
	if len(value) <= maxValue {
		return value, 0
	}
	end := maxValue
	for end > maxValue-utf8.UTFMax && !utf8.RuneStart(value[end]) {
		end--
	}
	return strings.Clone(value[:end]), len(value) - end // a clone, so that the rest is not kept in memory
}

// handler serves until running ends, and what is under way then.
func (s *service) handler(running context.Context, metrics prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /leader", s.serveLeader)

	// Alive is a process that answers. It says nothing about etcd: a restart would not bring that back.
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })

	// Ready is who can answer requests: leader or follower, as soon as it knows who leads, so that an
	// instance that cannot reach etcd from the start stops a rollout. Who loses etcd later stays
	// ready and answers what it knows: else an outage of etcd took all instances away at once.
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		switch {
		case running.Err() != nil:
			http.Error(w, "stopping", http.StatusServiceUnavailable)
		case s.leader.Load() == nil:
			http.Error(w, "who leads has not been observed yet", http.StatusServiceUnavailable)
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
	Self   bool   `json:"self"`          // it is this instance, and its term holds
}

func (s *service) serveLeader(w http.ResponseWriter, _ *http.Request) {
	o := s.leader.Load()
	if o == nil {
		http.Error(w, "who leads has not been observed yet", http.StatusServiceUnavailable)
		return
	}
	term := s.term.Load()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(status{ // an error says that the client is gone
		Leader: o.value,
		Cut:    o.cut,
		Token:  o.token,
		Self:   term != nil && term.Token() == o.token && term.IsLeader(), // what was observed may be outdated
	})
}

// work is what the leader does: a tick per second. It returns as soon as ctx ends, with the term or
// the service; its requests end with ctx too, so no margin is too short for it.
func (s *service) work(ctx context.Context, l *leader.Leader) error {
	s.term.Store(l)
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for {
		n, err := s.tick(ctx, l)
		if err == nil {
			s.log.Info("tick", "n", n, "token", l.Token())
		} else if ctx.Err() == nil {
			s.log.Warn("tick failed, the next will be tried", "token", l.Token(), "error", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-second.C:
		}
	}
}

var errRefused = errors.New("refused by the guard: the term is over")

// tick adds a tick to those in etcd and returns how many there are. The guard keeps a leader from it that
// does not know yet that it has been replaced. One whose answer is lost may have been added.
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
	return resp.Responses[1].GetResponseRange().Kvs[0].Version, nil // etcd counts how often a key was put
}

// ticksKey is not below the election, where candidates are.
func ticksKey(election string) string { return election + "-ticks" }

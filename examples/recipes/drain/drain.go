// Package drain takes an instance out of its elections, for example before its host goes down, and lets it in again. A
// drained instance has resigned and does not campaign.
//
//	s := drain.New()
//	http.Handle("/drain", s) // where only operators reach it: PUT drains, DELETE undrains
//	err := s.Run(ctx, func(ctx context.Context) error {
//		return leader.Run(ctx, client, "my-service/leader", "", work)
//	})
//
// The next in the queue leads as soon as work has returned. To choose who that is, call Elector.Transfer first.
package drain

import (
	"context"
	"errors"
	"net/http"
	"sync"
)

var errDrained = errors.New("the instance is drained")

// A Switch says whether an instance may take part in elections. It may, until Drain.
type Switch struct {
	mu      sync.Mutex
	drained bool
	stop    context.CancelCauseFunc // ends the call of campaign; nil if there is none
	changed chan struct{}           // closed, and replaced, when drained or stop changes
}

// New returns a Switch.
func New() *Switch { return &Switch{changed: make(chan struct{})} }

// Run calls campaign, and calls it again whenever the instance was drained and undrained. It blocks until campaign
// returns for another reason, or ctx ends. campaign must resign before it returns, as leader.Run does.
func (s *Switch) Run(ctx context.Context, campaign func(context.Context) error) error {
	for {
		running, stop := context.WithCancelCause(ctx)
		err := s.await(ctx, func() bool {
			if !s.drained { // as of now Drain finds what to stop
				s.stop = stop
			}
			return !s.drained
		})
		if err == nil {
			err = campaign(running)
		}
		stop(nil)
		s.change(func() { s.stop = nil })
		if err == nil || !errors.Is(context.Cause(running), errDrained) {
			return err
		}
	}
}

// Drain stops the work and resigns. It blocks until that is done or ctx ends; the instance is drained in either case.
func (s *Switch) Drain(ctx context.Context) error {
	s.change(func() {
		s.drained = true
		if s.stop != nil {
			s.stop(errDrained)
		}
	})
	return s.await(ctx, func() bool { return s.stop == nil || !s.drained })
}

// Undrain has Run campaign again, at the end of the queue.
func (s *Switch) Undrain() { s.change(func() { s.drained = false }) }

// ServeHTTP answers PUT when the instance is drained, and DELETE when it may campaign again.
func (s *Switch) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodPut:
		if err := s.Drain(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusGatewayTimeout)
		}
	case http.MethodDelete:
		s.Undrain()
	default:
		http.Error(w, "PUT drains, DELETE undrains", http.StatusMethodNotAllowed)
	}
}

func (s *Switch) change(do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	do()
	close(s.changed)
	s.changed = make(chan struct{})
}

// await blocks until condition, which is called under the lock, returns true, or until ctx ends.
func (s *Switch) await(ctx context.Context, condition func() bool) error {
	for {
		s.mu.Lock()
		ok, changed := condition(), s.changed
		s.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

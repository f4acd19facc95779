//go:build linux

package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strconv"
	"sync"

	"example.com/leader/internal/oracle"
)

// resource is something outside etcd to which leaders write. It protects itself as the documentation of Leader.Token
// says: it remembers the largest token of each election and refuses smaller ones.
type resource struct {
	*Recorder
	mu      sync.Mutex
	largest map[string]int64
}

// serveResource runs a resource at the unix socket until ctx ends.
func serveResource(ctx context.Context, dir, socket string) error {
	recorder, err := newRecorder(dir, "resource")
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: &resource{Recorder: recorder, largest: make(map[string]int64)}}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// ServeHTTP handles an append.
func (r *resource) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	election, value := req.FormValue("election"), req.FormValue("value")
	token, err := strconv.ParseInt(req.FormValue("token"), 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	result := oracle.OK
	if token < r.largest[election] {
		result = oracle.Failed
		w.WriteHeader(http.StatusConflict)
	} else {
		r.largest[election] = token
	}
	r.add(oracle.Entry{Kind: oracle.Accepted, Election: election, Token: token, Value: value, Result: result})
}

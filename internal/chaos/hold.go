//go:build linux

package main

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// A holder is the part of a worker's link to a member that can hold requests. While it holds, it stores what the worker
// writes. After release it forwards one write after another, some time apart. So a request that the worker has
// cancelled meanwhile is still carried out, because its cancellation is a later write. etcd's proxy, which comes next
// and does everything else, would deliver both at once, and etcd then usually ignores the request.
type holder struct {
	Endpoint string

	listener net.Listener
	dir      string
	running  sync.WaitGroup

	mu      sync.Mutex
	changed *sync.Cond
	holding bool
	spacing time.Duration // between two writes that were held
	closed  bool
	conns   map[net.Conn]bool
}

// startHolder returns a holder in front of a unix socket.
func startHolder(socket string) (*holder, error) {
	dir, err := os.MkdirTemp("", "hold") // a short name, because the path of a unix socket must be short
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", path)
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	h := &holder{Endpoint: "unix://" + path, listener: listener, dir: dir, conns: make(map[net.Conn]bool)}
	h.changed = sync.NewCond(&h.mu)
	h.running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return // closed
			}
			server, err := net.Dial("unix", socket)
			if err != nil {
				client.Close()
				continue
			}
			h.forward(client, server)
		}
	})
	return h, nil
}

// forward carries bytes between both until one of them closes.
func (h *holder) forward(client, server net.Conn) {
	h.mu.Lock()
	h.conns[client], h.conns[server] = true, true
	closed := h.closed
	h.mu.Unlock()
	end := func() {
		client.Close()
		server.Close()
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.conns, client)
		delete(h.conns, server)
		h.changed.Broadcast()
	}
	if closed {
		end()
		return
	}
	// Everything is read at once, held or not, so what one read returns is one write of the client.
	writes := make(chan []byte, 1<<16)
	h.running.Go(func() {
		defer close(writes)
		for {
			buf := make([]byte, 32<<10)
			n, err := client.Read(buf)
			if n > 0 {
				writes <- buf[:n]
			}
			if err != nil {
				return
			}
		}
	})
	h.running.Go(func() {
		defer end()
		held := 0 // number of held writes still to be forwarded
		for b := range writes {
			waited, spacing := h.wait(client)
			if waited {
				held = len(writes) + 1
			}
			if _, err := server.Write(b); err != nil {
				break
			}
			if held--; held > 0 {
				time.Sleep(spacing)
			}
		}
	})
	h.running.Go(func() {
		defer end()
		_, _ = io.Copy(client, server)
	})
}

// wait blocks while the holder holds and the connection is open. It reports whether it has blocked.
func (h *holder) wait(client net.Conn) (waited bool, spacing time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.holding && h.conns[client] {
		waited = true
		h.changed.Wait()
	}
	return waited, h.spacing
}

// hold stores what clients write until release.
func (h *holder) hold() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.holding = true
}

// release forwards what was held, each write some time after the previous one.
func (h *holder) release(spacing time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.holding, h.spacing = false, spacing
	h.changed.Broadcast()
}

func (h *holder) close() error {
	h.mu.Lock()
	h.closed, h.holding = true, false
	for c := range h.conns {
		c.Close()
	}
	h.changed.Broadcast()
	h.mu.Unlock()
	err := h.listener.Close()
	h.running.Wait()
	return errors.Join(err, os.RemoveAll(h.dir))
}

//go:build linux

package main

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMutationsAreUpToDate(t *testing.T) {
	t.Parallel()
	for _, m := range mutations {
		source, err := os.ReadFile(filepath.Join("..", "..", m.file))
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(source), m.old); n != 1 {
			t.Errorf("%s: %s has %q %d times, want once", m.name, m.file, m.old, n)
		}
		if _, err := choose(m.faults); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
	}
}

func TestOldEtcdIsSparedAuthentication(t *testing.T) {
	t.Parallel()
	for version, spared := range map[string]bool{
		"3.4.23": true, "3.4.27": true, "3.4.28": false,
		"3.5.0": false, "3.5.35": false, "3.7.3": false, "3.8.0-alpha.0": false, "4.4.0": false, "": false,
	} {
		for _, s := range sorts() {
			if got := s.unfit(version) != ""; got != (spared && s.name == "auth") {
				t.Errorf("%s with etcd %q: spared %v", s.name, version, got)
			}
		}
	}
}

func TestHolderDeliversLateAndApart(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "held") // short, as a unix socket's path must be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	server, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	h, err := startHolder(server.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.close(); err != nil {
			t.Error(err)
		}
	}()
	client, err := net.Dial("unix", strings.TrimPrefix(h.Endpoint, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	taken, err := server.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	write := func(text string) {
		t.Helper()
		if _, err := client.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	read := func(want string) {
		t.Helper()
		buf := make([]byte, len(want))
		if _, err := io.ReadFull(taken, buf); err != nil || string(buf) != want {
			t.Fatalf("read %q, %v, want %q", buf, err, want)
		}
	}
	write("before")
	read("before")

	h.hold()
	write("request")
	time.Sleep(50 * time.Millisecond) // for the holder to read it by itself
	write("cancellation")
	client.Close()
	if err := taken.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := taken.Read(make([]byte, 1)); n > 0 || !os.IsTimeout(err) {
		t.Fatalf("read %d bytes, %v, while they are held", n, err)
	}
	if err := taken.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}

	const spacing = 200 * time.Millisecond
	h.release(spacing)
	read("request")
	began := time.Now()
	read("cancellation")
	if apart := time.Since(began); apart < spacing/2 {
		t.Errorf("delivered %v after the other, want about %v", apart, spacing)
	}
	if n, err := taken.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read %d bytes, %v, want the end", n, err)
	}
}

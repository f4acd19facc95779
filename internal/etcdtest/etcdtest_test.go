package etcdtest

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/version"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

// Tests of a version mean nothing if they run another.
func TestMembersAreOfTheNamedBinary(t *testing.T) {
	want := version.Version
	if binary := os.Getenv(binaryEnv); binary != "" {
		out, err := exec.Command(binary, "--version").Output()
		if err != nil {
			t.Fatal(err)
		}
		line, _, _ := strings.Cut(string(out), "\n")
		want = strings.TrimPrefix(line, "etcd Version: ")
	}
	m := Start(t)
	status, err := NewClient(t, m.Endpoint).Status(t.Context(), m.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	if status.Version != want {
		t.Errorf("runs etcd %s, want %s", status.Version, want)
	}
}

// Another process may take a port just before etcd does. Then other ports are tried, and soon: not when the rest of the
// cluster has waited for the member in vain.
func TestClusterWithAPortThatIsTakenFailsAtOnce(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for what, binary := range map[string]string{"in this process": "", "in processes of their own": self} {
		t.Run(what, func(t *testing.T) {
			members, err := newMembers(filepath.Join(t.TempDir(), "members"), binary, 3, func(err error) { t.Error(err) }, nil)
			if err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("tcp", members[1].Endpoint)
			if err != nil {
				t.Skip(err) // it was taken indeed
			}
			defer l.Close()
			err = startAll(members)
			for _, m := range members {
				m.Stop()
			}
			if !errors.Is(err, errGivenUp) || errors.Is(err, errNotReady) {
				t.Errorf("the start of a cluster with a port that is taken: %v", err)
			}
		})
	}
}

func TestMemberKeepsItsDataAndEndpoint(t *testing.T) {
	m := Start(t)
	client := NewClient(t, m.Endpoint)
	put, err := client.Put(t.Context(), "key", "value")
	if err != nil {
		t.Fatal(err)
	}
	m.Stop()
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	get, err := client.Get(t.Context(), "key")
	if err != nil {
		t.Fatal(err)
	}
	if len(get.Kvs) != 1 || get.Kvs[0].ModRevision != put.Header.Revision {
		t.Errorf("after a restart the key is %v", get.Kvs)
	}
}

func TestServerNeedsLittleDisk(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	m := startCluster(t, "", 1)[0]
	if _, err := NewClient(t, m.Endpoint).Put(t.Context(), "key", "value"); err != nil {
		t.Fatal(err)
	}
	var size int64
	err := filepath.WalkDir(tmp, func(_ string, entry fs.DirEntry, err error) error {
		if info, e := entry.Info(); err == nil && e == nil { // etcd may have renamed it
			size += info.Size()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if size == 0 || size > 4<<20 {
		t.Errorf("a server needs %d bytes", size)
	}
}

// An etcd that cannot write, as on a full disk, panics while it starts.
func TestServerThatPanicsInStartIsAnError(t *testing.T) {
	_, _, err := run("", 1, func(err error) { t.Error(err) }, Settings{"wal-dir": "/dev/null/wal"})
	if !errors.Is(err, errFailed) || !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("got %v", err)
	}
}

// An etcd that cannot write later ends its process.
func TestServerThatFailsReportsItAndBreaksItsConnections(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	failed := make(chan error, 2)
	members, stop, err := run("", 1, func(err error) { failed <- err })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	client := NewClient(t, members[0].Endpoint)
	wals, err := filepath.Glob(filepath.Join(tmp, "*", "*", "*", "member", "wal"))
	if err != nil || len(wals) != 1 {
		t.Fatalf("found %v, %v", wals, err)
	}
	if err := os.RemoveAll(wals[0]); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	// The second segment of the log is to be in the folder that is gone.
	if _, err := client.Put(ctx, "key", strings.Repeat("x", 1<<20)); err == nil || ctx.Err() != nil {
		t.Errorf("Put returned %v", err)
	}
	select {
	case err := <-failed:
		if !errors.Is(err, errFailed) || !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("failed with %v", err)
		}
	case <-time.After(patience):
		t.Fatal("waited in vain for the failure")
	}
	stop()
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("left in the temporary folder: %v, %v", left, err)
	}
	if len(failed) > 0 {
		t.Errorf("failed twice: %v", <-failed)
	}
}

func TestLinkThatCannotListenFailsAtOnce(t *testing.T) {
	began := time.Now()
	l, err := startLink("127.0.0.1:1", filepath.Join(t.TempDir(), strings.Repeat("x", 100)))
	if err == nil {
		l.Close()
		t.Fatal("listens at a path that is too long")
	}
	if took := time.Since(began); took > patience || !strings.Contains(err.Error(), "bind") {
		t.Errorf("after %v: %v", took, err)
	}
}

func TestLinkWorksWithALongTemporaryFolder(t *testing.T) {
	long := filepath.Join(t.TempDir(), strings.Repeat("x", 100))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", long)
	link := NewLink(t, Start(t))
	if _, err := NewClient(t, link.Endpoint).Get(t.Context(), "key"); err != nil {
		t.Error(err)
	}
}

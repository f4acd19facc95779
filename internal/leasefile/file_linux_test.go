package leasefile

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	ownerVariable = "LEASEFILE_TEST_OWNER" // the path of the file that a process of the tests owns
	coreVariable  = "LEASEFILE_TEST_CORE"  // how many bytes its core has, at least, if it is to have one
	cluster       = 0xcdf818194e3a8c32
)

var core []byte

// A process of the tests owns a file until it is killed.
func TestMain(m *testing.M) {
	if path := os.Getenv(ownerVariable); path != "" {
		f, err := Open(path)
		if err == nil {
			err = errors.Join(f.Add(cluster, 1), f.Add(cluster, 2))
		}
		if size, _ := strconv.Atoi(os.Getenv(coreVariable)); size > 0 {
			core = bytes.Repeat([]byte{1}, size)
			var limit syscall.Rlimit
			err = errors.Join(err, syscall.Getrlimit(syscall.RLIMIT_CORE, &limit))
			limit.Cur = limit.Max
			err = errors.Join(err, syscall.Setrlimit(syscall.RLIMIT_CORE, &limit))
		}
		fmt.Println(err)
		if err == nil {
			time.Sleep(time.Hour)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// startOwner starts a process that owns the file. It returns what the process says of that: "<nil>" is good.
func startOwner(t *testing.T, path string, files ...*os.File) (owner *exec.Cmd, said string) {
	t.Helper()
	owner = newOwner(t, path)
	owner.ExtraFiles = files
	return owner, start(t, owner)
}

func newOwner(t *testing.T, path string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	owner := exec.Command(self)
	owner.Env = append(os.Environ(), ownerVariable+"="+path)
	return owner
}

func start(t *testing.T, owner *exec.Cmd) (said string) {
	t.Helper()
	out, err := owner.StdoutPipe()
	if err == nil {
		err = owner.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = owner.Process.Kill()
		_ = owner.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

func open1(t *testing.T, path string) *File {
	t.Helper()
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.crash)
	return f
}

func (f *File) crash() { Crash(f.path) }

// await returns what the file names when its owner is dead.
func await(t *testing.T, path string) Record {
	t.Helper()
	r, err := Await(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// locked reports whether the file is locked now.
func locked(t *testing.T, path string) bool {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // it looks once
	_, err := Await(ctx, path)
	if err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	return err != nil
}

func wantLeases(t *testing.T, got Record, want ...int64) {
	t.Helper()
	if !slices.Equal(got.Leases, want) || len(want) > 0 && got.Cluster != cluster {
		t.Errorf("it names the leases %x of cluster %x, want %x of %x", got.Leases, got.Cluster, want, uint64(cluster))
	}
}

func TestLeasesOfADeadOwnerAreNamed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	owner, said := startOwner(t, path)
	if said != "<nil>" {
		t.Fatal(said)
	}
	if !locked(t, path) {
		t.Fatal("the file of a living owner is not locked")
	}
	if err := owner.Process.Kill(); err != nil { // and not reaped: it is a zombie
		t.Fatal(err)
	}
	wantLeases(t, await(t, path), 1, 2)
	f := open1(t, path)
	wantLeases(t, f.Left(), 1, 2)
	if err := f.Add(cluster, 3); err != nil {
		t.Fatal(err)
	}
	if err := f.Remove(1); err != nil {
		t.Fatal(err)
	}
	wantLeases(t, f.Left(), 2)
	f.crash()
	wantLeases(t, await(t, path), 2, 3)
}

func TestAStoppedOwnerIsAlive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	owner, said := startOwner(t, path)
	if said != "<nil>" {
		t.Fatal(said)
	}
	if err := owner.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*pause)
	defer cancel()
	if r, err := Await(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Await returned %v, %v while the owner is stopped", r, err)
	}
	if _, err := Open(path); !errors.Is(err, ErrLocked) {
		t.Errorf("Open returned %v while the owner is stopped", err)
	}
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	wantLeases(t, await(t, path), 1, 2)
}

// The kernel closes the descriptors of a process when it has written the core.
func TestAnOwnerThatDumpsCoreIsAlive(t *testing.T) {
	const size = 64 << 20 // so that it takes a while
	path := filepath.Join(t.TempDir(), "lease")
	owner := newOwner(t, path)
	owner.Dir = t.TempDir() // gets the core
	owner.Env = append(owner.Env, coreVariable+"="+strconv.Itoa(size), "GOTRACEBACK=crash")
	if said := start(t, owner); said != "<nil>" {
		t.Fatal(said)
	}
	dumps := func() bool {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", owner.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(status, []byte("\nCoreDumping:\t1\n"))
	}
	if err := owner.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	for seen := 0; ; time.Sleep(time.Millisecond) {
		before, free := dumps(), !locked(t, path)
		switch {
		case free && dumps():
			t.Fatal("the file is not locked while its owner dumps core")
		case free && seen == 0:
			t.Skip("the owner was not seen to dump core: see core(5)")
		case free:
			t.Logf("the file was locked %d times while its owner dumped core", seen)
			return
		case before:
			seen++
		}
	}
}

// A child that has a copy of the descriptor works on when its parent is dead, so the file stays locked for it.
func TestAChildThatHasTheDescriptorKeepsTheLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	f := open1(t, path)
	if err := f.Add(cluster, 7); err != nil {
		t.Fatal(err)
	}
	copied, err := syscall.Dup(f.fd)
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other")
	file := os.NewFile(uintptr(copied), path)
	child, said := startOwner(t, other, file)
	if said != "<nil>" {
		t.Fatal(said)
	}
	file.Close()
	// As the end of this process would: the lock is not let go, only the descriptor closed.
	_ = syscall.Close(f.fd)
	f.fd = -1
	held.Lock()
	clear(held.files)
	held.Unlock()
	if !locked(t, path) {
		t.Error("the lock went although a child has the descriptor")
	}
	_ = child.Process.Kill()
	wantLeases(t, await(t, path), 7)
}

// Without O_CLOEXEC each child would have the descriptor.
func TestAChildDoesNotInheritTheDescriptor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	f := open1(t, path)
	other := filepath.Join(t.TempDir(), "other")
	if _, said := startOwner(t, other); said != "<nil>" {
		t.Fatal(said)
	}
	_ = syscall.Close(f.fd)
	f.fd = -1
	held.Lock()
	clear(held.files)
	held.Unlock()
	if locked(t, path) {
		t.Error("a child keeps the lock")
	}
}

func TestOfTwoProcessesOneOwnsTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	said := make(chan string, 2)
	for range 2 {
		go func() {
			_, s := startOwner(t, path)
			said <- s
		}()
	}
	first, second := <-said, <-said
	if first != "<nil>" || !strings.Contains(second, "owner is alive") {
		t.Errorf("the processes said %q and %q, want that one owns the file and the other is told so", first, second)
	}
}

func TestAReleasedFileIsUnlockedWhenItNamesNoLease(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	f := open1(t, path)
	if err := f.Add(cluster, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errors.Is(err, ErrLocked) {
		t.Errorf("a second owner in the process got %v", err)
	}
	f.Release()
	if !locked(t, path) {
		t.Error("it is unlocked although it names a lease of a living process")
	}
	next := open1(t, path) // of this process
	wantLeases(t, next.Left())
	if err := next.Add(cluster, 2); err != nil {
		t.Fatal(err)
	}
	next.Release()
	if err := errors.Join(f.Remove(1), f.Remove(2), f.Remove(3)); err != nil {
		t.Fatal(err)
	}
	if locked(t, path) {
		t.Error("it is locked although it has neither owner nor leases")
	}
	wantLeases(t, await(t, path))
	open1(t, path).Release()
}

func TestTheOldestLeasesAreLeftOut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	f := open1(t, path)
	var want []int64
	for id := int64(-5); id < maxLeases; id++ {
		if err := f.Add(cluster, id); err != nil {
			t.Fatal(err)
		}
		if want = append(want, id); len(want) > maxLeases {
			want = want[1:]
		}
	}
	f.crash()
	wantLeases(t, await(t, path), want...)
}

func TestLeasesOfAnotherClusterAreForgotten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	f := open1(t, path)
	if err := f.Add(99, 1); err != nil {
		t.Fatal(err)
	}
	f.crash()
	f = open1(t, path)
	if err := f.Add(cluster, 2); err != nil {
		t.Fatal(err)
	}
	wantLeases(t, f.Left())
	f.crash()
	wantLeases(t, await(t, path), 2)
}

// What does not match names no leases, and is no error. The owner's record replaces it.
func TestARecordThatDoesNotMatchNamesNoLeases(t *testing.T) {
	good := func(t *testing.T, path string) []byte {
		f := open1(t, path)
		if err := f.Add(cluster, 1); err != nil {
			t.Fatal(err)
		}
		f.crash()
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	flip := func(text []byte, what string) []byte {
		at := bytes.Index(text, []byte(what)) + len(what)
		text[at] ^= 1
		return text
	}
	for name, change := range map[string]func(text []byte) []byte{
		"empty":                func([]byte) []byte { return nil },
		"short":                func(text []byte) []byte { return text[:20] },
		"torn":                 func(text []byte) []byte { return append(text[:100], make([]byte, size-100)...) },
		"zeros, after a crash": func([]byte) []byte { return make([]byte, size) },
		"another lease":        func(text []byte) []byte { return flip(text, "\nlease ") },
		"another cluster":      func(text []byte) []byte { return flip(text, "\ncluster ") },
		"without a sum":        func(text []byte) []byte { return text[:bytes.Index(text, []byte("sum"))] },
		"another boot": func([]byte) []byte {
			return Record{cluster, []int64{1}}.encode(place{boot: "another"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "lease")
			if err := os.WriteFile(path, change(good(t, path)), 0o600); err != nil {
				t.Fatal(err)
			}
			wantLeases(t, await(t, path))
			f := open1(t, path)
			wantLeases(t, f.Left())
			if err := f.Add(cluster, 2); err != nil {
				t.Fatal(err)
			}
			f.crash()
			wantLeases(t, await(t, path), 2)
		})
	}
	t.Run("copy", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "lease")
		copied := path + "-copy"
		if err := os.WriteFile(copied, good(t, path), 0o600); err != nil {
			t.Fatal(err)
		}
		wantLeases(t, await(t, path), 1)
		wantLeases(t, await(t, copied))
		wantLeases(t, open1(t, copied).Left())
	})
}

func TestOtherContentIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	const text = "127.0.0.1 localhost\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "other content") {
		t.Errorf("Open returned %v", err)
	}
	wantLeases(t, await(t, path))
	if got, err := os.ReadFile(path); string(got) != text {
		t.Errorf("now it has %q, %v", got, err)
	}
}

func TestAFileThatBreaksARuleIsRefused(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, mode fs.FileMode) string {
		if err := errors.Join(os.WriteFile(path(name), nil, mode), os.Chmod(path(name), mode)); err != nil {
			t.Fatal(err)
		}
		return path(name)
	}
	for _, err := range []error{
		os.Mkdir(path("directory"), 0o700),
		os.Symlink(write("target", 0o600), path("link")),
		os.Symlink(path("nowhere"), path("dangling")),
		syscall.Mkfifo(path("fifo"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	socket, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		defer func() { _ = syscall.Close(socket) }()
		err = syscall.Bind(socket, &syscall.SockaddrUnix{Name: path("socket")})
	}
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		path("directory"):      "regular file",
		path("link"):           "symbolic link",
		path("dangling"):       "symbolic link",
		path("fifo"):           "regular file",
		path("socket"):         "regular file",
		"/dev/null":            "regular file",
		write("group", 0o620):  "mode is 0620",
		write("others", 0o602): "mode is 0602",
		path("none/lease"):     "directory must exist",
		path("target/lease"):   "directory must be one",
	} {
		t.Run(path, func(t *testing.T) {
			if f, err := Open(path); err == nil || errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), want) {
				t.Errorf("Open returned %v, %v; want an error with %q", f, err, want)
			}
			_, err := Await(t.Context(), path)
			if absent := strings.HasSuffix(path, "none/lease"); absent != (err == nil) {
				t.Errorf("Await returned %v", err)
			}
		})
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(write("other", 0o600), 1, -1); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path("other")); err == nil || !strings.Contains(err.Error(), "must belong to the user") {
			t.Errorf("Open of another user's file returned %v", err)
		}
		wantLeases(t, await(t, path("other"))) // root may
	}
}

// As in a directory that is read-only. Not even root may create a file in sysfs.
func TestAFileThatCannotBeCreatedIsUnusable(t *testing.T) {
	if f, err := Open("/sys/leader.lease"); !errors.Is(err, ErrUnusable) {
		t.Errorf("Open returned %v, %v; want ErrUnusable", f, err)
	}
}

// As on a full disk. The next write that succeeds writes all.
func TestAFailureToWriteIsToldAndPasses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	f := open1(t, path)
	if err := f.Add(cluster, 1); err != nil {
		t.Fatal(err)
	}
	readOnly, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Close(readOnly) }()
	writable := f.fd
	f.fd = readOnly
	err = f.Add(cluster, 2)
	f.fd = writable
	var refused *fs.PathError
	if !errors.As(err, &refused) || refused.Path != path {
		t.Errorf("Add returned %v", err)
	}
	if err := f.Remove(3); err != nil {
		t.Error(err)
	}
	if err := f.Add(cluster, 3); err != nil { // writes all
		t.Error(err)
	}
	f.crash()
	wantLeases(t, await(t, path), 1, 2, 3)
}

// Await finds the file that is at the path when it looks, and not one that was replaced.
func TestAReplacedFileIsNotWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	open1(t, path)
	got := make(chan Record)
	go func() {
		r, _ := Await(t.Context(), path)
		got <- r
	}()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	wantLeases(t, <-got)
	next := open1(t, path) // another file
	if err := next.Add(cluster, 5); err != nil {
		t.Fatal(err)
	}
	next.crash()
	wantLeases(t, await(t, path), 5)
}

func TestANilFileDoesNothing(t *testing.T) {
	var f *File
	f.Release()
	wantLeases(t, f.Left())
	if err := errors.Join(f.Add(cluster, 1), f.Remove(1)); err != nil {
		t.Error(err)
	}
}

// Another machine may give up the lock of a process that lives.
func TestARemoteFileSystemIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	open1(t, path).Release()
	var system syscall.Statfs_t
	if err := syscall.Statfs(path, &system); err != nil {
		t.Fatal(err)
	}
	remote[uint32(system.Type)] = "a test's"
	defer delete(remote, uint32(system.Type))
	descriptors := func() int {
		open, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(open)
	}
	before := descriptors()
	for range 10 {
		if _, err := Open(path); err == nil || errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "local file system, not on a test's") {
			t.Fatalf("Open returned %v", err)
		}
		if _, err := Await(t.Context(), path); err == nil || !strings.Contains(err.Error(), "local file system") {
			t.Fatalf("Await returned %v", err)
		}
	}
	if after := descriptors(); after >= before+10 {
		t.Errorf("%d descriptors are open, and %d before", after, before)
	}
}

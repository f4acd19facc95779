package leasefile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A File is a lease file that this process has locked. It is safe for concurrent use. The methods of a nil File do
// nothing.
type File struct {
	path string
	at   place

	mu       sync.Mutex
	fd       int // not an os.File, which would let go when it is collected; -1 when closed
	record   Record
	left     []int64 // those of record that a dead owner has left
	released bool
}

type fileID struct{ device, inode uint64 }

// held has the files that this process has locked. One that was released with leases in it stays locked, for they
// belong to a living process. Its next owner takes it from here.
var held = struct {
	sync.Mutex
	files map[fileID]*File
}{files: make(map[fileID]*File)}

// Open locks the file, which it creates if there is none. It tries that for up to a second. The error is [ErrLocked] if
// the owner lives, [ErrUnusable] as described there, and otherwise says which rule for lease files the path breaks.
func Open(path string) (*File, error) {
	boot, err := bootID()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	for began := time.Now(); ; {
		f, err := open(path, boot)
		if !errors.Is(err, ErrLocked) || time.Since(began) > patience {
			return f, err
		}
		time.Sleep(pause)
	}
}

func open(path, boot string) (*File, error) {
	fd, at, err := openChecked(path, syscall.O_RDWR|syscall.O_CREAT, isOwn)
	if err != nil {
		return nil, err
	}
	at.boot = boot
	f, err := take(path, fd, at)
	if f == nil || f.fd != fd {
		_ = syscall.Close(fd)
	}
	return f, err
}

// take locks the file that is open, or takes over the one that this process has locked and released.
func take(path string, fd int, at place) (*File, error) {
	id := fileID{at.device, at.inode}
	held.Lock()
	f := held.files[id]
	held.Unlock()
	if f != nil {
		return f.adopt()
	}
	if err := lock(fd, syscall.LOCK_EX); err != nil {
		return nil, err
	}
	// Another process may have replaced the file before it was locked. Then the lock of this one tells nobody anything.
	var now syscall.Stat_t
	if err := again(func() error { return syscall.Lstat(path, &now) }); err != nil || (fileID{uint64(now.Dev), now.Ino}) != id {
		return nil, ErrLocked
	}
	text, err := read(fd)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	if foreign(text) {
		return nil, fmt.Errorf("%w: it has other content, which is left alone", ErrUnusable)
	}
	f = &File{path: path, at: at, fd: fd, record: decode(text, at)}
	f.left = slices.Clone(f.record.Leases)
	if err := f.writeLocked(); err != nil { // now, to find out whether it can be written
		return nil, fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	held.Lock()
	held.files[id] = f
	held.Unlock()
	return f, nil
}

// adopt makes the caller the owner of a file that has none.
func (f *File) adopt() (*File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 || !f.released {
		return nil, ErrLocked
	}
	f.released = false
	return f, nil
}

// Left returns the leases that a dead owner has left, without those that were removed since.
func (f *File) Left() Record {
	if f == nil {
		return Record{}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return Record{f.record.Cluster, slices.Clone(f.left)}
}

// Add writes a lease of the owner's into the file. If another cluster has granted it, the leases that are in the file
// are forgotten: they expire.
func (f *File) Add(cluster uint64, id int64) error {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.record.Cluster != cluster {
		f.record, f.left = Record{Cluster: cluster}, nil
	}
	if len(f.record.Leases) == maxLeases {
		f.removeLocked(f.record.Leases[0])
	}
	f.record.Leases = append(f.record.Leases, id)
	return f.writeLocked()
}

// Remove says that a lease is gone from etcd, or that the file must not name it any more. It deletes the lease's ID from
// the file.
func (f *File) Remove(id int64) error {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.removeLocked(id) {
		return nil
	}
	err := f.writeLocked()
	f.closeLocked()
	return err
}

func (f *File) removeLocked(id int64) bool {
	before := len(f.record.Leases)
	this := func(other int64) bool { return other == id }
	f.record.Leases = slices.DeleteFunc(f.record.Leases, this)
	f.left = slices.DeleteFunc(f.left, this)
	return len(f.record.Leases) < before
}

// Release says that the file has no owner any more. It is unlocked as soon as it names no lease. Until then, the next
// Open in this process gets it.
func (f *File) Release() {
	if f == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.released = true
	f.closeLocked()
}

// Crash unlocks the file at the path as the end of its owner's process does. What the owner still does with its File then
// has no effect. It is for simulations of processes, which share one of the system.
func Crash(path string) {
	var stat syscall.Stat_t
	if err := again(func() error { return syscall.Lstat(path, &stat) }); err != nil {
		return
	}
	held.Lock()
	f := held.files[fileID{uint64(stat.Dev), stat.Ino}]
	held.Unlock()
	if f == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd >= 0 {
		f.forgetLocked()
	}
}

// closeLocked unlocks the file if it has neither owner nor leases.
func (f *File) closeLocked() {
	if f.fd >= 0 && f.released && len(f.record.Leases) == 0 {
		f.forgetLocked()
	}
}

func (f *File) forgetLocked() {
	held.Lock()
	delete(held.files, fileID{f.at.device, f.at.inode})
	held.Unlock()
	// Unlocked first: a child process that is being started has a copy of the descriptor for a moment.
	_ = again(func() error { return syscall.Flock(f.fd, syscall.LOCK_UN) })
	_ = syscall.Close(f.fd)
	f.fd = -1
}

// writeLocked writes the record. What it cannot write is not tried again: the next call writes all of it.
func (f *File) writeLocked() error {
	if f.fd < 0 {
		return nil
	}
	text := f.record.encode(f.at)
	var n int
	err := again(func() (err error) { n, err = syscall.Pwrite(f.fd, text, 0); return err })
	if err == nil && n < len(text) {
		err = syscall.ENOSPC
	}
	if err != nil {
		return &fs.PathError{Op: "write", Path: f.path, Err: err}
	}
	return nil
}

// Await blocks until the owner of the file is dead, or has unlocked it, and returns the leases that it has left. A file
// that does not exist names none. Await never writes. It returns ctx's error if ctx ends first, and an error that says
// which rule for lease files the path breaks.
func Await(ctx context.Context, path string) (Record, error) {
	boot, err := bootID()
	if err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	ticker := time.NewTicker(pause)
	defer ticker.Stop()
	for {
		r, err := awaitOne(ctx, ticker.C, path, boot)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return Record{}, nil
		case !errors.Is(err, ErrLocked):
			return r, err
		case ctx.Err() != nil:
			return Record{}, fmt.Errorf("its owner is alive: %w", ctx.Err())
		}
	}
}

// awaitOne is Await of the file that is at the path now. It returns [ErrLocked] when ctx ends, and also after a second,
// because the file may have been replaced.
func awaitOne(ctx context.Context, ticks <-chan time.Time, path, boot string) (Record, error) {
	fd, at, err := openChecked(path, syscall.O_RDONLY, func(uid uint32) bool { return isOwn(uid) || os.Geteuid() == 0 })
	if err != nil {
		return Record{}, err
	}
	defer func() { _ = syscall.Close(fd) }()
	at.boot = boot
	for began := time.Now(); ; {
		err := lock(fd, syscall.LOCK_SH) // shared: several may read, and the owner's lock excludes them
		if err == nil {
			text, err := read(fd)
			if err != nil {
				return Record{}, fmt.Errorf("%w: %w", ErrUnusable, err)
			}
			return decode(text, at), nil
		}
		if !errors.Is(err, ErrLocked) || time.Since(began) > patience {
			return Record{}, err
		}
		select {
		case <-ctx.Done():
			return Record{}, err
		case <-ticks:
		}
	}
}

// openChecked opens a file and checks the rules for lease files.
func openChecked(path string, flags int, mayOwn func(uid uint32) bool) (fd int, at place, err error) {
	var stat syscall.Stat_t
	// Before it is opened, since opening a device may do something. Afterwards the open file is checked in any case.
	if err := again(func() error { return syscall.Lstat(path, &stat) }); err == nil {
		if err := check(&stat, mayOwn); err != nil {
			return -1, place{}, err
		}
	}
	err = again(func() (err error) {
		fd, err = syscall.Open(path, flags|syscall.O_CLOEXEC|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
		return err
	})
	switch {
	case errors.Is(err, syscall.ENOENT) && flags&syscall.O_CREAT != 0:
		return -1, place{}, errors.New("its directory must exist")
	case errors.Is(err, syscall.ENOENT):
		return -1, place{}, err
	case errors.Is(err, syscall.ENOTDIR):
		return -1, place{}, errors.New("its directory must be one")
	case errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENXIO):
		return -1, place{}, errNotRegular
	case err != nil:
		return -1, place{}, fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	opened := fd // fd is what is returned
	defer func() {
		if err != nil {
			_ = syscall.Close(opened)
		}
	}()
	if err := again(func() error { return syscall.Fstat(fd, &stat) }); err != nil {
		return -1, place{}, fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	if err := check(&stat, mayOwn); err != nil {
		return -1, place{}, err
	}
	var system syscall.Statfs_t
	if err := again(func() error { return syscall.Fstatfs(fd, &system) }); err != nil {
		return -1, place{}, fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	if name := remote[uint32(system.Type)]; name != "" {
		return -1, place{}, fmt.Errorf("must be on a local file system, not on %s", name)
	}
	return fd, place{device: uint64(stat.Dev), inode: stat.Ino}, nil
}

var errNotRegular = errors.New("must be a regular file, and no symbolic link")

func check(stat *syscall.Stat_t, mayOwn func(uid uint32) bool) error {
	switch {
	case stat.Mode&syscall.S_IFMT != syscall.S_IFREG:
		return errNotRegular
	case !mayOwn(stat.Uid):
		return fmt.Errorf("must belong to the user of this process, whose ID is %d, not to %d", os.Geteuid(), stat.Uid)
	case stat.Mode&0o022 != 0:
		return fmt.Errorf("must not be writable by others: its mode is %04o", stat.Mode&0o7777)
	}
	return nil
}

func isOwn(uid uint32) bool { return uint64(uid) == uint64(os.Geteuid()) }

// remote has the file systems whose locks another machine keeps, by the types of statfs(2).
var remote = map[uint32]string{
	0x6969:     "NFS",
	0x517b:     "SMB",
	0xff534d42: "CIFS",
	0xfe534d42: "SMB2",
	0x01021997: "9P",
	0x00c36400: "Ceph",
	0x5346414f: "AFS",
	0x6b414653: "AFS",
	0x73757245: "Coda",
	0x01161970: "GFS2",
	0x7461636f: "OCFS2",
	0x0bd00bd0: "Lustre",
}

// lock locks an open file, or returns [ErrLocked] at once.
func lock(fd, how int) error {
	err := again(func() error { return syscall.Flock(fd, how|syscall.LOCK_NB) })
	switch {
	case errors.Is(err, syscall.EWOULDBLOCK):
		return ErrLocked
	case err != nil:
		return fmt.Errorf("%w: flock: %w", ErrUnusable, err)
	}
	return nil
}

func read(fd int) ([]byte, error) {
	text := make([]byte, size)
	var n int
	err := again(func() (err error) { n, err = syscall.Pread(fd, text, 0); return err })
	return text[:max(n, 0)], err
}

// again repeats a system call that a signal has interrupted.
func again(call func() error) error {
	for {
		if err := call(); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}

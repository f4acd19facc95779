// Package leasefile lets another process end the leases of one that has died, without waiting until they expire.
//
// The owner of a lease file locks it as long as it lives, and writes the IDs of its leases into it. Whoever gets the
// lock then knows that the owner is dead, and may revoke them. The argument:
//
//   - The lock (flock) belongs to the owner's open file description. The owner has the only descriptor of it, which is
//     closed on exec. So the kernel drops the lock when it closes the descriptors of the process, and Linux does that
//     when the last thread has left user mode for good: after that no instruction of the process runs. It holds the lock
//     while the process is stopped, while it dumps core, and while a thread of it cannot be killed. It has dropped it
//     although the process may still be a zombie.
//   - The owner unlocks the file before its end only if no ID is left in it.
//   - etcd does not grant an ID twice. So IDs that were read under the lock belong to the dead for good. They may be
//     revoked at any later time, without the lock.
//   - A copy of the file has a lock of its own, which says nothing about the owner. So the record names the file, by
//     device and inode, the boot of the kernel, and the cluster of etcd. If one of them is another, or if the record is
//     torn, the file names no leases.
//
// It rests on a kernel that the owner does not leave: not with CRIU, nor in a virtual machine that is cloned while it
// runs. It rests on a local file system: others may give up the lock of a process that lives, so they are refused. A FUSE
// file system is not refused, because most are local; on one whose locks another machine keeps there must be no lease
// file. What the dead process had handed to the kernel, such as data in the buffer of a socket, may still be sent.
//
// Nothing else rests on the file. Without it, or if it is deleted, the leases expire.
package leasefile

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
	"time"
)

// ErrUnusable says that there can be no lease file, for a reason that is not the path's fault: the system is not Linux,
// the disk is full, or permission is denied.
var ErrUnusable = errors.New("lease file cannot be used")

// ErrLocked says that a living process has the file locked, or another owner in this process.
var ErrLocked = errors.New("must not be in use, but its owner is alive: each instance needs a file of its own")

// A Record is what a lease file says.
type Record struct {
	Cluster uint64  // ID of the cluster that has granted the leases
	Leases  []int64 // the oldest first, at most maxLeases
}

const (
	// maxLeases is how many leases a record has room for. The oldest are left out.
	maxLeases = 32

	// size of a record, in bytes. A record is written by one call and does not cross a page, so the end of the process
	// does not tear it.
	size = 1024

	// header begins each record.
	header = "leader lease file, version 1\n"

	// patience is how long Open tries to lock the file. The last owner may be dying, and whoever reads the file locks it
	// for a moment. It is also how long Await tries to lock the same file before it looks for another one at the path.
	patience = time.Second

	// pause between attempts to lock the file.
	pause = 5 * time.Millisecond
)

// A place is where a record is valid.
type place struct {
	boot          string // ID of the kernel's boot
	device, inode uint64
}

// encode returns the record as a text of exactly size bytes.
func (r Record) encode(at place) []byte {
	var text bytes.Buffer
	fmt.Fprintf(&text, "%sboot %s\nfile %x:%x\ncluster %x\n", header, at.boot, at.device, at.inode, r.Cluster)
	for _, id := range r.Leases {
		fmt.Fprintf(&text, "lease %x\n", uint64(id))
	}
	fmt.Fprintf(&text, "sum %08x\n", crc32.ChecksumIEEE(text.Bytes()))
	return append(text.Bytes(), bytes.Repeat([]byte{'\n'}, size-text.Len())...)
}

// decode returns the record that the text has. It is the zero Record if the text is not exactly what encode returns for
// this place.
func decode(text []byte, at place) Record {
	var r Record
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		id, err := strconv.ParseUint(value, 16, 64)
		switch {
		case err != nil:
		case name == "cluster":
			r.Cluster = id
		case name == "lease" && len(r.Leases) < maxLeases:
			r.Leases = append(r.Leases, int64(id))
		}
	}
	if !bytes.Equal(r.encode(at), text) {
		return Record{}
	}
	return r
}

// foreign reports whether a text is neither a record, nor a part of one, nor what a crash of the machine leaves of one.
func foreign(text []byte) bool {
	begin := text[:min(len(text), len(header))]
	return !strings.HasPrefix(header, string(begin)) && len(bytes.Trim(text, "\x00")) > 0
}

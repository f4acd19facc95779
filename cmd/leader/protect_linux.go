package main

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// protect makes the kernel kill the command if this process is killed, unless the command changes its user, and makes
// this process the parent of the command's orphans.
//
// The command does not inherit the lock of the lease file, which would make others wait until it has ended: it could
// write the file and unlock it, and a daemon that it leaves behind would keep the lock, so that the next start fails.
func protect(attr *syscall.SysProcAttr) {
	attr.Pdeathsig = syscall.SIGKILL
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) // Linux 3.4 and later
}

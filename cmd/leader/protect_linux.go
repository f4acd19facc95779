package main

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// protect makes the kernel kill the command if this process is killed, and makes this process the parent of its orphans.
func protect(attr *syscall.SysProcAttr) {
	attr.Pdeathsig = syscall.SIGKILL
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) // Linux 3.4 and later
}

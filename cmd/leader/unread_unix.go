//go:build unix

package main

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// onUnread calls f once nobody can read standard output any more, as in "leader watch NAME | head -n 1". Without it the
// process would live until the next change. The goroutine ends with the process.
func onUnread(f func()) {
	go func() {
		for {
			stdout := []unix.PollFd{{Fd: int32(os.Stdout.Fd())}} // no events: errors are always reported
			switch n, err := unix.Poll(stdout, -1); {
			case n > 0:
				f()
				return
			case !errors.Is(err, unix.EINTR):
				return
			}
		}
	}()
}

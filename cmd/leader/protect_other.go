//go:build unix && !linux

package main

import "syscall"

// protect does nothing: only Linux can do this.
func protect(*syscall.SysProcAttr) {}

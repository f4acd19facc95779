//go:build !linux

package etcdtest

import (
	"errors"
	"testing"
)

var errLinuxOnly = errors.New("etcdtest: members run in processes of their own on Linux only, where they are certain to end with the test")

// Main does nothing, because members cannot run in processes of their own here.
func Main() {}

// StartProcesses skips the test.
func StartProcesses(tb testing.TB, _ int, _ ...Settings) []*Member {
	tb.Helper()
	tb.Skip(errLinuxOnly)
	return nil
}

// Pause returns an error.
func (*Member) Pause() error { return errLinuxOnly }

// Resume returns an error.
func (*Member) Resume() error { return errLinuxOnly }

func startProcess(*Member, <-chan struct{}) (server, error) { return nil, errLinuxOnly }

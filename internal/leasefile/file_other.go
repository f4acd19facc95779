//go:build !linux

package leasefile

import (
	"context"
	"errors"
	"fmt"
	"runtime"
)

// A File is a lease file that this process has locked. There is none on this system.
type File struct{}

func unsupported() error {
	return fmt.Errorf("%w: %w on %s, only on Linux", ErrUnusable, errors.ErrUnsupported, runtime.GOOS)
}

// Open returns [ErrUnusable].
func Open(string) (*File, error) { return nil, unsupported() }

// Await returns [ErrUnusable].
func Await(context.Context, string) (Record, error) { return Record{}, unsupported() }

// Crash does nothing.
func Crash(string) {}

// Left returns no leases.
func (*File) Left() Record { return Record{} }

// Add does nothing.
func (*File) Add(uint64, int64) error { return nil }

// Remove does nothing.
func (*File) Remove(int64) error { return nil }

// Release does nothing.
func (*File) Release() {}

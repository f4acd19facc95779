//go:build !unix

package main

import (
	"context"
	"fmt"
	"runtime"
)

// onUnread does nothing: the next line that is written fails.
func onUnread(func()) {}

func (f runFlags) run(context.Context, *app, string, []string) error {
	return fmt.Errorf("run does not work on %s", runtime.GOOS)
}

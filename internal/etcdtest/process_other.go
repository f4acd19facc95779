//go:build !unix

package etcdtest

// Main does nothing where processes cannot be paused.
func Main() {}

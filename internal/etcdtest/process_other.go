//go:build !linux

package etcdtest

import "errors"

// Main does nothing where members do not run in processes of their own.
func Main() {}

func startProcess(*Member) (server, error) {
	return nil, errors.New("etcdtest: a binary of etcd runs on Linux only, where it ends with the test")
}

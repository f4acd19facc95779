//go:build !linux

package etcdtest

import "errors"

// Main does nothing, because members cannot run in processes of their own here.
func Main() {}

func startProcess(*Member) (server, error) {
	return nil, errors.New("etcdtest: a binary of etcd can be run on Linux only, where it is certain to end with the test")
}

//go:build production

package main

import "errors"

// startEtcd is not for production: the binary has no server of etcd.
func startEtcd() (endpoint string, stop func(), err error) {
	return "", nil, errors.New("-embedded: the binary was built for production, without an etcd")
}

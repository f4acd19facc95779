//go:build !production

package main

import "example.com/leader/examples/internal/demo"

// startEtcd starts an etcd in this process, to try the service out.
func startEtcd() (endpoint string, stop func(), err error) { return demo.StartEtcd("", demo.AnyPort) }

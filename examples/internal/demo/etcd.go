// Package demo is what the examples need as demonstrations: an etcd, and processes that can be ended. A service needs
// none of it.
package demo

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// AnyPort makes etcd listen on a free port of loopback.
const AnyPort = "127.0.0.1:0"

// StartEtcd runs a server in this process until stop is called, which also removes its data. The server listens for
// clients at the address listen, and on loopback for peers.
func StartEtcd(listen string) (endpoint string, stop func(), err error) {
	dir, err := os.MkdirTemp("", "leader-etcd-")
	if err != nil {
		return "", nil, err
	}
	server, err := startEtcd(dir, listen)
	if err != nil {
		return "", nil, fmt.Errorf("start etcd: %w", errors.Join(err, os.RemoveAll(dir)))
	}
	return server.Clients[0].Addr().String(), func() { server.Close(); os.RemoveAll(dir) }, nil
}

func startEtcd(dir, listen string) (*embed.Etcd, error) {
	clients := []url.URL{{Scheme: "http", Host: listen}}
	peers := []url.URL{{Scheme: "http", Host: AnyPort}} // a single member has no other peer
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = clients, clients
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = peers, peers
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, err
	}
	select {
	case <-server.Server.ReadyNotify():
		return server, nil
	case err = <-server.Err():
	case <-time.After(30 * time.Second):
		err = errors.New("not ready after 30 s")
	}
	server.Close()
	return nil, err
}

// Package demo is what the examples need as demonstrations: an etcd, and processes that can be ended. A service needs
// none of it.
package demo

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// AnyPort makes etcd listen on a free port of loopback.
const AnyPort = "127.0.0.1:0"

// StartEtcd runs a server in this process until stop is called. Its data is in dir; if that is "", in a temporary
// directory, which stop removes. The server listens at the address listen, which must be one of loopback, and on loopback
// for peers.
func StartEtcd(dir, listen string) (endpoint string, stop func(), err error) {
	host, _, err := net.SplitHostPort(listen)
	if ip := net.ParseIP(host); err != nil || host != "localhost" && !ip.IsLoopback() {
		return "", nil, errors.New("must be host:port of loopback, since whoever reaches this etcd may write to it")
	}
	clean := func() error { return nil }
	if dir == "" {
		if dir, err = os.MkdirTemp("", "leader-etcd-"); err != nil {
			return "", nil, err
		}
		clean = func() error { return os.RemoveAll(dir) }
	}
	server, err := startEtcd(dir, listen)
	if err != nil {
		return "", nil, fmt.Errorf("start etcd: %w", errors.Join(err, clean()))
	}
	return server.Clients[0].Addr().String(), func() { server.Close(); _ = clean() }, nil
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

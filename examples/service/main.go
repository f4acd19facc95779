// Service is an HTTP service as in production. At most one of its instances works at a time.
//
//	go run ./examples/service -embedded
//
// With -embedded it starts an etcd of its own, to try it out. Built with the tag "production" it cannot, and is a third
// smaller. Every flag can also be set by an environment variable, such as SERVICE_TTL for -ttl. README.md shows how to run
// two instances, and how to deploy three.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"example.com/leader"
	"example.com/leader/leaderprom"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

func main() {
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	cfg, err := parse(os.Args[1:], os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, "service:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := run(ctx, cfg, log); err != nil {
		log.Error("failed", "error", err)
		os.Exit(1)
	}
}

// run serves until ctx ends, which is not an error, or until something fails permanently.
func run(ctx context.Context, cfg config, log *slog.Logger) error {
	tryout := cfg.endpoints == nil
	if tryout {
		endpoint, stop, err := startEtcd()
		if err != nil {
			return err
		}
		defer stop()
		cfg.endpoints = []string{endpoint}
		log.Warn("only instances that use this embedded etcd take part in the election", "embedded etcd", endpoint)
	}
	client, err := cfg.client(ctx)
	if err != nil && ctx.Err() != nil {
		return nil // the service was stopped while it waited for etcd
	}
	if err != nil {
		return fmt.Errorf("etcd client: %w", err)
	}
	defer client.Close()

	s := &service{client: client, election: cfg.election, log: log, url: cfg.advertise}
	collector := leaderprom.New()
	options := []leader.Option{leader.WithTTL(cfg.ttl), leader.WithLogger(log), leader.WithHooks(collector.Hooks()), leader.WithHealth(s.healthy)}
	if cfg.leaseFile != "" {
		options = append(options, leader.WithLeaseFile(cfg.leaseFile))
	}
	if s.elector, err = leader.New(client, options...); err != nil {
		return fmt.Errorf("-ttl or -lease-file: %w", err)
	}
	defer s.close(context.WithoutCancel(ctx))
	// Not the default registry: the embedded etcd puts its own metrics there.
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collector, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	listener, err := net.Listen("tcp", cfg.listen)
	if err != nil {
		return fmt.Errorf("-listen %s: %w", cfg.listen, err)
	}
	address := listener.Addr().String()
	log.Info("listening", "address", address, "pid", os.Getpid())
	if tryout {
		fmt.Printf("curl http://%s/leader\ncurl http://%[1]s/readyz\ncurl http://%[1]s/livez\ncurl http://%[1]s/metrics\ncurl -X POST http://%[1]s/ticks\n", address)
		fmt.Printf("go run ./examples/service -endpoints %s -listen 127.0.0.1:0   # another instance\n", cfg.endpoints[0])
	}

	if s.url == "" {
		s.url = "http://" + address
	}
	return s.run(ctx, listener, metrics)
}

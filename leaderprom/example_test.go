package leaderprom_test

import (
	"context"
	"fmt"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"

	"example.com/leader"
	"example.com/leader/leaderprom"
	"example.com/leader/leadertest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func Example() {
	client, stop := newClient()
	defer stop()
	ctx := context.Background()

	work := func(context.Context, *leader.Leader) error {
		fmt.Println(scrapeOf("leader_is_leader"))
		return nil
	}

	metrics := leaderprom.New() // one per process
	prometheus.MustRegister(metrics)
	http.Handle("/metrics", promhttp.Handler())
	err := leader.Run(ctx, client, "my-service/leader", "", work, leader.WithHooks(metrics.Hooks()))
	if err != nil {
		log.Print(err)
		return
	}
	fmt.Println(scrapeOf("leader_is_leader"))
	fmt.Println(scrapeOf("leader_term_ends_total"))
	// Output:
	// leader_is_leader{election="my-service/leader"} 1
	//
	// leader_is_leader{election="my-service/leader"} 0
	//
	// leader_term_ends_total{election="my-service/leader",reason="evicted"} 0
	// leader_term_ends_total{election="my-service/leader",reason="expired"} 0
	// leader_term_ends_total{election="my-service/leader",reason="resigned"} 1
	// leader_term_ends_total{election="my-service/leader",reason="transferred"} 0
	// leader_term_ends_total{election="my-service/leader",reason="unhealthy"} 0
}

// A service that serves its metrics on the address in its first argument.
func ExampleCollector_Hooks() {
	var (
		ctx    context.Context
		client *clientv3.Client
		work   func(ctx context.Context, l *leader.Leader) error
		err    error
	)

	metrics := leaderprom.New() // one per process
	prometheus.MustRegister(metrics)
	http.Handle("/metrics", promhttp.Handler())
	go func() { log.Fatal(http.ListenAndServe(os.Args[1], nil)) }()
	err = leader.Run(ctx, client, "my-service/leader", "", work,
		leader.WithLogger(slog.Default()), leader.WithHooks(metrics.Hooks()))

	if err != nil {
		log.Print(err)
	}
}

// scrapeOf returns the lines that Prometheus would read of a metric.
func scrapeOf(metric string) string {
	response := httptest.NewRecorder()
	http.DefaultServeMux.ServeHTTP(response, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	var series strings.Builder
	for line := range strings.Lines(response.Body.String()) {
		if strings.HasPrefix(line, metric) {
			series.WriteString(line)
		}
	}
	return series.String()
}

// newClient starts an etcd, which runs until stop is called, and returns a client of it.
func newClient() (client *clientv3.Client, stop func()) {
	server, stopServer, err := leadertest.Start()
	if err != nil {
		log.Fatal(err)
	}
	client, err = clientv3.New(clientv3.Config{Endpoints: []string{server.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		log.Fatal(err)
	}
	return client, func() {
		if err := client.Close(); err != nil {
			log.Print(err)
		}
		stopServer()
	}
}

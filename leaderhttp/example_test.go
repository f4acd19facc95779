package leaderhttp_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"

	"example.com/leader"
	"example.com/leader/leaderhttp"
	"example.com/leader/leadertest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func Example() {
	client, stop := newClient()
	defer stop()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	start := func(instance string) (*leader.Elector, *httptest.Server) {
		elector, err := leader.New(client)
		if err != nil {
			log.Fatal(err)
		}
		jobs := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintln(w, instance, "serves", r.URL)
		})
		return elector, httptest.NewServer(leaderhttp.Forward(ctx, elector, "my-service/leader", jobs))
	}
	elector, a := start("a")
	defer a.Close()
	_, b := start("b")
	defer b.Close()
	term, err := elector.Campaign(ctx, "my-service/leader", a.URL)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(await200(a.URL + "/jobs/1"))
	fmt.Print(await200(b.URL + "/jobs/2"))
	if err := term.Resign(ctx); err != nil {
		log.Fatal(err)
	}
	// Output:
	// a serves /jobs/1
	// a serves /jobs/2
}

// A service whose value is the URL at which others reach it.
func ExampleForward() {
	var (
		ctx     context.Context
		elector *leader.Elector
		jobs    http.Handler
		work    func(ctx context.Context, l *leader.Leader) error
		err     error
	)

	http.Handle("/jobs/", leaderhttp.Forward(ctx, elector, "my-service/leader", jobs))
	err = elector.Run(ctx, "my-service/leader", "http://10.0.0.7:8080", work)

	if err != nil {
		log.Print(err)
	}
}

// await200 sends a request again while it is refused: instance b may not know yet who leads.
func await200(url string) string {
	for {
		resp, err := http.Get(url)
		if err != nil {
			log.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			log.Fatal(err)
		}
		if resp.StatusCode != http.StatusServiceUnavailable {
			return string(text)
		}
	}
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

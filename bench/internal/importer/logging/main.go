// Logging is the program of package stock, which also logs by log/slog, as this library does.
package main

import (
	"context"
	"log"
	"log/slog"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

func main() {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"127.0.0.1:2379"}})
	if err != nil {
		log.Fatal(err)
	}
	session, err := concurrency.NewSession(client)
	if err != nil {
		log.Fatal(err)
	}
	election := concurrency.NewElection(session, "jobs")
	if err := election.Campaign(context.Background(), "me"); err != nil {
		log.Fatal(err)
	}
	slog.Default().Info("elected", "key", election.Key())
	if err := election.Resign(context.Background()); err != nil {
		log.Fatal(err)
	}
}

// Stock is a program that elects by etcd's own package.
package main

import (
	"context"
	"log"

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
	if err := election.Resign(context.Background()); err != nil {
		log.Fatal(err)
	}
}

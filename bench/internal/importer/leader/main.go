// Leader is the program of package stock, by this library.
package main

import (
	"context"
	"log"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func main() {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"127.0.0.1:2379"}})
	if err != nil {
		log.Fatal(err)
	}
	l, err := leader.Campaign(context.Background(), client, "jobs", "me")
	if err != nil {
		log.Fatal(err)
	}
	if err := l.Resign(context.Background()); err != nil {
		log.Fatal(err)
	}
}

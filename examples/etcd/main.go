// Etcd runs an etcd for experiments until it is interrupted, and then deletes its data.
//
//	go run ./examples/etcd
//
// It listens on loopback only. The flag -listen sets the address for clients.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"example.com/leader/examples/internal/demo"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:2379", "`address` of loopback to listen on")
	flag.Parse()
	ctx, interrupted := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer interrupted()
	endpoint, stop, err := demo.StartEtcd(*listen)
	if err != nil {
		fmt.Fprintf(os.Stderr, "etcd: -listen %s: %v\n", *listen, err)
		os.Exit(1)
	}
	fmt.Println("etcd listens on", endpoint)
	<-ctx.Done()
	stop()
}

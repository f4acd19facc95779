// Etcd runs an etcd for experiments until it is interrupted.
//
//	go run ./examples/etcd
//
// Its data is gone in the end, and so revisions and tokens begin anew, unless the flag -data-dir keeps it. It listens on
// loopback only, because it asks nobody for a password. The flag -listen sets the address for clients.
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
	dir := flag.String("data-dir", "", "`directory` to keep the data in; if empty, it is deleted in the end")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "etcd: %q is not a flag\n", flag.Arg(0))
		os.Exit(2)
	}
	ctx, interrupted := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer interrupted()
	endpoint, stop, err := demo.StartEtcd(*dir, *listen)
	if err != nil {
		fmt.Fprintf(os.Stderr, "etcd: -listen %s: %v\n", *listen, err)
		os.Exit(1)
	}
	fmt.Println("etcd listens on", endpoint)
	if *dir == "" {
		fmt.Println("its data is deleted in the end; -data-dir keeps it")
	}
	<-ctx.Done()
	stop()
}

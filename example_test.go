package leader_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"os"
	"sync/atomic"
	"time"

	"example.com/leader"
	"example.com/leader/leadertest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// The whole of a service: work while leading, resign at the end.
func ExampleRun() {
	client, stop := newClient()
	defer stop()

	// In a main this is ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM).
	ctx, cancel := context.WithCancel(context.Background())

	err := leader.Run(ctx, client, "example/run", "instance 1", func(ctx context.Context, l *leader.Leader) error {
		fmt.Println("leading:", l.IsLeader())
		cancel()     // the service is asked to stop while it leads
		<-ctx.Done() // work ends with ctx
		fmt.Println("still leading while work ends:", l.IsLeader())
		return nil
	})
	fmt.Println("asked to stop:", errors.Is(err, context.Canceled))
	// Output:
	// leading: true
	// still leading while work ends: true
	// asked to stop: true
}

func ExampleCampaign() {
	client, stop := newClient()
	defer stop()
	ctx := context.Background()

	l, err := leader.Campaign(ctx, client, "example/campaign", "instance 1")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("leading:", l.IsLeader())

	// Pass l.Context() to the work: it is cancelled when leadership is lost.
	fmt.Println("work may go on:", l.Context().Err() == nil)

	if err := l.Resign(ctx); err != nil {
		log.Print(err) // the next leader has to wait for the lease to expire
	}
	fmt.Println("the term has ended:", context.Cause(l.Context()))
	// Output:
	// leading: true
	// work may go on: true
	// the term has ended: leader: term resigned
}

// Campaign, then proclaim at every tick to learn whether one still leads, do a piece of work, and
// resign after five.
func ExampleLeader_Proclaim() {
	client, stop := newClient()
	defer stop()
	ctx := context.Background()

	l, err := leader.Campaign(ctx, client, "example/proclaim", "")
	if err != nil {
		log.Fatal(err)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for piece := 1; piece <= 5; piece++ {
		<-tick.C
		if err := l.Proclaim(ctx, fmt.Sprintf("at piece %d", piece)); errors.Is(err, leader.ErrNotLeader) {
			fmt.Println("leadership lost:", err)
			break
		} else if err != nil {
			log.Print(err) // etcd did not answer; the term goes on until its deadline
			continue
		}
		fmt.Println("piece", piece)
	}
	if err := l.Resign(ctx); err != nil {
		log.Print(err)
	}
	fmt.Println(l.Proclaim(ctx, "too late"))
	// Output:
	// piece 1
	// piece 2
	// piece 3
	// piece 4
	// piece 5
	// leader: election: not leader: leader: term resigned
}

// A write that etcd refuses once the term is over, however late it arrives.
func ExampleLeader_Guard() {
	client, stop := newClient()
	defer stop()
	ctx := context.Background()

	l, err := leader.Campaign(ctx, client, "example/guard", "instance 1")
	if err != nil {
		log.Fatal(err)
	}
	write := func(value string) {
		resp, err := client.Txn(ctx).
			If(l.Guard()).
			Then(clientv3.OpPut("example/result", value)).
			Commit()
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s written: %v\n", value, resp.Succeeded)
	}
	write("first")
	if err := l.Resign(ctx); err != nil {
		log.Fatal(err)
	}
	write("second")
	// Output:
	// first written: true
	// second written: false
}

// Who leads is for display and for finding the leader, not for deciding whether oneself leads.
func ExampleElector_Observe() {
	client, stop := newClient()
	defer stop()
	ctx := context.Background()

	e, err := leader.New(client)
	if err != nil {
		log.Fatal(err)
	}
	var l *leader.Leader
	for c, err := range e.Observe(ctx, "example/observe") {
		if err != nil {
			log.Fatal(err) // ctx has ended, or it is not permitted
		}
		switch {
		case c.Token == 0 && l == nil:
			fmt.Println("nobody leads")
			if l, err = e.Campaign(ctx, "example/observe", "10.0.0.1:8080"); err != nil {
				log.Fatal(err)
			}
		case c.Token == 0:
			fmt.Println("nobody leads any more")
			return
		default:
			fmt.Println("leader:", c.Value)
			if err := l.Resign(ctx); err != nil {
				log.Fatal(err)
			}
		}
	}
	// Output:
	// nobody leads
	// leader: 10.0.0.1:8080
	// nobody leads any more
}

// A client that notices when a connection has died without a sign, as a NAT or a load balancer has forgotten it.
func Example_keepalive() {
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            []string{"etcd-1:2379", "etcd-2:2379", "etcd-3:2379"},
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 2 * time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	if _, err := leader.New(client); err != nil {
		log.Fatal(err)
	}
}

// A client that shows a certificate to an etcd that runs with --client-cert-auth.
func Example_clientCertificate() {
	certificate, err := tls.LoadX509KeyPair("client.crt", "client.key")
	if err != nil {
		log.Fatal(err)
	}
	pem, err := os.ReadFile("ca.crt")
	if err != nil {
		log.Fatal(err)
	}
	ca := x509.NewCertPool()
	ca.AppendCertsFromPEM(pem)
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            []string{"https://etcd-1:2379", "https://etcd-2:2379", "https://etcd-3:2379"},
		TLS:                  &tls.Config{Certificates: []tls.Certificate{certificate}, RootCAs: ca},
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 2 * time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	if _, err := leader.New(client); err != nil {
		log.Fatal(err)
	}
}

// newClient returns a client of an etcd that runs until stop is called. A service calls clientv3.New
// instead, and its test leadertest.NewClient.
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

// A watchdog: work that has begun says that it makes progress, and the check asks when it did so last.
func ExampleWithHealth() {
	client, stop := newClient()
	defer stop()
	var progress atomic.Int64 // when the work made progress last; 0 if there is none, as in a candidate that waits
	check := func(context.Context, string) error {
		if last := progress.Load(); last != 0 && time.Since(time.Unix(0, last)) > 500*time.Millisecond {
			return errors.New("the work hangs")
		}
		return nil
	}
	l, err := leader.Campaign(context.Background(), client, "example/health", "", leader.WithTTL(2*time.Second), leader.WithHealth(check))
	if err != nil {
		log.Fatal(err)
	}
	for range 3 {
		progress.Store(time.Now().UnixNano()) // the work does something
	}
	<-l.Context().Done() // and then it hangs
	progress.Store(0)
	fmt.Println(context.Cause(l.Context()))
	if err := l.Resign(context.Background()); err != nil {
		log.Print(err)
	}
	// Output:
	// leader: unhealthy: the work hangs
}

// A handler asks whether this instance leads, and does not need the term of Run.
func ExampleElector_Leading() {
	client, stop := newClient()
	defer stop()
	e, err := leader.New(client)
	if err != nil {
		log.Fatal(err)
	}
	schedule := func() {
		if l, ok := e.Leading("example/leading"); ok {
			fmt.Println("the job runs, with a token:", l.Token() > 0)
		} else {
			fmt.Println("another instance runs the job")
		}
	}
	schedule()
	err = e.Run(context.Background(), "example/leading", "", func(context.Context, *leader.Leader) error {
		schedule()
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// another instance runs the job
	// the job runs, with a token: true
}

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"example.com/leader"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// A config holds the values of flags and environment.
type config struct {
	endpoints        []string // nil: start an etcd
	ca, cert, key    string   // paths of PEM files
	user, password   string
	listen, election string
	advertise        string // URL at which other instances reach this one; "" for that of the listener
	leaseFile        string // path; "" for none
	ttl              time.Duration
}

// parse reads the flags, and the environment for flags that are not given. It ends the process if a flag is unknown or
// malformed.
func parse(args []string, getenv func(string) string) (config, error) {
	var c config
	flags := flag.NewFlagSet("service", flag.ExitOnError)
	endpoints := flags.String("endpoints", "", "etcd `host:port,…`, or https://host:port")
	embedded := flags.Bool("embedded", false, "instead of -endpoints, to try it out: starts an etcd of its own, which ends with this instance")
	flags.StringVar(&c.ca, "ca", "", "PEM `file` with the authorities to check etcd's certificate against")
	flags.StringVar(&c.cert, "cert", "", "PEM `file` with the certificate to present to etcd")
	flags.StringVar(&c.key, "key", "", "PEM `file` with the private key of -cert")
	flags.StringVar(&c.user, "user", "", "`name` of the etcd user; the password is in $SERVICE_PASSWORD or -password-file")
	passwordFile := flags.String("password-file", "", "`file` with the password of the etcd user")
	flags.StringVar(&c.listen, "listen", "127.0.0.1:8080", "`address` to serve HTTP on")
	flags.StringVar(&c.election, "election", "service/leader", "`name` of the election")
	flags.StringVar(&c.advertise, "advertise", "", "`URL` at which the other instances reach this one; if empty, the address that it listens on")
	flags.StringVar(&c.leaseFile, "lease-file", "", "`file`, of this instance alone, by which its lease ends at once if it crashes")
	flags.DurationVar(&c.ttl, "ttl", leader.DefaultTTL, "time to live of the leader's lease")

	var err error
	flags.VisitAll(func(f *flag.Flag) {
		name := "SERVICE_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		f.Usage += " [$" + name + "]"
		if value := getenv(name); value != "" {
			if ferr := f.Value.Set(value); ferr != nil { // before Parse, so that a flag overrides the environment
				err = errors.Join(err, fmt.Errorf("%s=%s: %w", name, value, ferr))
			}
		}
	})
	_ = flags.Parse(args) // it exits on an error
	if err != nil {
		return c, err
	}

	c.password = getenv("SERVICE_PASSWORD")
	if *passwordFile != "" {
		if c.password != "" {
			return c, errors.New("-password-file: must not be given with SERVICE_PASSWORD")
		}
		text, err := os.ReadFile(*passwordFile)
		if err != nil {
			return c, fmt.Errorf("-password-file: %w", err)
		}
		c.password = strings.TrimRight(string(text), "\r\n")
	}
	if *endpoints != "" {
		c.endpoints = strings.Split(*endpoints, ",")
	}
	secure := c.ca != "" || c.cert != ""
	switch {
	case flags.NArg() > 0:
		return c, fmt.Errorf("%q is not a flag", flags.Arg(0))
	case slices.Contains(c.endpoints, ""):
		return c, fmt.Errorf("-endpoints %s: must not have an empty one", *endpoints)
	case *embedded == (c.endpoints != nil):
		return c, errors.New("-endpoints: must be given, or -embedded to try the service out, and not both")
	case *embedded && (secure || c.user != ""):
		return c, errors.New("-ca, -cert and -user: must be given with -endpoints")
	case (c.cert == "") != (c.key == ""):
		return c, errors.New("-cert and -key: must be given together")
	case secure && strings.Contains(*endpoints, "http://"):
		return c, fmt.Errorf("-endpoints %s: must not be http:// with -ca or -cert, which it would ignore", *endpoints)
	case (c.user == "") != (c.password == ""):
		return c, errors.New("-user: must be given together with a password, in SERVICE_PASSWORD or -password-file")
	case c.advertise != "" && !reachable(c.advertise):
		return c, fmt.Errorf("-advertise %s: must be a URL with http:// or https:// and a host, an IPv6 address in brackets", c.advertise)
	case c.advertise == "" && everywhere(c.listen):
		return c, fmt.Errorf("-advertise: must be given with -listen %s, which is no address to send requests to", c.listen)
	case c.election == "" || strings.HasSuffix(c.election, "/"):
		return c, fmt.Errorf("-election %q: must not be empty or end in a slash", c.election)
	}
	return c, nil
}

// reachable reports whether other instances can send requests to a URL.
func reachable(advertise string) bool {
	u, err := url.Parse(advertise)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != ""
}

// everywhere reports whether listening on an address means listening on all addresses of the machine.
func everywhere(listen string) bool {
	host, _, err := net.SplitHostPort(listen)
	ip := net.ParseIP(host)
	return err == nil && (host == "" || ip != nil && ip.IsUnspecified())
}

// client returns a client of etcd. It waits for etcd only to check a password, for at most 10 s, and gives up when ctx
// ends. The client itself does not end with ctx, because resigning needs it.
func (c *config) client(ctx context.Context) (*clientv3.Client, error) {
	var secure *tls.Config // nil: https:// is checked against the system's authorities
	if c.ca != "" || c.cert != "" {
		var err error
		info := transport.TLSInfo{TrustedCAFile: c.ca, CertFile: c.cert, KeyFile: c.key} // notices a renewed one
		if secure, err = info.ClientConfig(); err != nil {
			return nil, fmt.Errorf("-ca, -cert or -key: %w", err)
		}
	}
	clientCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	release := context.AfterFunc(ctx, cancel)
	client, err := clientv3.New(clientv3.Config{
		Context:     clientCtx,
		Endpoints:   c.endpoints,
		TLS:         secure,
		Username:    c.user,
		Password:    c.password,
		DialTimeout: 10 * time.Second,
		// A NAT or a load balancer may forget a connection without a sign. Pings detect that within 12 s; TCP alone may
		// take 15 minutes. etcd accepts a ping every 5 s (--grpc-keepalive-min-time).
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 2 * time.Second,
		Logger:               zap.NewNop(), // those who send the requests log what matters
	})
	if !release() && err == nil { // ctx has ended, and so has clientCtx
		err = errors.Join(context.Cause(ctx), client.Close())
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return client, nil
}

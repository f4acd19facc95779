//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"example.com/leader/internal/oracle"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

const (
	user, password         = "chaos", "chaos" // may only read and write keys that begin with root
	rootUser, rootPassword = "root", "root"
	// electionTimeout is that of the members.
	electionTimeout = 500 * time.Millisecond
	// patience bounds waits that are long only on a machine that is too busy.
	patience = time.Minute
)

// A member is a member of the etcd cluster. The other members and the workers reach it only through links. The campaign
// itself and etcdctl connect to it directly.
type member struct {
	*process
	id           uint64
	paused       oracle.Entry     // what to record when it resumes
	client, peer string           // addresses
	peers        []*etcdtest.Link // by member: the link through which this one dials it; nil for itself
}

// A system is the system under test: members, links and workers.
type system struct {
	*Recorder
	dir      string // of the history and the logs
	tmp      string // of sockets and data
	p        Parameters
	binary   string // the program of the workers
	auth     bool   // workers have a user
	root     *clientv3.Client
	operator *leader.Elector // over root
	members  []*member
	workers  []*process // that take part in elections
	faulty   []*process // workers that faults strike
	watchers []*process // that only observe
	resource *process
	links    map[*process][]*workerLink // links of a worker's clients, by member, for the members that it knows
	audit    *audit
	closers  []func()
}

// startSystem starts everything and waits until it is ready.
func startSystem(ctx context.Context, dir string, p Parameters, binary string, auth bool) (s *system, err error) {
	s = &system{dir: dir, p: p, binary: binary, auth: auth, links: make(map[*process][]*workerLink)}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.Recorder, err = newRecorder(dir, "chaos"); err != nil {
		return s, err
	}
	if s.tmp, err = os.MkdirTemp("", "chaos"); err != nil {
		return s, err
	}
	s.closers = append(s.closers, func() { os.RemoveAll(s.tmp) })
	if err := s.startMembers(ctx); err != nil {
		return s, err
	}
	return s, s.startWorkers() //nolint:contextcheck // what it starts ends with close
}

// close ends everything that still runs, whatever its state.
func (s *system) close() {
	var all []*process
	for _, m := range s.members {
		all = append(all, m.process)
	}
	for _, p := range slices.Concat(all, s.workers, s.watchers, []*process{s.resource}) {
		if p != nil {
			p.sidecar.kill()
		}
		p.kill()
	}
	for _, close := range s.closers {
		defer close()
	}
}

func (s *system) newProcess(sort, name string, command func() *exec.Cmd) *process {
	return &process{name: name, sort: sort, command: command, dir: s.dir, recorder: s.Recorder}
}

// startMembers runs the cluster.
func (s *system) startMembers(ctx context.Context) error {
	var cluster []string
	addresses, err := etcdtest.FreeAddresses(2 * s.p.Members)
	if err != nil {
		return err
	}
	for i := range s.p.Members {
		m := &member{client: addresses[2*i], peer: addresses[2*i+1], peers: make([]*etcdtest.Link, s.p.Members)}
		s.members = append(s.members, m)
		cluster = append(cluster, fmt.Sprintf("m%d=%s", i, peerURL(i)))
	}
	for i, m := range s.members {
		proxy, err := s.startPeerProxy(i) //nolint:contextcheck // it ends with close
		if err != nil {
			return err
		}
		name := fmt.Sprintf("m%d", i)
		config, err := json.Marshal(map[string]any{ // JSON is YAML
			"name":                        name,
			"data-dir":                    filepath.Join(s.tmp, name),
			"listen-client-urls":          "http://" + m.client,
			"advertise-client-urls":       "http://" + m.client,
			"listen-peer-urls":            "http://" + m.peer,
			"initial-advertise-peer-urls": peerURL(i),
			"initial-cluster":             strings.Join(cluster, ","),
			"initial-cluster-state":       "new",
			"heartbeat-interval":          electionTimeout / 10 / time.Millisecond,
			"election-timeout":            electionTimeout / time.Millisecond,
			"pre-vote":                    true,
			"auth-token-ttl":              2, // seconds
			"bcrypt-cost":                 4, // the password protects nothing
			"unsafe-no-fsync":             true,
			"logger":                      "zap",
			"log-level":                   "error",
			"log-outputs":                 []string{"stderr"},
		})
		if err != nil {
			return err
		}
		file := filepath.Join(s.tmp, name+".json")
		if err := os.WriteFile(file, config, 0o600); err != nil {
			return err
		}
		m.process = s.newProcess(sortMember, name, func() *exec.Cmd {
			cmd := exec.Command(s.self(), "member", file)
			if s.p.Binary != "" {
				cmd = exec.Command(s.p.Binary, "--config-file", file)
			}
			cmd.Env = append(os.Environ(), "HTTP_PROXY=http://"+proxy, "http_proxy=http://"+proxy, "NO_PROXY=", "no_proxy=")
			return cmd
		})
		if err := m.start(); err != nil {
			return err
		}
	}
	if err := s.dialRoot(); err != nil {
		return err
	}
	for _, m := range s.members {
		status, err := s.awaitMember(ctx, m)
		if err != nil {
			return err
		}
		m.id, s.p.Etcd = status.Header.MemberId, status.Version
	}
	if err := s.addUsers(ctx); err != nil {
		return err
	}
	s.audit, err = startAudit(s) //nolint:contextcheck // it lasts until it is stopped
	return err
}

// self is the program that runs the campaign.
func (s *system) self() string {
	path, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return path
}

// peerURL is the URL of a member for the others. They reach it through their proxy.
func peerURL(i int) string { return fmt.Sprintf("http://10.255.0.%d:2380", i+1) }

// startPeerProxy runs the HTTP proxy that a member must use to reach the others. The proxy sends each request over the
// link to its target. So each pair of members has one link for each direction of dialling, with any build of etcd.
func (s *system) startPeerProxy(from int) (address string, err error) {
	m := s.members[from]
	hosts := make(map[string]*etcdtest.Link)
	for to, other := range s.members {
		if to == from {
			continue
		}
		if m.peers[to], err = etcdtest.StartLink(other.peer); err != nil {
			return "", err
		}
		s.closers = append(s.closers, m.peers[to].Close)
		hosts[strings.TrimPrefix(peerURL(to), "http://")] = m.peers[to]
	}
	transport := &http.Transport{
		DisableCompression: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			link, ok := hosts[address]
			if !ok {
				return nil, fmt.Errorf("%s is no other member", address)
			}
			return (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(link.Endpoint, "unix://"))
		},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	silent := log.New(io.Discard, "", 0) // its connections fail on purpose
	server := &http.Server{
		ErrorLog: silent,
		Handler: &httputil.ReverseProxy{
			Rewrite: func(*httputil.ProxyRequest) {}, Transport: transport, FlushInterval: -1, ErrorLog: silent,
		},
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l) // ends with Close
	}()
	s.closers = append(s.closers, func() {
		server.Close()
		<-done
		transport.CloseIdleConnections()
	})
	return l.Addr().String(), nil
}

// serveMember runs a member in this process.
func serveMember(ctx context.Context, file string) error {
	cfg, err := embed.ConfigFromFile(file)
	if err != nil {
		return err
	}
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	select {
	case err := <-etcd.Err():
		return err
	case <-ctx.Done():
		return nil
	}
}

// newRootClient returns a client that may do everything and bypasses all links.
func (s *system) newRootClient(members ...*member) (*clientv3.Client, error) {
	var endpoints []string
	for _, m := range members {
		endpoints = append(endpoints, m.client)
	}
	return clientv3.New(clientv3.Config{Endpoints: endpoints, Username: rootUser, Password: rootPassword, Logger: zap.NewNop()})
}

func (s *system) dialRoot() (err error) {
	s.root, err = s.newRootClient(s.members...)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, func() { s.root.Close() })
	s.operator, err = leader.New(s.root, leader.WithPrefix(root))
	return err
}

// ask sends a request as an operator does, who gives up after 2 s.
func (s *system) ask(ctx context.Context, request func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), 2*time.Second)
	defer cancel()
	return request(ctx)
}

// insist repeats a request until it succeeds.
func (s *system) insist(ctx context.Context, request func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := s.ask(ctx, request)
		if err == nil {
			return nil
		}
		if conn := s.root.ActiveConnection(); conn != nil {
			conn.ResetConnectBackoff()
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// awaitMember waits until a member answers and knows a raft leader.
func (s *system) awaitMember(ctx context.Context, m *member) (status *clientv3.StatusResponse, err error) {
	err = s.insist(ctx, func(ctx context.Context) (err error) {
		status, err = s.root.Status(ctx, m.client)
		if err == nil && status.Leader == 0 {
			err = errors.New("no raft leader")
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("member %s is not ready: %w", m.name, err)
	}
	return status, nil
}

// raftLeader returns the leader of etcd. If two members claim to lead, the later raft term wins.
func (s *system) raftLeader(ctx context.Context) (*member, error) {
	var leader *member
	var term uint64
	for _, m := range s.members {
		sctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		status, err := s.root.Status(sctx, m.client)
		cancel()
		if err == nil && status.Leader == status.Header.MemberId && status.RaftTerm > term {
			leader, term = m, status.RaftTerm
		}
	}
	if leader == nil {
		return nil, errors.New("etcd has no leader")
	}
	return leader, nil
}

// pause stops a member, and notes whether it is known to be a follower.
func (s *system) pause(ctx context.Context, m *member) error {
	m.paused = oracle.Entry{Kind: oracle.Resumed, Proc: m.name}
	sctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	status, err := s.root.Status(sctx, m.client)
	cancel()
	if err == nil && status.Leader != 0 && status.Leader != m.id {
		m.paused.Op = oracle.Follower
	}
	m.paused.From = now()
	return m.signal(syscall.SIGSTOP)
}

// resume continues a paused member.
func (s *system) resume(m *member) error {
	s.add(m.paused)
	return m.signal(syscall.SIGCONT)
}

// addUsers creates the users for the time when authentication is enabled.
func (s *system) addUsers(ctx context.Context) error {
	role := "candidate"
	for _, request := range []func(context.Context) error{
		func(ctx context.Context) error { _, err := s.root.RoleAdd(ctx, role); return err },
		func(ctx context.Context) error {
			_, err := s.root.RoleGrantPermission(ctx, role, root, clientv3.GetPrefixRangeEnd(root), clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func(ctx context.Context) error { _, err := s.root.UserAdd(ctx, user, password); return err },
		func(ctx context.Context) error { _, err := s.root.UserGrantRole(ctx, user, role); return err },
		func(ctx context.Context) error { _, err := s.root.RoleAdd(ctx, "root"); return err },
		func(ctx context.Context) error { _, err := s.root.UserAdd(ctx, rootUser, rootPassword); return err },
		func(ctx context.Context) error { _, err := s.root.UserGrantRole(ctx, rootUser, "root"); return err },
	} {
		err := s.insist(ctx, func(ctx context.Context) error {
			err := request(ctx)
			if errors.Is(err, rpctypes.ErrRoleAlreadyExist) || errors.Is(err, rpctypes.ErrUserAlreadyExist) {
				return nil
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("add users: %w", err)
		}
	}
	return nil
}

// A workerLink is the link of a worker's clients to a member: a holder, and behind it etcd's proxy, which does
// everything else.
type workerLink struct {
	*etcdtest.Link
	holder *holder
}

// linksOf creates the links of one worker's clients.
func (s *system) linksOf(p *process) ([]*workerLink, error) {
	for _, m := range s.members {
		link, err := etcdtest.StartLink(m.client)
		if err != nil {
			return nil, err
		}
		s.closers = append(s.closers, link.Close)
		holder, err := startHolder(strings.TrimPrefix(link.Endpoint, "unix://"))
		if err != nil {
			return nil, err
		}
		s.closers = append(s.closers, func() { holder.close() })
		s.links[p] = append(s.links[p], &workerLink{link, holder})
	}
	return s.links[p], nil
}

const (
	// mixed is the election in which peers compete with this package.
	mixed = "mixed"
	// again is the election of two candidates that never rest. Its terms are short, most campaigns are given up soon,
	// and the next one begins at once. One of the two keeps its lease, and so the name of its key.
	again = "again"
)

// elections are the names of all elections; lasting are those whose terms may be long.
var (
	lasting   = []string{"e0", "e1", "e2", mixed}
	elections = append(slices.Clone(lasting), again)
)

// watched returns the member that some candidates use for all their watches.
func (s *system) watched() *member { return s.members[len(s.members)-1] }

// startWorkers runs the resource, the candidates and the observers.
func (s *system) startWorkers() error {
	socket := filepath.Join(s.tmp, "resource")
	s.resource = s.newProcess("resource", "resource", func() *exec.Cmd {
		return exec.Command(s.self(), "resource", s.dir, socket)
	})
	if err := s.resource.start(); err != nil {
		return err
	}
	add := func(sort string, w worker, knows func(*worker, []string)) (*process, error) {
		p := s.newProcess(sort, w.Name, nil)
		links, err := s.linksOf(p)
		if err != nil {
			return nil, err
		}
		var endpoints []string
		for _, link := range links {
			endpoints = append(endpoints, link.holder.Endpoint)
		}
		knows(&w, endpoints)
		p.asks = len(w.Endpoints)
		if w.Watches == "" {
			s.links[p] = links[:p.asks]
		}
		w.Dir, w.Resource, w.Ill, w.TTL, w.Margin = s.dir, socket, s.ill(p), s.p.TTL, s.p.Margin
		if s.auth {
			w.User, w.Password = user, password
		}
		command := func(p *process, what string) func() *exec.Cmd {
			return func() *exec.Cmd {
				w.Seed = s.p.Seed + uint64(p.started)<<32
				config, err := json.Marshal(w)
				if err != nil {
					panic(err)
				}
				cmd := exec.Command(s.binary, what, string(config))
				cmd.Env = append(os.Environ(), "GORACE=halt_on_error=1")
				return cmd
			}
		}
		p.command = command(p, "worker")
		if w.File == "" {
			return p, p.start()
		}
		p.sidecar = s.newProcess(sortSidecar, sidecarOf(w.Name), nil)
		p.sidecar.command = command(p.sidecar, "sidecar")
		return p, errors.Join(p.start(), p.sidecar.start())
	}
	all := func(w *worker, endpoints []string) { w.Endpoints = endpoints }
	last := len(s.members) - 1
	for i := range s.p.Candidates {
		w := worker{Name: fmt.Sprintf("c%d", i)}
		if i%5 < 4 { // the leases of the others expire after a crash
			w.File = filepath.Join(s.tmp, w.Name+".lease")
		}
		knows := all
		switch i % 4 {
		case 0: // one lease for all elections
			w.Shared, w.Observe, w.Changes = lasting, elections[:1], true
			if i > 0 { // and one member for all watches
				knows = func(w *worker, endpoints []string) { w.Endpoints, w.Watches = endpoints, endpoints[last] }
			}
		case 1: // a lease for each term, and one member that serves only watches
			w.Own = []string{elections[0], mixed, again}
			knows = func(w *worker, endpoints []string) { w.Endpoints, w.Watches = endpoints[:last], endpoints[last] }
		case 2: // one lease for all elections, and all members but that one
			w.Shared, w.Observe = elections, elections[:1]
			knows = func(w *worker, endpoints []string) { w.Endpoints = endpoints[:last] }
		case 3: // one member
			w.Shared, w.Own, w.Changes = elections[1:2], elections[2:3], true
			knows = func(w *worker, endpoints []string) { w.Endpoints = endpoints[:1] }
		}
		p, err := add(sortCandidate, w, knows)
		if err != nil {
			return err
		}
		s.workers, s.faulty = append(s.workers, p), append(s.faulty, p)
	}
	stock, err := add("stock", worker{Name: "stock", Stock: []string{mixed}}, all)
	if err != nil {
		return err
	}
	s.workers = append(s.workers, stock)
	observer, err := add("observer", worker{Name: "observer", Observe: elections, Ask: elections}, all)
	if err != nil {
		return err
	}
	s.watchers, s.faulty = append(s.watchers, observer), append(s.faulty, observer)
	return nil
}

// ill is the file that says what a worker suffers from.
func (s *system) ill(p *process) string { return filepath.Join(s.tmp, p.name+".ill") }

// etcdctlTTL is the TTL of the lease of etcdctl elect.
const etcdctlTTL = time.Minute

// etcdctl takes part in an election with the command of that name until ctx ends.
func (s *system) etcdctl(ctx context.Context, name string) {
	path, err := exec.LookPath("etcdctl")
	if err != nil {
		s.add(oracle.Entry{Kind: oracle.Start, Proc: "etcdctl", Op: "etcdctl", Err: err.Error()})
		return
	}
	for ctx.Err() == nil {
		s.etcdctlTerm(ctx, path, root+name)
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// etcdctlTerm is one campaign of etcdctl elect, and one term if it is elected.
func (s *system) etcdctlTerm(ctx context.Context, path, election string) {
	const proc = "etcdctl"
	stdout, w := io.Pipe()
	var endpoints []string
	for _, m := range s.members {
		endpoints = append(endpoints, m.client)
	}
	p := s.newProcess(proc, proc, func() *exec.Cmd {
		cmd := exec.Command(path, "--endpoints", strings.Join(endpoints, ","), "--user", user+":"+password, "elect", election, proc)
		cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
		cmd.Stdout = w
		return cmd
	})
	began := now()
	if err := p.start(); err != nil {
		s.add(oracle.Entry{Kind: oracle.Failure, Err: err.Error()})
		return
	}
	p.disown()
	key := make(chan string, 1)
	read := make(chan struct{})
	go func() {
		defer close(read)
		var line strings.Builder
		buffer := make([]byte, 256)
		for {
			n, err := stdout.Read(buffer)
			line.Write(buffer[:n])
			if first, _, ok := strings.Cut(line.String(), "\n"); ok {
				select {
				case key <- first:
				default:
				}
			}
			if err != nil {
				return
			}
		}
	}()
	select {
	case k := <-key:
		s.etcdctlLeads(ctx, p, election, k, began)
	case <-p.exited:
	case <-ctx.Done():
	}
	_ = p.signal(syscall.SIGINT) // it resigns
	select {
	case <-p.exited:
	case <-time.After(s.p.TTL): // it has permanently lost its connection
		p.kill()
	}
	w.Close()
	<-read
	s.removeKeysOf(context.WithoutCancel(ctx), proc, election)
}

// etcdctlLeads records a term of etcdctl.
func (s *system) etcdctlLeads(ctx context.Context, p *process, election, key string, began int64) {
	var token, lease int64
	err := s.ask(ctx, func(ctx context.Context) error {
		resp, err := s.root.Get(ctx, key)
		if err == nil && len(resp.Kvs) > 0 {
			token, lease = resp.Kvs[0].CreateRevision, resp.Kvs[0].Lease
		}
		return err
	})
	if err != nil || token == 0 {
		return
	}
	e := oracle.Entry{Proc: p.name, Kind: oracle.Term, From: began, Election: election, Token: token, Key: key, Lease: lease, Op: "etcdctl"}
	s.add(e)
	last := now()
	for range 10 {
		select {
		case <-time.After(pieceEvery):
		case <-p.exited:
			return
		case <-ctx.Done():
			return
		}
		e.Kind, e.From, e.T = oracle.Belief, last, now()
		last = e.T
		s.add(e)
	}
}

// removeKeysOf deletes what a peer has left behind, because the lease of etcdctl lasts for a minute.
func (s *system) removeKeysOf(ctx context.Context, peer, election string) {
	_ = s.insist(ctx, func(ctx context.Context) error {
		resp, err := s.root.Get(ctx, election+"/", clientv3.WithPrefix())
		if err != nil {
			return err
		}
		for _, kv := range resp.Kvs {
			if string(kv.Value) == peer {
				_, err := s.root.Revoke(ctx, clientv3.LeaseID(kv.Lease))
				if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
					return err
				}
			}
		}
		return nil
	})
}

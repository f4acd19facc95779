package leader_test

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"example.com/leader/internal/leasefile"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// ownerEnv makes the test's own binary a process with a lease file, until it is killed. It contains etcd's endpoint, the
// path of the file, and what the process does.
const ownerEnv = "LEADER_TEST_OWNER"

// What an owner does.
const (
	leads = "leads" // "jobs" and "others"
	hurry = "hurry" // leads "jobs" again and again for a moment, each time with a new Elector
	renew = "renew" // leads "jobs" with a lease that is renewed often
)

func TestMainOfAnOwner(t *testing.T) {
	args := strings.Fields(os.Getenv(ownerEnv))
	if len(args) == 0 {
		t.Skip("not an owner")
	}
	client := etcdtest.NewClient(t, args[0])
	if err := own(t.Context(), client, args[1], args[2]); err != nil {
		fmt.Println(err)
	}
}

func own(ctx context.Context, client *clientv3.Client, path, what string) error {
	lease := long
	if what == renew {
		lease = leader.WithTTL(ttl)
	}
	for {
		e, err := leader.New(client, lease, leader.WithLeaseFile(path))
		if err != nil {
			return err
		}
		if what == hurry {
			fmt.Println("begins")
		}
		l, err := e.Campaign(ctx, "jobs", "owner")
		if err == nil && what == leads {
			_, err = e.Campaign(ctx, "others", "owner") // on the same lease
		}
		if err != nil {
			return err
		}
		if what != hurry {
			fmt.Println("leads with", l.Key())
			<-l.Context().Done()
			return context.Cause(l.Context())
		}
		if !l.IsLeader() {
			return context.Cause(l.Context())
		}
		if rand.N(2) == 0 {
			err = l.Resign(ctx)
		}
		if err = errors.Join(err, e.Close(ctx)); err != nil {
			return err
		}
	}
}

// startOwner starts a process that leads "jobs" and "others" with a lease file.
func startOwner(t *testing.T, m *etcdtest.Member, path string) *exec.Cmd {
	t.Helper()
	owner, said := startProcess(t, m, path, leads)
	if line := <-said; !strings.HasPrefix(line, "leads with jobs/") {
		t.Fatal(line)
	}
	return owner
}

// startProcess starts an owner and returns what it says, line by line, until its end.
func startProcess(t *testing.T, m *etcdtest.Member, path, what string) (*exec.Cmd, <-chan string) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("lease files need Linux")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	owner := exec.Command(self, "-test.run=^TestMainOfAnOwner$", "-test.v=false")
	owner.Env = append(os.Environ(), ownerEnv+"="+m.Endpoint+" "+path+" "+what)
	out, err := owner.StdoutPipe()
	if err == nil {
		err = owner.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = owner.Process.Kill()
		_ = owner.Wait()
	})
	said := make(chan string, 10_000)
	go func() {
		defer close(said)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			said <- lines.Text()
		}
	}()
	return owner, said
}

func kill(t *testing.T, p *exec.Cmd) {
	t.Helper()
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
}

// reclaim reclaims in the background.
func reclaim(ctx context.Context, client *clientv3.Client, path string) <-chan error {
	c := make(chan error, 1)
	go func() { c <- leader.Reclaim(ctx, client, path) }()
	return c
}

func leaseFile(t *testing.T) string { return filepath.Join(t.TempDir(), "lease") }

func TestReclaimEndsTheTermsOfAProcessThatWasKilled(t *testing.T) {
	m, client := start(t)
	path := leaseFile(t)
	owner := startOwner(t, m, path)
	waiting := newElector(t, client)
	next := campaign(t.Context(), waiting, "jobs", "next")
	awaitQueue(t, client, "jobs", queued(2))
	reclaimed := reclaim(t.Context(), client, path)
	select {
	case err := <-reclaimed:
		t.Fatalf("Reclaim returned %v while the owner lives", err)
	case o := <-next:
		t.Fatalf("Campaign returned %v, %v while the owner leads", o.l, o.err)
	case <-time.After(100 * time.Millisecond):
	}
	kill(t, owner)
	if err := etcdtest.Await(t, "Reclaim", reclaimed); err != nil {
		t.Error(err)
	}
	resign(t, awaitLeader(t, next)) // and not after a minute, which is longer than Await waits
	resign(t, lead(t, waiting, "others", ""))
	if err := leader.Reclaim(t.Context(), client, path); err != nil { // there is nothing left to revoke
		t.Error(err)
	}
}

// A sidecar, as in docs/operations.md.
func keepReclaiming(ctx context.Context, client *clientv3.Client, file string) {
	for ctx.Err() == nil {
		if err := leader.Reclaim(ctx, client, file); err != nil && ctx.Err() == nil {
			log.Print(err)
		}
		time.Sleep(time.Second) // until a new process has started it would ask etcd again and again
	}
}

func TestASidecarReclaimsAgainAndAgain(t *testing.T) {
	m, client := start(t)
	path := leaseFile(t)
	ctx, cancel := context.WithCancel(t.Context())
	var sidecar sync.WaitGroup
	sidecar.Go(func() { keepReclaiming(ctx, client, path) })
	defer sidecar.Wait()
	defer cancel()
	for range 3 {
		kill(t, startOwner(t, m, path))
		awaitQueue(t, client, "jobs", queued(0))
	}
}

func TestARestartedProcessRevokesTheLeasesOfTheDeadOne(t *testing.T) {
	m, client := start(t)
	path := leaseFile(t)
	owner := startOwner(t, m, path)
	if _, err := leader.New(client, leader.WithLeaseFile(path)); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "owner is alive") {
		t.Fatalf("New returned %v while the owner lives", err)
	}
	kill(t, owner)
	logged := new(logRecorder)
	e, err := leader.New(client, leader.WithTTL(ttl), leader.WithLeaseFile(path), leader.WithLogger(slog.New(logged)))
	if err != nil {
		t.Fatal(err)
	}
	// TryCampaign too, which would not wait behind the dead.
	l, err := e.TryCampaign(t.Context(), "jobs", "")
	if err != nil {
		t.Fatal(err)
	}
	logged.await(t, "INFO leases of a dead owner are gone")
	if err := e.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, l, leader.ErrResigned)
	again, err := leader.New(client, leader.WithLeaseFile(path)) // Close has unlocked it
	if err == nil {
		err = again.Close(t.Context())
	}
	if err != nil {
		t.Error(err)
	}
}

func TestALeaseFileServesAnElectorAfterAnother(t *testing.T) {
	_, client := start(t)
	path := leaseFile(t)
	file := leader.WithLeaseFile(path)
	for range 2 {
		err := leader.Run(t.Context(), client, "jobs", "", func(context.Context, *leader.Leader) error {
			if _, err := leader.New(client, file); err == nil {
				t.Error("two Electors of a process have the same file")
			}
			return nil
		}, file)
		if err != nil {
			t.Error(err)
		}
		l, err := leader.Campaign(t.Context(), client, "jobs", "", file)
		if err != nil {
			t.Fatal(err)
		}
		resign(t, l)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := leader.Campaign(ctx, client, "jobs", "", file); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if _, err := leader.Campaign(t.Context(), client, "jobs/", "", file); !errors.Is(err, leader.ErrInvalidName) {
			t.Error(err)
		}
		e, err := leader.New(client, file)
		if err != nil {
			t.Fatal(err)
		}
		lead(t, e, "a", "")
		lead(t, e, "b", "")
		if err := e.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil || strings.Contains(string(text), "\nlease ") {
		t.Errorf("in the end the file has %q, %v", text, err)
	}
}

// The first Elector leaves a lease in the file, and so the next one takes the file over while it is locked.
func TestClosingAgainDoesNotTakeTheLeaseFileFromTheNextElector(t *testing.T) {
	_, client := start(t)
	file := leader.WithLeaseFile(leaseFile(t))
	denying := wrapped(client)
	denying.Lease = denied(client)
	first, err := leader.New(denying, long, file)
	if err != nil {
		t.Fatal(err)
	}
	left := leaseOf(t, client, lead(t, first, "jobs", ""))
	if err := first.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := newElector(t, client, file)
	lead(t, second, "others", "")
	if err := first.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := leader.New(client, file); err == nil || !strings.Contains(err.Error(), "owner is alive") {
		t.Errorf("New returned %v while another Elector uses the file", err)
	}
	if _, err := client.Revoke(t.Context(), left); err != nil {
		t.Error(err)
	}
}

// denied returns a Lease that may revoke nothing.
func denied(client *clientv3.Client) *brokenLease {
	lease := &brokenLease{Lease: client.Lease}
	deny := func() error { return rpctypes.ErrPermissionDenied }
	lease.revoke.Store(&deny)
	return lease
}

// Each lease is in the file before a key is on it, and until etcd has confirmed that it is gone.
func TestALeaseFileNamesTheLeasesThatThereAre(t *testing.T) {
	_, client := start(t)
	path := leaseFile(t)
	names := func(l *leader.Leader) bool {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(text), "\nlease "+filepath.Base(l.Key())+"\n")
	}
	kv := &brokenKV{KV: client.KV}
	before := func() {
		if text, err := os.ReadFile(path); err != nil || !strings.Contains(string(text), "\nlease ") {
			t.Errorf("a join is sent while the file has %q, %v", text, err)
		}
	}
	kv.before.Store(&before)
	joining := wrapped(client)
	joining.KV = kv
	e := newElector(t, joining, leader.WithLeaseFile(path))
	l := lead(t, e, "jobs", "")
	if !names(l) {
		t.Error("the file does not name the lease of a leader")
	}
	other := lead(t, e, "other", "")
	resign(t, l)
	if !names(l) {
		t.Error("the file does not name a lease that is still used")
	}
	if _, err := client.Revoke(t.Context(), leaseOf(t, client, other)); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, other, leader.ErrEvicted)
	next := lead(t, e, "jobs", "")
	if !names(next) {
		t.Error("the file does not name the lease that replaced a lost one")
	}
	kv.before.Store(nil)
}

func leaseOf(t *testing.T, client *clientv3.Client, l *leader.Leader) clientv3.LeaseID {
	t.Helper()
	return clientv3.LeaseID(onlyKey(t, client, l.Key()).Lease)
}

func TestLeaseFileOfAnotherClusterRevokesNothing(t *testing.T) {
	m, client := start(t)
	other := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	path := leaseFile(t)
	owner := startOwner(t, m, path)
	// The other cluster has a lease with the same ID, of somebody who lives.
	id := clientv3.LeaseID(onlyKey(t, client, "jobs/").Lease)
	_, err := etcdserverpb.NewLeaseClient(other.ActiveConnection()).LeaseGrant(t.Context(), &etcdserverpb.LeaseGrantRequest{ID: int64(id), TTL: 600})
	if err != nil {
		t.Fatal(err)
	}
	kill(t, owner)
	if err := leader.Reclaim(t.Context(), other, path); err != nil {
		t.Error(err)
	}
	e, err := leader.New(other, leader.WithLeaseFile(path))
	if err != nil {
		t.Fatal(err)
	}
	resign(t, lead(t, e, "jobs", ""))
	if answer, err := other.TimeToLive(t.Context(), id); err != nil || answer.TTL <= 0 {
		t.Errorf("the lease of another cluster with the same ID: %+v, %v", answer, err)
	}
	if err := e.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := client.Revoke(t.Context(), id); err != nil { // it was left to expire
		t.Error(err)
	}
}

// Its leases are not there, and nothing tells the cluster from the one before. etcd does not grant their IDs again: an ID
// has the time in it.
func TestLeaseFileOfAWipedClusterDelaysNobody(t *testing.T) {
	data := t.TempDir()
	m := etcdtest.Start(t, etcdtest.Settings{"data-dir": data})
	path := leaseFile(t)
	owner := startOwner(t, m, path)
	client := etcdtest.NewClient(t, m.Endpoint)
	before, err := client.Status(t.Context(), m.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	kill(t, owner)
	wipe(t, m, data)
	client = etcdtest.NewClient(t, m.Endpoint)
	if after, err := client.Status(t.Context(), m.Endpoint); err != nil || after.Header.ClusterId != before.Header.ClusterId {
		t.Fatalf("the cluster is %v, %v; want the same ID as %v", after, err, before)
	}
	living := lead(t, newElector(t, client), "others", "")
	if err := leader.Reclaim(t.Context(), client, path); err != nil {
		t.Error(err)
	}
	e := newElector(t, client, leader.WithLeaseFile(path))
	l, err := e.TryCampaign(t.Context(), "jobs", "")
	if err != nil {
		t.Fatal(err)
	}
	resign(t, l)
	resign(t, living)
}

// Without permission to revoke, for example because of another user, a restarted process waits as without a file.
func TestALeaseThatCannotBeRevokedDelaysNobody(t *testing.T) {
	m, client := start(t)
	path := leaseFile(t)
	owner := startOwner(t, m, path)
	kill(t, owner)
	denying := wrapped(client)
	lease := denied(client)
	denying.Lease = lease
	logged := new(logRecorder)
	if err := leader.Reclaim(t.Context(), denying, path); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("Reclaim returned %v", err)
	}
	e, err := leader.New(denying, leader.WithTTL(ttl), leader.WithLeaseFile(path), leader.WithLogger(slog.New(logged)))
	if err != nil {
		t.Fatal(err)
	}
	l := lead(t, e, "free", "")
	logged.await(t, "WARN leases of a dead owner could not be revoked, they will expire")
	if err := leader.Reclaim(t.Context(), client, filepath.Join(t.TempDir(), "none")); err != nil {
		t.Error(err)
	}
	lease.revoke.Store(nil)
	resign(t, l)
	if err := e.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := client.Revoke(t.Context(), clientv3.LeaseID(onlyKey(t, client, "jobs/").Lease)); err != nil {
		t.Error(err)
	}
}

func TestABadLeaseFileIsRefused(t *testing.T) {
	t.Parallel()
	client := clientv3.NewCtxClient(t.Context())
	dir := t.TempDir()
	for path, want := range map[string]string{
		"":  "must not be empty",
		dir: "regular file",
	} {
		_, err := leader.New(client, leader.WithLeaseFile(path))
		if want := fmt.Sprintf("leader: WithLeaseFile(%q): ", path); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("New returned %v, want an error with %q", err, want)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New returned %v, want an error with %q", err, want)
		}
		if err := leader.Reclaim(t.Context(), client, path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Reclaim returned %v, want an error with %q", err, want)
		}
	}
	if err := leader.Reclaim(t.Context(), nil, dir); err == nil || !strings.Contains(err.Error(), "client: must not be nil") {
		t.Errorf("Reclaim without a client returned %v", err)
	}
}

// kills is how many processes TestAProcessThatIsKilledAtAnyMomentLosesItsLeasesAlone kills.
var kills = flag.Int("kills", 24, "how many processes with a lease file to kill")

// A process is killed while it opens its file, is granted a lease, writes, joins, leads, renews, resigns or closes. Each
// time its keys are gone as soon as Reclaim has returned, or the next process has begun to campaign; and no living
// process loses its lease, also while somebody tries to reclaim it all the time.
func TestAProcessThatIsKilledAtAnyMomentLosesItsLeasesAlone(t *testing.T) {
	m, client := start(t)
	path, ownPath := leaseFile(t), leaseFile(t)
	if runtime.GOOS != "linux" {
		t.Skip("lease files need Linux")
	}
	living := newElector(t, client, leader.WithLeaseFile(ownPath))
	own := lead(t, living, "alive", "")
	ctx, cancel := context.WithCancel(t.Context())
	reclaiming := reclaim(ctx, client, ownPath)
	left := 0 // leases that were granted when it was too late to write them down: they have no key
	for i := range *kills {
		what, until := hurry, 40*time.Millisecond
		if i%8 == 7 {
			what, until = renew, time.Second
		}
		owner, said := startProcess(t, m, path, what)
		first := etcdtest.Await(t, "the process", said)
		time.Sleep(rand.N(until))
		kill(t, owner)
		if i%5 == 4 {
			e, err := leader.New(client, long, leader.WithLeaseFile(path))
			if err != nil {
				t.Fatalf("%d: New after a crash: %v", i, err)
			}
			if _, err := e.TryCampaign(t.Context(), "jobs", ""); err != nil {
				t.Fatalf("%d: the campaign after a crash: %v", i, err)
			}
			if err := e.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
		} else if err := leader.Reclaim(t.Context(), client, path); err != nil {
			t.Fatalf("%d: Reclaim: %v", i, err)
		}
		if keys, err := client.Get(t.Context(), "jobs/", clientv3.WithPrefix()); err != nil || len(keys.Kvs) > 0 {
			t.Fatalf("%d: a key of a process that was killed is left: %v, %v", i, keys, err)
		}
		for line := first; line != ""; line = <-said {
			if line != "begins" && !strings.HasPrefix(line, "leads with") {
				t.Fatalf("%d: the process said %q", i, line)
			}
		}
		leases, err := client.Leases(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range leases.Leases {
			if answer, err := client.TimeToLive(t.Context(), l.ID, clientv3.WithAttachedKeys()); err == nil && answer.TTL > 0 && len(answer.Keys) == 0 {
				_, _ = client.Revoke(t.Context(), l.ID)
				left++
			}
		}
	}
	if !own.IsLeader() {
		t.Errorf("the term of a living process has ended: %v", context.Cause(own.Context()))
	}
	cancel()
	if err := etcdtest.Await(t, "Reclaim", reclaiming); !errors.Is(err, context.Canceled) {
		t.Errorf("Reclaim of a living process's file returned %v", err)
	}
	t.Logf("%d processes were killed; %d of their leases had no key yet, and would have expired", *kills, left)
}

func TestReclaimSaysThatTheClientIsClosed(t *testing.T) {
	m, client := start(t)
	path := filepath.Join(t.TempDir(), "leases")
	f, err := leasefile.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Add(resp.Header.ClusterId, 1234); err != nil {
		t.Fatal(err)
	}
	leasefile.Crash(path)
	closed := etcdtest.NewClient(t, m.Endpoint)
	closed.Close()
	if err := leader.Reclaim(t.Context(), closed, path); !errors.Is(err, leader.ErrClosed) {
		t.Errorf("Reclaim: %v, want ErrClosed", err)
	}
}

//go:build unix

package main

import (
	"context"
	"strings"
	"sync"
	"testing"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

func TestTransferChoosesByValueKeyOrAge(t *testing.T) {
	t.Parallel()
	const name = "transfer/choose"
	leaderDo(t, "transfer", name).want(t, 3, `"`+name+`" has no leader`)
	leaderDo(t, "transfer", name, "--to", "newest").want(t, 3, `"`+name+`" has no leader`)
	enqueue(t, name, "a")
	leaderDo(t, "wait", name).want(t, 0, "a\n")
	leaderDo(t, "transfer", name).want(t, 3, "nobody waits")
	leaderDo(t, "transfer", name, "--to", "newest").want(t, 3, "nobody waits")
	enqueue(t, name, "b")
	enqueue(t, name, "c")
	enqueue(t, name, "d")
	leads := func(want string, args ...string) {
		t.Helper()
		if r := leaderDo(t, append([]string{"transfer", name}, args...)...); r.status != 0 || r.out != want+"\n" {
			t.Errorf("transfer %v: %+v, want %s", args, r, want)
		}
		leaderDo(t, "wait", name).want(t, 0, want+"\n")
	}
	leads("b")
	leads("b", "--to", "b") // it leads already
	await(t, "a in the queue again", func() bool { return len(keys(t, name)) == 4 })
	leads("a", "--to", "newest")
	await(t, "b in the queue again", func() bool { return len(keys(t, name)) == 4 })
	lines := strings.Split(leaderDo(t, "list", name).out, "\n")
	var key string
	for _, line := range lines {
		if f := strings.Split(line, "\t"); f[len(f)-1] == "d" {
			key = name + "/" + f[3]
		}
	}
	leads("d", "--to", key)
	leaderDo(t, "transfer", name, "--to", "nobody").want(t, 3, `"nobody"`)
	enqueue(t, name, "twin")
	enqueue(t, name, "twin")
	leaderDo(t, "transfer", name, "--to", "twin").want(t, 2, "several", name+"/")
	leaderDo(t, "transfer", name, "--to", "c", "-o", "json").want(t, 0, `"value":"c"`)
}

// The new leader resigns when the transfer is done, before it is read who leads.
func TestATransferIsDoneThoughTheNewLeaderHasLeft(t *testing.T) {
	t.Parallel()
	const name = "transfer/left"
	first := lead(t, name, "first")
	elected := make(chan *leader.Leader, 1)
	var working sync.WaitGroup
	t.Cleanup(working.Wait)
	working.Go(func() {
		select {
		case <-first.Context().Done():
			_ = first.Resign(t.Context()) // the second one is elected only if it succeeds
		case <-t.Context().Done():
		}
	})
	working.Go(func() {
		if second, err := leader.Campaign(t.Context(), etcdtest.NewClient(t, member.Endpoint), name, "second"); err == nil {
			elected <- second
		}
	})
	await(t, "the second candidate", func() bool { return len(keys(t, name)) == 2 })
	elector, err := leader.New(etcdtest.NewClientFrom(t, clientv3.Config{
		Endpoints: []string{member.Endpoint},
		DialOptions: []grpc.DialOption{grpc.WithChainUnaryInterceptor(
			func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				if r, ok := req.(*etcdserverpb.RangeRequest); ok && r.Limit == 1 { // only this reads who leads
					select {
					case second := <-elected:
						elected <- second // the read may be repeated
						if err := second.Resign(ctx); err != nil {
							t.Error(err)
						}
					case <-ctx.Done():
					}
				}
				return invoker(ctx, method, req, reply, cc, opts...)
			})},
	}))
	if err != nil {
		t.Fatal(err)
	}
	a := &app{commandTimeout: etcdtest.Patience}
	if c, err := a.handOver(t.Context(), elector, name, "", etcdtest.Patience); c != (leader.Candidate{}) || err != nil {
		t.Errorf("handOver returned %v, %v", c, err)
	}
}

// A leader that does not stop its work keeps its place.
func TestATransferThatTakesTooLongNamesWhoHasNotLeft(t *testing.T) {
	t.Parallel()
	const name = "transfer/stubborn"
	p := leaderBegin(t, "run", name, "--value", "stubborn", "--ttl", "5m", "--margin", "2m", "--restart", "--",
		"sh", "-c", `trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done`)
	p.line(t, "ready")
	enqueue(t, name, "waits")
	leaderDo(t, "transfer", name, "--timeout", "2s").want(t, 4, "stubborn", "have not left")
	p.line(t, "asked")
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
}

func TestEvictAsksFirst(t *testing.T) {
	t.Parallel()
	const name = "evict/asks"
	leaderDo(t, "evict", name, "--yes").want(t, 3, `"`+name+`" has no leader`)
	l := lead(t, name, "victim")
	leaderDo(t, "evict", name).want(t, 2, "--yes")
	for answer, status := range map[string]int{"\n": 1, "n\n": 1, "\x04": 1, "\x03": 130} {
		p, keyboard := onTerminal(t, "evict", name)
		p.line(t, "two may work")
		keyboard(answer)
		p.end(t, status)
		if !l.IsLeader() {
			t.Fatalf("evicted after %q", answer)
		}
	}
	p, keyboard := onTerminal(t, "evict", name)
	p.line(t, "two may work")
	keyboard("y\n")
	p.end(t, 0)
	<-l.Context().Done()
	if strings.Contains(strings.Join(keys(t, name), " "), l.Key()) {
		t.Error("the key is there")
	}
	lead(t, name, "second")
	leaderDo(t, "evict", name, "--yes", "-o", "json").want(t, 0, `"value":"second"`)
}

func TestEvictSparesALaterTerm(t *testing.T) {
	t.Parallel()
	const name = "evict/later"
	l := lead(t, name, "first")
	p, keyboard := onTerminal(t, "evict", name)
	p.line(t, "two may work")
	if err := l.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := lead(t, name, "second")
	keyboard("y\n")
	p.end(t, 1)
	if !second.IsLeader() {
		t.Error("the later term was evicted")
	}
}

func TestReclaimTellsAnErrorOnceAndGoesOn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	leaderDo(t, "reclaim", "--once", dir).want(t, 1, "regular")
	leaderDo(t, "reclaim", "--once", dir+"/missing").want(t, 0, "no lease of a dead owner is left")
	leaderDo(t, "reclaim", "--once", dir+"/nowhere/missing").want(t, 0, "does not exist")
	p := leaderBegin(t, "reclaim", dir)
	p.line(t, `being retried: reclaim "`+dir+`": must be`)
	select {
	case <-p.ended:
		t.Error("it has ended")
	case line := <-p.lines:
		t.Errorf("it also prints %q", line)
	case <-t.Context().Done():
	default:
	}
}

package leader_test

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The tests of this file are about what is logged while a candidate joins, and about log handlers that block there.

// The line comes when a lease was granted after all, so there is a lease to give back.
func TestPanicAndGoexitInALogHandlerThatIsToldOfAGrantLeaveNoLease(t *testing.T) {
	for _, how := range []string{"panic", "Goexit"} {
		t.Run(how, func(t *testing.T) {
			_, client := start(t)
			c := wrapped(client)
			c.Lease = &refusingLease{Lease: client.Lease}
			m := newMisdeed("log: requests of the campaign work again", func() {
				if how == "panic" {
					panic("panic")
				}
				runtime.Goexit()
			})
			m.armed.Store(true)
			e := newElector(t, c, m.options()...)
			ended := ending(func() { _, _ = e.Campaign(t.Context(), "jobs", "") })
			if got := etcdtest.Await(t, "the caller's end", ended); got != how {
				t.Fatalf("the call has ended by %v, want %v", got, how)
			}
			resp, err := client.Leases(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(resp.Leases) > 0 {
				t.Errorf("leases left: %v", resp.Leases)
			}
			resign(t, lead(t, e, "jobs", ""))
		})
	}
}

// leaderReads holds reads of who leads.
type leaderReads struct {
	clientv3.KV
	hung chan struct{}
}

func (kv *leaderReads) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if op := clientv3.OpGet(key, opts...); len(op.RangeBytes()) > 0 {
		select {
		case kv.hung <- struct{}{}:
		default:
		}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return kv.KV.Get(ctx, key, opts...)
}

// What is only logged must not keep the event waiting that elects.
func TestElectionDoesNotWaitForTheReadThatIsLogged(t *testing.T) {
	_, client := start(t)
	l := lead(t, newElector(t, client), "jobs", "first")
	c := wrapped(client)
	kv := &leaderReads{KV: client.KV, hung: make(chan struct{}, 1)}
	c.KV = kv
	var log logRecorder
	next := campaign(t.Context(), newElector(t, c, leader.WithLogger(slog.New(&log))), "jobs", "second")
	etcdtest.Await(t, "the read", kv.hung)
	resigned := time.Now()
	resign(t, l)
	second := awaitLeader(t, next)
	if took := time.Since(resigned); took > time.Second {
		t.Errorf("elected %v after the resignation; logged %q", took, log.lines())
	}
	resign(t, second)
}

// A log handler that takes its time must not make a stream that works look dark.
func TestWatchIsNotLateBecauseTheLogHandlerIsSlow(t *testing.T) {
	_, client := start(t)
	l := lead(t, newElector(t, client), "jobs", "first")
	var log logRecorder
	slow := handler(func(r slog.Record) {
		if r.Message == "joined the queue" {
			time.Sleep(1500 * time.Millisecond)
		}
		_ = log.Handle(t.Context(), r)
	})
	e := newElector(t, wrapped(client), leader.WithLogger(slog.New(slow)))
	next := campaign(t.Context(), e, "jobs", "second")
	log.await(t, "INFO joined the queue")
	time.Sleep(500 * time.Millisecond) // what must not happen has no event
	resign(t, l)
	resign(t, awaitLeader(t, next))
	for _, line := range log.lines() {
		if line == "WARN watch of the own key is being retried" {
			t.Errorf("logged %q", log.lines())
		}
	}
}

// A candidate whose key is deleted while its log handler blocks must know that when it goes on.
func TestNobodyIsElectedWhoseKeyWasDeletedWhileTheLogHandlerBlocked(t *testing.T) {
	_, client := start(t)
	for _, line := range []string{"joined the queue", "requests of the campaign work again"} {
		const blocks = 1300 * time.Millisecond
		for i := range 10 {
			t.Run(fmt.Sprint(line, i), func(t *testing.T) {
				t.Parallel()
				name := fmt.Sprint(line, i)
				l := lead(t, newElector(t, client), name, "first")
				reached, release := make(chan struct{}), make(chan struct{})
				var once atomic.Bool
				slow := handler(func(r slog.Record) {
					if r.Message == line && once.CompareAndSwap(false, true) {
						close(reached)
						<-release
					}
				})
				elected := make(chan *leader.Leader, 10)
				c := wrapped(client)
				if line == "requests of the campaign work again" {
					c.KV = &refusingKV{KV: client.KV}
				}
				e := newElector(t, c, leader.WithLogger(slog.New(slow)), leader.WithHooks(leader.Hooks{
					Elected: func(_ string, l *leader.Leader, _ time.Duration) { elected <- l },
				}))
				next := campaign(t.Context(), e, name, "second")
				etcdtest.Await(t, "the log handler", reached)
				cs := awaitQueue(t, client, name, queued(2))
				if _, err := client.Delete(t.Context(), cs[1].Key); err != nil {
					t.Fatal(err)
				}
				resign(t, l)
				time.Sleep(blocks)
				close(release)
				if got := etcdtest.Await(t, "Elected", elected).Token(); got == cs[1].Token {
					t.Errorf("elected with token %d, whose key was deleted %v ago", got, blocks)
				}
				if o := etcdtest.Await(t, "Campaign", next); o.l != nil {
					_ = o.l.Resign(t.Context())
				}
			})
		}
	}
}

// A refusingKV refuses the first transaction.
type refusingKV struct {
	clientv3.KV
	refused atomic.Bool
}

func (kv *refusingKV) Txn(ctx context.Context) clientv3.Txn {
	if kv.refused.CompareAndSwap(false, true) {
		ctx, cancel := context.WithCancel(ctx)
		cancel()
		return kv.KV.Txn(ctx)
	}
	return kv.KV.Txn(ctx)
}

// valueReads counts reads of all keys of an election with their values.
type valueReads struct {
	clientv3.KV
	reads atomic.Int64
}

func (kv *valueReads) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if op := clientv3.OpGet(key, opts...); len(op.RangeBytes()) > 0 && !op.IsKeysOnly() && op.Limit() == 0 {
		kv.reads.Add(1)
	}
	return kv.KV.Get(ctx, key, opts...)
}

// There may be thousands of candidates, each with a value of up to 1 MiB.
func TestWhatIsLoggedCostsNoReadOfAllValues(t *testing.T) {
	_, client := start(t)
	if _, err := client.Put(t.Context(), "jobs/nested/x", ""); err != nil {
		t.Fatal(err)
	}
	l := lead(t, newElector(t, client), "jobs", "first")
	c := wrapped(client)
	kv := &valueReads{KV: client.KV}
	c.KV = kv
	log := make(logChannel, 100)
	next := campaign(t.Context(), newElector(t, c, leader.WithLogger(slog.New(log))), "jobs", "second")
	awaitRecord(t, log, "joined the queue", next)
	if got := kv.reads.Load(); got > 0 {
		t.Errorf("%d reads of the values of all candidates", got)
	}
	resign(t, l)
	resign(t, awaitLeader(t, next))
}

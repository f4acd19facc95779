//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"example.com/leader/internal/oracle"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A sort is a kind of fault. It strikes, holds for a while, and heals. The seed decides in advance which kinds strike.
// Whom one strikes may depend on who leads at that moment.
type sort struct {
	name string
	// on is what it strikes. Two faults of one round do not strike the same.
	on target
	// strike returns when everything is healed. It also heals if ctx ends early.
	strike func(ctx context.Context, f *fault) error
}

type target int

const (
	onWorker target = iota
	onMember        // one fault at a time: with two, etcd would lose its quorum, which is a fault of its own
	onData          // what is in etcd
	onHealth        // of a candidate
	onLife          // of a candidate that has a sidecar
	onAuth
	onSpace
)

// A fault is a single fault of some kind.
type fault struct {
	*schedule
	sort   sort
	rand   *rand.Rand
	worker *process // the worker it strikes, if any
	victim string   // whom it strikes, for the history
}

// hold blocks for a random time between from and to, in units of the TTL, or until ctx ends.
func (f *fault) hold(ctx context.Context, from, to float64) {
	ttl := float64(f.p.TTL)
	sleep(ctx, f.rand, time.Duration(from*ttl), time.Duration(to*ttl))
}

// sorts returns all kinds of faults.
func sorts() []sort {
	return []sort{
		{"kill-candidate", onWorker, killCandidate},
		{"kill-candidate-reclaimed", onLife, killReclaimed},
		{"stop-candidate-short", onWorker, stopCandidate(0.1, 0.7)},
		{"stop-candidate-long", onWorker, stopCandidate(1.1, 1.8)},
		{"link-dark", onWorker, onLinks((*etcdtest.Link).Darken, 0.3, 1.8)},
		{"link-dark-sending", onWorker, onLinks(func(l *etcdtest.Link) { l.PauseTx() }, 0.3, 1.8)},
		{"link-dark-receiving", onWorker, onLinks(func(l *etcdtest.Link) { l.PauseRx() }, 0.3, 1.8)},
		{"link-reset", onWorker, onLinks((*etcdtest.Link).Cut, 0.1, 0.7)},
		{"link-slow", onWorker, slowLinks(false)},
		{"link-slow-given-up", onWorker, slowLinks(true)},
		{"link-slow-dark", onWorker, slowThenDarkenLinks},
		{"link-flapping", onWorker, flapLinks},
		{"endpoint-dark", onWorker, darkEndpoint},
		{"endpoint-late", onWorker, holdRequests},
		{"unhealthy", onHealth, fallIll},
		{"kill-member", onMember, killMember},
		{"stop-member", onMember, stopMember},
		{"stop-raft-leader", onMember, stopRaftLeader},
		{"depose-raft-leader", onMember, deposeRaftLeader},
		{"partition-member", onMember, partitionMember},
		{"stop-follower", onMember, stopFollower},
		{"slow-follower", onMember, slowFollower},
		{"quorum-lost-short", onMember, loseQuorum(0.3, 0.6)},
		{"quorum-lost-long", onMember, loseQuorum(1.2, 1.7)},
		{"move-raft-leader", onMember, moveRaftLeader},
		{"compact-defragment", onMember, compactAndDefragment},
		{"operator-deletes-key", onData, deleteKey},
		{"operator-deletes-two", onData, deleteTwo},
		{"operator-revokes-lease", onData, revokeLease},
		{"operator-transfers", onData, transfer},
		{"no-space", onSpace, noSpace},
		{"auth", onAuth, enableAuth},
	}
}

// unfit returns why a fault of this kind makes no sense with this version of etcd, or "" if it does.
func (s sort) unfit(version string) string {
	var major, minor, patch int
	_, _ = fmt.Sscanf(version, "%d.%d.%d", &major, &minor, &patch) // a version in another format is a newer one
	if s.on == onAuth && major == 3 && minor == 4 && patch < 28 {
		// etcd then refuses to authenticate a client that sends an expired token, and clientv3 sends the token that it
		// has. So nobody gets a new token, and neither does the campaign itself. Fixed by etcd-io/etcd#12165 and, in
		// 3.4.28, by #16826.
		return "before etcd 3.4.28 a client whose token has expired cannot authenticate again (etcd-io/etcd#12385)"
	}
	return ""
}

// leaderProcess returns the worker that leads an election, if that is known.
func (f *fault) leaderProcess(ctx context.Context, election string) *process {
	queue, err := f.queue(ctx, election)
	if err != nil {
		return nil
	}
	return f.processOf(queue[0])
}

// processOf returns the worker that a candidate belongs to, or nil if it is none of the workers.
func (f *fault) processOf(candidate oracle.Entry) *process {
	name, _, _ := strings.Cut(candidate.Value, "/") // proclaimed values have more after a slash
	i := slices.IndexFunc(f.faulty, func(p *process) bool { return p.name == name })
	if i < 0 {
		return nil
	}
	return f.faulty[i]
}

// queue returns the candidates of an election in their order, at least one.
func (s *system) queue(ctx context.Context, election string) (queue []oracle.Entry, err error) {
	err = s.ask(ctx, func(ctx context.Context) error {
		all, err := s.operator.Candidates(ctx, election)
		if err != nil {
			return err
		}
		if len(all) == 0 {
			return fmt.Errorf("%s has no candidate", election)
		}
		queue = nil
		for _, candidate := range all {
			queue = append(queue, asEntry(candidate, oracle.Entry{Election: root + election}))
		}
		return nil
	})
	return queue, err
}

// killCandidate also kills the sidecar, so only the worker itself can revoke its leases, when it is started again.
func killCandidate(ctx context.Context, f *fault) error {
	f.worker.sidecar.kill()
	f.worker.kill()
	f.hold(ctx, 0, 1.2)
	err := f.worker.start()
	if f.worker.sidecar != nil {
		err = errors.Join(err, f.worker.sidecar.start())
	}
	return err
}

// killReclaimed leaves the sidecar alive.
func killReclaimed(ctx context.Context, f *fault) error {
	f.worker.kill()
	f.hold(ctx, 0, 1.2)
	return f.worker.start()
}

func stopCandidate(from, to float64) func(context.Context, *fault) error {
	return func(ctx context.Context, f *fault) error {
		if err := f.worker.signal(syscall.SIGSTOP); err != nil {
			return err
		}
		f.hold(ctx, from, to)
		return f.worker.signal(syscall.SIGCONT)
	}
}

// onLinks does the same to all links of a worker, and then heals them.
func onLinks(spoil func(*etcdtest.Link), from, to float64) func(context.Context, *fault) error {
	return func(ctx context.Context, f *fault) error {
		for _, l := range f.links[f.worker] {
			spoil(l.Link)
			defer l.Heal()
		}
		f.hold(ctx, from, to)
		return nil
	}
}

// slowLinks delays everything between a worker and etcd. If givenUp, the worker also gives up its campaigns again and
// again, so that their requests arrive when it has begun the next one.
func slowLinks(givenUp bool) func(context.Context, *fault) error {
	return func(ctx context.Context, f *fault) error {
		latency := between(f.rand, 50*time.Millisecond, 500*time.Millisecond)
		f.victim += fmt.Sprintf(" %v", latency.Round(time.Millisecond))
		for _, l := range f.links[f.worker] {
			l.DelayTx(latency/2, latency/4)
			l.DelayRx(latency/2, latency/4)
			defer l.UndelayTx()
			defer l.UndelayRx()
		}
		if givenUp {
			return f.giveUp(ctx, f.p.TTL/2, 2*f.p.TTL)
		}
		f.hold(ctx, 0.5, 2)
		return nil
	}
}

// giveUp makes a worker give up its campaigns again and again.
func (f *fault) giveUp(ctx context.Context, from, to time.Duration) error {
	until := time.Now().Add(between(f.rand, from, to))
	for ctx.Err() == nil && time.Now().Before(until) {
		sleep(ctx, f.rand, 50*time.Millisecond, 400*time.Millisecond)
		if err := f.worker.signal(giveUp); err != nil {
			return err
		}
	}
	return nil
}

// flapLinks darkens the links, and lets everything through in short moments in between.
func flapLinks(ctx context.Context, f *fault) error {
	for range 4 {
		for _, l := range f.links[f.worker] {
			l.Darken()
		}
		f.hold(ctx, 0.1, 0.3)
		for _, l := range f.links[f.worker] {
			l.Heal()
		}
		sleep(ctx, f.rand, 20*time.Millisecond, 300*time.Millisecond)
	}
	return nil
}

// slowThenDarkenLinks delays answers, and then lets nothing through for longer than the lease lasts. The last renewal
// that counted was sent earlier than its answer suggests.
func slowThenDarkenLinks(ctx context.Context, f *fault) error {
	for _, l := range f.links[f.worker] {
		l.DelayRx(250*time.Millisecond, 50*time.Millisecond)
		defer l.UndelayRx()
	}
	f.hold(ctx, 0.45, 0.65)
	for _, l := range f.links[f.worker] {
		l.Darken()
		defer l.Heal()
	}
	f.hold(ctx, 1.1, 1.3)
	return nil
}

func darkEndpoint(ctx context.Context, f *fault) error {
	l := f.anyLink()
	l.Darken()
	defer l.Heal()
	f.hold(ctx, 0.5, 2)
	return nil
}

// anyLink chooses one of the worker's links.
func (f *fault) anyLink() *workerLink {
	links := f.links[f.worker]
	i := f.rand.IntN(len(links))
	f.victim += "-" + f.members[i].name
	return links[i]
}

// holdRequests holds back what a worker sends to one member, while the worker gives up its campaigns again and again.
// When the worker has had time to be elected, it delivers everything late, even requests that were cancelled.
func holdRequests(ctx context.Context, f *fault) error {
	l := f.anyLink()
	l.PauseRx()
	defer l.UnpauseRx()
	l.holder.hold()
	spacing := between(f.rand, 2*time.Millisecond, 30*time.Millisecond)
	defer func() { l.holder.release(spacing) }()
	if err := f.giveUp(ctx, f.p.TTL/3, f.p.TTL); err != nil {
		return err
	}
	f.hold(ctx, 0.1, 0.5)
	return nil
}

// fallIll makes the checks of a worker fail, or its work hang, or both hang.
func fallIll(ctx context.Context, f *fault) error {
	how := []string{fails, stalls, hangs}[f.rand.IntN(3)]
	f.victim += " " + how
	if err := os.WriteFile(f.ill(f.worker), []byte(how), 0o600); err != nil {
		return err
	}
	f.hold(ctx, 0.5, 3)
	return os.Remove(f.ill(f.worker))
}

// anyMember chooses a member.
func (f *fault) anyMember() *member { return f.members[f.rand.IntN(len(f.members))] }

// someMember chooses a member: half of the time the leader of etcd, if there is one.
func (f *fault) someMember(ctx context.Context) *member {
	if l, err := f.raftLeader(ctx); f.rand.IntN(2) == 0 && err == nil {
		return l
	}
	return f.anyMember()
}

func killMember(ctx context.Context, f *fault) error {
	m := f.someMember(ctx)
	f.victim = m.name
	m.kill()
	f.hold(ctx, 0.2, 1)
	return f.restart(context.WithoutCancel(ctx), m)
}

// restart starts a killed member again and waits until it has rejoined.
func (f *fault) restart(ctx context.Context, m *member) error {
	if err := m.start(); err != nil {
		return err
	}
	_, err := f.awaitMember(ctx, m)
	return err
}

func stopMember(ctx context.Context, f *fault) error { return f.pauseAWhile(ctx, f.anyMember()) }

func stopRaftLeader(ctx context.Context, f *fault) error {
	m, err := f.raftLeader(ctx)
	if err != nil {
		return err
	}
	return f.pauseAWhile(ctx, m)
}

func (f *fault) pauseAWhile(ctx context.Context, m *member) error {
	f.victim = m.name
	if err := f.pause(ctx, m); err != nil {
		return err
	}
	f.hold(ctx, 0.4, 1.5)
	return f.resume(m)
}

// deposeRaftLeader pauses etcd's leader until another one is elected, and resumes it in a partition. For a moment it
// still considers itself the leader, and acknowledges what one worker has sent meanwhile. That worker is a leader if
// possible. It can reach only this member, until the member knows that it was deposed and answers its reads again.
// After that it can reach nobody, so no later renewal extends what it was told in that moment. The library's own test
// of this is in deposed_test.go.
func deposeRaftLeader(ctx context.Context, f *fault) error {
	m, err := f.raftLeader(ctx)
	if err != nil {
		return err
	}
	f.victim = m.name
	var link *etcdtest.Link
	at := slices.Index(f.members, m)
	var leads []string
	for _, i := range f.rand.Perm(len(lasting)) {
		leads = append(leads, lasting[i])
	}
	if f.worker = f.pick(ctx, func(p *process) bool { return at < p.asks }, leads...); f.worker != nil {
		f.victim += " with " + f.worker.name
		for i, l := range f.links[f.worker] {
			defer l.Heal()
			if i == at {
				link = l.Link
			} else {
				l.Cut() // not darkened, so that the client knows that it cannot use these
			}
		}
		sleep(ctx, f.rand, 300*time.Millisecond, 500*time.Millisecond)
		link.Darken()
	}
	rejoin := f.partition(m, true, true)
	defer rejoin()
	if err := f.pause(ctx, m); err != nil {
		return err
	}
	f.hold(ctx, 0.4, 0.45)
	if err := f.resume(m); err != nil {
		return err
	}
	// It considers itself the leader from its first tick on, which comes with a heartbeat interval.
	sleep(ctx, f.rand, electionTimeout/5, electionTimeout/4)
	if link != nil {
		link.Heal()
	}
	sleep(ctx, f.rand, electionTimeout/2, electionTimeout)
	rejoin()
	sleep(ctx, f.rand, 2*electionTimeout, 3*electionTimeout)
	if link != nil {
		link.Darken()
	}
	f.hold(ctx, 1, 1.1)
	return nil
}

// partition darkens the links between a member and the others until heal is called. out stops what the member sends, in
// stops what it receives. Each takes the links of both directions of dialling, because a member sends most of its
// messages as answers on connections that the others have made.
func (s *system) partition(m *member, out, in bool) (heal func()) {
	var links []*etcdtest.Link
	for made, taken := range s.peerLinks(m) {
		links = append(links, made, taken)
		if out {
			made.PauseTx()
			taken.PauseRx()
		}
		if in {
			made.PauseRx()
			taken.PauseTx()
		}
	}
	return func() {
		for _, l := range links {
			l.Heal()
		}
	}
}

// peerLinks yields the links between a member and each other one: one for what the member dials, one for what the other
// dials.
func (s *system) peerLinks(m *member) iter.Seq2[*etcdtest.Link, *etcdtest.Link] {
	return func(yield func(made, taken *etcdtest.Link) bool) {
		to := slices.Index(s.members, m)
		for i, other := range s.members {
			if other != m && !yield(m.peers[i], other.peers[to]) {
				return
			}
		}
	}
}

// follower returns the member that some candidates use for all their watches. If the member leads etcd, it moves the
// leadership to another.
func (f *fault) follower(ctx context.Context) (*member, error) {
	m := f.watched()
	f.victim = m.name
	leader, err := f.raftLeader(ctx)
	if err == nil && leader == m {
		_, err = f.moveLeader(ctx, m)
	}
	return m, err
}

// stopFollower pauses a member for short moments. When the member resumes, it has not yet heard what happened, so a
// watch that it was asked for meanwhile begins in the past. This is true only of the first watch of a client: clientv3
// asks for the next one when the first is answered. Therefore there are many short pauses.
func stopFollower(ctx context.Context, f *fault) error {
	m, err := f.follower(ctx)
	if err != nil {
		return err
	}
	for range 10 {
		if err := f.pause(ctx, m); err != nil {
			return err
		}
		sleep(ctx, f.rand, 100*time.Millisecond, 500*time.Millisecond)
		if err := f.resume(m); err != nil {
			return err
		}
		sleep(ctx, f.rand, 50*time.Millisecond, 300*time.Millisecond)
	}
	return nil
}

// slowFollower delays what a member hears from the others, so that its watches begin in the past.
func slowFollower(ctx context.Context, f *fault) error {
	m, err := f.follower(ctx)
	if err != nil {
		return err
	}
	latency := between(f.rand, 50*time.Millisecond, 300*time.Millisecond)
	f.victim += fmt.Sprintf(" %v", latency.Round(time.Millisecond))
	for made, taken := range f.peerLinks(m) {
		for _, l := range []*etcdtest.Link{made, taken} {
			l.DelayTx(latency, latency/4)
			l.DelayRx(latency, latency/4)
			defer l.UndelayTx()
			defer l.UndelayRx()
		}
	}
	f.hold(ctx, 0.5, 2)
	return nil
}

func partitionMember(ctx context.Context, f *fault) error {
	m := f.someMember(ctx)
	way := f.rand.IntN(3)
	f.victim = m.name + []string{"", " sends nothing", " gets nothing"}[way]
	defer f.partition(m, way != 2, way != 1)()
	f.hold(ctx, 0.5, 1.5)
	return nil
}

// loseQuorum stops or kills as many members as it takes to lose the quorum.
func loseQuorum(from, to float64) func(context.Context, *fault) error {
	return func(ctx context.Context, f *fault) error {
		kill := f.rand.IntN(2) == 0
		f.victim = "stopped:"
		if kill {
			f.victim = "killed:"
		}
		lost := slices.Clone(f.members)
		f.rand.Shuffle(len(lost), func(i, j int) { lost[i], lost[j] = lost[j], lost[i] })
		lost = lost[len(lost)/2:]
		var errs []error
		for _, m := range lost {
			f.victim += " " + m.name
			if kill {
				m.kill()
			} else {
				errs = append(errs, f.pause(ctx, m))
			}
		}
		f.hold(ctx, from, to)
		for _, m := range lost {
			if kill {
				errs = append(errs, m.start())
			} else {
				errs = append(errs, f.resume(m))
			}
		}
		for _, m := range lost {
			_, err := f.awaitMember(context.WithoutCancel(ctx), m)
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
}

func moveRaftLeader(ctx context.Context, f *fault) error {
	m, err := f.raftLeader(ctx)
	if err != nil {
		return err
	}
	to, err := f.moveLeader(ctx, m)
	f.victim = m.name + " to " + to.name
	return err
}

// moveLeader makes another member the leader of etcd.
func (f *fault) moveLeader(ctx context.Context, m *member) (to *member, err error) {
	others := slices.DeleteFunc(slices.Clone(f.members), func(other *member) bool { return other == m })
	to = others[f.rand.IntN(len(others))]
	client, err := f.newRootClient(m) // only the leader accepts this request
	if err != nil {
		return to, err
	}
	defer client.Close()
	return to, f.ask(ctx, func(ctx context.Context) error {
		_, err := client.MoveLeader(ctx, to.id)
		return err
	})
}

// deleteKey deletes the key of a candidate, mostly the leader's.
func deleteKey(ctx context.Context, f *fault) error {
	queue, err := f.queue(ctx, f.lasting())
	if err != nil {
		return err
	}
	return f.take(ctx, oracle.Delete, queue[f.place(queue)])
}

// deleteTwo deletes the keys of the leader and of the candidate behind it together. The process of the second one gives
// up its campaigns at almost the same moment.
func deleteTwo(ctx context.Context, f *fault) error {
	queue, err := f.queue(ctx, f.lasting())
	if err != nil {
		return err
	}
	if len(queue) < 2 {
		return fmt.Errorf("nobody waits in %s", queue[0].Election)
	}
	later := time.Duration(f.rand.Int64N(int64(2 * time.Millisecond)))
	err = f.take(ctx, oracle.Delete, queue[:2]...)
	if p := f.processOf(queue[1]); p != nil && err == nil {
		time.Sleep(later)
		err = p.signal(giveUp)
	}
	return err
}

// revokeLease revokes the lease of a candidate, mostly the leader's, and so takes all keys on it.
func revokeLease(ctx context.Context, f *fault) error {
	queue, err := f.queue(ctx, f.lasting())
	if err != nil {
		return err
	}
	return f.take(ctx, oracle.Revoke, queue[f.place(queue)])
}

// lasting chooses an election whose terms may be long.
func (f *fault) lasting() string { return lasting[f.rand.IntN(len(lasting))] }

// place chooses a place in the queue, mostly the first.
func (f *fault) place(queue []oracle.Entry) int {
	if f.rand.IntN(4) != 0 {
		return 0
	}
	return f.rand.IntN(len(queue))
}

// take takes keys, or a lease, from candidates, and records that. It repeats the request until there is an answer, so
// that no request can take effect later. If the first answer is that there is nothing to take, an earlier copy of the
// request may have taken it.
func (f *fault) take(ctx context.Context, op string, victims ...oracle.Entry) error {
	began, result, rev := now(), oracle.OK, int64(0)
	for _, v := range victims {
		f.victim = strings.TrimSpace(fmt.Sprintf("%s %s of %s", f.victim, v.Key, v.Value))
	}
	var answer error // the error that etcd answered, if any
	err := f.insist(context.WithoutCancel(ctx), func(ctx context.Context) (err error) {
		if op == oracle.Revoke {
			rev, err = f.revoke(ctx, victims[0].Lease)
		} else {
			rev, err = f.delete(ctx, victims)
		}
		switch {
		case errors.Is(err, errGone):
			answer, err = err, nil
			if result == oracle.OK && op == oracle.Delete {
				result = oracle.Failed
			} else {
				result = oracle.Unknown
			}
		case err != nil:
			result = oracle.Unknown
		case result == oracle.Unknown:
			result = oracle.OK
		}
		return err
	})
	if err != nil {
		rev = math.MaxInt64 // it may still take effect
	}
	for _, e := range victims {
		e.Kind, e.Op, e.From, e.Result, e.Rev = oracle.Taken, op, began, result, rev
		if err := cmp.Or(err, answer); err != nil {
			e.Err = err.Error()
		}
		f.add(e)
	}
	return cmp.Or(err, answer)
}

var errGone = errors.New("the key is already gone")

// delete deletes the keys in one transaction, if all of them exist. It returns the revision of the answer.
func (s *system) delete(ctx context.Context, victims []oracle.Entry) (rev int64, err error) {
	var are []clientv3.Cmp
	var deletes []clientv3.Op
	for _, v := range victims {
		are = append(are, clientv3.Compare(clientv3.CreateRevision(v.Key), "=", v.Token))
		deletes = append(deletes, clientv3.OpDelete(v.Key))
	}
	resp, err := s.root.Txn(ctx).If(are...).Then(deletes...).Commit()
	switch {
	case err != nil:
		return 0, err
	case !resp.Succeeded:
		return resp.Header.Revision, errGone
	}
	return resp.Header.Revision, nil
}

// revoke revokes a lease. clientv3 may have sent the request twice, so if the lease does not exist, this call itself
// may have revoked it.
func (s *system) revoke(ctx context.Context, lease int64) (rev int64, err error) {
	revoked, err := s.root.Revoke(ctx, clientv3.LeaseID(lease))
	switch {
	case err == nil:
		return revoked.Header.Revision, nil
	case !errors.Is(err, rpctypes.ErrLeaseNotFound):
		return 0, err
	}
	resp, err := s.root.Get(ctx, root)
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, errGone
}

// transfer hands an election over to a candidate, or to whoever is next.
func transfer(ctx context.Context, f *fault) error {
	election := elections[f.rand.IntN(len(elections))]
	all, err := f.operator.Candidates(ctx, election)
	if err != nil {
		return err
	}
	var to leader.Candidate
	if f.rand.IntN(3) > 0 && len(all) > 0 {
		to = all[f.rand.IntN(len(all))]
	}
	f.victim = election + " to " + cmp.Or(to.Value, "the next")
	tctx, cancel := context.WithTimeout(ctx, between(f.rand, f.p.TTL/3, 3*f.p.TTL))
	defer cancel()
	e := oracle.Entry{Kind: oracle.Transfer, From: now(), Election: root + election, Token: to.Token, Result: oracle.OK}
	switch err = f.operator.Transfer(tctx, election, to); {
	case err == nil:
	case errors.Is(err, leader.ErrNotCandidate), errors.Is(err, leader.ErrNoLeader):
		e.Result, e.Err = oracle.Failed, err.Error()
	default:
		e.Result, e.Err = oracle.Unknown, err.Error()
		if tctx.Err() == nil {
			f.add(oracle.Entry{Kind: oracle.Failure, Err: err.Error()})
		}
	}
	f.add(e)
	return nil
}

// compactAndDefragment compacts the whole history, and then blocks a member for a moment.
func compactAndDefragment(ctx context.Context, f *fault) error {
	err := f.ask(ctx, func(ctx context.Context) error {
		_, err := f.root.Compact(ctx, f.audit.recorded(), clientv3.WithCompactPhysical())
		return err
	})
	if err != nil {
		return err
	}
	m := f.anyMember()
	f.victim = m.name
	return f.ask(ctx, func(ctx context.Context) error {
		_, err := f.root.Defragment(ctx, m.client)
		return err
	})
}

// noSpace raises the alarm that a member raises when its database is full.
func noSpace(ctx context.Context, f *fault) error {
	m := f.anyMember()
	f.victim = m.name
	alarm := func(action etcdserverpb.AlarmRequest_AlarmAction) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := etcdserverpb.NewMaintenanceClient(f.root.ActiveConnection()).Alarm(ctx,
				&etcdserverpb.AlarmRequest{Action: action, MemberID: m.id, Alarm: etcdserverpb.AlarmType_NOSPACE})
			return err
		}
	}
	err := f.ask(ctx, alarm(etcdserverpb.AlarmRequest_ACTIVATE))
	f.hold(ctx, 0.2, 1.5)
	return errors.Join(err, f.insist(context.WithoutCancel(ctx), alarm(etcdserverpb.AlarmRequest_DEACTIVATE)))
}

// enableAuth makes every client authenticate, again and again: a token lasts for 2 s.
func enableAuth(ctx context.Context, f *fault) error {
	err := f.ask(ctx, func(ctx context.Context) error {
		_, err := f.root.AuthEnable(ctx)
		return err
	})
	f.hold(ctx, 0.8, 2)
	return errors.Join(err, f.insist(context.WithoutCancel(ctx), func(ctx context.Context) error {
		_, err := f.root.AuthDisable(ctx)
		if errors.Is(err, rpctypes.ErrAuthNotEnabled) {
			err = nil
		}
		return err
	}))
}

// A schedule injects faults of some kinds until ctx ends, round by round, a few at once in each round. The seed decides
// which.
type schedule struct {
	*system
	sorts []sort
	rand  *rand.Rand

	mu     sync.Mutex
	struck map[*process]bool
}

func (s *schedule) run(ctx context.Context) {
	for round := 1; ctx.Err() == nil; round++ {
		var wg sync.WaitGroup
		for _, f := range s.round() {
			wg.Go(func() { s.strike(ctx, f) })
		}
		wg.Wait()
		if round%4 == 0 && ctx.Err() == nil {
			s.calm(ctx)
		} else {
			sleep(ctx, s.rand, 100*time.Millisecond, time.Second)
		}
	}
}

// round chooses the faults that strike at once.
func (s *schedule) round() []*fault {
	var faults []*fault
	taken := make(map[target]bool)
	workers := 0
	for n := 3 + s.rand.IntN(4); n > 0; n-- {
		sort := s.sorts[s.rand.IntN(len(s.sorts))]
		if sort.on == onWorker {
			if workers++; workers > len(s.faulty)/2 {
				continue // leave somebody who can lead
			}
		} else if taken[sort.on] {
			continue
		}
		taken[sort.on] = true
		faults = append(faults, &fault{schedule: s, sort: sort, rand: rand.New(rand.NewPCG(s.rand.Uint64(), 0))})
	}
	return faults
}

// strike runs one fault and records it.
func (s *schedule) strike(ctx context.Context, f *fault) {
	e := oracle.Entry{Kind: oracle.Fault, Op: f.sort.name, From: now()}
	var err error
	if f.sort.on == onWorker || f.sort.on == onHealth || f.sort.on == onLife {
		var leads []string
		if f.rand.IntN(3) != 0 {
			leads = append(leads, elections[f.rand.IntN(len(elections))])
		}
		suits := func(p *process) bool {
			switch f.sort.on {
			case onHealth:
				return p.sort == sortCandidate
			case onLife:
				return p.sidecar != nil
			}
			return true
		}
		if f.worker = f.pick(ctx, suits, leads...); f.worker == nil {
			err = errors.New("no worker is left to strike")
		} else {
			f.victim = f.worker.name
		}
	}
	if err == nil {
		err = f.sort.strike(ctx, f)
	}
	e.T, e.Value = now(), f.victim
	if err != nil {
		e.Err = err.Error()
	}
	s.add(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.struck, f.worker)
}

// pick chooses a suitable worker that no other fault strikes: the first that leads one of these elections, or else any.
func (f *fault) pick(ctx context.Context, suits func(*process) bool, leads ...string) *process {
	var leaders []*process
	for _, election := range leads {
		leaders = append(leaders, f.leaderProcess(ctx, election))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	free := slices.DeleteFunc(slices.Clone(f.faulty), func(p *process) bool { return f.struck[p] || !suits(p) })
	if len(free) == 0 {
		return nil
	}
	p := free[f.rand.IntN(len(free))]
	if i := slices.IndexFunc(leaders, func(l *process) bool { return slices.Contains(free, l) }); i >= 0 {
		p = leaders[i]
	}
	f.struck[p] = true
	return p
}

// calm lets everything recover. Then an operator takes keys and transfers elections, a candidate becomes unhealthy, and
// one is killed and reclaimed. In a calm system their leaders must learn of it at once, and others must soon lead.
func (s *schedule) calm(ctx context.Context) {
	s.clean(ctx)
	began := now()
	sleep(ctx, s.rand, s.p.TTL+oracle.RecoverTime, s.p.TTL+oracle.RecoverTime)
	for _, sort := range s.sorts {
		if (sort.on == onData || sort.on == onHealth || sort.on == onLife) && ctx.Err() == nil {
			s.strike(ctx, &fault{schedule: s, sort: sort, rand: rand.New(rand.NewPCG(s.rand.Uint64(), 0))})
			sleep(ctx, s.rand, time.Second, time.Second)
		}
	}
	sleep(ctx, s.rand, oracle.RecoverTime, oracle.RecoverTime)
	if s.clean(ctx) && ctx.Err() == nil {
		s.add(oracle.Entry{Kind: oracle.Calm, From: began})
	}
}

// clean undoes what a fault has requested of etcd and may have got only after it had given the request up. It reports
// whether there was nothing to undo.
func (s *schedule) clean(ctx context.Context) bool {
	clean := true
	err := s.insist(ctx, func(ctx context.Context) error {
		alarms, err := s.root.AlarmList(ctx)
		if err != nil {
			return err
		}
		for _, a := range alarms.Alarms {
			clean = false
			if _, err := s.root.AlarmDisarm(ctx, (*clientv3.AlarmMember)(a)); err != nil {
				return err
			}
		}
		// An old etcd does not know this request. Disabling what is not enabled succeeds in every version.
		if auth, err := s.root.AuthStatus(ctx); err == nil && auth.Enabled {
			clean = false
		}
		_, err = s.root.AuthDisable(ctx)
		return err
	})
	return clean && err == nil
}

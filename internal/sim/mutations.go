package main

import (
	"slices"
	"time"

	"example.com/leader/internal/sim/world"
)

// A mutation takes one safeguard out of the library, for a run that must find that out. It is a change of the source
// that only the compiler sees, so that the library itself has no switch.
type mutation struct {
	name, safeguard string
	changes         []change
	// What shows it soonest, if not any run does.
	adjust func(*world.Config)
}

// A change replaces a text that a file has exactly once.
type change struct{ file, old, new string }

const (
	campaign = "campaign.go"
	elector  = "elector.go"
	term     = "leader.go"
	health   = "health.go"
	session  = "internal/lease/lease.go"
	pool     = "internal/lease/pool.go"
	renewal  = "internal/lease/renew.go"
	keys     = "internal/lease/keys.go"
	stream   = "internal/lease/stream.go"
	queue    = "internal/queue/queue.go"
	wait     = "internal/queue/wait.go"
	observe  = "internal/queue/observe.go"
	retry    = "internal/retry/retry.go"

	reclaim   = "internal/lease/reclaim.go"
	leasefile = "internal/leasefile/file_linux.go"
)

// only returns what makes faults of these sorts alone strike.
func only(faults ...string) func(*world.Config) {
	return func(c *world.Config) { c.Faults = faults }
}

// restless is only, with processes that are back at once over the same lease: keys of one name come and go.
func restless(faults ...string) func(*world.Config) {
	return func(c *world.Config) {
		c.Faults, c.Restless, c.Unprobed = faults, true, true
		c.TTL, c.Every, c.Length = 3*time.Second, 500*time.Millisecond, time.Minute
	}
}

// crowd is only, with long queues.
func crowd(faults ...string) func(*world.Config) {
	return func(c *world.Config) {
		c.Faults, c.Processes, c.Unprobed = faults, 5, true
		c.TTL, c.Every, c.Length = 3*time.Second, 500*time.Millisecond, time.Minute
	}
}

// held is adjust, with goroutines that are held up in the middle of things.
func held(adjust func(*world.Config)) func(*world.Config) {
	return func(c *world.Config) {
		adjust(c)
		c.Holds = 0.02
	}
}

// calm returns what makes simulations short, for what their probes show.
func calm(ttl time.Duration) func(*world.Config) {
	return func(c *world.Config) { c.Length, c.TTL = 10*time.Second, ttl }
}

// filed is only, with processes that have lease files, die, and are waited for by others that reclaim.
func filed(c *world.Config) {
	c.Faults, c.Filed = []string{"kill-process", "reclaim-living"}, true
	c.TTL, c.Every, c.Length = 3*time.Second, 500*time.Millisecond, 30*time.Second
}

// checks is only, with checks of health that fail and hang, of all processes.
func checks(c *world.Config) {
	c.Faults, c.Checks = []string{"check-fails", "check-hangs"}, true
	c.TTL, c.Every, c.Length = 3*time.Second, 500*time.Millisecond, 30*time.Second
}

var mutations = []mutation{
	// When a term is over.
	{name: "send-time", safeguard: "a renewal counts from when it was sent", changes: []change{
		{renewal, "return s.found(seen), s.extend(sent, answer.ttl)", "return s.found(seen), s.extend(s.now(), answer.ttl)"},
	}},
	{name: "grant-time", safeguard: "a grant counts from when it was sent", changes: []change{
		{session, "	s.id = granted.ID\n", "	s.id = granted.ID\n	s.sent = s.now()\n"},
	}},
	{name: "same-term", safeguard: "a renewal counts only if a read in the same raft term follows", changes: []change{
		{renewal, "case answer.ttl == 0, seen.term != answer.term:", "case answer.ttl == 0:"},
	}, adjust: only("depose-raft-leader")},
	{name: "margin", safeguard: "a term ends a margin before the lease can", changes: []change{
		{session, "return s.ttl - s.margin - age", "return s.ttl - age"},
	}},
	{name: "monotonic-clock", safeguard: "the monotonic clock is asked", changes: []change{
		{session, "age := max(now.mono.Sub(s.sent.mono), now.wall.Sub(s.sent.wall))", "age := now.wall.Sub(s.sent.wall)"},
	}, adjust: only("wall-back", "link-dark", "link-slow-dark")},
	{name: "wall-clock", safeguard: "the wall clock is asked", changes: []change{
		{session, "age := max(now.mono.Sub(s.sent.mono), now.wall.Sub(s.sent.wall))", "age := now.mono.Sub(s.sent.mono)"},
	}},
	{name: "clock-check", safeguard: "a context ends though the monotonic clock has stood still", changes: []change{
		{session, "const clockCheck = time.Second", "const clockCheck = time.Hour"},
	}, adjust: only("suspend")},
	{name: "arming", safeguard: "the timer that ends a context is set anew if it was set late", changes: []change{
		{session, "if until = s.untilCheckLocked(); before-until < maxArming {", "if until = s.untilCheckLocked(); before-until < time.Hour {"},
	}, adjust: held(only("link-dark", "link-flapping"))},
	{name: "is-leader-clocks", safeguard: "IsLeader asks the clocks and does not wait for a timer", changes: []change{
		{term, "if l.ctx.Err() == nil && !l.session.Valid() {", "if l.ctx.Err() == nil && l.session.Cause() != nil {"},
	}},
	{name: "elect-clocks", safeguard: "who is elected asks the clocks first", changes: []change{
		{campaign, "	if !l.session.Valid() {\n		return fmt.Errorf(\"%w: %w\", errLost, l.sessionCause())\n	}\n", ""},
	}, adjust: only("stop-long", "suspend", "link-dark", "wall-forward")},
	{name: "elect-lost", safeguard: "who has lost the key while it was being elected is not", changes: []change{
		{campaign, "	if l.ctx.Err() != nil {\n		return fmt.Errorf(\"%w: %w\", errLost, context.Cause(l.ctx))\n	}\n	l.elected = true", "	l.elected = true"},
	}, adjust: held(restless("operator-deletes-two", "slow-follower"))},
	{name: "standing", safeguard: "a candidacy ends with its lease and its key", changes: []change{
		{campaign, "func() { l.end(l.sessionCause()) })", "func() {\n		l.mu.Lock()\n		elected := l.elected\n		l.mu.Unlock()\n		if elected {\n			l.end(l.sessionCause())\n		}\n	})"},
	}, adjust: only("operator-deletes-key", "operator-revokes-lease", "link-dark")},
	{name: "keeps-margin", safeguard: "an expired session leaves its lease alone for the margin", changes: []change{
		{session, "if s.Gone() || errors.Is(s.Cause(), ErrExpired) && s.untilExpiry() > 0 {", "if s.Gone() {"},
	}},
	{name: "revokes-late", safeguard: "the lease of an expired session is revoked when the margin has passed", changes: []change{
		{pool, "s.pool.late.Go(s.revokeLate)", "s.pool.late.Go(func() {})"},
	}, adjust: calm(8 * time.Second)},
	{name: "late-by-both-clocks", safeguard: "the margin has passed when both clocks say so", changes: []change{
		{pool, "return s.ttl - min(now.mono.Sub(s.sent.mono), now.wall.Sub(s.sent.wall))", "return s.ttl - max(now.mono.Sub(s.sent.mono), now.wall.Sub(s.sent.wall))"},
	}, adjust: only("wall-forward", "link-dark")},
	{name: "acknowledgements", safeguard: "answers of a stream are matched to requests by their order", changes: []change{
		{stream, "	st.sent[0].answer <- answer{resp: resp}\n	st.sent = st.sent[1:]\n", "	st.sent[len(st.sent)-1].answer <- answer{resp: resp}\n	st.sent = st.sent[:len(st.sent)-1]\n"},
	}, adjust: only("link-slow", "link-slow-dark", "link-lossy")},
	{name: "resign-ends-first", safeguard: "a term is over here before etcd is asked to delete the key", changes: []change{
		{term, "	l.end(ErrResigned)\n	select {\n	case l.resigning <- struct{}{}: // wins", "	select {\n	case l.resigning <- struct{}{}: // wins"},
		{term, "if keepsKey(context.Cause(l.ctx)) { // else", "if cause := context.Cause(l.ctx); cause == nil || keepsKey(cause) { // else"},
		{term, "	select {\n	case <-l.done: // soon", "	l.end(ErrResigned)\n	select {\n	case <-l.done: // soon"},
	}},
	{name: "transferred-keeps", safeguard: "a term that was asked to step back deletes its key", changes: []change{
		{term, "func keepsKey(cause error) bool { return resigned(cause) || winding(cause) }", "func keepsKey(cause error) bool { return resigned(cause) }"},
	}, adjust: only("operator-transfers")},
	{name: "run-lets-go-last", safeguard: "Run resigns after the function has returned", changes: []change{
		{elector, "	err = lead(lctx, l)\n", "	defer context.AfterFunc(lctx, func() { l.letGo(ctx) })()\n	err = lead(lctx, l)\n"},
	}},
	{name: "run-live", safeguard: "Run calls its function only while the term lasts", changes: []change{
		{elector, "	if l.IsLeader() { // Hooks", "	if true { // Hooks"},
	}, adjust: calm(8 * time.Second)},
	{name: "run-context", safeguard: "the context of Run's function ends with the term", changes: []change{
		{elector, "stop := context.AfterFunc(l.ctx, func() { cancel(context.Cause(l.ctx)) })", "stop := func() bool { return true }"},
	}},

	// Who leads.
	{name: "own-key", safeguard: "a leader watches its own key", changes: []change{
		{term, "switch err := l.deletion.Wait(); {", "switch err := func() error { l.deletion.Close(); <-ctx.Done(); return ctx.Err() }(); {"},
	}},
	{name: "own-key-read", safeguard: "a renewal finds out that a key is gone though its watch is dead", changes: []change{
		{keys, "case !k.abandoned && k.rev != 0 && k.rev != rev:", "case !k.abandoned && k.rev != 0 && rev < 0:"},
	}, adjust: calm(0)},
	{name: "guard", safeguard: "a guarded transaction fails once the term is over", changes: []change{
		{term, `return clientv3.Compare(clientv3.CreateRevision(l.key), "=", l.token)`, `return clientv3.Compare(clientv3.CreateRevision(l.key), ">", -1)`},
	}},
	{name: "old-event", safeguard: "an event counts only if it is newer than the key that it is about", changes: []change{
		{wait, "if ev.Kv.ModRevision <= w.rev {", "if ev.Kv.ModRevision < 0 {"},
	}, adjust: restless("slow-follower", "pause-follower", "lag-member")},
	{name: "known-oldest", safeguard: "an event alone elects only if nobody is before the key that went", changes: []change{
		{queue, "return Place{Token: token, before: c.Key, rev: c.Token, oldest: len(before) == 1}, nil", "return Place{Token: token, before: c.Key, rev: c.Token, oldest: true}, nil"},
	}},
	{name: "own-key-behind", safeguard: "who reads its place finds out that its own key is gone", changes: []change{
		{queue, "if len(newest) == 0 || newest[0].CreateRevision != token {\n		return Place{}, ErrGone", "if len(newest) == 0 {\n		return Place{}, ErrGone"},
	}, adjust: crowd("operator-deletes-two")},
	{name: "read-when-watched", safeguard: "the key is read once the watch exists", changes: []change{
		{wait, "		s.stopReading() // a read that is under way may have found the key before it was watched, and deleted since\n		s.readKey()\n", ""},
	}, adjust: calm(8 * time.Second)},
	{name: "reread", safeguard: "a candidate reads the key before it once in a TTL, as its watch may be dead", changes: []change{
		{wait, "	case <-s.rereadDue():\n		s.readKey()\n", "	case <-s.rereadDue():\n"},
	}, adjust: calm(0)},
	{name: "join-once", safeguard: "a join that is sent again does not put the key again", changes: []change{
		{queue, "			If(clientv3.Compare(clientv3.CreateRevision(key), \"=\", 0)).\n			Then(\n", "			If(clientv3.Compare(clientv3.CreateRevision(key), \">\", -1)).\n			Then(\n"},
	}},
	{name: "one-claim", safeguard: "an Elector campaigns once at a time in an election", changes: []change{
		{campaign, "	if taken {\n		return nil, fmt.Errorf", "	if taken && e == nil {\n		return nil, fmt.Errorf"},
		{campaign, "	if !taken {\n		e.claims[election] = c\n", "	if true {\n		e.claims[election] = c\n"},
	}, adjust: only("give-up")},

	// What is left behind, and what arrives late.
	{name: "late-deletion", safeguard: "a deletion names the create revision of what it deletes", changes: []change{
		{queue, "If(clientv3.Compare(clientv3.CreateRevision(key), \"=\", token)).\n		Then(clientv3.OpDelete(key)).", "Then(clientv3.OpDelete(key))."},
	}, adjust: restless("endpoint-late", "link-lossy", "give-up")},
	{name: "late-sweep", safeguard: "the deletion of an orphan names its create revision", changes: []change{
		{keys, "If(clientv3.Compare(clientv3.CreateRevision(o.name), \"=\", o.rev)).\n			Then(clientv3.OpDelete(o.name)).", "Then(clientv3.OpDelete(o.name))."},
	}, adjust: calm(8 * time.Second)},
	{name: "late-proclaim", safeguard: "a late Proclaim does not replace a later value", changes: []change{
		{term, "guarded := lease.WithGuard(ctx, clientv3.Compare(clientv3.ModRevision(l.key), \"=\", modified))", "guarded := lease.WithGuard(ctx, clientv3.Compare(clientv3.ModRevision(l.key), \">\", modified-modified))"},
	}, adjust: calm(8 * time.Second)},
	{name: "unanswered-join", safeguard: "a key whose join has no answer is looked for", changes: []change{
		{keys, "	case to == dropped && k.uncertainLocked():\n		k.state = abandoned\n", ""},
	}, adjust: calm(8 * time.Second)},
	{name: "sweep", safeguard: "renewals delete keys that nobody owns", changes: []change{
		{renewal, "s.sweep(orphans, attempt)", "_ = orphans"},
	}, adjust: calm(8 * time.Second)},
	{name: "withdraw", safeguard: "a campaign that fails deletes its key", changes: []change{
		{term, "if l.token == 0 || lost || l.session.Gone() {", "if l.token == 0 || lost || !elected || l.session.Gone() {"},
	}, adjust: calm(0)},
	{name: "abandon", safeguard: "a key whose deletion has failed is looked for", changes: []change{
		{term, "	} else {\n		l.tracked.Abandon()\n	}\n	err = errors.Join", "	} else {\n		l.tracked.Drop()\n	}\n	err = errors.Join"},
	}, adjust: calm(8 * time.Second)},
	{name: "copied-join", safeguard: "a join that is carried out twice leaves no key", changes: []change{
		{keys, "	s.past = append(s.past, k.name)\n", ""},
	}, adjust: calm(8 * time.Second)},
	{name: "touch-keeps-lease", safeguard: "a touch leaves the key on its lease", changes: []change{
		{queue, "Then(clientv3.OpPut(key, \"\", clientv3.WithIgnoreValue(), clientv3.WithIgnoreLease())).", "Then(clientv3.OpPut(key, \"\", clientv3.WithIgnoreValue()))."},
	}},
	{name: "touch-keeps-value", safeguard: "a touch leaves the key its value", changes: []change{
		{queue, "Then(clientv3.OpPut(key, \"\", clientv3.WithIgnoreValue(), clientv3.WithIgnoreLease())).", "Then(clientv3.OpPut(key, \"\", clientv3.WithIgnoreLease()))."},
	}},
	{name: "gives-lease-back", safeguard: "the lease of a lost term is given back", changes: []change{
		{term, "l.unrevoked = l.remove(cctx)", "l.unrevoked = cctx.Err()"},
	}},
	{name: "close-revokes", safeguard: "Close revokes the leases that nobody uses", changes: []change{
		{pool, "closes.Go(func() { errs[i] = s.Close(ctx) })", "closes.Go(func() { errs[i] = s.ctx.Err() })"},
	}},
	{name: "lease-gone", safeguard: "who learns from a renewal that its lease is gone stops", changes: []change{
		{renewal, "		s.Revoked()\n		return nil, rpctypes.ErrLeaseNotFound\n", "		return nil, rpctypes.ErrLeaseNotFound\n"},
	}, adjust: calm(15 * time.Second)},
	{name: "lease-gone-read", safeguard: "a lease is gone only if a read confirms it", changes: []change{
		{renewal, "case answer.ttl == 0 && s.lacks(seen, answer.term):", "case answer.ttl == 0:"},
		{renewal, "case answer.ttl == 0, seen.term != answer.term:", "case seen.term != answer.term:"},
	}, adjust: only("depose-raft-leader")},
	{name: "join-on-lost-lease", safeguard: "who learns from a join that its lease is gone takes another", changes: []change{
		{campaign, "		l.session.Revoked()\n		return err", "		return err"},
	}, adjust: calm(15 * time.Second)},

	// When something does not answer.
	{name: "asks-again", safeguard: "what has no answer is sent again, to another endpoint", changes: []change{
		{retry, "				next.Reset(beside.Next())\n", "				_ = beside\n				next.Reset(time.Hour)\n"},
	}, adjust: calm(0)},
	{name: "two-at-once", safeguard: "what is sent again is sent to two endpoints", changes: []change{
		{retry, "	if beside && len(a.client.Endpoints()) > 1 {\n		a.send()\n	}\n", ""},
	}, adjust: calm(8 * time.Second)},
	{name: "other-stream", safeguard: "a watch that is not created in time is tried on another stream", changes: []change{
		{wait, "			stream.Late()\n", ""},
	}, adjust: calm(8 * time.Second)},
	{name: "expired-token", safeguard: "a stream of watches whose token has expired is given up", changes: []change{
		{wait, "	if retry.Unauthenticated(err) {\n		o.stream.Late()\n	}\n", ""},
	}, adjust: func(c *world.Config) {
		c.Faults, c.Passwords, c.Length, c.TTL = []string{"expire-tokens"}, true, 15*time.Second, 8*time.Second
	}},
	{name: "other-endpoint", safeguard: "a renewal that has no answer is sent over other streams", changes: []change{
		{stream, "	k.fail(streams)\n	return nil, err\n", "	return nil, err\n"},
	}, adjust: calm(0)},
	{name: "persist", safeguard: "what tidies up is sent until it is answered", changes: []change{
		{retry, "	_, err := Ask(ctx, client, func(err error) { last = err }, func(ctx context.Context) (struct{}, error) {\n		return struct{}{}, request(ctx)\n	})\n", "	_ = client\n	err := request(ctx)\n"},
	}, adjust: calm(8 * time.Second)},
	{name: "reconnect-silent", safeguard: "a request that is silent makes gRPC connect again", changes: []change{
		{retry, "		Reconnect(a.client)\n		if state", "		if state"},
	}, adjust: calm(8 * time.Second)},
	{name: "reconnect", safeguard: "gRPC's pause between attempts to connect does not grow", changes: []change{
		{retry, "		conn.ResetConnectBackoff()\n", ""},
	}, adjust: calm(0)},
	{name: "back-off", safeguard: "failures are followed by pauses", changes: []change{
		{retry, "next.Reset(failing.Next())", "failing.Next()\n		next.Reset(0)"},
	}},
	{name: "pause-before-again", safeguard: "Run pauses before it campaigns again", changes: []change{
		{elector, "if backoff.Wait(ctx) != nil {", "if ctx.Err() != nil {"},
	}},

	// Health, and work that is late.
	{name: "health-joins", safeguard: "who joins the queue is healthy", changes: []change{
		{campaign, "if err := h.wait(k.ctx, k.by == byTryCampaign, k.unhealthy); err != nil {", "if err := k.ctx.Err(); err != nil && h != nil {"},
		{campaign, "if err := h.err(); err != nil { // health", "if err := h.err(); err != nil && l.watched == nil { // health"},
	}, adjust: checks},
	{name: "health-ends", safeguard: "who is not healthy any more does not lead", changes: []change{
		{health, "	h.lost(err)\n", "	_ = err\n"},
	}, adjust: checks},
	{name: "health-from-start", safeguard: "a check that has succeeded holds from when it was called", changes: []change{
		{health, "h.until = began.Add(", "h.until = time.Now().Add("},
	}, adjust: checks},
	{name: "health-arming", safeguard: "health is not late though its timer is set late", changes: []change{
		{health, "if wait = time.Until(h.until); before-wait < time.Millisecond {", "if wait = time.Until(h.until); before >= wait {"},
	}, adjust: held(checks)},
	{name: "one-check", safeguard: "a check that hangs is not called again", changes: []change{
		{health, "if busy { // that", "if busy = false; busy { // that"},
	}, adjust: checks},
	{name: "unhealthy-vacates", safeguard: "the key of an unhealthy leader whose work hangs goes after the margin", changes: []change{
		{term, "if l.by != byRun || unhealthy(cause) {", "if l.by != byRun {"},
	}, adjust: checks},
	{name: "winding-margin", safeguard: "the work of an unhealthy leader has the margin to stop", changes: []change{
		{term, "timer := time.NewTimer(l.session.Margin())", "timer := time.NewTimer(0)"},
	}, adjust: checks},
	{name: "transferred-works", safeguard: "a leader by Run that was asked to step back keeps its key until its work has ended", changes: []change{
		{term, "if l.by != byRun || unhealthy(cause) {", "if true {"},
	}, adjust: only("operator-transfers")},
	{name: "overdue-margin", safeguard: "work has the margin before it is reported as late", changes: []change{
		{elector, "	o.wait(o.l.session.Margin())\n", "	o.wait(0)\n"},
	}, adjust: checks},
	{name: "overdue-tells", safeguard: "work that does not stop is reported", changes: []change{
		{elector, "		case <-timer.C:\n			o.tell()\n", "		case <-timer.C:\n"},
	}, adjust: checks},
	{name: "overdue-returned", safeguard: "work that was reported as late is reported when it has stopped", changes: []change{
		{elector, "	if o.told {\n", "	if o.told && o.l == nil {\n"},
	}, adjust: checks},

	// Lease files.
	{name: "shared-lock", safeguard: "the owner of a lease file locks it against all others", changes: []change{
		{leasefile, "lock(fd, syscall.LOCK_EX)", "lock(fd, syscall.LOCK_SH)"},
	}, adjust: filed},
	{name: "unnamed-lease", safeguard: "a lease is in the lease file before a key is put on it", changes: []change{
		{reclaim, "	p.cfg.told(p.cfg.File.Add(s.cluster, int64(s.id)))\n", ""},
	}, adjust: filed},

	// What observers and hooks are told.
	{name: "observe-old-event", safeguard: "Observe does not go back where a member lags", changes: []change{
		{observe, "if !o.valid || ev.Kv.ModRevision <= o.rev {", "if !o.valid {"},
	}, adjust: restless("slow-follower", "pause-follower", "lag-member", "link-reset")},
	{name: "observe-revision", safeguard: "of a revision only the last event shows a state", changes: []change{
		{observe, "if i+1 == len(events) || events[i+1].Kv.ModRevision != ev.Kv.ModRevision {", "if i >= 0 {"},
	}, adjust: only("operator-deletes-two")},
	{name: "observe-reread", safeguard: "Observe reads who leads at intervals, as its watch may be dead", changes: []change{
		{observe, "				read() // either an event", "				ok() // either an event"},
	}, adjust: calm(0)},
	{name: "observe-yields", safeguard: "Observe yields what it has found", changes: []change{
		{observe, "	if o.began && leader == o.last {\n", "	if o.began || leader == o.last {\n"},
	}},
	{name: "ended-told", safeguard: "Hooks.Ended is called", changes: []change{
		{term, "		if elected {\n			l.tell()", "		if elected && l.e == nil {\n			l.tell()"},
	}},
}

// mutationNamed returns the mutation of this name, nil if there is none.
func mutationNamed(name string) *mutation {
	i := slices.IndexFunc(mutations, func(m mutation) bool { return m.name == name })
	if i < 0 {
		return nil
	}
	return &mutations[i]
}

// Package fake is an etcd cluster in memory, for clients that are real, in the time of a
// testing/synctest bubble or in real time.
//
// # What is real
//
//   - The client is a [clientv3.Client] as New returns it, with its retries, its tokens and its watch
//     streams. Its calls end in interceptors of its connection, below those of clientv3. So
//     ActiveConnection is not nil, and the library takes the same path as with a real etcd.
//   - gRPC's balancer, reconnection, back-off and keepalive. gRPC dials each connection and shakes
//     hands over a pipe in memory. Only calls bypass HTTP/2: they go to the member that gRPC's balancer
//     picks.
//   - Raft. Each member runs go.etcd.io/raft/v3 as etcd does, with PreVote, CheckQuorum and read index.
//     So elections, terms, deposed leaders, dropped and late proposals are not imitated.
//
// # What is modelled, after the sources of etcd 3.7.3
//
//   - The store: revisions, transactions, ranges, compaction, and watches with all their options.
//   - The lessor: renewals without raft, a scan every 500 ms, at most 500 revocations a scan, promotion
//     and demotion, the minimum TTL.
//   - The server: headers, time limits, what a member without a leader refuses, the forwarding of
//     renewals, users and rights, the alarm of a full database, limits of size and rate.
//   - The network between processes and members, see [Link], and between members, see [Cluster.Cut].
//   - Pauses. A member that goes on finds its timers due and its sockets full, and reads them in an
//     order that nobody knows. That is why a deposed leader may acknowledge renewals, and revoke leases
//     that its successor has renewed.
//
// The tests compare the store, leases, rights and the alarm with an embedded etcd, answer by answer.
// They compare terms, promotion, lagging watches, deposed leaders and lost quorums with real members.
// How the network behaves is compared with nothing.
//
// # What is not modelled
//
//   - Raft messages are lost only through a cut, a long pause or a member that is down. A member loses
//     nothing that it has written. There are no snapshots, learners or changes of membership: elections
//     do not notice them.
//   - Leases are not checkpointed. This matters only for a TTL above 5 minutes, which the library
//     refuses. Nor does a new leader spread the expiry of a thousand leases and more.
//   - HTTP/2 flow control. A client that does not read gets later everything that it would have got,
//     where etcd would join events.
//   - Members do not know the deadlines of calls. They learn that a caller has given up by its
//     cancellation.
//
// # Determinism
//
// The cluster is one loop of events in the order of their time. It draws from generators that follow
// from the seed, and never ranges over a map where order matters. Three things come from outside: raft
// draws election timeouts from [crypto/rand.Reader], gRPC its jitter and its first endpoint from
// math/rand/v2, and the runtime decides which of the callers' goroutines runs first.
package fake

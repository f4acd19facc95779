package fake

import (
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
)

// Config is what a cluster is made of. The zero value is a cluster of three members.
type Config struct {
	Seed    uint64 // of all that the cluster decides by chance
	Members int    // 3 if 0

	// Delays are means of exponential distributions. A delay that is 0 has its default, one that is
	// negative is none.
	ClientDelay time.Duration // of a message between a process and a member, 200 µs by default
	PeerDelay   time.Duration // of a message between members, 200 µs by default
	DiskDelay   time.Duration // until a member has written what it was sent, 300 µs by default

	TickInterval  time.Duration // raft's heartbeat, 100 ms by default
	ElectionTicks int           // 10 by default, as etcd
	MinLeaseTTL   int64         // in seconds; (3*ElectionTicks)/2 heartbeats, rounded up, by default, as etcd

	MaxRequestBytes int // 1.5 MiB by default, as etcd

	// LateRequests is the probability that a request is carried out whose caller has given up before it
	// arrived. 0 means 0.5, a negative one never.
	LateRequests float64

	// OnCommit, if not nil, is told of each entry when the first member applies it, in the order of the
	// log. It must not block and not call the cluster, which is locked: the truth at that moment is
	// handed to it.
	OnCommit func(Truth, Commit)
}

// A Commit is an entry of the log, as it was applied.
type Commit struct {
	At       time.Time
	Index    uint64
	Term     uint64
	Revision int64 // of the store after it
	Member   int   // that proposed it

	Process string        // that asked for it, "" if etcd itself did, OperatorName if the operator
	Call    uint64        // the number of the request, the same for one that was carried out twice
	Request proto.Message // *pb.PutRequest, *pb.TxnRequest, *pb.LeaseRevokeRequest, ...
	Err     error         // it was refused when applied
	Expiry  Expiry

	Events []*mvccpb.Event // with PrevKv
}

// Expiry says what a revocation is about.
type Expiry int

// What a revocation is about.
const (
	NoExpiry    Expiry = iota // a request, not etcd's own
	TrueExpiry                // the lease had expired at the lessor that counts
	EarlyExpiry               // it had not: a deposed leader has revoked it by its own count
)

// OperatorName is [Commit.Process] of what the operator does.
const OperatorName = "operator"

// Truth is the state of the cluster at one moment. It may be used only in the function that it is
// handed to.
type Truth struct{ c *Cluster }

// Progress is how far a member has come.
type Progress struct {
	Up       bool // neither paused nor killed
	Paused   bool
	Leads    bool   // it believes that it is the leader
	Term     uint64 // of the last entry that it has applied, as its headers say
	Index    uint64
	Revision int64
}

// A Permission allows a user to read or write the keys with a prefix.
type Permission struct {
	Prefix      string
	Read, Write bool
}

// A User may authenticate.
type User struct {
	Name, Password string
	Root           bool // may do everything
	Permissions    []Permission
}

// Counters count what a process has sent.
type Counters struct {
	Requests map[string]int // calls by the name of the method, such as "Range" or "Txn"; streams when they are opened
	Messages int            // requests, and messages on streams
	Dials    int
}

// Total is the number of calls.
func (c Counters) Total() (n int) {
	for _, calls := range c.Requests {
		n += calls
	}
	return n
}

// ClientConfig is how a process connects.
type ClientConfig struct {
	Endpoints          []int // members; all by default
	Username, Password string
	// Alter, if not nil, changes the configuration that New is called with.
	Alter func(*clientv3.Config)
}

package fake

import (
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// A realm is who may do what. It is replaced, never changed: members have applied different ones.
type realm struct {
	enabled  bool
	revision uint64 // grows with each change
	ttl      time.Duration
	users    []User
}

// A right is to read or to write.
type right int

const (
	read right = iota
	write
)

// An identity is who asks, as etcd found out from a token when the request arrived.
type identity struct {
	user     string
	revision uint64 // of the realm then; 0 if nobody said who asks
}

// root is etcd itself and the operator.
var root = identity{user: "\x00root", revision: ^uint64(0)}

func (r *realm) user(name string) (User, bool) {
	i := slices.IndexFunc(r.users, func(u User) bool { return u.Name == name })
	if i < 0 {
		return User{}, false
	}
	return r.users[i], true
}

// admin reports whether everything is permitted.
func (r *realm) admin(who identity) bool {
	if !r.enabled || who == root {
		return true
	}
	u, ok := r.user(who.user)
	return ok && u.Root
}

// permits returns why who may not read or write a range.
func (r *realm) permits(who identity, do right, key, end []byte) error {
	switch {
	case !r.enabled || who == root:
		return nil
	case who.revision == 0:
		return rpctypes.ErrGRPCUserEmpty
	case who.revision < r.revision:
		return rpctypes.ErrGRPCAuthOldRevision
	}
	u, _ := r.user(who.user)
	if u.Root || slices.ContainsFunc(u.Permissions, func(p Permission) bool {
		return (do == read && p.Read || do == write && p.Write) && p.covers(string(key), string(end))
	}) {
		return nil
	}
	return rpctypes.ErrGRPCPermissionDenied
}

// covers reports whether all keys of a range have the prefix. Permissions that touch are not joined, as
// etcd does.
func (p Permission) covers(key, end string) bool {
	switch {
	case p.Prefix == "":
		return true
	case !strings.HasPrefix(key, p.Prefix):
		return false
	case end == "":
		return true
	case end == "\x00":
		return false
	}
	after := []byte(p.Prefix)
	for i := len(after) - 1; i >= 0; i-- {
		if after[i] < 0xff {
			after[i]++
			return end <= string(after[:i+1])
		}
	}
	return true // the prefix is all 0xff: nothing comes after it
}

// permitsLease returns why who may not attach a key to the lease or revoke it: all its keys must be
// writable.
func (r *realm) permitsLease(who identity, keys []string) error {
	if r.admin(who) {
		return nil
	}
	for _, key := range keys {
		if err := r.permits(who, write, []byte(key), nil); err != nil {
			return err
		}
	}
	return nil
}

// permitsTxn returns why who may not commit a transaction. Both branches must be permitted.
func (r *realm) permitsTxn(who identity, t *pb.TxnRequest, keysOf func(lease int64) []string) error {
	if !r.enabled {
		return nil
	}
	for _, c := range t.Compare {
		if err := r.permits(who, read, c.Key, c.RangeEnd); err != nil {
			return err
		}
	}
	for _, op := range slices.Concat(t.Success, t.Failure) {
		var err error
		switch op := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			err = r.permits(who, read, op.RequestRange.Key, op.RequestRange.RangeEnd)
		case *pb.RequestOp_RequestPut:
			err = r.permitsPut(who, op.RequestPut, keysOf)
		case *pb.RequestOp_RequestDeleteRange:
			err = r.permitsDelete(who, op.RequestDeleteRange)
		case *pb.RequestOp_RequestTxn:
			err = r.permitsTxn(who, op.RequestTxn, keysOf)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *realm) permitsPut(who identity, p *pb.PutRequest, keysOf func(lease int64) []string) error {
	if err := r.permits(who, write, p.Key, nil); err != nil {
		return err
	}
	if err := r.permitsLease(who, keysOf(p.Lease)); err != nil {
		return err
	}
	if p.PrevKv {
		return r.permits(who, read, p.Key, nil)
	}
	return nil
}

func (r *realm) permitsDelete(who identity, d *pb.DeleteRangeRequest) error {
	if d.PrevKv {
		if err := r.permits(who, read, d.Key, d.RangeEnd); err != nil {
			return err
		}
	}
	return r.permits(who, write, d.Key, d.RangeEnd)
}

package leader

import (
	"context"
	"errors"
	"fmt"

	"example.com/leader/internal/lease"
	"example.com/leader/internal/leasefile"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Reclaim waits until the process that uses the lease file is dead, and revokes its leases, so that the next candidates
// are elected at once: see [WithLeaseFile]. It is for a supervisor, a sidecar or ExecStopPost= of a unit of systemd. It
// must not be used by the process that it waits for.
//
// It blocks while the owner of the file lives, and then until etcd has confirmed or ctx ends. It returns nil when no
// lease is left, also if the file does not exist, names no lease, is a copy, or is of another boot or cluster. So it
// returns at once between two runs of the owner: call it again, after a pause. It does not write the file and may run
// more than once at a time. A process that starts meanwhile with the same file is not disturbed.
//
// The errors are ctx's, [ErrClosed] if the client is closed, the rule that the file breaks, permission denied to read
// it, or what etcd has refused. The client needs the rights of the owner's client, because etcd revokes a lease only for
// users who may write all its keys.
func Reclaim(ctx context.Context, client *clientv3.Client, leaseFile string) error {
	if client == nil {
		return errors.New("leader: client: must not be nil")
	}
	if leaseFile == "" {
		return errors.New(`leader: lease file "": must not be empty`)
	}
	left, err := leasefile.Await(ctx, leaseFile)
	if err == nil {
		err = lease.Reclaim(ctx, client, left, func(int64) {})
	}
	if errors.Is(err, context.Canceled) && ctx.Err() == nil && client.Ctx().Err() != nil {
		err = ErrClosed
	}
	if err != nil {
		return fmt.Errorf("leader: reclaim %q: %w", leaseFile, err)
	}
	return nil
}

// openLeaseFile opens the file of WithLeaseFile, if there is one.
func (o *options) openLeaseFile() (*leasefile.File, error) {
	if o.leaseFile == "" {
		return nil, nil
	}
	file, err := leasefile.Open(o.leaseFile)
	if errors.Is(err, leasefile.ErrUnusable) {
		o.log.Warn("no lease file, so a crash takes the TTL", "path", o.leaseFile, "error", err)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("leader: WithLeaseFile(%q): %w", o.leaseFile, err)
	}
	return file, nil
}

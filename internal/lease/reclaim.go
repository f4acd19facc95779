package lease

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"example.com/leader/internal/leasefile"
	"example.com/leader/internal/retry"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Reclaim revokes the leases that a dead process has left. It calls gone, possibly concurrently, for each that is not in
// this cluster any more. Leases of another cluster are none of this one. It sends its requests until etcd has answered
// or ctx ends.
func Reclaim(ctx context.Context, client *clientv3.Client, left leasefile.Record, gone func(id int64)) error {
	if len(left.Leases) == 0 {
		return nil
	}
	// The answer shows the cluster's ID, whether the lease exists or not, and it needs no permission.
	answer, err := retry.Ask(ctx, client, nil, func(ctx context.Context) (*clientv3.LeaseTimeToLiveResponse, error) {
		return client.TimeToLive(ctx, clientv3.LeaseID(left.Leases[0]))
	})
	if err != nil {
		return fmt.Errorf("ask for the cluster's ID: %w", err)
	}
	if answer == nil || answer.ResponseHeader == nil {
		return errors.New("ask for the cluster's ID: the client answered with neither header nor error")
	}
	errs := make([]error, len(left.Leases))
	var revocations sync.WaitGroup
	for i, id := range left.Leases {
		if answer.ClusterId != left.Cluster {
			gone(id)
			continue
		}
		revocations.Go(func() {
			if errs[i] = revoke(ctx, client, clientv3.LeaseID(id)); errs[i] == nil {
				gone(id)
			}
		})
	}
	revocations.Wait()
	return errors.Join(errs...)
}

// revoke revokes a lease that nobody uses. It returns nil if the lease is gone.
func revoke(ctx context.Context, client *clientv3.Client, id clientv3.LeaseID) error {
	_, err := retry.Ask(ctx, client, nil, func(ctx context.Context) (struct{}, error) {
		_, err := client.Revoke(ctx, id)
		return struct{}{}, err
	})
	if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return fmt.Errorf("revoke lease %x: %w", id, err)
	}
	return nil
}

// Inherit revokes, once, the leases that the lease file's last owner has left when it died. Call it before a candidate
// joins, which would wait behind the dead one otherwise. It blocks until that is done, for the length of one request at
// most: if etcd does not answer it continues in a goroutine of the pool, and the leases may also expire.
func (p *Pool) Inherit(ctx context.Context) {
	if p.cfg.File == nil {
		return
	}
	p.mu.Lock()
	if p.inheriting == nil {
		var done context.CancelFunc
		p.inheriting, done = context.WithTimeout(p.ctx, retry.RequestTimeout)
		if left := p.cfg.File.Left(); len(left.Leases) > 0 {
			p.late.Go(func() { //nolint:contextcheck // it may outlive ctx
				defer done()
				p.reclaim(left, done)
			})
		} else {
			done()
		}
	}
	inheriting := p.inheriting
	p.mu.Unlock()
	_ = retry.Wait(ctx, inheriting.Done())
}

// reclaim revokes the leases that a dead owner has left, and then calls done.
func (p *Pool) reclaim(left leasefile.Record, done func()) {
	ctx, cancel := context.WithTimeout(retry.RequireLeader(p.ctx), maxLate)
	defer cancel()
	defer context.AfterFunc(p.client.Ctx(), cancel)()
	err := Reclaim(ctx, p.client, left, func(id int64) { p.cfg.told(p.cfg.File.Remove(id)) })
	done() // before the log handler, which may block
	switch {
	case err == nil:
		p.cfg.Log.Info("leases of a dead owner are gone", "leases", len(left.Leases))
	case p.ctx.Err() == nil:
		p.cfg.Log.Warn("leases of a dead owner could not be revoked, they will expire", "error", err)
	}
}

// note writes the session's lease into the lease file.
func (p *Pool) note(s *Session) {
	if p.cfg.File == nil {
		return
	}
	if s.cluster == 0 {
		p.cfg.told(errors.New("etcd does not say which cluster it is"))
		return
	}
	p.cfg.told(p.cfg.File.Add(s.cluster, int64(s.id)))
	if s.Gone() { // already
		p.cfg.told(p.cfg.File.Remove(int64(s.id)))
	}
}

// told logs a failure to write the lease file, in a goroutine, because the log handler may block.
func (c *Config) told(err error) {
	if err != nil {
		c.started.Go(func() { c.Log.Warn("lease file is not up to date, so a crash may take the TTL", "error", err) })
	}
}

package lease

import (
	"context"
	"sync"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// A Pool shares one session among its users: granted for the first, replaced when it is over,
// closed after the last.
type Pool struct {
	client   *clientv3.Client
	cfg      Config
	granting chan struct{} // holds a token while a session is being granted

	mu      sync.Mutex
	current *Lent
}

// Lent is a session that the pool has lent. Each user gives it back once, with [Lent.Return].
type Lent struct {
	*Session
	pool *Pool
	refs int // guarded by pool.mu
}

// NewPool returns a pool without a session.
func NewPool(client *clientv3.Client, cfg Config) *Pool {
	return &Pool{client: client, cfg: cfg, granting: make(chan struct{}, 1)}
}

// Get lends the present session, or a new one if there is none or it is over. It blocks for the
// grant, one at a time, which is bounded by ctx.
func (p *Pool) Get(ctx context.Context) (*Lent, error) {
	select {
	case p.granting <- struct{}{}:
		defer func() { <-p.granting }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if l := p.lend(); l != nil {
		return l, nil
	}
	s, err := Grant(ctx, p.client, p.cfg)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.current = &Lent{Session: s, pool: p, refs: 1}
	return p.current, nil
}

func (p *Pool) lend() *Lent {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.current == nil || !p.current.Valid() {
		return nil
	}
	p.current.refs++
	return p.current
}

// Return gives the session back. The last one to do so must call [Lent.Finish] then.
func (l *Lent) Return() {
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	l.refs--
	if l.refs == 0 && l.pool.current == l {
		l.pool.current = nil
	}
}

// Unused reports whether all users have given the session back.
func (l *Lent) Unused() bool {
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	return l.refs == 0
}

// Finish closes the session if it is unused. It may be called again after an error.
func (l *Lent) Finish(ctx context.Context) error {
	if !l.Unused() {
		return nil
	}
	return l.Close(ctx)
}

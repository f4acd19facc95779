package leader

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// DefaultTTL is the time to live of the lease behind a leadership, unless [WithTTL] says
// otherwise: after a crash of the leader, nobody leads for about that long.
const DefaultTTL = 15 * time.Second

const (
	minTTL = time.Second
	maxTTL = 5 * time.Minute
)

// An Option changes a default of an [Elector], [Campaign] or [Run]. Options are opaque and made by
// the With functions. Of a kind the last counts, but for hooks, which add up. A bad value is reported
// by the call that is given the option, as an error that names option, value and rule.
type Option struct{ apply func(*options) error }

type options struct {
	ttl    time.Duration
	margin time.Duration // 0: a fifth of the TTL that etcd grants
	prefix string
	log    *slog.Logger
	hooks  Hooks
}

func newOptions(opts []Option) (options, error) {
	o := options{ttl: DefaultTTL, log: slog.New(slog.DiscardHandler), hooks: Hooks{}.withDefaults()}
	for _, opt := range opts {
		if opt.apply == nil {
			return o, errors.New("leader: Option{}: must be made by one of the With functions")
		}
		if err := opt.apply(&o); err != nil {
			return o, fmt.Errorf("leader: %w", err)
		}
	}
	// Half of the TTL has room for the wait until a renewal, for it, and for two retries.
	if o.margin > o.ttl/2 {
		return o, fmt.Errorf("leader: WithMargin(%v): must be at most half of the TTL, which is %v", o.margin, o.ttl)
	}
	return o, nil
}

// WithTTL sets the lease's time to live, 1 s to 5 min: about the longest that nobody leads after a
// crash of the leader, and, less the margin, the longest outage of etcd or the network that a
// leader survives. etcd counts in whole seconds, so a fraction is rounded up, and raises what is
// below its own minimum (2 s with its default settings). Above 5 min etcd may shorten a lease when
// its own leader changes (lease checkpointing).
func WithTTL(ttl time.Duration) Option {
	return Option{func(o *options) error {
		if ttl < minTTL {
			return fmt.Errorf("WithTTL(%v): must be at least %v", ttl, minTTL)
		}
		if ttl > maxTTL {
			return fmt.Errorf("WithTTL(%v): must be at most %v", ttl, maxTTL)
		}
		o.ttl = ttl
		return nil
	}}
}

// WithMargin sets how long before etcd's earliest possible expiry of the lease a term ends here,
// if it could not be renewed: the time that is left for work to stop before another can lead. It
// must be positive and at most half of the TTL; the default is a fifth of it. It is also what
// covers a local clock that runs slower than etcd's, by up to margin/TTL.
func WithMargin(margin time.Duration) Option {
	return Option{func(o *options) error {
		if margin <= 0 {
			return fmt.Errorf("WithMargin(%v): must be positive", margin)
		}
		o.margin = margin
		return nil
	}}
}

// WithPrefix puts every election of an [Elector] under a prefix: the etcd prefix of the election
// "name" is then "prefix/name", with exactly one slash in between however the two are written.
// The empty prefix, the default, changes nothing.
func WithPrefix(prefix string) Option {
	return Option{func(o *options) error {
		o.prefix = prefix
		return nil
	}}
}

// WithLogger sets where to log; the default is nowhere, nil is an error. At level Info it gets what
// happens to a term: elected, resigned, lost. At level Warn it gets what is being retried, once for
// a streak of failures, and what was given up, such as a resignation while etcd was away.
func WithLogger(log *slog.Logger) Option {
	return Option{func(o *options) error {
		if log == nil {
			return errors.New("WithLogger(nil): must not be nil")
		}
		o.log = log
		return nil
	}}
}

// WithHooks adds functions to call when something happens. Given more than once, each time adds to
// what was given before: functions for the same event are called one after the other, in the order
// of the options.
func WithHooks(hooks Hooks) Option {
	return Option{func(o *options) error {
		o.hooks = o.hooks.and(hooks.withDefaults())
		return nil
	}}
}

// Hooks are functions to call when something happens; any of them may be nil. They are meant for
// metrics and notices, not for the work that a leader does.
//
// They are called in the middle of things: a hook must return quickly, and must not call Resign, Close
// or another method that waits for the term to end. A hook that does not return holds up what it
// belongs to: Campaign, the other hooks of its election, Close. It does not hold up renewals, nor the
// deletion of a key. A panic in Campaigning, Elected or CampaignFailed goes on to the caller of
// Campaign or Run, after the key was deleted and the election let go; so does one in a log handler
// there. The other hooks are called in goroutines of the package, where a panic ends the program, as it
// does in any goroutine.
//
// Hooks of different elections, and of the lease, may be called at the same time, and so may LeaderChanged
// beside Campaigning and Elected. One campaign's order is Campaigning, then either CampaignFailed or Elected
// and Ended. Another goroutine's campaign in the same election may begin a moment before CampaignFailed or
// Ended is called, and its Campaigning come first.
// A call that is refused at once, for its name or value, with [ErrCampaigning] or with [ErrClosed],
// is no campaign.
//
// election is the election's name with the prefix of [WithPrefix].
type Hooks struct {
	// Campaigning is called when a campaign begins.
	Campaigning func(election string)

	// CampaignFailed is called when a campaign ends without leadership.
	CampaignFailed func(election string, err error)

	// Elected is called when a campaign is won, before Campaign returns; waited is how long it
	// took.
	Elected func(election string, l *Leader, waited time.Duration)

	// Ended is called when a term has ended, after its context, and when LeaderChanged has nothing
	// more to say of the campaign. cause is [ErrResigned], [ErrExpired] or [ErrEvicted], possibly
	// wrapped.
	Ended func(election string, l *Leader, cause error)

	// LeaderChanged is called, while this Elector campaigns or leads in the election, with whoever
	// leads, this Elector itself included, and on every change of the leader or its value; the zero
	// Candidate means nobody. While it has not returned, changes may be left out, but not the last one.
	// A campaign does not repeat what the one before it in the election was told last, unless more than
	// 100 other elections have ended in between. It says nothing between the end of a term and the next
	// campaign. It costs a watch of the election.
	LeaderChanged func(election string, leader Candidate)

	// Renewed is called when a renewal of the lease has counted: took is how long that took and
	// deadline until when all terms on this lease hold then. No renewal waits for Renewed and
	// RenewFailed: while one of them has not returned only the newest 100 are kept for them, and they
	// may be told after the term has ended.
	Renewed func(id clientv3.LeaseID, took time.Duration, deadline time.Time)

	// RenewFailed is called when an attempt to renew the lease has failed; err is [ErrRefused] if
	// etcd has answered and that does not count all the same. There will be other
	// attempts until the deadline.
	RenewFailed func(id clientv3.LeaseID, took time.Duration, err error)
}

// withDefaults replaces hooks that are nil, except LeaderChanged, whose absence saves a watch.
func (h Hooks) withDefaults() Hooks {
	if h.Campaigning == nil {
		h.Campaigning = func(string) {}
	}
	if h.CampaignFailed == nil {
		h.CampaignFailed = func(string, error) {}
	}
	if h.Elected == nil {
		h.Elected = func(string, *Leader, time.Duration) {}
	}
	if h.Ended == nil {
		h.Ended = func(string, *Leader, error) {}
	}
	if h.Renewed == nil {
		h.Renewed = func(clientv3.LeaseID, time.Duration, time.Time) {}
	}
	if h.RenewFailed == nil {
		h.RenewFailed = func(clientv3.LeaseID, time.Duration, error) {}
	}
	return h
}

// and returns hooks that call those of h, and then those of next, though h may panic or exit its goroutine. Both
// have their defaults.
func (h Hooks) and(next Hooks) Hooks {
	both := Hooks{
		Campaigning: func(election string) {
			defer next.Campaigning(election)
			h.Campaigning(election)
		},
		CampaignFailed: func(election string, err error) {
			defer next.CampaignFailed(election, err)
			h.CampaignFailed(election, err)
		},
		Elected: func(election string, l *Leader, waited time.Duration) {
			defer next.Elected(election, l, waited)
			h.Elected(election, l, waited)
		},
		Ended: func(election string, l *Leader, cause error) {
			defer next.Ended(election, l, cause)
			h.Ended(election, l, cause)
		},
		Renewed: func(id clientv3.LeaseID, took time.Duration, deadline time.Time) {
			defer next.Renewed(id, took, deadline)
			h.Renewed(id, took, deadline)
		},
		RenewFailed: func(id clientv3.LeaseID, took time.Duration, err error) {
			defer next.RenewFailed(id, took, err)
			h.RenewFailed(id, took, err)
		},
	}
	switch {
	case h.LeaderChanged == nil:
		both.LeaderChanged = next.LeaderChanged
	case next.LeaderChanged == nil:
		both.LeaderChanged = h.LeaderChanged
	default:
		both.LeaderChanged = func(election string, leader Candidate) {
			defer next.LeaderChanged(election, leader)
			h.LeaderChanged(election, leader)
		}
	}
	return both
}

// election returns the etcd prefix of the election, without its last slash.
func (o *options) election(name string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("%w: %q: must not be empty", ErrInvalidName, name)
	}
	if strings.HasSuffix(name, "/") {
		return "", fmt.Errorf("%w: %q: must not end in a slash", ErrInvalidName, name)
	}
	if o.prefix == "" {
		return name, nil
	}
	return strings.TrimRight(o.prefix, "/") + "/" + strings.TrimLeft(name, "/"), nil
}

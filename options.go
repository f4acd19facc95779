package leader

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// DefaultTTL is the time to live of the lease, unless [WithTTL] sets another. After a crash of the
// leader nobody leads for up to about that long.
const DefaultTTL = 15 * time.Second

const (
	minTTL = time.Second
	maxTTL = 5 * time.Minute
)

// An Option changes a default of an [Elector], [Campaign] or [Run]. The With functions make Options. If
// an option is repeated, the last one wins; hooks accumulate. A bad value is an error of the call that is
// given the option; the error names the option, the value and the rule.
type Option struct{ apply func(*options) error }

type options struct {
	ttl    time.Duration
	margin time.Duration // 0: a fifth of the TTL that etcd grants
	prefix string
	log    *slog.Logger
	hooks  hookList
	health func(ctx context.Context, election string) error

	leaseFile string
}

func newOptions(opts []Option) (options, error) {
	o := options{ttl: DefaultTTL, log: slog.New(slog.DiscardHandler)}
	for _, opt := range opts {
		if opt.apply == nil {
			return o, errors.New("leader: Option{}: must be made by one of the With functions")
		}
		if err := opt.apply(&o); err != nil {
			return o, fmt.Errorf("leader: %w", err)
		}
	}
	// The other half of the TTL must have room for the pause before a renewal, the renewal and two retries.
	if o.margin > o.ttl/2 {
		return o, fmt.Errorf("leader: WithMargin(%v): must be at most half of the TTL, which is %v", o.margin, o.ttl)
	}
	return o, nil
}

// WithTTL sets the lease's time to live, from 1 s to 5 min; the default is [DefaultTTL]. After a crash of the leader
// nobody leads for up to about a TTL. A leader survives every outage of etcd or the network shorter than 2/3·TTL −
// margin. It survives a longer one, up to TTL − margin, if it begins right after a renewal.
//
// etcd counts in whole seconds, so a fraction is rounded up. It raises a TTL below its own minimum, which
// is 2 s with its default settings. Above 5 min it may shorten a lease when its own leader changes (lease
// checkpointing).
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

// WithMargin sets how long before etcd's earliest possible expiry of the lease a term ends here, if the
// lease could not be renewed. Work has this time to stop before another can lead. The margin must be
// positive and at most half of the TTL; the default is a fifth of the TTL. The margin also covers a local
// clock that runs slower than etcd's, by up to margin/TTL.
func WithMargin(margin time.Duration) Option {
	return Option{func(o *options) error {
		if margin <= 0 {
			return fmt.Errorf("WithMargin(%v): must be positive", margin)
		}
		o.margin = margin
		return nil
	}}
}

// WithPrefix puts every election of an [Elector] below a prefix: the election "name" becomes "prefix/name",
// with one slash in between, whether the prefix ends in one or not. The default is no prefix.
func WithPrefix(prefix string) Option {
	return Option{func(o *options) error {
		o.prefix = prefix
		return nil
	}}
}

// WithLogger sets where to log; by default nothing is logged. nil is an error. Level Info has the steps of candidates
// and terms: joined the queue, elected, resigned. Level Warn has terms that were lost; the first of several failures in
// a row, and after a minute, two, four and so on the present one, if its reason is another; and what was given up, such
// as a resignation while etcd was unreachable. docs/operations.md lists all lines.
func WithLogger(log *slog.Logger) Option {
	return Option{func(o *options) error {
		if log == nil {
			return errors.New("WithLogger(nil): must not be nil")
		}
		o.log = log
		return nil
	}}
}

// WithHealth makes health count as the lease does: a candidate or leader is healthy until TTL − margin after the start
// of its last successful check. Without it, a leader whose work hangs is renewed by its other goroutines, and leads
// forever.
//
// check is called for each election in which the Elector campaigns or leads, about every TTL/3, or more often if the
// margin is more than a fifth of the TTL, so that one failure loses nothing. It is also called during outages of etcd,
// and never twice at a time for an election. Its context ends before the next call is due, and when the campaign or the
// term is over. A check that hangs is not called again before it has returned. Only a success before its
// context has ended counts. A panic ends the program.
//
//   - A leader that is not healthy any more loses its term: the cause is [ErrUnhealthy], and wraps the last failure.
//     Its key goes when the function of Run has returned or Resign is called, or a margin later, whichever is first. So
//     a leader that hangs costs what one that crashes costs.
//   - A candidate leaves the queue, and joins again when it is healthy. Campaign waits for a first success before it
//     joins; TryCampaign returns [ErrUnhealthy] if the first check fails.
//
// If everybody is unhealthy nobody leads. So check must ask about this process, and not about what all instances share,
// such as a database. It may ask whether work that has begun makes progress; a candidate that waits has none. If the
// work itself notices that it cannot continue, do not wait for the check: stop the work and call Resign.
func WithHealth(check func(ctx context.Context, election string) error) Option {
	return Option{func(o *options) error {
		if check == nil {
			return errors.New("WithHealth(nil): must not be nil")
		}
		o.health = check
		return nil
	}}
}

// WithLeaseFile lets another instance lead milliseconds after a crash of this process, instead of a TTL. The file names
// the process's leases, and is locked as long as the process lives. So whoever gets the lock knows that the process is
// dead, and revokes the leases: [Reclaim] in a supervisor or sidecar, at once, or the next process with the same file,
// when it campaigns for the first time. It works on Linux; elsewhere a warning is logged and there is no file.
//
// path is for this instance alone. Its directory must exist on a local file system, and only the service may write
// there, as in /run or a volume of the pod; the file must not be in an image. New creates the file, with mode 0600, and
// waits up to 1 s for a living owner to unlock it. It returns an error if the owner lives on, or for a file that is not
// regular, belongs to another user, is writable by others, or is on NFS or the like (FUSE is not recognised). A file
// that cannot be created or written for another reason, such as a full disk, is a warning in the log.
//
// The file is unlocked when [Elector.Close] has succeeded, by [Leader.Resign] if the term is from the function
// [Campaign], or at the end of the function [Run]; but if the lease could not be revoked, at the end of the process. So
// an Elector with a lease file must be closed before another one in the same process uses the file.
//
// No guarantee depends on the file. If it is deleted, or if what it says is of another boot of the machine, another
// file (it is a copy) or another cluster, the lease expires as without it. But these limits hold:
//   - A process that is stopped or dumps core is alive. A child process that outlives it may still work: kill it with
//     its parent.
//   - Do not use it with CRIU, or in a virtual machine that is cloned while it runs.
//   - A disk that hangs can hold up a campaign, Resign and Close beyond their contexts, but not the end of a term.
//   - The next leader may be elected before the last writes of the dead process arrive. [Leader.Guard] and tokens
//     protect a resource from those. For a resource that compares neither, do not use a lease file.
func WithLeaseFile(path string) Option {
	return Option{func(o *options) error {
		if path == "" {
			return errors.New(`WithLeaseFile(""): must not be empty`)
		}
		o.leaseFile = path
		return nil
	}}
}

// WithHooks adds functions to call when something happens. It may be given more than once: functions for the
// same event are called one after the other, in the order of the options.
func WithHooks(hooks Hooks) Option {
	return Option{func(o *options) error {
		o.hooks = append(o.hooks, hooks)
		return nil
	}}
}

// Hooks are functions to call when something happens; any of them may be nil. They are meant for
// metrics and notifications, not for the work that a leader does.
//
// A hook must return quickly. It must not call Resign, Close or another method that waits for the term to
// end. A hook that blocks holds up Campaign, the other hooks of its election, and Close. It does not hold up
// renewals or the deletion of a key.
//
// If Campaigning, Elected or CampaignFailed panics, the panic reaches the caller of Campaign or Run, after
// the key was deleted and the election released. The same holds for a log handler that is called there. The
// other hooks are called in goroutines of the package, where a panic ends the program.
//
// For each campaign the order is Campaigning, then either CampaignFailed or Elected and Ended. Hooks of
// different elections and of the lease may be called concurrently, and LeaderChanged concurrently with
// Campaigning and Elected. When CampaignFailed or Ended is called, another goroutine's campaign in the same
// election may have begun, and its Campaigning may come first. It may also come before Elected, if the log handler
// blocks and the term is over already. A call that is refused at once, for its name or value, with [ErrCampaigning] or
// with [ErrClosed], is no campaign.
//
// election is the election's name with the prefix of [WithPrefix].
type Hooks struct {
	// Campaigning is called when a campaign begins.
	Campaigning func(election string)

	// CampaignFailed is called when a campaign ends without leadership.
	CampaignFailed func(election string, err error)

	// Elected is called when a campaign is won, before Campaign returns. waited is how long the campaign
	// took.
	Elected func(election string, l *Leader, waited time.Duration)

	// Ended is called when a term has ended, after its context is cancelled and after the campaign's last
	// LeaderChanged. cause is [ErrResigned], [ErrTransferred], [ErrUnhealthy], [ErrExpired] or [ErrEvicted],
	// possibly wrapped. Ended does not wait for work that winds down after a transfer or for lack of health.
	Ended func(election string, l *Leader, cause error)

	// Overdue is called by Run if the function that leads ignores the end of its context: a margin after that
	// end, then once per TTL, and with late = 0 when the function has returned. late is how long ago the
	// context ended. If the term is over, another instance may lead while this one still works. Calls for a
	// term are never concurrent, and Run does not campaign again before they have returned.
	Overdue func(election string, l *Leader, late time.Duration)

	// LeaderChanged is called with whoever leads, and again on each change of the leader or its value, while this
	// Elector campaigns or leads in the election. The leader may be this Elector itself; the zero Candidate means that
	// nobody leads. While a call has not returned, changes may be left out, but not the last one. The Elector's next
	// campaign in the election does not repeat the last call if leader and value are still the same, unless the Elector
	// has ended its part in more than 100 other elections since. Between the end of a term and the next campaign it is
	// not called. It costs a watch of the election.
	LeaderChanged func(election string, leader Candidate)

	// Renewed is called when a renewal of the lease has counted. took is how long it took. deadline is the latest time
	// at which all terms on this lease end unless another renewal succeeds. Renewals do not wait for Renewed and
	// RenewFailed: while one of them has not returned, only the newest 100 renewals are kept for them. They may be
	// called after the term has ended.
	Renewed func(id clientv3.LeaseID, took time.Duration, deadline time.Time)

	// RenewFailed is called when an attempt to renew the lease has failed. Until the deadline there will be
	// other attempts. err matches [ErrRefused] if etcd has answered but the answer does not count, [ErrEvicted]
	// if the lease was revoked, [ErrExpired] if the deadline has cut the attempt short; else it is the
	// request's error.
	RenewFailed func(id clientv3.LeaseID, took time.Duration, err error)
}

// hookList has the hooks of each WithHooks.
type hookList []Hooks

// each calls event with the hooks of each option, in their order. It does so even if one of them panics or exits the
// goroutine.
func (list hookList) each(event func(Hooks)) {
	if len(list) > 0 {
		defer list[1:].each(event)
		event(list[0])
	}
}

// watchLeader reports whether somebody has to be told who leads.
func (list hookList) watchLeader() bool {
	return slices.ContainsFunc(list, func(h Hooks) bool { return h.LeaderChanged != nil })
}

func (list hookList) campaigning(election string) {
	list.each(func(h Hooks) {
		if h.Campaigning != nil {
			h.Campaigning(election)
		}
	})
}

func (list hookList) campaignFailed(election string, err error) {
	list.each(func(h Hooks) {
		if h.CampaignFailed != nil {
			h.CampaignFailed(election, err)
		}
	})
}

func (list hookList) elected(l *Leader, waited time.Duration) {
	list.each(func(h Hooks) {
		if h.Elected != nil {
			h.Elected(l.claim.election, l, waited)
		}
	})
}

func (list hookList) ended(l *Leader, cause error) {
	list.each(func(h Hooks) {
		if h.Ended != nil {
			h.Ended(l.claim.election, l, cause)
		}
	})
}

func (list hookList) overdue(l *Leader, late time.Duration) {
	list.each(func(h Hooks) {
		if h.Overdue != nil {
			h.Overdue(l.claim.election, l, late)
		}
	})
}

func (list hookList) leaderChanged(election string, leader Candidate) {
	list.each(func(h Hooks) {
		if h.LeaderChanged != nil {
			h.LeaderChanged(election, leader)
		}
	})
}

func (list hookList) renewed(id clientv3.LeaseID, took time.Duration, deadline time.Time) {
	list.each(func(h Hooks) {
		if h.Renewed != nil {
			h.Renewed(id, took, deadline)
		}
	})
}

func (list hookList) renewFailed(id clientv3.LeaseID, took time.Duration, err error) {
	list.each(func(h Hooks) {
		if h.RenewFailed != nil {
			h.RenewFailed(id, took, err)
		}
	})
}

// healthMargin is how long before a TTL has passed a check that has succeeded does not hold any more.
func (o *options) healthMargin() time.Duration { return cmp.Or(o.margin, o.ttl/5) }

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

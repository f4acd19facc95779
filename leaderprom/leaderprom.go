// Package leaderprom exports the state of elections to Prometheus: who leads, how long the term still holds, how terms
// begin and end, and how renewals of the lease go. [New] makes a Collector. Give its Hooks to your Electors.
//
// For each election in which this process has campaigned, with the label election:
//
//	leader_is_leader                    1 while this process leads, else 0
//	leader_token                        fencing token of the term while this process leads, else 0
//	leader_deadline_seconds             time left until the term's deadline, unless it is renewed; 0 while not leading
//	leader_overdue_seconds              for how long the function that leads has ignored the end of its context, else 0
//	leader_terms_total                  terms that have begun
//	leader_term_ends_total              terms that have ended, by reason
//	leader_campaign_duration_seconds    histogram: how long campaigns took until they were won
//
// For the leases, without that label, because all elections of an Elector share one lease:
//
//	leader_renewal_duration_seconds     histogram: how long renewals took until they counted
//	leader_renewal_failures_total       attempts that failed, by reason
//
// The reasons why a term ends are
//
//	resigned    Resign, Close or the end of Run
//	transferred Transfer asked the leader to step back
//	unhealthy   the check of WithHealth has not succeeded for too long
//	expired     the lease could not be renewed in time
//	evicted     somebody else deleted the key or revoked the lease
//
// The reasons why an attempt to renew fails are
//
//	refused            etcd answered, but its own leader changed meanwhile: leader.ErrRefused
//	timeout            no answer in time, or none before the lease's deadline
//	unavailable        the client has no connection to etcd, or etcd says that it has no leader
//	lease_not_found    the lease was revoked
//	permission_denied  etcd does not allow it, or does not accept the client's user or token
//	other              none of these
//
// A client has no connection if the port refuses it, the host name is unknown or the certificate comes from an unknown
// authority, for example. If the connection is open and etcd does not answer on it, the reason is timeout. It is also
// timeout, with or without a connection, for an attempt that the lease's deadline ends.
//
// Each scrape asks the term whether this process leads. So no scrape returns 1, or the term's token, after the term has
// ended. But what Prometheus has stored is as old as the last scrape: do not let it decide who may work.
//
// To count the terms of an election, use both leader_token and leader_terms_total, because each misses some.
// leader_terms_total starts at 0 with the process, so Prometheus does not see a term that begins before the process's
// first scrape: a process that is elected, exits and is started again shows 1 forever. leader_token differs in every
// term, whichever process leads, but a term leaves no trace if there is no scrape during it. This counts the tokens
// that scrapes have seen; "> 0" leaves out the times without a leader:
//
//	changes(max by (job, election) (leader_token > 0)[10m:15s])
//
// Every series exists before the first event that it counts: those of an election from its first campaign, those of the
// leases from the start. None is dropped later, because a counter must not start again. So there are as many as the
// elections in which the process has ever campaigned. There is no metric for the number of candidates of an election:
// every scrape would have to ask etcd, in every process. Call [leader.Elector.Candidates] where you need it.
//
// The files alerts.yml and dashboard.json in this folder are alert rules and a Grafana dashboard.
package leaderprom

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"example.com/leader"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A Collector is a [prometheus.Collector] of the metrics of this package, for one process and any number of Electors.
// It tells elections apart by name alone. If two Electors campaign in the same election, their counts add up,
// leader_is_leader says whether either leads, and leader_token is the larger token. If Electors use different etcds,
// give each etcd a Collector of its own, and register it through [prometheus.WrapRegistererWith] with a label that
// names the etcd.
//
// A Collector is safe for concurrent use.
type Collector struct {
	isLeader  *prometheus.Desc
	token     *prometheus.Desc
	remaining *prometheus.Desc
	overdue   *prometheus.Desc
	terms     *prometheus.CounterVec
	ends      *prometheus.CounterVec
	campaigns *prometheus.HistogramVec
	renewals  prometheus.Histogram
	failures  *prometheus.CounterVec

	mu        sync.Mutex
	elections map[string]map[*leader.Leader]struct{}  // terms that have not ended; no election is removed
	late      map[string]map[*leader.Leader]time.Time // since when work is overdue, by the term that it belongs to
}

// Why a term ended, for leader_term_ends_total.
var endReasons = []struct {
	reason string
	cause  error
}{
	{"unhealthy", leader.ErrUnhealthy}, // first: it may wrap the end of another term
	{"resigned", leader.ErrResigned},
	{"transferred", leader.ErrTransferred},
	{"expired", leader.ErrExpired},
	{"evicted", leader.ErrEvicted},
}

// Why a renewal failed, for leader_renewal_failures_total.
const (
	refused          = "refused"
	timeout          = "timeout"
	unavailable      = "unavailable"
	leaseNotFound    = "lease_not_found"
	permissionDenied = "permission_denied"
	other            = "other"
)

var failureReasons = []string{refused, timeout, unavailable, leaseNotFound, permissionDenied, other}

// New returns a Collector that has seen nothing yet. Register it with Prometheus, and give its [Collector.Hooks] to the
// Electors. A registry takes one Collector, or several under different labels.
func New() *Collector {
	c := &Collector{
		isLeader: prometheus.NewDesc("leader_is_leader",
			"Whether this process leads the election (1) or not (0), checked at each scrape.", []string{"election"}, nil),
		token: prometheus.NewDesc("leader_token",
			"Fencing token of this process's term, checked at each scrape; 0 while it does not lead.", []string{"election"}, nil),
		remaining: prometheus.NewDesc("leader_deadline_seconds",
			"Time until the deadline of this process's term, which each renewal moves; 0 while it does not lead.", []string{"election"}, nil),
		overdue: prometheus.NewDesc("leader_overdue_seconds",
			"How long ago the context of the function that leads ended, if the function has not returned a margin later; else 0.", []string{"election"}, nil),
		terms: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "leader_terms_total",
			Help: "Terms of this process that have begun.",
		}, []string{"election"}),
		ends: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "leader_term_ends_total",
			Help: "Terms of this process that have ended, by reason.",
		}, []string{"election", "reason"}),
		campaigns: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "leader_campaign_duration_seconds",
			Help: "How long the campaigns took that this process won.",
			// Milliseconds if nobody led, a TTL after a crash, otherwise as long as others led.
			Buckets: []float64{.001, .01, .1, 1, 5, 15, 60, 300, 1800, 2 * 3600, 12 * 3600, 48 * 3600},
		}, []string{"election"}),
		renewals: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "leader_renewal_duration_seconds",
			Help: "How long the renewals of a lease took that counted.",
			// Usually milliseconds. After some seconds the next attempt begins.
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "leader_renewal_failures_total",
			Help: "Attempts to renew a lease that failed, by reason.",
		}, []string{"reason"}),
		elections: make(map[string]map[*leader.Leader]struct{}),
		late:      make(map[string]map[*leader.Leader]time.Time),
	}
	for _, reason := range failureReasons {
		c.failures.WithLabelValues(reason)
	}
	return c
}

// Hooks returns the hooks that feed the Collector. Pass them to [leader.WithHooks], for any number of Electors, and
// your own hooks to another WithHooks. The hooks return at once. They do not include LeaderChanged, which would cost a
// watch.
func (c *Collector) Hooks() leader.Hooks {
	return leader.Hooks{
		Campaigning: c.campaigning,
		Elected:     c.elected,
		Ended:       c.ended,
		Overdue:     c.workOverdue,
		Renewed: func(_ clientv3.LeaseID, took time.Duration, _ time.Time) {
			c.renewals.Observe(took.Seconds())
		},
		RenewFailed: func(_ clientv3.LeaseID, _ time.Duration, err error) {
			c.failures.WithLabelValues(failureReason(err)).Inc()
		},
	}
}

// campaigning creates the series of the election, unless they exist.
func (c *Collector) campaigning(election string) {
	election = label(election)
	c.terms.WithLabelValues(election)
	for _, end := range endReasons {
		c.ends.WithLabelValues(election, end.reason)
	}
	c.campaigns.WithLabelValues(election)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.elections[election] == nil {
		c.elections[election] = make(map[*leader.Leader]struct{})
	}
}

func (c *Collector) elected(election string, l *leader.Leader, waited time.Duration) {
	election = label(election)
	c.terms.WithLabelValues(election).Inc()
	c.campaigns.WithLabelValues(election).Observe(waited.Seconds())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.elections[election][l] = struct{}{}
}

func (c *Collector) ended(election string, l *leader.Leader, cause error) {
	election = label(election)
	for _, end := range endReasons {
		if errors.Is(cause, end.cause) {
			c.ends.WithLabelValues(election, end.reason).Inc()
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.elections[election], l)
}

func (c *Collector) workOverdue(election string, l *leader.Leader, late time.Duration) {
	election = label(election)
	c.mu.Lock()
	defer c.mu.Unlock()
	if late == 0 {
		delete(c.late[election], l)
		return
	}
	if c.late[election] == nil {
		c.late[election] = make(map[*leader.Leader]time.Time)
	}
	c.late[election][l] = time.Now().Add(-late)
}

// longest is for how long work in the election is overdue.
func (c *Collector) longest(election string) (late time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, since := range c.late[election] {
		late = max(late, time.Since(since))
	}
	return late
}

// Describe implements [prometheus.Collector].
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.isLeader
	ch <- c.token
	ch <- c.remaining
	ch <- c.overdue
	c.terms.Describe(ch)
	c.ends.Describe(ch)
	c.campaigns.Describe(ch)
	c.renewals.Describe(ch)
	c.failures.Describe(ch)
}

// Collect implements [prometheus.Collector]. It sends no request to etcd.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	for election, terms := range c.snapshot() {
		var leads, token, remaining float64
		for _, l := range terms {
			if l.IsLeader() {
				leads = 1
				token = max(token, float64(l.Token()))
				remaining = max(remaining, time.Until(l.Deadline()).Seconds())
			}
		}
		ch <- prometheus.MustNewConstMetric(c.isLeader, prometheus.GaugeValue, leads, election)
		ch <- prometheus.MustNewConstMetric(c.token, prometheus.GaugeValue, token, election)
		ch <- prometheus.MustNewConstMetric(c.remaining, prometheus.GaugeValue, remaining, election)
		ch <- prometheus.MustNewConstMetric(c.overdue, prometheus.GaugeValue, c.longest(election).Seconds(), election)
	}
	c.terms.Collect(ch)
	c.ends.Collect(ch)
	c.campaigns.Collect(ch)
	c.renewals.Collect(ch)
	c.failures.Collect(ch)
}

// snapshot returns the terms that have not ended, by election. Collect asks them without holding c.mu, because a term
// has its own locks.
func (c *Collector) snapshot() map[string][]*leader.Leader {
	c.mu.Lock()
	defer c.mu.Unlock()
	terms := make(map[string][]*leader.Leader, len(c.elections))
	for election, ls := range c.elections {
		terms[election] = slices.Collect(maps.Keys(ls))
	}
	return terms
}

// label is the election's name as the value of a label. etcd allows any bytes in a name. Prometheus requires UTF-8, and
// its client panics at anything else.
func label(election string) string { return strings.ToValidUTF8(election, "\uFFFD") }

// failureReason returns why an attempt to renew failed: one of failureReasons.
func failureReason(err error) string {
	switch {
	case errors.Is(err, leader.ErrRefused):
		return refused
	case errors.Is(err, leader.ErrEvicted):
		return leaseNotFound
	case errors.Is(err, leader.ErrExpired):
		return timeout // the lease's deadline ended the attempt
	}
	for _, denied := range []error{rpctypes.ErrAuthFailed, rpctypes.ErrUserEmpty} { // of the code for bad requests
		if errors.Is(err, denied) {
			return permissionDenied
		}
	}
	code := status.Code(err)
	var etcd rpctypes.EtcdError
	if errors.As(err, &etcd) {
		code = etcd.Code()
	}
	switch code {
	case codes.Unavailable: // first: without a connection the answer is also late, and the error matches both
		return unavailable
	case codes.DeadlineExceeded, codes.Canceled:
		return timeout
	case codes.NotFound: // only a lease can be missing
		return leaseNotFound
	case codes.PermissionDenied, codes.Unauthenticated:
		return permissionDenied
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return timeout
	}
	return other
}

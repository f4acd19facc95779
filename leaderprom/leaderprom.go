// Package leaderprom tells Prometheus of elections: who leads and for how long still, how terms
// begin and end, and how the lease behind them fares. [New] makes a Collector; its Hooks feed it.
//
// About each election in which this process has campaigned, with the label election:
//
//	leader_is_leader                    1 while this process leads, else 0
//	leader_token                        fencing token of the term while this process leads, else 0
//	leader_deadline_seconds             time left until the term's deadline, unless it is renewed; 0 for no term
//	leader_terms_total                  terms that have begun
//	leader_term_ends_total              terms that have ended, by reason
//	leader_campaign_duration_seconds    histogram: how long the campaigns took that were won
//
// About the leases, without that label, since all elections of an Elector share one:
//
//	leader_renewal_duration_seconds     histogram: how long the renewals took that counted
//	leader_renewal_failures_total       attempts that failed, by reason
//
// A term's reason is
//
//	resigned    Resign, Close or the end of Run
//	expired     the lease could not be renewed in time
//	evicted     somebody else deleted the key or revoked the lease
//
// and that of a failed attempt to renew
//
//	refused            etcd answered it but changed its own leader: leader.ErrRefused
//	timeout            no answer in time, or none before the lease's deadline
//	unavailable        etcd is out of reach, or says that it has no leader
//	lease_not_found    the lease was revoked
//	permission_denied  etcd does not allow it, or does not know who asks
//	other              none of these
//
// Whether this process leads is asked of the term at every scrape, not remembered, so that no scrape
// says 1, or names the term's token, after the term is over. What Prometheus stores is as old as the last scrape all the same:
// it is for people to look at, not for deciding who may work.
//
// To count the terms of an election, use both leader_token and leader_terms_total, since each misses
// some. leader_terms_total starts at 0 with the process, so Prometheus does not see a term that begins
// before the process's first scrape: a process that is elected, exits and is started again shows 1 for
// ever. leader_token differs in every term, whichever process leads, but a term that no scrape falls
// into leaves no trace. This counts the tokens that scrapes have seen; "> 0" leaves out the times
// without a leader:
//
//	changes(max by (job, election) (leader_token > 0)[10m:15s])
//
// Every series is there before the first event that it counts: those of an election with its first
// campaign, those of the leases from the start. None is dropped later, since a counter must not
// start anew, so there are as many as elections that the process has ever campaigned in. How many
// candidates an election has is not told: every scrape would have to ask etcd, in every process.
// [leader.Elector.Candidates] does so where it is wanted.
//
// Next to this file are alert rules (alerts.yml) and a Grafana dashboard (dashboard.json).
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
	"example.com/leader/internal/lease"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A Collector is a [prometheus.Collector] of the metrics of this package, for one process and any
// number of Electors. Elections are told apart by name alone: where two Electors campaign in the
// same one, counts add up, leader_is_leader says whether either leads, and leader_token is the larger one. Electors on different
// etcds are better given a Collector each, registered with [prometheus.WrapRegistererWith] and a
// label that tells the etcds apart.
//
// A Collector is safe for concurrent use.
type Collector struct {
	isLeader  *prometheus.Desc
	token     *prometheus.Desc
	remaining *prometheus.Desc
	terms     *prometheus.CounterVec
	ends      *prometheus.CounterVec
	campaigns *prometheus.HistogramVec
	renewals  prometheus.Histogram
	failures  *prometheus.CounterVec

	mu        sync.Mutex
	elections map[string]map[*leader.Leader]struct{} // terms that have not ended; an election without one stays
}

// Why a term ended, for leader_term_ends_total.
var endReasons = []struct {
	reason string
	cause  error
}{
	{"resigned", leader.ErrResigned},
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

// New returns a Collector that has seen nothing yet. It is to be registered with Prometheus, and its
// [Collector.Hooks] are to be given to the Electors. A registry takes one Collector, or several under
// different labels.
func New() *Collector {
	c := &Collector{
		isLeader: prometheus.NewDesc("leader_is_leader",
			"Whether this process leads the election (1) or not (0), asked at the scrape.", []string{"election"}, nil),
		token: prometheus.NewDesc("leader_token",
			"Fencing token of this process's term, asked at the scrape; 0 while it does not lead.", []string{"election"}, nil),
		remaining: prometheus.NewDesc("leader_deadline_seconds",
			"Time until the deadline of this process's term, unless the lease is renewed; 0 while it does not lead.", []string{"election"}, nil),
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
			Help: "How long campaigns took that this process won.",
			// Milliseconds where nobody led, a TTL after a crash, and else as long as others led.
			Buckets: []float64{.001, .01, .1, 1, 5, 15, 60, 300, 1800, 2 * 3600, 12 * 3600, 48 * 3600},
		}, []string{"election"}),
		renewals: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "leader_renewal_duration_seconds",
			Help: "How long renewals of a lease took that counted.",
			// Milliseconds as a rule; later than some seconds another attempt is made.
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "leader_renewal_failures_total",
			Help: "Attempts to renew a lease that failed, by reason.",
		}, []string{"reason"}),
		elections: make(map[string]map[*leader.Leader]struct{}),
	}
	for _, reason := range failureReasons {
		c.failures.WithLabelValues(reason)
	}
	return c
}

// Hooks returns what feeds the Collector, for [leader.WithHooks] of any number of Electors. Hooks of
// your own go into another WithHooks. The hooks return at once, and do not ask for a watch.
func (c *Collector) Hooks() leader.Hooks {
	return leader.Hooks{
		Campaigning: c.campaigning,
		Elected:     c.elected,
		Ended:       c.ended,
		Renewed: func(_ clientv3.LeaseID, took time.Duration, _ time.Time) {
			c.renewals.Observe(took.Seconds())
		},
		RenewFailed: func(_ clientv3.LeaseID, _ time.Duration, err error) {
			c.failures.WithLabelValues(failureReason(err)).Inc()
		},
	}
}

// campaigning makes the series of the election, unless they are there.
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
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.elections[election], l)
}

// Describe implements [prometheus.Collector].
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.isLeader
	ch <- c.token
	ch <- c.remaining
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
	}
	c.terms.Collect(ch)
	c.ends.Collect(ch)
	c.campaigns.Collect(ch)
	c.renewals.Collect(ch)
	c.failures.Collect(ch)
}

// snapshot returns the terms that have not ended, by election, for Collect to ask without c.mu: a term
// has locks of its own.
func (c *Collector) snapshot() map[string][]*leader.Leader {
	c.mu.Lock()
	defer c.mu.Unlock()
	terms := make(map[string][]*leader.Leader, len(c.elections))
	for election, ls := range c.elections {
		terms[election] = slices.Collect(maps.Keys(ls))
	}
	return terms
}

// label is the election's name as a label's value: etcd takes any bytes for a name, while Prometheus
// wants UTF-8 and its client panics at anything else.
func label(election string) string { return strings.ToValidUTF8(election, "\uFFFD") }

// failureReason tells why an attempt to renew failed: one of failureReasons.
func failureReason(err error) string {
	switch {
	case errors.Is(err, leader.ErrRefused):
		return refused
	case errors.Is(err, lease.ErrExpired), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return timeout // an attempt is cancelled by the lease's deadline
	case errors.Is(err, lease.ErrRevoked):
		return leaseNotFound
	}
	code := status.Code(err)
	var etcd rpctypes.EtcdError
	if errors.As(err, &etcd) {
		code = etcd.Code()
	}
	switch code {
	case codes.DeadlineExceeded, codes.Canceled:
		return timeout
	case codes.Unavailable:
		return unavailable
	case codes.NotFound: // a lease is all that is asked for
		return leaseNotFound
	case codes.PermissionDenied, codes.Unauthenticated:
		return permissionDenied
	}
	return other
}

// Package alertstest checks the alert rules and the dashboard of leaderprom with Prometheus' own
// evaluation. It is a module of its own, so that nobody who imports the library gets to see
// Prometheus among its requirements.
//
// The files that it checks are outside this module, where go test does not look for changes: after one
// it must be run with -count=1.
package alertstest

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/rules"
	"github.com/prometheus/prometheus/util/teststorage"
)

const alertsFile = "../alerts.yml"

// interval is that of scrapes and of evaluations.
const interval = 15 * time.Second

// A scenario is what Prometheus has scraped, and the alerts that must fire for it and no others.
type scenario struct {
	name   string
	series string // a line each, in the notation of promtool's unit tests, from minute 0 on
	lasts  time.Duration
	fires  []string
}

var scenarios = []scenario{
	{
		name:  "one leads, one waits, one is in no election",
		lasts: 30 * time.Minute,
		series: `
			leader_is_leader{job="batch", instance="a", election="jobs"} 1x120
			leader_is_leader{job="batch", instance="b", election="jobs"} 0x120
			leader_token{job="batch", instance="a", election="jobs"} 5x120
			leader_token{job="batch", instance="b", election="jobs"} 0x120
			leader_deadline_seconds{job="batch", instance="a", election="jobs"} 11x120
			leader_deadline_seconds{job="batch", instance="b", election="jobs"} 0x120
			leader_terms_total{job="batch", instance="a", election="jobs"} 1x120
			leader_terms_total{job="batch", instance="b", election="jobs"} 0x120
			leader_term_ends_total{job="batch", instance="a", election="jobs", reason="expired"} 0x120
			leader_term_ends_total{job="batch", instance="b", election="jobs", reason="expired"} 0x120
			leader_campaign_duration_seconds_bucket{job="batch", instance="a", election="jobs", le="0.01"} 0 1x119
			leader_campaign_duration_seconds_bucket{job="batch", instance="a", election="jobs", le="+Inf"} 0 1x119
			leader_renewal_duration_seconds_count{job="batch", instance="a"} 0+3x120
			leader_renewal_duration_seconds_count{job="batch", instance="b"} 0+3x120
			leader_renewal_duration_seconds_count{job="batch", instance="c"} 0x120
			leader_renewal_duration_seconds_bucket{job="batch", instance="a", le="0.005"} 0+2x120
			leader_renewal_duration_seconds_bucket{job="batch", instance="a", le="+Inf"} 0+3x120
			leader_renewal_failures_total{job="batch", instance="a", reason="refused"} 0x120
			leader_renewal_failures_total{job="batch", instance="a", reason="timeout"} 0x120
			leader_renewal_failures_total{job="batch", instance="b", reason="timeout"} 0x120
			leader_renewal_failures_total{job="batch", instance="c", reason="timeout"} 0x120
		`,
	},
	{
		name:  "the leader crashes and the next one leads when the lease has expired",
		lasts: 10 * time.Minute,
		series: `
			leader_is_leader{job="batch", instance="a", election="jobs"} 1x3 stale
			leader_is_leader{job="batch", instance="b", election="jobs"} 0x5 1x34
		`,
	},
	{
		name:  "the leader crashes and nobody leads for two minutes",
		lasts: 10 * time.Minute,
		series: `
			leader_is_leader{job="batch", instance="a", election="jobs"} 1x3 stale
			leader_is_leader{job="batch", instance="b", election="jobs"} 0x11 1x28
			leader_is_leader{job="batch", instance="b", election="mail"} 1x40
		`,
		fires: []string{`LeaderMissing{election="jobs", job="batch"} from 1m30s to 3m0s`},
	},
	{
		name:  "a handover looks like two leaders, and the next like none",
		lasts: 10 * time.Minute,
		series: `
			leader_is_leader{job="batch", instance="a", election="jobs"} 1x10 0x9 1x19
			leader_is_leader{job="batch", instance="b", election="jobs"} 0x9 1x9 0x20
		`,
	},
	{
		name:  "two lead, on different etcds",
		lasts: 10 * time.Minute,
		series: `
			leader_is_leader{job="batch", instance="a", election="jobs"} 1x40
			leader_is_leader{job="batch", instance="b", election="jobs"} 0x3 1x36
		`,
		fires: []string{`LeaderNotUnique{election="jobs", job="batch"} from 3m0s on`},
	},
	{
		name:  "two jobs have elections of the same name",
		lasts: 10 * time.Minute,
		series: `
			leader_is_leader{job="batch", instance="a", election="leader"} 1x40
			leader_is_leader{job="mail", instance="a", election="leader"} 1x40
		`,
	},
	{
		name:  "renewals are refused as etcd changes its leader",
		lasts: 30 * time.Minute,
		series: `
			leader_renewal_duration_seconds_count{job="batch", instance="a"} 0+3x120
			leader_renewal_duration_seconds_count{job="batch", instance="b"} 0+3x120
			leader_renewal_failures_total{job="batch", instance="a", reason="refused"} 0x19 1x99
			leader_renewal_failures_total{job="batch", instance="b", reason="refused"} 0x19 1x99
		`,
	},
	{
		name:  "renewals are refused now here and now there, for etcd goes on to change its leader",
		lasts: 30 * time.Minute,
		series: `
			leader_renewal_duration_seconds_count{job="batch", instance="a"} 0+3x120
			leader_renewal_duration_seconds_count{job="batch", instance="b"} 0+3x120
			leader_renewal_failures_total{job="batch", instance="a", reason="refused"} 0x19 1x31 2x31 3x35
			leader_renewal_failures_total{job="batch", instance="b", reason="refused"} 0x35 1x31 2x50
		`,
		fires: []string{`LeaderRenewalsRefused{job="batch"} from 15m0s to 25m45s`},
	},
	{
		name:  "an outage of etcd costs a lease less than its TTL",
		lasts: 30 * time.Minute,
		series: `
			leader_renewal_duration_seconds_count{job="batch", instance="a"} 0+3x60 180+3x59
			leader_renewal_failures_total{job="batch", instance="a", reason="timeout"} 0x60 4x59
			leader_renewal_failures_total{job="batch", instance="a", reason="unavailable"} 0x60 1x59
		`,
	},
	{
		name:  "every other attempt of one process to renew goes to an endpoint out of reach",
		lasts: 30 * time.Minute,
		series: `
			leader_renewal_duration_seconds_count{job="batch", instance="a"} 0+3x120
			leader_renewal_duration_seconds_count{job="batch", instance="b"} 0+3x120
			leader_renewal_failures_total{job="batch", instance="a", reason="timeout"} 0+2x120
			leader_renewal_failures_total{job="batch", instance="a", reason="unavailable"} 0+1x120
			leader_renewal_failures_total{job="batch", instance="b", reason="timeout"} 0x120
			leader_renewal_failures_total{job="batch", instance="b", reason="unavailable"} 0x120
		`,
		fires: []string{`LeaderRenewalsFailing{instance="a", job="batch"} from 5m15s on`},
	},
	{
		name:  "work ignores the end of its term, and later that of Run's context",
		lasts: 10 * time.Minute,
		series: `
			leader_is_leader{job="batch", instance="a", election="jobs"} 1x7 0x3 1x20
			leader_is_leader{job="batch", instance="b", election="jobs"} 0x7 1x3 0x20
			leader_overdue_seconds{job="batch", instance="a", election="jobs"} 0x7 3+15x3 0x4 5+15x3 0x5
			leader_overdue_seconds{job="batch", instance="b", election="jobs"} 0x30
		`,
		fires: []string{`LeaderWorkOverdue{election="jobs", instance="a", job="batch"} from 2m0s to 3m0s`},
	},
	{
		name:  "no lease can be renewed at all",
		lasts: 30 * time.Minute,
		series: `
			leader_renewal_duration_seconds_count{job="batch", instance="a"} 0x120
			leader_renewal_failures_total{job="batch", instance="a", reason="permission_denied"} 0+4x120
		`,
		fires: []string{`LeaderRenewalsFailing{instance="a", job="batch"} from 5m15s on`},
	},
	{
		name:  "a rolling update elects five times",
		lasts: 40 * time.Minute,
		series: `
			leader_terms_total{job="batch", instance="a", election="jobs"} 1x9 stale
			leader_terms_total{job="batch", instance="b", election="jobs"} 0x11 1x3 stale
			leader_terms_total{job="batch", instance="c", election="jobs"} 0x15 1x3 stale
			leader_terms_total{job="batch", instance="d", election="jobs"} _x11 0x6 1x3 stale
			leader_terms_total{job="batch", instance="e", election="jobs"} _x15 0x6 1x3 stale
			leader_terms_total{job="batch", instance="f", election="jobs"} _x19 0x6 1x120
			leader_token{job="batch", instance="a", election="jobs"} 5x9 stale
			leader_token{job="batch", instance="b", election="jobs"} 0x11 8x3 stale
			leader_token{job="batch", instance="c", election="jobs"} 0x15 11x3 stale
			leader_token{job="batch", instance="d", election="jobs"} _x11 0x6 14x3 stale
			leader_token{job="batch", instance="e", election="jobs"} _x15 0x6 17x3 stale
			leader_token{job="batch", instance="f", election="jobs"} _x19 0x6 20x120
		`,
	},
	{
		name:  "a leader crashes every four minutes, and nobody leads until it is back",
		lasts: 40 * time.Minute,
		series: `
			leader_token{job="batch", instance="a", election="jobs"} 5x36` + lives(10, 8, 3, "%dx12 stale _ _") + `
			leader_token{job="batch", instance="b", election="jobs"} 0x160
		`,
	},
	{
		name:  "a process exits two minutes after it is elected, is started again, and is elected before it is scraped",
		lasts: 40 * time.Minute,
		series: `
			leader_terms_total{job="batch", instance="a", election="jobs"} 1x159
			leader_token{job="batch", instance="a", election="jobs"} 5x39` + turns(8, 3) + `
			leader_token{job="batch", instance="b", election="jobs"} 0x159
			leader_token{job="batch", instance="b", election="mail"} 4x159
		`,
		fires: []string{`LeaderFlapping{election="jobs", job="batch"} from 31m0s on`},
	},
	{
		name:  "two processes take turns: one is elected before it is scraped, exits half a minute later, and is down for minutes",
		lasts: 40 * time.Minute,
		series: `
			leader_terms_total{job="batch", instance="a", election="jobs"} _x40` + lives(8, 1, 0, "_ %dx1 stale _x12") + `
			leader_terms_total{job="batch", instance="b", election="jobs"} _x48` + lives(8, 1, 0, "_ %dx1 stale _x12") + `
			leader_token{job="batch", instance="a", election="jobs"} _x40` + lives(8, 5, 6, "_ %dx1 stale _x12") + `
			leader_token{job="batch", instance="b", election="jobs"} _x48` + lives(8, 8, 6, "_ %dx1 stale _x12") + `
		`,
		fires: []string{`LeaderFlapping{election="jobs", job="batch"} from 33m15s on`},
	},
	{
		name:  "the work gives up again and again",
		lasts: 40 * time.Minute,
		series: `
			leader_terms_total{job="batch", instance="a", election="jobs"} 1x39` + turns(2, 1) + `
			leader_terms_total{job="batch", instance="b", election="jobs"} 0x37` + turns(1, 1) + `
			leader_terms_total{job="batch", instance="b", election="mail"} 1x160
		`,
		fires: []string{`LeaderFlapping{election="jobs", job="batch"} from 27m0s on`},
	},
}

// turns is a series that grows from n by step every two minutes, for half an hour.
func turns(n, step int) string { return lives(15, n, step, "%dx7") }

// lives is one life of a process after another: samples, with a value that grows from n by step.
func lives(times, n, step int, samples string) string {
	var s strings.Builder
	for i := range times {
		fmt.Fprintf(&s, " "+samples, n+i*step)
	}
	return s.String()
}

// storageOf holds what the scenario's scrapes found.
func storageOf(t *testing.T, s scenario) *teststorage.TestStorage {
	load := fmt.Sprintf("load %v\n", interval)
	for _, line := range seriesOf(s) {
		load += "  " + line + "\n"
	}
	return promqltest.LoadedStorage(t, load)
}

// seriesOf returns the lines of the scenario's series.
func seriesOf(s scenario) []string {
	var lines []string
	for line := range strings.Lines(s.series) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}

// query returns how to query the storage.
func query(t *testing.T, storage *teststorage.TestStorage) rules.QueryFunc {
	engine := promqltest.NewTestEngine(t, false, 5*time.Minute, promqltest.DefaultMaxSamplesPerQuery)
	return rules.EngineQueryFunc(engine, storage)
}

// alertingRules returns the rules as Prometheus loads them.
func alertingRules(t *testing.T) []*rules.AlertingRule {
	t.Helper()
	groups, errs := rules.NewManager(&rules.ManagerOptions{}).LoadGroups(interval, labels.EmptyLabels(), "", nil, false, alertsFile)
	for _, err := range errs {
		t.Fatal(err)
	}
	var all []*rules.AlertingRule
	for _, group := range groups {
		all = append(all, group.AlertingRules()...)
	}
	if len(all) == 0 {
		t.Fatal("there are no alerts")
	}
	return all
}

func TestAlertsFireForWhatTheyAreAboutAndNothingElse(t *testing.T) {
	fired := make(map[string]bool)
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			run := query(t, storageOf(t, s))
			var got []string
			for _, rule := range alertingRules(t) {
				for _, f := range firings(t, rule, run, s.lasts) {
					got = append(got, f)
					fired[rule.Name()] = true
				}
			}
			slices.Sort(got)
			if !slices.Equal(got, s.fires) {
				t.Errorf("what fires is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(s.fires, "\n"))
			}
		})
	}
	for _, rule := range alertingRules(t) {
		if !fired[rule.Name()] {
			t.Errorf("no scenario makes %s fire", rule.Name())
		}
	}
}

// firings evaluates a rule as Prometheus does and tells when it fires, and for what.
func firings(t *testing.T, rule *rules.AlertingRule, run rules.QueryFunc, lasts time.Duration) []string {
	t.Helper()
	since := make(map[string]time.Duration)
	var all []string
	for at := time.Duration(0); at <= lasts; at += interval {
		if _, err := rule.Eval(context.Background(), 0, time.Unix(0, 0).Add(at), run, &url.URL{}, 0); err != nil {
			t.Fatalf("%s: %v", rule.Name(), err)
		}
		now := make(map[string]bool)
		for _, alert := range rule.ActiveAlerts() {
			if alert.State != rules.StateFiring {
				continue
			}
			if alert.Labels.Get("severity") == "" {
				t.Errorf("%s has no severity", rule.Name())
			}
			for _, name := range []string{"summary", "description"} {
				if text := alert.Annotations.Get(name); text == "" || strings.Contains(text, "<error") || strings.Contains(text, "<no value>") || strings.Contains(text, "  ") {
					t.Errorf("the %s of %s is %q", name, rule.Name(), text)
				}
			}
			what := rule.Name() + labels.NewBuilder(alert.Labels).Del("alertname", "severity").Labels().String()
			now[what] = true
			if _, ok := since[what]; !ok {
				since[what] = at
			}
		}
		for what, from := range since {
			if !now[what] {
				all = append(all, fmt.Sprintf("%s from %v to %v", what, from, at))
				delete(since, what)
			}
		}
	}
	for what, from := range since {
		all = append(all, fmt.Sprintf("%s from %v on", what, from))
	}
	return all
}

package leaderprom_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"weak"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
	"example.com/leader/leaderprom"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// patience is how long a test waits for an event that must come.
const patience = etcdtest.Patience

func start(t *testing.T) (*etcdtest.Member, *clientv3.Client) {
	t.Helper()
	t.Parallel()
	m := etcdtest.Start(t)
	return m, etcdtest.NewClient(t, m.Endpoint)
}

// newElector returns an Elector that is closed with the test.
func newElector(t *testing.T, client *clientv3.Client, opts ...leader.Option) *leader.Elector {
	t.Helper()
	e, err := leader.New(client, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := e.Close(ctx); err != nil && !t.Failed() {
			t.Errorf("Close: %v", err)
		}
	})
	return e
}

// lead campaigns and must win.
func lead(t *testing.T, e *leader.Elector, name string) *leader.Leader {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := e.Campaign(ctx, name, "")
	if err != nil {
		t.Fatalf("Campaign: %v", err)
	}
	return l
}

func resign(t *testing.T, l *leader.Leader) {
	t.Helper()
	if err := l.Resign(t.Context()); err != nil {
		t.Fatalf("Resign: %v", err)
	}
}

// A scrape is what a Collector says, by series as Prometheus writes them; of a histogram the count.
type scrape map[string]float64

func scraped(t *testing.T, c *leaderprom.Collector) scrape {
	t.Helper()
	registry := prometheus.NewPedanticRegistry() // says where Describe and Collect disagree
	registry.MustRegister(c)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	s := make(scrape)
	for _, family := range families {
		for _, m := range family.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			name, value := family.GetName(), m.GetGauge().GetValue()+m.GetCounter().GetValue()
			if h := m.GetHistogram(); h != nil {
				name, value = name+"_count", float64(h.GetSampleCount())
			}
			if labels != nil {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			s[name] = value
		}
	}
	return s
}

// expect checks some series of a Collector. One that is missing is not taken for 0.
func expect(t *testing.T, c *leaderprom.Collector, want scrape) {
	t.Helper()
	got := scraped(t, c)
	for _, series := range slices.Sorted(maps.Keys(want)) {
		if value, ok := got[series]; !ok || value != want[series] {
			t.Errorf("%s is %v (there: %v), want %v", series, value, ok, want[series])
		}
	}
}

func TestSeriesAreThereBeforeWhatTheyCountAndStay(t *testing.T) {
	_, client := start(t)
	c := leaderprom.New()
	want := scrape{
		`leader_renewal_duration_seconds_count`:                     0,
		`leader_renewal_failures_total{reason="lease_not_found"}`:   0,
		`leader_renewal_failures_total{reason="other"}`:             0,
		`leader_renewal_failures_total{reason="permission_denied"}`: 0,
		`leader_renewal_failures_total{reason="refused"}`:           0,
		`leader_renewal_failures_total{reason="timeout"}`:           0,
		`leader_renewal_failures_total{reason="unavailable"}`:       0,
	}
	if got := scraped(t, c); !maps.Equal(got, want) {
		t.Errorf("at the start there are %v, want %v", got, want)
	}

	lead(t, newElector(t, client), "jobs")
	campaigning := make(chan struct{})
	e := newElector(t, client, leader.WithHooks(c.Hooks()), leader.WithHooks(leader.Hooks{
		Campaigning: func(string) { close(campaigning) },
	}))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	failed := make(chan error, 1)
	go func() {
		_, err := e.Campaign(ctx, "jobs", "")
		failed <- err
	}()
	etcdtest.Await(t, "the campaign", campaigning)
	maps.Copy(want, scrape{
		`leader_campaign_duration_seconds_count{election="jobs"}`:      0,
		`leader_is_leader{election="jobs"}`:                            0,
		`leader_term_ends_total{election="jobs",reason="evicted"}`:     0,
		`leader_term_ends_total{election="jobs",reason="expired"}`:     0,
		`leader_term_ends_total{election="jobs",reason="resigned"}`:    0,
		`leader_term_ends_total{election="jobs",reason="transferred"}`: 0,
		`leader_term_ends_total{election="jobs",reason="unhealthy"}`:   0,
		`leader_deadline_seconds{election="jobs"}`:                     0,
		`leader_overdue_seconds{election="jobs"}`:                      0,
		`leader_terms_total{election="jobs"}`:                          0,
		`leader_token{election="jobs"}`:                                0,
	})
	watched := func(s scrape) scrape { // without what may come while the candidate waits
		delete(s, `leader_renewal_duration_seconds_count`)
		return s
	}
	watched(want)
	if got := watched(scraped(t, c)); !maps.Equal(got, want) {
		t.Errorf("while it campaigns there are %v, want %v", got, want)
	}
	cancel()
	if err := etcdtest.Await(t, "the end of the campaign", failed); !errors.Is(err, context.Canceled) {
		t.Errorf("Campaign: %v", err)
	}
	if got := watched(scraped(t, c)); !maps.Equal(got, want) {
		t.Errorf("after the campaign there are %v, want %v", got, want)
	}
}

func TestTermIsToldFromItsBeginToItsResignation(t *testing.T) {
	_, client := start(t)
	c := leaderprom.New()
	e := newElector(t, client, leader.WithHooks(c.Hooks()))
	l := lead(t, e, "jobs")
	before, deadline := time.Now(), l.Deadline()
	remaining := scraped(t, c)[`leader_deadline_seconds{election="jobs"}`]
	least, most := time.Until(deadline).Seconds(), l.Deadline().Sub(before).Seconds() // a renewal moves the deadline
	if remaining < least || remaining > most {
		t.Errorf("%v s of the term are said to remain, want between %v and %v", remaining, least, most)
	}
	expect(t, c, scrape{
		`leader_is_leader{election="jobs"}`:                            1,
		`leader_token{election="jobs"}`:                                float64(l.Token()),
		`leader_terms_total{election="jobs"}`:                          1,
		`leader_campaign_duration_seconds_count{election="jobs"}`:      1,
		`leader_term_ends_total{election="jobs",reason="resigned"}`:    0,
		`leader_term_ends_total{election="jobs",reason="transferred"}`: 0,
		`leader_term_ends_total{election="jobs",reason="unhealthy"}`:   0,
	})
	resign(t, l)
	expect(t, c, scrape{
		`leader_is_leader{election="jobs"}`:                            0,
		`leader_token{election="jobs"}`:                                0,
		`leader_deadline_seconds{election="jobs"}`:                     0,
		`leader_overdue_seconds{election="jobs"}`:                      0,
		`leader_terms_total{election="jobs"}`:                          1,
		`leader_campaign_duration_seconds_count{election="jobs"}`:      1,
		`leader_term_ends_total{election="jobs",reason="resigned"}`:    1,
		`leader_term_ends_total{election="jobs",reason="transferred"}`: 0,
		`leader_term_ends_total{election="jobs",reason="unhealthy"}`:   0,
		`leader_term_ends_total{election="jobs",reason="expired"}`:     0,
		`leader_term_ends_total{election="jobs",reason="evicted"}`:     0,
	})
	jobs := lead(t, e, "jobs")
	mail := lead(t, e, "mail")
	expect(t, c, scrape{
		`leader_is_leader{election="jobs"}`:   1,
		`leader_token{election="jobs"}`:       float64(jobs.Token()),
		`leader_terms_total{election="jobs"}`: 2,
		`leader_is_leader{election="mail"}`:   1,
		`leader_token{election="mail"}`:       float64(mail.Token()),
		`leader_terms_total{election="mail"}`: 1,
	})
}

// endedHook tells of the end of terms. Given after a Collector's hooks, it does so after the Collector
// has been told.
func endedHook() (leader.Option, <-chan error) {
	ended := make(chan error, 100)
	return leader.WithHooks(leader.Hooks{Ended: func(_ string, _ *leader.Leader, cause error) { ended <- cause }}), ended
}

func TestEvictionIsTold(t *testing.T) {
	_, client := start(t)
	c := leaderprom.New()
	hook, ended := endedHook()
	e := newElector(t, client, leader.WithHooks(c.Hooks()), hook)
	lead(t, e, "jobs")
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	if cause := etcdtest.Await(t, "the end of the term", ended); !errors.Is(cause, leader.ErrEvicted) {
		t.Errorf("the term ended with %v", cause)
	}
	expect(t, c, scrape{
		`leader_is_leader{election="jobs"}`:                            0,
		`leader_term_ends_total{election="jobs",reason="evicted"}`:     1,
		`leader_term_ends_total{election="jobs",reason="resigned"}`:    0,
		`leader_term_ends_total{election="jobs",reason="transferred"}`: 0,
		`leader_term_ends_total{election="jobs",reason="unhealthy"}`:   0,
		`leader_term_ends_total{election="jobs",reason="expired"}`:     0,
	})
}

func TestRenewalsAreToldAndSoIsExpiryWithoutThem(t *testing.T) {
	m, _ := start(t)
	link := etcdtest.NewLink(t, m)
	c := leaderprom.New()
	hook, ended := endedHook()
	renewed := make(chan struct{}, 100)
	watch := leader.WithHooks(leader.Hooks{
		Renewed: func(clientv3.LeaseID, time.Duration, time.Time) { renewed <- struct{}{} },
	})
	e := newElector(t, etcdtest.NewClient(t, link.Endpoint), leader.WithTTL(2*time.Second), leader.WithHooks(c.Hooks()), hook, watch)
	lead(t, e, "jobs")
	etcdtest.Await(t, "a renewal", renewed)
	if n := scraped(t, c)["leader_renewal_duration_seconds_count"]; n < 1 {
		t.Errorf("%v renewals are told of after the first", n)
	}
	link.Darken()
	if cause := etcdtest.Await(t, "the end of the term", ended); !errors.Is(cause, leader.ErrExpired) {
		t.Errorf("the term ended with %v", cause)
	}
	expect(t, c, scrape{
		`leader_is_leader{election="jobs"}`:                            0,
		`leader_deadline_seconds{election="jobs"}`:                     0,
		`leader_overdue_seconds{election="jobs"}`:                      0,
		`leader_term_ends_total{election="jobs",reason="expired"}`:     1,
		`leader_term_ends_total{election="jobs",reason="resigned"}`:    0,
		`leader_term_ends_total{election="jobs",reason="transferred"}`: 0,
		`leader_term_ends_total{election="jobs",reason="unhealthy"}`:   0,
		`leader_term_ends_total{election="jobs",reason="evicted"}`:     0,
	})
	if n := scraped(t, c)[`leader_renewal_failures_total{reason="timeout"}`]; n < 1 {
		t.Errorf("%v renewals are told to have timed out", n)
	}
	link.Heal()
}

// A Collector hears last of the end of the term here, and must not need to have heard of it.
func TestNoScrapeSaysLeaderOnceTheTermIsOver(t *testing.T) {
	_, client := start(t)
	c := leaderprom.New()
	var over scrape
	e := newElector(t, client, leader.WithHooks(leader.Hooks{
		Ended: func(string, *leader.Leader, error) { over = scraped(t, c) },
	}), leader.WithHooks(c.Hooks()))
	resign(t, lead(t, e, "jobs"))
	for _, series := range []string{
		`leader_is_leader{election="jobs"}`, `leader_token{election="jobs"}`, `leader_deadline_seconds{election="jobs"}`,
	} {
		if value, ok := over[series]; !ok || value != 0 {
			t.Errorf("once the term is over %s is %v (there: %v), want 0", series, value, ok)
		}
	}
	if n := over[`leader_term_ends_total{election="jobs",reason="resigned"}`]; n != 0 {
		t.Error("the Collector has heard of the end before the scrape, which proves nothing then")
	}
}

// The first term is held on to in its end, so that the Collector has two of one election.
func TestTwoElectorsInOneElectionAddUp(t *testing.T) {
	_, client := start(t)
	c := leaderprom.New()
	release := make(chan struct{})
	first := newElector(t, client, leader.WithHooks(leader.Hooks{
		Ended: func(string, *leader.Leader, error) { <-release },
	}), leader.WithHooks(c.Hooks()))
	second := newElector(t, client, leader.WithHooks(c.Hooks()))
	l := lead(t, first, "jobs")
	if _, err := second.TryCampaign(t.Context(), "jobs", ""); !errors.Is(err, leader.ErrHeld) {
		t.Errorf("TryCampaign while another leads: %v", err)
	}
	expect(t, c, scrape{`leader_is_leader{election="jobs"}`: 1, `leader_terms_total{election="jobs"}`: 1})
	resigned := make(chan error, 1)
	go func() { resigned <- l.Resign(t.Context()) }()
	token := lead(t, second, "jobs").Token()
	for range 20 { // whichever of the terms is asked last
		expect(t, c, scrape{
			`leader_is_leader{election="jobs"}`:                       1,
			`leader_token{election="jobs"}`:                           float64(token),
			`leader_terms_total{election="jobs"}`:                     2,
			`leader_campaign_duration_seconds_count{election="jobs"}`: 2,
		})
		if n := scraped(t, c)[`leader_deadline_seconds{election="jobs"}`]; n <= 0 {
			t.Errorf("%v s of the second term are said to remain", n)
		}
	}
	close(release)
	if err := etcdtest.Await(t, "Resign", resigned); err != nil {
		t.Errorf("Resign: %v", err)
	}
	expect(t, c, scrape{
		`leader_is_leader{election="jobs"}`:                            1,
		`leader_term_ends_total{election="jobs",reason="resigned"}`:    1,
		`leader_term_ends_total{election="jobs",reason="transferred"}`: 0,
		`leader_term_ends_total{election="jobs",reason="unhealthy"}`:   0,
	})
}

// On one etcd there is no second leader.
func TestIsLeaderIsOneAndTheTokenIsTheLargerOneWhereElectorsOnTwoEtcdsLead(t *testing.T) {
	_, client := start(t)
	c := leaderprom.New()
	other := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	first := lead(t, newElector(t, client, leader.WithHooks(c.Hooks())), "jobs")
	resign(t, lead(t, newElector(t, other), "jobs")) // so that the tokens differ
	second := lead(t, newElector(t, other, leader.WithHooks(c.Hooks())), "jobs")
	if second.Token() <= first.Token() {
		t.Fatalf("the tokens are %d and %d, want the second to be larger", first.Token(), second.Token())
	}
	for range 20 { // whichever of the terms is asked last
		expect(t, c, scrape{
			`leader_is_leader{election="jobs"}`:   1,
			`leader_token{election="jobs"}`:       float64(second.Token()),
			`leader_terms_total{election="jobs"}`: 2,
		})
	}
}

func TestFailedRenewalsAreToldByReason(t *testing.T) {
	for _, test := range []struct {
		err    error
		reason string
	}{
		{leader.ErrRefused, "refused"},
		{fmt.Errorf("renew: %w", leader.ErrRefused), "refused"},
		{context.DeadlineExceeded, "timeout"},
		{fmt.Errorf("renew: %w", context.DeadlineExceeded), "timeout"},
		{context.Canceled, "timeout"},
		{leader.ErrExpired, "timeout"},
		{status.Error(codes.DeadlineExceeded, ""), "timeout"},
		{status.Error(codes.Unavailable, "connection refused"), "unavailable"},
		{rpctypes.ErrNoLeader, "unavailable"},
		{fmt.Errorf("renew: %w", rpctypes.ErrNoLeader), "unavailable"},
		{rpctypes.ErrLeaseNotFound, "lease_not_found"},
		{rpctypes.ErrGRPCLeaseNotFound, "lease_not_found"},
		{fmt.Errorf("%w: lease revoked", leader.ErrEvicted), "lease_not_found"},
		{errors.Join(context.DeadlineExceeded, status.Error(codes.Unavailable, "connection refused")), "unavailable"},
		{rpctypes.ErrPermissionDenied, "permission_denied"},
		{rpctypes.ErrInvalidAuthToken, "permission_denied"},
		{rpctypes.ErrAuthFailed, "permission_denied"},
		{fmt.Errorf("the stream has ended: %w", status.Error(codes.Unavailable, "connection refused")), "unavailable"},
		{rpctypes.ErrNoSpace, "other"},
		{errors.New("of a kind that nobody knows"), "other"},
	} {
		c := leaderprom.New()
		before := scraped(t, c)
		c.Hooks().RenewFailed(1, time.Second, test.err)
		series := fmt.Sprintf("leader_renewal_failures_total{reason=%q}", test.reason)
		before[series]++
		if got := scraped(t, c); !maps.Equal(got, before) {
			t.Errorf("after %q: %v, want %s and nothing else", test.err, got, series)
		}
	}
}

func TestOverdueWorkIsShownUntilItReturns(t *testing.T) {
	c := leaderprom.New()
	hooks := c.Hooks()
	hooks.Campaigning("jobs")
	const series = `leader_overdue_seconds{election="jobs"}`
	first, second := new(leader.Leader), new(leader.Leader)
	hooks.Overdue("jobs", first, time.Minute)
	hooks.Overdue("jobs", second, time.Hour) // of another Elector
	if got := scraped(t, c)[series]; got < time.Hour.Seconds() {
		t.Errorf("%s is %v, want an hour", series, got)
	}
	hooks.Overdue("jobs", second, 0)
	if got := scraped(t, c)[series]; got < time.Minute.Seconds() || got >= time.Hour.Seconds() {
		t.Errorf("%s is %v, want a minute: one function has returned", series, got)
	}
	hooks.Overdue("jobs", first, 0)
	if got := scraped(t, c)[series]; got != 0 {
		t.Errorf("%s is %v, want 0: both functions have returned", series, got)
	}
}

// Users look at the reason to find out what is wrong, so that of an etcd that is out of reach must not be "other".
func TestRenewalsOfAClientThatCannotConnectAreUnavailable(t *testing.T) {
	m, _ := start(t)
	link := etcdtest.NewLink(t, m)
	c := leaderprom.New()
	e, err := leader.New(etcdtest.NewClient(t, link.Endpoint), leader.WithTTL(3*time.Second), leader.WithHooks(c.Hooks()))
	if err != nil {
		t.Fatal(err)
	}
	l, err := e.Campaign(t.Context(), "jobs", "")
	if err != nil {
		t.Fatal(err)
	}
	link.Cut()
	etcdtest.Await(t, "the end of the term", l.Context().Done())
	link.Heal()
	if err := e.Close(t.Context()); err != nil { // all has been told by then
		t.Error(err)
	}
	got := scraped(t, c)
	if n := got[`leader_renewal_failures_total{reason="unavailable"}`]; n == 0 {
		t.Errorf("no renewal has failed as etcd was out of reach: %v", got)
	}
	if n := got[`leader_renewal_failures_total{reason="other"}`]; n > 0 {
		t.Errorf("%v renewals have failed for no reason that is known", n)
	}
}

func TestTermIsForgottenOnceItHasEnded(t *testing.T) {
	_, client := start(t)
	c := leaderprom.New()
	e := newElector(t, client, leader.WithHooks(c.Hooks()))
	term := func() weak.Pointer[leader.Leader] {
		l := lead(t, e, "jobs")
		defer resign(t, l)
		return weak.Make(l)
	}()
	for began := time.Now(); term.Value() != nil; time.Sleep(10 * time.Millisecond) {
		runtime.GC()
		if time.Since(began) > patience {
			t.Fatal("a term that has ended is still held")
		}
	}
	runtime.KeepAlive(c)
}

// etcd takes any bytes for a name.
func TestElectionIsToldWhateverItsName(t *testing.T) {
	_, client := start(t)
	c := leaderprom.New()
	e := newElector(t, client, leader.WithHooks(c.Hooks()))
	resign(t, lead(t, e, "jobs/\xff"))
	expect(t, c, scrape{
		"leader_is_leader{election=\"jobs/\uFFFD\"}":                           0,
		"leader_terms_total{election=\"jobs/\uFFFD\"}":                         1,
		"leader_term_ends_total{election=\"jobs/\uFFFD\",reason=\"resigned\"}": 1,
	})
}

func TestHooksAskForNoWatch(t *testing.T) {
	if leaderprom.New().Hooks().LeaderChanged != nil {
		t.Error("LeaderChanged is set, which costs a watch in every process")
	}
}

func TestMetricsAreNamedAsPrometheusWantsThem(t *testing.T) {
	_, client := start(t)
	c := leaderprom.New()
	resign(t, lead(t, newElector(t, client, leader.WithHooks(c.Hooks())), "jobs"))
	problems, err := testutil.CollectAndLint(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestElectorsAndScrapesDoNotWaitForEachOther(t *testing.T) {
	_, client := start(t)
	c := leaderprom.New()
	const electors, terms = 4, 5
	var wg sync.WaitGroup
	for i := range electors {
		e := newElector(t, client, leader.WithHooks(c.Hooks()))
		for _, name := range []string{"shared", fmt.Sprint("own", i)} {
			wg.Go(func() {
				for range terms {
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					l, err := e.Campaign(ctx, name, "")
					if err == nil {
						err = l.Resign(ctx)
					}
					cancel()
					if err != nil {
						t.Errorf("a term of %s: %v", name, err)
						return
					}
				}
			})
		}
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for ended := false; !ended; {
		select {
		case <-done:
			ended = true
		default:
			scraped(t, c)
		}
	}
	want := scrape{
		`leader_is_leader{election="shared"}`:                         0,
		`leader_terms_total{election="shared"}`:                       electors * terms,
		`leader_term_ends_total{election="shared",reason="resigned"}`: electors * terms,
	}
	for i := range electors {
		want[fmt.Sprintf(`leader_terms_total{election="own%d"}`, i)] = terms
	}
	expect(t, c, want)
}

// The failure of a check may wrap the end of another term.
func TestATermThatWasUnhealthyIsCountedOnce(t *testing.T) {
	c := leaderprom.New()
	hooks := c.Hooks()
	hooks.Campaigning("jobs")
	hooks.Ended("jobs", new(leader.Leader), fmt.Errorf("%w: %w", leader.ErrUnhealthy, leader.ErrExpired))
	got := scraped(t, c)
	for _, reason := range []string{"resigned", "transferred", "unhealthy", "expired", "evicted"} {
		want := 0.0
		if reason == "unhealthy" {
			want = 1
		}
		if n := got[fmt.Sprintf("leader_term_ends_total{election=\"jobs\",reason=%q}", reason)]; n != want {
			t.Errorf("%v terms ended as %s, want %v", n, reason, want)
		}
	}
}

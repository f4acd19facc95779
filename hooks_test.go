package leader_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/leader"
	"example.com/leader/internal/etcdtest"
)

// The tests of this file are about what hooks and log tell. usercode_test.go is about hooks and log handlers that
// misbehave.

func TestHooksTellACampaignsAndATermsStory(t *testing.T) {
	_, client := start(t)
	story := make(chan string, 1000)
	tell := func(format string, args ...any) { story <- fmt.Sprintf(format, args...) }
	hooks := leader.Hooks{
		Campaigning:    func(election string) { tell("campaigning %s", election) },
		CampaignFailed: func(election string, err error) { tell("failed %s %v", election, errors.Is(err, context.Canceled)) },
		Elected: func(election string, l *leader.Leader, waited time.Duration) {
			tell("elected %s %v %v", election, l.IsLeader(), waited > 0)
		},
		Ended: func(election string, l *leader.Leader, cause error) {
			tell("ended %s %v %v", election, l.IsLeader(), cause)
		},
	}
	expect := func(want string) {
		t.Helper()
		if got := etcdtest.Await(t, want, story); got != want {
			t.Errorf("the hook said %q, want %q", got, want)
		}
	}
	e := newElector(t, client, leader.WithPrefix("svc"), leader.WithHooks(hooks))
	l := lead(t, e, "jobs", "")
	expect("campaigning svc/jobs")
	expect("elected svc/jobs true true")
	resign(t, l)
	expect("ended svc/jobs false " + leader.ErrResigned.Error())

	other := lead(t, newElector(t, client), "svc/jobs", "")
	ctx, cancel := context.WithCancel(t.Context())
	failing := campaign(ctx, e, "jobs", "")
	awaitQueue(t, client, "svc/jobs", queued(2))
	expect("campaigning svc/jobs")
	cancel()
	etcdtest.Await(t, "Campaign", failing)
	expect("failed svc/jobs true")
	resign(t, other)

	lead(t, e, "jobs", "")
	expect("campaigning svc/jobs")
	expect("elected svc/jobs true true")
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	if got := etcdtest.Await(t, "the end", story); !strings.HasPrefix(got, "ended svc/jobs false "+leader.ErrEvicted.Error()) {
		t.Errorf("the hook said %q", got)
	}
}

func TestLogTellsATermAndEachStreakOnce(t *testing.T) {
	_, client := start(t)
	var log logRecorder
	broken := wrapped(client)
	kv := &brokenKV{KV: client.KV}
	broken.KV = kv
	e := newElector(t, broken, leader.WithLogger(slog.New(&log)))
	resign(t, lead(t, e, "jobs", ""))
	lead(t, e, "jobs", "")
	if err := e.Evict(t.Context(), "jobs"); err != nil {
		t.Fatal(err)
	}
	log.await(t, "WARN lost")
	want := []string{"INFO elected", "INFO resigned", "INFO elected", "WARN lost"}
	if got := log.lines(); !slices.Equal(got, want) {
		t.Errorf("logged %q, want %q", got, want)
	}
	// Many failed attempts are one streak.
	kv.loseReplies(4)
	lead(t, e, "jobs", "")
	if got := log.lines()[len(want):]; !slices.Equal(got, []string{"WARN campaign is being retried", "INFO requests of the campaign work again", "INFO elected"}) {
		t.Errorf("a streak of failures was logged as %q", got)
	}
}

// Of an instance that does not work its log says why: it waits, and for whom.
func TestLogSaysThatACandidateWaitsAndForWhom(t *testing.T) {
	_, client := start(t)
	l := lead(t, newElector(t, client), "jobs", "first")
	next := campaign(t.Context(), newElector(t, client), "jobs", "second")
	awaitQueue(t, client, "jobs", queued(2))
	log := make(logChannel, 100)
	last := campaign(t.Context(), newElector(t, client, leader.WithLogger(slog.New(log))), "jobs", "third")
	r := awaitRecord(t, log, "joined the queue", last)
	if place, leads := attr(r, "place"), attr(r, "leader"); r.Level != slog.LevelInfo || place != "3" || leads != "first" {
		t.Errorf("logged at %v with place %s and leader %s, want INFO, 3 and first", r.Level, place, leads)
	}
	resign(t, l)
	resign(t, awaitLeader(t, next))
	resign(t, awaitLeader(t, last))
}

// Whoever reads of a lost term wants to know why the lease could not be renewed.
func TestLogSaysWhyRenewalsFailedAndThatTheyWorkAgain(t *testing.T) {
	m, direct := start(t)
	link := etcdtest.NewLink(t, m)
	var log logRecorder
	lost := make(chan string, 1)
	e := newElector(t, etcdtest.NewClient(t, link.Endpoint), leader.WithTTL(3*time.Second), leader.WithLogger(slog.New(teeHandler{&log, func(rec slog.Record, with []slog.Attr) {
		if rec.Message == "lost" {
			lost <- fmt.Sprint(with)
		}
	}, nil})))
	lead(t, e, "jobs", "")
	link.Cut()
	log.await(t, "WARN renewal of the lease is being retried")
	link.Heal()
	log.await(t, "INFO renewals of the lease work again")
	link.Darken() // the end of the term cuts the last attempt short
	if with := etcdtest.Await(t, "the loss", lost); !strings.Contains(with, "renewal=") || strings.Contains(with, "renewal=lease expired") {
		t.Errorf("lost was logged with %s, want the failure of the last renewal", with)
	}
	link.Heal()
	awaitExpiry(t, direct)
}

// A teeHandler passes records on, and tells of them with the attributes of their logger.
type teeHandler struct {
	slog.Handler
	tell func(slog.Record, []slog.Attr)
	with []slog.Attr
}

func (h teeHandler) WithAttrs(with []slog.Attr) slog.Handler {
	return teeHandler{h.Handler, h.tell, append(h.with[:len(h.with):len(h.with)], with...)}
}

func (h teeHandler) Handle(ctx context.Context, rec slog.Record) error {
	h.tell(rec, h.with)
	return h.Handler.Handle(ctx, rec)
}

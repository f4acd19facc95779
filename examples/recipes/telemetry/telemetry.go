// Package telemetry reports elections to OpenTelemetry: metrics, and a span for each term.
//
//	t, err := telemetry.New(otel.Meter("my-service"), otel.Tracer("my-service"))
//	err = leader.Run(ctx, client, "my-service/leader", "", work, leader.WithHooks(t.Hooks()))
package telemetry

import (
	"context"
	"errors"
	"sync"
	"time"

	"example.com/leader"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

var why = []error{leader.ErrResigned, leader.ErrTransferred, leader.ErrExpired, leader.ErrEvicted, leader.ErrUnhealthy}

// Telemetry has the instruments. One serves all Electors of a process, as long as no two are in the same election.
type Telemetry struct {
	tracer trace.Tracer
	waited metric.Float64Histogram
	ended  metric.Int64Counter

	mu sync.Mutex
	// By election, the terms that have not ended: none while this instance waits. The contexts have their spans.
	terms map[string]map[*leader.Leader]context.Context
}

// New makes the instruments.
func New(meter metric.Meter, tracer trace.Tracer) (*Telemetry, error) {
	t, errs := &Telemetry{tracer: tracer, terms: make(map[string]map[*leader.Leader]context.Context)}, [3]error{}
	t.waited, errs[0] = meter.Float64Histogram("leader.campaign.duration", metric.WithUnit("s"))
	t.ended, errs[1] = meter.Int64Counter("leader.terms.ended")
	_, errs[2] = meter.Int64ObservableGauge("leader.leading", metric.WithInt64Callback(t.observe))
	return t, errors.Join(errs[:]...)
}

// observe asks each term, whenever the gauge is read. A value set by a hook would be wrong for a moment after the
// process was paused.
func (t *Telemetry) observe(_ context.Context, o metric.Int64Observer) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for election, terms := range t.terms {
		leading := int64(0)
		for l := range terms {
			if l.IsLeader() {
				leading = 1
			}
		}
		o.Observe(leading, metric.WithAttributes(attribute.String("election", election)))
	}
	return nil
}

// Hooks is for [leader.WithHooks].
func (t *Telemetry) Hooks() leader.Hooks {
	return leader.Hooks{Campaigning: t.campaigning, Elected: t.elected, Ended: t.termEnded}
}

func (t *Telemetry) campaigning(election string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.terms[election] == nil {
		t.terms[election] = make(map[*leader.Leader]context.Context)
	}
}

func (t *Telemetry) elected(election string, l *leader.Leader, waited time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	name, token := attribute.String("election", election), attribute.Int64("token", l.Token())
	t.waited.Record(context.Background(), waited.Seconds(), metric.WithAttributes(name))
	t.terms[election][l], _ = t.tracer.Start(context.Background(), "leader term", trace.WithAttributes(name, token))
}

func (t *Telemetry) termEnded(election string, l *leader.Leader, cause error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	span := trace.SpanFromContext(t.terms[election][l])
	delete(t.terms[election], l)
	if !errors.Is(cause, leader.ErrResigned) && !errors.Is(cause, leader.ErrTransferred) {
		span.SetStatus(codes.Error, cause.Error())
	}
	for _, known := range why {
		if errors.Is(cause, known) { // cause itself may have details, and each text would be a time series of its own
			attributes := []attribute.KeyValue{attribute.String("election", election), attribute.String("cause", known.Error())}
			t.ended.Add(context.Background(), 1, metric.WithAttributes(attributes...))
			span.SetAttributes(attributes...)
		}
	}
	span.End()
}

// Link ties a span of the work to that of its term: trace.WithLinks(t.Link(election, l)). As children of the term's
// span, the spans of the work would lack a parent until the term ends, which may take weeks.
func (t *Telemetry) Link(election string, l *leader.Leader) trace.Link {
	t.mu.Lock()
	defer t.mu.Unlock()
	return trace.LinkFromContext(t.terms[election][l]) // of no use after the term
}

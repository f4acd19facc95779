package telemetry_test

import (
	"context"
	"errors"
	"testing"

	"example.com/leader"
	"example.com/leader/examples/recipes/internal/recipetest"
	"example.com/leader/examples/recipes/telemetry"
	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

const election = "shop/telemetry"

type instance struct {
	telemetry *telemetry.Telemetry
	reader    *metric.ManualReader
	spans     *tracetest.InMemoryExporter
	leads     chan *leader.Leader
	ended     chan error // after the hooks of telemetry
}

func start(t *testing.T, client *clientv3.Client, name string) *instance {
	i := &instance{
		reader: metric.NewManualReader(),
		spans:  tracetest.NewInMemoryExporter(),
		leads:  make(chan *leader.Leader, 10),
		ended:  make(chan error, 10),
	}
	meters := metric.NewMeterProvider(metric.WithReader(i.reader))
	tracers := trace.NewTracerProvider(trace.WithSyncer(i.spans))
	var err error
	if i.telemetry, err = telemetry.New(meters.Meter("test"), tracers.Tracer("test")); err != nil {
		t.Fatal(err)
	}
	recipetest.Go(t, func(ctx context.Context) error {
		return leader.Run(ctx, client, election, name, func(ctx context.Context, l *leader.Leader) error {
			i.leads <- l
			<-ctx.Done()
			return ctx.Err()
		}, leader.WithHooks(i.telemetry.Hooks()), leader.WithHooks(leader.Hooks{
			Ended: func(_ string, _ *leader.Leader, cause error) { i.ended <- cause },
		}))
	})
	return i
}

// data returns the values of the metrics: of a histogram, how many it has counted.
func (i *instance) data(t *testing.T) map[string]int64 {
	var rm metricdata.ResourceMetrics
	if err := i.reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	values := make(map[string]int64)
	for _, m := range rm.ScopeMetrics[0].Metrics {
		switch data := m.Data.(type) {
		case metricdata.Gauge[int64]:
			values[m.Name] = data.DataPoints[0].Value
		case metricdata.Histogram[float64]:
			values[m.Name] = int64(data.DataPoints[0].Count) //nolint:gosec // few
		case metricdata.Sum[int64]:
			for _, p := range data.DataPoints {
				cause, _ := p.Attributes.Value("cause")
				values[m.Name+" "+cause.AsString()] = p.Value
			}
		}
	}
	return values
}

func TestMetricsAndASpanFollowATermThroughAHandoff(t *testing.T) {
	t.Parallel()
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	a := start(t, client, "a")
	first := etcdtest.Await(t, "a's term", a.leads)
	link := a.telemetry.Link(election, first)
	b := start(t, client, "b")
	recipetest.AwaitQueue(t, client, election, 2)
	if got := a.data(t); got["leader.leading"] != 1 || got["leader.campaign.duration"] != 1 {
		t.Errorf("a: %v", got)
	}
	if got, ok := b.data(t)["leader.leading"]; got != 0 || !ok {
		t.Errorf("b: leading is %v, %v", got, ok)
	}

	recipetest.Transfer(t, client, election)
	second := etcdtest.Await(t, "b's term", b.leads)
	if cause := etcdtest.Await(t, "the end of a's term", a.ended); !errors.Is(cause, leader.ErrTransferred) {
		t.Errorf("a's term has ended: %v", cause)
	}
	if got := a.data(t); got["leader.leading"] != 0 || got["leader.terms.ended leader: term transferred"] != 1 {
		t.Errorf("a: %v", got)
	}
	if got := b.data(t); got["leader.leading"] != 1 {
		t.Errorf("b: %v", got)
	}
	checkSpan(t, a, first, codes.Unset, leader.ErrTransferred)
	if got := a.spans.GetSpans()[0].SpanContext; !link.SpanContext.IsValid() || link.SpanContext.SpanID() != got.SpanID() {
		t.Errorf("the link is to %v, and the span of the term %v", link.SpanContext, got)
	}

	if err := recipetest.NewElector(t, client).Evict(t.Context(), election); err != nil {
		t.Fatal(err)
	}
	if cause := etcdtest.Await(t, "the end of b's term", b.ended); !errors.Is(cause, leader.ErrEvicted) {
		t.Errorf("b's term has ended: %v", cause)
	}
	checkSpan(t, b, second, codes.Error, leader.ErrEvicted)
}

// checkSpan checks the only span that has ended.
func checkSpan(t *testing.T, i *instance, l *leader.Leader, status codes.Code, cause error) {
	t.Helper()
	spans := i.spans.GetSpans()
	if len(spans) != 1 {
		t.Fatalf("%d spans have ended", len(spans))
	}
	attributes := attribute.NewSet(spans[0].Attributes...)
	token, _ := attributes.Value("token")
	why, _ := attributes.Value("cause")
	if spans[0].Status.Code != status || token.AsInt64() != l.Token() || why.AsString() != cause.Error() {
		t.Errorf("%v with token %d ends as %v with %v", spans[0].Name, l.Token(), spans[0].Status, spans[0].Attributes)
	}
}

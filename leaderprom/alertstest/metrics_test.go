package alertstest

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"example.com/leader/leaderprom"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
)

const dashboardFile = "../dashboard.json"

var promql = parser.NewParser(parser.Options{})

// A kind is what all series of a name have in common.
type kind struct {
	metric string                     // what the Collector calls it; a histogram has series of several names
	labels map[string]map[string]bool // their names and, of those that can have some values only, the values
}

// produced returns the kinds of series that Prometheus scrapes from a Collector, by name.
func produced(t *testing.T) map[string]kind {
	t.Helper()
	c := leaderprom.New()
	c.Hooks().Campaigning("jobs")
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(c)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	kinds := make(map[string]kind)
	for _, family := range families {
		k := kind{family.GetName(), map[string]map[string]bool{"job": nil, "instance": nil}} // which Prometheus adds
		for _, m := range family.GetMetric() {
			for _, l := range m.GetLabel() {
				switch name := l.GetName(); {
				case name == "election":
					k.labels[name] = nil
				case k.labels[name] == nil:
					k.labels[name] = map[string]bool{l.GetValue(): true}
				default:
					k.labels[name][l.GetValue()] = true
				}
			}
		}
		if family.GetType() != dto.MetricType_HISTOGRAM {
			kinds[k.metric] = k
			continue
		}
		kinds[k.metric+"_sum"], kinds[k.metric+"_count"] = k, k
		k.labels = maps.Clone(k.labels)
		k.labels["le"] = nil
		kinds[k.metric+"_bucket"] = k
	}
	return kinds
}

// check reports an error unless a Collector produces series of the name that have the labels, with the
// values; "" is any.
func check(t *testing.T, where string, kinds map[string]kind, name string, labels map[string]string) {
	t.Helper()
	k, ok := kinds[name]
	if !ok {
		t.Errorf("%s: no Collector produces %q", where, name)
		return
	}
	for label, value := range labels {
		values, ok := k.labels[label]
		if !ok {
			t.Errorf("%s: %s has no label %s", where, name, label)
		} else if value != "" && values != nil && !values[value] {
			t.Errorf("%s: %s has no %s=%q", where, name, label, value)
		}
	}
}

// expressions returns all expressions of rules and dashboard, as they are evaluated, by where they are.
func expressions(t *testing.T) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for _, rule := range alertingRules(t) {
		all[rule.Name()] = rule.Query().String()
	}
	maps.Copy(all, dashboard(t))
	return all
}

// dashboard returns the dashboard's expressions with its variables filled in as Grafana does.
func dashboard(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	type datasource struct{ Type, UID string }
	var d struct {
		Templating struct {
			List []struct {
				Name, Type string
				Datasource datasource
				Query      json.RawMessage
			}
		}
		Panels []struct {
			ID          int
			Title, Type string
			Datasource  datasource
			Targets     []struct {
				Expr       string
				Datasource datasource
			}
		}
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatalf("the dashboard is not JSON: %v", err)
	}
	chosen := datasource{"prometheus", "${datasource}"}
	fill := strings.NewReplacer("$__rate_interval", "5m", "$__range", "30m", "$job", ".+", "$election", ".+")
	all := make(map[string]string)
	variables := make(map[string]bool)
	for _, v := range d.Templating.List {
		variables[v.Name] = true
		if v.Type != "query" {
			continue
		}
		var q struct{ Query string }
		if err := json.Unmarshal(v.Query, &q); err != nil {
			t.Fatal(err)
		}
		selector, label, ok := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(q.Query, "label_values("), ")"), ", ")
		if !ok || v.Datasource != chosen {
			t.Errorf("the variable %s asks %v for %q", v.Name, v.Datasource, q.Query)
		}
		all["variable "+v.Name] = fmt.Sprintf("group by (%s) (%s)", label, fill.Replace(selector))
	}
	for _, name := range []string{"datasource", "job", "election"} {
		if !variables[name] {
			t.Errorf("the dashboard has no variable %s", name)
		}
	}
	ids := make(map[int]bool)
	for _, p := range d.Panels {
		if ids[p.ID] || p.Title == "" || p.Type == "" || len(p.Targets) == 0 || p.Datasource != chosen {
			t.Errorf("panel %d, %q, is of type %q, asks %v and has %d targets", p.ID, p.Title, p.Type, p.Datasource, len(p.Targets))
		}
		ids[p.ID] = true
		for i, target := range p.Targets {
			if target.Datasource != chosen {
				t.Errorf("a target of panel %q asks %v", p.Title, target.Datasource)
			}
			all[fmt.Sprintf("panel %q, target %d", p.Title, i)] = fill.Replace(target.Expr)
		}
	}
	return all
}

func TestRulesAndDashboardAskForWhatACollectorProduces(t *testing.T) {
	kinds := produced(t)
	used := make(map[string]bool)
	for where, expr := range expressions(t) {
		parsed, err := promql.ParseExpr(expr)
		if err != nil {
			t.Errorf("%s: %q does not parse: %v", where, expr, err)
			continue
		}
		parser.Inspect(parsed, func(node parser.Node, path []parser.Node) error {
			vs, ok := node.(*parser.VectorSelector)
			if !ok {
				return nil
			}
			used[kinds[vs.Name].metric] = true
			asked := make(map[string]string)
			for _, above := range path {
				if aggregation, ok := above.(*parser.AggregateExpr); ok {
					for _, label := range aggregation.Grouping {
						asked[label] = ""
					}
				}
			}
			for _, m := range vs.LabelMatchers {
				switch {
				case m.Name == model.MetricNameLabel:
				case m.Type == labels.MatchEqual:
					asked[m.Name] = m.Value
				default:
					asked[m.Name] = ""
				}
			}
			check(t, where, kinds, vs.Name, asked)
			return nil
		})
	}
	for _, k := range kinds {
		if !used[k.metric] {
			t.Errorf("neither rules nor dashboard use %s", k.metric)
		}
	}
}

// Else the alerts are proved for series that nobody produces.
func TestScenariosAreOfSeriesThatACollectorProduces(t *testing.T) {
	kinds := produced(t)
	for _, s := range scenarios {
		for _, line := range seriesOf(s) {
			series, _, err := promql.ParseSeriesDesc(line)
			if err != nil {
				t.Errorf("%s: %v", s.name, err)
				continue
			}
			name, has := series.Get(model.MetricNameLabel), series.Map()
			delete(has, model.MetricNameLabel)
			check(t, s.name, kinds, name, has)
			for label := range kinds[name].labels {
				if has[label] == "" {
					t.Errorf("%s: %s lacks the label %s", s.name, series, label)
				}
			}
		}
	}
}

func TestDashboardShowsSomethingWhereAllIsWell(t *testing.T) {
	well := scenarios[0]
	run := query(t, storageOf(t, well))
	for where, expr := range dashboard(t) {
		result, err := run(t.Context(), expr, time.Unix(0, 0).Add(well.lasts))
		if err != nil {
			t.Errorf("%s: %v", where, err)
		} else if len(result) == 0 {
			t.Errorf("%s: %q yields nothing", where, expr)
		}
	}
}

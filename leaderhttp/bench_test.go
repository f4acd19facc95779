package leaderhttp_test

import (
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"testing"
	"time"

	"example.com/leader/internal/etcdtest"
	"example.com/leader/leaderhttp"
)

// BenchmarkForward sends the same small request in turn to a plain server, to a bare httputil.ReverseProxy before it,
// to the leader, and to another instance, which forwards it to the leader. It reports ratios of the medians.
func BenchmarkForward(b *testing.B) {
	m := etcdtest.Start(b)
	client := etcdtest.NewClient(b, m.Endpoint)
	plain := serve(b, say("ok"))
	target, err := url.Parse(plain)
	if err != nil {
		b.Fatal(err)
	}
	backend := &http.Transport{}
	b.Cleanup(backend.CloseIdleConnections)
	proxy := serve(b, &httputil.ReverseProxy{
		Rewrite:   func(pr *httputil.ProxyRequest) { pr.SetURL(target); pr.SetXForwarded() },
		Transport: backend,
	})
	e := newElector(b, client)
	leading := serve(b, leaderhttp.Forward(b.Context(), e, "jobs", say("ok")))
	lead(b, e, leading)
	following := serve(b, leaderhttp.Forward(b.Context(), newElector(b, client), "jobs", say("not here")))
	awaitText(b, following, "ok")

	ways := []struct{ name, url string }{{"direct", plain}, {"ReverseProxy", proxy}, {"leader", leading}, {"forwarded", following}}
	took := make([][]time.Duration, len(ways))
	transport := &http.Transport{}
	b.Cleanup(transport.CloseIdleConnections)
	for b.Loop() {
		for i, way := range ways {
			began := time.Now()
			resp, err := transport.RoundTrip(newRequest(b, http.MethodGet, way.url, nil))
			if err != nil {
				b.Fatal(err)
			}
			text, err := io.ReadAll(resp.Body)
			if err != nil || string(text) != "ok" {
				b.Fatalf("%s: %s %q, %v", way.name, resp.Status, text, err)
			}
			resp.Body.Close()
			took[i] = append(took[i], time.Since(began))
		}
	}
	var medians []time.Duration
	for _, ds := range took {
		slices.Sort(ds)
		medians = append(medians, ds[len(ds)/2])
	}
	b.ReportMetric(0, "ns/op") // of all ways together, which says nothing
	b.ReportMetric(float64(medians[0].Nanoseconds()), "ns-direct")
	for i, way := range ways[1:] {
		b.ReportMetric(float64(medians[i+1])/float64(medians[0]), way.name+"/direct")
	}
	b.ReportMetric(float64(medians[3])/float64(medians[1]), "forwarded/ReverseProxy")
}

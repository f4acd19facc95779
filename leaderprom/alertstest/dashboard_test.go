package alertstest

import (
	"errors"
	"os"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	grafana "github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

// Grafana imports what it does not know without a word, and shows nothing there.
func TestDashboardHasWhatGrafanasSchemaRequiresAndNothingElse(t *testing.T) {
	plugins.RegisterDefaultPlugins() // the options of panels and the fields of queries
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	var d grafana.Dashboard //nolint:staticcheck // its successor is another format, which an older Grafana cannot import
	var unknown cog.BuildErrors
	if err := d.UnmarshalJSONStrict(text); err != nil && !errors.As(err, &unknown) {
		t.Fatal(err)
	}
	for _, u := range unknown {
		t.Error(u)
	}
	if err := d.Validate(); err != nil {
		t.Error(err)
	}
}

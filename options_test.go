package leader

import (
	"errors"
	"strings"
	"testing"
)

// However prefix and name are written, the election is the prefix, one slash, and the name.
func FuzzElectionName(f *testing.F) {
	for _, prefix := range []string{"", "/", "svc", "/svc", "svc/", "/svc//"} {
		for _, name := range []string{"", "/", "jobs", "/jobs", "jobs/", "a/b", "//a//b"} {
			f.Add(prefix, name)
		}
	}
	f.Fuzz(func(t *testing.T, prefix, name string) {
		o := options{prefix: prefix}
		election, err := o.election(name)
		if invalid := name == "" || strings.HasSuffix(name, "/"); invalid != errors.Is(err, ErrInvalidName) || invalid != (err != nil) {
			t.Fatalf("election(%q) returned %q, %v", name, election, err)
		}
		switch {
		case err != nil:
		case prefix == "":
			if election != name {
				t.Errorf("without a prefix the election of %q is %q", name, election)
			}
		default:
			if want := strings.TrimRight(prefix, "/") + "/" + strings.TrimLeft(name, "/"); election != want {
				t.Errorf("prefix %q and name %q give %q", prefix, name, election)
			}
			if strings.HasSuffix(election, "/") {
				t.Errorf("prefix %q and name %q give %q, which ends in a slash", prefix, name, election)
			}
		}
	})
}

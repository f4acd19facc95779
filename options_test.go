package leader

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/leader/internal/lease"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// However many hooks are given, and whichever of their functions are set, every function is called,
// and called in the order of the options.
func TestHooksAddUpInTheOrderOfTheOptions(t *testing.T) {
	events := reflect.TypeFor[Hooks]()
	for i := range events.NumField() {
		event := events.Field(i)
		for _, given := range [][]string{{}, {"a"}, {"", "b"}, {"a", ""}, {"a", "b", "c"}, {"a", "", "c"}} {
			var called, want []string
			var opts []Option
			for _, name := range given {
				var hooks Hooks
				if name != "" {
					want = append(want, name)
					reflect.ValueOf(&hooks).Elem().Field(i).Set(reflect.MakeFunc(event.Type, func([]reflect.Value) []reflect.Value {
						called = append(called, name)
						return nil
					}))
				}
				opts = append(opts, WithHooks(hooks))
			}
			o, err := newOptions(opts)
			if err != nil {
				t.Fatal(err)
			}
			if event.Name == "LeaderChanged" && o.hooks.watchLeader() != (want != nil) {
				t.Errorf("given %q, the leader is watched: %v; that costs a watch", given, o.hooks.watchLeader())
			}
			o.hooks.call(event.Name)
			if !slices.Equal(called, want) {
				t.Errorf("given %q, %s calls %q", given, event.Name, called)
			}
		}
	}
}

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

// call calls the functions for an event with zero values.
func (list hookList) call(event string) {
	l := &Leader{claim: &claim{}}
	map[string]func(){
		"Campaigning":    func() { list.campaigning("") },
		"CampaignFailed": func() { list.campaignFailed("", nil) },
		"Elected":        func() { list.elected(l, 0) },
		"Ended":          func() { list.ended(l, nil) },
		"Overdue":        func() { list.overdue(l, 0) },
		"LeaderChanged":  func() { list.leaderChanged("", Candidate{}) },
		"Renewed":        func() { list.renewed(0, 0, time.Time{}) },
		"RenewFailed":    func() { list.renewFailed(0, 0, nil) },
	}[event]()
}

// Users cannot match what internal packages define.
func TestRenewFailedIsToldErrorsThatUsersCanMatch(t *testing.T) {
	for err, want := range map[error]error{
		lease.ErrRefused:             ErrRefused,
		lease.ErrRevoked:             ErrEvicted,
		rpctypes.ErrLeaseNotFound:    ErrEvicted,
		lease.ErrExpired:             ErrExpired,
		context.DeadlineExceeded:     context.DeadlineExceeded,
		rpctypes.ErrPermissionDenied: rpctypes.ErrPermissionDenied,
	} {
		if got := renewalError(fmt.Errorf("renew: %w", err)); !errors.Is(got, want) {
			t.Errorf("of %v RenewFailed is told %v, want %v", err, got, want)
		}
	}
}

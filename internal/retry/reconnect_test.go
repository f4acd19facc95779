package retry

import (
	"testing"
	"time"

	"google.golang.org/grpc/connectivity"
)

// gRPC goes through its connections without a lock as it is made to connect again: a map that changes meanwhile ends
// the program.
func TestConnectionsAreLeftAloneWhileTheyMayChange(t *testing.T) {
	const ready, idle, connecting, failure = connectivity.Ready, connectivity.Idle, connectivity.Connecting, connectivity.TransientFailure
	one, two := []string{"a"}, []string{"a", "b"}
	type look struct {
		after     time.Duration
		state     connectivity.State
		endpoints []string
		want      bool
	}
	for name, looks := range map[string][]look{
		"as the client begins to connect":    {{0, connecting, one, false}, {minReset, connecting, one, false}, {minReset, failure, one, true}},
		"when nobody has answered for long":  {{0, connecting, one, false}, {maxBegin - 1, connecting, one, false}, {minReset, connecting, one, true}},
		"after the endpoints have changed":   {{0, ready, one, false}, {time.Second, failure, one, true}, {time.Second, failure, two, false}, {time.Second, failure, two, true}},
		"when one is connecting again":       {{0, ready, one, false}, {time.Second, connecting, one, true}},
		"beside one that is ready":           {{0, ready, two, false}, {time.Second, ready, two, true}},
		"after a time in which it was idle":  {{0, ready, one, false}, {time.Second, idle, one, false}, {time.Second, connecting, one, false}, {maxBegin, connecting, one, true}},
		"a moment after it was made to last": {{0, ready, one, false}, {minReset, failure, one, true}, {minReset - 1, failure, one, false}, {1, failure, one, true}},
	} {
		bubble(t, name, func(t *testing.T) {
			traffic := trafficOf(client(t))
			for i, l := range looks {
				time.Sleep(l.after)
				if got := traffic.mayReset(l.state, l.endpoints); got != l.want {
					t.Errorf("look %d, %v with the endpoints %q: %t, want %t", i, l.state, l.endpoints, got, l.want)
				}
			}
		})
	}
}

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"example.com/leader"
	"example.com/leader/internal/queue"
	"example.com/leader/internal/retry"
	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
)

func (a *app) newList() *cobra.Command {
	var out format
	cmd := &cobra.Command{
		Use:   "list [PREFIX]",
		Short: "Shows the elections below a prefix, their leaders and who waits",
		Long: `Shows all elections below a prefix: candidates in the order of the queue, the
leader first, with token, lease and value.

"list svc/jobs" shows the elections svc/jobs and svc/jobs/..., and needs the
right to read below svc/jobs/. Without PREFIX it reads all of etcd.

LEFT is the time until etcd lets the candidate's lease expire, unless it is
renewed before. "expired" means that the lease is gone and its key goes next.
"never" is a key without a lease: it does not expire, and the candidates behind
it wait until somebody deletes it; an election with nothing but such keys is
shown if PREFIX is its name. etcd does not record when a term began; of two
candidates, the one with the smaller token has joined the queue first.

On a terminal it prints a table, without LEASE and LEFT if that is narrow. Else
it prints one line for each candidate, with tabs in between: election, place,
token, lease, seconds left, TTL, value. A value that is not printable is quoted.
With -o json it prints an array.`,
		Example: `  leader list svc
  leader list svc -o json | jq -r '.[] | .election + " " + .candidates[0].value'`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage("list takes at most one prefix")
			}
			return nil
		},
		RunE: a.bounded(func(ctx context.Context, client *clientv3.Client, args []string) error {
			ctx, cancel := context.WithTimeout(ctx, a.commandTimeout)
			defer cancel()
			elections, err := readElections(ctx, client, strings.TrimRight(strings.Join(args, ""), "/"))
			if err != nil {
				return a.unreachable(err)
			}
			if len(elections) == 0 {
				fmt.Fprintln(os.Stderr, "leader: no elections there")
			}
			if out == formatJSON {
				return printJSON(os.Stdout, elections)
			}
			return printElections(elections, onScreen())
		}),
	}
	out.addTo(cmd)
	return cmd
}

// An election is one of "leader list".
type election struct {
	Name       string   `json:"election"`
	Candidates []queued `json:"candidates"`
}

// A queued is a candidate of "leader list".
type queued struct {
	candidate
	TTL  int64 `json:"ttl"`  // of the lease, in seconds; 0 if there is none
	Left int64 `json:"left"` // until it expires, in seconds; -1 if it is gone

	id clientv3.LeaseID // to which the key is attached
}

// readElections reads all elections below a prefix, with one read of the keys and one of each lease. An election is
// there if a key of it is attached to the lease in its name, or if it is named by the prefix. Then other keys that look
// like a candidate's are candidates too, because the others wait for them.
func readElections(ctx context.Context, client *clientv3.Client, prefix string) ([]election, error) {
	key, opts := prefix+"/", []clientv3.OpOption{clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend)}
	if prefix == "" {
		key, opts = "\x00", append(opts, clientv3.WithFromKey())
	} else {
		opts = append(opts, clientv3.WithPrefix())
	}
	resp, err := retry.First(ctx, client, func(ctx context.Context) (*clientv3.GetResponse, error) {
		return client.Get(ctx, key, opts...)
	})
	switch {
	case errors.Is(err, rpctypes.ErrPermissionDenied) && prefix == "":
		return nil, fmt.Errorf("read all keys: %w; name a PREFIX below which you may read", err)
	case err != nil && prefix == "":
		return nil, fmt.Errorf("read all keys: %w", err)
	case err != nil:
		return nil, fmt.Errorf("read the keys below %s: %w", key, err)
	}
	byName, held := make(map[string][]queued), make(map[string]bool)
	for _, kv := range resp.Kvs {
		name := string(kv.Key[:max(0, bytes.LastIndexByte(kv.Key, '/'))])
		id, ok := queue.New(client, name).ParseKey(string(kv.Key))
		if !ok || name == "" || strings.HasSuffix(name, "/") {
			continue
		}
		c := leader.Candidate{Value: string(kv.Value), Token: kv.CreateRevision, Key: string(kv.Key), Lease: id}
		byName[name] = append(byName[name], queued{candidate: *newCandidate(c), id: clientv3.LeaseID(kv.Lease)})
		held[name] = held[name] || kv.Lease == int64(id)
	}
	elections := []election{} // in JSON, none is []
	for name, candidates := range byName {
		if held[name] || name == prefix {
			elections = append(elections, election{name, candidates})
		}
	}
	slices.SortFunc(elections, func(a, b election) int { return cmp.Compare(a.Name, b.Name) })
	return elections, readLeases(ctx, client, elections)
}

// readLeases asks for each lease once.
func readLeases(ctx context.Context, client *clientv3.Client, elections []election) error {
	byLease := make(map[clientv3.LeaseID][]*queued)
	for _, e := range elections {
		for i := range e.Candidates {
			if c := &e.Candidates[i]; c.id != 0 {
				byLease[c.id] = append(byLease[c.id], c)
			}
		}
	}
	asking, ctx := errgroup.WithContext(ctx)
	asking.SetLimit(16)
	for id, candidates := range byLease {
		asking.Go(func() error {
			resp, err := retry.First(ctx, client, func(ctx context.Context) (*clientv3.LeaseTimeToLiveResponse, error) {
				return client.TimeToLive(ctx, id)
			})
			if err != nil {
				return fmt.Errorf("read lease %x: %w", id, err)
			}
			for _, c := range candidates {
				c.TTL, c.Left = resp.GrantedTTL, resp.TTL
			}
			return nil
		})
	}
	return asking.Wait()
}

func printElections(elections []election, s *screen) error {
	out := bufio.NewWriter(os.Stdout)
	for _, e := range elections {
		if s == nil {
			for i, c := range e.Candidates {
				fmt.Fprintf(out, "%s\t%d\t%d\t%s\t%d\t%d\t%s\n", quoted(e.Name), i+1, c.Token, c.Lease, c.Left, c.TTL, quoted(c.Value))
			}
			continue
		}
		var table strings.Builder
		t := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, s.row("", "TOKEN", "LEASE", "LEFT", "VALUE"))
		for i, c := range e.Candidates {
			place := "leader"
			if i > 0 {
				place = strconv.Itoa(i + 1)
			}
			fmt.Fprintln(t, s.row(place, strconv.FormatInt(c.Token, 10), c.Lease, c.left(), quoted(c.Value)))
		}
		_ = t.Flush() // to memory
		fmt.Fprintln(out, s.fit(quoted(e.Name)))
		for i, line := range strings.Split(strings.TrimSuffix(table.String(), "\n"), "\n") {
			if line = s.fit(line); i == 1 {
				line = s.bold(line)
			}
			fmt.Fprintln(out, line)
		}
	}
	return out.Flush()
}

// row returns a row of the table, for a tabwriter. On a narrow screen it leaves columns out, so that the value has room.
func (s *screen) row(place, token, lease, left, value string) string {
	cells := []string{"  " + place, token}
	if s.width >= 70 {
		cells = append(cells, lease)
	}
	if s.width >= 50 {
		cells = append(cells, left)
	}
	return strings.Join(append(cells, value), "\t")
}

// left says how long the lease still lives.
func (c *queued) left() string {
	switch {
	case c.id == 0:
		return "never"
	case c.Left < 0:
		return "expired"
	}
	return fmt.Sprintf("%ds of %ds", c.Left, c.TTL)
}

func (a *app) newWatch() *cobra.Command {
	var out format
	cmd := &cobra.Command{
		Use:   "watch NAME",
		Short: "Prints who leads, and each change",
		Long: `Prints who leads an election now, and then each change of the leader or of its
value, until it is stopped. A "-" as the token means that nobody leads.

Each line has the time at which this process learned of it, the token and the
value, with a tab in between. A value that is not printable is quoted. With
-o json each line is an object, whose leader is null if nobody leads.

It survives outages of etcd. It may leave out states that came and went in the
meantime, but never the latest one.`,
		Example: "  leader watch svc/jobs -o json",
		Args:    oneName,
		RunE: a.patient(func(ctx context.Context, client *clientv3.Client, args []string) error {
			ctx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			onUnread(func() { cancel(signalled{syscall.SIGPIPE}) })
			defer a.warnIfAway(ctx, client, a.commandTimeout)()
			return a.observe(ctx, client, args[0], func(c leader.Candidate) (bool, error) {
				return true, out.printChange(os.Stdout, args[0], c)
			})
		}),
	}
	out.addTo(cmd)
	return cmd
}

func (f format) printChange(w io.Writer, election string, c leader.Candidate) error {
	now := time.Now().Format("2006-01-02T15:04:05.000Z07:00")
	if f == formatJSON {
		return printJSON(w, struct {
			Time     string     `json:"time"`
			Election string     `json:"election"`
			Leader   *candidate `json:"leader"`
		}{now, election, newCandidate(c)})
	}
	token, value := "-", "nobody leads"
	if c != (leader.Candidate{}) {
		token, value = strconv.FormatInt(c.Token, 10), quoted(c.Value)
	}
	s, gap := onScreen(), "\t"
	if s != nil {
		gap = "  "
	}
	_, err := fmt.Fprintln(w, s.fit(now+gap+token+gap+value))
	return err
}

// observe calls each with who leads, until that returns false or an error.
func (a *app) observe(ctx context.Context, client *clientv3.Client, name string, each func(leader.Candidate) (bool, error)) error {
	elector, err := a.elector(client)
	if err != nil {
		return err
	}
	for c, err := range elector.Observe(ctx, name) {
		more := false
		if err == nil {
			more, err = each(c)
		}
		if err != nil || !more {
			return err
		}
	}
	return nil
}

func (a *app) newWait() *cobra.Command {
	var out format
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "wait NAME",
		Short: "Waits until somebody leads",
		Long: `Waits until somebody leads an election, and prints the leader's value. It is
for scripts that must not continue before. If etcd cannot be reached, it waits.

Who leads may change at any time, also before the script's next line.`,
		Example: "  leader wait svc/jobs --timeout 1m && echo ready",
		Args:    oneName,
	}
	wait := a.patient(func(ctx context.Context, client *clientv3.Client, args []string) error {
		defer a.warnIfAway(ctx, client, cmp.Or(min(timeout/2, a.commandTimeout), a.commandTimeout))()
		return a.observe(ctx, client, args[0], func(c leader.Candidate) (bool, error) {
			if c == (leader.Candidate{}) {
				return true, nil
			}
			return false, out.printLeader(args[0], c)
		})
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if timeout <= 0 {
			return wait(cmd, args)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), timeout) // the time to log in counts
		defer cancel()
		cmd.SetContext(ctx)
		err := wait(cmd, args)
		if err != nil && ctx.Err() != nil {
			return fmt.Errorf("nobody was seen to lead within %v: %w", timeout, err)
		}
		return err
	}
	out.addTo(cmd)
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "exit with status 4 after that time; 0 waits forever")
	return cmd
}

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"example.com/leader"
	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/term"
)

// newest is the value of --to for the candidate that has joined last.
const newest = "newest"

func (a *app) newTransfer() *cobra.Command {
	var out format
	var to string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "transfer NAME",
		Short: "Hands an election over to another candidate, without an overlap",
		Long: `Hands an election over: the leader stops its work, and only then the chosen
candidate is elected. Without --to it is the one that has waited longest. It
prints the new leader's value, or nothing if that one has left already.

Candidates between the leader and the chosen one join again at the end of the
queue. Those of "etcdctl elect" and of concurrency.Election do not step back.
If the transfer takes longer than --timeout, it is given up and the error names
who has not left; a leader that was already asked may still step back.`,
		Example: `  leader transfer svc/jobs
  leader transfer svc/jobs --to newest
  leader transfer svc/jobs --to host-2`,
		Args: oneName,
		PreRunE: func(cmd *cobra.Command, _ []string) error {
			if to == "" && cmd.Flags().Changed("to") { // as by a variable of a script that is not set
				return usage(`--to "": must not be empty`)
			}
			if timeout <= 0 {
				return usage("--timeout %v: must be positive", timeout)
			}
			return nil
		},
		RunE: a.bounded(func(ctx context.Context, client *clientv3.Client, args []string) error {
			elector, err := a.elector(client)
			if err != nil {
				return err
			}
			c, err := a.handOver(ctx, elector, args[0], to, timeout)
			if err != nil {
				return a.failed(args[0], err)
			}
			if c == (leader.Candidate{}) {
				newLog(false).Warn("transferred, but the new leader has left already, so nobody leads")
			}
			return out.printLeader(args[0], c)
		}),
	}
	out.addTo(cmd)
	cmd.Flags().StringVar(&to, "to", "", "`candidate` that is to lead: its value, its key, or newest")
	_ = cmd.RegisterFlagCompletionFunc("to", cobra.FixedCompletions([]string{newest}, cobra.ShellCompDirectiveNoFileComp))
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "give up after that time, which must be positive and should be longer than the TTL")
	return cmd
}

// handOver transfers an election, and returns who leads then: the zero Candidate if nobody does any more.
func (a *app) handOver(ctx context.Context, elector *leader.Elector, name, to string, timeout time.Duration) (leader.Candidate, error) {
	chosen, err := a.choose(ctx, elector, name, to)
	if err != nil {
		return leader.Candidate{}, err
	}
	transferring, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := elector.Transfer(transferring, name, chosen); err != nil || to != "" {
		return chosen, err
	}
	now, err := a.current(ctx, elector, name)
	if err != nil && !errors.Is(err, leader.ErrNoLeader) {
		return now, fmt.Errorf("transferred, but who leads now could not be read: %w", err)
	}
	return now, nil
}

// choose returns the candidate that --to names, the zero Candidate for whoever is next.
func (a *app) choose(ctx context.Context, elector *leader.Elector, name, to string) (leader.Candidate, error) {
	ctx, cancel := context.WithTimeout(ctx, a.commandTimeout)
	defer cancel()
	cs, err := elector.Candidates(ctx, name)
	switch {
	case err != nil || to == "":
		return leader.Candidate{}, err
	case len(cs) == 0:
		return leader.Candidate{}, leader.ErrNoLeader
	case to == newest && len(cs) == 1:
		return leader.Candidate{}, statusError{exitNobody, errors.New("nobody waits")}
	case to == newest:
		return cs[len(cs)-1], nil
	}
	if i := slices.IndexFunc(cs, func(c leader.Candidate) bool { return c.Key == to }); i >= 0 {
		return cs[i], nil
	}
	cs = slices.DeleteFunc(cs, func(c leader.Candidate) bool { return c.Value != to })
	switch len(cs) {
	case 0:
		return leader.Candidate{}, statusError{exitNobody, fmt.Errorf("no candidate of %q has the value or the key %q", name, to)}
	case 1:
		return cs[0], nil
	}
	keys := make([]string, len(cs))
	for i, c := range cs {
		keys[i] = c.Key
	}
	return leader.Candidate{}, usage("--to %s: several candidates have this value, so name one by its key: %s", to, strings.Join(keys, ", "))
}

// failed adds to an error which election has no leader, or which etcd has not answered.
func (a *app) failed(name string, err error) error {
	if errors.Is(err, leader.ErrNoLeader) {
		return statusError{exitNobody, fmt.Errorf("%q has no leader", name)}
	}
	return a.unreachable(err)
}

func (a *app) current(ctx context.Context, elector *leader.Elector, name string) (leader.Candidate, error) {
	ctx, cancel := context.WithTimeout(ctx, a.commandTimeout)
	defer cancel()
	return elector.Current(ctx, name)
}

func (a *app) newEvict() *cobra.Command {
	var out format
	var yes bool
	cmd := &cobra.Command{
		Use:   "evict NAME",
		Short: "Ends the present term by force, as a last resort",
		Long: `Ends the present term by force: it deletes the leader's key. The next candidate
is elected at once, and the leader learns of it milliseconds later. Until then
both may work; if the leader is cut off from etcd, until its deadline. A leader
by "etcdctl elect" or concurrency.Election never learns of it: stop its process
first. "leader transfer" has no such overlap.

It asks before it does so. In a script it needs --yes. It prints the value of
the leader that it has found. If another one is elected at that very moment, it
may evict that one instead.`,
		Example: "  leader evict svc/jobs --yes",
		Args:    oneName,
		RunE: a.bounded(func(ctx context.Context, client *clientv3.Client, args []string) error {
			elector, err := a.elector(client)
			if err != nil {
				return err
			}
			evicted, err := a.current(ctx, elector, args[0])
			if err != nil {
				return a.failed(args[0], err)
			}
			if !yes {
				if err := confirm(ctx, args[0], evicted); err != nil {
					return err
				}
				now, err := a.current(ctx, elector, args[0])
				if err == nil && now.Token != evicted.Token {
					err = fmt.Errorf("%s leads now, so nobody was evicted", quoted(now.Value))
				}
				if err != nil {
					return a.failed(args[0], err)
				}
			}
			ctx, cancel := context.WithTimeout(ctx, a.commandTimeout)
			defer cancel()
			if err := elector.Evict(ctx, args[0]); err != nil {
				return a.failed(args[0], err)
			}
			return out.printLeader(args[0], evicted)
		}),
	}
	out.addTo(cmd)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// confirm asks on the terminal. It returns nil if the answer is yes.
func confirm(ctx context.Context, name string, c leader.Candidate) error {
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return usage("evict ends a term by force: without a terminal to ask on it needs --yes")
	}
	fmt.Fprintf(os.Stderr, "%s leads %s, with token %d.\n", quoted(c.Value), quoted(name), c.Token)
	fmt.Fprint(os.Stderr, "After an eviction two may work for a moment; \"leader transfer\" avoids that.\nEvict? [y/N] ")
	answered := make(chan string, 1)
	go func() { // it ends with the process if nobody answers
		line, err := bufio.NewReader(os.Stdin).ReadString('\n')
		if errors.Is(err, io.EOF) {
			fmt.Fprintln(os.Stderr)
		}
		answered <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case answer := <-answered:
		if answer == "y" || answer == "yes" {
			return nil
		}
		return errors.New("nobody was evicted")
	case <-ctx.Done():
		fmt.Fprintln(os.Stderr)
		return ctx.Err()
	}
}

//go:build linux

// Command chaos tests the guarantees of package leader under faults. It runs an etcd cluster and candidates, each in a
// process of its own, injects faults into them and the links between them, records what every process believes and
// does, and checks the record. If a guarantee was violated, it exits with status 1 and prints where the record is.
//
//	go run ./internal/chaos -duration 30m
//	go run ./internal/chaos -mutation same-term   # one safeguard is off: must be detected
//	go run ./internal/chaos -check DIR            # check a record again
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"example.com/leader/internal/oracle"
	"example.com/leader/internal/retry"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
}

// command runs the campaign, or one of its processes.
func command(ctx context.Context, args []string) error {
	if len(args) > 1 {
		switch args[0] {
		case "member":
			return serveMember(ctx, args[1])
		case "resource":
			return serveResource(ctx, args[1], args[2])
		case "worker", "sidecar":
			var w worker
			if err := json.Unmarshal([]byte(args[1]), &w); err != nil {
				return err
			}
			if args[0] == "sidecar" {
				return w.reclaim(ctx)
			}
			return w.run(ctx)
		}
	}
	return campaign(ctx, args)
}

// campaign parses the flags, runs the campaign, checks its record and reports.
func campaign(ctx context.Context, args []string) error {
	var p Parameters
	flags := flag.NewFlagSet("chaos", flag.ExitOnError)
	flags.DurationVar(&p.Duration, "duration", time.Minute, "how long to inject faults")
	flags.Uint64Var(&p.Seed, "seed", 0, "seed of the schedule of faults; 0 chooses one at random")
	flags.IntVar(&p.Members, "members", 3, "number of members of the etcd cluster, at least 3")
	flags.IntVar(&p.Candidates, "candidates", 5, "number of candidate processes that use this package, at least 3")
	flags.DurationVar(&p.TTL, "ttl", 3*time.Second, "TTL of the leases, in whole seconds")
	flags.BoolVar(&p.Race, "race", false, "build the candidates with the race detector")
	flags.StringVar(&p.Mutation, "mutation", "", "switch off a safeguard, and use the faults, TTL and duration that show it; one of "+names(mutations, func(m mutation) string { return m.name }))
	only := flags.String("faults", "", "comma-separated kinds of faults to inject, or, with a minus in front, to leave out; all by default: "+names(sorts(), func(s sort) string { return s.name }))
	out := flags.String("o", "", "`folder` for the record and the report; a temporary one by default")
	flags.StringVar(&p.Binary, "etcd", "", "`path` of an etcd to run instead of the embedded one")
	list := flags.Bool("mutations", false, "list the mutations and exit")
	check := flags.String("check", "", "check the record in this `folder` again, write its report, and exit")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *list {
		for _, m := range mutations {
			fmt.Println(m.name)
		}
		return nil
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%q is not a flag", flags.Arg(0))
	}
	if *check != "" {
		return judge(*check)
	}
	var m *mutation
	if p.Mutation != "" {
		if m = mutationNamed(p.Mutation); m == nil {
			return fmt.Errorf("-mutation %s: must be one of %s", p.Mutation, names(mutations, func(m mutation) string { return m.name }))
		}
		var err error
		flags.Visit(func(f *flag.Flag) {
			if f.Name == "ttl" || f.Name == "duration" || f.Name == "faults" {
				err = fmt.Errorf("-%s: must not be given with -mutation, which has its own", f.Name)
			}
		})
		if err != nil {
			return err
		}
		p.TTL, p.Duration, p.Faults = m.ttl, m.duration, m.faults
	} else if *only != "" {
		p.Faults = strings.Split(*only, ",")
	}
	chosen, err := choose(p.Faults)
	if err != nil {
		return err
	}
	switch {
	case p.Duration <= 0:
		return fmt.Errorf("-duration %v: must be positive", p.Duration)
	case p.TTL < 2*time.Second || p.TTL%time.Second != 0 || p.TTL >= etcdctlTTL:
		return fmt.Errorf("-ttl %v: must be at least 2s and less than %v, in whole seconds", p.TTL, etcdctlTTL)
	case p.Members < 3:
		return fmt.Errorf("-members %d: must be at least 3", p.Members)
	case p.Candidates < 3:
		return fmt.Errorf("-candidates %d: must be at least 3", p.Candidates)
	}
	for p.Seed == 0 {
		p.Seed = rand.Uint64() >> 32
	}
	p.Margin = p.TTL / 5
	p.Elections = nil
	for _, name := range elections {
		p.Elections = append(p.Elections, root+name)
	}
	tmp, err := os.MkdirTemp("", "chaos-build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	binary, err := build(ctx, tmp, p.Race, m)
	if err != nil {
		return err
	}
	dir := *out
	if dir == "" {
		if dir, err = os.MkdirTemp("", "chaos-record-"); err != nil {
			return err
		}
	} else if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if old, err := recordFiles(dir); err != nil {
		return err
	} else if len(old) > 0 {
		return fmt.Errorf("-o %s: already has a record", dir)
	}
	fmt.Printf("seed %d, record in %s\n", p.Seed, dir)
	if err := record(ctx, dir, p, binary, chosen); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("interrupted; the record so far is in %s", dir)
		}
		return err
	}
	return judge(dir)
}

// choose returns the kinds of faults with these names, without those that have a minus. If only names with a minus are
// given, it starts from all kinds.
func choose(list []string) ([]sort, error) {
	all := sorts()
	var chosen, dropped []sort
	for _, name := range list {
		bare, drop := strings.CutPrefix(name, "-")
		i := slices.IndexFunc(all, func(s sort) bool { return s.name == bare })
		switch {
		case i < 0:
			return nil, fmt.Errorf("-faults %s: must be among %s", name, names(all, func(s sort) string { return s.name }))
		case drop:
			dropped = append(dropped, all[i])
		default:
			chosen = append(chosen, all[i])
		}
	}
	if len(chosen) == 0 {
		chosen = all
	}
	chosen = slices.DeleteFunc(chosen, func(s sort) bool {
		return slices.ContainsFunc(dropped, func(d sort) bool { return d.name == s.name })
	})
	if len(chosen) == 0 {
		return nil, fmt.Errorf("-faults %s: none is left", strings.Join(list, ","))
	}
	return chosen, nil
}

func names[T any](list []T, name func(T) string) string {
	var s []string
	for _, t := range list {
		s = append(s, name(t))
	}
	return strings.Join(s, ",")
}

// record runs the system and the faults, until the time is up and everything is calm again.
func record(ctx context.Context, dir string, p Parameters, binary string, chosen []sort) error {
	s, err := startSystem(ctx, dir, p, binary, slices.ContainsFunc(chosen, func(s sort) bool { return s.on == onAuth }))
	if err != nil {
		return err
	}
	defer s.close()
	chosen = slices.DeleteFunc(chosen, func(sort sort) bool {
		why := sort.unfit(s.p.Etcd)
		if why != "" {
			fmt.Printf("%s is left out: %s\n", sort.name, why)
		}
		return why != ""
	})
	if len(chosen) == 0 {
		return fmt.Errorf("-faults: none is left with etcd %s", s.p.Etcd)
	}
	parameters, err := json.Marshal(s.p)
	if err != nil {
		return err
	}
	s.add(oracle.Entry{Kind: oracle.Run, Value: string(parameters)})

	peers, stop := context.WithCancel(ctx)
	defer stop()
	var etcdctl sync.WaitGroup
	etcdctl.Go(func() { s.etcdctl(peers, mixed) })
	defer etcdctl.Wait()
	defer stop()

	faults := &schedule{system: s, sorts: chosen, rand: rand.New(rand.NewPCG(p.Seed, 0)), struck: make(map[*process]bool)}
	faults.calm(ctx) // this also shows that all is well before the faults begin
	timed, cancel := context.WithTimeout(ctx, p.Duration)
	defer cancel()
	faults.run(timed)
	faults.calm(ctx)
	stop()
	etcdctl.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return s.end(ctx)
}

// end makes every process resign, and records what is left.
func (s *system) end(ctx context.Context) error {
	fail := func(err error) {
		if err != nil {
			s.add(oracle.Entry{Kind: oracle.Failure, Err: err.Error()})
		}
	}
	var wg sync.WaitGroup
	for _, p := range s.workers {
		wg.Go(func() { fail(p.stop(syscall.SIGTERM, 20*time.Second)) })
	}
	wg.Wait()
	keys := func(ctx context.Context) error {
		resp, err := s.root.Get(ctx, root, clientv3.WithPrefix(), clientv3.WithKeysOnly())
		if err != nil {
			return err
		}
		for _, kv := range resp.Kvs {
			if !strings.HasPrefix(string(kv.Key), data.Data) {
				s.add(oracle.Entry{Kind: oracle.Left, Op: "key", Value: string(kv.Key)})
			}
		}
		return nil
	}
	if err := s.insist(ctx, keys); err != nil {
		return err
	}
	_ = retry.Sleep(ctx, oracle.RecoverTime) // so that observers see the last state
	for _, p := range s.workers {
		if p.sidecar != nil {
			fail(p.sidecar.stop(syscall.SIGTERM, 20*time.Second))
		}
	}
	for _, p := range s.watchers {
		fail(p.stop(syscall.SIGTERM, 20*time.Second))
	}
	fail(s.resource.stop(syscall.SIGTERM, 20*time.Second))
	// If the answer to a grant was lost, it may have left a lease without keys, which expires.
	var leases []string
	deadline := time.Now().Add(s.p.TTL + oracle.RecoverTime)
	for {
		err := s.insist(ctx, func(ctx context.Context) error {
			resp, err := s.root.Leases(ctx)
			if err != nil {
				return err
			}
			leases = nil
			for _, l := range resp.Leases {
				ttl, err := s.root.TimeToLive(ctx, l.ID)
				if err != nil {
					return err
				}
				if ttl.GrantedTTL != int64(etcdctlTTL/time.Second) {
					leases = append(leases, fmt.Sprintf("%x", int64(l.ID)))
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		if len(leases) == 0 || time.Now().After(deadline) {
			break
		}
		_ = retry.Sleep(ctx, 200*time.Millisecond)
	}
	for _, id := range leases {
		s.add(oracle.Entry{Kind: oracle.Left, Op: "lease", Value: id})
	}
	// The audit does not see revisions of keys outside root. It sees this one.
	var rev int64
	err := s.insist(ctx, func(ctx context.Context) error {
		resp, err := s.root.Put(ctx, root+"end", "")
		if err == nil {
			rev = resp.Header.Revision
		}
		return err
	})
	if err != nil {
		return err
	}
	fail(s.audit.stop(rev))
	for _, m := range s.members {
		m.kill()
	}
	return nil
}

// judge checks a record and writes the report. If a safeguard was off, it fails unless the rule of that mutation is
// violated.
func judge(dir string) error {
	history, err := readHistory(dir)
	if err != nil {
		return err
	}
	p := parameters(history)
	if p.TTL == 0 {
		return fmt.Errorf("the record in %s does not contain its parameters", dir)
	}
	verdict := oracle.Check(history, p.options())
	report := filepath.Join(dir, "report.md")
	if err := writeFile(report, func(f *os.File) error { return writeReport(f, history, verdict, p.command()) }); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, "timeline.svg"), func(f *os.File) error { return writeTimeline(f, history, verdict, 0, 0) }); err != nil {
		return err
	}
	if m := mutationNamed(p.Mutation); m != nil {
		if !slices.ContainsFunc(verdict.Violations, func(v oracle.Violation) bool { return v.Rule == m.rule }) {
			return fmt.Errorf("mutation %s was not detected by the rule %q, so nothing shows that this safeguard works: %s", m.name, m.rule, m.safeguard)
		}
		fmt.Printf("mutation %s was detected, so this safeguard matters: %s\n", m.name, m.safeguard)
		return nil
	}
	text, err := os.ReadFile(report)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", text)
	if found := len(verdict.Violations); found > 0 {
		return fmt.Errorf("%d violations; seed %d, record in %s", found, p.Seed, dir)
	}
	return nil
}

// command returns the command that runs a campaign with these parameters.
func (p Parameters) command() string {
	args := []string{"go run ./internal/chaos", "-seed", fmt.Sprint(p.Seed)}
	if p.Mutation != "" {
		args = append(args, "-mutation", p.Mutation)
	} else {
		args = append(args, "-duration", p.Duration.String(), "-ttl", p.TTL.String())
		if len(p.Faults) > 0 {
			args = append(args, "-faults", strings.Join(p.Faults, ","))
		}
	}
	args = append(args, "-members", fmt.Sprint(p.Members), "-candidates", fmt.Sprint(p.Candidates))
	if p.Race {
		args = append(args, "-race")
	}
	if p.Binary != "" {
		args = append(args, "-etcd", p.Binary)
	}
	return strings.Join(args, " ")
}

func writeFile(name string, write func(*os.File) error) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}

// Bench measures this library and its peers on the same etcd.
//
//	go run .                   # every row, about 35 minutes
//	go run . -quick -o /tmp    # every row with few trials; elsewhere, since its figures are rough
//	go run . -only 1,2         # some rows
//
// It writes the tables of README.md, between the markers there, and the plots beside it. Every
// etcd server is a process of its own, on loopback, with its data synced to disk; it is this very
// binary, started anew, and ends with it. In a row, the contestants take turns trial by trial.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"example.com/leader/internal/etcdtest"
	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
)

// A row is one question, with the answer of each contestant and what the library has to reach.
type row struct {
	number  int
	name    string
	measure func(ctx context.Context, r *run) (*result, error)
}

var rows = []row{
	{1, "handoff", measureHandoff},
	{2, "fresh-successor", measureFreshSuccessor},
	{3, "ping-pong", measurePingPong},
	{4, "start", measureStart},
	{5, "crash", measureCrash},
	{6, "blackhole", measureBlackhole},
	{7, "candidates", measureCandidates},
	{8, "elections", measureElections},
	{9, "waiting", measureWaiting},
	{10, "observers", measureObservers},
	{11, "renewal", measureRenewal},
	{12, "importer", measureImporter},
	{13, "passwords", measurePasswords},
	{14, "transfer", measureTransfer},
}

func main() {
	be()
	only := flag.String("only", "", "measure only these `rows`, such as 1,2")
	quick := flag.Bool("quick", false, "make few trials: rough figures, within minutes")
	dir := flag.String("o", ".", "write README.md and the plots to this `directory`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := bench(ctx, *only, *quick, *dir)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// be turns the process into what it was started as, if that is not the benchmark itself: a member
// of a cluster, or one whose resources are measured or that is killed.
func be() {
	etcdtest.Main()
	klog.SetLogger(logr.Discard()) // client-go logs every step
	beChild()
}

func bench(ctx context.Context, only string, quick bool, dir string) error {
	chosen := rows
	if only != "" {
		chosen = nil
		for field := range strings.SplitSeq(only, ",") {
			i := slices.IndexFunc(rows, func(r row) bool { return strconv.Itoa(r.number) == strings.TrimSpace(field) })
			if i < 0 {
				return fmt.Errorf("-only %s: there is no row %q", only, field)
			}
			chosen = append(chosen, rows[i])
		}
	}
	size := full
	if quick {
		size = few
	}
	rep := report{dir: dir, command: "go run ." + strings.Join(append([]string{""}, os.Args[1:]...), " ")}
	for _, row := range chosen {
		began := time.Now()
		fmt.Printf("%s row %d: %s\n", began.Format(time.TimeOnly), row.number, row.name)
		res, err := measure(ctx, row, size, func(format string, args ...any) {
			fmt.Printf("%s   "+format+"\n", append([]any{time.Now().Format(time.TimeOnly)}, args...)...)
		})
		if err != nil {
			return fmt.Errorf("row %d: %w", row.number, err)
		}
		fmt.Print(res)
		if err := rep.add(row, res, time.Since(began)); err != nil {
			return err
		}
	}
	if err := rep.picture(); err != nil || only != "" {
		return err
	}
	return rep.summarize()
}

// measure runs one row, with clusters and clients that end with it.
func measure(ctx context.Context, row row, size size, log func(string, ...any)) (*result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &run{size: size, log: log}
	defer r.stop()
	res, err := row.measure(ctx, r)
	return res, cmp.Or(ctx.Err(), err)
}

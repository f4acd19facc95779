//go:build linux

package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"example.com/leader/internal/oracle"
	"golang.org/x/sys/unix"
)

// Parameters are the settings of a run.
type Parameters struct {
	Seed       uint64        `json:"seed"`
	Duration   time.Duration `json:"duration"`
	Members    int           `json:"members"`
	Candidates int           `json:"candidates"`
	TTL        time.Duration `json:"ttl"` // both requested from etcd and granted by it
	Margin     time.Duration `json:"margin"`
	Faults     []string      `json:"faults"`
	Etcd       string        `json:"etcd"`             // version
	Binary     string        `json:"binary,omitempty"` // path of the etcd to run, if not the embedded one
	Race       bool          `json:"race,omitempty"`
	Mutation   string        `json:"mutation,omitempty"`
	Elections  []string      `json:"elections"`
}

// root is the prefix of a run's elections, and of everything else that it has in etcd. data contains where its data is.
const root = "chaos/"

var data = oracle.Options{Data: root + "data/"}

// options are the settings for the oracle.
func (p Parameters) options() oracle.Options {
	o := data
	o.TTL, o.Margin, o.Elections = p.TTL, p.Margin, p.Elections
	o.Require = []oracle.Kind{
		oracle.Run, oracle.Fault, oracle.Calm, oracle.CampaignFailed, oracle.Changed, oracle.Resigning, oracle.Renewed,
		oracle.Tried, oracle.Checked, oracle.Proclaimed, oracle.Read, oracle.Append, oracle.Observed, oracle.ObserveEnded, oracle.Current, oracle.Candidates, oracle.Closed,
	}
	o.DeposedAfter = electionTimeout * 4 / 5 // less than the whole, because the last heartbeat came before the pause
	return o
}

// now is the machine's monotonic clock, the same for all processes.
func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

// A Recorder writes a process's part of the history. It is safe for concurrent use.
type Recorder struct {
	proc string
	mu   sync.Mutex
	f    *os.File
}

// newRecorder opens a new file in dir for what a process records under the name proc.
func newRecorder(dir, proc string) (*Recorder, error) {
	name := filepath.Join(dir, fmt.Sprintf("%s.%d.jsonl", proc, os.Getpid()))
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644) // a pid may be used again
	if err != nil {
		return nil, err
	}
	return &Recorder{proc: proc, f: f}, nil
}

// add writes the entry, with the process's name and, if it has none, the time. It panics if it cannot write: a process
// without a history must not continue.
func (r *Recorder) add(e oracle.Entry) {
	if e.Proc == "" {
		e.Proc = r.proc
	}
	if e.T == 0 {
		e.T = now()
	}
	line := oracle.Encode(e)
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := r.f.Write(line); err != nil {
		panic(err)
	}
}

// readHistory merges the files of all processes in dir, by time.
func readHistory(dir string) ([]oracle.Entry, error) {
	files, err := recordFiles(dir)
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no history in %q", dir)
	}
	var history []oracle.Entry
	for _, file := range files {
		entries, err := readFile(filepath.Join(dir, file))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		history = append(history, entries...)
	}
	oracle.Sort(history)
	return history, nil
}

// recordFiles returns the names of the files of a record.
func recordFiles(dir string) ([]string, error) { return fs.Glob(os.DirFS(dir), "*.jsonl") }

func readFile(name string) ([]oracle.Entry, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return oracle.Decode(f)
}

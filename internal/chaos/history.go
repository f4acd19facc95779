//go:build linux

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Kind says what an [Entry] tells and which of its fields it uses, beside T, Proc and Kind.
type Kind string

// What processes under test tell.
const (
	// Term is an election won. From..T is the campaign; Election, Token, Key, Lease, Op ("leader", or
	// the peer: "stock", "etcdctl").
	Term Kind = "term"
	// Belief is a piece of a term in which its holder believed that it led: it had an answer at From
	// already and asked for another at T, and all of them said so. Of one answer alone, asked at T and
	// got at From, From is the later. Pieces of a term that follow each other without a pause of the
	// process begin where the one before them ends. Election, Token, Op (what was asked: "IsLeader",
	// "Context"; "stock", "etcdctl" for a peer, which may believe what it likes).
	Belief Kind = "belief"
	// GivenUp is a campaign whose context ended before it was elected, From..T. Election.
	GivenUp Kind = "given-up"
	// Evicted is a candidate that says that its key was deleted by somebody else before it was elected. Election, Err.
	Evicted Kind = "evicted"
	// Resigning is told before a term is given up. Election, Token.
	Resigning Kind = "resigning"
	// Ended is told by the hook of that name. Election, Token, Err (the cause).
	Ended Kind = "ended"
	// Renewed is a renewal that counted. From is when it was sent; Lease, Until (when etcd may let the
	// lease expire: the deadline and the margin).
	Renewed Kind = "renewed"
	// Refused is a renewal that etcd acknowledged in vain. Lease.
	Refused Kind = "refused"
	// Read is a linearizable read of a value in etcd, From..T. Election, Token, Op ("counter",
	// "register"), Value.
	Read Kind = "read"
	// Write is a guarded write, From..T. Election, Token, Op, Base (the value that was read before),
	// Value, Rev (of etcd's answer), Result.
	Write Kind = "write"
	// Append is a request to the resource outside etcd, From..T. Election, Token, Value, Result.
	Append Kind = "append"
	// Observed is a pair that Observe has yielded. Election, Op (which call of Observe), Token, Key,
	// Value, Lease; Err if it was the last one.
	Observed Kind = "observed"
	// Failure is something that must not happen: an API call that returns what it should not, a
	// goroutine that is left. Err.
	Failure Kind = "failure"
)

// What the orchestrator tells.
const (
	// Run is the first entry: Value are the parameters, as JSON.
	Run Kind = "run"
	// Start is a process that was started. Op (which sort: "candidate", "stock", "etcdctl",
	// "observer", "resource", "member").
	Start Kind = "start"
	// Exit is a process that has ended. Result ([OK] as it was meant to, also if it was to be killed), Err.
	Exit Kind = "exit"
	// Fault is one fault, From its injection until T, when it was healed. Op (which sort), Value (whom
	// it struck), Err if it could not be injected.
	Fault Kind = "fault"
	// Resumed is a member of etcd that goes on after a pause.
	Resumed Kind = "resumed"
	// Calm is a time without faults, From..T.
	Calm Kind = "calm"
	// Taken is a key that an operator deleted, or that went with a lease that an operator revoked;
	// From..T is the request. Op ("delete", "revoke"), Election, Token, Key, Lease, Result.
	Taken Kind = "taken"
	// Event is a change in etcd, as the first of several watches saw it at T. Rev, Key, Op ("put",
	// "delete"), Token (create revision), Value (of a put), Lease (of a put).
	Event Kind = "event"
	// Accepted is a request that the resource outside etcd has taken or, by Result, refused.
	// Election, Token, Value.
	Accepted Kind = "accepted"
	// Left is something of ours in etcd after everybody has resigned. Op ("key", "lease"), Value.
	Left Kind = "left"
)

// How a request ended.
const (
	OK      = "ok"
	Failed  = "failed"  // it has certainly not had an effect
	Unknown = "unknown" // it may have had one, or have one yet
)

// An Entry is one line of a history. Times are nanoseconds of the machine's monotonic clock.
type Entry struct {
	T        int64  `json:"t"`
	From     int64  `json:"from,omitempty"`
	Until    int64  `json:"until,omitempty"`
	Proc     string `json:"proc"`
	Kind     Kind   `json:"kind"`
	Election string `json:"election,omitempty"` // with its prefix
	Token    int64  `json:"token,omitempty"`
	Key      string `json:"key,omitempty"`
	Lease    int64  `json:"lease,omitempty"`
	Op       string `json:"op,omitempty"`
	Base     string `json:"base,omitempty"`
	Value    string `json:"value,omitempty"`
	Rev      int64  `json:"rev,omitempty"`
	Result   string `json:"result,omitempty"`
	Err      string `json:"err,omitempty"`
}

// Parameters are what a run was started with.
type Parameters struct {
	Seed       uint64        `json:"seed"`
	Duration   time.Duration `json:"duration"`
	Members    int           `json:"members"`
	Candidates int           `json:"candidates"`
	TTL        time.Duration `json:"ttl"` // what was asked for, and what etcd granted
	Margin     time.Duration `json:"margin"`
	Faults     []string      `json:"faults"`
	Etcd       string        `json:"etcd"`             // version
	Binary     string        `json:"binary,omitempty"` // of etcd, if it is not the embedded one
	Race       bool          `json:"race,omitempty"`
	Mutation   string        `json:"mutation,omitempty"`
	Elections  []string      `json:"elections"`
}

// Keys of a run: an election is root + a name, its candidates are root + name + "/" + lease, its data
// are dataRoot + name + "/" + what.
const (
	root     = "chaos/"
	dataRoot = "chaos/data/"
)

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

// newRecorder opens a new file in dir for what a process tells under the name proc.
func newRecorder(dir, proc string) (*Recorder, error) {
	name := filepath.Join(dir, fmt.Sprintf("%s.%d.jsonl", proc, os.Getpid()))
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644) // the pid may come again
	if err != nil {
		return nil, err
	}
	return &Recorder{proc: proc, f: f}, nil
}

// add writes the entry, with the process's name and, if it has none, the time. A process that cannot
// write its history must not go on.
func (r *Recorder) add(e Entry) {
	if e.Proc == "" {
		e.Proc = r.proc
	}
	if e.T == 0 {
		e.T = now()
	}
	line, err := json.Marshal(e)
	if err != nil {
		panic(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := r.f.Write(append(line, '\n')); err != nil {
		panic(err)
	}
}

// readHistory merges the files of all processes in dir, by time.
func readHistory(dir string) ([]Entry, error) {
	files, err := recordFiles(dir)
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no history in %q", dir)
	}
	var history []Entry
	for _, file := range files {
		entries, err := readFile(filepath.Join(dir, file))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		history = append(history, entries...)
	}
	slices.SortStableFunc(history, func(a, b Entry) int { return cmp.Compare(a.T, b.T) })
	return history, nil
}

// recordFiles are the names of a record's files.
func recordFiles(dir string) ([]string, error) { return fs.Glob(os.DirFS(dir), "*.jsonl") }

func readFile(name string) ([]Entry, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var entries []Entry
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return entries, nil // what has no end of line was being written when the process was killed
		}
		if err != nil {
			return nil, err
		}
		var e Entry
		d := json.NewDecoder(bytes.NewReader(line))
		d.DisallowUnknownFields()
		if err := d.Decode(&e); err != nil {
			return nil, fmt.Errorf("line %d: %w", len(entries)+1, err)
		}
		entries = append(entries, e)
	}
}

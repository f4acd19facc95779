// Package oracle judges what was recorded of candidates, leaders and observers while faults struck them: whether
// the guarantees were kept, whatever system has recorded it. A history is a list of entries, and [Check] says what
// they come to.
//
// It knows nothing of processes, files or real time: names are names, and a time is a count of nanoseconds on a
// clock that all entries of a history share.
package oracle

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
)

// A Kind says what an [Entry] tells and which of its fields it uses, beside T, Proc and Kind.
type Kind string

// What a process under test tells.
const (
	// Campaigning, Elected, CampaignFailed, Changed and Ended are told by the hooks of the library.

	// Campaigning is a campaign that begins. Election, Value (the call that it is of, where that is known).
	Campaigning Kind = "campaigning"
	// CampaignFailed is a campaign that ends without a term. Election, Op (why: [GaveUp], [Held] or
	// [Shut]), Err.
	CampaignFailed Kind = "campaign-failed"
	// Elected is a campaign that ends with a term. Election, Token.
	Elected Kind = "elected"
	// Changed is what LeaderChanged was called with. Election, Token, Key, Value, Lease.
	Changed Kind = "changed"
	// Ended is a term that has ended. Election, Token, Op (the cause: [Resigned], [Expired] or
	// [Evicted]), Err, Until (the deadline that the term says it had).
	Ended Kind = "ended"

	// GivingUp is told before the context of a campaign, or of the campaigns that follow, ends.
	// Election; none means all.
	GivingUp Kind = "giving-up"
	// Tried is a call of TryCampaign that has returned, From..T: its campaign was not to wait. Election.
	Tried Kind = "tried"
	// Closing is told before Close is called. Election; a call that is about several is told for each.
	Closing Kind = "closing"
	// Closed is a call of Close that has returned, From..T. Election, Result.
	Closed Kind = "closed"

	// Term is a term whose work begins. From is the beginning of the campaign, as far as the caller
	// knows it; Election, Token, Key, Lease, Until (the deadline), Op ([Ours], or the name of what else
	// has won, which may believe what it likes), Value ([ByRun] if Run looks after the term).
	Term Kind = "term"
	// Belief is a piece of a term in which its holder believed that it led: it had an answer at From
	// already and asked for another at T, and all of them said so. Of one answer alone, asked at T and
	// got at From, From is the later. Pieces of a term that follow each other without a pause of the
	// process begin where the one before them ends. Election, Token, Op (what was asked: [ByIsLeader],
	// [ByContext] or [ByRun]; anything else is of no interest).
	Belief Kind = "belief"
	// Resigning is told before a term is given up. Election, Token.
	Resigning Kind = "resigning"
	// Renewed is a renewal that counted. From is when it was sent; Lease, Until (the deadline).
	Renewed Kind = "renewed"
	// Refused is a renewal that etcd acknowledged in vain. Lease.
	Refused Kind = "refused"

	// Read is a linearizable read of a value in etcd, From..T. Election, Token (the reader's term),
	// Op (which value), Value, Rev (of etcd's answer). The first in a term also shows who was in the
	// queue when it began.
	Read Kind = "read"
	// Write is a guarded write, From..T. Election, Token, Op, Base (the value that was read before),
	// Value, Rev (of etcd's answer), Result.
	Write Kind = "write"
	// Proclaimed is a call of Proclaim, From..T. Election, Token, Value, Result.
	Proclaimed Kind = "proclaimed"
	// Append is a request to the resource outside etcd, From..T. Election, Token, Value, Result.
	Append Kind = "append"

	// Observing is a call of Observe that begins. Election, Op (which call).
	Observing Kind = "observing"
	// Observed is a pair without an error that Observe has yielded. Election, Op, Token, Key, Value,
	// Lease.
	Observed Kind = "observed"
	// ObserveEnded is a call of Observe that has returned. Election, Op, Err (of the last pair; none if
	// there was no such pair).
	ObserveEnded Kind = "observe-ended"
	// Current and Candidates are calls of these names, From..T. Election, Err. Current: Token, Key,
	// Value, Lease. Candidates: Value (the tokens in their order, with spaces between them).
	Current    Kind = "current"
	Candidates Kind = "candidates"

	// Stopped is a time From..T in which the process did not run, or a part of it. Op ([Suspended] if the monotonic clock
	// stood still meanwhile).
	Stopped Kind = "stopped"
	// Busy is a time From..T for which the user's code has kept the library waiting, in a hook. Op ([Renewed] if renewals are
	// not told meanwhile).
	Busy Kind = "busy"
	// Failure is something that must not happen: an API call that returns what it should not, a
	// goroutine that is left. Err.
	Failure Kind = "failure"
)

// What the one tells who runs the processes and strikes them.
const (
	// Run is the first entry. Value is what the recorder likes.
	Run Kind = "run"
	// Start is a process that was started. Op (which sort), Value (the process that it is a part of, which it stops
	// and ends with; none if it is one by itself).
	Start Kind = "start"
	// Exit is a process that has ended. Result ([OK] as it was meant to, also if it was to be killed),
	// Err (if it was killed or has failed).
	Exit Kind = "exit"
	// Clock is what is wrong with the clocks of a process. Op ([Rate]: they run Value times as fast as those of the
	// history, from the beginning on; [Set]: the wall clock was set forward at T).
	Clock Kind = "clock"
	// Fault is one fault, From its injection until T, when it was healed. Op (which sort), Value (whom
	// it struck), Err if it could not be injected.
	Fault Kind = "fault"
	// Resumed is a member of etcd that goes on after a pause, From..T. Op ([Follower] if it was known to
	// be one when it was paused).
	Resumed Kind = "resumed"
	// Calm is a time without faults, From..T.
	Calm Kind = "calm"
	// Taken is a key that an operator took, From..T. Op ([Delete]: this key; [Revoke]: all of this
	// lease; [Evict]: that of whoever led), Election, Token (for Evict, of who led before), Key, Lease,
	// Result, Rev: of [OK], the revision in which the keys went; of [Unknown], and of Evict, one in which
	// they were known to be gone, by this request or not. That of Evict may be missing.
	Taken Kind = "taken"
	// Event is a change in etcd, seen at T. Rev, Key, Op ("put", "delete"), Token (create revision),
	// Value (of a put; of a candidate's first put, its process's name, alone or before a slash), Lease (of
	// a put).
	Event Kind = "event"
	// AuditEnd says that all events up to its Rev were told, and that nothing was asked of etcd later.
	AuditEnd Kind = "audit-end"
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

// What Op is.
const (
	Ours = "leader" // of Term: won by a process that is to keep the rules

	// Of Belief.
	ByIsLeader = "IsLeader"
	ByContext  = "Context"
	ByRun      = "Run" // the context of the function that Run calls

	// Of Ended.
	Resigned = "resigned"
	Expired  = "expired"
	Evicted  = "evicted"

	// Of CampaignFailed.
	GaveUp = "gave-up" // its context had ended
	Held   = "held"    // it was not to wait
	Shut   = "shut"    // Close was called

	// Of Taken.
	Delete = "delete"
	Revoke = "revoke"
	Evict  = "evict"

	Follower = "follower" // of Resumed

	Suspended = "suspended" // of Stopped

	// Of Clock.
	Rate = "rate"
	Set  = "set"
)

// An Entry is one line of a history. Times are nanoseconds.
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

// Encode returns the entry as a line of JSON.
func Encode(e Entry) []byte {
	line, err := json.Marshal(e)
	if err != nil {
		panic(err) // an entry has nothing that JSON has not
	}
	return append(line, '\n')
}

// Decode reads entries, one a line. A last line without an end was being written when its process was killed, and is left
// out.
func Decode(r io.Reader) ([]Entry, error) {
	var entries []Entry
	for lines := bufio.NewReader(r); ; {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return entries, nil
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

// Sort brings entries into the order of time. What is of one time stays in its order.
func Sort(history []Entry) {
	slices.SortStableFunc(history, func(a, b Entry) int { return cmp.Compare(a.T, b.T) })
}

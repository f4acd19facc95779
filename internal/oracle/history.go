// Package oracle judges a record of what candidates, leaders and observers did while faults struck them: whether the
// guarantees were kept. It does not matter which system has recorded it. A history is a list of entries, and [Check]
// returns a verdict on it.
//
// The package knows nothing of processes, files or real time. Names are names, and a time is a number of nanoseconds on
// a clock that all entries of a history share.
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

// A Kind says what an [Entry] means and which of its fields it uses, besides T, Proc and Kind.
type Kind string

// Recorded by a process under test.
const (
	// The hooks of the library record Campaigning, Elected, CampaignFailed, Changed and Ended.

	// Campaigning is a campaign that begins. Election, Value (the call that it belongs to, where that is known).
	Campaigning Kind = "campaigning"
	// CampaignFailed is a campaign that ends without a term. Election, Op (why: [GaveUp], [Held],
	// [Shut] or [Unhealthy]), Err.
	CampaignFailed Kind = "campaign-failed"
	// Elected is a campaign that ends with a term. Election, Token.
	Elected Kind = "elected"
	// Changed is what LeaderChanged was called with. Election, Token, Key, Value, Lease.
	Changed Kind = "changed"
	// Ended is a term that has ended. Election, Token, Op (the cause: [Resigned], [Transferred], [Unhealthy], [Expired]
	// or [Evicted]), Err, Until (the deadline that the term reports).
	Ended Kind = "ended"
	// Overdue is a call of the hook of that name. Election, Token, From (when the context had ended; 0 if the function
	// of Run has returned).
	Overdue Kind = "overdue"

	// Checked is a call of the check of WithHealth, From..T, recorded before it returns. Election, Result.
	Checked Kind = "checked"

	// GivingUp is recorded before the context of a campaign, or of the campaigns that follow, ends. Election; without
	// one it is about all elections.
	GivingUp Kind = "giving-up"
	// Tried is a call of TryCampaign that has returned, From..T: its campaign must not wait. Election.
	Tried Kind = "tried"
	// Closing is recorded before Close is called. Election; a call that is about several elections is recorded for
	// each.
	Closing Kind = "closing"
	// Closed is a call of Close that has returned, From..T. Election, Result.
	Closed Kind = "closed"

	// Term is a term whose work begins. From is the beginning of the campaign, as far as the caller knows it. Election,
	// Token, Key, Lease, Until (the deadline), Op ([Ours], or the name of another system that has won, whose belief is
	// not judged), Value ([ByRun] if Run ends the term).
	Term Kind = "term"
	// Belief is a piece of a term in which its holder believed that it led. At From it already had an answer, at T it
	// asked for the last one, and all answers said that it led. A piece may consist of a single answer, asked for at T
	// and received at From; From is then the later. If pieces of a term follow each other without a pause of the
	// process, each begins where the previous one ends. Election, Token, Op (what was asked: [ByIsLeader], [ByContext]
	// or [ByRun]; anything else is ignored).
	Belief Kind = "belief"
	// Resigning is recorded before a term is given up, when its work has stopped. Election, Token.
	Resigning Kind = "resigning"
	// Renewed is a renewal that counted. From is when it was sent; Lease, Until (the deadline).
	Renewed Kind = "renewed"
	// Refused is a renewal that etcd acknowledged but that did not count. Lease.
	Refused Kind = "refused"
	// Granted is a lease that was granted, recorded before the library knows it. Lease.
	Granted Kind = "granted"
	// Revoked is a request to revoke a lease, From..T. Lease, Err.
	Revoked Kind = "revoked"
	// Reclaimed is a call of Reclaim that has returned, From..T. Election; a call that is about several elections is
	// recorded for each. Value (the process whose leases it is about), Result, Err.
	Reclaimed Kind = "reclaimed"

	// Read is a linearizable read of a value in etcd, From..T. Election, Token (the reader's term), Op (which value),
	// Value, Rev (of etcd's answer). The first read in a term also shows who was in the queue when the term began.
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
	// ObserveEnded is a call of Observe that has returned. Election, Op, Err (of the last pair; empty if no pair had an
	// error).
	ObserveEnded Kind = "observe-ended"
	// Current and Candidates are calls of these names, From..T. Election, Err. Current: Token, Key,
	// Value, Lease. Candidates: Value (the tokens in their order, with spaces between them).
	Current    Kind = "current"
	Candidates Kind = "candidates"

	// Stopped is a time From..T in which the process, or a part of it, did not run. Op ([Suspended] if the monotonic
	// clock stood still meanwhile).
	Stopped Kind = "stopped"
	// Busy is a time From..T in which the user's code kept the library waiting, in a hook. Op ([Renewed] if renewals
	// are not reported meanwhile).
	Busy Kind = "busy"
	// Failure is something that must not happen: an API call that returns what it should not, or a goroutine that is
	// left. Err.
	Failure Kind = "failure"
)

// Recorded by the process that runs the others and injects the faults.
const (
	// Run is the first entry. Value is for the recorder: the oracle ignores it.
	Run Kind = "run"
	// Start is a process that was started. Op (its kind), Value (the process that it is a part of, with which it stops
	// and ends; empty if it is a process of its own).
	Start Kind = "start"
	// Exit is a process that has ended. Result ([OK] if it was meant to, even by being killed), Err (if it was killed
	// or has failed), From (when it was told to end, if it was), Op (what becomes of its leases: [Filed] or [Attended],
	// otherwise they expire).
	Exit Kind = "exit"
	// Clock is an error of the clocks of a process. Op ([Rate]: they run Value times as fast as those of the history,
	// from the beginning; [Set]: the wall clock was set forward at T).
	Clock Kind = "clock"
	// Fault is one fault, From its injection until T, when it was healed. Op (its kind), Value (whom it struck), Err if
	// it could not be injected.
	Fault Kind = "fault"
	// Transfer is a call of Transfer, From..T. Election, Token (of who is to lead; 0 for whoever is next), Result
	// ([Failed]: nobody led, or there was no such candidate; [Unknown]: its context has ended), Err.
	Transfer Kind = "transfer"
	// Resumed is a member of etcd that resumes after a pause, From..T. Op ([Follower] if it was known to be a follower
	// when it was paused).
	Resumed Kind = "resumed"
	// Calm is a time without faults, From..T.
	Calm Kind = "calm"
	// Taken is a key that an operator took, From..T. Op ([Delete]: this key; [Revoke]: all keys of this lease; [Evict]:
	// the key of whoever led), Election, Token (for Evict, of who led before), Key, Lease, Result, Rev. With [OK], Rev
	// is the revision in which the keys went. With [Unknown], and for Evict, it is a revision in which they were known
	// to be gone, whether by this request or not. For Evict it may be missing.
	Taken Kind = "taken"
	// Event is a change in etcd, seen at T. Rev, Key, Op ("put", "delete"), Token (create revision), Value (of a put; a
	// candidate's first put has its process's name, alone or in front of a slash), Lease (of a put). The key of a
	// request to step back is that of who is asked and "/stepback", its value the token of who is asked.
	Event Kind = "event"
	// AuditEnd says that all events up to its Rev were recorded, and that nothing was requested of etcd later.
	AuditEnd Kind = "audit-end"
	// Accepted is a request that the resource outside etcd has accepted or, according to Result, refused. Election,
	// Token, Value.
	Accepted Kind = "accepted"
	// Left is something of this library that is in etcd after everybody has resigned. Op ("key", "lease"), Value.
	Left Kind = "left"
)

// Results of requests.
const (
	OK      = "ok"
	Failed  = "failed"  // it certainly had no effect
	Unknown = "unknown" // it may have had an effect, or may still have one
)

// Values of Op.
const (
	Ours = "leader" // of Term: won by a process that must keep the rules

	// Of Belief.
	ByIsLeader = "IsLeader"
	ByContext  = "Context"
	ByRun      = "Run" // the context of the function that Run calls

	// Of Ended.
	Resigned    = "resigned"
	Transferred = "transferred"
	Unhealthy   = "unhealthy"
	Expired     = "expired"
	Evicted     = "evicted"

	// Of CampaignFailed.
	GaveUp = "gave-up" // its context had ended
	Held   = "held"    // it must not wait, and somebody else was there
	Shut   = "shut"    // Close was called
	// Unhealthy: it must not wait, and its check had not succeeded.

	// Of Taken.
	Delete = "delete"
	Revoke = "revoke"
	Evict  = "evict"

	Follower = "follower" // of Resumed

	// Of Exit.
	Filed    = "filed"    // others may revoke them, for it had a lease file
	Attended = "attended" // somebody is there who does so at once

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
		panic(err) // every field of an entry can be encoded
	}
	return append(line, '\n')
}

// Decode reads entries, one a line. It leaves out a last line without an end, which its process was writing when it was
// killed.
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

// Sort sorts entries by time. Entries of the same time stay in their order.
func Sort(history []Entry) {
	slices.SortStableFunc(history, func(a, b Entry) int { return cmp.Compare(a.T, b.T) })
}

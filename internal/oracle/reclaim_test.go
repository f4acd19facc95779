package oracle

import "testing"

func TestLeasesOfDeadProcessesAloneAreRevoked(t *testing.T) {
	t.Parallel()
	granted := Entry{T: 10, Proc: "c1", Kind: Granted, Lease: 1}
	killed := Entry{T: 4990, From: 4980, Proc: "c1", Kind: Exit, Op: Filed, Result: OK, Err: "signal: killed"}
	// dies is that c1 is killed while it leads, and that its key is gone at 5 s. Its lease might last until 6 s.
	dies := func(extra ...any) scene {
		return scene{gone: 5000, drop: "ended c1 resigning c1", extra: join(granted, join(extra...))}
	}
	revoked := func(proc string, from int64) Entry {
		return Entry{T: from + 5, From: from, Proc: proc, Kind: Revoked, Lease: 1}
	}
	exit := func(change func(*Entry)) Entry { return with(killed, change) }
	testScenes(t, map[string]sceneTest{
		"killed, and gone early":             {dies(killed), good},
		"gone as it was killed":              {dies(exit(func(e *Entry) { e.From, e.T = 5000, 5010 })), good},
		"gone before it was killed":          {dies(exit(func(e *Entry) { e.From, e.T = 5001, 5010 })), violated(RuleLease)},
		"killed without a lease file":        {dies(exit(func(e *Entry) { e.Op = "" })), violated(RuleLease)},
		"told to end, and not killed":        {dies(exit(func(e *Entry) { e.Err = "" })), violated(RuleEnded, RuleLease)},
		"another was killed":                 {dies(exit(func(e *Entry) { e.Proc = "c3" })), violated(RuleEnded, RuleLease)},
		"one of the same name was killed":    {dies(exit(func(e *Entry) { e.From, e.T = 1, 2 })), violated(RuleEnded, RuleLease)},
		"a lease of which nothing was told":  {scene{gone: 5000, drop: "ended c1 resigning c1", extra: join(killed)}, violated(RuleLease)},
		"believes until it is gone":          {dies(killed, beliefOf("c1", 10, ByIsLeader, 11, 5000)), good},
		"believes when it is gone":           {dies(killed, beliefOf("c1", 10, ByIsLeader, 11, 5001)), violated(RuleMargin)},
		"both believe":                       {dies(killed, beliefOf("c1", 10, ByIsLeader, 11, 5100), beliefOf("c2", 20, ByIsLeader, 5050, 9000)), violated(RuleExclusion, RuleMargin)},
		"revoked by itself":                  {scene{extra: join(granted, revoked("c1", 9690))}, good},
		"revoked by another when it is dead": {dies(killed, revoked("s", 4980)), good},
		"revoked by another while it lives":  {dies(killed, revoked("s", 4979)), violated(RuleReclaim)},
		"revoked by another, and it lives":   {scene{extra: join(granted, revoked("s", 9699))}, violated(RuleReclaim)},
		"revoked by the next of its name":    {dies(killed, revoked("c1", 4992)), good},
		"revoked, of which nothing was told": {scene{extra: join(revoked("s", 4000))}, good},
	})
	if v := Check(dies(killed, revoked("s", 4985), with(revoked("s", 4986), func(e *Entry) { e.Err = "no" }), revoked("c1", 100), revoked("c1", 4992)).history(), sceneOptions()); v.Checked.Reclaimed != 1 || v.Checked.Revocations != 2 {
		t.Errorf("checked %+v", v.Checked)
	}

	call := Entry{T: 4998, From: 4990, Proc: "s", Kind: Reclaimed, Value: "c1", Result: OK}
	reads := Entry{T: 4999, From: 4999, Proc: "r", Kind: Read, Op: "register", Value: "1 10:1", Rev: 4999} // the key was there
	calls := func(change func(*Entry)) scene { return dies(killed, reads, with(call, change)) }
	late := join(Entry{T: 4, Proc: "c3", Kind: Granted, Lease: 3}, Entry{T: 5, Proc: "c3", Kind: Campaigning}, exit(func(e *Entry) { e.Proc, e.From, e.T = "c3", 7, 7 }),
		with(call, func(e *Entry) { e.Value, e.From, e.T = "c3", 8, 9 }), event(30, 30, "chaos/a/3", "c3"), event(40, 30, "chaos/a/3", ""))
	testScenes(t, map[string]sceneTest{
		"Reclaim returns when it is gone":            {calls(func(e *Entry) { e.T = 4999 }), good},
		"Reclaim returns before":                     {calls(func(*Entry) {}), violated(RuleReclaim)},
		"Reclaim was called while it lived":          {calls(func(e *Entry) { e.From = 10 }), violated(RuleReclaim)},
		"Reclaim was called before it had a key":     {calls(func(e *Entry) { e.From = 9 }), good},
		"Reclaim returns, and it lives":              {scene{extra: join(granted, with(call, func(e *Entry) { e.From, e.T = 10, 6000 }))}, violated(RuleReclaim)},
		"a key comes when Reclaim has returned":      {scene{extra: late}, violated(RuleReclaim)},
		"Reclaim fails":                              {calls(func(e *Entry) { e.Result = Unknown }), good},
		"Reclaim is about another":                   {calls(func(e *Entry) { e.Value = "c3" }), good},
		"Reclaim is about another election":          {calls(func(e *Entry) { e.Election = "chaos/b" }), good},
		"Reclaim returns again, when it is gone":     {dies(killed, with(call, func(e *Entry) { e.From, e.T = 5001, 5002 })), good},
		"Reclaim of an older one, and the key stays": {scene{extra: join(exit(func(e *Entry) { e.From, e.T = 1, 2 }), granted, with(call, func(e *Entry) { e.From, e.T = 3, 4 }))}, good},
	})
}

func TestADeadProcessIsReclaimedSoonInCalm(t *testing.T) {
	t.Parallel()
	granted := Entry{T: 10, Proc: "c1", Kind: Granted, Lease: 1}
	killed := Entry{T: 4390, From: 4380, Proc: "c1", Kind: Exit, Op: Attended, Result: OK, Err: "signal: killed"}
	failed := Entry{T: 4500, From: 20, Proc: "s", Kind: Reclaimed, Value: "c1", Result: Unknown, Err: "no"}
	// dies is that c1 is killed in calm, and that its key is gone at a time. Its lease might last until 6 s.
	dies := func(gone int64, extra ...any) scene {
		return scene{gone: gone, drop: "ended c1 resigning c1", extra: join(granted, join(extra...))}
	}
	testScenes(t, map[string]sceneTest{
		"reclaimed":                    {dies(4600, killed, calm(1000, 9990)), good},
		"expired":                      {dies(6000, killed, calm(1000, 9990)), violated(RuleReclaim)},
		"expired, as nobody was there": {dies(6000, with(killed, func(e *Entry) { e.Op = Filed }), calm(1000, 9990)), good},
		"expired, not in calm":         {dies(6000, killed, calm(2381, 9990)), good},
		"expired, and calm is over":    {dies(6000, killed, calm(100, 5999)), good},
		"expired soon after":           {dies(6000, with(killed, func(e *Entry) { e.From, e.T = 4980, 5000 }), calm(1000, 9990)), good},
		"Reclaim fails":                {dies(4600, killed, failed, calm(1000, 9990)), violated(RuleReclaim)},
		"Reclaim fails, not in calm":   {dies(4600, killed, failed, calm(2501, 9990)), good},
	})
}

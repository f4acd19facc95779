package oracle

import (
	"slices"
	"testing"
)

func exactly(o *Options) { o.Exact = true }

func TestClocksOfAProcessMayBeWrong(t *testing.T) {
	t.Parallel()
	clock := func(rate string) Entry { return Entry{Proc: "c1", Kind: Clock, Op: Rate, Value: rate} }
	// lasting is that each renewal of c1 buys so much.
	lasting := func(d int64) []Entry {
		all := []Entry{with(first, func(e *Entry) { e.Until = 9 + d })}
		for _, e := range renewals("c1", 1, 4000) {
			all = append(all, with(e, func(e *Entry) { e.Until = e.From + d }))
		}
		return all
	}
	expires := func(extra ...any) scene { return scene{gone: 6000, cause: Expired, extra: join(extra...)} }
	until := func(t int64) Entry { return beliefOf("c1", 10, ByIsLeader, 11, t) }
	set := func(at int64) Entry { return Entry{T: at, Proc: "c1", Kind: Clock, Op: Set} }
	endsAt := func(at int64) Entry {
		return Entry{T: at, Until: at, Proc: "c1", Kind: Ended, Token: 10, Op: Expired}
	}
	each := slices.Repeat([]string{RuleDeadline}, len(renewals("c1", 1, 4000))+2) // the first deadline and the belief, too
	successor := beliefOf("c2", 20, ByIsLeader, 6002, 9000)
	testScenes(t, map[string]sceneTest{
		"fast":                        {expires(clock("1.25"), lasting(1280), until(5280)), good},
		"fast, and believes too long": {expires(clock("1.25"), lasting(1280), until(5281)), violated(RuleDeadline)},
		"slow, as far as the margin":  {expires(clock("0.8"), lasting(2000), until(6000)), good},
		"slow, and believes too long": {expires(clock("0.8"), lasting(2000), until(6001)), violated(RuleDeadline, RuleMargin)},
		"not slow":                    {expires(lasting(2000), until(6000)), violated(append(each, RuleMargin)...)},
		"slower than the margin": {
			scene{gone: 6000, cause: Evicted, extra: join(clock("0.5"), lasting(3200), until(7000), successor)}, overlap(998),
		},
		"no slower than the margin": {
			scene{gone: 6000, cause: Evicted, extra: join(clock("0.8"), lasting(2000), until(6000), successor)}, violated(RuleEnded),
		},
		"set forward":                  {expires(set(4900), endsAt(5000)), good},
		"set forward before a renewal": {expires(set(3999), endsAt(5000)), violated(RuleEnded)},
		"set forward later":            {expires(set(5001), endsAt(5000)), violated(RuleEnded)},
	}, exactly)
}

func TestWhatHindersAProcessExcusesWhatIsLate(t *testing.T) {
	t.Parallel()
	expires := func(extra ...any) scene { return scene{gone: 6000, cause: Expired, extra: join(extra...)} }
	context := func(t int64) Entry { return beliefOf("c1", 10, ByContext, 11, t) }
	stopped := func(proc string, from, to int64) Entry { return Entry{T: to, From: from, Proc: proc, Kind: Stopped} }
	suspended := func(from, to int64) Entry {
		return Entry{T: to, From: from, Proc: "c1", Kind: Stopped, Op: Suspended}
	}
	part := Entry{Proc: "c1", Kind: Start, Op: "elector", Value: "host"}
	gaveUp := func(at int64) []Entry {
		return []Entry{{T: 3000, Proc: "c3", Kind: GivingUp, Election: "chaos/a"}, {T: at, Proc: "c3", Kind: CampaignFailed, Op: GaveUp}}
	}
	waiting := func(extra ...any) scene { return scene{extra: waits(4000, extra...)} }
	busy := func(proc, op string, from, to int64) Entry {
		return Entry{T: to, From: from, Proc: proc, Kind: Busy, Op: op}
	}
	dead := Entry{T: 5900, Proc: "c1", Kind: Exit, Result: OK, Err: "killed"}
	killed := func(extra ...any) scene {
		return scene{gone: 7000, cause: Expired, drop: "ended c1", extra: join(dead, beliefOf("c1", 10, ByIsLeader, 11, 5800), join(extra...))}
	}
	testScenes(t, map[string]sceneTest{
		"its host has stopped":                     {expires(part, context(6050), stopped("host", 5600, 6050)), late(1)},
		"another's host has stopped":               {expires(context(6050), stopped("host", 5600, 6050)), violated(RuleDeadline, RuleMargin)},
		"stops that overlap":                       {expires(context(6050), stopped("c1", 5700, 5800), stopped("c1", 5590, 6050)), late(1)},
		"its timer was set late":                   {expires(context(5601)), late(1)},
		"later than that":                          {expires(context(5602)), violated(RuleDeadline, RuleMargin)},
		"suspended while its timer was armed":      {expires(context(5700), suspended(4600, 4700)), late(1)},
		"suspended for less than that":             {expires(context(5702), suspended(4600, 4700)), violated(RuleDeadline, RuleMargin)},
		"suspended before it was armed":            {expires(context(5602), suspended(4500, 4599)), violated(RuleDeadline, RuleMargin)},
		"stopped before":                           {expires(context(5602), stopped("c1", 4600, 4610)), violated(RuleDeadline, RuleMargin)},
		"given up in time":                         {waiting(gaveUp(5000)), good},
		"given up late":                            {waiting(gaveUp(5001)), violated(RuleCampaign)},
		"given up late, as it was stopped":         {waiting(gaveUp(5500), stopped("c3", 3500, 4000)), good},
		"given up late, as a hook took its time":   {waiting(gaveUp(5500), busy("c3", "", 3500, 4000)), good},
		"given up later than that":                 {waiting(gaveUp(5501), busy("c3", "", 3500, 4000)), violated(RuleCampaign)},
		"given up late, as another's hook did":     {waiting(gaveUp(5500), busy("c4", "", 3500, 4000)), violated(RuleCampaign)},
		"killed, and believed for too long":        {killed(), violated(RuleDeadline)},
		"killed before it could tell of renewals":  {killed(busy("c1", string(Renewed), 4050, 5900)), good},
		"killed after it could":                    {killed(busy("c1", string(Renewed), 4050, 5899)), violated(RuleDeadline)},
		"killed before it could tell of something": {killed(busy("c1", "", 4050, 5900)), violated(RuleDeadline)},
	}, exactly)
}

func TestCopiesOfAJoinThatArriveLateAreNobodys(t *testing.T) {
	t.Parallel()
	campaigning := func(at int64, value string) Entry {
		return Entry{T: at, Proc: "c3", Kind: Campaigning, Election: "chaos/a", Value: value}
	}
	// late is a key that comes in a campaign of the call c3/2, and goes.
	late := func(value string, extra ...any) scene {
		return scene{extra: join(
			campaigning(3000, "c3/2"), event(3100, 3100, "chaos/a/3", value), event(4500, 3100, "chaos/a/3", ""),
			renewals("c3", 3, 4000)[5:], join(extra...),
		)}
	}
	testScenes(t, map[string]sceneTest{
		"of another call":           {late("c3/1"), good},
		"of this one":               {late("c3/2"), violated(RuleLease)},
		"of a candidacy before":     {late("c3/2", event(3050, 3050, "chaos/a/3", "c3/2"), event(3060, 3050, "chaos/a/3", ""), taken(3050, 3060)), good},
		"of one under another name": {late("c3/2", event(3050, 3050, "chaos/a/4", "c3/2"), event(3060, 3050, "chaos/a/4", ""), taken(3050, 3060)), violated(RuleLease)},
		"and it joins again under that name": {
			late("c3/2", event(3050, 3050, "chaos/a/3", "c3/2"), event(3060, 3050, "chaos/a/3", ""), taken(3050, 3060), event(4600, 4600, "chaos/a/3", "c3/2")),
			good,
		},
	}, exactly)
}

// taken is that an operator has taken the key of a token in a revision.
func taken(token, rev int64) Entry {
	return Entry{T: rev, From: rev, Proc: "operator", Kind: Taken, Op: Delete, Token: token, Rev: rev, Result: OK}
}

func TestRunRestsBeforeTheSameCallCampaignsAgain(t *testing.T) {
	t.Parallel()
	again := func(value string) scene {
		return scene{gone: 4999, cause: Evicted, drop: "campaigning c1", extra: join(
			Entry{T: 9, Proc: "c1", Kind: Campaigning, Value: "c1/1"},
			with(first, func(e *Entry) { e.Value = ByRun }), with(deletedIt, func(e *Entry) { e.Proc = "operator" }),
			Entry{T: 5010, Proc: "c1", Kind: Resigning, Token: 10},
			Entry{T: 5059, Proc: "c1", Kind: Campaigning, Value: value},
		)}
	}
	testScenes(t, map[string]sceneTest{
		"another call": {again("c1/2"), good},
		"the same":     {again("c1/1"), violated(RuleCampaign)},
	}, exactly)
}

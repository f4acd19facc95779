package oracle

import (
	"slices"
	"testing"
)

func ended(at int64, cause string) Entry {
	return Entry{T: at, Proc: "c1", Kind: Ended, Token: 10, Op: cause}
}

func resigning(at int64) Entry { return Entry{T: at, Proc: "c1", Kind: Resigning, Token: 10} }

// asked is a request to step back, to the key with this digit.
func asked(at int64, key, token string) Entry {
	return event(at, at, "chaos/a/"+key+"/stepback", token)
}

// by shows that what comes later was not there yet.
func by(t int64) Entry {
	return Entry{T: t + 1, From: t, Proc: "r", Kind: Read, Token: 10, Op: "register", Value: "1 10:1", Rev: t}
}

// healthy are checks that have succeeded, every half second from the beginning until last.
func healthy(proc string, last int64) []Entry {
	var all []Entry
	for t := last % 500; t <= last; t += 500 {
		all = append(all, Entry{T: t, From: t, Proc: proc, Kind: Checked, Election: "chaos/a", Result: OK})
	}
	return all
}

var ofRun = with(first, func(e *Entry) { e.Value = ByRun })

func TestTermEndsTransferredOnlyIfItWasAsked(t *testing.T) {
	t.Parallel()
	transferred := func(extra ...any) scene {
		return scene{gone: 5000, cause: Transferred, extra: join(ended(4950, Transferred), resigning(4999), join(extra...))}
	}
	waiting := func(extra ...any) scene { return scene{extra: waits(4500, extra...)} }
	wrong, lost := violated(RuleEnded), violated(RuleLease)
	testScenes(t, map[string]sceneTest{
		"asked":                              {transferred(asked(4900, "1", "10")), good},
		"nobody":                             {transferred(), wrong},
		"asked as it ended":                  {transferred(asked(4960, "1", "10"), by(4950)), good},
		"asked later":                        {transferred(asked(4960, "1", "10"), by(4951)), wrong},
		"another term was asked":             {transferred(asked(4900, "1", "11")), wrong},
		"another candidate was asked":        {transferred(asked(4900, "2", "20")), wrong},
		"asked in another election":          {transferred(with(asked(4900, "1", "10"), func(e *Entry) { e.Key = "chaos/b/1/stepback" })), wrong},
		"asked for something else":           {transferred(with(asked(4900, "1", "10"), func(e *Entry) { e.Key = "chaos/a/1/step" })), wrong},
		"asked without a token":              {transferred(asked(4900, "1", "x")), wrong},
		"the request was withdrawn":          {transferred(with(asked(4900, "1", "10"), func(e *Entry) { e.Op = "delete" })), wrong},
		"asked, and it has expired":          {scene{gone: 6000, cause: Expired, extra: join(asked(4900, "1", "10"))}, good},
		"asked, and it is gone":              {scene{gone: 5000, cause: Expired, extra: join(asked(4900, "1", "10"), resigning(4999))}, lost},
		"a request is there in the end":      {scene{extra: join(asked(4900, "1", "10"), observed(11, 10))}, good},
		"waiting, asked":                     {waiting(asked(4400, "3", "30")), good},
		"waiting, asked as it went":          {waiting(asked(4510, "3", "30"), by(4500)), good},
		"waiting, asked later":               {waiting(asked(4510, "3", "30"), by(4501)), lost},
		"waiting, and another term is asked": {waiting(asked(4400, "3", "20")), lost},
	})
}

func TestTransferredTermKeepsItsKeyUntilItsWorkHasStopped(t *testing.T) {
	t.Parallel()
	// It believes until 4.6 s, and its key is gone at gone.
	transferred := func(gone int64, extra ...any) scene {
		return scene{gone: gone, cause: Transferred, extra: join(
			asked(4500, "1", "10"), beliefOf("c1", 10, ByIsLeader, 11, 4600), ended(4601, Transferred), join(extra...))}
	}
	killed := func(gone int64, extra ...any) scene {
		s := transferred(gone, Entry{T: 5500, Proc: "c1", Kind: Exit, Result: OK, Err: "killed"}, join(extra...))
		s.extra = slices.DeleteFunc(s.extra, func(e Entry) bool { return e.Kind == Ended })
		s.drop = "ended c1"
		return s
	}
	closed := Entry{T: 4700, Proc: "c1", Kind: Closing}
	early := violated(RuleLease)
	testScenes(t, map[string]sceneTest{
		"Campaign, when it has resigned":          {transferred(4700, resigning(4700)), good},
		"Campaign, a margin after its end":        {transferred(5000, resigning(5500)), good},
		"Campaign, earlier":                       {transferred(4999, resigning(5500)), early},
		"Campaign, closed":                        {transferred(4700, resigning(5500), closed), good},
		"Campaign, killed":                        {killed(5000), good},
		"Campaign, killed, and not asked":         {killed(5000, asked(4500, "1", "11")), good},
		"Campaign, killed, before a margin":       {killed(4999), early},
		"Run, when its function has returned":     {transferred(4700, ofRun, resigning(4700)), good},
		"Run, earlier":                            {transferred(5000, ofRun, resigning(5001)), early},
		"Run, whose function has not returned":    {transferred(5500, ofRun), early},
		"Run, whose lease has expired":            {transferred(6000, ofRun, resigning(6001)), good},
		"Run, closed":                             {transferred(4700, ofRun, resigning(5001), closed), good},
		"Run, killed":                             {killed(5000, ofRun), early},
		"Run, unhealthy, a margin after its end":  {transferred(5000, ofRun, resigning(6001), healthy("c1", 3000)), good},
		"Run, unhealthy, earlier":                 {transferred(4999, ofRun, resigning(6001), healthy("c1", 3000)), early},
		"Run, healthy, a margin after its end":    {transferred(5000, ofRun, resigning(6001), healthy("c1", 4500)), early},
		"Run, whose function was never called":    {scene{gone: 4700, cause: Transferred, drop: "term c1 read c1", extra: join(asked(4500, "1", "10"), ended(4601, Transferred))}, good},
		"Run, whose function was called too late": {transferred(4700, with(ofRun, func(e *Entry) { e.T, e.Until = 4701, 4701 })), good},
	})
}

func TestTermEndsUnhealthyOnlyIfItIs(t *testing.T) {
	t.Parallel()
	// Its last successful check begins at 4 s, so that it is healthy until 5.6 s. Its lease lives longer.
	sick := func(believed, gone int64, extra ...any) scene {
		return scene{gone: gone, cause: Unhealthy, extra: join(renewals("c1", 1, 5500), healthy("c1", 4000),
			beliefOf("c1", 10, ByIsLeader, 11, believed), ended(max(5601, believed+1), Unhealthy), join(extra...))}
	}
	waiting := func(last int64, extra ...any) scene {
		return scene{extra: waits(4500, healthy("c3", last), join(extra...))}
	}
	check := func(from, to int64, result string) Entry {
		return Entry{T: to, From: from, Proc: "c3", Kind: Checked, Election: "chaos/a", Result: result}
	}
	tried := func(extra ...any) scene {
		return scene{extra: join(Entry{T: 5000, Proc: "c3", Kind: Campaigning}, check(5000, 5001, Failed),
			Entry{T: 5900, Proc: "c3", Kind: CampaignFailed, Op: Unhealthy}, join(extra...))}
	}
	isTried := Entry{T: 5901, From: 4999, Proc: "c3", Kind: Tried}
	// A check of TryCampaign succeeds at 5 s. It ends, as unhealthy, when etcd has answered or its machine goes on.
	lapsed := func(end int64) scene {
		return scene{extra: join(Entry{T: 5000, Proc: "c3", Kind: Campaigning}, healthy("c3", 5000),
			Entry{T: end, Proc: "c3", Kind: CampaignFailed, Op: Unhealthy}, Entry{T: end, From: 4999, Proc: "c3", Kind: Tried})}
	}
	wrong, early, lost, late := violated(RuleEnded), violated(RuleLease), violated(RuleLease), violated(RuleHealth)
	testScenes(t, map[string]sceneTest{
		"in time":                                          {sick(5600, 6000, resigning(9000)), good},
		"its timer is late":                                {sick(5700, 6100, resigning(9000)), good},
		"its timer is too late":                            {sick(5701, 6101, resigning(9000)), late},
		"its timer is late, as it was stopped":             {sick(6100, 6500, resigning(9000), Entry{T: 6000, From: 5000, Proc: "c1", Kind: Stopped}), good},
		"without a check":                                  {scene{gone: 5000, cause: Unhealthy, extra: join(ended(4950, Unhealthy), resigning(4999))}, wrong},
		"and healthy":                                      {sick(5600, 6000, resigning(5999), healthy("c1", 5500)), wrong},
		"and healthy just in time":                         {sick(5600, 6000, resigning(5999), healthy("c1", 5590)), wrong},
		"and healthy too late":                             {sick(5590, 6000, resigning(5999), with(check(5599, 5599, OK), func(e *Entry) { e.Proc = "c1" })), good},
		"its key goes when its work has stopped":           {sick(5600, 5700, resigning(5700)), good},
		"its key goes before a margin has passed":          {sick(5600, 5999, resigning(9000)), early},
		"an earlier check answers late":                    {sick(5600, 6000, resigning(9000), with(check(1000, 4500, OK), func(e *Entry) { e.Proc = "c1" })), good},
		"what is of no interest":                           {sick(5600, 6300, resigning(9000), beliefOf("c1", 10, "else", 5600, 5900)), good},
		"no check has ever succeeded":                      {scene{extra: join(with(check(100, 100, Failed), func(e *Entry) { e.Proc = "c1" }), beliefOf("c1", 10, ByIsLeader, 11, 200))}, late},
		"waiting, as its health is over":                   {waiting(2500), good},
		"waiting, and healthy":                             {waiting(3000), lost},
		"waiting, and a check succeeds too late":           {waiting(2500, check(3500, 4040, OK)), good},
		"waiting, and a check succeeds in time":            {waiting(2500, check(3500, 4020, OK)), lost},
		"waiting, and a check succeeds as its health ends": {waiting(2500, check(4092, 4092, OK)), good},
		"waiting, and a check succeeds just before":        {waiting(2500, check(4085, 4085, OK)), lost},
		"waiting, and its checks fail":                     {waiting(2500, check(3500, 3500, Failed)), good},
		"waiting, and others are healthy":                  {waiting(2500, healthy("c1", 9000), healthy("c2", 9000)), good},
		"TryCampaign, whose check fails":                   {tried(isTried), good},
		"TryCampaign, whose check has succeeded":           {tried(isTried, check(5500, 5501, OK)), violated(RuleCampaign)},
		"TryCampaign, and its health is over by then":      {lapsed(6700), good},
		"TryCampaign, and its health is not over by then":  {lapsed(6500), violated(RuleCampaign)},
		"TryCampaign, whose check succeeds then":           {tried(isTried, check(5898, 5899, OK)), good},
		"TryCampaign, whose check succeeded before":        {tried(isTried, check(4998, 4999, OK)), good},
		"Campaign in calm, without a key":                  {scene{extra: join(Entry{T: 5000, Proc: "c3", Kind: Campaigning}, healthy("c3", 9000), calm(100, 9000))}, violated(RuleCampaign)},
		"Campaign in calm, unhealthy":                      {scene{extra: join(Entry{T: 5000, Proc: "c3", Kind: Campaigning}, healthy("c3", 5000), calm(100, 9000))}, good},
		"Campaign, whose check fails":                      {tried(), violated(RuleCampaign)},
	})
}

func TestOverdueFunctionsAreReported(t *testing.T) {
	t.Parallel()
	overdue := func(at, since int64) Entry {
		return Entry{T: at, From: since, Proc: "c1", Kind: Overdue, Token: 10}
	}
	// The context of its function ends at 5.6 s. The function returns at returned.
	expires := func(returned int64, extra ...any) scene {
		return scene{gone: 6000, cause: Expired, extra: join(ofRun, resigning(returned), join(extra...))}
	}
	wrong := violated(RuleOverdue)
	testScenes(t, map[string]sceneTest{
		"it returns in time":                 {expires(6000), good},
		"it returns late":                    {expires(7000), good},
		"it returns too late":                {expires(7001), wrong},
		"it returns too late, and is told":   {expires(9500, overdue(6000, 5600), overdue(8000, 5600), overdue(9501, 0)), good},
		"it is told too early":               {expires(9500, overdue(5999, 5600), overdue(9501, 0)), wrong},
		"it is told of a context that lives": {expires(9500, beliefOf("c1", 10, ByRun, 11, 5600), overdue(6000, 5594), overdue(9501, 0)), wrong},
		"it is told of a context that ends":  {expires(9500, beliefOf("c1", 10, ByRun, 11, 5600), overdue(6000, 5595), overdue(9501, 0)), good},
		"it is told long after its return":   {expires(6100, overdue(7101, 5600), overdue(7102, 0)), wrong},
		"it is told after its return":        {expires(6100, overdue(7100, 5600), overdue(7102, 0)), good},
		"its return is not told":             {expires(6100, overdue(6050, 5600)), wrong},
		"its return is not told, as it was killed": {expires(6100, overdue(6050, 5600),
			Entry{T: 6200, Proc: "c1", Kind: Exit, Result: OK, Err: "killed"}), good},
		"it has not returned when it is killed": {scene{gone: 6000, cause: Expired, extra: join(ofRun, overdue(6050, 5600),
			Entry{T: 6200, Proc: "c1", Kind: Exit, Result: OK, Err: "killed"})}, good},
		"its return is told twice":               {expires(9500, overdue(6000, 5600), overdue(9501, 0), overdue(9502, 0)), wrong},
		"its return is told before":              {expires(9500, overdue(6000, 5600), overdue(9499, 0)), wrong},
		"its return is told, and it was in time": {expires(6000, overdue(6001, 0)), wrong},
		"it is Campaign":                         {scene{extra: join(overdue(6000, 5600))}, wrong},
	})
}

func TestTransferTellsTheTruth(t *testing.T) {
	t.Parallel()
	// c1 leads with token 10, and c2 waits with token 20, until 9.7 s. Then c2 leads until 9.8 s.
	told := func(from, to, token int64, result string, extra ...any) scene {
		return scene{extra: join(Entry{T: to, From: from, Proc: "chaos", Kind: Transfer, Token: token, Result: result}, by(9600), join(extra...))}
	}
	peer := join(event(4000, 4000, "chaos/a/5", "stock"), event(4100, 4000, "chaos/a/5", ""))
	wrong := violated(RuleTransfer)
	testScenes(t, map[string]sceneTest{
		"to one that leads":                     {told(9000, 9700, 20, OK), good},
		"to one that leads before":              {told(100, 200, 10, OK), good},
		"to one that leads later":               {told(9000, 9599, 20, OK), wrong},
		"to one that has led":                   {told(9710, 9720, 10, OK), wrong},
		"to the next":                           {told(9000, 9700, 0, OK), good},
		"to the next, and the same leads":       {told(9000, 9599, 0, OK), wrong},
		"to the next, and it leads already":     {told(9710, 9720, 0, OK), wrong},
		"nobody leads":                          {told(0, 5, 0, Failed), good},
		"nobody waits":                          {told(12, 15, 0, Failed), good},
		"somebody waits":                        {told(4000, 4001, 0, Failed), wrong},
		"there is no such candidate any more":   {told(9750, 9801, 20, Failed), good},
		"there is such a candidate":             {told(4000, 4001, 20, Failed), wrong},
		"in calm, it is not done":               {told(3000, 6001, 20, Unknown, calm(500, 9000)), wrong},
		"in calm, it is not waited for":         {told(3000, 6000, 20, Unknown, calm(500, 9000)), good},
		"in calm, it is not done behind a peer": {told(3000, 6001, 20, Unknown, calm(500, 9000), peer), good},
		"before calm, it is not done":           {told(3000, 6001, 20, Unknown, calm(1001, 9000)), good},
	})
}

package fake

import (
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var mutants = flag.Bool("mutants", false, "compile faults into the fake, and see that the tests find each")

// TestFaultsOfTheFakeAreFound shows that the tests which compare the fake with etcd can fail. Without
// -mutants it looks only whether each fault still has its place in the source.
func TestFaultsOfTheFakeAreFound(t *testing.T) {
	const answers, scenarios, deposed = "TestFakeAnswersAsEtcdDoes", "TestScenariosGoAsWithRealMembers", "TestDeposedLeader"
	for _, mutant := range []struct {
		name, file, old, new string
		found                string // by which test
	}{
		{"version-stays", "machine.go", "old.Version+1", "old.Version", answers},
		{"create-revision-moves", "machine.go", "kv.CreateRevision, kv.Version = old.CreateRevision, ", "kv.CreateRevision, kv.Version = tx.begin+1, ", answers},
		{"count-is-limited", "store.go", "sorted(kvs, r)\n", "sorted(kvs, r)\n\tresp.Count = int64(len(kvs))\n", answers},
		{"limit-before-order", "store.go", "r.SortOrder == pb.RangeRequest_NONE && !filters", "!filters", answers},
		{"missing-value-equals-empty", "store.go", "if c.Target == pb.Compare_VALUE {", "if false {", answers},
		{"nested-branches-see-changes", "machine.go", "tx.commit(p.nested[i])", "tx.commit(map[int]*path{i: tx.now().path(op.RequestTxn)}[i])", answers},
		{"compaction-one-too-far", "store.go", "revision != 0 && revision < v.compacted", "revision != 0 && revision <= v.compacted", answers},
		{"old-lease-keeps-key", "machine.go", "\t\ttx.detach(old)\n\t}", "\t}", answers},
		{"previous-value-is-the-new-one", "store.go", ".at(last)", ".at(last + 1)", answers},
		{"filters-swapped", "streams.go", "f == pb.WatchCreateRequest_NOPUT && ev.Type == mvccpb.Event_PUT", "f == pb.WatchCreateRequest_NOPUT && ev.Type == mvccpb.Event_DELETE", answers},
		{"watch-starts-one-late", "streams.go", "ev.Kv.ModRevision >= w.next", "ev.Kv.ModRevision > w.next", answers},
		{"lease-is-granted-twice", "machine.go", "case tx.leases[r.ID] != nil:", "case false:", answers},
		{"no-promotion", "lessor.go", "m.refresh(m.countdown[id], m.c.electionTimeout())", "m.refresh(m.countdown[id], -time.Second*20)", scenarios},
		{"term-of-raft", "server.go", "clusterID, uint64(m.id+1), m.term", "clusterID, uint64(m.id+1), m.node.BasicStatus().GetTerm()", "TestTermInAHeader"},
		{"reads-without-quorum", "server.go", "\tif serializable {\n", "\tif serializable || true {\n", deposed},
	} {
		t.Run(mutant.name, func(t *testing.T) {
			text, err := os.ReadFile(mutant.file)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(text), mutant.old); n != 1 {
				t.Fatalf("%q is %d times in %s", mutant.old, n, mutant.file)
			}
			if !*mutants {
				return
			}
			dir := t.TempDir()
			file := filepath.Join(dir, mutant.file)
			writeFile(t, file, strings.Replace(string(text), mutant.old, mutant.new, 1))
			here, err := filepath.Abs(mutant.file)
			if err != nil {
				t.Fatal(err)
			}
			overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{here: file}})
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(dir, "overlay.json"), string(overlay))
			cmd := exec.CommandContext(t.Context(), "go", "test", "-overlay", filepath.Join(dir, "overlay.json"),
				"-run", mutant.found, "-vet", "off", "-operations", "8000", ".")
			out, err := cmd.CombinedOutput()
			if err == nil || strings.Contains(string(out), "[build failed]") {
				t.Errorf("%s has not found it: %v\n%.2000s", mutant.found, err, out)
			}
		})
	}
}

func writeFile(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

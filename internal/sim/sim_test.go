package main

import (
	"testing"
	"time"

	"example.com/leader/internal/sim/world"
)

func TestNoRuleIsBrokenAndTheSameSeedHasTheSameHistory(t *testing.T) {
	binary, why, err := target{}.build(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	hashes := make(map[uint64]string)
	for _, seed := range []uint64{1, 1, 2, 3} {
		r, _, err := simulate(t.Context(), binary, world.Job{Config: world.Config{
			Seed: seed, Every: 2 * time.Second, Length: time.Minute,
		}})
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range r.Violations {
			t.Errorf("seed %d %v", seed, v)
		}
		if r.Counts.Terms == 0 || r.Counts.Writes == 0 || len(r.Faults) == 0 {
			t.Errorf("seed %d: nothing has happened: %+v", seed, r.Counts)
		}
		if hash := hashes[seed]; hash != "" && hash != r.Hash && why == nil {
			t.Errorf("seed %d has the histories %s and %s", seed, hash, r.Hash)
		}
		hashes[seed] = r.Hash
	}
	if why != nil {
		t.Log("not compared:", why)
	}
}

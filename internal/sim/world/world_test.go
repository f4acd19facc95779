package world

import (
	"encoding/json"
	"flag"
	"os"
	"testing"
	"testing/synctest"
)

// job is what the program in internal/sim asks for. It needs a test, as a bubble takes a *testing.T.
var job = flag.String("job", "", "a Job as JSON; its result is written to file descriptor 3")

func TestJob(t *testing.T) {
	if *job == "" {
		t.Skip("the program in internal/sim runs this, and so do its tests")
	}
	var j Job
	if err := json.Unmarshal([]byte(*job), &j); err != nil {
		t.Fatal(err)
	}
	if err := j.Do(os.NewFile(3, "result"), func(f func()) { synctest.Test(t, func(*testing.T) { f() }) }); err != nil {
		t.Fatal(err)
	}
}

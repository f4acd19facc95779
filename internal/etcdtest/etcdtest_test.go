package etcdtest

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/version"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

// Tests of a version mean nothing if they run another.
func TestMembersAreOfTheNamedBinary(t *testing.T) {
	want := version.Version
	if binary := os.Getenv(binaryEnv); binary != "" {
		out, err := exec.Command(binary, "--version").Output()
		if err != nil {
			t.Fatal(err)
		}
		line, _, _ := strings.Cut(string(out), "\n")
		want = strings.TrimPrefix(line, "etcd Version: ")
	}
	m := Start(t)
	status, err := NewClient(t, m.Endpoint).Status(t.Context(), m.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	if status.Version != want {
		t.Errorf("runs etcd %s, want %s", status.Version, want)
	}
}

func TestMemberKeepsItsDataAndEndpoint(t *testing.T) {
	m := Start(t)
	client := NewClient(t, m.Endpoint)
	put, err := client.Put(t.Context(), "key", "value")
	if err != nil {
		t.Fatal(err)
	}
	m.Stop()
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	get, err := client.Get(t.Context(), "key")
	if err != nil {
		t.Fatal(err)
	}
	if len(get.Kvs) != 1 || get.Kvs[0].ModRevision != put.Header.Revision {
		t.Errorf("after a restart the key is %v", get.Kvs)
	}
}

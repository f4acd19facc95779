package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"example.com/leader/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// passwordTTL is short so that renewals are many. They are due after a third of it.
	passwordTTL = 5 * time.Second

	// passwordUser is the user of the leaders, the password, and what their keys begin with.
	passwordUser = "service"

	// logins is how many clients connect and campaign at a time. Each has etcd hash the password several times,
	// and etcd needs time for the renewals of the others.
	logins = 2
)

// byDefault makes etcd's heartbeats as rare as they are by default. Those of the other rows cost an idle etcd
// more than twice as much CPU.
var byDefault = etcdtest.Settings{"heartbeat-interval": 100, "election-timeout": 1000}

// A bill is what leaders of one kind have cost in one interval or in several.
type bill struct {
	leaders int
	minutes float64
	cpu     time.Duration // of etcd's process

	logins                              int // authentications before the interval
	authentications, renewals, requests int // in the interval
	lostBefore, lost                    int // terms that ended before it and in it
}

func (b *bill) add(other bill) {
	b.leaders += other.leaders
	b.minutes += other.minutes
	b.cpu += other.cpu
	b.logins += other.logins
	b.authentications += other.authentications
	b.renewals += other.renewals
	b.requests += other.requests
	b.lostBefore += other.lostBefore
	b.lost += other.lost
}

// perMinute is etcd's CPU time in ms.
func (b *bill) perMinute() float64 { return float64(b.cpu) / 1e6 / b.minutes }

func measurePasswords(ctx context.Context, r *run) (*result, error) {
	rounds := r.pick(2, 1, 1)
	window := time.Duration(r.pick(10, 10, 3)) * time.Second // whole thirds of the TTL, but for the tests
	sizes := []int{1, 20, 100}[:r.pick(3, 3, 2)]
	believers := []believer{{ours, believeOurs}, {stock, believeStock}}
	bills := make(map[string]map[int]*bill)
	for _, b := range believers {
		bills[b.name] = make(map[int]*bill)
		for _, n := range sizes {
			bills[b.name][n] = &bill{}
		}
	}
	idle := &bill{}
	for round := range rounds {
		one, err := passwords(ctx, r, believer{}, 0, window)
		if err != nil {
			return nil, err
		}
		idle.add(one)
		for _, n := range sizes {
			r.log("round %d of %d, leaders: %d", round+1, rounds, n)
			for _, i := range rand.Perm(len(believers)) {
				b := believers[i]
				one, err := passwords(ctx, r, b, n, window)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", b.name, err)
				}
				bills[b.name][n].add(one)
			}
		}
	}
	t := table{
		caption: fmt.Sprintf("Leaders with a user and a password, each with a client of its own, TTL %v. Each row has an etcd of its own, with its default bcrypt cost. "+
			"CPU is the time that etcd's process uses in %v in which only renewals happen. Authentications and requests are counted at the clients; "+
			"each message on a stream is one request. Lost terms are not replaced, because nobody campaigns again.", passwordTTL, window),
		header: []string{"leaders", "contestant", "CPU, ms per minute", "per leader", "× stock", "authentications per leader, before", "per minute",
			"renewals per leader and minute", "requests per renewal", "terms lost before", "in the interval"},
	}
	t.add("0", "–", number(idle.perMinute()), "–", "–", "–", "–", "–", "–", "–", "–")
	res := &result{}
	lost, led := 0, 0
	for _, n := range sizes {
		for _, b := range believers {
			one := bills[b.name][n]
			perMinute := func(count int) string { return number(float64(count) / float64(n) / one.minutes) }
			t.add(fmt.Sprint(n), b.name, number(one.perMinute()), number(one.perMinute()/float64(n)), number(one.perMinute()/bills[stock.name][n].perMinute()),
				number(float64(one.logins)/float64(one.leaders)), perMinute(one.authentications),
				perMinute(one.renewals), number(float64(one.requests)/float64(one.renewals)),
				fmt.Sprintf("%d of %d", one.lostBefore, one.leaders), fmt.Sprint(one.lost))
		}
		own := bills[ours.name][n]
		lost, led = lost+own.lostBefore+own.lost, led+own.leaders
		// 72 requests a minute rather than 30, which makes 2.4 if each costs etcd the same: two for a renewal
		// rather than one, and a renewal when it is due, where stock looks every half a second.
		res.atMost(2.5, exact(own.perMinute()/bills[stock.name][n].perMinute()), "etcd's CPU time, leader / stock, leaders: %d", n)
	}
	res.atMost(0, exact(float64(lost)), "terms of leader lost, of %d", led)
	res.tables = []table{t}
	return res, nil
}

// passwords measures n leaders at an etcd of their own.
func passwords(ctx context.Context, r *run, b believer, n int, window time.Duration) (bill, error) {
	defer r.stop()
	endpoints, err := r.cluster(1, byDefault)
	if err != nil {
		return bill{}, err
	}
	etcd, err := processOf(endpoints[0])
	if err != nil {
		return bill{}, err
	}
	if err := askForPasswords(ctx, endpoints); err != nil {
		return bill{}, err
	}
	m := newMeter()
	cfg := clientv3.Config{Endpoints: endpoints, DialOptions: m.options(), Username: passwordUser, Password: passwordUser}
	clients, ends := make([]*clientv3.Client, n), make([]<-chan time.Time, n)
	defer func() {
		for _, client := range clients {
			if client != nil {
				client.Close()
			}
		}
	}()
	if err := each(n, logins, func(i int) (err error) {
		if clients[i], err = connect(ctx, cfg); err != nil {
			return err
		}
		cctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		ends[i], err = b.believe(cctx, clients[i], fmt.Sprintf("%s/%03d", passwordUser, i), passwordTTL)
		return err
	}); err != nil {
		return bill{}, err
	}
	settling := passwordTTL / time.Duration(r.pick(1, 1, 2)) // each has renewed by then, and opened the stream for it
	sleep(ctx, settling)

	logins, requests, renewals := m.of(authenticate), m.count(), m.of(keepAlive)
	began := time.Now()
	used, err := cpuOf(etcd)
	if err != nil {
		return bill{}, err
	}
	sleep(ctx, window)
	now, err := cpuOf(etcd)
	if err != nil {
		return bill{}, err
	}
	one := bill{
		leaders: n, minutes: time.Since(began).Minutes(), cpu: max(now-used, tick),
		logins: logins, authentications: m.of(authenticate) - logins,
		renewals: m.of(keepAlive) - renewals, requests: m.count() - requests,
	}
	for _, end := range ends {
		select {
		case at := <-end:
			if at.Before(began) {
				one.lostBefore++
			} else {
				one.lost++
			}
		default:
		}
	}
	return one, nil
}

// askForPasswords makes etcd ask for a user and a password, and makes the user of the leaders.
func askForPasswords(ctx context.Context, endpoints []string) error {
	client, err := newClient(ctx, endpoints)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	const role = "candidate"
	var errs []error
	do := func(_ any, err error) { errs = append(errs, err) }
	permit := func(from, to string) {
		do(client.RoleGrantPermission(ctx, role, from, to, clientv3.PermissionType(clientv3.PermReadWrite)))
	}
	do(client.UserAdd(ctx, "root", "root"))
	do(client.UserGrantRole(ctx, "root", "root"))
	do(client.RoleAdd(ctx, role))
	permit(passwordUser+"/", clientv3.GetPrefixRangeEnd(passwordUser+"/"))
	permit(connected, "")
	do(client.UserAdd(ctx, passwordUser, passwordUser))
	do(client.UserGrantRole(ctx, passwordUser, role))
	do(client.AuthEnable(ctx))
	return errors.Join(errs...)
}

// processOf returns the process of the member with this endpoint: the one whose configuration names it.
func processOf(endpoint string) (pid int, err error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(string(text), "\x00")
		if len(args) < 3 || args[1] != "--config-file" {
			continue
		}
		if config, err := os.ReadFile(args[2]); err == nil && bytes.Contains(config, []byte("//"+endpoint+`"`)) {
			return strconv.Atoi(filepath.Base(filepath.Dir(file)))
		}
	}
	return 0, fmt.Errorf("no process serves %s", endpoint)
}

// tick is the unit in which Linux says what a process has used. Less cannot be told from nothing.
const tick = time.Second / 100

// cpuOf is the time that a process has used.
func cpuOf(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses, which may hold anything. The 14th and the 15th are
	// the time spent in user mode and in the kernel.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("process %d: %d fields in its stat", pid, len(fields)+2)
	}
	var ticks int64
	for _, field := range fields[11:13] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("process %d: %w", pid, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * tick, nil
}

// Package locks is package sync for goroutines that may be stopped while they hold a lock: who waits for it waits on
// a channel, so that the time of a bubble goes on. It has as much of sync as the library uses.
package locks

import (
	"sync"

	"example.com/leader/internal/sim/machine"
)

// As in package sync: these block in a way that lets a bubble's time go on.
type (
	WaitGroup = sync.WaitGroup
	Map       = sync.Map
	Locker    = sync.Locker
)

// A Mutex is a [sync.Mutex]. Each process has its own: in the variable of a package, which simulated processes share, it
// is one of another for each machine, so that none waits for another that has stopped.
type Mutex struct {
	mu     sync.Mutex // held for moments
	owner  *machine.Machine
	own    lock // of the owner, and of goroutines that are no machine's
	others map[*machine.Machine]*lock
}

// A lock is what goroutines of one machine exclude each other with.
type lock struct {
	locked  bool
	waiting []chan struct{} // the first is the next to have it
}

// lockLocked is that of the goroutine. The first machine that asks is the owner.
func (m *Mutex) lockLocked() *lock {
	of := machine.Current().Whole()
	if m.owner == nil {
		m.owner = of
	}
	if of == nil || of == m.owner {
		return &m.own
	}
	if m.others == nil {
		m.others = make(map[*machine.Machine]*lock)
	}
	l := m.others[of]
	if l == nil {
		l = new(lock)
		m.others[of] = l
	}
	return l
}

// Lock blocks until the mutex is free.
func (m *Mutex) Lock() {
	machine.Gate()
	m.mu.Lock()
	l := m.lockLocked()
	if !l.locked {
		l.locked = true
		m.mu.Unlock()
		return
	}
	turn := make(chan struct{})
	l.waiting = append(l.waiting, turn)
	m.mu.Unlock()
	<-turn
	machine.Gate()
}

// TryLock locks the mutex if it is free.
func (m *Mutex) TryLock() bool {
	machine.Gate()
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.lockLocked()
	if l.locked {
		return false
	}
	l.locked = true
	return true
}

// Unlock gives the mutex to whoever has waited longest.
func (m *Mutex) Unlock() {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.lockLocked()
	if !l.locked {
		panic("unlock of a mutex that is not locked")
	}
	if len(l.waiting) == 0 {
		l.locked = false
		return
	}
	close(l.waiting[0])
	l.waiting = l.waiting[1:]
}

// A Once is a [sync.Once].
type Once struct {
	mu   Mutex
	done bool
}

// Do calls f the first time. Others wait until that call has returned.
func (o *Once) Do(f func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.done {
		defer func() { o.done = true }()
		f()
	}
}

// OnceFunc is [sync.OnceFunc], but for panics, which come once.
func OnceFunc(f func()) func() {
	var once Once
	return func() { once.Do(f) }
}

package fake

import (
	"container/heap"
	"sync"
	"time"
)

// A loop runs events in the order of their time, those of one time in the order in which they were
// planned. Everything of the cluster happens in events, or under the lock, so nothing of it depends on
// how goroutines are scheduled but the order of the callers' own requests.
type loop struct {
	mu      sync.Mutex
	began   time.Time
	timer   *time.Timer
	planned events
	last    uint64 // number of the event that was planned last
	busy    bool   // the timer is set when the present events are done
	stopped bool
	done    chan struct{} // closed when it was stopped
	ended   chan struct{} // closed when its goroutine has ended
}

// An event is something that happens at a time, counted from when the loop began.
type event struct {
	at     time.Duration
	number uint64
	index  int // in the heap; -1 if it has happened, or never will
	happen func()
}

func (l *loop) start() {
	l.began = time.Now()
	l.timer = time.NewTimer(0)
	l.done, l.ended = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(l.ended)
		for !l.run() {
			<-l.timer.C
		}
	}()
}

func (l *loop) now() time.Duration { return time.Since(l.began) }

// after plans an event. The lock is held, here and when it happens.
func (l *loop) after(d time.Duration, happen func()) *event {
	l.last++
	e := &event{at: l.now() + max(0, d), number: l.last, happen: happen}
	heap.Push(&l.planned, e)
	if e.index == 0 && !l.busy {
		l.timer.Reset(max(0, d))
	}
	return e
}

// cancel makes an event not happen. It may be nil, or over.
func (l *loop) cancel(e *event) {
	if e != nil && e.index >= 0 {
		heap.Remove(&l.planned, e.index)
	}
}

// run does what is due, and returns whether the loop was stopped.
func (l *loop) run() (stopped bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.busy = true
	for len(l.planned) > 0 && l.planned[0].at <= l.now() && !l.stopped {
		heap.Pop(&l.planned).(*event).happen()
	}
	l.busy = false
	if len(l.planned) > 0 && !l.stopped {
		l.timer.Reset(l.planned[0].at - l.now())
	}
	return l.stopped
}

// stop ends the loop. The lock is held.
func (l *loop) stop() {
	l.stopped = true
	l.planned = nil
	l.timer.Reset(0) // the goroutine shall see it
	close(l.done)
}

// events are a heap.
type events []*event

func (h events) Len() int { return len(h) }

func (h events) Less(i, j int) bool {
	if h[i].at != h[j].at {
		return h[i].at < h[j].at
	}
	return h[i].number < h[j].number
}

func (h events) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *events) Push(e any) {
	e.(*event).index = len(*h)
	*h = append(*h, e.(*event))
}

func (h *events) Pop() any {
	old := *h
	e := old[len(old)-1]
	e.index = -1
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return e
}

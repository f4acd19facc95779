package fake

import "time"

// A lane carries parcels in one direction, in their order. Where the way is blocked they wait, and all
// behind them.
type lane struct {
	c     *Cluster
	queue []parcel
	next  *event // the arrival of the first
	// blocked returns where to wait, or nil if the way is free.
	blocked func() *queue
	waiting bool
}

// A parcel is a message under way.
type parcel struct {
	sent, due time.Duration
	deliver   func()
}

// A queue has the lanes that wait for one thing.
type queue []*lane

func (l *lane) send(delay time.Duration, deliver func()) {
	now := l.c.now()
	p := parcel{sent: now, due: now + delay, deliver: deliver}
	if n := len(l.queue); n > 0 {
		p.due = max(p.due, l.queue[n-1].due)
	}
	l.queue = append(l.queue, p)
	l.plan()
}

func (l *lane) plan() {
	if l.next == nil && !l.waiting && len(l.queue) > 0 {
		l.next = l.c.after(l.queue[0].due-l.c.now(), l.arrive)
	}
}

func (l *lane) arrive() {
	l.next = nil
	for len(l.queue) > 0 && l.queue[0].due <= l.c.now() {
		if q := l.blocked(); q != nil {
			*q = append(*q, l)
			l.waiting = true
			return
		}
		p := l.queue[0]
		l.queue = l.queue[1:]
		p.deliver()
	}
	l.plan()
}

// wake lets the lanes of a queue go on, each after a delay.
func (q *queue) wake(delay func() time.Duration) {
	lanes := *q
	*q = nil
	for _, l := range lanes {
		l.waiting = false
		due := l.c.now() + delay()
		for i := range l.queue {
			l.queue[i].due = max(l.queue[i].due, due)
		}
		l.plan()
	}
}

// lose forgets what was sent before a time.
func (l *lane) lose(before time.Duration) {
	for len(l.queue) > 0 && l.queue[0].sent < before {
		l.queue = l.queue[1:]
	}
}

package world

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"example.com/leader"
	"example.com/leader/internal/leasefile"
)

// file returns the path of a lease file of the process, and of those that are started in its place later.
func (p *process) file(name string) string {
	path := filepath.Join(p.w.dir, fmt.Sprintf("%d-%s", p.place, strings.ReplaceAll(name, "/", "_")))
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Contains(p.files, path) {
		p.files = append(p.files, path)
	}
	return path
}

func (p *process) leaseFiles() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.files)
}

// crash lets go of the lease files, as the kernel does at the end of a process.
func (p *process) crash() {
	for _, path := range p.leaseFiles() {
		leasefile.Crash(path)
	}
}

// reclaim waits for a while beside a process, living or dying, to revoke the leases in its files. That it does not revoke
// those of one that lives is among the rules for the ends of terms. Of one that is dead it leaves no key.
func (s *strike) reclaim() {
	w, p := s.w, s.p
	for _, path := range p.leaseFiles() {
		if w.rng.IntN(2) == 0 {
			continue
		}
		within, dead := s.ttl(0, 2), p.dead.Load()
		w.reclaiming.Go(func() {
			ctx, cancel := context.WithTimeout(w.ctx, within)
			defer cancel()
			switch err := leader.Reclaim(ctx, w.evictor.reclaimer, path); {
			case err == nil && dead:
				w.checkReclaimed(p, path)
			case err == nil:
			case ctx.Err() == nil:
				w.violate("error", "Reclaim beside %s: %v", p.name, err)
			}
		})
	}
}

// checkReclaimed: when Reclaim has returned, a process that was dead when it began has no key left.
func (w *world) checkReclaimed(p *process, path string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked("the leases of %s were reclaimed", p.name)
	for _, name := range w.names {
		for _, l := range w.queues[name] {
			if l.owner != nil && l.owner.p == p && l.owner.el.file == path {
				w.violateLocked("reclaim", "%s: the key of %s with token %d is there after Reclaim", name, p.name, l.token)
			}
		}
	}
}

package machine

import "unsafe"

// The runtime keeps a pointer for each goroutine, for the profiler, and gives it to the goroutines that this one
// starts. Both functions are those of runtime/pprof, which has no exported way to ask for it.

//go:linkname goroutineLabels runtime/pprof.runtime_getProfLabel
func goroutineLabels() unsafe.Pointer

//go:linkname setGoroutineLabels runtime/pprof.runtime_setProfLabel
func setGoroutineLabels(unsafe.Pointer)

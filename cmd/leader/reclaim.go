package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"example.com/leader"
	"example.com/leader/internal/retry"
	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
)

func (a *app) newReclaim() *cobra.Command {
	var once bool
	cmd := &cobra.Command{
		Use:   "reclaim FILE...",
		Short: "Revokes the leases of a process as soon as it has died",
		Long: `Waits until the owner of a lease file has died, then revokes its leases, so that
the next candidate leads at once and not after the TTL. The owner is "leader run
--lease-file FILE" or a program that uses leader.WithLeaseFile. It works on
Linux, on the machine of the owner, as the same user or root, and needs the
rights in etcd that the owner has.

It waits for one owner after the other, for example in a sidecar, until it is
stopped. With --once it returns when the leases of each file's present owner are
gone, at once if there are none. In a unit of systemd:

  ExecStopPost=leader reclaim --once /run/jobs.lease`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage("reclaim needs a lease file")
			}
			return nil
		},
		RunE: a.patient(func(ctx context.Context, client *clientv3.Client, files []string) error {
			log := newLog(true)
			defer a.warnIfAway(ctx, client, a.commandTimeout)() // Reclaim does not say it
			var reclaiming errgroup.Group
			for _, file := range files {
				if _, err := os.Stat(filepath.Dir(file)); errors.Is(err, fs.ErrNotExist) {
					log.Warn("the directory of the lease file does not exist", "file", file)
				}
				reclaiming.Go(func() error {
					if once {
						_, err := reclaim(ctx, client, file, log, true)
						return err
					}
					return keepReclaiming(ctx, client, file, log)
				})
			}
			return reclaiming.Wait()
		}),
	}
	cmd.Flags().BoolVar(&once, "once", false, "return when the leases of each present owner are gone")
	return cmd
}

// keepReclaiming reclaims the leases of each owner of the file, until ctx ends. It logs the first error of a streak.
func keepReclaiming(ctx context.Context, client *clientv3.Client, file string, log *slog.Logger) error {
	// Between two owners Reclaim returns at once, after it has asked etcd for the last one's leases. So the pauses grow
	// until there is an owner to wait for.
	pause := retry.Backoff{Min: 50 * time.Millisecond, Max: time.Second}
	failing := false
	for first := true; ; first = false {
		waited, err := reclaim(ctx, client, file, log, first || failing)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && !failing {
			log.Warn("reclaim is being retried", "error", err)
		}
		failing = err != nil
		if waited {
			pause.Reset()
		}
		if err := pause.Wait(ctx); err != nil {
			return err
		}
	}
}

// reclaim reclaims the leases of one owner. It logs that it has to wait, which it reports too, and the success after
// that, or after any call if always is true.
func reclaim(ctx context.Context, client *clientv3.Client, file string, log *slog.Logger, always bool) (waited bool, err error) {
	told := make(chan struct{})
	waits := time.AfterFunc(time.Second, func() {
		defer close(told)
		log.Info("waits until the owner is dead and its leases are gone", "file", file)
	})
	err = leader.Reclaim(ctx, client, file)
	if waited = !waits.Stop(); waited {
		<-told
	}
	if err == nil && (waited || always) {
		log.Info("no lease of a dead owner is left", "file", file)
	}
	return waited, err
}

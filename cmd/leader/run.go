package main

import (
	"time"

	"example.com/leader"
	"github.com/spf13/cobra"
)

// runFlags are the flags of "leader run".
type runFlags struct {
	leaseFile, value string
	ttl, margin      time.Duration
	restart, quiet   bool
}

func (a *app) newRun() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run NAME [flags] -- COMMAND [ARG...]",
		Short: "Runs a command while this instance leads",
		Long: `Joins the queue of an election, and runs a command when it is elected. At most
one instance runs its command at a time: when the term ends, the command is
stopped before another instance can be elected.

When the term ends, for example because etcd cannot be reached, the command
gets SIGTERM, and SIGKILL when three quarters of the margin have passed. When
the command exits, what is left of its process group gets SIGKILL, the term is
resigned, and the next instance leads at once.

Signals to "leader run" are passed on to the command. After SIGTERM or SIGINT
the command is not run again, and its status counts even if it loses its term
before it exits. SIGHUP and SIGQUIT are only passed on. In the queue each of the
four makes "leader run" leave. It cannot be suspended with Ctrl-Z.

The command's environment:
  LEADER_ELECTION  the election
  LEADER_VALUE     what others see of this instance
  LEADER_KEY       the term's key in etcd
  LEADER_TOKEN     the fencing token: larger than that of every earlier term
  LEADER_DEADLINE  Unix time in seconds: when the term ends unless it is
                   renewed. It is as of the start; renewals move it.
It also has all variables of "leader run", ETCDCTL_PASSWORD among them.

The command is in a process group of its own. If standard input and output are
a terminal, it is in the foreground there, and the terminal's modes are restored
after it; otherwise it cannot read from a terminal. Processes that leave the
group are not stopped, such as the jobs of an interactive shell.

If "leader run" itself is killed, the kernel kills the command (on Linux), but
not the command's own children. With --lease-file, "leader reclaim" or the next
"leader run" with this file then lets the next instance lead at once. So with
--lease-file the command must be a single process, as after exec in a shell
script, and it may overlap with the next leader for a moment.

The command must not change its user, as sudo, su, gosu, setpriv and setuid
programs do. "leader run" may then have no right to kill it, and if "leader run"
is killed, the kernel does not kill it, so it works on while the next instance
leads. Start "leader run" itself as that user.

If "leader run" is paused, as by SIGSTOP, it cannot stop the command. What the
command writes is safe in all cases only if the store compares LEADER_TOKEN.

Exit status:
  the command's, or 128 plus the number of the signal that killed it
  124  the term was lost, and the command was stopped (without --restart)
  125  "leader run" failed, for example because permission is denied
  126  the command cannot be run
  127  the command was not found
  130  interrupted by Ctrl-C in the queue; 143 by SIGTERM`,
		Example: `  leader run svc/jobs -- ./worker --verbose
  leader run svc/jobs --restart --value "$(hostname)" -- ./worker
  leader run svc/jobs -- sh -c 'echo "token $LEADER_TOKEN"; exec ./worker'`,
		Args: func(cmd *cobra.Command, args []string) error {
			if cmd.ArgsLenAtDash() != 1 || len(args) < 2 {
				return usage("run needs one name, then -- and the command")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("margin") {
				f.margin = f.ttl / 5
			}
			return f.run(cmd.Context(), a, args[0], args[1:])
		},
	}
	cmd.Flags().StringVar(&f.value, "value", "", "what others see of this instance (default host name, time and pid)")
	cmd.Flags().DurationVar(&f.ttl, "ttl", leader.DefaultTTL, "after a crash nobody leads for up to that time")
	cmd.Flags().DurationVar(&f.margin, "margin", 0, "time in which the command must stop (default a fifth of the TTL)")
	cmd.Flags().StringVar(&f.leaseFile, "lease-file", "", "`file` that names the lease, for \"leader reclaim\"")
	cmd.Flags().BoolVar(&f.restart, "restart", false, "campaign again after a lost term; not after the command exits")
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "print only warnings")
	return cmd
}

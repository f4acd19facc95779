// Leader runs commands under leader election on etcd, and shows and moves leaders.
//
//	go -C cmd/leader install .    # in a clone of the repository
//	leader help
//
// Candidates are those of package [example.com/leader], and so those of concurrency.Election and of etcdctl elect.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"example.com/leader"
	"example.com/leader/internal/retry"
	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/pkg/v3/flags"
	"go.uber.org/zap"
	"golang.org/x/term"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
)

// The statuses with which the command exits. codesHelp describes them.
const (
	exitFailed    = 1
	exitUsage     = 2
	exitNobody    = 3
	exitNoAnswer  = 4
	exitLost      = 124
	exitRun       = 125
	exitNotRun    = 126
	exitNotFound  = 127
	exitSignalled = 128 // plus the signal's number
)

const codesHelp = `Exit status:
  0    done
  1    failed, for example because permission is denied
  2    wrong usage
  3    nobody leads, or there is no such candidate
  4    no answer in time
  130  interrupted by Ctrl-C; 143 by SIGTERM
"leader run" exits with the status of its command: see "leader run --help".`

// A statusError is an error with the status to exit with.
type statusError struct {
	status int
	error
}

func (e statusError) Unwrap() error { return e.error }

// A quietly is a status to exit with when there is nothing to say: that of a command, or of a signal.
type quietly int

func (q quietly) Error() string { return fmt.Sprintf("exit status %d", int(q)) }

func usage(format string, args ...any) error {
	return statusError{exitUsage, fmt.Errorf(format, args...)}
}

// A signalled is the cause of a context that a signal has ended.
type signalled struct{ syscall.Signal }

func (s signalled) Error() string { return "stopped by the signal: " + s.String() }

// quietly is the status with which shells report the signal. Who has sent it knows.
func (s signalled) quietly() error { return quietly(exitSignalled + int(s.Signal)) }

func main() { os.Exit(execute()) }

func execute() int {
	root := newRoot()
	cmd, err := root.ExecuteC()
	if err == nil {
		return 0
	}
	var q quietly
	if errors.As(err, &q) {
		return int(q)
	}
	fmt.Fprintln(os.Stderr, "leader:", inLines(textOf(err.Error())))
	status := statusOf(err)
	if cmd == root { // there is no such subcommand
		status = exitUsage
	}
	if status == exitUsage {
		fmt.Fprintf(os.Stderr, "See %q.\n", cmd.CommandPath()+" --help")
	}
	if cmd.Name() == "run" && status < exitLost {
		return exitRun // its command may exit with any smaller status
	}
	return status
}

// textOf returns the text of an error without the prefixes of the library, and with flags for its options.
func textOf(err string) string {
	text := strings.ReplaceAll(strings.TrimPrefix(err, "leader: "), ": leader: ", ": ")
	text = strings.ReplaceAll(text, ", "+retry.Cure, "") // advice for programs: here --keepalive-time sets it
	for option, flag := range map[string]string{"WithTTL(": "--ttl ", "WithMargin(": "--margin ", "WithLeaseFile(": "--lease-file "} {
		if rest, ok := strings.CutPrefix(text, option); ok {
			return flag + strings.Replace(rest, "): ", ": ", 1)
		}
	}
	return text
}

// statusOf returns the status to exit with after an error.
func statusOf(err error) int {
	var with statusError
	switch {
	case errors.As(err, &with):
		return with.status
	case errors.Is(err, leader.ErrInvalidName):
		return exitUsage
	case errors.Is(err, leader.ErrNoLeader), errors.Is(err, leader.ErrNotCandidate):
		return exitNobody
	case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.Unavailable:
		return exitNoAnswer
	}
	return exitFailed
}

// An app is what the subcommands share: the flags, which are those of etcdctl.
type app struct {
	spec           clientv3.ConfigSpec
	commandTimeout time.Duration
	user, password string
}

func newRoot() *cobra.Command {
	a := &app{spec: clientv3.ConfigSpec{Secure: &clientv3.SecureConfig{}}}
	root := &cobra.Command{
		Use:   "leader",
		Short: "Runs commands under leader election on etcd, and shows and moves leaders",
		Long: `Runs commands under leader election on etcd, and shows and moves leaders.

Of all the candidates in an election, at most one leads at a time. An election
is a name, such as svc/jobs. Programs that use the Go package
example.com/leader, "leader run" and "etcdctl elect" can all be candidates.

Every flag about etcd can also be given as a variable, as for etcdctl:
--endpoints as ETCDCTL_ENDPOINTS, --user as ETCDCTL_USER.

Results go to standard output, progress and errors to standard error.

` + codesHelp,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			f := cmd.Root().PersistentFlags()
			complete := f.Changed("user") && strings.Contains(a.user, ":") && !f.Changed("password")
			if err := flags.SetPflagsFromEnv(nil, "ETCDCTL", f); err != nil {
				return statusError{exitUsage, err}
			}
			if complete { // flags win over variables
				a.password = ""
			}
			switch {
			case a.spec.DialTimeout <= 0:
				return usage("--dial-timeout %v: must be positive", a.spec.DialTimeout)
			case a.commandTimeout <= 0:
				return usage("--command-timeout %v: must be positive", a.commandTimeout)
			}
			return nil
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if cmd.Name() == "run" {
			return usage("%w; run's command, with its flags, comes after --", err)
		}
		return statusError{exitUsage, err}
	})
	f := root.PersistentFlags()
	f.SortFlags = false
	f.StringSliceVar(&a.spec.Endpoints, "endpoints", []string{"127.0.0.1:2379"}, "`addresses` of etcd, separated by commas")
	f.DurationVar(&a.spec.DialTimeout, "dial-timeout", 2*time.Second, "how long to wait for a connection")
	f.DurationVar(&a.commandTimeout, "command-timeout", 5*time.Second, "how long to wait for etcd's answers")
	f.DurationVar(&a.spec.KeepAliveTime, "keepalive-time", 10*time.Second, "how often to check the connection")
	f.DurationVar(&a.spec.KeepAliveTimeout, "keepalive-timeout", 2*time.Second, "how long such a check may take")
	f.StringVar(&a.spec.Secure.Cacert, "cacert", "", "`file` with the CA of etcd's certificate")
	f.StringVar(&a.spec.Secure.Cert, "cert", "", "`file` with the client's certificate")
	f.StringVar(&a.spec.Secure.Key, "key", "", "`file` with the client's key")
	f.BoolVar(&a.spec.Secure.InsecureTransport, "insecure-transport", true, "no TLS, unless another flag needs it")
	f.BoolVar(&a.spec.Secure.InsecureSkipVerify, "insecure-skip-tls-verify", false, "do not check etcd's certificate")
	f.StringVar(&a.user, "user", "", "`name[:password]` of the user")
	f.StringVar(&a.password, "password", "", "`password`; --user is only the name then")
	root.AddCommand(a.newRun(), a.newList(), a.newWatch(), a.newWait(), a.newTransfer(), a.newEvict(), a.newReclaim())
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), ".FlagUsages", ".FlagUsagesWrapped 80"))
	for _, cmd := range root.Commands() {
		cmd.DisableFlagsInUseLine = true
		if cmd.Name() != "reclaim" {
			cmd.ValidArgsFunction = completeArg
		}
	}
	return root
}

// version returns that of the module from which the command was built.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return cmp.Or(info.Main.Version, "unknown")
}

// completeArg offers no files for the first argument, a name. What comes after it is the command of "leader run".
func completeArg(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// oneName accepts one argument.
func oneName(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usage("%s needs one name, that of an election", cmd.Name())
	}
	return nil
}

// A work is what a subcommand does with a connection to etcd, until ctx ends.
type work func(ctx context.Context, client *clientv3.Client, args []string) error

// bounded runs work that is over soon: it fails if etcd cannot be reached within --command-timeout.
func (a *app) bounded(w work) func(*cobra.Command, []string) error {
	return a.command(false, w)
}

// patient runs work that waits for etcd as long as it takes.
func (a *app) patient(w work) func(*cobra.Command, []string) error {
	return a.command(true, w)
}

func (a *app) command(patient bool, w work) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		ctx, stop := untilSignal(cmd.Context())
		defer stop()
		client, err := a.connect(ctx, patient)
		if err == nil {
			defer func() { _ = client.Close() }() // it was used to the end
			err = a.who(w(ctx, client, args))
		}
		return orSignal(ctx, err)
	}
}

// who adds to a denial who was denied.
func (a *app) who(err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrUserEmpty):
		return fmt.Errorf("%w: there is no --user", err)
	case !errors.Is(err, rpctypes.ErrPermissionDenied):
		return err
	case a.spec.Auth != nil:
		return fmt.Errorf("%w (user %q)", err, a.spec.Auth.Username)
	}
	return fmt.Errorf("%w (there is no --user; with --cert, the certificate's name is the user)", err)
}

// orSignal returns the signal that has ended ctx if it explains err, and err otherwise.
func orSignal(ctx context.Context, err error) error {
	var s signalled
	if err != nil && (errors.As(context.Cause(ctx), &s) || errors.As(err, &s)) {
		return s.quietly()
	}
	return err
}

// untilSignal returns a context that ends when the process is asked to end. Its cause says by which signal.
func untilSignal(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, wanted(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)...)
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case s := <-signals:
			cancel(signalled{s.(syscall.Signal)})
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel(nil)
		<-done
	}
}

// wanted returns the signals that whoever started the process has not told it to ignore, as nohup does.
func wanted(signals ...os.Signal) []os.Signal {
	var w []os.Signal
	for _, s := range signals {
		if !signal.Ignored(s) {
			w = append(w, s)
		}
	}
	return w
}

// connect returns a client. With a user it blocks until etcd has answered.
func (a *app) connect(ctx context.Context, patient bool) (*clientv3.Client, error) {
	if err := a.authenticate(ctx); err != nil {
		return nil, err
	}
	cfg, err := clientv3.NewClientConfig(&a.spec, zap.NewNop())
	if err != nil {
		return nil, usage("TLS: %w", err)
	}
	cfg.Logger = zap.NewNop()
	backoff := retry.Backoff{Min: 100 * time.Millisecond, Max: 2 * time.Second}
	for {
		client, err := dial(ctx, *cfg)
		switch {
		case err == nil:
			return client, nil
		case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.Unavailable:
			err = a.unreachable(a.reason(ctx, *cfg, err))
		case cfg.Username != "":
			name, _, _ := strings.Cut(cfg.Username, ":") // what comes after it may be a password
			return nil, fmt.Errorf("log in to etcd at %s as %q: %w", a.where(), name, plain(err))
		default:
			return nil, err
		}
		if !patient {
			return nil, err
		}
		if backoff.Streak() == 0 && ctx.Err() == nil {
			newLog(false).Warn("etcd is being asked again", "error", err)
		}
		if backoff.Wait(ctx) != nil {
			return nil, err
		}
	}
}

func (a *app) where() string { return strings.Join(a.spec.Endpoints, ", ") }

// dial makes a client and waits for its first connection, for at most --dial-timeout. The client outlives ctx.
func dial(ctx context.Context, cfg clientv3.Config) (*clientv3.Client, error) {
	clientCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer context.AfterFunc(ctx, cancel)()
	cfg.Context = clientCtx
	client, err := clientv3.New(cfg)
	if err != nil {
		cancel()
		return nil, err
	}
	// While gRPC sets up its connections, it must not be made to connect again, as the library does when an answer is
	// late: a race in it can end the program (grpc/grpc-go#9155).
	ctx, stop := context.WithTimeout(ctx, cfg.DialTimeout)
	defer stop()
	conn := client.ActiveConnection()
	conn.Connect()
	for s := conn.GetState(); s == connectivity.Idle || s == connectivity.Connecting; s = conn.GetState() {
		if !conn.WaitForStateChange(ctx, s) {
			break
		}
	}
	return client, nil
}

// reason returns why there is no connection. [clientv3.New], which has tried to log in, does not say it.
func (a *app) reason(ctx context.Context, cfg clientv3.Config, err error) error {
	cfg.Username, cfg.Password = "", ""
	client, newErr := dial(ctx, cfg)
	if newErr != nil {
		return err
	}
	defer func() { _ = client.Close() }() // it was only to ask
	asking, cancel := context.WithTimeout(ctx, cfg.DialTimeout)
	defer cancel()
	if silent := ping(asking, client); silent != nil && statusOf(silent) == exitNoAnswer {
		return silent
	}
	return fmt.Errorf("no answer to the login within --dial-timeout %v: %w", cfg.DialTimeout, err)
}

// plain is an error of gRPC without its wrapping.
func plain(err error) error {
	if s, ok := status.FromError(err); ok && s.Code() == codes.Unknown {
		return errors.New(s.Message())
	}
	return err
}

// ping sends a request that needs no right.
func ping(ctx context.Context, client *clientv3.Client) error {
	_, err := retry.First(ctx, client, func(ctx context.Context) (*clientv3.LeaseTimeToLiveResponse, error) {
		return client.TimeToLive(ctx, 1)
	})
	return err
}

// warnIfAway warns if etcd has not answered when a time has passed, unless the function that it returns is called before.
func (a *app) warnIfAway(ctx context.Context, client *clientv3.Client, after time.Duration) (stop func()) {
	ctx, cancel := context.WithTimeout(ctx, after)
	var asking sync.WaitGroup
	asking.Go(func() {
		if err := ping(ctx, client); errors.Is(err, context.DeadlineExceeded) {
			newLog(false).Warn("etcd is being asked again", "error", a.unreachable(err))
		}
	})
	return func() { cancel(); asking.Wait() }
}

// authenticate completes the user, and asks for the password on a terminal, as etcdctl does, until ctx ends.
func (a *app) authenticate(ctx context.Context) error {
	switch {
	case a.spec.Auth != nil:
		return nil
	case a.user == "" && a.password != "":
		return usage("--password: there is no --user")
	case a.user == "":
		return nil
	}
	name, password, ok := strings.Cut(a.user, ":")
	switch {
	case a.password != "":
		name, password = a.user, a.password
	case ok:
	case !term.IsTerminal(int(os.Stdin.Fd())):
		return usage("--user %s: the password is missing: --user NAME:PASSWORD, --password or ETCDCTL_PASSWORD", a.user)
	default:
		var err error
		if password, err = askPassword(ctx, int(os.Stdin.Fd())); err != nil {
			return fmt.Errorf("read the password: %w", err)
		}
	}
	switch { // with either empty etcd's client does not log in at all
	case name == "":
		return usage("--user: the name is empty")
	case password == "":
		return usage("--user %s: the password is empty", name)
	}
	a.spec.Auth = &clientv3.AuthConfig{Username: name, Password: password}
	return nil
}

// askPassword asks on the terminal. If ctx ends it restores the terminal's modes, which hide what is typed.
func askPassword(ctx context.Context, fd int) (string, error) {
	modes, err := term.GetState(fd)
	if err != nil || ctx.Err() != nil {
		return "", cmp.Or(err, ctx.Err())
	}
	fmt.Fprint(os.Stderr, "Password: ")
	defer fmt.Fprintln(os.Stderr)
	var password []byte
	answered := make(chan error, 1)
	go func() { // it ends with the process if nobody answers
		var err error
		password, err = term.ReadPassword(fd)
		answered <- err
	}()
	select {
	case err := <-answered:
		return string(password), err
	case <-ctx.Done():
		return "", cmp.Or(term.Restore(fd, modes), ctx.Err())
	}
}

// elector returns an Elector that observes.
func (a *app) elector(client *clientv3.Client) (*leader.Elector, error) {
	return leader.New(client, leader.WithLogger(newLog(false)))
}

// unreachable adds which etcd has not answered.
func (a *app) unreachable(err error) error {
	if err == nil || statusOf(err) != exitNoAnswer {
		return err
	}
	hint := ""
	if text := err.Error(); strings.Contains(text, "EOF") || strings.Contains(text, "broken pipe") || strings.Contains(text, "reset by peer") {
		hint = " (it may want TLS, or none, or another client certificate: see --cacert and --cert)"
	}
	return fmt.Errorf("etcd at %s: %w%s", a.where(), err, hint)
}

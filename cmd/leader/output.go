package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"example.com/leader"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// A format is a value of the flag -o.
type format string

const (
	formatText format = "text"
	formatJSON format = "json"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "format" }

// Set is called with the flag's value.
func (f *format) Set(s string) error {
	if *f = format(s); *f != formatText && *f != formatJSON {
		return fmt.Errorf("must be %s or %s", formatText, formatJSON)
	}
	return nil
}

// addTo adds the flag -o to a subcommand.
func (f *format) addTo(cmd *cobra.Command) {
	*f = formatText
	cmd.Flags().VarP(f, "output", "o", "text or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{string(formatText), string(formatJSON)}, cobra.ShellCompDirectiveNoFileComp))
}

// A candidate is a [leader.Candidate] in JSON.
type candidate struct {
	Value string `json:"value"`
	Token int64  `json:"token"`
	Key   string `json:"key"`
	Lease string `json:"lease"` // in hex, as in the key and in etcdctl
}

func newCandidate(c leader.Candidate) *candidate {
	if c == (leader.Candidate{}) {
		return nil
	}
	return &candidate{c.Value, c.Token, c.Key, strconv.FormatInt(int64(c.Lease), 16)}
}

// printJSON prints a value on one line.
func printJSON(w io.Writer, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var line strings.Builder
	for _, r := range string(text) { // only strings have such runes, and a terminal might obey them
		switch {
		case unicode.IsPrint(r):
			line.WriteRune(r)
		case r > 0xffff:
			fmt.Fprintf(&line, `\u%04x\u%04x`, 0xd800+(r-0x10000)>>10, 0xdc00+(r-0x10000)&0x3ff)
		default:
			fmt.Fprintf(&line, `\u%04x`, r)
		}
	}
	_, err = fmt.Fprintln(w, line.String())
	return err
}

// printLeader prints the result of a subcommand that ends with one leader, or with the zero Candidate, which is nobody.
func (f format) printLeader(election string, c leader.Candidate) error {
	if f == formatJSON {
		return printJSON(os.Stdout, struct {
			Election string     `json:"election"`
			Leader   *candidate `json:"leader"`
		}{election, newCandidate(c)})
	}
	if c == (leader.Candidate{}) {
		return nil
	}
	_, err := fmt.Println(quoted(c.Value))
	return err
}

// escaped returns s with what is not printable as Go's escapes, so that a terminal shows it and does not obey it.
func escaped(s string) string {
	var b strings.Builder
	for s != "" {
		r, size := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, s[0])
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
		s = s[size:]
	}
	return b.String()
}

// inLines escapes a text of several lines, each for itself.
func inLines(s string) string {
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(s, "\t", "  ")), "\n")
	for i, line := range lines {
		lines[i] = escaped(line)
	}
	return strings.Join(lines, "\n")
}

// quoted returns s itself if it is printable, and as a Go string if not, or if it looks like one.
func quoted(s string) string {
	if s == "" || strings.HasPrefix(s, `"`) || escaped(s) != s {
		return strconv.Quote(s)
	}
	return s
}

// A screen is a standard output that is a terminal.
type screen struct{ width int }

// onScreen returns nil if standard output is no terminal.
func onScreen() *screen {
	fd := int(os.Stdout.Fd())
	if !term.IsTerminal(fd) {
		return nil
	}
	width, _, _ := term.GetSize(fd) // 0 if the terminal does not say
	return &screen{cmp.Or(width, 80)}
}

// fit cuts a line off at the width of the screen.
func (s *screen) fit(line string) string {
	if runes := []rune(line); s != nil && len(runes) > s.width {
		return string(runes[:s.width-1]) + "…"
	}
	return line
}

// bold is for a line that is fit.
func (s *screen) bold(line string) string {
	if s == nil || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return line
	}
	return "\x1b[1m" + line + "\x1b[0m"
}

// A logHandler prints the log for people: "leader: elected (token=12 key=svc/jobs/1f)". An error comes last:
// "leader: warning: lost (token=12): the lease has expired".
type logHandler struct {
	level slog.Level
	attrs []slog.Attr
}

// newLog returns a log on standard error. Without progress it has only warnings.
func newLog(progress bool) *slog.Logger {
	h := logHandler{level: slog.LevelWarn}
	if progress {
		h.level = slog.LevelInfo
	}
	return slog.New(h)
}

// Enabled reports whether a message of this level is printed.
func (h logHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }

// WithGroup ignores the group: nobody makes one.
func (h logHandler) WithGroup(string) slog.Handler { return h }

// WithAttrs returns a handler that prints the attributes with each message.
func (h logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.attrs = append(h.attrs[:len(h.attrs):len(h.attrs)], attrs...)
	return h
}

// Handle prints one message. It ignores the error of a standard error that nobody reads.
func (h logHandler) Handle(_ context.Context, r slog.Record) error {
	printMessage(h.lineOf(r))
	return nil
}

// lineOf returns what is printed. Of several errors the last one stands at the end, and the others are attributes.
func (h logHandler) lineOf(r slog.Record) string {
	var attrs []string
	var last slog.Attr // that is an error
	reason := ""
	add := func(a slog.Attr) bool {
		if a.Key != "election" && a.Key != "cure" { // one is on the command line, the other for programs
			if a.Value.Kind() == slog.KindDuration {
				a.Value = slog.DurationValue(a.Value.Duration().Round(time.Millisecond))
			}
			text := escaped(strings.ReplaceAll(textOf(a.Value.String()), "\n", "; "))
			if _, ok := a.Value.Any().(error); ok {
				if last.Key != "" {
					attrs = append(attrs, last.Key+"="+inQuotes(last.Value.String()))
				}
				last, reason = slog.String(a.Key, text), ": "+text
				return true
			}
			attrs = append(attrs, a.Key+"="+inQuotes(text))
		}
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	line := "leader: "
	if r.Level >= slog.LevelWarn {
		line += "warning: "
	}
	line += r.Message
	if len(attrs) > 0 {
		line += " (" + strings.Join(attrs, " ") + ")"
	}
	return line + reason
}

// inQuotes puts a value in quotation marks if it would not be seen where it ends.
func inQuotes(text string) string {
	if strings.ContainsAny(text, " =()") {
		return `"` + text + `"`
	}
	return text
}

// A message is a line of the log.
type message struct {
	line    string
	printed chan struct{}
}

// messages has those that standard error has not taken yet. The goroutine that prints them ends with the process.
var messages = sync.OnceValue(func() chan<- message {
	queue := make(chan message, 100)
	go func() {
		for m := range queue {
			fmt.Fprintln(os.Stderr, m.line)
			close(m.printed)
		}
	}()
	return queue
})

// printMessage prints a line on standard error. It does not wait for it for long: a terminal may be held by Ctrl-S, and
// the reader of a pipe may hang, but the command of "leader run" must be stopped in time. Then lines may be lost.
func printMessage(line string) {
	m := message{line, make(chan struct{})}
	late := time.After(100 * time.Millisecond)
	select {
	case messages() <- m:
	case <-late:
		return
	}
	select {
	case <-m.printed:
	case <-late:
	}
}

# The steps of CI, one target each. make alone runs them all, by .ci/run, which installs what they need first.
# make quick is what takes a minute; make api rewrites api.txt.

# A step fails if any of its commands fails, also one in front of a pipe. No recipe relies on this alone, since
# make 3.81, which macOS has, ignores .SHELLFLAGS: what can fail runs first, then its output is used.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

actionlint := github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
golangci_lint := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

go_mods := $(shell find . -mindepth 2 -name go.mod ! -path '*/.*' ! -path '*/testdata/*' ! -path '*/vendor/*')
ifneq ($(filter-out 0,$(.SHELLSTATUS)),)
$(error find failed, so the list of nested modules may be incomplete)
endif
nested := $(sort $(go_mods:./%/go.mod=%))
steps := fmt vet lint tidy api-check test race examples sim sim-mutations chaos mutations model nested vuln

.PHONY: all steps quick api lint-workflows $(steps) $(nested:%=nested/%) $(addprefix lint/,. $(nested))

all:
	bash .ci/run

steps:
	@echo $(steps)

quick: fmt vet lint tidy api-check

# Of all modules.
fmt:
	@files=$$("$$(go env GOROOT)/bin/gofmt" -l .) || exit; \
	[ -z "$$files" ] || { echo "not formatted:" $$files; exit 1; }

vet:
	go vet ./...

# Of all modules, with the same configuration.
lint: lint-workflows $(addprefix lint/,. $(nested))

$(addprefix lint/,. $(nested)): lint/%:
	go -C $* run $(golangci_lint) run

lint-workflows:
	go run $(actionlint) .github/workflows/*.yml

tidy:
	go mod tidy -diff

api:
	@api=$$(bash .ci/api . $(nested)) || exit; \
	printf '%s\n\n' "$$api" >api.txt

api-check:
	@api=$$(bash .ci/api . $(nested)) || exit; \
	printf '%s\n\n' "$$api" | diff -u api.txt - || { \
	echo "The exported API is not what api.txt says. If that is meant: make api, commit api.txt, and say it in CHANGELOG.md."; \
	exit 1; }

test:
	go test ./...

race:
	go test -race -shuffle=on -timeout 20m ./...

examples:
	go run ./examples/failover
	go run ./examples/shards

# Some seeds are always the same, though a change of the library plays them in another way. Those of the second run are
# new each time, and printed.
sim:
	go run ./internal/sim -seed 1 -seeds 24
	go run ./internal/sim -for 30s

# The seed is new each time, and printed.
chaos:
	go run ./internal/chaos -race -duration 90s

# The simulation must detect that a safeguard is off, each within a minute.
sim-mutations:
	go run ./internal/sim -mutation all -seed 1

# So must the fault campaign; two at a time, since they mostly wait. Two of its mutations are among those of the
# simulation too, and are left out here.
mutations:
	names=$$(go run ./internal/chaos -mutations) || exit; \
	names=$$(grep -vx 'shared-lock\|unnamed-lease' <<<"$$names"); \
	xargs -n 1 -P 2 go run ./internal/chaos -mutation <<<"$$names"

# The protocol, and each safeguard taken away from it. Needs spin and a C compiler.
model:
	bash docs/model/check

nested: $(nested:%=nested/%)

$(nested:%=nested/%): nested/%:
	go -C $* vet ./...
	go -C $* mod tidy -diff
	go -C $* test -bench . -benchtime 1x ./...

vuln:
	@bash .ci/vuln . $(nested)

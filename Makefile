# `make` builds the programs into target/release; `make test` runs every test; `make demo` shows the tour; `make bench`
# measures and prints the table of speed. All do their own set-up.
# CARGO_TARGET_DIR is honoured.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
TARGET_DIR := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
HOST := $(shell rustc -vV | sed -n 's/^host: //p')
PROGRAMS := bulkhead-manager bulkhead-probe bulkhead bulkhead-worker bulkhead-launcher
# Named one by one: built together with the simulator, they would have its features too, like a clock that can be paused.
PACKAGES := -p bulkhead-manager -p bulkhead-probe -p bulkhead-cli -p bulkhead-worker -p bulkhead-launcher

.PHONY: all setup test test-interop test-rotation chaos soak planted fuzz demo compose-image compose-test lint bench bench-log clean

all: setup
	cargo build --release --locked $(PACKAGES) --bins
	mkdir -p "$(TARGET_DIR)/release"
	for program in $(PROGRAMS); do \
		test ! -e "$(TARGET_DIR)/$(HOST)/release/$$program" || \
		ln -f "$(TARGET_DIR)/$(HOST)/release/$$program" "$(TARGET_DIR)/release/$$program"; \
	done

# The one native package: libseccomp's static archive and headers.
setup:
	@bash scripts/setup.sh

# Test programs share what they compile with the debug build. `cargo test` rather than an extra runner: a fresh
# toolchain has nothing else.
test: setup
	@bash scripts/setup.sh networks
	cargo build --locked --workspace --bins
	cargo test --locked --workspace --no-fail-fast

# The speed of a real cluster, beside Debian's etcd. ONLY=write,kill measures some parts, QUICK=1 does it with few
# repetitions, FORMAT=json prints JSON, which is kept in any case; FOLDER is on the disk to measure.
bench: all
	cargo build --release --locked -p bulkhead-bench
	etcd=$$(bash scripts/etcd.sh "$(TARGET_DIR)/etcd"); \
	"$(TARGET_DIR)/$(HOST)/release/bulkhead-bench" --bin "$(TARGET_DIR)/release" --out "$(TARGET_DIR)/bench.json" \
		$${etcd:+--etcd "$$etcd"} $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick) \
		$(if $(FORMAT),--format $(FORMAT)) $(if $(FOLDER),--folder "$(FOLDER)")

# Ten rotations of the root in a row under load, each under a leader that is killed: minutes, and root.
test-rotation: setup
	cargo build --locked --workspace --bins
	cargo test --locked -p bulkhead-tests --test rotations -- --ignored --nocapture

# The simulated cluster on SEEDS seeds and on a hundred with workers, and MINUTES of everything on real programs where root runs it: within a quarter of an
# hour. Reports are in chaos-report/, chaos-report/workers and chaos-report/live.
SEEDS ?= 2000
MINUTES ?= 3
chaos: all
	@bash scripts/setup.sh networks
	cargo build --release --locked -p bulkhead-chaos
	"$(TARGET_DIR)/$(HOST)/release/bulkhead-chaos" sim --seeds $(SEEDS)
	"$(TARGET_DIR)/$(HOST)/release/bulkhead-chaos" sim --seeds 100 --nodes 5+20 --report chaos-report/workers
	if [ "$$(id -u)" = 0 ]; then \
		"$(TARGET_DIR)/$(HOST)/release/bulkhead-chaos" live --bin "$(TARGET_DIR)/release" --minutes $(MINUTES) \
			--report chaos-report/live; \
	else echo "clusters of real programs need root: sudo make chaos" >&2; fi

# Breaks clusters of real programs for HOURS, one campaign after the other, each on a seed of its own; reports are in
# soak-report/. The first one that finds something ends it.
HOURS ?= 1
soak: all
	@bash scripts/setup.sh networks
	cargo build --release --locked -p bulkhead-chaos
	BULKHEAD_BIN="$(TARGET_DIR)/release" bash scripts/soak.sh "$(TARGET_DIR)/$(HOST)/release/bulkhead-chaos" $(HOURS)

# Bugs that are switched on, one at a time: each has to be found, and by how many seeds.
planted: setup
	cargo build --locked --workspace --bins --features bulkhead-chaos/planted --target-dir "$(TARGET_DIR)/planted"
	"$(TARGET_DIR)/planted/$(HOST)/debug/bulkhead-chaos" planted

# Each parser of bytes from outside for EACH seconds, driven by coverage; findings are in target/fuzz. A short form, with random and
# damaged bytes, is part of `make test`.
EACH ?= 60
fuzz: setup
	bash scripts/fuzz.sh $(EACH)

# Images of other tools; they come from Debian, through apt when root.
test-interop: setup
	@missing=; for program in umoci skopeo busybox; do command -v "$$program" >/dev/null || missing=1; done; \
	install="apt-get install -y --no-install-recommends umoci skopeo busybox-static"; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" = 0 ]; then $$install; else echo "run: sudo $$install" >&2; exit 1; fi; \
	fi
	cargo build --locked --workspace --bins
	cargo test --locked --workspace --test e2e -- --nocapture foreign_image

# The log store against a plain preallocated file, in the folder FOLDER (default: the temporary one).
bench-log:
	cargo run --release --locked -p bulkhead-raft --example log_bench -- $(FOLDER)

# The tour against real programs; KEEP=1 leaves the cluster up.
demo: all
	BULKHEAD_BIN="$(TARGET_DIR)/release" KEEP=$(KEEP) bash scripts/demo.sh

# The image of the compose cluster, of these programs: chaos/compose/docker-compose.yml tells how to use it.
compose-image: all
	BULKHEAD_BIN="$(TARGET_DIR)/release" bash chaos/compose/build.sh

# The compose cluster, from `up` to `down -v`; needs docker, docker-compose and root.
compose-test: all
	BULKHEAD_BIN="$(TARGET_DIR)/release" bash chaos/compose/test.sh

lint: setup
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets

clean:
	cargo clean

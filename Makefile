# What people and CI run. `make demo`, `make test` and `make check` install what they need on Debian 12 (as root).

SHELL := /bin/bash
CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
# Rounds of each mode in the demo.
ROUNDS ?= 5

# What `make figures` measures.
AREA ?= hulls

.PHONY: demo figures test check build install install-packages help

help:
	@echo 'make demo    cold starts of a real image, overlayfs beside hullspeed; one table, target/demo/result.json'
	@echo 'make figures AREA=hulls   what pod hulls promise, one JSON object per line (containerd 1.6 and 2.x; a quarter of an hour)'
	@echo 'make figures AREA=fetch   what lazy layers cost: requests, cold reads, background, disk, memory (five minutes)'
	@echo 'make figures AREA=native  reads, stats and cold starts by EROFS and by FUSE beside native overlayfs (four minutes)'
	@echo 'make test    unit and integration tests (root: real containerd, registry, CNI, FUSE)'
	@echo 'make check   formatting, lints, licences and advisories, documentation'
	@echo 'make build   release binaries'

# Root, FUSE and overlayfs, and packages from the machine's own Debian sources; nothing to do when they are there.
install:
	@bash tests/install-packages.sh

# What a build alone needs does not ask for root, FUSE and overlayfs.
install-packages:
	@bash tests/install-packages.sh --packages

build:
	$(CARGO) build --locked --release --workspace --bins

demo: install build
	@$(TARGET_DIR)/release/startup --directory target/demo --rounds $(ROUNDS)

figures: install build
	@$(TARGET_DIR)/release/figures $(AREA) --directory target/figures

# The tests that mount lazy layers, by the binary that they are in: `make test` runs these a second time with EROFS mounts
# (HULLSPEED_TEST_MOUNT=erofs), under the keeper. What they ask of containerd, of pods and of the network is asked once.
MOUNTING := bad_input doctor explain faults fetch_faults fetch_mirrors fetch_requests fetch_restart fetch_space fetch_ways hulls_warm \
  peer permissions reads reads_damage reads_fault_points reads_faults reads_holes reads_kills restart trees variants warm

space := $(subst ,, )
MOUNTING_FILTER = binary(/^privileged_($(subst $(space),|,$(strip $(MOUNTING))))$$/) - test(/^converter::/)

# The integration tests start our binaries from the directory they are built into, so those are built first.
test: install
	$(CARGO) build --locked --workspace --bins
	@if $(CARGO) nextest --version > /dev/null 2>&1; then set -x; \
	  $(CARGO) test --locked --workspace --doc && $(CARGO) nextest run --locked --workspace --no-fail-fast && \
	  HULLSPEED_TEST_MOUNT=erofs $(CARGO) nextest run --locked -p hullspeed-tests --no-fail-fast -E '$(MOUNTING_FILTER)'; \
	else set -x; $(CARGO) test --locked --workspace --no-fail-fast && \
	  HULLSPEED_TEST_MOUNT=erofs $(CARGO) test --locked -p hullspeed-tests --no-fail-fast $(MOUNTING:%=--test privileged_%); fi

check: install-packages
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --all-features -- -D warnings
	@bash tests/check-dependencies.sh
	RUSTDOCFLAGS='-D warnings -A rustdoc::private_intra_doc_links' $(CARGO) doc --locked --workspace --no-deps

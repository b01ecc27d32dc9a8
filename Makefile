# Limosa's front door. `make` alone lists the targets.
#
# Nothing has to be installed by hand but a Rust toolchain: targets that need Debian packages ask for them through
# scripts/ensure-packages, which does nothing when they are all there.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=

.PHONY: help
help: ## List the targets
	@printf 'Limosa: checkpoint, restore and migrate running Linux containers\n\n'
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12 | sed 's/^/  make /'

.PHONY: build
build: ## Build the limosa program (optimised, static) into target/release
	@scripts/build

.PHONY: test
test: ## Check format, lints, dependencies, and run every test but the virtual machines' (needs root)
	@scripts/test

.PHONY: test-vm
test-vm: ## Run the suite that migrates between two virtual machines (needs root)
	@scripts/test-vm

.PHONY: sweep
sweep: ## Kill Limosa at each of its operations, restore thousands of hostile checkpoints (needs root; `make test` does some)
	@scripts/ensure-packages test
	LIMOSA_SWEEP=full LIMOSA_SWEEP_SECONDS=$${LIMOSA_SWEEP_SECONDS:-120} $(CARGO) nextest run --locked --profile sweep \
		-p limosa-e2e -p limosa-puppet --test kill_sweep --test hostile_checkpoints --test twins

.PHONY: demo
demo: ## Move a running redis between two hosts and back, under a connected client (needs root)
	@scripts/demo

.PHONY: bench
bench: ## Measure freeze, checkpoint and restore times (needs root)
	@scripts/bench

.PHONY: fmt
fmt: ## Format the sources
	$(CARGO) fmt --all

.PHONY: lint
lint: ## Check format, clippy with warnings denied, and dependencies (no root needed once gcc and make are there)
	@scripts/lint

.PHONY: install
install: build ## Install the program to PREFIX (default /usr/local), under DESTDIR if given
	install -D -m 0755 target/release/limosa $(DESTDIR)$(PREFIX)/bin/limosa

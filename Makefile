# What people run. Everything here works on a fresh Debian 12, as root or as a
# user who may use sudo for the installation of packages.
.DELETE_ON_ERROR:
SHELL := /bin/sh
# Debian's own Python where it is there: other users, whom sandboxes and the
# demo need, can run it.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3.1[1-9] /usr/bin/python3) python3)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: help demo venv schema lint test test-all hostile bench fuzz soak test-cluster clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | column -t -s '|'

demo: ## install what is needed, build examples/c-hello inside gVisor, publish it on loopback
	deploy/demo/demo.sh

venv: .venv/installed ## make .venv with runner and its development tools

.venv/installed: pyproject.toml dev.lock hatch_build.py $(wildcard sandbox/guest/*.[ch])
	deploy/debian/install-host-tools.sh python3-venv gcc libc6-dev libssl-dev
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

tools:
	deploy/debian/install-host-tools.sh
	deploy/debian/install-host-tools.sh docker.io iproute2 iptables

schema: venv ## write the schema of policy files for editors
	$(BIN)/python -m policies.schema

lint: venv ## formatting, lint, types, imports, shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: tools venv lint ## what CI runs: everything but what is marked slow, with real sandboxes
	$(BIN)/runner policy check --strict policies/library/*.yaml
	$(BIN)/runner policy test policies/library/tests
	$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered

test-all: tools venv lint ## all of it
	$(PYTEST) --cov

hostile: tools venv ## the attacks alone
	$(PYTEST) tests/hostile

bench: tools venv ## measure against the same builder without a sandbox; writes docs/benchmarks*.md
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.policy
	$(BIN)/python -m tests.bench.gateway
	$(BIN)/python -m tests.bench.bases
	$(BIN)/python -m tests.bench.docker

fuzz: venv ## property tests with many more examples
	HYPOTHESIS_PROFILE=fuzz $(PYTEST) tests/unit -m "not sandbox"
	$(BIN)/python -m tests.fuzz.fuzz_dockerfile -max_total_time=120

test-cluster: tools venv ## the kubernetes backend in the cluster that KUBECONFIG names
	$(PYTEST) tests/cluster

soak: ## not there yet: said so, and no success
	@echo "make $@: nothing to run yet; CHANGELOG.md says what this version has" >&2; exit 2

clean: ## remove what was built here; host tools and demo state stay
	rm -rf .venv .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	rm -f sandbox/guest/init sandbox/guest/init-pod

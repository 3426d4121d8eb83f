# What a user and a developer type. Every target sets up what it needs on a bare Debian 12 or 13, as
# root, with only git, make and apt there, and is quick the second time: scripts/setup installs what
# is missing, and the scripts skip what is done already. Built files are in build/, what outlives a
# checkout in ${XDG_CACHE_HOME:-~/.cache}/architect.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The steps build on each other and share apt and Podman; each is parallel where it pays.
.NOTPARALLEL:
export PYTHONDONTWRITEBYTECODE := 1

PYTHON := /usr/bin/python3
VENV := build/venv/bin
IMAGES := valkey test example-go servers
CLUSTER := PYTHONPATH=.:scripts $(PYTHON) -m tests.cluster
# What the checkers look at; a folder appears here when its first file does.
CHECKED := $(wildcard src scripts tests bench examples)

.PHONY: help
help: ## Show this list
	@sed -n 's/^\([a-z*-]*\):.*## /\1\t/p' Makefile | expand -t 18

.PHONY: demo
demo: install image-valkey ## See a valkey vanish and come back
	$(VENV)/python examples/valkey/demo.py

.PHONY: test
test: setup-all install images lint ## All checks and tests, on real engines, guests and a real cluster
	$(VENV)/python -m pytest $(PYTEST)

.PHONY: test-cluster
test-cluster: setup-all native bundle images ## Only those on the cluster; its first build takes ten minutes
	$(VENV)/python -m pytest -m cluster tests/cluster tests/e2e $(PYTEST)

.PHONY: bench
bench: setup-all install images ## Benchmarks, each with its peers; results in bench/results
	PYTHONPATH=.:scripts $(VENV)/python -m bench $(BENCH)

.PHONY: install
install: setup native bundle ## Put architect on this machine and register its runtime
	$(PYTHON) scripts/install.py install

.PHONY: uninstall
uninstall: ## Take it off again (FORCE=1: although containers need it)
	$(PYTHON) scripts/install.py uninstall

.PHONY: lint
lint: setup-test ## ruff, mypy, import-linter
	$(VENV)/ruff check $(CHECKED)
	$(VENV)/mypy $(CHECKED)
	$(VENV)/lint-imports --no-cache

.PHONY: setup setup-test setup-all
setup: ## Debian packages and the Python environment that building and running take
	@scripts/setup runtime build
setup-test: ## The same, with what the tests take
	@scripts/setup runtime build test

setup-all: ## The same, with what the test cluster and the components' image take
	@scripts/setup runtime build test cluster image

.PHONY: setup-cluster
setup-cluster: ## The same for building and running, with what the test cluster takes
	@scripts/setup runtime build cluster

.PHONY: cluster
cluster: setup-cluster ## A real Kubernetes of three nodes on this machine; source .cluster/env
	@$(CLUSTER) up $(UP)

.PHONY: cluster-install
cluster-install: setup-cluster setup-image native bundle ## Install architect on the cluster with helm, as a user would
	@PYTHONPATH=.:scripts $(PYTHON) -m tests.cluster install $(SET:%=--set %)

.PHONY: cluster-load
cluster-load: ## Load IMAGE=archive.tar in all nodes of the cluster
	@$(CLUSTER) load "$(if $(IMAGE),$(IMAGE),$(error say which: make cluster-load IMAGE=archive.tar))"

.PHONY: cluster-down
cluster-down: ## Take the cluster away, whatever state it is in
	@$(CLUSTER) down

.PHONY: setup-image
setup-image: ## The same, with what the components' image is built with
	@scripts/setup runtime build image

.PHONY: image
image: setup-image native bundle ## The container image of the components, in build/images
	@$(PYTHON) scripts/component_image.py

.PHONY: example-go
example-go: setup-cluster ## The quick start's Go program, in build/example-go
	@PYTHONPATH=.:scripts $(PYTHON) examples/go/build.py

image-example-go: example-go
	@$(PYTHON) scripts/image.py example-go

.PHONY: native
native: setup ## keeper, runc-architect, criu-hook, health-check-proxy and the eBPF object, in build/native
	@$(MAKE) --no-print-directory -C native
	@$(PYTHON) scripts/licences.py

.PHONY: bundle
bundle: setup ## CRIU with its own loader and libraries, in build/bundle
	@$(PYTHON) scripts/bundle.py

.PHONY: images
images: setup example-go ## All container images of scripts/images.toml
	@$(PYTHON) scripts/image.py $(IMAGES)

image-%: setup
	@$(PYTHON) scripts/image.py $*

.PHONY: lock
lock: ## Write requirements/*.txt anew (UPGRADE=1: with the newest versions)
	scripts/lock

.PHONY: clean
clean: ## Remove build/; the cache stays
	rm -rf build

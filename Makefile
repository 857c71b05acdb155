# What one runs in a checkout; `make help` lists it. Needs Linux and Python 3.10, 3.11 or 3.12.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

ACCELERATOR ?= cpu
DATA_ROOT ?= ../shared/data
N ?= 30
PYTHON ?= python3.11 python3.12 python3.10 python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq install --no-deps
# Programs of the environment come first: torchx finds torchrun on PATH.
USE_VENV := export PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

# Both go on where they were stopped. The large one may replace the page that is kept.
COMPARE = python -m benchmarks.evidence --data-root $(DATA_ROOT)
EVIDENCE = $(COMPARE) benchmarks/evidence.yaml --results benchmarks/results/evidence.md
QUICK_EVIDENCE = $(COMPARE) benchmarks/evidence_quick.yaml --out runs/evidence_quick

# One stamp for each thing installed, so that only what changed is installed again.
REQUIREMENTS := $(VENV)/.requirements-$(ACCELERATOR)
PACKAGE := $(VENV)/.package
DEV := $(VENV)/.dev
SERVE := $(VENV)/.serve

ifeq ($(filter $(ACCELERATOR),cpu cuda),)
$(error ACCELERATOR=$(ACCELERATOR) is not known; use cpu or cuda)
endif

.PHONY: help setup server demo test lint chaos evidence clean

help:  ## this list
	@echo "make TARGET [ACCELERATOR=cpu|cuda] [PYTHON=python3.x] [N=30] [QUICK=1] [RECORDS=file] [DATA_ROOT=dir]"
	sed -nE 's/^([a-z]+):[^#]*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

setup: $(PACKAGE)  ## build .venv with everything pinned

server: setup $(SERVE)  ## add what `hetegen serve` needs

demo: setup  ## pre-train, fine-tune and evaluate on a real click log, with a report
	@$(USE_VENV)
	hetegen demo --ranks 2

test: lint  ## lint, types and all tests
	@$(USE_VENV)
	timeout --kill-after=30 2400 pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: setup $(DEV)  ## format, lint and types only
	@$(USE_VENV)
	ruff check .
	ruff format --check .
	mypy

chaos: setup  ## kill N trainings at random moments; each must end like an undisturbed one
	@$(USE_VENV)
	python -m benchmarks.chaos --trials $(N)

evidence: setup  ## compare the methods on every data set in DATA_ROOT, in hours; QUICK=1: a small grid, in minutes; RECORDS: runs that count
	@$(USE_VENV)
	$(if $(QUICK),$(QUICK_EVIDENCE),$(EVIDENCE)) $(addprefix --records ,$(RECORDS))

clean:  ## remove .venv and caches; data/ and runs/ stay
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The shared packages are installed first and without the extra index of cpu.txt: so only torch and
# fbgemm are looked up there, and where it cannot be reached that costs seconds.
$(REQUIREMENTS): requirements/common.txt requirements/$(ACCELERATOR).txt
	@$(create_venv)
	echo "Installing the pinned packages for $(ACCELERATOR): a few minutes the first time."
	$(PIP) -r requirements/common.txt
	$(PIP) --retries 1 --timeout 15 -r requirements/$(ACCELERATOR).txt
	touch $@

$(PACKAGE): $(REQUIREMENTS) pyproject.toml
	@$(PIP) --no-build-isolation -e .
	$(VENV)/bin/python -c "import hetegen_rec"
	touch $@

$(SERVE): $(REQUIREMENTS) requirements/serve.txt
	@$(PIP) -r requirements/serve.txt
	touch $@

$(DEV): $(REQUIREMENTS) requirements/dev.txt $(SERVE)
	@$(PIP) -r requirements/dev.txt
	touch $@

# Keeps an environment that fits. One of the other accelerator goes: both builds of fbgemm in one
# environment break each other.
define create_venv
can_run() { "$$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }
has_pip() { "$$1" -c 'import ensurepip, venv' 2>/dev/null; }
others=$$(ls $(VENV)/.requirements-* 2>/dev/null | grep -vx "$(REQUIREMENTS)" || true)
if [[ -z "$$others" ]] && can_run $(VENV)/bin/python && $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then
	chosen=
else
	chosen=none without_pip=
	for candidate in $(PYTHON); do
		can_run "$$candidate" || continue
		if has_pip "$$candidate"; then chosen=$$candidate; break; fi
		without_pip=$$candidate
	done
fi
if [[ "$$chosen" == none && -n "$$without_pip" ]]; then
	echo "make: $$without_pip has no venv module; on Debian and Ubuntu: apt install $$(basename $$without_pip)-venv" >&2
	exit 1
elif [[ "$$chosen" == none ]]; then
	echo "make: no Python 3.10, 3.11 or 3.12 among: $(PYTHON). Install one, or name it: make PYTHON=/path/to/python" >&2
	exit 1
elif [[ -n "$$chosen" ]]; then
	echo "Creating $(VENV) with $$($$chosen --version)."
	"$$chosen" -m venv --clear $(VENV)
fi
endef

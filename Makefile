# make demo, make test: each installs what it needs on first use, into .venv: requirements.lock what cnnray needs,
# requirements-dev.lock that and what tests, types and benchmarks need.
# The first of PYTHON that is there and supported makes .venv.
PYTHON ?= python3.13 python3.12 python3.11 python3
SUPPORTED := -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null
BIN := .venv/bin
# ai-edge-litert asks for backports-strenum; from 1.3 on it is for Pythons before 3.11 only, an upper bound that uv does not
# look at. (As constraint of [tool.uv], it would keep `uv pip install` from taking the lock files.)
COMPILE := $(BIN)/uv pip compile pyproject.toml --generate-hashes --universal --python-version 3.11 --no-header --quiet \
	--constraint .venv/constraints.txt
# tensorflow holds kernels for GPUs, which need the packages of requirements-gpu.lock; tensorflow-cpu has wheels for Linux
# on x86-64 alone.
WITHOUT_GPU := .venv/without-gpu.in --override .venv/without-gpu.txt

# uv is faster than pip, but does not read pip's settings (an index or certificates of one's own): where uv fails, pip installs.
install = $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes --requirement $(1) || \
	$(BIN)/pip install --quiet --require-hashes --requirement $(1)

.PHONY: help install develop demo test lint types bench test-long chaos soak test-cluster test-s3 test-browser lock clean

help:  ## Show this list.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

install: .venv/installed  ## Make .venv with what cnnray needs.

develop: .venv/developed  ## And with what its tests, types and benchmarks need.

.venv/installed: requirements.lock pyproject.toml native/resize.c
	@$(BIN)/python $(SUPPORTED) && exit; \
	for python in $(PYTHON); do $$python $(SUPPORTED) && exec $$python -m venv --clear .venv; done; \
	echo "cnnray needs Python 3.11 to 3.13 with its module venv (python3.13-venv on Debian): install it, or name it with \
	PYTHON=/path/to/python" >&2; exit 1
	@sed -n '/^uv==/,/[^\\]$$/p' requirements-dev.lock > .venv/uv.lock
	$(BIN)/pip install --quiet --require-hashes --requirement .venv/uv.lock
	$(call install,requirements.lock)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/developed: requirements-dev.lock | .venv/installed
	$(call install,requirements-dev.lock)
	@touch $@

demo: .venv/installed  ## Train on 1,797 handwritten digits with two workers, and classify a few.
	@$(BIN)/python jobs/demo.py

test: lint types  ## Lint, types and all tests, in two processes.
	$(BIN)/python -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder \
	  --durations 20 --override-ini faulthandler_timeout=1200 --override-ini faulthandler_exit_on_timeout=true

lint: .venv/developed  ## Style and import rules.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: .venv/developed  ## Types.
	$(BIN)/mypy

bench: .venv/developed  ## Measure against the peers and bare limits, side by side; installs wrk from Debian's packages.
	command -v wrk || { apt-get update -qq && apt-get install -y -qq wrk; }
	$(BIN)/python jobs/benchmark.py

test-long: .venv/developed  ## The tests that take minutes each: the largest networks in every format.
	$(BIN)/python -m pytest -m long

chaos: .venv/developed  ## Kill prediction runs at random moments, ten times each way; cut storage off; runs whose Ray dies.
	$(BIN)/python -m pytest -m chaos -s

soak: .venv/developed  ## A million images with a kill at half; a service under load, faults and nonsense; flat memory.
	command -v wrk || { apt-get update -qq && apt-get install -y -qq wrk; }
	$(BIN)/python -m pytest -m soak -s

test-s3: .venv/developed  ## The S3 tests against Ceph's gateway, which it installs from Debian's packages.
	tests/ceph.sh $(BIN)/python -m pytest -m s3 tests

test-browser: .venv/developed  ## The tests in Chromium, which it installs from Debian's packages.
	command -v chromium chromedriver || { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; }
	$(BIN)/python -m pytest -m browser tests

test-cluster: .venv/developed  ## Several nodes, Prometheus, MLflow; installs iproute2 and prometheus from Debian's packages.
	{ command -v ip && command -v prometheus; } || { apt-get update -qq && apt-get install -y -qq iproute2 prometheus; \
		systemctl disable --now prometheus 2>/dev/null || true; }
	$(BIN)/python -m pytest -m cluster -s

lock: .venv/developed  ## Write the lock files anew from pyproject.toml.
	@echo 'tensorflow>=2.21,<2.22; sys_platform != "linux" or platform_machine != "x86_64"' > .venv/without-gpu.txt
	@echo 'tensorflow-cpu>=2.21,<2.22; sys_platform == "linux" and platform_machine == "x86_64"' > .venv/without-gpu.in
	@echo 'backports-strenum<1.3' > .venv/constraints.txt
	$(COMPILE) $(WITHOUT_GPU) --extra dev --upgrade --output-file requirements-dev.lock
	$(COMPILE) $(WITHOUT_GPU) --extra heic --extra openvino --constraint requirements-dev.lock \
		--output-file requirements.lock
	$(COMPILE) --extra gpu --extra heic --extra openvino --constraint requirements-dev.lock --upgrade \
		--output-file requirements-gpu.lock

clean:  ## Remove what the targets above made.
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info demo build

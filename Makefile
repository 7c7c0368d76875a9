# make demo and make test do all of their own set-up. What it installs is locked, version by version, in requirements/;
# LOCK=none takes the newest of everything instead, into an environment of its own.
LOCK   ?= requirements
PYTHON ?= python3.11
VENV   ?= $(if $(UNLOCKED),.venv-latest,.venv)
TORCH  ?= torch==2.13.0
BIN     = $(VENV)/bin
JOBS   ?= 2
UNLOCKED = $(filter none,$(LOCK))
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# $(call fits,PYTHON,FILE): says in one line why a lock file can't be installed here, before pip takes pages to say it.
fits = $(if $(UNLOCKED),true,$(1) requirements/lock.py fits $(LOCK)/$(2).txt --torch "$(TORCH)")
# $(call install,FILE): pip, held to a lock file, and what it builds packages with held to another. It compiles nothing:
# of eighteen thousand modules few are imported, and those Python compiles then.
install = $(BIN)/python -m pip install --quiet --no-compile $(if $(UNLOCKED),--upgrade --upgrade-strategy eager "$(TORCH)",\
	--build-constraint $(LOCK)/build.txt --constraint $(LOCK)/$(1).txt)
alone = $(BIN)/python -m pip install --quiet --no-compile --no-deps $(if $(UNLOCKED),--upgrade,\
	--build-constraint $(LOCK)/build.txt --constraint $(LOCK)/$(1).txt)
# Each worker takes most tests of a file together, so that a model or a kernel that a file sets up is set up once.
workers = -n $(JOBS) --dist worksteal
quick = -m "not slow and not gpu and not browser and not notebook"
locked = $(if $(UNLOCKED),,$(LOCK)/build.txt $(LOCK)/$(1).txt)

.PHONY: demo test lint test-slow test-attack test-soak test-mutants test-browser test-notebook test-field test-cluster test-serving test-gpu test-latest docs docs-links dist check-all bench bench-gpu train \
	compare coverage lock newest clean help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/python:
	@python=$$(command -v $(PYTHON) || command -v python3) || { echo "there is no $(PYTHON), nor a python3" >&2; exit 1; }; \
		$(call fits,"$$python",demo) && "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(UNLOCKED),--upgrade,--constraint $(LOCK)/build.txt) pip

$(VENV)/.demo: pyproject.toml requirements/alone.in $(call locked,demo) | $(BIN)/python
	@$(call fits,$(BIN)/python,demo) --venv $(VENV)
	$(call install,demo) -e ".[demo]"
	$(call alone,demo) -r requirements/alone.in
	@touch $@

$(VENV)/.dev: pyproject.toml requirements/alone.in $(call locked,dev) | $(BIN)/python
	@$(call fits,$(BIN)/python,dev) --venv $(VENV)
	$(call install,dev) -e ".[demo,dev]"
	$(call alone,dev) -r requirements/alone.in
	@touch $(VENV)/.demo $@

demo: $(VENV)/.demo ## trace two real trained models, offline
	$(BIN)/hookattn demo --out out

lint: $(VENV)/.dev ## ruff, its format, and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## linter, types and the tests
	$(BIN)/python -m pytest $(workers) $(quick)

test-slow: $(VENV)/.dev ## what takes long
	$(BIN)/python -m pytest -m "slow" -n 1

# Says in one line where there is none.
chromium = command -v chromium >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } || \
	echo "chromium is missing and cannot be installed here: what needs it is skipped"

test-browser: $(VENV)/.dev ## the viewer in Chromium, which is installed if it is missing and can be
	@$(chromium)
	@command -v npm >/dev/null && npm ci --silent --prefix hookattn/render/viewer || \
		echo "npm is missing: that the bundle is what its sources build is not checked, nor the rules of axe"
	$(BIN)/python -m pytest tests/browser -n 1 -rs

# Of its own: JupyterLab and marimo bring servers that nothing else here needs.
noted = .venv-notebook/bin/python -m pip install --quiet --no-compile $(if $(UNLOCKED),--upgrade --upgrade-strategy eager,\
	--build-constraint $(LOCK)/build.txt --constraint $(LOCK)/notebooks.txt)
.venv-notebook/.done: pyproject.toml $(call locked,notebooks)
	@$(call fits,$(PYTHON),notebooks) --venv .venv-notebook
	$(PYTHON) -m venv .venv-notebook
	.venv-notebook/bin/python -m pip install --quiet $(if $(UNLOCKED),--upgrade,--constraint $(LOCK)/build.txt) pip
	$(noted) "$(TORCH)" -e ".[notebooks]"
	@touch $@

test-notebook: .venv-notebook/.done ## JupyterLab and marimo, installed for it, with real kernels in Chromium
	@$(chromium)
	PYTHONPATH=.:adapters .venv-notebook/bin/python -m pytest tests/notebooks -p no:cacheprovider -rs

$(VENV)/.field: $(VENV)/.dev tests/field/libraries.txt tests/field/needed.txt $(call locked,field)
	$(call alone,field) -r tests/field/libraries.txt -r tests/field/needed.txt
	@touch $@

test-field: $(VENV)/.field ## the other libraries of the field, installed for it
	$(BIN)/python -m pytest tests/field tests/interop/test_viewers.py -n $(JOBS) -rs

$(VENV)/.cluster: $(VENV)/.dev $(call locked,cluster)
	@$(call fits,$(BIN)/python,cluster) --venv $(VENV)
	$(call install,cluster) -e ".[demo,dev,ray]"
	@touch $@

test-cluster: $(VENV)/.cluster ## surveys on Ray, installed for it: two CPUs of this machine, and what is killed on them
	$(BIN)/python -m pytest tests/cluster -n 1 -rs

# Of its own: vLLM asks for other versions than the tests do. It has wheels for Linux on x86_64 alone.
served = .venv-serving/bin/python -m pip install --quiet --no-compile $(if $(UNLOCKED),,--constraint $(LOCK)/serving.txt)
.venv-serving/.done: tests/serving_vllm/libraries.txt tests/serving_vllm/needed.txt $(if $(UNLOCKED),,$(LOCK)/serving.txt)
	@$(call fits,$(PYTHON),serving) --venv .venv-serving
	$(PYTHON) -m venv .venv-serving
	$(served) "$(TORCH)"
	$(served) "$(TORCH)" -r tests/serving_vllm/needed.txt
	$(served) --no-deps -r tests/serving_vllm/libraries.txt
	@touch $@

test-serving: .venv-serving/.done ## vLLM on a CPU, installed for it: minutes
	PYTHONPATH=.:adapters .venv-serving/bin/python -m pytest tests/serving_vllm -p no:cacheprovider -rs

test-attack: $(VENV)/.dev ## interrupts, forks, kills, damaged files, wrong calls, other users: minutes, with figures
	$(BIN)/python -m tests.attack

$(VENV)/.docs: $(VENV)/.dev $(call locked,docs)
	@$(call fits,$(BIN)/python,docs) --venv $(VENV)
	$(call install,docs) -e ".[demo,dev,site,release]"
	@touch $@

docs: $(VENV)/.docs ## the documentation site, offline: every notebook run, warnings as errors, links within it checked
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m sphinx -W --keep-going -q -b html -d docs/_build/cache docs docs/_build/html
	$(BIN)/python -m tests.project.site_links docs/_build/html
	@echo "open docs/_build/html/index.html"

docs-links: docs ## the links that lead out of the site, where there is a network
	HOOKATTN_DOCS_NOTEBOOKS=cache $(BIN)/python -m sphinx -q -b linkcheck -d docs/_build/cache docs docs/_build/links

dist: $(VENV)/.docs ## wheel and sdist: built, checked, and tried in an environment that has nothing else
	rm -rf dist .venv-dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m tests.project.distributions dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --no-compile $(if $(UNLOCKED),,--constraint $(LOCK)/dev.txt) "$(TORCH)" numpy
	.venv-dist/bin/python -m pip install --quiet --no-compile $(if $(UNLOCKED),,--constraint $(LOCK)/dev.txt) dist/*.whl
	cd .venv-dist && bin/python -I $(CURDIR)/tests/project/installed.py
	.venv-dist/bin/python -m pip install --quiet --no-compile $(if $(UNLOCKED),,--constraint $(LOCK)/dev.txt) "$$(ls dist/*.whl)[cli]"
	cd .venv-dist && bin/hookattn --help > /dev/null && bin/hookattn adapters > /dev/null
	@echo "dist/ is ready: docs/releasing.md says what comes next"

SECONDS ?= 3600
test-soak: $(VENV)/.dev ## traces of changing models in one process for an hour (SECONDS=): nothing may grow
	$(BIN)/python -m tests.attack --only soak --rounds $(SECONDS)

$(VENV)/.mutants: $(VENV)/.dev $(call locked,mutants)
	@$(call fits,$(BIN)/python,mutants) --venv $(VENV)
	$(call install,mutants) -e ".[demo,dev,mutants]"
	@touch $@

test-mutants: $(VENV)/.mutants ## changes an operator of the core, many times, and asks whether a test notices; NUMBER=200 SEED=0, long
	$(BIN)/python -m tests.mutants --number $(or $(NUMBER),200) --seed $(or $(SEED),0) $(if $(ONLY),--only $(ONLY))

test-gpu: $(VENV)/.dev ## what a GPU does differently; without one, its kernels in Triton's interpreter and compiler
	$(BIN)/python -m pytest tests/attention/test_kernels*.py tests/test_on_device.py tests/recording/test_host_transfer.py tests/store/test_writer.py -n 1 -rs

test-latest: ## the newest of everything, in an environment of its own: the tests, and what is newer than the lock
	@rm -f .venv-latest/.demo .venv-latest/.dev
	@$(MAKE) LOCK=none newest

newest: $(VENV)/.dev
	$(BIN)/python -m pytest $(workers) $(quick)

check-all: ## every target, one after the other, and a table of what is red at the end; TARGETS="demo lint" runs these
	@bash .ci/all "$(MAKE)" $(TARGETS)

lock: ## lock what the set-up installs anew: the newest of everything, and TORCH; KEEP=1 keeps what is locked
	@test -x .venv-lock/bin/python || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --upgrade uv
	PATH="$(CURDIR)/.venv-lock/bin:$$PATH" .venv-lock/bin/python requirements/lock.py make --torch "$(TORCH)" \
		$(if $(KEEP),--keep)

bench: $(VENV)/.dev ## what a trace costs, as ratios to the untraced forward
	$(BIN)/python -m benchmarks --json out/bench.json

bench-gpu: $(VENV)/.dev ## the same on a GPU, in eight minutes; says so where there is none
	$(BIN)/python -m benchmarks --device cuda --json out/bench-gpu.json

.venv-peers/.done: benchmarks/side_by_side/libraries.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --no-compile "$(TORCH)"
	.venv-peers/bin/python -m pip install --quiet --no-compile -r $<
	@touch $@

compare: .venv-peers/.done ## the same in other libraries: docs/comparison.md and docs/comparison-edits.md anew; PAGES= is another folder
	PYTHONPATH=.:adapters .venv-peers/bin/python -m benchmarks.same_weights $(or $(PAGES),docs)/comparison.md
	PYTHONPATH=.:adapters .venv-peers/bin/python -m benchmarks.side_by_side $(or $(PAGES),docs)/comparison-edits.md
	PYTHONPATH=.:adapters .venv-peers/bin/python -m pytest tests/edit/test_peers.py tests/interop -rs

coverage: $(VENV)/.dev ## every model type of transformers, and docs/coverage.md anew
	$(BIN)/python -m tests.sweep --jobs $(JOBS) --resume $(if $(REPORT),--report $(REPORT))

train: $(VENV)/.dev ## train the demo's small causal model again
	$(BIN)/python examples/train_induction.py $(if $(WEIGHTS),--out $(WEIGHTS))

clean: ## remove what was set up
	rm -rf $(VENV) .venv-latest .venv-lock .venv-peers .venv-serving .venv-notebook out

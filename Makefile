# `make bench` and `make test` work on a bare machine with Python >= 3.10: each first brings .venv up to date.
#
#   PYTHON=python3.12        the interpreter that creates .venv
#   VENV=/some/where         another place for the environment
#   CURVOPT_DATA=/folder     data sets kept locally (default: none; nothing is ever downloaded here)
#   WORKERS=4                test processes
#   ARGS="-k lanczos"        more arguments for pytest or the benchmark

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
CODE := $(wildcard curvopt benchmarks tests examples)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv bench suite studies test test-all lint format docs clean distclean

help:  ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create or update .venv

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "curvopt needs Python >= 3.10; '$(PYTHON)' is older or missing. Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "no virtual environment: on Debian or Ubuntu install the package python3-venv" >&2; exit 1; }

# The order matters. torch goes first, at its pinned version, so that nothing that follows picks another one. BackPACK
# asks for torchvision, of which it needs nothing (only its examples import it) and which does not import beside a CPU
# build of torch: hence BackPACK alone by --no-deps, and its two real requirements by name. `pip check` will say so.
# The stamp is written last: an installation that was interrupted starts over.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PIP) install -q -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) install -q -c constraints.txt einops unfoldNd -e ".[bench,wandb,tensorboard,optimizers,dev]"
	$(PIP) install -q -c constraints.txt --no-deps backpack-for-pytorch
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) install -q -c constraints.txt -e ".[docs]"
	@touch $@

bench: $(STAMP)  ## train and compare the optimizers on the main task: table, plots, logs (a few minutes)
	$(PY) -m benchmarks bench $(ARGS)

studies: $(STAMP)  ## re-run the founding papers' claims at small size: benchmarks/results/studies.md (half an hour at most)
	$(PY) -m benchmarks study all --small --page benchmarks/results/studies.md $(ARGS)

suite: $(STAMP)  ## the small suite: five tasks, twelve optimizers tuned alike, six seeds (a quarter of an hour on two cores)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks suite small --jobs $(WORKERS) $(ARGS)

# One thread a process: the tests run in WORKERS processes, and more threads than cores only wait for each other.
test: $(STAMP)  ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) $(ARGS)

test-all: $(STAMP)  ## all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) -m "slow or not slow" $(ARGS)

lint: $(STAMP)  ## style, formatting, types; changes nothing
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m mypy

format: $(STAMP)  ## put formatting right, and what the linter can repair by itself
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)

docs: $(DOCS_STAMP)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:  ## remove caches and build products, not .venv and not runs/
	rm -rf build dist site htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

# Everything runs from .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHES := $(patsubst tests/bench/%.py,%,$(filter-out tests/bench/__init__.py,$(wildcard tests/bench/*.py)))

.DEFAULT_GOAL := help
.PHONY: help install demo serve test test-slow bench lint clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## install everything into .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cellray needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.11 install" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install ## the whole path on a simulated atlas, about ten minutes
	$(BIN)/python -m pipelines.demo

serve: install ## answer with the model in BUNDLE=PATH on http://127.0.0.1:8000, for this machine alone
	@test -n "$(BUNDLE)" || { echo "which model? Say make serve BUNDLE=PATH, the folder or URL of a bundle" >&2; exit 2; }
	@folder=$$(mktemp -d /tmp/cellray-XXXXXX) && trap 'rm -rf "$$folder"' EXIT && trap 'exit 130' INT TERM && \
	RAY_TMPDIR=$$folder RAY_ADDRESS=local RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 \
	RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$$($(BIN)/python -c 'import secrets; print(secrets.token_hex(32))') \
	RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1 \
	$(BIN)/serve run serve.app:build bundle="$(BUNDLE)"

test: lint ## lint, types and the fast tests, a quarter of an hour or more
	$(BIN)/python -m pytest

test-slow: install ## the whole fault matrix and the long learning runs
	$(BIN)/python -m pytest -m slow

bench: install ## every benchmark in tests/bench
	@set -e; for name in $(BENCHES); do $(BIN)/python -m tests.bench.$$name; done

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what was installed and cached; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

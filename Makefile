# `make demo` and `make test` do everything: environment, installation, work. A second run does only the work.
#
#   make demo PYTHON=python3.12      another interpreter (3.10 or newer)
#   make demo BUDGET=50%             another budget for the first summary

PYTHON ?= python3
BUDGET ?= 35%
REPORT := samples/money-bail.txt

VENV := .venv
STAMP := $(VENV)/installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# What a recipe calls is what is installed here, so that the commands shown can be typed as they stand in an
# activated environment.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# Shows a command on stderr, then runs it: stdout carries summaries and nothing else.
run = @printf '\n$$ %s\n' '$(1)' >&2; $(1)

.PHONY: help demo test clean

help:
	@echo 'make demo    install into $(VENV), fetch the default model once, summarize $(REPORT)'
	@echo 'make test    install into $(VENV), then lint, types and all tests'
	@echo 'make clean   remove $(VENV) and caches (the fetched model stays in your cache directory)'

demo: $(STAMP)
	$(call run,auvsum models pull)
	$(call run,auvsum summarize $(REPORT) --budget $(BUDGET))
	$(call run,auvsum summarize $(REPORT) --budget 4%)

# Tests use tiny models: more threads than cores at hand only make them wait for each other.
test: export OMP_NUM_THREADS = 2
test: export HF_HUB_OFFLINE = 1
test: $(STAMP)
	ruff check
	ruff format --check
	mypy
	pytest

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "auvsum needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)" >&2; \
	  echo "hint: name one, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo 'Installing into $(VENV): a few minutes the first time.' >&2
	@$(PYTHON) -m venv $(VENV) >&2
	@$(PIP) setuptools hatchling editables >&2
	@$(PIP) --no-build-isolation --use-pep517 --editable '.[dev]' >&2
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

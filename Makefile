# `make sentiment` and `make test` do all their own set-up, from a clean clone, in $(VENV).
# Another Python: make test PYTHON=/path/to/python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip --no-input install -qq

.DEFAULT_GOAL := help
.PHONY: help sentiment test test-slow lint clean

help:
	@echo "make sentiment   fine-tune glm-nano-zh on Chinese reviews: the main job"
	@echo "make test        run the tests"
	@echo "make test-slow   run those that take minutes each"
	@echo "make lint        run ruff and mypy"
	@echo "make clean       remove the environment and the caches; runs/ stays"

sentiment: $(VENV)/.stamp-runtime
	$(BIN)/python launch/train.py --config=configs/sentiment.py

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.stamp-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted installation is taken up again.
$(VENV)/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "glm-jax needs Python 3.11 or newer and '$(PYTHON)' is not: try make PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.stamp-runtime: requirements.lock pyproject.toml | $(VENV)/.stamp-python
	@echo "Installing requirements.lock into $(VENV) (a few minutes the first time)"
	@$(PIP) -r requirements.lock
	@$(PIP) --no-deps -e .
	@touch $@

$(VENV)/.stamp-dev: requirements-dev.lock $(VENV)/.stamp-runtime
	@echo "Installing requirements-dev.lock into $(VENV) (a few minutes the first time)"
	@$(PIP) -r requirements-dev.lock
	@touch $@

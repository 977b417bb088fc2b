# Each target sets up what it needs: a virtual environment in .venv, made once and again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart test test-all conformance lint docs-test bench clean

quickstart: $(READY)
	$(BIN)/lightning-feat fit --config recipes/quickstart.yaml

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest

conformance: $(READY)
	$(BIN)/python -m pytest tests/conformance

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs-test: $(READY)
	$(BIN)/python -m pytest --doctest-modules --doctest-continue-on-failure lightning_feat
	$(BIN)/python -m pytest tests/test_readmes.py

bench: $(READY)
	$(BIN)/python benchmarks

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache

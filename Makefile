# Each target sets up what it needs: a virtual environment in .venv, made once and again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready
WORKERS ?= 2
# Workers of one thread each; tests/conftest.py says which tests stay together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: quickstart test test-slow test-all conformance lint docs docs-test dist bench sweep clean

quickstart: $(READY)
	$(BIN)/lightning-feat fit --config recipes/quickstart.yaml

# The blocks of the READMEs are run by docs-test.
test: $(READY)
	$(PYTEST) -m "not slow" --ignore tests/recipes/test_readmes.py

test-slow: $(READY)
	$(PYTEST) -m slow

test-all: $(READY)
	$(PYTEST)

conformance: $(READY)
	$(PYTEST) tests/conformance

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs-test: $(READY)
	$(PYTEST) --doctest-modules --doctest-continue-on-failure lightning_feat
	$(PYTEST) -m "not slow" tests/recipes/test_readmes.py

# The site, into build/site; a warning is an error. Open build/site/index.html: it needs neither server nor network.
docs: $(DOCS_READY)
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet --conf-dir docs/site --doctree-dir build/doctrees . build/site

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist

sweep: $(READY)
	$(BIN)/python -m tests.models.sweep

bench: $(READY)
	$(BIN)/python benchmarks

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test docs recipes reliability lint

install: $(VENV)/.installed

# Made once, and again when the dependencies change.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# A detector from nothing: draws scenes, trains, evaluates, counts its energy, shows it all. Half an hour on one CPU core.
demo: install
	rm -rf runs/demo
	$(BIN)/hoyer-det train scenes_retinanet_resnet18 --out runs/demo
	$(BIN)/hoyer-det analyze runs/demo
	$(BIN)/hoyer-det report runs/demo

# Two processes of one thread each: most tests are small.
test: install
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 tests

# The site, strictly: no broken link, no public name without a docstring; then every block of its pages and the README.
docs: install
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist load -o faulthandler_timeout=660 docs/test_pages.py

# Every recipe for about a hundred steps, a quarter as wide: fails where one does not learn.
recipes: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/recipes.py

# All tests, and docs/reliability.md from its report.
reliability: install
	mkdir -p runs
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -o junit_family=xunit1 --junitxml runs/tests.xml tests
	$(BIN)/python docs/reliability.py runs/tests.xml

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

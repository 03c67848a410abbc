# Every target works on a bare clone: it first makes the virtual environment and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP ?= $(BIN)/python -m pip
# The file that marks an extra as installed. `dev` includes all extras that a target needs.
installed = $(or $(wildcard $(VENV)/.installed-dev),$(VENV)/.installed-$(1))
# One process per core, each with one thread. Neighboring tests share a process, and with it the models they train.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: install demo quickstart published docs test test-slow test-browser lint format clean

install: $(VENV)/.installed-dev  ## everything, to work on the library itself

$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable ".[$*]"
	touch $@

demo: $(call installed,onnx)  ## open a page on which the model in this repository generates; ARGS=--no_browser only serves it
	$(BIN)/python examples/browser_demo.py $(ARGS)

quickstart: $(call installed,quickstart)  ## train a small model, distill it and sample from both
	$(BIN)/python examples/quickstart.py $(ARGS)

published: $(call installed,evaluate)  ## evaluate the released models as published; ARGS=--quick for a first look
	$(BIN)/python examples/published.py $(ARGS)

docs: $(call installed,docs)  ## the documentation site, in docs/_build; broken links between its pages are errors
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs docs/_build
	@echo "Open docs/_build/index.html"

test: $(VENV)/.installed-dev  ## the fast tests
	$(PYTEST)

test-slow: $(VENV)/.installed-dev  ## the slow tests
	$(PYTEST) -m "slow and not gpu"

test-browser: $(VENV)/.installed-dev  ## the tests of the page, in Chromium
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || command -v google-chrome >/dev/null || { echo "Chromium is missing: 'apt-get install chromium', or set CHROMIUM to an executable"; exit 1; }
	@command -v npm >/dev/null || { echo "npm is missing: install Node.js"; exit 1; }
	npm ci --prefix tests/browser --ignore-scripts --no-audit --no-fund
	$(PYTEST) -m browser

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) docs/_build *.egg-info .pytest_cache .ruff_cache tests/browser/node_modules

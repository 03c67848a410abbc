# Everything works on a bare clone: the first target that needs the virtual environment makes it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A process for each core, each with one thread, and with tests that lie together, which share what they train.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: install demo quickstart published test test-slow test-browser lint format clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(INSTALLED)  ## a page on this machine on which the model in this repository writes; ARGS=--no_browser only serves it
	$(BIN)/python examples/browser_demo.py $(ARGS)

quickstart: $(INSTALLED)  ## train a small model and watch it write
	$(BIN)/python examples/quickstart.py

published: $(INSTALLED)  ## the released models beside their published figures; ARGS=--quick for a first look
	$(BIN)/python examples/published.py $(ARGS)

test: $(INSTALLED)  ## the fast tests
	$(PYTEST)

test-slow: $(INSTALLED)  ## the tests that take long
	$(PYTEST) -m "slow and not gpu"

test-browser: $(INSTALLED)  ## the tests of the page, in Chromium
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || command -v google-chrome >/dev/null || { echo "Chromium is missing: 'apt-get install chromium', or set CHROMIUM to an executable"; exit 1; }
	@command -v npm >/dev/null || { echo "npm is missing: install Node.js"; exit 1; }
	npm ci --prefix tests/browser --ignore-scripts --no-audit --no-fund
	$(PYTEST) -m browser

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache tests/browser/node_modules

# Everything works on a bare clone: the first target that needs the virtual environment makes it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart test test-slow lint format clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: $(INSTALLED)  ## train a small model and watch it write
	$(BIN)/python examples/quickstart.py

test: $(INSTALLED)  ## the fast tests
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)  ## the tests that take long
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache

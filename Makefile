# `make quickstart` and `make test` need Python 3.11 or newer, make and a package index, and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test check bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/fusechat run examples/quickstart.yaml

test: install
	$(BIN)/pytest

check: install
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/quickstart.py

clean:
	rm -rf .venv build dist src/*.egg-info

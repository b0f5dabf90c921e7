# make quickstart   set up .venv and see the whole way once: train, export, build, measure
# make test         set up .venv and run the tests
# make check        ruff and mypy

PYTHON ?= python3
EXTRAS := cpu,rtx,demo,report,bulk,triton,test
BIN := .venv/bin

quickstart: .venv/.ready
	$(BIN)/rtresnet quickstart

test: .venv/.ready
	$(BIN)/python -m pytest

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@

.PHONY: quickstart test check

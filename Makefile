# make quickstart   set up .venv and see the whole way once: train, export, build, measure
# make test         set up .venv and run the tests
# make check        ruff and mypy

PYTHON ?= python3
EXTRAS := cpu,rtx,demo,report,bulk,ray,triton,test
BIN := .venv/bin

quickstart: .venv/.ready
	$(BIN)/rtresnet quickstart

test: .venv/.ready .venv/openvino
	$(BIN)/python -m pytest

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@

# Takes the place of onnxruntime where it is installed, so it lies beside, for the tests that ask.
.venv/openvino: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $@ onnxruntime-openvino || echo "not installed: tests of it will be skipped"

.PHONY: quickstart test check

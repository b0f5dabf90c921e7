# make quickstart   set up .venv and see the whole way once: train, export, build, measure
# make test         set up .venv and run the tests, but for the slow ones
# make test-slow    run the tests that start real processes: kill and resume, torchrun, Ray, README
# make test-all     run every test
# make check        ruff and mypy

PYTHON ?= python3
EXTRAS := cpu,rtx,demo,report,bulk,ray,serve,triton,test
BIN := .venv/bin
# One worker per core; each takes its half of the tests, and then what others have not begun.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

quickstart: .venv/.ready
	$(BIN)/rtresnet quickstart

test: .venv/.ready .venv/openvino .venv/tensorrt-bindings
	$(PYTEST) -m "not slow"

test-slow: .venv/.ready .venv/openvino .venv/tensorrt-bindings
	$(PYTEST) -m slow

test-all: test test-slow

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@

# Replaces onnxruntime where it is installed, so it goes to a folder that only some tests use.
.venv/openvino: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $@ onnxruntime-openvino || echo "not installed: tests of it will be skipped"

# TensorRT's Python API without its libraries: tests compare every call with these two versions.
.venv/tensorrt-bindings: .venv/.ready
	for version in 10.13 11; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
			--target $@/$$version "tensorrt-cu13-bindings==$$version.*" \
			|| echo "not installed: tests of TensorRT $$version will be skipped"; \
	done

.PHONY: quickstart test test-slow test-all check

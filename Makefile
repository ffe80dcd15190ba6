# Everything a newcomer or a developer runs. `make demo` and `make test` need nothing but bash, Python >= 3.11 and a network.
SHELL := bash
PY := .venv/bin/python
RUN := .venv/bin

# Waiting OpenMP threads must not spin: with another process busy, two spinning threads are slower than one.
export OMP_WAIT_POLICY ?= passive

PROTOS := winnow/proto/v1/common.proto winnow/proto/v1/internal.proto winnow/proto/v1/winnow.proto

.PHONY: help demo setup test check fmt lint types docs proto gpu faults bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: ## install, start the pipeline, rank real documents, answer about a long text, stop everything
	@scripts/setup.sh demo
	@$(RUN)/winnow demo

setup: ## make .venv with the development tools
	@scripts/setup.sh dev

test: setup ## everything that needs no GPU 
	$(PY) -m pytest -q -m "not gpu and not soak"

check: setup lint types ## format, lint, types, protocol drift, fast tests 
	$(PY) -m pytest -q -m "not gpu and not soak and not faults and not slow" tests/unit

fmt: setup ## format and fix what ruff can fix
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

lint: setup ## formatting and lint, changes nothing
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .

types: setup ## mypy, strict
	@scripts/types.sh

docs: setup ## write the generated tables of README.md again
	$(PY) scripts/readme.py

proto: setup ## generate src/winnow/proto/v1 from proto/v1
	$(PY) -m grpc_tools.protoc -Iwinnow/proto=proto --python_out=src --pyi_out=src --grpc_python_out=src $(PROTOS)

bench: setup ## measure against the controls, write tests/bench/results (the GPU figures where there is a GPU)
	$(PY) tests/bench/$(if $(shell nvidia-smi -L 2>/dev/null),spine_h100,spine_cpu).py

gpu: setup ## tests that need a CUDA device
	$(PY) -m pytest -q -m gpu

faults: setup ## tests that kill, pause and cut real processes
	$(PY) -m pytest -q -m faults

clean: ## remove caches, build output and the virtual environment
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

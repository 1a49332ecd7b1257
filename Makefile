# FedFog: `make demo` runs it, `make help` lists the rest.
CLIENTS ?= 3
ROUNDS ?= 3
REGIONS ?= 1
TIERS ?= 2
FOG_ROUNDS ?= 1
SEED ?= 42
SECONDS ?= 120
SECURE ?=

VENV ?= .venv
# The first interpreter that is new enough; name another with `make env PYTHON=...`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# CPU builds of PyTorch, a tenth of the size of the CUDA build that Linux gets by default.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

SERVICES := $(wildcard services/*/pyproject.toml)
TOOLS := pytest hypothesis mypy ruff import-linter pyyaml markdown-it-py scikit-learn
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo test test-compose chaos fuzz lint bench bench-full results docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(INSTALLED) ## make the Python environment in .venv (first time: about a minute)

demo: env ## federated training on this machine: CLIENTS=3 (per region) ROUNDS=3 REGIONS=1 TIERS=2 SEED=42 SECURE=1
	@$(VENV)/bin/fedfog demo --clients $(CLIENTS) --rounds $(ROUNDS) --regions $(REGIONS) --tiers $(TIERS) --seed $(SEED) $(if $(SECURE),--secure)

test: env ## all tests that need no Docker
	$(VENV)/bin/pytest -m "not compose"

test-compose: env ## the tests of images and compose file; needs a Docker engine with Compose
	$(VENV)/bin/pytest -m compose

chaos: env ## kill and cut everything for SECONDS=120 after a schedule of SEED=42; is anything lost?
	@PYTHONPATH=tests $(VENV)/bin/python -m chaos --seconds $(SECONDS) --seed $(SEED) --tiers $(TIERS) --fog-rounds $(FOG_ROUNDS)

fuzz: env ## 200,000 hostile payloads, packets and requests at everything that reads them: SEED=42
	@PYTHONPATH=tests $(VENV)/bin/python -m fuzz --seed $(SEED)

lint: env ## style, types and layers
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: env ## FedFog and stock Flower side by side: time of a round, memory, bytes; five minutes
	@$(VENV)/bin/python -m bench

results: env ## what is learned over the real stack, three seeds: writes docs/results.md; a quarter of an hour
	@$(VENV)/bin/python -m bench.learning

bench-full: env ## all sizes and rivals, big models; writes the figures of docs/scaling.md; half an hour
	@$(VENV)/bin/python -m bench --full
	@$(VENV)/bin/python -m bench.scaling --write

docs: env ## write docs/settings.md, docs/messages.md and .env.example anew
	$(VENV)/bin/python -m fedfog.cli.pages .

clean: ## remove the environment and all caches; results in runs/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find shared services tests bench -name __pycache__ -prune -exec rm -rf {} +
	find shared services -name '*.egg-info' -prune -exec rm -rf {} +

# Torch has a step of its own, because the other index is asked for nothing else. Build isolation
# would install setuptools once for each of the editable packages.
$(INSTALLED): constraints.txt shared/pyproject.toml $(SERVICES)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; name one: make env PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) torch
	$(PIP) --no-build-isolation --editable 'shared[evaluation,flower,experiments,onnx,tensorboard]' \
		$(SERVICES:%/pyproject.toml=--editable %) $(TOOLS)
	@touch $@

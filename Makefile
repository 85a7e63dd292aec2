# `make help` lists the targets. Each one sets up what it needs, so any of them may be the first command typed.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
ARGS ?=
COMPILE := $(RUN) -m uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --quiet \
	--custom-compile-command "make lock"
PACKAGES_OF := import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]])

.DEFAULT_GOAL := help
.PHONY: help setup extra train test test-all lint tensorboard bench lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(READY)  ## make the virtual environment .venv with the pinned dependencies

extra: $(READY)  ## add what only some need: EXTRA=text, EXTRA=audio, EXTRA=ray, EXTRA=slurm or EXTRA=optuna
	@case "$(EXTRA)" in text|audio|ray|slurm|optuna) ;; \
		*) echo 'error: EXTRA must be text, audio, ray, slurm or optuna: make extra EXTRA=text'; exit 1;; esac
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes --constraint requirements-extras.lock \
		$$($(RUN) -c '$(PACKAGES_OF)' $(EXTRA))

train: $(READY)  ## train a VAE on the embedded digits (ARGS="model=dcgan data=mnist" for others)
	$(RUN) -m src.train model=vae $(ARGS)

test: $(READY)  ## run the fast tests, on two cores
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(READY)  ## run all tests, also real trainings on real data (DATA_ROOT=folder)
	$(RUN) -m pytest -m "" $(ARGS)

lint: $(READY)  ## check style, types and the direction of the imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

tensorboard: $(READY)  ## open the dashboard on all runs in outputs/
	$(RUN) -m tensorboard.main --logdir outputs $(ARGS)

bench: $(READY)  ## time training steps against a bare PyTorch loop, an evaluation, sweeps, mixtures, and drawing with a cache
	$(RUN) -m tests.benchmarks.training_cost
	$(RUN) -m tests.benchmarks.evaluation_cost
	$(RUN) -m tests.benchmarks.sweep_cost
	$(RUN) -m tests.benchmarks.gmm_cost
	$(RUN) -m tests.benchmarks.decoding_cost

lock: $(READY)  ## pin the newest versions that pyproject.toml allows
	$(RUN) -m pip install --quiet uv
	$(COMPILE) --extra dev --upgrade --output-file requirements.lock
	$(COMPILE) --all-extras --constraint requirements.lock --output-file requirements-extras.lock

clean:  ## remove the environment and all caches; runs in outputs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] < (3, 14) else f"error: Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]} (choose another with make PYTHON=python3.11)")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies into $(VENV) (about 6 GB with CUDA on Linux; a few minutes, once)"
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $(READY)

# make setup | train | test | test-slow | test-parity | results | plan | lint | format | clean
# PYTHON=python3.12 picks the interpreter; ACCEL=cuda13 or ACCEL=tpu installs jax for that device.

PYTHON ?= python3
ACCEL ?= cpu
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed-$(ACCEL)
TORCH := $(VENV)/installed-torch
PLANNER := .venv-plan
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: setup train test test-slow test-parity results plan lint format clean

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@case "$(ACCEL)" in cpu|cuda13|tpu) ;; *) echo "ACCEL=$(ACCEL): use cpu, cuda13 or tpu" >&2; exit 2;; esac
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) -r requirements.txt $(if $(filter-out cpu,$(ACCEL)),"jax[$(ACCEL)]")
	$(PIP) --no-deps --editable .
	touch $@

train: setup
	$(RUN) -m bitnet_jax train --resume

test: lint
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

# Whole commands, programs on many devices, and processes that are killed and go on.
test-slow: setup
	$(RUN) -m pytest -n 2 --dist loadfile -m slow

# The exports as transformers and llama.cpp themselves compute them. torch's CPU build is enough:
# point PIP_EXTRA_INDEX_URL to it where pip would take a larger one.
test-parity: $(TORCH)
	$(RUN) -m pytest tests/parity

$(TORCH): $(STAMP)
	$(PIP) torch==2.13.0 accelerate==1.15.0 lm_eval==0.4.13 xllamacpp==2026.10.11549
	touch $@

# Every table, figure and claim of the experiments, from their rows.
results: setup
	$(RUN) -m experiments.lab.build

# What a run will need on TPUs, by their compiler, which needs no TPU (libtpu, one process at a time):
# make plan PRESET=125m TOPOLOGY=v5e:2x4 SET="data.batch_size=64 model.n_layers=6"
PRESET ?= 125m
TOPOLOGY ?= v5e:2x4
plan: $(PLANNER)/installed
	$(PLANNER)/bin/python -m bitnet_jax plan --preset $(PRESET) --topology $(TOPOLOGY) $(SET:%=--set %)

$(PLANNER)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv --clear $(PLANNER)
	$(PLANNER)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt "jax[tpu]"
	touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Runs are kept.
clean:
	rm -rf $(VENV) $(PLANNER) .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

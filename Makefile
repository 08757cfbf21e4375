# make demo   train a small translation model and show its results (about ten minutes)
# make test   run ruff, mypy and the whole test suite
# make check  the same with only the fast tests, in one to three minutes
# make format format the code
# Each creates the environment that it needs in .venv. PYTHON=... chooses the interpreter; by default
# it is one that fairseq has a wheel for, if there is one that works.

PYTHON ?= $(or $(shell for python in python3.12 python3.11; do \
  $$python -c "import ensurepip, venv" 2>/dev/null && echo $$python && break; done),python3)
VENV ?= .venv
BIN := $(VENV)/bin
# All cores; without this, fairseq starts either one thread or too many.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

.PHONY: demo test check lint format clean

demo: $(VENV)/ready
	$(BIN)/python examples/demo/demo.py

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: lint
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow and not network"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/ready: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot create an environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing torch, fairseq, timm and transformers into $(VENV): a few minutes, 7 GB (10 meanwhile), once."
	$(BIN)/python -m pip install --progress-bar on --editable '.[fairseq,timm,transformers,glue,timeseries,viz,demo,dev]'
	@touch $@

clean:
	rm -rf build $(patsubst %/ready,%,$(wildcard $(VENV)/ready)) *.egg-info

# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test fuzz lint format parity real bench clean

demo: $(STAMP)
	$(BIN)/deltaworks demo

test: lint
	$(BIN)/python -m pytest

# A hundred thousand mutated documents for everything that reads a file; inputs that fail stay in .fuzz.
fuzz: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m fuzz

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mergekit and transformers live in environments of their own: neither is a dependency of deltaworks.
parity: $(STAMP) .venv-peers/.installed
	MERGEKIT_PYTHON=$(CURDIR)/.venv-peers/bin/python $(BIN)/python -m pytest -m parity -rs tests

real: $(STAMP) .venv-peers/.installed .venv-peers-4/.installed
	TRANSFORMERS_4_PYTHON=$(CURDIR)/.venv-peers-4/bin/python MERGEKIT_PYTHON=$(CURDIR)/.venv-peers/bin/python KUBERNETES_PYTHON=$(CURDIR)/.venv-peers/bin/python $(BIN)/python -m pytest -m real -rs tests

# Two hours, most of them for mergekit, and 40 GB of disk; goes on where it was stopped.
bench: $(STAMP) .venv-peers/.installed
	$(BIN)/python benchmarks/speed.py .bench --mergekit .venv-peers/bin/python

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

.venv-peers/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement benchmarks/peers.txt
	touch $@

# The same for transformers 4, which reads configurations in its own way.
.venv-peers-4/.installed: benchmarks/peers-4.txt
	$(PYTHON) -m venv .venv-peers-4
	.venv-peers-4/bin/python -m pip install --quiet --requirement benchmarks/peers-4.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-peers .venv-peers-4 .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz

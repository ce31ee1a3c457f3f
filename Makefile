# Two commands: `make quickstart` runs the whole road, `make test` runs every test. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one process a core and one more, for tests that wait for servers and children; a file's tests in
# one of them: they share the exports they make
CORES := $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
PARALLEL := -n $(CORES) --dist loadfile

.PHONY: quickstart test test-all fuzz check coverage docs bench peers clean

quickstart: $(STAMP)
	$(BIN)/edgetune quickstart --out quickstart-out

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -q $(PARALLEL)

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL)

# about ten minutes of mutated bundles, hostile adapters and recipes, killed processes and a server
# under load, and one table of what came of them; EDGETUNE_FUZZ: how many (1000: hours of the whole
# target), EDGETUNE_FUZZ_SEED: from which seed on
fuzz: $(STAMP)
	EDGETUNE_FUZZ=$${EDGETUNE_FUZZ:-300} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 tests/fuzz

# decode, serving, encoders and training beside the peers that `make peers` has installed, in turns,
# into benchmarks/results/ and SPEED.md; needs what `make quickstart` leaves, or DECODER=BUNDLE and
# ENCODER=BUNDLE. A small one: make bench BENCH=decode ROUNDS=1
BENCH ?= decode serving encoder training
ROUNDS ?= 7
bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py $(BENCH) --rounds $(ROUNDS) $(if $(DECODER),--decoder $(DECODER)) $(if $(ENCODER),--encoder $(ENCODER)) $(if $(GENAI),--genai $(GENAI)) $(if $(PEERS),--peers $(PEERS))
	$(BIN)/python benchmarks/bench_page.py

peers: $(STAMP)
	$(BIN)/python benchmarks/bench.py --install-peers $(if $(PEERS),--peers $(PEERS))

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p edgetune

coverage: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -q --cov --cov-report=term-missing:skip-covered

# the site, out of docs/ and the docstrings, into site/; a dead link is an error
docs: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# where a C++ compiler and kernels for this processor are, an engine that is not built is a fault
COMPILER := $(shell command -v c++ || command -v g++ || command -v clang++)
KERNELS := $(filter x86_64 aarch64 arm64,$(shell uname -m))
export EDGETUNE_NATIVE ?= $(if $(and $(COMPILER),$(KERNELS)),required,auto)
ENGINE := setup.py $(wildcard runtime/engine/native/csrc/*)

# torch first and by itself: its exact version resolves to a CPU build where one is offered
$(STAMP): pyproject.toml constraints.txt $(ENGINE)
	$(PYTHON) -c 'import sys; sys.exit("edgetune needs Python 3.10 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache quickstart-out site

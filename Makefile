# `make demo` and `make test` set up all they need in .venv; run again, they start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Caches of libraries stay inside the environment too; only the demo downloads are kept elsewhere (see README).
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/cache/torch_extensions

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

# The recipe's bf16 takes several times as long as float32 on a CPU that has no products of 16 bits.
FAST_DTYPE := from foldgpt.sources.load import device_of, is_slow_in_16_bits as slow; \
  print("float32" if device_of("auto").type == "cpu" and slow() else "bfloat16")

demo: $(READY)
	dtype=$$($(BIN)/python -c '$(FAST_DTYPE)') && \
	$(BIN)/foldgpt run recipes/demo.yaml --dtype $$dtype --out runs/demo --overwrite

# One worker a core, four at most; a file of tests stays with one worker, which makes its models once. In their order:
# the longest files have few tests, and would come last, when the other workers have nothing left to do.
test: $(READY) lint
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "foldgpt needs Python 3.11 or later; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs

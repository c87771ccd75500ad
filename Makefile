# make demo | make test | make lint | make clean. Each sets up all it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU the small CPU build of torch is pinned; with one, pip takes its own choice.
CPU_ONLY := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU || echo yes)
STAMP := $(VENV)/.installed-$(if $(CPU_ONLY),cpu,gpu)

.PHONY: demo test lint clean setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints/cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifneq ($(CPU_ONLY),)
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable '.[dev]'
else
	$(BIN)/python -m pip install --quiet --editable '.[dev,gpu]'
endif
	touch $@

demo: setup
	$(BIN)/heterotune run demo

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

# One environment, made by whoever needs it first. `make check` is what CI runs.
PYTHON ?= python3
BIN := .venv/bin
THREADS := OMP_NUM_THREADS=1

.PHONY: check format lint types test demo clients quality

check: format lint types test

.venv/made: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch==2.13.0 || $(BIN)/pip install -q torch
	$(BIN)/pip install -q -e '.[dev]'
	touch .venv/made

format: .venv/made
	$(BIN)/ruff format --check .

lint: .venv/made
	$(BIN)/ruff check .

types: .venv/made
	$(BIN)/pyright

test: .venv/made
	$(THREADS) $(BIN)/pytest -n 2

demo: .venv/made
	$(BIN)/halfbyte demo

clients: .venv/made  # makes environments of vLLM and llm-compressor: minutes, and a package index
	$(BIN)/pytest -m clients tests/clients -s

quality: .venv/made  # the table of README.md, on the reference models
	$(BIN)/python benchmarks/quality.py --models $(MODELS) --calibration $(CALIBRATION) --text $(TEXT) \
		--json docs/measurements/quality.json --readme README.md

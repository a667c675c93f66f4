# One word each, on a fresh machine too: the first one that runs sets up .venv.
#
#   make demo    train with and without feplb, kill a rank: one screen and a picture in out/
#                (make demo ARGS="--text PATH" for another text)
#   make test    all tests
#   make test-stacks   against Megatron-Core 0.16.1 and the names in CuPy, on the CPU
#   make check   ruff, mypy, clang-format, the walls
#
# WORKERS=... is how many processes run tests side by side, each a file at a time (0: this one).
# PYTHON=... chooses the interpreter. A system torch of 2.8 or newer is used; else the CPU wheel is
# installed (the plain one brings gigabytes of CUDA).

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet

TORCH := 2.13.0
MEGATRON := 0.16.1
CUPY := 14.2.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
HAS_TORCH := -c 'import sys, torch; sys.exit([int(n) for n in torch.__version__.split(".")[:2]] < [2, 8])'

# What a file's tests share is made once.
SIDE_BY_SIDE := --numprocesses $(WORKERS) --dist loadfile

# Wherever pip has put it.
CLANG_FORMAT := -c 'from clang_format import clang_format; clang_format()'

BUILT_FROM := pyproject.toml setup.py $(wildcard feplb/csrc/*.cpp feplb/csrc/*.h)

.PHONY: help demo test test-stacks check
.DELETE_ON_ERROR:

help:
	@sed -n '/^#   /s/^#   //p' Makefile

demo: $(VENV)/.demo
	$(RUN) examples/demo.py $(ARGS)

# pytest's status 5, no tests ran, is a failure like any other.
test: $(VENV)/.dev
	$(RUN) -m pytest $(SIDE_BY_SIDE) $(ARGS)

# Not among its requirements: what megatron-core wants beside torch and numpy is for GPUs.
test-stacks: $(VENV)/.dev
	@$(PIP) --no-deps 'megatron-core==$(MEGATRON)' packaging \
		'cupy-cuda12x==$(CUPY)' 'cuda-bindings==12.9.*' cuda-pathfinder
	$(RUN) -m pytest $(SIDE_BY_SIDE) $(ARGS) -W ignore tests/stacks

check: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	find feplb tests '(' -name '*.cpp' -o -name '*.h' ')' -print0 | \
		xargs -0 $(RUN) $(CLANG_FORMAT) --dry-run -Werror
	$(RUN) -m pytest tests/test_walls.py

$(VENV)/.torch:
	@echo "setting up $(VENV)"
	@if ! $(RUN) $(HAS_TORCH) 2>/dev/null; then \
		if $(PYTHON) $(HAS_TORCH) 2>/dev/null; \
		then $(PYTHON) -m venv --system-site-packages $(VENV); \
		else $(PYTHON) -m venv $(VENV); fi && \
		{ $(RUN) $(HAS_TORCH) 2>/dev/null || \
		$(PIP) 'torch==$(TORCH)+cpu' 2>/dev/null || \
		$(PIP) --index-url $(TORCH_CPU_INDEX) 'torch==$(TORCH)'; }; fi
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(BUILT_FROM)
	@echo "building feplb and installing what the demo needs"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(BUILT_FROM)
	@echo "building feplb and installing what tests and checks need"
	@$(PIP) -e '.[demo,test,check]'
	@touch $(VENV)/.demo $@

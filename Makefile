# make demo, test and lint need python3, make and a C++ compiler; they install the rest into .venv.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
TOOLS := $(VENV)/.tools
BUILT := $(VENV)/.built
SOURCES := setup.py pyproject.toml tools/native_build.py ssp_fused/_version.py \
	$(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

.PHONY: demo test lint format bench wheel gpu-check check-oldest-torch clean

demo: $(BUILT)
	$(VENV)/bin/python -m ssp_fused.demo

# One process a core, each with one thread: the tensors of the tests are too small to share. Triton interprets its
# kernels, or compiles them, by a choice for a whole process: two runs.
test: $(BUILT)
	$(PYTEST) tests --ignore tests/triton_interpreter
	$(PYTEST) tests/triton_interpreter

lint: $(TOOLS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/python tools/check_text.py

format: $(TOOLS)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# A part of what docs/results.md has, in less than ten minutes on two cores; nothing else may run beside it.
bench: OUT ?= bench
bench: $(BUILT)
	$(VENV)/bin/python -m benchmarks.memory --out $(OUT)
	$(VENV)/bin/python -m benchmarks.blocks --device cpu --schemes ssp33 --layouts contiguous \
		--shapes 128x16x32x32 128x64x8x8 --out $(OUT) \
		--contenders eager "eager (control)" fused-cpu compile-default convolutions
	$(VENV)/bin/python -m benchmarks.kernels --device cpu --cold --shapes 32x16x32x32 --layouts channels_last \
		--contenders eager "eager (control)" fused-cpu copy --out $(OUT)
	$(VENV)/bin/python -m benchmarks.adversarial --device cpu --batch-size 32 --out $(OUT)

# A wheel in dist/, tried in an environment of its own.
wheel: $(TOOLS)
	$(INSTALL) torch
	$(VENV)/bin/python tools/make_wheel.py

# Installs nothing: with the torch, nvcc and pytest of $(PYTHON).
gpu-check: OUT ?= gpu-check
gpu-check:
	$(PYTHON) tools/gpu_check.py --out $(OUT)

# TORCH_WHEEL names a wheel of the oldest torch; without it, pip downloads one.
check-oldest-torch: $(TOOLS)
	PYTHON=$(VENV)/bin/python tools/check_oldest_torch.sh $(TORCH_WHEEL)

clean:
	rm -rf build dist *.egg-info .cache .pytest_cache .ruff_cache
	rm -rf ssp_fused/_lib ssp_fused/_C.* ssp_fused/_build_info.json $(BUILT)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

# The build needs these, and so does everything that checks the sources.
$(TOOLS): constraints.txt | $(VENV)/bin/python
	$(INSTALL) setuptools wheel ninja pybind11 ruff clang-format
	touch $@

$(BUILT): $(TOOLS) $(SOURCES)
	$(INSTALL) torch
	$(INSTALL) --no-build-isolation --editable '.[plot,dev]'
	# Attacks that evaluations run and tests compare with. torchattacks asks for an old requests and for torchvision,
	# and imports neither.
	$(INSTALL) --no-deps pyautoattack torchattacks
	touch $@

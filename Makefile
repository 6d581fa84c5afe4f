# Every target makes $(VENV) when it is missing or older than the pins, so `make demo` works in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# For `make fuzz`.
CASES ?= 20000
SEED ?= 0
# For `make try`.
TORCH ?= 2.11.0

py := $(VENV)/bin/python
# Two pip runs in one environment would race.
.NOTPARALLEL:
.DEFAULT_GOAL := help

# Workers share the cores, so each gets one thread: torch's default would start a full set in every worker.
one_thread := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# `demo` installs little, because it is the first command of a new user.
extras_demo := cli,plot
extras_full := test,docs,bench,hf,dev

$(VENV)/.installed-%: constraints.txt pyproject.toml
	@echo "Installing fusedonemoe[$(extras_$*)] into $(VENV) (a minute or so the first time) ..."
	@test -x $(py) || $(PYTHON) -m venv $(VENV)
	@# The build tools come first and pinned; with build isolation pip would fetch its own, unpinned.
	@$(py) -m pip install -qq -c constraints.txt setuptools wheel
	@$(py) -m pip install -qq -c constraints.txt --no-build-isolation -e '.[$(extras_$*)]'
	@touch $@

.PHONY: kernels-again wheel
.PHONY: help demo test bench suite docs links-elsewhere site-check check verifytypes pytest triton-values fuzz doctest wheel-smoke try
.PHONY: clean
.PHONY: asv-smoke asv-machine asv-run asv-range asv-compare asv-check asv-history

help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.installed-demo  ## train a small compiled MoE language model here, in about three minutes
	$(py) -m fusedonemoe demo

# Fast steps come first.
steps := check doctest docs wheel-smoke asv-smoke triton-values pytest

test: $(addprefix timed-,$(steps))  ## everything CI runs

timed-%: $(VENV)/.installed-full
	@echo "== $*"; start=$$(date +%s); $(MAKE) --no-print-directory $*; status=$$?; \
	echo "== $*: $$(test $$status = 0 && echo passed || echo FAILED) after $$(($$(date +%s) - start)) s"; exit $$status

check: $(VENV)/.installed-full  ## lint, format, types and spelling
	$(py) -m ruff check
	$(py) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror ops/cpu/native/*
	$(py) -m mypy
	$(py) -m codespell_lib *.md docs examples fusedonemoe ops asv_bench tests
	tests/verify_types.sh $(py)

verifytypes: $(VENV)/.installed-full  ## types of every public name of the wheel, by pyright
	tests/verify_types.sh $(py)

pytest: $(VENV)/.installed-full  ## the tests alone
	$(one_thread) $(py) -m pytest -n $(JOBS) --dist worksteal --durations=20 --durations-min=5 -m 'not recompiles' tests

kernels-again: $(VENV)/.installed-full  ## the CPU kernels for other instruction sets, and with sanitizers (about 8 minutes)
	$(one_thread) $(py) -m pytest -v -m recompiles tests/ops/test_cpu_build.py

triton-values: $(VENV)/.installed-full  ## values of the GPU kernels, in Triton's interpreter
	@# A process of its own: triton decides at its import whether it interprets or compiles.
	@if $(py) -c 'import triton' 2>/dev/null; then \
	  echo '$(one_thread) TRITON_INTERPRET=1 $(py) -m pytest -n $(JOBS) --dist worksteal tests/triton/values'; \
	  $(one_thread) TRITON_INTERPRET=1 $(py) -m pytest -n $(JOBS) --dist worksteal tests/triton/values; \
	else echo 'triton is not installed (it has wheels for Linux only): its tests are left out'; fi

fuzz: $(VENV)/.installed-full  ## small random cases against a loop in float64: CASES=20000 SEED=0
	$(py) -m tests.fuzz --cases $(CASES) --seed $(SEED) $(FUZZ_OPTIONS)

doctest: $(VENV)/.installed-full  ## the examples in docstrings, README and docs
	$(one_thread) $(py) -m pytest -q --doctest-modules --doctest-glob='*.md' fusedonemoe docs README.md

docs: $(VENV)/.installed-full  ## the documentation and the benchmarks' history, into docs/_build/html
	$(py) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	$(py) tests/site/links.py docs/_build/html

links-elsewhere: $(VENV)/.installed-full  ## try the links to other sites, which needs the network
	$(py) -m sphinx -q -b linkcheck docs docs/_build/linkcheck

site-check: docs  ## open every page in Chromium: errors, search, phone width, accessibility (needs chromium and npm)
	npm install --silent --no-audit --no-fund --no-package-lock --prefix tests/site
	$(py) -m fusedonemoe report docs/results/*.json --output docs/_build/report.html
	node tests/site/check.mjs docs/_build/html docs/_build/report.html

bench: $(VENV)/.installed-full  ## the side-by-side comparison, quick form
	$(py) -m fusedonemoe bench --quick

SUITE ?= seeds

suite: $(VENV)/.installed-full  ## a benchmark that proves a claim of the pages: SUITE=seeds
	$(py) -m asv_bench.suites $(SUITE) --json $(SUITE).json $(SUITE_OPTIONS)

asv-smoke: asv-machine  ## every asv benchmark once
	$(one_thread) ASV_SMOKE=1 $(py) -m asv run --config "$$($(py) asv_bench/configuration.py smoke)" --machine $(MACHINE) --quick --python=same --show-stderr $(ASV_OPTIONS)

# Results are kept by machine, so a machine with committed results gets a name: MACHINE=epyc-2core.
MACHINE ?= local
COMMIT ?= HEAD
RANGE ?= main..HEAD
BASE ?= main
HEAD ?= HEAD
asv_run = $(py) -m asv run --config asv_bench/asv.conf.json --machine $(MACHINE) --no-interleave-rounds --show-stderr $(ASV_OPTIONS)
milestones = sed -n 's/^\([0-9a-f][0-9a-f]*\) .*/\1/p' asv_bench/milestones.txt

asv-machine: $(VENV)/.installed-full
	@# asv asks about a machine once, and CI cannot answer; an answer that asv already has stays. A new name takes the missing
	@# details from the entry of this host.
	@known() { grep -qs "\"$$1\":" "$$HOME/.asv-machine.json"; }; asv="$(py) -m asv machine --yes --config asv_bench/asv.conf.json"; \
	known "$(MACHINE)" || { known "$$(uname -n)" || $$asv; $$asv --machine "$(MACHINE)" --os "$$(uname -s)"; } >/dev/null

asv-run: asv-machine  ## one commit measured: COMMIT=HEAD MACHINE=local
	$(asv_run) '$(COMMIT)^!'

asv-range: asv-machine  ## commits measured: RANGE=main..HEAD
	$(asv_run) --skip-existing-successful '$(RANGE)'

asv-compare: $(VENV)/.installed-full  ## two measured commits: BASE=main HEAD=HEAD
	$(py) -m asv compare --config asv_bench/asv.conf.json --machine $(MACHINE) $(BASE) $(HEAD)

asv-check: asv-machine  ## fails if HEAD=HEAD is more than 15 % slower than BASE=main
	$(py) asv_bench/check.py $(BASE) $(HEAD) --machine $(MACHINE) $(ASV_OPTIONS)

asv-history: asv-machine  ## measure the missing results of the commits in asv_bench/milestones.txt
	@# The benchmarks without torch.compile come first, which are most, so that a run that is stopped early has a history too. asv
	@# would combine this choice with one in ASV_OPTIONS.
	-$(if $(filter -b% --bench%,$(ASV_OPTIONS)),,$(milestones) | $(asv_run) --bench '^(?!bench_compile.Compile|bench_layers.Compiled)' --skip-existing-successful HASHFILE:-)
	$(milestones) | $(asv_run) --skip-existing-successful HASHFILE:-

wheel: $(VENV)/.installed-full  ## a wheel for Linux on x86-64 with the CPU kernels inside, and the sdist, in dist/
	FUSEDONEMOE_PREBUILD=all $(py) -m build --no-isolation --outdir dist/linux .
	@# auditwheel names the oldest system that has the symbols. torch's library comes with torch.
	PATH="$(abspath $(VENV))/bin:$$PATH" auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist dist/linux/*.whl
	mv dist/linux/*.tar.gz dist/ && rm -r dist/linux

wheel-smoke: $(VENV)/.installed-full  ## wheel and sdist, installed and run elsewhere
	tests/smoke_wheel.sh $(py)

try:  ## a part of the tests with another torch or Python, as in `make try TORCH=2.11.0 PYTHON=python3.13`
	tests/try_versions.sh $(TORCH) $(PYTHON) -n $(JOBS)

clean:  ## remove the files that the other targets made
	rm -rf .venv build dist *.egg-info docs/_build demo-output asv_bench/.asv tests/site/node_modules
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# From a fresh checkout to a running benchmark; `make` lists the targets.
#
# Everything runs in .venv, which is made on first use with the first fitting Python and brought up to date when
# pyproject.toml changes. Variables, on the command line or in the environment:
#   PYTHON      the Python to make .venv with; given on the command line, no other is tried
#   EXTRAS      further extras of pyproject.toml to install: EXTRAS=tpu, EXTRAS=gpu,plots
#   ARGS        further arguments for bench.decode, bench.gpu or bench.aot; a repeated option overrides the one given here
#   TEST_ARGS   further arguments for pytest: TEST_ARGS="-n 0 -k dispatch"
#   GPU_PYTHON  the Python of `make test-gpu` and `make bench-gpu`, which already has jax, flax and pytest

ifeq ($(filter oneshell,$(.FEATURES)),)
$(error GNU make 3.82 or newer is needed, and this is $(MAKE_VERSION); on macOS: brew install make, then gmake)
endif

# One shell a recipe, which stops at the first command that fails.
.ONESHELL:
SHELL := /bin/sh
.SHELLFLAGS := -euc
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup decode test test-all lint format test-gpu bench-gpu aot clean base tools compiler cuda

RUN := .venv/bin/python
GPU_PYTHON ?= python3

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# pip compiles no modules, of which most are never imported; Python keeps what it compiles at the first import.
PIP_INSTALL := $(RUN) -m pip install -qq --no-input --no-compile
unexport PYTHONDONTWRITEBYTECODE

# The tests bring the TPU compiler with them, and where it is installed jax complains that there is no TPU.
ifeq ($(wildcard /dev/accel[0-9]* /dev/vfio/[0-9]* /dev/nvidia[0-9]* /dev/kfd),)
export JAX_PLATFORMS ?= cpu
endif

help:  ## list the targets
	@echo 'Usage: make TARGET [ARGS="..."] [TEST_ARGS="..."] [EXTRAS=tpu] [PYTHON=/path/to/python3]'
	sed -n 's/^\([a-z-]*\):.*  ## /\1:/p' Makefile | while IFS=: read -r target text; do
	  printf '  make %-9s %s\n' "$$target" "$$text"
	done

setup: cuda  ## make .venv with moejax and all that `make test` needs

decode: base  ## run the main job: decode over 32 expert-parallel chips, timed and modelled
	$(RUN) -m bench.decode --ep 32 $(ARGS)

test: tools  ## lint, check types, run some cases of every kind of test
	$(MAKE) --no-print-directory lint & lint=$$!
	$(MAKE) --no-print-directory cuda
	wait $$lint
	$(RUN) -m pytest -n 2 --dist loadgroup --durations=20 --durations-min=5 -m 'not slow' $(TEST_ARGS)

test-all: override TEST_ARGS := -m '' $(TEST_ARGS)
test-all: test  ## the same with every case

lint: tools  ## check style, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy -n 2

format: tools  ## fix what ruff can fix, then format
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .

# Without pytest-timeout, which that Python may lack, pyproject.toml's `timeout` is an unknown option: no error. With
# pytest-benchmark, which it may have, TEST_ARGS="-n 8" would be one.
test-gpu:  ## run the tests that need an NVIDIA GPU with GPU_PYTHON (python3), installing nothing
	export XLA_PYTHON_CLIENT_PREALLOCATE=false
	PYTHONPATH=. $(GPU_PYTHON) -m pytest -p no:benchmark -W ignore::pytest.PytestConfigWarning -m gpu tests $(TEST_ARGS)

# Status 1 says that a bar is missed; the figures are shown all the same.
bench-gpu:  ## time the GPU kernels and their peers with GPU_PYTHON, show the figures in docs/results.md
	status=0
	$(GPU_PYTHON) -m bench.gpu --json docs/results/h200.json $(ARGS) || status=$$?
	if [ "$$status" -gt 1 ]; then exit "$$status"; fi
	$(GPU_PYTHON) -m bench.publish docs/results/h200.json
	exit "$$status"

# Status 1 says that something does not compile; the rest is shown all the same.
aot: compiler  ## compile the full-size layer for every TPU, forward and training, with no TPU at hand
	status=0
	for pass in '' --grad; do
	  $(RUN) -m bench.aot --all --precision w8a8 --precision w16a16 $$pass $(ARGS) || status=1
	done
	exit "$$status"

clean:  ## remove .venv, caches and build outputs
	rm -rf .venv build dist *.egg-info .jax_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

base:
	@$(call install)

tools:
	@$(call install,test)

compiler:
	@$(call install,aot)

# The compiler for GPUs, for tests that compile and run nothing. It has a folder of its own, as a jax that sees it looks
# for a GPU wherever it starts.
cuda: tools
	@version=$$($(RUN) -c 'import jax; print(jax.__version__)')
	if [ "$$(uname -sm)" != 'Linux x86_64' ] || [ -e ".venv/cuda/$$version" ]; then exit; fi
	echo "==> installing the compiler for GPUs of jax $$version in .venv/cuda"
	rm -rf .venv/cuda
	$(PIP_INSTALL) --no-deps --target .venv/cuda \
	  "jax-cuda12-pjrt==$$version" "jax-cuda12-plugin==$$version" 'nvidia-cuda-nvcc-cu12>=12.9,<13' || {
	  rm -rf .venv/cuda
	  echo 'make: pip could not, as it says above; the tests that need it are skipped' >&2
	  exit 0
	}
	touch ".venv/cuda/$$version"

# ---- How .venv is made -----------------------------------------------------------------------------------------------

# The Python releases to look for, best first. Another one from 3.12 on is taken if it is called python3 or python.
SERIES := 3.14 3.13 3.12

# Every candidate has to answer this, as being on the PATH proves nothing: pyenv puts a python3.13 there that may only
# say where Python 3.13 is, and Debian's python3 comes without ensurepip. (Old Pythons must be able to parse it.)
define probe
import sys
if sys.version_info < (3, 12): sys.exit("is Python %d.%d" % sys.version_info[:2])
try: import ensurepip, venv
except ImportError: sys.exit("has no venv or no ensurepip module")
print("Python %d.%d.%d" % sys.version_info[:3])
endef

# What a Python and the virtual environments made with it have in common.
identity := import sys; print(sys.base_prefix, sys.version) if sys.version_info >= (3, 12) else sys.exit(1)

comma := ,
space := $(comma:,= )
# $(call extras,test) is test,gpu when EXTRAS=gpu.
extras = $(subst $(space),$(comma),$(strip $(1) $(subst $(comma),$(space),$(EXTRAS))))

# $(call install,test): the commands that leave .venv with moejax[test] in it.
# .venv/installed holds a file for each set of extras: the checkout's path and the pyproject.toml that were installed.
# The folder is set aside while pip works, so that an interrupted installation counts for nothing.
define install
say() { echo "==> $$*"; }
only='$(filter command line,$(origin PYTHON))'

candidates() {
  if [ -n "$${PYTHON:-}" ]; then echo "$$PYTHON"; fi
  if [ -n "$$only" ]; then return; fi
  for series in $(SERIES); do echo "python$$series"; done
  echo python3
  echo python
  shim=$$(command -v python3 || true)
  for series in $(SERIES); do
    for root in "$${PYENV_ROOT:-}" "$${HOME:-}/.pyenv" "$${shim%/shims/python3}"; do
      ls -d "$$root/versions/$$series."*/bin/python3 2>/dev/null | grep '/[0-9.]*/bin/python3$$' | sort -rV
    done
  done
}

make_venv() {
  tried=
  newline=$$(printf '\n.')
  IFS=$${newline%.}
  for python in $$(candidates | awk '!seen[$$0]++'); do
    if ! command -v "$$python" >/dev/null; then
      answer='not found'
    elif answer=$$("$$python" -c '$(probe)' 2>&1 </dev/null); then
      say "making .venv with $$python ($$answer)"
      rm -rf .venv
      answer=$$("$$python" -m venv .venv 2>&1) && return
    fi
    tried="$$tried  $$python: $$(echo "$$answer" | head -n 1)$$IFS"
  done
  if [ -z "$$only" ] && command -v uv >/dev/null; then
    say 'making .venv with uv'
    rm -rf .venv
    uv venv --quiet --seed --python '>=3.12' .venv && return
  fi
  {
    echo 'make: found no Python that is 3.12 or newer, runs, and can make a virtual environment. Tried:'
    printf '%s' "$$tried"
    if [ -z "$$only" ]; then echo "  pyenv's versions folder and uv: nothing that fits"; fi
    echo 'Install one with its venv module (apt install python3.12-venv, pyenv install 3.13, uv python install 3.13),'
    echo 'or say where it is: make setup PYTHON=/path/to/python3.13'
  } >&2
  exit 1
}

fits() {
  found=$$($(RUN) -c '$(identity)' 2>/dev/null) || return
  [ -z "$$only" ] || [ "$$found" = "$$("$$PYTHON" -c '$(identity)' 2>/dev/null)" ]
}

wanted() { pwd -P; cat pyproject.toml; }

extras='$(call extras,$(1))'
if ! fits; then (make_venv); fi
if [ "$$(wanted)" = "$$(cat ".venv/installed/$${extras:-base}" 2>/dev/null)" ]; then exit; fi
if ! $(RUN) -m pip --version >/dev/null 2>&1; then (make_venv); fi
say "installing moejax$${extras:+[$$extras]} in .venv (the first time takes minutes)"
rm -rf .venv/installing
mkdir -p .venv/installed
mv .venv/installed .venv/installing
wanted >.venv/installing/base
$(PIP_INSTALL) --editable ".$${extras:+[$$extras]}" || {
  echo 'make: pip could not install moejax in .venv, as it says above. With another Python: make setup PYTHON=...' >&2
  exit 1
}
if [ -n "$$extras" ]; then cp .venv/installing/base ".venv/installing/$$extras"; fi
mv .venv/installing .venv/installed
endef

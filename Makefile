# Every target makes the environment it needs on first use: no step comes before it.
#
#   make train                 train a small model on real text; minutes on a laptop
#   make test                  format, lint, types, then the tests
#   make test-slow             the tests that take minutes each
#   make test-compat PYTHON=3.11   types, and tests that could differ on an older JAX
#   make test-aot              compile the step for TPU and GPU, without owning one
#   make bench NAME=...        one benchmark: a table, and a file in results/
#   make lint                  format, lint, types
#   make papers                write docs/papers.md again
#   make docs                  the site, in site/: these documents and the docstrings
#   make setup                 the environment, and nothing else
#
# PYTHON=3.12, PYTHON=python3.12 or PYTHON=/a/path chooses the interpreter; otherwise it
# is the newest that starts. ARGS="..." is handed to pytest or train.py.

SHELL := bash
PYTHON ?=
NAME ?=
ARGS ?=
JOBS ?= 2
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
# Memory in pages of 2 MiB, where Linux has them: a step on a CPU takes a quarter less.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# What changes most between lines of Python and JAX: config files, kernels and what
# stands in for them, meshes, the step.
COMPAT ?= tests/test_config.py tests/test_tree.py tests/test_partition.py \
  tests/sharding tests/pallas_kernels tests/moe/test_grouped_kernels.py \
  $(addprefix tests/attention/test_,operation.py mosaic_tpu.py mosaic_gpu.py layer.py) \
  tests/train/test_step.py

# $(call in,LEVEL) puts the environment's programs first; a failed set-up ends the recipe.
in = set -e; python=$$(PYTHON='$(PYTHON)' .ci/environment $(1)); bin=$$(dirname $$python)
pytest = $$python -m pytest -q
# A file's tests stay together: they share what they have compiled. A worker that dies
# ends the run: what it would have run would be lost without a word.
apart = -n $(JOBS) --dist loadfile --max-worker-restart=0
types = $$bin/pyright --pythonpath $$python
lint = $$bin/ruff format --check .; $$bin/ruff check .; $(types)

.PHONY: setup train test test-slow test-compat test-aot bench lint papers docs

setup:
	@$(call in,test)

train:
	@$(call in,run); $$python train.py --config=configs/quickstart.py $(ARGS)

test:
	@$(call in,test); $(lint); $(pytest) $(apart) $(ARGS)

test-slow:
	@$(call in,test); $(pytest) -m slow $(ARGS)

test-compat:
	@$(call in,test); $(types); $(pytest) $(apart) $(COMPAT) $(ARGS)

# One process: two of them would fight for the TPU compiler's lock.
test-aot:
	@$(call in,aot); $(pytest) -m aot $(ARGS)

bench:
	@$(call in,run); $$python -m sparsejax.bench $(NAME)

lint:
	@$(call in,test); $(lint)

papers:
	@$(call in,test); $$python -m sparsejax.papers --write

docs:
	@$(call in,test); JAX_PLATFORMS=cpu $$python -m sphinx -q -E -W --keep-going docs site

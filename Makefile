# Everything from a fresh clone: `make demo`, `make test`, `make lint`. `make help` lists the targets.
#
# Settings, on the command line or in the environment:
#   PYTHON       the interpreter .venv is made with, 3.11 or newer (python3)
#   JOBS         pytest workers, one CPU thread each (2)
#   PYTEST_ARGS  more arguments for pytest, for example PYTEST_ARGS="-k longformer -x"
#   DEMO_ARGS    more arguments for the demo
#   V=1          show all that pip says

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
V ?=

BIN := .venv/bin
STAMP := .venv/.installed
PIP_INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install $(if $(V),,-qq) -c constraints.txt
CODE := $(wildcard hf_efficient_attn tests examples benchmarks)

# One thread a worker: the models under test are small, and workers that share the cores slow each other down.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## create or update .venv (the targets below do it when needed)
	@:

demo: $(STAMP) ## run the demo
	@$(BIN)/hf-efficient-attn demo $(DEMO_ARGS)

test: $(STAMP) ## run every test
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: $(STAMP) ## check style and layout
	@status=0; \
	$(BIN)/ruff check $(CODE) || status=1; \
	$(BIN)/ruff format --check $(CODE) || status=1; \
	exit $$status

format: $(STAMP) ## rewrite the code in the checked layout
	@$(BIN)/ruff check --fix --exit-zero $(CODE)
	@$(BIN)/ruff format $(CODE)

clean: ## remove what the demo, the tests and the tools wrote
	@rm -rf demo-output build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage htmlcov *.egg-info
	@find . -path ./.venv -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove .venv as well
	@rm -rf .venv

# Made once, and brought up to date when the requirements change.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed, and there is no $(PYTHON) here: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "Bringing .venv up to date with pyproject.toml and constraints.txt."; \
	else \
		echo "Creating .venv with $$($(PYTHON) --version) (once, a few minutes; V=1 shows more)."; \
		$(PYTHON) -m venv --clear .venv; \
	fi
	@echo "  1/2 PyTorch and Transformers, the largest downloads"
	@$(PIP_INSTALL) torch transformers
	@echo "  2/2 this package and its tools"
	@$(PIP_INSTALL) --editable ".[dev]"
	@touch $@
	@echo "  .venv is ready."

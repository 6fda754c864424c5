# Everything from a fresh clone: `make demo`, `make test`, `make lint`. `make help` lists the targets.
#
# Settings, on the command line or in the environment:
#   PYTHON       the interpreter .venv and .venv-floor are made with, 3.11 or newer (python3)
#   JOBS         pytest workers, one CPU thread each (2)
#   PYTEST_ARGS  more arguments for pytest, for example PYTEST_ARGS="-k longformer -x"
#   DEMO_ARGS    more arguments for the demo
#   LRA_ARGS     more arguments for benchmarks/lra.py, for example LRA_ARGS="--budget paper"
#   V=1          show all that pip says

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
LRA_ARGS ?=
V ?=

BIN := .venv/bin
STAMP := .venv/.installed
FLOOR_BIN := .venv-floor/bin
FLOOR_STAMP := .venv-floor/.installed
# For the recipe of the stamps: $(@D) is the venv.
PIP_INSTALL = PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/python -m pip install $(if $(V),,-qq) -c $(@D)/constraints.txt
CODE := $(wildcard hf_efficient_attn tests examples benchmarks)

# One thread a worker: the models under test are small, and workers that share the cores slow each other down.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help venv demo lra test test-floor dist lint format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## create or update .venv (the targets below do it when needed)
	@:

demo: $(STAMP) ## run the demo
	@$(BIN)/hf-efficient-attn demo $(DEMO_ARGS)

lra: $(STAMP) ## train every family and softmax on ListOps of Long Range Arena (about ten minutes)
	@$(BIN)/python benchmarks/lra.py $(LRA_ARGS)

test: $(STAMP) ## run every test
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# Looks at the version on every run: a venv that something else was installed into would test another one in silence.
test-floor: $(FLOOR_STAMP) ## run every test on the oldest supported transformers
	@version=$$($(FLOOR_BIN)/python -c 'import transformers; print(transformers.__version__)') || exit 1; \
	grep -qx "transformers==$$version" constraints-floor.txt || { \
		echo ".venv-floor holds transformers $$version, not the one of constraints-floor.txt: rm -r .venv-floor" >&2; \
		exit 1; \
	}; \
	echo "Testing with transformers $$version."
	@$(TEST_ENV) $(FLOOR_BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

dist: $(STAMP) ## build sdist and wheel into dist, and try the wheel in a clean venv
	@$(BIN)/python tests/check_dist.py

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
	@find . -path './.venv*' -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove .venv and .venv-floor as well
	@rm -rf .venv .venv-floor

# Each made once, and brought up to date when the requirements change. Two lines for one package are a conflict to pip:
# awk keeps the first, so that in .venv-floor those of constraints-floor.txt win.
$(FLOOR_STAMP): constraints-floor.txt
$(STAMP) $(FLOOR_STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed, and there is no $(PYTHON) here: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if $(@D)/bin/python -m pip --version >/dev/null 2>&1; then \
		echo "Bringing $(@D) up to date with $^."; \
	else \
		echo "Creating $(@D) with $$($(PYTHON) --version) (once, a few minutes; V=1 shows more)."; \
		$(PYTHON) -m venv --clear $(@D); \
	fi
	@awk -F == '!/==/ || !seen[$$1]++' $(filter constraints-floor.txt,$^) constraints.txt > $(@D)/constraints.txt
	@echo "  1/2 PyTorch and Transformers, the largest downloads"
	@$(PIP_INSTALL) torch transformers
	@echo "  2/2 this package and its tools"
	@$(PIP_INSTALL) --editable ".[dev]"
	@touch $@
	@echo "  $(@D) is ready."

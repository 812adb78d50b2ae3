# Each target sets up what it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
# Two processes, each with whole files: most of the time goes by in Python.
PYTEST ?= -n 2 --dist loadfile
export TF_CPP_MIN_LOG_LEVEL ?= 2

# What a version can break: private names, optimizers, layers, loops, graphs. Replays of thousands of steps and large
# models are left to the newest end. Empty: all tests.
OLDEST ?= $(foreach name,package contract optimizer callbacks layers audit fused v1_rewrite config \
	records report run_script,$(wildcard tests/*/test_$(name).py)) \
	-k "not (none_never or no_row_of_overflows or well_made_models or killed_process or restored_run)"

.PHONY: demo test test-all coverage test-backends test-oldest docs check format clean

demo: .venv/installed
	$(BIN)/python examples/digits.py

test: .venv/installed
	$(BIN)/python -m pytest $(PYTEST)

# All combinations too, of which `make test` takes those that hold each value or each pair of values (tests/thorough.py).
test-all: .venv/installed
	$(BIN)/python -m pytest $(PYTEST) -m ""

# Fails below 95 % of the lines of tfmixed/; processes that tests start count.
coverage: .venv/installed
	@mkdir -p build/coverage
	$(BIN)/python -m pytest $(PYTEST) --cov

# JAX and PyTorch, in an environment without TensorFlow.
test-backends: .venv-backends/installed
	KERAS_BACKEND=jax .venv-backends/bin/python -m pytest $(PYTEST)
	KERAS_BACKEND=torch .venv-backends/bin/python -m pytest $(PYTEST)

# The wheel, without this checkout, on the oldest of everything that pyproject.toml admits.
test-oldest: .venv/installed
	$(BIN)/nox --session oldest -- $(PYTEST) $(OLDEST)

# The site, in build/site; whatever it warns of is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/installed: EXTRA = dev
.venv-backends/installed: EXTRA = backends
%/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "tfmixed needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet --editable '.[$(EXTRA)]'
	@touch $@

clean:
	rm -rf .venv .venv-backends .nox runs build dist

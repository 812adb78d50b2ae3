# Each target creates the environment that it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
PYTEST ?= -n 2 --dist worksteal
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test test-slow test-all coverage test-backends test-oldest docs check format clean

demo: .venv/installed
	$(BIN)/python examples/digits.py

# The default tests: every feature, a few minutes.
test: .venv/installed
	$(BIN)/python -m pytest $(PYTEST)

# The tests that CI adds: processes, trainings, faults of Keras and TensorFlow.
test-slow: .venv/installed
	$(BIN)/python -m pytest $(PYTEST) -m "slow and not thorough"

# Everything, including all combinations of parameters (tests/helpers/thorough.py).
test-all: .venv/installed
	$(BIN)/python -m pytest $(PYTEST) -m ""

# Fails if fewer than 95 % of the lines of tfmixed/ are run. Processes that tests start count.
coverage: .venv/installed
	@mkdir -p build/coverage
	$(BIN)/python -m pytest $(PYTEST) -m "not thorough" --cov

# The default tests on JAX and PyTorch, in an environment without TensorFlow.
test-backends: .venv-backends/installed
	KERAS_BACKEND=jax .venv-backends/bin/python -m pytest $(PYTEST)
	KERAS_BACKEND=torch .venv-backends/bin/python -m pytest $(PYTEST)

# The default tests on the wheel, with the oldest dependencies that pyproject.toml allows. The tests of attention use
# arguments of Keras 3.15, and the oldest matplotlib places the texts of figures differently.
OLDEST ?= --ignore tests/layers/test_attention.py --ignore tests/plotting/test_plotting.py
test-oldest: .venv/installed
	$(BIN)/nox --session oldest -- $(PYTEST) $(OLDEST)

# Builds the site in build/site. Warnings are errors.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell . .ci/run .ci/docstrings.py
	$(BIN)/python .ci/docstrings.py tfmixed tests docs examples benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/installed: EXTRA = dev
.venv-backends/installed: EXTRA = backends
%/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "tfmixed requires Python 3.11 or newer. Choose one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet --editable '.[$(EXTRA)]'
	@touch $@

clean:
	rm -rf .venv .venv-backends .nox runs build dist

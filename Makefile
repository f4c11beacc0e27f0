# make demo  a small distillation on the digits of scikit-learn, with its report
# make test  lint, types, the documentation and the whole test suite, in the same environment
#
# Needs only make and Python 3.11 or newer with venv. Another interpreter: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/digits
# Two processes: compilation, which most tests wait for, uses one core. Files stay whole, for their shared fixtures, and
# are taken in the order of tests/conftest.py rather than by their number of tests.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Python:resolution of uv, for "make versions": lowest-direct is every lower bound of setup.cfg.
VERSIONS ?= 3.11:lowest-direct 3.12:highest 3.13:highest
# A few tests from every room.
VERSIONS_TESTS ?= tests/test_precision.py tests/test_splat.py tests/test_storage.py tests/test_checkpoint.py \
  tests/test_rundir.py tests/test_exchange.py tests/test_parallel.py tests/test_errors.py tests/test_cli.py::test_demo_succeeds_and_prints_its_table

VENV_PYTHON := $(VENV)/bin/python
# Touched last, so an interrupted installation is taken up again; a change of the metadata installs again.
STAMP := $(VENV)/.installed-dev
# What the tests compile the GPU kernels with, on a machine without a GPU; the demo does without its gigabyte.
LOWERING := $(VENV)/.installed-lowering
DOCS := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help env demo test lint types docs pytest versions readers format wheel clean distclean

help:
	@echo "make demo       distill the digits dataset on the CPU into $(OUT)"
	@echo "make test       lint, types, the documentation and the whole test suite"
	@echo "make lint       ruff check and ruff format --check"
	@echo "make types      mypy"
	@echo "make docs       the documentation as a site that opens from disk, site/index.html; a dead link is an error"
	@echo "make pytest     the test suite alone; PYTEST_ARGS='-k render' passes arguments on"
	@echo "make versions   a short suite on the oldest and newest packages, on each Python that is there"
	@echo "make readers    exports, read by datasets, torchvision, PyTorch and TFDS; installs gigabytes"
	@echo "make format     rewrite the sources in the house format"
	@echo "make wheel      build the wheel into dist/"
	@echo "make clean      remove caches and build outputs; distclean removes $(VENV) as well"

env: $(LOWERING)

$(STAMP): setup.cfg pyproject.toml
	@command -v "$(PYTHON)" >/dev/null 2>&1 || \
	  { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: gsdd_jax needs Python 3.11 or newer, but $(PYTHON) is $$("$(PYTHON)" --version 2>&1); name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@echo "Installing gsdd_jax and its tools into $(VENV); the first time downloads several hundred megabytes."
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Elsewhere those tests are skipped with a reason.
$(LOWERING): $(STAMP)
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[lowering]' && \
	  $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps \
	    "jax-cuda13-plugin==$$($(VENV_PYTHON) -c 'import jaxlib; print(jaxlib.__version__)')"; \
	fi
	@touch $@

$(DOCS): $(STAMP)
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

demo: $(STAMP)
	$(VENV_PYTHON) -m train.distill --config configs/digits.yaml --out $(OUT)
	@echo "Report: $(abspath $(OUT))/report.html"
	@echo "Table:  $(abspath $(OUT))/table.md"

test: lint types docs pytest

lint: $(STAMP)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

types: $(STAMP)
	$(VENV_PYTHON) -m mypy

# What the variable turns off is an advertisement.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict
	@echo "Documentation: $(abspath site)/index.html"

pytest: $(LOWERING)
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

versions: $(STAMP)
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check uv
	@set -e; for pair in $(VERSIONS); do \
	  python=$${pair%:*}; resolution=$${pair#*:}; there=$(VENV)/versions/$$python-$$resolution; \
	  if ! $(VENV)/bin/uv python find --quiet --no-python-downloads "$$python" >/dev/null 2>&1; then \
	    echo "skipped: no Python $$python on this machine"; continue; \
	  fi; \
	  echo "Python $$python, $$resolution:"; \
	  $(VENV)/bin/uv venv --quiet --clear --no-python-downloads --python "$$python" "$$there"; \
	  $(VENV)/bin/uv pip install --quiet --python "$$there" --resolution "$$resolution" --editable '.[dev]'; \
	  "$$there/bin/python" -m pytest $(PYTEST_ARGS) --quiet $(VERSIONS_TESTS); \
	done

readers: $(STAMP)
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[readers]'
	$(VENV_PYTHON) -m pytest tests/test_readers.py

format: $(STAMP)
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

wheel: $(STAMP)
	rm -rf build
	$(VENV_PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find gsdd_jax kernels train tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)

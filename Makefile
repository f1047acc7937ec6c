# The two commands of the README: `make demo` and `make test`. Each makes its own virtual environment if there is none.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
OLDEST_PEFT := $(VENV)/peft-0.20.0
# What goes through PEFT's own names, files, switching and merging; numbers and checks of configs do not depend on it
PEFT_TESTS := tests/compat tests/test_registration.py $(patsubst %,tests/tuners/test_%.py, \
  alast bsr_adapters bsr_modules interrupted_saves layouts saved_before synqt)
# Each worker goes through one half of the tests in order, so that what a module's tests share is made once
PYTEST := -m pytest -n auto --dist worksteal

.PHONY: demo test test-all test-app test-contract test-distributed test-gpu test-timm lint bench bench-gpu docs compatibility clean

demo: $(VENV)/installed
	$(BIN)/python examples/quickstart.py $(ARGS)

# A worker uses a core: more threads would only wait for each other
test test-contract test-distributed test-app: export OMP_NUM_THREADS = 1

test: lint $(OLDEST_PEFT)
	PYTHONPATH=$(OLDEST_PEFT) $(BIN)/python $(PYTEST) -q $(PEFT_TESTS)
	$(BIN)/python $(PYTEST) $(ARGS)

# A family of tests by itself; every run ends with the counts of each
test-contract: $(VENV)/installed
	$(BIN)/python $(PYTEST) tests/contract tests/test_registration.py $(ARGS)

test-distributed: $(VENV)/installed
	$(BIN)/python -m pytest -n0 -m dist tests/distributed tests/examples $(ARGS)

# On a machine with a CUDA card; elsewhere all of it skips
test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -n0 -m gpu tests/gpu tests/engine/test_weight_offload.py $(ARGS)

# timm's models, in an environment of their own (`.venv-timm`): timm needs torchvision; minutes
test-timm: $(VENV)/installed
	$(BIN)/python tests/timm_environment.py $(ARGS)

# The app in headless Chromium, which has to be there
test-app: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[app]' playwright
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "" tests/app $(ARGS)

test-all: test test-distributed

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/bsr_vit_base.py $(ARGS)

# Eight minutes of a CUDA card; run it again to continue
bench-gpu: $(VENV)/installed
	$(BIN)/python benchmarks/gpu.py $(ARGS)

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict

compatibility: $(VENV)/installed
	$(BIN)/python tests/contract/report.py
	$(BIN)/python tests/contract/versions.py

# torch by itself first: the version of the constraints, whichever build this machine offers for it
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(OLDEST_PEFT): $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $@ peft==0.20.0

clean:
	rm -rf $(VENV) .venv-timm build dist *.egg-info

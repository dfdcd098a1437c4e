# Everything from a fresh checkout: each target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-all fuzz lint format wheel clean

help:
	@echo "make demo    the whole pipeline on rendered street scenes: runs/demo, about 6 minutes"
	@echo "make test    the default tests"
	@echo "make test-all  with the slow ones, about an hour"
	@echo "make fuzz    10,000 inputs for each reader of files from others"
	@echo "make lint    style, types, import order"
	@echo "make wheel   build a wheel and check that it finds its configs and tables"
	@echo "make clean   remove the virtual environment and caches"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/oneshot-ednas demo --out runs/demo --resume

# One thread per test process: with two cores, more threads than cores cost far more than they give.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

fuzz: $(INSTALLED)
	ONESHOT_EDNAS_FUZZ=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_fuzz.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Away from the checkout, so that only what the wheel holds can be found.
wheel: $(INSTALLED)
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	$(BIN)/python -m zipfile -e build/wheel/*.whl build/wheel/unpacked
	cd / && PYTHONPATH=$(CURDIR)/build/wheel/unpacked $(CURDIR)/$(BIN)/python -P -m oneshot_ednas \
		describe configs/architectures/ednas_table6.json \
		--table latency_tables/edgetpu_sim_256x256.csv

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis

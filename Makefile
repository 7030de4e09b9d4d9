# make demo | make test: both work on a fresh machine; the first call makes .venv and installs (about 6 GB, minutes).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-all lint matrix bench docs

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python train.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Two files of tests at a time, in the order of tests/conftest.py, each in a process with one thread: two with two threads each crawl
# on two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Every method on every data set with every family of teachers; `make test-all` runs a tenth of it, `make test` a part of that.
matrix: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/support_matrix.py

bench: install
	$(BIN)/python -m benchmarks.run

# The pages of docs/, into docs/_build/html. A warning or a broken link fails.
docs: install
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --quiet --nitpicky --fail-on-warning --keep-going docs docs/_build/html
	@echo "open docs/_build/html/index.html"

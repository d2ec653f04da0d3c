# Two commands do everything on a fresh machine: `make quickstart` runs the main job, `make test` runs all checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
INSTALLED := $(VENV)/.installed
PUBLIC = $(patsubst mpqsearch/%,mpqsearch.%,$(patsubst %/__init__.py,%,$(wildcard mpqsearch/*/__init__.py)) \
	$(patsubst %.py,%,$(filter-out mpqsearch/_%,$(wildcard mpqsearch/*.py))))

# Every process of the tests would compile the libraries again, 13 seconds each
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test suite test-all test-gpu test-oldest fuzz kill lint types contracts benchmark reference clean

quickstart: $(RUNTIME)
	$(BIN)/mpqsearch run studies/quickstart.toml

# One more than there are cores: many tests wait for a process, a server or a signal
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
test: $(INSTALLED) lint contracts
	$(MAKE) --no-print-directory --jobs 2 types suite  # mypy has one thread, and the tests wait for processes anyway

# The libraries are compiled once, and not by all workers at the same time
suite: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python -c "from tests.e2e.forked import preload; preload()"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# Everything that `make test` takes a sample of, such as all denoiser classes of diffusers
test-all: export MPQSEARCH_TEST_ALL = 1
test-all: test

# Every verb on the first CUDA device; times and peaks of memory: build/gpu/verbs.md
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu

# The core of the suite with the oldest versions that pyproject.toml allows, in an environment beside this one
OLDEST ?= build/oldest
test-oldest: $(INSTALLED)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --no-compile --no-deps --requirement constraints-oldest.txt
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(OLDEST)/lib/python3.*/site-packages)/zz.pth
	PYTHONPATH=. OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests/unit/core tests/unit/allocate \
		tests/unit/report tests/unit/metrics tests/unit/test_artifacts.py tests/unit/test_config.py tests/unit/test_pareto.py \
		tests/unit/test_api.py

# Malformed inputs for every reader; the tests read 300 of them
FUZZ ?= 5000
fuzz: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python -m tests.fuzz.fuzz $(FUZZ)

# A whole small study, killed at random points and continued, value by value; the tests kill 4 times
KILLS ?= 200
kill: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.e2e.kill $(KILLS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

contracts: $(INSTALLED)
	$(BIN)/lint-imports

benchmark: $(INSTALLED)
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only --benchmark-enable -s

# The page of all keys and options, and the reference of the Python interface (build/reference/index.html), from the docstrings
reference: $(INSTALLED)
	$(BIN)/python -m mpqsearch.cli.reference > studies/guides/reference.md
	$(BIN)/python -m pdoc mpqsearch $(PUBLIC) --output-directory build/reference

# torch first and by itself: with it in place, no other package pulls in another build of it.
$(RUNTIME): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[pipelines]' optimum-quanto
	touch $@

$(INSTALLED): $(RUNTIME)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

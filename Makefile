# `make demo` and `make test` set themselves up; the environment is .venv unless VENV says otherwise.
# LOCK=requirements-xformers.lock: the combination in which xformers runs on a GPU (docs/kernels.md).
VENV ?= .venv
PYTHON ?= python3
LOCK ?= requirements.lock
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test gpu lint docs mutants lock clean

demo: $(READY)
	$(BIN)/eva02-at demo

# Two at a time, a file each: much of the suite waits for processes that it starts.
test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# On a machine with a GPU, with whatever Python there has torch; no network (docs/gpu.md).
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))
gpu:
	PYTHONPATH=$(CURDIR)$(PYTHONPATH:%=:%) $(GPU_PYTHON) -m lightning_modules.cli.main bench gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Which change of the hot code does no test notice? Hours; goes on where it was stopped.
# ROOMS="losses metrics order checkpoints kernels"; the report comes last.
mutants: $(READY)
	$(BIN)/pip install -qq --constraint $(LOCK) --editable '.[mutants]'
	nice $(BIN)/python .ci/mutants.py $(ROOMS)

# The documentation as a site, in build/site; any broken link or reference is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f .ci/mkdocs.yml

# Every version comes from the lock file. torch goes first: with it in place nothing pulls another.
$(READY): pyproject.toml $(LOCK)
	@echo "setting up $(VENV) (a minute or two)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade pip
	$(BIN)/pip install -qq --constraint $(LOCK) torch
	$(BIN)/pip install -qq --constraint $(LOCK) --editable '.[dev]'
	touch $@

# The site's tools want a Python of their own age (3.11.5), so that nothing else waits for them.
$(VENV)/.docs: $(READY)
	$(BIN)/pip install -qq --constraint $(LOCK) --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

# Run in a fresh environment: it writes down what is installed.
lock:
	(sed -n '/^#/p' requirements.lock; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//; /^eva02-at/d') > requirements.lock.new
	mv requirements.lock.new requirements.lock
	(sed -n '/^#/p' requirements-xformers.lock; sed '/^#/d; s/^torch==.*/torch==2.10.0/; s/^triton==.*/triton==3.6.0/' requirements.lock) > requirements-xformers.lock.new
	mv requirements-xformers.lock.new requirements-xformers.lock

# The two commands of a fresh checkout: `make demo` and `make test`. Both make .venv on their first call.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test test-slow lint bench bench-quick gpu-check clean

demo: $(VENV)/.installed
	$(VENV)/bin/restoration demo --out demo --force

# In a process for each core, up to four. Threads that wait sleep, and leave the core to the other processes' tests.
test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Builds packages, on all cores, compiles every Triton kernel and trains for minutes; .ci/run calls it.
test-slow: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Editable, so that pulled Python changes need no new install; changed build files do.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

bench: $(VENV)/.installed
	$(VENV)/bin/python -m pytest benchmarks

# Tiny sizes: shows that the benchmarks still run, and that what they time is right.
bench-quick: $(VENV)/.installed
	$(VENV)/bin/python -m pytest benchmarks --quick

# On a machine with a GPU, which needs no network: with the Python that has torch there, see benchmarks/README.md.
STEP ?= all
OUT ?= build/gpu-check
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --step $(STEP) --out $(OUT)

clean:
	rm -rf $(VENV) build demo *.egg-info


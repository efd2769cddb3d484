# `make demo` and `make test` do everything, from a checkout on. PYTHON is the interpreter for .venv, 3.11 or 3.12;
# PROCESSES is how many share the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
BIN := .venv/bin
INSTALLED := .venv/installed
PROCESSES ?= 2

.PHONY: demo test test-slow bench support lint clean

demo: $(INSTALLED)
	$(BIN)/python -m fast_diffusers.cli demo

# Every process has one thread; the tests of a file run in one of them.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(PROCESSES) --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Training steps, forward-mode differentiation and inference, measured side by side. docs/performance.md has the figures.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/mnist_step.py
	$(BIN)/python benchmarks/jvp.py
	$(BIN)/python benchmarks/load_memory.py
	$(BIN)/python -m fast_diffusers.cli bench infer --preset digits
	$(BIN)/python -m fast_diffusers.cli bench infer --preset flux-block

# docs/support.md, from the tests that exist.
support: $(INSTALLED)
	$(BIN)/python docs/make_support.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The variable, unlike the option -c, also reaches the environments in which packages without a wheel are built.
$(INSTALLED): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check -e ".[dev,export]"
	touch $@

clean:
	rm -rf .venv build outputs *.egg-info .pytest_cache .ruff_cache .hypothesis

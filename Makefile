# Two commands do everything, install included:  make demo  and  make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The text may hold anything. $(value) takes it as it was typed; every other way, the export of command-line variables included,
# would run the $(shell ...) in it. The recipe finds it in the environment, where no shell reads it either.
ifeq ($(origin PROMPT),undefined)
PROMPT := a large red circle on a blue background
endif
override LATENTRT_PROMPT := $(value PROMPT)
export LATENTRT_PROMPT
unexport PROMPT
MAKEOVERRIDES :=

# One thread for each library in each of the two processes. Groups: see pytest_collection_modifyitems in tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint train clean

demo: $(VENV)/.installed
	$(BIN)/python build_engines.py
	$(BIN)/python -m engine picture --bundle engines/demo --guidance-scale 5 --seed 0 --output engines/demo.png -- "$$LATENTRT_PROMPT"
	@echo 'The next one:  $(BIN)/python -m engine picture "a small green star on a white background"'

test: lint
	$(PYTEST)

# For daily work: all but what is slow. The first run also makes the bundles that the tests share, in build/test-engines.
test-fast: lint
	$(PYTEST) -m 'not slow'

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

train: $(VENV)/.installed
	$(BIN)/python -m export.demo.train
	$(BIN)/python -m export.demo.train_shapes

$(VENV)/.installed: pyproject.toml constraints.txt tests/without_dependencies.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,openvino,benchmarks,export,test]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --requirement tests/without_dependencies.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

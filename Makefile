# Two commands do everything, install included:  make demo  and  make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a large red circle on a blue background

.PHONY: demo test lint train clean

demo: $(VENV)/.installed
	$(BIN)/python build_engines.py
	$(BIN)/python -m engine picture "$(PROMPT)" --bundle engines/demo --guidance-scale 5 --seed 0 --output engines/demo.png

test: lint
	$(BIN)/python -m pytest -q

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

train: $(VENV)/.installed
	$(BIN)/python -m export.demo.train

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,openvino,benchmarks,export,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

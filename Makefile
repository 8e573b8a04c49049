# `make quickstart` runs the main job; `make test` the whole suite; `make check` format, lint and types;
# `make test-versions` tries the oldest and the newest of every dependency in each Python (environments in .versions/);
# `make test-serving` installs vLLM, llama.cpp and mlx-lm into .engines/ (half an hour) and runs tiny children in each;
# `make results` writes docs/results.md, the figures of docs/scale.md and MFU from benchmarks/results/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STDLIB = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")

.PHONY: quickstart test test-gpu test-versions test-serving results check format clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'puzzle needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/puzzle run examples/quickstart.yaml --data "$(STDLIB)" --out runs/quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n logical --dist loadfile

# VERSIONS="--torch" installs torch's oldest and newest too; VERSIONS="--export" is what CI runs
test-versions: $(VENV)/installed
	$(BIN)/python tests/versions/run.py $(VERSIONS)

test-serving: $(VENV)/installed
	$(BIN)/python benchmarks/lib/serving_environments.py
	$(BIN)/python benchmarks/serving/serving_matrix.py

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -q tests/kernels
	$(BIN)/python -m pytest -q -m gpu --ignore tests/kernels

results: $(VENV)/installed
	$(BIN)/python benchmarks/lib/results_page.py
	$(BIN)/python benchmarks/lib/scale_page.py

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy puzzle blocklib solver kernels benchmarks

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf runs build dist *.egg-info

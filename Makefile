# Each target makes the environment that it needs. Only Python 3.11, pip, make and git are taken for granted.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test slow lint types canvas table1 attacks erasers claim figure-neurons calibrate benchmarks clean

demo: $(INSTALLED)
	$(BIN)/python run.py -m +experiment=demo

test: $(INSTALLED)
	$(BIN)/pytest

slow: $(INSTALLED)
	$(BIN)/pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/mypy

canvas: $(INSTALLED)
	$(BIN)/python -m diffusion.canvas.recipe --build build/canvas --ship diffusion/canvas/weights
	$(BIN)/python -m experiments.instruments.canvas_card --folder diffusion/canvas/weights

table1: $(INSTALLED)
	$(BIN)/python run.py -m +experiment=table1
	$(BIN)/eraselab tables table1

attacks: $(INSTALLED)
	$(BIN)/python run.py -m +experiment=attacks
	$(BIN)/eraselab tables attacks
	$(BIN)/eraselab figure attacks

erasers: $(INSTALLED)
	$(BIN)/python run.py -m +experiment=erasers
	$(BIN)/eraselab tables erasers

claim: $(INSTALLED)
	$(BIN)/python run.py -m +experiment=claim
	$(BIN)/python run.py -m +experiment=tradeoff
	$(BIN)/eraselab tables claim
	$(BIN)/eraselab claim
	$(BIN)/eraselab tables tradeoff
	$(BIN)/eraselab figure tradeoff

figure-neurons: $(INSTALLED)
	$(BIN)/python run.py -m +experiment=neurons
	$(BIN)/eraselab neurons

# How often a judge errs: make calibrate CALIBRATE='judge=nudenet --pictures labelled/'; without, the canvas's judge.
calibrate: $(INSTALLED)
ifdef CALIBRATE
	$(BIN)/eraselab calibrate $(CALIBRATE)
else
	for concept in van_gogh church fire; do $(BIN)/eraselab calibrate concept=$$concept || exit 1; done
endif

benchmarks: $(INSTALLED)
	for script in $(filter-out %/published_flow.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache

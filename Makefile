# Each target makes the environment that it needs. Only Python 3.11, pip, make and git are taken for granted.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The canvas whose twins are made: canvas, or canvas_mmdit, whose files lie in weights_mmdit and twins_mmdit.
CANVAS ?= canvas
TWINS ?= build/$(CANVAS)_twins
SHIPPED_TWINS = $(CANVAS:canvas%=diffusion/canvas/twins%)

# make table1 concept=church LAUNCHER=joblib: fields that are named are the sweep's overrides, and its results get a name
# of their own. PRESET=gpu_each takes one of conf/launcher_presets.
OVERRIDES = $(filter-out PYTHON=% LAUNCHER=% PRESET=% CALIBRATE=%,$(MAKEOVERRIDES))
SWEEP = $(BIN)/python run.py -m $(if $(LAUNCHER),hydra/launcher=$(LAUNCHER)) $(if $(PRESET),+launcher_presets=$(PRESET))

# What the launcher and the store (store=s3://...) need besides the rest: Ray is large.
NEEDED = $(INSTALLED) $(if $(filter ray%,$(LAUNCHER) $(PRESET)),$(VENV)/.ray) $(if $(filter s3://%,$(store)),$(VENV)/.s3)

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test slow lint types canvas canvas-mmdit canvas-twins ship-twin table1 attacks erasers claim paper probes figure-neurons calibrate benchmarks docs clean

demo: $(NEEDED)
	$(SWEEP) +experiment=demo $(OVERRIDES)

test: $(INSTALLED)
	$(BIN)/pytest

# What takes minutes, for a night; the last line says how many passed and how long it took.
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

# The same world by a transformer, Stable Diffusion 3's architecture; it needs the canvas.
canvas-mmdit: $(INSTALLED)
	$(BIN)/python -m diffusion.canvas.mmdit_recipe --build build/canvas_mmdit --ship diffusion/canvas/weights_mmdit
	$(BIN)/python -m experiments.instruments.canvas_card --folder diffusion/canvas/weights_mmdit

# Networks of other training seeds and such that never saw a concept, make canvas-twins CANVAS=canvas_mmdit: transformers;
# what is finished is found again, and killed runs go on.
canvas-twins: $(INSTALLED)
	$(BIN)/python -m diffusion.canvas.retraining $(TWIN) --base $(CANVAS) --build $(TWINS)

# Puts a finished one beside the canvas, with its card: make ship-twin TWIN=never_fire_0
ship-twin: $(INSTALLED)
	$(BIN)/python -m diffusion.canvas.retraining $(TWIN) --base $(CANVAS) --build $(TWINS) --ship $(SHIPPED_TWINS)
	$(BIN)/python -m experiments.instruments.twin_card $(TWIN) --source $(CANVAS) --build $(TWINS)

table1: $(NEEDED)
	$(SWEEP) +experiment=table1 $(OVERRIDES)
	$(BIN)/eraselab tables table1 $(OVERRIDES)

attacks: $(NEEDED)
	$(SWEEP) +experiment=attacks $(OVERRIDES)
	$(BIN)/eraselab tables attacks $(OVERRIDES)
	$(BIN)/eraselab figure attacks $(OVERRIDES)

erasers: $(NEEDED)
	$(SWEEP) +experiment=erasers $(OVERRIDES)
	$(BIN)/eraselab tables erasers $(OVERRIDES)

claim: $(NEEDED)
	$(SWEEP) +experiment=claim $(OVERRIDES)
	$(SWEEP) +experiment=tradeoff $(OVERRIDES)
	$(BIN)/eraselab tables claim $(OVERRIDES)
	$(BIN)/eraselab claim claim $(OVERRIDES)
	$(BIN)/eraselab tables tradeoff $(OVERRIDES)
	$(BIN)/eraselab figure tradeoff $(OVERRIDES)

# The paper's benchmark on Stable Diffusion 1.4: what is missing, the plan, the table; make paper PAPER='paper.scale=smoke'
# runs it in small, make paper PAPER='--yes model.source=sd14' in full.
paper: $(INSTALLED)
	$(BIN)/eraselab paper $(PAPER)

# Which attacks tell models that know from models that never knew: the table is of all runs in the store.
probes: $(INSTALLED)
	$(SWEEP) +experiment=probes $(OVERRIDES)
	$(BIN)/eraselab probes

figure-neurons: $(NEEDED)
	$(SWEEP) +experiment=neurons $(OVERRIDES)
	$(BIN)/eraselab neurons neurons $(OVERRIDES)

# How often a judge errs: make calibrate CALIBRATE='judge=nudenet --pictures labelled/'; without, the canvas's judge.
calibrate: $(INSTALLED)
ifdef CALIBRATE
	$(BIN)/eraselab calibrate $(CALIBRATE)
else
	for concept in van_gogh church fire; do $(BIN)/eraselab calibrate concept=$$concept || exit 1; done
endif

# On a CPU; where there is a GPU, python benchmarks/gpu.py measures what it makes of a full-size model.
benchmarks: $(INSTALLED)
	for script in $(filter-out %/published_flow.py %/gpu.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

# The site, in build/site; nothing is fetched while it is built.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(VENV)/.ray $(VENV)/.s3: $(VENV)/.%: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache

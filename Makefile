# The two commands of the README, and what developers add to them.
#   make quickstart   post-train the small model and show what changed
#   make test         lint, types, tests
# Both create .venv and install the pinned versions first, once: a stamp file in .venv remembers it
# until pyproject.toml or constraints.txt changes.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.dgpo-installed
TRACKERS := $(VENV)/.dgpo-trackers
LOWEST := .venv-lowest
RUN := runs/quickstart
comma := ,

# $(call step,TITLE,COMMAND): say what runs, run it, say how long it took (no commas in either)
define step
@printf '\n==> %s\n' "$(1)"; begin=$$(date +%s); $(2); printf '    done in %s s\n' "$$(( $$(date +%s) - begin ))"
endef

.PHONY: help install quickstart test test-all test-lowest style lint format fuzz audit bench ablations results papers docs-tables clean-env

help:
	@echo 'make install      create $(VENV) with the pinned versions (1 to 4 minutes the first time, then nothing)'
	@echo 'make quickstart   post-train the small model for 15 minutes; results in $(RUN) (under 30 minutes in all)'
	@echo 'make test         ruff, pyright and the quick tests (7 to 18 minutes, install included)'
	@echo 'make test-all     make test, and the slow tests, with the trackers installed (wandb, trackio, swanlab)'
	@echo 'make test-lowest  the lower bounds of pyproject.toml: import, dgpo check, the tests of the small models (TORCH=2.13.0: with another torch)'
	@echo 'make lint         ruff and pyright alone'
	@echo 'make format       let ruff rewrite the files'
	@echo 'make fuzz         1000 odd recipes, files, answers and requests each (slow)'
	@echo 'make audit        bandit over the code, pip-audit over constraints.txt (needs the network)'
	@echo 'make bench        where the time of a training iteration goes (5 minutes)'
	@echo 'make ablations    what each part of DGPO is worth; 13 runs of about 5 minutes each; goes on where it was stopped'
	@echo 'make results      write the comparison of docs/results.md and its picture from benchmarks/results'
	@echo 'make papers       write docs/papers.md from the recipes and benchmarks/results'
	@echo 'make docs-tables  write the tables of docs that the registry knows, and docs/images/architecture.svg'
	@echo 'make clean-env    delete $(VENV)'

install: $(STAMP)

# --no-compile: Python compiles what it needs, a fifth of the 20000 files that pip would compile for a minute and a half
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'dgpo needs Python 3.10 or later: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	$(call step,creating $(VENV) (10 s),test -x $(BIN)/python || $(PYTHON) -m venv $(VENV))
	$(call step,installing the build tools (5 s),$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools)
	$(call step,installing dgpo and the versions pinned in constraints.txt (1 to 4 minutes; 2.4 GB on disk),$(BIN)/python -m pip install --no-compile --progress-bar off --constraint constraints.txt --no-build-isolation --editable '.[rewards$(comma)dev]')
	@touch $(STAMP)

# A run is never overwritten: an earlier one is kept beside it under a number, and the newest
# is always in the same place.
quickstart: $(STAMP)
	@if [ -e $(RUN) ]; then n=1; while [ -e $(RUN)-$$n ]; do n=$$((n + 1)); done; \
	  mv $(RUN) $(RUN)-$$n; echo "$(RUN) held an earlier run: it is kept as $(RUN)-$$n"; fi
	$(call step,post-training the small model by DGPO: 15 minutes of training and about 5 of evaluation,$(BIN)/dgpo train pocket-geneval train.max_minutes=15 run.dir=$(RUN))
	@printf '\n%s\n' 'Results:'
	@printf '  %-34s %s\n' \
	  '$(RUN)/curve.png' 'the score on held-out prompts over training' \
	  '$(RUN)/samples/' 'the same prompts and seeds before, during and after' \
	  '$(RUN)/README.md' 'the model card with the measured numbers' \
	  '$(RUN)/lora/' 'the trained LoRA: pipe.load_lora_weights("$(RUN)/lora")' \
	  '$(RUN)/metrics.jsonl' 'one object for every iteration'

style: $(STAMP)
	$(call step,ruff check (1 s),$(BIN)/ruff check .)
	$(call step,ruff format --check (1 s),$(BIN)/ruff format --check .)

lint: style
	$(call step,pyright (1 minute),$(BIN)/pyright)

# pyright keeps one core busy for a minute: with the tests beside it all is done sooner
test: style
	$(call step,pyright and the quick tests (5 to 13 minutes on two cores),\
	  $(BIN)/pyright > $(VENV)/pyright.log 2>&1 & types=$$!; \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' --durations=5 || failed=$$?; \
	  wait $$types || failed=$$?; cat $(VENV)/pyright.log; test -z "$${failed:-}")

# The trackers' tests are skipped where these are not installed, as after make install
$(TRACKERS): $(STAMP)
	$(call step,installing the trackers (1 minute),$(BIN)/python -m pip install --progress-bar off --constraint constraints.txt --no-build-isolation --editable '.[trackers]')
	@touch $(TRACKERS)

test-all: lint $(TRACKERS)
	$(call step,all tests,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10)

# How the small models are pretrained needs Muon, which came with torch 2.9; the package does not
PRETRAINING := tests/pocket/test_pretrain.py::test_a_transformer_stage_learns_layout_and_leaves_the_stock_model \
  tests/pocket/test_sd.py::test_the_unet_learns_what_the_teacher_says

# In an environment of its own, made anew each time. Where the oldest torch cannot be had: make test-lowest TORCH=2.13.0
test-lowest: $(STAMP)
	$(call step,creating $(LOWEST) (10 s),$(PYTHON) -m venv --clear $(LOWEST))
	@$(BIN)/python -m tools.lowest $(if $(TORCH),torch==$(TORCH)) > $(LOWEST)/lowest.txt
	$(call step,installing the lower bounds (2 to 10 minutes; up to 7 GB with the CUDA builds of torch),$(LOWEST)/bin/python -m pip install --progress-bar off --no-compile --constraint $(LOWEST)/lowest.txt --editable '.[rewards$(comma)datasets$(comma)serve$(comma)media$(comma)audio]' pytest)
	$(call step,import,$(LOWEST)/bin/python -c 'import dgpo.trainer')
	$(call step,dgpo check,$(LOWEST)/bin/dgpo check pocket)
	$(call step,the quick tests of the small models and of the servers,OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q tests/pocket tests/serve tests/core -m 'not slow' $(foreach test,$(PRETRAINING),--deselect $(test)))

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

fuzz: $(STAMP)
	$(call step,1000 examples of every fuzzing test (the same ones each time),DGPO_FUZZ=1000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/fuzz --durations=5)

# The pins are looked up as they stand: nothing is installed or resolved for it. What was found goes
# to a file, which stays empty where nothing could be looked up.
audit: $(STAMP)
	$(call step,bandit: what is risky in the code (20 s),$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src)
	$(call step,pip-audit: known vulnerabilities of the pinned versions (needs the network),found=$$(mktemp); \
	  if $(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off --output $$found; then rm $$found; \
	  elif [ -s $$found ]; then cat $$found; rm $$found; echo 'the pinned versions above have known vulnerabilities'; exit 1; \
	  else rm $$found; echo 'pip-audit has looked at nothing or not at every pin: its service is out of reach$(comma) or what answers in its place knows no vulnerabilities. Run make audit again where that service is reached'; exit 1; fi)

bench: $(STAMP)
	$(call step,time and memory of the training loop beside the bare compute,$(BIN)/python benchmarks/step_time.py)

# One table of the recipe with one thing changed at a time, in docs/results.md. OPTIONS: --budget MINUTES --seeds N --out DIR
ablations: $(STAMP)
	$(call step,ablations: 13 variants of pocket-geneval-turbo (about 5 minutes each; finished runs are used again),OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ablations.py $(OPTIONS))

# The comparison of docs/results.md, from what finished runs have left in benchmarks/results
results: $(STAMP)
	@$(BIN)/python benchmarks/comparison.py
	@$(BIN)/python benchmarks/comparison.py --early

papers: $(STAMP)
	@$(BIN)/python benchmarks/papers.py

# What a test holds equal to the registry and to the imports of src/dgpo
docs-tables: $(STAMP)
	@$(BIN)/python -m tools.docs_tables

clean-env:
	rm -rf $(VENV)

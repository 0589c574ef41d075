# One environment, made once in .venv and remade when the files that describe it change.
# PYTHON=python3.13 makes its own environment, .venv-python3.13. PIP_ARGS goes to pip, ARGS to the lwm command.
PYTHON   ?= python3
PIP_ARGS ?=
ARGS     ?=
VENV     ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN      := $(VENV)/bin
MAMBA    := mamba-ssm==2.3.2.post1
RECIPE   := settings.ini setup.py pyproject.toml constraints.txt
INSTALL   = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
export PIP_ARGS

.PHONY: help demo test test-slow lab train bench report build check clean
.DEFAULT_GOAL := help

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/.playable ## play the shipped world model on http://127.0.0.1:7860
	$(BIN)/lwm demo $(ARGS)

test: $(VENV)/.complete ## the test suite, but for the tests that take minutes each
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.complete ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(ARGS)

lab: $(VENV)/.complete ## JupyterLab on the chapters
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/00_start.ipynb $(ARGS)

train: $(VENV)/.complete ## collect play, train a tokenizer, train a world model: 10 minutes a stage
	$(BIN)/lwm train $(ARGS)

bench: $(VENV)/.playable ## key-to-pixels latency, frames per second, memory
	$(BIN)/lwm bench --json results/bench.json $(ARGS)

report: $(VENV)/.playable ## the milestones: target, measured, verdict
	$(BIN)/lwm report $(ARGS)

build: $(VENV)/.complete ## make modules, exercises and README.md from the notebooks
	$(BIN)/python tools/build.py

check: $(VENV)/.complete ## fail when a generated file is not current
	$(BIN)/python tools/build.py --check

clean: ## remove the environments and what was built, nothing else
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache
	find lwm_course nbs solutions exercises tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

$(VENV)/.playable: $(RECIPE)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"$(PYTHON) is Python {v[0]}.{v[1]}; 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[games,video]"
	@touch $@

$(VENV)/.complete: $(VENV)/.playable
	$(INSTALL) -e ".[all]"
	MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps --no-build-isolation \
		--no-binary :all: --dest $(VENV) $(PIP_ARGS) $(MAMBA)  # its source alone: the tests read its reference functions
	@touch $@

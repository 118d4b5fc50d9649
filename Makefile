# Every target works in a fresh clone on a machine with Python >= 3.10: the first one that needs
# it makes .venv and installs what constraints.txt pins, once.
PYTHON ?= python3
OUT    ?= runs/tiny
VENV   := .venv
BIN    := $(VENV)/bin
USE    := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help run test bench lab notebooks docs readme constraints clean

help: ## Say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

run: $(USE) ## The main job: from nothing to a trained model and its report, in about five minutes
	mmie run --preset tiny --out $(OUT)

test: $(DEV) ## Every check: notebooks, style, types, tests
	OMP_NUM_THREADS=1 nbdev_test --n_workers 3 --timing
	ruff check .
	mypy
	OMP_NUM_THREADS=1 pytest --numprocesses 3 --dist loadfile

bench: $(DEV) ## Speed beside the programs that people use instead (some minutes, on a quiet machine)
	mmie bench tokenizer
	mmie bench attention
	mmie bench decode
	mmie bench quantization
	mmie bench train-step
	mmie bench train

lab: $(DEV) ## Open JupyterLab on the book
	jupyter lab --notebook-dir nbs

notebooks: $(DEV) ## Run every notebook from a fresh kernel, store its outputs, export the library
	python tools/notebooks.py

docs: $(DEV) ## Build the site into _docs/ (with Quarto where it is installed, without it elsewhere)
	python tools/site.py

readme: $(DEV) ## Write README.md from nbs/index.ipynb
	python tools/readme.py

constraints: $(DEV) ## Resolve the tested versions anew
	pip install --quiet uv
	echo 'torch==2.13.0' | uv pip compile --universal --python-version 3.10 --extra dev --quiet --no-annotate --no-header \
		--constraint /dev/stdin --upgrade setup.py -o constraints.txt

clean: ## Remove what the other targets made, but for runs/
	rm -rf $(VENV) _docs _proc build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mmie needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Name another with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(USE): settings.ini setup.py constraints.txt | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(DEV): settings.ini setup.py constraints.txt | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(USE)

# turbo_lab: `make figures` and `make test` need nothing but python >= 3.11, pip, make and git.
# The first use of any command creates .venv and installs into it the versions in constraints.txt.

PROFILE ?= quick
ONLY ?=
JOBS ?=
PYTHON ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PIP := 26.3
TURBO_LAB := $(PY) -m turbo_lab.cli
CHOICE = $(if $(ONLY),--only $(ONLY)) $(if $(JOBS),--jobs $(JOBS))
# A backend set in the environment silently drops every figure of a notebook.
unexport MPLBACKEND

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help figures test check format lab bars notebooks reproduce doctor constraints clean

help:
	@echo "make figures      run the notebooks, write figures/ and executed copies in runs/"
	@echo "                  PROFILE=smoke|quick|paper  ONLY=01  JOBS=2"
	@echo "make test         every test: units, slow ones, notebooks at smoke, nbval"
	@echo "make check        lint, format, types, import layers, unit tests (what CI runs first)"
	@echo "                  JOBS=2 processes for the tests"
	@echo "make lab          JupyterLab on notebooks/"
	@echo "make bars         recompute every acceptance figure from the shipped artefacts; ONLY=name"
	@echo "make notebooks    run notebooks/ at quick and store them with fresh outputs; ONLY=01"
	@echo "make reproduce    train everything again from nothing (hours), and compare the claims"
	@echo "                  PROFILE=quick|paper  ONLY=02  JOBS=2  KEEP=postcards/teacher  ALONE=1"
	@echo "make doctor       what this machine has, and what will be slow on it"
	@echo "make format       let ruff fix and format the code"
	@echo "make constraints  write the versions of .venv to constraints.txt"
	@echo "make clean        remove caches and runs/; .venv, figures/ and artefacts stay"

figures: $(READY)
	@$(TURBO_LAB) figures --profile $(PROFILE) $(CHOICE)

# nbval runs the committed notebooks as they are; its figures go to runs/, not over the real ones.
test: $(READY)
	@TURBO_LAB_FIGURES=runs/tests/figures $(PY) -m pytest -q -m "" tests notebooks \
		--nbval-lax --nbval-current-env --nbval-cell-timeout 300

# Tests compute on tiny tensors: processes of one thread each are faster than threads.
check: $(READY)
	@echo "ruff"; $(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet .
	@echo "mypy"; $(PY) -m mypy --no-error-summary
	@echo "import layers"; said=$$($(VENV)/bin/lint-imports --no-logo 2>&1) || { echo "$$said"; exit 1; }
	@echo "unit tests"; OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(or $(JOBS),2) --dist worksteal

format: $(READY)
	@$(PY) -m ruff check --quiet --fix . && $(PY) -m ruff format .

lab: $(READY)
	@$(PY) -m jupyterlab --notebook-dir=. notebooks

bars: $(READY)
	@$(TURBO_LAB) bars $(if $(ONLY),--only $(ONLY))

notebooks: $(READY)
	@$(TURBO_LAB) refresh $(CHOICE)

reproduce: $(READY)
	@$(TURBO_LAB) reproduce --profile $(PROFILE) $(CHOICE) $(KEEP:%=--keep '%') $(if $(ALONE),--alone)

doctor: $(READY)
	@$(TURBO_LAB) doctor

constraints: $(READY)
	@{ sed '/^[^#]/,$$d' constraints.txt; $(PY) -m pip freeze --exclude-editable; } \
		> constraints.new && mv constraints.new constraints.txt
	@touch $(READY); echo "constraints.txt holds $$(grep -c == constraints.txt) packages"

clean:
	@rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find turbo_lab tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(READY): pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" sh .ci/install $(VENV) $(PIP)
	@touch $@

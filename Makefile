# `make demo` and `make test` each do everything on a fresh machine: install, then run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)

# Where Python may not keep what it compiled, every start with LLaMA-Factory costs three times as much.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo docs test golden leaderboard leaderboard-gpu test-gpu bench-gpu install lint lock clean

demo: $(VENV)/.installed
	$(BIN)/dataflex-cli demo

docs: $(VENV)/.installed
	$(BIN)/python docs/api_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

golden: $(VENV)/.installed
	$(BIN)/python tests/golden/methods.py --check

# The files that benchmarks/leaderboard/README.md lists. LEADERBOARD holds further options of run.py.
DATA ?= ../shared/data

# The data and the methods are checked before the peer is installed.
leaderboard: $(VENV)/.installed
	$(BIN)/python benchmarks/leaderboard/run.py --data $(DATA) $(LEADERBOARD) --check
	$(MAKE) leaderboard/peer/.installed
	$(BIN)/python benchmarks/leaderboard/run.py --data $(DATA) --jobs 2 --time-limit 85m \
	  --peer leaderboard/peer/bin/python $(LEADERBOARD)

# bergson in its own environment: its versions are not those of this project.
leaderboard/peer/.installed: | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) leaderboard/peer
	VIRTUAL_ENV=$(abspath leaderboard/peer) $(UV) pip install --quiet "bergson==2.5.1" "torch==2.11.0" "torchaudio==2.11.0"
	@touch $@

TIER ?= large

# Without --peer, so that track C leaves out bergson.
leaderboard-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON_GPU) benchmarks/leaderboard/run.py --tier $(TIER) --data $(DATA) --jobs 4 \
	  --time-limit 8m --kept benchmarks/results/leaderboard/$(TIER)-runs $(LEADERBOARD)

# Both need an accelerator with 80 GB. PYTHON_GPU is an interpreter that has torch for it, and what DataFlex needs.
PYTHON_GPU ?= $(BIN)/python

test-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON_GPU) -m pytest tests/gpu -x -p no:cacheprovider --durations 10

bench-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON_GPU) benchmarks/gpu.py $(BENCH_GPU)

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	VIRTUAL_ENV=$(abspath $(VENV)) $(UV) pip install --quiet --require-hashes -r requirements.lock
	VIRTUAL_ENV=$(abspath $(VENV)) $(UV) pip install --quiet --no-deps -e .
	@touch $@

.tools/bin/uv:
	$(PYTHON) -m pip install --quiet --target .tools uv

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/codespell src tests docs benchmarks README.md ARCHITECTURE.md CONTRIBUTING.md CHANGELOG.md
	$(BIN)/mypy

# Versions and hashes of everything, for every platform and Python >= 3.11; no index address in it.
lock: | $(UV)
	$(UV) pip compile --quiet --universal --upgrade --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url --python-version 3.11 --extra dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .tools

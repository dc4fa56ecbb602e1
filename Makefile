# `make demo` and `make test` set up everything they need, from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs clean

$(VENV)/.installed: requirements.txt requirements-client.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

models/demo/.made: $(VENV)/.installed builder/make_demo_models.py builder/demo/weights/SHA256SUMS
	$(BIN)/python -m builder.make_demo_models models/demo
	touch $@

demo: models/demo/.made
	MODEL_PROFILE=demo $(BIN)/python handler.py

test: models/demo/.made lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

docs: $(VENV)/.installed
	$(BIN)/python -m builder.export_schema docs/in_out_spec.md

clean:
	rm -rf $(VENV) models outputs

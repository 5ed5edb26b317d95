PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

# Two commands on a fresh machine: `make demo` and `make test`.
demo: .venv/installed
	$(BIN)/python finetune.py --config configs/demo.yaml --model_type lite_medsam \
	  --batch_size 2 --epoch_num 14 --test_interval 56 $(DEMO_FLAGS)

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

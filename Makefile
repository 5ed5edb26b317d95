PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint lock

demo: .venv/installed
	$(BIN)/python finetune.py --config configs/demo.yaml --model_type lite_medsam --train decoder \
	  --batch_size 2 --epoch_num 14 --test_interval 56 $(DEMO_FLAGS)

# One process per core, each on one thread. A process takes up to 3.5 GB, so at most 4.
test: .venv/installed
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Writes the versions with which the tests have just passed. For the newest versions, remove .venv first.
lock: test
	echo "# Versions with which the tests passed, on $$(uname -s) with $$($(BIN)/python --version). They need Python 3.11 or newer. See: make lock" > constraints.txt
	$(BIN)/pip list --format=freeze --exclude pip >> constraints.txt

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

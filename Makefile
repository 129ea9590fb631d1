# make demo: the whole method on a laptop.  make test: the tests.  make torture: those of what can break, longer.
# make test-gpu: those that need a GPU.
# Each makes .venv and installs what is needed the first time.
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/python distill.py --data shapes --ratio 0.02

test: .venv/installed-tests
	.venv/bin/python -m pytest -q -n 2 --dist loadfile tests -m "not slow and not gpu"

test-gpu: .venv/installed-tests
	.venv/bin/python -m pytest -q tests -m gpu

torture: .venv/installed-tests
	.venv/bin/python -m pytest -q tests/test_faults.py tests/test_reading.py

lint: .venv/installed-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-tests: tests/requirements.txt .venv/installed
	.venv/bin/python -m pip install -q -r tests/requirements.txt
	touch $@

.PHONY: demo test test-gpu torture lint

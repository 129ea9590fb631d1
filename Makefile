# make demo: the whole method on a laptop CPU.  make test: the tests.  make test-faults: the long version of the
# fault-tolerance tests.  make test-gpu: the tests that need a GPU.  make lint: style.
# Each creates .venv and installs the requirements the first time.
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/python distill.py --data shapes --ratio 0.02

test: .venv/installed-tests
	.venv/bin/python -m pytest -q -n 2 --dist loadfile tests -m "not slow and not gpu"

test-gpu: .venv/installed-tests
	.venv/bin/python -m pytest -q tests -m gpu

test-faults: .venv/installed-tests
	.venv/bin/python -m pytest -q tests/test_fault_tolerance.py tests/test_untrusted_files.py

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

.PHONY: demo test test-gpu test-faults lint

# make demo: the whole method on a laptop CPU.  make test: the tests.  make test-faults: the long version of the
# fault-tolerance tests.  make test-gpu: the tests that need a GPU.  make test-oldest: the tests with the oldest
# supported versions, in .venv-oldest (Python 3.10 to 3.12); test-oldest-short: the main ones.  make lint: style.
# Each creates its environment and installs the requirements the first time.
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/python distill.py --data shapes --ratio 0.02 --recipe robust

test: .venv/installed-tests
	.venv/bin/python -m pytest -q -n 2 --dist loadfile tests -m "not slow and not gpu"

test-gpu: .venv/installed-tests
	.venv/bin/python -m pytest -q tests -m gpu

test-faults: .venv/installed-tests
	.venv/bin/python -m pytest -q tests/test_fault_tolerance.py tests/test_untrusted_files.py

# test_parity.py and the tests marked oracle need one version of transformers, which needs newer packages.
OLDEST = .venv-oldest/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu and not oracle"
OLDEST += --ignore tests/test_parity.py

SHORT = $(addprefix tests/test_,model.py matcher.py data.py method.py evaluate.py predict.py)
SHORT += tests/test_training.py::test_distill_runs_the_three_phases_and_writes_a_table_and_a_picture
SHORT += "tests/test_fault_tolerance.py::test_a_run_stopped_many_times_ends_bit_equal[some-1-0]"
SHORT += tests/test_fault_tolerance.py::test_processes_exit_with_their_own_code

test-oldest: .venv-oldest/installed
	$(OLDEST) tests

test-oldest-short: .venv-oldest/installed
	$(OLDEST) $(SHORT)

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

.venv-oldest/installed: tests/requirements-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -r tests/requirements-oldest.txt
	touch $@

.PHONY: demo test test-gpu test-faults test-oldest test-oldest-short lint

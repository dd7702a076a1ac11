# make reproduce   a true result in minutes: environment, embedded model, notebooks of profile quick
# make test        the same environment, and the tests
# make test-faults the tests that take minutes: runs killed at random moments
# make test-gpu    the tests that hold on a GPU, on this machine's
# make bench       speed and memory against what a user would pick instead (a quarter of an hour, alone on the machine)
# make bench-engine training and evaluation on this processor against an earlier version: make bench-engine BEFORE=COMMIT
# make report      pages of a profile's results, every number a link to its runs: make report PROFILE=cpu
# make lock        resolve pyproject.toml's ranges anew into requirements.lock
# make clean       remove what make reproduce wrote (not the environment)

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= quick
BEFORE ?= 3a1a101
MADE = $(VENV)/.made

.PHONY: reproduce test test-faults test-gpu bench bench-engine report lint lock clean

reproduce: $(MADE)
	@$(VENV)/bin/alps-repro reproduce quick

test: $(MADE) lint
	@$(VENV)/bin/python -m pytest

test-faults: $(MADE)
	@$(VENV)/bin/python -m pytest -m long

test-gpu: $(MADE)
	@ALPS_REPRO_TEST_DEVICE=cuda $(VENV)/bin/python -m pytest -m gpu tests/gpu

bench: $(MADE)
	@for part in localization training harness table; do $(VENV)/bin/python benchmarks/$$part.py || exit 1; done

bench-engine: $(MADE)
	@test -d .before-$(BEFORE) || git worktree add --detach .before-$(BEFORE) $(BEFORE)
	@$(VENV)/bin/python benchmarks/engine.py --against .before-$(BEFORE)
	@for scope in heads all; do $(VENV)/bin/python benchmarks/variants.py $$scope || exit 1; done
	@$(VENV)/bin/python benchmarks/table.py

report: $(MADE)
	@$(VENV)/bin/alps-repro report $(PROFILE)

lint: $(MADE)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

$(MADE): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(MADE)

# CUDA libraries are left out: torch pins its own exactly where it is built for them, and needs none on a CPU. A comment
# says which CUDA that is.
lock: $(MADE)
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate \
	  --custom-compile-command "make lock" --no-emit-package triton \
	  pyproject.toml --output-file requirements.lock
	@grep -E '^(torch|cuda-toolkit)==' requirements.lock | cut -d' ' -f1 | sed 's/^/# On Linux PyPI resolves /' > requirements.lock.cuda
	sed -i -e '/^nvidia-/d' -e '/^cuda-/d' -e '2r requirements.lock.cuda' requirements.lock
	@rm requirements.lock.cuda

clean:
	rm -rf results/quick

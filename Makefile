# make demo   the whole way on generated images, about 2 minutes      make test       the fast tests
# make check  ruff and mypy                                           make test-slow  the tests that take minutes
# make format ruff's formatting and safe fixes                        make ci         check, test, and the marks ddp and real
.PHONY: demo test test-slow check format ci
.DEFAULT_GOAL := demo

BIN := .venv/bin
STAMP := .venv/.stamp
# two processes of one thread each; a file's tests stay together, with what they share
TWICE := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

demo: $(STAMP)
	@$(BIN)/sslmed demo --out demo-run
	@echo "to type sslmed yourself: . $(BIN)/activate"

test: $(STAMP)
	@$(TWICE)

test-slow: $(STAMP)
	@$(BIN)/pytest -m slow

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

ci: check
	@$(TWICE) -m "not slow and not gpu"

$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if ! $(BIN)/python -c "" 2>/dev/null; then \
	  for python in python3.11 python3.12 python3.13 python3 none; do \
	    if $$python -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" 2>/dev/null; then break; fi; \
	  done; \
	  if [ $$python = none ]; then \
	    echo "sslmed needs Python 3.11, 3.12 or 3.13 on the PATH; found: $$(python3 --version 2>&1)" >&2; exit 1; \
	  fi; \
	  echo "making .venv with $$($$python --version) ..."; \
	  $$python -m venv --clear .venv; \
	fi; \
	echo "installing the tested versions from constraints.txt (about a minute the first time) ..."; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"; \
	touch $@

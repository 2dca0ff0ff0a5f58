# make demo   pretrain, fine-tune, merge and check a small language model
# make test   run the test suite on the CPU
# make test-full   run what `make test` leaves out: the rest of the grids, compile tests
# make docs   build the documentation into build/site, every warning an error
PYTHON ?= python3
BIN = .venv/bin
OLDEST = .venv-oldest/bin
DOCS = .venv-docs/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-full test-oldest lint docs clean

# PASSIVE: waiting threads sleep. If they spin on a busy machine, two threads are ten times slower than one.
demo: .venv/ready
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/hasten demo --out runs/demo

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-full: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m full

test-oldest: .venv-oldest/ready
	$(OLDEST)/python -m pytest tests/families tests/patching

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,test]'
	touch $@

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --constraint constraints-oldest.txt torch==2.13.0
	$(OLDEST)/python -m pip install --quiet --constraint constraints-oldest.txt pytest pytest-timeout bitsandbytes triton --editable .
	touch $@

# Only the documentation tools: the reference is read from the source, so neither torch nor hasten is installed.
.venv-docs/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > .venv-docs/requirements.txt
	$(DOCS)/python -m pip install --quiet --constraint constraints.txt --requirement .venv-docs/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-docs runs build *.egg-info

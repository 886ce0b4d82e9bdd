# Everything starts here: `make help`. The system must have Python 3.11, python3-venv, libgomp1, make and git.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHON
export PYTHONNOUSERSITE := 1
export DVC_NO_ANALYTICS := 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

.PHONY: help setup fetch data repro test lab serve report library docs doctor hooks peers golden preparation off-policy full check

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup:  ## .venv from the pins (once; then nothing)
	@.ci/setup

fetch: setup  ## the embedded data sets into data/, checked by SHA-256
	@recsys-lab fetch

data: fetch
	@dvc status -q data.dvc || { \
	  echo "data/ is not what data.dvc lists: a file is absent or changed." >&2; \
	  echo "Look with 'dvc status data.dvc'; remove the folder it names and run 'make fetch' again." >&2; exit 1; }

repro: data  ## data, pipeline and report: everything, from nothing
	@dvc repro
	@recsys-lab report
	@echo "The report: $(CURDIR)/reports/index.html (make library adds what the library's notebooks show)"

test: data  ## every notebook and every test
	@pytest -n $(or $(TEST_WORKERS),2) --dist loadgroup $(TESTS)

check: setup  ## the quick half of the tests: structure, style, parameters
	@pytest tests/test_notebooks.py tests/test_layers.py tests/test_environment.py tests/test_params.py -k "not test_runs"

lab: fetch  ## JupyterLab on the index
	@jupyter lab nbs/index.ipynb

report: setup  ## the site in reports/ from what is already computed
	@recsys-lab report
	@echo "The report: $(CURDIR)/reports/index.html"

serve: repro  ## the served model and its page on this machine, from what make repro made
	@recsys-lab serve --first $(or $(MODEL),ml1m-time/ease)

library: data  ## the site with the outputs of every library notebook (minutes; those that changed)
	@recsys-lab report --library

docs: setup  ## format, then modules and README from the notebooks
	@ruff format -q nbs tests peers benchmark
	@nbdev-export
	@nbdev-clean
	@find nbs -name '*.ipynb' -not -path '*/.*' -print0 | xargs -0 nbstripout --keep-id
	@recsys-lab readme

doctor: setup  ## what is installed, which device, which data, what is wrong
	@recsys-lab doctor

hooks: setup  ## git drivers for notebooks, in this clone only
	@git config merge.ours.driver true
	@git config merge.jupyternotebook.name "nbdev: merge notebooks cell by cell"
	@git config merge.jupyternotebook.driver "'$(CURDIR)/.venv/bin/nbdev-merge' %O %A %B %P"
	@git config diff.jupyternotebook.command "'$(CURDIR)/.venv/bin/nbdev-diff-driver'"
	@echo "git now merges and shows notebooks cell by cell here; after a merge run 'make docs'"

peers: data  ## speed and quality beside RecBole, in its own environment
	@.ci/setup .venv-recbole peers/requirements-recbole.txt
	@recsys-lab speed

golden: setup  ## what Open Bandit Pipeline says of small logs, for the tests, in its own environment
	@.ci/setup .venv-obp peers/requirements-obp.txt
	@.venv-obp/bin/python -m pip install -q --no-deps --ignore-requires-python obp==0.5.5
	@.venv-obp/bin/python peers/obp_golden.py

preparation: setup  ## a hundred million generated rows prepared, beside polars' bare sort
	@python benchmark/preparation.py --record

off-policy: setup  ## a million logged rounds judged by nine estimators, beside numpy's bootstrap alone
	@python benchmark/off_policy.py --record

full: data  ## the full benchmark (hours on a CPU, minutes on a GPU)
	@dvc repro --keep-going benchmark/dvc.yaml
	@recsys-lab record
	@recsys-lab report

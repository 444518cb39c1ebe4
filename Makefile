# make demo    the whole recipe on Python's own source code, minutes on two CPU cores
# make test    the tests
# make lint    ruff
# make bench   the speed of the demo's training on this machine
# Each sets itself up: a virtual environment in .venv with the pinned requirements.

PYTHON ?= python3

.PHONY: demo test lint bench clean

demo: .venv/installed
	.venv/bin/python prepare_data.py python --out=data/demo
	.venv/bin/python inheritune.py config/demo.toml

test: .venv/installed-dev
	.venv/bin/python -m pytest

lint: .venv/installed-dev
	.venv/bin/ruff check .

bench: .venv/installed
	.venv/bin/python bench.py config/demo.toml

clean:
	rm -rf .venv out/demo data/demo

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: found Python " + sys.version.split()[0] + ", expected 3.11 or newer; say which: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

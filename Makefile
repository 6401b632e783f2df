# SPDX-License-Identifier: Apache-2.0
# Everything happens in .venv; stamps make a second run start at once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

NATIVE := kvmpy/uapi/_native.abi3.so
NATIVE_SOURCES := kvmpy/build.py kvmpy/gen.py kvmpy/guest/layout.py kvmpy/x86/hyperv.py kvmpy/x86/xen.py \
	kvmpy/x86/msr_numbers.py kvmpy/x86/vmcb.py kvmpy/x86/vmsa.py kvmpy/x86/svm_exits.py $(wildcard \
	kvmpy/uapi/*.py kvmpy/uapi/constants/*.py kvmpy/uapi/cdef/* kvmpy/uapi/native/* \
	kvmpy/debug/record/layouts.py kvmpy/debug/preload/*.[cp]* kvmpy/debug/preload/rawcall.h kvmpy/debug/record/events.py kvmpy/debug/record/format.py)
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

SECONDS ?= 60

.DEFAULT_GOAL := help
.PHONY: help build run hardware lab kernel test torture lint format wheel wheelhouse pex docs man site clean check-host

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "ARGS='...' is passed on by run, lab (kvmpy run, kvmpy lab run) and test (pytest)."
	@echo "PYTHON=python3.12 picks the interpreter."

build: $(VENV)/.kvmpy-run $(NATIVE) ## build the extension and the generated stubs and headers, if they are out of date

run: $(VENV)/.kvmpy-run $(NATIVE) ## run the selftests on this host's KVM, or in the lab if it has none
	@$(BIN)/kvmpy run $(ARGS)

lab: $(VENV)/.kvmpy-run $(NATIVE) ## run the selftests under QEMU, in a kernel with the software AMD-SP (built first if none is up to date)
	@$(BIN)/kvmpy lab run --soft-sev --build $(ARGS)

hardware: $(VENV)/.kvmpy-run $(NATIVE) ## on a machine with SEV: run doctor, the suite and bench, and pack the results
	@$(BIN)/kvmpy hardware $(ARGS)

kernel: $(VENV)/.kvmpy-run $(NATIVE) ## build a kernel for the lab if none is up to date
	@$(BIN)/kvmpy lab build --soft-sev --missing

test: $(VENV)/.kvmpy-dev $(NATIVE) ## run kvmpy's own tests, then the selftests
	@$(BIN)/python -m pytest $(ARGS)

torture: $(VENV)/.kvmpy-dev $(NATIVE) ## run hangs, kills, malformed input and corrupt guests against kvmpy, SECONDS=60 for each test
	@KVMPY_TORTURE_SECONDS=$(SECONDS) $(BIN)/python -m pytest tests/torture $(ARGS)

lint: $(VENV)/.kvmpy-dev $(NATIVE) ## run ruff, mypy --strict and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(VENV)/.kvmpy-dev ## reformat the sources with ruff
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

wheel: $(VENV)/.kvmpy-dev ## build the installable package in dist/
	@$(BIN)/python -m build --wheel --outdir dist .

wheelhouse: $(VENV)/.kvmpy-dev ## collect the wheels of kvmpy and all it needs in dist/wheelhouse/, and try them without a network
	@rm -rf dist/wheelhouse
	@$(PIP) wheel --wheel-dir dist/wheelhouse .
	@PYTHON=$(BIN)/python sh ci/without_network.sh dist/wheelhouse

pex: wheelhouse ## make one file of them, dist/kvmpy.pex, and try it without a network
	@$(PIP) install --quiet 'pex>=2.1.150'
	@$(BIN)/pex --no-index --find-links dist/wheelhouse kvmpy -c kvmpy -o dist/kvmpy.pex --sh-boot --venv prepend
	@sh ci/without_network.sh dist/kvmpy.pex

docs: $(VENV)/.kvmpy-docs $(NATIVE) ## build the API reference from the docstrings in build/api/
	@$(BIN)/python ci/api_reference.py build/api

man: $(VENV)/.kvmpy-docs $(NATIVE) ## write a man page for each command into build/man/
	@$(BIN)/python ci/man_pages.py build/man

site: $(VENV)/.kvmpy-docs $(NATIVE) ## build the documentation and the public docstrings as a site in build/site/
	@$(BIN)/sphinx-build -W --keep-going -q -c ci/site -d build/site-doctrees . build/site
	@echo "build/site/ci/site/index.html"

clean: ## remove everything that was built, including the virtual environment
	-git clean -fdXq kvmpy guest_asm
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

check-host:
	@PYTHON='$(PYTHON)' sh ci/prerequisites.sh

$(BIN)/python:
	@PYTHON='$(PYTHON)' sh ci/prerequisites.sh
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.kvmpy-run: pyproject.toml hatch_build.py | $(BIN)/python
	@PYTHON='$(PYTHON)' sh ci/prerequisites.sh
	@echo "installing kvmpy and what it needs into $(VENV)"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.kvmpy-dev: pyproject.toml hatch_build.py | $(BIN)/python
	@PYTHON='$(PYTHON)' sh ci/prerequisites.sh
	@echo "installing kvmpy and its development tools into $(VENV)"
	@$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/.kvmpy-run

$(VENV)/.kvmpy-docs: $(VENV)/.kvmpy-dev
	@$(PIP) install --editable '.[docs]'
	@touch $@

# The editable install has built it, and what is generated; this rule does when what they are made from changes.
$(NATIVE): $(NATIVE_SOURCES) | $(BIN)/python
	@$(PIP) install 'cffi>=1.16' 'setuptools>=65'
	@echo "building $@"
	@$(BIN)/python -I -m kvmpy.build

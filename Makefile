# make demo, make test, make test-fault, make test-cluster, make test-sglang: each works as the first command on a machine with Python 3.10-3.13, and is quick when run again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export PYTHONSAFEPATH = 1

.PHONY: demo test test-fault test-slow test-cluster test-sglang lint docs clean

demo: $(VENV)/.installed
	$(BIN)/verippo demo --output demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fault: $(VENV)/.installed
	@echo "runs that are killed, stopped, damaged and starved: 6 to 11 minutes ..."
	$(BIN)/python -m pytest -m fault tests/fault

# Hosts are network namespaces: needs root and iproute2; skipped, with the reason, where they cannot be made.
test-cluster: $(VENV)/.installed
	@echo "several hosts, links that are cut, hosts that are stopped: about 6 minutes ..."
	$(BIN)/python -m pytest -m cluster tests/cluster

lint: $(VENV)/.installed links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=links $(BIN)/mypy --explicit-package-bases -p verippo
	$(BIN)/basedpyright --level error
	$(BIN)/python -m verippo.launch.document --check

docs: $(VENV)/.installed
	$(BIN)/python -m verippo.launch.document
	$(BIN)/python -m verippo.launch.families
	$(BIN)/python -m verippo.launch.plan_page

# torch goes first, by itself: asked for by another package, pip takes the newest build with gigabytes of CUDA.
# Without a GPU, PyTorch's own CPU index (PIP_EXTRA_INDEX_URL) gives the small build; TORCH picks another version.
TORCH ?= torch==2.13.0

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13), sys.version' || \
	  { echo "make: needs Python 3.10 to 3.13; say PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: python venv is missing; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing $(TORCH) ..."
	@$(BIN)/pip install --progress-bar on "$(TORCH)"
	@echo "installing verippo and what it needs ..."
	@$(BIN)/pip install --progress-bar on -e ".[test]"
	@touch $@

# sglang pins other versions than the trainer, so it has an environment of its own (3 GB with PyTorch's CPU build); the
# stubs in tests/sglang stand in for packages that need CUDA.
SGLANG ?= sglang==0.5.23
SGLANG_VENV := .sglang
SGLANG_PYTHON ?= $(PYTHON)

$(SGLANG_VENV)/.installed: tests/sglang/requirements.txt
	@$(SGLANG_PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), sys.version' || \
	  { echo "make: sglang needs Python 3.11 to 3.13; say SGLANG_PYTHON=/path/to/python"; exit 2; }
	@$(SGLANG_PYTHON) -m venv $(SGLANG_VENV) || { echo "make: python venv is missing; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing $(SGLANG) into an environment of its own, $(SGLANG_VENV) (about 3 GB, some minutes) ..."
	@$(SGLANG_VENV)/bin/pip install --progress-bar on -r tests/sglang/requirements.txt
	@$(SGLANG_VENV)/bin/pip install --progress-bar on --no-deps "$(SGLANG)"
	@touch $@

# A path file makes the stubs part of the environment; packages that are really installed come before them.
$(SGLANG_VENV)/.stubs: $(SGLANG_VENV)/.installed
	@echo "$(CURDIR)/tests/sglang/stubs" > \
	  "$$($(SGLANG_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/verippo-stubs.pth"
	@touch $@

test-slow: $(VENV)/.installed
	@echo "measured memory and dry runs of every configuration: about 20 minutes ..."
	$(BIN)/python -m pytest -m slow

test-sglang: $(VENV)/.installed $(SGLANG_VENV)/.stubs
	@echo "tests against a real sglang server, on CPU ..."
	$(BIN)/python -m pytest -m sglang

links:
	mkdir -p links/verippo
	for d in core kernels rl sft search eval launch; do ln -sfn ../../$$d links/verippo/$$d; done

clean:
	rm -rf $(VENV) $(SGLANG_VENV) links demo build *.egg-info

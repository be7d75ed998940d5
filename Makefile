# Works with GNU make 3.81 (macOS) and later, and with any POSIX sh.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
PIP_ARGS ?=
PYTEST_ARGS ?=
# test processes; each runs torch on one thread
JOBS ?= 2

PY = $(VENV)/bin/python
# transformers and what it needs in older versions than constraints.txt has
HF_LOWEST = transformers==5.0.0 peft==0.18.0 tokenizers==0.22.2 huggingface_hub==1.33.0 \
	httpx==0.28.1 httpcore==1.0.9 typer-slim==0.24.0
STAMP = $(VENV)/.mor-setup
VERSION_OK = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
TRITON = import importlib.metadata as m; print(m.version("triton"))
TORCH_OK = import importlib.metadata as m, re; v = m.version("torch"); \
	print(v if tuple(map(int, re.findall(r"\d+", v)[:2])) >= (2, 11) else "")

.PHONY: help setup demo test test-slow test-hf-lowest lint check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv and install everything (PYTHON=..., PIP_ARGS=...)

demo: setup ## train, compare and report in about six minutes (OUT=runs/demo)
	$(VENV)/bin/mor demo --out $(OUT)

test: setup check ## style, types, import contracts and the quick tests (PYTEST_ARGS=...)
	$(VENV)/bin/pytest -n $(JOBS) --dist loadgroup -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: setup ## the other tests; those for a GPU are skipped without one
	$(VENV)/bin/pytest -m "slow or gpu" $(PYTEST_ARGS)

test-hf-lowest: setup ## the Hugging Face adapter, with the oldest versions that it promises
	$(PY) -m pip install $(PIP_ARGS) -q --no-deps --upgrade --target $(VENV)/hf-lowest $(HF_LOWEST)
	PYTHONPATH=$(abspath $(VENV)/hf-lowest) $(PY) -c 'import transformers as t; print("transformers", t.__version__)'
	PYTHONPATH=$(abspath $(VENV)/hf-lowest) $(VENV)/bin/pytest tests/test_hf*.py $(PYTEST_ARGS)

lint: setup ## style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

check: lint ## style, types and import contracts
	$(VENV)/bin/pyrefly check --output-format=min-text
	$(VENV)/bin/lint-imports

clean: ## remove caches and builds; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find mor tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
		echo "$(PYTHON) was not found; name a Python 3.11 to 3.14: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c '$(VERSION_OK)' || { \
		echo "$$($(PYTHON) --version) does not fit; name a Python 3.11 to 3.14: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A suitable torch that is already in .venv stays, and the triton that came with it: their own
# versions replace the pins.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	@$(PY) -c '$(VERSION_OK)' || { \
		echo "$(VENV) holds $$($(PY) --version), but 3.11 to 3.14 is needed; remove $(VENV), then run make setup again" >&2; exit 2; }
	@torch=$$($(PY) -c '$(TORCH_OK)' 2>/dev/null); \
	if [ -n "$$torch" ]; then \
		echo "keeping torch $$torch"; \
		triton=$$($(PY) -c '$(TRITON)' 2>/dev/null); \
		sed -e "s/^torch==.*/torch==$$torch/" -e "$${triton:+s/^triton==.*/triton==$$triton/}" \
			constraints.txt > $(VENV)/constraints.txt; \
	else \
		cp constraints.txt $(VENV)/constraints.txt; \
		if [ "$$(uname -s)" = Linux ]; then \
			echo "torch will be downloaded now; on Linux it may bring several GB of CUDA libraries."; \
			echo "For a small CPU build instead, stop this (Ctrl-C), install torch into $(VENV) with the command"; \
			echo "that the selector on the PyTorch site shows for Linux, Pip, CPU (with $(VENV)/bin/pip),"; \
			echo "then run make setup again: it keeps that torch."; \
		fi; \
	fi
	$(PY) -m pip install $(PIP_ARGS) -c $(VENV)/constraints.txt -e '.[dev,report,data]'
	@touch $(STAMP)

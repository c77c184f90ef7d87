# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv first and is quick the second time; `make
# demo` installs what running the model needs, `make test` adds the tests' and the evaluation's packages to it.
#
# TORCH is what pip is asked for. Unless you set it, it is torch's own CPU build where there is no NVIDIA GPU, which is
# ten times smaller than the one that PyPI has for Linux. Where that index cannot be reached: TORCH=torch make demo
PYTHON ?= python3
TORCH_VERSIONS := 'torch>=2.11,<2.14'
CPU_BUILD := --index-url https://download.pytorch.org/whl/cpu
ifdef TORCH
TORCH_SIZE := torch as TORCH says
else ifneq (,$(shell nvidia-smi -L 2>/dev/null))
TORCH := $(TORCH_VERSIONS)
TORCH_SIZE := torch for NVIDIA GPUs, some 3 GB to download
else
TORCH := $(TORCH_VERSIONS) $(CPU_BUILD)
TORCH_SIZE := torch for CPUs, as there is no NVIDIA GPU here: some 200 MB to download
endif

# --no-compile: python compiles what it imports, and most of these packages is never imported.
# One stamp per torch requirement and set of packages: asking for another torch installs it.
NAME := $(shell printf '%s' "$(TORCH)" | tr -c 'A-Za-z0-9.' '_')
DEMO := .venv/demo-$(NAME)
TEST := .venv/test-$(NAME)
PICTURE := examples/shapes.png

.PHONY: demo test lint data

# A picture that the training never drew. examples/README.md has nine more questions that this model can answer.
demo: $(DEMO)
	.venv/bin/python scripts/generate.py --model demo --image $(PICTURE) --prompt "What do you see in this picture?"

test: $(TEST)
	.venv/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

lint: $(TEST)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

# gsm8k's 8,792 problems, from the hub, for `qwen3vl-moe gsm8k --data data/gsm8k` and eval/.
data: $(TEST)
	.venv/bin/python eval/fetch_gsm8k.py data/gsm8k

$(DEMO): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
	@echo 'Setting up .venv with $(TORCH_SIZE); then some 60 MB of other packages.'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip setuptools
	.venv/bin/pip install --no-compile $(TORCH)
	.venv/bin/pip install --no-compile --no-build-isolation -e .
	@touch $@

$(TEST): $(DEMO)
	@echo 'Adding what the tests, the linters and lm-eval need to .venv: some 800 MB to download.'
	.venv/bin/pip install --no-compile --no-build-isolation -e '.[test,eval]'
	@touch $@

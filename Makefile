# Two commands for a newcomer: `make demo` and `make test`. Each makes its own .venv first and is quick the second time.
#
# TORCH is what pip is asked for. Without a GPU, the small CPU build will do:
#   export TORCH="'torch>=2.11,<2.14' --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= 'torch>=2.11,<2.14'
PYTHON ?= python3

# One stamp per torch requirement: asking for another one installs it.
STAMP := .venv/installed-$(shell printf '%s' "$(TORCH)" | tr -c 'A-Za-z0-9.' '_')
PICTURE := .cache/picture.png

.PHONY: demo test lint

# A picture that the training never drew, with the question about it and the answer that would be right.
demo: $(STAMP)
	@.venv/bin/python scripts/eval_demo.py --sample $(PICTURE)
	.venv/bin/python scripts/generate.py --model demo --image $(PICTURE) --prompt "What do you see in this picture?" --max-tokens 48

test: $(STAMP)
	.venv/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip setuptools
	.venv/bin/pip install --quiet $(TORCH)
	.venv/bin/pip install -qq --no-build-isolation -e '.[test,eval]'
	@touch $@

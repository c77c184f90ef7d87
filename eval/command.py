"""lm-eval's own command with our model in it: ``python eval/lm.py``."""

from __future__ import annotations

import sys
import traceback

import answer_cache
from qwen3vl_moe.errors import UserError

# Where lm-eval reads what its command was given: an exception from there is about that, and no fault of the program.
_READERS = ("/lm_eval/_cli/", "/lm_eval/config/", "/lm_eval/tasks/", "/lm_eval/api/registry.py")


def main() -> None:
    """Run the command; an error of its use is one line and status 2."""
    from lm_eval.__main__ import cli_evaluate

    answer_cache.install()
    try:
        cli_evaluate()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if not isinstance(error, UserError) and not any(part in where for part in _READERS):
            raise
        reason = error if isinstance(error, UserError) else UserError(error.args[0] if error.args else repr(error))
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)

"""lm-eval's own command with our model in it: ``python eval/lm.py``."""

from __future__ import annotations

import sys
import traceback

import answer_cache
from qwen3vl_moe.errors import UserError

# Where lm-eval reads what its command was given: an exception from there is about that, and no fault of the program.
_READERS = ("/lm_eval/_cli/", "/lm_eval/config/", "/lm_eval/tasks/", "/lm_eval/api/registry.py")
_TASK = "/lm_eval/api/task.py"  # which fetches the data of a task


def main() -> None:
    """Run the command; an error of its use is one line and status 2."""
    import lm_eval.models  # noqa: F401  # lm-eval's own, which it looks for only while it knows of none
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "qwen3vl_moe" not in model_registry:
        model_registry.register("qwen3vl_moe", target="lm:EngineLM")  # imported when it is asked for
    answer_cache.install()
    try:
        cli_evaluate()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, UserError):
            reason = error
        elif any(frame.name == "download" and _TASK in frame.filename for frame in frames):
            first = (str(error).splitlines() or [type(error).__name__])[0]
            reason = UserError(
                f"the data of a task cannot be had ({first}): it comes from the hub, or from where dataset_path and "
                "dataset_kwargs of the task's YAML file say"
            )
        elif any(part in frames[-1].filename for part in _READERS):
            reason = UserError(error.args[0] if error.args else repr(error))
        else:
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)

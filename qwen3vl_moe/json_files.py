"""Reading the JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3vl_moe.errors import UserError


def read_json_object(path: Path, error: type[UserError]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: the file cannot be read, or holds no JSON object; one line says which.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from None
    except (ValueError, RecursionError) as problem:  # no UTF-8, no JSON, thousands of digits, or nested too deep
        raise error(f"{path} cannot be read as JSON: {problem}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: a JSON object is needed, got {type(content).__name__}")
    return content

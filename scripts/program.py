"""What every program here and in eval/ begins with."""

from __future__ import annotations

import codecs
import io
import json
import sys
from typing import Any


def any_text() -> None:
    """Let stdout and stderr take any text: what their encoding does not have is written as an escape.

    They need not be UTF-8 (LC_ALL=C, PYTHONIOENCODING, a terminal of old), and no UTF-8 holds half of a surrogate pair,
    of which the name of a file may consist. To be called before anything is written.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None or something of a notebook's where there is no terminal
            stream.reconfigure(errors="backslashreplace")


def json_line(value: Any) -> str:
    """``value`` as one line of JSON that stdout can take: readable where that is UTF-8, else in ASCII."""
    readable = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    return json.dumps(value, ensure_ascii=not readable) + "\n"

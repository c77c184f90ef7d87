"""Files of requests."""

import json

import pytest

from batch_file import read_requests
from qwen3vl_moe.engine import SamplingParams

SETTINGS = {"model": "m", "max_pixels": None}
DEFAULTS = SamplingParams(max_tokens=5)


@pytest.fixture
def job(tmp_path):
    """``job(lines)``: the requests of a file with these lines (JSON values or bytes)."""

    def make(lines, defaults=DEFAULTS, settings=SETTINGS):
        path = tmp_path / "requests.jsonl"
        path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
        return read_requests(path, defaults, settings)

    return make

"""kill -9 of any rank at any moment: the program ends with one line, leaves no process, and the next run goes on.

QWEN3VL_MOE_KILLS is how often; a few by default, as each takes some seconds.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.scripts.generate.conftest import records

KILLS = int(os.environ.get("QWEN3VL_MOE_KILLS", 2))
LINES = [
    {"id": n, "prompt": f"Hello {n}", "max_tokens": 60, "temperature": 1.0, "seed": n, "ignore_eos": True}
    for n in range(60)
]


def alive(session):
    """Processes of a session that have not ended, the eldest first."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(its_session) == session and state not in "ZX":
            found.append(int(entry.name))
    return sorted(found)


@pytest.fixture(scope="module")
def wide(make_tiny):
    return make_tiny("wide").published


@pytest.fixture
def arguments(wide, tmp_path, batch):
    files = batch(LINES)
    return [*files, "--model", wide, "--tensor-parallel-size", 2, "--max-model-len", 128]


def test_any_rank_may_be_killed_at_any_time(start, arguments, tmp_path):
    drawn, answers = random.Random(time.time_ns()), tmp_path / "answers.jsonl"
    begun = time.monotonic()
    whole = start(*arguments, start_new_session=True)
    assert whole.communicate()[1].splitlines()[-1].startswith(f"{answers} is complete: {len(LINES)} answers, 0 errors")
    seconds, expected = time.monotonic() - begun, records(answers)
    for kill in range(KILLS):
        if kill % 2 == 0:
            answers.unlink(missing_ok=True)  # else the run after one that was killed is killed, too
        process = start(*arguments, start_new_session=True)
        time.sleep(drawn.uniform(0, seconds))
        there = alive(process.pid)
        victim = drawn.choice(there or [process.pid])
        if there:
            os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=15)
        assert time.monotonic() - killed < 10
        deadline = time.monotonic() + 5
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(process.pid)
        assert "Traceback" not in err
        if victim != process.pid and process.returncode != 0:  # it may have been at its end
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, (process.returncode, err)
            assert "rank 1 was killed (SIGKILL)" in errors[0]
            assert process.returncode in (1, 2)
    done = start(*arguments, start_new_session=True)
    done.communicate(timeout=120)
    assert done.returncode == 0
    assert records(answers) == expected

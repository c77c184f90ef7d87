"""The new held-out set: the same on every call, all kinds in turn, and answers that its pixels bear out."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demo_training import heldout, heldout_board, heldout_phrases
from demo_training.evaluation import new_conversation, new_heldout, score_new
from demo_training.heldout import heldout_question
from demo_training.heldout_phrases import ASKED, KINDS
from qwen3vl_moe.errors import OptionError

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "scripts"))}


def test_it_shares_no_code_with_the_training():
    own = {"demo_training.heldout_board", "demo_training.heldout_phrases", "qwen3vl_moe.errors"}
    for module in (heldout, heldout_board, heldout_phrases):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        assert {name for name in imported if name.split(".")[0] in ("demo_training", "qwen3vl_moe")} <= own
        assert not imported & {"cv2", "PIL.ImageDraw", "PIL.ImageFont"}


def test_kinds_take_turns_and_every_question_is_the_same_again():
    asked = new_heldout(len(KINDS))
    assert [each.kind for each in asked] == list(KINDS)
    for number, one in enumerate(asked):
        again = heldout_question(number)
        assert (one.question, one.answer) == (again.question, again.answer)
        assert [p.tobytes() for p in one.pictures] == [p.tobytes() for p in again.pictures]
        assert "{" not in one.question
        two = any(phrase.count("picture") and ("first" in phrase or "{2}" in phrase) for phrase in ASKED[one.kind])
        assert len(one.pictures) == (2 if two or one.kind == "count in one of two" else 1)


def of_kind(kind: str, count: int):
    return [heldout_question(KINDS.index(kind) + len(KINDS) * number) for number in range(count)]


def test_a_described_shape_has_its_colour_in_its_middle():
    for asked in of_kind("describe one", 8):
        pixels = np.asarray(asked.pictures[0]).astype(int)
        drawn = np.abs(pixels - pixels[0, 0]).sum(-1) > 120
        rows, columns = np.nonzero(drawn)
        assert np.ptp(rows) > 0.25 * min(pixels.shape[:2])
        colour = asked.answer.split()[2]
        middle = pixels[round(rows.mean()), round(columns.mean())]
        from matplotlib.colors import to_rgb

        paints = [np.array(to_rgb(paint)) * 255 for paint in heldout_board.PAINTS[colour]]
        assert min(np.abs(middle - paint).max() for paint in paints) < 4


def test_a_word_is_whole():
    for asked in [*of_kind("word", 10), *of_kind("number", 10)]:
        pixels = np.asarray(asked.pictures[0]).astype(int)
        ink = np.abs(pixels - pixels[0, 0]).max(-1) > 90
        assert ink.any()
        assert not np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]]).any()


def test_scores_tell_right_from_wrong():
    asked = new_heldout(2 * len(KINDS))
    right = [each.answer for each in asked]
    assert score_new(asked, right)["all"] == {"right": len(asked), "of": len(asked)}
    table = score_new(asked, ["?", *right[1:]])
    assert table["colour"] == {"right": 1, "of": 2}
    assert len(table) == len(KINDS) + 1
    assert new_conversation(asked[0])[0]["content"][-1] == {"type": "text", "text": asked[0].question}


def test_the_first_set_needs_no_further_package():
    """Whoever asks the demo the old questions has installed none of the packages that the new pictures come of."""
    code = (
        "import sys\n"
        "for name in ('cv2', 'matplotlib', 'skimage', 'sklearn', 'font_caladea'): sys.modules[name] = None\n"
        "from demo_training.evaluation import conversation, heldout_examples\n"
        "print(len(conversation(heldout_examples(1)[0])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.stdout == "1\n", done.stderr


def test_a_missing_package_is_one_clear_line():
    with pytest.raises(OptionError, match=r"need no_such_package; pip install 'qwen3vl-moe\[demo\]'"):
        heldout_board.file_of("no_such_package", "file")

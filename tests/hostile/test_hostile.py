"""Inputs by the thousand that nobody should send: each is used or refused in one line; none costs much, none runs."""

import pytest

from qwen3vl_moe.errors import UserError
from tests.hostile.corpus_run import run_corpus

DOORS = {
    "line", "image", "source", "prompt", "conversation", "sampling", "template", "checkpoint", "problems", "cache",
}  # fmt: skip
# Some of either kind, of which nobody doubts where they belong: refusing everything is no answer, nor is using it.
USED = {
    "line: prompt", "line: images", "line: chat", "image: PNG", "image: JPEG", "image: WebP", "image: GIF",
    "image: TIFF", "image: BMP", "image: PNG with alpha", "image: orientation 0", "source: an image of 1x1",
    "checkpoint: config.json as it is", "cache: as it was written",
}  # fmt: skip
REFUSED = {
    "image: EPS", "image: PDF", "image: PNG of 0x0", "image: PNG of 60000x60000", "image: raw: HTML",
    "image: SVG", "line: message 0", "line: item 0", "line: item 7", "line: item 12", "line: raw: NUL bytes",
    "source: an image of NaN", "line: unknown keys", "prompt: ids of value 51",
    "template: template 15: '{% for i in range(10**9) %}a{% endfor %}'", "checkpoint: weights of NaN",
    "checkpoint: weights of infinity", "checkpoint: a header of 0 bytes", "cache: a pickle",
    "problems: answer is null", "source: an image of infinity",
}  # fmt: skip
pytest.importorskip("lm_eval", reason="lm-eval is not installed")


def test_every_input_is_used_or_refused_in_a_line():
    report = run_corpus()
    assert report.faults == []
    assert report.ran.keys() == DOORS
    assert report.ran.total() >= 2000
    assert all(count >= 50 for count in report.ran.values())
    assert report.used >= USED
    assert not report.used & REFUSED


def test_the_watch_finds_every_kind_of_fault():
    report = run_corpus(num_workers=1, planted=True)
    faults = dict(fault.removeprefix("planted: ").split(": ", 1) for fault in report.faults)
    assert faults["raises"].startswith("KeyError")
    assert "os.system" in faults["runs_a_program"]
    assert faults["hangs"] == "it hangs"
    assert faults["takes_memory"].startswith("it takes ")
    assert "status 3" in faults["dies"]
    assert len(faults) == 5


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a line", ""),
        ("two\nlines", "no printable line"),
        ("\x1b[2J", "no printable line"),
        ("a" * 2000, "2000 characters"),
    ],
)
def test_errors_are_judged(text, found):
    from tests.hostile.worker import outcome_of

    class Error(UserError):
        __str__ = ValueError.__str__  # as it would be without the care that UserError takes

    def refuse():
        raise Error(text)

    wrong, used = outcome_of(refuse)
    assert not used
    assert found in wrong
    assert bool(found) == bool(wrong)

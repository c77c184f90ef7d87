"""Runs what is marked for triton's interpreter in this folder: kernels one by one, and whole models through them."""

from pathlib import Path

import pytest

from tests.interpreted import INTERPRETED, ON_GPU, run_in_interpreter


@pytest.mark.long
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="kernels run on the card, or are interpreted here already")
def test_in_the_interpreter():
    run_in_interpreter(Path(__file__).parent, at_least=150)

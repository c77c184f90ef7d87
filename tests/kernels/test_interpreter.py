"""Runs test_values.py in triton's interpreter."""

from pathlib import Path

import pytest

from tests.interpreted import run_in_interpreter


@pytest.mark.long
@pytest.mark.timeout(900)
def test_values_in_the_interpreter():
    run_in_interpreter(Path(__file__).with_name("test_values.py"), at_least=120)

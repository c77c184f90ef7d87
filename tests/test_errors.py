"""What a user error says is one line that a terminal can show as it is."""

import pytest

from qwen3vl_moe.errors import OptionError, PromptError, UserError


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("image 0 ('Straße/漢字.png'): there is no such file", "image 0 ('Straße/漢字.png'): there is no such file"),
        ("\x1b]0;title\x07\x1b[31mred", r"\x1b]0;title\x07\x1b[31mred"),
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("\x85\u2028\u2029", r"\x85\u2028\u2029"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud800 \udcff", r"\ud800 \udcff"),
        ("\0\x7f\x9b", r"\x00\x7f\x9b"),
    ],
)
@pytest.mark.parametrize("kind", [UserError, OptionError])
def test_an_error_is_one_printable_line(given, shown, kind):
    text = str(kind(given))
    assert text == shown
    assert str(PromptError(f"request 3: {text}")) == f"request 3: {shown}", "said again, it stays what it is"


@pytest.mark.parametrize("character", ["x", "\x1b", "\U000e0001"])
def test_a_long_error_loses_its_middle(character):
    text = str(UserError(f"begins {character * 100_000} ends"))
    assert text.startswith("begins ")
    assert text.endswith(" ends")
    assert " ... " in text
    assert len(text) <= 1000

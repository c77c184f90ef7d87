"""Tokens to text: whole characters only, no part of a stop string, the same text as the tokenizer's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_moe.engine.detokenizer import TextStream, TokenBytes
from qwen3vl_moe.inputs.processor import _load_tokenizer

TEXTS = [
    "Hello, how are you today?",
    "Grüße aus Köln, naïve café",
    "猫が好きです。漢字も少し",
    "😀👍🏽 family: 👨‍👩‍👧‍👦 flag: 🇩🇪",
    "a\tb\n  c\u00a0\u200b\ufffd\x00",
]


@pytest.fixture(scope="module")
def tokenizer(plain):
    return _load_tokenizer(plain.path)


@pytest.fixture(scope="module")
def token_bytes(tokenizer):
    return TokenBytes(tokenizer)


def encode(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, token_bytes, text):
    stream = TextStream(token_bytes)
    for token in encode(tokenizer, text):
        before = len(stream.text)
        stream.push(token)
        assert text.startswith(stream.text)
        assert "\ufffd" not in stream.text[before:] or "\ufffd" in text
    stream.flush()
    assert stream.text == text


@given(st.lists(st.integers(0, 511), max_size=40))
def test_any_tokens_give_the_tokenizers_text(tokenizer, token_bytes, tokens):
    """Noise too: broken UTF-8, special tokens (left out), ids without a token."""
    stream = TextStream(token_bytes)
    for token in tokens:
        stream.push(token)
    stream.flush()
    assert stream.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_real_vocabulary(shared_dir):
    tokenizer = _load_tokenizer(shared_dir / "qwen3vl-tokenizer")
    stream = TextStream(TokenBytes(tokenizer))
    text = " ".join(TEXTS)
    for token in encode(tokenizer, text):
        stream.push(token)
        assert text.startswith(stream.text)
    stream.flush()
    assert stream.text == text
    # Added tokens that are not special are text.
    added = next(i for i, token in tokenizer.added_tokens_decoder.items() if not token.special)
    stream.push(added)
    assert stream.text == text + tokenizer.decode([added])


@pytest.mark.parametrize(
    ("text", "stops", "expected", "reason"),
    [
        ("The answer is 42.", ("answer",), "The ", "answer"),
        ("The answer is 42.", ("42.", "is"), "The answer ", "is"),
        ("ababac", ("abac",), "ab", "abac"),
        ("aaaab", ("aab",), "aa", "aab"),
        ("no stop here", ("x",), "no stop here", None),
        ("ends with a part: </ans", ("</answer>",), "ends with a part: </ans", None),
        ("emoji 😀 stops", ("😀",), "emoji ", "😀"),
        ("two at once", ("two at", "two"), "", "two"),
        ("line\n\nline", ("\n\n",), "line", "\n\n"),
    ],
)
def test_stop_strings(tokenizer, token_bytes, text, stops, expected, reason):
    """Byte by byte, so that every stop string crosses token boundaries."""
    single = {token_bytes(token): token for token in range(511) if len(token_bytes(token)) == 1}
    for tokens in (encode(tokenizer, text), [single[bytes([byte])] for byte in text.encode()]):
        stream, found = TextStream(token_bytes, stops), None
        for token in tokens:
            found = stream.push(token)
            assert expected.startswith(stream.text), "a part of a stop string was shown"
            if found is not None:
                break
        stream.flush()
        assert (stream.text, found) == (expected, reason)


def test_text_is_not_held_longer_than_needed(tokenizer, token_bytes):
    """Only what could still become a stop string waits."""
    stream = TextStream(token_bytes, ("stop it",))
    for token in encode(tokenizer, "please sto"):
        stream.push(token)
    assert stream.text == "please "
    for token in encode(tokenizer, "p here"):
        stream.push(token)
    assert stream.text == "please stop here"

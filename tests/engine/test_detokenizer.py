"""Tokens to text: whole characters only, no part of a stop string, the same text as the tokenizer's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_moe.engine.detokenizer import TextStream, TokenBytes
from qwen3vl_moe.inputs.tokenizer import load_tokenizer

TEXTS = [
    "Hello, how are you today?",
    "Grüße aus Köln, naïve café",
    "猫が好きです。漢字も少し",
    "😀👍🏽 family: 👨‍👩‍👧‍👦 flag: 🇩🇪",
    "a\tb\n  c\u00a0\u200b\ufffd\x00",
]


@pytest.fixture(scope="module")
def tokenizer(plain):
    return load_tokenizer(plain.path)


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


@given(st.lists(st.lists(st.integers(0, 511), max_size=9), max_size=6), st.booleans())
def test_many_tokens_at_once_are_the_same_as_one_by_one(token_bytes, parts, skip_special):
    together, single = (TextStream(token_bytes, skip_special=skip_special) for _ in range(2))
    for part in parts:
        together.extend(part)
        for token in part:
            single.push(token)
        assert together.text == single.text


def test_real_vocabulary(shared_dir):
    tokenizer = load_tokenizer(shared_dir / "qwen3vl-tokenizer")
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
    single = single_bytes(token_bytes)
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


def single_bytes(token_bytes):
    """The token of each byte."""
    return {token_bytes(token): token for token in range(511) if len(token_bytes(token)) == 1}


class Spelled:
    """Token bytes of a vocabulary made up for a test."""

    def __init__(self, *pieces, special=None):
        self.pieces, self.special = pieces, special or {}

    def __call__(self, token_id):
        return b"" if token_id in self.special else self.pieces[token_id]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("pieces", "stop", "before"),
    [
        ((b"a", b" \xe2\x80"), " ", "a"),  # 266 tokens of the published vocabulary are like this one
        ((b"a", b".\xf0\x9f\x98"), ".", "a"),
        ((b"a\xe7", b"\x8c\xab\xe3"), "\u732b", "a"),
        ((b"ab\xc3",), "b", "a"),
        ((b"ab\xff\xfe rest",), "ab", ""),
    ],
)
def test_nothing_of_the_token_after_the_stop_string_stays(pieces, stop, before, include):
    stream = TextStream(Spelled(*pieces), (stop,), include_stop=include)
    found = [stream.push(token) for token in range(len(pieces))]
    stream.flush()
    assert found == [None] * (len(pieces) - 1) + [stop]
    assert stream.text == before + (stop if include else "")


SPECIAL = {9: "<|im_end|>", 8: "<|image_pad|>"}
HELLO = Spelled(b"Hel", b"lo", b"\n", b"<|im_", b"end|>", b"\xe2", b"\x82\xac", special=SPECIAL)


@pytest.mark.parametrize(
    ("tokens", "stops", "shown", "found"),
    [
        ([0, 1, 9, 2], ("<|im_end|>",), "Hello", "<|im_end|>"),
        ([0, 1, 9, 2], ("lo<|im_end|>\n",), "Hel", "lo<|im_end|>\n"),
        ([0, 1, 9, 2], ("never", "<|im_end|>"), "Hello", "<|im_end|>"),
        ([0, 8, 1, 9], ("<|im_end|>",), "Hello", "<|im_end|>"),  # another special token is left out as ever
        ([0, 8, 1], ("lo",), "Hel", "lo"),
        ([0, 8, 1], ("Hello",), "", "Hello"),  # no stop spells a special token, so none is seen
        ([0, 9, 1], ("<|im_end|>x",), "Hello", None),
        ([0, 3, 4, 1], ("<|im_end|>",), "Hel", "<|im_end|>"),  # spelled by ordinary tokens: text like any other
        ([5, 9, 6], ("<|im_end|>",), "", "<|im_end|>"),
        ([5, 8, 6], ("<|im_end|>",), "\u20ac", None),
    ],
)
def test_stops_that_spell_special_tokens(tokens, stops, shown, found):
    stream, result = TextStream(HELLO, stops), None
    for token in tokens:
        result = stream.push(token)
        assert shown.startswith(stream.text), "a special token or a part of a stop was shown"
        if result:
            break
    stream.flush()
    assert (stream.text, result) == (shown, found)


@given(st.lists(st.integers(0, 511), max_size=40))
def test_with_special_tokens_the_text_is_the_tokenizers_too(tokenizer, token_bytes, tokens):
    stream = TextStream(token_bytes, skip_special=False)
    for token in tokens:
        stream.push(token)
    stream.flush()
    assert stream.text == tokenizer.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("early", range(8))
def test_a_stop_counts_only_where_it_ends_late_enough(early):
    """vLLM's min_tokens: the stop string may begin before, its last character may not stand there."""
    letters = Spelled(*(letter.encode() for letter in "ababcab"))
    stream, found = TextStream(letters, ("ab", "bab"), include_stop=True), None
    for token in range(7):
        found = stream.push(token, may_stop=token >= early)
        if found:
            break
    stream.flush()
    end = next((end for end in (1, 3, 6) if end >= early), None)
    assert stream.text == "ababcab"[: 7 if end is None else end + 1]
    assert found == (None if end is None else "bab" if end == 3 else "ab")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([b"a", b"\xe2", b"\x82", b"\xac", b"b"], ["a", "", "", "\u20ac", "b"]),
        ([b" \xe2\x80", b"\x99s"], [" ", "\u2019s"]),
        ([b"\xf0\x9f", b"\x98\x80\xf0", b"\x9f\x98\x81"], ["", "\U0001f600", "\U0001f601"]),
        ([b"\xe2", b"a"], ["", "a"]),  # never completed: what follows is not to blame
        ([b"\x82", b"\xff"], ["\ufffd", "\ufffd"]),
        ([b"\xc3\xa9\xc3", b"\xa9"], ["\u00e9", "\u00e9"]),
    ],
)
def test_the_text_of_a_token_by_itself(tokenizer, raw, expected):
    token_bytes = TokenBytes(tokenizer)
    tokens = [1000 + number for number in range(len(raw))]
    token_bytes._known.update(zip(tokens, raw, strict=True))
    assert [token_bytes.decoded(token, tokens[:at]) for at, token in enumerate(tokens)] == expected


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_tokens_join_to_the_text(tokenizer, token_bytes, text):
    single = single_bytes(token_bytes)
    for tokens in (encode(tokenizer, text), [single[bytes([byte])] for byte in text.encode()]):
        assert "".join(token_bytes.decoded(token, tokens[:at]) for at, token in enumerate(tokens)) == text
    special = next(iter(token_bytes.special))
    assert token_bytes.decoded(special, []) == tokenizer.decode([special])

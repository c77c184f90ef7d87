"""Answers taken apart: the same parts however the text is cut, and nothing of it lost."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_moe.server.parts import Part, Parts

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</x> <tool_call>"}}\n</tool_call>'
F, G = Part("call", '{"a": "</x> <tool_call>"}', "f"), Part("call", "{}", "g")
CASES = {
    "plain": ("Hello <b> <tool", {"calls": True}, [Part("content", "Hello <b> <tool")]),
    "no calls were offered": (CALL, {}, [Part("content", CALL)]),
    "said, then called twice": (
        f'Sure.\n{CALL}\n<tool_call>{{"name": "g", "arguments": {{}}}}</tool_call>\n',
        {"calls": True},
        [Part("content", "Sure."), F, G],
    ),
    "no JSON": ("x <tool_call>\n{'a'}\n</tool_call> y", {"calls": True}, None),
    "another form": ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', {"calls": True}, None),
    "arguments that are no object": ('<tool_call>{"name": "f", "arguments": 1}</tool_call>', {"calls": True}, None),
    "never closed": ('x\n<tool_call>\n{"name": ', {"calls": True}, None),
    "thinks at once": (
        "\nSo it is\n</think>\n\nYes </think>",
        {"reasons": "at once"},
        [Part("reasoning", "So it is"), Part("content", "Yes </think>")],
    ),
    "thinks to the end": ("So it\n", {"reasons": "at once"}, [Part("reasoning", "So it\n")]),
    "thinks by a tag": (
        "<think>\nhm\n</think>\n\n" + CALL,
        {"reasons": "tagged", "calls": True},
        [Part("reasoning", "hm"), F],
    ),
    "thinks of nothing": ("<think>\n\n</think>\n\nYes", {"reasons": "tagged"}, [Part("content", "Yes")]),
    "does not think": (" \n<thin> Yes", {"reasons": "tagged"}, [Part("content", " \n<thin> Yes")]),
    "space": ("  \n ", {"reasons": "tagged", "calls": True}, [Part("content", "  \n ")]),
}


def parts_of(pieces, **options):
    parts, found = Parts(**options), []
    for part in itertools.chain(*(parts.push(piece) for piece in pieces), parts.push("", last=True)):
        if found and found[-1].kind == part.kind != "call":
            found[-1] = Part(part.kind, found[-1].text + part.text)
        else:
            found.append(part)
    assert parts.called == any(part.kind == "call" for part in found)
    return found


@pytest.mark.parametrize(("text", "options", "expected"), CASES.values(), ids=CASES)
@given(st.data())
def test_parts_do_not_depend_on_the_cuts(text, options, expected, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]
    expected = [Part("content", text)] if expected is None else expected  # what is no call stays as it is
    assert parts_of(pieces, **options) == parts_of(text, **options) == expected


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", " ", "\n", "x", "{", "<", "<tool"])).map("".join))
def test_nothing_that_is_no_call_gets_lost(text):
    assert "".join(part.text for part in parts_of(text, calls=True)) == text


def test_text_is_given_as_soon_as_it_can_be_nothing_else():
    parts = Parts(calls=True)
    assert parts.push("Hello") == [Part("content", "Hello")]
    assert parts.push(" <tool") == []
    assert parts.push("s>") == [Part("content", " <tools>")]

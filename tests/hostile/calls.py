"""Arguments of calls in Python: prompts, conversations, sampling parameters, chat templates."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from qwen3vl_moe import SamplingParams
from tests.hostile import request_lines
from tests.hostile.request_lines import ITEMS, MESSAGES, PIXEL
from tests.hostile.sources import Raising

NESTED: list = []
for _ in range(2000):
    NESTED = [NESTED]
CIRCLE: list = []
CIRCLE.append(CIRCLE)
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    2**31,
    2**63,
    2**64,
    10**400,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    1j,
    Decimal("0.5"),
    Decimal("sNaN"),
    Fraction(1, 3),
    np.int64(3),
    np.float32(0.5),
    np.float64("nan"),
    np.array([1, 2]),
    np.bool_(True),
    torch.tensor(1),
    torch.tensor([1.0, 2.0]),
    "",
    "a",
    "\ud800",
    "\x00",
    "a" * 1_000_000,
    b"a",
    bytearray(b"a"),
    [],
    [None],
    ["a"],
    [""],
    ["a", 1],
    ["\ud800"],
    [1],
    [-1],
    [2**64],
    [1.0],
    [True],
    ["a"] * 100,
    list(range(100_000)),
    NESTED,
    CIRCLE,
    (),
    (1,),
    {},
    {"a": 1},
    {1: 2},
    {1: math.nan},
    {"1": 5.0},
    set(),
    {1},
    range(3),
    object(),
    Raising(),
    int,
    len,
]
SAMPLING = [name for name in request_lines.NUMBERS if name in SamplingParams.__dataclass_fields__]
TEXTS = [
    "",
    " ",
    "\x00",
    "\ud800",
    "a\ud800",
    "\udfff\ud800",
    "\ufffe",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_start|><|image_pad|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|im_end|>",
    "<|endoftext|>" * 5000,
    "🖼️" * 100,
    "e\u0301" * 100,
    "a\u0300" + "\u0300" * 10_000,
    " " * 100_000,
    "a" * 100_000,
    "ab " * 1_000_000,
    "9" * 1_000_000,
    "\u202e\u2066\u200f",
]
TEMPLATES = [
    "",
    "a",
    "{{",
    "{%",
    "{{ a.b.c }}",
    "{{ messages[99].content }}",
    "{{ messages }}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no\nway') }}",
    "{{ raise_exception('\x1b[31m') }}",
    "{{ raise_exception('a' * 100000) }}",
    "{{ 'a' * 10**12 }}",
    "{{ ('a' * 10**5) * 10**5 }}",
    "{{ [0] * 10**10 }}",
    "{{ range(10**9) | list }}",
    "{% for i in range(10**9) %}a{% endfor %}",
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "{% for i in range(90000) %}{% for j in range(90000) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "{% for i in range(90000) %}{% for j in range(90000) %}{% set x = i * j %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=2) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 10**10**10 }}",
    "{{ 2 ** 2 ** 40 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a,' * 1000 | replace('a', 'a' * 10**6) }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 5000) | indent(10**7) }}",
    "{{ '1' | int(base=99) }}",
    "{{ ('a' * 40 + 'b') | wordwrap(1) }}",
    "{{ lipsum(10**6) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ self.__init__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}{{ messages[0].role }}",
    "{{ messages[0].update({}) }}",
    "{% include 'a' %}",
    "{% import 'a' as b %}",
    "{% extends 'a' %}",
    "{{ strftime_now('%Y') }}",
    "{{ strftime_now('%' * 9) }}",
    "{{ strftime_now(3) }}",
    "{{ tojson }}",
    "{{ messages | tojson }}",
    "{{ range | tojson }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{% set a = [] %}{% set _ = a.append(a) %}{{ a | tojson }}",
    "{{ a | b }}",
    "{% nothing %}",
    "{% endfor %}",
    "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
    "{{ '\\ud800' }}",
    "\ud800",
    "{{ messages[0].content[0].text.x.y }}",
    "{{ none() }}",
    "{{ 'a'() }}",
    "{{ messages[0]['content'] | join(1) | sum | round('x') }}",
    "{{ [3, 'a', none] | sort }}",
    "{{ {}.x.y }}",
    "{{ 'a' ~ none ~ 1.5 ~ [] }}",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "{{ '<|video_pad|>' }}",
    "{# a",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ " + "-" * 100_000 + "1 }}",
    "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "{{ a }}" * 100_000,
    "a" * 20_000_000,
]


def prompts() -> Iterator[tuple[str, Any]]:
    """What ``generate`` is asked."""
    for number, value in enumerate(VALUES):
        yield f"value {number}", value
        yield f"ids of value {number}", {"prompt_token_ids": value}
        if number % 2:
            yield f"data of value {number}", {"prompt": "a", "multi_modal_data": value}
    for number, text in enumerate(TEXTS):
        yield f"text {number}", text
        yield f"text {number} with an image", {"prompt": text, "multi_modal_data": {"image": PIXEL}}
    for kind in ("image", "video", "audio", "", "\x1b", 3, None):
        yield f"data of kind {kind!a}", {"prompt": "a", "multi_modal_data": {kind: [PIXEL]}}
    yield "a million ids", [1] * 1_000_000
    yield "both", {"prompt": "a", "prompt_token_ids": [1]}
    yield "nothing", {"prompt": None}


def conversations() -> Iterator[tuple[str, Any]]:
    """What ``chat`` is asked."""
    rng = random.Random(8)
    for number, value in enumerate(VALUES):
        forms = {
            "value": value,
            "message": [value],
            "role": [{"role": value, "content": "a"}],
            "content": [{"role": "user", "content": value}],
            "item": [{"role": "user", "content": [value]}],
            "text": [{"role": "user", "content": [{"type": "text", "text": value}]}],
            "key": [{"role": "user", "content": "a", "k": value}],
            "calls": [{"role": "assistant", "content": None, "tool_calls": value}],
        }
        for form in rng.sample(sorted(forms), 3):
            yield f"{form} {number}", forms[form]
    for number, text in enumerate(TEXTS):
        yield f"a text {number}", [{"role": "user", "content": text}]
    for number, message in enumerate(MESSAGES):
        yield f"odd message {number}", [message]
    for number, item in enumerate(ITEMS):
        yield f"odd item {number}", [{"role": "user", "content": (item,)}]


def sampling() -> Iterator[tuple[str, dict[str, Any]]]:
    """Sampling parameters, by keyword."""
    rng = random.Random(7)
    for name in SAMPLING:
        for number in rng.sample(range(len(VALUES)), 24):
            yield f"{name}, value {number}", {name: VALUES[number]}
    yield "an unknown name", {"beam_width": 3}
    yield "a name of control characters", {"\x1b[2J\n": 3}


def templates() -> Iterator[tuple[str, str]]:
    """Chat templates."""
    for number, template in enumerate(TEMPLATES):
        yield f"template {number}: {template[:40]!a}", template

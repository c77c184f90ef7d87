"""Lines of a requests file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from tests.hostile.mutations import JSON_VALUES, RAW_TEXTS, json_mutations, with_value

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)
PROMPT = {"id": "a", "prompt": "How many?", "image": PIXEL, "max_tokens": 1}
IMAGES = {"id": 7, "prompt": "How many?", "images": [PIXEL, PIXEL], "seed": 3, "temperature": 1, "max_tokens": 1}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": PIXEL},
                {"type": "image_url", "image_url": {"url": PIXEL, "detail": "auto"}},
                {"type": "text", "text": "How many?"},
            ],
        },
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Sure?"},
    ],
    "stop": ["a", "b"],
    "max_tokens": 1,
}
NUMBERS = [
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "seed",
    "logprobs",
    "prompt_logprobs",
    "n",
    "min_tokens",
    "bad_words",
    "logit_bias",
    "allowed_token_ids",
]
ITEMS = [
    {"type": "video", "video": "a.mp4"},
    {"type": "video_url", "video_url": {"url": "http://127.0.0.1:9/a.mp4"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "file", "file": {"file_id": "a"}},
    {"type": "input_text", "text": "a"},
    {"type": "input_image", "image_url": PIXEL},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
    {"type": "text", "text": "a", "image": PIXEL},
    {"type": "text", "text": "a", "image_url": {"url": PIXEL}},
    {"type": "image_url", "image_url": {"url": PIXEL}, "max_pixels": 16384},
    {"type": "image_url", "image_url": {"url": PIXEL, "detail": "high"}},
    {"type": "image", "image": PIXEL, "min_pixels": 1e9},
    {"type": "image", "image": PIXEL, "max_pixels": -1},
    {"type": "image", "image": PIXEL, "resized_height": 0, "resized_width": 2**40},
    {"type": "image", "image": PIXEL, "resized_height": 32},
    {"type": "image", "image": PIXEL, "url": PIXEL},
    {"type": "image", "base64": PIXEL},
    {"type": "image", "base64": "not base64"},
    {"type": "image", "path": "/dev/zero"},
    {"type": "image"},
    {"image": PIXEL},
    {"text": "a"},
    {"type": "IMAGE", "image": PIXEL},
    {"type": ["image"], "image": PIXEL},
    "text",
    [],
    None,
    3,
]
MESSAGES = [
    {"role": "user", "content": "a", "images": [PIXEL]},
    {"role": "user", "content": "a", "image": PIXEL},
    {"role": "user", "content": "a", "attachments": [{}]},
    {"role": "user"},
    {"content": "a"},
    {"role": "developer", "content": "a"},
    {"role": "tool", "content": "a", "tool_call_id": "x"},
    {"role": "function", "content": "a", "name": "f"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
    {"role": "assistant", "content": None},
    {"role": "assistant", "content": "a", "tool_calls": "f"},
    {"role": "assistant", "content": "a", "tool_calls": [1, None]},
    {"role": "assistant", "content": "a", "reasoning_content": {"a": []}},
    {"role": "user", "content": []},
    {"role": "user", "content": {}},
    {"role": "user", "content": [[]]},
    {"role": "user", "content": "<|im_start|>system"},
    {"role": "user", "content": "<|video_pad|>"},
    {"role": "us\u0000er", "content": "a"},
]


def cases() -> Iterator[tuple[str, bytes]]:
    """Names and lines; each line is the whole file."""
    rng = random.Random(0)
    for name, base, each in (("prompt", PROMPT, 10), ("images", IMAGES, 6), ("chat", CHAT, 6)):
        yield name, json.dumps(base).encode()
        for change, line in json_mutations(base, rng, each):
            yield f"{name}: {change}", line
        line = json.dumps(base).encode()
        for at in range(1, len(line), max(1, len(line) // 10)):
            yield f"{name}: cut after {at}", line[:at]
        for number in range(10):
            damaged = bytearray(line)
            damaged[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
            yield f"{name}: a bit flipped, {number}", bytes(damaged).replace(b"\n", b" ")
    for key in NUMBERS:
        for value in rng.sample(sorted(JSON_VALUES), 8):
            yield f"{key} is {value}", with_value({**PROMPT, key: 0}, (key,), JSON_VALUES[value])
    for number, item in enumerate(ITEMS):
        content = [item, {"type": "text", "text": "What?"}]
        yield f"item {number}", _chat([{"role": "user", "content": content}])
    for number, message in enumerate(MESSAGES):
        yield f"message {number}", _chat([message])
        yield f"message {number}, later", _chat([{"role": "user", "content": "a"}, message, message])
    for name, text in RAW_TEXTS.items():
        yield f"raw: {name}", text
    yield "unknown keys", json.dumps({**PROMPT, **{f"k{n}": n for n in range(10_000)}}).encode()
    yield "a key of a megabyte", json.dumps({**PROMPT, "k" * 1_000_000: 1}).encode()
    yield "a key of control characters", json.dumps({**PROMPT, "\x1b[2J\n": 1}).encode()
    yield "a prompt of ten megabytes", json.dumps({"prompt": "word " * 2_000_000}).encode()
    yield "ten megabytes of one letter", json.dumps({"prompt": "a" * 10_000_000}).encode()
    yield "megabytes of placeholders", json.dumps({"prompt": "<|image_pad|>" * 300_000}).encode()
    yield "an id of a megabyte", json.dumps({**PROMPT, "id": "i" * 1_000_000, "top_p": 7}).encode()
    yield "a thousand images", json.dumps({"prompt": "a", "images": [PIXEL] * 1000}).encode()
    yield "ten thousand messages", _chat([{"role": "user", "content": "a"}] * 10_000)
    yield "a hundred thousand stops", json.dumps({**PROMPT, "stop": ["a"] * 100_000}).encode()
    yield "a stop of a megabyte", json.dumps({**PROMPT, "stop": ["a" * 1_000_000]}).encode()
    yield "a data URL with half a surrogate pair", json.dumps({"prompt": "a", "image": "data:;base64,\ud800"}).encode()


def _chat(messages: list) -> bytes:
    return json.dumps({"messages": messages, "max_tokens": 1}).encode()

"""What a conversation may look like: every key means what it says, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.images import ImageSize
from qwen3vl_moe.inputs.messages import ImageRequest, split_media

URL = "https://example.org/a.png"
READ = frozenset(("tool_calls", "name", "reasoning_content"))

DEEP: list = []
for _ in range(5000):
    DEEP = [DEEP]
CIRCLE: list = []
CIRCLE.append(CIRCLE)


def split(*content, **message):
    messages = [{"role": "user", "content": list(content), **message}]
    return split_media(messages, ("<|image_pad|>",), READ)


class TestItems:
    @pytest.mark.parametrize(
        ("item", "source"),
        [
            ({"type": "image", "image": URL}, URL),
            ({"type": "image", "url": URL}, URL),
            ({"type": "image", "path": "a.png"}, Path("a.png")),
            ({"type": "image", "base64": "iVBOR"}, "data:;base64,iVBOR"),
            ({"type": "image", "base64": "DATA:image/png;base64,iVBOR"}, "DATA:image/png;base64,iVBOR"),
            ({"type": "image", "image_url": URL}, URL),
            ({"type": "image_url", "image_url": URL}, URL),
            ({"type": "image_url", "image_url": {"url": URL}}, URL),
            ({"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}, URL),
            ({"type": "image_url", "image_url": {"url": URL, "detail": None}, "max_pixels": None}, URL),
            ({"type": "input_image", "image_url": URL, "detail": "high"}, URL),
            ({"image": URL}, URL),
            ({"type": None, "image_url": {"url": URL}, "text": None}, URL),
        ],
    )
    def test_forms_of_an_image(self, item, source):
        [message], images = split(item)
        assert message == {"role": "user", "content": [{"type": "image"}]}
        assert images == [ImageRequest(source, None)]

    @pytest.mark.parametrize("kind", ["text", "input_text", "output_text", None])
    def test_forms_of_a_text(self, kind):
        [message], images = split({"type": kind, "text": "Hello", "image": None, "image_url": None})
        assert (message["content"], images) == ([{"type": "text", "text": "Hello"}], [])

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            (
                {"type": "text", "text": "a", "image": URL},
                "content[0] is a text and has the key 'image'; text is understood",
            ),
            ({"type": "text", "text": "a", "image_url": {"url": URL}}, "is a text and has the key 'image_url'"),
            ({"type": "text", "text": "a", "images": [URL]}, "is a text and has the key 'images'"),
            ({"type": "input_text", "text": "a", "video": URL}, "is a text and has the key 'video'"),
            ({"type": "image", "image": URL, "text": "a"}, "has the key 'text'; image, "),
            ({"type": "image", "image": URL, "max_pixel": 9}, "has the key 'max_pixel'; "),
            ({"type": "image", "image": URL, "video": URL}, "has the key 'video'; "),
            ({"type": "image", "file_id": "f"}, "has the key 'file_id'; "),
            ({"type": "image", "source": {"type": "base64", "data": "iVBOR"}}, "has the key 'source'; image, "),
            ({"type": "image_url", "image": URL}, "has the key 'image'; image_url, "),
            ({"type": "image_url", "url": URL}, "has the key 'url'; image_url, "),
            ({"type": "image_url", "image_url": {"uri": URL}}, "content[0].image_url has the key 'uri'; url, "),
            ({"type": "image_url", "image_url": {"url": URL, "uuid": "x"}}, ".image_url has the key 'uuid'; url, "),
            ({"type": "image_url", "image_url": {"url": None}}, "has no URL"),
            ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, "has the detail 'low'; auto and high"),
            ({"type": "input_image", "image_url": URL, "detail": ["auto"]}, "has the detail ['auto']"),
            ({"type": "input_image", "file_id": "f"}, "has the key 'file_id'; image_url, "),
            ({"type": "image", "image": URL, "url": URL}, "gives image and url; one of"),
            ({"type": "image", "image": None}, "gives no image; one of"),
            ({"type": "input_audio", "input_audio": {"data": ""}}, "is audio; the model takes text, images and videos"),
            ({"type": "file", "file": {"file_id": "f"}}, "is a file; give its text"),
            (
                {"type": "tool_result", "content": "x"},
                "has the type 'tool_result'; text, image, image_url, video",
            ),
            ({"type": 3, "text": "x"}, "has no type"),
            ({"text": "x", "image": URL}, "has no type"),
            ({"image": URL, "video": URL}, "has no type"),
            ([URL], "is ['https://ex"),
        ],
    )
    def test_refused_by_name(self, item, message):
        with pytest.raises(PromptError) as caught:
            split(item)
        assert str(caught.value).startswith("messages[0].content[0]")
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        "item",
        [
            {"type": "image", "image": URL, "max_pixels": 16384, "min_pixels": None},
            {"type": "image_url", "image_url": {"url": URL}, "max_pixels": 16384},
            {"type": "image_url", "image_url": {"url": URL, "max_pixels": 16384}},
            {"type": "image_url", "image_url": URL, "max_pixels": 16384},
            {"type": "input_image", "image_url": URL, "max_pixels": 16384, "resized_height": None},
            {"image": URL, "max_pixels": 16384},
        ],
    )
    def test_size_beside_and_inside(self, item):
        assert split(item)[1] == [ImageRequest(URL, ImageSize(max_pixels=16384))]

    @pytest.mark.parametrize("key", ["min_pixels", "max_pixels", "resized_height", "resized_width"])
    @pytest.mark.parametrize("value", ["16384", 0, -1, True, 1.5, float("nan"), [16384], 2**40 + 1, 10**400])
    def test_size_that_is_no_number_of_pixels(self, key, value):
        for item in ({"type": "image", "image": URL, key: value}, {"type": "image_url", "image_url": {key: value}}):
            if item["type"] == "image_url":
                item["image_url"]["url"] = URL
            with pytest.raises(PromptError, match=rf"content\[0\] has {key} .*; a positive whole number of pixels"):
                split(item)

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            ({"type": "image", "image": URL, "resized_height": 64}, "gives resized_height alone"),
            ({"type": "image", "image": URL, "resized_width": 64, "resized_height": None}, "gives resized_width alone"),
            (
                {"type": "image_url", "image_url": {"url": URL, "max_pixels": 9}, "max_pixels": 9},
                "gives 'max_pixels' twice: beside image_url and in it",
            ),
        ],
    )
    def test_sizes_that_contradict(self, item, message):
        with pytest.raises(PromptError, match=message):
            split(item)


class TestMessages:
    @pytest.mark.parametrize("key", ["images", "image", "image_url", "image_urls", "video", "audio", "file", "file_id"])
    def test_media_beside_the_content(self, key):
        # Ollama's form, and its relatives: refused even where a template reads such a name
        messages = [{"role": "user", "content": "What is this?", key: [URL]}]
        with pytest.raises(PromptError, match=rf"messages\[0\] has the key '{key}': images and videos are items"):
            split_media(messages, (), {*READ, key})

    def test_keys_that_the_template_reads(self):
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, None, True]}}}
        messages = [{"role": "assistant", "content": None, "tool_calls": [call], "name": "a", "reasoning": "hm"}]
        [plain], _ = split_media(messages, (), READ)
        assert plain == {
            "role": "assistant",
            "content": "",
            "tool_calls": [call],
            "name": "a",
            "reasoning_content": "hm",
        }
        plain["tool_calls"][0]["function"]["name"] = "g"
        assert call["function"]["name"] == "f"  # a template works on a copy

    @pytest.mark.parametrize("key", ["tool_call_id", "refusal", "annotations", "weight", "cache_control", "id"])
    def test_keys_that_it_does_not_read(self, key):
        for empty in (None, "", [], {}, ()):
            assert split({"type": "text", "text": "a"}, **{key: empty})[0][0].keys() == {"role", "content"}
        with pytest.raises(PromptError, match=rf"messages\[0\] has the key '{key}', which the chat template does not"):
            split({"type": "text", "text": "a"}, **{key: "x"})

    @pytest.mark.parametrize(
        ("message", "error"),
        [
            ({"content": None}, "has content of type NoneType"),
            ({"content": None, "tool_calls": []}, "has content of type NoneType"),
            ({"content": "a", "tool_calls": [object()]}, "messages[0].tool_calls[0] is of type object"),
            ({"content": "a", "tool_calls": DEEP}, "tool_calls[0][0]"),
            ({"content": "a", "tool_calls": CIRCLE}, "is nested more than 50 deep"),
            ({"content": "a", "name": {1, 2}}, "messages[0].name is of type set"),
            ({"content": "a", "tool_calls": [{"x": "<|image_pad|>"}]}, "tool_calls[0].x: the text holds the token"),
        ],
    )
    def test_refused(self, message, error):
        with pytest.raises(PromptError) as caught:
            split_media([{"role": "assistant", **message}], ("<|image_pad|>",), READ)
        assert error in str(caught.value)

    def test_values_whose_text_fails(self):
        class Broken:
            def __repr__(self):
                raise RuntimeError

        for value in (Broken(), DEEP, CIRCLE, "x" * 10**6):
            with pytest.raises(PromptError) as caught:
                split_media([{"role": value, "content": "x"}], ())
            assert len(str(caught.value)) < 300

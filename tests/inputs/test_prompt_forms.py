"""Prompts as dicts: keys that mean what they say, null as not given, and lengths that are refused before they cost."""

from __future__ import annotations

import base64
import random
import time

import pytest
import torch
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.processor import Processor
from qwen3vl_moe.inputs.tokenizer import begins_too_long, bytes_per_token, encode
from tests.inputs.parts import PLACEHOLDER, VOCAB_SIZE, make, picture, png, user


def limited(processor: Processor, max_model_len: int, tokenizer=None) -> Processor:
    return Processor(
        tokenizer or processor.tokenizer,
        processor.chat_template,
        processor.image_settings,
        processor.config,
        max_model_len=max_model_len,
    )


class TestKeys:
    @pytest.mark.parametrize(
        "prompt",
        [
            {"prompt": "ab", "prompt_token_ids": None, "images": None, "multi_modal_data": None},
            {"prompt": "ab", "multi_modal_data": {"image": None, "video": None}, "mm_processor_kwargs": None},
            {"prompt": "ab", "mm_processor_kwargs": {"max_pixels": None, "size": None, "do_resize": None}},
            {"prompt": "ab", "text_token_ids": None, "multi_modal_uuids": None},
        ],
    )
    def test_null_is_not_given(self, processor, prompt):
        assert processor.prompt(prompt).token_ids == processor.prompt("ab").token_ids

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ({"prompt": "a", "multi_modal_uuids": {"image": ["x"]}}, "'multi_modal_uuids': images are told apart by"),
            ({"prompt": "a", "prompt_embeds": [1]}, "'prompt_embeds': give text or token ids"),
            ({"prompt": "a", "cache_salt": "x"}, "'cache_salt': the prefix cache is not divided"),
            ({"prompt": "a", "image": "x"}, "the prompt has the key 'image'; prompt, prompt_token_ids, text_token_ids"),
            ({"prompt": None}, "the prompt gives nothing"),
            ({"prompt": [1, 2]}, "the prompt's text is of type list; token ids go into prompt_token_ids"),
            ({"prompt_token_ids": "ab"}, "prompt_token_ids is a text; text goes into prompt"),
            ({"text_token_ids": "ab"}, "a prompt of type str is not understood"),
            ({"text_token_ids": []}, "the prompt is empty"),
            ({"text_token_ids": [VOCAB_SIZE]}, "is outside the vocabulary"),
            ({"text_token_ids": [1.0]}, "number 0 is a float"),
            ({"prompt": "a", "mm_processor_kwargs": []}, "mm_processor_kwargs is a list"),
            (
                {"prompt": "a", "mm_processor_kwargs": {"do_resize": False}},
                "mm_processor_kwargs holds 'do_resize'; min",
            ),
            ({"prompt": "a", "mm_processor_kwargs": {"fps": 1}}, "mm_processor_kwargs holds 'fps'"),
            (
                {"prompt": "a", "mm_processor_kwargs": {"size": {"height": 1}}},
                "size holds shortest_edge and longest_edge",
            ),
            ({"prompt": "a", "mm_processor_kwargs": {"max_pixels": "9"}}, "mm_processor_kwargs: max_pixels is '9'"),
            ({"prompt": "a", "mm_processor_kwargs": {"max_pixels": 63}}, "mm_processor_kwargs: max_pixels=63 is less"),
            (
                {"prompt": "a", "mm_processor_kwargs": {"min_pixels": 6401}},
                "min_pixels=6401 is more than max_pixels=6400",
            ),
        ],
    )
    def test_refused(self, processor, prompt, message):
        with pytest.raises(PromptError) as caught:
            processor.prompt(prompt)
        assert message in str(caught.value)


class TestBoundsOfOnePrompt:
    @pytest.mark.parametrize(
        ("options", "bounds"),
        [
            ({"max_pixels": 640}, (None, 640)),
            ({"min_pixels": 4096}, (4096, None)),
            ({"size": {"longest_edge": 640}}, (None, 640)),
            ({"size": {"shortest_edge": 100, "longest_edge": 1280}, "max_pixels": 640}, (100, 640)),
        ],
    )
    def test_as_the_processor_with_these_bounds(self, processor, options, bounds):
        image = picture(50, 40)
        prompt = {"prompt": PLACEHOLDER, "multi_modal_data": {"image": image}}
        [bounded] = processor.prompt({**prompt, "mm_processor_kwargs": options}).images
        expected = processor.image_settings.with_bounds(*bounds).resize(image)
        assert bounded.digest == expected.digest
        assert bounded.digest != processor.prompt(prompt).images[0].digest

    def test_images_of_one_conversation_have_their_own_sizes(self, processor):
        image, small = picture(80, 80), {"max_pixels": 640}
        content = [{"type": "image", "image": image}, {"type": "image", "image": image, **small}]
        prompt = processor.chat([{"role": "user", "content": content}])
        assert [each.num_tokens for each in prompt.images] == [100, 9]
        alone = [processor.chat([{"role": "user", "content": [item]}]).images[0] for item in content]
        assert [each.digest for each in prompt.images] == [each.digest for each in alone]
        assert torch.equal(prompt.images[1].pixel_values, alone[1].pixel_values)

    @pytest.mark.parametrize(("keys", "tokens"), [({"max_pixels": 16384}, 12), ({}, 300), ({"max_pixels": None}, 300)])
    def test_published(self, published, keys, tokens):
        url = "data:image/png;base64," + base64.b64encode(png(picture(640, 480))).decode()
        for item in (
            {"type": "image_url", "image_url": {"url": url}, **keys},
            {"type": "image_url", "image_url": {"url": url, **keys}},
            {"type": "image", "image": picture(640, 480), **keys},
        ):
            assert published.chat([{"role": "user", "content": [item]}]).images[0].num_tokens == tokens


class TestTooLong:
    def test_text_is_refused_before_it_is_cut_into_tokens(self, processor, monkeypatch):
        most = bytes_per_token(processor.tokenizer)
        assert most == max(len(token.encode()) for token in processor.tokenizer.get_vocab())  # a special one's
        short, cut = limited(processor, 30), []
        monkeypatch.setattr("qwen3vl_moe.inputs.processor.encode", lambda *_: cut.append(1) or [1])
        for text in ("a" * (30 * most + 1), "é" * (15 * most + 1), "a" * 10**7):
            with pytest.raises(
                PromptError, match=rf"^the prompt has {len(text)} characters, which are more tokens than "
            ):
                short.prompt(text)
            with pytest.raises(
                PromptError, match=r"more tokens than max_model_len=30; shorten it or raise max_model_len"
            ):
                short.chat(user(text))
        assert not cut
        short.prompt("a" * (30 * most))
        assert cut

    def test_never_what_would_fit(self, processor):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=processor.tokenizer.backend_tokenizer)
        longest = "x" * 100
        tokenizer.add_tokens([longest])
        assert len(limited(processor, 50, tokenizer).prompt(longest * 50).token_ids) == 50

    def test_normalising_shortens(self, processor, directory):
        # Three Hangul letters of 3 bytes become one: what counts is what the vocabulary sees.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        tokenizer.backend_tokenizer.add_tokens([AddedToken("\uac01" * 40, normalized=True)])
        assert bytes_per_token(tokenizer) == 120
        short, letters = limited(processor, 50, tokenizer), "\u1100\u1161\u11a8" * 40
        assert len(short.prompt(letters * 50).token_ids) == 50
        with pytest.raises(PromptError, match="more tokens than max_model_len=50"):
            short.prompt(letters * 50 + "\u1100")

    @pytest.mark.parametrize("fixture", ["processor", "published"])
    def test_a_beginning_tells_the_truth(self, fixture, request, monkeypatch):
        # Whatever it says of a beginning, the whole text has at least that many tokens; and it says so of plain text.
        tokenizer = request.getfixturevalue(fixture).tokenizer
        for text in ("word " * 9000, "12 " * 9000, "<|im_end|>" * 9000):
            assert begins_too_long(tokenizer, text, 1000)
        monkeypatch.setattr("qwen3vl_moe.inputs.tokenizer._SUSPICIOUS", 0.3)  # many cuts of each text
        pieces = ["word ", "e\u0301", "<|im_end|>", "\n", " ", "12", "世界", "\u1100\u1161\u11a8", "!!", "a" * 99]
        draw, found = random.Random(1), 0
        for _ in range(20):
            text = "".join(draw.choices(pieces, k=600)) + "<|im_end|>"
            count = len(encode(tokenizer, text))
            assert not begins_too_long(tokenizer, text, count)
            found += begins_too_long(tokenizer, text, count // 3)
        assert found
        assert not begins_too_long(tokenizer, "a" * 9000, 1000)  # of one word nothing is known before its end

    def test_long_tokens_do_not_hide_long_texts(self, processor, directory, monkeypatch):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        tokenizer.add_tokens(["x" * 10**5])
        lengths = []
        monkeypatch.setattr("qwen3vl_moe.inputs.processor.encode", lambda _, text: lengths.append(len(text)) or [1])
        with pytest.raises(PromptError, match="the prompt has 500000 characters, which are more tokens than max_model"):
            limited(processor, 1000, tokenizer).prompt("word " * 10**5)
        assert not lengths

    def test_a_tokenizer_without_such_a_bound(self, processor, directory):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        tokenizer.backend_tokenizer.add_tokens([AddedToken("<gap>", lstrip=True)])
        assert bytes_per_token(tokenizer) is None
        assert len(limited(processor, 5, tokenizer).prompt(" " * 9999 + "<gap>").token_ids) == 1

    @pytest.mark.parametrize("key", [None, "prompt_token_ids", "text_token_ids"])
    def test_ids_are_counted_before_they_are_looked_at(self, processor, key):
        short, ids = limited(processor, 20), [*[1] * 20, "not looked at"]
        with pytest.raises(PromptError, match="the prompt has 21 tokens, more than max_model_len=20; shorten it"):
            short.prompt(ids if key is None else {key: ids})

    def test_ids_of_both_kinds_are_counted_together(self, processor):
        with pytest.raises(PromptError, match="the prompt has 21 tokens, more than max_model_len=20"):
            limited(processor, 20).prompt({"prompt_token_ids": [1] * 11, "text_token_ids": [1] * 10})

    @pytest.mark.parametrize(
        ("count", "item", "message"),
        [
            (20, {}, "at least 61 tokens, .*: 41 of text and at least 20 of 20 image"),
            (
                4,
                {"resized_height": 32, "resized_width": 40},
                "at least 89 tokens, .*: 9 of text and at least 80 of 4 image",
            ),
            (4, {"min_pixels": 1024}, "at least 73 tokens, .*: 9 of text and at least 64 of 4 image"),
        ],
    )
    def test_images_are_counted_before_one_is_fetched(self, tmp_path, monkeypatch, count, item, message):
        short = make(tmp_path, max_model_len=60)
        monkeypatch.setattr("qwen3vl_moe.inputs.media.open_image", lambda *_: pytest.fail("an image was fetched"))
        content = [{"type": "image", "image": "no.png", **item}] * count
        template = "{% for item in messages[0].content %}<|vision_start|><|image_pad|><|vision_end|>{% endfor %}x"
        short = Processor(short.tokenizer, template, short.image_settings, short.config, max_model_len=60)
        with pytest.raises(PromptError, match=message + r".*; give fewer images or raise max_model_len"):
            short.chat([{"role": "user", "content": content}])

    def test_many_placeholders_cost_little(self, processor):
        config, started = processor.config, time.thread_time()
        one = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
        with pytest.raises(PromptError, match=r"the <.vision_start.> at token 60000 is not followed"):
            processor.prompt(one * 20000 + one[:1])
        assert time.thread_time() - started < 2

    def test_ten_megabytes_cost_little(self, processor):
        short = limited(processor, 4096)
        started = time.thread_time()
        for text in ("a" * 10**7, "word " * 2 * 10**6, "\ud83d" * 10**7):
            with pytest.raises(PromptError, match="more tokens than max_model_len=4096"):
                short.prompt(text)
        assert time.thread_time() - started < 2  # seconds of this thread on a core; cutting them takes 14 each

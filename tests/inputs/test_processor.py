"""Chat template, placeholders, token expansion, positions and errors of the processor, against transformers."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen3vl_moe.errors import CheckpointError, OptionError, PromptError
from qwen3vl_moe.inputs.processor import Processor
from tests.inputs.parts import CONVERSATIONS, PLACEHOLDER, VOCAB_SIZE, make, oracle_for, picture, png, user


@pytest.fixture(params=["tiny", "published"])
def either(request) -> Processor:
    """The tiny processor, and (where the shared folder is) the published tokenizer and template."""
    return request.getfixturevalue("processor" if request.param == "tiny" else "published")


class TestChat:
    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_golden_text(self, either, name):
        messages, expected = CONVERSATIONS[name]
        assert either.apply_chat_template(messages) == expected
        assert either.chat(messages).text == expected
        without = either.apply_chat_template(messages, add_generation_prompt=False)
        assert without == expected.removesuffix("<|im_start|>assistant\n")

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_equal_to_transformers(self, either, name):
        messages, _ = CONVERSATIONS[name]
        prompt = either.chat(messages)
        expected = oracle_for(either).apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert prompt.token_ids == expected["input_ids"][0].tolist()
        if "pixel_values" not in expected:
            assert prompt.images == ()
            return
        assert [image.grid_thw for image in prompt.images] == [tuple(g) for g in expected["image_grid_thw"].tolist()]
        pixel_values = torch.cat([image.pixel_values for image in prompt.images])
        assert pixel_values.dtype == torch.float32
        assert torch.equal(pixel_values, expected["pixel_values"])

    def test_expansion(self, processor):
        prompt = processor.chat(CONVERSATIONS["several turns"][0])
        pad = processor.config.image_token_id
        for image in prompt.images:
            stop = image.start + image.num_tokens
            assert image.num_tokens == torch.tensor(image.grid_thw).prod().item() // 4
            assert image.pixel_values.shape == (image.num_tokens * 4, processor.config.vision.patch_dim)
            assert set(prompt.token_ids[image.start : stop]) == {pad}
            assert prompt.token_ids[image.start - 1] == processor.config.vision_start_token_id
            assert prompt.token_ids[stop] == processor.config.vision_end_token_id
        assert prompt.token_ids.count(pad) == sum(image.num_tokens for image in prompt.images)

    def test_every_item_form(self, processor, tmp_path):
        image = picture(30, 22)
        path = tmp_path / "a.png"
        path.write_bytes(png(image))
        data = base64.b64encode(png(image)).decode()
        expected = processor.chat(user(image, "hi"))
        items = [
            {"type": "image", "image": png(image)},
            {"type": "image", "image": str(path)},
            {"type": "image", "path": str(path)},
            {"type": "image", "path": path},
            {"type": "image", "url": path.as_uri()},
            {"type": "image", "base64": data},
            {"type": "image", "image": f"data:image/png;base64,{data}"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", "detail": "high"}},
            {"type": "image_url", "image_url": str(path)},
        ]
        for item in items:
            prompt = processor.chat([{"role": "user", "content": [item, {"type": "text", "text": "hi"}]}])
            assert prompt.token_ids == expected.token_ids
            assert torch.equal(prompt.images[0].pixel_values, expected.images[0].pixel_values)

    def test_a_file_is_known_by_its_bytes(self, processor, tmp_path):
        """Of whatever kind the source is; what changes the pixels makes another picture, and so do other bytes."""
        image = picture(60, 44)
        image.putalpha(128)
        data, path = png(image), tmp_path / "a.png"
        path.write_bytes(data)

        def digest(source, by: Processor = processor, **size) -> bytes:
            item = {"type": "image", "image": source, **size}
            return by.chat([{"role": "user", "content": [item]}]).images[0].digest

        text = base64.b64encode(data).decode()
        same = [
            digest(source) for source in (data, bytearray(data), path, path.as_uri(), f"data:image/png;base64,{text}")
        ]
        assert len(set(same)) == 1
        assert digest(data, max_pixels=6000) == same[0]  # bounds that change nothing
        buffer = BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        others = [
            digest(buffer.getvalue()),
            digest(data, max_pixels=1000),
            digest(data, resized_height=44, resized_width=90),
            digest(data, make(tmp_path / "drop", alpha="drop")),
            digest(image),
        ]
        assert len({same[0], *others}) == 6
        assert digest(image.copy()) == others[-1]

    def test_resized_on_the_device(self, processor, tmp_path):
        later = make(tmp_path, resize_on_device=True)
        messages = user(picture(30, 22), png(picture(61, 23)), picture(300, 200), "hi")
        ours, expected = later.chat(messages), processor.chat(messages)
        assert [image.picture.resized for image in ours.images] == [False, False, True]  # the last one shrinks a lot
        for image, same in zip(ours.images, expected.images, strict=True):
            assert (image.start, image.num_tokens, image.grid_thw) == (same.start, same.num_tokens, same.grid_thw)
            assert torch.equal(image.pixel_values, same.pixel_values)

    def test_rotated_image(self, processor):
        # The count of tokens comes from the header, the grid from the upright picture.
        image, buffer = picture(40, 16), BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(buffer, "PNG", exif=exif)
        prompt = processor.chat(user(buffer.getvalue(), "hi"))
        assert prompt.images[0].grid_thw == (1, 10, 4)
        upright = image.transpose(Image.Transpose.ROTATE_270)
        assert torch.equal(prompt.images[0].pixel_values, processor.chat(user(upright)).images[0].pixel_values)

    def test_header_that_lies_about_the_size(self, processor, monkeypatch):
        monkeypatch.setattr("qwen3vl_moe.inputs.image_source.decode_rgb", lambda *_: picture(80, 80))
        with pytest.raises(PromptError, match=r"image 0 .* its header gives: it decodes to 80x80"):
            processor.chat(user(picture(8, 8)))

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "the conversation is empty"),
            ("Hello", "a conversation is a str"),
            ({"role": "user", "content": "x"}, "a conversation is a dict"),
            (None, "a conversation is a NoneType"),
            (["Hello"], "messages[0] is a str"),
            ([[{"role": "user", "content": "x"}]], "messages[0] is a list"),
            ([{"content": "x"}], "messages[0] has the role None; known are system, user, assistant, tool"),
            ([{"role": "User", "content": "x"}], "messages[0] has the role 'User'"),
            ([{"role": "user"}], "messages[0] has content of type NoneType"),
            ([{"role": "user", "content": 3}], "messages[0] has content of type int"),
            ([{"role": "user", "content": ["x"]}], "messages[0].content[0] is 'x'"),
            ([{"role": "user", "content": [{"text": "x", "image": "a"}]}], "messages[0].content[0] has no type"),
            ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0] has text of type NoneType"),
            ([{"role": "user", "content": [{"type": "audio"}]}], "messages[0].content[0] is audio; the model"),
            (
                [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "video", "image": "a.mp4"}]}],
                "messages[1].content[0] has the key 'image'; video, video_url, url, path, base64",
            ),
            ([{"role": "user", "content": [{"type": "image"}]}], "messages[0].content[0] gives no image"),
            (
                [{"role": "user", "content": [{"type": "image", "url": "a", "path": "b"}]}],
                "messages[0].content[0] gives url and path",
            ),
            (
                [{"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixel": 5}]}],
                "messages[0].content[0] has the key 'max_pixel'; image, ",
            ),
            ([{"role": "user", "content": [{"type": "image", "path": b"a"}]}], "'path' of type bytes"),
            ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "content[0] has no URL"),
            (user("hi", picture(8, 8), "no.png") + user("x", "y") + user(Path("no.png")), "image 1 ('no.png')"),
        ],
    )
    def test_malformed(self, processor, messages, message):
        with pytest.raises(PromptError) as caught:
            processor.chat(messages)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    @pytest.mark.parametrize("form", [lambda text: text, lambda text: [{"type": "text", "text": text}]])
    def test_smuggled_vision_tokens(self, processor, token, form):
        # A placeholder in text would take the image that was meant for a later one.
        messages = [{"role": "user", "content": form(f"a{token}b")}, *user(picture(8, 8))]
        with pytest.raises(PromptError, match=r"messages\[0\].*the text holds the token"):
            processor.chat(messages)

    def test_template_that_drops_an_image(self, processor):
        template = processor.chat_template.replace("'<|vision_start|><|image_pad|><|vision_end|>'", "''")
        broken = Processor(processor.tokenizer, template, processor.image_settings, processor.config)
        with pytest.raises(PromptError, match=r"0 image placeholders .* for 1 images"):
            broken.chat(user(picture(8, 8)))

    def test_template_that_refuses(self, processor):
        template = "{{ raise_exception('roles must alternate') }}"
        strict = Processor(processor.tokenizer, template, processor.image_settings, processor.config)
        with pytest.raises(PromptError, match="the chat template refuses the conversation: roles must alternate"):
            strict.chat(user("hi"))

    @pytest.mark.parametrize(
        ("template", "error", "message"),
        [
            ("{% if %}", CheckpointError, "the checkpoint's chat template is damaged, line 1"),
            ("{{ messages[0].content + 1 }}", PromptError, "the chat template refuses the conversation"),
        ],
    )
    def test_template_that_fails(self, processor, template, error, message):
        broken = Processor(processor.tokenizer, template, processor.image_settings, processor.config)
        with pytest.raises(error, match=message):
            broken.chat(user("hi"))


class TestPrompt:
    def test_text(self, processor):
        prompt = processor.prompt("What is the colour?")
        assert prompt.token_ids == processor.tokenizer("What is the colour?").input_ids
        assert prompt.text == "What is the colour?"
        assert prompt.images == ()
        assert torch.equal(prompt.positions_3T, torch.arange(len(prompt.token_ids)).expand(3, -1))
        assert prompt.next_position == len(prompt.token_ids)

    def test_every_form_of_one_prompt(self, processor):
        images = [picture(40, 20), picture(9, 33)]
        messages = user("a", images[0], images[1], "b")
        expected = processor.chat(messages)
        short = processor.tokenizer(expected.text).input_ids
        prompts = [
            {"prompt": expected.text, "multi_modal_data": {"image": images}},
            {"prompt_token_ids": short, "multi_modal_data": {"image": tuple(images)}},
            # as an earlier answer reports them, with every image token written out
            {"prompt_token_ids": expected.token_ids, "multi_modal_data": {"image": images}},
        ]
        for form in prompts:
            prompt = processor.prompt(form)
            assert prompt.token_ids == expected.token_ids
            assert torch.equal(prompt.positions_3T, expected.positions_3T)
            assert [i.start for i in prompt.images] == [i.start for i in expected.images]
            for ours, theirs in zip(prompt.images, expected.images, strict=True):
                assert torch.equal(ours.pixel_values, theirs.pixel_values)
        assert processor.prompt(prompts[0]).text == expected.text
        assert processor.prompt(prompts[1]).text is None

    def test_one_image_needs_no_list(self, processor):
        prompt = processor.prompt({"prompt": f"{PLACEHOLDER}!", "multi_modal_data": {"image": png(picture(8, 8))}})
        assert [image.num_tokens for image in prompt.images] == [1]

    def test_token_ids(self, processor):
        assert processor.prompt([1, 2, VOCAB_SIZE - 1]).token_ids == [1, 2, VOCAB_SIZE - 1]
        assert processor.prompt({"prompt_token_ids": (5,)}).token_ids == [5]
        assert processor.prompt({"prompt": "a", "multi_modal_data": {}}).images == ()
        assert processor.prompt({"prompt": "a", "multi_modal_data": {"image": None}}).images == ()

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "the prompt is empty"),
            ("half \ud83d", "the text is not valid Unicode"),
            ([], "the prompt is empty"),
            ({"prompt": ""}, "the prompt is empty"),
            ([VOCAB_SIZE], f"token id {VOCAB_SIZE} at index 0 is outside the vocabulary of {VOCAB_SIZE}"),
            ([3, -1], "token id -1 at index 1"),
            ([3, True], "number 1 is a bool"),
            (["a"], "number 0 is a str"),
            (np.array([1, 2]), "a prompt of type ndarray is not understood"),
            (None, "a prompt of type NoneType"),
            (7, "a prompt of type int"),
            (b"abc", "a prompt of type bytes"),
            ({}, "the prompt gives nothing"),
            ({"prompt": "a", "prompt_token_ids": [1]}, "the prompt gives prompt and prompt_token_ids"),
            ({"prompt": "a", "images": []}, "the prompt has the key 'images'"),
            ({"prompt": "a", "multi_modal_data": []}, "multi_modal_data is a list"),
            ({"prompt": "a", "multi_modal_data": {"video": ["a.mp4"]}}, "0 video placeholders"),
            ({"prompt": "a", "multi_modal_data": {"audio": []}}, "holds 'audio'; only 'image' and 'video' are"),
            (PLACEHOLDER, "1 image placeholders"),
            ({"prompt": PLACEHOLDER * 2, "multi_modal_data": {"image": picture(8, 8)}}, "2 image placeholders"),
            ({"prompt": "a", "multi_modal_data": {"image": picture(8, 8)}}, "0 image placeholders"),
            ("a <|image_pad|> b", "the <|image_pad|> at token"),
            ("<|image_pad|>", "the <|image_pad|> at token 0"),
            ("<|vision_start|><|image_pad|>", "the <|image_pad|> at token 1"),
            ("<|image_pad|><|vision_end|>", "the <|image_pad|> at token 0"),
            ("<|vision_start|>", "the <|vision_start|> at token 0 is not followed by <|image_pad|>"),
            ("a<|vision_start|><|vision_end|>", "the <|vision_start|> at token 1 is not followed"),
            ("<|vision_start|><|video_pad|><|vision_end|>", "1 video placeholders"),
            (
                {
                    "prompt": "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>",
                    "multi_modal_data": {"image": picture(24, 8)},
                },
                "image 0 (PIL RGB 24x8) has 2 <|image_pad|> tokens in the prompt; write one, or as many",
            ),
            ({"prompt": PLACEHOLDER, "multi_modal_data": {"image": b"x"}}, "image 0 (1 bytes) is not an image"),
            (
                {"prompt": PLACEHOLDER * 2, "multi_modal_data": {"image": [picture(8, 8), picture(402, 2)]}},
                "image 1 (PIL RGB 402x2) is 402x2 pixels: its sides differ by a factor of 201",
            ),
        ],
    )
    def test_refused(self, processor, prompt, message):
        with pytest.raises(PromptError) as caught:
            processor.prompt(prompt)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_smuggled_tokens_in_token_ids(self, processor):
        config = processor.config
        for ids in ([5, config.image_token_id, 6], [config.vision_start_token_id], [config.video_token_id]):
            with pytest.raises(PromptError):
                processor.prompt(ids)

    def test_text_token_ids_are_text_whatever_they_spell(self, processor):
        config = processor.config
        vision = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
        spelled = [7, *vision, config.image_token_id, config.video_token_id, config.vision_start_token_id]
        alone = processor.prompt({"text_token_ids": spelled})
        assert (alone.token_ids, alone.images, alone.text) == (spelled, (), None)
        assert torch.equal(alone.positions_3T, torch.arange(len(spelled)).expand(3, -1))
        assert alone.next_position == len(spelled)
        image = {"image": picture(24, 40)}
        for head in ({"prompt": PLACEHOLDER + "a"}, {"prompt_token_ids": [*vision, 4]}):
            plain = processor.prompt({**head, "multi_modal_data": image})
            both = processor.prompt({**head, "multi_modal_data": image, "text_token_ids": tuple(spelled)})
            count = len(plain.token_ids)
            assert both.token_ids == [*plain.token_ids, *spelled]
            assert torch.equal(both.positions_3T[:, :count], plain.positions_3T)
            after = torch.arange(plain.next_position, plain.next_position + len(spelled))
            assert torch.equal(both.positions_3T[:, count:], after.expand(3, -1))
            assert both.next_position == plain.next_position + len(spelled)
            assert [i.start for i in both.images] == [i.start for i in plain.images]

    def test_many_threads(self, processor):
        messages = user("a", picture(50, 31), "b", picture(20, 64), "What do you see?")
        expected = processor.chat(messages)
        with ThreadPoolExecutor(16) as pool:
            prompts = list(pool.map(processor.chat, [messages] * 64))
        for prompt in prompts:
            assert prompt.token_ids == expected.token_ids
            for ours, theirs in zip(prompt.images, expected.images, strict=True):
                assert torch.equal(ours.pixel_values, theirs.pixel_values)


class TestLength:
    def test_boundary(self, tmp_path):
        processor = make(tmp_path, max_model_len=20)
        assert len(processor.prompt([1] * 20).token_ids) == 20
        with pytest.raises(PromptError, match="the prompt has 21 tokens, more than max_model_len=20"):
            processor.prompt([1] * 21)
        # 4 x 4 tokens and the two vision markers, with two or three tokens of text
        fitting = {"prompt": PLACEHOLDER + "Q7", "multi_modal_data": {"image": picture(32, 32)}}
        assert len(processor.prompt(fitting).token_ids) == 20
        with pytest.raises(PromptError) as caught:
            processor.prompt({**fitting, "prompt": PLACEHOLDER + "Q7#"})
        assert str(caught.value) == (
            "the prompt has 21 tokens, more than max_model_len=20: 5 of text and 16 of 1 image(s), the largest being "
            "image 0 (PIL RGB 32x32) of 32x32 pixels with 16 image tokens; lower max_pixels (now 6400) or raise "
            "max_model_len"
        )
        with pytest.raises(PromptError, match=r"shorten the text or raise max_model_len$"):
            processor.prompt({**fitting, "prompt": PLACEHOLDER + "Q7" * 20})

    def test_refused_before_decoding(self, tmp_path, monkeypatch):
        processor = make(tmp_path, max_model_len=50)
        data = png(picture(80, 80))
        monkeypatch.setattr("qwen3vl_moe.inputs.image_source.decode_rgb", lambda *_: pytest.fail("a pixel was decoded"))
        images = [png(picture(8, 8)), data[: len(data) // 2]]  # the header is whole, the pixels are not
        with pytest.raises(
            PromptError, match=r"101 of 2 image\(s\), the largest being image 1 .* with 100 image tokens"
        ):
            processor.prompt({"prompt": PLACEHOLDER * 2, "multi_modal_data": {"image": images}})

    def test_max_pixels_makes_it_fit(self, tmp_path):
        processor = make(tmp_path, max_model_len=50, max_pixels=640)
        prompt = processor.chat(user(picture(80, 80), "a"))
        assert prompt.images[0].num_tokens == 9
        with pytest.raises(OptionError, match="max_pixels=63"):
            make(tmp_path, max_pixels=63)


class TestPositions:
    @pytest.mark.parametrize(
        "sizes", [(), ((8, 8),), ((80, 8), (8, 80)), ((64, 40), (40, 64), (56, 24))], ids=lambda sizes: f"{len(sizes)}"
    )
    def test_equal_to_transformers(self, processor, sizes):
        from transformers import Qwen3VLMoeConfig
        from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel

        with torch.device("meta"):
            model = Qwen3VLMoeModel(Qwen3VLMoeConfig(vision_config={"depth": 1}, text_config={"num_hidden_layers": 1}))
        content = ["Look"]
        for number, size in enumerate(sizes):
            content += [picture(*size), f"number {number}"]
        prompt = processor.chat(user(*content))
        ids = torch.tensor([prompt.token_ids])
        positions, delta = model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == processor.config.image_token_id).int(),
            image_grid_thw=torch.tensor([image.grid_thw for image in prompt.images]),
        )
        assert torch.equal(prompt.positions_3T, positions[:, 0])
        assert prompt.next_position == len(prompt.token_ids) + delta.item()

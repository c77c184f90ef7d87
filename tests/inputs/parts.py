"""A tiny processor, transformers' own over the same files, and conversations for both."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import Qwen3VLProcessor

from benchmarking.tiny import write_processor_dir
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.inputs.processor import Processor
from tests.pictures import transformers_images

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
VOCAB_SIZE = 512


def make(directory: Path, **options) -> Processor:
    """A tiny processor of 8 x 8 pixels a token in ``directory``, and the config that fits it."""
    ids = write_processor_dir(
        directory, vocab_size=VOCAB_SIZE, patch_size=4, merge_size=2, min_pixels=64, max_pixels=6400
    )
    base = Qwen3VLMoeConfig.qwen3_vl_30b_a3b()
    config = replace(
        base,
        text=replace(base.text, vocab_size=VOCAB_SIZE),
        vision=replace(base.vision, patch_size=4),
        image_token_id=ids.image,
        video_token_id=ids.video,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
    )
    return Processor.from_pretrained(directory, config, **options)


class ImageOnlyProcessor(Qwen3VLProcessor):
    """transformers' processor without its video part, the only one that needs torchvision."""

    def check_argument_for_proper_class(self, *_):
        pass


def oracle_for(processor: Processor) -> ImageOnlyProcessor:
    images = transformers_images(processor.image_settings)
    return ImageOnlyProcessor(images, processor.tokenizer, None, chat_template=processor.chat_template)


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width + 1000 * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def user(*content) -> list[dict]:
    """One user message of strings (text) and images (anything else)."""
    items = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return [{"role": "user", "content": items}]


CONVERSATIONS = {
    "text": (
        [{"role": "user", "content": "Hello, how are you?"}],
        "<|im_start|>user\nHello, how are you?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "system and user": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    ),
    "image between text": (
        user("Look: ", picture(20, 30), " What is it?"),
        f"<|im_start|>user\nLook: {PLACEHOLDER} What is it?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "two images": (
        user(picture(20, 30), picture(41, 17), "Which is larger?"),
        f"<|im_start|>user\n{PLACEHOLDER}{PLACEHOLDER}Which is larger?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "several turns": (
        [
            {"role": "system", "content": "You are a helpful assistant."},
            *user(picture(64, 64), "What is this?"),
            {"role": "assistant", "content": "A cat."},
            *user("And this?\n", picture(7, 90)),
            {"role": "assistant", "content": [{"type": "text", "text": "A  dog. "}]},
            {"role": "user", "content": "Sure?"},
        ],
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{PLACEHOLDER}What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        f"<|im_start|>user\nAnd this?\n{PLACEHOLDER}<|im_end|>\n"
        "<|im_start|>assistant\nA  dog. <|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "not English": (
        [{"role": "user", "content": "Grüße, 世界! {{ 1 + 1 }} <b> ☕"}],
        "<|im_start|>user\nGrüße, 世界! {{ 1 + 1 }} <b> ☕<|im_end|>\n<|im_start|>assistant\n",
    ),
}

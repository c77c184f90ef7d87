"""The files of a processor, made on the spot, for tests and for models with random weights.

They are a byte-level BPE tokenizer of a few hundred tokens with Qwen's special tokens, a chat template of the Qwen
form, and the settings of the image processor, laid out as in a published checkpoint, so everything that reads one (this
package, transformers) reads them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from qwen3vl_moe.errors import OptionError

# In the order of the published vocabulary, where they follow the text tokens as here.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Merges are learned from this text, so that common words are one token and rare ones fall back to bytes.
_CORPUS = """
What do you see in this picture? Describe the image in one sentence. There is a cat on the table and a dog under the
chair. How many red squares are in the first image, and how many blue circles are in the second image? The picture
shows a large green triangle above a small yellow circle. Answer with the name of the colour and the name of the
shape. You are a helpful assistant. Hello, how are you today? The answer is the sum of the numbers that are written
on the left side.
"""

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for item in message.content -%}
            {%- if item.type in ('image', 'image_url') -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif item.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif item.type == 'text' -%}
                {{- item.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class TokenIds:
    """Ids that a config for the tiny tokenizer needs; ``size`` is how many ids the tokenizer uses, from 0."""

    endoftext: int
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image: int
    video: int
    size: int


def write_processor_dir(
    path: str | Path,
    *,
    vocab_size: int = 512,
    patch_size: int = 16,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    min_pixels: int = 4096,
    max_pixels: int = 262144,
    video_pixels: tuple[int, int] | None = None,
) -> TokenIds:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and preprocessor_config.json into ``path``.

    The result is the same on every call: nothing here is random.

    Args:
        path: directory, made if it is not there.
        vocab_size: rows of the model's embedding; every id stays below it, and (as in the published checkpoint) some
            rows may be left without a token. At least 256 bytes + 7 special tokens.
        patch_size, temporal_patch_size, merge_size: of the vision tower that the images are cut for.
        min_pixels, max_pixels: an image is resized to an area between these, in pixels.
        video_pixels: bounds of all frames of a video together; None: those of an image, as in transformers.

    Raises:
        OptionError: ``vocab_size`` has no room for the bytes and the special tokens.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer(vocab_size)
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 262144,
            "clean_up_tokenization_spaces": False,
        },
    )
    (path / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    settings = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": patch_size,
        "temporal_patch_size": temporal_patch_size,
        "merge_size": merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    _write_json(path / "preprocessor_config.json", settings)
    if video_pixels is not None:
        size = {"shortest_edge": video_pixels[0], "longest_edge": video_pixels[1]}
        kind = {"video_processor_type": "Qwen3VLVideoProcessor", "size": size}
        del settings["image_processor_type"]
        _write_json(path / "video_preprocessor_config.json", settings | kind)
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    return TokenIds(*ids, size=tokenizer.get_vocab_size())


def _build_tokenizer(vocab_size: int) -> Tokenizer:
    room = vocab_size - len(SPECIAL_TOKENS)
    if room < 256:
        raise OptionError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {256 + len(SPECIAL_TOKENS)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # 160 merges make whole words of the corpus; a larger vocabulary would only memorise its sentences.
    trainer = trainers.BpeTrainer(
        vocab_size=min(room, 256 + 160), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

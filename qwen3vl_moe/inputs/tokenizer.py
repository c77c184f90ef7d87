"""A checkpoint's tokenizer: text -> token ids."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import CheckpointError, ConfigError, PromptError

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
IMAGE_PLACEHOLDER = VISION_START + IMAGE_PAD + VISION_END
VIDEO_PLACEHOLDER = VISION_START + VIDEO_PAD + VISION_END
VISION_TOKENS = (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

_SUSPICIOUS = 6  # characters a token: few texts have as many
_NEAR = 1000  # characters


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: a checkpoint directory needs its tokenizer.json")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise CheckpointError(f"{path} or its tokenizer_config.json cannot be read: {error}") from error
    # A tokenizer.json may carry the limits of its training; a prompt is never cut or padded here.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_tokens(directory: Path, tokenizer: PreTrainedTokenizerFast, config: Qwen3VLMoeConfig) -> None:
    """Raises ConfigError where the tokenizer's ids are not those of the model."""
    for token, expected in (
        (VISION_START, config.vision_start_token_id),
        (VISION_END, config.vision_end_token_id),
        (IMAGE_PAD, config.image_token_id),
        (VIDEO_PAD, config.video_token_id),
    ):
        # The vocabulary is asked: convert_tokens_to_ids would answer with the unknown token's id.
        found = tokenizer.backend_tokenizer.token_to_id(token)
        if found != expected:
            raise ConfigError(
                f"{directory}: tokenizer.json has {token} as id {found}, the model's config.json as {expected}"
            )
    # Ids may have gaps, so that the number of tokens says nothing.
    token, highest = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    if highest >= config.text.vocab_size:
        raise ConfigError(
            f"{directory}: the tokenizer has {token!r} as id {highest}, the model's vocab_size is "
            f"{config.text.vocab_size}"
        )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text, in which special tokens count as such; any number of threads may call it."""
    # Not tokenizer(text): that sets truncation and padding on the shared tokenizer, which fails when threads meet.
    try:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError:
        raise PromptError("the text is not valid Unicode: it holds half of a surrogate pair") from None


def bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The most bytes of text that one token stands for; None where that is not bounded."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder.values()
    # Without a token for every byte, any text may become a token that stands for what is unknown.
    whole = all(character in vocabulary for character in pre_tokenizers.ByteLevel.alphabet())
    if not whole or any(token.lstrip or token.rstrip for token in added):
        return None
    # A byte-level vocabulary spells each byte as one character; added tokens are spelled as they are.
    return max(*map(len, vocabulary), *(len(token.content.encode()) for token in added))


def is_longer(tokenizer: PreTrainedTokenizerFast, text: str, num_bytes: int) -> bool:
    """Whether a text has more bytes than that, in the form that is cut into tokens: normalising can shorten it."""
    if len(text.encode(errors="surrogatepass")) <= num_bytes:
        return False
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is None or len(normalizer.normalize_str(text).encode()) > num_bytes


def begins_too_long(tokenizer: PreTrainedTokenizerFast, text: str, most_tokens: int) -> bool:
    """Whether a beginning of a very long text has more tokens than that already.

    A cut changes the tokens near to it, but none of a word that ends well before: the tokenizer looks at one character
    behind a word, and for added tokens and accents at a few more. Only those are counted.
    """
    size = int(_SUSPICIOUS * most_tokens)
    while size < len(text):
        beginning = tokenizer.backend_tokenizer.encode(text[:size], add_special_tokens=False)
        ends, words = [end for _, end in beginning.offsets], beginning.word_ids
        near = bisect_right(ends, size - _NEAR)  # the first token that the cut may have changed, or words
        unchanged = near if near == len(words) else words.index(words[near])
        if unchanged > most_tokens:
            return True
        size *= 2
    return False

"""A checkpoint's tokenizer: text -> token ids."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from qwen3vl_moe.errors import CheckpointError, PromptError


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


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text, in which special tokens count as such; any number of threads may call it."""
    # Not tokenizer(text): that sets truncation and padding on the shared tokenizer, which fails when threads meet.
    try:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError:
        raise PromptError("the text is not valid Unicode: it holds half of a surrogate pair") from None

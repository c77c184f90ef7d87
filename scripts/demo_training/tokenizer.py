"""The demo's own byte-level BPE and the processor files, laid out as in a published checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarking.tiny import SPECIAL_TOKENS, write_processor_dir
from demo_training.asking import make_wide_example, wide_size
from demo_training.publish import write_json
from demo_training.questions import make_example
from demo_training.scenes import LARGEST_AREA, SMALLEST_AREA
from demo_training.texts import Problem, arithmetic_problem, chat_messages, prompt_text

# Words with their leading space, single digits (a sum is then worked digit by digit, as in Qwen's own vocabulary),
# punctuation, line breaks.
_SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def corpus(problems: Sequence[Problem], seed: int) -> Iterator[str]:
    """The texts that merges are learned from."""
    rng = Random(f"tokenizer/{seed}")
    for problem in problems:
        yield prompt_text(problem.question)
        yield problem.answer
    for number in range(1500):
        problem = arithmetic_problem(rng)
        yield prompt_text(problem.question)
        yield problem.answer
        for message in chat_messages(rng):
            yield message["content"]
        wide = make_wide_example(seed, number, size=wide_size(rng), images=1 + number % 3 // 2, turns=4)
        for question in (*make_example("train", seed, number, turns=4).questions, *wide.questions):
            yield question.text
            if not question.spelled:
                yield question.answer


def write_processor(path: str | Path, problems: Sequence[Problem], *, vocab_size: int, seed: int) -> None:
    """Tokenizer of at most ``vocab_size`` entries, chat template and image settings into ``path``, made if missing.

    The same arguments give the same files.
    """
    path = Path(path)
    write_processor_dir(path, min_pixels=SMALLEST_AREA, max_pixels=LARGEST_AREA)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(problems, seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    # The whole processor, so that transformers' AutoProcessor finds its class.
    settings = path / "preprocessor_config.json"
    content = {**json.loads(settings.read_text(encoding="utf-8")), "processor_class": "Qwen3VLProcessor"}
    write_json(settings, content)
    content.pop("image_processor_type")
    write_json(path / "video_preprocessor_config.json", {**content, "video_processor_type": "Qwen3VLVideoProcessor"})

"""How many experts does a step read? Random weights and greedy tokens collapse onto a few, which flatters a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen3vl_moe.engine.params import SamplingParams

if TYPE_CHECKING:
    from qwen3vl_moe.engine import LLM


def experts_in_next_step(llm: LLM) -> float:
    """Distinct experts per layer in the engine's next step, which is launched eagerly so that hooks see it."""
    model, counts = llm.engine.model, []
    k = model.config.text.experts_per_token

    def count(module, inputs, logits_TE) -> None:
        counts.append(len(logits_TE.topk(k, dim=-1).indices.unique()))

    hooks = [layer.moe.router.register_forward_hook(count) for layer in model.text.layers]
    llm.engine.runner.replays = False
    llm.engine.step()
    llm.engine.runner.replays = True
    for hook in hooks:
        hook.remove()
    return statistics.mean(counts)


def experts_while_decoding(llm: LLM, texts: Sequence[Sequence[int]], temperature: float) -> tuple[int, float]:
    """Continues as many of the token sequences as run at once, and counts in a step in which all of them decode.

    Returns the number of sequences and the distinct experts per layer that one such step reads; (0, 0.0) if none fits.
    """
    engine, settings = llm.engine, llm.settings
    room, block = settings["kv_cache_tokens"], engine.cache.block_size
    most = min(room, sum(len(ids) for ids in texts[: settings["max_num_seqs"]]))
    # The first go on while the last are read.
    params = SamplingParams(
        max_tokens=4 + most // settings["max_prefill_tokens"], temperature=temperature, ignore_eos=True
    )
    sequences = []
    for ids in texts[: settings["max_num_seqs"]]:
        length = len(ids) + params.max_tokens
        room -= -(-length // block) * block
        if room < 0 or length > settings["max_model_len"]:
            break
        sequences.append(engine.request(llm.processor.prompt({"text_token_ids": list(ids)}), params))
    for sequence in sequences:
        engine.add(sequence)
    touched = 0.0
    while not all(sequence.finished for sequence in sequences):
        if not touched and all(sequence.pending == 1 for sequence in sequences):
            touched = experts_in_next_step(llm)
        else:
            engine.step()
    return len(sequences), touched

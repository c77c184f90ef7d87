"""The ways of computing one set of weights that parity.py compares: our backends, transformers, and fp32."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

import beside_scripts  # noqa: F401
from benchmarking.transformers_twin import in_float32, transformers_twin
from lm import Answer, EngineLM
from qwen3vl_moe import LLM, Qwen3VLMoe, SamplingParams
from qwen3vl_moe.engine.engine import Engine
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model.batch import Batch
from qwen3vl_moe.ops.segments import Segments

_ROWS = 256  # whose logits are on the device at once: 80 MB in bf16 at the published vocabulary
OURS = ("tma", "triton", "reference")
VARIANTS = (*OURS, "transformers")
RANKED = re.compile(rf"({'|'.join(OURS)})@([1-9][0-9]*)")  # one of ours, divided among so many ranks
# What each of ours is measured by: independent implementations in the same dtype. A peer with a fault is a loose
# measure, so the kernel has to be as good as both of its peers.
PEERS = dict.fromkeys(("tma", "triton"), ("transformers", "reference")) | {"reference": ("transformers",)}


def peers_of(variant: str) -> tuple[str, ...]:
    """Of one of ours, on however many ranks."""
    return PEERS[variant.partition("@")[0]]


def variant_lm(llm: LLM, variant: str) -> EngineLM:
    """An lm-eval model that computes in one of :data:`VARIANTS`, over the weights of ``llm``, without a copy of them.

    A variant of ours gets an engine of its own: one that has captured CUDA graphs would go on replaying them.
    """
    if variant == "transformers":
        return TransformersLM(llm)
    engine = llm.engine
    if engine.model.moe != variant:
        model, defaults = engine.model, engine.defaults
        del engine
        release(llm)  # the old cache goes before the new one is sized
        model.set_moe(variant)
        llm.engine = LLM.from_parts(model, llm.processor, defaults, **vars(llm.options)).engine
    return EngineLM(llm, answer_logprobs=True)


def release(llm: LLM) -> None:
    """Give up an LLM's engine, the memory of its cache, and the processes of other ranks."""
    llm.close()
    del llm.engine
    gc.collect()
    torch.cuda.empty_cache()


class TransformersLM(EngineLM):
    """The same requests answered by transformers' ``generate``.

    Args:
        llm: its weights and tokenizer.
        batch: prompts at a time, padded on the left; 1 is a plain loop.
    """

    def __init__(self, llm: LLM, batch: int = 1):
        super().__init__(llm)
        self.twin, self.batch = transformers_twin(llm.engine.model), batch

    def _answer(self, prompts: list[Any], params: list[SamplingParams], done: Callable[[int, Answer], Any]) -> None:
        for start in range(0, len(prompts), self.batch):
            numbers = range(start, min(start + self.batch, len(prompts)))
            same = [list(each) for _, each in groupby(numbers, key=params.__getitem__)]
            for group in same:  # one call of generate has one way of sampling
                ids = [self.llm.processor.prompt(prompts[number]).token_ids for number in group]
                answers = self._generate(ids, params[group[0]])
                for number, answer in zip(group, answers, strict=True):
                    done(number, answer)

    def _generate(self, prompts: list[list[int]], each: SamplingParams) -> list[Answer]:
        tokenizer, device = self.tokenizer, self.twin.device
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ends = [*(() if each.ignore_eos else self.llm.engine.defaults.eos_token_ids), *each.stop_token_ids]
        sampling = (
            {"temperature": each.temperature, "top_p": each.top_p, "top_k": each.top_k} if each.temperature else {}
        )
        with torch.inference_mode():
            out = self.twin.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                mm_token_type_ids=torch.zeros_like(ids, dtype=torch.int32, device=device),
                max_new_tokens=min(each.max_tokens, self.max_length - longest),
                do_sample=bool(sampling),
                eos_token_id=ends or None,
                pad_token_id=tokenizer.pad_token_id,
                stop_strings=list(each.stop) or None,
                tokenizer=tokenizer,
                **sampling,
            )
        return [self._cut(prompt, out[row, longest:].tolist(), ends, each) for row, prompt in enumerate(prompts)]

    def _cut(self, prompt: list[int], new: list[int], ends: list[int], each: SamplingParams) -> Answer:
        """The answer without what the longer ones of its batch have made the batch add to it."""
        ended = [place + 1 for place, token in enumerate(new) if token in ends]
        new = new[: min(ended, default=len(new))]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        cuts = [text.index(stop) for stop in each.stop if stop in text]
        while cuts and new and new[-1] == self.tokenizer.pad_token_id:
            new.pop()
        text = text[: min(cuts, default=len(text))]
        return Answer(tuple(prompt), tuple(new), text, not (cuts or ended), 0, None)


class Evaluations:
    """Logits of whole sequences by each variant and in fp32, over one copy of the weights."""

    def __init__(self, model: Qwen3VLMoe):
        # Products in full fp32: TF32 would make the yardstick as coarse as what it measures.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.model = model
        self._twins = {"transformers": transformers_twin(model), "fp32": in_float32(transformers_twin(model))}

    @torch.inference_mode()
    def logits(self, who: str, ids: Sequence[int]) -> Tensor:
        """Logits [T - 1, V] by a variant or by "fp32", at every token that another one follows."""
        if who in OURS:
            self.model.set_moe(who)
            return text_logits(self.model, ids)[:-1]
        ids_1T = torch.tensor([ids], device=self.model.device)
        types = torch.zeros_like(ids_1T, dtype=torch.int32)
        logits_1TV = self._twins[who](
            input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), mm_token_type_ids=types
        ).logits
        return logits_1TV[0, :-1]


@torch.inference_mode()
def text_logits(model: Qwen3VLMoe, ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of ids that are text whatever they spell: an answer may hold an image's placeholder."""
    device = model.device
    return model(
        Batch(
            input_ids_T=torch.tensor(list(ids), device=device),
            positions_3T=torch.arange(len(ids), device=device).expand(3, -1),
            segments=Segments.build([len(ids)], device=device),
            visual=None,
        )
    )


@torch.inference_mode()
def engine_logits(engine: Engine, ids: Sequence[int], first: int) -> Tensor:
    """The same from token ``first`` on, [T - first, V] on the host, as an idle engine computes them on all its ranks.

    Raises:
        OptionError: the cache has no room for so many tokens.
    """
    cache, executor, table = engine.cache, engine.runner.executor, []
    size, step, pieces = cache.block_size, engine.scheduler.max_prefill_tokens, []
    if not cache.grow(table, len(ids)):
        raise OptionError(f"{len(ids)} tokens do not fit into the cache: lower --max-gen-toks or --num-fewshot")
    try:
        blocks_B = torch.tensor(table)
        for start in range(0, len(ids), step):
            place_T = torch.arange(start, min(start + step, len(ids)))
            stop = start + len(place_T)
            tables = blocks_B[None].int()
            batch = Batch(
                input_ids_T=torch.tensor(list(ids[start:stop])),
                positions_3T=place_T.expand(3, -1),
                segments=Segments.build([stop - start], [stop], block_tables=tables, block_size=size),
                slots_T=blocks_B[place_T // size] * size + place_T % size,
            )
            executor.compute(batch, 1, replay=False)
            for row in range(max(start, first), stop, _ROWS):
                pieces.append(executor.logits(slice(row - start, min(row + _ROWS, stop) - start)).cpu())
    finally:
        cache.release(table)
    return torch.cat(pieces)

"""Faults to plant in a loaded model, and how many answers each changes.

A checkpoint is a signal only if what breaks the model breaks its answers. Each fault here is one that has been made in
some implementation of this architecture; each has a bound, the share of answers that it has to change at least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

import tma_moe
from demo_training.evaluation import PICTURE_TOKENS, new_conversation, our_answers
from demo_training.heldout import HeldOut
from demo_training.heldout_phrases import OF_POSITIONS
from demo_training.texts import arithmetic_problem, prompt_text
from qwen3vl_moe.model import text

BF16_BITS = 8  # of a significand, the one that is not stored included


@contextmanager
def _in_place_of(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def no_deepstack(llm: Any) -> AbstractContextManager[None]:
    """What the tower's middle layers have to say is left out."""
    vision = llm.engine.model.vision
    encode = vision.encode

    def without(*args: Any) -> Any:
        features = encode(*args)
        return dataclasses.replace(features, deepstack_LMH=torch.zeros_like(features.deepstack_LMH))

    return _in_place_of(vision, "encode", without)


def _axes(order: list[int]) -> AbstractContextManager[None]:
    angles = text.mrope_angles
    return _in_place_of(text, "mrope_angles", lambda positions, *rest: angles(positions[order], *rest))


def height_and_width_exchanged(llm: Any) -> AbstractContextManager[None]:
    return _axes([0, 2, 1])


def sections_exchanged(llm: Any) -> AbstractContextManager[None]:
    """The section of the height gets the time's frequencies, and the other way round."""
    return _axes([1, 0, 2])


def sections_side_by_side(llm: Any) -> AbstractContextManager[None]:
    """The M-RoPE of Qwen2-VL: a run of frequencies for each axis instead of turns."""

    def angles(positions_3T: Tensor, frequencies: Tensor, section: Sequence[int]) -> tuple[Tensor, Tensor]:
        parts = (positions_3T[..., None].float() * frequencies).split(list(section), dim=-1)
        angles_TF = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        return angles_TF.cos(), angles_TF.sin()

    return _in_place_of(text, "mrope_angles", angles)


@contextmanager
def _experts(llm: Any, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Other weights for the experts of every layer: of gate and up [E, 2I, H], and of down [E, H, I]."""
    kept = []
    for layer in llm.engine.model.text.layers:
        experts = layer.moe.experts
        kept.append((experts, experts.gate_up.data, experts.down.data))
        experts.gate_up.data, experts.down.data = change(experts.gate_up.data, experts.down.data)
    try:
        yield
    finally:
        for experts, gate_up, down in kept:
            experts.gate_up.data, experts.down.data = gate_up, down


def gate_and_up_exchanged(llm: Any) -> AbstractContextManager[None]:
    return _experts(llm, lambda gate_up, down: (gate_up.roll(down.shape[2], dims=1), down))


def experts_in_the_other_layout(llm: Any) -> AbstractContextManager[None]:
    """The numbers of [E, H, 2I] taken for [E, 2I, H], as if nothing had to be transposed."""
    return _experts(llm, lambda *weights: tuple(w.transpose(1, 2).reshape(w.shape) for w in weights))  # type: ignore[arg-type]


def not_renormalised(llm: Any) -> AbstractContextManager[None]:
    """The chosen experts' weights do not add up to one."""
    route = tma_moe.route

    def without(logits_TE: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        ids_TK, _ = route(logits_TE, *args, **options)
        shares_TE = logits_TE.softmax(-1, dtype=torch.float32)
        return ids_TK, shares_TE.gather(1, ids_TK.long().clamp(min=0))

    return _in_place_of(tma_moe, "route", without)


def rounded(x: Tensor, bits: int) -> Tensor:
    """fp32 to a significand of so many bits, half away from zero."""
    spare = 24 - bits
    raw = x.float().view(torch.int32)
    return ((raw + (1 << (spare - 1))) & -(1 << spare)).view(torch.float32).to(x.dtype)


@contextmanager
def experts_of_bits(llm: Any, bits: int) -> Iterator[None]:
    """The experts' inputs, weights and outputs with significands of so many bits."""
    fused_moe = tma_moe.fused_moe

    def rough(x_TH: Tensor, *args: Any, **options: Any) -> Any:
        y = fused_moe(rounded(x_TH, bits), *args, **options)
        return rounded(y, bits) if isinstance(y, Tensor) else y

    change = _experts(llm, lambda *weights: tuple(rounded(w, bits) for w in weights))  # type: ignore[arg-type]
    with change, _in_place_of(tma_moe, "fused_moe", rough):
        yield


def one_bit_too_few(llm: Any) -> AbstractContextManager[None]:
    return experts_of_bits(llm, BF16_BITS - 1)


@dataclass(frozen=True)
class Fault:
    """``least``: share of the answers that change at least; ``of``: whose. ``all`` are those to the new held-out set,
    ``positions`` those of its kinds OF_POSITIONS, ``problems`` those to two word problems at once, which the model has
    never seen: it is less sure of them than of any picture, so that small errors show."""

    plant: Callable[[Any], AbstractContextManager[None]]
    least: float
    of: str = "all"

    @property
    def name(self) -> str:
        return self.plant.__name__.replace("_", " ")


FAULTS = (
    Fault(no_deepstack, 0.1),
    Fault(gate_and_up_exchanged, 0.1),
    Fault(experts_in_the_other_layout, 0.1),
    Fault(not_renormalised, 0.05),
    Fault(one_bit_too_few, 0.05, "problems"),
    Fault(height_and_width_exchanged, 0.3, "positions"),
    Fault(sections_exchanged, 0.3, "positions"),
    Fault(sections_side_by_side, 0.3, "positions"),
)
PROBLEMS, PROBLEM_TOKENS = 60, 80


def conversations_of(of: str, asked: Sequence[HeldOut]) -> list[list[dict[str, Any]]]:
    """What a fault is measured by: of ``asked``, those that count for it, or problems."""
    if of == "problems":
        rngs = [Random(f"two problems/{number}") for number in range(PROBLEMS)]
        pairs = [f"{arithmetic_problem(rng).question} {arithmetic_problem(rng).question}" for rng in rngs]
        return [[{"role": "user", "content": prompt_text(pair)}] for pair in pairs]
    return [new_conversation(each) for each in asked if of == "all" or each.kind in OF_POSITIONS]


def measure(llm: Any, asked: Sequence[HeldOut], faults: Sequence[Fault] = FAULTS) -> dict[str, dict[str, float]]:
    """``{fault: {"changed": n, "of": n, "least": share}}``, against the answers without any; fp32 on a CPU.

    Nothing that the model knew before is used with a fault, and it is whole again afterwards.
    """
    from qwen3vl_moe.engine import LLM

    whole: dict[str, list[str]] = {}
    table = {}
    for fault in faults:
        conversations = conversations_of(fault.of, asked)
        tokens = PROBLEM_TOKENS if fault.of == "problems" else PICTURE_TOKENS
        if fault.of not in whole:
            whole[fault.of] = our_answers(llm, conversations, tokens)
        with fault.plant(llm):
            broken = LLM.from_parts(llm.engine.model, llm.processor, llm.engine.defaults)
            answers = our_answers(broken, conversations, tokens)
        changed = sum(one != other for one, other in zip(answers, whole[fault.of], strict=True))
        table[fault.name] = {"changed": changed, "of": len(answers), "least": fault.least}
    return table

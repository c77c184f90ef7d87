"""The portable MoE kernels with every shipped choice of tiles, compiled for each kind of card, with no GPU.

Each has to fit: no spilled register, no more shared memory than the card gives a program. And each has to use what the
card has: its matrix instruction, in FP8 where it multiplies FP8, and copies that run beside the products.
"""

from __future__ import annotations

import pytest
import torch

from tma_moe import support
from tma_moe.tiles import CONFIG_DIR, Choice, load

triton = pytest.importorskip("triton")
if support.interpreting():
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from tests.kernels.codegen import Compiled, GPUTarget, compile_for_hopper, disassemble, kernels_of  # noqa: E402
from tma_moe import combine, quantise, recipe, routing  # noqa: E402
from tma_moe.portable.rule import portable_default_choices  # noqa: E402
from tma_moe.portable.targets import shared_memory  # noqa: E402

SHAPE = (128, 8, 2048, 768)
CARDS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
INSTRUCTION = {(9, 0): "wgmma.mma_async", (10, 0): "tcgen05.mma"}  # of the others: mma.sync


def choices_on(card: tuple[int, int], fp8: bool) -> list[Choice]:
    """What the files have for cards of this capability, or the rule where none has."""
    files = [file for file in map(load, sorted(CONFIG_DIR.glob("*.json"))) if file["portable"]]
    found = [
        choice
        for file in files
        if file["capability"] == card
        for _, choices in file["shapes"]
        for choice in choices
        if choice.fp8 == fp8
    ]
    return found or list(portable_default_choices(*SHAPE[:2], fp8, card >= (8, 9), shared_memory(card)))


@pytest.fixture
def on_card(monkeypatch):
    """Recipes are made for a card, and their kernels compiled for it."""
    kept = recipe.has_pdl, recipe.has_fp8_products, quantise._launch, combine._launch

    def clear():
        for function in kept:
            function.cache_clear()

    def compile_on(card: tuple[int, int], choice: Choice, dtype: torch.dtype = torch.bfloat16) -> dict[str, Compiled]:
        clear()
        monkeypatch.setattr(support, "capability", lambda device: card)
        seen = kernels_of(choice, choice.max_tokens or 4096, *SHAPE, dtype, monkeypatch)
        target, made = GPUTarget("cuda", 10 * card[0] + card[1], 32), {}
        for name, (kernel, args, constants, options) in seen.items():
            key = (card, name, constants, tuple(options.items()), dtype)
            # Grouping differs in the heights of tiles alone: one of each kind stands for all.
            if name.startswith(("group", "count")):
                key = (card, name)
            if key not in COMPILED:
                COMPILED[key] = compile_for_hopper(kernel, args, constants, options, target)
            made[name] = COMPILED[key]
        return made

    yield compile_on
    clear()


COMPILED: dict[tuple, Compiled] = {}


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"sm_{card[0]}{card[1]}")
def test_every_choice_fits_and_uses_the_card(card, fp8, on_card):
    a8 = fp8 and card >= (8, 9)
    for choice in choices_on(card, fp8):
        kernels = on_card(card, choice)
        expected = {f"{choice.up.kernel}_up", f"{choice.down.kernel}_down"}
        assert expected <= kernels.keys()
        assert ("quantise_rows" in kernels) == (a8 and choice.grouped)
        for name, made in kernels.items():
            assert made.spilled == 0, f"{name} spills {made.spilled} bytes"
            assert made.shared <= shared_memory(card), f"{name} needs {made.shared} bytes of shared memory"
            assert made.scratch == 0, f"{name} asks for global scratch memory, which needs an allocator"
            assert (made.count("griddepcontrol") > 0) == (card >= (9, 0)), name
            assert "cp.async.bulk" not in made.ptx, f"{name} uses TMA"
        if not choice.grouped:
            continue
        for name in expected:
            ptx = kernels[name].ptx
            assert INSTRUCTION.get(card, "mma.sync") in ptx, f"{name} has no matrix instruction of this card"
            assert "cp.async.cg.shared.global" in ptx, f"{name} copies nothing ahead"
            if a8:
                assert "e4m3.e4m3" in ptx or "kind::f8f6f4" in ptx, f"{name} does not multiply FP8"
            elif fp8:
                assert "prmt.b32" in ptx
                assert "bf16.bf16" in ptx, f"{name} does not multiply what was widened"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"sm_{card[0]}{card[1]}")
def test_routing(card):
    ids, pdl = torch.empty(16, dtype=torch.int32), card >= (9, 0)
    arguments = (torch.empty(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.uint8), ids, torch.empty(16), 5)
    target = GPUTarget("cuda", 10 * card[0] + card[1], 32)
    for tokens in (1, 16):
        constants = (128, 8, 128, 8, tokens, True, pdl)
        made = compile_for_hopper(routing.route_topk, arguments, constants, {"num_warps": 4}, target)
        assert made.spilled == 0
        assert made.shared <= shared_memory(card)


def test_float16_on_the_oldest_card(on_card):
    for fp8 in (False, True):
        choice = choices_on((8, 0), fp8)[1]
        for name, made in on_card((8, 0), choice, torch.float16).items():
            assert made.spilled == 0
            if name.endswith(("_up", "_down")):
                assert "f16.f16" in made.ptx
                assert "bf16" not in made.ptx


def test_pdl_keeps_its_contract(on_card):
    for fp8 in (False, True):
        for choice in choices_on((9, 0), fp8)[1:2]:
            kernels = on_card((9, 0), choice).values()
            disassemble(kernels)
            for made in kernels:
                made.assert_takes_turn(reads_early=False)


def test_shared_memory_of_cards():
    assert [shared_memory(card) for card in CARDS] == [166_912, 101_376, 101_376, 232_448, 232_448, 101_376]
    assert shared_memory((13, 0)) == 101_376  # what no table has gets the least

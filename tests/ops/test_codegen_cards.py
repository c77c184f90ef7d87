"""The decoder's and the tower's kernels at the published sizes, compiled for each kind of card, with no GPU.

Each has to fit: no spilled register, no more shared memory than the card gives a program. What Hopper is to make of
them is in test_codegen.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.interpreted import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles, so not in the interpreter", allow_module_level=True)

from qwen3vl_moe.ops.kernels import (
    block_linear,
    launch,
    packed_attention,
    paged_decode,
    patches,
    ranks,
    residual,
    resize,
    rotation,
)
from qwen3vl_moe.ops.shared_memory import SharedMemory
from tests.kernels.codegen import GPUTarget, compile_for_hopper
from tests.kernels.test_portable_codegen import CARDS
from tma_moe import FP8, Uncombined, quantise, support
from tma_moe.launcher import Launch, instead_of_launching
from tma_moe.portable.targets import shared_memory

META = torch.device("meta")
N, G, D, H, TOWER = 32, 4, 128, 2048, (16, 72, 1152)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


@pytest.fixture
def launched(monkeypatch):
    """What operations launch on a card: kernels with their arguments, constants and options."""
    caches = (
        support.has_pdl,
        support.has_fp8_products,
        support.multiplies_from_shared_memory,
        quantise._launch,
        launch._kept,
        packed_attention._tile,
    )

    def clear():
        for function in caches:
            function.cache_clear()

    def on_card(card: tuple[int, int]) -> Iterator[tuple[str, Launch, tuple]]:
        clear()
        monkeypatch.setattr(support, "capability", lambda device: card)
        seen: dict[tuple, tuple] = {}
        with instead_of_launching(lambda kept, grid, args: seen.update({(kept.kernel, kept.constants): (kept, args)})):
            everything(card >= (8, 9))
        return ((kernel.__name__, kept, args) for (kernel, _), (kept, args) in seen.items())

    yield on_card
    clear()


def everything(fp8: bool) -> None:
    """Each operation once in each way in which the model calls it; those of an FP8 cache where a card can have one."""
    x, weight, int32 = empty(8, H), empty(H), {"dtype": torch.int32}
    residual.add_norm(x, x, weight, 1e-6)
    residual.add_norm(empty(8, TOWER[2]), None, empty(TOWER[2]), 1e-6, empty(TOWER[2]))
    open_sum = Uncombined(empty(8, 8, H), empty(8, 8, **int32), empty(8, 8, dtype=torch.float32), 128, True)
    residual.combine_add_norm(x, open_sum, weight, 1e-6)
    addresses = empty(2, dtype=torch.int64)
    shared = SharedMemory(0, 2, "no group", x, addresses, addresses, owned=None)
    for part in (x, open_sum):
        ranks.sum_add_norm(x, part, shared, weight, 1e-6)
    caches = [empty(2, 16, 16, G, D)] + [empty(2, 16, 16, G, D + 4, dtype=torch.uint8)] * fp8
    starts, tables = empty(3, **int32), empty(2, 8, **int32)
    norms = [torch.nn.RMSNorm(D, eps=1e-6, device=META, dtype=torch.bfloat16) for _ in range(2)]
    q = empty(8, N, D)
    for cache in caches:
        angles = empty(8, D // 2, dtype=torch.float32), empty(8, D // 2, dtype=torch.float32)
        qkv, slots = empty(8, (N + 2 * G) * D), empty(8, dtype=torch.int64)
        rotation.norm_rotate_store(qkv, (N, G), *angles, norms, slots, cache)
        paged_decode.paged_decode(q, cache, q, starts, starts, tables)
        packed_attention.paged_attention(q, cache, q, starts, starts, tables)
    packed_attention.packed_attention(q, empty(8, G, D), empty(8, G, D), starts, starts, causal=True)
    heads, width, hidden = TOWER
    angles = empty(8, width // 2, dtype=torch.float32), empty(8, width // 2, dtype=torch.float32)
    rotation.norm_rotate_store(empty(8, 3 * heads * width), (heads, heads), *angles, None, None, None)
    head = empty(8, heads, width)
    packed_attention.packed_attention(head, head, head, starts, starts, causal=False)
    planes = empty(3, 64, 64, dtype=torch.uint8)
    patches.cut_patches(planes, empty(16, 1536), (16, 2, 2), (0.5,) * 3, (0.5,) * 3)
    patches.add_positions(empty(8, hidden), empty(2304, hidden), empty(8, 4, dtype=torch.int64), empty(8, 4))
    pixels, table = empty(64, 48, 3, dtype=torch.uint8), empty(9, 32, **int32)
    resize.resize_rows(pixels, table)
    resize.resize_columns(empty(3, 64, 48, dtype=torch.uint8), table)
    for columns, rows in ((H, (N + 2 * G) * D), (N * D, H)):
        w8, scale = empty(rows, columns, dtype=FP8), empty(rows // 128, columns // 128, dtype=torch.float32)
        for T in (1, 16, 256):
            kernel = block_linear.one_row if T == 1 else block_linear.portable_rows
            kernel(empty(T, columns), w8, scale, 128)


@pytest.mark.parametrize("card", [card for card in CARDS if card != (9, 0)], ids=lambda card: f"sm_{card[0]}{card[1]}")
def test_every_kernel_fits(card, launched):
    met = set()
    for name, kept, args in launched(card):
        target = GPUTarget("cuda", 10 * card[0] + card[1], 32)
        made = compile_for_hopper(kept.kernel, args, kept.constants, kept.options, target)
        assert made.spilled == 0, f"{name} {kept.constants} spills {made.spilled} bytes"
        assert made.shared <= shared_memory(card), f"{name} needs {made.shared} bytes of shared memory"
        met.add(name)
    assert len(met) == 13 + (card >= (8, 9))  # whose activations are quantised

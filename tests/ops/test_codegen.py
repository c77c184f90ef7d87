"""What the compiler makes of the decoder's and the tower's kernels for Hopper, at the published sizes, with no GPU."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.interpreted import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles, so not in the interpreter", allow_module_level=True)

from qwen3vl_moe.ops.kernels import (
    block_linear,
    hopper_attention,
    hopper_linear,
    launch,
    packed_attention,
    paged_decode,
    patches,
    ranks,
    residual,
    resize,
    rotation,
)
from tests.kernels.codegen import GPUTarget, compile_for_hopper, disassemble
from tma_moe import FP8
from tma_moe.launcher import instead_of_launching

BF16, FP32, INT32 = (torch.empty(16, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.int32))


@pytest.mark.parametrize(("width", "has_bias"), [(2048, False), (1152, True)], ids=["RMSNorm", "LayerNorm"])
def test_add_and_norm(width, has_bias):
    block = 2048
    made = compile_for_hopper(
        residual._add_norm, (BF16,) * 5 + (1e-6,), (width, True, has_bias, block, True), {"num_warps": 8}
    )
    assert made.spilled == 0
    made.assert_takes_turn(reads_early=False)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_cards_before_hopper_are_launched_without_pdl(monkeypatch, capability):
    """Their assembler refuses the instruction."""
    seen = {}

    class Recorded:
        def __init__(self, kernel, constants, warps, stages, pdl):
            seen.update(pdl=pdl, constant=constants[-1])

        def __call__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(launch, "Launch", Recorded)
    monkeypatch.setattr(launch, "device_guard", lambda device: nullcontext())
    monkeypatch.setattr(launch, "current_stream", lambda device: 0)
    for cached in (launch._kept, launch.has_pdl):
        cached.cache_clear()
    x = SimpleNamespace(data_ptr=lambda: 0, device=torch.device("cuda:0"), dtype=torch.bfloat16)
    launch.run_kept(residual._add_norm, (1, 1, 1), (x,), (), (), 4)
    for cached in (launch._kept, launch.has_pdl):
        cached.cache_clear()
    assert seen == {"pdl": capability >= (9, 0), "constant": capability >= (9, 0)}
    if capability < (9, 0):
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        arguments, constants = (BF16,) * 5 + (1e-6,), (2048, True, False, 2048, seen["constant"])
        assert compile_for_hopper(residual._add_norm, arguments, constants, {"num_warps": 8}, target).spilled == 0


@pytest.mark.parametrize("evict", ["", "evict_first"])
def test_combine_add_and_norm(evict):
    arguments = (BF16, BF16, INT32, FP32, BF16, BF16, 1e-6)
    constants = (2048, 128, 8, 8, 2048, evict, True)
    made = compile_for_hopper(residual._combine_add_norm, arguments, constants, {"num_warps": 8})
    assert made.spilled == 0
    assert made.registers <= 128  # two programs of 256 threads a multiprocessor at the least
    assert made.count("ld.global") >= 8
    assert ".v4.b32" in made.ptx  # 16 bytes a thread
    made.assert_takes_turn(reads_early=False)


@pytest.mark.parametrize("of_sum", [(0, 0, 1), (128, 8, 8)], ids=["a part", "a sum over experts"])
def test_sum_over_ranks_add_and_norm(of_sum):
    int64 = torch.empty(16, dtype=torch.int64)
    arguments = (BF16, BF16, INT32, FP32, BF16, int64, int64, BF16, 1e-6, 5)
    constants = (2048, *of_sum, 2048, "", 1, 2, 128, True)
    made = compile_for_hopper(ranks._sum_add_norm, arguments, constants, {"num_warps": 8})
    assert made.spilled == 0
    assert re.search(r"ld\.volatile\.global\.v4\.b32", made.ptx)  # 16 bytes a thread, of the other GPU
    assert made.count("atom.global.release.sys.cas.b32") == made.count("atom.global.acquire.sys.cas.b32") == 1
    made.assert_takes_turn(reads_early=False)


@pytest.mark.parametrize(
    "sizes",
    [
        (32, 4, 128, 4, 8, 64, True, True, 0, True),
        (32, 4, 128, 4, 8, 64, True, True, 16, True),
        (16, 16, 72, 4, 8, 64, False, False, 0, True),
    ],
    ids=["decoder", "FP8 cache", "vision tower"],
)
def test_norm_rotate_and_store(sizes):
    rows = torch.empty(16, dtype=FP8) if sizes[-2] else BF16
    arguments = (BF16, FP32, FP32, BF16, BF16, INT32, BF16, BF16, rows, rows, FP32, FP32, 5, 1e-6)
    made = compile_for_hopper(rotation._norm_rotate_store, arguments, sizes, {"num_warps": 8})
    assert made.spilled == 0
    made.assert_takes_turn(reads_early=False)


def test_patches_and_positions():
    mean = std = (0.5, 0.25, 0.125)
    arguments = (torch.empty(16, dtype=torch.uint8), BF16, 36, 36, 5, *mean, *std)
    made = compile_for_hopper(patches._cut_patches, arguments, (16, 2, 2, 256), {"num_warps": 2})
    assert made.spilled == 0
    assert made.count("div.rn.f32") >= 2  # as the host divides
    arguments = (BF16, BF16, torch.empty(16, dtype=torch.int64), FP32)
    made = compile_for_hopper(patches._add_positions, arguments, (1152, 2048, True), {"num_warps": 8})
    assert made.spilled == 0
    made.assert_takes_turn(reads_early=False)


@pytest.mark.parametrize(("kernel", "numbers"), [(resize._resize_rows, 3), (resize._resize_columns, 4)])
def test_resize(kernel, numbers):
    pixels = torch.empty(16, dtype=torch.uint8)
    arguments = (pixels, INT32, pixels, *(37,) * numbers)
    made = compile_for_hopper(kernel, arguments, (resize._BLOCK,), {"num_warps": 4})
    assert made.spilled == 0
    assert made.registers <= 32  # sixteen programs a multiprocessor, to wait for memory together
    assert "mad.wide" in made.ptx or "mul.wide" in made.ptx or "mul.lo.s64" in made.ptx  # 64 bits, of large pictures


@pytest.mark.parametrize("fp8", [False, True])
def test_paged_decode(fp8):
    rows = torch.empty(16, dtype=FP8) if fp8 else BF16
    arguments = (BF16, INT32, rows, rows, FP32, FP32, INT32, INT32, FP32, FP32, BF16, 256, 64, 0.1)
    constants = (16, 32, 4, 128, 16, 128, paged_decode._TOKENS, fp8)
    made = compile_for_hopper(paged_decode._attend_span, arguments, constants, {"num_warps": 4, "num_stages": 2})
    assert made.spilled == 0
    assert made.count("mma.sync") > 0
    arguments = (FP32, FP32, BF16, INT32, INT32, 32, 64)
    constants = (32, 128, 128, paged_decode._TOGETHER, paged_decode._TOKENS)
    made = compile_for_hopper(paged_decode._join_spans, arguments, constants, {"num_warps": 2})
    assert made.spilled == 0


@pytest.mark.parametrize(("block_size", "fp8"), [(0, False), (16, False), (16, True)], ids=["packed", "paged", "FP8"])
@pytest.mark.parametrize(
    ("heads", "width", "causal", "tile"),
    [
        ((32, 4), 128, True, (64, 64, 4, 3)),
        ((16, 16), 72, False, (64, 64, 4, 3)),
        ((3, 3), 72, True, (64, 64, 4, 3)),
    ],
    ids=["decoder", "vision", "rows-at-odd-eighths"],
)
def test_packed_attention(heads, width, causal, tile, block_size, fp8):
    queries, keys, warps, stages = tile
    rows = torch.empty(16, dtype=FP8) if fp8 else BF16
    arguments = (BF16, rows, rows, FP32, FP32, BF16, *(INT32,) * 3, 512, 64, 64, 256, 3, 0.1)
    constants = (*heads, width, *packed_attention.head_parts(width), block_size, block_size > 0, causal)
    options = {"num_warps": warps, "num_stages": stages}
    made = compile_for_hopper(
        packed_attention._attend_packed, arguments, (*constants, queries, keys, 128, fp8), options
    )
    assert made.spilled == 0
    # Both parts of keys and values are copied 16 bytes at a time: narrower loads of them meet a fault of ptxas. Those
    # of an FP8 cache are widened on the way, and triton 3.9 then loads them into registers.
    assert fp8 or made.count("cp.async.cg.shared.global") > 0
    assert made.count("ld.global.b16") == 0
    assert made.count("wgmma.mma_async") > 0
    assert made.count("mma.sync") == 0
    assert made.shared <= 232_448
    assert made.warps == warps


@pytest.mark.parametrize(
    ("heads", "width", "causal", "block_size"),
    [((32, 4), 128, True, 0), ((16, 16), 72, False, 0), ((32, 4), 128, True, 16), ((32, 4), 128, True, 64)],
    ids=["decoder", "vision", "cache", "cache-of-large-blocks"],
)
def test_hopper_attention(monkeypatch, heads, width, causal, block_size):
    (N, G), dtype, meta = heads, torch.bfloat16, torch.device("meta")
    q, k = (torch.empty(300, n, width, dtype=dtype, device=meta) for n in (N, G))
    starts = torch.empty(4, dtype=torch.int32, device=meta)
    seen = {}
    with instead_of_launching(lambda launch, grid, args: seen.update(launch=launch, args=args)):
        if block_size:
            cache = torch.empty(2, 20, block_size, G, width, dtype=dtype, device=meta)
            tables = torch.empty(3, 7, dtype=torch.int32, device=meta)
            hopper_attention.hopper_paged_attention(q, cache, torch.empty_like(q), starts, starts, tables)
        else:
            hopper_attention.hopper_attention(q, k, k, starts, starts, causal=causal)
    kept = seen["launch"]
    made = compile_for_hopper(kept.kernel, seen["args"], kept.constants, kept.options)
    assert made.count("wgmma.mma_async") > 0
    assert made.count("mma.sync") == 0
    # Of a block of keys in the cache 8 pages in two halves each, and as many of values.
    assert made.count("cp.async.bulk.tensor") >= (32 if block_size else 3)
    assert made.shared <= 232_448
    # A few bytes are spilled by the compiler of triton 3.9, none by that of 3.6.
    assert made.spilled <= (48 if block_size else 16)


@pytest.mark.parametrize(("N", "K"), [(5120, 2048), (2048, 4096)], ids=["qkv", "out"])
def test_block_linear(N, K):
    meta = torch.device("meta")
    weight, scale = torch.empty(N, K, dtype=FP8, device=meta), torch.empty(N // 128, K // 128, device=meta)
    seen = {}
    with instead_of_launching(lambda launch, grid, args: seen.update({launch.kernel.__name__: (launch, args)})):
        for T in (16, 8192):
            x = torch.empty(T, K, dtype=torch.bfloat16, device=meta)
            block_linear.some_rows(x, weight, scale, 128)
            hopper_linear.many_rows(x, weight, scale)
    assert seen.keys() == {"quantise_rows", "_some_rows", "hopper_block_linear"}
    kernels = {
        name: compile_for_hopper(kept.kernel, args, kept.constants, kept.options) for name, (kept, args) in seen.items()
    }
    disassemble(kernels.values())
    for name, made in kernels.items():
        assert made.spilled == 0
        made.assert_takes_turn(reads_early=name == "hopper_block_linear")
        if name != "quantise_rows":
            products = re.findall(r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3 R\d+, [^;]*", made.sass)
            # A step along K, which is four products, begins with no sum.
            assert len(products) == 4 * sum("!UPT" in product for product in products) > 0
            assert made.count("cp.async.bulk.tensor") >= 2
            assert made.count("mma.sync") == 0
    arguments = (BF16, torch.empty(16, dtype=FP8), FP32, BF16)
    made = compile_for_hopper(block_linear._one_row, arguments, (N, K, 128, 4, 2048, True, True), {"num_warps": 4})
    assert made.spilled == 0
    made.assert_takes_turn(reads_early=False)
    assert re.search(r"ld\.global\S*\.v4\.b32", made.ptx)

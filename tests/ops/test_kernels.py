"""The kernels of the ops against the plain torch they stand for.

On a GPU they run compiled, in bf16 and fp16. Elsewhere this file runs itself once more in Triton's interpreter, in
fp32.
"""

import pytest
import torch
import torch.nn.functional as F

import tma_moe
from qwen3vl_moe.ops import Segments
from qwen3vl_moe.ops.kernels.packed_attention import TILE, packed_attention, paged_attention
from qwen3vl_moe.ops.kernels.paged_decode import paged_decode
from qwen3vl_moe.ops.kernels.ranks import sum_add_norm
from qwen3vl_moe.ops.kernels.residual import add_norm, combine_add_norm
from qwen3vl_moe.ops.kernels.rotation import norm_rotate_store
from qwen3vl_moe.ops.reference import attention as plain_attention
from qwen3vl_moe.ops.reference import rotate
from qwen3vl_moe.ops.shared_memory import SharedMemory
from tests.interpreted import DEVICE, DTYPES, ON_GPU, runs_kernels

ON_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)


def within_rounding(ours, exact, plain):
    """At most twice the error that the same operation has in torch in the working dtype, plus half a unit of it."""
    unit = torch.finfo(ours.dtype).eps * exact.abs().max()
    error, allowed = (ours - exact).abs().max(), 2 * (plain - exact).abs().max() + unit / 2
    assert torch.isfinite(ours).all()
    assert error <= allowed, f"error {float(error):.3g}, allowed {float(allowed):.3g}"


def rms_norm(weight_D):
    norm = torch.nn.RMSNorm(len(weight_D), eps=1e-6, device=weight_D.device, dtype=weight_D.dtype)
    norm.weight.data = weight_D
    return norm.requires_grad_(False)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (5, 48), *([(300, 2048)] if ON_GPU else [])])
@pytest.mark.parametrize("with_y", [True, False])
@pytest.mark.parametrize("with_bias", [True, False], ids=["LayerNorm", "RMSNorm"])
def test_add_and_norm(dtype, shape, with_y, with_bias):
    x, y = (torch.randn(shape, device=DEVICE, dtype=dtype) + 0.5 for _ in range(2))
    weight, bias = (torch.rand(shape[1], device=DEVICE, dtype=dtype) + 0.5 for _ in range(2))
    total = x + y if with_y else x.clone()

    def expected(kind):
        if with_bias:
            return F.layer_norm(total.to(kind), total.shape[1:], weight.to(kind), bias.to(kind), 1e-6)
        return F.rms_norm(total.to(kind), total.shape[1:], weight.to(kind), 1e-6)

    out = add_norm(x, y if with_y else None, weight, 1e-6, bias if with_bias else None)
    assert torch.equal(x, total)
    within_rounding(out, expected(torch.float64), expected(dtype))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "H"), [(1, 1, 32), (5, 3, 48), *([(300, 8, 2048)] if ON_GPU else [])])
@pytest.mark.parametrize("kept", [False, True])
def test_combine_add_and_norm(dtype, T, K, H, kept):
    E = 6 if K < 6 else 20
    x, weight = torch.randn(T, H, device=DEVICE, dtype=dtype), torch.rand(H, device=DEVICE, dtype=dtype) + 0.5
    rows, weights = torch.randn(T, K, H, device=DEVICE, dtype=dtype), torch.rand(T, K, device=DEVICE)
    ids = torch.randint(0, E, (T, K), device=DEVICE, dtype=torch.int32)
    ids[-1, -1] = E  # no expert: nothing has written its row
    rows[-1, -1] = torch.nan
    real = torch.where((ids < E)[..., None], rows, 0)

    def expected(kind):
        total = x.to(kind) + (real.to(kind) * weights[..., None].to(kind)).sum(1)
        return total, F.rms_norm(total, (H,), weight.to(kind), 1e-6)

    exact, plain = expected(torch.float64), expected(dtype)
    y, before = tma_moe.Uncombined(rows, ids, weights, E, kept), x.clone()
    out = combine_add_norm(x, y, weight, 1e-6)
    within_rounding(x, exact[0], plain[0])
    within_rounding(out, exact[1], plain[1])
    some = torch.tensor([T - 1, 0], device=DEVICE)
    alone = before[some]
    assert torch.equal(combine_add_norm(alone, y[some], weight, 1e-6), out[some])
    assert torch.equal(alone, x[some])


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_experts", [False, True])
def test_sum_over_ranks_add_and_norm(dtype, of_experts):
    """The second of three ranks, alone: the others' parts are there, and their flags are up."""
    T, H, K, E, rank = 5, 48, 3, 7, 1
    x, weight = torch.randn(T, H, device=DEVICE, dtype=dtype), torch.rand(H, device=DEVICE, dtype=dtype) + 0.5
    rows, weights = torch.randn(T, K, H, device=DEVICE, dtype=dtype), torch.rand(T, K, device=DEVICE)
    ids = torch.randint(0, E, (T, K), device=DEVICE, dtype=torch.int32)
    y = tma_moe.Uncombined(rows, ids, weights, E, False) if of_experts else rows[:, 0].contiguous()
    own = (rows.double() * weights[..., None]).sum(1) if of_experts else rows[:, 0].double()
    rooms = torch.randn(3, 2, 128, H, device=DEVICE, dtype=dtype)
    flags = torch.zeros(3, 128, 3, dtype=torch.int32, device=DEVICE)
    addresses = [torch.tensor([each.data_ptr() for each in of_all], device=DEVICE) for of_all in (rooms, flags)]
    shared = SharedMemory(rank, 3, "no group", x, *addresses, owned=None)
    for turn in (1, 0):
        flags[rank, :T, [0, 2]] = 1
        flags[0], flags[2] = 0, 0
        parts = [rooms[0, turn, :T], own, rooms[2, turn, :T]]

        def expected(kind, parts=parts):
            total = x.to(kind) + sum(part.to(dtype).to(kind) for part in parts)
            return total, F.rms_norm(total, (H,), weight.to(kind), 1e-6)

        exact, plain, sum_TH = expected(torch.float64), expected(dtype), x.clone()
        out = sum_add_norm(sum_TH, y, shared, weight, 1e-6)
        within_rounding(rooms[rank, turn, :T], own, own.to(dtype))
        within_rounding(sum_TH, exact[0], plain[0])
        within_rounding(out, exact[1], plain[1])
        raised = torch.zeros_like(flags)
        raised[0, :T, rank] = raised[2, :T, rank] = 1  # those of this rank at the others, and its own are down again
        assert torch.equal(flags, raised)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 16), ((6, 1), 12), *([((32, 4), 128)] if ON_GPU else [])])
@pytest.mark.parametrize(("with_norm", "with_cache"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("T", [5, 259])  # one token a program, and several
def test_norm_rotate_and_store(dtype, heads, width, with_norm, with_cache, T):
    N, G = heads
    qkv = torch.randn(T, (N + 2 * G) * width, device=DEVICE, dtype=dtype)
    q_weight, k_weight = (torch.rand(width, device=DEVICE, dtype=dtype) + 0.5 for _ in range(2))
    angle = torch.rand(T, width // 2, device=DEVICE) * 6
    cos, sin = angle.cos(), angle.sin()
    cache = torch.full((2, T, 4, G, width), torch.nan, device=DEVICE, dtype=dtype)
    slots = torch.randperm(4 * T)[:T].to(DEVICE)
    slots[[2, T - 1]] = -1
    norms = tuple(map(rms_norm, (q_weight, k_weight))) if with_norm else None
    q, k, v = norm_rotate_store(
        qkv, heads, cos, sin, norms, slots if with_cache else None, cache if with_cache else None
    )

    def expected(part, weight, kind):
        normed = F.rms_norm(part.to(kind), (width,), weight.to(kind), 1e-6) if with_norm else part.to(kind)
        return (
            rotate(normed, cos.to(kind), sin.to(kind))
            if kind == torch.float64
            else rotate(normed.float(), cos, sin).to(kind)
        )

    parts = qkv.view(T, N + 2 * G, width).split((N, G, G), dim=1)
    for ours, part, weight in ((q, parts[0], q_weight), (k, parts[1], k_weight)):
        within_rounding(ours, expected(part, weight, torch.float64), expected(part, weight, dtype))
    assert torch.equal(v, parts[2])
    if with_cache:
        k_rows, v_rows = cache.flatten(1, 2)
        kept = slots >= 0
        others = torch.ones(4 * T, dtype=torch.bool, device=DEVICE)
        others[slots[kept]] = False
        for cached, given in ((k_rows, k), (v_rows, v)):
            assert torch.equal(cached[slots[kept]], given[kept])
            assert cached[others].isnan().all()


def paged(q_lens, kv_lens, heads, width, dtype, block_size=16):
    """Queries, keys and values of sequences, and the same keys in the scattered blocks of a cache."""
    (N, G), S = heads, len(kv_lens)
    blocks = -(-max(kv_lens) // block_size)
    tables = torch.randperm(S * blocks).view(S, blocks).int().to(DEVICE)
    segments = Segments.build(q_lens, kv_lens, DEVICE, tables, block_size)
    cache = torch.full((2, S * blocks, block_size, G, width), torch.nan, device=DEVICE, dtype=dtype)
    k_rows, v_rows = cache.flatten(1, 2)
    rows = segments.cache_rows_U
    q = torch.randn(sum(q_lens), N, width, device=DEVICE, dtype=dtype)
    k_rows[rows] = torch.randn(sum(kv_lens), G, width, device=DEVICE, dtype=dtype)
    v_rows[rows] = torch.randn(sum(kv_lens), G, width, device=DEVICE, dtype=dtype)
    return q, k_rows[rows], v_rows[rows], segments, cache, tables


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "width"), [((4, 2), 16), ((6, 1), 24), ((8, 8), 32), *([((32, 4), 128)] if ON_GPU else [])]
)
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([1], [1]),
        ([1, 1, 1, 1, 1], [3, 64, 65, 1, 130]),
        ([1, 1], [2000, 700]),  # more passes than spans
        ([1, 20, 1, 0, 35], [70, 20, 5, 0, 90]),
        *([([1, 700, 300], [2000, 700, 900])] if ON_GPU else []),
    ],
)
def test_attention_over_the_cache(dtype, heads, width, q_lens, kv_lens):
    """Decoding sequences and prompts in one step: each kernel takes its own and leaves the others' rows alone."""
    q, k, v, segments, cache, tables = paged(q_lens, kv_lens, heads, width, dtype)
    places = segments.q_starts, segments.kv_starts, tables
    singles = torch.cat([torch.full((n,), n == 1) for n in q_lens]).to(DEVICE)
    ours = torch.full_like(q, torch.nan)
    paged_decode(q, cache, ours, *places)
    assert torch.equal(ours.isnan().any(2).any(1), ~singles)
    paged_attention(q, cache, ours, *places, tile=TILE if ON_GPU else (16, 32, 4, 1))
    full = Segments.build([n for n in q_lens if n], [n for n in kv_lens if n], DEVICE)
    exact, plain = (
        plain_attention(q.to(kind), k.to(kind), v.to(kind), full, causal=True) for kind in (torch.float64, dtype)
    )
    within_rounding(ours, exact, plain)


@runs_kernels
def test_a_sequence_without_keys_gives_zeros():
    q, _, _, _, cache, tables = paged([1, 1], [1, 4], (4, 2), 16, DTYPES[0])
    out = torch.full_like(q, torch.nan)
    starts = torch.tensor([0, 1, 2], device=DEVICE, dtype=torch.int32)
    paged_decode(q, cache, out, starts, torch.tensor([0, 0, 4], device=DEVICE, dtype=torch.int32), tables)
    assert (out[0] == 0).all()
    assert out[1].isfinite().all()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "width"),
    [((4, 2), 16), ((2, 2), 24), *([((32, 4), 128), ((16, 16), 72), ((3, 3), 72)] if ON_GPU else [])],
)
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([5], [5]),
        ([40, 0, 17], [40, 0, 17]),
        ([3, 1, 33], [60, 1, 90]),
        *([([1000, 127, 129], [1000, 640, 129])] if ON_GPU else []),
    ],
)
def test_packed_attention(dtype, causal, heads, width, q_lens, kv_lens):
    check_packed_attention(dtype, causal, heads, width, q_lens, kv_lens)


@runs_kernels
def test_packed_attention_of_more_sequences_than_are_looked_at_together():
    lens = [2, 0, 1] * 45 + [17]
    check_packed_attention(DTYPES[0], True, (1, 1), 16, lens, lens)


def check_packed_attention(dtype, causal, heads, width, q_lens, kv_lens):
    N, G = heads
    tile = TILE if ON_GPU else (16, 32, 4, 1)
    segments = Segments.build(q_lens, kv_lens, DEVICE)
    # Rows of a fused projection, so that their stride is not that of a tensor of their own.
    qkv = torch.randn(max(sum(q_lens), sum(kv_lens)), N + 2 * G, width, device=DEVICE, dtype=dtype)
    q, k, v = qkv.split((N, G, G), dim=1)
    q, k, v = q[: sum(q_lens)], k[: sum(kv_lens)], v[: sum(kv_lens)]
    ours = packed_attention(q, k, v, segments.q_starts, segments.kv_starts, causal=causal, tile=tile)
    full = Segments.build([n for n in q_lens if n], [n for n in kv_lens if n], DEVICE)
    exact, plain = (
        plain_attention(q.to(kind), k.to(kind), v.to(kind), full, causal=causal) for kind in (torch.float64, dtype)
    )
    within_rounding(ours, exact, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "width"), [((8, 2), 128), ((3, 3), 72), ((4, 1), 80)])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([1], [1]),
        ([63, 0, 64, 65, 127, 128, 129], [63, 0, 64, 65, 127, 128, 129]),
        ([5, 130, 1, 700], [200, 130, 77, 1000]),
        ([7] * 40, [7] * 40),
    ],
)
def test_hopper_attention(dtype, causal, heads, width, q_lens, kv_lens):
    from qwen3vl_moe.ops.kernels.hopper_attention import hopper_attention, takes

    N, G = heads
    segments = Segments.build(q_lens, kv_lens, "cuda")
    qkv = torch.randn(max(sum(q_lens), sum(kv_lens)), N + 2 * G, width, device="cuda", dtype=dtype)
    q, k, v = qkv.split((N, G, G), dim=1)
    q, k, v = q[: sum(q_lens)], k[: sum(kv_lens)], v[: sum(kv_lens)]
    assert takes(q, k, v)
    ours = hopper_attention(q, k, v, segments.q_starts, segments.kv_starts, causal=causal)
    full = Segments.build([n for n in q_lens if n], [n for n in kv_lens if n], "cuda")
    exact, plain = (
        plain_attention(q.to(kind), k.to(kind), v.to(kind), full, causal=causal) for kind in (torch.float64, dtype)
    )
    within_rounding(ours, exact, plain)
    # A neighbour's NaN stays with the neighbour, whatever tiles the two share.
    if len(q_lens) > 1:
        first = kv_lens[0]
        k[first:], v[first:] = torch.nan, torch.nan
        again = hopper_attention(q, k, v, segments.q_starts, segments.kv_starts, causal=causal)
        assert torch.equal(again[: q_lens[0]], ours[: q_lens[0]])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([2], [2]),
        ([63, 0, 64, 1, 65, 127, 128, 129], [63, 0, 640, 5, 65, 130, 1280, 1000]),
        ([1] * 150 + [700, 1, 300, 1], [*range(1, 151), 2000, 70, 900, 1]),
        ([5], [4001]),
    ],
)
def test_hopper_attention_over_the_cache(dtype, block_size, q_lens, kv_lens):
    """What nobody has written into the cache is NaN here, and decoding sequences' rows are left alone."""
    from qwen3vl_moe.ops.kernels.hopper_attention import hopper_paged_attention, takes_cache

    q, k, v, segments, cache, tables = paged(q_lens, kv_lens, (8, 2), 128, dtype, block_size)
    assert takes_cache(cache)
    ours = torch.full_like(q, torch.nan)
    hopper_paged_attention(q, cache, ours, segments.q_starts, segments.kv_starts, tables)
    singles = torch.cat([torch.full((n,), n == 1) for n in q_lens]).to(DEVICE)
    assert torch.equal(ours.isnan().any(2).any(1), singles)
    full = Segments.build([n for n in q_lens if n], [n for n in kv_lens if n], DEVICE)
    exact, plain = (
        plain_attention(q.to(kind), k.to(kind), v.to(kind), full, causal=True) for kind in (torch.float64, dtype)
    )
    within_rounding(ours[~singles], exact[~singles], plain[~singles])


@runs_kernels
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_attention_over_the_cache_replays_in_a_graph_while_sequences_grow():
    q, _, _, _, cache, tables = paged([1] * 4, [256] * 4, (32, 4), 128, torch.bfloat16)
    q_starts = torch.arange(5, device=DEVICE, dtype=torch.int32)
    kv_starts = torch.tensor([0, 1, 3, 6, 10], dtype=torch.int32, device=DEVICE)
    out, eager = torch.zeros_like(q), torch.zeros_like(q)

    def attend(out):
        paged_decode(q, cache, out, q_starts, kv_starts, tables)
        paged_attention(q, cache, out, q_starts, kv_starts, tables)

    attend(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(out)
    for new, lens in (([1, 1, 1, 1], [256, 1, 77, 128]), ([2, 0, 1, 1], [250, 0, 16, 17])):
        q_starts[1:] = torch.tensor(new).cumsum(0)
        kv_starts[1:] = torch.tensor(lens).cumsum(0)
        graph.replay()
        attend(eager)
        assert torch.equal(out, eager)

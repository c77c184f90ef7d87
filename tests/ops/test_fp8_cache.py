"""The cache in FP8: plain torch against another evaluation, kernels against plain torch, and the engine over it."""

from __future__ import annotations

import pytest
import torch

from qwen3vl_moe import LLM, SamplingParams
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.ops import Segments, cached_attention, reference, rotate_and_store
from qwen3vl_moe.ops.fp8_cache import FP8_CACHE, fp8_views
from tests.interpreted import DEVICE, DTYPES, INTERPRETED, ON_GPU, runs_kernels
from tests.kernels.test_fp8_values import conversions_as_on_a_gpu  # noqa: F401
from tests.ops.test_kernels import rms_norm, within_rounding

BLOCK_SIZE = 16
plain_only = pytest.mark.skipif(INTERPRETED or ON_GPU, reason="once is enough")


def empty_cache(blocks: int, G: int, D: int) -> torch.Tensor:
    return torch.zeros(2, blocks, BLOCK_SIZE, G, D + 4, dtype=FP8_CACHE, device=DEVICE)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each head in FP8 with a scale of its own, value by value in float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for at in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])):
        head = x[tuple(at)].float().cpu()
        scale = head.abs().max() / 448
        out[tuple(at)] = (head / scale).to(torch.float8_e4m3fn).double() * scale.double()
    return out.to(x.device)


def filled(q_lens, kv_lens, heads, D, dtype):
    """Queries, a cache that holds all keys and values, these as the cache holds them, and where they are."""
    N, G = heads
    tables = torch.randperm(sum(-(-n // BLOCK_SIZE) for n in kv_lens)).int().to(DEVICE)
    cache = empty_cache(len(tables) + 1, G, D)
    padded = torch.zeros(len(kv_lens), max(-(-n // BLOCK_SIZE) for n in kv_lens), dtype=torch.int32, device=DEVICE)
    first, keys, values = 0, [], []
    for row, n in zip(padded, kv_lens, strict=True):
        own = tables[first : (first := first + -(-n // BLOCK_SIZE))]
        row[: len(own)] = own
        token = torch.arange(n, device=DEVICE)
        slots = own[token // BLOCK_SIZE].long() * BLOCK_SIZE + token % BLOCK_SIZE
        k, v = (torch.randn(n, G, D, device=DEVICE, dtype=dtype) * 3 for _ in range(2))
        reference.store(k, v, slots, cache)
        keys.append(rounded(k))
        values.append(rounded(v))
    q = torch.randn(sum(q_lens), N, D, device=DEVICE, dtype=dtype)
    segments = Segments.build(q_lens, kv_lens, DEVICE, padded, BLOCK_SIZE)
    return q, cache, torch.cat(keys), torch.cat(values), segments


@plain_only
def test_what_is_stored_is_what_comes_back():
    cache, (k, v) = empty_cache(5, 3, 8), (torch.randn(7, 3, 8) for _ in range(2))
    k[2] = 0
    slots = torch.randperm(80)[:7]
    k_back, v_back = reference.store(k, v, slots, cache)
    assert torch.allclose(k_back.double(), rounded(torch.where(k == 0, 1e-20, k)), rtol=1e-6, atol=1e-18)
    assert torch.allclose(v_back.double(), rounded(v), rtol=1e-6)
    (k_values, _), (k_scales, v_scales) = fp8_views(cache)
    assert k_values.shape == (5, 16, 3, 8)
    assert (k_scales != 0).sum() == (v_scales != 0).sum() == 7 * 3
    assert torch.allclose(k_scales[slots // 16, slots % 16][0], k[0].abs().amax(-1) / 448)
    before = cache.clone()
    reference.store(k, v, slots, cache)
    assert torch.equal(cache, before)


@plain_only
@pytest.mark.parametrize(("q_lens", "kv_lens"), [((1, 1), (40, 3)), ((5, 1, 20), (37, 20, 20))])
def test_plain_attention_over_it(q_lens, kv_lens):
    q, cache, k, v, segments = filled(q_lens, kv_lens, (4, 2), 16, torch.float32)
    exact = reference.attention(q.double(), k, v, segments, causal=True)
    ours = reference.cached_attention(q, segments, cache)
    assert torch.allclose(ours.double(), exact, atol=2e-5 * float(exact.abs().max()), rtol=0)


@plain_only
def test_what_rounding_does_to_attention():
    """e4m3 is off by at most 2^-4 of a value, evenly spread: a mean square of at most (2^-4 x)^2 / 3, independently for
    every channel. What follows for the output, to first order, is sharp: e5m2 would miss it by half."""
    q_len, U, N, G, D = 40, 200, 4, 2, 16
    q, k, v = torch.randn(q_len, N, D).double(), torch.randn(U, G, D), torch.randn(U, G, D)
    cache, tables = empty_cache(13, G, D), torch.arange(13, dtype=torch.int32)[None]
    reference.store(k, v, torch.arange(U), cache)
    segments = Segments.build([q_len], [U], "cpu", tables, BLOCK_SIZE)
    ours = reference.cached_attention(q, segments, cache)
    exact = reference.attention(q, k.double(), v.double(), segments, causal=True)

    k, v = (x.double().repeat_interleave(N // G, dim=1) for x in (k, v))
    seen = torch.ones(q_len, U, dtype=torch.bool).tril(U - q_len)[:, None]
    scores = torch.einsum("tnd,und->tnu", q, k) / D**0.5
    p2 = scores.masked_fill(~seen, -torch.inf).softmax(-1).square()
    score_off2 = torch.einsum("tnd,und->tnu", q**2, k**2) / D * (2**-8 / 3)
    from_keys = torch.einsum("tnu,tund->tnd", p2 * score_off2, (v - exact[:, None]) ** 2)
    from_values = torch.einsum("tnu,und->tnd", p2, v**2) * (2**-8 / 3)
    bound = (from_keys + from_values).mean().sqrt()
    assert bound / 2 < (ours - exact).square().mean().sqrt() < bound


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "D"), [((4, 2), 16), ((6, 1), 24), *([((32, 4), 128)] if ON_GPU else [])])
@pytest.mark.parametrize("T", [5, 259])
def test_rotation_stores_it(dtype, heads, D, T):
    from qwen3vl_moe.ops.kernels.rotation import norm_rotate_store

    N, G = heads
    qkv = torch.randn(T, (N + 2 * G) * D, device=DEVICE, dtype=dtype)
    angle = torch.rand(T, D // 2, device=DEVICE) * 6
    norms = tuple(rms_norm(torch.rand(D, device=DEVICE, dtype=dtype) + 0.5) for _ in range(2))
    slots = torch.randperm(16 * 20)[:T].to(DEVICE)
    ours, plain = empty_cache(20, G, D), empty_cache(20, G, D)
    expected = reference.rotate_and_store(qkv.clone(), heads, angle.cos(), angle.sin(), norms, slots, plain)
    skipped = slots.clone()
    skipped[[2, T - 1]] = -1
    q, k, v = norm_rotate_store(qkv.clone(), heads, angle.cos(), angle.sin(), norms, skipped, ours)
    assert torch.equal(v.float(), expected[2].float()) or (v.float() != expected[2].float()).float().mean() < 1e-2
    step = 2.0**-3  # of FP8: the norm's rounding may carry a value across the middle of two numbers
    for got, want in ((q, expected[0]), (k, expected[1]), (v, expected[2])):
        assert torch.allclose(got.float(), want.float(), rtol=step, atol=step * 2**-6 * float(want.abs().max()))
    for got, want in zip(fp8_views(ours)[1], fp8_views(plain)[1], strict=True):
        block, place = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        assert (got[block[2], place[2]] == 0).all(), "a row that is to be skipped was written"
        there = torch.ones(T, dtype=torch.bool)
        there[[2, T - 1]] = False
        unit = torch.finfo(dtype).eps
        assert torch.allclose(got[block, place][there], want[block, place][there], rtol=4 * unit, atol=0)
        assert (got != 0).sum() == (T - 2) * G
    # What the step itself attends to is what the cache holds.
    block, place = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    for values, scales, got in zip(*fp8_views(ours), (k, v), strict=True):
        held = values[block, place].view(torch.float8_e4m3fn).float() * scales[block, place][..., None]
        assert torch.equal(held[3].to(dtype), got[3])


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "D"), [((4, 2), 16), ((3, 3), 24), *([((32, 4), 128)] if ON_GPU else [])])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ((1, 1, 1), (1, 70, 17)),
        ((3, 1, 70), (3, 40, 200)),
        *([((1,), (9000,)), ((700, 1), (5000, 300))] if ON_GPU else []),
    ],
)
def test_attention_over_it(dtype, heads, D, q_lens, kv_lens):
    q, cache, k, v, segments = filled(q_lens, kv_lens, heads, D, dtype)
    if not ON_GPU:
        from qwen3vl_moe.ops.kernels.packed_attention import paged_attention
        from qwen3vl_moe.ops.kernels.paged_decode import paged_decode

        out = torch.empty_like(q)
        places = segments.q_starts, segments.kv_starts, segments.block_tables
        paged_decode(q, cache, out, *places)
        paged_attention(q, cache, out, *places)
    else:
        out = cached_attention(q, k.to(dtype), v.to(dtype), segments, cache)
    exact = reference.attention(q.double(), k, v, segments, causal=True)
    plain = reference.attention(q, k.to(dtype), v.to(dtype), segments, causal=True)
    # Values times their scales are rounded once more than those of a 16-bit cache: with the probabilities.
    within_rounding(out, exact, plain if dtype == torch.float32 else plain + (plain - exact).abs().max())


@plain_only
def test_a_step_attends_to_what_the_cache_holds():
    """The first chunk of a prompt sees rounded keys, too, so cutting a prompt changes no more than rounding does."""
    N, G, D, T = 4, 2, 16, 30
    qkv, angle, slots = torch.randn(T, (N + 2 * G) * D), torch.rand(T, D // 2), torch.arange(T)
    cache = empty_cache(2, G, D)
    q, k, v = rotate_and_store(qkv, (N, G), angle.cos(), angle.sin(), slots_T=slots, layer_cache=cache)
    tables = torch.tensor([[0, 1]], dtype=torch.int32)
    whole = cached_attention(q, k, v, Segments.build([T], [T], "cpu", tables, BLOCK_SIZE), cache)
    part = Segments.build([10], [T], "cpu", tables, BLOCK_SIZE)
    assert torch.allclose(cached_attention(q[-10:], k[-10:], v[-10:], part, cache), whole[-10:], atol=1e-5)


@plain_only
def test_the_engine_over_it(make_tiny):
    """However a prompt is cut, and whether its beginning is found: the same numbers, but for float32's rounding."""
    tiny = make_tiny("plain")
    options = {"device": "cpu", "progress": False, "max_model_len": 128, "num_blocks": 20}
    whole, cut = (LLM(tiny.path, kv_cache_dtype="fp8", max_prefill_tokens=most, **options) for most in (8192, 7))
    exact = LLM(tiny.path, **options)
    assert whole.settings["kv_cache_dtype"] == "fp8"
    assert exact.settings["kv_cache_dtype"] == "float32"
    assert exact.engine.cache.tensor.nbytes / whole.engine.cache.tensor.nbytes == 4 * 16 / 20
    prompts = ["A b c d e f g h", "A b c d e f g h i j k l m n o p", "x"]
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=0)
    answers = [llm.generate(prompts, params) for llm in (whole, whole, cut, exact)]
    for first, again, in_parts, plain in zip(*answers, strict=True):
        assert first.outputs[0].token_ids == again.outputs[0].token_ids == in_parts.outputs[0].token_ids
        values = [
            [entry.logprob for each in answer.outputs[0].logprobs for entry in each.values()]
            for answer in (first, again, in_parts, plain)
        ]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
        assert values[0] == pytest.approx(values[2], abs=1e-4)
        assert abs(values[0][0] - values[3][0]) > 1e-4, "nothing was rounded"
    assert whole.stats["prefix_cache_hits"] > 0


@plain_only
def test_other_dtypes_are_refused(make_tiny):
    with pytest.raises(OptionError, match="kv_cache_dtype='int8' is unknown; choose from auto, fp8"):
        LLM(make_tiny("plain").path, device="cpu", kv_cache_dtype="int8", progress=False)

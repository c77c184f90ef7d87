"""Attention over packed segments against a plain fp64 evaluation, and the cache that it reads."""

import pytest
import torch

from qwen3vl_moe.ops import Segments
from qwen3vl_moe.ops.attend import attention, cached_attention
from qwen3vl_moe.ops.reference import store


def naive(q, k, v, segments, causal):
    """fp64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    out, q0, k0 = [], 0, 0
    for q_len, kv_len in zip(segments.q_lens, segments.kv_lens, strict=True):
        for i in range(q_len):
            seen = k0 + (kv_len - q_len + i + 1 if causal else kv_len)
            heads = []
            for n in range(q.shape[1]):
                weights = torch.softmax(k[k0:seen, n // group] @ q[q0 + i, n] / q.shape[2] ** 0.5, dim=0)
                heads.append(weights @ v[k0:seen, n // group])
            out.append(torch.stack(heads))
        q0, k0 = q0 + q_len, k0 + kv_len
    return torch.stack(out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [([5], [5]), ([1], [1]), ([3, 1, 4], [3, 1, 4]), ([1, 1, 1], [7, 1, 4]), ([2, 1, 5], [6, 9, 5])],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_equals_the_plain_one(q_lens, kv_lens, heads, kv_heads, causal):
    generator = torch.Generator().manual_seed(sum(q_lens))
    q = torch.randn(sum(q_lens), heads, 12, generator=generator)
    k, v = (torch.randn(sum(kv_lens), kv_heads, 12, generator=generator) for _ in range(2))
    segments = Segments.build(q_lens, kv_lens)
    # Softmax averages of values near 1 in fp32: rounding of some twelve products and at most nine sums.
    torch.testing.assert_close(
        attention(q, k, v, segments, causal=causal).double(), naive(q, k, v, segments, causal), rtol=0, atol=5e-6
    )


def test_a_segment_does_not_see_another():
    segments = Segments.build([3, 4])
    q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
    before = attention(q, k, v, segments, causal=False)
    k[3:], v[3:] = torch.nan, torch.nan
    assert torch.equal(attention(q, k, v, segments, causal=False)[:3], before[:3])


def test_a_step_attends_to_what_earlier_steps_wrote():
    """Two steps over scattered blocks give the queries of the second what one step over everything gives them."""
    generator = torch.Generator().manual_seed(0)
    block_size, tables = 4, torch.tensor([[5, 2], [0, 7], [3, 1]], dtype=torch.int32)
    cache = torch.full((2, 8, block_size, 1, 8), torch.nan)
    first, second = [3, 5, 1], [1, 1, 4]
    total = [a + b for a, b in zip(first, second, strict=True)]
    q, k, v = ([torch.randn(n, heads, 8, generator=generator) for n in total] for heads in (2, 1, 1))
    whole = attention(torch.cat(q), torch.cat(k), torch.cat(v), Segments.build(total), causal=True).split(total)

    def step(done, lengths):
        def rows(parts):
            return torch.cat([x[d : d + n] for x, d, n in zip(parts, done, lengths, strict=True)])

        places = [range(d, d + n) for d, n in zip(done, lengths, strict=True)]
        slots = [int(tables[s, p // 4]) * 4 + p % 4 for s, span in enumerate(places) for p in span]
        total = [d + n for d, n in zip(done, lengths, strict=True)]
        segments = Segments.build(lengths, total, block_tables=tables, block_size=block_size)
        store(rows(k), rows(v), torch.tensor(slots), cache)
        return cached_attention(rows(q), rows(k), rows(v), segments, cache).split(lengths)

    step([0, 0, 0], first)
    for ours, theirs, n in zip(step(first, second), whole, second, strict=True):
        torch.testing.assert_close(ours, theirs[-n:], rtol=0, atol=5e-6)

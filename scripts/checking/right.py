"""Whether each operation gives the right result on this machine, by whatever runs it there.

A result is compared with the same operation in float64 (float32 for whole layers of experts). It is right if its error
is at most twice what plain torch makes in the working dtype; where plain torch is what runs, a few units of that dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, update_wrapper

import torch
from torch import Tensor, nn

import tma_moe
from benchmarking.moe import MoeShape, dequantised, draw_routing, random_experts, relative_error
from qwen3vl_moe import ops
from qwen3vl_moe.ops import Segments, reference
from qwen3vl_moe.ops.dispatch import takes_kernels
from tma_moe.block_fp8 import quantize_blocks, quantize_rows, scaled_linear
from tma_moe.support import interpreting

FULL = MoeShape()  # the 30B model's
SMALL = MoeShape(num_experts=5, experts_per_token=2, hidden_size=144, expert_width=80)
_LEAST_FOR_FULL = 8 * 2**30  # bytes
_UNITS = 8  # of the dtype's rounding that plain torch may be off


@dataclass(frozen=True)
class Result:
    """One operation: what ran it, its relative error, and the largest that would be right."""

    operation: str
    by: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed


def results(device: torch.device, dtype: torch.dtype, memory: int) -> Iterator[Result]:
    """All of them, one after the other. An operation that fails is wrong, and its error is the message.

    Args:
        memory: bytes that may be taken; with few, the layer of experts is a small one.
    """
    torch.manual_seed(0)
    experts = partial(_experts, enough=memory > _LEAST_FOR_FULL)
    update_wrapper(experts, _experts)
    for check in (_routing, experts, _norms, _rotation, _attention, _block_linear, _resize):
        try:
            yield from check(device, dtype)
        except Exception as error:  # kernels fail in many ways, and the rest is worth knowing
            message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            yield Result(check.__name__.strip("_").replace("_", " "), message, float("inf"), 0.0)


def _backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    found = [name for name in ("tma", "triton") if tma_moe.unavailable(device, dtype, backend=name) is None]
    return found or ["reference"]


def _runner(x: Tensor) -> str:
    return "kernel" if takes_kernels(x) else "torch"


def _judged(operation: str, by: str, ours: Tensor, plain: Tensor, exact: Tensor) -> Result:
    unit = torch.finfo(ours.dtype).eps
    allowed = _UNITS * unit if by in ("torch", "reference") else max(2 * relative_error(plain, exact), unit / 2)
    return Result(operation, by, relative_error(ours, exact), allowed)


def _routing(device: torch.device, dtype: torch.dtype) -> Iterator[Result]:
    logits_TE = torch.randn(300 if device.type == "cuda" else 5, 128, device=device)
    expected_ids, expected = tma_moe.route(logits_TE, 8, backend="reference")
    for backend in _backends(device, dtype):
        ids, weights = tma_moe.route(logits_TE, 8, backend=backend)
        error = (weights - expected).abs().max().item() if torch.equal(ids, expected_ids) else float("inf")
        yield Result("choice of experts", backend, error, 8 * torch.finfo(torch.float32).eps)


def _experts(device: torch.device, dtype: torch.dtype, enough: bool) -> Iterator[Result]:
    on_card = device.type == "cuda"
    base, tokens = (FULL if on_card and enough else SMALL), ((1, 8, 32, 200, 450, 2048) if on_card else (1, 18))
    kind = str(dtype).removeprefix("torch.")
    for fp8 in (False,) if interpreting() else (False, True):  # triton's interpreter rounds to FP8 wrongly
        shape = MoeShape(*(base.num_experts, base.experts_per_token, base.hidden_size, base.expert_width), fp8=fp8)
        experts = random_experts(shape, str(device), dtype)
        exact_experts = dequantised(experts, torch.float32)
        for T in tokens:
            x_TH = torch.randn(T, shape.hidden_size, device=device, dtype=dtype)
            route = draw_routing("zipf", T, shape, seed=T, device=device)
            exact = tma_moe.fused_moe(x_TH.float(), *route, exact_experts, backend="reference")
            plain = tma_moe.fused_moe(x_TH, *route, experts, backend="reference")
            assert isinstance(exact, Tensor)
            assert isinstance(plain, Tensor)
            for backend in _backends(device, dtype):
                ours = tma_moe.fused_moe(x_TH, *route, experts, backend=backend)
                assert isinstance(ours, Tensor)
                result = _judged(
                    f"experts, {'FP8' if fp8 else kind}, {T} token{'s' * (T > 1)}", backend, ours, plain, exact
                )
                if fp8 and backend == "reference":  # what the format itself rounds
                    result = Result(result.operation, backend, result.error, 0.1)
                yield result


def _norms(device: torch.device, dtype: torch.dtype) -> Iterator[Result]:
    x_TH, y_TH = (torch.randn(37, 2048, device=device, dtype=dtype) for _ in range(2))
    norm = nn.RMSNorm(2048, eps=1e-6, device=device, dtype=dtype)
    total_TH = x_TH + y_TH
    exact = nn.functional.rms_norm(total_TH.double(), (2048,), norm.weight.double(), 1e-6)
    stream = ops.ResidualStream(x_TH.clone())
    stream.add(y_TH)
    yield _judged("add and RMSNorm", _runner(x_TH), stream.normed(norm), norm(total_TH), exact)
    tower = nn.LayerNorm(1152, eps=1e-6, device=device, dtype=dtype)
    x_PC = torch.randn(37, 1152, device=device, dtype=dtype)
    exact = nn.functional.layer_norm(x_PC.double(), (1152,), tower.weight.double(), tower.bias.double(), 1e-6)
    ours = ops.ResidualStream(x_PC.clone()).normed(tower)
    yield _judged("LayerNorm", _runner(x_PC), ours, tower(x_PC), exact)


def _rotation(device: torch.device, dtype: torch.dtype) -> Iterator[Result]:
    T, N, G, D = 37, 32, 4, 128
    qkv = torch.randn(T, (N + 2 * G) * D, device=device, dtype=dtype)
    angle_TF = torch.rand(T, D // 2, device=device) * 6
    norms = [nn.RMSNorm(D, eps=1e-6, device=device, dtype=dtype) for _ in range(2)]
    slots_T = torch.randperm(48, device=device)[:T]
    cache = torch.zeros(2, 3, 16, G, D, device=device, dtype=dtype)
    operands = (N, G), angle_TF.cos(), angle_TF.sin()
    plain_cache, exact_cache = cache.clone(), cache.double()
    exact_norms = [nn.RMSNorm(D, eps=1e-6, device=device, dtype=torch.float64) for _ in range(2)]
    q, k, _ = ops.rotate_and_store(
        qkv.clone(), *operands, norms=(norms[0], norms[1]), slots_T=slots_T, layer_cache=cache
    )
    plain = reference.rotate_and_store(qkv, *operands, (norms[0], norms[1]), slots_T, plain_cache)
    exact = reference.rotate_and_store(qkv.double(), *operands, (exact_norms[0], exact_norms[1]), slots_T, exact_cache)
    for name, ours, other, right in (("queries", q, plain[0], exact[0]), ("keys", k, plain[1], exact[1])):
        yield _judged(f"norm and rotation, {name}", _runner(qkv), ours, other, right)
    yield _judged("keys and values in the cache", _runner(qkv), cache, plain_cache, exact_cache)


def _attention(device: torch.device, dtype: torch.dtype) -> Iterator[Result]:
    lengths = (1, 70, 300) if device.type == "cuda" else (1, 20)
    for name, (N, G, D), causal in (("decoder", (32, 4, 128), True), ("vision tower", (16, 16, 72), False)):
        q, k, v = (torch.randn(sum(lengths), heads, D, device=device, dtype=dtype) for heads in (N, G, G))
        segments = Segments.build(lengths, device=device)
        exact = reference.attention(q.double(), k.double(), v.double(), segments, causal=causal)
        plain = reference.attention(q, k, v, segments, causal=causal)
        ours = ops.attention(q, k, v, segments, causal=causal)
        yield _judged(f"attention, {name}", _runner(q), ours, plain, exact)
    G, D, size = 4, 128, 16
    past = (200, 1000, 30) if device.type == "cuda" else (20, 40)
    q_lens = (1, 1, 25)[: len(past)]
    kv_lens = tuple(old + new for old, new in zip(past, q_lens, strict=True))
    blocks = -(-max(kv_lens) // size)
    tables = torch.arange(len(past) * blocks, dtype=torch.int32, device=device).view(len(past), blocks)
    cache = torch.randn(2, tables.numel(), size, G, D, device=device, dtype=dtype)
    segments = Segments.build(q_lens, kv_lens, device, tables, size)
    q = torch.randn(sum(q_lens), 32, D, device=device, dtype=dtype)
    k, v = (torch.randn(sum(q_lens), G, D, device=device, dtype=dtype) for _ in range(2))
    exact = reference.cached_attention(q.double(), segments, cache.double())
    plain = reference.cached_attention(q, segments, cache)
    yield _judged("attention over the cache", _runner(q), ops.cached_attention(q, k, v, segments, cache), plain, exact)


def _block_linear(device: torch.device, dtype: torch.dtype) -> Iterator[Result]:
    layer = ops.BlockLinear(2048, 1024).to(device)
    w8, scale = quantize_blocks(torch.randn(1024, 2048) * 2048**-0.5)
    layer.weight.data.copy_(w8)
    layer.scale.data.copy_(scale)
    for T in (1, 40, 600) if device.type == "cuda" else (1, 40):
        x_TK = torch.randn(T, 2048, device=device, dtype=dtype)
        exact = (
            x_TK.float()
            @ (layer.weight.float() * scale.to(device).repeat_interleave(128, 0).repeat_interleave(128, 1)).T
        )
        plain = scaled_linear(*quantize_rows(x_TK), layer.weight, layer.scale).to(dtype)
        result = _judged(f"linear layer in FP8, {T} row{'s' * (T > 1)}", _runner(x_TK), layer(x_TK), plain, exact)
        yield Result(result.operation, result.by, result.error, 2 * relative_error(plain, exact))


def _resize(device: torch.device, dtype: torch.dtype) -> Iterator[Result]:
    pixels_HW3 = torch.randint(256, (97, 131, 3), dtype=torch.uint8)
    expected = ops.resize_picture(pixels_HW3, 64, 96)
    ours = ops.resize_picture(pixels_HW3.to(device), 64, 96).cpu()
    error = 0.0 if torch.equal(ours, expected) else float("inf")
    yield Result("resize of pictures", "kernel" if device.type == "cuda" else "torch", error, 0.0)


def working_dtype(device: torch.device) -> torch.dtype:
    """What is checked: bfloat16, but in triton's interpreter, whose products of bfloat16 are wrong, float16."""
    return torch.float16 if device.type == "cpu" and interpreting() else torch.bfloat16

"""What the timing programs share: problem shapes, routings, floors, the grouped_mm baseline and a timer for the GPU.

Shape letters: T tokens, H hidden, E experts, K chosen experts, I expert width.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tma_moe
from benchmarking.card import Ceilings, card, ceilings, fp8_rate, median_seconds
from tma_moe.block_fp8 import dequantize_blocks, quantize_blocks


@dataclass(frozen=True)
class MoeShape:
    """One MoE layer: E experts of which a token uses K; hidden size H; expert width I; how the weights are stored."""

    num_experts: int = 128
    experts_per_token: int = 8
    hidden_size: int = 2048
    expert_width: int = 768
    fp8: bool = False  # weights in block-scaled FP8

    @classmethod
    def parse(cls, text: str, dtype: str = "bf16") -> "MoeShape":
        """Reads `"E,K,H,I"`, for example `"128,8,2048,768"`, and "bf16" or "fp8"; ValueError says what is wrong."""
        if dtype not in ("bf16", "fp8"):
            raise ValueError(f"dtype {dtype!r} is unknown: choose bf16 or fp8")
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 4 or min(numbers) < 1:
            raise ValueError(f"shape {text!r} is not four positive integers E,K,H,I such as 128,8,2048,768")
        if numbers[1] > numbers[0]:
            raise ValueError(
                f"shape {text!r} asks for {numbers[1]} experts per token but has only {numbers[0]} experts"
            )
        return cls(*numbers, fp8=dtype == "fp8")

    def __str__(self) -> str:
        sizes = f"{self.num_experts},{self.experts_per_token},{self.hidden_size},{self.expert_width}"
        return f"{sizes} in fp8" if self.fp8 else sizes

    def expert_bytes(self, itemsize: int) -> int:
        """Bytes of one expert's gate, up and down matrices."""
        return 3 * self.hidden_size * self.expert_width * itemsize

    def flops(self, num_tokens: int) -> int:
        """Floating-point operations of the three matrix products, a multiply-add counted as two."""
        return num_tokens * self.experts_per_token * 2 * 3 * self.hidden_size * self.expert_width


def first_that_runs(backend: str) -> tuple[str, str | None]:
    """A backend of kernels by name, or for "auto" the first that runs on the current GPU; and why it does not run.

    Raises ValueError for another name.
    """
    kernels = ("tma", "triton")
    if backend not in ("auto", *kernels):
        raise ValueError(f"{backend!r} is unknown: choose auto, {' or '.join(kernels)}")
    tried = kernels if backend == "auto" else (backend,)
    reasons = {name: tma_moe.unavailable("cuda", torch.bfloat16, backend=name) for name in tried}
    backend = next((name for name in tried if reasons[name] is None), tried[-1])
    return backend, reasons[backend]


def random_experts(shape: MoeShape, device: str, dtype: torch.dtype) -> tma_moe.ExpertWeights:
    """Experts with random weights: of `dtype`, or for an FP8 shape quantised, one matrix after the other."""
    sizes = shape.num_experts, shape.hidden_size, shape.expert_width
    experts = tma_moe.ExpertWeights(*sizes, device=device, dtype=tma_moe.FP8 if shape.fp8 else dtype)
    for weight, scale, width in (
        (experts.gate_up, experts.gate_up_scale, shape.hidden_size),
        (experts.down, experts.down_scale, shape.expert_width),
    ):
        if scale is None:
            weight.normal_(std=width**-0.5)
            continue
        for matrix, of_matrix in zip(weight.data, scale.data, strict=True):
            w8, scales = quantize_blocks(torch.randn(matrix.shape, device=device) * width**-0.5)
            matrix.copy_(w8)
            of_matrix.copy_(scales)
    return experts


def dequantised(experts: tma_moe.ExpertWeights, dtype: torch.dtype) -> tma_moe.ExpertWeights:
    """The same weights in another dtype; those of FP8 times their scales."""
    weights = [
        weight.to(dtype) if scale is None else dequantize_blocks(weight, scale, dtype)
        for weight, scale in ((experts.gate_up, experts.gate_up_scale), (experts.down, experts.down_scale))
    ]
    return tma_moe.ExpertWeights.from_checkpoint(*weights, "transformers5")


def parse_tokens(text: str) -> list[int]:
    """Reads `"1,8,32"` into a sorted list of distinct token counts; ValueError says what is wrong with it."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise ValueError(f"tokens {text!r} is not a list of positive integers such as 1,32,4096")
    return counts


def draw_routing(
    kind: str, num_tokens: int, shape: MoeShape, *, seed: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random routing: K distinct experts per token.

    `kind` is `"uniform"` (every expert equally likely) or `"zipf"` (the expert of rank r has probability
    proportional to 1/r, the ranks shuffled over the experts: a few hot experts, a long cold tail).
    Returns `(topk_ids_TK int32, topk_weights_TK float32)`, each row of weights summing to 1. The same seed gives the
    same routing on every device.
    """
    E, K = shape.num_experts, shape.experts_per_token
    generator = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        log_probability_E = torch.zeros(E)
    elif kind == "zipf":
        log_probability_E = -torch.log(torch.randperm(E, generator=generator) + 1.0)
    else:
        raise ValueError(f"routing {kind!r} is unknown: choose uniform or zipf")
    # Adding Gumbel noise and taking the K largest draws K experts without replacement (Kool et al. 2019, section 2).
    noise_TE = -torch.log(torch.empty(num_tokens, E).exponential_(generator=generator))
    topk_ids_TK = (log_probability_E + noise_TE).topk(K).indices.to(torch.int32)
    weights_TK = torch.rand(num_tokens, K, generator=generator) + 0.1
    return topk_ids_TK.to(device), (weights_TK / weights_TK.sum(-1, keepdim=True)).to(device)


def floor_us(shape: MoeShape, topk_ids_TK: Tensor, ceilings: Ceilings, itemsize: int = 2) -> tuple[float, str]:
    """The least time the op can take, in microseconds, and its limit: `"memory"` or `"math"`.

    The larger of: the weights of the experts that this routing touches, read once, over the measured bandwidth; the
    matrix products over the measured rate. Activations are left out: they are small beside the weights or stay in L2.
    """
    memory = topk_ids_TK.unique().numel() * shape.expert_bytes(itemsize) / ceilings.bytes_per_second
    math = shape.flops(topk_ids_TK.shape[0]) / ceilings.flops_per_second
    return (memory * 1e6, "memory") if memory >= math else (math * 1e6, "math")


def grouped_mm_moe(x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The baseline: the same op from torch's own parts, with no host synchronisation.

    Sort the token slots by expert, `grouped_mm`, SwiGLU, `grouped_mm`, weigh, put back, sum over K. The routing weights
    are rounded to the dtype of the activations first, as the models in transformers do.
    """
    K = topk_ids_TK.shape[1]
    sorted_ids, order = topk_ids_TK.flatten().sort()
    experts_E = torch.arange(gate_up.shape[0], dtype=sorted_ids.dtype, device=sorted_ids.device)
    ends_E = torch.searchsorted(sorted_ids, experts_E, right=True, out_int32=True)
    rows = x_TH[order // K]
    gate, up = torch.nn.functional.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    rows = torch.nn.functional.grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(1, 2), offs=ends_E)
    rows = rows * topk_weights_TK.flatten()[order, None].to(rows.dtype)
    slots = torch.empty_like(rows)
    slots[order] = rows
    return slots.view(*topk_ids_TK.shape, -1).sum(dim=1)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """`|out - reference| / |reference|` (Frobenius norms in float64); infinite if any element is not finite."""
    error = ((out.double() - reference.double()).norm() / reference.double().norm()).item()
    return error if error == error else float("inf")


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of the samples."""
    if len(samples) == 1:
        return {"median": samples[0], "p20": samples[0], "p80": samples[0]}
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "p20": fifths[0], "p80": fifths[3]}


@dataclass(frozen=True)
class Candidate:
    """Something to time: `run()` makes `num_calls` calls of the op, over weight sets that together exceed the L2."""

    run: Callable[[], object]
    num_calls: int


class CudaTimer:
    """Times candidates on the current CUDA device, in microseconds per call.

    Candidates are sampled in turns, so that a drift of the clocks falls on all alike. `samples` is the number of
    samples of each, `sample_us` the least length of a sample of graph replay.
    """

    def __init__(self, samples: int = 30, sample_us: float = 2000.0):
        self.samples, self.sample_us = samples, sample_us

    def card(self) -> dict[str, str]:
        """The card as it is now: :func:`benchmarking.card.card`."""
        return card()

    def ceilings(self) -> Ceilings:
        """What the card can do: :func:`benchmarking.card.ceilings`."""
        return ceilings("cuda")

    def fp8_ceilings(self) -> Ceilings:
        """The same with products in FP8."""
        return replace(ceilings("cuda"), flops_per_second=fp8_rate("cuda"))

    def graph_us(self, candidates: dict[str, Candidate]) -> dict[str, list[float]]:
        """Samples of each candidate replayed from a CUDA graph: the work of the GPU alone."""
        graphs = {}
        for name, candidate in candidates.items():
            candidate.run()  # compiles, and fills workspaces, before anything is captured
            one_run_us = self._median_us(self._capture(candidate.run, 1).replay, repeats=3)
            rounds = min(200, max(1, round(self.sample_us / one_run_us)))
            graphs[name] = (self._capture(candidate.run, rounds), rounds * candidate.num_calls)
        events = []
        for name, (graph, num_calls) in list(graphs.items()) * (self.samples + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            events.append((name, start, end, num_calls))
        torch.cuda.synchronize()
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for name, start, end, num_calls in events[len(graphs) :]:  # the first of each warms up
            samples[name].append(start.elapsed_time(end) * 1e3 / num_calls)
        return samples

    def eager_us(self, candidates: dict[str, Candidate], seconds: float = 1.0) -> dict[str, dict[str, list[float]]]:
        """Samples of each candidate launched from Python onto an empty queue, for about `seconds` each.

        `"host"` is what the launches cost the host, `"total"` lasts until the GPU is done: the longer of the two works.
        """
        passes = {}
        for name, candidate in candidates.items():
            candidate.run()
            passes[name] = max(5, min(self.samples, int(seconds * 1e6 / self._median_us(candidate.run, repeats=1))))
        samples: dict[str, dict[str, list[float]]] = {name: {"total": [], "host": []} for name in candidates}
        for index in range(max(passes.values())):
            for name, candidate in candidates.items():
                if index >= passes[name]:
                    continue
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                begin = time.perf_counter()
                start.record()
                candidate.run()
                end.record()
                host = time.perf_counter() - begin
                torch.cuda.synchronize()
                samples[name]["host"].append(host * 1e6 / candidate.num_calls)
                samples[name]["total"].append(start.elapsed_time(end) * 1e3 / candidate.num_calls)
        return samples

    def replayed(self, call: Callable[[], Tensor]) -> Tensor:
        """What `call` computes when it is captured and replayed; its buffers are poisoned in between."""
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        out.fill_(float("nan"))
        graph.replay()
        return out.clone()

    def _capture(self, run: Callable[[], object], rounds: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                run()
        graph.replay()
        return graph

    def _median_us(self, call: Callable[[], object], repeats: int = 10) -> float:
        return 1e6 * median_seconds(call, "cuda", repeats)

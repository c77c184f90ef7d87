"""What only a Hopper GPU can show: the shape of the model, CUDA graphs, memory, streams and threads."""

from __future__ import annotations

import gc
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import tma_moe
from tests.kernels.on_hopper import (
    MARKS,
    E,
    H,
    I,
    K,
    assert_as_good_as_the_dtype,
    in_float32,
    make_experts,
    make_inputs,
)
from tma_moe.descriptor_policies import clear_descriptor_cache

pytestmark = MARKS
TOKENS = [1, 2, 4, 5, 8, 17, 64, 129, 200, 321, 450, 641, 1024, 1537, 2048, 4096]
POLICIES = ["per_call", "lru", "owned"]


@pytest.fixture(scope="module", params=[torch.bfloat16, tma_moe.FP8], ids=["bf16", "fp8"])
def experts(request):
    return make_experts(dtype=request.param)


@pytest.fixture(scope="module")
def float32_weights(experts):
    return in_float32(experts)


@pytest.mark.parametrize("T", TOKENS)
def test_values_at_the_models_shape(T, experts, float32_weights):
    inputs = make_inputs(T)
    y = tma_moe.fused_moe(*inputs, experts)
    assert_as_good_as_the_dtype(y, *inputs, experts, float32_weights)
    assert torch.equal(tma_moe.fused_moe(*inputs, experts), y)


@pytest.mark.parametrize("T", [4, 64, 450, 4096])
def test_skewed_routing_and_large_inputs(T, experts, float32_weights):
    x, ids, weights = make_inputs(T, scale=300.0)
    ids[:, 0] = 7  # one expert gets every token
    ids[:, 1:] = torch.where(ids[:, 1:] == 7, 8, ids[:, 1:])
    y = tma_moe.fused_moe(x, ids, weights, experts)
    assert y.isfinite().all()
    assert_as_good_as_the_dtype(y, x, ids, weights, experts, float32_weights)


@pytest.mark.parametrize("T", [4, 100, 600, 5000])
def test_nan_stays_in_its_row(T, experts):
    x, ids, weights = make_inputs(T)
    clean = tma_moe.fused_moe(x, ids, weights, experts)
    x[T // 2] = float("nan")
    y = tma_moe.fused_moe(x, ids, weights, experts)
    assert y[T // 2].isnan().all()
    y[T // 2] = clean[T // 2]
    assert torch.equal(y, clean)


# FP8 has another choice of tiles for a single token.
@pytest.mark.parametrize(("T", "rows"), [(4, 2), (100, 30), (600, 450), (1500, 1400), (5000, 4200), (9000, 8000)])
def test_a_tokens_output_does_not_depend_on_its_batch(T, rows, experts):
    x, ids, weights = make_inputs(T)
    part = slice(T - rows, T)
    alone = tma_moe.fused_moe(x[part].clone(), ids[part].clone(), weights[part].clone(), experts)
    assert torch.equal(tma_moe.fused_moe(x, ids, weights, experts)[part], alone)


@pytest.mark.parametrize("T", [1, 32, 450, 4096])
def test_captured_graph_replays_with_other_routing(T, experts):
    static = make_inputs(T)
    for _ in range(2):
        tma_moe.fused_moe(*static, experts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tma_moe.fused_moe(*static, experts)
    for seed in (1, 2):
        for target, source in zip(static, make_inputs(T, seed), strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(y, tma_moe.fused_moe(*static, experts))


@pytest.mark.parametrize("T", [4, 64, 1024])
def test_a_graph_skips_what_the_replay_says(T, experts):
    """What pads a captured batch differs from replay to replay, and is told on the device."""
    x, logits = make_inputs(T)[0], torch.randn(T, E, device="cuda")
    skip = torch.zeros(T, dtype=torch.bool, device="cuda")

    def step() -> torch.Tensor:
        return tma_moe.fused_moe(x, *tma_moe.route(logits, K, skip_T=skip), experts)

    whole = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for padding in (0, 1, T // 2, T):
        skip.copy_(torch.arange(T, device="cuda") >= T - padding)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, whole.masked_fill(skip[:, None], 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, tma_moe.FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("T", [1, 2, 4, 30, 200])
@pytest.mark.parametrize("shape", [(16, 4, 256, 80), (32, 4, 512, 128), (8, 2, 1024, 256), (E, K, H, I)], ids=str)
def test_a_chain_in_a_graph_is_never_out_of_turn(shape, T, dtype):
    """Routing and experts, step after step in one graph: each launch may begin before the one before it has ended.

    Every step has experts of its own choice, and other ones in every replay, so whatever is read too early is another
    step's. The right answer is bitwise what the same launches give one at a time.
    """
    E, K, H, I = shape  # noqa: E741
    steps, replays = (200, 10) if E < 128 else (40, 10)
    experts = make_experts(sizes=(E, H, I), dtype=dtype)
    x = torch.randn(steps, T, H, device="cuda", dtype=torch.bfloat16)
    static = torch.empty(steps, T, E, device="cuda", dtype=torch.bfloat16)

    def step(i: int, wait: bool) -> torch.Tensor:
        ids, weights = tma_moe.route(static[i], K)
        if wait:
            torch.cuda.synchronize()
        y = tma_moe.fused_moe(x[i], ids, weights, experts)
        if wait:
            torch.cuda.synchronize()
        return y

    static.normal_()
    for i in range(2):
        step(i, wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [step(i, wait=False) for i in range(steps)]
    for _ in range(replays):
        static.normal_(std=3.0)
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        wrong = [i for i in range(steps) if not torch.equal(outs[i], step(i, wait=True))]
        assert not wrong, f"{len(wrong)} of {steps} steps, the first is number {wrong[0]}"


@pytest.mark.parametrize("T", [4, 64, 1024])
def test_no_host_synchronisation(T, experts):
    inputs = make_inputs(T)
    tma_moe.fused_moe(*inputs, experts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tma_moe.fused_moe(*inputs, experts)
        tma_moe.route(torch.randn(T, E, device="cuda"), K)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", POLICIES)
def test_dropping_the_weights_returns_their_memory(policy):
    inputs = make_inputs(64)
    with tma_moe.descriptor_policy(policy):
        tma_moe.fused_moe(*inputs, make_experts())
        clear_descriptor_cache()
        gc.collect()
        before = torch.cuda.memory_allocated()
        held = make_experts()
        size = 2 * sum(p.numel() for p in held.parameters())
        y = tma_moe.fused_moe(*inputs, held)
        del held, y
        gc.collect()
        kept = torch.cuda.memory_allocated() - before
        if policy == "lru":
            # This is the price of keeping objects in a table: the weights stay until it is emptied.
            assert kept >= size
            clear_descriptor_cache()
            kept = torch.cuda.memory_allocated() - before
        assert kept == 0


@pytest.mark.parametrize("T", [4, 64, 5000])
@pytest.mark.parametrize("policy", POLICIES)
def test_other_weights_at_the_same_address(policy, T):
    inputs = make_inputs(T)
    expected = [tma_moe.fused_moe(*inputs, make_experts(seed)) for seed in (0, 1)]
    with tma_moe.descriptor_policy(policy):
        layer = make_experts(0)
        address = layer.gate_up.data_ptr()
        assert torch.equal(tma_moe.fused_moe(*inputs, layer), expected[0])
        torch.cuda.synchronize()
        del layer
        clear_descriptor_cache()
        gc.collect()
        others = []  # kept, until the allocator has no other block left to give
        while (layer := make_experts(1)).gate_up.data_ptr() != address and len(others) < 8:
            others.append(layer)
        assert layer.gate_up.data_ptr() == address, "the allocator did not re-use the address: the test shows nothing"
        assert torch.equal(tma_moe.fused_moe(*inputs, layer), expected[1])
        # Re-bound and filled in place: both must be seen.
        other = make_experts(0)
        layer.gate_up, layer.down = other.gate_up, other.down
        assert torch.equal(tma_moe.fused_moe(*inputs, layer), expected[0])
        fresh = make_experts(1)
        layer.gate_up.data, layer.down.data = fresh.gate_up.data, fresh.down.data
        assert torch.equal(tma_moe.fused_moe(*inputs, layer), expected[1])


@pytest.mark.parametrize("policy", POLICIES)
def test_threads_with_streams_of_their_own(policy):
    layers = [make_experts(seed) for seed in range(3)]
    inputs = [make_inputs(T, seed=T) for T in (3, 64, 700)]
    expected = [[tma_moe.fused_moe(*given, layer) for given in inputs] for layer in layers]
    torch.cuda.synchronize()
    wrong = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                for i, given in enumerate(inputs):
                    if not torch.equal(tma_moe.fused_moe(*given, layers[number]), expected[number][i]):
                        wrong.append((number, i))

    with tma_moe.descriptor_policy(policy):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((8, 2, 4096, 14336), id="mixtral-8x7b"),
        pytest.param((60, 4, 2048, 1408), id="qwen1.5-moe-a2.7b"),
        pytest.param((7, 7, 264, 136), id="odd"),
    ],
)
@pytest.mark.parametrize("T", [3, 40, 1200])
def test_other_models(sizes, T):
    experts, topk, hidden, width = sizes
    layer = make_experts(dtype=torch.float16, sizes=(experts, hidden, width))
    inputs = make_inputs(T, dtype=torch.float16, sizes=(experts, topk, hidden))
    y = tma_moe.fused_moe(*inputs, layer)
    assert_as_good_as_the_dtype(y, *inputs, layer, in_float32(layer))


def test_one_shape_in_several_dtypes():
    """One after the other in one process: a kernel that is kept for one dtype must not read another."""
    sizes = 8, 256, 128
    for dtype in (torch.bfloat16, torch.float16):
        layer = make_experts(dtype=dtype, sizes=sizes)
        for ids_dtype, weights_dtype in ((torch.int32, torch.float32), (torch.int64, torch.float32), (None, dtype)):
            x, ids, weights = make_inputs(77, dtype=dtype, sizes=(8, 4, 256))
            inputs = x, ids.to(ids_dtype or torch.int64), weights.to(weights_dtype)
            for backend in ("tma", "triton"):
                y = tma_moe.fused_moe(*inputs, layer, backend=backend)
                assert_as_good_as_the_dtype(y, *inputs, layer, in_float32(layer))


def test_host_time_by_policy():
    """48 layers launched eagerly at 64 tokens: `owned` must cost the host less than either other policy.

    At one token, which is printed too, there is nothing to tell apart: the gemv kernels take no descriptors.
    """
    layers = [make_experts(sizes=(8, 256, 128)) for _ in range(48)]
    for T in (1, 64):
        inputs = make_inputs(T, sizes=(8, 2, 256))
        passes: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for turn in range(30):  # in turns, so that whatever else the host does falls on all alike
            for policy in POLICIES:
                with tma_moe.descriptor_policy(policy):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for layer in layers:
                        tma_moe.fused_moe(*inputs, layer)
                    passes[policy] += [(time.perf_counter() - start) / len(layers) * 1e6] * (turn >= 3)
        torch.cuda.synchronize()
        clear_descriptor_cache()
        times = {policy: statistics.median(taken) for policy, taken in passes.items()}
        print(f"host time per layer at {T} tokens, us: {times}")
        if T == 64:
            assert times["owned"] < times["lru"], times
            assert times["owned"] < times["per_call"], times


SANITIZED = """
import sys
sys.path.insert(0, "kernels")
import torch, tma_moe
from tma_moe.recipe import make_recipe
from tma_moe.tiles import Choice, Tiles
experts = tma_moe.ExpertWeights(6, 128, 64, device="cuda", dtype=torch.bfloat16)
for parameter in experts.parameters():
    parameter.data.normal_()
device = torch.device("cuda", 0)
def both(kernel, up, down):
    return Choice(None, Tiles(kernel, *up), Tiles(kernel, *down))
gemv = both("gemv", (1, 4, 128, 4, 1), (1, 8, 64, 4, 1))
plain = both("weights_m", (16, 64, 64, 4, 3), (16, 128, 64, 4, 3))
persistent = both("weights_m", (64, 64, 64, 4, 3, 1, True), (64, 64, 64, 4, 3, 1, True, True))
weights = both("weights_m_ws", (96, 64, 64, 4, 4, 1), (160, 128, 64, 4, 4, 1))
tokens = both("tokens_m_ws", (128, 64, 64, 4, 3, 1), (128, 128, 64, 4, 3, 1))
calls = [(3, gemv), (70, plain), (70, persistent), (900, plain)]
if "memcheck" in sys.argv and tma_moe.gluon_problem() is None:
    calls += [(200, tokens), (300, weights)]
for T, choice in calls:
    skip = torch.arange(T, device="cuda") % 5 == 1
    ids, routed = tma_moe.route(torch.randn(T, 6, device="cuda"), 3, skip_T=skip)
    x = torch.randn(T, 128, device="cuda", dtype=torch.bfloat16)
    y = make_recipe(device, 6, 3, 128, 64, choice).run(x, ids, routed, experts)
    assert y.isfinite().all()
    assert (y[skip] == 0).all()
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """racecheck leaves out the kernels in Gluon: it reports triton's own hand-over of work to the warp groups, which
    goes through shared memory and barriers of a part of the threads, and cannot follow mbarriers."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, tool]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "done" in done.stdout

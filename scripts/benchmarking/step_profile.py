"""torch's profiler around one piece of work, and where the time of a step goes: its kernels, summed by kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

# Kernel names by kind, the first that matches; ours are those of kernels/tma_moe and qwen3vl_moe/ops/kernels.
KINDS = {
    "attention": r"hopper_attend|attend_packed|attend_span|join_spans",
    "experts": r"(gemv|weights_m|weights_m_ws|tokens_m_ws)_(up|down)",
    "quantising": r"quantise_rows",
    "routing and combine": r"route_topk|group_few|count_pairs|group_many|^combine",
    "sums over ranks": r"all_?reduce|sum_add_norm",  # few rows with the norm after it
    "norms and rotation": r"add_norm|norm_rotate_store",
    "projections and head": r"gemm|gemv|cutlass|nvjet|xmma|splitk|hopper_block_linear|^_(one|some|odd)_rows",
    "the rest": "",
}


@dataclass(frozen=True)
class StepProfile:
    """Milliseconds a step.

    Attributes:
        total: on the host, from the call to its return.
        before: until the device began.
        kinds: kernel time by the keys of ``KINDS``. Kernels may overlap, as each lets the next one begin early.
        gaps: while the device had begun and ran nothing.
        kernels: kernel time by name, the longest first.
    """

    total: float
    before: float
    kinds: dict[str, float]
    gaps: float
    kernels: dict[str, float]


def traced(
    run: Callable[[], Any], warm: Callable[[], object], on_gpu: bool
) -> tuple[Any, FunctionEvent, list[FunctionEvent]]:
    """What ``run()`` returned, its event on the host, and what a GPU did from then on, in the order in which it began.

    ``warm()`` goes before, as the profiler starts slowly.
    """
    label = "what is measured"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as trace:
        warm()
        with record_function(label):
            result = run()
    events = trace.events()
    [whole] = [event for event in events if event.name == label and event.device_type == DeviceType.CPU]
    on_device = [event for event in events if event.device_type == DeviceType.CUDA and event.name != label]
    began = whole.time_range.start
    device = [event for event in on_device if event.time_range.start >= began]
    return result, whole, sorted(device, key=lambda event: event.time_range.start)


def profile_steps(run: Callable[[], object], steps: int = 1) -> StepProfile:
    """Profile ``run()``, which makes that many steps on a CUDA device; figures are per step."""

    def warm() -> None:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()

    def whole_steps() -> None:
        run()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    _, whole, device = traced(whole_steps, warm, on_gpu=True)
    kinds, kernels = dict.fromkeys(KINDS, 0.0), {}
    gaps, end = 0.0, device[0].time_range.start
    for event in device:
        kind = next(kind for kind, names in KINDS.items() if re.search(names, event.name, re.IGNORECASE))
        took = event.time_range.elapsed_us() / 1e3 / steps
        kinds[kind] += took
        kernels[event.name] = kernels.get(event.name, 0.0) + took
        gaps += max(0.0, event.time_range.start - end)
        end = max(end, event.time_range.end)
    return StepProfile(
        total=whole.time_range.elapsed_us() / 1e3 / steps,
        before=(device[0].time_range.start - whole.time_range.start) / 1e3,
        kinds=kinds,
        gaps=gaps / 1e3 / steps,
        kernels=dict(sorted(kernels.items(), key=lambda item: -item[1])),
    )

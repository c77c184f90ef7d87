"""Where the time of a step goes: kernels in the trace of torch's profiler, summed by kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

# Kernel names by kind, the first that matches; ours are those of kernels/tma_moe and qwen3vl_moe/model.
KINDS = {
    "attention": r"attend_packed|attend_span|join_spans",
    "experts": r"(swap|streamed|specialized|grouped|decode)_(up|down)",
    "routing and combine": r"route_topk|group_few|count_pairs|group_many|^combine",
    "norms and rotation": r"add_norm|norm_rotate_store",
    "projections and head": r"gemm|gemv|cutlass|nvjet|xmma|splitk",
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


def profile_steps(run: Callable[[], object], steps: int = 1) -> StepProfile:
    """Profile ``run()``, which makes that many steps on a CUDA device; figures are per step."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        with record_function("warm"):  # the profiler starts slowly
            torch.zeros(1, device="cuda").add_(1)
            torch.cuda.synchronize()
        with record_function("steps"):
            run()
            torch.cuda.synchronize()
    events = trace.events()
    [whole] = [event for event in events if event.name == "steps" and event.device_type == DeviceType.CPU]
    began = whole.time_range.start
    device = [event for event in events if event.device_type == DeviceType.CUDA and event.name not in ("warm", "steps")]
    device = sorted((e for e in device if e.time_range.start >= began), key=lambda event: event.time_range.start)
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
        before=(device[0].time_range.start - began) / 1e3,
        kinds=kinds,
        gaps=gaps / 1e3 / steps,
        kernels=dict(sorted(kernels.items(), key=lambda item: -item[1])),
    )

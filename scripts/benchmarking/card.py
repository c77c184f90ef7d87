"""The device under the measurements: what it is, what it can do at most, and how long a call takes on it."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
)


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do: bytes per second (read plus written) and bf16 FLOP per second."""

    bytes_per_second: float
    flops_per_second: float


def ceilings(device: torch.device | str) -> Ceilings:
    """Measures a device on random data: a 2 GiB copy and an 8192^3 bf16 product, on a CPU much smaller ones."""
    on_gpu = torch.device(device).type == "cuda"
    count, side = (2**29, 8192) if on_gpu else (2**23, 512)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy, product = (median_seconds(run, device) for run in (lambda: target.copy_(source), lambda: torch.mm(a, b)))
    return Ceilings(2 * source.nbytes / copy, 2 * side**3 / product)


def fp8_rate(device: torch.device | str) -> float:
    """FLOP per second of an 8192^3 product in FP8 with one scale for all, the fastest that torch has."""
    side, one = 8192, torch.ones((), device=device)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16).to(torch.float8_e4m3fn) for _ in range(2))
    product = median_seconds(
        lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True), device
    )
    return 2 * side**3 / product


def median_seconds(run: Callable[[], object], device: torch.device | str, times: int = 10) -> float:
    """Median time of a warm call, one at a time: on a GPU between events in its stream, else on the host's clock."""
    seconds = []
    for _ in range(times + 2):
        if torch.device(device).type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def card(device: torch.device | str = "cuda") -> dict[str, str]:
    """Name, driver, clocks, power limit and temperature as they are now; of a CPU the name alone."""
    device = torch.device(device)
    if device.type != "cuda":
        return {"name": f"CPU ({platform.machine()})"}
    properties = torch.cuda.get_device_properties(device)
    # By its UUID: nvidia-smi's numbers are not torch's where CUDA_VISIBLE_DEVICES picks or reorders cards.
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        return dict(zip(_FIELDS, (value.strip() for value in line.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {"name": properties.name}

"""What bench_load.py times: the loading of a checkpoint, ours and safetensors'."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import mmap
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarking.transformers_twin import transformers_config
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import CheckpointError, OptionError
from qwen3vl_moe.weights.checkpoint import find_expert_layout, load_model
from qwen3vl_moe.weights.shards import INDEX, read_headers
from qwen3vl_moe.weights.table import expand_table

GB = 1e9
console = Console(stderr=True, highlight=False, soft_wrap=True)


# --- a synthetic checkpoint ---


def synthetic_config(gigabytes: float, tiny: bool) -> Qwen3VLMoeConfig:
    """The 30B model (or one of a few MB) with as many decoder layers as it takes to reach ``gigabytes`` in bf16."""
    config = Qwen3VLMoeConfig.qwen3_vl_30b_a3b()
    if tiny:
        text = dataclasses.replace(
            config.text, hidden_size=64, expert_width=48, num_experts=8, num_heads=2, num_kv_heads=1
        )
        vision = dataclasses.replace(config.vision, depth=2, hidden_size=64, intermediate_size=96, num_heads=4)
        vision = dataclasses.replace(vision, out_hidden_size=64, deepstack_indexes=(0, 1))
        config = dataclasses.replace(config, text=text, vision=vision)

    def with_layers(layers: int) -> Qwen3VLMoeConfig:
        return dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=layers))

    least = len(config.vision.deepstack_indexes)
    fixed = config_bytes(with_layers(least))
    per_layer = config_bytes(with_layers(least + 1)) - fixed
    return with_layers(least + max(0, -int(-(gigabytes * GB - fixed) // per_layer)))


def config_bytes(config: Qwen3VLMoeConfig) -> int:
    return sum(2 * torch.Size(entry.shape).numel() for entry in expand_table(config))


def write_synthetic(directory: Path, config: Qwen3VLMoeConfig, device: torch.device, shard_bytes: float) -> None:
    """Random weights, made on ``device``, in shards of at most ``shard_bytes``."""
    total = config_bytes(config)
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if total * 1.02 > free:
        raise OptionError(f"--gb: the checkpoint takes {total / GB:.1f} GB, {directory} has {free / GB:.1f} GB free")
    started = time.perf_counter()
    groups: list[list] = [[]]
    filled = 0
    for entry in expand_table(config):
        size = 2 * torch.Size(entry.shape).numel()
        if filled and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size

    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            entry.source: torch.empty(entry.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02).cpu()
            for entry in group
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        with open(directory / file, "rb") as written:
            os.fsync(written.fileno())  # pages that are not on the disk yet cannot be dropped from the cache
        weight_map |= dict.fromkeys(tensors, file)
        console.print(f"wrote {file} ({time.perf_counter() - started:.0f} s)")
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    transformers_config(config).to_json_file(directory / "config.json")


# --- the page cache ---


def drop_from_cache(files: list[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share_in_cache(files: list[Path]) -> float | None:
    """Share of the files' pages that the page cache holds (mincore), None where that cannot be asked."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    held = pages = 0
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address in (None, ctypes.c_void_p(-1).value):
            return None
        states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        failed = libc.mincore(address, size, states)
        libc.munmap(address, size)
        if failed:
            return None
        held += sum(state & 1 for state in states)
        pages += len(states)
    return held / pages


# --- measuring ---


class HostPeak:
    """Growth of this process's resident memory while the block runs, sampled every few milliseconds."""

    def __enter__(self) -> HostPeak:
        self.total = self.unshared = 0
        self._first = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            resident, shared = self._now()
            self.total = max(self.total, resident - self._first[0])
            self.unshared = max(self.unshared, resident - shared - (self._first[0] - self._first[1]))

    @staticmethod
    def _now() -> tuple[int, int]:
        """Resident bytes, and how many of them are shared: pages of mapped files."""
        resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
        return int(resident) * mmap.PAGESIZE, int(shared) * mmap.PAGESIZE


def load_ours(directory: Path, files: list[Path], device: torch.device) -> object:
    return load_model(directory, device=device, moe="reference", progress=False)


def load_peer(directory: Path, files: list[Path], device: torch.device) -> object:
    tensors = {}
    for path in files:
        part = load_file(path, device=str(device))
        # On the CPU load_file only maps the file; a copy makes it read.
        tensors |= part if device.type == "cuda" else {name: value.clone() for name, value in part.items()}
    return tensors


LOADERS: dict[str, Callable[[Path, list[Path], torch.device], object]] = {
    "qwen3vl_moe": load_ours,
    "safetensors": load_peer,
}


def measure(loader: str, state: str, directory: Path, files: list[Path], device: torch.device) -> dict:
    cuda = device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if state == "cold":
        drop_from_cache(files)
    in_cache = share_in_cache(files)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    with HostPeak() as host:
        started = time.perf_counter()
        loaded = LOADERS[loader](directory, files, device)
        if cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in files)
    row = {
        "loader": loader,
        "state": state,
        "in_cache": in_cache,
        "seconds": seconds,
        "gb_per_s": size / GB / seconds,
        "host_peak_gb": host.total / GB,
        "host_peak_unshared_gb": host.unshared / GB,
        "device_peak_gb": (torch.cuda.max_memory_allocated(device) - before) / GB if cuda else None,
    }
    del loaded
    cached = "unknown" if in_cache is None else f"{in_cache:.0%}"
    console.print(f"{state} ({cached} in cache) {loader}: {seconds:.2f} s, {row['gb_per_s']:.2f} GB/s")
    return row


def verify(directory: Path, files: list[Path], device: torch.device) -> int:
    """Compare every value that ours has loaded with what ``load_file`` reads; returns the number of tensors."""
    model = load_model(directory, device=device, moe="reference", progress=False)
    table = {entry.source: entry for entry in expand_table(model.config)}
    layout = find_expert_layout(list(table.values()), read_headers(directory), directory)
    parameters = dict(model.named_parameters())
    for path in files:
        for name, value in load_file(path, device=str(device)).items():
            ours = table[name].destination(parameters[table[name].target], layout)
            if not torch.equal(ours, value.to(model.dtype)):
                raise RuntimeError(f"{name} was not loaded as load_file reads it")
    return len(table)


def summary(rows: list[dict]) -> Table:
    table = Table(
        "page cache", "in cache", "loader", "runs", "seconds", "GB/s (least - most)", "host peak GB", "device peak GB"
    )
    for state in ("cold", "warm"):
        for loader in LOADERS:
            found = [row for row in rows if (row["state"], row["loader"]) == (state, loader)]
            if not found:
                continue
            rates = sorted(row["gb_per_s"] for row in found)
            shares = [row["in_cache"] for row in found if row["in_cache"] is not None]
            device = [row["device_peak_gb"] for row in found if row["device_peak_gb"] is not None]
            table.add_row(
                state,
                f"{statistics.mean(shares):.0%}" if shares else "unknown",
                loader,
                str(len(found)),
                f"{statistics.median(row['seconds'] for row in found):.2f}",
                f"{statistics.median(rates):.2f} ({rates[0]:.2f} - {rates[-1]:.2f})",
                f"{max(row['host_peak_gb'] for row in found):.2f} "
                f"({max(row['host_peak_unshared_gb'] for row in found):.2f} unshared)",
                f"{max(device):.2f}" if device else "-",
            )
    return table


def show(runs: list[dict]) -> None:
    Console(width=None if os.isatty(1) else 140).print(summary(runs))
    for state in ("cold", "warm"):
        rates = [[run["gb_per_s"] for run in runs if (run["loader"], run["state"]) == (name, state)]
                 for name in LOADERS]  # fmt: skip
        if all(rates):
            ours, peers = map(statistics.median, rates)
            print(f"{state}: ours is {ours / peers:.2f} times as fast as load_file")


def bench(
    report: dict, directory: Path, gb: float, device: torch.device, rounds: int, budget: float, tiny: bool, keep: bool
) -> None:
    """Fills ``report``; its runs one by one."""
    started = time.perf_counter()
    written = not (directory / "config.json").exists()
    if written and directory.exists() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} is no checkpoint and not empty: name another --dir")
    try:
        if written:
            config = synthetic_config(gb, tiny)
            write_synthetic(directory, config, device, 5 * GB if not tiny else 20e6)
        files = sorted({tensor.file for tensor in read_headers(directory).values()})
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        facts = {
            "device": name,
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "files": len(files),
            "gb": sum(path.stat().st_size for path in files) / GB,
            "verified_tensors": verify(directory, files, device),  # also the warm-up of both loaders
        }
        console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
        report |= facts
        runs = report["runs"]
        for number in range(rounds):
            for state in ("cold", "warm"):
                # Alternating who is first: whatever drifts (clocks, the disk's own cache) favours neither.
                for loader in list(LOADERS)[:: 1 if number % 2 == 0 else -1]:
                    if number and time.perf_counter() - started + max(run["seconds"] for run in runs) > budget:
                        console.print(f"stopped at --budget {budget:.0f} s")
                        return
                    runs.append(measure(loader, state, directory, files, device))
    finally:
        if written and not keep and directory.exists():
            shutil.rmtree(directory)

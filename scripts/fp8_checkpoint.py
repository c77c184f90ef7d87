"""What quantize.py writes and compares: a checkpoint in block-scaled FP8, shard by shard."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import CheckpointError, OptionError
from qwen3vl_moe.json_files import read_json_object
from qwen3vl_moe.weights.checkpoint import check_tensors, find_expert_layout
from qwen3vl_moe.weights.scales import scale_name
from qwen3vl_moe.weights.shards import INDEX, StoredTensor, read_headers, read_whole, shorten
from qwen3vl_moe.weights.table import Entry, expand_table
from replace_file import replace_file
from tma_moe.block_fp8 import FP8, dequantize_blocks, quantize_blocks, scale_shape

SCALES = {"bf16": ("BF16", torch.bfloat16), "fp32": ("F32", torch.float32)}
# What --check allows: the nearest value of FP8 is half a step away at most. A value is less than 32 of its half steps,
# and up to four roundings to float32 (the quotient in the maker and here, the product, the difference) move what is
# compared by 2^-24 of it each.
HALF_STEPS = 1 + 4 * 32 * 2**-24
SHARD_BYTES = 5 * 10**9
NOTES = "quantize.json"  # in the destination, until it is finished: of what and how it is made
QUANTISED = re.compile(r"(\.self_attn\.[qkvo]_proj\.weight|\.mlp\.experts\.(gate_up|down)_proj)$")
# Modules with products that stay as they are, as transformers wants them listed.
LEFT_OUT = re.compile(r"^(lm_head|.*\.mlp\.gate|model\.visual\..*(attn\.qkv|attn\.proj|linear_fc[12]))\.weight$")
PART = re.compile(r"\.[0-9a-f]{16}\.part")  # of replace_file.py: what it leaves where the process was killed
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
stdout = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be quantised.

    Attributes:
        layout: of its experts.
        stored: its tensors, by name, in the order of the files.
        raw: its config.json.
    """

    directory: Path
    layout: str
    stored: dict[str, StoredTensor]
    raw: dict[str, Any]

    @classmethod
    def read(cls, directory: Path, expert_layout: str | None = None) -> Source:
        """Raises UserError for what is no sound checkpoint, or is quantised already."""
        if not directory.is_dir():
            raise OptionError(f"{directory} is no directory: give that of a checkpoint")
        config = Qwen3VLMoeConfig.from_pretrained(directory)
        if config.text.fp8_attention or config.text.fp8_experts:
            raise CheckpointError(f"{directory} is quantised already: its config.json has a quantization_config")
        stored, table = read_headers(directory), expand_table(config)
        check_tensors(table, stored, directory)
        layout = find_expert_layout(table, stored, directory, expert_layout)
        in_order = sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset))
        return cls(directory, layout, dict(in_order), read_json_object(directory / "config.json", CheckpointError))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored.values())

    def turned(self, name: str) -> bool:
        """Whether a tensor is input-major, so that blocks are found in its transpose."""
        return self.layout == "published" and ".experts." in name

    def fingerprint(self) -> str:
        """Changes with the files, their tensors and config.json."""
        files = sorted({tensor.file for tensor in self.stored.values()} | {self.directory / "config.json"})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        tensors = [(name, tensor.dtype, tensor.shape, tensor.offset) for name, tensor in self.stored.items()]
        return hashlib.sha256(repr((stats, tensors)).encode()).hexdigest()


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written. ``source`` is that which it is made of, ``part`` what of it: "as it is", the
    "weight" in FP8, or its "scale"."""

    name: str
    source: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def plan(model: Source, scales: str) -> list[list[Planned]]:
    """The tensors of each shard, in order; a weight's scales follow it in the same shard."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for name, tensor in model.stored.items():
        made = [Planned(name, name, "as it is", tensor.dtype, tensor.shape, tensor.nbytes)]
        if QUANTISED.search(name):
            shape = scale_shape(tensor.shape)  # the same whichever way its blocks lie
            dtype, torch_dtype = SCALES[scales]
            made = [
                Planned(name, name, "weight", "F8_E4M3", tensor.shape, math.prod(tensor.shape)),
                Planned(scale_name(name), name, "scale", dtype, shape, math.prod(shape) * torch_dtype.itemsize),
            ]
        nbytes = sum(each.nbytes for each in made)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1] += made
        size += nbytes
    return shards


def turn(tensor: Tensor, turned: bool) -> Tensor:
    return tensor.transpose(-1, -2).contiguous() if turned else tensor


def quantise(model: Source, destination: Path, scales: str, device: torch.device) -> int:
    """Write the whole checkpoint; returns its bytes of weights.

    Raises:
        UserError: the destination is something else, or there is no room for it.
    """
    shards = plan(model, scales)
    total = sum(each.nbytes for shard in shards for each in shard)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    notes = {"source": model.fingerprint(), "layout": model.layout, "scales": scales, "shards": names}
    _prepare(destination, notes)
    done = {name for name in names if (destination / name).exists()}
    left = sum(each.nbytes for name, shard in zip(names, shards, strict=True) if name not in done for each in shard)
    free = shutil.disk_usage(destination).free
    if left > free:
        raise OptionError(f"{destination} needs {left / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free there")
    with tqdm(total=total, desc="quantising", unit="B", unit_scale=True) as bar:
        for name, shard in zip(names, shards, strict=True):
            if name in done:
                bar.update(sum(each.nbytes for each in shard))
            else:
                replace_file(destination / name, _shard_bytes(model, shard, scales, device, bar))
    for path in sorted(model.directory.iterdir()):
        if path.is_file() and path.name != "config.json" and not path.name.endswith(WEIGHT_FILES):
            shutil.copyfile(path, destination / path.name)
    weight_map = {each.name: name for name, shard in zip(names, shards, strict=True) for each in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(destination / INDEX, index)
    _write_json(destination / "config.json", model.raw | {"quantization_config": quantization_config(model)})
    (destination / NOTES).unlink()
    return total


def _prepare(destination: Path, notes: dict[str, Any]) -> None:
    """Make the destination, or see that an unfinished one is of the same source and settings."""
    path = destination / NOTES
    if path.exists():
        if read_json_object(path, CheckpointError) != notes:
            raise OptionError(f"{destination} was begun from another source or with other --scales: remove it first")
        for left_behind in destination.iterdir():
            if PART.fullmatch(left_behind.name):
                left_behind.unlink()
        return
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise OptionError(f"{destination} is there already: name a directory that is empty or new")
    destination.mkdir(parents=True, exist_ok=True)
    _write_json(path, notes)


def quantization_config(model: Source) -> dict[str, Any]:
    left_out = sorted(found[1] for name in model.stored if (found := LEFT_OUT.match(name)))
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": left_out,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, [json.dumps(content, indent=2).encode() + b"\n"])


def _shard_bytes(model: Source, shard: list[Planned], scales: str, device: torch.device, bar: tqdm) -> Iterator[bytes]:
    """A safetensors file: header, then every tensor's bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in shard:
        header[each.name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [end, end + each.nbytes]}
        end += each.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    yield len(text).to_bytes(8, "little")
    yield text
    scale = torch.empty(0)
    for each in shard:
        value = read_whole(model.stored[each.source]) if each.part != "scale" else scale
        if each.part == "weight":
            value, scale = _quantised(value, model.turned(each.name), SCALES[scales][1], device)
            if not bool(torch.isfinite(scale).all()):
                file = model.stored[each.source].file
                raise CheckpointError(f"{file}: {each.name} holds a value that is not finite: the file is damaged")
        yield _bytes(value.contiguous()).numpy().tobytes()
        bar.update(each.nbytes)


def _quantised(value: Tensor, turned: bool, scales: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights and scales, on the host and as they are stored; experts one by one, whose float32 copies are large."""
    w8, scale = torch.empty_like(value, dtype=FP8), torch.empty(scale_shape(value.shape), dtype=scales)
    matrices = [(value, w8, scale)] if value.dim() == 2 else zip(value, w8, scale, strict=True)
    for weight, w8_of_it, scale_of_it in matrices:
        made_w8, made_scale = quantize_blocks(turn(weight.to(device), turned), scales)
        w8_of_it.copy_(turn(made_w8, turned))
        scale_of_it.copy_(turn(made_scale, turned))
    return w8, scale


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


@dataclass
class Deviation:
    """How far quantised weights are from their originals, over any number of blocks. NaN stays NaN.

    Attributes:
        error, power: sums of squares of the differences and of the originals.
        in_scales: the largest difference, counted in its block's scale.
        in_half_steps: the largest difference, counted in half the step of FP8 where the original lies.
    """

    error: float = 0.0
    power: float = 0.0
    in_scales: float = 0.0
    in_half_steps: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the differences, by that of the originals; all zeros are no difference."""
        return math.sqrt(self.error / self.power) if self.power else math.sqrt(self.error)

    @property
    def within_bound(self) -> bool:
        return self.in_half_steps <= HALF_STEPS

    def add(self, other: Deviation) -> None:
        self.error, self.power = self.error + other.error, self.power + other.power
        self.in_scales = _largest(self.in_scales, other.in_scales)
        self.in_half_steps = _largest(self.in_half_steps, other.in_half_steps)


def _largest(a: float, b: float) -> float:
    return a if math.isnan(a) or a > b else b  # max() forgets NaN


def deviation(w8: Tensor, scale: Tensor, weight: Tensor) -> Deviation:
    """Of one matrix, output-major, with float32 scales and originals.

    w / scale has an exponent e (2^e <= |w / scale| < 2^(e+1)), of which FP8 has no smaller than -6. It keeps three bits
    after the leading one, so values lie 2^(e-3) apart, and the nearest one is at most 2^(e-4) away.
    """
    spread = dequantize_blocks(torch.ones_like(weight), scale)
    off = (dequantize_blocks(w8, scale) - weight).abs()
    # Of float32's bits, the eight from the 23rd on are the exponent + 127. (frexp would give zero too large a one.)
    exponent = (weight / spread).abs().view(torch.int32).bitwise_right_shift(23) - 127
    half_step = (exponent.clamp_min(-6) - 4 + 127).bitwise_left_shift(23).view(torch.float32) * spread

    def largest(unit: Tensor) -> float:
        return float(torch.where(off == 0, 0.0, off / unit).max())  # a scale may be 0, and its block with it

    error, power = float(off.double().square().sum()), float(weight.double().square().sum())
    return Deviation(error, power, largest(spread), largest(half_step))


def compare(model: Source, destination: Path, device: torch.device) -> bool:
    """Print how far the quantised tensors are from their originals, by kind; whether all is as it should be.

    Raises:
        UserError: the destination is no sound checkpoint, none in FP8, or one of other sizes or of the other layout.
    """
    config = Qwen3VLMoeConfig.from_pretrained(destination)
    if not (config.text.fp8_attention or config.text.fp8_experts):
        raise CheckpointError(f"{destination} is not quantised: its config.json has no quantization_config")
    table: dict[str, Entry] = {entry.source: entry for entry in expand_table(config)}
    stored = read_headers(destination)
    check_tensors(list(table.values()), stored, destination)
    made, wanted = {(name, stored[name].shape) for name in table}, {(n, x.shape) for n, x in model.stored.items()}
    if differ := sorted({name for name, _ in made ^ wanted}):
        raise CheckpointError(
            f"{destination} is no quantised {model.directory}: other sizes, or experts lie otherwise: {shorten(differ)}"
        )
    find_expert_layout(list(table.values()), stored, destination, model.layout)
    kinds: dict[str, list[Deviation]] = {}
    wrong: list[str] = []
    for name, tensor in tqdm(model.stored.items(), desc="comparing"):
        ours, theirs = read_whole(stored[name]), read_whole(tensor)
        if not table[name].fp8:
            if ours.dtype != theirs.dtype or not torch.equal(_bytes(ours), _bytes(theirs)):
                wrong.append(name)
            continue
        scale = read_whole(stored[scale_name(name)])
        found = Deviation()
        for matrices in zip(ours, scale, theirs, strict=True) if ours.dim() == 3 else [(ours, scale, theirs)]:
            w8, of_blocks, weight = (turn(x.to(device), model.turned(name)) for x in matrices)
            found.add(deviation(w8, of_blocks.float(), weight.float()))
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name).rpartition("layers.")[2], []).append(found)
        if not found.within_bound:
            wrong.append(name)
    stdout.print(table_of(kinds))
    stdout.print(f"{len(wrong)} wrong: {shorten(wrong)}" if wrong else "every other tensor is equal")
    return not wrong


def table_of(kinds: dict[str, list[Deviation]]) -> Table:
    """One line for each kind of tensor, of those of all layers."""
    columns = "tensors", "count", "relative error (rms)", "of the worst", "largest error: scales", "half steps"
    shown = Table(*columns, box=box.SIMPLE)
    for kind, each in kinds.items():
        total, worst = Deviation(), 0.0
        for one in each:
            total.add(one)
            worst = _largest(worst, one.relative)
        errors = f"{total.relative:.3%}", f"{worst:.3%}", f"{total.in_scales:.3f}", f"{total.in_half_steps:.4f}"
        shown.add_row(kind, str(len(each)), *errors)
    return shown

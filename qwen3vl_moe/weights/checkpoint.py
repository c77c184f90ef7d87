"""From a Hugging Face checkpoint to the model's parameters, by the table of names: strict both ways, streamed.

How the layout is found (:func:`find_expert_layout`): by shape, with H and I from config.json, from every tensor that
has different shapes in the two layouts; they must all agree. A tensor whose shapes coincide (gate_up_proj if H == 2I,
down_proj if H == I; never both) proves nothing about itself, nor does its sibling prove it: transformers 5 decides
tensor by tensor and transposes only where the shape differs (``Transpose(check_dims=True)`` in its
``conversion_mapping.py``), so it turns a published checkpoint with H == 2I into one whose down_proj is transposed and
whose gate_up_proj is not. It rewrites config.json on the way, so no file declares the layout. Such a checkpoint is
loaded only if the caller names the layout (``expert_layout=``). No published model has such sizes.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import CheckpointError, OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.ops import ALONE, BlockLinear, Ranks
from qwen3vl_moe.weights.columns import own_rows, read_columns
from qwen3vl_moe.weights.placement import parse_device, parse_dtype, require_division, require_memory, resolve_moe
from qwen3vl_moe.weights.scales import SCALE_DTYPES, fill_scales, scale_name
from qwen3vl_moe.weights.shards import DTYPES, FP8, StoredTensor, part_of, read_headers, shorten, stream
from qwen3vl_moe.weights.source import resolve
from qwen3vl_moe.weights.table import LAYOUTS, Entry, expand_table
from tma_moe.block_fp8 import BLOCK


def check_tensors(table: list[Entry], stored: dict[str, StoredTensor], directory: Path) -> None:
    """Require exactly the names of the table, in a shape of either layout and a dtype that can be loaded.

    Raises:
        CheckpointError: naming what is missing, unexpected, of the wrong shape or of an unsupported dtype.
    """
    entries = {entry.source: entry for entry in table}
    scales = {scale_name(entry.source): entry for entry in table if entry.fp8}
    wrong_shape: list[str] = []
    wrong_dtype: dict[tuple[str, ...], list[str]] = {}
    for name, tensor in stored.items():
        if name in entries:
            entry = entries[name]
            shapes, dtypes = map(entry.shape_in, LAYOUTS), (FP8,) if entry.fp8 else tuple(DTYPES)
        elif name in scales:
            shapes, dtypes = map(scales[name].scale_shape_in, LAYOUTS), SCALE_DTYPES
        else:
            continue
        if tensor.shape not in (fitting := list(dict.fromkeys(shapes))):
            wrong_shape.append(f"{name} {list(tensor.shape)} instead of {' or '.join(str(list(s)) for s in fitting)}")
        if tensor.dtype not in dtypes:
            wrong_dtype.setdefault(dtypes, []).append(f"{name} {tensor.dtype}")
    expected = entries.keys() | scales.keys()
    findings = {
        "missing": [name for name in (*entries, *scales) if name not in stored],
        "unexpected": [name for name in stored if name not in expected],
        "of the wrong shape": wrong_shape,
    }
    for dtypes, names in wrong_dtype.items():
        declared = "config.json declares FP8" if dtypes == (FP8,) else f"only {', '.join(dtypes)} can be loaded"
        findings[f"of an unsupported dtype ({declared})"] = names
    lines = [f"{len(found)} {what}: {shorten(found)}" for what, found in findings.items() if found]
    if lines:
        raise CheckpointError(
            f"{directory} does not hold the tensors that its config.json calls for; {'; '.join(lines)}"
        )


def find_expert_layout(
    table: list[Entry], stored: dict[str, StoredTensor], directory: Path, asked: str | None = None
) -> str:
    """``published`` or ``transformers5``, never guessed: the rule is at the top of this file.

    Args:
        table, stored: what :func:`check_tensors` has accepted.
        directory: what error messages call the checkpoint.
        asked: the layout that the caller names, needed only if some expert tensor has one shape in both layouts.

    Raises:
        OptionError: ``asked`` is no layout.
        CheckpointError: the tensors disagree with each other or with ``asked``, or the layout has to be named.
    """
    if asked not in (None, *LAYOUTS):
        raise OptionError(f"expert_layout is {asked!r}; choose from {', '.join(LAYOUTS)}")
    examples: dict[str, str] = {}
    for entry in table:
        if entry.transform == "experts":
            shape = stored[entry.source].shape
            fits = [layout for layout in LAYOUTS if shape == entry.shape_in(layout)]
            examples.setdefault(fits[0] if len(fits) == 1 else "either", f"{entry.source} {list(shape)}")
    either = examples.pop("either", None)
    if len(examples) > 1:
        raise CheckpointError(
            f"{directory} mixes expert layouts: {examples['published']} is of layout 'published', "
            f"{examples['transformers5']} of 'transformers5'; write all of them in one layout"
        )
    # gate_up_proj and down_proj cannot both be square, so one of them has told its layout.
    (layout, example), *_ = examples.items()
    _check_scales_lie_alike(table, stored, directory, layout)
    if asked not in (None, layout):
        raise CheckpointError(
            f"expert_layout={asked!r} contradicts {directory}: {example} has the shape of layout {layout!r}"
        )
    if either and not asked:
        raise CheckpointError(
            f"{directory}: {either} has the same shape in both expert layouts, and a converter may have left it in the "
            f"other layout than {example} ({layout!r}); pass expert_layout={layout!r} if all were written in that one"
        )
    return layout


def _check_scales_lie_alike(table: list[Entry], stored: dict[str, StoredTensor], directory: Path, layout: str) -> None:
    """Require of each scale the shape that it has beside weights of this layout."""
    for entry in table:
        name = scale_name(entry.source)
        if entry.fp8 and stored[name].shape != (needed := entry.scale_shape_in(layout)):
            raise CheckpointError(
                f"{directory}: {name} {list(stored[name].shape)} lies the other way round than its weights "
                f"{list(stored[entry.source].shape)}, whose layout is {layout!r}: {list(needed)} is needed"
            )


def load_model(
    path_or_id: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    moe: str = "auto",
    *,
    expert_layout: str | None = None,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> Qwen3VLMoe:
    """Build the model and fill it from a checkpoint, streaming from the files straight to the device.

    Everything that can be wrong with the files is found before the model is allocated. There is never a second copy of
    it: beside the parameters, host and device memory hold at most a piece (``shards.PIECE_BYTES``) per reading thread.

    Args:
        path_or_id: directory with config.json and safetensors files, a Hugging Face hub id, or "demo".
        device: where the parameters go; ``"auto"``: a GPU where there is one.
        dtype: of all parameters but FP8 weights and their scales: a torch dtype, its name, or ``"auto"`` for what
            config.json declares. The files may hold another floating dtype of bf16, fp16, fp32; it is cast.
        moe: ``"tma"``, ``"triton"``, ``"reference"``, ``"auto"``: :func:`qwen3vl_moe.weights.placement.resolve_moe`.
        expert_layout: ``"published"`` or ``"transformers5"``; needed only where an expert tensor has one shape in both.
        ranks: the processes that share the model. Each reads a part of the files: its own part of a tensor where that
            lies together, else some rows, whose columns the ranks then exchange.
        progress: a progress bar, then one line of seconds, GB/s and peak memory, both on stderr.

    Raises:
        CheckpointError: the files are missing, damaged, or not the tensors that config.json calls for.
        ConfigError: config.json asks for something that is not supported.
        OptionError: an unknown or unavailable device, dtype, moe or expert_layout; a number of ranks among which the
            model cannot be divided; not enough device memory.
    """
    directory = resolve(path_or_id)
    started = time.perf_counter()
    stored = read_headers(directory)
    config = Qwen3VLMoeConfig.from_pretrained(directory)
    require_division(config.text, ranks.size)
    table = expand_table(config, ranks)
    check_tensors(table, stored, directory)
    layout = find_expert_layout(table, stored, directory, expert_layout)
    device, dtype = parse_device(device), parse_dtype(dtype, config.dtype)

    with torch.device("meta"):
        model = Qwen3VLMoe(config, resolve_moe(moe, device, dtype, config.text, ranks.size), ranks).set_dtype(dtype)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    require_memory(device, model_bytes, directory, dtype, divided=config if ranks.alone else None)
    model = model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    # In the order of the files: a disk reads forwards fastest, and shards end up one after the other.
    entries = sorted(table, key=lambda entry: (stored[entry.source].file, stored[entry.source].offset))
    copies, columns = [], []
    for entry in entries:
        tensor, axis = stored[entry.source], entry.axis_in(layout)
        destination = entry.destination(parameters[entry.target], layout)
        if axis is None:
            copies.append((tensor, destination))
        elif axis == len(tensor.shape) - 1:
            columns.append((tensor, destination, entry.ranges))
        else:
            copies += part_of(tensor, destination, axis, entry.own)

    scales = [stored[scale_name(entry.source)] for entry in entries if entry.fp8]
    total = sum(tensor.nbytes for tensor, _ in copies) + sum(tensor.nbytes for tensor in scales)
    total += sum(own_rows(tensor, ranks).nbytes for tensor, _, _ in columns)
    with closing(_Meter(device, total, progress)) as meter:
        stream(copies, device, meter.add)
        for tensor, destination, ranges in columns:
            read_columns(tensor, destination, ranges, ranks, meter.add)
        for entry in entries:
            if entry.fp8:
                _fill_scales_of(entry, model, stored, layout)
                meter.add(stored[scale_name(entry.source)].nbytes)
    line = meter.line(time.perf_counter() - started, model_bytes)
    if not ranks.alone:
        line += f"; read by each rank: {', '.join(map(_size, ranks.of_all(total)))}"
    if progress:
        print(f"loaded {directory.name}: {line}", file=sys.stderr)
    return model


def _fill_scales_of(entry: Entry, model: Qwen3VLMoe, stored: dict[str, StoredTensor], layout: str) -> None:
    experts = entry.transform == "experts"
    layer_name, _, parameter_name = entry.target.rpartition(".")
    layer = model.get_submodule(layer_name)
    if isinstance(layer, BlockLinear):
        shared, scales = layer.shared, layer.scale.data
        scales = scales.narrow(0, entry.first_row // shared, -(-entry.rows // shared))
    else:
        shared, scales = BLOCK, layer.get_parameter(f"{parameter_name}_scale").data
    name, axis = scale_name(entry.source), entry.axis_in("transformers5")
    turned = experts and layout == "published"
    rows = entry.shape_in("transformers5")[-2]
    held = None if axis is None else (axis, entry.own)
    fill_scales(scales, stored[name], name, rows=rows, shared=shared, turned=turned, held=held)


class _Meter:
    """Progress bar and peak of host memory while the parameters are filled. ``add`` is called from several threads."""

    def __init__(self, device: torch.device, total_bytes: int, show: bool):
        # The device is in use by now (its context takes host memory too), so only the load itself is counted.
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._first_rss = self._peak_rss = _resident_bytes()
        self._sampled, self._lock = 0.0, threading.Lock()
        self._device, self._total = device, total_bytes
        self._bar = tqdm(total=total_bytes, desc="loading", unit="B", unit_scale=True, disable=not show)

    def add(self, count: int) -> None:
        with self._lock:
            self._bar.update(count)
            if time.perf_counter() - self._sampled > 0.01:  # thousands of pieces a second need not all be counted
                self._peak_rss = max(self._peak_rss, _resident_bytes())
                self._sampled = time.perf_counter()

    def close(self) -> None:
        """End the bar's line: an error may follow."""
        self._bar.close()

    def line(self, seconds: float, model_bytes: int) -> str:
        """What to print at the end."""
        growth = max(self._peak_rss, _resident_bytes()) - self._first_rss
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            memory = f"host memory grew by {_size(growth)} at most, {self._device} held {_size(peak)}"
        else:
            memory = f"host memory grew by {_size(max(0, growth - model_bytes))} at most beside the model"
        return f"{_size(self._total)} in {seconds:.2f} s ({_size(self._total / seconds)}/s); {memory}"


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")


def _resident_bytes() -> int:
    """Physical memory of this process; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0

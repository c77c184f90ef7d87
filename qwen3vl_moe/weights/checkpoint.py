"""From a Hugging Face checkpoint to the model's parameters: one table of names, strict both ways, streamed.

Two writers of checkpoints are known, and only what they write is accepted: the published Qwen3-VL-MoE checkpoints and
``save_pretrained`` of transformers 5. They use the same names and differ in the layout of the fused expert tensors:

================== ============================ ============================
layout             ``experts.gate_up_proj``     ``experts.down_proj``
================== ============================ ============================
``published``      [E, H, 2I], gate | up        [E, I, H]
``transformers5``  [E, 2I, H], gate over up     [E, H, I]
================== ============================ ============================

How the layout is found (:func:`find_expert_layout`): by shape, with H and I from config.json, from every tensor that
has different shapes in the two layouts; they must all agree. A tensor whose shapes coincide (gate_up_proj if H == 2I,
down_proj if H == I; never both) proves nothing about itself, nor does its sibling prove it: transformers 5 decides
tensor by tensor and transposes only where the shape differs (``Transpose(check_dims=True)`` in its
``conversion_mapping.py``), so it turns a published checkpoint with H == 2I into one whose down_proj is transposed and
whose gate_up_proj is not. It rewrites config.json on the way, so no file declares the layout. Such a checkpoint is
loaded only if the caller names the layout (``expert_layout=``). No published model has such sizes.
"""

from __future__ import annotations

import re
import resource
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import CheckpointError, OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.ops import BlockLinear
from qwen3vl_moe.weights.placement import parse_device, parse_dtype, require_memory, resolve_moe
from qwen3vl_moe.weights.scales import SCALE_DTYPES, fill_scales, scale_name
from qwen3vl_moe.weights.shards import DTYPES, FP8, StoredTensor, read_headers, shorten, stream
from qwen3vl_moe.weights.source import resolve
from tma_moe.block_fp8 import BLOCK, scale_shape

LAYOUTS = ("published", "transformers5")

# Sizes in the table: V vocabulary, H hidden, N*D and G*D query and key/value heads times head width, D head width,
# E experts, I expert width; of the vision tower: C width, m*m*C that of merge_size x merge_size patches side by side,
# F width of its MLP, S position embeddings, and the Conv3d kernel: c channels, t frames, p rows and columns of pixels.
_TABLE = """
# name in the checkpoint                          our parameter                          transform  its shape there
model.visual.patch_embed.proj.weight              vision.patch_embed.weight              reshape    C c t p p
model.visual.patch_embed.proj.bias                vision.patch_embed.bias                copy       C
model.visual.pos_embed.weight                     vision.pos_embed.weight                copy       S C
model.visual.blocks.{b}.norm1.weight              vision.blocks.{b}.norm1.weight         copy       C
model.visual.blocks.{b}.norm1.bias                vision.blocks.{b}.norm1.bias           copy       C
model.visual.blocks.{b}.norm2.weight              vision.blocks.{b}.norm2.weight         copy       C
model.visual.blocks.{b}.norm2.bias                vision.blocks.{b}.norm2.bias           copy       C
model.visual.blocks.{b}.attn.qkv.weight           vision.blocks.{b}.attn.qkv.weight      copy       3C C
model.visual.blocks.{b}.attn.qkv.bias             vision.blocks.{b}.attn.qkv.bias        copy       3C
model.visual.blocks.{b}.attn.proj.weight          vision.blocks.{b}.attn.out.weight      copy       C C
model.visual.blocks.{b}.attn.proj.bias            vision.blocks.{b}.attn.out.bias        copy       C
model.visual.blocks.{b}.mlp.linear_fc1.weight     vision.blocks.{b}.mlp.fc1.weight       copy       F C
model.visual.blocks.{b}.mlp.linear_fc1.bias       vision.blocks.{b}.mlp.fc1.bias         copy       F
model.visual.blocks.{b}.mlp.linear_fc2.weight     vision.blocks.{b}.mlp.fc2.weight       copy       C F
model.visual.blocks.{b}.mlp.linear_fc2.bias       vision.blocks.{b}.mlp.fc2.bias         copy       C
model.visual.merger.norm.weight                   vision.merger.norm.weight              copy       C
model.visual.merger.norm.bias                     vision.merger.norm.bias                copy       C
model.visual.merger.linear_fc1.weight             vision.merger.fc1.weight               copy       m*m*C m*m*C
model.visual.merger.linear_fc1.bias               vision.merger.fc1.bias                 copy       m*m*C
model.visual.merger.linear_fc2.weight             vision.merger.fc2.weight               copy       H m*m*C
model.visual.merger.linear_fc2.bias               vision.merger.fc2.bias                 copy       H
model.visual.deepstack_merger_list.{d}.norm.weight        vision.deepstack_mergers.{d}.norm.weight  copy  m*m*C
model.visual.deepstack_merger_list.{d}.norm.bias          vision.deepstack_mergers.{d}.norm.bias    copy  m*m*C
model.visual.deepstack_merger_list.{d}.linear_fc1.weight  vision.deepstack_mergers.{d}.fc1.weight   copy  m*m*C m*m*C
model.visual.deepstack_merger_list.{d}.linear_fc1.bias    vision.deepstack_mergers.{d}.fc1.bias     copy  m*m*C
model.visual.deepstack_merger_list.{d}.linear_fc2.weight  vision.deepstack_mergers.{d}.fc2.weight   copy  H m*m*C
model.visual.deepstack_merger_list.{d}.linear_fc2.bias    vision.deepstack_mergers.{d}.fc2.bias     copy  H
model.language_model.embed_tokens.weight          text.embed.weight                      copy       V H
model.language_model.layers.{l}.input_layernorm.weight           text.layers.{l}.attn_norm.weight      copy     H
model.language_model.layers.{l}.self_attn.q_proj.weight          text.layers.{l}.attn.qkv.weight       rows     N*D H
model.language_model.layers.{l}.self_attn.k_proj.weight          text.layers.{l}.attn.qkv.weight       rows     G*D H
model.language_model.layers.{l}.self_attn.v_proj.weight          text.layers.{l}.attn.qkv.weight       rows     G*D H
model.language_model.layers.{l}.self_attn.q_norm.weight          text.layers.{l}.attn.q_norm.weight    copy     D
model.language_model.layers.{l}.self_attn.k_norm.weight          text.layers.{l}.attn.k_norm.weight    copy     D
model.language_model.layers.{l}.self_attn.o_proj.weight          text.layers.{l}.attn.out.weight       copy     H N*D
model.language_model.layers.{l}.post_attention_layernorm.weight  text.layers.{l}.moe_norm.weight       copy     H
model.language_model.layers.{l}.mlp.gate.weight                  text.layers.{l}.moe.router.weight     copy     E H
model.language_model.layers.{l}.mlp.experts.gate_up_proj         text.layers.{l}.moe.experts.gate_up   experts  E H 2I
model.language_model.layers.{l}.mlp.experts.down_proj            text.layers.{l}.moe.experts.down      experts  E I H
model.language_model.norm.weight                  text.norm.weight                       copy       H
lm_head.weight                                    lm_head.weight                         copy       V H
"""


@dataclass(frozen=True)
class Entry:
    """One row of the table for one layer.

    ``transform`` is ``copy``; ``reshape`` (same bytes, our parameter has fewer dimensions); ``rows`` (``shape[0]`` rows
    of the parameter from ``first_row`` on); or ``experts`` (``shape`` is that of the published layout; ours is
    transformers 5's, with the last two dimensions swapped).

    ``fp8`` says that the weights are quantised and have scales (weights/scales.py).
    """

    source: str
    target: str
    transform: str
    shape: tuple[int, ...]
    first_row: int = 0
    fp8: bool = False

    def shape_in(self, layout: str) -> tuple[int, ...]:
        """Shape in a checkpoint whose experts have ``layout``."""
        if self.transform == "experts" and layout == "transformers5":
            return self.shape[0], self.shape[2], self.shape[1]
        return self.shape

    def scale_shape_in(self, layout: str) -> tuple[int, ...]:
        """Shape of its scales in such a checkpoint."""
        return scale_shape(self.shape_in(layout))

    def destination(self, parameter: torch.Tensor, layout: str) -> torch.Tensor:
        """The view of ``parameter`` that, filled with the stored tensor as it is, carries out the transform."""
        if self.transform == "reshape":
            return parameter.view(self.shape)
        if self.transform == "rows":
            return parameter[self.first_row : self.first_row + self.shape[0]]
        if self.transform == "experts" and layout == "published":
            return parameter.transpose(1, 2)
        return parameter


def expand_table(config: Qwen3VLMoeConfig) -> list[Entry]:
    """The table for all layers of ``config``. Rows of one parameter follow each other in the order of the table."""
    text, vision = config.text, config.vision
    sizes = {
        "V": text.vocab_size,
        "H": text.hidden_size,
        "N*D": text.num_heads * text.head_dim,
        "G*D": text.num_kv_heads * text.head_dim,
        "D": text.head_dim,
        "E": text.num_experts,
        "I": text.expert_width,
        "2I": 2 * text.expert_width,
        "C": vision.hidden_size,
        "3C": 3 * vision.hidden_size,
        "m*m*C": vision.merged_width,
        "F": vision.intermediate_size,
        "S": vision.num_positions,
        "c": vision.in_channels,
        "t": vision.temporal_patch_size,
        "p": vision.patch_size,
    }
    repeats = {"l": text.num_layers, "b": vision.depth, "d": len(vision.deepstack_indexes)}
    entries, next_row = [], {}
    for line in _TABLE.strip().splitlines()[1:]:
        source, target, transform, *shape_names = line.split()
        shape = tuple(sizes[name] for name in shape_names)
        counter = re.search(r"\{(.)\}", source)
        for i in range(repeats[counter[1]] if counter else 1):
            name = target.replace(counter[0], str(i)) if counter else target
            first_row = next_row.get(name, 0)
            next_row[name] = first_row + shape[0]
            named = source.replace(counter[0], str(i)) if counter else source
            layers = text.fp8_attention if ".self_attn." in source else text.fp8_experts
            fp8 = i in layers and (transform == "experts" or source.endswith("_proj.weight"))
            entries.append(Entry(named, name, transform, shape, first_row, fp8))
    return entries


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
        moe: ``"tma"``, ``"reference"`` or ``"auto"``, see :func:`qwen3vl_moe.weights.placement.resolve_moe`.
        expert_layout: ``"published"`` or ``"transformers5"``; needed only where an expert tensor has one shape in both.
        progress: a progress bar, then one line of seconds, GB/s and peak memory, both on stderr.

    Raises:
        CheckpointError: the files are missing, damaged, or not the tensors that config.json calls for.
        ConfigError: config.json asks for something that is not supported.
        OptionError: an unknown or unavailable device, dtype, moe or expert_layout; not enough device memory.
    """
    directory = resolve(path_or_id)
    started = time.perf_counter()
    stored = read_headers(directory)
    config = Qwen3VLMoeConfig.from_pretrained(directory)
    table = expand_table(config)
    check_tensors(table, stored, directory)
    layout = find_expert_layout(table, stored, directory, expert_layout)
    device, dtype = parse_device(device), parse_dtype(dtype, config.dtype)

    with torch.device("meta"):
        model = Qwen3VLMoe(config, resolve_moe(moe, device, dtype, config.text)).set_dtype(dtype)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    require_memory(device, model_bytes, directory, dtype)
    meter = _Meter(device, sum(tensor.nbytes for tensor in stored.values()), progress)
    model = model.to_empty(device=device)

    parameters = dict(model.named_parameters())
    # In the order of the files: a disk reads forwards fastest, and shards end up one after the other.
    entries = sorted(table, key=lambda entry: (stored[entry.source].file, stored[entry.source].offset))
    copies = [(stored[e.source], e.destination(parameters[e.target], layout)) for e in entries]
    stream(copies, device, meter.add)
    for entry in entries:
        if entry.fp8:
            _fill_scales_of(entry, model, stored, layout)
            meter.add(stored[scale_name(entry.source)].nbytes)
    line = meter.finish(time.perf_counter() - started, model_bytes)
    if progress:
        print(f"loaded {directory.name}: {line}", file=sys.stderr)
    return model


def _fill_scales_of(entry: Entry, model: Qwen3VLMoe, stored: dict[str, StoredTensor], layout: str) -> None:
    experts = entry.transform == "experts"
    layer_name, _, parameter_name = entry.target.rpartition(".")
    layer = model.get_submodule(layer_name)
    if isinstance(layer, BlockLinear):
        shared, scales = layer.shared, layer.scale.data
        scales = scales.narrow(0, entry.first_row // shared, -(-entry.shape[0] // shared))
    else:
        shared, scales = BLOCK, layer.get_parameter(f"{parameter_name}_scale").data
    name = scale_name(entry.source)
    turned = experts and layout == "published"
    fill_scales(scales, stored[name], name, rows=entry.shape[0], shared=shared, turned=turned)


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

    def finish(self, seconds: float, model_bytes: int) -> str:
        """Close the bar; the line to print."""
        self._bar.close()
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

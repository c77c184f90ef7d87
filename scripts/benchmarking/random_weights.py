"""Random weights of any size, the same for any number of ranks, and routers that draw their experts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from qwen3vl_moe import Qwen3VLMoe, Qwen3VLMoeConfig
from qwen3vl_moe.ops import ALONE, BlockLinear, Ranks
from qwen3vl_moe.weights.placement import parse_device, parse_dtype, require_memory, resolve_moe
from qwen3vl_moe.weights.table import Entry, expand_table
from tma_moe.block_fp8 import BLOCK, FP8

ROUTINGS = ("balanced", "skewed")


def dummy_model(
    *,
    directory: str | None,
    fp8: bool,
    dtype: str,
    moe: str,
    routing: str | None,
    rows: int,
    device: torch.device,
    config: Qwen3VLMoeConfig | None = None,
    ranks: Ranks = ALONE,
) -> Qwen3VLMoe:
    """A model of ``--load-format dummy``, or one rank's part of it.

    Args:
        directory: of the config; None: the published sizes.
        fp8: experts and attention in FP8, whatever the config says.
        routing: see :func:`draw_routing`; None: as the random routers have it.
        rows: most tokens of a step.
        config: instead of the directory's.

    Raises:
        OptionError: see :func:`random_model`.
    """
    if config is None:
        published = directory is None
        config = Qwen3VLMoeConfig.qwen3_vl_30b_a3b() if published else Qwen3VLMoeConfig.from_pretrained(Path(directory))
    if fp8:
        config = in_fp8(config)
    model = random_model(config, device, parse_dtype(dtype, config.dtype), moe=moe, ranks=ranks)
    if routing is not None:  # before graphs are captured
        draw_routing(model, routing, rows)
    return model


def in_fp8(config: Qwen3VLMoeConfig) -> Qwen3VLMoeConfig:
    """The same model with the attention products and experts of all layers in block-scaled FP8."""
    layers = frozenset(range(config.text.num_layers))
    return dataclasses.replace(config, text=dataclasses.replace(config.text, fp8_attention=layers, fp8_experts=layers))


def random_model(
    config: Qwen3VLMoeConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    moe: str = "auto",
    ranks: Ranks = ALONE,
) -> Qwen3VLMoe:
    """Random weights of any size, made on the device: N(0, 0.02) matrices, norms at 1, biases at 0.

    Those in FP8 are N(0, 100), with scales around 0.0002. Each of several ranks draws whole tensors, one at a time, and
    keeps its part.

    Raises:
        OptionError: an unknown or unavailable device or moe; not enough memory.
    """
    device, dtype = parse_device(device), dtype or config.dtype
    with torch.device("meta"):
        backend = resolve_moe(moe, device, dtype, config.text, ranks.size)
        model = Qwen3VLMoe(config, backend, ranks).set_dtype(dtype)
        whole = model if ranks.alone else Qwen3VLMoe(config, backend).set_dtype(dtype)
    require_memory(device, sum(parameter.nbytes for parameter in model.parameters()), "a model of this size", dtype)
    model = model.to_empty(device=device)
    table: dict[str, list[tuple[Entry, Entry]]] = {}
    for here, there in zip(expand_table(config, ranks), expand_table(config), strict=True):
        table.setdefault(here.target, []).append((here, there))
    generator = torch.Generator(device=device).manual_seed(seed)
    shapes = whole.named_parameters()
    for (name, parameter), (_, all_of_it) in zip(model.named_parameters(), shapes, strict=True):
        if ranks.alone:
            _draw(name, parameter, generator)
            continue
        drawn = torch.empty_like(all_of_it, device=device)
        _draw(name, drawn, generator)
        parts = _parts(name, drawn, table, model, whole)
        begin = 0
        for part in parts:
            raw = parameter.data[begin : begin + len(part)]
            (raw.view(torch.uint8) if raw.dtype == FP8 else raw).copy_(part)
            begin += len(part)
    return model


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Fill a whole parameter."""
    parameter = parameter.data
    if parameter.dtype == FP8:
        for rows in parameter.flatten(0, -2).split(1 << 14):  # N(0, 100) of FP8, piece by piece
            drawn = torch.randn(rows.shape, device=parameter.device, dtype=torch.bfloat16, generator=generator)
            rows.copy_(drawn.mul_(100).clamp_(-448, 448))  # beyond that lies no number, and copy_ makes it NaN
    elif name.endswith("scale"):
        parameter.uniform_(1.5e-4, 2.5e-4, generator=generator)
    elif name.endswith(".bias"):
        parameter.zero_()
    elif parameter.ndim == 1:
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, 0.02, generator=generator)


def _parts(
    name: str,
    drawn: Tensor,
    table: dict[str, list[tuple[Entry, Entry]]],
    model: Qwen3VLMoe,
    whole: Qwen3VLMoe,
) -> list[Tensor]:
    """What a rank holds of a parameter: of each tensor in it, one after the other. FP8 as bytes."""
    drawn = drawn.view(torch.uint8) if drawn.dtype == FP8 else drawn
    layer_name, _, own_name = name.rpartition(".")
    layer, units = model.get_submodule(layer_name), [1] * drawn.ndim
    is_scale = name not in table
    if is_scale:
        units[-2:] = BLOCK, BLOCK
        name = f"{layer_name}.weight" if own_name == "scale" else name.removesuffix("_scale")
    shared = 1
    if is_scale and isinstance(layer, BlockLinear):
        # In a part, fewer rows may have a scale in common.
        shared = layer.shared
        drawn = drawn.repeat_interleave(whole.get_submodule(layer_name).shared // shared, 0)
        units[0] = shared
    parts = []
    for here, there in table[name]:
        part = drawn
        if here.transform == "rows":
            part = drawn.narrow(0, there.first_row // shared, -(-there.rows // shared))
        axis = here.axis_in("transformers5")
        if axis is not None:
            unit = units[axis]
            part = torch.cat([part.narrow(axis, r.start // unit, -(-len(r) // unit)) for r in here.own], axis)
        parts.append(part)
    return parts


def draw_routing(model: Qwen3VLMoe, routing: str, rows: int) -> None:
    """Make every router of a model give drawn logits in place of its own, one draw per row of a step and layer.

    The k largest of Gumbel noise plus log p are a draw of k experts without replacement with probabilities p. Each
    router still makes its product; the draw is a view, which costs no launch and replays from a CUDA graph.
    """
    text = model.config.text
    shift = 61  # layers begin at different rows of one table
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(rows + shift * text.num_layers, text.num_experts, generator=generator)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))
    if routing == "skewed":
        gumbel -= torch.log(torch.randperm(text.num_experts, generator=generator) + 1.0)
    table = gumbel.to(model.device, model.dtype)

    def hook(first: int):
        def replaced(module: torch.nn.Module, inputs: tuple, logits_TE: Tensor) -> Tensor:
            return table[first : first + len(logits_TE)]

        return replaced

    for number, layer in enumerate(model.text.layers):
        layer.moe.router.register_forward_hook(hook(shift * number))

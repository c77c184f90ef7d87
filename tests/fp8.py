"""Tiny checkpoints in block-scaled FP8, made from those of 16 or 32 bits without the loader's own tables."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tma_moe.block_fp8 import dequantize_blocks, quantize_blocks

QUANTISED = re.compile(r"(self_attn\.[qkvo]_proj\.weight|experts\.(gate_up|down)_proj)$")
CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.visual", "mlp.gate"],
}
Change = Callable[[dict[str, torch.Tensor]], None]


def write_fp8(
    source: Path, target: Path, *, published: bool, scales: torch.dtype = torch.bfloat16, config: dict | None = None,
    change: Change | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Quantise a checkpoint; returns what it stands for, as tensors of the source's names and layout.

    Args:
        published: whether its experts, and with them their scales, are input-major.
        scales: of which dtype.
        config: of the quantization; None: the usual one.
        change: called with the tensors before they are written.
    """
    shutil.copytree(source, target, dirs_exist_ok=True)
    raw = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | {"quantization_config": CONFIG if config is None else config}))
    tensors, exact = load_file(target / "model.safetensors"), {}
    for name, value in list(tensors.items()):
        exact[name] = value
        if QUANTISED.search(name):
            turn = (lambda x: x.transpose(-1, -2).contiguous()) if published and ".experts." in name else (lambda x: x)
            w8, scale = quantize_blocks(turn(value))
            scale = scale.to(scales)
            exact[name] = turn(dequantize_blocks(w8, scale.float()))
            tensors[name], tensors[f"{name}_scale_inv"] = turn(w8), turn(scale)
    if change is not None:
        change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return exact

"""A trained model -> the files of a published checkpoint: names, expert layout and config spelling as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHARD_BYTES = 15 * 2**20


def write_weights(model: Any, path: Path, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the weights of a ``Qwen3VLMoeForConditionalGeneration`` in bf16, sharded; the total in bytes.

    transformers 5 holds expert weights output-major ([E, 2I, H], [E, H, I]); published checkpoints hold them
    input-major ([E, H, 2I], [E, I, H]).
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = total = 0
    for name, value in model.state_dict().items():
        value = value.detach().to("cpu", torch.bfloat16)
        value = (value.transpose(1, 2) if ".experts." in name else value).contiguous()
        if used and used + value.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = value
        used += value.nbytes
        total += value.nbytes
    for stale in path.glob("model*.safetensors*"):
        stale.unlink()
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, path / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    write_json(path / "model.safetensors.index.json", index)
    return total


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

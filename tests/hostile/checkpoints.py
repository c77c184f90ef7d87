"""Checkpoints of which one file has been damaged. They are tiny, and their weights are zeros."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarking.tiny import write_processor_dir
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.weights.table import expand_table
from tests.hostile.mutations import RAW_TEXTS, file_mutations, json_mutations

SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"


def write_sound(folder: Path) -> None:
    """A checkpoint of some hundred thousand parameters, in one shard with an index."""
    ids = write_processor_dir(folder, patch_size=4)
    config = {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "image_token_id": ids.image,
        "video_token_id": ids.video,
        "vision_start_token_id": ids.vision_start,
        "vision_end_token_id": ids.vision_end,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "dtype": "float32",
            "vocab_size": 512,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            "eos_token_id": ids.im_end,
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe",
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    }
    generation = {
        "eos_token_id": [ids.im_end, ids.endoftext],
        "do_sample": True,
        "top_k": 20,
        "top_p": 0.8,
        "temperature": 0.7,
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content))
    header, at = {}, 0
    for entry in expand_table(Qwen3VLMoeConfig.from_pretrained(folder)):
        end = at + 4 * math.prod(entry.shape)
        header[entry.source] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": [at, end]}
        at = end
    (folder / SHARD).write_bytes(safetensors(header, at))
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": at}, "weight_map": dict.fromkeys(header, SHARD)})
    )


def safetensors(header: object, data_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def cases(sound: Path) -> Iterator[tuple[str, tuple[str, bytes]]]:
    """Names, and which file of the checkpoint ``sound`` gets which content."""
    rng = random.Random(4)
    yield "config.json as it is", ("config.json", (sound / "config.json").read_bytes())
    for file, each in (
        ("config.json", 3),
        ("generation_config.json", 6),
        ("preprocessor_config.json", 4),
        ("tokenizer_config.json", 4),
    ):
        for change, content in json_mutations(json.loads((sound / file).read_text()), rng, each):
            yield f"{file}: {change}", (file, content)
    tokenizer = json.loads((sound / "tokenizer.json").read_text())
    for change, content in rng.sample(list(json_mutations({**tokenizer, "model": {}}, rng, 1)), 30):
        yield f"tokenizer.json: {change}", ("tokenizer.json", content)
    vocabulary = tokenizer["model"]["vocab"]
    for number, value in enumerate((-1, 511, 512, 2**31, 2**32 - 1, 0.5, "a", None)):
        changed = {**tokenizer["model"], "vocab": {**vocabulary, next(iter(vocabulary)): value}}
        yield (
            f"tokenizer.json: an id, {number}",
            ("tokenizer.json", json.dumps({**tokenizer, "model": changed}).encode()),
        )
    for file in (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        INDEX,
        SHARD,
        "chat_template.jinja",
    ):
        for name, text in RAW_TEXTS.items():
            if file in ("config.json", INDEX, SHARD) or rng.random() < 0.5:
                yield f"{file}: {name}", (file, text)
    yield from _index(sound, rng)
    yield from _shard(sound, rng)


def _index(sound: Path, rng: random.Random) -> Iterator[tuple[str, tuple[str, bytes]]]:
    content = json.loads((sound / INDEX).read_text())
    names = rng.sample(sorted(content["weight_map"]), 3)
    short = {**content, "weight_map": {name: content["weight_map"][name] for name in names}}
    for change, text in json_mutations(short, rng, 6):
        yield f"index: {change}", (INDEX, text)
    for file in (
        "../a.safetensors",
        "/etc/passwd",
        "/dev/zero",
        "a\x00b",
        "\x1b[31m",
        "",
        ".",
        "config.json",
        "a" * 5000,
        "\ud800",
    ):
        changed = {**content["weight_map"], names[0]: file}
        yield f"index names {file[:20]!a}", (INDEX, json.dumps({"weight_map": changed}).encode())


def _shard(sound: Path, rng: random.Random) -> Iterator[tuple[str, tuple[str, bytes]]]:
    data = (sound / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = rng.sample(sorted(header), 3)
    for change, text in rng.sample(list(json_mutations({name: header[name] for name in names}, rng, 6)), 60):
        rest = b"" if text == b"{}" else b"," + text[1:-1]
        whole = (
            json.dumps({name: entry for name, entry in header.items() if name not in names}).encode()[:-1] + rest + b"}"
        )
        yield f"header: {change}", (SHARD, len(whole).to_bytes(8, "little") + whole + data[8 + length :])
    for claimed in (0, 1, 7, length - 1, length + 1, 10**8, 2**63, 2**64 - 1):
        yield f"a header of {claimed} bytes", (SHARD, claimed.to_bytes(8, "little") + data[8:])
    for change, damaged in file_mutations(data[: 8 + length], rng, 6, 20):
        yield f"shard: {change}", (SHARD, damaged + data[8 + length :])
    yield "weights of NaN", (SHARD, data[: 8 + length] + b"\xff" * (len(data) - 8 - length))
    yield "weights of infinity", (SHARD, data[: 8 + length] + b"\x00\x00\x80\x7f" * ((len(data) - 8 - length) // 4))


def damaged(sound: Path, folder: Path, change: tuple[str, bytes]) -> Path:
    """A checkpoint like ``sound`` but for one file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sound.iterdir():
        if path.name != change[0]:
            os.link(path, folder / path.name)
    (folder / change[0]).write_bytes(change[1])
    return folder

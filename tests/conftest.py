"""Fixtures shared by all tests: tiny random checkpoints that transformers made, and the optional shared folder."""

from __future__ import annotations

import gc
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from benchmarking.tiny import write_processor_dir

# What modules define stays for good. While tests are collected, and while they run, python need not look through all of
# it again and again for garbage: that was a quarter of the time of the former, and a tenth of the latter.
gc.disable()
# Shells have background jobs ignore Ctrl-C, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the shapes are tiny: a second thread costs more than it computes
# How long an example takes says something of the machine and of what else it does, not of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """Bounds of rounding hold for almost every draw of a few numbers: a test must not fail on the unlucky one."""
    torch.manual_seed(0)


# Sizes that differ from each other wherever a mistake could hide: non-square experts (2I != H, I != H), head counts,
# expert counts that are no power of two, DeepStack blocks in and out of order or absent, merge sizes.
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {
        "text": {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "mrope_section": [4, 2, 2],
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        "vision": {
            "depth": 4,
            "deepstack_visual_indexes": [0, 2],
            "spatial_merge_size": 2,
            "num_position_embeddings": 36,
        },
    },
    "odd": {
        "text": {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "mrope_section": [3, 2, 1],
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
        },
        "vision": {
            "depth": 3,
            "deepstack_visual_indexes": [2, 0, 1],
            "spatial_merge_size": 3,
            "num_position_embeddings": 25,
        },
    },
    # Every token goes to every expert: rounding cannot send it elsewhere. Heads are wide enough for the GPU kernels.
    "dense_routing": {
        "text": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "mrope_section": [4, 2, 2],
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 40,
        },
        "vision": {
            "depth": 2,
            "deepstack_visual_indexes": [],
            "spatial_merge_size": 1,
            "num_position_embeddings": 49,
            "num_heads": 2,
        },
    },
}
# For FP8: sides of more than one block of 128, most of them ragged; queries, and keys and values, of different kinds.
BLOCKS: dict[str, Any] = {
    "text": {
        "hidden_size": 144,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mrope_section": [6, 5, 5],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 80,
    },
    "vision": {
        "depth": 2,
        "deepstack_visual_indexes": [1],
        "spatial_merge_size": 2,
        "num_position_embeddings": 36,
    },
}
# The same with sides of whole blocks, and with experts whose gate_up_proj is square.
FP8_CONFIGS = {
    "blocks": BLOCKS,
    "whole blocks": BLOCKS
    | {"text": BLOCKS["text"] | {"hidden_size": 256, "num_key_value_heads": 4, "moe_intermediate_size": 384}},
    "square experts": BLOCKS | {"text": BLOCKS["text"] | {"moe_intermediate_size": 72}},
}
# Two ranks have whole blocks of 128 query channels each, of 64 keys, and of experts' widths, or whole experts.
_RANKS_TEXT = BLOCKS["text"] | {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
FP8_CONFIGS |= {
    "ranks, width": BLOCKS | {"text": _RANKS_TEXT | {"moe_intermediate_size": 512}},
    "ranks, experts": BLOCKS | {"text": _RANKS_TEXT | {"moe_intermediate_size": 384}},
}
# Whose experts ranks divide by their width: the other configs leave whole experts to each.
WIDE: dict[str, Any] = {
    "text": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "mrope_section": [2, 1, 1],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "vision": {
        "depth": 2,
        "deepstack_visual_indexes": [0],
        "spatial_merge_size": 2,
        "num_position_embeddings": 36,
    },
}
VOCAB_SIZE = 512
PATCH_SIZE = 4


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # One of them that begins last would leave the other processors with nothing to do.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@dataclass(frozen=True)
class TinyCheckpoint:
    """A random model that transformers made, and two directories of it (processor files included).

    Attributes:
        name: its key in ``TINY_CONFIGS``.
        path: as transformers 5 saved it.
        published: the same weights in the published expert layout and config spelling.
        oracle: the transformers model, fp32, on the CPU.
    """

    name: str
    path: Path
    published: Path
    oracle: Any

    @property
    def paths(self) -> dict[str, Path]:
        return {"transformers5": self.path, "published": self.published}


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The optional shared folder beside the repository."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("an optional folder of public files is not here")
    return path


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory):
    """``make_tiny(name)``: the tiny checkpoint of that name, made once per session."""
    made: dict[str, TinyCheckpoint] = {}

    def make(name: str) -> TinyCheckpoint:
        if name not in made:
            made[name] = _write_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="session", params=list(TINY_CONFIGS))
def tiny(request: pytest.FixtureRequest, make_tiny) -> TinyCheckpoint:
    """Each tiny checkpoint in turn."""
    return make_tiny(request.param)


@pytest.fixture(scope="session")
def plain(make_tiny) -> TinyCheckpoint:
    """One tiny checkpoint, for tests that do not depend on its sizes."""
    return make_tiny("plain")


def _write_tiny(name: str, directory: Path) -> TinyCheckpoint:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    sizes = (TINY_CONFIGS | FP8_CONFIGS | {"wide": WIDE})[name]
    path, published = directory / "transformers5", directory / "published"
    merge_size = sizes["vision"]["spatial_merge_size"]
    side = PATCH_SIZE * merge_size
    for target in (path, published):
        ids = write_processor_dir(
            target,
            vocab_size=VOCAB_SIZE,
            patch_size=PATCH_SIZE,
            merge_size=merge_size,
            min_pixels=4 * side**2,
            max_pixels=64 * side**2,
        )
    text = dict(sizes["text"])
    section = text.pop("mrope_section")
    config = Qwen3VLMoeConfig(
        text_config={
            **text,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 4096,
            "eos_token_id": ids.im_end,
            "pad_token_id": ids.endoftext,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": section,
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "num_heads": 4,
            **sizes["vision"],
            "hidden_size": 32,
            "intermediate_size": 40,
            "patch_size": PATCH_SIZE,
            "out_hidden_size": text["hidden_size"],
        },
        image_token_id=ids.image,
        video_token_id=ids.video,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
        tie_word_embeddings=False,
    )
    oracle = Qwen3VLMoeForConditionalGeneration(config).eval().requires_grad_(False)
    # transformers' own initialisation is so small that every layer is nearly the identity and mistakes hide.
    generator = torch.Generator().manual_seed(len(name))
    for key, parameter in oracle.named_parameters():
        scale = 0.1 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.normal_(0.0, scale, generator=generator)
        if "norm" in key and key.endswith("weight"):
            parameter.add_(1.0)
    oracle.generation_config.eos_token_id = [ids.im_end, ids.endoftext]
    oracle.generation_config.pad_token_id = ids.endoftext
    oracle.save_pretrained(path)
    _write_published(oracle, path, published)
    return TinyCheckpoint(name, path, published, oracle)


def _write_published(oracle: Any, path: Path, published: Path) -> None:
    """The same model as the published checkpoints are laid out: input-major experts, the older config spelling."""
    tensors = {
        key: (value.transpose(1, 2) if ".experts." in key else value).contiguous()
        for key, value in oracle.state_dict().items()
    }
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((path / "config.json").read_text())
    text = raw["text_config"]
    text["num_experts"] = text.pop("num_local_experts")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    text["norm_topk_prob"] = True
    raw["vision_config"]["model_type"] = "qwen3_vl_moe"
    raw["vision_config"].pop("rope_parameters", None)
    raw["transformers_version"] = "4.57.0"
    (published / "config.json").write_text(json.dumps(raw, indent=2))
    (published / "generation_config.json").write_text((path / "generation_config.json").read_text())

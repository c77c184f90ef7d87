"""Engines around the tiny checkpoints, and prompts for them. Everything is fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine import LLM, scheduler
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.inputs.processor import Processor
from qwen3vl_moe.inputs.tokenizer import IMAGE_PLACEHOLDER
from qwen3vl_moe.model import Qwen3VLMoe

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="session")
def make_llm() -> MakeLLM:
    """``make_llm(checkpoint, **engine_options)``: a fresh engine; model and processor are loaded once.

    Steps are launched ahead, as on a GPU.
    """
    loaded = {}

    def make(checkpoint, **options) -> LLM:
        if checkpoint.name not in loaded:
            config = Qwen3VLMoeConfig.from_pretrained(checkpoint.path)
            loaded[checkpoint.name] = (
                Qwen3VLMoe.from_pretrained(checkpoint.path, dtype=torch.float32, progress=False),
                Processor.from_pretrained(checkpoint.path, config),
                GenerationDefaults.from_pretrained(checkpoint.path),
            )
        model, processor, defaults = loaded[checkpoint.name]
        options = {"num_blocks": 256, "max_num_seqs": 16, "async_scheduling": True, **options}
        return LLM.from_parts(model, processor, defaults, **options)

    return make


@pytest.fixture(autouse=True)
def no_room_ahead(monkeypatch):
    """Answers here are so short that room for the next 128 tokens would make every preemption impossible."""
    monkeypatch.setattr(scheduler, "_SOON", 0)


@pytest.fixture
def encoded(plain, make_llm, monkeypatch) -> list[int]:
    """How many pictures each call of the vision tower has."""
    model = make_llm(plain).engine.model
    calls: list[int] = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels, grids: calls.append(len(grids)) or encode(pixels, grids))
    return calls


@pytest.fixture
def llm(plain, make_llm) -> LLM:
    return make_llm(plain)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mixed_prompt(*sizes: tuple[int, int], text: str = "The picture shows", seed: int = 0) -> dict:
    """Text with images of the given sizes (width, height in pixels) between its pieces."""
    images = [picture(width, height, seed + number) for number, (width, height) in enumerate(sizes)]
    return {
        "prompt": text + "".join(f" one {IMAGE_PLACEHOLDER} and then" for _ in images),
        "multi_modal_data": {"image": images},
    }


PROMPTS = {
    "text": mixed_prompt(text="Hello, how are you today? Answer in"),
    "one image": mixed_prompt((40, 30), seed=1),
    "three odd images": mixed_prompt((61, 23), (17, 53), (35, 37), seed=2),
}


def check_leaks(llm: LLM) -> None:
    """Nothing is running, and every block is free and held by nobody."""
    engine = llm.engine
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert sorted(engine.cache._free) == list(range(engine.cache.num_blocks))
    assert not any(engine.cache._references)

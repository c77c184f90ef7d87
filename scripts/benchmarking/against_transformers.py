"""What compare_transformers.py compares: logits, ours and transformers', with those of an fp32 evaluation."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarking.random_weights import random_model
from benchmarking.transformers_twin import in_float32, require_16_bits, transformers_twin
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.weights import load_model, resolve
from qwen3vl_moe.weights.placement import resolve_moe

console = Console(stderr=True, soft_wrap=True)


def random_prompts(config: Qwen3VLMoeConfig) -> dict[str, tuple]:
    """A text prompt of 450 tokens; a 560x560 image (324 visual tokens) between 128 text tokens; 16 frames of 360x640
    (220 for each pair), with 8 text tokens before each."""
    generator = torch.Generator().manual_seed(0)
    highest = min(config.text.vocab_size, config.image_token_id)

    def words(count: int) -> list[int]:
        return torch.randint(0, highest, (count,), generator=generator).tolist()

    # 560 pixels are resized to the next multiple of 32: 576, or 36 x 36 patches of 16.
    merge = config.vision.merge_size
    grid = (1, 18 * merge, 18 * merge)
    image = [config.vision_start_token_id, *[config.image_token_id] * 324, config.vision_end_token_id]
    pixels = torch.rand(grid[1] * grid[2], config.vision.patch_dim, generator=generator) * 2 - 1
    clip = (8, 11 * merge, 20 * merge)
    frame = [config.vision_start_token_id, *[config.video_token_id] * 220, config.vision_end_token_id]
    video = [token for _ in range(clip[0]) for token in (*words(8), *frame)]
    frames = torch.rand(math.prod(clip), config.vision.patch_dim, generator=generator) * 2 - 1
    return {
        "text, 450 tokens": (words(450),),
        "image 560x560 + 128 text tokens": (words(64) + image + words(64), pixels, [grid]),
        "16 frames of 360x640": (video + words(64), None, None, frames, [clip]),
    }


def real_prompts(
    model: str, config: Qwen3VLMoeConfig, prompt: str, image: Path | None, video: Path | None
) -> dict[str, tuple]:
    from qwen3vl_moe.inputs.processor import Processor
    from qwen3vl_moe.weights import resolve

    processor = Processor.from_pretrained(resolve(model), config)
    content = [{"type": "text", "text": prompt}]
    prompts = {"text": content}
    if image is not None:
        prompts[f"image {image.name} + text"] = [{"type": "image", "image": str(image)}, *content]
    if video is not None:
        prompts[f"video {video.name} + text"] = [{"type": "video", "video": str(video)}, *content]
    out = {}
    for name, items in prompts.items():
        ready = processor.chat([{"role": "user", "content": items}])
        inputs: list = [list(ready.token_ids)]
        for of_video in (False, True):
            found = [image for image in ready.images if image.of_video == of_video]
            inputs.append(torch.cat([each.pixel_values for each in found]) if found else None)
            inputs.append([each.grid_thw for each in found] or None)
        out[name] = tuple(inputs)
    return out


def twin_logits(
    twin, config: Qwen3VLMoeConfig, device: torch.device, ids, pixels=None, grids=None, frames=None, clips=None
) -> torch.Tensor:
    """transformers' logits [T, V]."""
    ids = torch.tensor([ids], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    if pixels is not None:
        inputs |= {"pixel_values": pixels.to(device), "image_grid_thw": torch.tensor(grids, device=device)}
    if frames is not None:
        inputs |= {"pixel_values_videos": frames.to(device), "video_grid_thw": torch.tensor(clips, device=device)}
    with torch.no_grad():
        return twin(**inputs).logits[0]


def errors(logits: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Distances of one model's logits [T, V] from the fp32 evaluation, over all positions."""
    ours, theirs = logits.float(), exact
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return {
        "relative": float((ours - theirs).norm() / theirs.norm()),
        "largest": float((ours - theirs).abs().max() / theirs.abs().max()),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "top1": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }


def compare(model, prompt, image, video, device, dtype, moe, layers) -> list[dict]:
    if dtype not in (torch.bfloat16, torch.float16):
        raise OptionError("--dtype must be bfloat16 or float16: the yardstick is an fp32 evaluation")
    # Products in full fp32: TF32 would make the yardstick as coarse as what it measures.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if model is None:
        config = Qwen3VLMoeConfig.qwen3_vl_30b_a3b()
        if layers:
            config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=layers))
        ours, prompts = random_model(config, device, dtype, moe="reference"), random_prompts(config)
    else:
        require_16_bits(Qwen3VLMoeConfig.from_pretrained(resolve(model, weights=False)))
        ours = load_model(model, device, dtype, "reference")
        config, prompts = ours.config, real_prompts(model, ours.config, prompt, image, video)
    backends = list(dict.fromkeys(resolve_moe(name, device, dtype, config.text) for name in moe.split(",")))

    logits: dict[str, dict[str, torch.Tensor]] = {name: {} for name in prompts}
    for backend in backends:
        ours.set_moe(backend)
        for name, inputs in prompts.items():
            logits[name][f"ours, moe={backend}"] = ours.logits(*inputs)
    twin = transformers_twin(ours)
    for name, inputs in prompts.items():
        logits[name]["transformers"] = twin_logits(twin, config, device, *inputs)
    started = time.perf_counter()
    yardstick = in_float32(twin)
    rows = []
    for name, inputs in prompts.items():
        exact = twin_logits(yardstick, config, device, *inputs).float()
        peer = errors(logits[name]["transformers"], exact)
        for who, values in logits[name].items():
            row = {"prompt": name, "model": who, **errors(values, exact)}
            within = row["relative"] <= 2 * peer["relative"] and row["largest"] <= 2 * peer["largest"]
            row["verdict"] = "the peer" if who == "transformers" else "right" if within else "WRONG"
            rows.append(row)
    console.print(f"fp32 evaluation: {time.perf_counter() - started:.1f} s", highlight=False)
    return rows

"""Ways to run one loaded model, taken in turns in one process: the weights, the requests and the card are the same.

per_call, lru, owned    the fused experts under that descriptor policy, every kernel launched by the host;
grouped_mm              torch's grouped_mm experts in place of the fused ones, launched by the host;
reference               the plain torch loop over the experts, launched by the host;
eager                   as loaded, launched by the host;
graphs                  as loaded, small steps replayed from CUDA graphs;
transformers            transformers' own model (grouped_mm experts, SDPA) over the same weights: our preprocessing,
                        its forward over the whole prompt, and the most likely token; one request at a time only.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import tma_moe
from benchmarking.inputs import TimedRequest
from benchmarking.moe import grouped_mm_moe
from benchmarking.serving import sampling, single_stream
from benchmarking.statistics import Record
from benchmarking.transformers_twin import transformers_twin
from qwen3vl_moe.engine import LLM
from qwen3vl_moe.engine.cuda_graphs import uses_graphs
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.inputs.images import copy_pixels, cut_patches
from tma_moe.descriptor_policies import POLICIES

TRANSFORMERS = "transformers"
ENGINE_VARIANTS = (*POLICIES, "grouped_mm", "reference", "eager", "graphs")


def check_names(names: str) -> list[str]:
    """The variants of a comma-separated list.

    Raises:
        OptionError: an unknown name, or one that is given twice.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in ENGINE_VARIANTS]
    if unknown:
        raise OptionError(f"--compare: {unknown[0]!r} is unknown; choose from {', '.join(ENGINE_VARIANTS)}")
    if len(set(chosen)) != len(chosen):
        raise OptionError(f"--compare {names}: a variant is named twice")
    return chosen


def check_variants(names: list[str], llm: LLM) -> None:
    """Raises OptionError for a variant that this model cannot run here."""
    for name in names:
        if name in POLICIES and llm.engine.model.moe != "tma":
            raise OptionError(f"--compare: {name} is a way of the fused experts, and this model runs moe='reference'")
        if name == "graphs" and not has_graphs(llm):
            raise OptionError("--compare: graphs cannot run here: the engine has made no CUDA graphs")


def has_graphs(llm: LLM) -> bool:
    return uses_graphs(llm.engine.model, llm.options)


@contextlib.contextmanager
def variant(llm: LLM, name: str) -> Iterator[None]:
    """The engine runs as ``name`` says until the block ends."""
    runner, layers, model = llm.engine.runner, llm.engine.model.text.layers, llm.engine.model
    policy = name if name in POLICIES else "owned"
    loaded_as = model.moe
    if name == "reference":
        model.set_moe("reference")
    elif name == "grouped_mm":
        for layer in layers:
            layer.moe.forward = partial(_grouped_mm_forward, layer.moe)
    runner.replays = name == "graphs"
    try:
        with tma_moe.descriptor_policy(policy):
            yield
    finally:
        runner.replays = True
        model.set_moe(loaded_as)
        for layer in layers:
            layer.moe.__dict__.pop("forward", None)


def _grouped_mm_forward(moe: torch.nn.Module, x_TH: Tensor, padding_T: Tensor | None = None) -> Tensor:
    """An MoE layer with torch's grouped products. Steps that the host launches have no padding."""
    ids_TK, weights_TK = tma_moe.route(moe.router(x_TH), moe.experts_per_token, backend=moe.backend)
    return grouped_mm_moe(x_TH, ids_TK, weights_TK, moe.experts.gate_up, moe.experts.down)


def host_us_per_layer(llm: LLM, request: TimedRequest, repeats: int = 5) -> float:
    """Host time of one MoE layer of a prefill, router included, in microseconds: the median over passes.

    The clock runs around each layer's call and does not wait for the device, so on a GPU this is what the launches
    cost. The prompt is text alone, as long as the request's: behind an image tower the queue of launches may fill up,
    and the host would wait in it. On a CPU it is the whole layer, and so it is for ``reference``, which waits for the
    device.
    """
    config = llm.engine.model.config
    markers = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    tokens = llm.processor.chat(request.messages).token_ids
    plain = next(token for token in tokens[::-1] if token not in markers)
    prompt = llm.processor.prompt([plain if token in markers else token for token in tokens])
    passes: list[float] = []
    for _ in range(repeats + 1):
        with _timed_layers(llm) as seconds:
            sequence = llm.engine.request(prompt, sampling(TimedRequest([], 1), 0.0))
            llm.engine.add(sequence)
            while not sequence.finished:
                llm.engine.step()
        passes.append(statistics.mean(seconds))
    return 1e6 * statistics.median(passes[1:])


@contextlib.contextmanager
def _timed_layers(llm: LLM) -> Iterator[list[float]]:
    seconds: list[float] = []
    started = [0.0]

    def before(module: torch.nn.Module, inputs: tuple) -> None:
        started[0] = time.perf_counter()

    def after(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        seconds.append(time.perf_counter() - started[0])

    hooks = [layer.moe.register_forward_pre_hook(before) for layer in llm.engine.model.text.layers]
    hooks += [layer.moe.register_forward_hook(after) for layer in llm.engine.model.text.layers]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


class TransformersPeer:
    """transformers' model over the weights of an LLM, asked for one first token at a time."""

    def __init__(self, llm: LLM):
        self.llm = llm
        self.twin = transformers_twin(llm.engine.model)
        # Where our routers were made to give drawn logits, transformers' routers get the same.
        for layer, peer in zip(llm.engine.model.text.layers, self.twin.model.language_model.layers, strict=True):
            for hook in layer.moe.router._forward_hooks.values():
                peer.mlp.gate.register_forward_hook(_router_hook(hook, layer.moe.experts_per_token))

    @torch.inference_mode()
    def first_token(self, request: TimedRequest) -> Record:
        """Bytes and text to the first token on the host."""
        device = self.llm.engine.model.device
        start = time.perf_counter()
        prompt = self.llm.processor.chat(request.messages)
        prepared = time.perf_counter()
        ids = torch.tensor([prompt.token_ids], device=device)
        config = self.llm.engine.model.config
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        names = (False, "pixel_values", "image_grid_thw"), (True, "pixel_values_videos", "video_grid_thw")
        for of_video, pixels, grids in names:
            if images := [image for image in prompt.images if image.of_video == of_video]:
                pictures = [image.picture for image in images]
                inputs[pixels] = cut_patches(copy_pixels(pictures, device), pictures)
                inputs[grids] = torch.tensor([image.grid_thw for image in images], device=device)
        self.twin(**inputs, logits_to_keep=1).logits[0, -1].argmax().item()
        stop = time.perf_counter()
        vision = sum(image.num_tokens + 2 for image in prompt.images)
        # Its own stages are not told apart: all that follows the preprocessing stands under prefill.
        stages = {"preprocess": prepared - start, "prefill": stop - prepared}
        return Record(start, [stop], len(prompt.token_ids) - vision, vision, stages)


def _router_hook(ours: Callable, k: int) -> Callable:
    def replaced(module: torch.nn.Module, inputs: tuple, output: tuple) -> tuple:
        logits_TE = ours(module, inputs, output[0])
        weights_TK, ids_TK = torch.topk(logits_TE.float().softmax(-1), k, dim=-1)
        return logits_TE, (weights_TK / weights_TK.sum(-1, keepdim=True)).to(logits_TE.dtype), ids_TK

    return replaced


def single_stream_as(llm: LLM, name: str, request: TimedRequest, peer: TransformersPeer | None) -> Record:
    """One request under a variant."""
    if name == TRANSFORMERS:
        return peer.first_token(request)
    with variant(llm, name):
        return single_stream(llm, request)

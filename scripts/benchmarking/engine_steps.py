"""What bench_engine.py measures: first token, steps of decoding and prefill, what they cost the host, the tower."""

from __future__ import annotations

import io
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarking.card import card, ceilings
from benchmarking.experts_read import experts_in_next_step
from benchmarking.figures import check_figure, plot_scaling
from benchmarking.inputs import plain_token_ids
from benchmarking.loading import load_llm
from benchmarking.report import TABLE_WIDTH, environment
from benchmarking.step_profile import KINDS, StepProfile, profile_steps
from qwen3vl_moe import LLM, SamplingParams
from qwen3vl_moe.engine.runner import seconds_between
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.inputs.images import Picture
from qwen3vl_moe.weights.placement import parse_device

console = Console(stderr=True, highlight=False, soft_wrap=True)
# Sequences and their context. Beside the 30B weights, an 80 GB card has room for some 95,000 tokens.
DECODE = ((1, 450), (32, 512), (128, 512), (256, 300), (1, 8192), (1, 32768), (1, 65000))
PREFILL = (450, 8192, 16384, 32768, 65000)
HOST, HOST_CONTEXT = (1, 32, 128, 256, 512), 64
LONGEST = 66048  # of what is measured with random weights


def photo(side: int, rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def first_token(llm: LLM, rng: np.random.Generator, times: int) -> dict:
    """One 560x560 JPEG and about 128 tokens of text at a time, from bytes to the first token on the host."""
    params, totals, stages = SamplingParams(max_tokens=1, temperature=1.0, ignore_eos=True), [], []
    for _ in range(times + 2):
        text = llm.processor.tokenizer.decode(plain_token_ids(llm.processor.tokenizer, 100, rng), errors="replace")
        content = [{"type": "image", "image": photo(560, rng)}, {"type": "text", "text": text}]
        started = time.perf_counter()
        [output] = llm.chat([{"role": "user", "content": content}], params)
        totals.append(time.perf_counter() - started)
        stages.append(output.metrics.stages)
    names = ("preprocess", "host_to_device", "vision", "prefill", "sample")
    parts = {name: 1e3 * statistics.median(s[name] for s in stages[2:]) for name in names}
    return {
        "what": f"time to first token, 560x560 JPEG + text ({len(output.prompt_token_ids)} tokens)",
        "ms": 1e3 * statistics.median(totals[2:]),
        "first_ms": 1e3 * totals[0],
        "note": ", ".join(f"{name} {value:.1f}" for name, value in parts.items()),
    }


def decode_step(llm: LLM, S: int, context: int, bandwidth: float, rng: np.random.Generator, steps: int) -> dict | None:
    """Steps in which S sequences decode around a context length; None if they do not fit."""
    engine = llm.engine
    if not fits(llm, S, context + steps):
        return None
    sequences = [add_request(llm, context - steps // 2, rng, steps) for _ in range(S)]
    seconds, experts = [], 0.0
    while not all(sequence.finished for sequence in sequences):
        # All of them: the first ones decode while the last are still read, and end before them.
        decoding = [sequence.pending for sequence in engine.scheduler.running] == [1] * S
        if decoding and not experts:
            # Drawn routing depends on the row alone, so every timed step reads just these. Real routers are asked in
            # the step before the timed ones.
            experts = experts_in_next_step(llm)
            continue
        started = time.perf_counter()
        engine.step()
        if decoding:
            seconds.append(time.perf_counter() - started)
    return {
        "what": f"decode step, batch {S}, context {context}",
        "sequences": S,
        "context": context,
        "ms": 1e3 * statistics.median(seconds),
        "p20_ms": 1e3 * float(np.percentile(seconds, 20)),
        "p80_ms": 1e3 * float(np.percentile(seconds, 80)),
        "floor_ms": 1e3 * bytes_of_step(llm, experts, context * S) / bandwidth,
        "note": f"{experts:.0f} of {engine.model.config.text.num_experts} experts a layer",
    }


def scaling(rows: list[dict]) -> dict[str, dict[int, list[float]]]:
    """Tokens per second by the number of sequences, measured and by the floor, of the rows of decoding."""
    decoding = [row for row in rows if "sequences" in row and row["context"] <= 1024]
    return {
        "measured": {row["sequences"]: [1e3 * row["sequences"] / row["ms"]] for row in decoding},
        "floor: weights and cache read once a step": {
            row["sequences"]: [1e3 * row["sequences"] / row["floor_ms"]] for row in decoding
        },
    }


def fits(llm: LLM, S: int, T: int) -> bool:
    """Whether S sequences of T tokens run at once."""
    seats, length, room = (llm.settings[name] for name in ("max_num_seqs", "max_model_len", "kv_cache_tokens"))
    return seats >= S and length >= T and room >= S * T


def host_step(llm: LLM, S: int, rng: np.random.Generator, steps: int) -> dict | None:
    """What a decode step of S sequences costs the host; None if so many do not fit."""
    engine = llm.engine
    if not fits(llm, S, HOST_CONTEXT + steps):
        return None
    sequences = [add_request(llm, HOST_CONTEXT, rng, steps) for _ in range(S)]
    while [sequence.pending for sequence in engine.scheduler.running] != [1] * S:
        engine.step()
    waited, read = 0.0, engine.runner.read

    def timed_read(step):
        nonlocal waited
        started = time.perf_counter()
        list(step.marks.values())[-1].synchronize()
        waited += time.perf_counter() - started
        return read(step)

    engine.runner.read, seconds = timed_read, []
    try:
        for _ in range(steps // 2):
            waited, started = 0.0, time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - started - waited)
    finally:
        engine.runner.read = read
        for sequence in sequences:
            engine.abort(sequence)
    return {
        "what": f"host, decode step of {S} sequences",
        "ms": 1e3 * statistics.median(seconds),
        "p20_ms": 1e3 * float(np.percentile(seconds, 20)),
        "p80_ms": 1e3 * float(np.percentile(seconds, 80)),
        "note": f"{1e6 * statistics.median(seconds) / S:.1f} microseconds a sequence",
    }


def bytes_of_step(llm: LLM, experts: float, cached: int) -> float:
    """What a step of the decoder has to read: so many experts a layer, the other weights, so many cached tokens."""
    model, text = llm.engine.model, llm.engine.model.config.text
    sizes = {n: p.nbytes for n, p in model.named_parameters() if n.startswith(("text.", "lm_head"))}
    always = sum(size for n, size in sizes.items() if ".experts." not in n and n != "text.embed.weight")
    of_experts = sum(size for n, size in sizes.items() if ".experts." in n)
    token = llm.engine.cache.tensor.nbytes / (llm.engine.cache.num_blocks * llm.engine.cache.block_size)
    return experts / text.num_experts * of_experts + cached * token + always


def add_request(llm: LLM, T: int, rng: np.random.Generator, max_tokens: int = 1) -> Sequence:
    """Queue a prompt of T random text tokens."""
    prompt = llm.processor.prompt(plain_token_ids(llm.processor.tokenizer, T, rng))
    sequence = llm.engine.request(prompt, SamplingParams(max_tokens=max_tokens, temperature=1.0, ignore_eos=True))
    llm.engine.add(sequence)
    return sequence


def prefill(llm: LLM, T: int, bandwidth: float, rate: float, rng: np.random.Generator, times: int) -> dict | None:
    """A prompt of T tokens, in as many steps as it takes; None if it does not fit."""
    if not fits(llm, 1, T + 1):
        return None
    engine, text = llm.engine, llm.engine.model.config.text
    first = add_request(llm, T, rng)
    experts, seconds = experts_in_next_step(llm), []
    while not first.finished:
        engine.step()
    chunks = -(-T // llm.settings["max_prefill_tokens"])
    for _ in range(times + 2):
        sequence = add_request(llm, T, rng)
        started = time.perf_counter()
        while not sequence.finished:
            engine.step()
        seconds.append(time.perf_counter() - started)
    heads = text.num_heads + 2 * text.num_kv_heads
    per_token = heads * text.head_dim + text.num_heads * text.head_dim + text.num_experts
    per_token = text.hidden_size * (per_token + 3 * text.experts_per_token * text.expert_width)
    flop = text.num_layers * (2 * T * per_token + 2 * T * T * text.num_heads * text.head_dim)
    return {
        "what": f"prefill of {T} text tokens in {'one step' if chunks == 1 else f'{chunks} steps'}",
        "ms": 1e3 * statistics.median(seconds[2:]),
        "floor_ms": 1e3 * max(flop / rate, chunks * bytes_of_step(llm, experts, 0) / bandwidth),
        "note": f"{experts:.0f} of {text.num_experts} experts a layer",
    }


def wall_seconds(run, device: torch.device, times: int) -> float:
    """Median seconds of a warm call on the host's clock, until the device is done with it."""
    seconds = []
    for _ in range(times + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def random_pictures(llm: LLM, count: int, rng: np.random.Generator) -> list[Picture]:
    """Noise of 36 x 36 patches, made at its size: nothing is resized."""
    vision = llm.engine.model.config.vision
    side = 18 * vision.merge_size * vision.patch_size
    exact = llm.processor.image_settings.with_bounds(1, side**2)
    noise = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count))
    return [exact.resize(Image.fromarray(pixels)) for pixels in noise]


def tower_of(images: int) -> str:
    return f"vision tower, {images} image{'s' if images > 1 else ''}"


def vision_call(llm: LLM, images: int, rate: float, rng: np.random.Generator, times: int) -> dict:
    """The tower on 560x560 images (36 x 36 patches), from resized pictures on the host to features."""
    model, vision = llm.engine.model, llm.engine.model.config.vision
    pictures = random_pictures(llm, images, rng)
    P = math.prod(pictures[0].grid)
    marks = []
    with torch.inference_mode():
        seconds = wall_seconds(lambda: marks.append(llm.engine.runner.encode(pictures)[1]), model.device, times)
    tower = statistics.median(seconds_between(each["copied"], each["encoded"]) for each in marks[2:])
    width = vision.hidden_size
    block = P * width * (4 * width + 2 * vision.intermediate_size) + 2 * P * P * width
    mergers = (1 + len(vision.deepstack_indexes)) * P // vision.merge_size**2
    flop = 2 * vision.depth * block + 2 * mergers * vision.merged_width * (vision.merged_width + vision.out_hidden_size)
    return {
        "what": f"{tower_of(images)} in one call",
        "ms": 1e3 * seconds,
        "floor_ms": 1e3 * images * flop / rate,
        "note": f"{1e3 * tower:.2f} from pixels on the device",
    }


def profiles(llm: LLM, rng: np.random.Generator) -> dict[str, StepProfile]:
    """Profiles of a decode step of each batch, of a prefill step, and of the tower."""
    engine, found = llm.engine, {}
    for S, context in DECODE[:3]:
        if not fits(llm, S, context + 20):
            continue  # `measure` has said so
        sequences = [add_request(llm, context, rng, 20) for _ in range(S)]
        while [sequence.pending for sequence in engine.scheduler.running] != [1] * S:
            engine.step()
        found[f"decode, batch {S}"] = profile_steps(lambda: [engine.step() for _ in range(8)], 8)
        for sequence in sequences:
            engine.abort(sequence)
    add_request(llm, 8192, rng)
    found["prefill of 8192 tokens"] = profile_steps(engine.step)
    for images in (1, 32):
        pictures = random_pictures(llm, images, rng)
        with torch.inference_mode():
            engine.runner.encode(pictures)
            found[tower_of(images)] = profile_steps(lambda pictures=pictures: engine.runner.encode(pictures))
    return found


def profile_table(found: dict[str, StepProfile]) -> Table:
    """A column for each step, as there are fewer of them than kinds of work."""
    table = Table(box=box.SIMPLE_HEAD, title="milliseconds, by torch's profiler")
    table.add_column(no_wrap=True)
    for name in found:
        table.add_column(name, justify="right")
    rows = {"host, total": "total", "before the device": "before", "gaps": "gaps"}
    for name, attribute in rows.items():
        table.add_row(name, *(f"{getattr(step, attribute):.2f}" for step in found.values()))
    for kind in KINDS:
        table.add_row(kind, *(f"{step.kinds[kind]:.2f}" for step in found.values()))
    return table


def bench(options: dict[str, Any]) -> None:
    """Load, measure, show, by the program's options; what has been measured is kept, whatever becomes of the rest.

    Raises:
        UserError: an option does not fit, or something cannot be loaded or measured.
    """
    device, model = options["device"], options["model"]
    if options["profile"] and parse_device(device).type != "cuda":
        raise OptionError(f"--profile looks at a GPU's kernels; --device {device} has none")
    check_figure("--plot", options["plot_file"])
    started = time.perf_counter()
    length = LONGEST if model is None else None
    drawn = options["routing"] if options["load_format"] != "auto" else None
    engine = {name: options[name] for name in ("device", "moe", "kv_cache_dtype", "tensor_parallel_size")}
    engine |= {"enforce_eager": options["eager"], "max_model_len": length}
    llm = load_llm(model, load_format=options["load_format"], routing=drawn, **engine)
    console.print(f"ready after {time.perf_counter() - started:.1f} s: {llm.settings}", markup=False)
    name, weights = card(llm.engine.model.device)["name"], llm.settings["model"]
    results = {"device": name, "torch": torch.__version__, "rows": [], "profiles": {}}
    out = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    try:
        try:
            results["rows"].extend(measure(llm, options["quick"]))  # as far as they go
        finally:
            title = f"{name}, torch {torch.__version__}, weights: {weights}"
            table = Table("what", "ms", "floor ms", "note", title=title)
            for row in results["rows"]:
                floor = f"{row['floor_ms']:.2f}" if "floor_ms" in row else ""
                table.add_row(row["what"], f"{row['ms']:.2f}", floor, row["note"])
            out.print(table)
        if options["profile"]:
            found = profiles(llm, np.random.default_rng(1))
            out.print(profile_table(found))
            results["profiles"] = {what: asdict(step) for what, step in found.items()}
    finally:
        if options["json_file"]:
            options["json_file"].write_text(json.dumps(results, indent=2))
    if options["plot_file"]:
        title = "Decoding: tokens per second"
        plot_scaling(scaling(results["rows"]), options["plot_file"], environment(llm), title)


def measure(llm: LLM, quick: bool) -> Iterator[dict]:
    """Rows of the table, each as soon as it is there."""
    rng = np.random.default_rng(0)
    most = ceilings(llm.engine.model.device)
    bandwidth, rate = most.bytes_per_second, most.flops_per_second
    console.print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    times = 2 if quick else 10
    yield first_token(llm, rng, times)
    for S, context in ((1, 40), (3, 40)) if quick else DECODE:
        if row := decode_step(llm, S, context, bandwidth, rng, 8 if quick else 40):
            yield row
        else:
            console.print(f"left out: batch {S} at context {context}, which does not fit (see the settings above)")
    for S in (1, 3) if quick else HOST:
        if llm.engine.model.device.type == "cuda" and (row := host_step(llm, S, rng, 8 if quick else 60)):
            yield row
    for T in (100,) if quick else PREFILL:
        if row := prefill(llm, T, bandwidth, rate, rng, times if T <= 8192 else 2):
            yield row
    for images in (1,) if quick else (1, 32):
        yield vision_call(llm, images, rate, rng, times)

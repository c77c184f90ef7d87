"""Loading: the table against the published names and our model, values against transformers, layouts, host memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import CheckpointError, OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.weights import checkpoint, shards
from qwen3vl_moe.weights.checkpoint import load_model
from qwen3vl_moe.weights.table import LAYOUTS, expand_table

RENAMED = [
    ("model.visual.", "vision."),
    ("patch_embed.proj.", "patch_embed."),
    ("deepstack_merger_list.", "deepstack_mergers."),
    ("attn.proj.", "attn.out."),
    ("linear_fc", "fc"),
    ("model.language_model.", "text."),
    ("embed_tokens.", "embed."),
    ("input_layernorm.", "attn_norm."),
    ("post_attention_layernorm.", "moe_norm."),
    ("self_attn.", "attn."),
    ("o_proj.", "out."),
    ("mlp.gate.", "moe.router."),
    ("mlp.experts.gate_up_proj", "moe.experts.gate_up"),
    ("mlp.experts.down_proj", "moe.experts.down"),
]


def ours_from(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What our state_dict should be, from transformers' in-memory state_dict: written without the loader's table."""
    ours = {}
    for name, value in theirs.items():
        if name.endswith("q_proj.weight"):
            parts = [theirs[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            name, value = name.replace("q_proj", "qkv"), torch.cat(parts)
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            continue
        elif name.endswith("patch_embed.proj.weight"):
            value = value.flatten(1)
        for old, new in RENAMED:
            name = name.replace(old, new)
        ours[name] = value
    return ours


def assert_equal_states(model: Qwen3VLMoe, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not wrong


def load(path: Path, **options) -> Qwen3VLMoe:
    return load_model(path, moe="reference", progress=False, **options)


# --- the table ---


def test_table_is_the_published_30b_checkpoint(shared_dir):
    published = json.loads((shared_dir / "checkpoint-30b" / "tensors.json").read_text())
    table = expand_table(Qwen3VLMoeConfig.from_pretrained(shared_dir / "checkpoint-30b"))
    assert len(table) == 882
    assert {entry.source: list(entry.shape) for entry in table} == published["shapes"]
    assert sum(2 * math.prod(entry.shape) for entry in table) == published["total_size"] == 62_141_508_064


def test_table_fills_the_30b_model_exactly():
    config = Qwen3VLMoeConfig.qwen3_vl_30b_a3b()
    table = expand_table(config)
    assert len({entry.source for entry in table}) == len(table) == 882
    with torch.device("meta"):
        model = Qwen3VLMoe(config)
    filled = Counter()
    for entry in table:
        filled[entry.target] += math.prod(entry.shape)
    assert filled == {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert not list(model.named_buffers())  # nothing else that a meta-device build would leave empty


@pytest.mark.parametrize("layout", LAYOUTS)
def test_table_fills_every_element_once(tiny, layout):
    config = Qwen3VLMoeConfig.from_pretrained(tiny.path)
    model = Qwen3VLMoe(config)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.zero_()
    for entry in expand_table(config):
        destination = entry.destination(parameters[entry.target], layout)
        assert destination.shape == entry.shape_in(layout)
        destination += 1
    assert all((parameter == 1).all() for parameter in parameters.values())


# --- values ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_value_is_transformers(tiny, layout):
    assert_equal_states(load(tiny.paths[layout]), ours_from(tiny.oracle.state_dict()))


def test_shards_that_transformers_writes(tiny, tmp_path):
    tiny.oracle.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal_states(load(tmp_path), ours_from(tiny.oracle.state_dict()))


def test_shards_of_the_published_layout(plain, tmp_path):
    shutil.copytree(plain.published, tmp_path, dirs_exist_ok=True)
    split_into_shards(tmp_path, 3)
    assert_equal_states(load(tmp_path), ours_from(plain.oracle.state_dict()))


def test_one_file_saved_over_shards(plain, tmp_path):
    """transformers removes the shards and leaves their index behind."""
    plain.oracle.save_pretrained(tmp_path, max_shard_size="60KB")
    plain.oracle.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors", "model.safetensors.index.json"}
    assert_equal_states(load(tmp_path), ours_from(plain.oracle.state_dict()))


def split_into_shards(directory: Path, count: int) -> None:
    """Replace model.safetensors by shards of every ``count``-th tensor: the rows of one qkv come from several files."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[shard::count])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_do_not_depend_on_the_size_of_pieces(plain, layout, monkeypatch):
    monkeypatch.setattr(shards, "PIECE_BYTES", 1000)  # cuts most tensors, at rows that do not divide them evenly
    monkeypatch.setattr(shards.os, "cpu_count", lambda: 5)
    assert_equal_states(load(plain.paths[layout]), ours_from(plain.oracle.state_dict()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", ["float16", torch.bfloat16, torch.float32])
def test_any_float_dtype_loads_as_any_other(plain, tmp_path, layout, stored, asked):
    shutil.copytree(plain.paths[layout], tmp_path, dirs_exist_ok=True)
    tensors = {name: value.to(stored) for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    dtype = getattr(torch, asked) if isinstance(asked, str) else asked
    expected = ours_from(plain.oracle.state_dict())
    model = load(tmp_path, dtype=asked)
    assert_equal_states(model, {name: value.to(stored).to(dtype) for name, value in expected.items()})


def test_auto_dtype_is_the_one_of_the_config(plain, tmp_path):
    shutil.copytree(plain.published, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"dtype": "bfloat16"}))
    assert {parameter.dtype for parameter in load(tmp_path).parameters()} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_on_a_gpu(tiny, layout, dtype, monkeypatch):
    monkeypatch.setattr(shards, "PIECE_BYTES", 1000)
    state = load(tiny.paths[layout], device="cuda", dtype=dtype).state_dict()
    expected = ours_from(tiny.oracle.state_dict())
    assert all(value.is_cuda for value in state.values())
    assert all(torch.equal(state[name].cpu(), expected[name].to(dtype)) for name in expected)


# --- expert layouts of square tensors ---


def with_expert_width(source: Path, target: Path, expert_width: int, layout: str) -> dict[str, torch.Tensor]:
    """Write ``source`` with experts of another width; returns its tensors, the experts as transformers 5 has them."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    raw = json.loads((target / "config.json").read_text())
    raw["text_config"]["moe_intermediate_size"] = expert_width
    (target / "config.json").write_text(json.dumps(raw))
    hidden, experts = raw["text_config"]["hidden_size"], raw["text_config"]["num_experts"]
    tensors = load_file(target / "model.safetensors")
    shapes = {"gate_up_proj": (experts, 2 * expert_width, hidden), "down_proj": (experts, hidden, expert_width)}
    for name in tensors:
        kind = name.rpartition(".")[2]
        if kind in shapes:
            tensors[name] = torch.randn(shapes[kind], generator=torch.Generator().manual_seed(len(name)))
    written = {
        name: value.transpose(1, 2).contiguous() if layout == "published" and ".experts." in name else value
        for name, value in tensors.items()
    }
    save_file(written, target / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("expert_width", "square"), [(16, "gate_up_proj [8, 32, 32]"), (32, "down_proj [8, 32, 32]")])
def test_square_experts_need_a_named_layout(plain, tmp_path, layout, expert_width, square):
    tensors = with_expert_width(plain.published, tmp_path, expert_width, layout)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert square in str(error.value)
    assert f"expert_layout={layout!r}" in str(error.value)

    assert_equal_states(load(tmp_path, expert_layout=layout), ours_from(tensors))

    other = next(name for name in LAYOUTS if name != layout)
    with pytest.raises(
        CheckpointError, match=f"expert_layout='{other}' contradicts .* has the shape of layout '{layout}'"
    ):
        load(tmp_path, expert_layout=other)


def test_a_sibling_does_not_prove_a_square_tensors_layout(plain, tmp_path):
    """The reason for the rule: transformers 5 itself turns a published checkpoint with H == 2I into a mixed one."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    published, converted = tmp_path / "published", tmp_path / "converted"
    tensors = with_expert_width(plain.published, published, 16, "published")
    Qwen3VLMoeForConditionalGeneration.from_pretrained(published).save_pretrained(converted)
    saved = load_file(converted / "model.safetensors")
    experts = "model.language_model.layers.0.mlp.experts."
    assert torch.equal(saved[experts + "down_proj"], tensors[experts + "down_proj"])
    assert torch.equal(saved[experts + "gate_up_proj"].transpose(1, 2), tensors[experts + "gate_up_proj"])
    with pytest.raises(CheckpointError, match="has the same shape in both expert layouts"):
        load(converted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_named_layout_must_agree_with_the_shapes(plain, layout):
    assert_equal_states(load(plain.paths[layout], expert_layout=layout), ours_from(plain.oracle.state_dict()))
    other = next(name for name in LAYOUTS if name != layout)
    with pytest.raises(CheckpointError, match=f"expert_layout='{other}' contradicts"):
        load(plain.paths[layout], expert_layout=other)
    with pytest.raises(OptionError, match="expert_layout is 'input-major'; choose from published, transformers5"):
        load(plain.path, expert_layout="input-major")


def test_mixed_layouts_are_refused(plain, tmp_path):
    shutil.copytree(plain.published, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    mixed = "model.language_model.layers.1.mlp.experts.down_proj"
    tensors[mixed] = tensors[mixed].transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    for layout in (None, *LAYOUTS):
        with pytest.raises(CheckpointError, match=rf"mixes expert layouts: .*{mixed} \[8, 32, 24\] of 'transformers5'"):
            load(tmp_path, expert_layout=layout)


# --- memory and what is printed ---

MEASURE = """
import sys, torch
torch.set_num_threads(1)
from qwen3vl_moe.weights import shards
from qwen3vl_moe.weights.checkpoint import load_model, _resident_bytes
shards.PIECE_BYTES = 1 << 20  # every core has a piece in flight, and there may be many
load_model(sys.argv[1], moe="reference", progress=False)  # whatever is imported or cached on first use
before = _resident_bytes()
open("/proc/self/clear_refs", "w").write("5")  # starts the kernel's own peak (VmHWM) anew
model = load_model(sys.argv[2], moe="reference", progress=False)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(peak - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


def write_large(plain, directory: Path) -> int:
    """A checkpoint of 340 MB in the layout that needs transposing; returns the bytes of its largest tensor."""
    shutil.copytree(plain.published, directory, dirs_exist_ok=True)
    raw = json.loads((directory / "config.json").read_text())
    raw["dtype"] = "bfloat16"
    raw["text_config"] |= {"num_experts": 96, "moe_intermediate_size": 768, "hidden_size": 256}
    raw["vision_config"]["out_hidden_size"] = 256
    (directory / "config.json").write_text(json.dumps(raw))
    table = expand_table(Qwen3VLMoeConfig.from_pretrained(directory))
    tensors = {entry.source: torch.full(entry.shape, 0.5, dtype=torch.bfloat16) for entry in table}
    save_file(tensors, directory / "model.safetensors")
    return max(tensor.nbytes for tensor in tensors.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
def test_host_memory_stays_near_the_model(plain, tmp_path):
    """In a process of its own, by the kernel's count."""
    largest = write_large(plain, tmp_path)
    command = [sys.executable, "-c", MEASURE, str(plain.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    growth, model_bytes = map(int, done.stdout.split())
    assert model_bytes > 300e6
    # A mapped or doubled copy would add the model's size again; the pieces in flight are less than one tensor here.
    assert growth - model_bytes < largest < 0.25 * model_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_memory_stays_near_the_model(plain, tmp_path, monkeypatch):
    largest = write_large(plain, tmp_path)
    monkeypatch.setattr(shards, "PIECE_BYTES", largest // 20)
    load(plain.path, device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load(tmp_path, device="cuda")
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert torch.cuda.memory_allocated() - before < 1.05 * model_bytes
    assert torch.cuda.max_memory_allocated() - before < 1.05 * model_bytes + largest


def environment() -> dict[str, str]:
    root = Path(checkpoint.__file__).parents[2]
    return os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}


def test_prints_time_rate_and_memory_to_stderr_only(plain, capsys):
    load_model(plain.path, moe="reference")
    captured = capsys.readouterr()
    assert not captured.out
    line = captured.err.splitlines()[-1]
    assert line.startswith("loaded transformers5: ")
    assert all(word in line for word in ("B in ", " s (", "B/s); host memory grew by"))
    load(plain.path)
    assert capsys.readouterr() == ("", "")

"""scripts/quantize.py: what it writes is loaded here and read by transformers, and nothing half-written is taken."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fp8_checkpoint
import quantize
from qwen3vl_moe import LLM, SamplingParams
from qwen3vl_moe.weights import load_model
from qwen3vl_moe.weights.source import DEMO
from tests.model.prompts import assert_close_to_scale, make_prompt, oracle_logits
from tma_moe.block_fp8 import dequantize_blocks


def run(*arguments):
    return CliRunner().invoke(quantize.app, [*map(str, arguments), "--device", "cpu"])


def written(source, target, *options):
    done = run(source, target, *options)
    assert done.exit_code == 0, done.output
    return target


@pytest.fixture(scope="module")
def blocks(make_tiny):
    return make_tiny("blocks")


def dequantised(directory, published: bool) -> dict[str, torch.Tensor]:
    """What its tensors stand for, as transformers' model names them in memory: read without our loader."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    exact = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        turn = (lambda x: x.transpose(1, 2)) if published and ".experts." in name else (lambda x: x)
        scale = tensors.get(f"{name}_scale_inv")
        exact[name] = turn(value) if scale is None else dequantize_blocks(turn(value), turn(scale).float())
    return exact


@pytest.mark.parametrize("layout", ["published", "transformers5"])
@pytest.mark.parametrize("scales", ["bf16", "fp32"])
def test_transformers_computes_with_what_is_written(blocks, tmp_path, layout, scales):
    target = written(blocks.paths[layout], tmp_path / "fp8", "--scales", scales)
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    tensors = load_file(next(target.glob("*.safetensors")))
    assert {x.dtype for n, x in tensors.items() if n.endswith("_scale_inv")} == {names[scales]}
    oracle = copy.deepcopy(blocks.oracle)
    exact = dequantised(target, layout == "published")
    oracle.load_state_dict(exact)  # strict: the names are those of the original
    for name, value in blocks.oracle.state_dict().items():
        if f"{name}_scale_inv" not in tensors:
            assert torch.equal(exact[name], value), name
    # FP8 keeps three bits of mantissa: every value is right to a sixteenth of itself, or of the least of its block.
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    assert (exact[name] - blocks.oracle.state_dict()[name]).norm() < exact[name].norm() / 16
    model = load_model(target, progress=False)
    prompt = make_prompt(blocks.oracle.config, [(2, 3)])
    ours, theirs = model.logits(*prompt.our_inputs()), oracle_logits(oracle, prompt)
    assert (ours - theirs).norm() < 0.3 * theirs.norm()  # only activations are rounded beside it, in two layers
    plain = load_model(blocks.paths[layout], progress=False)
    assert_close_to_scale(plain.logits(*prompt.our_inputs()), oracle_logits(blocks.oracle, prompt))


def test_transformers_own_loader_reads_it(make_tiny, tmp_path):
    """`dequantize=True` on sides of whole blocks, which it wants; of the fused experts 5.24 leaves the scales out, and
    says so, whoever has written them."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    target = written(make_tiny("whole blocks").path, tmp_path / "fp8", "--scales", "fp32")
    config = transformers.FineGrainedFP8Config(dequantize=True)
    kind = transformers.Qwen3VLMoeForConditionalGeneration
    theirs = kind.from_pretrained(target, quantization_config=config, dtype=torch.float32).state_dict()
    exact = dequantised(target, published=False)
    assert theirs.keys() == exact.keys()
    for name, value in exact.items():
        if ".experts." not in name:
            assert torch.allclose(theirs[name], value, rtol=1e-6, atol=0), name


def test_experts_that_do_not_tell_their_layout(make_tiny, tmp_path):
    square = make_tiny("square experts").path  # gate_up_proj is [E, H, H]
    done = run(square, tmp_path / "fp8")
    assert done.exit_code == 2
    assert "pass expert_layout='transformers5'" in done.output
    written(square, tmp_path / "fp8", "--expert-layout", "transformers5")
    done = run(square, tmp_path / "fp8", "--check", "--expert-layout", "transformers5")
    assert done.exit_code == 0, done.output


def test_the_demo_answers(tmp_path):
    target = written(DEMO, tmp_path / "fp8")
    raw = json.loads((target / "config.json").read_text())["quantization_config"]
    assert raw["weight_block_size"] == [128, 128]
    assert "lm_head" in raw["modules_to_not_convert"]
    assert "model.language_model.layers.0.mlp.gate" in raw["modules_to_not_convert"]
    assert "model.visual.blocks.0.attn.qkv" in raw["modules_to_not_convert"]
    assert not any("experts" in name or "self_attn" in name for name in raw["modules_to_not_convert"])
    done = run(DEMO, target, "--check")
    assert done.exit_code == 0, done.output
    assert "every other tensor is equal" in done.output
    llm = LLM(target, device="cpu", dtype="float32", progress=False, max_model_len=128)
    [answer] = llm.chat([{"role": "user", "content": "What is 2 + 3?"}], SamplingParams(max_tokens=4))
    assert answer.outputs[0].token_ids


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import fp8_checkpoint
fp8_checkpoint.SHARD_BYTES = 60_000
quantise_tensor, calls = fp8_checkpoint._quantised, []
def fatal(*arguments):
    calls.append(arguments)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return quantise_tensor(*arguments)
fp8_checkpoint._quantised = fatal
source = fp8_checkpoint.Source.read(Path(sys.argv[1]))
fp8_checkpoint.quantise(source, Path(sys.argv[2]), "bf16", torch.device("cpu"))
"""


def test_killed_it_goes_on_and_clears_up(blocks, tmp_path, monkeypatch):
    target = tmp_path / "fp8"
    scripts = quantize.__file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", KILLED, blocks.published, target], cwd=scripts, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(target.glob("*.safetensors"))
    assert list(target.glob(".*.part"))  # nothing could remove it
    assert not (target / "config.json").exists()
    monkeypatch.setattr(fp8_checkpoint, "SHARD_BYTES", 60_000)
    written(blocks.published, target)
    whole = written(blocks.published, tmp_path / "whole")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_interrupted_it_goes_on(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_checkpoint, "SHARD_BYTES", 60_000)
    whole = written(blocks.path, tmp_path / "whole")
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(names) > 3
    for after in range(len(names)):
        target, replace_file, calls = tmp_path / f"{after}", fp8_checkpoint.replace_file, []

        def fail(path, pieces, after=after, calls=calls, replace_file=replace_file):
            if path.suffix == ".safetensors":
                calls.append(path.name)
                if len(calls) > after:
                    next(iter(pieces))
                    raise KeyboardInterrupt
            replace_file(path, pieces)

        monkeypatch.setattr(fp8_checkpoint, "replace_file", fail)
        assert run(blocks.path, target).exit_code == 130
        assert not (target / "config.json").exists()
        monkeypatch.setattr(fp8_checkpoint, "replace_file", replace_file)
        kept = {name: (target / name).stat().st_mtime_ns for name in names[:after]}
        assert kept.keys() == {path.name for path in target.glob("*.safetensors")}
        written(blocks.path, target)
        assert all((target / name).stat().st_mtime_ns == time for name, time in kept.items())
        for path in whole.iterdir():
            assert (target / path.name).read_bytes() == path.read_bytes()


def test_unfinished_work_of_other_settings(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_checkpoint, "_shard_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(blocks.path, tmp_path / "fp8").exit_code == 130
    monkeypatch.undo()
    done = run(blocks.path, tmp_path / "fp8", "--scales", "fp32")
    assert done.exit_code == 2
    assert "was begun from another source or with other --scales" in done.output


def with_byte(w8, byte):
    w8.view(torch.uint8).view(-1)[-1] = byte
    return w8


def test_half_a_step_is_the_bound():
    """The nearest value of FP8 is within it, and neither neighbour of that is."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # all from 0 to 448
    between = torch.cat([values[:-1].lerp(values[1:], part) for part in (0.25, 0.49, 0.51, 0.75)])
    weight, scale = torch.cat([between, -between])[:, None] * 0.37, torch.full((1, 1), 0.37)
    for of_one in weight.split(1):
        nearest = (of_one / scale).to(torch.float8_e4m3fn)
        found = fp8_checkpoint.deviation(nearest, scale, of_one)
        assert found.within_bound
        assert 0.49 < found.in_half_steps < 0.99
        byte = nearest.view(torch.uint8)
        neighbours = [byte + 1] if not int(byte) & 0x7F else [byte - 1, byte + 1]  # magnitudes: 0 has none below
        for other in neighbours:
            assert not fp8_checkpoint.deviation(
                other.view(nearest.dtype), scale, of_one
            ).within_bound  # nor is NaN, above 448


def test_zero_may_only_become_zero():
    least = torch.tensor([[0x00, 0x01, 0x80, 0x81]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = [fp8_checkpoint.deviation(w8, torch.full((1, 1), 0.37), torch.zeros(1, 1)) for w8 in least.split(1, dim=1)]
    assert [each.in_half_steps for each in found] == [0, 2, 0, 2]
    gone = fp8_checkpoint.deviation(least, torch.zeros(1, 1), torch.ones(1, 4))
    assert not gone.within_bound  # nor all by a scale of zero
    assert fp8_checkpoint.deviation(least, torch.zeros(1, 1), torch.zeros(1, 4)).within_bound


def damage(directory, name, change):
    path = directory / "model-00001-of-00001.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lm_head.weight", lambda x: x + 1),
        ("model.language_model.layers.0.self_attn.q_proj.weight_scale_inv", lambda x: x * 2),
        ("model.language_model.layers.1.mlp.experts.down_proj", lambda x: x.flip(0)),
        ("model.language_model.layers.0.self_attn.k_proj.weight", lambda x: with_byte(x, 0x7F)),  # NaN
        ("model.language_model.layers.1.mlp.experts.gate_up_proj", lambda x: with_byte(x, 0x7E)),  # 448
    ],
)
def test_check_finds_what_is_wrong(blocks, tmp_path, name, change):
    target = written(blocks.published, tmp_path / "fp8")
    assert run(blocks.published, target, "--check").exit_code == 0
    damage(target, name, change)
    done = run(blocks.published, target, "--check")
    assert done.exit_code == 1
    assert f"1 wrong: {name.removesuffix('_scale_inv')}" in done.output


def test_what_is_refused(blocks, tmp_path):
    def refusal(*arguments) -> str:
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        [line] = [line for line in done.output.splitlines() if line.startswith("error: ")]
        return line

    target = written(blocks.path, tmp_path / "fp8")
    assert "fp8 is there already" in refusal(blocks.path, target)
    assert "is not quantised" in refusal(blocks.path, blocks.path, "--check")
    assert "is no quantised" in refusal(blocks.published, target, "--check")  # of the other layout
    assert "is quantised already" in refusal(target, tmp_path / "again")
    assert "is no directory" in refusal(tmp_path / "nowhere", tmp_path / "other")
    assert "--scales fp16" in refusal(blocks.path, tmp_path / "other", "--scales", "fp16")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    assert "foreign is there already" in refusal(blocks.path, tmp_path / "foreign")
    shutil.copytree(blocks.path, tmp_path / "broken")
    damage_all = load_file(tmp_path / "broken" / "model.safetensors")
    damage_all.pop("lm_head.weight")
    save_file(damage_all, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing: lm_head.weight" in refusal(tmp_path / "broken", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_source_with_infinity(blocks, tmp_path):
    shutil.copytree(blocks.path, tmp_path / "broken")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors[name][-1, -1, -1] = float("inf")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    done = run(tmp_path / "broken", tmp_path / "fp8")
    assert done.exit_code == 2
    assert f"model.safetensors: {name} holds a value that is not finite" in done.output
    assert not (tmp_path / "fp8" / "config.json").exists()


def test_no_room(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    done = run(blocks.path, tmp_path / "fp8")
    assert done.exit_code == 2
    assert "GB are free there" in done.output

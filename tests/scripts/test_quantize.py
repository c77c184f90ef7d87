"""scripts/quantize.py: what it writes is loaded here and read by transformers, and nothing half-written is taken."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

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
    says so, whoever has written them (transformers#44230)."""
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


def test_interrupted_it_goes_on(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "SHARD_BYTES", 60_000)
    whole = written(blocks.path, tmp_path / "whole")
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(names) > 3
    for after in range(len(names)):
        target, replace_file, calls = tmp_path / f"{after}", quantize.replace_file, []

        def fail(path, pieces, after=after, calls=calls, replace_file=replace_file):
            if path.suffix == ".safetensors":
                calls.append(path.name)
                if len(calls) > after:
                    next(iter(pieces))
                    raise KeyboardInterrupt
            replace_file(path, pieces)

        monkeypatch.setattr(quantize, "replace_file", fail)
        assert run(blocks.path, target).exit_code == 130
        assert not (target / "config.json").exists()
        monkeypatch.setattr(quantize, "replace_file", replace_file)
        kept = {name: (target / name).stat().st_mtime_ns for name in names[:after]}
        assert kept.keys() == {path.name for path in target.glob("*.safetensors")}
        written(blocks.path, target)
        assert all((target / name).stat().st_mtime_ns == time for name, time in kept.items())
        for path in whole.iterdir():
            assert (target / path.name).read_bytes() == path.read_bytes()


def test_unfinished_work_of_other_settings(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "_shard_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(blocks.path, tmp_path / "fp8").exit_code == 130
    monkeypatch.undo()
    done = run(blocks.path, tmp_path / "fp8", "--scales", "fp32")
    assert done.exit_code == 2
    assert "was begun from another source or with other --scales" in done.output


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


def test_no_room(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    done = run(blocks.path, tmp_path / "fp8")
    assert done.exit_code == 2
    assert "GB are free there" in done.output

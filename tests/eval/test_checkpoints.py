"""eval/checkpoints.py: two checkpoints answer the same problems, and what differs is counted."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import checkpoints
from tests.eval.conftest import run_program
from tests.fp8 import write_fp8

SMALL = ("--device", "cpu", "--max-model-len", 256, "--max-num-seqs", 4, "--num-fewshot", 0, "--limit", 2)


@pytest.fixture
def run(problems_dir):
    def call(first, second, *arguments):
        fixed = ("--data", problems_dir, "--max-gen-toks", 8, *SMALL)
        return run_program(checkpoints.app, str(first), str(second), *fixed, *arguments)

    return call


def report(run, first, second, folder):
    done = run(first, second, "--output", folder)
    assert done.code == 0, done.err
    return json.loads((folder / "checkpoints.json").read_text())


def test_a_checkpoint_beside_itself(run, plain, tmp_path):
    found = report(run, plain.path, plain.published, tmp_path)
    assert found["problems"] == 2
    [pair] = found["pairs"].values()
    assert pair["identical"] == 2
    assert (pair["right_to_wrong"], pair["wrong_to_right"], pair["p_value"]) == (0, 0, 1.0)
    assert found["distance"]["tokens"] == 16
    assert found["distance"]["largest"] < 1e-4
    assert found["distance"]["top1"] == 1.0


def test_a_quantised_checkpoint_beside_its_original(run, make_tiny, tmp_path):
    blocks = make_tiny("blocks")
    write_fp8(blocks.published, tmp_path / "fp8", published=True)
    found = report(run, blocks.published, tmp_path / "fp8", tmp_path)
    distance = found["distance"]
    assert 1e-4 < distance["mean"] < 1.0
    assert 0 < distance["kl"] < 1.0
    assert [settings["random_weights"] for settings in found["settings"].values()] == [False, False]


def test_another_vocabulary(run, plain, tmp_path):
    shutil.copytree(plain.path, tmp_path / "other")
    raw = json.loads((tmp_path / "other" / "config.json").read_text())
    raw["text_config"]["vocab_size"] -= 8
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw))
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        tensors[name] = tensors[name][:-8].contiguous()
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    done = run(plain.path, tmp_path / "other")
    assert done.code == 2
    assert "vocab" in done.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(("--logprob-problems", 0), "--logprob-problems 0"), (("--limit", 0), "--limit 0"), (("--moe", "x"), "moe='x'")],
)
def test_errors_are_one_line(run, plain, arguments, text):
    done = run(plain.path, plain.path, *arguments)
    assert done.code == 2
    [line] = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert text in line


def test_one_checkpoint_on_one_rank_and_on_two(run, make_tiny, tmp_path):
    wide = make_tiny("wide").published
    done = run(wide, wide, "--tensor-parallel-size", "1,2", "--dtype", "float32", "--output", tmp_path)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "checkpoints.json").read_text())
    assert [settings["tensor_parallel_size"] for settings in found["settings"].values()] == [1, 2]
    assert found["distance"]["largest"] < 1e-4


def test_a_number_of_ranks_that_is_none(run, plain):
    assert "--tensor-parallel-size 1,2,3" in run(plain.path, plain.path, "--tensor-parallel-size", "1,2,3").err

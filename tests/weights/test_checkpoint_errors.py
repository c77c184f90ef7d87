"""Every checkpoint that cannot be loaded: one line that names what is at fault, before anything is allocated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarking.random_weights import random_model
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import CheckpointError, ConfigError, OptionError
from qwen3vl_moe.weights import placement, shards
from qwen3vl_moe.weights.shards import MAX_HEADER_BYTES
from tests.weights.conftest import message

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("_no_allocation")
EXPERTS = "model.language_model.layers.0.mlp.experts."


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


# --- which files there are ---


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_beside_the_weights(directory, name):
    (directory / name).write_text("{}")
    assert f"{directory} holds an adapter ({name})" in message(directory)


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_only(directory, name):
    (directory / SINGLE).rename(directory / name)
    text = message(directory)
    assert f"only as {name}" in text
    assert "safetensors" in text


def test_no_weights(directory):
    (directory / SINGLE).unlink()
    assert message(directory).startswith(f"{directory} has no weights: {SINGLE} or {INDEX} is needed")


def test_no_config(directory):
    (directory / "config.json").unlink()
    assert "config.json is missing" in message(directory, ConfigError)


def test_shards_without_an_index(sharded):
    (sharded / INDEX).unlink()
    assert "the index is missing" in message(sharded)


def test_single_file_beside_an_index(sharded):
    (sharded / SINGLE).write_bytes(b"")
    assert f"holds both {SINGLE} and {INDEX}" in message(sharded)


@pytest.mark.parametrize("missing", [1, 2])
def test_single_file_beside_an_index_of_which_some_shards_are_there(sharded, missing):
    lost = sorted(path.name for path in sharded.glob("*.safetensors"))[:missing]
    for name in lost:
        (sharded / name).unlink()
    (sharded / SINGLE).write_bytes(b"")
    text = message(sharded)
    assert (
        f"holds both {SINGLE} and {INDEX}, but of the shards that the index names {', '.join(lost)} is missing" in text
    )


# --- the index ---


def test_index_names_a_file_that_is_not_there(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    text = message(sharded)
    assert f"{sharded / INDEX} names {lost.name}" in text


def test_index_disagrees_with_the_shards(sharded):
    index = json.loads((sharded / INDEX).read_text())
    files = Counter(index["weight_map"].values())
    first = next(file for file, count in files.items() if count > 1)
    second = next(file for file in files if file != first)
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = second
    (sharded / INDEX).write_text(json.dumps(index))
    text = message(sharded)
    assert f"{sharded / INDEX} disagrees with the files" in text
    assert f"{moved} is not in {second}" in text
    assert f"{first} holds {moved}, not listed for it" in text


@pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": ["b"]}}'])
def test_garbage_index(sharded, content):
    (sharded / INDEX).write_text(content)
    assert message(sharded).startswith(str(sharded / INDEX))


def test_index_cannot_name_files_elsewhere(sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    assert "names ../elsewhere.safetensors, not in" in message(sharded)


# --- damaged files ---


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    assert message(sharded) == (
        f"{shard} is truncated: it has {len(content) - 10} bytes, its header describes {len(content)}"
    )


@pytest.mark.parametrize("kept", [0, 5, 8, 100])
def test_truncated_header(directory, kept):
    (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes()[:kept])
    assert f"{directory / SINGLE} is truncated or no safetensors file: it has {kept} bytes" in message(directory)


def with_header(directory: Path, header: bytes, data: bytes = b"") -> None:
    (directory / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    "header",
    [b"\xff\xfe garbage", b"{", b"[]", b"3", b'{"a": 1}', b'{"a": {"dtype": "F32"}}',
     b'{"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}',
     b'{"a": {"dtype": [], "shape": [4], "data_offsets": [0, 16]}}',
     b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}',
     b'{"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}',
     b'{"a": {"dtype": "F32", "shape": [4, true], "data_offsets": [0, 16]}}',
     b'{"a": {"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]}}',
     b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [false, 16]}}',
     b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1e999]}}',
     b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 16]}}' % (b"9" * 400),
     b'{"a": {}, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
     b"[" * 500 + b"]" * 500, b"[" * 100_000],
)  # fmt: skip
def test_garbage_header(directory, header):
    with_header(directory, header, bytes(16))
    assert message(directory).startswith(f"{directory / SINGLE} is no safetensors file: its header ")


@pytest.mark.parametrize("offsets", [[0, 12], [4, 20], [-4, 12]])
def test_offsets_that_do_not_fit(directory, offsets):
    with_header(
        directory, json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": offsets}}).encode(), bytes(16)
    )
    text = message(directory)
    assert text.startswith(f"{directory / SINGLE} is damaged: a (F32 [4]) should take 16 bytes from byte 0")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 99_000_000, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_is_too_long_is_not_read(directory, length):
    with open(directory / SINGLE, "wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(1 << 41)
    text = message(directory)
    if length < 1 << 41:
        assert text == f"{directory / SINGLE}: its header takes {length} bytes; at most {MAX_HEADER_BYTES} are read"
    else:
        assert "is truncated or no safetensors file" in text


def test_bytes_after_the_last_tensor(directory):
    with open(directory / SINGLE, "ab") as file:
        file.write(b"more")
    assert f"{directory / SINGLE} is damaged: it has " in message(directory)


def test_git_lfs_pointer(directory):
    (directory / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer" in message(directory)


def test_file_that_shrinks_while_it_is_read(tmp_path):
    file = tmp_path / SINGLE
    file.write_bytes(bytes(40))
    stored = shards.StoredTensor(file, "F32", (16,), 8, 64)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        shards.stream([(stored, torch.empty(16))], torch.device("cpu"), lambda count: None)


# --- tensors that are not those of the config ---


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(directory):
    def change(tensors):
        del tensors["lm_head.weight"], tensors[EXPERTS + "down_proj"]
        tensors["lm_head.bias"] = torch.zeros(3)
        tensors["model.visual.pos_embed.weight"] = torch.zeros(2, 3)
        tensors["model.language_model.norm.weight"] = torch.zeros(32, dtype=torch.float8_e4m3fn)
        tensors["model.visual.merger.norm.bias"] = torch.zeros(32, dtype=torch.int64)

    rewrite(directory, change)
    text = message(directory)
    assert text.startswith(f"{directory} does not hold the tensors that its config.json calls for; ")
    assert f"2 missing: {EXPERTS}down_proj, lm_head.weight; " in text
    assert "1 unexpected: lm_head.bias; " in text
    assert "1 of the wrong shape: model.visual.pos_embed.weight [2, 3] instead of [36, 32]; " in text
    assert "2 of an unsupported dtype (only BF16, F16, F32 can be loaded): " in text
    assert "model.language_model.norm.weight F8_E4M3" in text
    assert "model.visual.merger.norm.bias I64" in text


def test_misshapen_experts_name_both_layouts(directory):
    rewrite(directory, lambda tensors: tensors.update({EXPERTS + "gate_up_proj": torch.zeros(8, 24, 32)}))
    assert f"{EXPERTS}gate_up_proj [8, 24, 32] instead of [8, 32, 48] or [8, 48, 32]" in message(directory)


def test_long_lists_are_shortened(directory):
    rewrite(directory, lambda tensors: tensors.update({f"extra.{i:02}": torch.zeros(1) for i in range(45)}))
    assert message(directory).endswith(
        "45 unexpected: extra.00, extra.01, extra.02, extra.03, extra.04 ... and 40 more"
    )


def test_tied_head_is_missing(directory):
    rewrite(directory, lambda tensors: tensors.pop("lm_head.weight"))
    assert message(directory).endswith("1 missing: lm_head.weight")


def test_experts_of_one_tensor_each_are_refused(directory):
    def change(tensors):
        for expert, weight in enumerate(tensors.pop(EXPERTS + "down_proj")):
            tensors[f"{EXPERTS}{expert}.down_proj.weight"] = weight.clone()

    rewrite(directory, change)
    text = message(directory)
    assert f"1 missing: {EXPERTS}down_proj; " in text
    assert f"8 unexpected: {EXPERTS}0.down_proj.weight, " in text


def test_older_prefixes_are_refused(directory):
    def change(tensors):
        for name in list(tensors):
            tensors[name.replace("model.visual.", "visual.")] = tensors.pop(name)

    rewrite(directory, change)
    text = message(directory)
    assert " missing: model.visual." in text
    assert " unexpected: visual." in text


@pytest.mark.parametrize("section", [None, "text_config", "vision_config"])
def test_other_compression_is_refused_by_name(directory, section):
    raw = json.loads((directory / "config.json").read_text())
    (raw if section is None else raw[section])["compression_config"] = {"format": "pack-quantized"}
    (directory / "config.json").write_text(json.dumps(raw))
    assert "compression_config is not supported" in message(directory, ConfigError)


# --- options ---


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here ("),
        ({"device": "gpu"}, "device 'gpu' is unknown; choose cpu, cuda or"),
        ({"device": None}, "device 'None' is unknown"),
        ({"device": "meta"}, "device 'meta' is not supported; choose cpu or cuda"),
        ({"device": "mps"}, "device 'mps' is not supported; choose cpu or cuda"),
        ({"dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn is not supported; choose from auto, bfloat16"),
        ({"dtype": "half-ish"}, "dtype half-ish is not supported"),
        ({"dtype": torch.int8}, "dtype torch.int8 is not supported"),
        ({"expert_layout": "rows"}, "expert_layout is 'rows'; choose from published, transformers5"),
    ],
)
def test_options(plain, options, text):
    assert message(plain.path, OptionError, **options).startswith(text)


def test_a_model_that_does_not_fit_the_host_is_refused(plain, monkeypatch):
    monkeypatch.setattr(placement, "free_bytes", lambda device: 100_000)
    text = message(plain.path, OptionError)
    assert text.startswith(f"{plain.path} takes 0.0 GB in float32, but cpu has 0.0 GB free")
    monkeypatch.undo()
    assert 1e6 < placement.free_bytes(torch.device("cpu")) < 1e15


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (18_000_000_000, 24_000_000_000))
    device, directory = torch.device("cuda", 0), Path("model")
    placement.require_memory(device, 20_000_000_000, directory, torch.bfloat16)
    with pytest.raises(OptionError, match=r"model takes 62\.1 GB in bfloat16, but cuda:0 has 20\.0 GB free"):
        placement.require_memory(device, 62_141_508_064, directory, torch.bfloat16)


def test_random_weights_that_do_not_fit_are_refused(monkeypatch):
    config = Qwen3VLMoeConfig.qwen3_vl_30b_a3b()
    monkeypatch.setattr(placement, "free_bytes", lambda device: 8_000_000_000)
    with pytest.raises(OptionError, match=r"a model of this size takes 62\.1 GB in bfloat16, but cpu has 8\.0 GB free"):
        random_model(config, "cpu")
    with pytest.raises(OptionError, match="device 'abacus' is unknown"):
        random_model(config, "abacus")

"""Tile choices: the shipped files, the rule for what they do not list, and files that are wrong."""

from __future__ import annotations

import json
import warnings

import pytest
from tma_moe import tuning

QWEN3_VL_30B = {"experts": 128, "topk": 8, "hidden": 2048, "width": 768}
SWAP = {"kernel": "swap", "rows": 16, "cols": 64, "block_k": 64, "warps": 4, "stages": 3}


@pytest.fixture(autouse=True)
def fresh_caches():
    tuning._files.cache_clear()
    tuning._warn_unlisted.cache_clear()
    yield
    tuning._files.cache_clear()
    tuning._warn_unlisted.cache_clear()


def config(**changes) -> dict:
    bucket = {"max_tokens": 64, "up": dict(SWAP), "down": dict(SWAP)}
    last = {"up": {**SWAP, "rows": 64}, "down": dict(SWAP)}
    shape = {"experts": 4, "topk": 2, "hidden": 64, "width": 32, "buckets": [bucket, last]}
    return {"devices": ["Some GPU"], "triton": "3.6.0", "shapes": [shape], **changes}


@pytest.mark.parametrize(("device", "many_rows"), [("NVIDIA H200", "grouped"), ("NVIDIA H100 80GB HBM3", "streamed")])
def test_the_models_shape_is_measured_for_hopper(device, many_rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choices = tuning.choices_for(device, "3.6.0", **QWEN3_VL_30B)
        # Another triton version uses the file that there is.
        assert tuning.choices_for(device, "9.9.9", **QWEN3_VL_30B) == choices
    assert choices != tuning.default_choices(**QWEN3_VL_30B)
    assert choices[0].up.kernel == "decode"
    assert {choice.up.kernel for choice in choices} >= {"swap", many_rows}


def test_an_unlisted_gpu_gets_defaults_and_one_warning():
    with pytest.warns(UserWarning, match="no measured tiles for 'Some GPU'.*scripts/tune_moe.py"):
        first = tuning.choices_for("Some GPU", "3.6.0", **QWEN3_VL_30B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.choices_for("Some GPU", "3.6.0", **QWEN3_VL_30B) == first
    assert first == tuning.default_choices(**QWEN3_VL_30B)


@pytest.mark.parametrize(
    "sizes", [(128, 8, 2048, 768), (8, 2, 4096, 14336), (1, 1, 8, 8), (5, 5, 64, 64), (512, 1, 64, 8)]
)
def test_defaults_are_buckets_by_rising_tokens(sizes):
    choices = tuning.default_choices(*sizes)
    limits = [choice.max_tokens for choice in choices]
    assert limits[-1] is None
    assert limits[:-1] == sorted(set(limits[:-1]))
    assert choices[-1].up.kernel == "grouped"


def test_the_version_of_triton_decides_between_two_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "CONFIG_DIR", tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(config()))
    newer = config(triton="3.9.0")
    newer["shapes"][0]["buckets"][0]["max_tokens"] = 32
    (tmp_path / "b.json").write_text(json.dumps(newer))
    sizes = (4, 2, 64, 32)
    assert tuning.choices_for("Some GPU", "3.9.0", *sizes)[0].max_tokens == 32
    assert tuning.choices_for("Some GPU", "3.6.0", *sizes)[0].max_tokens == 64


def test_dumped_buckets_load_again(monkeypatch, tmp_path):
    choices = tuning.default_choices(**QWEN3_VL_30B)
    shape = {**QWEN3_VL_30B, "buckets": tuning.dump_buckets(choices)}
    path = tmp_path / "dumped.json"
    path.write_text(json.dumps(config(shapes=[shape])))
    assert tuning.load(path)["shapes"] == [((128, 8, 2048, 768), choices)]


def test_without_gluon_the_triton_kernels_serve(monkeypatch):
    monkeypatch.setattr(tuning, "has_gluon", lambda: False)
    for device in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        choices = tuning.choices_for(device, "3.6.0", **QWEN3_VL_30B)
        used = {tiles.kernel for choice in choices for tiles in (choice.up, choice.down)}
        assert used == {"decode", "swap", "grouped"}
        assert choices[-1].down == tuning.GROUPED_DOWN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("devices"), "KeyError: 'devices'"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(rows=24), "rows must be a power of two"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(kernel="magic"), "kernel must be one of decode, swap"),
        (lambda c: c["shapes"][0]["buckets"][0].update(up={**SWAP, "kernel": "decode"}), "must both be 'decode'"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(depth=3), "unexpected keyword argument 'depth'"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(kernel="specialized"), "at least 128 rows"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(kernel="streamed"), "rows of 96, 160, 288"),
        (lambda c: c["shapes"][0]["buckets"].reverse(), "max_tokens must rise and the last bucket must have none"),
        (lambda c: c["shapes"][0].update(buckets=[]), "max_tokens must rise"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, change, message):
    wrong = config()
    change(wrong)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=message) as caught:
        tuning.load(path)
    assert str(path) in str(caught.value)

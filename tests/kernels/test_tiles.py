"""Tile choices: the shipped files, the rule for what they do not list, files that are wrong, and what products take."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace

import pytest
import torch

from tma_moe import support, tiles
from tma_moe.tiles import Choice, Tiles, choices_for, default_choices, load

QWEN3_VL_30B = {"experts": 128, "topk": 8, "hidden": 2048, "width": 768}
LISTED = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
PLAIN = {"kernel": "weights_m", "rows": 16, "cols": 64, "block_k": 64, "warps": 4, "stages": 3}
needs_gluon = pytest.mark.skipif(support.gluon_problem() is not None, reason=f"no Gluon: {support.gluon_problem()}")


@pytest.fixture(autouse=True)
def fresh_caches():
    kept = (tiles._files, tiles._warn_untimed, tiles._gluon_runs)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def shipped(device: str, fp8: bool = False) -> tuple[Choice, ...]:
    """What the file of a device for triton 3.6 says of the model's shape."""
    files = (
        dict(file["shapes"])[tuple(QWEN3_VL_30B.values())]
        for file in map(load, tiles.CONFIG_DIR.glob("*.json"))
        if device in file["devices"] and file["triton"] == "3.6.0"
    )
    (found,) = (choices for choices in files if choices[0].fp8 == fp8)
    return found


def config(**changes) -> dict:
    bucket = {"max_tokens": 64, "up": dict(PLAIN), "down": dict(PLAIN)}
    last = {"up": {**PLAIN, "rows": 64}, "down": dict(PLAIN)}
    shape = {"experts": 4, "topk": 2, "hidden": 64, "width": 32, "buckets": [bucket, last]}
    return {"devices": ["Some GPU"], "triton": "3.6.0", "shapes": [shape], **changes}


@needs_gluon
@pytest.mark.parametrize("device", LISTED)
def test_the_models_shape_is_measured_for_hopper(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choices = choices_for(device, "3.6.0", **QWEN3_VL_30B)
        # Another triton version uses the file that there is.
        assert choices_for(device, "9.9.9", **QWEN3_VL_30B) == choices
    assert choices == shipped(device)
    assert choices[0].up.kernel == "gemv"
    used = {chosen.kernel for choice in choices for chosen in (choice.up, choice.down)}
    assert used == set(tiles.KERNELS)


@needs_gluon
def test_fp8_has_choices_of_its_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choices = choices_for("NVIDIA H100 80GB HBM3", "3.6.0", **QWEN3_VL_30B, fp8=True)
    assert choices == shipped("NVIDIA H100 80GB HBM3", fp8=True)
    assert {chosen.kernel for choice in choices for chosen in (choice.up, choice.down)} == set(tiles.FP8_KERNELS)


@pytest.mark.parametrize("sizes", [(128, 8, 2048, 768), (5, 5, 64, 80), (512, 1, 64, 16)])
@pytest.mark.parametrize("gluon", [True, False])
def test_fp8_defaults(sizes, gluon, monkeypatch):
    monkeypatch.setattr(tiles, "gluon_problem", lambda: None if gluon else "ImportError: no fence_async_shared")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choices = choices_for("Some GPU", "3.6.0", *sizes, fp8=True)
    limits = [choice.max_tokens for choice in choices]
    assert limits[-1] is None
    assert limits[:-1] == sorted(set(limits[:-1]))
    assert all(choice.fp8 for choice in choices)
    # A group of hidden values must not leave its tile, and a machine without Gluon gets plain Triton.
    in_gluon = choices[-1].up.kernel == choices[-1].down.kernel == "fp8_tokens_m_ws"
    assert in_gluon == (gluon and sizes[3] % 128 == 0)


@needs_gluon
def test_every_shipped_tile_is_one_that_its_kernel_takes():
    """A file is read without a look at the kernels; what they do not take would show at a call only."""
    from tma_moe.gemm.product import Sizes, product

    made = 0
    for file in map(load, sorted(tiles.CONFIG_DIR.glob("*.json"))):
        for shape, choices in file["shapes"]:
            for choice in choices:
                for role in ("up", "down"):
                    a8 = file["capability"] >= (8, 9)
                    product(role, getattr(choice, role), Sizes(*shape, 132, a8=a8))
                    made += 1
    assert made >= 80


def test_an_unlisted_gpu_gets_defaults_and_one_warning():
    with pytest.warns(UserWarning, match="no measured tiles for 'Some GPU'.*scripts/tune_moe.py"):
        first = choices_for("Some GPU", "3.6.0", **QWEN3_VL_30B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choices_for("Some GPU", "3.6.0", **QWEN3_VL_30B) == first
    assert first == default_choices(**QWEN3_VL_30B)


@pytest.mark.parametrize(
    "sizes", [(128, 8, 2048, 768), (8, 2, 4096, 14336), (1, 1, 8, 8), (5, 5, 64, 64), (512, 1, 64, 8)]
)
def test_defaults_are_buckets_by_rising_tokens(sizes):
    choices = default_choices(*sizes)
    limits = [choice.max_tokens for choice in choices]
    assert limits[-1] is None
    assert limits[:-1] == sorted(set(limits[:-1]))
    assert (choices[-1].up, choices[-1].down) == (tiles.MANY_UP, tiles.MANY_DOWN)
    # They serve any triton that the package takes, so they are in plain Triton.
    assert {chosen.kernel for choice in choices for chosen in (choice.up, choice.down)} <= {"gemv", "weights_m"}


def test_the_version_of_triton_decides_between_two_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tiles, "CONFIG_DIR", tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(config()))
    newer = config(triton="3.9.0")
    newer["shapes"][0]["buckets"][0]["max_tokens"] = 32
    (tmp_path / "b.json").write_text(json.dumps(newer))
    sizes = (4, 2, 64, 32)
    assert choices_for("Some GPU", "3.9.0", *sizes)[0].max_tokens == 32
    assert choices_for("Some GPU", "3.6.0", *sizes)[0].max_tokens == 64


def test_dumped_buckets_load_again(tmp_path):
    for choices in (default_choices(**QWEN3_VL_30B), shipped("NVIDIA H200")):
        shape = {**QWEN3_VL_30B, "buckets": tiles.dump_buckets(choices)}
        path = tmp_path / "dumped.json"
        path.write_text(json.dumps(config(shapes=[shape])))
        assert load(path)["shapes"] == [((128, 8, 2048, 768), choices)]


def test_without_gluon_plain_triton_serves_and_one_warning_says_why(monkeypatch):
    monkeypatch.setattr(tiles, "gluon_problem", lambda: "ImportError: no fence_async_shared")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {device: choices_for(device, "3.6.0", **QWEN3_VL_30B) for device in LISTED * 2}
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "Gluon kernels are off" in message
    assert "(ImportError: no fence_async_shared)" in message
    assert "\n" not in message
    for device in LISTED:
        # Bucket by bucket the same tiles, but for those of a kernel in Gluon.
        for choice, plain in zip(shipped(device), found[device], strict=True):
            assert choice.max_tokens == plain.max_tokens
            for role, instead in (("up", tiles.MANY_UP), ("down", tiles.MANY_DOWN)):
                chosen = getattr(choice, role)
                expected = instead if chosen.kernel in support.GLUON_PRODUCTS else chosen
                assert getattr(plain, role) == expected
                assert expected.kernel in ("gemv", "weights_m")


def test_without_gluon_the_defaults_need_no_warning(monkeypatch):
    monkeypatch.setattr(tiles, "gluon_problem", lambda: "ImportError: no fence_async_shared")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choices = choices_for("NVIDIA H200", "3.6.0", 8, 2, 4096, 14336)  # a listed card, a shape that no file has
    assert choices == default_choices(8, 2, 4096, 14336)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("devices"), "KeyError: 'devices'"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(rows=24), "rows must be a power of two"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(stages=0), r"stages: at least 1\), got 0"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(cols="64"), "cols must be a power of two"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(kernel="magic"), "one of gemv, weights_m, weights_m_ws"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(kernel="grouped"), "got 'grouped'"),
        (lambda c: c["shapes"][0]["buckets"][0].update(up={**PLAIN, "kernel": "gemv"}), "must both be 'gemv'"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(kernel="fp8_weights_m"), "must both be for FP8 weights"),
        (lambda c: c["shapes"][0]["buckets"][0]["up"].update(depth=3), "unexpected keyword argument 'depth'"),
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
        load(path)
    assert str(path) in str(caught.value)


GEMV = (Tiles("gemv", 1, 8, 128, 4, 1), Tiles("gemv", 1, 8, 128, 4, 1))
WEIGHTS_M = (Tiles("weights_m", 16, 64, 64, 4, 3), Tiles("weights_m", 16, 64, 64, 4, 3))
WEIGHTS_M_WS = (Tiles("weights_m_ws", 96, 64, 64, 4, 4, 1), Tiles("weights_m_ws", 96, 128, 64, 4, 4, 1))
TOKENS_M_WS = (Tiles("tokens_m_ws", 128, 128, 64, 4, 4, 1), Tiles("tokens_m_ws", 128, 256, 64, 4, 4, 1))
ROWS = "rows of 96, 160, 288"
LIMITS = [
    (GEMV, {"rows": 16}, "one row, and nothing that L2 could keep"),
    (GEMV, {"keep": True}, "one row, and nothing that L2 could keep"),
    *((WEIGHTS_M_WS, {"rows": rows}, f"a block_k of 64 and {ROWS}") for rows in (64, 128, 256, 320)),
    (WEIGHTS_M_WS, {"warps": 8}, "4 warps"),
    (WEIGHTS_M_WS, {"block_k": 128}, "a block_k of 64"),
    (WEIGHTS_M_WS, {"cols": 256}, "{cols} columns"),
    (TOKENS_M_WS, {"rows": 64}, "4 warps, at least 128 rows, at most {cols} columns, a block_k of at least 64"),
    (TOKENS_M_WS, {"warps": 8}, "4 warps, at least 128 rows, at most {cols} columns, a block_k of at least 64"),
    (TOKENS_M_WS, {"cols": 512}, "at most {cols} columns"),
    (TOKENS_M_WS, {"block_k": 32}, "a block_k of at least 64"),
    (TOKENS_M_WS, {"keep": True}, "no keep"),
]


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize(
    ("takes", "change", "needed"), LIMITS, ids=[f"{takes[0].kernel}-{change}" for takes, change, _ in LIMITS]
)
def test_a_product_says_which_tiles_it_takes(monkeypatch, takes, change, needed, role):
    pytest.importorskip("triton")
    if takes[0].kernel in support.GLUON_PRODUCTS and support.gluon_problem() is not None:
        pytest.skip(support.gluon_problem())
    from tma_moe.recipe import make_recipe

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("H", (), {"multi_processor_count": 2}))
    sizes = (torch.device("meta"), 4, 2, 128, 64)
    partner = GEMV if takes is GEMV else WEIGHTS_M
    beside = {"up": partner[0], "down": partner[1]}
    right = dict(zip(("up", "down"), takes, strict=True))[role]
    make_recipe(*sizes, Choice(None, **{**beside, role: right}))
    wrong = replace(right, **change)
    with pytest.raises(ValueError, match=re.escape(f"tiles: '{right.kernel}' takes ")) as caught:
        make_recipe(*sizes, Choice(None, **{**beside, role: wrong}))
    message = str(caught.value)
    assert needed.format(cols=right.cols) in message
    assert message.endswith(f"got {wrong}")
    assert "\n" not in message


@needs_gluon
def test_the_columns_of_weights_m_ws_are_those_of_its_role():
    from tma_moe.gemm.product import Sizes, product

    for role, tile, other in (("up", *WEIGHTS_M_WS), ("down", *reversed(WEIGHTS_M_WS))):
        assert product(role, tile, Sizes(4, 2, 128, 64, 132)).tiles == tile
        with pytest.raises(ValueError, match=f"4 warps, {tile.cols} columns"):
            product(role, other, Sizes(4, 2, 128, 64, 132))


def test_tiles_that_were_timed_are_preferred_and_others_warn_once(monkeypatch, tmp_path):
    monkeypatch.setattr(tiles, "CONFIG_DIR", tmp_path)
    portable = {**PLAIN, "kernel": "portable", "weights_m": True}
    untimed = config(timed=False, capability="8.9")
    for bucket in untimed["shapes"][0]["buckets"]:
        bucket.update(up=dict(portable), down=dict(portable))
    (tmp_path / "a.json").write_text(json.dumps(untimed))
    sizes = (4, 2, 64, 32)
    with pytest.warns(UserWarning, match="for 'Some GPU' and uses tiles that were chosen for it and not timed"):
        found = tiles.listed("Some GPU", "3.6.0", sizes, False, portable=True)
    assert (found[0].max_tokens, found[0].up.weights_m) == (64, True)
    assert tiles.listed("Some GPU", "3.6.0", sizes, False, portable=False) is None  # of the other backend
    timed = json.loads(json.dumps(untimed)) | {"timed": True, "triton": "3.9.0"}
    timed["shapes"][0]["buckets"][0]["max_tokens"] = 32
    (tmp_path / "b.json").write_text(json.dumps(timed))
    tiles._files.cache_clear()
    assert tiles.listed("Some GPU", "3.6.0", sizes, False, portable=True)[0].max_tokens == 32
    timed["shapes"].append(config()["shapes"][0])
    (tmp_path / "b.json").write_text(json.dumps(timed))
    with pytest.raises(ValueError, match="all shapes must be of one backend"):
        load(tmp_path / "b.json")

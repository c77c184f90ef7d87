"""Resized pictures against Pillow's, byte for byte: in plain torch, and in the kernels, interpreted or on a card."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from triton import knobs

from qwen3vl_moe.ops import reference, resize, resize_picture
from qwen3vl_moe.ops.kernels import resize as kernels
from qwen3vl_moe.ops.resize import columns_first, resize_by, resizes_like_pillow, weight_table
from tests.interpreted import DEVICE, INTERPRETED, runs_kernels
from tests.pictures import noise

# Heights and widths, before and after.
SIZES = {
    "up": ((5, 7), (8, 12)),
    "down": ((12, 8), (4, 3)),
    "photograph": ((14, 14), (16, 16)),
    "wider and shorter": ((30, 10), (10, 30)),
    "columns first": ((18, 12), (6, 10)),
    "rows first, just": ((24, 16), (16, 12)),
    "columns first, just": ((25, 16), (16, 12)),
    "columns first, tall": ((203, 2), (7, 3)),
    "tall, and no shorter": ((101, 1), (104, 2)),
    "rows only": ((10, 25), (10, 16)),
    "columns only": ((25, 10), (16, 10)),
    "neither": ((10, 15), (10, 15)),
    "one pixel": ((1, 1), (8, 8)),
    "to one pixel": ((6, 5), (1, 1)),
    "one row": ((1, 100), (4, 12)),
    "one column": ((100, 1), (12, 4)),
    "a long row": ((1, 300), (2, 40)),
    "a long column": ((300, 1), (20, 1)),
    "more than a block": ((2, 300), (1, 600)),
}


def pillow(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def drawn(rng: random.Random, most: int) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Pictures and sizes: noise, or black and white, whose sums leave 0 to 255; sides that stay; thin pictures."""
    generator = np.random.default_rng(rng.randint(0, 10**9))
    while True:
        height, width, new_height, new_width = (
            rng.choice([1, 2, 3, rng.randint(1, most // 4), rng.randint(1, most)]) for _ in range(4)
        )
        if rng.random() < 0.1:
            height, width = rng.choice([(1, 20 * most), (20 * most, 1)])
        if rng.random() < 0.2:
            new_height, new_width = rng.choice([(height, min(new_width, 900)), (min(new_height, 900), width)])
        values = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield Image.fromarray(values if rng.random() < 0.5 else (values > 127) * np.uint8(255)), (new_height, new_width)


@pytest.mark.parametrize(("old", "new"), SIZES.values(), ids=SIZES)
def test_equal_to_pillow(old, new):
    image = noise(old[1], old[0])
    ours = resize_picture(pixels(image), *new)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    np.testing.assert_array_equal(ours.numpy(), pillow(image, new))


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pillow_at_random_sizes(seed):
    pictures = drawn(random.Random(seed), 60)
    for image, new in (next(pictures) for _ in range(250)):
        np.testing.assert_array_equal(resize_picture(pixels(image), *new).numpy(), pillow(image, new), str(new))


def test_equal_to_pillow_on_photographs(shared_dir):
    for name in ("chelsea.png", "china.jpg", "flower.jpg"):
        image = Image.open(shared_dir / "images" / name).convert("RGB")
        for new in ((448, 672), (96, 64)):
            np.testing.assert_array_equal(resize_picture(pixels(image), *new).numpy(), pillow(image, new))


def test_the_order_of_the_passes_matters():
    # Else the tests above would not tell one from the other.
    old, new = SIZES["columns first"]
    image = noise(old[1], old[0])
    one, other = (resize_by(reference, pixels(image), new[0], new[1], first) for first in (False, True))
    assert not torch.equal(one, other)
    expected = other if columns_first(old, new) else one
    np.testing.assert_array_equal(expected.numpy(), pillow(image, new))


def test_weights():
    # Half as large: a pixel lies between two, and the cubic gives -3, -9, 29, 111, 111, 29, -9, -3 over 256.
    table = weight_table(16, 8)
    assert table.dtype == np.int32
    assert table.shape == (10, 8)
    np.testing.assert_array_equal(table[0], [0, 0, 1, 3, 5, 7, 9, 11])
    inside = np.array([-3, -9, 29, 111, 111, 29, -9, -3, 0]) << 14
    np.testing.assert_array_equal(table[1:, 2:6], np.broadcast_to(inside[:, None], (9, 4)))
    # At an edge, those that are left are made to add up to one; each was rounded.
    assert abs(table[1:].sum(0) - (1 << 22)).max() <= 4
    same = weight_table(6, 6)
    assert all((same[1:, i] != 0).sum() == 1 and same[1 + i - same[0, i], i] == 1 << 22 for i in range(6))


def test_sums_stay_below_32_bits():
    for old, new in ((1, 7), (2, 5), (7, 100), (100, 7), (100, 99), (5000, 32), (1920, 1088)):
        weights = weight_table(old, new)[1:].astype(np.int64)
        half = 1 << 21
        assert 255 * weights.clip(min=0).sum(0).max() + half < 2**31
        assert 255 * weights.clip(max=0).sum(0).min() + half > -(2**31)


@runs_kernels
@pytest.mark.parametrize(("old", "new"), SIZES.values(), ids=SIZES)
def test_kernels(old, new):
    image = noise(old[1], old[0])
    ours = resize_by(kernels, pixels(image).to(DEVICE), new[0], new[1], columns_first(old, new))
    np.testing.assert_array_equal(ours.cpu().numpy(), pillow(image, new))


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
def test_kernels_at_random_sizes():
    pictures = drawn(random.Random(5), 8)
    for image, new in (next(pictures) for _ in range(12)):
        old = image.height, image.width
        ours = resize_by(kernels, pixels(image), new[0], new[1], columns_first(old, new))
        np.testing.assert_array_equal(ours.numpy(), pillow(image, new), str((old, new)))


@pytest.mark.gpu
def test_on_a_gpu():
    few, many = drawn(random.Random(6), 100), drawn(random.Random(7), 2000)
    large = [(noise(1920, 1080), (1088, 1920)), (noise(560, 560), (576, 576)), (noise(4000, 3000), (1056, 1408))]
    for image, new in [*large, *(next(few) for _ in range(150)), *(next(many) for _ in range(50))]:
        ours = resize_picture(pixels(image).cuda(), *new)
        np.testing.assert_array_equal(ours.cpu().numpy(), pillow(image, new), str((image.size, new)))


@pytest.mark.gpu
def test_no_size_compiles_anything(monkeypatch):
    resize_picture(pixels(noise(30, 20)).cuda(), 32, 32)
    resize_picture(pixels(noise(30, 90)).cuda(), 32, 32)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **made: compiled.append(made["repr"]))
    for width, height, new in ((16, 16, (1, 1)), (17, 32, (32, 64)), (1, 1, (32, 32)), (64, 640, (16, 16))):
        resize_picture(pixels(noise(width, height)).cuda(), *new)
    assert compiled == []


def test_an_order_that_is_not_known_is_said(monkeypatch):
    """Some later Pillow may have another: its pictures are then left to it."""
    monkeypatch.setattr(resize, "_ORDERS", ())
    resize._order.cache_clear()
    with pytest.warns(UserWarning, match="resized on the host, slower: Pillow"):
        assert not resizes_like_pillow()
    resize._order.cache_clear()
    monkeypatch.undo()
    assert resizes_like_pillow()

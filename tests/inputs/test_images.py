"""The size of an image, its resize and its patches: equal to transformers' image processor (its PIL backend)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as oracle_smart_resize

from benchmarking.tiny import write_processor_dir
from qwen3vl_moe.errors import ConfigError, OptionError, PromptError
from qwen3vl_moe.inputs.images import ImageSettings, ImageSize, copy_pixels, cut_patches, smart_resize
from tests.pictures import noise, rgb, transformers_images

SETTINGS = ImageSettings(
    patch_size=4,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=256,
    max_pixels=40_000,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def patches_of(settings: ImageSettings, image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int], bytes]:
    picture = settings.resize(image)
    return cut_patches(copy_pixels([picture], "cpu"), [picture]).numpy(), picture.grid, picture.digest


class TestPatches:
    # A single pixel, upscaling, exact multiples, rounding both ways, halves (rounded to even), long and tall.
    SIZES = ((1, 1), (3, 5), (16, 16), (20, 28), (64, 48), (100, 100), (37, 211), (7, 1400), (1399, 7), (333, 500))

    @pytest.mark.parametrize(("width", "height"), SIZES)
    def test_equal_to_transformers(self, width, height):
        image = noise(width, height)
        expected = transformers_images(SETTINGS)(images=[image], return_tensors="np")
        patches, grid, _ = patches_of(SETTINGS, image)
        assert grid == tuple(expected["image_grid_thw"][0])
        assert patches.dtype == np.float32
        np.testing.assert_array_equal(patches, expected["pixel_values"])  # bit for bit

    @pytest.mark.parametrize(
        ("min_pixels", "max_pixels"), [(1, 64), (1, 10_000), (9_000, 10_000), (250_000, 300_000), (64, 10**9)]
    )
    def test_bounds_equal_to_transformers(self, min_pixels, max_pixels):
        bounded = SETTINGS.with_bounds(min_pixels, max_pixels)
        image = noise(131, 77)
        expected = transformers_images(bounded)(images=[image], return_tensors="np")
        np.testing.assert_array_equal(patches_of(bounded, image)[0], expected["pixel_values"])

    @pytest.mark.parametrize(("patch_size", "temporal_patch_size", "merge_size"), [(16, 2, 2), (14, 1, 3), (5, 3, 1)])
    def test_other_sizes_and_uneven_normalisation(self, patch_size, temporal_patch_size, merge_size):
        other = ImageSettings(
            patch_size,
            temporal_patch_size,
            merge_size,
            min_pixels=3136,
            max_pixels=60_000,
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
        )
        image = noise(200, 301)
        expected = transformers_images(other)(images=[image], return_tensors="np")
        np.testing.assert_array_equal(patches_of(other, image)[0], expected["pixel_values"])

    def test_published_settings_on_photographs(self, shared_dir):
        published = ImageSettings.from_pretrained(shared_dir / "checkpoint-30b")
        oracle = transformers_images(published)
        for name in ("chelsea.png", "china.jpg", "flower.jpg"):
            path = shared_dir / "images" / name
            expected = oracle(images=[load_image(str(path))], return_tensors="np")
            np.testing.assert_array_equal(patches_of(published, rgb(path))[0], expected["pixel_values"])

    def test_order_of_patches(self):
        # A picture whose pixels name their own place: the first merge block is the 8 x 8 corner, patch by patch.
        rows, columns = np.mgrid[0:16, 0:24]
        image = Image.fromarray(np.stack([rows, columns, rows * 0], axis=-1).astype(np.uint8))
        patches, grid, _ = patches_of(SETTINGS, image)
        assert grid == (1, 4, 6)
        pixels = np.rint((patches * 0.5 + 0.5) * 255).astype(int).reshape(24, 3, 2, 4, 4)
        assert [tuple(pixels[p, :2, 0, 0, 0]) for p in range(8)] == [
            (0, 0), (0, 4), (4, 0), (4, 4), (0, 8), (0, 12), (4, 8), (4, 12)
        ]  # fmt: skip
        np.testing.assert_array_equal(pixels[:, :, 0], pixels[:, :, 1])  # both frames are the still image

    def test_packed_pictures_are_those_of_each_alone(self):
        images = [noise(64, 48), noise(7, 300), noise(20, 28)]
        pictures = [SETTINGS.resize(image) for image in images]
        pixels = copy_pixels(pictures, "cpu")
        assert {each.dtype for each in pixels} == {torch.uint8}
        expected = np.concatenate([patches_of(SETTINGS, image)[0] for image in images])
        np.testing.assert_array_equal(cut_patches(pixels, pictures).numpy(), expected)
        rounded = cut_patches(pixels, pictures, torch.bfloat16)
        assert torch.equal(rounded, torch.from_numpy(expected).bfloat16())

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize(("width", "height"), SIZES)
    def test_resized_on_the_device(self, width, height, device):
        uneven = replace(SETTINGS, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
        uneven = uneven.with_bounds(256, 80_000)
        images = [noise(width, height), noise(33, 17), noise(1000, 1000)]  # the last one on the host: it shrinks a lot
        expected = np.concatenate([patches_of(uneven, image)[0] for image in images])
        pictures = [uneven.resize(image, on_device=True) for image in images]
        assert [picture.resized for picture in pictures] == [False, False, True]
        assert [picture.pixels.shape for picture in pictures[:2]] == [(height, width, 3), (17, 33, 3)]
        ours = cut_patches(copy_pixels(pictures, device), pictures)
        np.testing.assert_array_equal(ours.cpu().numpy(), expected)

    def test_memory_of_pictures_that_wait_for_the_device(self):
        for height in (300, 1000):  # one whose rows are read out in several parts, of which the last is short
            picture = replace(SETTINGS, max_pixels=10**9).resize(noise(500, height), on_device=True)
            np.testing.assert_array_equal(picture.pixels, np.asarray(noise(500, height)))
        for factor in (2, 3, 9, 100):
            bounded = SETTINGS.with_bounds(64, 10**6 // factor)
            picture, plain = (bounded.resize(noise(1000, 1000), on_device=each) for each in (True, False))
            assert picture.pixels.nbytes <= 4 * plain.pixels.nbytes
            assert picture.resized == (factor > 4)

    def test_digest_tells_what_the_model_would_see(self):
        image, other = noise(64, 48), noise(64, 48)
        other.putpixel((40, 30), tuple(value ^ 1 for value in image.getpixel((40, 30))))
        grey = [Image.new("RGB", size, "grey") for size in ((64, 48), (48, 64), (8, 384))]
        small = SETTINGS.with_bounds(64, 1024)
        digests = [patches_of(SETTINGS, each)[2] for each in (image, other, *grey)] + [patches_of(small, image)[2]]
        assert len(set(digests)) == len(digests)
        assert patches_of(SETTINGS, image.copy())[2] == digests[0]
        # Pixels that are resized to the same are the same picture.
        assert patches_of(SETTINGS, Image.new("RGB", (80, 60), "grey"))[1:] != patches_of(SETTINGS, grey[0])[1:]
        assert patches_of(SETTINGS, Image.new("RGB", (66, 50), "grey"))[1:] == patches_of(SETTINGS, grey[0])[1:]

    def test_one_resize_only(self):
        # An image that already has a fitting size is not touched: its pixels can be read back from the patches.
        image = noise(64, 48)
        patches, (_, rows, columns), _ = patches_of(SETTINGS, image)
        blocks = patches.reshape(rows // 2, columns // 2, 2, 2, 3, 2, 4, 4)[:, :, :, :, :, 0]
        pixels = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(48, 64, 3)
        np.testing.assert_array_equal(np.rint((pixels * 0.5 + 0.5) * 255), np.asarray(image))


class TestSize:
    @given(
        st.integers(1, 5000),
        st.integers(1, 5000),
        st.sampled_from([8, 28, 32, 48]),
        st.integers(1, 100_000),
        st.integers(0, 10**7),
    )
    @settings(max_examples=300)
    def test_equal_to_transformers(self, height, width, factor, min_pixels, room):
        if max(height, width) > 200 * min(height, width):
            return
        bounds = (factor, min_pixels, max(min_pixels, factor**2) + room)
        assert smart_resize(height, width, *bounds) == oracle_smart_resize(height, width, *bounds)

    def test_factor_is_patch_times_merge(self):
        # 560 x 560 of the published checkpoint: 17.5 squares of 32 round to 18 (28, the factor of Qwen2-VL, gives 20).
        published = ImageSettings(16, 2, 2, 65536, 16777216, (0.5,) * 3, (0.5,) * 3)
        assert published.factor == 32
        grid = published.grid(560, 560)
        assert grid == (1, 36, 36)
        assert published.num_tokens(grid) == 324

    def test_max_pixels_is_honoured(self):
        for width, height in ((4000, 3000), (1000, 10), (8, 8)):
            _, rows, columns = SETTINGS.with_bounds(64, 6400).grid(height, width)
            assert rows * columns * 16 <= 6400 or min(rows, columns) == 2  # a side never falls below one image token

    def test_aspect_ratio(self):
        SETTINGS.grid(2, 400)
        with pytest.raises(PromptError, match=r"image 3 .*401x2 pixels.*factor of 200.*limit of 200"):
            SETTINGS.grid(2, 401, "image 3 ('a.png')")


class TestOwnSize:
    """Sizes of single images: what qwen-vl-utils' fetch_image (0.0.14, image_patch_size=16) resizes to."""

    PUBLISHED = replace(SETTINGS, patch_size=16, min_pixels=65536, max_pixels=16777216)

    @pytest.mark.parametrize(
        ("keys", "width", "height", "expected"),
        [
            ({"max_pixels": 16384}, 640, 480, (96, 128)),
            ({"max_pixels": 16384}, 480, 640, (128, 96)),
            ({"max_pixels": 100000}, 100, 100, (96, 96)),  # the checkpoint's least, 65536, does not apply
            ({"min_pixels": 200000}, 100, 100, (448, 448)),
            ({"min_pixels": 50176, "max_pixels": 50176}, 640, 480, (192, 256)),
            ({"min_pixels": 4096}, 200, 10, (32, 192)),  # transformers' rule would make it grow
            ({"resized_height": 280, "resized_width": 420}, 640, 480, (288, 416)),
            ({"resized_height": 280, "resized_width": 420, "max_pixels": 16384}, 640, 480, (288, 416)),
            ({"resized_height": 1, "resized_width": 1}, 640, 480, (64, 64)),
            ({"resized_height": 10, "resized_width": 200}, 5, 500, (32, 192)),
            ({"resized_height": 100000, "resized_width": 100000}, 64, 64, (4096, 4096)),
        ],
    )
    def test_equal_to_qwen_vl_utils(self, keys, width, height, expected):
        size = ImageSize.of(keys, "x")
        _, rows, columns = grid = self.PUBLISHED.grid(height, width, size=size)
        assert (rows * 16, columns * 16) == expected
        assert self.PUBLISHED.least_tokens(size) <= self.PUBLISHED.num_tokens(grid)

    @pytest.mark.parametrize("keys", [{"max_pixels": 16384}, {"resized_height": 280, "resized_width": 420}])
    def test_pixels_are_those_of_a_plain_resize(self, keys):
        image, size = noise(640, 480), ImageSize.of(keys, "x")
        ours = self.PUBLISHED.resize(image, size)
        _, rows, columns = ours.grid
        plain = np.asarray(image.resize((columns * 16, rows * 16))).transpose(2, 0, 1)
        np.testing.assert_array_equal(ours.pixels, plain)
        # The same picture, however its pixels came to be.
        again = Image.fromarray(plain.transpose(1, 2, 0))
        exact = ImageSize(resized_height=again.height, resized_width=again.width)
        assert self.PUBLISHED.resize(again, exact).digest == ours.digest

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"max_pixels": 1000}, "image 3: max_pixels=1000 is less than the 1024 pixels of one image token"),
            ({"max_pixels": 2000}, "image 3: min_pixels=4096 is more than max_pixels=2000"),
            ({"min_pixels": 16777217}, "image 3: min_pixels=16777217 is more than max_pixels=16777216"),
            ({"min_pixels": 9000, "max_pixels": 8000}, "image 3: min_pixels=9000 is more than max_pixels=8000"),
            ({"resized_height": 10**9, "resized_width": 1}, "image 3 is 1x1000000000 pixels: its sides differ"),
        ],
    )
    def test_no_room(self, keys, message):
        size = ImageSize.of(keys, "x")
        for call in (
            lambda: self.PUBLISHED.grid(64, 64, "image 3", size),
            lambda: self.PUBLISHED.least_tokens(size, "image 3"),
        ):
            with pytest.raises(PromptError, match=message):
                call()

    @given(
        st.integers(1, 5000),
        st.integers(1, 5000),
        st.sampled_from([(1024, 1024), (4096, 16384), (65536, 70000), (1, 10**6)]),
    )
    @settings(max_examples=200)
    def test_least_tokens_is_a_bound(self, width, height, bounds):
        if max(width, height) <= 200 * min(width, height):
            bounded = self.PUBLISHED.with_bounds(*bounds)
            assert bounded.least_tokens() <= bounded.num_tokens(bounded.grid(height, width))


class TestSettings:
    def test_published_and_override(self, tmp_path):
        write_processor_dir(tmp_path, min_pixels=5000, max_pixels=70000)
        read = ImageSettings.from_pretrained(tmp_path)
        assert (read.patch_size, read.temporal_patch_size, read.merge_size) == (16, 2, 2)
        assert (read.min_pixels, read.max_pixels) == (5000, 70000)
        assert (read.mean, read.std) == ((0.5,) * 3, (0.5,) * 3)
        assert ImageSettings.from_pretrained(tmp_path, max_pixels=9000).max_pixels == 9000
        assert ImageSettings.from_pretrained(tmp_path, min_pixels=6000).min_pixels == 6000

    def test_shared_checkpoint(self, shared_dir):
        read = ImageSettings.from_pretrained(shared_dir / "checkpoint-30b")
        assert (read.patch_size, read.merge_size, read.min_pixels, read.max_pixels) == (16, 2, 65536, 16777216)

    def test_as_transformers_saves_them(self, tmp_path):
        # save_pretrained of a processor nests the settings in processor_config.json, which then wins.
        write_processor_dir(tmp_path)
        saved = json.loads(transformers_images(SETTINGS).to_json_string())
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": saved, "processor_class": "x"}))
        assert ImageSettings.from_pretrained(tmp_path) == SETTINGS
        (tmp_path / "preprocessor_config.json").unlink()
        assert ImageSettings.from_pretrained(tmp_path) == SETTINGS

    def test_processor_config_without_settings(self, tmp_path):
        write_processor_dir(tmp_path, max_pixels=12345)
        (tmp_path / "processor_config.json").write_text('{"processor_class": "Qwen3VLProcessor"}')
        assert ImageSettings.from_pretrained(tmp_path).max_pixels == 12345

    def test_older_spelling_of_the_bounds(self, tmp_path):
        self.write(tmp_path, size=None, min_pixels=3136, max_pixels=12845056)
        read = ImageSettings.from_pretrained(tmp_path)
        assert (read.min_pixels, read.max_pixels) == (3136, 12845056)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_processor_type": "CLIP"}, "image_processor_type 'CLIP' is not supported"),
            ({"image_processor_type": None}, "image_processor_type None is not supported"),
            ({"do_resize": False}, "do_resize is False"),
            ({"do_center_crop": True}, "do_center_crop is True"),
            ({"resample": 2}, "resample is 2"),
            ({"rescale_factor": 0.5}, "rescale_factor is 0.5"),
            ({"size": {"height": 224, "width": 224}}, "size is"),
            ({"size": {"shortest_edge": 65536}}, "max_pixels or longest_edge is missing"),
            ({"size": {"shortest_edge": 65536, "longest_edge": 0}}, "longest_edge is 0"),
            ({"patch_size": "16"}, "patch_size is '16'"),
            ({"merge_size": None}, "merge_size is missing"),
            ({"image_mean": 0.5}, "image_mean is 0.5"),
            ({"image_std": [0.5, 0, 0.5]}, "image_std is"),
            ({"image_mean": [float("nan")] * 3}, "preprocessor_config.json"),
            ({"image_mean": [0.5, 0.5, float("inf")]}, "preprocessor_config.json"),
            ({"image_mean": [0.5, 1e30, 0.5]}, "its numbers must lie between -10 and 10"),
            ({"image_mean": [True, True, True]}, "image_mean is [True, True, True]; a list of three numbers"),
            ({"image_mean": [0.5, 0.5]}, "image_mean is [0.5, 0.5]; a list of three numbers"),
            ({"image_std": [0.5, float("nan"), 0.5]}, "preprocessor_config.json"),
            ({"image_std": [0.5, float("inf"), 0.5]}, "preprocessor_config.json"),
            ({"image_std": [1e-300] * 3}, "its numbers must lie between 0.001 and 100"),
            ({"image_std": [-0.5] * 3}, "image_std is"),
            ({"rescale_factor": float("nan")}, "preprocessor_config.json"),
            ({"size": {"shortest_edge": 65536, "longest_edge": 10**400}}, "preprocessor_config.json"),
            (
                {"size": {"shortest_edge": 65536, "longest_edge": 2**40 + 1}},
                "longest_edge is 1099511627777; a positive",
            ),
        ],
    )
    def test_unsupported(self, tmp_path, change, message):
        self.write(tmp_path, **change)
        with pytest.raises(ConfigError, match=r"preprocessor_config\.json") as caught:
            ImageSettings.from_pretrained(tmp_path)
        assert message in str(caught.value)

    def test_missing_and_damaged(self, tmp_path):
        with pytest.raises(ConfigError, match=r"has no image settings: preprocessor_config\.json"):
            ImageSettings.from_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text("{")
        with pytest.raises(ConfigError, match=r"preprocessor_config\.json cannot be read as JSON"):
            ImageSettings.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ({"max_pixels": 63}, "max_pixels=63 is less than the 64 pixels of one image token"),
            ({"max_pixels": 100}, "min_pixels=256 is more than max_pixels=100"),
            ({"min_pixels": 0}, "min_pixels is 0"),
            ({"max_pixels": 1e6}, "max_pixels is 1000000.0"),
            ({"min_pixels": True}, "min_pixels is True"),
            ({"max_pixels": 10**400}, "max_pixels is 1000"),
        ],
    )
    def test_bad_bounds(self, bounds, message):
        with pytest.raises(OptionError) as caught:
            SETTINGS.with_bounds(bounds.get("min_pixels"), bounds.get("max_pixels"))
        assert message in str(caught.value)

    def write(self, path: Path, **changes) -> None:
        write_processor_dir(path)
        file = path / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

"""Image sources, colours, the resize and the patches: equal to transformers' image processor (its PIL backend)."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as oracle_smart_resize

from qwen3vl_moe import image_source
from qwen3vl_moe.errors import ConfigError, OptionError, PromptError
from qwen3vl_moe.image_source import decode_rgb, describe, open_image
from qwen3vl_moe.images import ImageSettings, copy_pixels, cut_patches, smart_resize
from qwen3vl_moe.tiny import write_processor_dir

SETTINGS = ImageSettings(
    patch_size=4,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=256,
    max_pixels=40_000,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture of smooth colours and noise: flat or pure-noise images would hide mistakes of the resize."""
    generator = np.random.default_rng(width * 1000 + height)
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=-1)
    pixels = (smooth + generator.integers(0, 64, (height, width, 3))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def oracle_for(settings: ImageSettings) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=settings.patch_size,
        temporal_patch_size=settings.temporal_patch_size,
        merge_size=settings.merge_size,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
        size={"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
    )


def rgb(source) -> Image.Image:
    return decode_rgb(open_image(source, 0))


def patches_of(settings: ImageSettings, image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int], bytes]:
    picture = settings.resize(image)
    return cut_patches(copy_pixels([picture], "cpu"), [picture]).numpy(), picture.grid, picture.digest


class TestPatches:
    # A single pixel, upscaling, exact multiples, rounding both ways, halves (rounded to even), long and tall.
    SIZES = ((1, 1), (3, 5), (16, 16), (20, 28), (64, 48), (100, 100), (37, 211), (7, 1400), (1399, 7), (333, 500))

    @pytest.mark.parametrize(("width", "height"), SIZES)
    def test_equal_to_transformers(self, width, height):
        image = noise(width, height)
        expected = oracle_for(SETTINGS)(images=[image], return_tensors="np")
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
        expected = oracle_for(bounded)(images=[image], return_tensors="np")
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
        expected = oracle_for(other)(images=[image], return_tensors="np")
        np.testing.assert_array_equal(patches_of(other, image)[0], expected["pixel_values"])

    def test_published_settings_on_photographs(self, shared_dir):
        published = ImageSettings.from_pretrained(shared_dir / "checkpoint-30b")
        oracle = oracle_for(published)
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
        assert pixels.dtype == torch.uint8
        expected = np.concatenate([patches_of(SETTINGS, image)[0] for image in images])
        np.testing.assert_array_equal(cut_patches(pixels, pictures).numpy(), expected)
        rounded = cut_patches(pixels, pictures, torch.bfloat16)
        assert torch.equal(rounded, torch.from_numpy(expected).bfloat16())

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        """Two values below 1 that may be off by 2**-24 each, over std; and the rounding of the result, below 4."""
        uneven = replace(SETTINGS, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
        pictures = [uneven.resize(noise(*size)) for size in ((64, 48), (7, 300))]
        expected = cut_patches(copy_pixels(pictures, "cpu"), pictures)
        ours = cut_patches(copy_pixels(pictures, "cuda"), pictures).cpu()
        torch.testing.assert_close(ours, expected, rtol=0, atol=2 * 2**-24 / min(uneven.std) + 2**-22)

    def test_digest_tells_what_the_model_would_see(self):
        image, other = noise(64, 48), noise(64, 48)
        other.putpixel((40, 30), tuple(value ^ 1 for value in image.getpixel((40, 30))))
        grey = [Image.new("RGB", size, "grey") for size in ((64, 48), (48, 64), (8, 384))]
        small = SETTINGS.with_bounds(64, 1024)
        digests = [patches_of(SETTINGS, each)[2] for each in (image, other, *grey)] + [patches_of(small, image)[2]]
        assert len(set(digests)) == len(digests)
        assert patches_of(SETTINGS, image.copy())[2] == digests[0]
        # A file that is resized to the same pixels is the same picture.
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
    @settings(max_examples=300, deadline=None)
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
        saved = json.loads(oracle_for(SETTINGS).to_json_string())
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


class TestColours:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV"])
    def test_equal_to_transformers(self, mode):
        image = noise(23, 17, mode)
        np.testing.assert_array_equal(np.asarray(rgb(image)), np.asarray(load_image(image)))
        assert rgb(image).mode == "RGB"

    def test_files_of_every_kind(self, tmp_path):
        image = noise(23, 17)
        files = {
            "a.jpg": encoded(image, "JPEG"),
            "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
            "grey.jpg": encoded(image.convert("L"), "JPEG"),
            "a.png": encoded(image),
            "palette.png": encoded(image.convert("P"), transparency=3),
            "alpha.png": encoded(image.convert("RGBA")),
            "grey-alpha.png": encoded(image.convert("LA")),
            "bit.png": encoded(image.convert("1")),
            "a.webp": encoded(image, "WEBP", lossless=True),
            "a.bmp": encoded(image, "BMP"),
            "a.tiff": encoded(image, "TIFF"),
            "a.gif": encoded(image, "GIF"),
            "no-extension": encoded(image),
        }
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
            expected = np.asarray(load_image(str(tmp_path / name)))
            np.testing.assert_array_equal(np.asarray(rgb(tmp_path / name)), expected, err_msg=name)

    def test_alpha_is_dropped_not_blended(self):
        pixels = np.full((4, 4, 4), (200, 100, 50, 0), np.uint8)
        assert rgb(encoded(Image.fromarray(pixels))).getpixel((0, 0)) == (200, 100, 50)

    @pytest.mark.parametrize("format", [None, "PNG", "TIFF"])
    @pytest.mark.parametrize("mode", ["I;16", "I;16B"])
    def test_16_bit_grey_is_scaled(self, mode, format):
        # Pillow alone, and so transformers, clips at 255 and sees white.
        eight = np.arange(0, 256, dtype=np.uint16).reshape(16, 16)
        if mode == "I;16B" and format == "PNG":
            mode = "I;16"  # Pillow writes no PNG of I;16B; in the file the two are the same
        values = (eight * 257).astype(">u2" if mode == "I;16B" else "<u2")
        image = Image.frombytes(mode, (16, 16), values.tobytes())
        result = np.asarray(rgb(image if format is None else encoded(image, format)))
        np.testing.assert_array_equal(result, np.repeat(eight[:, :, None], 3, axis=2))

    def test_16_bit_pgm_is_scaled(self):
        values = np.array([0, 256, 30000, 65535])
        data = b"P5 2 2 65535\n" + values.astype(">u2").tobytes()
        np.testing.assert_array_equal(np.asarray(rgb(data))[:, :, 0].ravel(), np.rint(values / 257))

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_32_bit_of_8_bit_values_equals_transformers(self, mode):
        image = noise(9, 9, "L").convert(mode)
        np.testing.assert_array_equal(np.asarray(rgb(image)), np.asarray(load_image(image)))

    @pytest.mark.parametrize(
        "values", [np.array([[0, 256]], np.int32), np.array([[-1, 4]], np.int32), np.array([[0.0, 0.75]], np.float32)]
    )
    def test_32_bit_of_unknown_range_is_refused(self, values):
        with pytest.raises(PromptError, match=r"image 0 .*what is white there is not defined"):
            rgb(Image.fromarray(values))

    def test_first_frame_of_an_animation(self):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        for format in ("GIF", "WEBP", "PNG", "TIFF"):
            options = {"lossless": True} if format == "WEBP" else {}
            data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
            assert rgb(data).getpixel((4, 4)) == (255, 0, 0), format

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
    def test_exif_orientation(self, orientation, format):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(noise(20, 12), format, exif=exif)
        result = rgb(data)
        assert result.size == ((20, 12) if orientation < 5 else (12, 20))
        np.testing.assert_array_equal(np.asarray(result), np.asarray(load_image(Image.open(BytesIO(data)))))

    def test_exif_orientation_of_16_bit(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        values = (np.arange(12, dtype=np.uint16) * 257).reshape(3, 4)
        result = rgb(encoded(Image.fromarray(values), "PNG", exif=exif))
        np.testing.assert_array_equal(np.asarray(result)[:, :, 0], np.rot90(values // 257, -1))

    def test_callers_image_is_not_changed(self):
        image = noise(8, 8, "RGBA")
        before = image.tobytes()
        rgb(image)
        assert image.mode == "RGBA"
        assert image.tobytes() == before

    def test_one_lazy_image_in_many_threads(self):
        data = encoded(noise(300, 300))
        expected = np.asarray(rgb(data))
        for _ in range(5):
            image, results = Image.open(BytesIO(data)), []
            threads = [threading.Thread(target=lambda i=image, r=results: r.append(rgb(i))) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(results) == 8
            for result in results:
                np.testing.assert_array_equal(np.asarray(result), expected)


class TestSources:
    def test_every_spelling_gives_the_same_pixels(self, tmp_path):
        image = noise(31, 18)
        data = encoded(image)
        path = tmp_path / "an image.png"
        path.write_bytes(data)
        base = base64.b64encode(data).decode()
        wrapped = "\n".join(base[i : i + 76] for i in range(0, len(base), 76))
        percent = "".join(f"%{byte:02X}" for byte in data)
        sources = [
            path,
            str(path),
            path.as_uri(),
            f"file://localhost{path.as_uri()[7:]}",
            data,
            bytearray(data),
            memoryview(data),
            image,
            f"data:image/png;base64,{base}",
            f"DATA:image/png;charset=x;base64,{wrapped}",
            f"data:;base64,{base.replace('+', '%2B')}",
            f"data:image/png,{percent}",
        ]
        for source in sources:
            np.testing.assert_array_equal(np.asarray(rgb(source)), np.asarray(image), err_msg=describe(source))

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("no/such/file.png", "image 7 ('no/such/file.png'): there is no such file"),
            ("", "image 7 ('') is an empty string"),
            ("/", "image 7 ('/') is not a regular file"),
            ("/dev/zero", "is not a regular file"),
            ("x" * 5000, "image 7 ('" + "x" * 40 + "..." + "x" * 10 + "')"),
            ("a\0b.png", "image 7 ('a\\x00b.png')"),
            ("ftp://host/a.png", "has the scheme 'ftp'; file, http, https and data are supported"),
            ("s3://bucket/a.png", "has the scheme 's3'"),
            ("file://host/a.png", "names the host 'host'"),
            ("file:///no/such.png", "there is no such file"),
            ("data:image/png;base64", "has no comma"),
            ("data:image/png;base64,@@@@", "is not valid base64"),
            ("data:image/png;base64,", "is empty: 0 bytes"),
            (b"", "image 7 (0 bytes) is empty: 0 bytes"),
            (b"hello, this is text", "is not an image that Pillow can read: it begins with b'hello, this '"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image that Pillow can read"),
            (12, "image 7 (int) is of a type that is not understood"),
            (None, "image 7 (NoneType)"),
            (np.zeros((4, 4, 3), np.uint8), "PIL.Image.fromarray makes one of an array"),
            (Image.new("RGB", (0, 5)), "is 0x5 pixels: it has no area"),
        ],
    )
    def test_refused(self, source, message):
        with pytest.raises(PromptError) as caught:
            open_image(source, 7)
        text = str(caught.value)
        assert message in text
        assert text.startswith("image 7 (")
        assert "\n" not in text
        assert len(text) < 300

    def test_data_url_is_shortened(self):
        url = "data:image/png;base64," + base64.b64encode(b"x" * 10_000).decode()
        with pytest.raises(PromptError) as caught:
            open_image(url, 0)
        assert "data:image/png;base64,eHh4" in str(caught.value)
        assert len(str(caught.value)) < 200

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_truncated(self, tmp_path, format):
        data = encoded(noise(64, 64), format)
        path = tmp_path / "cut"
        for kept in (3, 20, len(data) // 2, len(data) * 9 // 10):
            path.write_bytes(data[:kept])
            with pytest.raises(PromptError, match=r"image 0 \('.*cut'\) (is not an|has a damaged|cannot be decoded)"):
                rgb(path)

    def test_closed_image(self):
        image = Image.open(BytesIO(encoded(noise(8, 8))))
        image.close()
        with pytest.raises(PromptError, match=r"image 0 .*cannot be decoded"):
            rgb(image)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [3, 10])  # Pillow itself only warns up to twice its limit
    def test_decompression_bomb(self, monkeypatch, side):
        data = encoded(Image.new("1", (side, side)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
        with pytest.raises(PromptError, match=r"image 0 .*more than 8 pixels, Pillow's limit"):
            open_image(data, 0)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert open_image(data, 0).image.size == (side, side)

    def test_file_size_limit(self, monkeypatch, tmp_path):
        data = encoded(noise(32, 32))
        path = tmp_path / "a.png"
        path.write_bytes(data)
        monkeypatch.setattr(image_source, "MAX_FILE_BYTES", len(data) - 1)
        for source in (data, path, "data:;base64," + base64.b64encode(data).decode()):
            with pytest.raises(PromptError, match="is larger than 0 MiB"):
                open_image(source, 0)


class Server(BaseHTTPRequestHandler):
    """Answers by path; /slow drips bytes for ever."""

    image = encoded(noise(31, 18))

    def do_GET(self):
        if self.path in ("/a.png", "/caf%C3%A9%20au%20lait.png?x=1"):
            self.reply(200, self.image)
        elif self.path == "/moved":
            self.reply(302, b"", Location="/a.png")
        elif self.path == "/to-file":
            self.reply(302, b"", Location="file:///etc/hostname")
        elif self.path == "/short":
            self.reply(200, self.image[:100], **{"Content-Length": str(len(self.image))})
        elif self.path == "/page":
            self.reply(200, b"<!DOCTYPE html><html></html>")
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            try:
                while not self.server.stopping.wait(0.02):
                    self.wfile.write(b"x")
            except OSError:
                pass  # the client hung up, as it should
        else:
            self.reply(404, b"nothing")

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.stopping = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.stopping.set()
        server.shutdown()


class TestDownload:
    @pytest.fixture(autouse=True)
    def _no_proxy(self, monkeypatch):
        monkeypatch.setenv("no_proxy", "127.0.0.1")

    @pytest.mark.parametrize("path", ["/a.png", "/moved", "/café au lait.png?x=1"])
    def test_image(self, server, path):
        np.testing.assert_array_equal(np.asarray(rgb(server + path)), np.asarray(rgb(Server.image)))

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("/gone.png", "cannot be downloaded: HTTP status 404 Not Found"),
            ("/to-file", "cannot be downloaded: HTTP status 302"),
            ("/short", "the server closed the connection"),
            ("/page", "is not an image that Pillow can read: it begins with b'<!DOCTYPE ht'"),
        ],
    )
    def test_refused(self, server, path, message):
        with pytest.raises(PromptError) as caught:
            open_image(server + path, 2)
        assert str(caught.value).startswith(f"image 2 ('{server}{path}')")
        assert message in str(caught.value)

    def test_slow_server(self, server, monkeypatch):
        monkeypatch.setattr(image_source, "DOWNLOAD_TIMEOUT_S", 0.3)
        with pytest.raises(PromptError, match=r"image 0 .*cannot be downloaded: not complete after 0\.3 seconds"):
            open_image(f"{server}/slow", 0)

    def test_size_limit(self, server, monkeypatch):
        monkeypatch.setattr(image_source, "MAX_FILE_BYTES", 50)
        with pytest.raises(PromptError, match="is larger than"):
            open_image(f"{server}/a.png", 0)

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http://127.0.0.1:port/a.png", "http://[::1/a.png"])
    def test_unreachable(self, url):
        with pytest.raises(PromptError, match=r"image 0 .*cannot be downloaded"):
            open_image(url, 0)

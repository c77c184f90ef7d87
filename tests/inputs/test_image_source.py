"""Files and PIL images to upright RGB: what becomes of their colours and of transparency, and what is not opened."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, features
from transformers.image_utils import load_image

from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs import image_source
from qwen3vl_moe.inputs.image_source import check_alpha, decode_rgb, decoded, open_image
from tests.pictures import encoded, noise, rgb


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
            "palette.png": encoded(image.convert("P")),
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
        "values",
        [
            *(np.array([pair], np.int32) for pair in ([0, 256], [-1, 4])),
            *(np.array([pair], np.float32) for pair in ([0, 0.75], [0, np.nan], [np.nan, 200], [9, np.inf])),
        ],
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


def see_through(mode: str) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A picture of ``mode`` with transparent, opaque and half transparent pixels; its colours and its alpha, 0 to 1."""
    colours, alpha = noise(24, 16), Image.new("L", (24, 16), 255)
    for column, value in enumerate((0, 1, 64, 128, 254)):
        alpha.paste(value, (4 * column, 0, 4 * column + 4, 16))
    base = {"L": "L", "P": "P", "R": "RGB"}[mode[0]]
    image = colours.convert(base)
    shown = np.asarray(image.convert("RGB")).astype(float)
    if mode == "PA":
        image = image.convert("PA")
    if mode in ("PA", "LA", "RGBA"):
        image.putalpha(alpha)
    elif mode in ("La", "RGBa"):
        whole = "LA" if mode == "La" else "RGBA"
        image.putalpha(alpha)
        image = image.convert(whole).convert(mode)
    assert image.mode == mode
    return image, shown, np.asarray(alpha)[:, :, None] / 255


class TestTransparency:
    """White under what is transparent, as qwen-vl-utils and vLLM have it; or the stored colours, as transformers."""

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
    def test_channel(self, mode):
        image, colours, alpha = see_through(mode)
        # Premultiplied colours are stored in fewer steps: 255 / alpha of them where little is seen, which then weighs
        # as little.
        np.testing.assert_allclose(
            np.asarray(rgb(image)), 255 * (1 - alpha) + colours * alpha, atol=1.6 if mode[-1] == "a" else 1
        )
        if mode[-1] == "A":
            stored = np.asarray(decode_rgb(open_image(image, 0), "drop"))
            np.testing.assert_array_equal(stored, np.asarray(load_image(image)))

    def test_equal_to_qwen_vl_utils(self):
        image, _, _ = see_through("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.split()[3])
        np.testing.assert_array_equal(np.asarray(rgb(image)), np.asarray(white))

    @pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "JPEG2000", "AVIF"])
    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_file(self, form, mode):
        if form == "AVIF" and not features.check("avif"):
            pytest.skip("this Pillow has no AVIF")
        image = Image.new(mode, (8, 8), (0,) * len(mode))
        image.paste((90,) * (len(mode) - 1) + (255,), (4, 0, 8, 8))
        options = {"lossless": True} if form == "WEBP" else {"irreversible": False} if form == "JPEG2000" else {}
        data = encoded(image, form, **options)
        assert rgb(data).getpixel((0, 0)) == (255, 255, 255)
        assert rgb(data).getpixel((7, 7)) == pytest.approx((90, 90, 90), abs=2)
        assert decode_rgb(open_image(data, 0), "drop").getpixel((0, 0)) == pytest.approx((0, 0, 0), abs=2)

    @pytest.mark.parametrize(
        ("mode", "form", "dark", "light", "key"),
        [
            ("1", "PNG", 0, 255, 0),
            ("L", "PNG", 0, 90, 0),
            ("L", None, 0, 90, 0),
            ("P", "PNG", 0, 1, 0),
            ("P", "PNG", 0, 1, b"\0\xff"),
            ("P", "GIF", 0, 1, 0),
            ("RGB", "PNG", (0, 0, 0), (0, 0, 90), (0, 0, 0)),
            ("RGB", None, (0, 0, 0), (0, 0, 90), (0, 0, 0)),
            ("I;16", "PNG", 0, 90 * 257, 0),
            ("I;16", None, 0, 90 * 257, 0),
        ],
    )
    def test_colour_that_stands_for_transparent(self, mode, form, dark, light, key):
        image = Image.new(mode, (8, 8), dark)
        if mode == "P":
            image.putpalette([0, 0, 0, 90, 90, 90])
        image.paste(light, (4, 0, 8, 8))
        image.info["transparency"] = key
        source = encoded(image, form, transparency=key) if form else image
        assert rgb(source).getpixel((0, 0)) == (255, 255, 255)
        right = {"1": (255,) * 3, "RGB": (0, 0, 90)}.get(mode, (90,) * 3)
        assert rgb(source).getpixel((7, 7)) == right
        stored = decode_rgb(open_image(source, 0), "drop")
        assert (stored.getpixel((0, 0)), stored.getpixel((7, 7))) == ((0, 0, 0), right)

    def test_turned_with_its_picture(self):
        image, _, _ = see_through("RGBA")
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = rgb(encoded(image, "PNG", exif=exif))
        np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(rgb(image)), -1))

    @pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX", "F"])
    def test_nothing_is_made_up(self, mode):
        image = Image.new(mode, (2, 2))
        image.info["transparency"] = 0  # means nothing in these modes
        np.testing.assert_array_equal(np.asarray(rgb(image)), np.asarray(image.convert("RGB")))

    def test_unknown_option(self):
        assert [check_alpha(name) for name in ("white", "drop")] == ["white", "drop"]
        with pytest.raises(OptionError, match="alpha is 'black'; known are white, drop"):
            check_alpha("black")


class TestReading:
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
    def test_as_many_pixels_as_transformers_takes(self, monkeypatch):
        assert open_image(png_header(13_000, 13_000), 0).size_text == "13000x13000"  # where Pillow warns
        with pytest.raises(PromptError, match=r"image 0 .*the limit is 178956970 pixels, 0.7 GB of memory: shrink it"):
            open_image(png_header(14_000, 14_000), 0)  # where Pillow raises
        # A limit of this package: whoever lifts Pillow's does not lift it.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        with pytest.raises(PromptError, match=r"image 0 .* is 14000x14000 pixels; the limit is 178956970 pixels"):
            open_image(png_header(14_000, 14_000), 0)

    @pytest.mark.parametrize(
        ("data", "kind"),
        [
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "a PostScript or EPS file"),
            (
                b"\xc5\xd0\xd3\xc6" + bytes(28) + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                "a PostScript or EPS",
            ),
            (
                b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 9, 9, 72) + bytes(6) + b"\1\0\t\0" + bytes(14),
                "a WMF",
            ),
            (b"\1\0\0\0" + struct.pack("<9I", 108, *(9,) * 8) + b" EMF" + bytes(64), "an EMF drawing"),
            (b"SIMPLE  =                    T" + b" " * 50 + b"END".ljust(2800), "a FITS file"),
            (encoded(Image.new("RGB", (9, 9)), "ICO"), "an icon"),
            (encoded(Image.new("RGB", (9, 9)), "TGA"), None),
            (encoded(Image.new("RGB", (9, 9)), "PCX"), None),
            (encoded(Image.new("RGB", (9, 9)), "SGI"), None),
            (b"<!DOCTYPE HTML><p>secret", "an HTML page"),
            (b" \n<svg xmlns='http://www.w3.org/2000/svg'/>secret", "an SVG drawing"),
            (b'{"secret": 1}', "JSON or other text"),
            (b"%PDF-1.7 secret", "a PDF"),
            (b"\0\0\0\x18ftypheic\0\0\0\0secret", "a HEIC picture; it needs the package pillow-heif"),
            (b"\0\0\0\x18ftypisom\0\0\0\0secret", "a video"),
            (b"version https://git-lfs.github.com/spec/v1\noid secret", "a pointer of Git LFS"),
            (b"secret", None),
        ],
    )
    def test_other_kinds_reach_no_reader_and_no_message(self, monkeypatch, data, kind):
        Image.init()
        for name in Image.OPEN.keys() - set(image_source.readable_formats()):
            monkeypatch.setitem(Image.OPEN, name, (lambda *_, n=name: pytest.fail(f"{n} was tried"), None))
        with pytest.raises(PromptError, match="is not an image that can be read") as caught:
            open_image(data, 0)
        assert (f"it begins like {kind}" if kind else "; JPEG, PNG, WEBP") in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_a_reader_of_heic_is_used_once_it_is_registered(self, monkeypatch):
        Image.init()
        monkeypatch.setitem(Image.OPEN, "HEIF", (lambda *_: noise(7, 5), lambda start: start[8:12] == b"heic"))
        assert open_image(b"\0\0\0\x18ftypheic\0\0\0\0", 0).size_text == "7x5"

    @pytest.mark.parametrize(
        "error", [SyntaxError("chunk b'secret'"), ValueError("secret"), KeyError("secret"), OSError("truncated secret")]
    )
    def test_words_of_pillow_stay_out(self, monkeypatch, error):
        opened = open_image(encoded(noise(8, 8)), 0)
        monkeypatch.setattr(Image.Image, "getexif", lambda _: raise_(error))
        with pytest.raises(PromptError, match=r"cannot be decoded: the file (is damaged \(|ends early)") as caught:
            decode_rgb(opened)
        assert "secret" not in str(caught.value)

    def test_pixels_are_let_go(self):
        data = encoded(noise(40, 30))
        opened, mine = open_image(data, 0), open_image(noise(40, 30), 1)
        with decoded(opened) as image, decoded(mine) as same:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(same))
        with pytest.raises(ValueError, match="closed"):
            opened.image.load()
        assert mine.image.getpixel((0, 0))

    def test_pixels_are_bounded_together(self, monkeypatch):
        """Eight threads that decode at once: never more than the budget, and a picture above it comes through alone."""
        monkeypatch.setattr(image_source, "DECODING", image_source.Budget(3 * 12 * 40 * 30))
        held, most, lock = [], [], threading.Lock()

        def work(number):
            width = 400 if number == 3 else 40
            with decoded(open_image(noise(width, 30), number)) as image:
                with lock:
                    held.append(image.width)
                    most.append(list(held))
                time.sleep(0.02)  # in which all the others would come
                if number == 4:
                    raise RuntimeError  # a thread that fails gives its part back
                with lock:
                    held.remove(image.width)

        threads = [threading.Thread(target=quietly, args=(work, n), daemon=True) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert len(most) == 8
        assert all(len(together) <= 4 for together in most)  # the one that failed still stands in the list
        assert all(400 not in together or len(together) <= 2 for together in most)  # as there


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels would begin."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0)) + chunk(b"IDAT", b"")
    )


def raise_(error: Exception):
    raise error


def quietly(work, number):
    with contextlib.suppress(RuntimeError):
        work(number)

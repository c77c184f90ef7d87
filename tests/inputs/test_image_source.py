"""Where images come from and what becomes of their colours: files, URLs, bytes and PIL images to upright RGB."""

from __future__ import annotations

import base64
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs import image_source
from qwen3vl_moe.inputs.image_source import describe, open_image
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
        # On a busy machine the first byte may be late too: then it is the socket's own timeout.
        reason = r"(not complete after 0\.3 seconds|timed out)"
        with pytest.raises(PromptError, match=rf"image 0 .*cannot be downloaded: {reason}"):
            open_image(f"{server}/slow", 0)

    def test_size_limit(self, server, monkeypatch):
        monkeypatch.setattr(image_source, "MAX_FILE_BYTES", 50)
        with pytest.raises(PromptError, match="is larger than"):
            open_image(f"{server}/a.png", 0)

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http://127.0.0.1:port/a.png", "http://[::1/a.png"])
    def test_unreachable(self, url):
        with pytest.raises(PromptError, match=r"image 0 .*cannot be downloaded"):
            open_image(url, 0)

"""Bytes of image files."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

from PIL import Image, features

from tests.hostile.mutations import RAW_TEXTS, file_mutations


def _saved(image: Image.Image, form: str, **options) -> bytes:
    out = BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Noise, so that no encoder finds it simple; the same every time."""
    rng = random.Random(1)
    channels = [Image.frombytes("L", size, rng.randbytes(size[0] * size[1])) for _ in range(4)]
    return Image.merge("RGBA", channels).convert(mode)


def originals() -> dict[str, bytes]:
    """A sound file of every kind."""
    rgb = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "PNG": _saved(rgb, "PNG"),
        "PNG with alpha": _saved(picture("RGBA"), "PNG"),
        "PNG with a palette": _saved(picture("P"), "PNG", transparency=3),
        "PNG of 16 bits": _saved(picture("L").convert("I").point(lambda v: v * 257).convert("I;16"), "PNG"),
        "JPEG": _saved(rgb, "JPEG", exif=exif),
        "JPEG, progressive": _saved(rgb, "JPEG", progressive=True),
        "JPEG of four channels": _saved(picture("CMYK"), "JPEG"),
        "GIF": _saved(picture("P"), "GIF", save_all=True, append_images=[picture("P")]),
        "TIFF": _saved(rgb, "TIFF"),
        "TIFF, packed": _saved(rgb, "TIFF", compression="tiff_deflate"),
        "BMP": _saved(rgb, "BMP"),
        "WebP": _saved(picture("RGBA"), "WEBP"),
        "EPS": _saved(rgb, "EPS"),
        "PDF": _saved(rgb, "PDF"),
        "ICO": _saved(rgb, "ICO"),
        "TGA": _saved(rgb, "TGA"),
        "PPM": _saved(rgb, "PPM"),
        "DDS": _saved(rgb, "DDS"),
        "ICNS": _saved(rgb.resize((32, 32)), "ICNS"),
        "PCX": _saved(rgb, "PCX"),
        "SGI": _saved(rgb, "SGI"),
        "IM": _saved(rgb, "IM"),
    }
    if features.check("jpg_2000"):
        files["JPEG 2000"] = _saved(rgb, "JPEG2000")
    if features.check("avif"):
        files["AVIF"] = _saved(rgb, "AVIF")
    return files


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", *extra: bytes, depth: int = 8, colours: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_exif(exif: bytes) -> bytes:
    return _saved(picture(), "JPEG", exif=b"Exif\x00\x00" + exif)


def orientation(value: bytes, kind: int = 3, count: int = 1) -> bytes:
    return b"II*\x00\x08\x00\x00\x00\x01\x00" + struct.pack("<HHI", 0x112, kind, count) + value + b"\x00" * 4


def crafted() -> Iterator[tuple[str, bytes]]:
    """Files that no accident makes."""
    zeros = zlib.compress(bytes(10_000_000), 9)
    for width, height in (
        (0, 0),
        (0, 9),
        (9, 0),
        (1, 2**31 - 1),
        (2**31 - 1, 2**31 - 1),
        (2**32 - 1, 1),
        (60000, 60000),
    ):
        yield f"PNG of {width}x{height}", png(width, height, zlib.compress(b"\x00"))
    yield "PNG of 16000x10000 with few bytes", png(16000, 10000, zeros)
    yield "PNG of 1x100000", png(1, 100_000, zeros)
    yield "PNG of 100000x1", png(100_000, 1, zeros)
    for depth, colours in ((0, 2), (3, 2), (16, 3), (8, 7), (255, 255)):
        yield f"PNG of depth {depth}, colours {colours}", png(9, 9, zeros, depth=depth, colours=colours)
    text = chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(70_000_000), 9))
    yield "PNG with a text of 70 MB", png(9, 9, zeros, text)
    yield (
        "PNG with a profile of 70 MB",
        png(9, 9, zeros, chunk(b"iCCP", b"a\x00\x00" + zlib.compress(bytes(70_000_000), 9))),
    )
    yield "PNG with 50000 texts", png(9, 9, zeros, *[chunk(b"tEXt", b"k%d\x00v" % n) for n in range(50_000)])
    yield "PNG without pixels", png(9, 9, b"")
    yield "PNG of no palette", png(9, 9, zeros, colours=3)
    yield "PNG with a short palette", png(9, 9, zlib.compress(b"\xff" * 90), chunk(b"PLTE", b"abc"), colours=3)
    yield "PNG with a long tRNS", png(9, 9, zeros, chunk(b"tRNS", b"a" * 999), colours=2)
    yield "PNG animated, no frames", png(9, 9, zeros, chunk(b"acTL", struct.pack(">II", 0, 0)))
    yield "PNG animated, many frames", png(9, 9, zeros, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)))
    yield (
        "GIF of 65535x65535",
        b"GIF89a\xff\xff\xff\xff\x80\x00\x00"
        + b"\x00" * 6
        + b","
        + b"\x00" * 4
        + b"\xff" * 4
        + b"\x00\x02\x01\x00\x00;",
    )
    yield "GIF of 0x0", b"GIF89a\x00\x00\x00\x00\x00\x00\x00,\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00;"
    yield "BMP of 0x0", b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0)
    yield (
        "BMP upside down",
        b"BM" + struct.pack("<III", 66, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    )
    yield (
        "BMP with runs",
        b"BM"
        + struct.pack("<III", 66, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 9999, 9999, 1, 8, 1, 0, 0, 0, 0, 0)
        + bytes(99),
    )
    yield "TIFF whose directory is its own next", b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00"
    tags = (
        (256, 4, 2**31 - 1),
        (257, 4, 2**31 - 1),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (278, 4, 1),
        (279, 4, 1),
    )
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    yield "TIFF of 2**31 a side", b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(tags)) + entries + bytes(4)
    entries = b"".join(struct.pack("<HHII", tag, kind, 2**31 - 1, value) for tag, kind, value in tags)
    yield "TIFF with endless tags", b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(tags)) + entries + bytes(4)
    for value in (0, 9, 255, 65535):
        yield f"orientation {value}", with_exif(orientation(struct.pack("<HH", value, 0)))
    yield "orientation as a text", with_exif(orientation(b"six\x00", kind=2, count=4))
    yield "orientation as a fraction", with_exif(orientation(struct.pack("<I", 26), kind=5))
    yield "orientation of no type", with_exif(orientation(b"\x06\x00\x00\x00", kind=99))
    yield "orientation four thousand million times", with_exif(orientation(b"\x06\x00\x00\x00", count=2**32 - 1))
    for exif in (
        b"",
        b"II",
        b"II*\x00\xff\xff\xff\xff",
        b"XX*\x00\x08\x00\x00\x00",
        b"II*\x00\x08\x00\x00\x00\xff\xff",
        bytes(200),
    ):
        yield f"EXIF {exif[:12].hex()}", with_exif(exif)
    jpeg = _saved(picture(), "JPEG")
    for width, height in ((0, 24), (24, 0), (65535, 65535), (65500, 1400)):
        at = jpeg.index(b"\xff\xc0") + 5
        yield f"JPEG of {width}x{height}", jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]
    yield "JPEG with a megabyte of filling", jpeg[:2] + b"\xff" * 1_000_000 + jpeg[2:]
    yield "JPEG with a thousand comments", jpeg[:2] + (b"\xff\xfe\xff\xff" + bytes(65533)) * 1000 + jpeg[2:]
    yield "JPEG with a profile of rubbish", _saved(picture(), "JPEG", icc_profile=b"rubbish" * 99)
    yield "JPEG 2000 of nothing", b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(40)
    yield "JPEG 2000 in boxes without end", b"\x00\x00\x00\x0cjP  \r\n\x87\n" + struct.pack(">I4s", 0, b"jp2h") * 99
    for brand in (b"avif", b"avis", b"heic", b"mif1", b"hevc", b"crx "):
        yield f"a box of {brand.decode()}", struct.pack(">I4s4sI4s", 20, b"ftyp", brand, 0, brand) + bytes(200)
    yield "WebP of nothing", b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(40)
    yield "WebP of 16383x16383", b"RIFF\x1e\x00\x00\x00WEBPVP8L\x11\x00\x00\x00/\xfe\xff\xff\x0f" + bytes(16)
    yield (
        "EPS that runs a program",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%true) (r) file\nshowpage\n%%EOF\n",
    )
    yield (
        "EPS with a preview",
        b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, 99, 0, 0, 0, 0, 65535) + b"%!PS" + bytes(99),
    )
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "XPM", b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n". c #000000",\n"."};\n'
    yield "WMF", b"\xd7\xcd\xc6\x9a" + bytes(99)
    yield "FITS", b"SIMPLE  =                    T" + b" " * 2850
    yield "MPEG", b"\x00\x00\x01\xb3" + bytes(99)
    yield "PSD", b"8BPS\x00\x01" + bytes(99)
    yield "FLI", struct.pack("<IHHHHHH", 128, 0xAF12, 65535, 9, 9, 8, 3) + bytes(110)
    yield "ZIP", b"PK\x03\x04" + bytes(99)
    yield "ELF", b"\x7fELF" + bytes(99)
    yield "one byte", b"\x89"


def cases() -> Iterator[tuple[str, bytes]]:
    """Names and files."""
    rng = random.Random(2)
    for name, data in originals().items():
        yield name, data
        common = name.split(",")[0].split(" with")[0] in (
            "PNG",
            "JPEG",
            "WebP",
            "GIF",
            "TIFF",
            "JPEG 2000",
            "AVIF",
            "BMP",
        )
        for change, damaged in file_mutations(data, rng, 8 if common else 3, 20 if common else 5):
            yield f"{name}: {change}", damaged
    yield from crafted()
    for name, text in RAW_TEXTS.items():
        yield f"raw: {name}", text

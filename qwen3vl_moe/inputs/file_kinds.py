"""What a file is, by its first bytes: which kinds are read as images or videos, and how to call others in messages."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

# What Pillow may try, and no more: among its other readers is one that starts Ghostscript, and others are hardly
# tested. HEIF is there once pillow_heif.register_heif_opener() was called.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF", "PPM")

# First bytes -> name. A point stands for any byte; small letters, among the others, for large ones too.
_PICTURES = (
    (b"\xff\xd8\xff", "a JPEG"),
    (b"\x89PNG\r\n\x1a\n", "a PNG"),
    (b"RIFF....WEBP", "a WebP picture"),
    (b"GIF87a", "a GIF"),
    (b"GIF89a", "a GIF"),
    (b"BM......\0\0", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"II+\0", "a TIFF"),
    (b"MM\0+", "a TIFF"),
    (b"\0\0\0\x0cjP  \r\n", "a JPEG 2000"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000"),
    (b"....ftypavi", "an AVIF picture; it needs Pillow 11.3 or newer"),
    *(
        (b"....ftyp" + brand, "a HEIC picture; it needs the package pillow-heif and pillow_heif.register_heif_opener()")
        for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    ),
)
_OTHERS = (
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<head", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML or SVG file"),
    (b"{", "JSON or other text"),
    (b"%pdf", "a PDF"),
    (b"%!", "a PostScript or EPS file"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript or EPS file"),
    (b"\xd7\xcd\xc6\x9a", "a WMF drawing"),
    (b"\x01\0\0\0" + b"." * 36 + b" emf", "an EMF drawing"),
    (b"simple  =", "a FITS file"),
    (b"8bps", "a Photoshop file"),
    (b"\0\0\x01\0", "an icon"),
    (b"....ftyp", "a video"),
    (b"\x1aE\xdf\xa3", "a video"),
    (b"riff....avi ", "a video"),
    (b"flv\x01", "a video"),
    (b"riff....wave", "a sound file"),
    (b"id3", "a sound file"),
    (b"oggs", "a sound file"),
    (b"pk\x03\x04", "a ZIP archive or an Office document"),
    (b"\x1f\x8b", "a gzip file"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"\x93numpy", "a NumPy array"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file that it stands for"),
)
# What FFmpeg may read, by its names for containers: none of them names other files, as playlists do.
_CONTAINERS = (
    (b"....ftyp", "mov"),
    (b"....moov", "mov"),
    (b"....mdat", "mov"),
    (b"....wide", "mov"),
    (b"....free", "mov"),
    (b"....skip", "mov"),
    (b"\x1aE\xdf\xa3", "matroska"),
    (b"RIFF....AVI ", "avi"),
    (b"FLV\x01", "flv"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"G" + b"." * 187 + b"G", "mpegts"),
)

_MOST_BOXES = 2**17  # of a file that are looked at, which anybody may have written


def readable_formats() -> list[str]:
    """Those of :data:`FORMATS` that this Pillow has."""
    Image.init()  # all of Pillow's readers make themselves known; done once
    return [name for name in FORMATS if name in Image.OPEN]


def is_picture(data: bytes) -> bool:
    """Whether a file of one of :data:`FORMATS` begins so (but for PPM, which looks like text)."""
    return any(_begins(data, start) for start, _ in _PICTURES)


def container_of(data: bytes) -> str | None:
    """FFmpeg's name for the container of a video that begins so (200 bytes tell); None: it is none that is read."""
    if any(_begins(data, start) for start, name in _PICTURES if name != "a GIF"):
        return None  # HEIC and AVIF begin like a film
    return next((name for start, name in _CONTAINERS if _begins(data, start)), None)


def missing_bytes(at: Callable[[int, int], bytes], size: int, container: str) -> int:
    """How many bytes a video of ``size`` bytes lacks at its end, as far as its container tells; at least 0.

    Args:
        at: gives so many bytes from a place on.
        container: of :func:`container_of`.
    """
    if container == "mov":  # a chain of boxes, each with its length
        place = 0
        for _ in range(_MOST_BOXES):
            if place + 8 > size:
                break
            box = at(place, 16)
            length = int.from_bytes(box[:4], "big")
            if length == 1:
                length = int.from_bytes(box[8:16], "big")
            if length < 8:  # 0: to the end of the file
                return 0
            place += length
        return max(0, place - size)
    if container == "avi":
        return max(0, 8 + int.from_bytes(at(4, 4), "little") - size)
    if container == "matroska":  # a header, and the segment that holds everything
        start, length = _ebml(at(4, 8), 4)
        header = at(start + length, 12)
        if header[:4] != b"\x18\x53\x80\x67":
            return 0
        begin, length = _ebml(header[4:], start + length + 4)
        return 0 if length < 0 else max(0, begin + length - size)
    return 0


def _ebml(data: bytes, place: int) -> tuple[int, int]:
    """Where the content of an element begins whose length stands at ``place``, and that length; -1: not known."""
    if not data or not data[0]:
        return place, -1
    width = 9 - data[0].bit_length()
    value = int.from_bytes(data[:width], "big") & ((1 << 7 * width) - 1)
    return place + width, -1 if value == (1 << 7 * width) - 1 else value


def kind_of(data: bytes) -> str | None:
    """What ``data`` looks like, for a message, which must not carry the data itself; None: it does not tell."""
    for start, name in _PICTURES:
        if _begins(data, start):
            return name
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((name for start, name in _OTHERS if _begins(data, start) or _begins(text, start)), None)


def _begins(data: bytes, start: bytes) -> bool:
    return len(data) >= len(start) and all(want in (ord("."), byte) for byte, want in zip(data, start, strict=False))

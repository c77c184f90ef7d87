"""What a file is, by its first bytes: which kinds are read as images, and what to call the others in a message."""

from __future__ import annotations

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
    (b"riff....wave", "a sound file"),
    (b"id3", "a sound file"),
    (b"oggs", "a sound file"),
    (b"pk\x03\x04", "a ZIP archive or an Office document"),
    (b"\x1f\x8b", "a gzip file"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"\x93numpy", "a NumPy array"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file that it stands for"),
)


def readable_formats() -> list[str]:
    """Those of :data:`FORMATS` that this Pillow has."""
    Image.init()  # all of Pillow's readers make themselves known; done once
    return [name for name in FORMATS if name in Image.OPEN]


def is_picture(data: bytes) -> bool:
    """Whether a file of one of :data:`FORMATS` begins so (but for PPM, which looks like text)."""
    return any(_begins(data, start) for start, _ in _PICTURES)


def kind_of(data: bytes) -> str | None:
    """What ``data`` looks like, for a message, which must not carry the data itself; None: it does not tell."""
    for start, name in _PICTURES:
        if _begins(data, start):
            return name
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((name for start, name in _OTHERS if _begins(data, start) or _begins(text, start)), None)


def _begins(data: bytes, start: bytes) -> bool:
    return len(data) >= len(start) and all(want in (ord("."), byte) for byte, want in zip(data, start, strict=False))

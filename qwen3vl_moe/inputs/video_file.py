"""A video file -> its frames, by PyAV (FFmpeg): counted and dated without decoding, then only those decoded that are
wanted.

Reading goes over the packets once, which tells how many frames there are, when each is shown, and from which packets
decoding can begin (key frames). The wanted frames are then decoded side by side, in one group for each key frame that
is needed: a group begins at its key frame and ends with the last frame that is wanted of it.

FFmpeg gets bytes and the name of a container, never a path or a URL: left to itself it would follow what playlists and
references within files name.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from qwen3vl_moe.errors import OptionError, PromptError, UserError, one_line
from qwen3vl_moe.inputs.file_kinds import container_of, kind_of, missing_bytes
from qwen3vl_moe.inputs.image_source import DECODING
from qwen3vl_moe.inputs.workers import POOL, side_by_side

MAX_FRAME_PIXELS = 2**26  # of one frame: 8192 x 8192
MAX_FRAMES = 2**22  # of a file: 38 hours at 30 a second; their times are kept in memory
_BATCH = 8  # frames of a group that are converted side by side
_BYTES_PER_PIXEL = 8 * _BATCH  # that a group holds: frames as decoded, some of them as RGB
_HASH_BYTES = 2**22  # that are read at a time for a digest
_READ_BYTES = 2**18  # that FFmpeg asks for at a time
_THREADS = 8  # most of FFmpeg's own, for one group


class Bytes:
    """The bytes of a file that several readers share: in memory, or on disk, where they are not read as a whole.

    An open file is closed for whoever opened it; this has a handle of its own, for as long as it is there.
    """

    def __init__(self, data: bytes | BinaryIO):
        if isinstance(data, bytes):
            self._data, self.size = data, len(data)
        else:
            with data:
                self._data = os.dup(data.fileno())
            weakref.finalize(self, os.close, self._data)
            self.size = os.fstat(self._data).st_size

    def at(self, place: int, count: int) -> bytes:
        """At most ``count`` bytes from ``place`` on. What is written behind the end meanwhile is not read."""
        count = max(0, min(count, self.size - place))
        if isinstance(self._data, bytes):
            return self._data[place : place + count]
        return os.pread(self._data, count, place)

    def digest(self) -> bytes:
        """SHA-256 of all of them."""
        digest = hashlib.sha256()
        for place in range(0, self.size, _HASH_BYTES):
            digest.update(self.at(place, _HASH_BYTES))
        return digest.digest()


class _Reader:
    """What PyAV takes for an open file."""

    def __init__(self, source: Bytes):
        self._source, self._place = source, 0

    def read(self, count: int) -> bytes:
        data = self._source.at(self._place, count)
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._source.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place


@dataclass(frozen=True, eq=False)
class VideoFile:
    """A video whose packets were counted.

    Attributes:
        where: what messages call it.
        total: frames in it, at least 1.
        fps: their number in a second, on average.
        height, width: of a frame in pixels, as it is shown.
        times: int64 [total], when each is shown, ascending, in units of the stream's own clock.
        keys: int64 [keys]: when each key frame is shown, ascending. Empty: the file does not tell enough. Then it is
            decoded from its start, and times are the frames' numbers.
    """

    where: str
    source: Bytes
    container: str
    total: int
    fps: float
    height: int
    width: int
    times: np.ndarray
    keys: np.ndarray
    alpha: str

    def digest(self, indices: Sequence[int]) -> bytes:
        """Of all that the pixels of some frames depend on."""
        return hashlib.sha256(repr((self._digest, self.alpha, list(indices))).encode()).digest()

    @cached_property
    def _digest(self) -> bytes:
        return self.source.digest()

    def read(
        self,
        indices: Sequence[int],
        take: Callable[[int, np.ndarray], None],
        goes_on: Callable[[], bool] = lambda: True,
        parts: int = 1,
    ) -> None:
        """Decode some frames, and call ``take(place in indices, frame)`` for each, in threads and in any order.

        Args:
            indices: ascending numbers below ``total``.
            take: gets an upright RGB frame, uint8 [height, width, 3].
            goes_on: asked after every frame; once it says no, none is decoded any more.
            parts: how many of them are waited for one after the other. Threads then work on the groups of one part,
                several on each, so that the first frames are there first.

        Raises:
            PromptError: a frame is damaged, or missing.
        """
        groups, failed = self._groups(np.asarray(indices)), False
        abreast = len(groups) if parts == 1 else max(-(-len(groups) // parts), -(-POOL.size // _THREADS))
        threads = min(_THREADS, max(1, POOL.size // min(abreast, len(groups))))

        def wanted_still() -> bool:
            return not failed and goes_on()

        def work(group: tuple[list[int | None], dict[int, int]]) -> None:
            nonlocal failed
            places, wanted = group
            try:
                with DECODING.hold(self.height * self.width * _BYTES_PER_PIXEL):
                    done = any(self._read_group(place, wanted, threads, take, wanted_still) for place in places)
                if not done and wanted_still():
                    raise PromptError(f"{self.where}: some of its {self.total} frames cannot be decoded: {_ENDS}")
            except BaseException:
                failed = True
                raise

        side_by_side(work, groups, None if parts == 1 else abreast)

    def _groups(self, indices: np.ndarray) -> list[tuple[list[int | None], dict[int, int]]]:
        """For each key frame that is needed: what to seek for, and by its time each wanted frame's place.

        A container may find a place that is too late for the key frame: then the one before is tried, then the start.
        """
        of_key: dict[int, dict[int, int]] = {}
        for place, index in enumerate(indices):
            time = int(self.times[index])
            number = int(np.searchsorted(self.keys, time, side="right")) - 1
            of_key.setdefault(max(number, 0), {})[time] = place
        groups = []
        for number, wanted in of_key.items():
            before = [int(self.keys[key]) for key in (number, number - 1) if key > 0]
            groups.append(([*before, None], wanted))
        return groups

    def _read_group(
        self,
        seek: int | None,
        wanted: dict[int, int],
        threads: int,
        take: Callable[[int, np.ndarray], None],
        goes_on: Callable[[], bool],
    ) -> bool:
        """Decode from a place on until the last wanted frame; False if one of them was passed over."""
        if not goes_on():
            return False
        left, last = dict(wanted), max(wanted)
        batch: list[tuple[int, Any]] = []

        def convert(pair: tuple[int, Any]) -> None:
            take(pair[0], _upright_rgb(pair[1], self.where, self.alpha))

        with _reading(self.source, self.container, self.where) as container:
            stream = _video_stream(container, self.where)
            if seek is not None:
                container.seek(seek, stream=stream, backward=True)
            for number, (time, frame) in enumerate(_frames(container, stream, self.where, threads)):
                time = time if len(self.keys) else number
                if time in left:
                    if frame.is_corrupt:
                        raise PromptError(f"{self.where}: one of its {self.total} frames cannot be decoded: {_ENDS}")
                    batch.append((left.pop(time), frame))
                    if len(batch) == _BATCH:
                        side_by_side(convert, batch)
                        batch = []
                if not left or (time is not None and time > last) or not goes_on():
                    break
            side_by_side(convert, batch)
        return not left


_ENDS = "the file is damaged, or ends early"


def open_video_file(data: bytes | BinaryIO, where: str, alpha: str = "white") -> VideoFile:
    """Count the frames of a video, and decode the first one.

    Args:
        data: the file: its bytes, or opened for reading.
        where: what messages call it.
        alpha: see :func:`.image_source.decode_rgb`.

    Raises:
        PromptError: it is no video that can be read, has no frame, is damaged, or ends early.
        OptionError: PyAV is not installed.
    """
    source = Bytes(data)
    if source.size == 0:
        raise PromptError(f"{where} is empty: 0 bytes")
    head = source.at(0, 4096)
    container_name = container_of(head)
    if container_name is None:
        kind = kind_of(head)
        raise PromptError(
            f"{where} is not a video that can be read"
            + (f": it begins like {kind}" if kind else "; MP4, MOV, MKV, WebM, AVI, MPEG-TS, FLV and GIF are")
        )
    if missing := missing_bytes(source.at, source.size, container_name):
        raise PromptError(f"{where} ends early: {missing} of its bytes are missing")
    with _reading(source, container_name, where) as container:
        stream = _video_stream(container, where)
        times, keys = _index(container, stream, where)
        rate, unit = stream.average_rate, stream.time_base
    if not times.size:
        raise PromptError(f"{where} has no frames")
    with _reading(source, container_name, where) as container:
        first = next(_frames(container, _video_stream(container, where), where, 1), None)
        if first is None:
            raise PromptError(f"{where} has no frame that can be decoded: {_ENDS}")
        height, width = first[1].height, first[1].width
        if _turns(first[1], where) % 2:
            height, width = width, height
    if rate is None and unit is not None and len(keys) and times.size > 1:
        rate = (times.size - 1) / max(float((times[-1] - times[0]) * unit), 1e-6)
    fps = float(rate or 0)
    if not 1e-6 < fps < 1e6:
        raise PromptError(f"{where} does not tell how many frames a second it has; give its frames as a list, with fps")
    return VideoFile(where, source, container_name, times.size, fps, height, width, times, keys, alpha)


def _pyav(where: str) -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise OptionError(f"{where} needs PyAV: pip install 'qwen3vl-moe[video]', or give frames as images") from None


@contextmanager
def _reading(source: Bytes, container: str, where: str) -> Iterator[Any]:
    """An open container of PyAV; whatever FFmpeg says of it becomes a line of ours."""
    av = _pyav(where)
    # Text that is no UTF-8 shall not stop a video. Release 19 escapes it by itself, and has no such option any more.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        with av.open(_Reader(source), format=container, buffer_size=_READ_BYTES, **lenient) as opened:
            yield opened
    except UserError:
        raise
    except MemoryError:
        raise PromptError(f"{where} asks for more memory than there is") from None
    except (TypeError, AttributeError) as error:  # of a release that has changed what it takes: not the file's fault
        raise PromptError(f"{where} cannot be read with PyAV {av.__version__}: {one_line(str(error))}") from error
    except Exception as error:  # FFmpeg's errors are of many types, and some quote the file
        raise PromptError(f"{where} cannot be decoded: {_ENDS} ({type(error).__name__})") from error


def _video_stream(container: Any, where: str) -> Any:
    """The first stream that moves, as players take it; the others are not read."""
    av = _pyav(where)
    moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not moving:
        raise PromptError(f"{where} has no video in it" + (", only sound" if container.streams.audio else ""))
    for stream in container.streams:
        if stream.index != moving[0].index:
            stream.discard = "all"
    return moving[0]


def _index(container: Any, stream: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Times of all frames in the order in which they are shown, and the key frames: see :class:`VideoFile`."""
    times, keys, whole = [], [], True
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        if len(times) == MAX_FRAMES:
            raise PromptError(f"{where} has more than {MAX_FRAMES} frames; cut it")
        whole = whole and packet.pts is not None
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
    if not whole or not keys or len(set(times)) < len(times):
        return np.arange(len(times)), np.empty(0, np.int64)
    return np.sort(np.array(times, np.int64)), np.sort(np.array(keys, np.int64))


def _frames(container: Any, stream: Any, where: str, threads: int) -> Iterator[tuple[int | None, Any]]:
    """Frames as they are shown, each with its time."""
    av = _pyav(where)
    codec, name = stream.codec_context, stream.codec_context.name
    if name in ("vp8", "vp9") and stream.metadata.get("alpha_mode") == "1":
        codec = av.CodecContext.create(f"libvpx{'-vp9' if name == 'vp9' else ''}", "r")  # FFmpeg's own drops the alpha
    codec.thread_type, codec.thread_count = "AUTO", threads
    codec.options = {**codec.options, "max_pixels": str(MAX_FRAME_PIXELS)}
    for packet in container.demux(stream):
        for frame in codec.decode(packet):
            yield frame.pts, frame


def _turns(frame: Any, where: str) -> int:
    """Quarter turns, counter-clockwise, that set a frame upright."""
    turns = round(frame.rotation / 90)
    if abs(frame.rotation - 90 * turns) > 1:  # it is kept in fractions that are not exact
        raise PromptError(f"{where} is to be turned by {frame.rotation} degrees; only quarter turns are supported")
    return turns % 4


def _upright_rgb(frame: Any, where: str, alpha: str) -> np.ndarray:
    """uint8 [height, width, 3], contiguous; what is transparent on white, as for images."""
    turns = _turns(frame, where)
    if alpha == "white" and any(component.is_alpha for component in frame.format.components):
        rgba = Image.fromarray(frame.to_ndarray(format="rgba"))
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        rgb = np.asarray(white)
    else:
        rgb = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(rgb, turns))

"""safetensors files on disk: which ones make up a checkpoint, what their headers promise, and their bytes on a device.

A safetensors file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, first and
last byte) and then the tensors' bytes without gaps. Reading the headers is cheap, so everything that can be wrong with
the files is found before any tensor is allocated.
"""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen3vl_moe.errors import CheckpointError
from qwen3vl_moe.json_files import check_regular, parse_json, read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 8 << 20  # the format allows 100 MB; the 30B model's largest has 20 kB
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FP8 = "F8_E4M3"
_STORED = DTYPES | {FP8: torch.float8_e4m3fn}

# Each worker reads and copies one piece at a time. A thread copies a few GB/s out of the page cache and the bus to a
# GPU takes some 50, so it needs many threads; 16 x 16 MiB keeps both busy and the host's share small.
PIECE_BYTES = 16 << 20
MAX_WORKERS = 16


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its header describes it. ``offset`` counts bytes from the start of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def shorten(names: list[str], limit: int = 5) -> str:
    """``names`` as one readable line: the first ``limit``, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" ... and {rest} more" if rest > 0 else "")


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of the checkpoint in ``directory``: one ``model.safetensors``, or the shards of its index.

    Raises:
        CheckpointError: no weights, weights in another format, adapter files, an index that does not agree with the
            files, or a file that is truncated or is no safetensors file.
    """
    try:
        files = set(os.listdir(directory))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror or error}") from None
    adapters = sorted(name for name in files if name.startswith(("adapter_config.json", "adapter_model.")))
    if adapters:
        raise CheckpointError(
            f"{directory} holds an adapter ({shorten(adapters)}), which would be ignored: merge it into the weights "
            "(peft's merge_and_unload) and save those without it"
        )
    if SINGLE in files and INDEX in files and _is_stale(directory / INDEX, files):
        files.remove(INDEX)
    if SINGLE in files and INDEX in files:
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}: remove the one that is not meant")
    if SINGLE in files:
        return _read_header(directory / SINGLE)
    if INDEX in files:
        return _read_shards(directory / INDEX, files)

    strays = sorted(name for name in files if name.endswith(".safetensors"))
    pickles = sorted(name for name in files if name.endswith((".bin", ".pth", ".pt")))
    if strays:
        raise CheckpointError(
            f"{directory} has neither {SINGLE} nor {INDEX}, only {shorten(strays)}: the index is missing"
        )
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights only as {shorten(pickles)}: pickled weights are not read, "
            "save them as safetensors (transformers' save_pretrained does)"
        )
    raise CheckpointError(f"{directory} has no weights: {SINGLE} or {INDEX} is needed")


def _is_stale(index: Path, files: set[str]) -> bool:
    """Whether an index was left behind by ``save_pretrained`` of one file into the folder of several, which it removes.

    Raises:
        CheckpointError: some of its shards are there, so nobody can tell which is meant.
    """
    shards = set(_weight_map(index).values())
    absent = sorted(shards - files)
    if absent and len(absent) < len(shards):
        raise CheckpointError(
            f"{index.parent} holds both {SINGLE} and {INDEX}, but of the shards that the index names {shorten(absent)} "
            "is missing: remove the index, or get the missing shards and remove the single file"
        )
    return bool(absent)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} cannot be read as an index: it has no weight_map from tensors to files")
    return weight_map


def _read_shards(index: Path, files: set[str]) -> dict[str, StoredTensor]:
    """All tensors of the shards that ``index`` names, which must be exactly the tensors that it lists."""
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if name not in files]
    if absent:
        raise CheckpointError(f"{index} names {shorten(absent)}, not in {index.parent}: is the download complete?")

    promises: dict[str, set[str]] = {shard: set() for shard in shards}
    for name, shard in weight_map.items():
        promises[shard].add(name)
    stored: dict[str, StoredTensor] = {}
    disagreements = []
    for shard, promised in promises.items():
        header = _read_header(index.parent / shard)
        disagreements += [f"{name} is not in {shard}" for name in sorted(promised - header.keys())]
        disagreements += [f"{shard} holds {name}, not listed for it" for name in sorted(header.keys() - promised)]
        stored |= header
    if disagreements:
        raise CheckpointError(f"{index} disagrees with the files: {shorten(disagreements)}")
    return stored


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, every offset checked against the others and the length of the file."""
    try:
        check_regular(path, CheckpointError, most=sys.maxsize)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
            if size < 8 or 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: it has {size} bytes, "
                    f"and its header should take {8 + length}"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: its header takes {length} bytes; at most {MAX_HEADER_BYTES} are read")
            header = parse_json(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no safetensors file: its header is not JSON ({error})") from None

    stored, end = {}, 0
    try:
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (first, last), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
            if not all(type(number) is int for number in (first, last, *shape)) or min(shape, default=0) < 0:
                raise TypeError
            expected = math.prod(shape) * _STORED[dtype].itemsize if dtype in _STORED else last - first
            if first != end or last < first or last - first != expected:
                raise CheckpointError(
                    f"{path} is damaged: {name} ({dtype} {list(shape)}) should take {expected} bytes from byte {end} "
                    f"of the data, its header says {first} to {last}"
                )
            stored[name] = StoredTensor(path, dtype, shape, 8 + length + first, last - first)
            end = last
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no safetensors file: its header describes no tensors") from None
    if 8 + length + end != size:
        state = "truncated" if size < 8 + length + end else "damaged"
        raise CheckpointError(f"{path} is {state}: it has {size} bytes, its header describes {8 + length + end}")
    return stored


@dataclass(frozen=True)
class _Piece:
    """Leading rows of a stored tensor, and where they go (same shape, perhaps another dtype and strides)."""

    stored: StoredTensor
    offset: int
    nbytes: int
    destination: torch.Tensor


def _pieces(stored: StoredTensor, destination: torch.Tensor) -> list[_Piece]:
    """Cut along the first dimension into pieces of at most ``PIECE_BYTES``, or of one row if that is larger."""
    rows = stored.shape[0]
    row_bytes = stored.nbytes // rows
    step = max(1, PIECE_BYTES // row_bytes)
    return [
        _Piece(
            stored, stored.offset + row * row_bytes, min(step, rows - row) * row_bytes, destination[row : row + step]
        )
        for row in range(0, rows, step)
    ]


def part_of(
    stored: StoredTensor, destination: torch.Tensor, axis: int, ranges: Sequence[range]
) -> list[tuple[StoredTensor, torch.Tensor]]:
    """What to copy of a tensor of which only ranges along ``axis`` are wanted: tensors whose bytes lie together.

    Args:
        destination: of the ranges, one after the other.
        axis: not the last dimension, of which no more than a row's part would lie together.
    """
    copies, begin = [], 0
    outer, row_bytes = math.prod(stored.shape[:axis]), stored.nbytes // math.prod(stored.shape[: axis + 1])
    if axis:
        destination = destination.flatten(0, axis - 1)
    for wanted in ranges:
        nbytes = len(wanted) * row_bytes
        for number in range(outer):
            offset = stored.offset + (number * stored.shape[axis] + wanted.start) * row_bytes
            shape = (*(1 for _ in range(axis > 0)), len(wanted), *stored.shape[axis + 1 :])
            there = destination[number : number + 1] if axis else destination
            there = there.narrow(1 if axis else 0, begin, len(wanted))
            copies.append((StoredTensor(stored.file, stored.dtype, shape, offset, nbytes), there))
        begin += len(wanted)
    return copies


def stream(
    copies: list[tuple[StoredTensor, torch.Tensor]], device: torch.device, on_read: Callable[[int], None]
) -> None:
    """Fill each destination from its stored tensor; several threads read, convert and copy a piece each.

    Host memory beside the destinations: one buffer of ``PIECE_BYTES`` per thread, pinned for a GPU so that the copies
    need no second one. Device memory beside the destinations: one piece per thread, and only where it has to be cast
    or transposed.

    Args:
        copies: pairs of a stored tensor and a destination of the same shape on ``device``, of any floating dtype and
            strides (the transposed view of a parameter receives a transpose).
        device: where the destinations are.
        on_read: called with a number of bytes after each piece, from several threads.

    Raises:
        CheckpointError: a file cannot be read to its end.
    """
    cuda = device.type == "cuda"
    pieces = deque(piece for stored, destination in copies for piece in _pieces(stored, destination))
    buffer_bytes = max(piece.nbytes for piece in pieces)
    if cuda:
        # The destinations may be recycled memory that kernels on other streams still use.
        torch.cuda.synchronize(device)

    def work() -> None:
        buffer = torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=cuda)
        queue = torch.cuda.Stream(device) if cuda else None
        with torch.cuda.stream(queue) if queue is not None else nullcontext():
            while pieces:
                try:
                    piece = pieces.popleft()
                except IndexError:  # another thread was faster
                    break
                _copy_piece(piece, buffer)
                if queue is not None:
                    queue.synchronize()  # the buffer is free again; releases the GIL
                on_read(piece.nbytes)

    workers = min(MAX_WORKERS, os.cpu_count() or 1, len(pieces))
    with ThreadPoolExecutor(workers) as pool:
        try:
            done = [pool.submit(work) for _ in range(workers)]
            wait(done, return_when=FIRST_EXCEPTION)
        finally:
            pieces.clear()  # after an error or Ctrl-C the other threads stop at their next piece
        for future in done:
            future.result()
    if cuda:
        # Scratch of the copies is cached per stream, where nothing else could ever use it.
        torch.cuda.empty_cache()


def _copy_piece(piece: _Piece, buffer: torch.Tensor) -> None:
    destination, dtype = piece.destination, _STORED[piece.stored.dtype]
    if dtype == destination.dtype == torch.float8_e4m3fn:  # never cast; as bytes it is copied in any order
        destination, dtype = destination.view(torch.uint8), torch.uint8
    as_stored = destination.dtype == dtype and destination.is_contiguous()
    cpu = destination.device.type == "cpu"
    if as_stored and cpu:
        _read(piece, destination.view(-1).view(torch.uint8))
        return
    staged = buffer[: piece.nbytes]
    _read(piece, staged)
    staged = staged.view(dtype).view(destination.shape)
    if as_stored or (cpu and destination.is_contiguous()):
        destination.copy_(staged, non_blocking=True)
    elif cpu:
        for matrix, source in zip(destination, staged, strict=True):
            # Into a contiguous matrix torch transposes in blocks, twice as fast as its general copy.
            matrix.t().copy_(source.t())
    else:
        # First over the bus as it is, then cast or transposed by the device: copy_ alone would do that on the host.
        destination.copy_(staged.to(destination.device, non_blocking=True))


def staging(like: StoredTensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Memory on a device for a tensor as it is stored."""
    return torch.empty(shape, dtype=_STORED[like.dtype], device=device)


def read_whole(stored: StoredTensor) -> torch.Tensor:
    """A small tensor on the host, as it is stored.

    Raises:
        CheckpointError: its file cannot be read to its end.
    """
    buffer = torch.empty(stored.nbytes, dtype=torch.uint8)
    _read(_Piece(stored, stored.offset, stored.nbytes, buffer), buffer)
    return buffer.view(_STORED[stored.dtype]).view(stored.shape)


def _read(piece: _Piece, target: torch.Tensor) -> None:
    """Fill ``target`` (uint8) from the file. Plain reads: faults on a mapped file are slower and would hold the GIL."""
    view, path = memoryview(target.numpy()), piece.stored.file  # pyright: ignore[reportArgumentType]
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(piece.offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{path} ended while it was read: is something writing to it?")
                view = view[count:]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None

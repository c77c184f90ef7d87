"""Tile choices: data in configs/, looked up on the host by device, shape, role and number of tokens.

A configuration file is JSON, one file for a device and a triton version:

    {
      "devices": ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"],   names as torch.cuda.get_device_name gives them
      "measured_on": "NVIDIA H100 80GB HBM3",                      the one that was timed
      "note": "...",                                               anything a reader should know (optional)
      "triton": "3.6.0",                                           the version it was timed with
      "shapes": [
        {
          "experts": 128, "topk": 8, "hidden": 2048, "width": 768,
          "buckets": [                                        by rising max_tokens; the last one serves all larger calls
            {"max_tokens": 4,
             "up":   {"kernel": "decode", "rows": 1, "cols": 4, "block_k": 2048, "warps": 4, "stages": 1},
             "down": {"kernel": "decode", "rows": 1, "cols": 2, "block_k": 1024, "warps": 4, "stages": 1}},
            ...
          ]
        }
      ]
    }

The meaning of the numbers is in `Tiles`. `scripts/tune_moe.py` measures and writes such files (`dump_buckets`).
A shape that no file lists gets tiles from a rule on rows per expert; a GPU that no file lists gets the same and one
warning per process.
"""

import functools
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from tma_moe.support import has_gluon

CONFIG_DIR = Path(__file__).parent / "configs"
KERNELS = ("decode", "swap", "grouped", "specialized", "streamed")
GLUON_KERNELS = ("specialized", "streamed")
KEEPING_KERNELS = ("swap", "streamed")
STREAMED_ROWS = (96, 160, 288)  # the most rows of a tile: a power of two and 32 more


@dataclass(frozen=True)
class Tiles:
    """One kernel and its tile.

    Attributes:
        kernel: "decode" (decode_gemv.py), "swap" (swap_gemm.py), "grouped" (grouped_gemm.py), "specialized"
            (specialized_gemm.py) or "streamed" (streamed_gemm.py); warps of the last two are those of one consumer.
        rows: rows (token, choice pairs) of an output tile, of "streamed" the most; 1 for "decode".
        cols: columns of an output tile; for the up product these are columns after SwiGLU, twice as many weight rows.
        block_k: step along the contraction.
        warps, stages: triton's num_warps and num_stages.
        ctas_per_sm: programs per multiprocessor of a persistent launch; 0 launches one program per tile.
        flatten: fuse the tile loop with the loop over K (persistent launches).
        keep: ask L2 to keep what the product stores, while weights stream past it, for the kernel that reads it
            (KEEPING_KERNELS); for calls whose rows fit.
    """

    kernel: str
    rows: int
    cols: int
    block_k: int
    warps: int
    stages: int
    ctas_per_sm: int = 0
    flatten: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"tiles: kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        for name in ("rows", "cols", "block_k", "warps", "stages"):
            value = getattr(self, name)
            free = name == "stages" or (name == "rows" and self.kernel == "streamed")
            if not isinstance(value, int) or value < 1 or (not free and value & (value - 1)):
                raise ValueError(f"tiles: {name} must be a power of two (stages: at least 1), got {value!r}")
        if self.keep and self.kernel not in KEEPING_KERNELS:
            raise ValueError(f"tiles: only {' and '.join(KEEPING_KERNELS)} have keep, not {self.kernel!r}")
        if self.kernel == "specialized" and (self.warps != 4 or self.rows < 128 or self.block_k < 64):
            raise ValueError("tiles: 'specialized' takes 4 warps, at least 128 rows and a block_k of at least 64")
        if self.kernel == "streamed" and not (
            self.warps == 4 and self.rows in STREAMED_ROWS and self.cols in (64, 128) and self.block_k == 64
        ):
            rows = ", ".join(map(str, STREAMED_ROWS))
            raise ValueError(f"tiles: 'streamed' takes 4 warps, 64 (up) or 128 (down) cols, block_k 64, rows of {rows}")

    @property
    def step(self) -> int:
        """Heights of tiles are multiples of this many rows: an expert's rows are cut evenly as far as it allows."""
        return 32 if self.kernel == "streamed" else self.rows


@dataclass(frozen=True)
class Choice:
    """The tiles of both products for calls of at most `max_tokens` tokens (None: any number)."""

    max_tokens: int | None
    up: Tiles
    down: Tiles

    def __post_init__(self) -> None:
        if (self.up.kernel == "decode") != (self.down.kernel == "decode"):
            raise ValueError(
                "tiles: the decode kernels keep h by slot, so up and down must both be 'decode' or neither"
            )


GROUPED_UP = Tiles("grouped", 128, 128, 64, 8, 3, ctas_per_sm=1, flatten=True)
GROUPED_DOWN = Tiles("grouped", 128, 256, 64, 8, 3, ctas_per_sm=1, flatten=True)


def choices_for(device: str, triton: str, experts: int, topk: int, hidden: int, width: int) -> tuple[Choice, ...]:
    """The choices for a device (by name) and shape, by rising `max_tokens`.

    A file of the same triton version is preferred, then any file of the device. Raises ValueError, naming the file, for
    a file that cannot be understood.
    """
    files = [file for file in _files() if device in file["devices"]]
    files.sort(key=lambda file: file["triton"] != triton)
    for file in files:
        for shape, choices in file["shapes"]:
            if shape == (experts, topk, hidden, width):
                return choices if has_gluon() else tuple(map(_without_gluon, choices))
    if not files:
        _warn_unlisted(device)
    return default_choices(experts, topk, hidden, width)


def _without_gluon(choice: Choice) -> Choice:
    """The same choice with the kernels of grouped_gemm.py for those in Gluon."""

    def tiles(chosen: Tiles, instead: Tiles) -> Tiles:
        return instead if chosen.kernel in GLUON_KERNELS else chosen

    return Choice(choice.max_tokens, tiles(choice.up, GROUPED_UP), tiles(choice.down, GROUPED_DOWN))


@functools.cache
def _warn_unlisted(device: str) -> None:
    warnings.warn(
        f"tma_moe has no measured tiles for {device!r} and uses safe defaults; run scripts/tune_moe.py to measure some",
        stacklevel=2,
    )


def load(path: Path) -> dict:
    """A configuration file: "devices", "triton", and "shapes" as ((experts, topk, hidden, width), choices) pairs."""
    try:
        raw = json.loads(path.read_text())
        shapes = [
            (
                (shape["experts"], shape["topk"], shape["hidden"], shape["width"]),
                tuple(
                    Choice(bucket.get("max_tokens"), Tiles(**bucket["up"]), Tiles(**bucket["down"]))
                    for bucket in shape["buckets"]
                ),
            )
            for shape in raw["shapes"]
        ]
        for shape, choices in shapes:
            limits = [choice.max_tokens for choice in choices]
            if not limits or limits[-1] is not None or None in limits[:-1] or limits[:-1] != sorted(set(limits[:-1])):
                raise ValueError(f"shape {shape}: max_tokens must rise and the last bucket must have none")
        return {"devices": list(raw["devices"]), "triton": str(raw["triton"]), "shapes": shapes}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a tile configuration: {type(error).__name__}: {error}") from error


def dump_buckets(choices: tuple[Choice, ...]) -> list[dict]:
    """Choices as the "buckets" of a configuration file."""
    return [
        {
            **({"max_tokens": c.max_tokens} if c.max_tokens is not None else {}),
            "up": asdict(c.up),
            "down": asdict(c.down),
        }
        for c in choices
    ]


@functools.cache
def _files() -> list[dict]:
    return [load(path) for path in sorted(CONFIG_DIR.glob("*.json"))]


def default_choices(experts: int, topk: int, hidden: int, width: int) -> tuple[Choice, ...]:
    """Tiles by rule: one row tile per expert as long as its rows fit, then 128 rows of the persistent kernels."""

    def tokens(rows_per_expert: int) -> int:
        return max(4, rows_per_expert * experts // topk)

    def swap(max_tokens: int, rows: int, stages: int) -> Choice:
        return Choice(
            max_tokens,
            Tiles("swap", rows, 64, 64, 4, stages),
            Tiles("swap", rows, 128, 64, 4, stages),
        )

    decode = Choice(4, Tiles("decode", 1, 4, 1024, 4, 1), Tiles("decode", 1, 4, 256, 8, 1))
    grouped = Choice(None, GROUPED_UP, GROUPED_DOWN)
    small = [swap(tokens(8), 16, 5), swap(tokens(16), 32, 5), swap(tokens(32), 64, 4), swap(tokens(64), 128, 3)]
    # Few experts or many choices can bring neighbouring limits together; the smaller tile then has nothing to do.
    distinct = {choice.max_tokens: choice for choice in small if choice.max_tokens > decode.max_tokens}
    return (decode, *distinct.values(), grouped)

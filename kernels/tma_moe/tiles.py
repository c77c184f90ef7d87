"""Tile choices: data in configs/, looked up on the host by device, shape, role and number of tokens.

A configuration file is JSON, one file for a device and a triton version:

    {
      "devices": ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"],   names as torch.cuda.get_device_name gives them
      "capability": "9.0",                                         theirs; 9.0 where it is left out
      "measured_on": "NVIDIA H100 80GB HBM3",                      the one that was timed
      "timed": true,                                               false: tiles were chosen by sizes, no card timed them
      "note": "...",                                               anything a reader should know (optional)
      "triton": "3.6.0",                                           the version it was timed with (not if none was)
      "shapes": [
        {
          "experts": 128, "topk": 8, "hidden": 2048, "width": 768,
          "buckets": [                                        by rising max_tokens; the last one serves all larger calls
            {"max_tokens": 4,
             "up":   {"kernel": "gemv", "rows": 1, "cols": 4, "block_k": 2048, "warps": 4, "stages": 1},
             "down": {"kernel": "gemv", "rows": 1, "cols": 2, "block_k": 1024, "warps": 4, "stages": 1}},
            ...
          ]
        }
      ]
    }

The meaning of the numbers is in `Tiles`. `scripts/tune_moe.py` measures and writes such files (`dump_buckets`).
A shape that no file lists gets tiles from a rule on rows per expert, and so does a GPU that no file lists. One warning
per process says so of a GPU, and of tiles that nobody timed. Backend "triton" has files of its own, whose kernels are
those of portable/, and a rule of its own (portable/rule.py). Where Gluon cannot be imported, tiles of kernels that are
written in it are replaced, with one warning that says why.
"""

import functools
import json
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tma_moe.support import GLUON_PRODUCTS, gluon_problem

CONFIG_DIR = Path(__file__).parent / "configs"
KERNELS = ("gemv", "weights_m", "weights_m_ws", "tokens_m_ws")  # files of gemm/, for weights of 16 bits
FP8_KERNELS = ("fp8_gemv", "fp8_weights_m", "fp8_tokens_m_ws")  # and for FP8
PORTABLE_KERNELS = ("portable", "fp8_portable")  # of backend "triton", beside both gemv: portable/
ALL_KERNELS = (*KERNELS, *FP8_KERNELS, *PORTABLE_KERNELS)


@dataclass(frozen=True)
class Tiles:
    """One way to compute a product, and its tile. What a way takes of these numbers is checked by its file in gemm/.

    Attributes:
        kernel: which file of gemm/, or of portable/.
        rows: rows (token, choice pairs) of an output tile, at most; 1 for "gemv".
        cols: columns of an output tile; for the up product these are columns after SwiGLU, twice as many weight rows.
        block_k: step along the contraction.
        warps, stages: triton's num_warps and num_stages; of a warp-specialised kernel, the warps of one consumer and
            the buffers of its ring.
        ctas_per_sm: programs per multiprocessor of a persistent launch; 0 launches one program per tile.
        flatten: fuse the tile loop with the loop over K (persistent launches of "weights_m").
        keep: store the product's output with evict_last, so that L2 holds it for the next kernel while weights stream
            past; useful where the rows fit into L2.
        weights_m: of the portable kernels: the weights are the M operand, else the tokens.
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
    weights_m: bool = False

    def __post_init__(self) -> None:
        if self.kernel not in ALL_KERNELS:
            raise ValueError(f"tiles: kernel must be one of {', '.join(ALL_KERNELS)}, got {self.kernel!r}")
        for name in ("rows", "cols", "block_k", "warps", "stages"):
            value = getattr(self, name)
            free = name == "stages" or (name == "rows" and self.kernel == "weights_m_ws")
            if not isinstance(value, int) or value < 1 or (not free and value & (value - 1)):
                raise ValueError(f"tiles: {name} must be a power of two (stages: at least 1), got {value!r}")


_TOGETHER = {
    "gemv": "gemv keeps h by slot",
    "fp8_gemv": "fp8_gemv keeps h by slot",
    "fp8_tokens_m_ws": "fp8_tokens_m_ws keeps h in FP8",
    "portable": "portable is of another backend",
    "fp8_portable": "fp8_portable is of another backend",
}


@dataclass(frozen=True)
class Choice:
    """The tiles of both products for calls of at most `max_tokens` tokens (None: any number)."""

    max_tokens: int | None
    up: Tiles
    down: Tiles

    def __post_init__(self) -> None:
        for kernel, why in _TOGETHER.items():
            if (self.up.kernel == kernel) != (self.down.kernel == kernel):
                raise ValueError(f"tiles: {why}, so up and down must both be {kernel!r} or neither")
        if self.up.kernel.startswith("fp8_") != self.down.kernel.startswith("fp8_"):
            raise ValueError("tiles: up and down must both be for FP8 weights or neither")

    @property
    def fp8(self) -> bool:
        """Whether these are for FP8 weights."""
        return self.up.kernel.startswith("fp8_")

    @property
    def grouped(self) -> bool:
        """Whether rows are grouped by expert."""
        return self.up.kernel not in ("gemv", "fp8_gemv")


# In plain Triton, for any number of rows.
FP8_MANY_UP = Tiles("fp8_weights_m", 64, 64, 128, 4, 3)
FP8_MANY_DOWN = Tiles("fp8_weights_m", 64, 128, 128, 4, 3)
MANY_UP = Tiles("weights_m", 128, 128, 64, 8, 4)
MANY_DOWN = Tiles("weights_m", 128, 128, 64, 8, 4)


def choices_for(
    device: str, triton: str, experts: int, topk: int, hidden: int, width: int, fp8: bool = False
) -> tuple[Choice, ...]:
    """The choices for a device (by name), shape and kind of weights, by rising `max_tokens`.

    A file of the same triton version is preferred, then any file of the device. Raises ValueError, naming the file, for
    a file that cannot be understood.
    """
    found = listed(device, triton, (experts, topk, hidden, width), fp8, portable=False)
    if found is not None:
        return found if _gluon_runs() else tuple(map(_without_gluon, found))
    if not fp8:
        return default_choices(experts, topk, hidden, width)
    choices = fp8_default_choices(experts, topk, hidden, width)
    in_gluon = any(tiles.kernel in GLUON_PRODUCTS for choice in choices for tiles in (choice.up, choice.down))
    return choices if not in_gluon or _gluon_runs() else tuple(map(_without_gluon, choices))


def listed(
    device: str, triton: str, shape: tuple[int, int, int, int], fp8: bool, portable: bool
) -> tuple[Choice, ...] | None:
    """What the files say of a shape on a device, for one backend; None if nothing.

    Tiles that were timed are preferred, then those of the same triton version. One warning says that the device is in
    no file, or that its tiles were not timed.
    """
    files = [file for file in _files() if device in file["devices"] and file["portable"] == portable]
    files.sort(key=lambda file: (not file["timed"], file["triton"] != triton))
    if not files or not any(file["timed"] for file in files):
        _warn_untimed(device, bool(files))
    for file in files:
        for entry, choices in file["shapes"]:
            if entry == shape and choices[0].fp8 == fp8:
                return choices
    return None


def _without_gluon(choice: Choice) -> Choice:
    """The same choice with plain Triton for kernels in Gluon."""

    def tiles(chosen: Tiles, instead: Tiles) -> Tiles:
        return instead if chosen.kernel in GLUON_PRODUCTS else chosen

    up, down = (FP8_MANY_UP, FP8_MANY_DOWN) if choice.fp8 else (MANY_UP, MANY_DOWN)
    return Choice(choice.max_tokens, tiles(choice.up, up), tiles(choice.down, down))


@functools.cache
def _gluon_runs() -> bool:
    """Whether kernels in Gluon can be used; if not, one warning says so and why."""
    problem = gluon_problem()
    if problem is not None:
        warnings.warn(
            f"tma_moe's Gluon kernels are off, as they cannot be imported ({problem}); plain Triton does their work, "
            "slower from about 770 tokens on",
            stacklevel=2,
        )
    return problem is None


@functools.cache
def _warn_untimed(device: str, in_files: bool) -> None:
    instead = "tiles that were chosen for it and not timed" if in_files else "safe defaults"
    warnings.warn(
        f"tma_moe has no measured tiles for {device!r} and uses {instead}; run scripts/tune_moe.py to measure some",
        stacklevel=3,
    )


def load(path: Path) -> dict:
    """A configuration file: "devices" and their "capability", "triton", "shapes" as ((experts, topk, hidden, width),
    choices) pairs, whether it was "timed", and whether it is of the "portable" kernels."""
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
            rising = [limit for limit in limits if limit is not None]
            if [*sorted(set(rising)), None] != limits:
                raise ValueError(f"shape {shape}: max_tokens must rise and the last bucket must have none")
        kinds = {choices[-1].up.kernel in PORTABLE_KERNELS for _, choices in shapes}
        if len(kinds) != 1:
            raise ValueError("all shapes must be of one backend")
        (portable,), timed = kinds, raw.get("timed", True)
        version = str(raw["triton"]) if timed else ""
        return {
            "devices": list(raw["devices"]),
            "triton": version,
            "shapes": shapes,
            "timed": timed,
            "portable": portable,
            "capability": tuple(map(int, raw.get("capability", "9.0").split("."))),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a tile configuration: {type(error).__name__}: {error}") from error


def dump_buckets(choices: tuple[Choice, ...]) -> list[dict]:
    """Choices as the "buckets" of a configuration file."""
    defaults = {field.name: field.default for field in fields(Tiles)}

    def plain(tiles: Tiles) -> dict:
        return {name: value for name, value in asdict(tiles).items() if value != defaults[name]}

    return [
        {
            **({"max_tokens": c.max_tokens} if c.max_tokens is not None else {}),
            "up": plain(c.up),
            "down": plain(c.down),
        }
        for c in choices
    ]


@functools.cache
def _files() -> list[dict]:
    return [load(path) for path in sorted(CONFIG_DIR.glob("*.json"))]


def default_choices(experts: int, topk: int, hidden: int, width: int) -> tuple[Choice, ...]:
    """Tiles by rule: one row tile per expert as long as its rows fit, then tiles of 128 rows."""

    def tokens(rows_per_expert: int) -> int:
        return max(4, rows_per_expert * experts // topk)

    def few(max_tokens: int, rows: int, stages: int) -> Choice:
        up, down = (Tiles("weights_m", rows, cols, 64, 4, stages) for cols in (64, 128))
        return Choice(max_tokens, up, down)

    gemv = Choice(4, Tiles("gemv", 1, 4, 1024, 4, 1), Tiles("gemv", 1, 4, 256, 8, 1))
    many = Choice(None, MANY_UP, MANY_DOWN)
    by_rows = ((tokens(8), 16, 5), (tokens(16), 32, 5), (tokens(32), 64, 4), (tokens(64), 128, 3))
    # Few experts or many choices can bring neighbouring limits together; the smaller tile then has nothing to do.
    distinct = {most: few(most, rows, stages) for most, rows, stages in by_rows if most > 4}
    return (gemv, *distinct.values(), many)


def fp8_default_choices(experts: int, topk: int, hidden: int, width: int) -> tuple[Choice, ...]:
    """The same for FP8 weights."""
    gemv = Choice(4, Tiles("fp8_gemv", 1, 4, 1024, 4, 1), Tiles("fp8_gemv", 1, 8, 128, 8, 1))
    some = Choice(max(5, 8 * experts // topk), *(Tiles("fp8_weights_m", 16, cols, 128, 4, 3) for cols in (64, 128)))
    if width % 128:
        return gemv, some, Choice(None, FP8_MANY_UP, FP8_MANY_DOWN)
    many = (Tiles("fp8_tokens_m_ws", 128, cols, 128, 4, 4, ctas_per_sm=1) for cols in (128, 256))
    return gemv, some, Choice(None, *many)

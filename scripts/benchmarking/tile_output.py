"""Where the tuner writes what it found: a configuration file of tma_moe."""

import json
import re
from pathlib import Path

import triton

from benchmarking.moe import MoeShape
from benchmarking.tile_search import HOPPER
from replace_file import replace_file
from tma_moe import tiles as tile_files
from tma_moe.tiles import Choice


def config_path(device: str, fp8: bool = False, portable: bool = False) -> Path:
    """The file that was measured on this device with this triton; a new one, named after both, if there is none.

    FP8 weights have files of their own, and so have the portable kernels.
    """
    for path in sorted(tile_files.CONFIG_DIR.glob("*.json")):
        document = json.loads(path.read_text())
        loaded = tile_files.load(path)
        (_, choices), *_ = loaded["shapes"]
        found = document.get("measured_on"), document.get("triton"), choices[0].fp8, loaded["portable"]
        if found == (device, triton.__version__, fp8, portable):
            return path
    device += "-portable" * portable + "-fp8" * fp8
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{device}-triton-{triton.__version__}".lower())
    return tile_files.CONFIG_DIR / f"{slug}.json"


def check_output(path: Path) -> None:
    """Raises ValueError unless results can be written to `path`."""
    if not path.resolve().parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {path.resolve().parent} does not exist")
    if path.exists() and not tile_files.load(path)["timed"]:
        raise ValueError(f"{path} holds tiles that were not timed, for several cards: give another --output")
    if path.exists() and (version := tile_files.load(path)["triton"]) != triton.__version__:
        raise ValueError(
            f"{path} was measured with triton {version}, this is {triton.__version__}: give another --output"
        )


def write_config(
    path: Path, device: str, shape: MoeShape, choices: tuple[Choice, ...], card: tuple[int, int] = HOPPER
) -> None:
    """Puts the choices of one shape into a configuration file, keeping its other shapes and device names."""
    document = {"devices": [device], "measured_on": device, "triton": triton.__version__, "shapes": []}
    if card != HOPPER:
        document["capability"] = f"{card[0]}.{card[1]}"
    if path.exists():
        document |= json.loads(path.read_text())
        document["devices"] = sorted({*document["devices"], device})
    key = {"experts": shape.num_experts, "topk": shape.experts_per_token}
    key |= {"hidden": shape.hidden_size, "width": shape.expert_width}
    others = [entry for entry in document["shapes"] if any(entry[name] != value for name, value in key.items())]
    document["shapes"] = [*others, {**key, "buckets": tile_files.dump_buckets(choices)}]
    text = json.dumps(document, indent=1)
    tiles_in_one_line = re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), text)
    replace_file(path, [tiles_in_one_line.encode() + b"\n"])

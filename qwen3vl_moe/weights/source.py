"""Where a checkpoint is: a directory, a Hugging Face hub id, or the demo that comes with this package."""

from __future__ import annotations

import re
from pathlib import Path

from qwen3vl_moe.errors import CheckpointError
from qwen3vl_moe.weights.shards import INDEX, shorten

SMALL_FILES = ["*.json", "*.jinja", "merges.txt"]  # all that is not weights
DEMO = Path(__file__).resolve().parents[1] / "demo"  # package data
_DEMO_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    INDEX,  # which names the files of weights
)


def resolve(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a checkpoint: ``path_or_id`` itself, or a download of that Hugging Face hub id.

    Args:
        path_or_id: a directory, a hub id, or "demo": the checkpoint that comes with this package.
        weights: whether a download takes the weights too.

    Raises:
        CheckpointError: no such directory and no such hub id, the hub cannot be reached or refuses access, or the
            demo's files are not where they belong.
    """
    if path_or_id == "demo":
        absent = [name for name in _DEMO_FILES if not (DEMO / name).is_file()]
        if absent:
            raise CheckpointError(
                f"model demo: {DEMO} lacks {shorten(absent)}; take the folder from the repository again, "
                "or make one with scripts/train_demo.py"
            )
        return DEMO
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the directory that holds config.json and the weights")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_id)):
        raise CheckpointError(
            f"{path_or_id} is neither a directory nor a hub id such as Qwen/Qwen3-VL-30B-A3B-Instruct"
        )

    from huggingface_hub import errors, snapshot_download

    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except errors.GatedRepoError:
        reason = "it is gated: accept its terms on huggingface.co, then log in with `hf auth login`"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        reason = "there is no such model on the hub (or it is private: log in with `hf auth login`)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "the hub cannot be reached and the local cache does not hold it whole; give a local directory instead"
    except Exception as error:  # those of its HTTP client pass through, and releases differ in which one that is
        reason = f"the download failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    raise CheckpointError(f"{path_or_id} is no local directory, and from the Hugging Face hub: {reason}")

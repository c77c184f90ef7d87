"""Where a checkpoint is: a directory, a Hugging Face hub id, or the demo that comes with this package."""

from __future__ import annotations

import re
from pathlib import Path

from qwen3vl_moe.errors import CheckpointError
from qwen3vl_moe.json_files import MAX_FILE_BYTES, check_regular
from qwen3vl_moe.weights.shards import INDEX, shorten

SMALL_FILES = ["*.json", "*.jinja", "merges.txt"]  # all that is not weights
# What is read of a checkpoint beside its weights, here or by transformers, and how many bytes are believed.
# A vocabulary of 150,000 words takes 7 MB.
_MOST_BYTES = {
    **dict.fromkeys(("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"), 128 << 20),
    **dict.fromkeys(("chat_template.jinja",), 1 << 20),
    **dict.fromkeys(
        (
            *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
            *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
            *("chat_template.json", INDEX),
        ),
        MAX_FILE_BYTES,
    ),
}
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
        CheckpointError: no such directory and no such hub id, the hub cannot be reached or refuses access, the demo's
            files are not where they belong, or a small file is none (a pipe, a device) or far too large to be one.
    """
    directory = _find(path_or_id, weights)
    for name, most in _MOST_BYTES.items():
        try:
            check_regular(directory / name, CheckpointError, most)
        except OSError:  # whoever needs it says that it is missing
            continue
    return directory


def _find(path_or_id: str | Path, weights: bool) -> Path:
    if not isinstance(path_or_id, str | Path):
        raise CheckpointError(f"the model is {path_or_id!r:.80}: a directory, a hub id or demo is needed")
    if path_or_id == "":  # which Path would read as the current directory
        raise CheckpointError("the model has no name: give a directory, a hub id, or demo")
    if path_or_id == "demo":
        absent = [name for name in _DEMO_FILES if not (DEMO / name).is_file()]
        if absent:
            raise CheckpointError(
                f"model demo: {DEMO} lacks {shorten(absent)}; take the folder from the repository again, "
                "or make one with scripts/train_demo.py"
            )
        return DEMO
    try:
        path = Path(path_or_id).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, UnicodeError) as error:  # no permission, a name too long, nobody's home
        raise CheckpointError(f"{path_or_id} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if is_directory:
        return path
    if exists:
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

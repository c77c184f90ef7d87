"""Sound checkpoints to be damaged, and the one line that a damaged one gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwen3vl_moe.errors import CheckpointError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.weights import load_model


@pytest.fixture
def _no_allocation(monkeypatch):
    """Nothing may get as far as memory for the parameters."""

    def fail(*args, **kwargs):
        raise AssertionError("the model was allocated before the checkpoint was checked")

    monkeypatch.setattr(Qwen3VLMoe, "to_empty", fail)


@pytest.fixture
def directory(plain, tmp_path) -> Path:
    """A sound checkpoint in one file."""
    shutil.copytree(plain.published, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(plain, tmp_path) -> Path:
    """A sound checkpoint of several shards, as transformers writes it."""
    plain.oracle.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def message(path: Path | str, kind: type = CheckpointError, **options) -> str:
    with pytest.raises(kind) as error:
        load_model(path, moe="reference", progress=False, **options)
    assert "\n" not in str(error.value)
    return str(error.value)

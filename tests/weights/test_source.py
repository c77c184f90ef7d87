"""Where a checkpoint is, and that its small files are files."""

from __future__ import annotations

import os
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from qwen3vl_moe.weights import resolve, source
from qwen3vl_moe.weights.source import DEMO
from tests.weights.conftest import message

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("_no_allocation")


@pytest.fixture(params=["fifo", "device", "directory", "sparse"])
def put(request):
    """``put(path)`` puts something in the place of a file, and says how it is refused."""

    def replace(path):
        path.unlink(missing_ok=True)
        match request.param:
            case "fifo":
                os.mkfifo(path)
            case "device":
                path.symlink_to("/dev/zero")
            case "directory":
                path.mkdir()
            case "sparse":
                with open(path, "wb") as file:
                    file.truncate(1 << 40)
                return f"{path} has {1 << 40} bytes; at most "
        return f"{path} is not a regular file"

    return replace


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"]
)
def test_no_small_file_is_a_pipe_a_device_or_a_desert(directory, put, name):
    """Those that other libraries read are looked at as well: nothing is opened that could block."""
    refusal = put(directory / name)
    assert message(directory).startswith(refusal)


@pytest.mark.timeout(20)
def test_no_index_is_a_pipe_a_device_or_a_desert(sharded, put):
    refusal = put(sharded / INDEX)
    assert message(sharded).startswith(refusal)


@pytest.mark.timeout(20)
def test_no_shard_is_a_pipe_or_a_device(sharded, put):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    refusal = put(shard)
    if shard.is_file():  # weights may be as large as they like, but their header says how large
        refusal = f"{shard} is no safetensors file: its header is not JSON"
    assert message(sharded).startswith(refusal)


@pytest.mark.parametrize(
    "name",
    ["no-such-directory", "./no/such", "/no/such/directory", "a/b/c", "owner/..", "a\0b", "\ud800", "owner/model\n"],
)
def test_neither_directory_nor_hub_id(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # must not be asked
    assert "is neither a directory nor a hub id" in message(name)


@pytest.mark.parametrize("name", [None, 5, b"demo", ["demo"]])
def test_what_is_no_name_at_all(name):
    assert message(name) == f"the model is {name!r}: a directory, a hub id or demo is needed"


@pytest.mark.parametrize("name", ["x" * 5000, "~no-such-user/model"])
def test_what_cannot_be_looked_at(name):
    assert " cannot be read: " in message(name)


def test_a_model_without_a_name():
    assert "the model has no name" in message("")


def test_a_file_is_no_directory(directory):
    assert "is a file; name the directory" in message(directory / SINGLE)


def test_hub_id_when_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "owner/model is no local directory, and from the Hugging Face hub: the hub cannot be reached" in message(
        "owner/model"
    )


def response(status: int) -> SimpleNamespace:
    """What the hub's errors read of a response, whichever HTTP client made it."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


class Timeout(Exception):
    """Stands for the HTTP client's own errors, which derive from no common class."""


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (hub_errors.GatedRepoError("403", response=response(403)), "it is gated: accept its terms"),
        (hub_errors.RepositoryNotFoundError("404", response=response(404)), "there is no such model on the hub"),
        (hub_errors.HfHubHTTPError("502 Bad Gateway\nmore", response=response(502)), "the download failed: 502 Bad"),
        (Timeout("timed out"), "the download failed: timed out"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_hub_errors(monkeypatch, raised, text):
    def snapshot_download(*args, **kwargs):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert text in message("owner/model")


def test_no_demo(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "DEMO", tmp_path / "demo")
    assert message("demo").startswith(f"model demo: {tmp_path / 'demo'} lacks config.json, generation_config.json, ")


@pytest.mark.parametrize(
    "pattern",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        INDEX,
        "model-00001-of-*.safetensors",
    ],
)
def test_a_file_of_the_demo_is_missing(monkeypatch, tmp_path, pattern):
    (absent,) = DEMO.glob(pattern)
    for path in DEMO.iterdir():
        if path != absent:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(source, "DEMO", tmp_path)
    text = message("demo")
    assert str(tmp_path) in text
    assert absent.name in text


def test_hub_download_takes_only_what_is_needed(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(tmp_path)
    )
    small = ["*.json", "*.jinja", "merges.txt"]
    assert resolve("owner/model") == tmp_path
    assert asked == {"name": "owner/model", "allow_patterns": [*small, "*.safetensors"]}
    assert resolve("owner/model", weights=False) == tmp_path
    assert asked == {"name": "owner/model", "allow_patterns": small}

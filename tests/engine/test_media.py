"""What the options of an LLM let the images of its requests be read from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from qwen3vl_moe import LLM
from qwen3vl_moe.errors import OptionError, PromptError


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of pictures; the weights of the model are not loaded."""
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
        Image.new("RGBA", (64, 64)).save(tmp_path / name / "clear.png")
    monkeypatch.setattr("qwen3vl_moe.engine.llm.Engine", lambda *_: SimpleNamespace(max_model_len=1000))
    made = SimpleNamespace(moe="tma", device=torch.device("cpu"), dtype=torch.float32)
    monkeypatch.setattr("qwen3vl_moe.engine.llm.load_model", lambda *_, **__: made)
    return tmp_path


def pixels(llm: LLM, source) -> set[int]:
    item = {"type": "image", "image": str(source)}
    (image,) = llm.processor.chat([{"role": "user", "content": [item]}]).images
    return set(image.picture.pixels.flatten().tolist())


def test_no_limits_and_white_by_default(pictures):
    llm = LLM("demo")
    assert pixels(llm, pictures / "inside" / "clear.png") == pixels(llm, pictures / "outside" / "clear.png") == {255}


def test_limits(pictures):
    options = {"media_root": pictures / "inside", "allow_hosts": "a.example", "allow_private_hosts": False}
    llm = LLM("demo", alpha="drop", **options)
    assert pixels(llm, pictures / "inside" / "clear.png") == {0}
    for source, message in (
        (pictures / "outside" / "clear.png", "is not within media_root"),
        ("http://b.example/a.png", "the host 'b.example' is not one of allow_hosts"),
    ):
        with pytest.raises(PromptError, match=message):
            pixels(llm, source)
    with pytest.raises(PromptError, match="an address of this machine or of a private network"):
        pixels(LLM("demo", allow_private_hosts=False), "http://127.0.0.1/a.png")


@pytest.mark.parametrize("options", [{"media_root": "/not/there"}, {"allow_hosts": ["a:1"]}, {"alpha": "black"}])
def test_wrong_limits(pictures, options):
    with pytest.raises(OptionError, match="|".join(options)):
        LLM("demo", **options)
